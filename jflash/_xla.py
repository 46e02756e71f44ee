"""Attention in plain JAX, tiled and linear in memory: the CPU backend, and the one that supports everything.

Three passes over the same walk: forward, tangent (forward mode) and cotangent (reverse mode). What a visit reads is cut out before
the branch on the tile's kind: inside, XLA's CPU compiler would fuse the slice into the arithmetic, which then is not vectorised.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import softmax

from ._plan import Plan, Schedule
from ._problem import Problem
from ._xla_walk import Chunk, Walk, by_kind


def supports(problem: Problem) -> str | None:
  """None: it computes everything."""
  del problem


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: Plan, schedule: Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  walk = Walk(problem, plan)
  state = softmax.start((*plan.chunk, walk.groups, plan.tiles[0]), problem.value_width, walk.dtype)

  def each_row(chunk, i, buffers):
    q = walk.rows(walk.q, chunk, i)

    def visit(j, kind, state):
      k, v, leaves = walk.columns(walk.k, chunk, j), walk.columns(walk.v, chunk, j), walk.leaves(chunk, i, j)

      def compute(masked, state):
        s = walk.scores(leaves, walk.product.scores(walk.algebra, q, k), chunk, i, j, masked)
        return softmax.accumulate(state, s, functools.partial(_weigh, walk, s, v, masked))

      return by_kind(plan, kind, compute, lambda state: state, state)

    return _put(walk, buffers, softmax.finish(walk.each_visit(chunk, i, visit, state)), chunk, i)

  return _get(problem, walk.each_row(schedule.rows, each_row, _row_buffers(problem, walk)))


@functools.partial(jax.jit, static_argnames="plan")
def tangent(problem: Problem, plan: Plan, schedule: Schedule, out: Any, lse: Any, dproblem: Problem) -> tuple[Any, Any]:
  """(dout, dlse) for the tangents of q, k, v and the float arrays of `logits`; `dproblem` holds zeros where there are none.

  By row: dlse = Σ P ∘ dS and dout = (P ∘ dS) V + P dV - dlse · out.
  """
  walk, dwalk = Walk(problem, plan), Walk(dproblem, plan)
  lse, out = walk.fill(lse[..., None], 0, value=-softmax.INF), walk.fill(out, 0)
  zeros = lambda width: jnp.zeros((*plan.chunk, walk.groups, plan.tiles[0], width), walk.dtype)

  def each_row(chunk, i, buffers):
    q, dq, row_lse, row_out = (walk.rows(x, chunk, i) for x in (walk.q, dwalk.q, lse, out))

    def visit(j, kind, carry):
      k, v, dk, dv = (walk.columns(x, chunk, j) for x in (walk.k, walk.v, dwalk.k, dwalk.v))
      leaves, dleaves = walk.leaves(chunk, i, j), dwalk.leaves(chunk, i, j)

      def compute(masked, dout, dlse):
        scores = lambda qk, leaves: walk.scores(leaves, qk, chunk, i, j, masked)
        moves = walk.product.tangent(walk.algebra, q, k, dq, dk), [_as_tangent(x, d) for x, d in zip(leaves, dleaves)]
        s, ds = jax.jvp(scores, (walk.product.scores(walk.algebra, q, k), leaves), moves)
        p = softmax.probabilities(s, row_lse)
        pds = p * jnp.where(s == -jnp.inf, 0, ds)
        weigh = functools.partial(_weigh, walk, s)
        return dout + weigh(v, masked, pds) + weigh(dv, masked, p), dlse + pds.sum(-1, keepdims=True)

      return by_kind(plan, kind, compute, lambda *carry: carry, *carry)

    dout, dlse = walk.each_visit(chunk, i, visit, (zeros(problem.value_width), zeros(1)))
    return _put(walk, buffers, (dout - dlse * row_out.astype(walk.dtype), dlse), chunk, i)

  return _get(problem, walk.each_row(schedule.rows, each_row, _row_buffers(problem, walk)))


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: Plan, schedule: Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`), in one pass with five products a tile."""
  walk = Walk(problem, plan)
  dout, delta = softmax.row_cotangents(out, lse, dout, dlse)
  dout, delta = walk.fill(dout, 0), walk.fill(delta[..., None], 0)
  lse = walk.fill(lse[..., None], 0, value=-softmax.INF)  # rows past the end saw nothing: P is 0 whatever their scores
  pick = lambda leaves: [x for x, w in zip(leaves, wanted) if w]

  def each_row(chunk, i, grads):
    dq_buffer, sums = grads
    row = Row(*(walk.rows(x, chunk, i) for x in (walk.q, dout, lse, delta)))

    def visit(j, kind, carry):
      dq, (dk, dv, dleaves) = carry
      columns = Columns(walk.columns(walk.k, chunk, j), walk.columns(walk.v, chunk, j), walk.leaves(chunk, i, j))
      compute = functools.partial(_tile_gradients, walk, chunk, i, j, row, columns, wanted)
      nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(functools.partial(compute, True)))
      tile_dq, tile_dk, tile_dv, tile_dleaves = by_kind(plan, kind, compute, nothing)
      return dq + tile_dq, (walk.add_columns(dk, tile_dk, chunk, j), walk.add_columns(dv, tile_dv, chunk, j),
                            [walk.add_leaf(x, y, chunk, i, j) for x, y in zip(dleaves, tile_dleaves)])

    dq, sums = walk.each_visit(chunk, i, visit, (jnp.zeros(row.q.shape, walk.dtype), sums))
    return walk.put_rows(dq_buffer, dq, chunk, i), sums

  zeros = lambda x: jnp.zeros(x.shape, walk.dtype)
  sums = zeros(walk.k), zeros(walk.v), [zeros(x) for x in pick(jax.tree.leaves(walk.logits))]
  dq, (dk, dv, dleaves) = walk.each_row(schedule.rows, each_row, (jnp.zeros_like(walk.q), sums))
  cut = lambda x, like: x[tuple(slice(n) for n in like.shape)].astype(like.dtype)
  return (cut(dq, problem.q), cut(dk, problem.k), cut(dv, problem.v),
          [cut(x, like) for x, like in zip(dleaves, pick(jax.tree.leaves(problem.logits)))])


