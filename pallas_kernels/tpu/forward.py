"""The forward pass: one visit a grid step; a query tile's running softmax stays in VMEM until its last visit."""

from __future__ import annotations

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
    logits: a pytree of arrays `[B|1, N|1, T|1, S|1, …]` with methods `coordinates` and `scores`.
    visits: row by row.
  """
  batch, heads, queries, width = q.shape
  value_width, rows = v.shape[3], call.tiles[0]
  walk = launch.walk(visits)
  where = walk.row_by_row(call.groups)
  count = len(jax.tree.leaves(logits))

  def kernel(codes, *refs):
    leaf_refs, (q_ref, k_ref, v_ref, out_ref, lse_ref, m_ref, total_ref, acc_ref) = refs[:count], refs[count:]
    b, h, n = (pl.program_id(axis) for axis in range(3))
    kv_head = lax.div(h, call.groups)
    first, last = walk.ends(codes, b, kv_head, n)
    state_refs = m_ref, total_ref, acc_ref

    @pl.when(first)
    def _():
      _write(state_refs, softmax.start((rows,), value_width, jnp.float32))

    def step(masked):
      qk = call.product.scores(call.algebra, q_ref[...], k_ref[...])  # [rows, columns]
      tiles = launch.leaf_tiles(logits, leaf_refs)
      s = call.scores(logits, tiles, where(b, h, n, codes), qk, masked)
      dot = lambda p, v: call.algebra.nn(p.astype(v.dtype), v)
      weigh = lambda p: softmax.weigh_masked(p, s, v_ref[...], dot) if masked else dot(p, v_ref[...])
      state = softmax.State(*(ref[...] for ref in state_refs))
      _write(state_refs, softmax.accumulate(state, s, lambda p: weigh(call.drop(logits, tiles, p)), leaves.ROWS))

    launch.by_kind(walk.code(codes, b, kv_head, n), step)

    @pl.when(last)
    def _():
      out, lse = softmax.finish(softmax.State(*(ref[...] for ref in state_refs)), leaves.ROWS)
      out_ref[...] = out.astype(out_ref.dtype)
      lse_ref[...] = leaves.row(lse)

  operands = launch.leaf_operands(logits, call.tiles, where) + [
      launch.Operand(q, launch.query_spec(width, call.tiles, where)),
      launch.Operand(k, launch.key_spec(width, call.tiles, call.groups, where)),
      launch.Operand(v, launch.key_spec(value_width, call.tiles, call.groups, where))]
  results = [
      launch.Operand(jax.ShapeDtypeStruct((batch, heads, queries, value_width), q.dtype),
                     launch.query_spec(value_width, call.tiles, where)),
      launch.Operand(jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32), launch.statistic_spec(call.tiles, where))]
  scratch = [pltpu.VMEM((rows, n), jnp.float32) for n in (leaves.LANES, leaves.LANES, value_width)]
  out, lse = call.launch(kernel, "jflash_forward", (batch, heads, walk.length), visits.codes.reshape(-1), operands, results,
                         scratch, parallel=2)
  return out, lse


def _write(refs: Any, state: softmax.State) -> None:
  """Row statistics fill all lanes of their scratch; any one of them is the value."""
  for ref, x in zip(refs, state):
    ref[...] = jnp.broadcast_to(x, ref.shape)
