"""Attention in plain JAX, tiled and linear in memory: the CPU backend, and the one that supports everything.

Three passes over the same walk: forward, tangent (forward mode) and cotangent (reverse mode); the latter two are sums over tiles,
which have derivatives of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import products, schedule, softmax

from . import _xla_rows
from ._plan import Plan, WalkSchedule, every_row
from ._problem import Problem
from ._xla_sum import Parts, Place, tile_sum
from ._xla_walk import Chunk, Columns, Walk, laid_out, stacked, turn


def supports(problem: Problem) -> str | None:
  """None: it computes everything."""
  del problem


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: Plan, schedule: WalkSchedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`; with `plan.alone` lse is 0, as nobody asked for it."""
  if plan.alone is not None:
    visits = every_row(problem, plan.alone) if plan.alone.one_visit else schedule.rows
    return _forward(problem, plan.alone, visits, False)[0], jnp.zeros(problem.q.shape[:3], problem.dtype)
  out, lse = _forward(problem, plan, schedule.rows, True)
  return out, lse[..., 0]


def _forward(problem: Problem, plan: Plan, visits: schedule.RowVisits, with_lse: bool) -> list[Any]:
  """`[out [B, T, N, E], lse [B, T, N, 1]]`, or out alone."""
  unit, logits = problem.logits.in_units()
  problem = dataclasses.replace(problem, logits=logits)
  walk = Walk(problem, plan)
  q, *keys = walk.arrays(problem)
  start = softmax.start((*plan.chunk, walk.groups, plan.tiles[0]), problem.value_width, walk.dtype)

  def each_row(chunk, i, buffers):
    row = _Row(walk, unit, logits.plain, _hides(problem), chunk, i, walk.rows(q, chunk, i), keys, buffers)
    if plan.fuses and plan.one_visit:
      return walk.each_visit(chunk, i, row.at_once if with_lse else row.alone, None)
    return row.finished(walk.each_visit(chunk, i, row.online, start))

  outputs = ((problem.value_width, problem.v.dtype), (1, walk.dtype))[:2 if with_lse else 1]
  buffers = walk.each_row(visits, each_row, [walk.row_buffer(*output) for output in outputs])
  return [x[:, :problem.queries] for x in buffers]


class _Row(NamedTuple):
  """A query tile on its way over its key tiles, and the buffers that its results go to."""

  walk: Walk
  unit: float
  plain: bool  # of the logits
  hides: bool
  chunk: Chunk
  i: Any
  q: Any
  keys: list[Any]  # all of k and v, and the arrays of the logits
  buffers: list[Any]

  def finished(self, state: softmax.State) -> list[Any]:
    """The buffers with the results of all visits in them."""
    tiles = softmax.finish(state._replace(m=_rounded(self.unit * state.m)))
    return [self.walk.put_rows(buffer, x, self.chunk, self.i) for buffer, x in zip(self.buffers, tiles)]

  def online(self, j: Columns, masked: bool, state: softmax.State) -> softmax.State:
    """Adds a visit to what has been seen before."""
    k, v, leaves = self._cut(j)

    def compute(state):
      s = self._scores(k, leaves, j, masked)
      weigh = lambda p: _weigh(self.walk, s, v, masked and self.hides, self.walk.drop(leaves, p))
      return softmax.accumulate(state, s, weigh, weight=softmax.powers(self.unit))

    return self.walk.apart(j, compute, lambda state: state, state)

  def at_once(self, j: Columns, masked: bool, _: None) -> list[Any]:
    """The buffers after the only visit."""
    k, v, leaves = self._cut(j)
    s = stacked(self._scores(k, leaves, j, masked))
    m, total, p = _xla_rows.state(s, self.unit)
    end = lambda acc: self.finished(softmax.State(*map(self.walk.apart_heads, (m, total, acc))))
    return _weigh(self.walk, s, v, masked and self.hides, self._drop(leaves, p), end)

  def alone(self, j: Columns, masked: bool, _: None) -> list[Any]:
    """The same without lse."""
    k, v, leaves = self._cut(j)
    s = stacked(self._scores(k, leaves, j, masked))
    s = jax.lax.optimization_barrier(s) if masked else s
    end = lambda out: [self.walk.put_rows(self.buffers[0], self.walk.apart_heads(out), self.chunk, self.i)]
    again = lambda: self._drop(leaves, _xla_rows.normalised(s, self.unit))
    return _weigh(self.walk, s, v, masked and self.hides, again(), end, again)

  def _cut(self, j: Columns) -> tuple[Any, Any, list[Any]]:
    k, v, leaves = self.keys
    columns = lambda x: self.walk.columns(x, self.chunk, j)
    return columns(k), columns(v), [self.walk.leaf(x, self.chunk, self.i, j) for x in leaves]

  def _scores(self, k: Any, leaves: list[Any], j: Columns, masked: bool) -> Any:
    qk = self.walk.product.scores(self.walk.algebra, self.q, k)
    s = self.walk.scores(leaves, qk, self.chunk, self.i, j, masked, differentiated=False)
    return s if self.plain else _rounded(s)

  def _drop(self, leaves: list[Any], p: Any) -> Any:
    return stacked(self.walk.drop(leaves, self.walk.apart_heads(p)))


