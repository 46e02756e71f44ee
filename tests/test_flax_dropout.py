"""Dropout of the Flax layers and attention functions against dense weights with the mask of `dropout_reference`."""

import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jflash
import jflash.linen
import jflash.nnx
from tests import cases, dropout_reference

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
same = np.testing.assert_array_equal
normal = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
N, K, D, H, RATE = 4, 2, 12, 3, 0.3
PARAMS = {name: {"kernel": 0.5 * normal(i, *shape), "bias": 0.5 * normal(i + 9, *bias)} for i, (name, shape, bias) in enumerate((
    ("query", (D, N, H), (N, H)), ("key", (D, K, H), (K, H)), ("value", (D, K, H), (K, H)), ("out", (N, H, D), (D,))))}
KEY = jax.random.key(3)
X = normal(20, 2, 3, 7, D)  # two batch dims


class Layer(NamedTuple):
  """One of the two layers as a function."""

  run: object  # (params, x, key=None, *, rate=RATE, deterministic=None, is_causal=False) -> out
  drawn: object  # key -> the key that dropout sees


compiled = functools.partial(jax.jit, static_argnames=("rate", "deterministic", "is_causal"))


@compiled
def run_nnx(params, x, key=None, *, rate=RATE, deterministic=None, is_causal=False):
  layer = jflash.nnx.MultiHeadAttention(N, D, num_kv_heads=K, dropout_rate=rate, rngs=nnx.Rngs(0),
                                        kernel_init=nnx.initializers.zeros)
  nnx.update(layer, params)
  rngs = None if key is None else nnx.Rngs(dropout=key)
  return layer(x, deterministic=deterministic, rngs=rngs, is_causal=is_causal)


@compiled
def run_linen(params, x, key=None, *, rate=RATE, deterministic=None, is_causal=False):
  layer = jflash.linen.MultiHeadAttention(num_heads=N, num_kv_heads=K, dropout_rate=rate)
  return layer.apply({"params": params}, x, deterministic=deterministic, dropout_rng=key, is_causal=is_causal)


LAYERS = {"nnx": Layer(run_nnx, lambda key: nnx.Rngs(dropout=key).dropout()), "linen": Layer(run_linen, lambda key: key)}
both = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def factors(key, batch, t):
  """By what the weights `[batch..., N, T, T]` are multiplied."""
  flat = dropout_reference.factors(RATE, np.asarray(jax.random.key_data(key)), cases.Sizes(B=int(np.prod(batch)), N=N, T=t, S=t))
  return jnp.asarray(flat.reshape(*batch, N, t, t), jnp.float32)


def attend(q, k, v, factors):
  """Causal attention, densely, of heads `[batch..., T, N, H]`."""
  scores = jnp.einsum("...tnh,...snh->...nts", q, k) / np.sqrt(q.shape[-1])
  weights = jax.nn.softmax(jnp.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf))
  return jnp.einsum("...nts,...snh->...tnh", weights * factors, v)


