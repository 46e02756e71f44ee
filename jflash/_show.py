"""`show`: the tiles of a mask as text, and what share of them is skipped."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from pallas_kernels import schedule

from . import _check, _mask, _plan, masks
from ._logits import Logits
from ._problem import Problem

INK = {schedule.FULL: "█", schedule.PARTIAL: "▒", schedule.EMPTY: "·"}
_WIDEST = 100  # columns of text
_CELLS = 48  # along an axis
_MAPS = 4  # so many batch elements and heads are drawn one by one, and of more only the first


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TileMap:
  """The tiles of a mask. `str` and `repr` both draw it, so that it appears at the prompt and with `print` alike.

  Attributes:
    kinds: 0 skipped, 1 partial, 2 full for every tile, `[B|1, N|1, query tiles, key tiles]`; an axis that the mask does
      not look at has size one.
    tiles: (query rows, key columns) of a tile.
    queries, keys: T and S.
    mask: the mask as text.
  """

  kinds: np.ndarray
  tiles: tuple[int, int]
  queries: int
  keys: int
  mask: str

  @property
  def skipped(self) -> float:
    """The share of tiles in which nothing is kept; they are neither loaded nor computed."""
    return float(np.mean(self.kinds == schedule.EMPTY))

  @property
  def partial(self) -> float:
    """The share of tiles that are computed with the mask. A tile that reaches past the last query or key is one."""
    return float(np.mean(self.kinds == schedule.PARTIAL))

  @property
  def full(self) -> float:
    """The share of tiles that are computed without looking at the mask."""
    return float(np.mean(self.kinds == schedule.FULL))

  def __str__(self) -> str:
    batch, heads, rows, columns = self.kinds.shape
    label = len(str(self.queries))
    cells = min(_CELLS, max(1, (min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns) - label - 1) // 2))
    factor = max(-(-rows // cells), -(-columns // cells))  # tiles along a side of a cell
    lines = textwrap.wrap(self.mask, _WIDEST)
    sides = " x ".join(map(str, self.tiles))
    lines.append(f"{self.queries} queries (down) by {self.keys} keys (across), tiles of {sides}")
    drawn = [(b, h) for b in range(batch) for h in range(heads)]
    drawn = drawn if len(drawn) <= _MAPS else drawn[:1]
    for b, h in drawn:
      if batch * heads > 1:
        lines.append(_caption(b, h, batch, heads))
      for number, row in enumerate(_merge(self.kinds[b, h], factor)):
        first = number * factor * self.tiles[0]
        lines.append(f"{first:>{label}} " + "".join(2 * INK[int(kind)] for kind in row))
    mixed = "" if factor == 1 else f", or mixed: each mark is {factor} x {factor} tiles"
    everywhere = "" if batch * heads == 1 else f" over all {batch} x {heads} of batch x heads"
    lines.append(f"{INK[schedule.FULL]} full, {INK[schedule.PARTIAL]} partial{mixed}, {INK[schedule.EMPTY]} skipped")
    lines.append(f"{_percent(self.skipped)} of {self.kinds.size} tiles skipped, "
                 f"{_percent(self.partial)} need the mask, {_percent(self.full)} are full{everywhere}")
    return "\n".join(lines)

  __repr__ = __str__


def show(mask: Any, queries: int, keys: int, *, tiles: int | tuple[int, int] = (128, 128), query_positions: Any = None,
         key_value_positions: Any = None) -> TileMap:
  """Draws the tiles of a mask and says what share of them is skipped.

  The tiles are those that a kernel of this tile size visits, read off its schedule. Batch and heads are as many as the
  mask's own arrays have; up to four maps are drawn, and of more only the first, while the shares count all of them.

  Args:
    mask: a mask from `jflash.masks`, or a boolean array that broadcasts to `[B, N, T, S]`. It must not be traced.
    queries: T.
    keys: S.
    tiles: (query rows, key columns) of a tile, or one number for both. `attention` takes its own: see `jflash.explain`.
    query_positions, key_value_positions: as in `attention`, integers `[B, T]` or `[T]`, `[B, S]` or `[S]`.

  Returns:
    A `TileMap`, which draws itself at the prompt and in `print`, and has the shares as `skipped`, `partial` and `full`.

  Raises:
    ValueError: the mask or the positions do not fit T and S, or are traced.

  Example:
    >>> from jflash import masks, show
    >>> show(masks.Causal() & masks.Window(left=64), 256, 256, tiles=64)
    Causal() & Window(left=64)
    256 queries (down) by 256 keys (across), tiles of 64 x 64
      0 ▒▒······
     64 ▒▒▒▒····
    128 ··▒▒▒▒··
    192 ····▒▒▒▒
    █ full, ▒ partial, · skipped
    56.2% of 16 tiles skipped, 43.8% need the mask, 0% are full
  """
  for name, size in (("queries", queries), ("keys", keys)):
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
      raise ValueError(f"`{name}` is {size!r}; pass an integer >= 1.")
  sides = (tiles, tiles) if isinstance(tiles, (int, np.integer)) else tuple(tiles)
  if len(sides) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in sides):
    raise ValueError(f"`tiles` is {tiles!r}; pass two integers >= 1, (query rows, key columns), or one for both.")
  leads = _leading(mask), _leading_of(query_positions, 1), _leading_of(key_value_positions, 1)
  batch, heads = (max(sizes) for sizes in zip(*leads))
  sizes = _mask.Sizes(batch, heads, int(queries), int(keys))
  if query_positions is not None:
    sizes = sizes._replace(query_positions=_check.per_query(query_positions, sizes, "query_positions"))
  if key_value_positions is not None:
    sizes = sizes._replace(key_positions=_check.per_key(key_value_positions, sizes, "key_value_positions"))
  bound = mask.bind(sizes) if isinstance(mask, _mask.Mask) else masks.Elements(_check.mask_array(mask, sizes))
  tile = min(int(sides[0]), sizes.queries), min(int(sides[1]), sizes.keys)
  kinds = tile_kinds(_problem(bound, sizes), _plan.Plan(tile, (1, 1), False, False))
  if kinds is None:
    raise ValueError(f"`mask`, {mask!r}, or the positions are traced; call `show` outside jit, on arrays with values.")
  name = repr(mask if isinstance(mask, _mask.Mask) else masks.Dense(_check.as_array(mask)))
  return TileMap(kinds, tile, sizes.queries, sizes.keys, name)


def tile_kinds(problem: Problem, plan: _plan.Plan) -> np.ndarray | None:
  """The schedule as EMPTY, PARTIAL or FULL for every tile, `[B|1, K|1, query tiles, key tiles]`; None if traced."""
  values = jax.tree.map(lambda x: np.asarray(x) if _has_value(x) else x, problem.logits)
  forward = dataclasses.replace(plan, backward_tiles=None, together=1)  # or full tiles that a step leaves over would be PARTIAL
  kinds = _plan.make_schedule(dataclasses.replace(problem, logits=values), forward).kinds
  return np.asarray(kinds).astype(np.int8) if _has_value(kinds) else None


def _has_value(x: Any) -> bool:
  """Whether an array can be read here and now."""
  return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def _problem(mask: _mask.Mask, sizes: _mask.Sizes) -> Problem:
  """Attention under `mask` as far as a schedule looks at it: sizes, but no queries and no keys."""
  of = lambda length: jax.ShapeDtypeStruct((sizes.batch, length, sizes.heads, 1), np.float32)
  logits = Logits(1.0, mask=mask, query_positions=sizes.query_positions, key_positions=sizes.key_positions)
  return Problem(of(sizes.queries), of(sizes.keys), of(sizes.keys), logits)


def _leading(mask: Any) -> tuple[int, int]:
  """(batch, heads) of the arrays that a mask is made of, before it is bound: 1 where it does not tell them apart."""
  if isinstance(mask, masks.Dense):
    mask = mask.array
  if not isinstance(mask, _mask.Mask):  # [B, N, T, S]
    shape: Any = (1, 1, 1, 1, *np.shape(mask))
    return shape[-4], shape[-3]
  if isinstance(mask, masks.BlockSparse):  # [B, N, query blocks, key blocks]
    return _leading(mask.table)
  own = 1 if isinstance(mask, masks.Segments) else 0  # [B, T], and [B] in all others
  parts = [getattr(mask, field.name) for field in dataclasses.fields(mask)]  # type: ignore[arg-type]
  leads = [_leading(x) if isinstance(x, _mask.Mask) else _leading_of(x, own) for x in parts if not callable(x)]
  return max([b for b, _ in leads], default=1), max([h for _, h in leads], default=1)


def _leading_of(x: Any, own: int) -> tuple[int, int]:
  """(batch, 1) of integers `[B, …]` with `own` axes after the batch, which may be missing."""
  shape: Any = np.shape(0 if x is None else x)
  return (shape[0] if len(shape) == own + 1 else 1), 1


def _merge(kinds: np.ndarray, factor: int) -> np.ndarray:
  """One kind for each `factor x factor` tiles: theirs where they agree, else PARTIAL."""
  rows, columns = (-(-n // factor) for n in kinds.shape)
  pad = [(0, n * factor - size) for n, size in zip((rows, columns), kinds.shape)]
  cells = np.pad(kinds, pad, mode="edge").reshape(rows, factor, columns, factor)
  low, high = cells.min((1, 3)), cells.max((1, 3))
  return np.where(low == high, low, schedule.PARTIAL)


def _caption(b: int, h: int, batch: int, heads: int) -> str:
  each = [f"{name} {i}" for name, i, n in (("batch", b, batch), ("head", h, heads)) if n > 1]
  left_out = "" if batch * heads <= _MAPS else f", the first of {batch} x {heads} maps"
  return ", ".join(each) + left_out


def _percent(share: float) -> str:
  return f"{round(100 * share, 1):g}%"
