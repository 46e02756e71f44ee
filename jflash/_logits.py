"""Everything between q·k and the weights, as one pytree: scale, bias, ALiBi, score_mod, soft cap, mask and dropout.

Its arrays are laid out as `[B|1, N|1, T|1, S|1, …]`, where a size of one broadcasts; the shape is the label. With tiles in
place of its arrays it computes the scores of a tile, with spans in place of them it says which tiles matter, and `jax.vjp`
of it is the only derivative of bias, ALiBi, score_mod, cap and mask that there is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._dropout import Dropout
from ._mask import Coordinates, Mask, Span
from ._program import Program, is_program
from ._pytree import pytree


@pytree
class Logits:
  """s = cap(score_mod(scale · q·k + bias - slope · |q position - k position|)), and -inf where the mask does not keep."""

  scale: Any  # a float or [1, 1, 1, 1]
  bias: Any = None  # [B|1, N|1, T|1, S|1]
  alibi_slopes: Any = None  # [B|1, N, 1, 1]
  soft_cap: Any = None  # a float or [1, 1, 1, 1]
  mask: Mask | None = None
  query_positions: Any = None  # [B|1, 1, T, 1]
  key_positions: Any = None  # [B|1, 1, 1, S]
  batch_ids: Any = None  # [B, 1, 1, 1] or [1, 1, T, 1]
  head_ids: Any = None  # [1, N, 1, 1]
  score_mod: Program | None = None
  dropout: Dropout | None = None

  def coordinates(self, batch: Any, head: Any, row: Any, column: Any, take: Any = None, gathers: bool = False,
                  turned: bool = False) -> Coordinates:
    """Where a tile lies, given its batch, head, row and column numbers, as `Coordinates` has them."""
    given = lambda own, number: number if own is None else own
    return Coordinates(given(self.batch_ids, batch), given(self.head_ids, head), row, column, given(self.query_positions, row),
                       given(self.key_positions, column), take, gathers, turned)

  @property
  def plain(self) -> bool:
    """Whether nothing but the mask comes after a known scale."""
    terms = self.bias, self.alibi_slopes, self.soft_cap, self.score_mod
    return isinstance(self.scale, float) and self.scale > 0 and all(term is None for term in terms)

  def in_units(self) -> tuple[float, Logits]:
    """(unit, logits) with these scores = unit · those: a known scale is left to the kernels, which place it better."""
    return (self.scale, dataclasses.replace(self, scale=1.0)) if self.plain else (1.0, self)

  def scores(self, qk: Any, at: Coordinates, masked: bool, inside: Any = None, differentiated: bool = True) -> Any:
    """The scores of a tile from its products `qk`.

    Args:
      masked: False where the mask is known to keep the whole tile, which leaves it out.
      inside: for a masked tile at the ragged end, which of its elements are queries and keys at all.
      differentiated: False where no derivative is taken of this.
    """
    keep = self._keep(at, inside) if masked else None
    # What is masked must be finite before it enters any product, or its zero cotangent would come back as 0 · NaN.
    hide = lambda x: x if keep is None or not differentiated else jnp.where(keep, x, 0.0)
    as_scores = lambda x: x if isinstance(x, float) else x.astype(qk.dtype)
    s = hide(qk) * as_scores(self.scale)
    if self.bias is not None:
      s = s + as_scores(self.bias)
    if self.alibi_slopes is not None:
      s = s - as_scores(self.alibi_slopes) * jnp.abs(at.q - at.k).astype(qk.dtype)
    if self.score_mod is not None:
      s = self.score_mod.on_tile(at, keep, hide(s))
    if self.soft_cap is not None:
      cap = as_scores(self.soft_cap)
      s = cap * jnp.tanh(hide(s) / cap)
    return s if keep is None else jnp.where(keep, s, -jnp.inf)

  def drop(self, weights: Any) -> Any:
    """A tile of weights, or of what multiplies them, after dropout."""
    return weights if self.dropout is None else self.dropout.on_tile(weights)

  def _keep(self, at: Coordinates, inside: Any) -> Any:
    keep = None if self.mask is None else self.mask.keep(at)
    return inside if keep is None else keep if inside is None else keep & inside

  def table(self, queries: int, keys: int, tiles: tuple[int, int]) -> tuple[Any, Any]:
    """(some, all) for every tile, `[B|1, N|1, T tiles, S tiles]`: NumPy arrays as far as the mask is known while tracing."""
    counts = -(-queries // tiles[0]), -(-keys // tiles[1])
    if self.mask is None:
      return np.ones((1, 1, *counts), bool), np.ones((1, 1, *counts), bool)
    positions = Logits(1.0, mask=self.mask, query_positions=self.query_positions, key_positions=self.key_positions)
    spans = jax.tree.map(lambda x: x if is_program(x) else _span(x, tiles), positions, is_leaf=is_program)
    row, column = (_span(np.arange(n, dtype=np.int32).reshape(shape), tiles)
                   for n, shape in ((queries, (1, 1, -1, 1)), (keys, (1, 1, 1, -1))))
    some, every = spans.mask.tile(spans.coordinates(None, None, row, column))
    xp = np if all(isinstance(x, (bool, np.bool_, np.ndarray)) for x in (some, every)) else jnp
    lead = np.broadcast_shapes(np.shape(some), np.shape(every), (1, 1, 1, 1))[:2]
    return tuple(xp.broadcast_to(xp.asarray(x), (*lead, *counts)) for x in (some, every))  # type: ignore[return-value]


def _span(x: Any, tiles: tuple[int, int]) -> Span:
  """Least and greatest value of `[B|1, N|1, T|1, S|1, …]` over each tile; axes past the fourth stay as they are."""
  if x.ndim > 4:
    return Span(x, x)
  xp = np if isinstance(x, np.ndarray) else jnp

  def split(y, axis):
    """The axis as (tiles, elements of a tile); the last tile is filled up with its own last value, which keeps its span."""
    tile = tiles[axis - 2]
    count = -(-y.shape[axis] // tile)
    pad = [(0, count * tile - n if a == axis else 0) for a, n in enumerate(y.shape)]
    return xp.pad(y, pad, mode="edge").reshape(*y.shape[:axis], count, tile, *y.shape[axis + 1:])

  lo = hi = x
  for axis in (2, 3):
    if x.shape[axis] > 1:
      lo, hi = split(lo, axis).min(axis=axis + 1), split(hi, axis).max(axis=axis + 1)
  return Span(lo, hi)
