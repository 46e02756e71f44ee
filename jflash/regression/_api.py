"""`kernel_regression` and `log_density`: the public functions, from their arguments to attention and back."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _plan
from . import _check, _fit, _moments, _points


class RegressionStats(NamedTuple):
  """What the pass of `kernel_regression` knows besides the mean. All but `visited` are differentiable.

  Attributes:
    variance: `[m]` or `[m, p]`, of y around the fit under the kernel's weights: the conditional variance. For a local line, of
      the residuals of that line.
    log_density: `[m]`, the log of the kernel density estimate of x at the query (without point i where it is left out).
    leverage: `[m]`, the weight of a data point's own y in the fit at that point: the diagonal of the hat matrix, also with
      `exclude_self`, where the fit itself leaves the point out. A query that is not `x` itself is taken for a data point of
      weight one; above 1, there are no data near it.
    effective_sample_size: `[m]`, 1 / Σ l² for the weights l with which y enters the mean; variance / effective_sample_size is
      the variance of the mean.
    visited: the share of tiles that were computed, 1 where `tol` is 0.
  """

  variance: Any
  log_density: Any
  leverage: Any
  effective_sample_size: Any
  visited: Any


def kernel_regression(x: Any, y: Any, x_query: Any, bandwidth: Any, *, order: str = "constant", exclude_self: bool = False,
                      sample_weight: Any = None, return_stats: bool = False, tol: float = 0.0,
                      implementation: str | None = None) -> Any:
  r"""Nadaraya-Watson or local-linear regression with a Gaussian kernel: attention from the queries to the data.

      mean(u) = Σ_j w_j y_j,    w_j ∝ s_j exp(-Σ_d (u_d - x_jd)² / 2σ_d²),    Σ_j w_j = 1

  Nothing of size m·n is stored, forward or backward. n data points, m queries, d coordinates, p values a point.

  Args:
    x: `[n, d]`, the data's points. What is known (not traced) is centred in float64 on the host, so a common offset costs no
      digits. Computed in float64 where `jax.enable_x64` is on and x, y or x_query is float64, else in float32.
    y: `[n]` or `[n, p]`, their values.
    x_query: `[m, d]`, where to estimate; None is `x`.
    bandwidth: σ > 0, the kernel's standard deviation in the units of x: a number, or `[d]`, one a coordinate.
    order: "constant" fits a constant around each query (Nadaraya 1964, Watson 1964), "linear" a plane by weighted least squares,
      which has no bias at borders and slopes (Fan 1993).
    exclude_self: whether query i leaves point i out (x_query is None or x): predictions for cross-validation.
    sample_weight: `[n]`, s >= 0; counts of observations, as in scikit-learn. A weight of 0 leaves a point out, and gets no
      gradient.
    return_stats: whether to return `RegressionStats` too, of the same pass.
    tol: the share of each query's weights that may be skipped, from 0 to below 1. Tiles of points that provably hold less are
      not computed, so the mean for order "constant" moves by at most tol · (max y - min y). For up to about three coordinates.
    implementation: as for `jflash.attention`: None, "xla" or "tpu".

  Returns:
    `mean [m]` (or `[m, p]`), and with `return_stats` a `RegressionStats`. A query so far from all data that one point has all the
    weight gets its value. Differentiable in x, y, x_query, bandwidth and sample_weight.

  Raises:
    ValueError: shapes or values do not fit, with both sides named. Values are looked at only where they are not traced.

  Warns:
    PrecisionWarning: (diameter / bandwidth)² · eps > 1e-3.

  Example:
    >>> import jax, jflash
    >>> x = jax.random.uniform(jax.random.key(0), (500, 2))
    >>> y = x[:, 0] * x[:, 1]
    >>> mean, stats = jflash.kernel_regression(x, y, x[:3], 0.1, order="linear", return_stats=True)
    >>> mean.shape, stats.variance.shape
    ((3,), (3,))

  Nadaraya, Theory Probab. Appl. 9 (1964); Watson, Sankhyā A 26 (1964); Fan, Ann. Statist. 21 (1993).
  """
  _check.options(order, tol)
  y_rank = np.ndim(y)
  points = _points.prepare(x, y, x_query, bandwidth, sample_weight, exclude_self, tol)
  _points.warn_if_wide(points)
  mean, stats = _regress(points, _points.Request(order, exclude_self, _same(x, x_query, exclude_self), return_stats, implementation,
                                                 _plan.context()))
  if y_rank == 1:
    mean = mean[:, 0]
    stats = stats._replace(variance=stats.variance[:, 0]) if return_stats else None
  return (mean, stats) if return_stats else mean


def log_density(x: Any, x_query: Any, bandwidth: Any, *, exclude_self: bool = False, sample_weight: Any = None, tol: float = 0.0,
                implementation: str | None = None) -> Any:
  r"""The log of the Gaussian kernel density estimate, from the same pass as `kernel_regression`: `[m]`.

      log p(u) = lse(u) - log Σ_j s_j - Σ_d log σ_d - d/2 log 2π,    exp(lse(u)) = Σ_j s_j exp(-Σ_d (u_d - x_jd)² / 2σ_d²)

  It stays finite where the density itself underflows. Arguments, errors and derivatives are those of `kernel_regression`. With
  `tol`, the density is too small by at most that share.

  Example:
    >>> import jax, jflash
    >>> x = jax.random.normal(jax.random.key(0), (500, 2))
    >>> jflash.log_density(x, x[:3], 0.3).shape
    (3,)
  """
  _check.options("constant", tol)
  points = _points.prepare(x, None, x_query, bandwidth, sample_weight, exclude_self, tol)
  _points.warn_if_wide(points)
  return _density(points, _points.Request("constant", exclude_self, _same(x, x_query, exclude_self), False, implementation,
                                          _plan.context()))


def _same(x: Any, x_query: Any, exclude_self: bool) -> bool:
  return x_query is None or x_query is x or exclude_self


@functools.partial(jax.jit, static_argnames="request")
def _regress(points: _points.Points, request: _points.Request) -> tuple[Any, RegressionStats | None]:
  found, fitted = fit_points(points, request)
  mean = fitted.mean * points.y_scale + points.y_shift
  if not request.stats:
    return mean, None
  own = points.weight if request.same else None
  log_own = 0.0 if own is None else _moments.log_or_minus_inf(own)
  leverage = jax.nn.sigmoid if request.exclude_self else jnp.exp  # from the gain of a point without, or with itself
  return mean, RegressionStats(fitted.variance * points.y_scale**2, log_density_of(points, found.log_sum, request.exclude_self),
                               leverage(log_own + fitted.log_gain), 1 / fitted.square, jax.lax.stop_gradient(found.visited))


@functools.partial(jax.jit, static_argnames="request")
def _density(points: _points.Points, request: _points.Request) -> Any:
  found, _ = fit_points(points, request)
  return log_density_of(points, found.log_sum, request.exclude_self)


def fit_points(points: _points.Points, request: _points.Request) -> tuple[_moments.Moments, _fit.Fit]:
  """The moments and the fit, in the units of `points.y`."""
  u, k = points.queries / points.bandwidth, points.x / points.bandwidth
  values = _fit.values(request.order, points.y, k, request.stats)
  found = _moments.moments(u, k, values, points.weight, points.tol, request)
  return found, _fit.fit(request.order, found, u, points.y.shape[1], request.stats)


def log_density_of(points: _points.Points, log_sum: Any, exclude_self: bool) -> Any:
  """From summed weights `[m]`, which `exclude_self` says are without point i, to log densities."""
  n, d = points.x.shape
  weight = points.weight
  count = n if weight is None else jnp.sum(weight)
  if exclude_self:
    count = count - (1 if weight is None else weight)
  log_volume = jnp.sum(jnp.log(jnp.broadcast_to(points.bandwidth, (d,)))) + 0.5 * d * np.log(2 * np.pi)
  return log_sum - jnp.log(jnp.asarray(count, log_sum.dtype)) - log_volume
