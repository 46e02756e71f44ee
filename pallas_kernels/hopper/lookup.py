"""Reading a table in global memory by an index per score: what `table[bucket(q - k)]` becomes inside a kernel."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import leaves


def take(table: leaves.Table, index: Any) -> Any:
  """`table[index]`, each thread for the scores that it holds; the index is in range."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, memref

  dtype = table.ref.dtype

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), leaves.WGMMA),
                     return_type=plgpu.ShapeDtypeStruct(index.shape, dtype, layout=leaves.WGMMA))
  def gather(context, ref, index):
    del context
    entry = lambda number, _: memref.load(ref, [arith.index_cast(ir.IndexType.get(), number)])
    return index.foreach(entry, create_array=True, is_signed=True if dtype == jnp.int32 else None)

  return gather(table.ref.at[table.at], index)


def interpreted(table: leaves.Table, index: Any) -> Any:
  """The same in plain JAX, for the interpreter."""
  return table.ref[table.at][index]
