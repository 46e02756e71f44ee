"""The backward pass in one kernel: five products a tile instead of seven, with dQ added up in global memory.

A thread block walks the query tiles of its column of key tiles, as in `columns.dkv`. Its warpgroups leave dS in shared memory,
each computes its share of what the tile adds to dQ, dS K, and the warpgroup that loads adds the whole to a float32 dQ by TMA.
Several thread blocks add to a tile of dQ: each when its turn has come, and two runs give the same bits; or as they come, and two
runs may differ in the last ones.
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
from . import launch, leaves
from .backward import tile_gradients, two_products

_HEIGHT = launch.WARPGROUP_ROWS


def fused(call: launch.Call, residuals: launch.Residuals, logits: Any, visits: schedule.RowVisits, wanted: tuple[int, ...] = (),
          ordered: bool = True) -> tuple[Any, Any, Any, list[Any]]:
  """dQ, dK and dV, and leaves' gradients summed over queries. Sums over keys are made by `rows.dq` alone.

  What is not finite in hidden keys reaches the results: `columns.dkv` and `rows.dq` would compute those again, this cannot.

  Args:
    call: of operands in one piece, with tiles whose dQ the warpgroups can share out.
    visits: of the transposed table, column by column.
    wanted: leaves that run along keys.
    ordered: whether thread blocks add to a tile of dQ in the order of their numbers, so that two runs give the same bits. One that
      waits for its turn waits for lower numbers only, and a GPU starts those first.

  Returns:
    dQ `[B, T, N, H]`, dK `[B, S, K, H]`, dV `[B, S, K, E]`; a `[B, N, S filled up]` for each wanted leaf.
  """
  (batches, length, _, width), value_width = residuals.q.shape, residuals.v.shape[3]
  (rows, columns), stages = call.tiles, call.stages
  warpgroups, tiles, row_tiles = columns // _HEIGHT, -(-call.keys // columns), -(-call.queries // rows)
  share, count, blocks = _share(call, width), len(jax.tree.leaves(logits)), rows // _HEIGHT
  dqs = tiles if call.interpret else 1  # the interpreter adds nothing to memory: there each column has a dQ of its own
  turns = [jnp.asarray(schedule.turns(visits)).reshape(-1)] if ordered and not call.interpret else []

  def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, **scratch):
    visit_refs, leaf_refs, refs = refs[:4], refs[4:4 + count], refs[4 + count:]
    turn_refs, (dq_ref, dk_ref, dv_ref, *dleaf_refs) = refs[:len(turns)], refs[len(turns):]
    memory = types.SimpleNamespace(**scratch)
    queries = launch.Ring(memory.q_tiles, memory.q_full, memory.q_empty, stages)
    semaphores = [pl.get_global(plgpu.SemaphoreType.REGULAR((batches * call.heads * row_tiles,))) for _ in turns]
    batch, kv_head, warpgroup = launch.place()
    find_walk = lambda: launch.walk(visits, visit_refs, batch, kv_head)

    @pl.when(warpgroup == warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=True)
      number, walk = find_walk()
      total = walk.count * call.groups
      plgpu.barrier_arrive(memory.part_empty)
      for source, tile in ((k_ref, memory.k), (v_ref, memory.v)):
        plgpu.copy_gmem_to_smem(source.at[batch, pl.ds(number * columns, columns), kv_head], tile, memory.loaded)

      def load(n, g, m):
        head, here = kv_head * call.groups + g, pl.ds(walk.tile(m) * rows, rows)
        queries.load(n, [q_ref.at[batch, here, head]], (dout_ref.at[batch, here, head], memory.dout),
                     (lse_ref.at[batch, head, here], memory.lse), (delta_ref.at[batch, head, here], memory.delta))

      def add(n, g, m):
        head, tile = kv_head * call.groups + g, walk.tile(m)
        to = dq_ref.at[number * batches + batch if call.interpret else batch, pl.ds(tile * rows, rows), head]
        at = (batch * call.heads + head) * row_tiles + tile
        turn = [_Turn(semaphore.at[at], walk._replace(tiles=ref).tile(m)) for semaphore, ref in zip(semaphores, turn_refs)]
        _add(call, memory, to, n + 1 < total, *turn)

      def after(g, m):
        last = m + 1 == walk.count
        return jnp.where(last, g + 1, g), jnp.where(last, 0, m + 1)

      def both(n, carry):
        """Loads visit n of all, which is visit m of query head g, and adds what `stages` visits before has come to."""
        loaded, added = carry
        pl.when(n < total)(lambda: load(n, *loaded))
        pl.when(n >= stages)(lambda: add(n - stages, *added))
        return after(*loaded), tuple(jnp.where(n >= stages, x, 0) for x in after(*added))

      first = jnp.int32(0), jnp.int32(0)
      lax.fori_loop(0, total + stages, both, (first, first))
      queries.drain(total)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < warpgroups)
    def _():
      launch.share_registers(warpgroups, loads=False)
      number, walk = find_walk()
      column = number * columns + warpgroup * _HEIGHT
      mine, own = pl.ds(column, _HEIGHT), pl.ds(warpgroup * _HEIGHT, _HEIGHT)
      plgpu.barrier_wait(memory.loaded)

      def of_group(g, accs):
        head = kv_head * call.groups + g

        def weights(n, tiles, block, sums, masked):
          """(Pᵀ after dropout, d(q·k)ᵀ, sums over queries) of a block of 64 queries in tile n of this head."""
          statistic = functools.partial(tiles.statistic, block)

          def gradients(qk, dp):
            window = leaves.Window(batch, head, walk.tile(n) * rows + block * _HEIGHT, column + tiles.zero, _HEIGHT, _HEIGHT, True)
            got = tile_gradients(call, logits, call.tiles_of(logits, leaf_refs, window), window, masked, wanted, qk,
                                 statistic(memory.lse), dp, statistic(memory.delta))
            new = tuple(total + call.rows.sum(x) for total, x in zip(sums, got.dleaves))
            return got.drop(got.p).astype(call.dtype), got.dqk.astype(call.dtype), new

          products = _one_by_one if count and call.overlapped else two_products
          return products(call, functools.partial(tiles.scores, block), functools.partial(tiles.dweights, block), lambda: None,
                          lambda: None, statistic(memory.delta), gradients, (_HEIGHT, _HEIGHT))

        def step(n, carry):
          (dk, dv), sums = carry
          tiles = _Tiles(memory, queries, g * walk.count + n, warpgroup)
          queries.wait(tiles.at)
          for block in range(blocks):
            of = functools.partial(weights, n, tiles, block, sums)
            p, ds, sums = lax.cond(n < walk.partial, lambda of=of: of(True), lambda of=of: of(False)) if call.masked else of(False)
            tiles.ds(block)[...] = ds
            if block + 1 < blocks:
              dv, = launch.accumulate(call, [dv], [p], [lambda _, block=block: tiles.dout(block)], [tiles.p])
          accs = _accumulate(call, tiles, share, (dk, dv), p)
          queries.release(tiles.at)
          return accs, sums

        sums = tuple(launch.in_layout(jnp.zeros((_HEIGHT,), jnp.float32), 1) for _ in wanted)
        accs, sums = lax.fori_loop(0, walk.count, step, (accs, sums))
        for ref, total in zip(dleaf_refs, sums):
          ref.at[batch, head, mine][...] = total
        return accs

      accs = tuple(launch.in_layout(jnp.zeros((_HEIGHT, w), jnp.float32)) for w in (width, value_width))
      accs = lax.fori_loop(0, call.groups, of_group, accs) if call.groups > 1 else of_group(0, accs)
      plgpu.barrier_arrive(memory.ds_full)  # when all have, nobody reads K any more
      plgpu.barrier_wait(memory.ds_full)
      for ref, tile, acc, unit in ((dk_ref, memory.k, accs[0], call.unit), (dv_ref, memory.v, accs[1], 1.0)):
        tile.at[own][...] = (acc * unit).astype(call.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile.at[own], ref.at[batch, mine, kv_head])
      plgpu.wait_smem_to_gmem(0)

  outs = [*(jax.ShapeDtypeStruct((batches, residuals.k.shape[1], call.kv_heads, w), call.dtype) for w in (width, value_width)),
          *(jax.ShapeDtypeStruct((batches, call.heads, tiles * columns), jnp.float32) for _ in wanted)]
  sizes = {"head": call.kv_heads, "tile": tiles, "batch": batches}
  # The last one changes fastest. Those that wait for each other are to run one after the other rather than at once.
  grid = {name: sizes[name] for name in (("tile", "batch", "head") if ordered else ("head", "tile", "batch"))}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, (rows, columns), transposed=True), *turns]

  def run(refs):
    dq_ref, *out_refs = refs
    found = call.launch(kernel, "jflash_fused", grid, warpgroups, [*ins, dq_ref], outs, _scratch(call, width, value_width))
    for ref, x in zip(out_refs, found):
      ref[...] = x

  zeros = jnp.zeros((dqs * batches, row_tiles * rows, call.heads, width), jnp.float32)
  dq, dk, dv, *dleaves = pl.run_state(run)((zeros, *(jnp.zeros(x.shape, x.dtype) for x in outs)))
  dq = dq.reshape(dqs, batches, -1, call.heads, width).sum(axis=0)[:, :length] * call.unit
  return dq.astype(call.dtype), dk, dv, dleaves


def _scratch(call: launch.Call, width: int, value_width: int) -> dict[str, Any]:
  (rows, columns), stages = call.tiles, call.stages
  warpgroups = columns // _HEIGHT
  matrix = functools.partial(launch.matrix, call.dtype)
  together = plgpu.Barrier(num_arrivals=warpgroups)
  scratch = launch.rings(call, warpgroups, 3, q=(rows, width)) | {
      "dout": matrix(stages, rows, value_width), "lse": plgpu.SMEM((stages, rows), jnp.float32),
      "delta": plgpu.SMEM((stages, rows), jnp.float32), "k": matrix(columns, width), "v": matrix(columns, value_width),
      "loaded": plgpu.Barrier(num_arrivals=2), "ds": matrix(2, columns, rows), "ds_full": together,
      "part": launch.matrix(jnp.float32, rows, width, lanes=32), "part_full": together, "part_empty": plgpu.Barrier()}
  return scratch if call.overlapped else scratch | {"p": matrix(1, columns, _HEIGHT)}


def _share(call: launch.Call, width: int) -> tuple[int, int]:
  """Rows and columns of a tile of dQ that one warpgroup computes: an equal part of either, in blocks of 64."""
  rows, warpgroups = call.tiles[0], call.tiles[1] // _HEIGHT
  assert call.pieces == 1, f"operands come in {call.pieces} pieces, and this kernel takes one; use `dq` and `dkv`"
  if rows % (warpgroups * _HEIGHT) == 0:
    return rows // warpgroups, width
  assert rows == _HEIGHT and width % (warpgroups * _HEIGHT) == 0, (
      f"{warpgroups} warpgroups cannot share out {rows} x {width} of dQ in blocks of 64 x 64: take other tiles than {call.tiles}")
  return rows, width // warpgroups


class _Tiles(NamedTuple):
  """What a warpgroup multiplies at visit `at` of all. Blocks are of 64 queries."""

  memory: Any
  queries: launch.Ring
  at: Any
  warpgroup: Any

  @property
  def zero(self) -> Any:
    """0, without the compiler knowing it, see `launch.kept`."""
    return self.at >> 30

  @property
  def own(self) -> Any:
    return pl.ds((self.warpgroup + self.zero) * _HEIGHT, _HEIGHT)

  def statistic(self, block: int, ref: Any) -> Any:
    """A function that loads a statistic of a block's queries, and spreads it over their scores."""
    load = lambda: plgpu.load(ref.at[self.queries.slot(self.at), _block(block)], layout=leaves.WGMMA.reduce(0))
    return lambda: lax.broadcast_in_dim(load(), (_HEIGHT, _HEIGHT), [1])

  def scores(self, block: int, a: int, b: int) -> tuple[Any, Any]:
    return self.memory.k.at[self.own], self.queries.tile(self.at, 0).at[_block(block)].transpose((1, 0))

  def dweights(self, block: int, a: int, b: int) -> tuple[Any, Any]:
    return self.memory.v.at[self.own], self.dout(block).transpose((1, 0))

  def dout(self, block: int) -> Any:
    return self.memory.dout.at[self.queries.slot(self.at), _block(block)]

  @property
  def all_ds(self) -> Any:
    """`[columns, rows]`, of all warpgroups; there are two, so that nobody waits for those who read the last one."""
    return self.memory.ds.at[lax.rem(self.at, jnp.int32(2))]

  def ds(self, block: int) -> Any:
    return self.all_ds.at[self.own, _block(block)]

  @property
  def p(self) -> Any:
    return self.memory.p.at[:, self.own] if hasattr(self.memory, "p") else None

  def share(self, share: tuple[int, int]) -> tuple[Any, Any]:
    """The rows and columns of this warpgroup in a tile of dQ."""
    start = self.warpgroup + self.zero
    by_rows = share[0] < self.memory.part.shape[0]
    return pl.ds(start * share[0] if by_rows else 0, share[0]), pl.ds(0 if by_rows else start * share[1], share[1])


