"""dK = d(QKᵀ)ᵀ Q and dV = Pᵀ dO, column by column, on transposed scores: a thread block keeps a key tile and sums over queries.

Gradients of the logits' arrays that run along keys alone are sums over the tiles that it passes anyway.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import schedule
from . import launch, leaves, mend
from .backward import tile_gradients, two_products


def dkv(call: launch.Call, residuals: launch.Residuals, logits: Any, visits: schedule.RowVisits, wanted: tuple[int, ...] = (),
        of: tuple[bool, bool] = (True, True)) -> tuple[list[Any], list[Any]]:
  """dK = d(QKᵀ)ᵀ Q and dV = Pᵀ dO, summed over the query heads of a kv head, and leaves' gradients summed over queries.

  Args:
    visits: of the transposed table, column by column.
    wanted: leaves that run along keys.
    of: whether dK, and whether dV, is computed.

  Returns:
    dK `[B, S, K, H]` and dV `[B, S, K, E]`, as far as asked for; a `[B, N, S filled up]` for each wanted leaf.
  """
  (batch, _, _, width), value_width = residuals.q.shape, residuals.v.shape[3]
  (rows, columns), stages = call.tiles, call.stages
  warpgroups, tiles = columns // launch.WARPGROUP_ROWS, -(-call.keys // columns)
  out_dtype = jnp.float32 if call.pieces > 1 else call.dtype
  count, height, groups = len(jax.tree.leaves(logits)), launch.WARPGROUP_ROWS, call.groups
  widths, units = zip(*(x for x, asked in zip(((width, call.unit), (value_width, 1.0)), of) if asked))
  scratch, left_in = _scratch(call, width, value_width, of, out_dtype)

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, **allocated):
    visit_refs, leaf_refs, refs = refs[:4], refs[4:4 + count], refs[4 + count:]
    grad_refs, dleaf_refs = refs[:len(widths)], refs[len(widths):]
    memory = types.SimpleNamespace(**allocated)
    batch, kv_head, warpgroup = launch.place()
    number, walk = launch.walk(visits, visit_refs, batch, kv_head)
    queries = launch.Ring(memory.q_tiles, memory.q_full, memory.q_empty, stages)
    douts = launch.Ring(memory.dout_tiles, memory.dout_full, memory.dout_empty, stages)

    @pl.when(warpgroup == warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=True)

      @pl.loop(0, walk.count * groups)
      def _(n):
        head, row = kv_head * groups + lax.div(n, walk.count), walk.tile(lax.rem(n, walk.count)) * rows
        at = lambda piece: (batch, pl.ds(row, rows), piece * call.heads + head)
        pieces = range(call.pieces)
        queries.load(n, [q_ref.at[at(p)] for p in pieces], (lse_ref.at[batch, head, pl.ds(row, rows)], memory.lse),
                     (delta_ref.at[batch, head, pl.ds(row, rows)], memory.delta))
        douts.load(n, [dout_ref.at[at(p)] for p in pieces])

      queries.drain(walk.count * groups)
      douts.drain(walk.count * groups)

    @pl.when(warpgroup < warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=False)
      column = number * columns + warpgroup * height
      mine = pl.ds(column, height)
      k_tile, loaded = memory.k.at[warpgroup], memory.loaded.at[warpgroup]
      v_tile = memory.v.at[warpgroup] if of[0] else None
      for source, tile in ((k_ref, k_tile), (v_ref, v_tile)):
        for piece in range(call.pieces if tile is not None else 0):
          plgpu.copy_gmem_to_smem(source.at[batch, mine, piece * call.kv_heads + kv_head], tile.at[piece], loaded)
      plgpu.barrier_wait(loaded)

      def statistic(ref, slot, size=rows):
        load = lambda: plgpu.load(ref.at[slot, pl.ds(0, size)], layout=leaves.WGMMA.reduce(0))
        return lambda: lax.broadcast_in_dim(load(), (height, size), [1])

      def place():
        batch, kv_head, warpgroup = launch.place(visit_refs[1][0])
        number, walk = launch.walk(visits, visit_refs, batch, kv_head)
        return batch, kv_head, warpgroup, number * columns + warpgroup * height, walk

      def gradients(batch, column, head, row, slot, qk, dp, sums, masked, hide=False):
        """(Pᵀ after dropout, d(q·k)ᵀ, sums over queries) of a head's queries from `row` on, with statistics at `slot`."""
        window = leaves.Window(batch, head, row, column, qk.shape[1], height, transposed=True)
        got = tile_gradients(call, logits, call.tiles_of(logits, leaf_refs, window), window, masked, wanted, qk,
                             statistic(memory.lse, slot, qk.shape[1]), dp, statistic(memory.delta, slot, qk.shape[1]), hide)
        return got.drop(got.p), got.dqk, tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))

      zeros = lambda *shape: launch.in_layout(jnp.zeros(shape, jnp.float32), None if len(shape) == 2 else 1)
      written = (lambda warpgroup, part: [ref.at[warpgroup, :, :, part] for ref in (memory.ds, memory.p)]) if "p" in scratch else (
          lambda warpgroup, part: [None, None])

      def of_groups(kv_head, visit_group, accs):
        """`visit_group(head, g, (accs, sums))` for all query heads; their sums are left, the others go on."""
        def of_group(g, accs):
          accs, sums = visit_group(kv_head * groups + g, g, (accs, tuple(zeros(height) for _ in wanted)))
          if wanted:
            batch, kv_head_here, _, column, _ = place()
            for ref, total in zip(dleaf_refs, sums):
              ref.at[batch, kv_head_here * groups + g, pl.ds(column, height)][...] = total
          return accs, sums
        if groups == 1:
          return of_group(0, accs)
        return lax.fori_loop(0, groups, lambda g, carry: _adding(of_group(g, carry[0]), carry[1]), (
            accs, tuple(zeros(height) for _ in wanted)))

      def visit_group(head, g, carry):
        slot = lambda n: queries.slot(g * walk.count + n)
        step = functools.partial(
            _dkv_step, call, of, lambda n, *args: gradients(batch, column, head, walk.tile(n) * rows, slot(n), *args),
            lambda n: statistic(memory.delta, slot(n)), k_tile, v_tile, queries, douts, g * walk.count,
            written(warpgroup, pl.ds(0, rows)))
        return launch.visit_all(call, walk, step, carry)

      accs, sums = of_groups(kv_head, visit_group, tuple(zeros(height, w) for w in widths))

      def leave():
        batch, kv_head, warpgroup, column, _ = place()
        mine = pl.ds(column, height)
        for which, (acc, unit) in enumerate(zip(accs, units)):
          name = left_in[which]
          out_tile = allocated[name].at[warpgroup] if name.startswith("out") else allocated[name].at[warpgroup, 0]
          out_tile[...] = (acc * unit).astype(out_dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(out_tile, grad_refs[which].at[batch, mine, kv_head])
          plgpu.wait_smem_to_gmem(0)

      def again():
        batch, kv_head, warpgroup, column, walk = place()
        k_tile, v_tile = memory.k.at[warpgroup], memory.v.at[warpgroup] if of[0] else None
        few = pl.ds(0, mend.KEYS)
        tiles = [lambda piece, tiles=tiles: tiles.at[warpgroup, piece, few] for tiles in (memory.q_tiles, memory.dout_tiles)]

        def of_which(which, of_keys):
          """dK where `of_keys`, or else dV."""
          right_tiles = memory.q_tiles if of_keys else memory.dout_tiles

          def compute(first):
            def visit_group(head, g, carry):
              def visit(row, carry):
                (acc,), sums = carry
                here = pl.ds(row, mend.KEYS)
                places = [(batch, here, piece * call.heads + head) for piece in range(call.pieces)]
                statistics = [(ref.at[batch, head, here], slots.at[warpgroup, few])
                              for ref, slots in ((lse_ref, memory.lse), (delta_ref, memory.delta))]
                sources = [ref.at[x] for ref in (q_ref, dout_ref) for x in places] + [source for source, _ in statistics]
                into = [tile(piece) for tile in tiles for piece in range(call.pieces)] + [slot for _, slot in statistics]
                mend.load(sources, into, memory.mended.at[warpgroup])
                s, dp = mend.two_products(call, (k_tile, v_tile), tiles, row)
                less = dp if call.dropped else dp - statistic(memory.delta, warpgroup, mend.KEYS)()
                p, ds, sums = gradients(batch, column, head, row, warpgroup, s, lambda: less, sums, True, True)
                right = lambda piece: right_tiles.at[warpgroup, piece, few, pl.ds(first, mend.WIDTH)]
                if of_keys:
                  for piece in range(call.pieces):
                    mend.clean(right(piece))
                left, tile = (ds, written(warpgroup, few)[0]) if of_keys else (p, written(warpgroup, few)[1])
                return tuple(launch.accumulate(call, [acc], [left], [right], [tile])), sums
              return mend.visit_all(walk, rows, visit, carry)

            (acc,), _ = of_groups(kv_head, visit_group, (zeros(height, mend.WIDTH),))
            return acc * units[which]

          mend.by_columns(widths[which], compute, lambda first, x: mend.store(
              x, memory.mended_tile.at[warpgroup],
              grad_refs[which].at[batch, pl.ds(column, height), kv_head, pl.ds(first, mend.WIDTH)]))

        for which, of_keys in enumerate([kind for kind, asked in zip((True, False), of) if asked]):
          of_which(which, of_keys)

      mend.leave_or(call, memory, leave, again, *accs, *sums)

  outs = [*(jax.ShapeDtypeStruct((batch, residuals.k.shape[1], call.kv_heads, w), out_dtype) for w in widths),
          *(jax.ShapeDtypeStruct((batch, call.heads, tiles * columns), jnp.float32) for _ in wanted)]
  grid = {"head": call.kv_heads, "tile": tiles, "batch": batch}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, (rows, columns), transposed=True)]
  results = call.launch(kernel, "jflash_dkv", grid, warpgroups, ins, outs, scratch)
  return results[:len(widths)], results[len(widths):]


