"""dQ = d(QKᵀ) K, row by row: a thread block keeps a query tile and sums over its key tiles in one order.

Gradients of the logits' arrays that run along queries alone, or along neither side, are sums over the tiles that it passes anyway.
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


def dq(call: launch.Call, residuals: launch.Residuals, logits: Any, visits: schedule.RowVisits,
       wanted: tuple[int, ...] = ()) -> tuple[Any, list[Any]]:
  """dQ = d(QKᵀ) K, and the wanted leaves' gradients summed over keys.

  Returns:
    `[B, T, N, H]` (float32 where operands come in pieces), and a `[B, N, T filled up]` for each wanted leaf.
  """
  (batch, _, _, width), value_width = residuals.q.shape, residuals.v.shape[3]
  (rows, columns), stages, dtype = call.tiles, call.stages, call.dtype
  warpgroups, tiles = rows // launch.WARPGROUP_ROWS, -(-call.queries // rows)
  out_dtype = jnp.float32 if call.pieces > 1 else dtype
  count, height, few_keys = len(jax.tree.leaves(logits)), launch.WARPGROUP_ROWS, min(mend.KEYS, columns)

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, **scratch):
    visit_refs, leaf_refs, (dq_ref, *dleaf_refs) = refs[:4], refs[4:4 + count], refs[4 + count:]
    memory = types.SimpleNamespace(**scratch)
    batch, head, warpgroup = launch.place()
    kv_head = lax.div(head, call.groups)
    number, walk = launch.walk(visits, visit_refs, batch, kv_head)
    keys = launch.Ring(memory.k_tiles, memory.k_full, memory.k_empty, stages)
    values = launch.Ring(memory.v_tiles, memory.v_full, memory.v_empty, stages)

    @pl.when(warpgroup == warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=True)
      launch.load_keys(call, walk, batch, kv_head, (keys, k_ref), (values, v_ref))

    @pl.when(warpgroup < warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=False)
      row = number * rows + warpgroup * height
      mine = pl.ds(row, height)
      q_tile, dout_tile, loaded = memory.q.at[warpgroup], memory.dout.at[warpgroup], memory.loaded.at[warpgroup]
      for piece in range(call.pieces):
        for source, tile in ((q_ref, q_tile), (dout_ref, dout_tile)):
          plgpu.copy_gmem_to_smem(source.at[batch, mine, piece * call.heads + head], tile.at[piece], loaded)

      def statistics(batch, head, row):
        return tuple(plgpu.load(ref.at[batch, head, pl.ds(row, height)], layout=leaves.WGMMA.reduce(1), optimized=False)
                     for ref in (lse_ref, delta_ref))

      of_rows = lse, delta = statistics(batch, head, row)
      plgpu.barrier_wait(loaded)

      def gradients(batch, head, row, key, qk, dp, sums, masked, hide=False, of_rows=of_rows):
        """(d(q·k), sums over keys) with the keys from `key` on."""
        window = leaves.Window(batch, head, row, key, *qk.shape)
        got = tile_gradients(call, logits, call.tiles_of(logits, leaf_refs, window), window, masked, wanted, qk,
                             lambda: window.along_rows(of_rows[0]), dp, lambda: window.along_rows(of_rows[1]), hide)
        return got.dqk, tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))

      step = functools.partial(
          _dq_step, call, lambda n, *args: gradients(batch, head, row, walk.tile(n) * columns, *args),
          lambda: lax.broadcast_in_dim(delta, (height, columns), [0]), q_tile, dout_tile, keys, values,
          memory.ds.at[warpgroup] if "ds" in scratch else None)
      zeros = lambda *shape: launch.in_layout(jnp.zeros(shape, jnp.float32), None if len(shape) == 2 else 1)
      no_sums = tuple(zeros(height) for _ in wanted)
      acc, sums = launch.visit_all(call, walk, step, (zeros(height, width), no_sums))

      def place():
        batch, head, warpgroup = launch.place(visit_refs[1][0])
        kv_head = lax.div(head, call.groups)
        number, walk = launch.walk(visits, visit_refs, batch, kv_head)
        return batch, head, kv_head, warpgroup, number * rows + warpgroup * height, walk

      def leave():
        batch, head, _, warpgroup, row, _ = place()
        mine = pl.ds(row, height)
        for ref, total in zip(dleaf_refs, sums):
          ref.at[batch, head, mine][...] = total
        out_tile = memory.out.at[warpgroup] if "out" in scratch else memory.q.at[warpgroup, 0]
        out_tile[...] = (acc * call.unit).astype(out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, dq_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

      def again():
        batch, head, kv_head, warpgroup, row, walk = place()
        lse, delta = statistics(batch, head, row)
        few = pl.ds(0, few_keys)
        tiles = [lambda piece, tiles=tiles: tiles.at[warpgroup, piece, few] for tiles in (memory.k_tiles, memory.v_tiles)]

        def compute(column):
          def visit(key, carry):
            acc, sums = carry
            places = [(batch, pl.ds(key, few_keys), piece * call.kv_heads + kv_head) for piece in range(call.pieces)]
            mend.load([ref.at[x] for ref in (k_ref, v_ref) for x in places],
                      [tile(piece) for tile in tiles for piece in range(call.pieces)], memory.mended.at[warpgroup])
            s, dp = mend.two_products(call, (memory.q.at[warpgroup], memory.dout.at[warpgroup]), tiles, key)
            less = dp if call.dropped else dp - lax.broadcast_in_dim(delta, dp.shape, [0])
            ds, sums = gradients(batch, head, row, key, s, lambda: less, sums, True, True, (lse, delta))
            right = lambda piece: memory.k_tiles.at[warpgroup, piece, few, pl.ds(column, mend.WIDTH)]
            for piece in range(call.pieces):
              mend.clean(right(piece))
            acc, = launch.accumulate(call, [acc], [ds], [right], [memory.ds.at[warpgroup, :, :, few] if "ds" in scratch else None])
            return acc, sums

          acc, sums = mend.visit_all(walk, columns, visit, (zeros(height, mend.WIDTH), no_sums), few_keys)
          for ref, total in zip(dleaf_refs, sums):
            ref.at[batch, head, pl.ds(row, height)][...] = total
          return acc * call.unit

        mend.by_columns(width, compute, lambda column, x: mend.store(
            x, memory.mended_tile.at[warpgroup], dq_ref.at[batch, pl.ds(row, height), head, pl.ds(column, mend.WIDTH)]))

      mend.leave_or(call, memory, leave, again, acc, *sums)

  outs = [jax.ShapeDtypeStruct((batch, residuals.q.shape[1], call.heads, width), out_dtype),
          *(jax.ShapeDtypeStruct((batch, call.heads, tiles * rows), jnp.float32) for _ in wanted)]
  lanes = min(64, columns)
  matrix = functools.partial(launch.matrix, dtype, lanes=lanes)
  scratch = launch.rings(call, warpgroups, lanes=lanes, k=(columns, width), v=(columns, value_width)) | {
      "q": matrix(warpgroups, call.pieces, height, width), "dout": matrix(warpgroups, call.pieces, height, value_width),
      "loaded": plgpu.Barrier(num_arrivals=2 * call.pieces, num_barriers=warpgroups)}
  if out_dtype != dtype:
    scratch["out"] = launch.matrix(out_dtype, warpgroups, height, width)
  if not call.overlapped:
    scratch["ds"] = matrix(warpgroups, call.pieces, height, columns)
  if call.masked:
    scratch |= mend.scratch(warpgroups, 2 * call.pieces, out_dtype)
  grid = {"head": call.heads, "tile": tiles, "batch": batch}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, (rows, columns))]
  dq, *dleaves = call.launch(kernel, "jflash_dq", grid, warpgroups, ins, outs, scratch)
  return dq, dleaves


def _dq_step(call, gradients, delta, q_tile, dout_tile, keys, values, ds_tile, n, carry, masked):
  """Adds tile n; dS is an operand from registers, or from shared memory at `ds_tile`."""
  acc, sums = carry
  keys.wait(n)
  q, dout = launch.kept(q_tile, n), launch.kept(dout_tile, n)
  ds, sums = two_products(
      call, lambda a, b: (q(a), keys.tile(n, b).transpose((1, 0))),
      lambda a, b: (dout(a), values.tile(n, b).transpose((1, 0))), lambda: values.wait(n), lambda: values.release(n), delta,
      lambda s, dp: gradients(n, s, dp, sums, masked), (launch.WARPGROUP_ROWS, call.tiles[1]))
  acc, = launch.accumulate(call, [acc], [ds], [lambda b: keys.tile(n, b)], [ds_tile])
  keys.release(n)
  return acc, sums
