"""Dropout: which weights are dropped, and that it is the same everywhere. Values and gradients are in the table of cases."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jflash
from jflash import _dropout, _mask
from tests import dropout_reference
from tests.backends import BACKENDS, attention, using
from tests.cases import Sizes

B, T, S, N, K, H = 2, 150, 170, 4, 2, 8
KEY = jax.random.key(11)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))


def kept(rate, key, sizes):
  return np.asarray(_dropout.bind(rate, key, sizes).kept())


def value_and_grads(backend, qkv, tiles=None, **kwargs):
  with using(backend, tiles):
    f = lambda *x: jflash.attention(*x, implementation=backend, is_causal=True, **kwargs)
    out, pull = jax.vjp(f, *qkv)
    return out, *pull(jnp.cos(out))


# The bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(4), jax.random.key(5, impl="rbg")], ids=["typed", "raw", "rbg"])
def test_bits_are_those_of_the_definition(key):
  data = np.asarray(key if key.dtype == jnp.uint32 else jax.random.key_data(key))
  words = (data[0], data[1]) if data.size == 2 else dropout_reference.threefry(data[:2], data[2:])
  want = dropout_reference.factors(0.3, words, Sizes(B, T, S, N, K, H, H)) > 0
  np.testing.assert_array_equal(kept(0.3, key, _mask.Sizes(B, N, T, S)), want)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_share_that_is_kept(rate):
  bits = kept(rate, KEY, _mask.Sizes(3, 5, 512, 512))
  n = bits[0, 0].size
  assert abs(bits.mean() - (1 - rate)) <= 0.01 * (1 - rate)
  for share in bits.mean((2, 3)).ravel():  # each batch element and head
    assert abs(share - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / n)


def test_bits_are_independent():
  """Chi-squared of 2 x 2 blocks of bits, and correlations along rows, columns, diagonals, heads, batch elements and keys."""
  worst = []
  for seed in range(4):
    bits = kept(0.5, jax.random.key(seed), _mask.Sizes(2, 2, 512, 512))
    blocks = bits[..., ::2, ::2] + 2 * bits[..., ::2, 1::2] + 4 * bits[..., 1::2, ::2] + 8 * bits[..., 1::2, 1::2]
    worst.append(scipy.stats.chisquare(np.bincount(blocks.ravel(), minlength=16)).pvalue)
    x, other = bits, kept(0.5, jax.random.key(seed + 100), _mask.Sizes(2, 2, 512, 512))
    pairs = [(x[..., n:, :], x[..., :-n, :]) for n in (1, 2, 3, 64, 128)] + [(x[..., n:], x[..., :-n]) for n in (1, 2, 3, 64, 128)]
    pairs += [(x[..., 1:, 1:], x[..., :-1, :-1]), (x[0], x[1]), (x[:, 0], x[:, 1]), (x, other)]
    below = np.tril(np.ones((512, 512), bool), -1)
    pairs.append((x[..., below], x.swapaxes(-1, -2)[..., below]))
    for a, b in pairs:
      alike = np.count_nonzero(a == b)
      worst.append(2 * scipy.stats.norm.sf(abs(alike - a.size / 2) / np.sqrt(a.size / 4)))
  assert min(worst) > 0.001 / len(worst), worst  # as a single test at the level of a thousandth
  assert scipy.stats.kstest(worst, "uniform").pvalue > 1e-4


def test_rows_and_columns_share_no_words():
  drop = _dropout.bind(0.5, KEY, _mask.Sizes(2, 3, 1000, 1000))
  words = np.concatenate([np.asarray(drop.query_words).ravel(), np.asarray(drop.key_words).ravel()])
  assert len(np.unique(words)) >= len(words) - 3  # of 12,000 words of 32 bits, 0.02 pairs agree by chance


# The same everywhere ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_zero_is_no_dropout_bit_by_bit(backend):
  plain = value_and_grads(backend, draw())
  jax.tree.map(np.testing.assert_array_equal, value_and_grads(backend, draw(), dropout_rate=0.0, dropout_key=KEY), plain)
  jax.tree.map(np.testing.assert_array_equal, value_and_grads(backend, draw(), dropout_rate=0), plain)


@pytest.mark.parametrize("backend, tiles", [("xla", (32, 64)), ("xla", (150, 170)), ("tpu", (128, 256)), ("tpu", (256, 128))])
def test_tiles_and_backends_do_not_matter(backend, tiles):
  options = {"dropout_rate": 0.4, "dropout_key": KEY}
  one, other = value_and_grads("xla", draw(), **options), value_and_grads(backend, draw(), tiles, **options)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), one, other)


def test_the_weights_of_lse_are_not_dropped():
  plain, dropped = (attention("xla", *draw(), **o)[1] for o in ({}, {"dropout_rate": 0.5, "dropout_key": KEY}))
  np.testing.assert_array_equal(plain, dropped)


def test_the_mean_over_keys_is_attention_without_dropout():
  q, k, v = (x[:1, :12, :2] for x in draw())
  k, v = k[:, :10], v[:, :10]
  f = jax.jit(jax.vmap(lambda key: jflash.attention(q, k, v, dropout_rate=0.3, dropout_key=key)))
  samples = np.asarray(f(jax.random.split(KEY, 4000)))
  error = samples.mean(0) - np.asarray(jflash.attention(q, k, v))
  assert abs(error / (samples.std(0) / np.sqrt(len(samples)))).max() < 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_keys_and_over_the_batch(backend):
  q, k, v = draw()
  keys = jax.random.split(KEY, 3)
  f = lambda q, k, v, key, **ids: attention(backend, q, k, v, dropout_rate=0.4, dropout_key=key, **ids)[0]
  one_by_one = jnp.stack([f(q, k, v, key) for key in keys])
  np.testing.assert_allclose(jax.vmap(f, (None, None, None, 0))(q, k, v, keys), one_by_one, atol=1e-5)
  each = jax.vmap(lambda q, k, v, n: f(q, k, v, KEY, batch_ids=n[None]))(*(x[:, None] for x in (q, k, v)), jnp.arange(B))
  np.testing.assert_allclose(each[:, 0], f(q, k, v, KEY), atol=1e-5)


def test_a_part_knows_its_place():
  """One batch element, one group of heads, some of the queries and all keys in another order: what a shard would compute."""
  q, k, v = draw()
  whole = attention("xla", q, k, v, dropout_rate=0.4, dropout_key=KEY, is_causal=True)[0]
  order = np.random.default_rng(0).permutation(S)
  part = attention("xla", q[1:, 50:90, 2:], k[1:, order, 1:], v[1:, order, 1:], dropout_rate=0.4, dropout_key=KEY, is_causal=True,
                   batch_ids=np.array([1]), head_ids=np.array([2, 3]), query_positions=np.arange(50, 90), key_value_positions=order)[0]
  np.testing.assert_allclose(part, whole[1:, 50:90, 2:], atol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jflash
from jax.sharding import PartitionSpec as P
q, k, v = (jax.random.normal(jax.random.key(n), (2, 40, 4, 8)) for n in range(3))
key = jax.random.key(5)
f = lambda *x, **ids: jflash.attention(*x, is_causal=True, dropout_rate=0.3, dropout_key=key, **ids)
loss = lambda q, k, v: (f(q, k, v) ** 2).sum()
want = f(q, k, v), jax.grad(loss, (0, 1, 2))(q, k, v)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
spec = P("data", None, "model")

def local(q, k, v):
  b, h = jax.lax.axis_index("data"), jax.lax.axis_index("model") * 2 + jnp.arange(2)
  g = lambda q, k, v: f(q, k, v, batch_ids=b[None], head_ids=h)
  return g(q, k, v), jax.grad(lambda *x: (g(*x) ** 2).sum(), (0, 1, 2))(q, k, v)

got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, (spec,) * 3), check_vma=False))(q, k, v)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)
placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in (q, k, v)]
np.testing.assert_allclose(jax.jit(f)(*placed), want[0], atol=1e-5, rtol=1e-5)
print("right")
"""


def test_shards(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
  assert "right" in done.stdout, done.stderr[-2000:]


def test_no_array_of_size_t_times_s():
  x = jax.ShapeDtypeStruct((1, 8192, 4, 64), jnp.float32)
  f = lambda q, k, v, key: jflash.attention(q, k, v, dropout_rate=0.1, dropout_key=key, implementation="xla").sum()
  compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x, jax.eval_shape(lambda: jax.random.key(0))).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 80 * 2**20  # 4 * 8192² bits alone are 32 MiB, in bytes 256


def test_a_plan_does_not_depend_on_dropout():
  q, k, v = draw()
  explained = [jflash.explain(q, k, v, **o) for o in ({}, {"dropout_rate": 0.1, "dropout_key": KEY})]
  assert explained[0].tiles == explained[1].tiles and explained[1].saved["logits"] == 4 * B * N * (T + S)
