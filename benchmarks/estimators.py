"""Kernel regression as jflash and others compute it, from NumPy arrays, and the definition that all are checked against."""

import atexit
import dataclasses
import functools
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jflash import kernel_regression, regression

BOTH = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Estimator:
  """One way to estimate the mean at the data's own points.

  `prepare(x, y, bandwidth)` imports what it needs and returns a function of no arguments, which returns the mean `[n]` or a
  tuple that begins with it.
  """

  name: str
  prepare: Callable[[Any, Any, float], Callable[[], Any]]
  order: str = "constant"
  dtypes: Sequence[str] = BOTH
  dense: bool = False

  def bytes(self, n: int, dtype: str) -> int:
    """The memory that its largest array takes: all pairs where it is dense."""
    return n * (n if self.dense else 1) * np.dtype(dtype).itemsize


def estimators(tol: float, implementation: str | None) -> dict[str, Estimator]:
  """name -> estimator; the first is what the others are compared with."""
  options = {"jflash": {}, "jflash linear": {"order": "linear"}, "jflash stats": {"return_stats": True},
             f"jflash tol {tol:g}": {"tol": tol}}
  ours = [Estimator(name, functools.partial(_jflash, implementation=implementation, **more), more.get("order", "constant"))
          for name, more in options.items()]
  theirs = [Estimator("pykeops", _pykeops), Estimator("scikit-learn", _sklearn, dense=True),
            Estimator("statsmodels lc", functools.partial(_statsmodels, "lc"), dtypes=BOTH[1:]),
            Estimator("statsmodels ll", functools.partial(_statsmodels, "ll"), "linear", BOTH[1:])]
  return {estimator.name: estimator for estimator in [*ours, *theirs]}


def widen(dtype: Any) -> Any:
  """A context in which JAX computes in `dtype`."""
  return jax.enable_x64(np.dtype(dtype) == np.float64)


def _jflash(x: Any, y: Any, bandwidth: float, **options: Any) -> Callable[[], Any]:
  def call():
    with widen(x.dtype):
      return kernel_regression(x, y, None, bandwidth, **options)

  return call


def _pykeops(x: Any, y: Any, bandwidth: float) -> Callable[[], Any]:
  keops = _keops()

  def call():
    scaled = x / x.dtype.type(bandwidth)
    weight = (-keops.Vi(scaled).sqdist(keops.Vj(scaled)) / 2).exp()
    sums = (weight * keops.Vj(np.stack([y, np.ones_like(y)], axis=1))).sum(axis=1)  # numerator and denominator
    return sums[:, 0] / sums[:, 1]

  return call


@functools.cache
def _keops() -> Any:
  """pykeops.numpy, with an empty cache for as long as the process lives, so that its first calls compile."""
  folder = tempfile.TemporaryDirectory()
  atexit.register(folder.cleanup)
  os.environ["KEOPS_CACHE_FOLDER"] = folder.name  # is looked at when it is imported
  pykeops: Any = importlib.import_module("pykeops")
  pykeops.set_verbose(False)
  return importlib.import_module("pykeops.numpy")


def _sklearn(x: Any, y: Any, bandwidth: float) -> Callable[[], Any]:
  pairwise: Any = importlib.import_module("sklearn.metrics.pairwise")

  def call():
    weight = pairwise.rbf_kernel(x, gamma=1 / (2 * bandwidth**2))
    return weight @ y / weight.sum(axis=1)

  return call


def _statsmodels(kind: str, x: Any, y: Any, bandwidth: float) -> Callable[[], Any]:
  return _kernel_reg()(x, y, kind, [bandwidth] * x.shape[1]).fit


# name -> `prepare(x, y)`, which imports what it needs and returns a function that finds the bandwidth `[d]` of the least
# leave-one-out squared error.
SEARCHES: dict[str, Callable[[Any, Any], Callable[[], Any]]] = {
  "jflash": lambda x, y: functools.partial(_jflash_search, x, y),
  "statsmodels": lambda x, y: functools.partial(_statsmodels_search(), x, y),
}


def _jflash_search(x: Any, y: Any) -> Any:
  with widen(x.dtype):
    return regression.select_bandwidth(x, y, criterion="loo")[0]


def _statsmodels_search() -> Callable[[Any, Any], Any]:
  model = _kernel_reg()
  return lambda x, y: np.abs(model(x, y, "lc", "cv_ls").bw)  # their sign says nothing


def _kernel_reg() -> Callable[[Any, Any, str, Any], Any]:
  library: Any = importlib.import_module("statsmodels.nonparametric.kernel_regression")

  def model(x, y, kind, bandwidth):
    with np.errstate(all="ignore"), warnings.catch_warnings():  # it also tries bandwidths that are too small
      warnings.simplefilter("ignore", FutureWarning)
      return library.KernelReg(y, x, "c" * x.shape[1], reg_type=kind, bw=bandwidth)

  return model


def dense_fit(x: Any, y: Any, rows: Any, bandwidth: Any, order: str = "constant", exclude_self: bool = False) -> Any:
  """The fit at `x[rows]` by its definition, in float64: one weighted mean or weighted least squares after the other."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

  def fit(row):
    away = (x - x[row]) / bandwidth
    log_weight = -np.sum(away**2, axis=1) / 2
    if exclude_self:
      log_weight[row] = -np.inf
    weight = np.exp(log_weight - log_weight.max())
    if order == "constant":
      return weight @ y / weight.sum()
    root = np.sqrt(weight)
    return np.linalg.lstsq(root[:, None] * np.column_stack([np.ones(len(x)), away]), root * y)[0][0]

  return np.array([fit(row) for row in rows])


def leave_one_out(x: Any, y: Any, bandwidth: Any) -> float:
  """The mean squared error of predicting each value from all others."""
  return float(np.mean((np.asarray(y, np.float64) - dense_fit(x, y, range(len(x)), bandwidth, exclude_self=True)) ** 2))
