"""From what the caller gives to what is computed with: checked, in one dtype, centred without losing digits."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from . import _check


class Points(NamedTuple):
  """Everything in one dtype; x and queries are shifted by one vector, y is shifted by `y_shift` and divided by `y_scale`.

  A shift of x changes nothing, and y' = (y - shift)/scale is estimated as y is, so no gradient goes through either of them.
  """

  x: Any  # [n, d]
  y: Any  # [n, p]
  queries: Any  # [m, d]; `x` itself where the data are asked at their own points
  bandwidth: Any  # [] or [d]
  weight: Any  # [n], or None for one each
  tol: Any  # [], or None to skip nothing
  y_shift: Any  # [p]
  y_scale: Any  # [p]


class Request(NamedTuple):
  """What is asked of a pass, and all else that its compiled form depends on besides shapes: static."""

  order: str
  exclude_self: bool
  same: bool  # whether the queries are the data's own points
  stats: bool
  implementation: str | None
  context: Any  # of `_plan`


class PrecisionWarning(UserWarning):
  """The data are so wide, measured in bandwidths, that their dtype loses digits that matter."""


def prepare(x: Any, y: Any, x_query: Any, bandwidth: Any, sample_weight: Any, exclude_self: bool, tol: float) -> Points:
  """Checks everything, then lays it out. `y` may be None, which is no columns at all."""
  x, y, x_query, bandwidth, sample_weight = (_as_array(a) for a in (x, y, x_query, bandwidth, sample_weight))
  _check.points(x, y, x_query, bandwidth, sample_weight, exclude_self, tol)
  dtype = _dtype(x, y, x_query)
  to = lambda a: a if a is None else a.astype(dtype)
  if y is None:
    y = np.zeros((x.shape[0], 0), dtype)
  y = y[:, None] if y.ndim == 1 else y
  shift, y_shift = _shift(x, dtype), _shift(y, dtype)
  y = y_shift.subtract_from(y, dtype)
  y_scale = _largest(y)
  points = Points(shift.subtract_from(x, dtype), y / y_scale,
                  None if x_query is None else shift.subtract_from(x_query, dtype), to(bandwidth),
                  to(sample_weight), np.asarray(tol, dtype) if tol else None, to(y_shift.total), to(y_scale))
  if x_query is None:
    points = points._replace(queries=points.x)
  return jax.tree.map(jnp.asarray, points)


def is_known(*arrays: Any) -> bool:
  """Whether values can be looked at: not while JAX traces them."""
  return not any(isinstance(a, core.Tracer) for a in arrays)


def _as_array(a: Any) -> Any:
  """JAX's arrays stay; anything else becomes NumPy's, with all its digits."""
  return a if a is None or isinstance(a, jax.Array) else np.asarray(a)


def _dtype(*arrays: Any) -> Any:
  wide = any(a is not None and a.dtype == np.float64 for a in arrays)
  return np.dtype(np.float64 if wide and jax.config.jax_enable_x64 else np.float32)  # type: ignore[attr-defined]


class Shift(NamedTuple):
  """A vector to subtract, in two steps: a point of the data, then the mean of what is left (or 0).

  Any vector will do if it is the same everywhere, to the last digit. A compiled mean may be summed twice, in two orders, so what
  is large must not be computed.
  """

  point: Any
  mean: Any

  def subtract_from(self, a: Any, dtype: Any) -> Any:
    """On the host in float64 where `a` is known, so that a common offset costs no digit."""
    if is_known(a, *self):
      return (np.asarray(a, np.float64) - self.point - self.mean).astype(dtype)
    return a.astype(dtype) - self.point - self.mean

  @property
  def total(self) -> Any:
    return self.point + self.mean


def _shift(a: Any, dtype: Any) -> Shift:
  """What centres the columns of `a`."""
  if is_known(a):
    mean = np.asarray(a).mean(axis=0, dtype=np.float64).astype(dtype)
    return Shift(mean, np.zeros_like(mean))
  a = jax.lax.stop_gradient(a.astype(dtype))
  return Shift(a[0], jnp.mean(a - a[0], axis=0))


def _largest(y: Any) -> Any:
  """The largest |y| of each column, or 1 where all are 0."""
  xp = np if is_known(y) else jnp
  top = xp.abs(jax.lax.stop_gradient(y) if xp is jnp else y).max(axis=0)
  return xp.where(top > 0, top, xp.ones_like(top))


def warn_if_wide(points: Points) -> None:
  """Warns where (diameter / bandwidth)² · eps is more than a thousandth, as far as that is known."""
  if not is_known(points.x, points.bandwidth):
    return
  dtype = points.x.dtype
  width = np.sqrt(np.sum(np.square(np.ptp(np.asarray(points.x, np.float64), axis=0) / np.asarray(points.bandwidth, np.float64))))
  lost = width**2 * np.finfo(dtype).eps
  if lost > 1e-3:
    fix = "a larger bandwidth" if dtype == np.float64 else "float64 (jax.enable_x64, arrays of float64) or a larger bandwidth"
    warnings.warn(f"the data are {width:.3g} bandwidths wide, and {dtype} may be off by {lost:.1g} of an exponent at that width; "
                  f"use {fix}.", PrecisionWarning, stacklevel=3)
