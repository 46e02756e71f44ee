"""What the kernels for Hopper share: sizes, memory, the ring of tiles that one warpgroup loads for the others, scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import schedule, softmax
from . import leaves, lookup

WARPGROUP_ROWS = 64  # rows of a product of one warpgroup
_LOADER_REGISTERS, _COMPUTE_REGISTERS = {2: 24, 3: 32}, {2: 240, 3: 160}  # of a thread, by how many warpgroups compute


@dataclasses.dataclass(frozen=True)
class Call:
  """One problem on one GPU: sizes, tiles and how to compute.

  q `[B, T, P · N, H]`, k `[B, S, P · K, H]`, v `[B, S, P · K, E]`, bfloat16 or float16, with T and S filled up to multiples of
  8, as TMA copies tiles of 8 rows, and H and E to multiples of 64. P is 1, or for
  float32 2 or 3: what rounding to bfloat16 takes away follows as heads of their own.
  """

  queries: int  # T and S before they were filled up
  keys: int
  heads: int  # N
  kv_heads: int  # K
  dtype: Any  # of the operands
  tiles: tuple[int, int]  # query rows, key columns; warpgroups share out the side that a thread block keeps
  stages: int  # tiles that are loaded ahead
  unit: float  # the scores of `logits` are to be multiplied by this
  masked: bool  # whether there may be PARTIAL tiles
  dropped: bool  # whether `logits` drop weights
  pieces: int  # P
  overlapped: bool  # whether products run beside the softmax of another tile, with P in registers: what no interpreter does
  turns: bool  # whether two warpgroups take turns at the tensor cores
  fold: int  # query heads that follow each other as rows: row r is query r // fold of head `fold` · head + r mod fold
  interpret: Any

  @property
  def groups(self) -> int:
    return self.heads // self.kv_heads

  @property
  def rows(self) -> softmax.Rows:
    """Statistics are `[rows]`."""
    return softmax.Rows(lambda s: jnp.max(s, axis=1), lambda s: jnp.sum(s, axis=1),
                        lambda x, width: lax.broadcast_in_dim(x, (*x.shape, width), [0]))

  @property
  def weight(self) -> softmax.Weight:
    return softmax.powers_of_two(self.unit)

  @property
  def products(self) -> list[tuple[int, int]]:
    """Which pieces of two operands are multiplied: all but those below the last piece's own rounding error."""
    return [(a, b) for a in range(self.pieces) for b in range(self.pieces - a)]

  @property
  def take(self) -> Any:
    return lookup.interpreted if self.interpret else lookup.take

  def scores(self, logits: Any, tiles: Any, window: leaves.Window, qk: Any, masked: bool, take: Any = None) -> Any:
    """The scores of a window; what lies past the last query or key is masked."""
    row, column = window.numbers(bool(self.interpret))
    head = window.everywhere(window.head)
    if self.fold > 1:
      head, row = head * self.fold + lax.rem(row, jnp.int32(self.fold)), lax.div(row, jnp.int32(self.fold))
    inside = None
    if masked and self.queries * self.fold % self.tiles[0]:
      inside = row < self.queries
    if masked and self.keys % self.tiles[1]:
      inside = (column < self.keys) if inside is None else inside & (column < self.keys)
    logits = jax.tree.unflatten(jax.tree.structure(logits), tiles)
    at = logits.coordinates(window.everywhere(window.batch), head, row, column,
                            take or self.take, gathers=True)
    return logits.scores(qk, at, masked, inside)

  def tiles_of(self, logits: Any, refs: Any, window: leaves.Window) -> list[Any]:
    return [leaves.tile(x, ref, window) for x, ref in zip(jax.tree.leaves(logits), refs)]

  def drop(self, logits: Any, tiles: Any, x: Any) -> Any:
    """Dropout of a window of weights, or of what multiplies them."""
    return jax.tree.unflatten(jax.tree.structure(logits), tiles).drop(x)

  def stored(self, logits: Any, sides: tuple[int, int], transposed: bool = False) -> list[Any]:
    return [leaves.store(x, sides, transposed) for x in jax.tree.leaves(logits)]

  def launch(self, kernel: Callable, name: str, grid: dict[str, int], warpgroups: int, ins: list[Any], outs: list[Any],
             scratch: dict[str, Any]) -> Any:
    """Runs `kernel(*ins, *outs, **scratch)` with one warpgroup more, which loads."""
    def named(*refs, **kwargs):
      kernel(*refs, **kwargs)
    named.__name__ = name
    return plgpu.kernel(
        named, out_type=outs, grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=warpgroups + 1,
        thread_name="warpgroup", scratch_types=scratch, compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=self.interpret or None)(*ins)


