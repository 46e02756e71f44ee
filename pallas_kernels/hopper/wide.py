"""dK and dV of wide heads: two warpgroups share the work on each tile, half of the scores and half of the columns each.

A warpgroup that summed dK and dV `[64, 256]` alone would need 256 registers a thread for that, and may have 240. Here a thread
block has 64 keys. Each warpgroup computes Pᵀ and dSᵀ for half of the queries of a tile and leaves them in shared memory, whence
both take all of them to multiply them with their halves of the columns of dO and Q. No product is computed twice.

Products run one behind the other, and what is computed between them beside them: P beside V dOᵀ, dS beside Pᵀ dO.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import schedule
from . import launch, leaves, mend
from .backward import tile_weights

_SHARERS = 2  # warpgroups that share a tile
_HEIGHT = launch.WARPGROUP_ROWS
_PART = _HEIGHT // _SHARERS  # queries of a tile that one of them computes with; half a head is a multiple of it


class Place(NamedTuple):
  """What a warpgroup works on."""

  batch: Any
  kv_head: Any
  warpgroup: Any
  column: Any  # the first key
  walk: launch.Walk


def dkv(call: launch.Call, residuals: launch.Residuals, logits: Any, visits: schedule.RowVisits,
        wanted: tuple[int, ...] = ()) -> tuple[list[Any], list[Any]]:
  """As `backward.dkv`, for operands of one piece; tiles have 64 query rows, and key columns in multiples of 64."""
  (batch, _, _, width), value_width = residuals.q.shape, residuals.v.shape[3]
  (rows, columns), groups, count = call.tiles, call.groups, len(jax.tree.leaves(logits))
  tiles, parts = -(-call.keys // columns), columns // _HEIGHT

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, **scratch):
    visit_refs, leaf_refs, (dk_ref, dv_ref, *dleaf_refs) = refs[:4], refs[4:4 + count], refs[4 + count:]
    memory = types.SimpleNamespace(**scratch)
    queries = launch.Ring(memory.q_tiles, memory.q_full, memory.q_empty, call.stages)
    douts = launch.Ring(memory.dout_tiles, memory.dout_full, memory.dout_empty, call.stages)

    def place(zero=0):
      batch, kv_head, warpgroup = launch.place(zero)
      block = lax.axis_index("tile") + zero
      number, walk = launch.walk(visits, visit_refs, batch, kv_head, lax.div(block, jnp.int32(parts)))
      return Place(batch, kv_head, warpgroup, number * columns + lax.rem(block, jnp.int32(parts)) * _HEIGHT, walk)

    here = place()

    @pl.when(here.warpgroup == _SHARERS)
    def _():
      launch.share_registers(_SHARERS, loads=True)
      for source, tile in ((k_ref, memory.k), (v_ref, memory.v)):
        plgpu.copy_gmem_to_smem(source.at[here.batch, pl.ds(here.column, _HEIGHT), here.kv_head], tile.at[0], memory.loaded)

      @pl.loop(0, here.walk.count * groups)
      def _(n):
        head = here.kv_head * groups + lax.div(n, here.walk.count)
        at = pl.ds(here.walk.tile(lax.rem(n, here.walk.count)) * rows, rows)
        queries.load(n, [q_ref.at[here.batch, at, head]], (lse_ref.at[here.batch, head, at], memory.lse),
                     (delta_ref.at[here.batch, head, at], memory.delta))
        douts.load(n, [dout_ref.at[here.batch, at, head]])

      queries.drain(here.walk.count * groups)
      douts.drain(here.walk.count * groups)

    @pl.when(here.warpgroup < _SHARERS)
    def _():
      launch.share_registers(_SHARERS, loads=False)
      plgpu.barrier_wait(memory.loaded)

      def each_head(visit_head, state, part=lambda total: total):
        """`visit_head(g, (state, sums))` for all heads; `part` of their sums is left, and their total goes on with the state."""
        none = tuple(_zeros(_HEIGHT) for _ in wanted)

        def visit(g, carry):
          state, before = carry
          state, sums = visit_head(g, (state, none))
          if wanted:
            there = place(visit_refs[1][0])
            for ref, total in zip(dleaf_refs, sums):
              ref.at[there.warpgroup, there.batch, there.kv_head * groups + g, pl.ds(there.column, _HEIGHT)][...] = part(total)
          return state, tuple(a + b for a, b in zip(sums, before))

        return lax.fori_loop(0, groups, visit, (state, none)) if groups > 1 else visit(0, (state, none))

      def visit_head(g, carry):
        def step(n, carry, masked):
          window = leaves.Window(here.batch, here.kv_head * groups + g, here.walk.tile(n) * rows, here.column, rows, _HEIGHT, True)
          return _step(call, memory, queries, douts, n, here.warpgroup + (n >> 30), window, functools.partial(
              tile_weights, call, logits, masked=masked, wanted=wanted), lambda part: call.tiles_of(logits, leaf_refs, part), carry)
        return lax.fori_loop(0, here.walk.count, functools.partial(step, masked=call.masked), carry)

      (*accs, _), sums = each_head(visit_head, (_zeros(_HEIGHT, width // _SHARERS), _zeros(_HEIGHT, value_width // _SHARERS),
                                                jnp.int32(0)))

      def leave():
        there = place(visit_refs[1][0])
        for tile, acc, unit in zip((memory.k, memory.v), accs, (call.unit, 1.0)):
          tile.at[0, :, _half(there.warpgroup, 2 * acc.shape[1])][...] = (acc * unit).astype(call.dtype)
        _meet(memory.met.at[0])
        for number, tile, ref in ((0, memory.k, dk_ref), (1, memory.v, dv_ref)):
          @pl.when(there.warpgroup == number)
          def _(tile=tile, ref=ref):
            plgpu.copy_smem_to_gmem(tile.at[0], ref.at[there.batch, pl.ds(there.column, _HEIGHT), there.kv_head])
            plgpu.wait_smem_to_gmem(0)

      def again():
        there = place(visit_refs[1][0])
        few, number = pl.ds(0, _PART), there.warpgroup
        tiles = [lambda _, tiles=tiles: tiles.at[number, 0, few] for tiles in (memory.q_tiles, memory.dout_tiles)]
        first_only = lambda total: jnp.where(lax.broadcast_in_dim(number, total.shape, []) == 0, total, 0.0)

        def compute(of_keys, column):
          def visit_head(g, carry):
            head = there.kv_head * groups + g

            def visit(row, carry):
              (acc,), sums = carry
              at = pl.ds(row, _PART)
              mend.load([q_ref.at[there.batch, at, head], dout_ref.at[there.batch, at, head], lse_ref.at[there.batch, head, at],
                         delta_ref.at[there.batch, head, at]],
                        [tiles[0](0), tiles[1](0), memory.lse.at[number, few], memory.delta.at[number, few]],
                        memory.mended.at[number])
              s, dp = mend.two_products(call, (memory.k, memory.v), tiles, row)
              window = leaves.Window(there.batch, head, row, there.column, _PART, _HEIGHT, transposed=True)
              lse, delta = (window.along_rows(plgpu.load(ref.at[number, few], layout=leaves.WGMMA.reduce(0)))
                            for ref in (memory.lse, memory.delta))
              p, gradients = tile_weights(call, logits, call.tiles_of(logits, leaf_refs, window), window, True, wanted, s,
                                          lambda: lse, hide=True)
              got = gradients(lambda: dp if call.dropped else dp - delta, lambda: delta)
              right = lambda _: tiles[0 if of_keys else 1](0).at[:, pl.ds(column, _PART)]
              if of_keys:
                mend.clean(memory.q_tiles.at[number, 0, :, pl.ds(column, _PART)])
              acc, = launch.accumulate(call, [acc], [got.dqk if of_keys else p()], [right], [memory.p.at[number, pl.ds(0, 1)]])
              return (acc,), tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))

            return mend.visit_all(there.walk, rows, visit, carry, _PART)

          (acc,), _ = each_head(visit_head, (_zeros(_HEIGHT, _PART),), first_only)
          return acc

        for of_keys, ref, unit in ((True, dk_ref, call.unit), (False, dv_ref, 1.0)):
          size = ref.shape[3] // _SHARERS

          @pl.loop(0, size // _PART)
          def _(n, of_keys=of_keys, ref=ref, unit=unit, size=size):
            column = number * size + n * _PART
            mend.store(compute(of_keys, column) * unit, memory.ds.at[number],
                       ref.at[there.batch, pl.ds(there.column, _HEIGHT), there.kv_head, pl.ds(column, _PART)])

      if not call.masked:
        leave()
      else:  # what one warpgroup leaves lies where the other would read: either both compute again, or none
        memory.broken[here.warpgroup] = mend.wanted(memory.flags.at[here.warpgroup], *accs, *sums).astype(jnp.int32)
        _meet(memory.met.at[0])
        lax.cond(memory.broken[here.warpgroup] + memory.broken[1 - here.warpgroup] > 0, again, leave)

  outs = [*(jax.ShapeDtypeStruct((batch, residuals.k.shape[1], call.kv_heads, w), call.dtype) for w in (width, value_width)),
          *(jax.ShapeDtypeStruct((_SHARERS, batch, call.heads, tiles * columns), jnp.float32) for _ in wanted)]
  matrix = functools.partial(launch.matrix, call.dtype, lanes=_PART)
  rings = functools.partial(launch.rings, call, _SHARERS, lanes=_PART)
  scratch = rings(2, q=(rows, width)) | rings(dout=(rows, value_width)) | {
      "k": matrix(1, _HEIGHT, width), "v": matrix(1, _HEIGHT, value_width), "loaded": plgpu.Barrier(num_arrivals=2),
      "lse": plgpu.SMEM((call.stages, rows), jnp.float32), "delta": plgpu.SMEM((call.stages, rows), jnp.float32),
      "p": matrix(call.stages, _SHARERS, _HEIGHT, _PART), "ds": matrix(_SHARERS, _HEIGHT, _PART),
      "met": plgpu.Barrier(num_arrivals=_SHARERS, num_barriers=2)}
  if call.masked:
    scratch |= {"flags": plgpu.SMEM((_SHARERS, _HEIGHT), jnp.float32), "broken": plgpu.SMEM((_SHARERS,), jnp.int32),
                "mended": plgpu.Barrier(num_arrivals=4, num_barriers=_SHARERS)}
  grid = {"head": call.kv_heads, "tile": tiles * parts, "batch": batch}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, (rows, columns), transposed=True)]
  dk, dv, *dleaves = call.launch(kernel, "jflash_dkv", grid, _SHARERS, ins, outs, scratch)
  return [dk, dv], [x.sum(axis=0) for x in dleaves]


def _step(call: launch.Call, memory: Any, queries: launch.Ring, douts: launch.Ring, n: Any, warpgroup: Any,
          window: leaves.Window, weights: Any, tiles_of: Any, carry: Any) -> Any:
  """Adds visit n of a head; its tiles are in the ring's slot of that number, which comes with the sums."""
  (*accs, slot), sums = carry
  mine = _half(warpgroup, window.rows)
  window = window._replace(row=window.row + warpgroup * _PART, rows=_PART)
  statistic = lambda ref: lambda: window.along_rows(plgpu.load(ref.at[slot, mine], layout=leaves.WGMMA.reduce(0)))
  queries.wait(slot)

  def add(dk_ref, dv_ref, s_ref, dp_ref, dp, sums):
    q, dout, p_tile = queries.tile(slot, 0), douts.tile(slot, 0), memory.p.at[slot]
    plgpu.wgmma(s_ref, launch.kept(memory.k, n)(0), q.at[mine].transpose((1, 0)))
    douts.wait(slot)
    plgpu.wgmma(dp_ref, launch.kept(memory.v, n)(0), dout.at[mine].transpose((1, 0)))
    p, gradients = weights(tiles_of(window), window, qk=plgpu.wgmma_accumulator_load(s_ref, wait_n=1), lse=statistic(memory.lse))
    share(p_tile, p(), memory.met.at[1])
    multiply(dv_ref, p_tile, dout)
    got = gradients(lambda: dp(_SHARERS), statistic(memory.delta))
    share(memory.ds, got.dqk, memory.met.at[0])
    multiply(dk_ref, memory.ds, q)
    return tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))

  def share(tile, x, barrier):
    tile.at[warpgroup][...] = x.astype(call.dtype)
    _meet(barrier)

  def multiply(acc, left, right):
    for part in range(_SHARERS):
      plgpu.wgmma(acc, launch.kept(left, n)(part), right.at[pl.ds(part * _PART, _PART), _half(warpgroup, right.shape[1])])

  accs, sums = _run(call, add, window.shape, None if call.dropped else -statistic(memory.delta)(), tuple(accs), sums)
  queries.release(slot)
  douts.release(slot)
  return (*accs, jnp.where(slot == call.stages - 1, 0, slot + 1)), sums


