"""The backward pass: dK and dV column by column, dQ beside them or row by row, and the gradient of any array of the logits.

The probabilities are computed again from lse. Each output tile is summed by one core in a fixed order: no atomics, and two runs
give the same bits. For every array of the logits, `jax.vjp` of the logits themselves takes dS to its gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import leaves, products, schedule, softmax
from . import launch


class Residuals(NamedTuple):
  """What the passes read: q, dout `[B, N, T, …]`, k, v `[B, K, S, …]`, lse and delta `[B, N, 1, T]`."""

  q: Any
  k: Any
  v: Any
  dout: Any
  lse: Any
  delta: Any

  def operands(self, call: launch.Call, where: Any) -> list[launch.Operand]:
    query = lambda x: launch.Operand(x, launch.query_spec(x.shape[3], call.tiles, where))
    key = lambda x: launch.Operand(x, launch.key_spec(x.shape[3], call.tiles, call.groups, where))
    statistic = lambda x: launch.Operand(x, launch.statistic_spec(call.tiles, where))
    return [query(self.q), key(self.k), key(self.v), query(self.dout), statistic(self.lse), statistic(self.delta)]


def backward(call: launch.Call, residuals: Residuals, logits: Any, rows: schedule.Visits,
             columns: schedule.Visits) -> tuple[Any, Any, Any]:
  """(dq, dk, dv), laid out as q, k, v, in their dtypes or in float32; all may have more rows."""
  dk, dv, *dq = _dkv(call, residuals, logits, columns)
  return dq[0] if dq else _dq(call, residuals, logits, rows), dk, dv


def _tile_gradients(call: launch.Call, logits: Any, tiles: Any, refs: Any, place: launch.Place, masked: bool,
                    wanted: int | None = None, turned: bool = False) -> tuple[Any, Any, Any]:
  """(P, d(q·k) / unit, gradient of the wanted leaf's tile): everything that all passes compute alike.

  With `turned`, keys are the rows of all of them: then lse and δ are rows as they lie in memory, and no lane moves.
  """
  q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref = refs

  def scores(qk, leaf):
    filled = [leaf if n == wanted else x for n, x in enumerate(tiles)]
    return call.scores(logits, filled, place, qk, masked, turned, differentiated=not logits.plain)

  nt = lambda product, of_query, of_key: product(*((of_key, of_query) if turned else (of_query, of_key)))
  leaf = jnp.zeros(()) if wanted is None else tiles[wanted]
  qk = nt(call.products, q_ref[...], k_ref[...])
  s, pull = (scores(qk, leaf), lambda ds: (ds, None)) if logits.plain else jax.vjp(scores, qk, leaf)
  statistic = lambda ref: ref[...] if turned else leaves.spread(leaves.lanes(ref[...]), s.shape[1])
  p = softmax.probabilities(s, statistic(lse_ref))
  dp = call.drop(logits, tiles, nt(call.algebra.nt, dout_ref[...], v_ref[...]))
  ds = softmax.dscores(p, dp, statistic(delta_ref))
  if masked:  # statistics and operands of rows past the last query hold anything
    p, ds = (jnp.where(s == -jnp.inf, 0.0, x) for x in (p, ds))
  dqk, dleaf = pull(ds)
  return p, dqk, dleaf


def _dq(call: launch.Call, residuals: Residuals, logits: Any, visits: schedule.Visits) -> Any:
  """dQ = d(QKᵀ) K, summed over the key tiles of a query tile."""
  batch, heads, _, width = residuals.q.shape
  walk = launch.walk(visits)
  where = walk.row_by_row(call.groups)
  count = len(jax.tree.leaves(logits))

  def kernel(codes, *refs):
    leaf_refs, inputs, (dq_ref, acc_ref) = refs[:count], refs[count:-2], refs[-2:]
    b, h, n = (pl.program_id(axis) for axis in range(3))
    kv_head = lax.div(h, call.groups)
    first, last = walk.ends(codes, b, kv_head, n)
    pl.when(first)(functools.partial(_zero, acc_ref))

    def step(masked):
      tiles, q, k = launch.leaf_tiles(logits, leaf_refs), inputs[0][...], inputs[1][...]
      _, dqk, _ = _tile_gradients(call, logits, tiles, inputs, where(b, h, n, codes), masked)
      acc_ref[...] += call.product.dq(call.algebra, dqk, q, k, masked)

    launch.by_kind(call, walk.code(codes, b, kv_head, n), step)
    pl.when(last)(functools.partial(_store, dq_ref, acc_ref, call.unit))

  operands = launch.leaf_operands(logits, call.tiles, where) + residuals.operands(call, where)
  result = launch.Operand(residuals.q, launch.query_spec(width, call.tiles, where))
  return call.launch(kernel, "jflash_dq", (batch, heads, walk.length), visits.codes.reshape(-1), operands, [result],
                     [pltpu.VMEM((call.tiles[0], width), jnp.float32)], parallel=2)[0]


def _dkv(call: launch.Call, residuals: Residuals, logits: Any, visits: schedule.Visits) -> list[Any]:
  """dK = d(QKᵀ)ᵀ Q and dV = Pᵀ dO, summed over the query tiles of a key tile and the query heads of its kv head.

  With `call.spans` dQ, too, whose sums for all query tiles of a span and of these heads stay on chip while the columns pass by.
  With several spans they pass by as often, and the sums of dK and dV wait in memory from one span to the next.
  """
  batch, kv_heads, _, width = residuals.k.shape
  value_width, groups, rows, keys = residuals.v.shape[3], call.groups, call.tiles[0], residuals.k.shape[2]
  turned = call.product is products.Dot  # which is the same from both sides
  with_dq, several = call.spans > 0, call.spans > 1
  span = -(-residuals.q.shape[2] // (rows * max(call.spans, 1)))  # query tiles
  columns = -(-keys // call.tiles[1])
  walk = launch.walk(visits)

  def where(b, kv_head, n, g, codes):
    code = walk.code(codes, b, kv_head, n)
    i, j = schedule.inner(code), schedule.outer(code)
    if several:
      i, j = lax.div(j, columns) * span + i, lax.rem(j, columns)
    return launch.Place(b, kv_head * groups + g, i, j)

  count = len(jax.tree.leaves(logits))

  def kernel(codes, *refs):
    leaf_refs, inputs, refs = refs[:count], refs[count:count + len(Residuals._fields)], refs[count + len(Residuals._fields):]
    (dk_ref, dv_ref, *dq_ref), (dk_acc, dv_acc, *dq_acc) = refs[:len(refs) // 2], refs[len(refs) // 2:]
    b, kv_head, n, g = (pl.program_id(axis) for axis in range(4))
    first, last = walk.ends(codes, b, kv_head, n)
    of_span, span_first, span_last = 0, n == 0, n == walk.length - 1
    if several:
      of_span, span_first, span_last = walk.ends_of(lambda outer: lax.div(outer, columns), codes, b, kv_head, n)

    def each_query_tile(do):
      """For all query tiles of this query head, which is enough, as each has a turn."""
      @pl.loop(0, span)
      def _(i):
        do(g, pl.ds(pl.multiple_of(i * rows, rows), rows))

    if with_dq:
      @pl.when(span_first)
      def _():
        def zero(g, rows):
          dq_acc[0][g, rows] = jnp.zeros((rows.size, width), jnp.float32)
        each_query_tile(zero)

    def in_memory(ref):
      """The sums of this key tile."""
      j = where(b, kv_head, n, g, codes).j
      return ref.at[b, kv_head, pl.ds(pl.multiple_of(j * call.tiles[1], call.tiles[1]), call.tiles[1])]

    resumed = (schedule.continued(walk.code(codes, b, kv_head, n)) != 0) if several else False

    @pl.when(first & (g == 0) & jnp.logical_not(resumed))
    def _():
      _zero(dk_acc)
      _zero(dv_acc)

    if several:
      @pl.when(first & (g == 0) & resumed)
      def _():
        pltpu.sync_copy(in_memory(dk_ref), dk_acc)
        pltpu.sync_copy(in_memory(dv_ref), dv_acc)

    def step(masked):
      tiles, (q, k, _, dout) = launch.leaf_tiles(logits, leaf_refs, turned), (ref[...] for ref in inputs[:4])
      place = where(b, kv_head, n, g, codes)
      p, dqk, _ = _tile_gradients(call, logits, tiles, inputs, place, masked, turned=turned)
      if masked and call.queries % rows:  # rows past the last query hold anything
        row = place.i * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        dout = jnp.where(row < call.queries, dout, jnp.zeros_like(dout))
      p = call.drop(logits, tiles, p).astype(dout.dtype)
      if turned:
        dk_acc[...] += call.product.dq(call.algebra, dqk, k, q, masked)
        dv_acc[...] += call.algebra.nn(p, dout)
      else:
        dk_acc[...] += call.product.dk(call.algebra, dqk, q, k, masked)
        dv_acc[...] += call.algebra.tn(p, dout)
      if with_dq:
        within = place.i - of_span * span if several else place.i
        mine = g, pl.ds(pl.multiple_of(within * rows, rows), rows)
        dq_acc[0][mine] += call.product.dk(call.algebra, dqk, k, q, masked)

    launch.by_kind(call, walk.code(codes, b, kv_head, n), step)

    @pl.when(last & (g == groups - 1))
    def _():
      if several:
        pltpu.sync_copy(dk_acc, in_memory(dk_ref))
        pltpu.sync_copy(dv_acc, in_memory(dv_ref))
      else:
        _store(dk_ref, dk_acc, call.unit)
        _store(dv_ref, dv_acc)

    if with_dq:
      @pl.when(span_last)
      def _():
        def store(g, rows):
          dq_ref[0][g, rows] = (call.unit * dq_acc[0][g, rows]).astype(dq_ref[0].dtype)
        each_query_tile(store)

  def sums(x):
    """Of whole tiles in memory, in float32, as copies by hand take no less."""
    array = jax.ShapeDtypeStruct((batch, kv_heads, columns * call.tiles[1], x.shape[3]), jnp.float32)
    return launch.Operand(array, pl.BlockSpec(memory_space=pl.ANY))

  def dq_block(b, kv_head, n, g, codes):
    return b, kv_head, lax.div(schedule.outer(walk.code(codes, b, kv_head, n)), columns) if several else 0, 0

  operands = launch.leaf_operands(logits, call.tiles, where) + residuals.operands(call, where)
  results = [sums(x) if several else launch.Operand(x, launch.key_spec(x.shape[3], call.tiles, groups, where))
             for x in (residuals.k, residuals.v)]
  scratch = [pltpu.VMEM((call.tiles[1], n), jnp.float32) for n in (width, value_width)]
  if with_dq:
    dq = jax.ShapeDtypeStruct((batch, kv_heads * groups, call.spans * span * rows, width), residuals.q.dtype)
    results.append(launch.Operand(dq, pl.BlockSpec((None, groups, span * rows, width), dq_block)))
    scratch.append(pltpu.VMEM((groups, span * rows, width), jnp.float32))
  dk, dv, *dq = call.launch(kernel, "jflash_backward" if with_dq else "jflash_dkv", (batch, kv_heads, walk.length, groups),
                            visits.codes.reshape(-1), operands, results, scratch, parallel=2)
  return [call.unit * dk if several else dk, dv, *dq]


def leaf_gradient(call: launch.Call, residuals: Residuals, logits: Any, wanted: int, kinds: Any) -> Any:
  """The gradient of leaf number `wanted` of the logits, in its own shape.

  The grid's inner axes are those along which the array broadcasts, so that a tile of the gradient is summed before it is left.

  Args:
    kinds: EMPTY, PARTIAL or FULL for every tile, `[B|1, K|1, T tiles, S tiles]`.
  """
  leaf = jax.tree.leaves(logits)[wanted]
  batch, heads = residuals.q.shape[:2]
  lists, (i_count, j_count) = kinds.shape[:2], kinds.shape[2:]
  sizes, runs = (batch, heads, i_count, j_count), leaves.runs_along(leaf)
  order = [axis for axis in range(4) if runs[axis]] + [axis for axis in range(4) if not runs[axis]]
  inner = [n for n, axis in enumerate(order) if not runs[axis]]

  def kind(place, codes):
    kv_head = lax.div(place.head, call.groups)
    number = (place.batch * lists[1] if lists[0] > 1 else 0) + (kv_head if lists[1] > 1 else 0)
    return codes[(number * i_count + place.i) * j_count + place.j]

  def here(*grid):
    return launch.Place(*(grid[order.index(axis)] for axis in range(4)))

  def where(*grid_and_codes):
    """What is loaded: for an empty tile always the same, so that a run of them loads nothing."""
    place = here(*grid_and_codes[:4])
    used = kind(place, grid_and_codes[4]) != schedule.EMPTY
    return launch.Place(place.batch, place.head, jnp.where(used, place.i, 0), jnp.where(used, place.j, 0))

  count = len(jax.tree.leaves(logits))

  def kernel(codes, *refs):
    leaf_refs, inputs, (dleaf_ref, acc_ref) = refs[:count], refs[count:-2], refs[-2:]
    grid = [pl.program_id(axis) for axis in range(4)]
    place = here(*grid)
    at_start, at_end = (functools.reduce(jnp.logical_and, [grid[n] == end(sizes[order[n]]) for n in inner], jnp.array(True))
                        for end in (lambda size: 0, lambda size: size - 1))
    pl.when(at_start)(functools.partial(_zero, acc_ref))

    def step(masked):
      *_, dleaf = _tile_gradients(call, logits, launch.leaf_tiles(logits, leaf_refs), inputs, place, masked, wanted)
      acc_ref[...] += leaves.untile(dleaf, leaf)

    launch.by_kind(call, kind(place, codes), step)
    pl.when(at_end)(functools.partial(_store, dleaf_ref, acc_ref))

  stored = leaves.store(leaf)
  operands = launch.leaf_operands(logits, call.tiles, where) + residuals.operands(call, where)
  result = launch.Operand(stored, leaves.block_spec(leaf, call.tiles, lambda *g: here(*g[:4])))
  scratch = [pltpu.VMEM(leaves.block(leaf, call.tiles), jnp.float32)]
  dleaf = call.launch(kernel, "jflash_dleaf", tuple(sizes[axis] for axis in order), kinds.reshape(-1), operands, [result],
                      scratch, parallel=0)[0]
  return leaves.unstore(dleaf, leaf)


def _zero(ref: Any) -> None:
  ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _store(ref: Any, acc_ref: Any, unit: float = 1.0) -> None:
  ref[...] = (unit * acc_ref[...]).astype(ref.dtype)
