"""Masks: which keys each query may see. Atoms, which combine with `&`, `|` and `~`.

Python numbers in an atom are static; NumPy arrays are known while tracing, so that what they hide costs nothing at run time;
JAX arrays may be traced. `_mask` says what `keep`, `tile` and `bind` are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _check, _check_functions, _program
from ._mask import Mask, Sizes, Span, brief, conjunction
from ._pytree import is_static, pytree


@pytree
class Causal(Mask):
  """A query sees the keys at its own position and before. With T != S, query 0 still sees key 0 alone, as in `jax.nn`."""

  def keep(self, at):
    return at.q >= at.k

  def tile(self, at):
    return at.q.hi >= at.k.lo, at.q.lo >= at.k.hi


FAR = 1 << 30  # a side of a window from which on it is no limit: positions ± it must fit into int32


@pytree
class Window(Mask):
  """A query at position p sees the keys from p - left to p + right, both inclusive; None, or 2**30 and more, is no limit.

  Args:
    left: how many positions back, an integer >= 0 (or an integer scalar array, which may be traced).
    right: how many positions ahead, likewise.

  Raises:
    ValueError: a side is negative.
  """

  left: Any = None
  right: Any = None

  def __post_init__(self):
    for name in ("left", "right"):
      value = getattr(self, name)
      if isinstance(value, np.integer):
        value = int(value)
      _check.window_side(value, f"masks.Window.{name}")
      object.__setattr__(self, name, None if isinstance(value, int) and value >= FAR else value)

  def keep(self, at):
    sides = []
    if self.left is not None:
      sides.append(at.k >= at.q - self.left)
    if self.right is not None:
      sides.append(at.k <= at.q + self.right)
    return conjunction(sides, (at.q >= at.k) | (at.q < at.k))

  def tile(self, at):
    left, right = (Span(x, x) if not isinstance(x, Span) else x for x in (self.left, self.right))
    some, all_ = [], []
    if self.left is not None:
      some.append(at.k.hi >= at.q.lo - left.hi)
      all_.append(at.k.lo >= at.q.hi - left.lo)
    if self.right is not None:
      some.append(at.k.lo <= at.q.hi + right.hi)
      all_.append(at.k.hi <= at.q.lo + right.lo)
    return conjunction(some, np.array(True)), conjunction(all_, np.array(True))

  def bind(self, sizes):
    return Window(*(x if is_static(x) else _check.scalar(x, f"masks.Window.{name}").clip(max=FAR)
                    for name, x in (("left", self.left), ("right", self.right))))


@pytree
class Segments(Mask):
  """Packed documents: a query sees the keys that carry its own segment id, whatever their positions.

  Ids are stored per row and per column; positions do not enter.

  Args:
    query: integer ids, `[B, T]` or `[T]`.
    key: integer ids, `[B, S]` or `[S]`; None is those of the queries (T = S).
  """

  query: Any
  key: Any = None

  def keep(self, at):
    return self.query == self.key

  def tile(self, at):
    q, k = self.query, self.key
    return (q.lo <= k.hi) & (k.lo <= q.hi), (q.lo == q.hi) & (k.lo == k.hi) & (q.lo == k.lo)

  def bind(self, sizes):
    key = self.key
    if key is None:
      _check.same_lengths(sizes, "masks.Segments", "key")
      key = self.query
    return Segments(_check.per_query(self.query, sizes, "masks.Segments.query"),
                    _check.per_key(key, sizes, "masks.Segments.key"))


@pytree
class Lengths(Mask):
  """Queries at positions below `query` see keys at positions below `key`; None is no limit.

  Args:
    query: an integer or integers `[B]`.
    key: an integer or integers `[B]`.
  """

  query: Any = None
  key: Any = None

  def keep(self, at):
    return self._keep(at.q, at.k)

  def tile(self, at):
    return self._tile(at.q, at.k)

  def _keep(self, q, k):
    sides = ([q < self.query] if self.query is not None else []) + ([k < self.key] if self.key is not None else [])
    return conjunction(sides, (q >= k) | (q < k))

  def _tile(self, q, k):
    some, all_ = [], []
    for span, length in ((q, self.query), (k, self.key)):
      if length is not None:
        length = length if isinstance(length, Span) else Span(length, length)
        some.append(span.lo < length.hi)
        all_.append(span.hi < length.lo)
    return conjunction(some, np.array(True)), conjunction(all_, np.array(True))

  def bind(self, sizes):
    name = f"masks.{type(self).__name__}"
    return type(self)(*(None if x is None else _check.length(x, sizes, f"{name}.{side}")
                        for side, x in (("query", self.query), ("key", self.key))))


@pytree
class RowLengths(Lengths):
  """`Lengths` on row and column numbers, which positions do not replace: `query_seq_lengths`, `key_value_seq_lengths`."""

  def keep(self, at):
    return self._keep(at.row, at.column)

  def tile(self, at):
    return self._tile(at.row, at.column)


@pytree
class PrefixLM(Mask):
  """Causal, except that everyone sees the keys at positions below `n`.

  Args:
    n: length of the prefix, an integer or integers `[B]`.
  """

  n: Any

  def keep(self, at):
    return (at.k < self.n) | (at.q >= at.k)

  def tile(self, at):
    n = self.n if isinstance(self.n, Span) else Span(self.n, self.n)
    return (at.k.lo < n.hi) | (at.q.hi >= at.k.lo), (at.k.hi < n.lo) | (at.q.lo >= at.k.hi)

  def bind(self, sizes):
    return PrefixLM(_check.length(self.n, sizes, "masks.PrefixLM.n"))


@pytree
class Dense(Mask):
  """A boolean array, True where a key is seen.

  Args:
    array: broadcasts to `[B, N, T, S]`. Where the caller gives positions, its last two axes are indexed by them instead
      (an axis of size one broadcasts, positions outside see nothing), which takes T·S bytes of memory.
  """

  array: Any

  def __post_init__(self):
    _check.boolean(self.array, "masks.Dense.array")

  def bind(self, sizes):
    if sizes.query_positions is None and sizes.key_positions is None:
      return Elements(_check.per_score(self.array, sizes, "masks.Dense.array"))
    return Elements(_look_up(self.array, sizes))


@pytree
class Elements(Mask):
  """A bound `Dense`: booleans by row and column number, `[B|1, N|1, T|1, S|1]` (or integers, nonzero where seen)."""

  array: Any

  def keep(self, at):
    return self.array != 0

  def tile(self, at):
    return self.array.hi, self.array.lo


@pytree
class BlockSparse(Mask):
  """A table of blocks: query position q sees key position k when `table[q // rows, k // columns]` is True.

  Args:
    table: boolean, `[query blocks, key blocks]`, with leading axes `[B or 1, N or 1]` where batches or heads differ.
    block_shape: (rows, columns) of a block, integers >= 1. Positions outside the table see nothing.
    max_blocks: a promise that no row of the table has more True blocks, where query heads that share a key head count together;
      None promises nothing. It shortens the lists of visits of a traced table. A table that has values is checked, head by
      head. Where a traced one breaks the promise, each row of tiles is cut off after as many tiles as it allows, forward and
      backward alike, and keys beyond are not seen.

  Raises:
    ValueError: the table is not boolean, has more True blocks in a row than `max_blocks`, or does not fit T and S.
  """

  table: Any
  block_shape: tuple[int, int]
  max_blocks: int | None = None

  def __post_init__(self):
    _check.boolean(self.table, "masks.BlockSparse.table")
    object.__setattr__(self, "block_shape", _check.block_shape(self.block_shape))
    object.__setattr__(self, "max_blocks", _check.max_blocks(self.table, self.max_blocks))

  def keep(self, at):
    if at.gathers:
      block, inside = 0, []
      for position, size, count in zip((at.q, at.k), self.block_shape, self.table.shape[-2:]):
        number = position // size
        inside.append((position >= 0) & (number < count))
        block = block * count + jnp.clip(number, 0, count - 1)
      return (at.take(self.table, block) != 0) & inside[0] & inside[1]
    # table[q // rows, k // columns] as two products with one-hot matrices: a gather that every kernel can do, and exact.
    table = self.table.reshape(*self.table.shape[:-4], *self.table.shape[-2:])  # [..., query blocks, key blocks]
    table = (table != 0).astype(jnp.float32)
    sides = [(at.q // self.block_shape[0], table.shape[-2]), (at.k // self.block_shape[1], table.shape[-1])]
    (row_blocks, along_rows), (column_blocks, along_columns) = reversed(sides) if at.turned else sides
    number = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    row = (row_blocks == number((1, along_rows), 1)).astype(jnp.float32)  # [..., tile rows, blocks]
    column = (column_blocks == number((along_columns, 1), 0)).astype(jnp.float32)  # [..., blocks, tile columns]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    found = dot("...ik,...jk->...ij" if at.turned else "...ik,...kj->...ij", row, table)
    return dot("...ik,...kj->...ij", found, column) > 0.5

  def tile(self, at):
    table = self.table.lo  # [B|1, N|1, 1, 1, query blocks, key blocks], the same for every tile
    table = table.reshape(*table.shape[:2], *table.shape[-2:])
    xp = np if isinstance(table, np.ndarray) else jnp
    # Summed area table: the number of True blocks in any rectangle from four of its entries.
    sums = xp.pad(xp.cumsum(xp.cumsum(table.astype(np.int32), -2), -1), ((0, 0), (0, 0), (1, 0), (1, 0)))
    batch = np.arange(table.shape[0])[:, None, None, None]
    head = np.arange(table.shape[1])[None, :, None, None]
    first = [span.lo // size for span, size in zip((at.q, at.k), self.block_shape)]
    stop = [span.hi // size + 1 for span, size in zip((at.q, at.k), self.block_shape)]
    (q0, k0), (q1, k1) = ([x.clip(0, n) for x, n in zip(ends, table.shape[-2:])] for ends in (first, stop))
    corner = lambda q, k: sums[batch, head, q, k]
    count = corner(q1, k1) - corner(q0, k1) - corner(q1, k0) + corner(q0, k0)
    return count > 0, count == (stop[0] - first[0]) * (stop[1] - first[1])

  def most(self, tiles):
    if self.max_blocks is None:
      return None
    return self.max_blocks * _crossed(tiles[0], self.block_shape[0]) * _crossed(self.block_shape[1], tiles[1])

  def bind(self, sizes):
    return BlockSparse(_check.block_table(self.table, self.block_shape, sizes), self.block_shape, self.max_blocks)


@pytree
class Custom(Mask):
  """Any rule: `fn(batch, head, query position, key position, *operands) -> bool`, traceable, on integers that broadcast.

  Args:
    fn: called with arrays that broadcast against each other, and with the operands as they are, to be indexed:
      `documents[batch, query] == documents[batch, key]`. What it closes over counts as an operand.
    *operands: arrays, which may be traced.
    tile: `tile(query span, key span) -> (some, all)`, the same for whole tiles, so that they can be skipped: `some` must be True
      where any element may be kept, `all` only where every element is. Spans are positions, `.lo` to `.hi`, both inclusive, as
      arrays that broadcast. Without it nothing is skipped; `Window(255, 0) & Custom(fn)` says as much.

  Raises:
    ValueError: `fn` fails on the operands, or what it returns is not boolean or does not broadcast.

  Example:
    >>> near = masks.Custom(lambda b, h, q, k, reach: q - k < reach[h], jax.numpy.array([8, 64]))
  """

  fn: Callable[..., Any]
  operands: Any
  rule: Callable[[Span, Span], tuple[Any, Any]] | None

  def __init__(self, fn: Callable[..., Any], *operands: Any, tile: Callable[[Span, Span], tuple[Any, Any]] | None = None):
    for name, value in (("fn", fn), ("operands", list(operands)), ("rule", tile)):
      object.__setattr__(self, name, value)

  def bind(self, sizes):
    _check_functions.mask_function(self.fn, self.operands)
    fixed = jax.lax.stop_gradient([jnp.asarray(x) for x in self.operands])  # what is kept has no derivative
    return BoundCustom(_program.bind(self.fn, fixed, sizes), self.rule)

  def __repr__(self):
    return f"Custom({', '.join([f'fn={brief(self.fn)}', *map(brief, self.operands)])})"


@pytree
class BoundCustom(Mask):
  """A `Custom` whose function is laid out for a problem."""

  program: _program.Program
  rule: Callable[[Span, Span], tuple[Any, Any]] | None

  def keep(self, at):
    return self.program.on_tile(at)

  def tile(self, at):
    return super().tile(at) if self.rule is None else self.rule(at.q, at.k)

  def __repr__(self):
    operands = [f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in self.program.shapes]
    return f"Custom({', '.join([f'fn={brief(self.program.fn)}', *operands])})"


def _crossed(size: int, other: int) -> int:
  """How many pieces of length `other` a piece of length `size` can reach into, where both lie end to end from 0."""
  return (size + other - math.gcd(size, other) - 1) // other + 1


def _look_up(array: Any, sizes: Sizes) -> Any:
  """`array[..., query position, key position]`, False outside: `[B|1, N|1, T|1, S|1]`."""
  array = jnp.asarray(array)
  _check.at_most_4d(array, "masks.Dense.array")
  array = array.reshape((1,) * (4 - array.ndim) + array.shape)
  _check.batch_and_heads(array.shape, sizes, "masks.Dense.array")
  q = sizes.query_positions if sizes.query_positions is not None else np.arange(sizes.queries)[None, None, :, None]
  k = sizes.key_positions if sizes.key_positions is not None else np.arange(sizes.keys)[None, None, None, :]
  rows, columns = array.shape[2:]
  inside = True
  index = []
  for position, size in ((q, rows), (k, columns)):
    if size > 1:
      inside = inside & (position >= 0) & (position < size)
      index.append(jnp.clip(position, 0, size - 1))
    else:
      index.append(np.zeros((1, 1, 1, 1), np.int32))
  batch, head = np.arange(array.shape[0])[:, None, None, None], np.arange(array.shape[1])[None, :, None, None]
  return array[batch, head, index[0], index[1]] & inside


__all__ = ["Mask", "Causal", "Window", "Segments", "Lengths", "PrefixLM", "Dense", "BlockSparse", "Custom"]
