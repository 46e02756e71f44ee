"""dK = d(QKᵀ)ᵀ Q and dV = Pᵀ dO, column by column, on transposed scores: a thread block keeps a key tile and sums over queries.

Gradients of the logits' arrays that run along keys alone are sums over the tiles that it passes anyway.
"""

from __future__ import annotations

import dataclasses
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
from .backward import tile_gradients, two_products

_HEIGHT = launch.WARPGROUP_ROWS
_FEW = pl.ds(0, mend.KEYS)  # of a slot, for what is computed again


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
  columns = call.tiles[1]
  warpgroups, tiles = columns // _HEIGHT, -(-call.keys // columns)
  out_dtype = jnp.float32 if call.pieces > 1 else call.dtype
  scratch, results = _scratch(call, width, value_width, of, out_dtype)
  count = len(jax.tree.leaves(logits))

  def kernel(*refs, **allocated):
    operands, refs = launch.Residuals(*refs[:6]), refs[6:]
    visit_refs, leaf_refs, refs = refs[:4], refs[4:4 + count], refs[4 + count:]
    block = _Block(call, logits, visits, wanted, results, operands, visit_refs, leaf_refs, refs[:len(results)], refs[len(results):],
                   types.SimpleNamespace(**allocated))
    at = block.place()
    pl.when(at.warpgroup == warpgroups)(lambda: block.load(at))
    pl.when(at.warpgroup < warpgroups)(lambda: block.compute(at))

  outs = [*(jax.ShapeDtypeStruct((batch, residuals.k.shape[1], call.kv_heads, x.width), out_dtype) for x in results),
          *(jax.ShapeDtypeStruct((batch, call.heads, tiles * columns), jnp.float32) for _ in wanted)]
  grid = {"head": call.kv_heads, "tile": tiles, "batch": batch}
  ins = [*residuals, *launch.flat(visits), *call.stored(logits, call.tiles, transposed=True)]
  found = call.launch(kernel, "jflash_dkv", grid, warpgroups, ins, outs, scratch)
  return found[:len(results)], found[len(results):]


class _Result(NamedTuple):
  """dK or dV: its width, by what its sums are multiplied, and the tile in shared memory by which it leaves."""

  of_keys: bool
  width: int
  unit: float
  left_in: str


def _scratch(call: launch.Call, width: int, value_width: int, of: tuple[bool, bool],
             out_dtype: Any) -> tuple[dict[str, Any], tuple[_Result, ...]]:
  """Shared memory by name, and the results that are asked for."""
  rows, columns = call.tiles
  warpgroups, matrix = columns // _HEIGHT, functools.partial(launch.matrix, call.dtype)
  scratch = launch.rings(call, warpgroups, 2, q=(rows, width)) | launch.rings(call, warpgroups, dout=(rows, value_width)) | {
      "lse": plgpu.SMEM((call.stages, rows), jnp.float32), "delta": plgpu.SMEM((call.stages, rows), jnp.float32),
      "k": matrix(warpgroups, call.pieces, _HEIGHT, width),
      "loaded": plgpu.Barrier(num_arrivals=(1 + of[0]) * call.pieces, num_barriers=warpgroups)}
  if of[0]:
    scratch["v"] = matrix(warpgroups, call.pieces, _HEIGHT, value_width)
  # Results leave by the tiles of operands of their width and dtype, which nobody reads any more, or by tiles of their own.
  kept = {value_width if name == "v" else width: name for name in ("k", "v") if name in scratch and out_dtype == call.dtype}
  both = (True, width, call.unit), (False, value_width, 1.0)
  results = tuple(_Result(*x, kept.get(x[1], f"out_{x[1]}")) for x, asked in zip(both, of) if asked)
  scratch |= {x.left_in: launch.matrix(out_dtype, warpgroups, _HEIGHT, x.width) for x in results if x.left_in not in scratch}
  if call.masked:
    scratch |= mend.scratch(warpgroups, 2 * call.pieces + 2, out_dtype)
  if not call.overlapped:
    scratch |= {"p": matrix(warpgroups, call.pieces, _HEIGHT, rows), "ds": matrix(warpgroups, call.pieces, _HEIGHT, rows)}
  return scratch, results