class Residuals(NamedTuple):
  """What the backward passes read: q, dout `[B, T, P · N, …]`, k, v `[B, S, P · K, …]`, lse and delta `[B, N, T]`, filled up."""

  q: Any
  k: Any
  v: Any
  dout: Any
  lse: Any
  delta: Any


def share_registers(warpgroups: int, loads: bool) -> None:
  """Gives those that compute what the one that loads does not need; a single one has all that it can name anyway."""
  if warpgroups > 1:
    number, action = (_LOADER_REGISTERS, "decrease") if loads else (_COMPUTE_REGISTERS, "increase")
    plgpu.set_max_registers(number[warpgroups], action=action)


def matrix(dtype: Any, *shape: int, lanes: int = 64) -> Any:
  """Shared memory for tiles `[…, rows, columns]` that the tensor cores read; operands that are multiplied agree in `lanes`."""
  width = min(128, min(lanes, *shape[-2:]) * jnp.dtype(dtype).itemsize)
  return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize)),
                                             plgpu.SwizzleTransform(width)))


def kept(tile: Any, n: Any) -> Callable[[int], Any]:
  """The pieces of what a thread block keeps, `[P, …]`, as operands at visit n: as if the address depended on n.

  Of an address that does not, the compiler keeps what each 16 columns of the operand have for a descriptor, two registers, over
  the whole loop.
  """
  return lambda piece: tile.at[piece + (n >> 30)]


def in_layout(x: Any, axis: int | None = None) -> Any:
  """Of a product's result `[rows, columns]`, or, given an axis, of that result reduced along it."""
  return plgpu.layout_cast(x, leaves.WGMMA if axis is None else leaves.WGMMA.reduce(axis))


class Ring(NamedTuple):
  """Tiles that one warpgroup loads ahead of those that use them; the n-th lies in slot n mod `stages`."""

  tiles: Any  # [stages, P, …] in shared memory
  full: Any
  empty: Any
  stages: int

  def slot(self, n: Any) -> Any:
    return lax.rem(jnp.int32(n), jnp.int32(self.stages))

  def load(self, n: Any, sources: list[Any], *others: tuple[Any, Any]) -> None:
    """Starts loading the pieces of tile n, as soon as its slot is free; `others` are (source, slots) that go with them."""
    slot = self.slot(n)
    pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
    for piece, source in enumerate(sources):
      plgpu.copy_gmem_to_smem(source, self.tiles.at[slot, piece], self.full.at[slot])
    for source, slots in others:
      plgpu.copy_gmem_to_smem(source, slots.at[slot], self.full.at[slot])

  def wait(self, n: Any) -> None:
    plgpu.barrier_wait(self.full.at[self.slot(n)])

  def tile(self, n: Any, piece: int) -> Any:
    return self.tiles.at[self.slot(n), piece]

  def release(self, n: Any) -> None:
    plgpu.barrier_arrive(self.empty.at[self.slot(n)])

  def drain(self, count: Any) -> None:
    """Waits for the last releases of `count` tiles, which `load` has not waited for: a barrier wants to be seen to its end."""
    for slot in range(self.stages):
      pl.when(count > slot)(functools.partial(plgpu.barrier_wait, self.empty.at[slot]))


def pieces(x: Any, count: int, dtype: Any) -> list[Any]:
  """`x` as a sum of `count` numbers in a narrow dtype: rounded, and then what rounding took away, rounded."""
  found = [x.astype(dtype)]
  while len(found) < count:
    x = x - found[-1].astype(x.dtype)
    found.append(x.astype(dtype))
  return found


def product(call: Call, operands: Callable, acc: Any) -> Any:
  """The sum of `operands(a, b)`'s products over the pieces, awaited."""
  def run(ref):
    for pair in call.products:
      plgpu.wgmma(ref, *operands(*pair))
    return ref[...]
  return pl.run_scoped(run, acc)