def _run(call: launch.Call, add: Any, shape: tuple[int, int], start: Any, accs: tuple[Any, ...],
         sums: tuple[Any, ...]) -> tuple[Any, Any]:
  """(accs, `sums = add(*accs, s, dp, dp after some products but for the last …, sums)`), with all products awaited.

  Args:
    shape: of s and dp.
    start: what dp starts with; None for 0.
  """
  if not call.overlapped:  # interpreters have no accumulators that hold something from the start
    def scoped(*refs):
      load = lambda later: plgpu.wgmma_accumulator_load(refs[3], wait_n=later) + (0.0 if start is None else start)
      found = add(*refs, load, sums)
      return tuple(acc + ref[...] for acc, ref in zip(accs, refs)), found

    return pl.run_scoped(scoped, *(plgpu.ACC(x, jnp.float32) for x in (*(acc.shape for acc in accs), shape, shape)))

  def run(refs):
    *acc_refs, sum_refs = refs
    load = lambda later: plgpu.wgmma_accumulator_load(acc_refs[3], wait_n=later)
    for ref, x in zip(sum_refs, add(*acc_refs, load, tuple(ref[...] for ref in sum_refs))):
      ref[...] = x

  init = plgpu.ACC.init
  dp = init(_zeros(*shape) if start is None else start)
  dk, dv, _, _, sums = pl.run_state(run)((*map(init, accs), init(_zeros(*shape)), dp, sums))
  return (dk, dv), sums


def _half(warpgroup: Any, size: int) -> Any:
  """A warpgroup's half of `size` rows or columns."""
  return pl.ds(warpgroup * (size // _SHARERS), size // _SHARERS)


def _zeros(*shape: int) -> Any:
  return launch.in_layout(jnp.zeros(shape, jnp.float32), None if len(shape) == 2 else 1)


def _meet(barrier: Any) -> None:
  """Returns when both warpgroups are here, and see what the other has written."""
  plgpu.commit_smem()
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)
