"""Sums over tiles in plain JAX, with derivatives of any order in linear memory.

A pass that needs nothing of one tile for the next adds, for every visited tile (i, j), some function of the rows of tile i, the
columns of tile j and the tile's leaves to other rows, columns and leaves. Its tangent and its transpose are again such sums, of
the function's own `jax.jvp` and `jax.vjp`, so that it can be differentiated as often as one likes and never stores a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import schedule

from ._linear import linear_map
from ._xla_walk import Chunk, Columns, Walk, laid_out


class Parts(NamedTuple):
  """Arrays, or tiles of them: those that run along the queries, along the keys, and those laid out as the logits' are."""

  rows: list[Any]  # [B, T, N, width], tiles [Bc, Kc, G, rows, width]
  columns: list[Any]  # [B, K, S, width] or [B, S, K, width], tiles [Bc, Kc, columns, width]
  leaves: list[Any]  # [B|1, N|1, T|1, S|1, …], tiles [Bc|1, Kc|1, G|1, rows|1, columns|1, …]

  def __add__(self, other: Any) -> Parts:
    return Parts(*(list(a) + list(b) for a, b in zip(self, other)))

  def split(self, first: Parts) -> tuple[Parts, Parts]:
    """The parts that came from `first`, and those that were added to it."""
    return Parts(*(a[:len(b)] for a, b in zip(self, first))), Parts(*(a[len(b):] for a, b in zip(self, first)))

  def pick(self, which: Parts) -> Parts:
    return Parts(*([x for x, w in zip(a, b) if w] for a, b in zip(self, which)))

  def put(self, which: Parts, values: Parts) -> Parts:
    """These parts with `values` in place of those that `pick(which)` gives."""
    values = Parts(*map(iter, values))  # type: ignore[arg-type]
    return Parts(*([next(v) if w else x for x, w in zip(a, b)] for a, b, v in zip(self, which, values)))  # type: ignore[call-overload]


class Place(NamedTuple):
  """Where a tile lies, or several in a row."""

  chunk: Chunk
  i: Any
  j: Columns


Tile = Callable[[Place, bool, Parts], Parts]  # (place, masked, tiles) -> what the tile adds


Prepare = Callable[[list[Any]], list[Any]]  # (tiles of rows) -> more of them, to be made once for all key tiles


def tile_sum(walk: Walk, tile: Tile, inputs: Parts, visits: schedule.RowVisits, gradients_of: tuple[int, ...] = (),
             row_dtypes: tuple[Any, ...] | None = None, prepare: Prepare = lambda rows: []) -> Parts:
  """The sum of `tile(place, masked, tiles)` over all visited tiles, differentiable in every float array of `inputs`.

  Args:
    inputs: arrays that are filled up to whole tiles.
    gradients_of: which of the leaves the summed leaves are laid out as.
    row_dtypes: of the summed rows; the scores' dtype by default, as all other sums.
    prepare: what it gives, `tile` finds behind its rows.
  """
  prepared = lambda place, masked, tiles: tile(place, masked, tiles._replace(rows=tiles.rows + prepare(tiles.rows)))

  @jax.custom_jvp
  def total(inputs, visits):
    return _run(walk, tile, inputs, visits, gradients_of, row_dtypes, prepare)

  def tangent(primals, tangents):
    inputs, visits = primals
    flat = jax.tree.leaves(tangents[0], is_leaf=lambda x: isinstance(x, SymbolicZero))
    moves = jax.tree.unflatten(jax.tree.structure(inputs), [not isinstance(d, SymbolicZero) and _is_float(x)
                                                            for x, d in zip(jax.tree.leaves(inputs), flat)])
    out = total(inputs, visits)
    if not any(jax.tree.leaves(moves)):
      return out, jax.tree.map(jnp.zeros_like, out)
    wide, numbers = walk.widened(), tuple(n for n, moved in enumerate(moves.leaves) if moved)

    def apply(residuals, moving):
      inputs, visits = residuals
      added = tile_sum(wide, _tangent_of(prepared, inputs, moves), inputs + moving, visits, gradients_of)
      return _as(added, out)

    def transpose(residuals, cotangents):
      inputs, visits = residuals
      summed = tile_sum(wide, _transpose_of(prepared, inputs, moves), inputs + cotangents, visits, numbers)
      return _as(summed, inputs.pick(moves))

    return out, linear_map(apply, transpose, primals, Parts(*tangents[0]).pick(moves))

  total.defjvp(tangent, symbolic_zeros=True)
  return total(inputs, visits)


