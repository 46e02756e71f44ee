"""From moments to the fit at each query and what belongs to it, for a local constant and a local line."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._moments import Moments


class Fit(NamedTuple):
  """At m queries, for p values."""

  mean: Any  # [m, p]
  variance: Any  # [m, p] of y around the fit, under the kernel's weights; None if it was not asked for
  log_gain: Any  # [m] log of the leverage of one more observation at the query, over one minus it
  square: Any  # [m] Σ l², l the weights with which y enters the mean; None if it was not asked for


def values(order: str, y: Any, k: Any, stats: bool) -> Any:
  """What the pass has to average, `[n, E]`; the fits take it apart again."""
  columns = [y]
  if order == "linear":
    i, j = np.triu_indices(k.shape[1])
    columns += [k, k[:, i] * k[:, j], (k[:, :, None] * y[:, None, :]).reshape(k.shape[0], -1)]
  if stats:
    columns.append(y * y)
  return jnp.concatenate(columns, axis=1) if sum(c.shape[1] for c in columns) else jnp.zeros((k.shape[0], 1), k.dtype)


def fit(order: str, found: Moments, u: Any, p: int, stats: bool) -> Fit:
  """The fit at queries `u [m, d]`, in bandwidths, from the moments of `values`."""
  return (_constant if order == "constant" else _linear)(found, u, p, stats)


def _constant(found: Moments, u: Any, p: int, stats: bool) -> Fit:
  mean = found.mean[0][:, :p]
  if not stats:
    return Fit(mean, None, -found.log_sum, None)
  variance = jnp.maximum(found.mean[0][:, p:2 * p] - mean**2, 0)
  return Fit(mean, variance, -found.log_sum, jnp.exp(found.log_square))


def _linear(found: Moments, u: Any, p: int, stats: bool) -> Fit:
  """Weighted least squares of y on (1, k - u): with C = cov(k), c = cov(k, y), a = C⁺(u - E k),

      mean = E y + cᵀ a,    variance = var(y) - cᵀ C⁺ c,    l_j = w_j (1 + aᵀ(k_j - E k)).

  Directions in which the weighted points do not differ by more than rounding have no slope (the pseudo-inverse), so that where
  one point has all the weight the fit is its value.
  """
  d = u.shape[1]
  y, k, kk, ky = _split(found.mean[0], p, d)
  cov = kk - k[:, :, None] * k[:, None, :]  # [m, d, d]
  cov_y = ky - k[:, :, None] * y[:, None, :]  # [m, d, p]
  inverse = _slopes(cov, kk)
  away = u - k
  a = jnp.einsum("mij,mj->mi", inverse, away)
  mean = y + jnp.einsum("mip,mi->mp", cov_y, a)
  log_gain = jnp.log1p(jnp.maximum(jnp.sum(a * away, axis=1), 0)) - found.log_sum
  if not stats:
    return Fit(mean, None, log_gain, None)
  explained = jnp.einsum("mip,mij,mjp->mp", cov_y, inverse, cov_y)
  variance = jnp.maximum(found.mean[0][:, -p:] - y**2 - explained, 0) if p else y
  # Σ l² = Σ w² (1 + aᵀ(k - E k))², by the moments E₂ under the weights w² / Σ w².
  _, k2, kk2, _ = _split(found.mean[1], p, d)
  shift = k2 - k
  second = kk2 - k2[:, :, None] * k[:, None, :] - k[:, :, None] * k2[:, None, :] + k[:, :, None] * k[:, None, :]
  grown = 1 + 2 * jnp.sum(a * shift, axis=1) + jnp.einsum("mi,mij,mj->m", a, second, a)
  return Fit(mean, variance, log_gain, jnp.exp(found.log_square) * jnp.maximum(grown, 0))


def _split(mean: Any, p: int, d: int) -> tuple[Any, Any, Any, Any]:
  """E y `[m, p]`, E k `[m, d]`, E k kᵀ `[m, d, d]`, E k yᵀ `[m, d, p]`."""
  pairs = d * (d + 1) // 2
  y, k, upper, ky, _ = jnp.split(mean, np.cumsum([p, d, pairs, d * p]), axis=1)
  place = np.zeros((d, d), np.int32)
  i, j = np.triu_indices(d)
  place[i, j] = place[j, i] = np.arange(pairs)
  return y, k, upper[:, place], ky.reshape(-1, d, p)


def _slopes(cov: Any, second: Any) -> Any:
  """C⁺ `[m, d, d]`, where what is below the rounding of E k kᵀ counts as 0."""
  eps = jnp.finfo(cov.dtype).eps
  rounding = 16 * eps * jnp.max(jnp.diagonal(second, axis1=1, axis2=2), axis=1)
  return _pseudo_inverse(cov, jax.lax.stop_gradient(rounding))


@jax.custom_jvp
def _pseudo_inverse(a: Any, least: Any) -> Any:
  """A⁺ of symmetric `[m, d, d]`, eigenvalues up to `least [m]` counting as 0 (`jnp.linalg.pinv` cannot trace such a bound)."""
  values, vectors = jnp.linalg.eigh(a)
  kept = values > least[:, None]
  inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
  return jnp.einsum("mik,mk,mjk->mij", vectors, inverse, vectors, precision=jax.lax.Precision.HIGHEST)


@_pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals, tangents):
  """dA⁺ = -A⁺ dA A⁺ + X + Xᵀ with X = A⁺ A⁺ dA (1 - A A⁺), where the rank stays (Golub & Pereyra 1973)."""
  (a, least), (da, _) = primals, tangents
  inverse = _pseudo_inverse(a, least)
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  x = dot(dot(dot(inverse, inverse), da), jnp.eye(a.shape[-1], dtype=a.dtype) - dot(a, inverse))
  return inverse, x + x.swapaxes(1, 2) - dot(dot(inverse, da), inverse)
