"""Cutting a problem's arrays into tiles in plain JAX, and walking over those that the schedule lists."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import products, schedule

from ._logits import Logits
from ._plan import Plan
from ._problem import Problem


class Chunk(NamedTuple):
  """Which batch elements, kv heads, and list of visits are being computed (first numbers; the sizes are static)."""

  batch: Any
  kv_head: Any
  codes: Any  # [visits]
  starts: Any  # [query tiles + 1]


class Walk:
  """One pass over a problem, in chunks of `Bc` batch elements and `Kc` kv heads and in tiles of rows and columns.

  It holds sizes and no arrays. Arrays are filled up with zeros to whole tiles. A tile of scores has shape
  `[Bc, Kc, G, rows, columns]`.
  """

  def __init__(self, problem: Problem, plan: Plan):
    self.plan = plan
    self.sizes = problem.queries, problem.keys
    self.counts = tuple(-(-size // tile) for size, tile in zip(self.sizes, plan.tiles))
    self.batch, self.kv_heads, self.groups = problem.batch, problem.kv_heads, problem.groups
    self.dtype = problem.dtype
    self.precision = lax.Precision.HIGHEST if problem.q.dtype == jnp.float32 else None
    self.structure = jax.tree.structure(problem.logits)
    self.product = problem.product

  @property
  def algebra(self) -> products.Algebra:
    return products.Algebra(
        nt=functools.partial(self.dot, "bkgth,bksh->bkgts"), nn=functools.partial(self.dot, "bkgts,bksh->bkgth"),
        tn=functools.partial(self.dot, "bkgts,bkgth->bksh"), lay_down=lambda x: x[:, :, None].swapaxes(-1, -2),
        over_rows=lambda s: s.sum((2, 3))[..., None])

  def widened(self) -> Walk:
    """The same walk over tiles that are all converted to the dtype of the scores."""
    wide = copy.copy(self)
    wide.plan = dataclasses.replace(self.plan, widen=True)
    wide.precision = lax.Precision.HIGHEST
    return wide

  def arrays(self, problem: Problem) -> tuple[Any, Any, Any, list[Any]]:
    """q, k, v and the arrays of the logits, filled up to whole tiles."""
    both = lambda x: functools.reduce(lambda y, side: y if y.shape[side + 2] == 1 else self.fill(y, side, side + 2), (0, 1), x)
    return (self.fill(problem.q, 0), self.fill(problem.k, 1), self.fill(problem.v, 1),
            [both(x) for x in jax.tree.leaves(problem.logits)])

  def fill(self, x: Any, side: int, axis: int = 1, value: float = 0) -> Any:
    """Fills an axis that runs along the queries (side 0) or the keys (side 1) up with `value` to whole tiles."""
    missing = -x.shape[axis] % self.plan.tiles[side]
    pad = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, pad, constant_values=value) if missing else x

  def dot(self, spec: str, a: Any, b: Any) -> Any:
    return jnp.einsum(spec, a, b, precision=self.precision, preferred_element_type=self.dtype)

  # Walking ------------------------------------------------------------------------------------------------------------

  def each_row(self, visits: schedule.Visits, body: Callable[[Chunk, Any, Any], Any], init: Any) -> Any:
    """`body(chunk, query tile, carry) -> carry` over all chunks and all query tiles."""
    batch, heads = self.plan.chunk
    lists, kv_lists = visits.codes.shape[:2]

    def each_chunk(number, carry):
      b, h = number // (self.kv_heads // heads) * batch, number % (self.kv_heads // heads) * heads
      pick = lambda x: x[b if lists > 1 else 0, h if kv_lists > 1 else 0]
      chunk = Chunk(b, h, pick(visits.codes), pick(visits.starts))
      return _loop(self.counts[0], functools.partial(body, chunk), carry)

    return _loop((self.batch // batch) * (self.kv_heads // heads), each_chunk, init)

  def each_visit(self, chunk: Chunk, i: Any, body: Callable[[Any, Any, Any], Any], init: Any) -> Any:
    """`body(key tile, kind, carry) -> carry` over the key tiles that query tile i visits."""
    step = lambda n, carry: body(schedule.inner(chunk.codes[n]), schedule.kind(chunk.codes[n]), carry)
    return lax.fori_loop(chunk.starts[i], chunk.starts[i + 1], step, init)

  # Tiles of q, k, v and their like ------------------------------------------------------------------------------------

  def rows(self, x: Any, chunk: Chunk, i: Any) -> Any:
    """Query tile i of `[B, T, N, H]` as `[Bc, Kc, G, rows, H]`."""
    (batch, heads), size = self.plan.chunk, self.plan.tiles[0]
    x = lax.dynamic_slice(x, _start(chunk.batch, i * size, chunk.kv_head * self.groups, 0),
                          (batch, size, heads * self.groups, x.shape[3]))
    return self._widen(x.reshape(batch, size, heads, self.groups, -1).transpose(0, 2, 3, 1, 4))

  def columns(self, x: Any, chunk: Chunk, j: Any) -> Any:
    """Key tile j of `[B, S, K, H]` as `[Bc, Kc, columns, H]`."""
    (batch, heads), size = self.plan.chunk, self.plan.tiles[1]
    x = lax.dynamic_slice(x, _start(chunk.batch, j * size, chunk.kv_head, 0), (batch, size, heads, x.shape[3]))
    return self._widen(x.transpose(0, 2, 1, 3))

  def _widen(self, x: Any) -> Any:
    return x.astype(self.dtype) if self.plan.widen else x

  def put_rows(self, buffer: Any, x: Any, chunk: Chunk, i: Any) -> Any:
    """Writes `[Bc, Kc, G, rows, H]` into query tile i of `[B, T, N, H]`."""
    batch, heads, groups, size, width = x.shape
    x = x.transpose(0, 3, 1, 2, 4).reshape(batch, size, heads * groups, width).astype(buffer.dtype)
    return lax.dynamic_update_slice(buffer, x, _start(chunk.batch, i * size, chunk.kv_head * groups, 0))

  def add_columns(self, buffer: Any, x: Any, chunk: Chunk, j: Any) -> Any:
    """Adds `[Bc, Kc, columns, H]` to key tile j of `[B, S, K, H]`."""
    x = x.transpose(0, 2, 1, 3)
    start = _start(chunk.batch, j * x.shape[1], chunk.kv_head, 0)
    return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, start, x.shape) + x, start)

  # Tiles of the logits ------------------------------------------------------------------------------------------------

  def leaf(self, x: Any, chunk: Chunk, i: Any, j: Any) -> Any:
    """Tile (i, j) of an array of the logits, `[Bc|1, Kc|1, G|1, rows|1, columns|1, …]`, floats in the scores' dtype."""
    start, size = self._leaf_slice(x, chunk, i, j)
    x = lax.dynamic_slice(x, start, size)
    x = x.reshape(size[0], *((1, 1) if size[1] == 1 else (self.plan.chunk[1], self.groups)), *size[2:])
    return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  def _leaf_slice(self, x: Any, chunk: Chunk, i: Any, j: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Start and size of a tile of `[B|1, N|1, T|1, S|1, …]`."""
    (batch, heads), (rows, columns) = self.plan.chunk, self.plan.tiles
    cut = (chunk.batch, batch), (chunk.kv_head * self.groups, heads * self.groups), (i * rows, rows), (j * columns, columns)
    start = [(0 if n == 1 else first) for n, (first, _) in zip(x.shape, cut)]
    size = [(1 if n == 1 else length) for n, (_, length) in zip(x.shape, cut)]
    return _start(*start, *(0,) * (x.ndim - 4)), (*size, *x.shape[4:])

  def add_leaf(self, buffer: Any, x: Any, chunk: Chunk, i: Any, j: Any) -> Any:
    """Adds a tile `[Bc|1, Kc|1, G|1, rows|1, columns|1]` to `[B|1, N|1, T|1, S|1]`."""
    start, size = self._leaf_slice(buffer, chunk, i, j)
    return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, start, size) + x.reshape(size), start)

  def scores(self, leaves: list[Any], qk: Any, chunk: Chunk, i: Any, j: Any, masked: bool) -> Any:
    """The scores of tile (i, j), given that tile's leaves."""
    logits: Logits = jax.tree.unflatten(self.structure, leaves)
    (batch, heads), (rows, columns) = self.plan.chunk, self.plan.tiles
    iota = lambda size, axis: lax.broadcasted_iota(jnp.int32, tuple(size if a == axis else 1 for a in range(5)), axis)
    head = (chunk.kv_head + iota(heads, 1)) * self.groups + iota(self.groups, 2)
    row, column = i * rows + iota(rows, 3), j * columns + iota(columns, 4)
    # Rows past the end count as well: their q is 0, and 0 times a key that is not finite would reach dK and dV.
    edges = [n < size for n, size, tile in ((row, self.sizes[0], rows), (column, self.sizes[1], columns)) if size % tile]
    inside = functools.reduce(jnp.logical_and, edges) if edges else None
    return logits.scores(qk, logits.coordinates(chunk.batch + iota(batch, 0), head, row, column, _take), masked, inside)

  def drop(self, leaves: list[Any], x: Any) -> Any:
    """Dropout of a tile of weights, or of what multiplies them, given that tile's leaves."""
    return jax.tree.unflatten(self.structure, leaves).drop(x)


def _take(table: Any, index: Any) -> Any:
  """`table[…, index]` with a table `[Bc|1, Kc|1, G|1, 1, 1, 1, n]` and an index that broadcasts to a tile."""
  lead, n = table.shape[:3], table.shape[-1]
  which = jnp.arange(math.prod(lead), dtype=np.int32).reshape(*lead, 1, 1) * n
  return jnp.take(table.reshape(-1), which + index, mode="clip")


def _start(*indices: Any) -> tuple[Any, ...]:
  """Where a slice starts; JAX wants all of it in one dtype, and Python's integers are int64 where x64 is on."""
  return tuple(lax.convert_element_type(index, np.int32) for index in indices)


def _loop(count: int, body: Callable[[Any, Any], Any], init: Any) -> Any:
  """`fori_loop` from 0 that counts in int32, as schedules do, also where JAX's integers have 64 bits."""
  return lax.fori_loop(np.int32(0), np.int32(count), body, init)


def by_kind(plan: Plan, kind: Any, compute: Callable, nothing: Callable, *args: Any) -> Any:
  """`compute(masked, *args)` for a partial or full tile, `nothing(*args)` for an empty one; only for kinds that may occur."""
  branches = [nothing] + [functools.partial(compute, possible == schedule.PARTIAL) for possible in plan.kinds]
  number = sum(((kind == possible) * np.int32(n) for n, possible in enumerate(plan.kinds, 1)), np.int32(0))
  return lax.switch(number, branches, *args)
