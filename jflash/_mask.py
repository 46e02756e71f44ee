"""The mask algebra: what a mask is, and `&`, `|`, `~`. The atoms are in `masks`.

    keep(at) -> bool array        may query position at.q see key position at.k?
    tile(at) -> (some, all)       the same for whole tiles, on the spans of their positions

`some` may say True too often and `all` may say False too often, never the other way round, so every composition is sound:
a tile without `some` is not loaded, a tile with `all` needs no mask arithmetic. A mask without a tile rule answers
(True, False): right, just not skipped.

What a mask is made of is checked against the problem's sizes by `bind`, which also lays every array out as
`[B|1, N|1, T|1, S|1, …]`: a size of one broadcasts, any further axes belong to the whole problem. After that one object
serves everywhere, whatever stands in its leaves: arrays, tiles of them, or spans.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._pytree import pytree


class Span(NamedTuple):
  """The least and the greatest value over each tile; arrays that broadcast to `[B, N, T tiles, S tiles]`."""

  lo: Any
  hi: Any


class Coordinates(NamedTuple):
  """Where the scores of a tile lie: batch and head numbers, row and column numbers, query and key positions.

  On elements these are integer arrays that broadcast to the tile (rows and q vary along its second-to-last axis, columns and k
  along its last, or the other way round if `turned`); on tiles rows, columns, q and k are `Span`s. Positions are the row and
  column numbers unless the caller gave others, and so are batch and head numbers.
  """

  batch: Any
  head: Any
  row: Any
  column: Any
  q: Any
  k: Any
  take: Any = None  # `take(table, index)` of the backend
  gathers: bool = False  # whether it takes from tables of any size, `[B|1, N|1, 1, 1, …]`, as well as it does anything else
  turned: bool = False  # whether keys lie along the rows of the tile


class OfTokens(NamedTuple):
  """Which sequence each query `[T]` and each key `[S]` belongs to, where one batch element packs many."""

  query: Any
  key: Any


class Sizes(NamedTuple):
  """What a mask is bound to: B batch, N query heads, T queries, S keys, and the positions where the caller gave any."""

  batch: int
  heads: int
  queries: int
  keys: int
  query_positions: Any = None  # [B|1, 1, T, 1]
  key_positions: Any = None  # [B|1, 1, 1, S]
  batch_ids: Any = None  # [B, 1, 1, 1], or [1, 1, T, 1] where one batch element packs many
  key_batch_ids: Any = None  # [1, 1, 1, S] in that case
  head_ids: Any = None  # [1, N, 1, 1]

  def numbers(self) -> tuple[Any, Any, Any, Any]:
    """(batch, head, query position, key position) of all scores, int32 arrays that broadcast to `[B, N, T, S]`."""
    counted = self.batch, self.heads, self.queries, self.keys
    given = self.batch_ids, self.head_ids, self.query_positions, self.key_positions
    count = lambda n, axis: jnp.arange(n, dtype=np.int32).reshape([-1 if a == axis else 1 for a in range(4)])
    return tuple(count(n, axis) if x is None else jnp.asarray(x)  # type: ignore[return-value]
                 for axis, (n, x) in enumerate(zip(counted, given)))


class Mask:
  """Which keys each query may see. Combine with `&`, `|`, `~`; boolean arrays join in as `Dense`."""

  def keep(self, at: Coordinates) -> Any:
    raise NotImplementedError

  def tile(self, at: Coordinates) -> tuple[Any, Any]:
    del at
    return np.array(True), np.array(False)

  def most(self, tiles: tuple[int, int]) -> int | None:
    """How many tiles of a row of tiles can keep something, for all query heads of a kv head together; None is no bound.

    It holds where the positions are the row and column numbers.
    """
    del tiles

  def bind(self, sizes: Sizes) -> Mask:
    """This mask with its arrays checked against `sizes` and laid out as `[B|1, N|1, T|1, S|1, …]`."""
    del sizes
    return self

  def __and__(self, other: Any) -> Mask:
    return And(self, _as_mask(other))

  def __rand__(self, other: Any) -> Mask:
    return And(_as_mask(other), self)

  def __or__(self, other: Any) -> Mask:
    return Or(self, _as_mask(other))

  def __ror__(self, other: Any) -> Mask:
    return Or(_as_mask(other), self)

  def __invert__(self) -> Mask:
    return Not(self)

  def __bool__(self) -> bool:
    raise TypeError("a mask has no truth value; combine masks with `&`, `|` and `~`, not with `and`, `or` and `not`.")

  def __repr__(self) -> str:
    fields = ", ".join(f"{f.name}={brief(getattr(self, f.name))}" for f in dataclasses.fields(self)  # type: ignore[arg-type]
                       if getattr(self, f.name) is not None)
    return f"{type(self).__name__.lstrip('_')}({fields})"

  __array_priority__ = 1000  # so that `array & mask` asks the mask
  __array_ufunc__ = None


def brief(value: Any) -> str:
  if isinstance(value, (np.ndarray, jax.Array)):
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"
  return getattr(value, "__name__", repr(value))


def _as_mask(value: Any) -> Mask:
  if isinstance(value, Mask):
    return value
  if hasattr(value, "dtype"):
    from .masks import Dense  # an atom, which builds on this file
    return Dense(value)
  raise TypeError(f"a mask combines with another mask or a boolean array, not with {value!r} of type {type(value).__name__}.")


# Composition ----------------------------------------------------------------------------------------------------------


@pytree
class And(Mask):
  """Kept where both keep."""

  a: Mask
  b: Mask

  def keep(self, at):
    return self.a.keep(at) & self.b.keep(at)

  def tile(self, at):
    (some_a, all_a), (some_b, all_b) = self.a.tile(at), self.b.tile(at)
    return some_a & some_b, all_a & all_b

  def most(self, tiles):
    return min((n for n in (self.a.most(tiles), self.b.most(tiles)) if n is not None), default=None)

  def bind(self, sizes):
    return And(self.a.bind(sizes), self.b.bind(sizes))

  def __repr__(self):
    return " & ".join(f"({x!r})" if isinstance(x, Or) else repr(x) for x in (self.a, self.b))


@pytree
class Or(Mask):
  """Kept where either keeps."""

  a: Mask
  b: Mask

  def keep(self, at):
    return self.a.keep(at) | self.b.keep(at)

  def tile(self, at):
    (some_a, all_a), (some_b, all_b) = self.a.tile(at), self.b.tile(at)
    return some_a | some_b, all_a | all_b

  def most(self, tiles):
    a, b = self.a.most(tiles), self.b.most(tiles)
    return None if a is None or b is None else a + b

  def bind(self, sizes):
    return Or(self.a.bind(sizes), self.b.bind(sizes))

  def __repr__(self):
    return f"{self.a!r} | {self.b!r}"


@pytree
class Not(Mask):
  """Kept where the other does not keep."""

  a: Mask

  def keep(self, at):
    return ~self.a.keep(at)

  def tile(self, at):
    some, all_ = self.a.tile(at)
    return ~all_, ~some

  def bind(self, sizes):
    return Not(self.a.bind(sizes))

  def __repr__(self):
    return f"~({self.a!r})" if isinstance(self.a, (And, Or)) else f"~{self.a!r}"


def parts(mask: Mask | None) -> list[Mask]:
  """The mask and everything that it is composed of."""
  if mask is None:
    return []
  nested = [getattr(mask, name) for name in ("a", "b") if isinstance(getattr(mask, name, None), Mask)]
  return [mask] + [part for m in nested for part in parts(m)]


def conjunction(terms: list, default: Any) -> Any:
  """All of the terms, or `default` where there are none."""
  result = terms[0] if terms else default
  for term in terms[1:]:
    result = result & term
  return result
