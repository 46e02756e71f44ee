"""`kernel_regression` and `log_density`: against dense float64, other packages, finite differences, and laws."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KernelDensity
from statsmodels.nonparametric.kernel_regression import KernelReg

import jflash
from jflash.regression import _points, _prune
from tests.backends import BACKENDS, using
from tests.regression_reference import regress

ORDERS = ["constant", "linear"]
TOLERANCE = {("constant", "float32"): 1e-5, ("linear", "float32"): 1e-3, ("constant", "float64"): 1e-12, ("linear", "float64"): 1e-10}


def data(n=150, d=2, p=None, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.uniform(size=(n, d))
  clean = np.sin(4 * x[:, 0]) + x.sum(1)
  y = (clean if p is None else clean[:, None] * np.arange(1, p + 1)) + 0.1 * rng.normal(size=(n,) if p is None else (n, p))
  return x, y, rng.uniform(size=(37, d)), rng


def run(backend, dtype, function, *args, **kwargs):
  """`function` on `backend`, with its arrays in `dtype`, as NumPy arrays."""
  cast = lambda a: a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype == np.float64 else a
  with jax.enable_x64(dtype == "float64"), using(backend):
    found = function(*map(cast, args), implementation=backend, **{name: cast(a) for name, a in kwargs.items()})
    return jax.tree.map(np.asarray, found)


WHERE = [("xla", "float32"), ("xla", "float64"), ("tpu", "float32")]
CASES = {
  "1d": {"d": 1, "bandwidth": 0.1},
  "2d": {"d": 2, "bandwidth": 0.2, "stats": True},
  "bandwidths": {"d": 3, "bandwidth": np.array([0.2, 0.5, 3.0])},
  "8d, subtracted": {"d": 8, "bandwidth": 0.9},
  "9d, multiplied": {"d": 9, "bandwidth": 0.9, "stats": True},
  "two values": {"d": 2, "p": 2, "bandwidth": 0.2, "stats": True},
  "weights": {"d": 2, "bandwidth": 0.2, "weight": True, "stats": True},
  "weights, multiplied": {"d": 9, "bandwidth": 0.9, "weight": True},
  "without self": {"d": 2, "bandwidth": 0.1, "exclude_self": True, "weight": True, "stats": True},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend,dtype", WHERE)
def test_against_dense_float64(backend, dtype, case, order):
  options = dict(CASES[case])
  x, y, queries, rng = data(d=options["d"], p=options.get("p"))
  weight = rng.integers(0, 4, len(x)).astype(float) if options.get("weight") else None
  exclude_self = options.get("exclude_self", False)
  queries = None if exclude_self else queries
  got = run(backend, dtype, jflash.kernel_regression, x, y, queries, options["bandwidth"], order=order, exclude_self=exclude_self,
            sample_weight=weight, return_stats=options.get("stats", False))
  want = regress(x, y, queries, options["bandwidth"], order, exclude_self, weight)
  tolerance = TOLERANCE[order, dtype]
  if not options.get("stats"):
    np.testing.assert_allclose(got, want.mean, atol=tolerance)
    return
  mean, stats = got
  assert mean.dtype == dtype
  np.testing.assert_allclose(mean, want.mean, atol=tolerance)
  np.testing.assert_allclose(stats.variance, want.variance, atol=tolerance)
  np.testing.assert_allclose(stats.log_density, want.log_density, atol=tolerance)
  np.testing.assert_allclose(1 / stats.effective_sample_size, (want.smoother**2).sum(1), rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend,dtype", WHERE)
def test_leverage_is_the_hat_matrix_diagonal_with_and_without_self(backend, dtype, order):
  x, y, _, rng = data(60)
  weight = rng.uniform(0.5, 3, len(x))
  hat = np.diag(regress(x, y, None, 0.15, order, sample_weight=weight).smoother)
  for exclude_self in (False, True):
    mean, stats = run(backend, dtype, jflash.kernel_regression, x, y, None, 0.15, order=order, exclude_self=exclude_self,
                      sample_weight=weight, return_stats=True)
    np.testing.assert_allclose(stats.leverage, hat, atol=TOLERANCE[order, dtype])
  fit = run(backend, dtype, jflash.kernel_regression, x, y, x, 0.15, order=order, sample_weight=weight)
  np.testing.assert_allclose(y - fit, (1 - hat) * (y - mean), atol=10 * TOLERANCE[order, dtype])  # the leave-one-out identity


@pytest.mark.parametrize("backend,dtype", WHERE)
@pytest.mark.parametrize("kind,order", [("lc", "constant"), ("ll", "linear")])
@pytest.mark.parametrize("d", [1, 2])
def test_statsmodels_agrees(backend, dtype, kind, order, d):
  x, y, queries, _ = data(300, d)
  bandwidth = np.full(d, 0.12)
  want, _ = KernelReg(y, x, "c" * d, reg_type=kind, bw=bandwidth).fit(queries)
  got = run(backend, dtype, jflash.kernel_regression, x, y, queries, bandwidth, order=order)
  np.testing.assert_allclose(got, want, atol=TOLERANCE[order, dtype])


@pytest.mark.parametrize("backend,dtype", WHERE)
@pytest.mark.parametrize("d", [1, 3, 12])
def test_scikit_learn_has_the_same_density(backend, dtype, d):
  x, _, queries, rng = data(200, d)
  weight = rng.uniform(0.1, 2, len(x))
  bandwidth = 0.3 * d**0.5
  want = KernelDensity(bandwidth=bandwidth).fit(x, sample_weight=weight).score_samples(queries)
  got = run(backend, dtype, jflash.log_density, x, queries, bandwidth, sample_weight=weight)
  np.testing.assert_allclose(got, want, atol=TOLERANCE["constant", dtype])


# Derivatives ----------------------------------------------------------------------------------------------------------


def everything(d):
  x, y, queries, rng = data(40, d)
  return {"x": x, "y": y, "x_query": queries[:7], "bandwidth": np.full(d, 0.3 * d**0.5), "sample_weight": rng.uniform(0.5, 2, len(x))}


def objective(arguments, order, exclude_self, implementation):
  """A number that depends on everything that a call returns."""
  if exclude_self:
    arguments = arguments | {"x_query": None}
  mean, stats = jflash.kernel_regression(**arguments, order=order, exclude_self=exclude_self, return_stats=True,
                                         implementation=implementation)
  each = (mean, stats.variance, stats.log_density, stats.leverage, jnp.log(stats.effective_sample_size))
  waves = jnp.cos(jnp.arange(mean.size, dtype=mean.dtype))
  return sum((n + 1) * jnp.vdot(waves, part) for n, part in enumerate(each))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("order,d", [("constant", 2), ("linear", 2), ("constant", 9)])  # 40 points make no plane in 9 dimensions
def test_gradients_against_finite_differences(order, exclude_self, d):
  with jax.enable_x64(True), using("xla"):
    arguments = {name: jnp.asarray(a) for name, a in everything(d).items()}
    f = jax.jit(functools.partial(objective, order=order, exclude_self=exclude_self, implementation="xla"))
    grads = jax.jit(jax.grad(f))(arguments)
    rng = np.random.default_rng(1)
    for name, grad in grads.items():
      direction = rng.normal(size=grad.shape)
      step = 1e-6
      ahead, behind = (f(arguments | {name: arguments[name] + sign * step * direction}) for sign in (1, -1))
      slope = jnp.vdot(grad, direction)
      np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6 * float(jnp.abs(grad).max()), err_msg=name)
      assert exclude_self and name == "x_query" or jnp.abs(grad).max() > 0
    moved = jax.jvp(f, (arguments,), (jax.tree.map(jnp.ones_like, arguments),))[1]
    np.testing.assert_allclose(moved, sum(g.sum() for g in grads.values()), rtol=1e-8)


@pytest.mark.parametrize("order,exclude_self,d", [("constant", False, 2), ("linear", True, 2), ("constant", True, 9)])
def test_the_kernels_have_the_gradients_of_plain_jax(order, exclude_self, d):
  arguments = everything(d)
  take = lambda backend: jax.grad(functools.partial(objective, order=order, exclude_self=exclude_self, implementation=backend))
  with jax.enable_x64(True), using("xla"):
    want = jax.tree.map(np.asarray, take("xla")({name: jnp.asarray(a) for name, a in arguments.items()}))
  with using("tpu"):
    got = take("tpu")({name: jnp.asarray(a, jnp.float32) for name, a in arguments.items()})
  for name in want:
    scale = abs(want[name]).max() or 1.0
    np.testing.assert_allclose(np.asarray(got[name]) / scale, want[name] / scale, atol=2e-3 if order == "linear" else 5e-5,
                               err_msg=name)


@pytest.mark.parametrize("order", ORDERS)
def test_second_derivative_by_the_bandwidth(order):
  x, y, _, _ = data(60)
  with jax.enable_x64(True):
    loss = lambda h: jnp.mean((y - jflash.kernel_regression(x, y, None, h, order=order, exclude_self=True)) ** 2)
    second = jax.jit(jax.hessian(loss))(0.2)
    slope = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(second, (slope(0.2 + 1e-5) - slope(0.2 - 1e-5)) / 2e-5, rtol=1e-6)


def test_vmap_over_bandwidths_and_inside_scan():
  x, y, queries, _ = data()
  bandwidths = jnp.array([0.1, 0.2, 0.4])
  one = lambda h: jflash.kernel_regression(x, y, queries, h)
  want = jnp.stack([one(h) for h in bandwidths])
  np.testing.assert_allclose(jax.vmap(one)(bandwidths), want, atol=1e-6)
  np.testing.assert_allclose(jax.lax.scan(lambda c, h: (c, one(h)), 0, bandwidths)[1], want, atol=1e-6)


# Numbers at their limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 10])
def test_a_query_far_from_all_data_gets_its_nearest_neighbour(backend, d, order):
  rng = np.random.default_rng(d)
  x, y = rng.normal(size=(200, d)), rng.normal(size=200)
  queries = np.array([1e3, 1e6, 1e10, 1e20, -1e30])[:, None] / (1 + np.arange(d))
  length = np.abs(queries).max(axis=1)
  nearest = np.argmin((x**2).sum(1)[:, None] / length - 2 * x @ (queries.T / length), axis=0)
  mean, stats = run(backend, "float32", jflash.kernel_regression, x, y, queries, 0.3, order=order, return_stats=True)
  np.testing.assert_allclose(mean, y[nearest], atol=1e-5)
  assert np.isfinite(stats.variance).all() and not np.isnan(stats.log_density).any() and (stats.effective_sample_size == 1).all()
  with using(backend):
    grad = jax.grad(lambda q: jflash.kernel_regression(x, y, q, 0.3, order=order, implementation=backend).sum())(
        jnp.asarray(queries, jnp.float32))
  assert np.isfinite(grad).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_isolated_point_can_be_left_out(backend, order):
  x, y, _, _ = data(60)
  x[7] = 30.0
  mean, stats = run(backend, "float32", jflash.kernel_regression, x, y, None, 0.3, order=order, exclude_self=True, return_stats=True)
  nearest = np.argmin(((np.delete(x, 7, axis=0) - x[7]) ** 2).sum(1))
  np.testing.assert_allclose(mean[7], np.delete(y, 7)[nearest], atol=1e-5)
  assert stats.leverage[7] == 1 and all(np.isfinite(part).all() for part in stats)


@pytest.mark.parametrize("order,d", [("constant", 2), ("linear", 2), ("constant", 9)])
def test_a_common_offset_costs_no_digits(d, order):
  x, y, queries, _ = data(500, d)
  bandwidth = 0.05 if d == 2 else 0.5
  want = regress(x, y, queries, bandwidth, order).mean
  for offset in (1e2, 1e3, 1e4, 1e6):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", _points.PrecisionWarning)
      wide = run("xla", "float64", jflash.kernel_regression, x + offset, y, queries + offset, bandwidth, order=order)
      single = np.asarray(jflash.kernel_regression(x + offset, y, queries + offset, bandwidth, order=order))  # float32 inside
    assert single.dtype == np.float32
    np.testing.assert_allclose(wide, want, atol=1e-9 * offset if order == "linear" else 1e-12 * offset)
    np.testing.assert_allclose(single, want, atol=1e-3 if order == "linear" else 1e-4)


def test_a_traced_offset_is_centred_too():
  x, y, queries, _ = data(300)
  x, queries = (a.astype(np.float32) + np.float32(1024) for a in (x, queries))  # both on the grid of float32 at 1024
  want = regress(x.astype(float), y, queries.astype(float), 0.05).mean
  got = jax.jit(lambda x, y, q: jflash.kernel_regression(x, y, q, 0.05))(x, y, queries)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_large_values_keep_their_spread():
  x, y, queries, _ = data()
  mean, stats = run("xla", "float32", jflash.kernel_regression, x, 1e25 * y, queries, 0.2, return_stats=True)
  want = regress(x, y, queries, 0.2)
  np.testing.assert_allclose(mean / 1e25, want.mean, atol=1e-5)
  shifted = run("xla", "float64", jflash.kernel_regression, x, y + 1e7, queries, 0.2, return_stats=True)[1]
  np.testing.assert_allclose(shifted.variance, want.variance, rtol=1e-6)


def test_warns_where_digits_are_lost():
  x, y, _, _ = data(50)
  with pytest.warns(_points.PrecisionWarning, match=r"bandwidths wide, and float32 .* use float64"):
    jflash.kernel_regression(x, y, None, 0.01)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jflash.kernel_regression(x, y, None, 0.1)
    run("xla", "float64", jflash.kernel_regression, x, y, None, 0.01)


@pytest.mark.parametrize("order", ORDERS)
def test_few_points_equal_points_and_equal_values(order):
  x, _, queries, rng = data(5)
  one = jflash.kernel_regression(x[:1], [3.0], queries, 0.1, order=order)
  np.testing.assert_array_equal(one, 3.0)
  same = jflash.kernel_regression(np.zeros((5, 2)), np.arange(5.0), queries, 0.1, order=order)
  np.testing.assert_allclose(same, 2.0, rtol=1e-6)
  constant = jflash.kernel_regression(x, np.full(5, 7.0), queries, 0.1, order=order)
  np.testing.assert_array_equal(constant, 7.0)
  on_a_line = np.column_stack([np.linspace(0, 1, 20), np.zeros(20)])  # no slope across the line, the right one along it
  got = jflash.kernel_regression(on_a_line, 2 * on_a_line[:, 0], on_a_line[3:5], 0.1, order="linear")
  np.testing.assert_allclose(got, 2 * on_a_line[3:5, 0], atol=1e-4)


def test_local_linear_reproduces_planes():
  x, _, queries, _ = data(200, 3)
  plane = lambda a: a @ np.array([1.0, -2.0, 0.5]) + 3
  got = run("xla", "float64", jflash.kernel_regression, x, plane(x), queries, 0.3, order="linear")
  np.testing.assert_allclose(got, plane(queries), atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_weights_count_observations(order):
  x, y, queries, rng = data(60)
  count = rng.integers(0, 4, len(x))
  weighted = run("xla", "float64", jflash.kernel_regression, x, y, queries, 0.2, order=order, sample_weight=count, return_stats=True)
  repeated = run("xla", "float64", jflash.kernel_regression, np.repeat(x, count, axis=0), np.repeat(y, count), queries, 0.2,
                 order=order, return_stats=True)
  for got, want in zip(jax.tree.leaves((weighted[0], weighted[1][:2])), jax.tree.leaves((repeated[0], repeated[1][:2]))):
    np.testing.assert_allclose(got, want, atol=1e-11)


# Skipping tiles -------------------------------------------------------------------------------------------------------


def test_order_is_a_permutation_into_compact_tiles():
  x = np.random.default_rng(0).uniform(size=(1000, 2)).astype(np.float32)
  order = np.asarray(_prune.order(jnp.asarray(x), 128))
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  volumes = [np.ptp(x[order[n:n + 128]], axis=0).prod() for n in range(0, 1000, 128)]
  assert max(volumes) < 0.25, "eight tiles of a unit square"


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("case", ["uniform", "clusters", "weights", "outliers"])
def test_what_is_skipped_weighs_less_than_tol(case, exclude_self):
  rng = np.random.default_rng(3)
  n = 1300 + 17
  x = rng.uniform(size=(n, 2)) if case != "clusters" else rng.normal(size=(n, 2)) * 0.02 + rng.integers(0, 4, (n, 1))
  if case == "outliers":
    x[::100] *= 40
  weight = rng.integers(0, 3, n) * rng.uniform(0.1, 10, n) if case == "weights" else None
  queries = None if exclude_self else np.concatenate([x[:500], 3 * rng.normal(size=(203, 2)), [[1e4, 0]]])
  y = rng.normal(size=n)
  arguments = {"exclude_self": exclude_self, "sample_weight": weight}
  with jax.enable_x64(True):
    fits = {tol: jax.tree.map(np.asarray, jflash.kernel_regression(x, y, queries, 0.03, return_stats=True, tol=tol, **arguments))
            for tol in (0, 1e-2, 1e-4)}
  exact, without = fits.pop(0)
  assert without.visited == 1
  for tol, (mean, stats) in fits.items():
    kept = np.exp(stats.log_density - without.log_density)
    assert stats.visited < (0.75 if exclude_self else 1)
    assert kept.max() <= 1 + 1e-9 and kept.min() >= 1 - tol
    np.testing.assert_allclose(mean, exact, atol=tol * np.ptp(y))
    assert (kept < 1).any(), "something was skipped that weighs something"


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipping_is_the_same_on_every_backend_and_has_gradients(backend):
  x, y, queries, _ = data(700)
  fit = lambda h, tol: jflash.kernel_regression(x, y, None, h, exclude_self=True, tol=tol, implementation=backend).sum()
  with jflash.interpret():
    (value, slope), (exact, exact_slope) = (jax.value_and_grad(fit)(0.04, tol) for tol in (1e-6, 0.0))
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  np.testing.assert_allclose(slope, exact_slope, rtol=1e-3)


def test_a_query_too_far_to_be_bounded_skips_nothing():
  x, y, queries, _ = data(600)
  queries[3] = 1e25
  exact, got = (jflash.kernel_regression(x, y, queries, 0.03, tol=tol) for tol in (0, 1e-3))
  np.testing.assert_allclose(got, exact, atol=1e-3 * np.ptp(y))
  assert got[3] == y[np.argmax(x.sum(1))].astype(np.float32)


@pytest.mark.slow
def test_few_tiles_of_many_points():
  x = np.random.default_rng(0).normal(size=(65536, 2))
  y = np.sin(3 * x[:, 0])
  exact, without = jflash.kernel_regression(x, y, x[:4096], 0.05, return_stats=True)
  _, stats = jflash.kernel_regression(x, y, None, 0.05, return_stats=True, tol=1e-3)
  assert stats.visited <= 0.1
  assert np.exp(np.asarray(stats.log_density[:4096] - without.log_density)).min() >= 1 - 1e-3 - 1e-5  # float32's own error


def test_memory_grows_with_n_and_not_its_square():
  def temporary(n):
    x, y = jax.ShapeDtypeStruct((n, 2), "float32"), jax.ShapeDtypeStruct((n,), "float32")
    loss = lambda x, y: jnp.sum(jflash.kernel_regression(x, y, None, 0.1, exclude_self=True, tol=1e-3) ** 2)
    return jax.jit(jax.grad(loss, (0, 1))).lower(x, y).compile().memory_analysis().temp_size_in_bytes
  small, large = temporary(16384), temporary(32768)
  assert large < 60e6 and large < 2.5 * small, "all pairs take 4 GiB"


# Errors ---------------------------------------------------------------------------------------------------------------


X, Y, Q = np.zeros((6, 2)), np.zeros(6), np.zeros((3, 2))
ERRORS = {
  "`bandwidth` is 0.0; it must be greater than 0": (X, Y, Q, 0.0, {}),
  "`bandwidth` is [0.1, -1.0]; it must be": (X, Y, Q, [0.1, -1], {}),
  "`bandwidth` has shape (3,) and `x` has 2 coordinates": (X, Y, Q, np.ones(3), {}),
  "`y` has 5 values and `x` has 6 points": (X, Y[:5], Q, 0.1, {}),
  "`y` has 3 axes": (X, np.zeros((6, 1, 1)), Q, 0.1, {}),
  "`x` has 1 axes and shape (6,); pass [points, coordinates]. `x[:, None]`": (Y, Y, Q, 0.1, {}),
  "`x` has shape (0, 2); it needs at least one point": (X[:0], Y[:0], Q, 0.1, {}),
  "`x_query` has 3 coordinates and `x` has 2": (X, Y, np.zeros((3, 3)), 0.1, {}),
  "`x` holds nan at [1, 0]": (np.array([[0.0], [np.nan]]), Y[:2], None, 0.1, {}),
  "`y` holds inf at [1]": (X[:2], np.array([0, np.inf]), None, 0.1, {}),
  "`x` has dtype complex128; pass real numbers": (X + 0j, Y, Q, 0.1, {}),
  "`sample_weight` has shape (5,) and `x` has 6 points": (X, Y, Q, 0.1, {"sample_weight": Y[:5]}),
  "`sample_weight` holds -1.0; weights must be 0 or more": (X, Y, Q, 0.1, {"sample_weight": Y - 1}),
  "`sample_weight` is 0 for every point": (X, Y, Q, 0.1, {"sample_weight": Y}),
  "`sample_weight` is greater than 0 for 1 point and `exclude_self`": (X, Y, None, 0.1, {"sample_weight": np.eye(6)[0],
                                                                                        "exclude_self": True}),
  "`x` has 1 point (n_samples = 1); pass at least two": (X[:1], Y[:1], None, 0.1, {"exclude_self": True}),
  "`x_query` has 3 points and `x` has 6": (X, Y, Q, 0.1, {"exclude_self": True}),
  "`order` is 'quadratic'; pass one of 'constant', 'linear'": (X, Y, Q, 0.1, {"order": "quadratic"}),
  "`tol` is 1.0; pass a number from 0": (X, Y, Q, 0.1, {"tol": 1.0}),
  "`tol` is 0.1 and `x` has 9 coordinates": (np.zeros((6, 9)), Y, None, 0.1, {"tol": 0.1}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_both_sides(message):
  *arguments, options = ERRORS[message]
  with pytest.raises(ValueError) as caught:
    jflash.kernel_regression(*arguments, **options)
  assert message in str(caught.value)
