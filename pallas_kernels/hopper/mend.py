"""What is computed again, slowly, where something not finite came out.

0 · NaN is NaN: a key or value that the mask hides, and that is not finite, would reach what a partial tile adds to. Looking for
that in every tile would cost time. Instead each warpgroup looks at what it is about to leave. What is finite is right. For
anything else it goes through its visits once more, on its own, and makes finite in shared memory what it multiplies with zeros.
Slots of the rings serve it as memory: by then nobody uses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import softmax
from . import launch, leaves

WIDTH, KEYS = 64, 64  # columns of a result, and keys or queries, that are computed at a time: registers are few
FINITE, NAN, INFINITE, MINUS_INFINITE = range(4)


def wanted(flags: Any, *results: Any) -> Any:
  """Whether anything in a warpgroup's results, in registers, is not finite.

  A sum over a whole tile would go through shared memory that Mosaic gives to all warpgroups alike, and these come here at the same
  time. Rows are summed within warps, and `flags`, `[64]` of shared memory for each warpgroup, makes one number of them.
  """
  counts = launch.in_layout(jnp.zeros((launch.WARPGROUP_ROWS,), jnp.float32), 1)
  for x in results:
    count = jnp.where(jnp.abs(x) < softmax.INF, 0.0, 1.0)
    counts = counts + (launch.in_layout(jnp.sum(launch.in_layout(count), axis=1), 1) if x.ndim == 2 else count)
  flags[...] = counts
  return lax.fori_loop(0, launch.WARPGROUP_ROWS, lambda row, total: total + flags[row], jnp.float32(0)) > 0


def scratch(warpgroups: int, copies: int, dtype: Any) -> dict[str, Any]:
  """What a kernel needs more: barriers, for `copies` that each warpgroup waits for on its own and for all to meet, and a tile."""
  found: dict[str, Any] = {"flags": plgpu.SMEM((warpgroups, launch.WARPGROUP_ROWS), jnp.float32),
                           "mended": plgpu.Barrier(num_arrivals=copies, num_barriers=warpgroups),
                           "mended_tile": launch.matrix(dtype, warpgroups, launch.WARPGROUP_ROWS, WIDTH)}
  return found | ({"through": plgpu.Barrier(num_arrivals=warpgroups)} if warpgroups > 1 else {})


def meet(barrier: Any) -> None:
  """Waits until all warpgroups that compute are through with the rings."""
  if barrier is not None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def load(sources: list[Any], tiles: list[Any], loaded: Any) -> None:
  """Copies and waits; the barrier wants as many arrivals."""
  for source, tile in zip(sources, tiles):
    plgpu.copy_gmem_to_smem(source, tile, loaded)
  plgpu.barrier_wait(loaded)


def clean(tile: Any, what: Any = FINITE) -> None:
  """In place, what is finite in a tile `[rows, columns]`; or 1 for each element that is `what`, and 0 for the others."""
  height, layout = launch.WARPGROUP_ROWS, leaves.WGMMA
  if tile.shape[0] % height:
    tile, layout = tile.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED
  for row in range(0, tile.shape[0], height):
    part = tile.at[pl.ds(row, height)]
    x = plgpu.layout_cast(part[...], layout).astype(jnp.float32)
    kind = _everywhere(what, x)
    mark = lambda which: jnp.where(which, 1.0, 0.0)
    marks = jnp.where(kind == NAN, mark(x != x), jnp.where(kind == INFINITE, mark(x == softmax.INF), mark(x == -softmax.INF)))
    part[...] = jnp.where(kind == FINITE, jnp.where(jnp.abs(x) < softmax.INF, x, 0.0), marks).astype(tile.dtype)
  plgpu.commit_smem()


def _everywhere(what: Any, like: Any) -> Any:
  return lax.broadcast_in_dim(jnp.int32(what), like.shape, [])


def by_columns(width: int, compute: Callable[[Any], Any], leave: Callable[[Any, Any], None]) -> None:
  """`leave(first column, compute(first column))` for each 64 columns of a result."""
  @pl.loop(0, width // WIDTH)
  def _(n):
    column = n * WIDTH
    leave(column, compute(column))


def visit_all(walk: launch.Walk, side: int, visit: Callable[[Any, Any], Any], carry: Any, few: int = KEYS) -> Any:
  """`carry = visit(first key or query, carry)` for each `few` of those that the visits hold, in tiles of `side`."""
  parts = side // few

  def one(n, carry):
    return visit(walk.tile(lax.div(n, jnp.int32(parts))) * side + lax.rem(n, jnp.int32(parts)) * few, carry)

  return lax.fori_loop(0, walk.count * parts, one, carry)


def two_products(call: launch.Call, lefts: tuple[Any, Any], rights: list[Callable], n: Any) -> tuple[Any, Any]:
  """The products of scores and of dO Vᵀ at visit n, awaited; 0 for the second where it is not asked for."""
  acc = plgpu.ACC((launch.WARPGROUP_ROWS, rights[0](0).shape[0]), jnp.float32)
  operands = lambda left, right: lambda a, b: (left(a), right(b).transpose((1, 0)))
  found = [launch.product(call, operands(launch.kept(left, n), right), acc)
           for left, right in zip(lefts, rights) if left is not None]
  return found[0], found[1] if len(found) > 1 else jnp.zeros_like(found[0])


def leave_or(call: launch.Call, memory: Any, leave: Callable[[], None], again: Callable[[], None], *results: Any) -> None:
  """Leaves what is finite, and computes the rest again."""
  if not call.masked:
    leave()
    return
  meet(getattr(memory, "through", None))
  flags = memory.flags.at[lax.axis_index("warpgroup")]
  lax.cond(wanted(flags, *results), again, leave)


def store(x: Any, tile: Any, place: Any) -> None:
  """Leaves a result `[64, 64]` in global memory, by way of shared memory."""
  tile[...] = x.astype(tile.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile, place)
  plgpu.wait_smem_to_gmem(0)


def attend_again(call: launch.Call, walk: launch.Walk, weights: Callable, scores: Callable, v_tile: Callable, p_tile: Any,
                 start: softmax.State) -> Callable[[Any], Any]:
  """For `by_columns`: 64 columns of the output; `scores(key)`, of 64 keys, also loads values, `v_tile(column, piece)`.

  First the elements of values that are NaN, infinite and minus infinite are each weighed with 1 for each key that a row sees, which
  says where they show; then what is finite is weighed as usual.
  """
  def compute(column):
    def attempt(m, result):
      what = MINUS_INFINITE - m

      def visit(key, state):
        top, total, shrink, p, seen = weights(key, scores(key), state.m, state.total, True)
        for piece in range(call.pieces):
          clean(v_tile(column, piece), what)
        left = jnp.where(_everywhere(what, p) == FINITE, p, seen)
        acc = jnp.where(_everywhere(what, state.acc) == FINITE, state.acc * call.rows.spread(shrink, WIDTH), state.acc)
        acc, = launch.accumulate(call, [acc], [left], [functools.partial(v_tile, column)], [p_tile])
        return softmax.State(top, total, acc)

      state = visit_all(walk, call.tiles[1], visit, start)
      out, _ = softmax.finish(state, call.rows, call.unit)
      kind = _everywhere(what, out)
      value = jnp.where(kind == NAN, jnp.nan, jnp.where(kind == INFINITE, softmax.INF, -softmax.INF))
      return result + jnp.where(kind == FINITE, out, jnp.where(state.acc > 0, value, 0.0))

    return lax.fori_loop(0, MINUS_INFINITE + 1, attempt, launch.in_layout(jnp.zeros((launch.WARPGROUP_ROWS, WIDTH), jnp.float32)))

  return compute
