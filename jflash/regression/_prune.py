"""Which tiles may be skipped: points in k-d order, boxes around their tiles, and a bound of what each tile can weigh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._pytree import pytree
from ..masks import BlockSparse


@pytree
class Kept(BlockSparse):
  """A table of tiles to compute. What shares a tile with something kept is kept too, so it says nothing about elements."""

  def keep(self, at):
    return (at.row >= 0) | (at.column >= 0)

  def tile(self, at):
    some, _ = super().tile(at)
    return some, some


def order(x: Any, size: int) -> Any:
  """A permutation of `x [n, d]` after which each run of `size` points is a leaf of a k-d tree: `[n]`.

  Every level halves each run at the widest of its coordinates (Bentley 1975), at a multiple of `size`.
  """
  n, d = x.shape
  permutation = jnp.arange(n, dtype=np.int32)
  for runs in _levels(-(-n // size)):
    run = np.repeat(np.arange(len(runs) - 1, dtype=np.int32), np.diff(np.minimum(np.asarray(runs) * size, n)))
    here = x[permutation]
    width = jax.ops.segment_max(here, run, len(runs) - 1) - jax.ops.segment_min(here, run, len(runs) - 1)
    along = jnp.take_along_axis(here, jnp.argmax(width, axis=1)[run][:, None], axis=1)[:, 0]
    permutation = permutation[jnp.lexsort((along, run))]
  return permutation


def _levels(tiles: int) -> list[list[int]]:
  """The borders of the runs to sort at each level, in tiles."""
  levels, runs = [], [0, tiles]
  while max(np.diff(runs)) > 1:
    levels.append(runs)
    runs = sorted({*runs, *((a + b) // 2 for a, b in zip(runs, runs[1:]) if b - a > 1)})
  return levels


def kept(queries: Any, keys: Any, log_weight: Any, size: int, tol: Any, exclude_self: bool) -> Any:
  """The tiles to compute, `[m tiles, n tiles]`: of the weights of any query, those of its other tiles sum to at most `tol`.

  For a query u and a tile of keys, of summed weight S, weighted mean c and spread v = Σ s |k - c|² / S, let z = |u - k|²/2, which
  lies between z0 and z1 (the nearest and farthest corner of the tile's box) and has the mean z̄ = (|u - c|² + v)/2. As exp(-z) is
  convex, it lies between its tangent at z̄ and its chord (Chan, Yiu & U, KARL, ICDE 2019):

      S exp(-z̄)  <=  Σ s exp(-z)  <=  S (exp(-z0) (z1 - z̄) + exp(-z1) (z̄ - z0)) / (z1 - z0)

  The upper bound over the sum of all lower bounds bounds a tile's share. Tiles are skipped whose share, at its largest over the
  queries of a tile, is below a limit: the greatest of a few for which what is skipped sums to at most `tol` for every query.
  """
  m, d = queries.shape
  rows, columns = -(-m // size), -(-keys.shape[0] // size)
  weight = jnp.ones(keys.shape[0], keys.dtype) if log_weight is None else jnp.exp(log_weight)
  box, total, centre, spread = _summary(_tiles(keys, size), _tiles(weight, size))
  box, centre = [b.T[:, None] for b in box], centre.T[:, None]  # [d, 1, columns]
  log_total = jnp.log(total)
  eps = jnp.finfo(keys.dtype).eps
  limits = tol * np.append(2.0 ** (-np.arange(24) / 3), 0).astype(keys.dtype)

  def row(inputs):
    number, u, own = inputs  # [size, d], [size]
    sides = [(box[0][n] - u[:, n, None], u[:, n, None] - box[1][n], u[:, n, None] - centre[n]) for n in range(d)]  # [size, columns]
    z0 = 0.5 * sum(jnp.square(jnp.maximum(jnp.maximum(below, above), 0)) for below, above, _ in sides)
    z1 = 0.5 * sum(jnp.square(jnp.minimum(below, above)) for below, above, _ in sides)
    mean = 0.5 * sum(jnp.square(x) for *_, x in sides) + 0.5 * spread
    rounding = 16 * eps * (1 + jnp.max(z1, axis=1, keepdims=True))
    if exclude_self:  # of its own tile, a point meets the others alone
      others = jnp.maximum(total - jnp.where(jnp.arange(columns) == number, own[:, None], 0), 0)
      lower = jnp.log(others) - mean * total / jnp.where(others > 0, others, 1)
    else:
      lower = log_total - mean
    width = z1 - z0
    chord = (z1 - mean + rounding + jnp.exp(-width) * (mean - z0)) / jnp.where(width > 0, width, 1)
    upper = log_total - z0 + jnp.log(jnp.where(width > 0, jnp.clip(chord, eps, 1), 1))
    share = jnp.exp(jnp.minimum(upper - jax.scipy.special.logsumexp(lower, axis=1, keepdims=True) + rounding, 0))
    share = jnp.where((number * size + jnp.arange(size) < m)[:, None], share, 0)
    largest = jnp.max(share, axis=0)  # [columns]
    below = largest[:, None] <= limits
    skipped = jnp.max(jnp.matmul(share, below.astype(share.dtype), precision=jax.lax.Precision.HIGHEST), axis=0)  # [limits]
    limit = jnp.max(jnp.where(skipped <= tol * (1 - 1e-3), limits, -1))
    return ~(largest <= limit)  # what could not be bounded is kept

  own = weight if exclude_self else jnp.ones(m, keys.dtype)
  return jax.lax.map(row, (jnp.arange(rows), _tiles(queries, size), _tiles(own, size)))


def _tiles(x: Any, size: int) -> Any:
  """`[n, …]` as `[tiles, size, …]`, filled up with zeros."""
  count = -(-x.shape[0] // size)
  return jnp.pad(x, [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])


def _summary(k: Any, s: Any) -> tuple[Any, Any, Any, Any]:
  """Box, summed weight, weighted mean and spread of every tile `[tiles, size, d]`; a point of weight 0 is not there."""
  there = (s > 0)[..., None]
  box = jnp.min(jnp.where(there, k, jnp.inf), axis=1), jnp.max(jnp.where(there, k, -jnp.inf), axis=1)
  total = jnp.sum(s, axis=1)
  share = s / jnp.where(total > 0, total, 1)[:, None]
  centre = jnp.sum(share[..., None] * k, axis=1)
  spread = jnp.sum(share * jnp.sum((k - centre[:, None]) ** 2, axis=-1), axis=1)
  return box, total, centre, spread
