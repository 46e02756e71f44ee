"""The forward pass: a query tile's running softmax stays in VMEM until its last visit; a grid step computes one or two visits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import leaves, schedule, softmax
from . import launch


def forward(call: launch.Call, q: Any, k: Any, v: Any, logits: Any, visits: schedule.Visits) -> tuple[Any, Any]:
  """`(out [B, N, T, E], lse [B, N, 1, T])` of q `[B, N, T, H]`, k `[B, K, S, H]`, v `[B, K, S, E]`.

  Args:
    call: sizes, tiles, launch options.
    logits: a pytree of arrays `[B|1, N|1, T|1, S|1, …]` with methods `coordinates` and `scores`, and `plain`.
    visits: row by row; their number in a row divides by `call.together`.
  """
  batch, heads, queries, width = q.shape
  value_width, rows, together = v.shape[3], call.tiles[0], call.together
  walk = launch.walk(visits)
  places = [walk.row_by_row(call.groups, together, side) for side in range(together)]
  count = len(jax.tree.leaves(logits))

  def kernel(codes, *refs):
    leaf_refs, (q_ref, *refs) = refs[:together * count], refs[together * count:]
    key_refs, (out_ref, lse_ref, *state_refs, broken_ref) = refs[:2 * together], refs[2 * together:]
    sides = [(leaf_refs[side * count:][:count], *key_refs[2 * side:][:2]) for side in range(together)]
    b, h, step = (pl.program_id(axis) for axis in range(3))
    kv_head = lax.div(h, call.groups)
    first, last = walk.ends(codes, b, kv_head, step * together, together)

    @pl.when(first)
    def _():
      _write(state_refs, softmax.start((rows,), value_width, jnp.float32))

    def scores_of(side):
      _, k_ref, _ = sides[side]
      return call.products(q_ref[...], k_ref[...])

    def add(masked, careful, side, qk):
      leaf_refs, _, v_ref = sides[side]
      tiles = launch.leaf_tiles(logits, leaf_refs)
      s = call.scores(logits, tiles, places[side](b, h, step, codes), qk, masked, differentiated=False)
      dot = lambda p, v: call.algebra.nn(p.astype(v.dtype), v)

      def weigh(p):
        p = call.drop(logits, tiles, p)
        return softmax.weigh_masked(p, s, v_ref[...], dot) if careful else dot(p, v_ref[...])

      state = softmax.State(*(ref[...] for ref in state_refs))
      _write(state_refs, softmax.accumulate(state, s, weigh, leaves.ROWS, all_see=logits.plain and not masked))

    def visit(masked, which, careful=False):
      """Adds visits one after the other; the product of the next runs beside the softmax of this one."""
      ahead = scores_of(which[0])
      for n, side in enumerate(which):
        qk, ahead = ahead, scores_of(which[n + 1]) if n + 1 < len(which) else None
        add(masked, careful, side, qk)

    kinds = [schedule.kind(walk.code(codes, b, kv_head, step * together + side)) for side in range(together)]
    some = [kind != schedule.EMPTY for kind in kinds]
    full = functools.reduce(jnp.logical_and, [kind == schedule.FULL for kind in kinds])
    if schedule.FULL in call.kinds:
      pl.when(full)(lambda: visit(False, range(together)))
    if schedule.PARTIAL in call.kinds:  # a full tile beside a partial one is masked with it, and so is one alone: less code
      masked = some[0] & ~full

      @pl.when(masked)
      def _():  # before the visits: within them, the branch on this keeps all scores alive, and costs a quarter
        broken_ref[0] = functools.reduce(jnp.add, [softmax.count_not_finite(v_ref[...]) for _, _, v_ref in sides])

      broken = broken_ref[0] > 0
      pl.when(masked & some[-1] & ~broken)(lambda: visit(True, range(together)))
      if together == 2:
        pl.when(masked & ~some[1] & ~broken)(lambda: visit(True, [0]))
      for side in range(together):
        pl.when(masked & some[side] & broken)(functools.partial(visit, True, [side], careful=True))
    elif together == 2:
      pl.when(some[0] & ~some[1])(lambda: visit(False, [0]))

    @pl.when(last)
    def _():
      out, lse = softmax.finish(softmax.State(*(ref[...] for ref in state_refs)), leaves.ROWS)
      out_ref[...] = out.astype(out_ref.dtype)
      lse_ref[...] = leaves.row(lse)

  operands = [
      *(operand for where in places for operand in launch.leaf_operands(logits, call.tiles, where)),
      launch.Operand(q, launch.query_spec(width, call.tiles, places[0])),
      *(launch.Operand(x, launch.key_spec(x.shape[3], call.tiles, call.groups, where)) for where in places for x in (k, v))]
  results = [
      launch.Operand(jax.ShapeDtypeStruct((batch, heads, queries, value_width), q.dtype),
                     launch.query_spec(value_width, call.tiles, places[0])),
      launch.Operand(jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
                     launch.statistic_spec(call.tiles, places[0]))]
  scratch = [pltpu.VMEM((rows, n), jnp.float32) for n in (leaves.LANES, leaves.LANES, value_width)]
  scratch.append(pltpu.SMEM((1,), jnp.float32))
  grid = batch, heads, walk.length // together
  out, lse = call.launch(kernel, "jflash_forward", grid, visits.codes.reshape(-1), operands, results, scratch, parallel=2)
  return out, lse


def _write(refs: Any, state: softmax.State) -> None:
  """Row statistics fill all lanes of their scratch; any one of them is the value."""
  for ref, x in zip(refs, state):
    ref[...] = jnp.broadcast_to(x, ref.shape)
