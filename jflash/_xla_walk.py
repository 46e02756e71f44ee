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
  """Which batch elements, kv heads, and lists of visits are being computed (first numbers; the sizes are static)."""

  batch: Any
  kv_head: Any
  visits: schedule.RowVisits  # without leading axes


Columns = tuple[Any, ...]  # numbers of the key tiles that are computed in one step


class Walk:
  """One pass over a problem, in chunks of `Bc` batch elements and `Kc` kv heads and in tiles of rows and columns.

  It holds sizes and no arrays. Arrays that it cuts are filled up with zeros to whole tiles. Along the queries they are
  `[B, T, N, H]`, as each of their tiles is cut once; along the keys they have the heads in front, `[B, K, S, H]`, unless there is
  one tile of queries only, or `Plan.in_place`. A tile of scores has shape `[Bc, Kc, G, rows, columns]`.
  """

  def __init__(self, problem: Problem, plan: Plan):
    self.plan = plan
    self.sizes = problem.queries, problem.keys
    self.counts = tuple(-(-size // tile) for size, tile in zip(self.sizes, plan.tiles))
    self.heads_first = self.counts[0] > 1 and not plan.in_place  # along the keys
    self.batch, self.kv_heads, self.groups = problem.batch, problem.kv_heads, problem.groups
    self.dtype = problem.dtype
    self.precision = lax.Precision.HIGHEST if problem.q.dtype == jnp.float32 else None
    self.structure = jax.tree.structure(problem.logits)
    self.product = problem.product

  @property
  def algebra(self) -> products.Algebra:
    return products.Algebra(
        nt=lambda q, k: self._dot("nth,nsh->nts", stacked(q), _stack(k)).reshape(*q.shape[:4], -1),
        nn=self.weigh,
        tn=lambda s, q: self.tn(s, turn(q)), lay_down=lambda x: x[:, :, None].swapaxes(-1, -2),
        over_rows=lambda s: s.sum((2, 3))[..., None])

  def weigh(self, s: Any, k: Any) -> Any:
    """s k for a tile of scores, or for what `stacked` makes of one."""
    flat = s if s.ndim == 3 else stacked(self._settled(s))
    return self._dot("nts,nsh->nth", flat, _stack(k)).reshape(*s.shape[:-1], -1)

  def apart_heads(self, x: Any) -> Any:
    """`[Bc · Kc, G · rows, n]` as `[Bc, Kc, G, rows, n]`."""
    return x.reshape(*self.plan.chunk, self.groups, -1, x.shape[-1])

  def tn(self, s: Any, turned: Any) -> Any:
    """sᵀ q with q as `turn` has it: (qᵀ s)ᵀ, as XLA's CPU compiler takes twice as long for sᵀ as for the smaller qᵀ."""
    x = self._dot("nht,nts->nhs", _stack(turned), stacked(self._settled(s)))
    return x.reshape(*s.shape[:2], -1, s.shape[-1]).swapaxes(-1, -2)

  def row_dot(self, a: Any, b: Any) -> Any:
    """Σ a ∘ b over the last axis: with JAX 0.10 on CPUs the sum of a product is a call that takes ten times as long."""
    return jnp.einsum("...h,...h->...", a, b, precision=lax.Precision.HIGHEST) if self.plan.as_bits else jnp.sum(a * b, axis=-1)

  def _dot(self, spec: str, a: Any, b: Any) -> Any:
    """Of stacks of matrices; with one more axis, of size one, XLA's CPU compiler would mix a copy into what follows."""
    return jnp.einsum(spec, a, b, precision=self.precision, preferred_element_type=self.dtype)

  def _settled(self, s: Any) -> Any:
    """Weights in a narrower dtype, rounded apart: as part of a change of shape XLA's CPU compiler rounds them slowly."""
    return s if s.dtype == self.dtype else lax.optimization_barrier(s)

  def widened(self) -> Walk:
    """The same walk over tiles that are all converted to the dtype of the scores."""
    wide = copy.copy(self)
    wide.plan = dataclasses.replace(self.plan, widen=True)
    wide.precision = lax.Precision.HIGHEST
    return wide

  def arrays(self, problem: Problem) -> tuple[Any, Any, Any, list[Any]]:
    """q, k, v and the arrays of the logits, as they are cut."""
    both = lambda x: functools.reduce(lambda y, side: y if y.shape[side + 2] == 1 else self.fill(y, side, side + 2), (0, 1), x)
    return (self.fill(problem.q, 0), self.along_columns(problem.k), self.along_columns(problem.v),
            [both(x) for x in jax.tree.leaves(problem.logits)])

  def along_columns(self, x: Any) -> Any:
    """`[B, S, K, width]` as it is cut into columns."""
    x = self._seen(self.fill(x, 1))
    return laid_out(x) if self.heads_first else x

  def keys(self, x: Any) -> Any:
    """What `along_columns` gives as `[B, S, K, width]`."""
    return self._seen(x)[:, :self.sizes[1]]

  def summed_columns(self, x: Any) -> Any:
    """What `add_columns` has summed, as `along_columns` has it."""
    return laid_out(self._seen(x.transpose(0, 3, 1, 2)))

  def _seen(self, x: Any) -> Any:
    return x.swapaxes(1, 2) if self.heads_first else x

  def fill(self, x: Any, side: int, axis: int = 1, value: float = 0) -> Any:
    """Fills an axis that runs along the queries (side 0) or the keys (side 1) up with `value` to whole tiles."""
    missing = -x.shape[axis] % self.plan.tiles[side]
    pad = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, pad, constant_values=value) if missing else x

  # Walking ------------------------------------------------------------------------------------------------------------

  def each_row(self, visits: schedule.RowVisits, body: Callable[[Chunk, Any, Any], Any], init: Any) -> Any:
    """`body(chunk, query tile, carry) -> carry` over all chunks and all query tiles."""
    batch, heads = self.plan.chunk
    lists, kv_lists = visits.tiles.shape[:2]

    def each_chunk(number, carry):
      b, h = number // (self.kv_heads // heads) * batch, number % (self.kv_heads // heads) * heads
      chunk = Chunk(b, h, jax.tree.map(lambda x: x[b if lists > 1 else 0, h if kv_lists > 1 else 0], visits))
      return _loop(self.counts[0], functools.partial(body, chunk), carry)

    return _loop((self.batch // batch) * (self.kv_heads // heads), each_chunk, init)

  def each_visit(self, chunk: Chunk, i: Any, body: Callable[[Columns, bool, Any], Any], init: Any) -> Any:
    """`body(key tiles, masked, carry) -> carry` over the key tiles that query tile i visits, those that are masked first."""
    if self.plan.one_visit:
      return body((np.int32(0),), self.plan.kinds[0] == schedule.PARTIAL, init)
    visits = chunk.visits
    first, end = _at(visits.starts, i), _at(visits.starts, i + 1)
    middle = first + _at(visits.partial, i)
    for kind, start, stop, together in ((schedule.PARTIAL, first, middle, 1), (schedule.FULL, middle, end, self.plan.together)):
      if kind in self.plan.kinds:
        # Numbers are looked up one step before: XLA's CPU compiler would do it again for each element of the mask.
        numbers = lambda step, first=start, many=together: tuple(
            _at(visits.tiles, first + step * many + place) for place in range(many))
        visit = lambda step, at, masked=kind == schedule.PARTIAL, numbers=numbers: (numbers(step + 1), body(at[0], masked, at[1]))
        _, init = lax.fori_loop(np.int32(0), lax.div(stop - start, np.int32(together)), visit, (numbers(0), init))
    return init

  def apart(self, j: Columns, compute: Callable, nothing: Callable, *args: Any) -> Any:
    """`compute(*args)`, for distances in a branch that is always taken.

    XLA's CPU compiler does not reach across one: elsewhere it fuses cutting a tile out with the arithmetic on it, which then is not
    vectorised (five times slower). With JAX 0.12 an optimization barrier does the same, with 0.10 it does not.
    """
    return compute(*args) if self.product is products.Dot else lax.cond(j[0] >= 0, compute, nothing, *args)

  # Tiles of q, k, v and their like ------------------------------------------------------------------------------------

  def rows(self, x: Any, chunk: Chunk, i: Any) -> Any:
    """Query tile i of `[B, T, N, H]`, `[Bc, Kc, G, rows, H]`."""
    (batch, heads), size = self.plan.chunk, self.plan.tiles[0]
    start = _start(chunk.batch, i * size, chunk.kv_head * self.groups, 0)
    x = self._cut(x, start, (batch, size, heads * self.groups, x.shape[-1]))
    return self._widen(laid_out(x.reshape(batch, size, heads, self.groups, -1).transpose(0, 2, 3, 1, 4)))

  def columns(self, x: Any, chunk: Chunk, j: Columns) -> Any:
    """Key tiles j of what `along_columns` gives, `[Bc, Kc, columns, H]`."""
    (batch, heads), size = self.plan.chunk, self.plan.tiles[1]

    def cut(n):
      if self.heads_first:
        return self._cut(x, _start(chunk.batch, chunk.kv_head, n * size, 0), (batch, heads, size, x.shape[-1]))
      tile = self._cut(x, _start(chunk.batch, n * size, chunk.kv_head, 0), (batch, size, heads, x.shape[-1])).swapaxes(1, 2)
      return laid_out(tile) if self.plan.in_place else tile

    return self._widen(_side_by_side([cut(n) for n in j], 2))

  def _cut(self, x: Any, start: tuple[Any, ...], size: tuple[int, ...]) -> Any:
    """A slice, of bfloat16 as integers where `Plan.as_bits`.

    XLA's CPU compiler of JAX 0.10 cuts no bfloat16: it converts all of `x` to float32, and that before the loop. So it would with
    the integers, if `x` did not pass a barrier together with the place, which changes.
    """
    if not self.plan.as_bits or x.dtype != jnp.bfloat16 or size == x.shape:
      return _slice(x, start, size)
    x, start = lax.optimization_barrier((x, start))
    x = _slice(lax.bitcast_convert_type(x, jnp.uint16), start, size)
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.bfloat16)

  def _widen(self, x: Any) -> Any:
    return x.astype(self.dtype) if self.plan.widen else x

  def row_buffer(self, width: int, dtype: Any) -> Any:
    """Zeros that `put_rows` fills with `[B, T, N, width]`, T filled up to whole tiles."""
    return jnp.zeros((self.batch, self.counts[0] * self.plan.tiles[0], self.kv_heads * self.groups, width), dtype)

  def put_rows(self, buffer: Any, x: Any, chunk: Chunk, i: Any) -> Any:
    """Writes `[Bc, Kc, G, rows, H]` into query tile i of a `row_buffer`."""
    batch, heads, groups, size, width = x.shape
    x = x.transpose(0, 3, 1, 2, 4).reshape(batch, size, heads * groups, width).astype(buffer.dtype)
    return _update(buffer, x, _start(chunk.batch, i * size, chunk.kv_head * groups, 0))

  def add_columns(self, buffer: Any, x: Any, chunk: Chunk, j: Columns) -> Any:
    """Adds `[Bc, Kc, columns, H]` to key tiles j of `[B, K, H, S]`, in which `tn` has it."""
    for n, tile in zip(j, jnp.split(x.swapaxes(-1, -2), len(j), axis=-1)):
      buffer = _add(buffer, tile, _start(chunk.batch, chunk.kv_head, 0, n * tile.shape[-1]))
    return buffer

  # Tiles of the logits ------------------------------------------------------------------------------------------------

  def leaf(self, x: Any, chunk: Chunk, i: Any, j: Columns) -> Any:
    """Tiles (i, j) of an array of the logits, `[Bc|1, Kc|1, G|1, rows|1, columns|1, …]`, floats in the scores' dtype."""
    tiles = []
    for n in j[:1] if x.shape[3] == 1 else j:
      start, size = self._leaf_slice(x, chunk, i, n)
      tiles.append(lax.optimization_barrier(self._cut(x, start, size)))  # or it would be cut for each element, with JAX 0.12
    x = _side_by_side(tiles, 3)
    x = x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (self.plan.chunk[1], self.groups)), *x.shape[2:])
    return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  def _leaf_slice(self, x: Any, chunk: Chunk, i: Any, n: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Start and size of a tile of `[B|1, N|1, T|1, S|1, …]`."""
    (batch, heads), (rows, columns) = self.plan.chunk, self.plan.tiles
    cut = (chunk.batch, batch), (chunk.kv_head * self.groups, heads * self.groups), (i * rows, rows), (n * columns, columns)
    start = [(0 if n == 1 else first) for n, (first, _) in zip(x.shape, cut)]
    size = [(1 if n == 1 else length) for n, (_, length) in zip(x.shape, cut)]
    return _start(*start, *(0,) * (x.ndim - 4)), (*size, *x.shape[4:])

  def add_leaf(self, buffer: Any, x: Any, chunk: Chunk, i: Any, j: Columns) -> Any:
    """Adds tiles `[Bc|1, Kc|1, G|1, rows|1, columns|1]` to `[B|1, N|1, T|1, S|1]`."""
    j = j[:1] if buffer.shape[3] == 1 else j
    for n, tile in zip(j, jnp.split(x, len(j), axis=-1)):
      start, size = self._leaf_slice(buffer, chunk, i, n)
      buffer = _add(buffer, tile.reshape(size), start)
    return buffer

  def scores(self, leaves: list[Any], qk: Any, chunk: Chunk, i: Any, j: Columns, masked: bool,
             differentiated: bool = True) -> Any:
    """The scores of tiles (i, j), given those tiles' leaves."""
    logits: Logits = jax.tree.unflatten(self.structure, leaves)
    (batch, heads), (rows, columns) = self.plan.chunk, self.plan.tiles
    iota = lambda size, axis: lax.broadcasted_iota(jnp.int32, tuple(size if a == axis else 1 for a in range(5)), axis)
    head = (chunk.kv_head + iota(heads, 1)) * self.groups + iota(self.groups, 2)
    row, column = i * rows + iota(rows, 3), _side_by_side([n * columns + iota(columns, 4) for n in j], 4)
    # Rows past the end count as well: their q is 0, and 0 times a key that is not finite would reach dK and dV.
    edges = [n < size for n, size, tile in ((row, self.sizes[0], rows), (column, self.sizes[1], columns)) if size % tile]
    inside = functools.reduce(jnp.logical_and, edges) if edges else None
    at = logits.coordinates(chunk.batch + iota(batch, 0), head, row, column, _take)
    return logits.scores(qk, at, masked, inside, differentiated)

  def drop(self, leaves: list[Any], x: Any) -> Any:
    """Dropout of a tile of weights, or of what multiplies them, given that tile's leaves."""
    return jax.tree.unflatten(self.structure, leaves).drop(x)


def _side_by_side(tiles: list[Any], axis: int) -> Any:
  return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis)


