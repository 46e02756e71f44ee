"""Every error that a caller of kernel regression can meet: it names the argument, both sides and the fix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import core

DIRECT = 8  # up to so many coordinates, points are subtracted one coordinate at a time
ORDERS = ("constant", "linear")


def options(order: str, tol: Any) -> None:
  if order not in ORDERS:
    raise ValueError(f"`order` is {order!r}; pass one of {', '.join(map(repr, ORDERS))}.")
  if isinstance(tol, core.Tracer) or not isinstance(tol, (int, float, np.number)) or not 0 <= tol < 1:
    raise ValueError(f"`tol` is {tol!r}; pass a number from 0 (nothing is skipped) to below 1.")


def points(x: Any, y: Any, x_query: Any, width: Any, sample_weight: Any, exclude_self: bool, tol: float) -> None:
  """Shapes, dtypes and, as far as they are known, values."""
  named = {"x": x, "y": y, "x_query": x_query, "bandwidth": width, "sample_weight": sample_weight}
  named = {name: a for name, a in named.items() if a is not None}
  for name, a in named.items():
    if not (np.issubdtype(a.dtype, np.integer) or np.issubdtype(a.dtype, np.floating) or a.dtype in (np.bool_, jnp.bfloat16)):
      raise ValueError(f"`{name}` has dtype {a.dtype}; pass real numbers.")
  _matrix("x", x)
  n, d = x.shape
  if y is not None and y.ndim not in (1, 2):
    raise ValueError(f"`y` has {y.ndim} axes and shape {y.shape}; pass one value a point, ({n},), or several, ({n}, p).")
  if y is not None and y.shape[0] != n:
    raise ValueError(f"`y` has {y.shape[0]} values and `x` has {n} points; pass one value a point.")
  if x_query is not None:
    _matrix("x_query", x_query)
    if x_query.shape[1] != d:
      raise ValueError(f"`x_query` has {x_query.shape[1]} coordinates and `x` has {d}; they must be equal.")
  bandwidth(width, d)
  if sample_weight is not None and sample_weight.shape != (n,):
    raise ValueError(f"`sample_weight` has shape {sample_weight.shape} and `x` has {n} points; pass one weight a point, ({n},).")
  if exclude_self:
    _exclude_self(n, x_query)
  if tol and d > DIRECT:
    raise ValueError(f"`tol` is {tol} and `x` has {d} coordinates; boxes bound distances in up to {DIRECT}, so pass tol=0.")
  for name, a in named.items():
    _values(name, a, exclude_self)


def bandwidth(value: Any, coordinates: int) -> None:
  """A number, or one for each coordinate, all of them finite and greater than 0 as far as they are known."""
  if value.shape not in ((), (coordinates,)):
    raise ValueError(f"`bandwidth` has shape {value.shape} and `x` has {coordinates} coordinates; pass a number, or one for each "
                     f"coordinate, ({coordinates},).")
  _values("bandwidth", value)


def _matrix(name: str, a: Any) -> None:
  if a.ndim != 2:
    hint = f" `{name}[:, None]` makes one coordinate of each value." if a.ndim == 1 else ""
    raise ValueError(f"`{name}` has {a.ndim} axes and shape {a.shape}; pass [points, coordinates].{hint}")
  if 0 in a.shape:
    raise ValueError(f"`{name}` has shape {a.shape}; it needs at least one point and one coordinate.")


def _exclude_self(n: int, x_query: Any) -> None:
  if n < 2:
    raise ValueError(f"`exclude_self` leaves each point out of its own fit and `x` has {n} point (n_samples = {n}); pass at "
                     "least two.")
  if x_query is not None and x_query.shape[0] != n:
    raise ValueError(f"`x_query` has {x_query.shape[0]} points and `x` has {n}; with `exclude_self` query i is point i, so pass "
                     "`x` itself, or None.")


def _values(name: str, a: Any, exclude_self: bool = False) -> None:
  if isinstance(a, core.Tracer):
    return
  a = np.asarray(a)
  if not np.isfinite(a.astype(np.float64)).all():
    bad = np.argwhere(~np.isfinite(a.astype(np.float64)))[0].tolist()
    raise ValueError(f"`{name}` holds {a[tuple(bad)]} at {bad}, and every value must be finite; drop such points, or impute them.")
  if name == "bandwidth" and not (a > 0).all():
    raise ValueError(f"`bandwidth` is {a.tolist()}; it must be greater than 0.")
  if name == "sample_weight":
    if (a < 0).any():
      raise ValueError(f"`sample_weight` holds {a.min()}; weights must be 0 or more.")
    if not (a > 0).any():
      raise ValueError("`sample_weight` is 0 for every point; at least one weight must be greater than 0.")
    if exclude_self and (a > 0).sum() < 2:
      raise ValueError("`sample_weight` is greater than 0 for 1 point and `exclude_self` leaves that out; at least two must be.")