def _scratch(call: launch.Call, width: int, value_width: int, of: tuple[bool, bool],
             out_dtype: Any) -> tuple[dict[str, Any], list[str]]:
  """Shared memory by name, and the tiles by which the results that are asked for leave it."""
  (rows, columns), height = call.tiles, launch.WARPGROUP_ROWS
  warpgroups, matrix = columns // height, functools.partial(launch.matrix, call.dtype)
  scratch = launch.rings(call, warpgroups, 2, q=(rows, width)) | launch.rings(call, warpgroups, dout=(rows, value_width)) | {
      "lse": plgpu.SMEM((call.stages, rows), jnp.float32), "delta": plgpu.SMEM((call.stages, rows), jnp.float32),
      "k": matrix(warpgroups, call.pieces, height, width),
      "loaded": plgpu.Barrier(num_arrivals=(1 + of[0]) * call.pieces, num_barriers=warpgroups)}
  if of[0]:
    scratch["v"] = matrix(warpgroups, call.pieces, height, value_width)
  # Results leave by the tiles of operands of their width and dtype, which nobody reads any more, or by tiles of their own.
  kept = {value_width if name == "v" else width: name for name in ("k", "v") if name in scratch and out_dtype == call.dtype}
  widths = [w for w, asked in zip((width, value_width), of) if asked]
  left_in = [kept.get(w, f"out_{w}") for w in widths]
  scratch |= {name: launch.matrix(out_dtype, warpgroups, height, w) for name, w in zip(left_in, widths) if name not in scratch}
  if call.masked:
    scratch |= mend.scratch(warpgroups, 2 * call.pieces + 2, out_dtype)
  if not call.overlapped:
    scratch |= {"p": matrix(warpgroups, call.pieces, height, rows), "ds": matrix(warpgroups, call.pieces, height, rows)}
  return scratch, left_in


