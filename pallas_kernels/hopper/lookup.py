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


class Replay:
  """`take` of a function that is called twice, first for what it finds, and then to be differentiated, which `take` cannot be."""

  def __init__(self, take: Any):
    self.take, self.found, self.ready = take, [], False

  def __call__(self, table: leaves.Table, index: Any) -> Any:
    if not self.ready:
      self.found.append(self.take(table, index))
      return self.found[-1]
    value = self.found.pop(0)
    self.found.append(value)
    return value


def interpreted(table: leaves.Table, index: Any) -> Any:
  """The same in plain JAX, for the interpreter."""
  return table.ref[table.at][index]
