"""The backward pass in two kernels: dQ row by row, dK and dV column by column.

The probabilities are computed again from lse. Each output tile is summed by one warpgroup in a fixed order: no atomics, and two runs
give the same bits. Gradients of the logits' arrays that run along queries or along keys alone are sums over the tiles that a
kernel passes anyway; `jax.vjp` of the logits themselves gives what is summed.
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

from .. import schedule, softmax
from . import launch, leaves, lookup


class TileGradients(NamedTuple):
  """What all passes compute alike, of one window."""

  p: Any  # the probabilities
  dqk: Any  # d(q·k)
  dleaves: tuple[Any, ...]  # the wanted leaves' parts of it, all of the window's shape
  drop: Any  # dropout of this window


def tile_gradients(call: launch.Call, logits: Any, tiles: list[Any], window: leaves.Window, masked: bool, wanted: tuple[int, ...],
                   qk: Any, lse: Any, dp: Any, delta: Any) -> TileGradients:
  """From q kᵀ, `dp()`, which is dO Vᵀ, less δ unless there is dropout, and `lse()` (in the unit of the scores) and `delta()`.

  Functions are called where they are needed, and not before: a thread has few registers.
  """
  take = lookup.Replay(call.take)

  def scores(qk, given):
    filled = list(tiles)
    for number, x in zip(wanted, given):
      filled[number] = x
    return call.scores(logits, filled, window, qk, masked, take)

  given = [x if jnp.ndim(x) else window.everywhere(x) for x in (tiles[n] for n in wanted)]
  if any(isinstance(x, leaves.Table) for x in tiles):
    scores(qk, given)
    take.ready = True
  s, pull = jax.vjp(scores, qk, given)
  p = softmax.probabilities(s, lse(), call.weight)
  drop = functools.partial(call.drop, logits, tiles)
  ds = softmax.dscores(p, drop(dp()), delta()) if call.dropped else softmax.dscores(p, dp(), 0.0)
  dqk, dleaves = pull(ds)
  return TileGradients(p, dqk, tuple(dleaves), drop)


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
  count, height = len(jax.tree.leaves(logits)), launch.WARPGROUP_ROWS

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, **scratch):
    visit_refs, leaf_refs, (dq_ref, *dleaf_refs) = refs[:4], refs[4:4 + count], refs[4 + count:]
    memory = types.SimpleNamespace(**scratch)
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    kv_head = lax.div(head, call.groups)
    number, walk = launch.walk(visits, visit_refs, batch, kv_head, lax.axis_index("tile"))
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
      lse, delta = (plgpu.load(ref.at[batch, head, mine], layout=leaves.WGMMA.reduce(1), optimized=False)
                    for ref in (lse_ref, delta_ref))
      lse, delta = (functools.partial(lax.broadcast_in_dim, x, (height, columns), [0]) for x in (lse, delta))
      plgpu.barrier_wait(loaded)

      def gradients(n, qk, dp, sums, masked):
        """(d(q·k), sums over keys) of tile n."""
        window = leaves.Window(batch, head, row, walk.tile(n) * columns, height, columns)
        got = tile_gradients(call, logits, call.tiles_of(logits, leaf_refs, window), window, masked, wanted, qk, lse, dp, delta)
        return got.dqk, tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))

      step = functools.partial(_dq_step, call, gradients, delta, q_tile, dout_tile, keys, values,
                               memory.ds.at[warpgroup] if "ds" in scratch else None)
      acc = launch.in_layout(jnp.zeros((height, width), jnp.float32))
      sums = tuple(launch.in_layout(jnp.zeros((height,), jnp.float32), 1) for _ in wanted)
      acc, sums = launch.visit_all(call, walk, step, (acc, sums))
      for ref, total in zip(dleaf_refs, sums):
        ref.at[batch, head, mine][...] = total
      out_tile = memory.out.at[warpgroup] if "out" in scratch else q_tile.at[0]
      out_tile[...] = (acc * call.unit).astype(out_dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out_tile, dq_ref.at[batch, mine, head])
      plgpu.wait_smem_to_gmem(0)

  outs = [jax.ShapeDtypeStruct((batch, residuals.q.shape[1], call.heads, width), out_dtype),
          *(jax.ShapeDtypeStruct((batch, call.heads, tiles * rows), jnp.float32) for _ in wanted)]
  matrix = functools.partial(launch.matrix, dtype)
  scratch = launch.rings(call, warpgroups, k=(columns, width), v=(columns, value_width)) | dict(
      q=matrix(warpgroups, call.pieces, height, width), dout=matrix(warpgroups, call.pieces, height, value_width),
      loaded=plgpu.Barrier(num_arrivals=2 * call.pieces, num_barriers=warpgroups))
  if out_dtype != dtype:
    scratch["out"] = launch.matrix(out_dtype, warpgroups, height, width)
  if not call.overlapped:
    scratch["ds"] = matrix(warpgroups, call.pieces, height, columns)
  grid = {"head": call.heads, "tile": tiles, "batch": batch}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, (rows, columns))]
  dq, *dleaves = call.launch(kernel, "jflash_dq", grid, warpgroups, ins, outs, scratch)
  return dq, dleaves


def _dq_step(call, gradients, delta, q_tile, dout_tile, keys, values, ds_tile, n, carry, masked):
  """Adds tile n; dS is an operand from registers, or from shared memory at `ds_tile`."""
  acc, sums = carry
  keys.wait(n)
  ds, sums = two_products(
      call, lambda a, b: (q_tile.at[a], keys.tile(n, b).transpose((1, 0))),
      lambda a, b: (dout_tile.at[a], values.tile(n, b).transpose((1, 0))), lambda: values.wait(n), lambda: values.release(n), delta,
      lambda s, dp: gradients(n, s, dp, sums, masked), (launch.WARPGROUP_ROWS, call.tiles[1]))
  acc, = launch.accumulate(call, [acc], [ds], [lambda b: keys.tile(n, b)], [ds_tile])
  keys.release(n)
  return acc, sums


def two_products(call: launch.Call, first: Any, second: Any, wait: Any, release: Any, start: Any, use: Any,
                  shape: tuple[int, int]) -> Any:
  """`use(s, dp)` of two products of tiles; the second comes less `start()`, and may still run until `dp()` is called."""
  acc = plgpu.ACC(shape, jnp.float32)
  if not call.overlapped:
    s = launch.product(call, first, acc)
    wait()
    dp = launch.product(call, second, acc)
    release()
    return use(s, lambda: dp if call.dropped else dp - start())

  def products(s_ref, dp_ref):
    for pair in call.products:
      plgpu.wgmma(s_ref, *first(*pair))
    if not call.dropped:
      dp_ref[...] = -start()
    wait()
    for pair in call.products:
      plgpu.wgmma(dp_ref, *second(*pair))
    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(call.products))

    def dp():
      result = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
      release()
      return result

    return use(s, dp)

  return pl.run_scoped(products, acc, acc)


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
  (rows, columns), stages, dtype = call.tiles, call.stages, call.dtype
  warpgroups, tiles = columns // launch.WARPGROUP_ROWS, -(-call.keys // columns)
  out_dtype = jnp.float32 if call.pieces > 1 else dtype
  count, height, groups = len(jax.tree.leaves(logits)), launch.WARPGROUP_ROWS, call.groups
  widths, units = zip(*(x for x, asked in zip(((width, call.unit), (value_width, 1.0)), of) if asked))

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, **scratch):
    visit_refs, leaf_refs, refs = refs[:4], refs[4:4 + count], refs[4 + count:]
    grad_refs, dleaf_refs = refs[:len(widths)], refs[len(widths):]
    memory = types.SimpleNamespace(**scratch)
    batch, kv_head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    number, walk = launch.walk(visits, visit_refs, batch, kv_head, lax.axis_index("tile"))
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
        queries.load(n, [q_ref.at[at(p)] for p in pieces], (lse_ref.at[batch, head, pl.ds(row, rows)], memory.lse))
        douts.load(n, [dout_ref.at[at(p)] for p in pieces], (delta_ref.at[batch, head, pl.ds(row, rows)], memory.delta))

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

      def of_group(g, accs):
        head = kv_head * groups + g

        def statistic(ref, n):
          slot = queries.slot(g * walk.count + n)
          load = lambda: plgpu.load(ref.at[slot], layout=leaves.WGMMA.reduce(0))
          return lambda: lax.broadcast_in_dim(load(), (height, rows), [1])

        def gradients(n, qk, dp, sums, masked):
          """(Pᵀ after dropout, d(q·k)ᵀ, sums over queries) of tile n of this head."""
          window = leaves.Window(batch, head, walk.tile(n) * rows, column, rows, height, transposed=True)
          got = tile_gradients(call, logits, call.tiles_of(logits, leaf_refs, window), window, masked, wanted, qk,
                               statistic(memory.lse, n), dp, statistic(memory.delta, n))
          return got.drop(got.p), got.dqk, tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))

        step = functools.partial(_dkv_step, call, of, gradients, functools.partial(statistic, memory.delta), k_tile, v_tile, queries, douts, g * walk.count,
                                 [memory.ds.at[warpgroup], memory.p.at[warpgroup]] if "p" in scratch else [None, None])
        sums = tuple(launch.in_layout(jnp.zeros((height,), jnp.float32), 1) for _ in wanted)
        accs, sums = launch.visit_all(call, walk, step, (accs, sums))
        for ref, total in zip(dleaf_refs, sums):
          ref.at[batch, head, mine][...] = total
        return accs

      accs = tuple(launch.in_layout(jnp.zeros((height, w), jnp.float32)) for w in widths)
      accs = lax.fori_loop(0, groups, of_group, accs) if groups > 1 else of_group(0, accs)
      for which, (acc, unit) in enumerate(zip(accs, units)):
        out_tile = memory.out.at[warpgroup, :, pl.ds(0, acc.shape[1])] if "out" in scratch else k_tile.at[0]
        out_tile[...] = (acc * unit).astype(out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, grad_refs[which].at[batch, mine, kv_head])
        plgpu.wait_smem_to_gmem(0)

  outs = [*(jax.ShapeDtypeStruct((batch, residuals.k.shape[1], call.kv_heads, w), out_dtype) for w in widths),
          *(jax.ShapeDtypeStruct((batch, call.heads, tiles * columns), jnp.float32) for _ in wanted)]
  matrix = functools.partial(launch.matrix, dtype)
  scratch = launch.rings(call, warpgroups, 1, q=(rows, width), dout=(rows, value_width)) | dict(
      lse=plgpu.SMEM((stages, rows), jnp.float32), delta=plgpu.SMEM((stages, rows), jnp.float32),
      k=matrix(warpgroups, call.pieces, height, width),
      loaded=plgpu.Barrier(num_arrivals=(1 + of[0]) * call.pieces, num_barriers=warpgroups))
  if out_dtype != dtype or {*widths} != {width}:
    scratch["out"] = launch.matrix(out_dtype, warpgroups, height, max(widths))
  if of[0]:
    scratch["v"] = matrix(warpgroups, call.pieces, height, value_width)
  if not call.overlapped:
    scratch |= dict(p=matrix(warpgroups, call.pieces, height, rows), ds=matrix(warpgroups, call.pieces, height, rows))
  grid = {"head": call.kv_heads, "tile": tiles, "batch": batch}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, (rows, columns), transposed=True)]
  results = call.launch(kernel, "jflash_dkv", grid, warpgroups, ins, outs, scratch)
  return results[:len(widths)], results[len(widths):]


def _dkv_step(call, of, gradients, delta, k_tile, v_tile, queries, douts, before, written, n, carry, masked):
  """Adds tile n, number `before` + n of all; dSᵀ and Pᵀ are operands from registers, or from shared memory at `written`."""
  accs, sums = carry
  at = before + n
  queries.wait(at)
  shape = launch.WARPGROUP_ROWS, call.tiles[0]
  scores = lambda a, b: (k_tile.at[a], queries.tile(at, b).transpose((1, 0)))
  if of[0]:
    p, ds, sums = two_products(
        call, scores, lambda a, b: (v_tile.at[a], douts.tile(at, b).transpose((1, 0))), lambda: douts.wait(at), lambda: None,
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