@functools.partial(jax.jit, static_argnames="plan")
def tangent(problem: Problem, plan: Plan, schedule: WalkSchedule, out: Any, lse: Any, dproblem: Problem) -> tuple[Any, Any]:
  """(dout, dlse) for the tangents of q, k, v and the float arrays of `logits`; `dproblem` holds zeros where there are none.

  By row: dlse = Σ P ∘ dS and dout = (Z ∘ P ∘ dS) V + (Z ∘ P) dV - dlse · out, with Z the factors of dropout.
  """
  walk = Walk(problem, plan)
  (q, k, v, leaves), (dq, dk, dv, dleaves) = walk.arrays(problem), walk.arrays(dproblem)
  moving, hides = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves], _hides(problem)

  def tile(place, masked, tiles):
    q, dq, lse = tiles.rows
    k, v, dk, dv = tiles.columns
    leaves, moved = tiles.leaves[:len(moving)], iter(tiles.leaves[len(moving):])
    moves = [next(moved) if m else np.zeros(x.shape, jax.dtypes.float0) for m, x in zip(moving, leaves)]
    q, dq, k, dk = (softmax.finite(x) if masked and hides else x for x in (q, dq, k, dk))
    s, ds = jax.jvp(functools.partial(_scores, walk, place, masked), (walk.product.scores(walk.algebra, q, k), leaves),
                    (walk.product.tangent(walk.algebra, q, k, dq, dk), moves))
    p = softmax.probabilities(_rounded(s), lse)
    pds = p * jnp.where(s == -jnp.inf, 0, ds)
    weigh = lambda v, p: _weigh(walk, s, v, masked and hides, walk.drop(leaves, p))
    return Parts([weigh(v, pds) + weigh(dv, p), pds.sum(-1, keepdims=True)], [], [])

  rows = [q, dq, walk.fill(lse[..., None], 0, value=-softmax.INF)]
  inputs = Parts(rows, [k, v, dk, dv], leaves + [x for x, m in zip(dleaves, moving) if m])
  weighed, dlse = (x[:, :problem.queries] for x in tile_sum(walk, tile, inputs, schedule.rows).rows)
  return (weighed - dlse * out.astype(walk.dtype)).astype(out.dtype), dlse[..., 0]


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: Plan, schedule: WalkSchedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`), in one pass with five products a tile.

  dS = P ∘ (Z ∘ dO Vᵀ - δ) and dV = (Z ∘ P)ᵀ dO, with Z the factors of dropout.
  """
  walk = Walk(problem, plan)
  q, k, v, leaves = walk.arrays(problem)
  dout, delta = softmax.row_cotangents(out, lse, dout, dlse, walk.row_dot)
  hides = _hides(problem)

  def tile(place, masked, tiles):
    q, dout, lse, delta, turned_q, turned_dout = tiles.rows
    k, v = tiles.columns
    algebra, guard = walk.algebra, masked and hides
    if guard:  # of what is hidden nothing is used, and its derivatives must not be 0 · NaN
      algebra = algebra._replace(nt=softmax.guarded(algebra.nt))
      q, k = (q, k) if walk.product is products.Dot else (softmax.finite(q), softmax.finite(k))
    moving = lambda qk, some: _scores(walk, place, masked, qk, _put(tiles.leaves, wanted, some))
    s, pull = jax.vjp(moving, walk.product.scores(algebra, q, k), [x for w, x in zip(wanted, tiles.leaves) if w])
    # A row that sees a NaN has an lse of NaN, which is not for keys that it does not see.
    seen = lambda x: jnp.where(s == -jnp.inf, 0, x) if masked else x
    p = seen(softmax.probabilities(_rounded(s), lse))
    ds = seen(softmax.dscores(p, seen(walk.drop(tiles.leaves, algebra.nt(dout, v))), delta))
    dqk, dleaves = pull(ds)
    by_key = algebra._replace(tn=lambda s, _: walk.tn(s, turned_q))
    return Parts([walk.product.dq(algebra, dqk, q, k, guard)],
                 [walk.product.dk(by_key, dqk, q, k, guard),
                  walk.tn(walk.drop(tiles.leaves, p).astype(q.dtype), turned_dout)], dleaves)

  # Rows past the end saw nothing: P is 0 whatever their scores.
  rows = [q, walk.fill(dout, 0), walk.fill(lse[..., None], 0, value=-softmax.INF), walk.fill(delta[..., None], 0)]
  numbers = tuple(n for n, w in enumerate(wanted) if w)
  (dq,), (dk, dv), dleaves = tile_sum(walk, tile, Parts(rows, [k, v], leaves), schedule.rows, numbers, (q.dtype,),
                                      lambda rows: [turn(softmax.finite(rows[0]) if hides else rows[0]), turn(rows[1])])
  cut = lambda x, like: x[tuple(slice(n) for n in like.shape)].astype(like.dtype)
  given = jax.tree.leaves(problem.logits)
  return (dq[:, :problem.queries], walk.keys(dk).astype(problem.k.dtype), walk.keys(dv).astype(problem.v.dtype),
          [cut(x, given[n]) for n, x in zip(numbers, dleaves)])


def _hides(problem: Problem) -> bool:
  """Whether a masked tile hides keys from queries, and is not just one at the ragged end, past which there are zeros."""
  return problem.logits.mask is not None


def _rounded(s: Any) -> Any:
  """Scores, as numbers of their dtype.

  XLA's CPU compiler contracts a product and the subtraction of a maximum into one operation, which rounds once: scores of 10^10
  then differ from themselves by hundreds, and exp overflows. It does not reach past a minimum.
  """
  return jnp.minimum(s, jnp.finfo(s.dtype).max)


def _scores(walk: Walk, place: Place, masked: bool, qk: Any, leaves: list[Any]) -> Any:
  return walk.scores(leaves, qk, *place, masked)


def _put(values: list[Any], which: tuple[bool, ...], new: list[Any]) -> list[Any]:
  """`values` with `new` in place of those that are picked."""
  rest = iter(new)
  return [next(rest) if w else x for x, w in zip(values, which)]


def _weigh(walk: Walk, s: Any, v: Any, guard: bool, p: Any, end: Callable[[Any], Any] = lambda out: out,
           again: Callable[[], Any] | None = None) -> Any:
  """`end(p V)`, with `guard` safe against values that are not finite where the mask hides them; `again()` is p, anew."""
  dot = lambda p, v: walk.weigh(p.astype(v.dtype), v)
  if not guard:
    return end(dot(p, v))
  return softmax.weigh_masked(p, s, laid_out(v), dot, end, again)  # or it would be cut out once for each of its uses