def accumulate(call: Call, accs: list[Any], lefts: list[Any], rights: list[Callable], written: list[Any]) -> list[Any]:
  """`acc + left right` for several sums at once; the left sides are in registers, and go through `written` if need be."""
  dtype = call.dtype
  lefts = [pieces(x, call.pieces, dtype) for x in lefts]
  if not call.overlapped:
    for tile, left in zip(written, lefts):
      for piece, x in enumerate(left):
        tile.at[piece][...] = x
    plgpu.commit_smem()
    operands = lambda tile, right: lambda a, b: (tile.at[a], right(b))
    return [acc + product(call, operands(tile, right), plgpu.ACC(acc.shape, jnp.float32))
            for acc, tile, right in zip(accs, written, rights)]

  def run(refs):
    for ref, left, right in zip(refs, lefts, rights):
      for a, b in call.products:
        plgpu.wgmma(ref, left[a], right(b))

  return pl.run_state(run)([plgpu.ACC.init(acc) for acc in accs])


def rings(call: Call, warpgroups: int, extra: int = 0, lanes: int = 64, **shapes: tuple[int, int]) -> dict[str, Any]:
  """Shared memory and barriers of rings, by name; `extra` copies arrive with the pieces of each tile."""
  full = plgpu.Barrier(num_arrivals=call.pieces + extra, num_barriers=call.stages)
  empty = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=call.stages)
  scratch = {}
  for name, shape in shapes.items():
    tiles = matrix(call.dtype, call.stages, call.pieces, *shape, lanes=lanes)
    scratch |= {f"{name}_tiles": tiles, f"{name}_full": full, f"{name}_empty": empty}
  return scratch


def load_keys(call: Call, walk: Walk, batch: Any, kv_head: Any, *pairs: tuple[Ring, Any]) -> None:
  """Fills rings with tiles of arrays `[B, S, P · K, …]`, visit after visit."""
  columns = call.tiles[1]

  @pl.loop(0, walk.count)
  def _(n):
    for ring, ref in pairs:
      ring.load(n, [ref.at[batch, pl.ds(walk.tile(n) * columns, columns), piece * call.kv_heads + kv_head]
                    for piece in range(call.pieces)])

  for ring, _ in pairs:
    ring.drain(walk.count)


def visit_all(call: Call, walk: Walk, step: Callable, carry: Any) -> Any:
  """`carry = step(n, carry, masked)` for all visits."""
  if call.masked:
    carry = lax.fori_loop(0, walk.partial, functools.partial(step, masked=True), carry)
  return lax.fori_loop(walk.partial if call.masked else 0, walk.count, functools.partial(step, masked=False), carry)


class Walk(NamedTuple):
  """The lists of visits in global memory, flat, and where those of one row of tiles are."""

  tiles: Any
  start: Any
  count: Any
  partial: Any

  def tile(self, n: Any) -> Any:
    return self.tiles[self.start + n]


def place(zero: Any = 0) -> tuple[Any, Any, Any]:
  """(batch element, head, warpgroup) of this thread.

  With a 0 that was read from memory they are computed anew: the compiler cannot know that it could have kept them, and all that
  follows from them, in registers over a loop that has none to spare.
  """
  return tuple(lax.axis_index(name) + zero for name in ("batch", "head", "warpgroup"))  # type: ignore[return-value]


def walk(visits: schedule.RowVisits, refs: Any, batch: Any, kv_head: Any, n: Any = None) -> tuple[Any, Walk]:
  """The row of tiles that this thread block has, the n-th longest, and its visits; n is the block's own number if not given."""
  tiles, starts, partial, order = refs
  lists, (length, rows) = visits.tiles.shape[:2], (visits.tiles.shape[2], visits.partial.shape[2])
  number = (batch * lists[1] if lists[0] > 1 else 0) + (kv_head if lists[1] > 1 else 0)
  row = order[number * rows + (lax.axis_index("tile") if n is None else n)]
  start = starts[number * (rows + 1) + row]
  count = starts[number * (rows + 1) + row + 1] - start
  return row, Walk(tiles, number * length + start, count, partial[number * rows + row])


def flat(visits: schedule.RowVisits) -> list[Any]:
  return [jnp.asarray(x).reshape(-1) for x in visits]
