"""Kernel regression written out with dense weights, in NumPy and float64: shares nothing with what it judges."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Dense(NamedTuple):
  """As `jflash.kernel_regression` returns it, `smoother [m, n]` being the weights with which y enters the mean."""

  mean: Any
  variance: Any
  log_density: Any
  smoother: Any


def regress(x, y, x_query, bandwidth, order="constant", exclude_self=False, sample_weight=None) -> Dense:
  n, d = x.shape
  bandwidth = np.broadcast_to(bandwidth, (d,))
  s = np.ones(n) if sample_weight is None else np.asarray(sample_weight, float)
  y = np.asarray(y, float)
  queries = x if x_query is None else x_query
  smoother, variance, log_density = [], [], []
  for i, u in enumerate(queries):
    weight = s.copy()
    if exclude_self:
      weight[i] = 0
    here = weight > 0
    z = ((x - u) / bandwidth)[here]
    log_w = -0.5 * (z**2).sum(1) + np.log(weight[here])
    w = np.exp(log_w - log_w.max())
    log_density.append(log_w.max() + np.log(w.sum()) - np.log(weight.sum()) - np.log(bandwidth).sum() - d / 2 * np.log(2 * np.pi))
    w /= w.sum()
    plane = np.ones((len(z), 1)) if order == "constant" else np.column_stack([np.ones(len(z)), z])
    root = np.sqrt(w)[:, None]
    hat = np.linalg.pinv(root * plane) * root.T  # [1 + d, n]: coefficients of the plane for any y
    row = np.zeros(n)
    row[here] = hat[0]
    smoother.append(row)
    variance.append(np.tensordot(w, (y[here] - plane @ np.tensordot(hat, y[here], 1)) ** 2, 1))
  smoother = np.array(smoother)
  return Dense(smoother @ y, np.array(variance), np.array(log_density), smoother)
