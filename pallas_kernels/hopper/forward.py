"""The forward pass: one warpgroup loads tiles by TMA, the others compute; a thread block keeps its query tile to the end.

Shah et al., FlashAttention-3, arXiv:2407.08608: beside the softmax of one tile run the products of other tiles, those of the same
warpgroup (Q Kᵀ of the tile after, P V of the tile before) and those of the warpgroup whose turn it is.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import schedule, softmax
from . import launch, leaves, mend

_GROWTH = 8  # by so many powers of two weights may exceed 1 before the output is rescaled


class Tiles(NamedTuple):
  """A warpgroup's operands in shared memory."""

  q: Any  # [P, 64, H]
  keys: launch.Ring
  values: launch.Ring
  p: Any  # [warpgroups, P, 64, columns], or None
  turn: Any  # barriers of the two warpgroups, or None


def forward(call: launch.Call, q: Any, k: Any, v: Any, logits: Any, visits: schedule.RowVisits) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, N, T filled up])`, of `Call`'s arrays; out is float32 where they are pieces.

  Args:
    call: sizes, tiles, launch options.
    logits: a pytree of arrays `[B|1, N|1, T|1, S|1, …]` with methods `coordinates` and `scores`.
    visits: row by row.
  """
  batch, _, _, width = q.shape
  value_width, (rows, columns), stages = v.shape[3], call.tiles, call.stages
  warpgroups, tiles = rows // launch.WARPGROUP_ROWS, -(-call.queries * call.fold // rows)
  out_dtype = jnp.float32 if call.pieces > 1 else call.dtype
  count = len(jax.tree.leaves(logits))

  def kernel(q_ref, k_ref, v_ref, *refs, **scratch):
    visit_refs, leaf_refs, (out_ref, lse_ref) = refs[:4], refs[4:4 + count], refs[4 + count:]
    def place(zero=0):
      batch, head, warpgroup = launch.place(zero)
      kv_head = lax.div(head, call.groups)
      number, walk = launch.walk(visits, visit_refs, batch, kv_head)
      return batch, head, kv_head, warpgroup, number * rows + warpgroup * launch.WARPGROUP_ROWS, walk

    batch, head, kv_head, warpgroup, row, walk = place()
    memory = types.SimpleNamespace(**scratch)
    keys = launch.Ring(memory.k_tiles, memory.k_full, memory.k_empty, stages)
    values = launch.Ring(memory.v_tiles, memory.v_full, memory.v_empty, stages)

    @pl.when(warpgroup == warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=True)
      launch.load_keys(call, walk, batch, kv_head, (keys, k_ref), (values, v_ref))

    @pl.when(warpgroup < warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=False)
      q_tile, q_loaded = memory.q.at[warpgroup], memory.q_loaded.at[warpgroup]
      for piece in range(call.pieces):
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(row, launch.WARPGROUP_ROWS), piece * call.heads + head], q_tile.at[piece],
                                q_loaded)
      plgpu.barrier_wait(q_loaded)

      def weights(batch, head, row, key, qk, m, total, masked, slack=0.0):
        """(m, total, shrink, P after dropout, 1 for what is seen) with the keys from `key` on."""
        window = leaves.Window(batch, head, row, key, *qk.shape)
        tiles = call.tiles_of(logits, leaf_refs, window)
        s = call.scores(logits, tiles, window, qk, masked)
        m, total, shrink, p = softmax.advance(m, total, s, call.rows, call.weight, slack)
        return m, total, shrink, call.drop(logits, tiles, p), jnp.where(s == -softmax.INF, 0.0, 1.0)

      fill = lambda x: launch.in_layout(jnp.full((launch.WARPGROUP_ROWS,), x, jnp.float32), 1)
      start = softmax.State(fill(-softmax.INF), fill(0.0), launch.in_layout(
          jnp.zeros((launch.WARPGROUP_ROWS, value_width), jnp.float32)))
      attend = _overlapped if call.overlapped else _in_turn
      tiles = Tiles(q_tile, keys, values, getattr(memory, "p", None), getattr(memory, "turn", None))
      state = attend(call, tiles, warpgroup, walk, functools.partial(weights, batch, head, row, slack=_slack(call)), start)
      out, lse = softmax.finish(state, call.rows, call.unit)

      def leave_lse():
        batch, head, _, _, row, _ = place(visit_refs[1][0])
        lse_ref.at[batch, head, pl.ds(row, launch.WARPGROUP_ROWS)][...] = lse

      def leave():
        batch, head, _, warpgroup, row, _ = place(visit_refs[1][0])
        out_tile = memory.out.at[warpgroup] if "out" in scratch else memory.q.at[warpgroup, 0]
        out_tile[...] = out.astype(out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[batch, pl.ds(row, launch.WARPGROUP_ROWS), head])
        plgpu.wait_smem_to_gmem(0)

      def again():
        batch, head, kv_head, warpgroup, row, walk = place(visit_refs[1][0])
        q_tile, mine = memory.q.at[warpgroup], pl.ds(row, launch.WARPGROUP_ROWS)
        first = pl.ds(0, mend.KEYS)
        k_tile = lambda piece: memory.k_tiles.at[warpgroup, piece, first]
        v_tile = lambda piece: memory.v_tiles.at[warpgroup, piece, first]
        v_columns = lambda column, piece: memory.v_tiles.at[warpgroup, piece, first, pl.ds(column, mend.WIDTH)]

        def scores(key):
          at = [(batch, pl.ds(key, mend.KEYS), piece * call.kv_heads + kv_head) for piece in range(call.pieces)]
          mend.load([ref.at[x] for ref in (k_ref, v_ref) for x in at],
                    [tile(piece) for tile in (k_tile, v_tile) for piece in range(call.pieces)], memory.mended.at[warpgroup])
          return launch.product(call, lambda a, b: (q_tile.at[a], k_tile(b).transpose((1, 0))),
                                plgpu.ACC((launch.WARPGROUP_ROWS, mend.KEYS), jnp.float32))

        narrow = launch.in_layout(jnp.zeros((launch.WARPGROUP_ROWS, mend.WIDTH), jnp.float32))
        p_tile = memory.p.at[warpgroup, :, :, first] if "p" in scratch else None
        compute = mend.attend_again(call, walk, functools.partial(weights, batch, head, row), scores, v_columns, p_tile,
                                    start._replace(acc=narrow))
        mend.by_columns(value_width, compute, lambda column, x: mend.store(
            x, memory.mended_tile.at[warpgroup], out_ref.at[batch, mine, head, pl.ds(column, mend.WIDTH)]))

      leave_lse()
      mend.leave_or(call, memory, leave, again, state.acc)

  outs = [jax.ShapeDtypeStruct((batch, q.shape[1], call.heads, value_width), out_dtype),
          jax.ShapeDtypeStruct((batch, call.heads, tiles * rows), jnp.float32)]
  matrix = functools.partial(launch.matrix, call.dtype)
  scratch = launch.rings(call, warpgroups, k=(columns, width), v=(columns, value_width)) | {
      "q": matrix(warpgroups, call.pieces, launch.WARPGROUP_ROWS, width),
      "q_loaded": plgpu.Barrier(num_arrivals=call.pieces, num_barriers=warpgroups)}
  if out_dtype != call.dtype or value_width != width:
    scratch["out"] = launch.matrix(out_dtype, warpgroups, launch.WARPGROUP_ROWS, value_width)
  if not call.overlapped:
    scratch["p"] = matrix(warpgroups, call.pieces, launch.WARPGROUP_ROWS, columns)
  if call.masked:
    scratch |= mend.scratch(warpgroups, 2 * call.pieces, out_dtype)
  if call.turns:
    scratch["turn"] = plgpu.Barrier(num_barriers=2)
  grid = {"head": call.heads, "tile": tiles, "batch": batch}
  ins = [q, k, v, *launch.flat(visits), *call.stored(logits, (rows, columns))]
  return call.launch(kernel, "jflash_forward", grid, warpgroups, ins, outs, scratch)


def _overlapped(call: launch.Call, tiles: Tiles, warpgroup: Any, walk: launch.Walk, weights: Any,
                state: softmax.State) -> softmax.State:
  """Adds all visits: Q Kᵀ of each tile and P V of the one before run together, and both beside the softmax."""
  rows, columns = launch.WARPGROUP_ROWS, call.tiles[1]
  zeros = launch.in_layout(jnp.zeros((rows, columns), jnp.float32))
  narrow = lambda p: launch.pieces(p, call.pieces, tiles.q.dtype)

  def first(state):
    m, total, _, p, _ = weights(walk.tile(0) * columns, _scores(call, tiles, 0), state.m, state.total, call.masked)
    return m, total, p

  def step(n, carry, masked):
    acc, m, total, p = carry
    p = narrow(p)
    tiles.keys.wait(n)
    if tiles.turn is not None:
      plgpu.barrier_wait(tiles.turn.at[warpgroup])

    def products(refs):
      acc_ref, s_ref, m_ref, total_ref, shrink_ref, p_ref = refs
      for a, b in call.products:
        plgpu.wgmma(s_ref, launch.kept(tiles.q, n)(a), tiles.keys.tile(n, b).transpose((1, 0)))
      tiles.values.wait(n - 1)
      for a, b in call.products:
        plgpu.wgmma(acc_ref, p[a], tiles.values.tile(n - 1, b))
      if tiles.turn is not None:
        plgpu.barrier_arrive(tiles.turn.at[1 - warpgroup])
      s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(call.products))
      tiles.keys.release(n)
      m_ref[...], total_ref[...], shrink_ref[...], p_ref[...], _ = weights(walk.tile(n) * columns, s, m, total, masked)

    acc, _, m, total, shrink, p = pl.run_state(products)(
        (plgpu.ACC.init(acc), plgpu.ACC.init(zeros), m, total, jnp.zeros_like(m), jnp.zeros_like(zeros)))
    tiles.values.release(n - 1)
    # P becomes an operand again only after the product that read the last one has ended, or ptxas lets none overlap (C7513).
    acc, p = lax.optimization_barrier((acc, p))
    # Partial tiles, few as a rule, go without the branch: with one in either loop ptxas spills more.
    return acc * call.rows.spread(shrink, acc.shape[1]) if masked else _rescale(acc, shrink), m, total, p

  def visit_all(state):
    m, total, p = first(state)
    carry = state.acc, m, total, p
    if tiles.turn is not None:
      pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(tiles.turn.at[0]))
    full = 1
    if call.masked:
      full = jnp.maximum(walk.partial, 1)
      carry = lax.fori_loop(1, full, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(full, walk.count, functools.partial(step, masked=False), carry)
    if tiles.turn is not None:
      pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(tiles.turn.at[0]))
    acc, m, total, p = carry
    p, last = narrow(p), walk.count - 1
    tiles.values.wait(last)

    def product(acc_ref):
      for a, b in call.products:
        plgpu.wgmma(acc_ref, p[a], tiles.values.tile(last, b))

    return softmax.State(m, total, pl.run_state(product)(plgpu.ACC.init(acc)))

  return lax.cond(walk.count > 0, visit_all, lambda state: state, state)


def _in_turn(call: launch.Call, tiles: Tiles, warpgroup: Any, walk: launch.Walk, weights: Any,
             state: softmax.State) -> softmax.State:
  """Adds all visits, one product after the other, with P in shared memory."""
  def step(n, state, masked):
    s = _scores(call, tiles, n)
    m, total, shrink, p, _ = weights(walk.tile(n) * call.tiles[1], s, state.m, state.total, masked)
    tiles.values.wait(n)
    acc, = launch.accumulate(call, [state.acc * call.rows.spread(shrink, state.acc.shape[1])], [p],
                             [lambda b: tiles.values.tile(n, b)], [tiles.p.at[warpgroup]])
    tiles.values.release(n)
    return softmax.State(m, total, acc)

  return launch.visit_all(call, walk, step, state)


def _scores(call: launch.Call, tiles: Tiles, n: Any) -> Any:
  """Q Kᵀ of tile n, awaited."""
  tiles.keys.wait(n)
  s = launch.product(call, lambda a, b: (tiles.q.at[a], tiles.keys.tile(n, b).transpose((1, 0))),
                     plgpu.ACC((launch.WARPGROUP_ROWS, call.tiles[1]), jnp.float32))
  tiles.keys.release(n)
  return s


def _slack(call: launch.Call) -> float:
  """What a row's maximum may grow by while the output stays as it is, in units of the scores."""
  if call.dropped and call.dtype == jnp.float16:
    return 0.0  # dropout makes weights larger still, and float16 ends at 2^16
  return min(_GROWTH / (call.unit * softmax.LOG2_E), 1e38)  # finite, for the first scores must exceed -inf by more


def _rescale(acc: Any, shrink: Any) -> Any:
  """`acc [64, width]` times `shrink [64]`, in warps where that is not 1 for all of their rows."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, nvvm, scf, vector

  @plgpu.inline_mgpu(arg_types=(leaves.WGMMA, leaves.WGMMA.reduce(1)),
                     return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=leaves.WGMMA))
  def multiply(context, acc, shrink):
    del context
    one, lanes = arith.constant(ir.F32Type.get(), 1.0), arith.constant(ir.IntegerType.get_signless(32), 0xffffffff)
    others = [arith.cmpf(arith.CmpFPredicate.UNE, vector.extract(x, [], [0]), one) for x in shrink.registers.flat]
    # With a branch of each thread's own ptxas spills more.
    wanted = nvvm.vote_sync(lanes, functools.reduce(arith.ori, others), nvvm.VoteSyncKind.any)
    branch = scf.IfOp(wanted, [x.type for x in acc.registers.flat], has_else=True)
    with ir.InsertionPoint(branch.then_block):
      scf.yield_(list((acc * shrink.broadcast_in_dim(acc.shape, (0,), acc.layout)).registers.flat))
    with ir.InsertionPoint(branch.else_block):
      scf.yield_(list(acc.registers.flat))
    registers = np.array(list(branch.results), dtype=object).reshape(acc.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)

  return multiply(acc, shrink)
