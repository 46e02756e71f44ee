"""A table of tiles becomes lists of visits: which tiles a kernel walks, in which order, and which of them need the mask.

A table `(some, all)` of shape `[B|1, K|1, rows, columns]` says for every tile whether anything, and whether everything, in it
is kept. Each visit is one int32: row tile, column tile and kind. Lists come row by row, so that a kernel may keep a row's
state on chip; every row has at least one visit, if only an EMPTY one, so that every output is written. The transposed
table gives the lists for the pass that walks column by column.

A NumPy table is known while tracing, and its lists are as long as the longest of them. For a traced table they are as long
as they could be, as far as the caller knows, and what is left over repeats the last tile as EMPTY: nothing new is loaded,
nothing is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2
_KIND_BITS, _TILE_BITS = 2, 14
MAX_TILES = 1 << _TILE_BITS


class Visits(NamedTuple):
  """Lists of visits, `codes [B|1, K|1, length]`; those of row r are numbers `starts[..., r]` to `starts[..., r + 1]`."""

  codes: Any
  starts: Any  # [B|1, K|1, rows + 1]


def outer(code: Any) -> Any:
  """The tile along the axis that is walked slowly."""
  return (code >> (_KIND_BITS + _TILE_BITS)) & (MAX_TILES - 1)


def continued(code: Any) -> Any:
  """1 for the visits of a column, in `span_visits`, that have others in spans before."""
  return code >> (_KIND_BITS + 2 * _TILE_BITS)


def inner(code: Any) -> Any:
  """The tile along the axis that is walked fast."""
  return (code >> _KIND_BITS) & (MAX_TILES - 1)


def kind(code: Any) -> Any:
  """EMPTY, PARTIAL or FULL."""
  return code & 3


def kinds(some: Any, every: Any) -> Any:
  """EMPTY, PARTIAL or FULL from whether some, and whether every, element of a tile is kept."""
  xp = np if isinstance(some, np.ndarray) and isinstance(every, np.ndarray) else jnp
  return xp.where(some, xp.where(every, FULL, PARTIAL), EMPTY).astype(np.int32)


def in_steps(kinds: Any, together: int) -> Any:
  """A table in which each row has a multiple of `together` FULL tiles: what is left over is PARTIAL."""
  xp: Any = np if isinstance(kinds, np.ndarray) else jnp
  full = (kinds == FULL).astype(np.int32)
  left_over = xp.cumsum(full, axis=-1) <= xp.sum(full, axis=-1, keepdims=True) % together
  return xp.where((kinds == FULL) & left_over, PARTIAL, kinds).astype(np.int32)


def first(kinds: Any, count: int) -> Any:
  """The first `count` tiles of each row that are not EMPTY, and EMPTY in place of the others: `[B|1, K|1, rows, columns]`."""
  return jnp.where(jnp.cumsum(kinds != EMPTY, axis=-1) <= count, kinds, EMPTY)


def visits(kinds: Any, most: int | None = None, together: int = 1, written: Any = True) -> Visits:
  """Lists that walk a table of kinds `[B|1, K|1, rows, columns]` row by row; transpose it first for column by column.

  Args:
    most: how many visits there can be in a list, empty rows included; it makes the lists of a traced table shorter.
    together: 1, or 2 for rows filled up to an even number of visits, with an EMPTY one.
    written: `[B|1, K|1, rows]`, which rows have a visit even if all of their tiles are EMPTY.
  """
  static = isinstance(kinds, np.ndarray)
  xp: Any = np if static else jnp
  *lead, rows, columns = kinds.shape
  if max(rows, columns) > MAX_TILES:
    raise NotImplementedError(f"{rows} x {columns} tiles; at most {MAX_TILES} fit along an axis. Use larger tiles.")
  row, column = np.arange(rows, dtype=np.int32)[:, None], np.arange(columns, dtype=np.int32)[None, :]
  some = kinds != EMPTY
  codes = (row << (_KIND_BITS + _TILE_BITS)) | (column << _KIND_BITS) | kinds
  listed = some | (~xp.any(some, axis=-1, keepdims=True) & xp.asarray(written)[..., None] & (column == 0))
  if together == 2:
    codes, listed = _even(codes, listed)
    longest = rows * (columns + columns % 2)
    columns, most = columns + 1, longest if most is None else min(longest, most + rows)
  counts = xp.sum(listed, axis=-1, dtype=np.int32)
  starts = xp.concatenate([xp.zeros((*lead, 1), np.int32), xp.cumsum(counts, axis=-1, dtype=np.int32)], axis=-1)
  total = starts[..., -1:]

  length = int(total.max()) if static else rows * columns if most is None else min(rows * columns, most)
  length += length % together
  flat = lambda x: x.reshape(*lead, rows * columns)
  order = xp.argsort(~flat(listed), axis=-1, stable=True)
  number = np.arange(length, dtype=np.int32)
  number = xp.minimum(number, total - together + number % together)
  codes = xp.take_along_axis(flat(codes), xp.take_along_axis(order, number, axis=-1), axis=-1)
  left_over = np.arange(length) >= total
  return Visits(xp.where(left_over, (codes >> _KIND_BITS) << _KIND_BITS, codes), starts)


def span_visits(kinds: Any, spans: int, most: int) -> Visits:
  """Lists that walk a table of kinds `[B|1, K|1, rows, columns]` column by column, in one span of rows after another.

  With `span = ceil(rows / spans)`, inner tiles are rows within a span, and outer ones `number of the span · columns + column`.
  Every column has a visit, if only in the first span, and so has every span, if only of the first column.

  Args:
    most: how many tiles there can be in a list that are not EMPTY.
  """
  *lead, rows, columns = kinds.shape
  most = min(most + columns + spans - 1, rows * columns)
  if spans == 1:
    return visits(kinds.swapaxes(-1, -2), most)
  span = -(-rows // spans)
  xp: Any = np if isinstance(kinds, np.ndarray) else jnp
  filled = xp.pad(kinds, [(0, 0), (0, 0), (0, spans * span - rows), (0, 0)], constant_values=EMPTY)
  table = filled.reshape(*lead, spans, span, columns).swapaxes(-1, -2)
  some = xp.any(table != EMPTY, axis=-1)  # [..., spans, columns]
  at_start = np.arange(spans)[:, None] == 0, np.arange(columns) == 0
  written = (~xp.any(some, axis=-2, keepdims=True) & at_start[0]) | (~xp.any(some, axis=-1, keepdims=True) & at_start[1])
  listed = (some | written).astype(np.int32)
  before = (xp.cumsum(listed, axis=-2) > listed).reshape(*lead, spans * columns).astype(np.int32)
  found = visits(table.reshape(*lead, spans * columns, span), most, written=written.reshape(*lead, spans * columns))
  return found._replace(codes=found.codes | xp.take_along_axis(before, outer(found.codes), axis=-1) << _KIND_BITS + 2 * _TILE_BITS)


def _even(codes: Any, listed: Any) -> tuple[Any, Any]:
  """With a column more: an EMPTY visit for rows of an odd number. It stays at the tile that was visited two before it."""
  xp: Any = np if isinstance(listed, np.ndarray) else jnp
  number = xp.cumsum(listed, axis=-1, dtype=np.int32)
  count = number[..., -1:]
  before = listed & (number == xp.maximum(count - 1, 1))
  empty = (xp.sum(xp.where(before, codes, 0), axis=-1, keepdims=True, dtype=np.int32) >> _KIND_BITS) << _KIND_BITS
  return xp.concatenate([codes, empty], axis=-1), xp.concatenate([listed, count % 2 == 1], axis=-1)


class RowVisits(NamedTuple):
  """For kernels that walk a row of tiles in a loop of their own: which tiles, with those that need the mask in front.

  The tiles of row r are `tiles[..., starts[r] : starts[r + 1]]`, of which the first `partial[r]` are PARTIAL.
  """

  tiles: Any  # [B|1, K|1, length], numbers of columns of tiles
  starts: Any  # [B|1, K|1, rows + 1]
  partial: Any  # [B|1, K|1, rows]
  order: Any  # [B|1, K|1, rows], the rows, longest first


def row_visits(kinds: Any, most: int | None = None) -> RowVisits:
  """The tiles of a table of kinds `[B|1, K|1, rows, columns]` that are not EMPTY, row by row; a row may have none.

  `most`: how many there can be in a list of a traced table.
  """
  static = isinstance(kinds, np.ndarray)
  xp: Any = np if static else jnp
  *lead, rows, columns = kinds.shape
  counts = xp.sum(kinds != EMPTY, axis=-1, dtype=np.int32)
  starts = xp.concatenate([xp.zeros((*lead, 1), np.int32), xp.cumsum(counts, axis=-1, dtype=np.int32)], axis=-1)
  length = max(int(starts.max()), 1) if static else rows * columns if most is None else min(rows * columns, most)
  rank = xp.where(kinds == EMPTY, 2 * rows, 2 * np.arange(rows)[:, None] + (kinds == FULL))
  tiles = xp.argsort(rank.reshape(*lead, rows * columns), axis=-1, stable=True)[..., :length] % columns
  order = xp.argsort(-counts, axis=-1, stable=True)
  return RowVisits(tiles.astype(np.int32), starts, xp.sum(kinds == PARTIAL, axis=-1, dtype=np.int32), order.astype(np.int32))


def turns(visits: RowVisits) -> Any:
  """For each visit, how many rows that come before its own in `order` visit the same tile: `[B|1, K|1, length]`."""
  static = isinstance(visits.tiles, np.ndarray)
  xp: Any = np if static else jnp

  def of_list(tiles, starts, order):
    number = xp.arange(tiles.shape[0])
    row = xp.searchsorted(starts[1:], number, side="right")
    tiles = xp.where(row < order.shape[0], tiles, np.iinfo(np.int32).max)  # what is left over comes last
    by_tile = xp.lexsort((xp.argsort(order)[xp.minimum(row, order.shape[0] - 1)], tiles))
    found = tiles[by_tile]
    return (number - xp.searchsorted(found, found))[xp.argsort(by_tile)].astype(np.int32)

  arrays = visits.tiles, visits.starts, visits.order
  if not static:
    return jax.vmap(jax.vmap(of_list))(*arrays)
  lead = visits.tiles.shape[:2]
  return np.stack([of_list(*(x[place] for x in arrays)) for place in np.ndindex(lead)]).reshape(visits.tiles.shape)
