"""Scikit-learn estimators on `jflash.kernel_regression` and `jflash.log_density`; `pip install "jflash[sklearn]"`.

Both find their own bandwidth by leave-one-out, keep the dtype of X (float64 by default), and go through pipelines, grid searches
and `clone`. Float64 is computed in float64 by plain JAX, and in float32 by kernels and on a TPU.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
from sklearn.base import BaseEstimator, DensityMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from . import _plan, regression
from .regression import _bandwidth, _check


class _Kernel(BaseEstimator):
  """What both estimators share: how X arrives, which dtype is computed in, which bandwidth is taken."""

  bandwidth: Any
  X_: Any
  sample_weight_: Any
  bandwidth_: Any
  tol: float
  implementation: str | None

  def _wide(self, X: Any) -> Any:
    """float64 for float64 data, where it can be computed."""
    kernels = self.implementation not in (None, "xla") or _plan.platform() == "tpu"
    return contextlib.nullcontext() if X.dtype == np.float32 or kernels else jax.enable_x64(True)

  def _as_data(self, results: Any) -> Any:
    """NumPy arrays in the dtype of the data, whatever it was computed in."""
    return jax.tree.map(lambda a: np.asarray(a, self.X_.dtype), results)

  def _log_density(self, X: Any) -> Any:
    check_is_fitted(self)
    X = validate_data(self, X, dtype=self.X_.dtype, reset=False)
    with self._wide(self.X_):
      return self._as_data(regression.log_density(
          self.X_, X, self.bandwidth_, sample_weight=self.sample_weight_, **self._options()))

  def _options(self) -> dict[str, Any]:
    return {"tol": self.tol, "implementation": self.implementation}

  def _given_bandwidth(self, criteria: tuple[str, ...], X: Any) -> Any:
    """The bandwidth as numbers, or None where it has to be found."""
    if isinstance(self.bandwidth, str):
      if self.bandwidth not in criteria:
        raise ValueError(f"`bandwidth` is {self.bandwidth!r}; pass a number, one for each of the {X.shape[1]} features, or one of "
                         f"{', '.join(map(repr, criteria))}.")
      if len(X) < 2:
        raise ValueError(f"`bandwidth` is {self.bandwidth!r}, which leaves points out, and n_samples = {len(X)}; pass at least two "
                         "samples, or a number.")
      return None
    bandwidth = np.asarray(self.bandwidth, np.float64)
    _check.bandwidth(bandwidth, X.shape[1])
    return bandwidth

  def _more_weight(self, sample_weight: Any, X: Any) -> Any:
    if sample_weight is None:
      return None
    weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
    return None if (weight == 1).all() else weight


class NadarayaWatson(MultiOutputMixin, RegressorMixin, _Kernel):
  """Kernel regression with a Gaussian kernel: the mean of y around each point, or a local line through it.

  Args:
    bandwidth: the kernel's standard deviation, in the units of X: a number, or one for each feature; or the criterion that finds
      one for each feature: "loo" (leave-one-out squared error), "gcv", "aicc". See `jflash.regression.select_bandwidth`.
    order: "constant" (Nadaraya-Watson) or "linear" (local-linear).
    tol: the share of the weights that may be skipped at each point; see `jflash.kernel_regression`.
    implementation: None, "xla" or "tpu". The kernels of "tpu" compute in float32.

  Attributes:
    X_, y_, sample_weight_: the data; `sample_weight_` is None for one each.
    bandwidth_: `[n_features]`.
    criterion_value_: the criterion's value at `bandwidth_`, or None where a bandwidth was given.
    n_features_in_, feature_names_in_: scikit-learn's.

  Example:
    >>> import numpy as np
    >>> from jflash.sklearn import NadarayaWatson
    >>> X = np.random.default_rng(0).uniform(size=(200, 1))
    >>> y = np.sin(6 * X[:, 0])
    >>> mean, std = NadarayaWatson(bandwidth=0.05, order="linear").fit(X, y).predict(X[:3], return_std=True)
    >>> mean.shape, std.shape
    ((3,), (3,))
  """

  def __init__(self, bandwidth: Any = "loo", *, order: str = "constant", tol: float = 0.0, implementation: str | None = None):
    self.bandwidth = bandwidth
    self.order = order
    self.tol = tol
    self.implementation = implementation

  def fit(self, X: Any, y: Any, sample_weight: Any = None) -> NadarayaWatson:
    """Keeps the data, `X [n_samples, n_features]` and `y [n_samples]` or `[n_samples, n_outputs]`, and finds the bandwidth."""
    X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True)
    _check.options(self.order, self.tol)
    y = np.asarray(y, X.dtype)
    weight = self._more_weight(sample_weight, X)
    bandwidth, self.criterion_value_ = self._given_bandwidth(_bandwidth.CRITERIA, X), None
    if bandwidth is None:
      with self._wide(X):
        bandwidth, self.criterion_value_ = regression.select_bandwidth(
            X, y, criterion=self.bandwidth, order=self.order, sample_weight=weight, **self._options())
    self.X_, self.y_, self.sample_weight_ = X, y, weight
    self.bandwidth_ = np.broadcast_to(bandwidth, (X.shape[1],)).copy()
    return self

  def predict(self, X: Any, return_std: bool = False) -> Any:
    """The fit at `X [n, n_features]`, shaped as y was.

    With `return_std` also the standard deviation of y around it: the spread of the data there, not the error of the mean, which is
    that divided by the square root of `stats(X).effective_sample_size`.
    """
    if not return_std:
      return self._regress(X, return_stats=False)
    mean, stats = self._regress(X, return_stats=True)
    return mean, np.sqrt(stats.variance)

  def stats(self, X: Any) -> regression.RegressionStats:
    """Everything that the pass knows at `X [n, n_features]`: `jflash.RegressionStats`, as NumPy arrays."""
    return self._regress(X, return_stats=True)[1]

  def log_density(self, X: Any) -> Any:
    """The log of the kernel density estimate of the fitted X, with the same bandwidth, at `X [n, n_features]`: `[n]`."""
    return self._log_density(X)

  def _regress(self, X: Any, return_stats: bool) -> Any:
    check_is_fitted(self)
    X = validate_data(self, X, dtype=self.X_.dtype, reset=False)
    with self._wide(self.X_):
      return self._as_data(regression.kernel_regression(
          self.X_, self.y_, X, self.bandwidth_, order=self.order, sample_weight=self.sample_weight_, return_stats=return_stats,
          **self._options()))


class KernelDensity(DensityMixin, _Kernel):
  """Density estimation with a Gaussian kernel, one bandwidth a feature.

  Args:
    bandwidth: as for `NadarayaWatson`; "loo" maximises the leave-one-out likelihood.
    tol: the share of the density that may be skipped at each point.
    implementation: None, "xla" or "tpu".

  Attributes:
    X_, sample_weight_, bandwidth_, n_features_in_, feature_names_in_: as for `NadarayaWatson`.

  Example:
    >>> import numpy as np
    >>> from jflash.sklearn import KernelDensity
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> KernelDensity(bandwidth=0.4).fit(X).score_samples(X[:3]).shape
    (3,)
  """

  def __init__(self, bandwidth: Any = "loo", *, tol: float = 0.0, implementation: str | None = None):
    self.bandwidth = bandwidth
    self.tol = tol
    self.implementation = implementation

  def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KernelDensity:
    """Keeps the data `X [n_samples, n_features]` and finds the bandwidth; y is not used."""
    X = validate_data(self, X, dtype=[np.float64, np.float32])
    _check.options("constant", self.tol)
    weight = self._more_weight(sample_weight, X)
    bandwidth = self._given_bandwidth(("loo",), X)
    if bandwidth is None:
      with self._wide(X):
        bandwidth, _ = regression.select_bandwidth(X, None, sample_weight=weight, **self._options())
    self.X_, self.sample_weight_ = X, weight
    self.bandwidth_ = np.broadcast_to(bandwidth, (X.shape[1],)).copy()
    return self

  def score_samples(self, X: Any) -> Any:
    """The log density at `X [n, n_features]`: `[n]`."""
    return self._log_density(X)

  def score(self, X: Any, y: Any = None) -> float:
    """The summed log density of X: the log likelihood."""
    return float(np.sum(self.score_samples(X)))


__all__ = ["KernelDensity", "NadarayaWatson"]
