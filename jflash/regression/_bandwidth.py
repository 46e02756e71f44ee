"""Which bandwidth: criteria of one pass, minimised by their gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _plan
from . import _api, _check, _moments, _points

CRITERIA = ("loo", "gcv", "aicc")
SCAN = np.geomspace(0.05, 8.0, 12)  # times Scott's rule, in all coordinates alike: where to start from
RANGE = 1e-3, 1e3  # times Scott's rule: where to look at all


def select_bandwidth(x: Any, y: Any, *, criterion: str = "loo", order: str = "constant", sample_weight: Any = None,
                     tol: float = 0.0, implementation: str | None = None) -> tuple[Any, float]:
  r"""The bandwidths `[d]` that minimise a criterion, and its value there.

  Every criterion comes from one pass that leaves each point out of its own fit: with the error r_i of that fit and the leverage
  H_ii of the point in the fit that includes it, the residual of the latter is (1 - H_ii) r_i, without any cancellation.

      "loo"    mean r²                                                    leave-one-out squared error
      "gcv"    mean ((1 - H) r)² / (1 - tr H / n)²                        Craven & Wahba 1979
      "aicc"   log mean ((1 - H) r)² + 1 + 2 (tr H + 1)/(n - tr H - 2)    Hurvich, Simonoff & Tsai 1998

  Without y, minus the mean leave-one-out log density. Means are weighted, n is the number of points. Rows that are equal in x and y
  are one point that carries their weight, so that no copy of a point vouches for it.

  The search starts at the best of a few multiples of Scott's rule and follows the gradient (L-BFGS-B over log σ). A coordinate
  that says nothing about y gets a bandwidth far beyond the data, which takes it out of a local constant; a local line keeps its
  slope there. "gcv" is 0/0 where each point sees itself alone, and not looked at where tr H > 0.9 n.

  Args:
    x, y, order, sample_weight, tol, implementation: as for `kernel_regression`; none may be traced. y is None for a density.
    criterion: as above; ignored without y.

  Returns:
    `(bandwidth [d], value)`: NumPy's, in the units of x and of y² (of log y² for "aicc").

  Raises:
    ValueError: as `kernel_regression`; fewer than two different points; no such criterion.
  """
  _check.options(order, tol)
  if criterion not in CRITERIA:
    raise ValueError(f"`criterion` is {criterion!r}; pass one of {', '.join(map(repr, CRITERIA))}.")
  points = _fill(_points.prepare(*_distinct(x, y, sample_weight), exclude_self=True, tol=tol))
  name = "likelihood" if y is None else criterion
  scott = _scott(points)
  request = _points.Request(order, True, True, False, implementation, _plan.context())

  def objective(log_h):
    value, grad = _value_and_grad(jnp.asarray(log_h, points.x.dtype), points, name, request)
    value, grad = float(value), np.asarray(grad, np.float64)
    return (value, grad) if np.isfinite(value) and np.isfinite(grad).all() else (1e30, np.zeros_like(grad))

  starts = [np.log(scott * factor) for factor in SCAN]
  values = [objective(start)[0] for start in starts]
  from scipy import optimize  # slow to import, and only needed here

  bounds = list(zip(np.log(scott * RANGE[0]), np.log(scott * RANGE[1])))
  options = {"maxiter": 200, "ftol": 1e-14, "gtol": 1e-8}
  found = optimize.minimize(objective, starts[int(np.argmin(values))], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
  bandwidth = np.exp(found.x)
  _points.warn_if_wide(points._replace(bandwidth=bandwidth))
  return bandwidth, _in_units(name, found.fun, points)


def _distinct(x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, None, float, Any]:
  """x, y and weight with equal rows merged and without rows of no weight, as the arguments of `prepare`; sorted, so that the order
  of rows does not matter, to the last digit.
  """
  _points.prepare(x, y, None, 1.0, sample_weight, exclude_self=True, tol=0.0)  # errors in the terms of what was passed
  x, y = np.asarray(x), None if y is None else np.asarray(y)
  weight = np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, np.float64)
  rows = x if y is None else np.column_stack([x, y])
  _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
  weight = np.bincount(number.ravel(), weight, len(first))
  first, weight = first[weight > 0], weight[weight > 0]
  if len(first) < 2:
    raise ValueError(f"`x` has {len(x)} points (n_samples = {len(x)}), of which {len(first)} is different from the others and has "
                     "a weight; a bandwidth is found from at least two.")
  equal = (weight == weight[0]).all()
  return x[first], None if y is None else y[first], None, 1.0, None if equal else weight / weight.mean()


def _fill(points: _points.Points) -> _points.Points:
  """The points with as many of weight 0 as make their number a multiple of 64: folds of nearly one size share compiled code."""
  n = len(points.x)
  weight = np.ones(n, points.x.dtype) if points.weight is None else points.weight
  fill = lambda a: jnp.asarray(np.pad(np.asarray(a), [(0, -n % 64)] + [(0, 0)] * (a.ndim - 1)))
  x = fill(points.x)
  return points._replace(x=x, queries=x, y=fill(points.y), weight=fill(weight))


def _scott(points: _points.Points) -> Any:
  """Scott's rule, `[d]`: standard deviations times n^(-1/(d + 4))."""
  x, weight = np.asarray(points.x, np.float64), np.asarray(points.weight, np.float64)
  centred = x - np.average(x, axis=0, weights=weight)
  spread = np.sqrt(np.average(centred**2, axis=0, weights=weight))
  return np.where(spread > 0, spread, 1.0) * np.sum(weight > 0) ** (-1 / (x.shape[1] + 4))