def _adding(result, before):
  """What a head's visits give, with the sums of heads before it: whether any is not finite shows in the whole."""
  accs, sums = result
  return accs, tuple(a + b for a, b in zip(sums, before))


def _dkv_step(call, of, gradients, delta, k_tile, v_tile, queries, douts, before, written, n, carry, masked):
  """Adds tile n, number `before` + n of all; dSᵀ and Pᵀ are operands from registers, or from shared memory at `written`."""
  accs, sums = carry
  at = before + n
  queries.wait(at)
  shape = launch.WARPGROUP_ROWS, call.tiles[0]
  k = launch.kept(k_tile, n)
  scores = lambda a, b: (k(a), queries.tile(at, b).transpose((1, 0)))
  if of[0]:
    v = launch.kept(v_tile, n)
    p, ds, sums = two_products(
        call, scores, lambda a, b: (v(a), douts.tile(at, b).transpose((1, 0))), lambda: douts.wait(at), lambda: None,
        delta(n), lambda s, dp: gradients(n, s, dp, sums, masked), shape)
  else:
    s = launch.product(call, scores, plgpu.ACC(shape, jnp.float32))
    p, ds, sums = gradients(n, s, lambda: jnp.zeros_like(s), sums, masked)
    douts.wait(at)
  chosen = lambda pair: [x for x, asked in zip(pair, of) if asked]
  rights = chosen([lambda b: queries.tile(at, b), lambda b: douts.tile(at, b)])
  accs = tuple(launch.accumulate(call, list(accs), chosen([ds, p]), rights, chosen(written)))
  queries.release(at)
  douts.release(at)
  return accs, sums