class Row(NamedTuple):
  """What the backward pass reads of a query tile: q, dout, lse and δ, `[Bc, Kc, G, rows, …]`."""

  q: Any
  dout: Any
  lse: Any
  delta: Any


class Columns(NamedTuple):
  """What the backward pass reads for a key tile: k, v `[Bc, Kc, columns, …]`, and the tile's leaves."""

  k: Any
  v: Any
  leaves: list[Any]


def _tile_gradients(walk: Walk, chunk: Chunk, i: Any, j: Any, row: Row, columns: Columns, wanted: tuple[bool, ...],
                    masked: bool) -> tuple[Any, Any, Any, list[Any]]:
  """What tile (i, j) adds to dq, dk, dv and to the gradients of the wanted leaves."""
  k, v, leaves = columns

  def scores(qk, some):
    some = iter(some)
    return walk.scores([next(some) if w else x for w, x in zip(wanted, leaves)], qk, chunk, i, j, masked)

  s, pull = jax.vjp(scores, walk.product.scores(walk.algebra, row.q, k), [x for w, x in zip(wanted, leaves) if w])
  p = softmax.probabilities(s, row.lse)
  ds = softmax.dscores(p, walk.algebra.nt(row.dout, v), row.delta)
  if masked:  # in a row whose lse is NaN, p is NaN also where nothing is seen
    p, ds = (jnp.where(s == -jnp.inf, 0, x) for x in (p, ds))
  dqk, dleaves = pull(ds)
  return (walk.product.dq(walk.algebra, dqk, row.q, k, masked), walk.product.dk(walk.algebra, dqk, row.q, k, masked),
          walk.algebra.tn(p.astype(row.q.dtype), row.dout), dleaves)


def _weigh(walk: Walk, s: Any, v: Any, masked: bool, p: Any) -> Any:
  """p V, safe against values that are not finite where the mask hides them."""
  dot = lambda p, v: walk.algebra.nn(p.astype(v.dtype), v)
  return softmax.weigh_masked(p, s, v, dot) if masked else dot(p, v)


def _row_buffers(problem: Problem, walk: Walk) -> tuple[Any, Any]:
  """Zeros for `[B, T, N, E]` and `[B, T, N, 1]`, T filled up to whole tiles."""
  rows = walk.q.shape[:3]
  return jnp.zeros((*rows, problem.value_width), problem.v.dtype), jnp.zeros((*rows, 1), walk.dtype)


def _put(walk: Walk, buffers: tuple[Any, Any], tiles: tuple[Any, Any], chunk: Chunk, i: Any) -> tuple[Any, Any]:
  out, lse = (walk.put_rows(buffer, x, chunk, i) for buffer, x in zip(buffers, tiles))
  return out, lse


def _get(problem: Problem, buffers: tuple[Any, Any]) -> tuple[Any, Any]:
  return buffers[0][:, :problem.queries], buffers[1][:, :problem.queries, :, 0]


def _as_tangent(x: Any, tangent: Any) -> Any:
  """Integer and boolean leaves have JAX's type for no tangent."""
  return tangent if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)