@functools.partial(jax.jit, static_argnames=("criterion", "request"))
def _value_and_grad(log_h: Any, points: _points.Points, criterion: str, request: _points.Request) -> tuple[Any, Any]:
  def value(log_h):
    at = points._replace(bandwidth=jnp.exp(log_h))
    found, fitted = _api.fit_points(at, request)
    if criterion == "likelihood":
      return -jnp.average(_api.log_density_of(at, found.log_sum, exclude_self=True), weights=at.weight)
    return _criterion(criterion, at, fitted)

  return jax.value_and_grad(value)(log_h)


def _criterion(criterion: str, points: _points.Points, fitted: Any) -> Any:
  """The log of "loo" and "gcv", whose minimum is the same, and "aicc"; in y's own scale but for the sum over its columns.

  A point of weight s has leverage H = s g / (1 + s g) in the fit with itself, g the gain of one observation there.
  """
  weight = points.weight
  there = weight > 0
  n = jnp.sum(there)
  error = (points.y - fitted.mean) * (points.y_scale / jnp.max(points.y_scale))  # [n, p]
  mean_square = lambda e: jnp.average(e**2, axis=0, weights=weight) + jnp.finfo(e.dtype).tiny  # [p]
  if criterion == "loo":
    return jnp.log(jnp.mean(mean_square(error)))
  rest = jnp.where(there, jax.nn.sigmoid(-_moments.log_or_minus_inf(weight) - fitted.log_gain), 0)  # 1 - H
  square, left = mean_square(error * rest[:, None]), jnp.sum(rest)  # n - tr H
  if criterion == "gcv":
    return jnp.where(left > 0.1 * n, jnp.log(jnp.mean(square)) - 2 * jnp.log(left / n), jnp.inf)
  trace, left = n - left, left - 2
  return jnp.where(left > 0, jnp.mean(jnp.log(square)) + 1 + 2 * (trace + 1) / jnp.where(left > 0, left, 1), jnp.inf)


def _in_units(criterion: str, value: float, points: _points.Points) -> float:
  unit = float(np.max(points.y_scale)) if points.y.shape[1] else 1.0
  if criterion == "aicc":
    return value + 2 * np.log(unit)
  return value if criterion == "likelihood" else float(np.exp(value)) * unit**2
