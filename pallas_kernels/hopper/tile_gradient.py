"""The gradient of an array of the logits that runs along queries and keys: dS itself, summed over what the array broadcasts."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import schedule
from . import launch, leaves
from .backward import tile_gradients, two_products


def tile_gradient(call: launch.Call, residuals: launch.Residuals, logits: Any, wanted: int, kinds: Any) -> Any:
  """The gradient of leaf number `wanted`, in its own shape and dtype.

  A thread block has a row of the array's tiles. For each of them it adds up the batch elements and heads that share the array,
  and leaves it; no array per head exists unless the leaf is one.

  Args:
    kinds: EMPTY, PARTIAL or FULL for every tile, `[B|1, K|1, T tiles, S tiles]`.
  """
  leaf = jax.tree.leaves(logits)[wanted]
  (batch, _, _, width), value_width = residuals.q.shape, residuals.v.shape[3]
  (rows, columns), height = call.tiles, launch.WARPGROUP_ROWS
  warpgroups, count = rows // height, len(jax.tree.leaves(logits))
  lists, (row_tiles, key_tiles) = kinds.shape[:2], kinds.shape[2:]
  own = leaf.shape[:2]  # batch elements and heads that the array tells apart
  heads = call.heads // own[1]  # that share it

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, kinds_ref, *refs, **scratch):
    leaf_refs, (dleaf_ref,) = refs[:count], refs[count:]
    memory = types.SimpleNamespace(**scratch)
    own_batch, own_head, number, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup"))
    ring = lambda name: launch.Ring(*(scratch[f"{name}_{part}"] for part in ("tiles", "full", "empty")), call.stages)
    queries, keys, values, douts = (ring(name) for name in ("q", "k", "v", "dout"))

    def visits(use, end, start):
      """`end(j, kept)` for each key tile j, `kept = use(n, batch, head, j, kept)` from `start` on; n counts what is not empty.

      Returns n at the end.
      """
      def visit(m, carry):
        n, j, kept = carry
        b = own_batch if own[0] > 1 else lax.div(m, jnp.int32(heads))
        h = own_head if own[1] > 1 else lax.rem(m, jnp.int32(heads))
        place = (b * lists[1] if lists[0] > 1 else 0) + (lax.div(h, jnp.int32(call.groups)) if lists[1] > 1 else 0)
        kind = kinds_ref[(place * row_tiles + number) * key_tiles + j]
        empty = kind == schedule.EMPTY
        kept = lax.cond(empty, lambda kept: kept, lambda kept: use(n, b, h, j, kept), kept)
        return n + jnp.where(empty, 0, 1), j, kept

      def column(j, n):
        n, _, kept = lax.fori_loop(0, batch // own[0] * heads, visit, (n, j, start))
        end(j, kept)
        return n

      return lax.fori_loop(0, key_tiles, column, jnp.int32(0))

    @pl.when(warpgroup == warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=True)

      def load(n, b, h, j, carry):
        kv_head = lax.div(h, jnp.int32(call.groups))
        query = [(b, pl.ds(number * rows, rows), piece * call.heads + h) for piece in range(call.pieces)]
        key = [(b, pl.ds(j * columns, columns), piece * call.kv_heads + kv_head) for piece in range(call.pieces)]
        for x, ref, places in ((queries, q_ref, query), (keys, k_ref, key), (douts, dout_ref, query), (values, v_ref, key)):
          x.load(n, [ref.at[place] for place in places])
        return carry

      loaded = visits(load, lambda j, kept: None, jnp.int32(0))
      for x in (queries, keys, douts, values):
        x.drain(loaded)

    @pl.when(warpgroup < warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=False)
      row = number * rows + warpgroup * height
      part = pl.ds(warpgroup * height, height)

      def add(n, b, h, j, total):
        window = leaves.Window(b, h, row, j * columns, height, columns)
        statistic = lambda ref: lambda: window.along_rows(plgpu.load(
            ref.at[b, h, pl.ds(row, height)], layout=leaves.WGMMA.reduce(1), optimized=False))
        of = lambda x, y: lambda p, r: (x.tile(n, p).at[part], y.tile(n, r).transpose((1, 0)))

        def wait():
          douts.wait(n)
          values.wait(n)

        def gradient(s, dp):
          got = tile_gradients(call, logits, call.tiles_of(logits, leaf_refs, window), window, call.masked, (wanted,), s,
                               statistic(lse_ref), dp, statistic(delta_ref), hide=call.masked)
          return got.dleaves[0]

        queries.wait(n)
        keys.wait(n)
        total += two_products(call, of(queries, keys), of(douts, values), wait, lambda: None, statistic(delta_ref), gradient,
                              (height, columns))
        for x in (queries, keys, values, douts):
          x.release(n)
        return total

      def leave(j, total):
        tile = memory.out.at[warpgroup]
        tile[...] = total.astype(leaf.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, dleaf_ref.at[own_batch, own_head, pl.ds(row, height), pl.ds(j * columns, columns)])
        plgpu.wait_smem_to_gmem(0)

      visits(add, leave, launch.in_layout(jnp.zeros((height, columns), jnp.float32)))

  out = jax.ShapeDtypeStruct((*own, row_tiles * rows, key_tiles * columns), leaf.dtype)
  scratch = launch.rings(call, warpgroups, q=(rows, width), k=(columns, width), v=(columns, value_width),
                         dout=(rows, value_width)) | {
                             "out": launch.matrix(leaf.dtype, warpgroups, height, columns)}
  grid = {"head": own[1], "tile": row_tiles, "batch": own[0]}
  ins = [*residuals, jnp.asarray(kinds).reshape(-1), *call.stored(logits, (rows, columns))]
  dleaf, = call.launch(kernel, "jflash_dleaf", grid, warpgroups, ins, [out], scratch)
  return dleaf[..., :call.queries, :call.keys]
