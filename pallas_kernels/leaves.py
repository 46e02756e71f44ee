"""From the shape of a logits' array to its block and to its tile inside a TPU kernel.

Such an array is `[B|1, N|1, T|1, S|1]`, and its shape says along which axes it is cut: a size of one is not. Axes past the
fourth belong to the whole problem and stay in one piece. Arrays that run along the queries alone lie in memory as rows,
`[…, 1, T]`: a column would take 128 times the space in the chip's tiled layout.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import softmax

LANES = 128


def runs_along(x: Any) -> tuple[bool, bool, bool, bool]:
  """Whether an array is cut along (batch, heads, queries, keys)."""
  return tuple(n > 1 for n in x.shape[:4])  # type: ignore[return-value]


def store(x: Any) -> Any:
  """The array as kernels want it in memory: a type that the chip loads, queries along the lanes."""
  if x.ndim > 4:
    return x.reshape(*x.shape[:2], *x.shape[4:]).astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
  _, _, queries, keys = runs_along(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.int8 if queries and keys else jnp.int32)
  elif x.dtype != jnp.bfloat16 or not (queries and keys):
    x = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
  return x.swapaxes(2, 3) if queries and not keys else x


def unstore(x: Any, like: Any) -> Any:
  """A gradient from the layout of `store` in that of the array it belongs to."""
  if like.ndim > 4:
    return x.reshape(like.shape)
  _, _, queries, keys = runs_along(like)
  return x.swapaxes(2, 3) if queries and not keys else x


def block(x: Any, tiles: tuple[int, int]) -> tuple[int, int]:
  """The last two sizes of a stored array's block."""
  if x.ndim > 4:
    return x.shape[4:]
  _, _, queries, keys = runs_along(x)
  return (1, tiles[0]) if queries and not keys else (tiles[0] if queries else 1, tiles[1] if keys else 1)


def block_spec(x: Any, tiles: tuple[int, int], where: Any) -> pl.BlockSpec:
  """The block of array `x` (before `store`); `where(*grid)` is the (batch, head, query tile, key tile) of a grid step."""
  batches, heads, queries, keys = runs_along(x)

  def index(*grid):
    b, h, i, j = where(*grid)
    i, j = (i if queries else 0), (j if keys else 0)
    last = (0, 0) if x.ndim > 4 else (0, i) if queries and not keys else (i, j)
    return (b if batches else 0, h if heads else 0, *last)

  return pl.BlockSpec((None, None, *block(x, tiles)), index)


def tile(x: Any, ref: Any, turned: bool = False) -> Any:
  """What a kernel computes with: `[rows|1, columns|1, …]`, 32 bits wide; `[columns|1, rows|1, …]` if `turned`."""
  loaded = ref[...]
  if x.ndim > 4:
    return loaded[None, None]
  _, _, queries, keys = runs_along(x)
  if loaded.dtype in (jnp.int8, jnp.bfloat16):
    loaded = loaded.astype(jnp.int32 if loaded.dtype == jnp.int8 else jnp.float32)
  if queries and keys:
    return loaded.T if turned else loaded
  return column(loaded) if (keys if turned else queries) else loaded


def untile(x: Any, like: Any) -> Any:
  """A gradient from the shape of `tile` in that of the block."""
  if like.ndim > 4:
    return x.reshape(x.shape[2:])
  _, _, queries, keys = runs_along(like)
  return row(x) if queries and not keys else x


def lanes(row: Any) -> Any:
  """`[1, n]` as `[n, 128]`, the same number in all lanes, through a transpose of whole registers."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def column(row: Any) -> Any:
  """`[1, n]` as `[n, 1]`."""
  return lanes(row)[:, :1]


def row(column: Any) -> Any:
  """`[n, 1]`, or `[n, 128]` with the same number in all lanes, as `[1, n]`."""
  return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def spread(x: Any, width: int) -> Any:
  """`[n, 128]` with the same number in all lanes, as `[n, width]`; no lane moves."""
  return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _highest(s: Any) -> Any:
  return jnp.broadcast_to(jnp.max(s, axis=1, keepdims=True), (s.shape[0], LANES))


def _partial_sums(s: Any) -> Any:
  s = jnp.pad(s, ((0, 0), (0, -s.shape[1] % LANES)))
  return functools.reduce(lambda a, b: a + b, [s[:, n:n + LANES] for n in range(0, s.shape[1], LANES)])


# Statistics `[rows, 128]`: a maximum in all lanes, a sum in 128 parts, so that tiles meet them register by register.
ROWS = softmax.Rows(_highest, _partial_sums, spread, lambda total: jnp.sum(total, axis=1, keepdims=True))
