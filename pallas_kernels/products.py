"""What a query and a key are to each other before scale, bias and mask: their inner product, or their distance.

A product is a class of static functions on tiles q `[..., rows, H]` and k `[..., columns, H]`: the scores, their tangent, and what
a cotangent `ds` of the scores gives to q and to k. How tiles are multiplied and laid out is the backend's, as an `Algebra`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from . import softmax


class Algebra(NamedTuple):
  """Products and reductions of tiles, in a backend's own layout."""

  nt: Callable[[Any, Any], Any]  # q `[..., rows, H]`, k `[..., columns, H]` -> q kᵀ `[..., rows, columns]`
  nn: Callable[[Any, Any], Any]  # s `[..., rows, columns]`, k `[..., columns, H]` -> s k `[..., rows, H]`
  tn: Callable[[Any, Any], Any]  # s, q -> sᵀ q `[..., columns, H]`, over all rows that share the keys
  lay_down: Callable[[Any], Any]  # `[..., columns, 1]` -> what broadcasts along the columns of scores
  over_rows: Callable[[Any], Any]  # `[..., rows, columns]` -> its sums `[..., columns, 1]`, over all rows that share the keys


class Dot:
  """s = q · k."""

  @staticmethod
  def scores(a: Algebra, q: Any, k: Any) -> Any:
    return a.nt(q, k)

  @staticmethod
  def tangent(a: Algebra, q: Any, k: Any, dq: Any, dk: Any) -> Any:
    return a.nt(dq, k) + a.nt(q, dk)

  @staticmethod
  def dq(a: Algebra, ds: Any, q: Any, k: Any, masked: bool) -> Any:
    """Where the tile is masked, ds is 0 for what is hidden, and what is hidden need not be finite."""
    return a.nn(ds.astype(k.dtype), softmax.finite(k) if masked else k)

  @staticmethod
  def dk(a: Algebra, ds: Any, q: Any, k: Any, masked: bool) -> Any:
    return a.tn(ds.astype(q.dtype), softmax.finite(q) if masked else q)


class Distance:
  """s = -|q - k|²/2 by direct differences, up to a constant of the row, for a handful of coordinates.

  A query is written as its foot b and what is left, e = q - b, side by side in `[..., 2 d]`; a key is `[..., 2 d]` too, its second
  half unused. Then

      s = -Σ (b - k) ((b - k)/2 + e)      and   -|q - k|²/2 = s - |e|²/2.

  q·k - |k|²/2 loses the digits that |q| and |k| have in common; differences do not. A query far away (b at the border of the
  keys, e large) still tells near keys from nearer ones, as |e|² is never added to anything.
  """

  @staticmethod
  def scores(a: Algebra, q: Any, k: Any) -> Any:
    return -sum(x * (0.5 * x + e) for x, e in _differences(a, q, k))  # type: ignore[return-value]

  @staticmethod
  def tangent(a: Algebra, q: Any, k: Any, dq: Any, dk: Any) -> Any:
    return -sum(dx * (x + e) + x * de  # type: ignore[return-value]
                for (x, e), (dx, de) in zip(_differences(a, q, k), _differences(a, dq, dk)))

  @staticmethod
  def dq(a: Algebra, ds: Any, q: Any, k: Any, masked: bool) -> Any:
    foot = [_sum(-_weigh(ds, x + e)) for x, e in _differences(a, q, k)]
    rest = [_sum(-_weigh(ds, x)) for x, _ in _differences(a, q, k)]
    return _side_by_side(foot + rest)

  @staticmethod
  def dk(a: Algebra, ds: Any, q: Any, k: Any, masked: bool) -> Any:
    return _side_by_side([a.over_rows(_weigh(ds, x + e)) for x, e in _differences(a, q, k)], k.shape[-1])


def _differences(a: Algebra, q: Any, k: Any) -> list[tuple[Any, Any]]:
  """(b - k, e) by coordinate: `[..., rows, columns]` and `[..., rows, 1]`."""
  d = q.shape[-1] // 2
  coordinate = lambda x, n: lax.slice_in_dim(x, n, n + 1, axis=x.ndim - 1)
  return [(coordinate(q, n) - a.lay_down(coordinate(k, n)), coordinate(q, d + n)) for n in range(d)]


def _weigh(ds: Any, x: Any) -> Any:
  """ds x, and 0 where ds is 0: what is hidden need not be finite."""
  return jnp.where(ds == 0, 0.0, ds * x)


def _sum(x: Any) -> Any:
  return jnp.sum(x, axis=-1, keepdims=True)


def _side_by_side(columns: list[Any], width: int | None = None) -> Any:
  """`[..., n, 1]`s as `[..., n, width]`, filled up with zeros; by selection, as lanes are not concatenated one by one."""
  shape = (*(1,) * (columns[0].ndim - 1), width or len(columns))
  lane = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
  return sum(jnp.where(lane == n, x, 0.0) for n, x in enumerate(columns))