def by_hand(params, x, factors):
  q, k, v = (jnp.einsum("...d,dnh->...nh", x, params[name]["kernel"]) + params[name]["bias"] for name in ("query", "key", "value"))
  out = attend(q, *(jnp.repeat(y, N // K, axis=-2) for y in (k, v)), factors)
  return jnp.einsum("...nh,nhd->...d", out, params["out"]["kernel"]) + params["out"]["bias"]


@both
def test_out_and_gradients_are_those_of_the_mask(layer):
  def everything(function):
    def loss(params, x):
      out = function(params, x)
      return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(PARAMS, X)
    return out, gradients

  mask = factors(layer.drawn(KEY), (2, 3), 7)
  expected = everything(lambda params, x: by_hand(params, x, mask))
  found = everything(lambda params, x: layer.run(params, x, KEY, deterministic=False, is_causal=True))
  jax.tree.map(close, found, expected)


@both
def test_switched_off_nothing_changes(layer):
  run = functools.partial(layer.run, PARAMS, X, is_causal=True)
  plain = run(rate=0.0)
  close(plain, by_hand(PARAMS, X, 1.0))
  same(run(deterministic=True), plain)
  same(run(KEY, deterministic=True), plain)
  same(run(rate=0.0, deterministic=False), plain)


@both
def test_the_key_decides(layer):
  run = lambda key: layer.run(PARAMS, X, key, deterministic=False)
  same(run(KEY), run(jax.random.key(3)))
  assert np.abs(run(KEY) - run(jax.random.key(4))).max() > 0.1


@both
def test_every_batch_element_has_a_mask_of_its_own(layer):
  out = layer.run(PARAMS, jnp.broadcast_to(X[0, 0], X.shape), KEY, deterministic=False).reshape(6, -1)
  difference = np.abs(out[:, None] - out[None]).max(-1)
  assert difference[~np.eye(6, dtype=bool)].min() > 0.1


@both
def test_the_mean_over_keys_is_the_output_without_dropout(layer):
  x, count = X[0, :1], 1000
  run = jax.jit(jax.vmap(lambda key: layer.run(PARAMS, x, key, deterministic=False)))
  outs = np.asarray(run(jax.random.split(jax.random.key(1), count)), np.float64)
  exact = layer.run(PARAMS, x, deterministic=True)
  error = outs.std(0, ddof=1) / np.sqrt(count)
  assert error.min() > 0
  # 84 numbers, each about normal: beyond 5 standard errors in fewer than 1 of 10,000 draws of the keys.
  assert (np.abs(outs.mean(0) - exact) / error).max() < 5


def test_rates_out_of_range_are_refused():
  for layer in LAYERS.values():
    with pytest.raises(ValueError, match="`dropout_rate` is 1.5; it must be at least 0 and less than 1"):
      layer.run(PARAMS, X, KEY, rate=1.5, deterministic=False)


# nnx -----------------------------------------------------------------------------------------------------------------


def nnx_layer(**config):
  config = {"dropout_rate": RATE, "rngs": nnx.Rngs(0, dropout=KEY), "kernel_init": nnx.initializers.zeros} | config
  layer = jflash.nnx.MultiHeadAttention(N, D, num_kv_heads=K, **config)
  nnx.update(layer, PARAMS)
  return layer


def test_nnx_trains_and_evaluates_as_flax_does():
  model, plain = nnx.Sequential(nnx_layer()), nnx_layer(dropout_rate=0.0)(X)
  model.eval()
  same(model(X), plain)
  model.train()
  assert np.abs(model(X) - plain).max() > 0.1
  same(model.layers[0](X, deterministic=True), plain)  # the call goes before the layer
  same(nnx.view(model, deterministic=True)(X), plain)
  assert model.layers[0].deterministic is False
  assert np.abs(nnx.view(nnx_layer(deterministic=True), deterministic=False)(X) - plain).max() > 0.1


def test_nnx_draws_anew_in_every_compiled_call():
  layer, step = nnx_layer(deterministic=False), nnx.jit(lambda layer, x: layer(x))
  first, second = step(layer, X), step(layer, X)
  assert np.abs(first - second).max() > 0.1
  again = nnx_layer(deterministic=False)
  close(first, again(X))
  close(second, again(X))


def test_nnx_draws_where_flax_draws():
  moved = nnx.MultiHeadAttention(N, D, num_kv_heads=K, dropout_rate=RATE, decode=False, rngs=nnx.Rngs(0, dropout=KEY),
                                 attention_fn=jflash.nnx.attention_fn, kernel_init=nnx.initializers.zeros)
  nnx.update(moved, PARAMS)
  ours = nnx_layer()
  shapes = lambda layer: jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer)))
  assert shapes(ours) == shapes(moved) and "rngs" in shapes(ours)
  assert shapes(nnx_layer(dropout_rate=0.0)) == shapes(nnx_layer(keep_rngs=False)) == jax.tree.map(jnp.shape, PARAMS)
  for rngs in (None, nnx.Rngs(dropout=5), nnx.Rngs(dropout=6).dropout):
    keywords = {"deterministic": False, "is_causal": True}
    close(ours(X, rngs=nnx.clone(rngs), **keywords), moved(X, rngs=nnx.clone(rngs), **keywords))


def test_nnx_drops_while_decoding_if_the_call_says_so():
  layer, x = nnx_layer(deterministic=False), X[0]
  plain = run_nnx(PARAMS, x, rate=0.0, is_causal=True)
  decoder = nnx.view(layer, decode=True, batch_size=3, max_length=8)
  step = nnx.jit(lambda decoder, x, **more: decoder(x, **more), static_argnames="deterministic")
  close(jnp.concatenate([step(decoder, x[:, :4]), step(decoder, x[:, 4:])], 1), plain)
  decoder.init_cache((3, 8, D))
  drop = lambda x: step(decoder, x, deterministic=False, rngs=nnx.Rngs(dropout=KEY))
  close(jnp.concatenate([drop(x[:, :4]), drop(x[:, 4:])], 1), run_nnx(PARAMS, x, KEY, deterministic=False, is_causal=True))


def test_nnx_errors():
  with pytest.raises(ValueError, match="`dropout_rate` is 0.3 and neither the call nor the layer has `deterministic`; call"):
    nnx_layer()(X)
  with pytest.raises(ValueError, match="`dropout_rate` is 0.3 and `rngs` is None in the call and in the layer; pass"):
    nnx_layer(keep_rngs=False)(X, deterministic=False)
  with pytest.raises(AttributeError, match="'dropout'"):
    nnx_layer(rngs=nnx.Rngs(params=0))


# linen ---------------------------------------------------------------------------------------------------------------


