"""From the shape of a logits' array to its part of a tile, in registers.

Such an array is `[B|1, N|1, T|1, S|1]`, and a size of one broadcasts. Here everything that varies within a tile is spread over the
whole of it: registers hold what differs between threads and nothing twice, and all further arithmetic is elementwise, on
tiles of scores and on tiles of transposed scores alike. Arrays with further axes are tables to look things up in; they stay in
global memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA


class Window(NamedTuple):
  """The part of the scores that one warpgroup holds, `[rows, columns]` or, transposed, `[columns, rows]`."""

  batch: Any
  head: Any
  row: Any  # the first query
  column: Any  # the first key
  rows: int
  columns: int
  transposed: bool = False

  @property
  def shape(self) -> tuple[int, int]:
    return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

  def numbers(self, interpreted: bool) -> tuple[Any, Any]:
    """Row and column numbers of all scores."""
    starts = (self.column, self.row) if self.transposed else (self.row, self.column)
    down = starts[0] + plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=WGMMA)
    count = lambda x: x + plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=WGMMA)
    across = count(starts[1]) if interpreted else _count_across(self.shape, self.everywhere(starts[1]))
    return (across, down) if self.transposed else (down, across)

  def along_rows(self, x: Any) -> Any:
    """A value for each query, `[rows]`, spread over the window."""
    return lax.broadcast_in_dim(x, self.shape, [int(self.transposed)])

  def along_columns(self, x: Any) -> Any:
    """A value for each key, `[columns]`, likewise."""
    return lax.broadcast_in_dim(x, self.shape, [1 - int(self.transposed)])

  def everywhere(self, x: Any) -> Any:
    """One value."""
    return lax.broadcast_in_dim(x, self.shape, [])


def _count_across(shape: tuple[int, int], start: Any) -> Any:
  """start + column, one addition of a constant for each.

  Written as a sum with an iota, the compiler keeps all columns of the iota in registers through a loop over tiles, to spare
  these additions: 68 registers' worth of spills in a backward pass of width 256.
  """
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, vector

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(shape),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=WGMMA))
  def count(context, start):
    del context
    i32 = ir.IntegerType.get_signless(32)
    iota = mgpu.FragmentedArray.broadcasted_iota(i32, shape, 1, mgpu.WGMMA_LAYOUT, is_signed=True)
    pair = iota.registers.flat[0].type  # the first of each 8 columns that a thread holds
    first = arith.addi(iota.registers.flat[0], vector.broadcast(pair, start.registers.item()))
    registers = iota.registers.copy()
    for at in np.ndindex(registers.shape):
      offset = arith.constant(pair, ir.DenseElementsAttr.get_splat(pair, ir.IntegerAttr.get(i32, 8 * at[1])))
      registers[at] = arith.addi(first, offset)
    return mgpu.FragmentedArray(_registers=registers, _layout=iota.layout, _is_signed=True)

  return count(start)


def runs_along(x: Any) -> tuple[bool, bool, bool, bool]:
  """Whether an array is cut along (batch, heads, queries, keys)."""
  return tuple(n > 1 for n in x.shape[:4])  # type: ignore[return-value]


class Table(NamedTuple):
  """A table in global memory, `[B|1, N|1, n]`, at the batch element and head that are computed."""

  ref: Any
  at: tuple[Any, Any]
  shape: tuple[int, ...]  # before `store`


def store(x: Any, sides: tuple[int, int], transposed: bool = False) -> Any:
  """The array as kernels want it in memory: 32 bits wide where that costs little, filled up to whole tiles.

  Args:
    x: `[B|1, N|1, T|1, S|1, …]`.
    sides: multiples to which queries and keys are filled up.
    transposed: whether the keys come before the queries where an array runs along both.
  """
  wide = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32
  if x.ndim > 4:
    return x.reshape(*x.shape[:2], -1).astype(wide)
  _, _, queries, keys = runs_along(x)
  if x.dtype == jnp.bool_ and queries and keys:
    x = x.astype(jnp.int8)
  elif not (queries and keys and x.dtype in (jnp.bfloat16, jnp.float16, jnp.int8)):
    x = x.astype(wide)
  missing = [-n % side if n > 1 else 0 for n, side in zip(x.shape[2:], sides)]
  if any(missing):
    x = jnp.pad(x, [(0, 0), (0, 0), *((0, n) for n in missing)])
  if queries and keys:
    return x.swapaxes(2, 3) if transposed else x
  return x.reshape(*x.shape[:2], -1)


def tile(x: Any, ref: Any, window: Window) -> Any:
  """What a kernel computes with, all of the window's shape, 32 bits wide; a scalar where nothing varies, a table as it is.

  Args:
    x: the array before `store`.
    ref: the whole array after it.
  """
  batches, heads, queries, keys = runs_along(x)
  at = window.batch if batches else 0, window.head if heads else 0
  if x.ndim > 4:
    return Table(ref, at, x.shape)
  rows, columns = pl.ds(window.row, window.rows), pl.ds(window.column, window.columns)
  if queries and keys:
    place = (columns, rows) if window.transposed else (rows, columns)
    loaded = plgpu.load(ref.at[(*at, *place)], layout=WGMMA, optimized=False)
    return loaded if jnp.dtype(loaded.dtype).itemsize == 4 else loaded.astype(
        jnp.float32 if jnp.issubdtype(loaded.dtype, jnp.floating) else jnp.int32)
  if not queries and not keys:
    return ref[(*at, 0)]
  along_last_axis = keys != window.transposed
  loaded = plgpu.load(ref.at[(*at, rows if queries else columns)], layout=WGMMA.reduce(0 if along_last_axis else 1),
                      optimized=False)
  return window.along_rows(loaded) if queries else window.along_columns(loaded)