def _take(table: Any, index: Any) -> Any:
  """`table[…, index]` with a table `[Bc|1, Kc|1, G|1, 1, 1, 1, n]` and an index that broadcasts to a tile."""
  lead, n = table.shape[:3], table.shape[-1]
  which = jnp.arange(math.prod(lead), dtype=np.int32).reshape(*lead, 1, 1) * n
  return jnp.take(table.reshape(-1), which + index, mode="clip")


def turn(x: Any) -> Any:
  """`[Bc, Kc, G, rows, H]` as `[Bc, Kc, H, G · rows]`, for `Walk.tn`."""
  return x.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(-1, -2)


def laid_out(x: Any) -> Any:
  """`[..., m, n]` in memory as it is here: what is only transposed XLA's CPU compiler of JAX 0.12 copies twice, and this once."""
  return lax.optimization_barrier(x.reshape(-1, *x.shape[-2:])).reshape(x.shape)


def _stack(x: Any) -> Any:
  """`[Bc, Kc, m, n]` as matrices one upon the other, `[Bc · Kc, m, n]`."""
  return x.reshape(-1, *x.shape[2:])


def stacked(x: Any) -> Any:
  """`[Bc, Kc, G, rows, n]` as `[Bc · Kc, G · rows, n]`, which XLA's CPU compiler makes the best of."""
  return x.reshape(-1, x.shape[2] * x.shape[3], x.shape[4])


# Places are never negative: that JAX would look for, in each dimension of each slice, takes compile time.
_slice = functools.partial(lax.dynamic_slice, allow_negative_indices=False)
_update = functools.partial(lax.dynamic_update_slice, allow_negative_indices=False)
_at = functools.partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)


def _add(buffer: Any, x: Any, start: tuple[Any, ...]) -> Any:
  return _update(buffer, _slice(buffer, start, x.shape) + x, start)


def _start(*indices: Any) -> tuple[Any, ...]:
  """Where a slice starts; JAX wants all of it in one dtype, and Python's integers are int64 where x64 is on."""
  return tuple(lax.convert_element_type(index, np.int32) for index in indices)


def _loop(count: int, body: Callable[[Any, Any], Any], init: Any) -> Any:
  """`fori_loop` from 0 that counts in int32, as schedules do, also where JAX's integers have 64 bits."""
  if count == 1:
    return body(np.int32(0), init)
  return lax.fori_loop(np.int32(0), np.int32(count), body, init)