def test_linen_draws_where_flax_draws():
  ours = jflash.linen.MultiHeadAttention(num_heads=N, dropout_rate=RATE, deterministic=False)
  moved = nn.MultiHeadDotProductAttention(num_heads=N, dropout_rate=RATE, deterministic=False,
                                          attention_fn=jflash.linen.attention_fn)
  variables = moved.init(jax.random.key(0), X)
  shapes = lambda variables: jax.tree.map(jnp.shape, variables)
  for rate in (RATE, 0.0):
    assert shapes(jax.eval_shape(ours.clone(dropout_rate=rate).init, jax.random.key(0), X)) == shapes(variables)
  out = ours.apply(variables, X, rngs={"dropout": KEY})
  close(out, moved.apply(variables, X, rngs={"dropout": KEY}))
  assert np.abs(out - ours.apply(variables, X, rngs={"dropout": jax.random.key(4)})).max() > 0.1


def test_linen_drops_while_decoding_if_the_call_says_so():
  layer, x = jflash.linen.MultiHeadAttention(num_heads=N, num_kv_heads=K, dropout_rate=RATE, deterministic=False), X[0]
  decoder = layer.clone(decode=True)
  empty = {"params": PARAMS, "cache": decoder.init(jax.random.key(0), jnp.zeros((3, 8, D)))["cache"]}
  for key, off in ((None, True), (KEY, False)):
    step = jax.jit(functools.partial(decoder.apply, mutable="cache", dropout_rng=key, deterministic=None if off else False))
    first, new = step(empty, x[:, :4])
    second, _ = step(empty | new, x[:, 4:])
    close(jnp.concatenate([first, second], 1), run_linen(PARAMS, x, key, deterministic=off, is_causal=True))


def test_linen_errors():
  layer = jflash.linen.MultiHeadAttention(num_heads=N, num_kv_heads=K, dropout_rate=RATE)
  with pytest.raises(ValueError, match='"deterministic" must be passed'):
    layer.apply({"params": PARAMS}, X)
  with pytest.raises(ValueError, match='"deterministic" was passed to the constructor and at call time'):
    layer.clone(deterministic=True).apply({"params": PARAMS}, X, deterministic=True)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    layer.apply({"params": PARAMS}, X, deterministic=False)


# The functions for Flax's own layers ---------------------------------------------------------------------------------


FUNCTIONS = {"nnx": jflash.nnx.attention_fn, "linen": jflash.linen.attention_fn}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@functions
def test_attention_fn_drops(function):
  q, k, v = normal(0, 3, 2, 3, 7, N, H)
  run = functools.partial(function, q, k, v, mask=np.tri(7, dtype=bool), dropout_rate=RATE)
  expected = attend(q, k, v, factors(KEY, (2, 3), 7))
  close(run(dropout_rng=KEY), expected)
  same(run(dropout_rng=KEY, broadcast_dropout=False), run(dropout_rng=KEY, broadcast_dropout=True))
  same(run(dropout_rng=jax.random.PRNGKey(3)), run(dropout_rng=KEY))
  same(run(dropout_rng=KEY, deterministic=True), function(q, k, v, mask=np.tri(7, dtype=bool)))


@functions
def test_attention_fn_without_a_key(function):
  with pytest.raises(ValueError, match="`dropout_rate` is 0.5 and `dropout_rng` is None; pass dropout_rng="):
    function(*normal(0, 3, 1, 7, N, H), dropout_rate=0.5)


# Learned sinks, as docs/flax.md has them -----------------------------------------------------------------------------


class NnxSinks(nnx.Module):
  def __init__(self, num_heads):
    self.sinks = nnx.Param(jnp.zeros(num_heads))

  def __call__(self, query, key, value, **options):
    return jflash.attention(query, key, value, sinks=self.sinks[...], **options)


class LinenSinks(nn.Module):
  @nn.compact
  def __call__(self, query, key, value, **options):
    sinks = self.param("sinks", nn.initializers.zeros_init(), (query.shape[-2],))
    return jflash.attention(query, key, value, sinks=sinks, **options)


def nnx_with_sinks(params, x, attention):
  layer = nnx_layer(attention=attention or NnxSinks(N), deterministic=False)
  nnx.update(layer, params)
  return layer(x)


def linen_with_sinks(params, x, attention):
  layer = jflash.linen.MultiHeadAttention(num_heads=N, num_kv_heads=K, dropout_rate=RATE, attention=attention or LinenSinks())
  tree = jax.eval_shape(functools.partial(layer.init, deterministic=True), jax.random.key(0), x)["params"]
  assert set(tree) == set(params)
  return layer.apply({"params": params}, x, deterministic=False, dropout_rng=KEY)


@pytest.mark.parametrize("run", [nnx_with_sinks, linen_with_sinks], ids=["nnx", "linen"])
def test_an_attention_with_parameters(run):
  sinks = normal(30, N)
  params = PARAMS | {"attention": {"sinks": sinks}}
  close(run(params, X, None), run(PARAMS, X, functools.partial(jflash.attention, sinks=sinks)))
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(run(params, X, None)))))(params)["attention"]["sinks"]
  assert gradient.shape == (N,) and np.abs(gradient).min() > 1e-3