def _tangent_of(tile: Tile, inputs: Parts, moves: Parts) -> Tile:
  def moved(place, masked, tiles):
    tiles, tangents = tiles.split(inputs)
    return jax.jvp(lambda moving: tile(place, masked, tiles.put(moves, moving)), [tiles.pick(moves)], [tangents])[1]
  return moved


def _transpose_of(tile: Tile, inputs: Parts, moves: Parts) -> Tile:
  def pulled(place, masked, tiles):
    tiles, cotangents = tiles.split(inputs)
    out, pull = jax.vjp(lambda moving: tile(place, masked, tiles.put(moves, moving)), tiles.pick(moves))
    return pull(_as(cotangents, out))[0]
  return pulled


def _run(walk: Walk, tile: Tile, inputs: Parts, visits: schedule.RowVisits, gradients_of: tuple[int, ...],
         row_dtypes: tuple[Any, ...] | None, prepare: Prepare) -> Parts:
  zeros = lambda x: jnp.zeros(x.shape, walk.dtype)

  def rows_at(chunk, i):
    rows = [walk.rows(x, chunk, i) for x in inputs.rows]
    return rows + [laid_out(x) for x in prepare(rows)]

  def cut_at(chunk, i, j, rows):
    return Parts(rows, [walk.columns(x, chunk, j) for x in inputs.columns], [walk.leaf(x, chunk, i, j) for x in inputs.leaves])

  def shapes():  # of what a tile adds; all tiles are alike
    zero = np.int32(0)
    chunk = Chunk(zero, zero, visits)
    return tile(Place(chunk, zero, (zero,)), True, cut_at(chunk, zero, (zero,), rows_at(chunk, zero)))

  added = jax.eval_shape(shapes)
  nothing = lambda tiles: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), added)

  def each_row(chunk, i, sums):
    rows = rows_at(chunk, i)

    def visit(j, masked, carry):
      row_sums, columns, leaves = carry
      new = walk.apart(j, lambda tiles: tile(Place(chunk, i, j), masked, tiles), nothing, cut_at(chunk, i, j, rows))
      return ([x + y for x, y in zip(row_sums, new.rows)],
              [walk.add_columns(x, y, chunk, j) for x, y in zip(columns, new.columns)],
              [walk.add_leaf(x, y, chunk, i, j) for x, y in zip(leaves, new.leaves)])

    row_sums, columns, leaves = walk.each_visit(chunk, i, visit, ([zeros(x) for x in added.rows], sums.columns, sums.leaves))
    return Parts([walk.put_rows(x, y, chunk, i) for x, y in zip(sums.rows, row_sums)], columns, leaves)

  dtypes = row_dtypes or (walk.dtype,) * len(added.rows)
  keys = walk.counts[1] * walk.plan.tiles[1]
  buffers = Parts([walk.row_buffer(x.shape[-1], d) for x, d in zip(added.rows, dtypes)],
                  [jnp.zeros((walk.batch, walk.kv_heads, x.shape[-1], keys), walk.dtype) for x in added.columns],
                  [zeros(inputs.leaves[n]) for n in gradients_of])
  summed = walk.each_row(visits, each_row, buffers)
  return summed._replace(columns=[walk.summed_columns(x) for x in summed.columns])


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _as(parts: Parts, like: Parts) -> Parts:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), parts, like)