def _block(number: int) -> Any:
  return pl.ds(number * _HEIGHT, _HEIGHT)


def _one_by_one(call: launch.Call, first: Any, second: Any, wait: Any, release: Any, start: Any, use: Any,
                shape: tuple[int, int]) -> Any:
  """As `two_products`, but the second begins when `dp()` is called: arrays of the logits take the registers that it would take."""
  def dp():
    def product(ref):
      if not call.dropped:
        ref[...] = -start()
      wait()
      plgpu.wgmma(ref, *second(0, 0))
      return ref[...]

    result = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    release()
    return result

  return use(launch.product(call, first, plgpu.ACC(shape, jnp.float32)), dp)


def _accumulate(call: launch.Call, tiles: _Tiles, share: tuple[int, int], accs: Any, p: Any) -> Any:
  """(dK + dSᵀ Q, dV + Pᵀ dO of the last block), with this warpgroup's share of dS K left in shared memory."""
  memory, (rows, columns) = tiles.memory, call.tiles
  dq_rows, dq_columns = tiles.share(share)
  of_dq = lambda: (tiles.all_ds.at[:, dq_rows].transpose((1, 0)), memory.k.at[pl.ds(tiles.zero * columns, columns), dq_columns])
  of_dk = lambda: (tiles.all_ds.at[tiles.own], tiles.queries.tile(tiles.at, 0))
  dout = functools.partial(tiles.dout, rows // _HEIGHT - 1)
  plgpu.commit_smem()
  plgpu.barrier_arrive(memory.ds_full)

  def leave(part):
    plgpu.barrier_wait(memory.part_empty)
    memory.part.at[dq_rows, dq_columns][...] = part
    plgpu.commit_smem()
    plgpu.barrier_arrive(memory.part_full)

  if not call.overlapped:
    plgpu.barrier_wait(memory.ds_full)
    product = lambda operands, shape: launch.product(call, lambda a, b: operands(), plgpu.ACC(shape, jnp.float32))
    leave(product(of_dq, share))
    dk, dv = accs
    return dk + product(of_dk, dk.shape), *launch.accumulate(call, [dv], [p], [lambda _: dout()], [tiles.p])

  def products(refs):
    dk_ref, dv_ref = refs
    plgpu.wgmma(dv_ref, p, dout())
    plgpu.barrier_wait(memory.ds_full)

    def part(dq_ref):
      plgpu.wgmma(dq_ref, *of_dq())
      plgpu.wgmma(dk_ref, *of_dk())
      return plgpu.wgmma_accumulator_load(dq_ref, wait_n=1)

    leave(pl.run_scoped(part, plgpu.ACC(share, jnp.float32)))

  return pl.run_state(products)(tuple(plgpu.ACC.init(acc) for acc in accs))


class _Turn(NamedTuple):
  """When to add to a tile of dQ: its semaphore counts those who have."""

  semaphore: Any
  number: Any


def _add(call: launch.Call, memory: Any, to: Any, more: Any, turn: _Turn | None = None) -> None:
  """Adds what the warpgroups have left to a tile of dQ; `more` says whether they will leave more."""
  plgpu.barrier_wait(memory.part_full)
  if turn is not None:
    plgpu.semaphore_wait(turn.semaphore, turn.number, decrement=False, memory_scope="gpu")
  plgpu.copy_smem_to_gmem(memory.part, to, reduction_op=None if call.interpret else "add")
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  pl.when(more)(lambda: plgpu.barrier_arrive(memory.part_empty))
  if turn is not None:
    plgpu.wait_smem_to_gmem(0)
    plgpu.semaphore_signal(turn.semaphore, memory_scope="gpu")
