"""The estimators: scikit-learn's own checks, and what they add to `kernel_regression`."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KernelDensity as Peer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import jflash
from jflash.sklearn import KernelDensity, NadarayaWatson
from tests.regression_reference import regress


def beyond_float32(estimator):
  """The one check that compares two sums to 1e-7, which is less than the eps of float32; below, it is made with that eps."""
  reason = "the kernels compute in float32"
  return {"check_sample_weight_equivalence_on_dense_data": reason} if estimator.implementation == "tpu" else {}


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([NadarayaWatson(), NadarayaWatson(0.5, order="linear"), NadarayaWatson(implementation="tpu"),
                          KernelDensity()], expected_failed_checks=beyond_float32)
def test_scikit_learn_s_own_checks(estimator, check):
  with jflash.interpret():  # what is not named is not interpreted
    check(estimator)


def data(n=120, d=2):
  rng = np.random.default_rng(0)
  X = rng.uniform(size=(n, d))
  return X, np.sin(5 * X[:, 0]) + 0.1 * rng.normal(size=n)


def test_predict_std_stats_and_density_are_those_of_the_functions():
  X, y = data()
  model = NadarayaWatson(0.15, order="linear").fit(X, y)
  want = regress(X, y, X[:9] + 0.01, 0.15, "linear")
  mean, std = model.predict(X[:9] + 0.01, return_std=True)
  np.testing.assert_allclose(mean, want.mean, atol=1e-11)  # float64 in, float64 out
  np.testing.assert_allclose(std**2, want.variance, atol=1e-11)
  np.testing.assert_allclose(model.log_density(X[:9] + 0.01), want.log_density, atol=1e-12)
  np.testing.assert_allclose(1 / model.stats(X[:9] + 0.01).effective_sample_size, (want.smoother**2).sum(1), rtol=1e-9)
  assert model.criterion_value_ is None and mean.dtype == np.float64
  single = NadarayaWatson(0.15).fit(X.astype(np.float32), y)
  assert single.predict(X).dtype == np.float32


@pytest.mark.parametrize("criterion", ["loo", "gcv", "aicc"])
def test_bandwidth_is_found_for_each_feature(criterion):
  X, y = data()
  model = NadarayaWatson(criterion).fit(X, y)
  assert model.bandwidth_[0] < 0.2 < 1 < model.bandwidth_[1] and model.score(X, y) > 0.95
  assert np.isfinite(model.criterion_value_)


def test_pipeline_grid_search_and_clone():
  X, y = data()
  pipeline = make_pipeline(StandardScaler(), NadarayaWatson(0.3))
  search = GridSearchCV(pipeline, {"nadarayawatson__bandwidth": [0.1, 0.3, 3.0], "nadarayawatson__order": ["constant", "linear"]}, cv=3)
  search.fit(X, y)
  assert search.best_params_ == {"nadarayawatson__bandwidth": 0.3, "nadarayawatson__order": "linear"} and search.best_score_ > 0.9
  assert clone(search.best_estimator_).get_params()["nadarayawatson__order"] == "linear"
  assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.5


def test_the_kernels_can_be_named():
  X, y = data()
  with jflash.interpret():
    got = NadarayaWatson(0.2, implementation="tpu").fit(X, y).predict(X)
  assert got.dtype == X.dtype
  np.testing.assert_allclose(got, NadarayaWatson(0.2).fit(X, y).predict(X), atol=1e-5)


def test_on_the_kernels_weights_are_repetitions_to_float32():
  X, y = data(40)
  count = np.random.default_rng(1).integers(0, 4, len(X))
  with jflash.interpret():
    weighted = NadarayaWatson(implementation="tpu").fit(X, y, sample_weight=count)
    repeated = NadarayaWatson(implementation="tpu").fit(np.repeat(X, count, axis=0), np.repeat(y, count))
    np.testing.assert_array_equal(weighted.bandwidth_, repeated.bandwidth_)
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), atol=2e-6)


def test_density_estimator_has_scikit_learn_s_numbers_and_a_better_bandwidth():
  X, _ = data()
  ours, theirs = KernelDensity(0.1).fit(X), Peer(bandwidth=0.1).fit(X)
  np.testing.assert_allclose(ours.score_samples(X[:9]), theirs.score_samples(X[:9]), atol=1e-12)
  np.testing.assert_allclose(ours.score(X), theirs.score(X), rtol=1e-12)
  fresh = np.random.default_rng(1).uniform(size=(500, 2))
  assert KernelDensity().fit(X).score(fresh) > max(Peer(bandwidth=h).fit(X).score(fresh) for h in (0.02, 1.0))


@pytest.mark.parametrize("model", [NadarayaWatson, KernelDensity])
def test_errors(model):
  X, y = data(10)
  with pytest.raises(ValueError, match=r"`bandwidth` is 'silverman'; pass a number, one for each of the 2 features, or one of 'loo'"):
    model("silverman").fit(X, y)
  with pytest.raises(ValueError, match="`bandwidth` is -1.0; it must be greater than 0"):
    model(-1.0).fit(X, y)
  with pytest.raises(ValueError, match=r"`bandwidth` has shape \(3,\) and `x` has 2 coordinates"):
    model(np.ones(3)).fit(X, y)
  with pytest.raises(ValueError, match=r"leaves points out, and n_samples = 1; pass at least two"):
    model("loo").fit(X[:1], y[:1])
