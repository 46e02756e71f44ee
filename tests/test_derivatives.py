"""Derivatives of second and third order of every feature, against differences of dense gradients in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _reference, masks
from tests import dropout_reference
from tests.backends import BACKENDS, using
from tests.cases import Sizes

B, T, S, N, K, H, E = 2, 11, 13, 4, 2, 3, 2
KEY = np.array([1, 2], np.uint32)
ROWS, COLUMNS = np.arange(T)[:, None], np.arange(S)
TILES = {"xla": (4, 5), "tpu": (128, 128)}


def table_mod(score, batch, head, query, key, table, factor):
  return factor * jnp.sin(score) + table[head, (query - key) % 7]


def near(batch, head, query, key, reach):
  return abs(query - key) < reach[head]


BLOCKS = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
REACH = np.array([1, 3, 5, 20])
LENGTHS = np.array([0, 9])
IDS = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3]), np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4])
# name: (arrays that get a gradient, other arguments, what is kept, factors of dropout)
FEATURES = {
    "plain": ({}, {}, True, 1.0),
    "causal": ({}, {"is_causal": True}, ROWS >= COLUMNS, 1.0),
    "lengths": ({}, {"key_value_seq_lengths": LENGTHS}, LENGTHS[:, None, None, None] > COLUMNS, 1.0),
    "segments": ({}, {"query_segment_ids": IDS[0], "key_value_segment_ids": IDS[1]}, IDS[0][:, None] == IDS[1], 1.0),
    "block_sparse": ({}, {"mask": masks.BlockSparse(BLOCKS, (4, 4))}, np.kron(BLOCKS, np.ones((4, 4), bool))[:T, :S], 1.0),
    "custom": ({}, {"mask": masks.Custom(near, REACH)}, abs(ROWS - COLUMNS) < REACH[:, None, None], 1.0),
    "bias": ({"bias": (N, 1, S)}, {"is_causal": True}, ROWS >= COLUMNS, 1.0),
    "bias_by_query": ({"bias": (B, 1, T, 1)}, {"local_window_size": 4}, abs(ROWS - COLUMNS) <= 4, 1.0),
    "scale_and_cap": ({"scale": (), "logits_soft_cap": ()}, {}, True, 1.0),
    "alibi": ({"alibi_slopes": (B, N)}, {}, True, 1.0),
    "score_mod": ({"score_operands": [(N, 7), ()]}, {"score_mod": table_mod}, True, 1.0),
    "sinks": ({"sinks": (N,)}, {"key_value_seq_lengths": LENGTHS}, LENGTHS[:, None, None, None] > COLUMNS, 1.0),
    "dropout": ({}, {"dropout_rate": 0.3, "dropout_key": KEY}, True, dropout_reference.factors(0.3, KEY, Sizes(B, T, S, N, K, H, E))),
    "everything": ({"bias": (1, N, T, S), "scale": (), "logits_soft_cap": (), "sinks": (N,), "score_operands": [(N, 7), ()]},
                   {"is_causal": True, "score_mod": table_mod, "dropout_rate": 0.3, "dropout_key": KEY}, ROWS >= COLUMNS,
                   dropout_reference.factors(0.3, KEY, Sizes(B, T, S, N, K, H, E))),
}


def draw(feature, dtype, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, E), **FEATURES[feature][0]}
  one = lambda shape: jnp.asarray(0.5 + rng.random(shape) if shape == () else rng.normal(size=shape), dtype)
  return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def reduce(out, lse):
  """A scalar that is curved in out and in lse."""
  return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(lse == -jnp.inf, 0.0, lse)))


def ours(backend, feature):
  _, others, _, _ = FEATURES[feature]

  def f(arrays):
    with using(backend, TILES[backend]):
      return reduce(*jflash.attention(**arrays, **others, implementation=backend, return_residual=True))
  return f


def dense(feature):
  """In float64 by the reference, which knows the mask and the factors by themselves."""
  _, others, keep, factors = FEATURES[feature]
  fixed = {name: x for name, x in others.items() if name == "score_mod"}
  return lambda arrays: reduce(*_reference.attention(**arrays, **fixed, keep=keep, factors=factors, dtype=jnp.float64))


def inner(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def pulled(f, direction):
  """The derivative of f along a direction, in reverse mode."""
  return lambda x: inner(jax.grad(f)(x), direction)


def pushed(f, direction):
  """The same in forward mode."""
  return lambda x: jax.jvp(f, (x,), (direction,))[1]


def differences(feature, order=2):
  """Along fixed directions, by central differences of fourth order of the dense gradient (or of its derivative) in float64."""
  with jax.enable_x64(True):
    x, *directions = (draw(feature, jnp.float64, seed) for seed in range(order + 1))
    f = dense(feature)
    for direction in directions[:-1]:
      f = pulled(f, direction)
    step = 1e-3
    at = lambda n: float(f(jax.tree.map(lambda a, d: a + n * step * d, x, directions[-1])))
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def derivative(backend, feature, modes, dtype):
  x, *directions = (draw(feature, dtype, seed) for seed in range(len(modes) + 1))
  f = ours(backend, feature)
  for mode, direction in zip(modes, directions):
    f = {"rev": pulled, "fwd": pushed}[mode](f, direction)
  return float(jax.jit(f)(x))


@pytest.mark.parametrize("feature", FEATURES)
def test_gradient_of_a_gradient(feature):
  with jax.enable_x64(True):
    got = derivative("xla", feature, ("rev", "rev"), jnp.float64)
  np.testing.assert_allclose(got, differences(feature), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("feature", FEATURES)
def test_hessian_vector_product_of_kernels(feature):
  """The gradient is the kernels', its derivative the plain-JAX backend's."""
  np.testing.assert_allclose(derivative("tpu", feature, ("rev", "rev"), jnp.float32), differences(feature), rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("modes", [("rev", "fwd"), ("fwd", "rev"), ("fwd", "fwd")], ids=" then ".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_mix(backend, modes):
  x64 = backend == "xla"
  with jax.enable_x64(x64):
    got = derivative(backend, "everything", modes, jnp.float64 if x64 else jnp.float32)
  np.testing.assert_allclose(got, differences("everything"), rtol=1e-6 if x64 else 2e-4, atol=1e-6 if x64 else 2e-3)


@pytest.mark.parametrize("modes", [("rev", "rev", "rev"), ("rev", "rev", "fwd")], ids=" then ".join)
def test_third_derivatives(modes):
  with jax.enable_x64(True):
    got = derivative("xla", "bias", modes, jnp.float64)
  np.testing.assert_allclose(got, differences("bias", 3), rtol=1e-5, atol=1e-5)


def test_hessian_is_symmetric_and_right():
  with jax.enable_x64(True):
    x = draw("causal", jnp.float64)
    small = lambda q: ours("xla", "causal")({**x, "query": x["query"].at[:1, :2, :1].set(q)})
    exact = lambda q: dense("causal")({**x, "query": x["query"].at[:1, :2, :1].set(q)})
    q = x["query"][:1, :2, :1]
    got, want = jax.hessian(small)(q).reshape(q.size, q.size), jax.hessian(exact)(q).reshape(q.size, q.size)
    np.testing.assert_allclose(got, got.T, atol=1e-10)
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(jax.jacrev(jax.jacrev(small))(q).reshape(got.shape), want, atol=1e-9)


def test_linearized_gradient_is_a_linear_map():
  with jax.enable_x64(True):
    x, d, e = (draw("bias", jnp.float64, seed) for seed in range(3))
    gradient, along = jax.linearize(jax.grad(ours("xla", "bias")), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient, jax.grad(ours("xla", "bias"))(x))
    np.testing.assert_allclose(inner(along(d), e), inner(along(e), d), rtol=1e-9)
    np.testing.assert_allclose(inner(along(d), e), pushed(pulled(ours("xla", "bias"), e), d)(x), rtol=1e-9)


def test_vmap_of_hessian_vector_products():
  with jax.enable_x64(True):
    x = draw("causal", jnp.float64)
    directions = jax.tree.map(lambda *y: jnp.stack(y), *[draw("causal", jnp.float64, seed) for seed in (1, 2, 3)])
    product = lambda d: jax.grad(pulled(ours("xla", "causal"), d))(x)
    got = jax.vmap(product)(directions)
    for n in range(3):
      one = product(jax.tree.map(lambda y, n=n: y[n], directions))
      jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, atol=1e-10), got, one)


def test_nothing_hidden_reaches_a_second_derivative():
  """NaN in keys and values that no query sees, and in queries that see nothing."""
  arrays = draw("lengths", jnp.float32)
  direction = draw("lengths", jnp.float32, 1)
  spoilt = dict(arrays)
  for name in ("key", "value"):
    spoilt[name] = arrays[name].at[1, 9:].set(jnp.nan).at[0].set(jnp.nan)
  products = [jax.jit(jax.grad(pulled(ours("xla", "lengths"), direction)))(x) for x in (arrays, spoilt)]
  jax.tree.map(np.testing.assert_array_equal, *products)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(products))


def test_kernel_regression():
  rng = np.random.default_rng(0)
  x, y, d, e = rng.normal(size=(20, 2)), rng.normal(size=20), rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
  with jax.enable_x64(True):
    f = lambda x: jnp.sin(jflash.kernel_regression(x, jnp.asarray(y), None, 0.7)).sum()

    def exact(x):
      s = -((x[:, None] - x) ** 2).sum(-1) / (2 * 0.7**2)
      return jnp.sin(jax.nn.softmax(s, -1) @ y).sum()

    got, want = (pulled(pulled(g, jnp.asarray(d)), jnp.asarray(e))(jnp.asarray(x)) for g in (f, exact))
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("mode", ["rev", "fwd"])
def test_memory_of_a_second_derivative_is_linear(mode):
  def bytes_at(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
    f = lambda q, k, v: jnp.sin(jflash.attention(q, k, v, is_causal=True, implementation="xla")).sum()
    slope = lambda q, k, v: sum(jnp.sum(g) for g in jax.grad(f, (0, 1, 2))(q, k, v))
    second = {"rev": jax.grad(slope, (0, 1, 2)), "fwd": lambda *qkv: jax.jvp(jax.grad(f, (0, 1, 2)), qkv, qkv)[1]}
    return jax.jit(second[mode]).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  half, whole = bytes_at(4096), bytes_at(8192)
  assert whole <= 2.05 * half and whole < 8192 * 8192  # a quarter of one head's scores
