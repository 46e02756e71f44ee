"""Choosing a bandwidth: the criteria are what they say, and the search finds their minimum."""

import time

import jax
import numpy as np
import pytest
from statsmodels.nonparametric.kernel_density import KDEMultivariate
from statsmodels.nonparametric.kernel_regression import KernelReg

import jflash
from jflash.regression import _bandwidth, select_bandwidth
from tests.regression_reference import regress


def data(n=200, d=1, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.uniform(size=(n, d))
  return x, np.sin(8 * x[:, 0]) + 0.2 * rng.normal(size=n), rng


def criterion_value(name, x, y, bandwidth, order="constant", weight=None):
  """By the hat matrix."""
  n = len(x)
  smoother = regress(x, y, None, bandwidth, order, sample_weight=weight).smoother
  residual, trace = y - smoother @ y, np.trace(smoother)
  mean = lambda e: np.average(e**2, weights=weight)
  if name == "loo":
    return mean(residual / (1 - np.diag(smoother)))
  if name == "gcv":
    return mean(residual) / (1 - trace / n) ** 2
  return np.log(mean(residual)) + 1 + 2 * (trace + 1) / (n - trace - 2)


@pytest.mark.parametrize("order", ["constant", "linear"])
@pytest.mark.parametrize("criterion", ["loo", "gcv", "aicc"])
@pytest.mark.parametrize("weighted", [False, True])
def test_finds_the_minimum_of_the_criterion(criterion, order, weighted):
  x, y, rng = data(80)
  weight = rng.uniform(0.2, 4, len(x)) if weighted else None
  with jax.enable_x64(True):
    found, value = select_bandwidth(x, y, criterion=criterion, order=order, sample_weight=weight)
  assert found.shape == (1,)
  np.testing.assert_allclose(value, criterion_value(criterion, x, y, found, order, weight), rtol=1e-8)
  for factor in (0.97, 1.03, *np.geomspace(0.2, 5, 15)):
    assert criterion_value(criterion, x, y, found * factor, order, weight) > value - 1e-9 * abs(value)


@pytest.mark.parametrize("criterion", ["loo", "gcv", "aicc"])
def test_copies_are_weights_and_do_not_vouch_for_each_other(criterion):
  x, y, rng = data(60)
  count = rng.integers(0, 4, len(x))
  with jax.enable_x64(True):
    once, _ = select_bandwidth(x, y, criterion=criterion)
    twice, _ = select_bandwidth(np.repeat(x, 2, axis=0), np.repeat(y, 2), criterion=criterion)
    weighted, value = select_bandwidth(x, y, criterion=criterion, sample_weight=7 * count)
    repeated, other = select_bandwidth(np.repeat(x, count, axis=0), np.repeat(y, count), criterion=criterion)
  np.testing.assert_allclose(twice, once, rtol=1e-6)
  np.testing.assert_allclose(repeated, weighted, rtol=1e-6)
  np.testing.assert_allclose(other, value, rtol=1e-9)


def test_the_order_of_rows_does_not_matter():
  x, y, rng = data(60)
  weight = rng.integers(0, 4, len(x))
  order = np.repeat(rng.permutation(len(x)), weight[rng.permutation(len(x))])
  count = np.bincount(order, minlength=len(x))
  found, value = select_bandwidth(x, y, sample_weight=count)
  again, other = select_bandwidth(x[order], y[order])
  assert (found == again).all() and value == other, "float32, and the same bits"


def test_a_feature_that_says_nothing_is_switched_off():
  x, y, rng = data(300, 3)
  y = np.sin(6 * x[:, 0]) + x[:, 2] ** 2 + 0.1 * rng.normal(size=len(x))
  found, value = select_bandwidth(x, y)
  assert found[1] > 3 and found[0] < 0.3 and found[2] < 1
  assert value < 0.02


def test_units_do_not_matter():
  x, y, _ = data(100, 2)
  with jax.enable_x64(True):
    found, value = select_bandwidth(x, y)
    scaled, scaled_value = select_bandwidth(x * [1e3, 1e-3] + 1e5, 1e4 * y - 7)
  np.testing.assert_allclose(scaled, found * [1e3, 1e-3], rtol=1e-4)
  np.testing.assert_allclose(scaled_value, 1e8 * value, rtol=1e-6)


def test_density_has_the_likelihood_of_statsmodels():
  x = np.random.default_rng(0).normal(size=(150, 2)) * [1, 3]
  peer = KDEMultivariate(x, "cc", bw="cv_ml")
  with jax.enable_x64(True):
    found, value = select_bandwidth(x, None)
    loo = jflash.log_density(x, None, found, exclude_self=True)
    np.testing.assert_allclose(value, -np.mean(np.asarray(loo)), rtol=1e-9)
    theirs = -np.mean(np.asarray(jflash.log_density(x, None, peer.bw, exclude_self=True)))
  np.testing.assert_allclose(peer.loo_likelihood(found, np.log) / len(x) + np.log(len(x) - 1), value, rtol=1e-9)  # theirs is not divided
  assert value <= theirs + 1e-9
  np.testing.assert_allclose(found, peer.bw, rtol=0.02)


def test_not_worse_and_not_slower_than_statsmodels():
  x, y, _ = data(1000)
  begin = time.perf_counter()
  theirs = KernelReg(y, x, "c", reg_type="lc", bw="cv_ls").bw
  their_time = time.perf_counter() - begin
  select_bandwidth(x, y)  # compiles
  begin = time.perf_counter()
  found, value = select_bandwidth(x, y)
  assert time.perf_counter() - begin < their_time
  assert value <= criterion_value("loo", x, y, theirs) * (1 + 1e-5)


def test_isolated_and_equal_points():
  x, y, _ = data(60)
  x[3] = 100.0
  x[10:14] = x[10]
  found, value = select_bandwidth(x, y)
  assert np.isfinite(value) and (found > 0).all()
  found, value = select_bandwidth(np.column_stack([x, np.ones(60)]), y)
  assert np.isfinite(value) and (found > 0).all()


def test_errors():
  x, y, _ = data(10)
  with pytest.raises(ValueError, match="`criterion` is 'cv'; pass one of 'loo', 'gcv', 'aicc'"):
    select_bandwidth(x, y, criterion="cv")
  with pytest.raises(ValueError, match="pass at least two"):
    select_bandwidth(x[:1], y[:1])
  with pytest.raises(ValueError, match=r"`x` has 3 points \(n_samples = 3\), of which 1 is different"):
    select_bandwidth(x[[0, 0, 0]], y[[0, 0, 0]])


def test_gcv_does_not_fall_into_the_hole_where_each_point_sees_itself_alone():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(150, 4))
  x[:60, 0] *= 8  # isolated points beside a crowd
  y = x[:, 1] + rng.normal(size=150)
  found, _ = select_bandwidth(x, y, criterion="gcv")
  smoother = regress(x, y, None, found).smoother
  assert np.trace(smoother) < 0.5 * len(x)


def test_points_of_nearly_one_number_share_compiled_code():
  select_bandwidth(*data(130)[:2])
  compiled = _bandwidth._value_and_grad._cache_size()
  select_bandwidth(*data(190)[:2])
  assert _bandwidth._value_and_grad._cache_size() == compiled


def test_the_warning_points_at_the_caller():
  x, y, _ = data(30)
  with pytest.warns(jflash.regression.PrecisionWarning) as caught:
    jflash.kernel_regression(x, y, None, 1e-3)
  assert caught[0].filename == __file__
