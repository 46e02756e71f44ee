"""Attention in plain JAX, tiled and linear in memory: the CPU backend, and the one that supports everything.

Loops over chunks of (batch, kv head), over query tiles, and over the key tiles that the schedule lists. Tiles have shape
`[Bc, Kc, G, rows, columns]`. One walk serves the three passes: forward, tangent (forward mode) and cotangent (reverse mode).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import schedule, softmax

from ._logits import Logits
from ._plan import Plan, Schedule
from ._problem import Problem


class _Chunk(NamedTuple):
  """Which batch elements, kv heads, and list of visits are being computed (first numbers; the sizes are static)."""

  batch: Any
  kv_head: Any
  codes: Any  # [visits]
  starts: Any  # [query tiles + 1]


class _Walker:
  """Cuts tiles out of a problem's arrays; everything static about the walk."""

  def __init__(self, problem: Problem, plan: Plan):
    self.plan = plan
    self.sizes = problem.queries, problem.keys
    self.groups = problem.groups
    self.dtype = problem.dtype
    self.precision = lax.Precision.HIGHEST if problem.q.dtype == jnp.float32 else None
    pad = lambda x, axis: _pad(x, axis, plan.tiles)
    self.q, self.k, self.v = pad(problem.q, 0), pad(problem.k, 1), pad(problem.v, 1)
    self.logits = jax.tree.map(lambda x: _pad(_pad(x, 0, plan.tiles, 2), 1, plan.tiles, 3), problem.logits)

  def dot(self, spec: str, a: Any, b: Any) -> Any:
    return jnp.einsum(spec, a, b, precision=self.precision, preferred_element_type=self.dtype)

  def rows(self, x: Any, chunk: _Chunk, tile: Any) -> Any:
    """Query rows of `[B, T, N, H]` as `[Bc, Kc, G, rows, H]`."""
    (batch, heads), size = self.plan.chunk, self.plan.tiles[0]
    x = lax.dynamic_slice(x, _start(chunk.batch, tile * size, chunk.kv_head * self.groups, 0),
                          (batch, size, heads * self.groups, x.shape[3]))
    return self._widen(x.reshape(batch, size, heads, self.groups, -1).transpose(0, 2, 3, 1, 4))

  def columns(self, x: Any, chunk: _Chunk, tile: Any) -> Any:
    """Key rows of `[B, S, K, H]` as `[Bc, Kc, columns, H]`."""
    (batch, heads), size = self.plan.chunk, self.plan.tiles[1]
    x = lax.dynamic_slice(x, _start(chunk.batch, tile * size, chunk.kv_head, 0), (batch, size, heads, x.shape[3]))
    return self._widen(x.transpose(0, 2, 1, 3))

  def _widen(self, x: Any) -> Any:
    return x.astype(self.dtype) if self.plan.widen else x

  def put_rows(self, buffer: Any, x: Any, chunk: _Chunk, tile: Any) -> Any:
    """Writes `[Bc, Kc, G, rows, H]` into `[B, T, N, H]`."""
    batch, heads, groups, size, width = x.shape
    x = x.transpose(0, 3, 1, 2, 4).reshape(batch, size, heads * groups, width).astype(buffer.dtype)
    return lax.dynamic_update_slice(buffer, x, _start(chunk.batch, tile * size, chunk.kv_head * groups, 0))

  def add_columns(self, buffer: Any, x: Any, chunk: _Chunk, tile: Any) -> Any:
    """Adds `[Bc, Kc, columns, H]` to `[B, S, K, H]`."""
    x = x.transpose(0, 2, 1, 3)
    start = _start(chunk.batch, tile * x.shape[1], chunk.kv_head, 0)
    return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, start, x.shape) + x, start)

  def _leaf_slice(self, x: Any, chunk: _Chunk, i: Any, j: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Start and size of a tile of `[B|1, N|1, T|1, S|1, …]`."""
    (batch, heads), (rows, columns) = self.plan.chunk, self.plan.tiles
    wanted = ((chunk.batch, batch), (chunk.kv_head * self.groups, heads * self.groups), (i * rows, rows),
              (j * columns, columns))
    start = [(0 if n == 1 else first) for n, (first, _) in zip(x.shape, wanted)]
    size = [(1 if n == 1 else length) for n, (_, length) in zip(x.shape, wanted)]
    return _start(*start, *(0,) * (x.ndim - 4)), (*size, *x.shape[4:])

  def leaf(self, x: Any, chunk: _Chunk, i: Any, j: Any) -> Any:
    """A tile of `[B|1, N|1, T|1, S|1, …]` as `[Bc|1, Kc|1, G|1, rows|1, columns|1, …]`."""
    start, size = self._leaf_slice(x, chunk, i, j)
    x = lax.dynamic_slice(x, start, size)
    x = x.reshape(size[0], *((1, 1) if size[1] == 1 else (self.plan.chunk[1], self.groups)), *size[2:])
    return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  def add_leaf(self, buffer: Any, x: Any, chunk: _Chunk, i: Any, j: Any) -> Any:
    """Adds a tile `[Bc|1, Kc|1, G|1, rows|1, columns|1]` to `[B|1, N|1, T|1, S|1]`."""
    start, size = self._leaf_slice(buffer, chunk, i, j)
    return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, start, size) + x.reshape(size), start)

  def scores(self, logits: Logits, qk: Any, chunk: _Chunk, i: Any, j: Any, masked: bool) -> Any:
    """The scores of tile (i, j); `logits` holds that tile's leaves."""
    (batch, heads), (rows, columns) = self.plan.chunk, self.plan.tiles
    iota = lambda size, axis: lax.broadcasted_iota(jnp.int32, tuple(size if a == axis else 1 for a in range(5)), axis)
    head = (chunk.kv_head + iota(heads, 1)) * self.groups + iota(self.groups, 2)
    row, column = i * rows + iota(rows, 3), j * columns + iota(columns, 4)
    s = logits.scores(qk, logits.coordinates(chunk.batch + iota(batch, 0), head, row, column), masked)
    if masked and self.sizes[1] % columns:
      s = jnp.where(column < self.sizes[1], s, -jnp.inf)
    return s

  def each_chunk(self, problem: Problem, visits: schedule.Visits, body: Any, init: Any) -> Any:
    """`body(chunk, carry) -> carry` over all chunks of batch elements and kv heads."""
    batch, heads = self.plan.chunk
    lists, kv_lists = visits.codes.shape[:2]

    def step(number, carry):
      b, h = number // (problem.kv_heads // heads) * batch, number % (problem.kv_heads // heads) * heads
      pick = lambda x: x[b if lists > 1 else 0, h if kv_lists > 1 else 0]
      return body(_Chunk(b, h, pick(visits.codes), pick(visits.starts)), carry)

    return _loop((problem.batch // batch) * (problem.kv_heads // heads), step, init)


def _pad(x: Any, side: int, tiles: tuple[int, int], axis: int = 1) -> Any:
  """Fills an axis that runs along the queries (side 0) or the keys (side 1) up with zeros to whole tiles."""
  size = x.shape[axis]
  if axis > 1 and size == 1:
    return x
  missing = -size % tiles[side]
  return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing else x


def _start(*indices: Any) -> tuple[Any, ...]:
  """Where a slice starts; JAX wants the indices in one dtype, and Python's own are int64 where x64 is on."""
  return tuple(lax.convert_element_type(index, np.int32) for index in indices)


def _loop(count: int, body: Any, init: Any) -> Any:
  """`fori_loop` from 0 that counts in int32, as schedules do, also where the integers of JAX have 64 bits."""
  return lax.fori_loop(0, count, lambda i, carry: body(lax.convert_element_type(i, np.int32), carry), init)


def _by_kind(code: Any, compute: Any, nothing: Any, *args: Any) -> Any:
  """Runs `compute(masked, *args)` for a partial or full tile, `nothing(*args)` for an empty one."""
  branches = [nothing, functools.partial(compute, True), functools.partial(compute, False)]
  return lax.switch(schedule.kind(code), branches, *args)


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: Plan, visits: Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  walk = _Walker(problem, plan)
  rows = (*plan.chunk, walk.groups, plan.tiles[0])
  batch, padded, heads, _ = walk.q.shape

  def each_row(chunk, i, buffers):
    q = walk.rows(walk.q, chunk, i)

    def visit(n, state):
      j = schedule.inner(chunk.codes[n])

      def compute(masked, state):
        s, v = _tile_scores(walk, chunk, q, i, j, masked), walk.columns(walk.v, chunk, j)
        return softmax.accumulate(state, s, functools.partial(_weigh, walk, s, v, masked))

      return _by_kind(chunk.codes[n], compute, lambda state: state, state)

    state = softmax.start(rows, problem.value_width, walk.dtype)
    out, lse = softmax.finish(lax.fori_loop(chunk.starts[i], chunk.starts[i + 1], visit, state))
    return walk.put_rows(buffers[0], out, chunk, i), walk.put_rows(buffers[1], lse, chunk, i)

  each_chunk = lambda chunk, buffers: _loop(padded // plan.tiles[0], functools.partial(_swap, each_row, chunk), buffers)
  buffers = (jnp.zeros((batch, padded, heads, problem.value_width), problem.v.dtype),
             jnp.zeros((batch, padded, heads, 1), walk.dtype))
  out, lse = walk.each_chunk(problem, visits.rows, each_chunk, buffers)
  return out[:, :problem.queries], lse[:, :problem.queries, :, 0]


def _swap(body: Any, chunk: _Chunk, i: Any, carry: Any) -> Any:
  return body(chunk, i, carry)


def _tile_scores(walk: _Walker, chunk: _Chunk, q: Any, i: Any, j: Any, masked: bool) -> Any:
  qk = walk.dot("bkgth,bksh->bkgts", q, walk.columns(walk.k, chunk, j))
  leaves = jax.tree.map(lambda x: walk.leaf(x, chunk, i, j), walk.logits)
  return walk.scores(leaves, qk, chunk, i, j, masked)


def _weigh(walk: _Walker, s: Any, v: Any, masked: bool, p: Any) -> Any:
  """p V, safe against values that are not finite where the mask hides them."""
  dot = lambda p, v: walk.dot("bkgts,bkse->bkgte", p.astype(v.dtype), v)
  return softmax.weigh_masked(p, s, v, dot) if masked else dot(p, v)


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: Plan, visits: Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`), in one pass with five products a tile."""
  walk = _Walker(problem, plan)
  to_rows = lambda x: _pad(x, 0, plan.tiles)
  lse, dlse = lse[..., None], dlse[..., None]
  dead = lse == -jnp.inf  # saw nothing: every gradient is 0, whatever arrives
  dout = jnp.where(dead, 0, dout)
  products = dout.astype(walk.dtype) * out.astype(walk.dtype)
  delta = to_rows(jnp.where(dead, 0, jnp.sum(products, -1, keepdims=True) - dlse))
  dout, lse = to_rows(dout), to_rows(lse)
  leaves, structure = jax.tree.flatten(walk.logits)
  dq_shape = (*plan.chunk, walk.groups, plan.tiles[0], problem.width)

  def each_row(chunk, i, grads):
    q, do, row_lse, row_delta = (walk.rows(x, chunk, i) for x in (walk.q, dout, lse, delta))
    def visit(n, carry):
      dq, (dk, dv, dleaves) = carry
      j = schedule.inner(chunk.codes[n])
      tiles = [walk.leaf(x, chunk, i, j) for x in leaves]

      def compute(masked):
        k, v = walk.columns(walk.k, chunk, j), walk.columns(walk.v, chunk, j)

        def scores(qk, some):
          some = iter(some)
          filled = [next(some) if w else x for w, x in zip(wanted, tiles)]
          return walk.scores(structure.unflatten(filled), qk, chunk, i, j, masked)

        s, pull = jax.vjp(scores, walk.dot("bkgth,bksh->bkgts", q, k), [x for w, x in zip(wanted, tiles) if w])
        p = softmax.probabilities(s, row_lse)
        clean = softmax.finite if masked else lambda x: x
        ds = softmax.dscores(p, walk.dot("bkgte,bkse->bkgts", do, v), row_delta)
        dqk, dsome = pull(jnp.where(s == -jnp.inf, 0, ds) if masked else ds)
        dqk, p = dqk.astype(q.dtype), p.astype(q.dtype)
        return (walk.dot("bkgts,bksh->bkgth", dqk, clean(k)), walk.dot("bkgts,bkgth->bksh", dqk, clean(q)),
                walk.dot("bkgts,bkgte->bkse", p, do), dsome)

      nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(functools.partial(compute, True)))
      tile_dq, tile_dk, tile_dv, tile_dleaves = _by_kind(chunk.codes[n], compute, nothing)
      return dq + tile_dq, (walk.add_columns(dk, tile_dk, chunk, j), walk.add_columns(dv, tile_dv, chunk, j),
                            [walk.add_leaf(x, y, chunk, i, j) for x, y in zip(dleaves, tile_dleaves)])

    dq, others = lax.fori_loop(chunk.starts[i], chunk.starts[i + 1], visit, (jnp.zeros(dq_shape, walk.dtype), grads[1]))
    return walk.put_rows(grads[0], dq, chunk, i), others

  each_chunk = lambda chunk, grads: _loop(walk.q.shape[1] // plan.tiles[0], functools.partial(_swap, each_row, chunk),
                                                  grads)
  zeros = lambda x, dtype=None: jnp.zeros(x.shape, dtype or walk.dtype)
  grads = zeros(walk.q, problem.q.dtype), (zeros(walk.k), zeros(walk.v), [zeros(x) for w, x in zip(wanted, leaves) if w])
  dq, (dk, dv, dleaves) = walk.each_chunk(problem, visits.rows, each_chunk, grads)
  originals = [x for w, x in zip(wanted, jax.tree.leaves(problem.logits)) if w]
  cut = lambda x, like: x[tuple(slice(n) for n in like.shape)].astype(like.dtype)
  return (cut(dq, problem.q), cut(dk, problem.k), cut(dv, problem.v), [cut(x, y) for x, y in zip(dleaves, originals)])


@functools.partial(jax.jit, static_argnames="plan")
def tangent(problem: Problem, plan: Plan, visits: Schedule, out: Any, lse: Any, dproblem: Problem) -> tuple[Any, Any]:
  """(dout, dlse) for tangents of q, k, v and the float leaves of `logits`; `dproblem` holds zeros for the other leaves.

  dlse = Σ P ∘ dS and dout = (P ∘ dS) V + P dV - dlse · out, by row.
  """
  walk, dwalk = _Walker(problem, plan), _Walker(dproblem, plan)
  rows = (*plan.chunk, walk.groups, plan.tiles[0])
  batch, padded, heads, _ = walk.q.shape
  to_rows = lambda x: _pad(x, 0, plan.tiles)
  lse, out = to_rows(lse[..., None]), to_rows(out)

  def each_row(chunk, i, buffers):
    q, dq, row_lse, row_out = (walk.rows(x, chunk, i) for x in (walk.q, dwalk.q, lse, out))

    def visit(n, carry):
      j = schedule.inner(chunk.codes[n])

      def compute(masked, dlse, dout):
        k, v, dk, dv = (walk.columns(x, chunk, j) for x in (walk.k, walk.v, dwalk.k, dwalk.v))
        times = functools.partial(walk.dot, "bkgth,bksh->bkgts")
        leaves, dleaves = (jax.tree.map(lambda x: w.leaf(x, chunk, i, j), w.logits) for w in (walk, dwalk))
        scores = lambda qk, logits: walk.scores(logits, qk, chunk, i, j, masked)
        s, ds = jax.jvp(scores, (times(q, k), leaves), (times(dq, k) + times(q, dk), _as_tangents(leaves, dleaves)))
        p = softmax.probabilities(s, row_lse)
        pds = p * (jnp.where(s == -jnp.inf, 0, ds) if masked else ds)
        weigh = functools.partial(_weigh, walk, s)
        return dlse + pds.sum(-1, keepdims=True), dout + weigh(v, masked, pds) + weigh(dv, masked, p)

      return _by_kind(chunk.codes[n], compute, lambda *carry: carry, *carry)

    zeros = lambda width: jnp.zeros((*rows, width), walk.dtype)
    dlse, dout = lax.fori_loop(chunk.starts[i], chunk.starts[i + 1], visit, (zeros(1), zeros(problem.value_width)))
    return walk.put_rows(buffers[0], dout - dlse * row_out.astype(walk.dtype), chunk, i), walk.put_rows(buffers[1], dlse, chunk, i)

  each_chunk = lambda chunk, buffers: _loop(padded // plan.tiles[0], functools.partial(_swap, each_row, chunk), buffers)
  buffers = (jnp.zeros((batch, padded, heads, problem.value_width), problem.v.dtype),
             jnp.zeros((batch, padded, heads, 1), walk.dtype))
  dout, dlse = walk.each_chunk(problem, visits.rows, each_chunk, buffers)
  return dout[:, :problem.queries], dlse[:, :problem.queries, :, 0]


def _as_tangents(leaves: Any, tangents: Any) -> Any:
  """Tangents of integer and boolean leaves have JAX's type for no tangent."""
  as_tangent = lambda x, t: t if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)
  return jax.tree.map(as_tangent, leaves, tangents)