class _Place(NamedTuple):
  """Where a warpgroup is: its 64 keys begin at `column`."""

  batch: Any
  kv_head: Any
  warpgroup: Any
  column: Any
  walk: launch.Walk


@dataclasses.dataclass(frozen=True)
class _Block:
  """What the warpgroups of a thread block share: the problem, operands and results in global memory, and shared memory."""

  call: launch.Call
  logits: Any
  visits: schedule.RowVisits
  wanted: tuple[int, ...]
  results: tuple[_Result, ...]
  operands: launch.Residuals
  visit_refs: Any
  leaf_refs: Any
  result_refs: Any
  dleaf_refs: Any
  memory: Any

  @property
  def queries(self) -> launch.Ring:
    return launch.Ring(self.memory.q_tiles, self.memory.q_full, self.memory.q_empty, self.call.stages)

  @property
  def douts(self) -> launch.Ring:
    return launch.Ring(self.memory.dout_tiles, self.memory.dout_full, self.memory.dout_empty, self.call.stages)

  def place(self, anew: bool = False) -> _Place:
    """Of this warpgroup, computed anew where it should not have been kept in registers."""
    batch, kv_head, warpgroup = launch.place(self.visit_refs[1][0] if anew else 0)
    tile, walk = launch.walk(self.visits, self.visit_refs, batch, kv_head)
    return _Place(batch, kv_head, warpgroup, tile * self.call.tiles[1] + warpgroup * _HEIGHT, walk)

  def load(self, at: _Place) -> None:
    """Loads query tiles for the other warpgroups, head by head."""
    call, (q, _, _, dout, lse, delta) = self.call, self.operands
    launch.share_registers(call.tiles[1] // _HEIGHT, loads=True)
    rows, pieces = call.tiles[0], range(call.pieces)

    @pl.loop(0, at.walk.count * call.groups)
    def _(n):
      head, row = at.kv_head * call.groups + lax.div(n, at.walk.count), at.walk.tile(lax.rem(n, at.walk.count)) * rows
      tile = lambda ref, piece: ref.at[at.batch, pl.ds(row, rows), piece * call.heads + head]
      of_rows = lambda ref: ref.at[at.batch, head, pl.ds(row, rows)]
      self.queries.load(n, [tile(q, p) for p in pieces], (of_rows(lse), self.memory.lse), (of_rows(delta), self.memory.delta))
      self.douts.load(n, [tile(dout, p) for p in pieces])

    self.queries.drain(at.walk.count * call.groups)
    self.douts.drain(at.walk.count * call.groups)

  def compute(self, at: _Place) -> None:
    """Sums over all visits, and leaves the results."""
    launch.share_registers(self.call.tiles[1] // _HEIGHT, loads=False)
    loaded = self.memory.loaded.at[at.warpgroup]
    for source, tile in zip((self.operands.k, self.operands.v), self.kept(at)):
      for piece in range(self.call.pieces if tile is not None else 0):
        plgpu.copy_gmem_to_smem(source.at[at.batch, pl.ds(at.column, _HEIGHT), piece * self.call.kv_heads + at.kv_head],
                                tile.at[piece], loaded)
    plgpu.barrier_wait(loaded)

    def visit_group(head, g, carry):
      return launch.visit_all(self.call, at.walk, functools.partial(self.step, at, head, g * at.walk.count), carry)

    accs, sums = self.of_groups(at.kv_head, visit_group, tuple(_zeros(_HEIGHT, x.width) for x in self.results))
    mend.leave_or(self.call, self.memory, functools.partial(self.leave, accs), self.again, *accs, *sums)

  def kept(self, at: _Place) -> tuple[Any, Any]:
    """A warpgroup's tiles of keys and values; without dK, no values."""
    return self.memory.k.at[at.warpgroup], self.memory.v.at[at.warpgroup] if self.results[0].of_keys else None

  def of_groups(self, kv_head: Any, visit_group: Any, accs: Any) -> tuple[Any, Any]:
    """`visit_group(head, g, (accs, sums))` for all query heads; their sums are left, the others go on."""
    groups, no_sums = self.call.groups, lambda: tuple(_zeros(_HEIGHT) for _ in self.wanted)

    def of_group(g, accs):
      accs, sums = visit_group(kv_head * groups + g, g, (accs, no_sums()))
      if self.wanted:
        at = self.place(anew=True)
        for ref, total in zip(self.dleaf_refs, sums):
          ref.at[at.batch, at.kv_head * groups + g, pl.ds(at.column, _HEIGHT)][...] = total
      return accs, sums

    if groups == 1:
      return of_group(0, accs)
    return lax.fori_loop(0, groups, lambda g, carry: _adding(of_group(g, carry[0]), carry[1]), (accs, no_sums()))

  def step(self, at: _Place, head: Any, before: Any, n: Any, carry: Any, masked: bool) -> tuple[Any, Any]:
    """Adds a head's tile n, number `before` + n of all; dSᵀ and Pᵀ are operands from registers, or from shared memory."""
    accs, sums = carry
    call, number, rows = self.call, before + n, self.call.tiles[0]
    self.queries.wait(number)
    k_tile, v_tile = self.kept(at)
    k = launch.kept(k_tile, n)
    scores = lambda a, b: (k(a), self.queries.tile(number, b).transpose((1, 0)))
    gradients = lambda s, dp: self.gradients(self.window(at, head, at.walk.tile(n) * rows, rows), self.queries.slot(number),
                                             s, dp, sums, masked)
    if v_tile is not None:
      v = launch.kept(v_tile, n)
      p, dqk, sums = two_products(
          call, scores, lambda a, b: (v(a), self.douts.tile(number, b).transpose((1, 0))), lambda: self.douts.wait(number),
          lambda: None, self.statistic(self.memory.delta, self.queries.slot(number), rows), gradients, (_HEIGHT, rows))
    else:
      s = launch.product(call, scores, plgpu.ACC((_HEIGHT, rows), jnp.float32))
      p, dqk, sums = gradients(s, lambda: jnp.zeros_like(s))
      self.douts.wait(number)
    lefts, rings = zip(*((dqk, self.queries) if x.of_keys else (p, self.douts) for x in self.results))
    rights = [functools.partial(ring.tile, number) for ring in rings]
    accs = tuple(launch.accumulate(call, list(accs), list(lefts), rights, self.written(at.warpgroup, pl.ds(0, rows))))
    self.queries.release(number)
    self.douts.release(number)
    return accs, sums

  def window(self, at: _Place, head: Any, row: Any, size: int) -> leaves.Window:
    """The transposed scores of a head's `size` queries from `row` on."""
    return leaves.Window(at.batch, head, row, at.column, size, _HEIGHT, transposed=True)

  def statistic(self, ref: Any, slot: Any, size: int) -> Any:
    """A function for a statistic of the queries at `slot`, along a window."""
    load = lambda: plgpu.load(ref.at[slot, pl.ds(0, size)], layout=leaves.WGMMA.reduce(0))
    return lambda: lax.broadcast_in_dim(load(), (_HEIGHT, size), [1])

  def gradients(self, window: leaves.Window, slot: Any, qk: Any, dp: Any, sums: Any, masked: bool, hide: bool = False) -> Any:
    """(Pᵀ after dropout, d(q·k)ᵀ, sums over queries) of a window whose statistics are at `slot`."""
    lse, delta = (self.statistic(ref, slot, window.rows) for ref in (self.memory.lse, self.memory.delta))
    found = tile_gradients(self.call, self.logits, self.call.tiles_of(self.logits, self.leaf_refs, window), window, masked,
                           self.wanted, qk, lse, dp, delta, hide)
    return found.drop(found.p), found.dqk, tuple(total + self.call.rows.sum(x) for total, x in zip(sums, found.dleaves))

  def written(self, warpgroup: Any, part: Any) -> list[Any]:
    """Where left operands go that cannot stay in registers, for each result."""
    if self.call.overlapped:
      return [None for _ in self.results]
    return [(self.memory.ds if x.of_keys else self.memory.p).at[warpgroup, :, :, part] for x in self.results]

  def leave(self, accs: Any) -> None:
    """Writes the results, by way of shared memory."""
    at = self.place(anew=True)
    for acc, result, ref in zip(accs, self.results, self.result_refs):
      tile = getattr(self.memory, result.left_in).at[at.warpgroup]
      tile = tile if result.left_in.startswith("out") else tile.at[0]
      tile[...] = (acc * result.unit).astype(ref.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(tile, ref.at[at.batch, pl.ds(at.column, _HEIGHT), at.kv_head])
      plgpu.wait_smem_to_gmem(0)

  def again(self) -> None:
    """Computes the results once more, a few columns and queries at a time, with what is hidden made finite (`mend`)."""
    at = self.place(anew=True)
    for result, ref in zip(self.results, self.result_refs):
      place = lambda first, ref=ref: ref.at[at.batch, pl.ds(at.column, _HEIGHT), at.kv_head, pl.ds(first, mend.WIDTH)]
      mend.by_columns(result.width, functools.partial(self.columns_again, at, result),
                      lambda first, x, place=place: mend.store(x, self.memory.mended_tile.at[at.warpgroup], place(first)))

  def columns_again(self, at: _Place, result: _Result, first: Any) -> Any:
    """64 columns of a result, from `first` on."""
    def visit_group(head, g, carry):
      visit = functools.partial(self.step_again, at, result, first, head)
      return mend.visit_all(at.walk, self.call.tiles[0], visit, carry)

    (acc,), _ = self.of_groups(at.kv_head, visit_group, (_zeros(_HEIGHT, mend.WIDTH),))
    return acc * result.unit

  def step_again(self, at: _Place, result: _Result, first: Any, head: Any, row: Any, carry: Any) -> tuple[Any, Any]:
    """Adds 64 queries of a head, from `row` on."""
    (acc,), sums = carry
    call, pieces = self.call, range(self.call.pieces)
    tiles = [lambda piece, ring=ring: ring.tiles.at[at.warpgroup, piece, _FEW] for ring in (self.queries, self.douts)]
    self.load_again(at, tiles, head, row)
    s, dp = mend.two_products(call, self.kept(at), tiles, row)
    less = dp if call.dropped else dp - self.statistic(self.memory.delta, at.warpgroup, mend.KEYS)()
    window = self.window(at, head, row, mend.KEYS)
    p, dqk, sums = self.gradients(window, at.warpgroup, s, lambda: less, sums, masked=True, hide=True)
    ring, left = (self.queries, dqk) if result.of_keys else (self.douts, p)
    right = lambda piece: ring.tiles.at[at.warpgroup, piece, _FEW, pl.ds(first, mend.WIDTH)]
    if result.of_keys:
      for piece in pieces:
        mend.clean(right(piece))
    written = self.written(at.warpgroup, _FEW)[self.results.index(result)]
    return tuple(launch.accumulate(call, [acc], [left], [right], [written])), sums

  def load_again(self, at: _Place, tiles: Any, head: Any, row: Any) -> None:
    """Copies 64 queries with their statistics into a warpgroup's own slot, and waits."""
    call, (q, _, _, dout, lse, delta) = self.call, self.operands
    here, pieces = pl.ds(row, mend.KEYS), range(call.pieces)
    sources = [ref.at[at.batch, here, piece * call.heads + head] for ref in (q, dout) for piece in pieces]
    into = [tile(piece) for tile in tiles for piece in pieces]
    for ref, slots in ((lse, self.memory.lse), (delta, self.memory.delta)):
      sources.append(ref.at[at.batch, head, here])
      into.append(slots.at[at.warpgroup, _FEW])
    mend.load(sources, into, self.memory.mended.at[at.warpgroup])


def _zeros(*shape: int) -> Any:
  return launch.in_layout(jnp.zeros(shape, jnp.float32), None if len(shape) == 2 else 1)


def _adding(result, before):
  """What a head's visits give, with the sums of heads before it: whether any is not finite shows in the whole."""
  accs, sums = result
  return accs, tuple(a + b for a, b in zip(sums, before))
