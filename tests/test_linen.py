"""The linen layer and attention function against Flax's own, with the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jflash
import jflash.linen
from jflash.linen import MultiHeadAttention, Rotary

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
normal = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
Flax = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4, deterministic=True)
Ours = functools.partial(MultiHeadAttention, num_heads=4)
Everything = functools.partial(
    Ours, qkv_features=16, num_kv_heads=2, rotary=Rotary(), normalize_qk=nn.RMSNorm,
    attention=functools.partial(jflash.attention, local_window_size=(2, 0), logits_soft_cap=3.0))


def checkpoint(layer, *inputs):
  """Random variables of the right names and shapes: fresh biases are 0 and scales 1, which would hide a mistake."""
  leaves, tree = jax.tree.flatten(jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"])
  return {"params": jax.tree.unflatten(tree, [0.5 * normal(i, *x.shape).astype(x.dtype) for i, x in enumerate(leaves)])}


def apply(layer, variables, *inputs, **keywords):
  static = {name: keywords.pop(name) for name in ("is_causal",) if name in keywords}
  return jax.jit(functools.partial(layer.apply, **static))(variables, *inputs, **keywords)


def same_outputs_and_gradients(flax, ours, *inputs, **keywords):
  """Of Flax's layer and ours, whose parameter trees must be equal too."""
  variables = checkpoint(flax, *inputs)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, checkpoint(ours, *inputs))

  def everything(layer):
    def loss(variables, inputs):
      out = layer.apply(variables, *inputs, **keywords)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, inputs)

  (_, out), gradients = everything(ours)
  (_, flax_out), flax_gradients = everything(flax)
  close(out, flax_out)
  jax.tree.map(close, gradients, flax_gradients)


def flax_masks(lengths=(7, 4)):
  tokens = jnp.arange(7) < jnp.array(lengths)[:, None]
  causal = nn.make_causal_mask(tokens)
  padding = nn.make_attention_mask(jnp.ones_like(tokens), tokens)
  return {"causal": causal, "padding": padding, "both": nn.combine_masks(causal, padding)}


@pytest.mark.parametrize("config", [
    {"normalize_qk": True}, {"qkv_features": 8, "out_features": 5, "use_bias": False},
], ids=["normalised", "widths and no bias"])
def test_takes_over_a_checkpoint(config):
  same_outputs_and_gradients(Flax(**config), Ours(**config), normal(0, 2, 7, 12), mask=flax_masks()["both"])


def test_cross_attention_over_two_batch_dims():
  inputs = normal(0, 2, 3, 7, 12), normal(1, 2, 3, 5, 6), normal(2, 2, 3, 5, 8)
  mask = (jnp.arange(5) < jnp.array([[1, 2, 3], [4, 5, 3]])[..., None])[:, :, None, None]
  same_outputs_and_gradients(Flax(), Ours(), *inputs, mask=mask)


def test_masks_made_by_flax_and_is_causal():
  x = normal(0, 2, 7, 12)
  variables = checkpoint(Flax(), x)
  for mask in flax_masks().values():
    assert mask.dtype == jnp.float32
    close(apply(Ours(), variables, x, mask=mask), apply(Flax(), variables, x, mask=mask))
  causal = apply(Ours(), variables, x, is_causal=True)
  close(causal, apply(Flax(), variables, x, mask=flax_masks()["causal"]))


def test_grouped_heads_equal_repeated_ones():
  x = normal(0, 2, 7, 12)
  grouped = checkpoint(Ours(num_kv_heads=2), x)
  assert grouped["params"]["key"]["kernel"].shape == (12, 2, 3)
  repeat = lambda path, leaf: jnp.repeat(leaf, 2, -2) if path[1].key in ("key", "value") else leaf
  close(apply(Ours(num_kv_heads=2), grouped, x), apply(Flax(), jax.tree_util.tree_map_with_path(repeat, grouped), x))


def test_bfloat16_with_float32_parameters():
  x = normal(0, 2, 7, 12)
  variables = checkpoint(Flax(), x)
  exact = apply(Flax(), variables, x)
  out, flax = (apply(layer(dtype=jnp.bfloat16), variables, x) for layer in (Ours, Flax))
  assert out.dtype == jnp.bfloat16
  error = lambda y: np.abs(y.astype(jnp.float32) - exact).max()
  assert error(out) <= 2 * error(flax)


def test_param_dtype_and_initialisers():
  layer = Ours(param_dtype=jnp.bfloat16, kernel_init=nn.initializers.ones, bias_init=nn.initializers.constant(3.0),
               normalize_qk=nn.RMSNorm)
  params = jax.jit(layer.init)(jax.random.key(0), normal(0, 2, 7, 12))["params"]
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.bfloat16.dtype}
  assert jnp.all(params["out"]["kernel"] == 1) and jnp.all(params["query"]["bias"] == 3)


def test_packed_documents_equal_separate_ones():
  layer, x = Everything(), normal(0, 1, 9, 12)
  variables = checkpoint(layer, x)
  ids, positions = jnp.array([5] * 4 + [2] * 5), jnp.array([*range(4), *range(5)])
  packed = apply(layer, variables, x, segment_ids=ids, positions=positions, is_causal=True)
  parts = [apply(layer, variables, part, is_causal=True) for part in (x[:, :4], x[:, 4:])]
  close(packed, jnp.concatenate(parts, 1))


# Decoding ------------------------------------------------------------------------------------------------------------


def with_cache(layer, variables, shape):
  """`layer` made to decode, and its variables with a cache that holds what attention must not look at."""
  layer = layer.clone(decode=True)
  cache = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(shape))["cache"]
  fill = lambda x: jnp.full(x.shape, 1e30, x.dtype) if x.ndim else jnp.zeros(x.shape, x.dtype)
  return layer, variables | {"cache": jax.tree.map(fill, cache)}


@pytest.mark.parametrize("batch", [(), (2, 1)], ids=str)
def test_decoding_equals_the_causal_pass(batch):
  layer, x = Everything(), normal(0, *batch, 10, 12)
  variables = checkpoint(layer, x)
  full = apply(layer, variables, x, is_causal=True)
  decoder, variables = with_cache(layer, variables, (*batch, 12, 12))
  prefill, new = jax.jit(functools.partial(decoder.apply, mutable="cache"))(variables, x[..., :4, :])

  def step(cache, token):
    out, new = decoder.apply(variables | {"cache": cache}, token[..., None, :], mutable="cache")
    return new["cache"], out[..., 0, :]

  scan = jax.jit(lambda cache, tokens: jax.lax.scan(step, cache, tokens))
  cache, out = scan(new["cache"], jnp.moveaxis(x[..., 4:, :], -2, 0))
  close(jnp.concatenate([prefill, jnp.moveaxis(out, 0, -2)], -2), full)
  assert cache["cache_index"] == 10


def test_prompts_of_different_lengths():
  layer, x, lengths = Everything(), normal(0, 3, 7, 12), jnp.array([5, 1, 3])
  variables = checkpoint(layer, x)
  full = apply(layer, variables, x, is_causal=True)
  decoder, variables = with_cache(layer, variables, (3, 7, 12))
  step = jax.jit(functools.partial(decoder.apply, mutable="cache"))
  rows = jnp.broadcast_to(jnp.arange(5), (3, 5))
  prefill, new = step(variables, x[:, :5], positions=jnp.where(rows < lengths[:, None], rows, -1))
  for i in range(2):
    out, new = step(variables | new, jnp.take_along_axis(x, (lengths + i)[:, None, None], 1),
                    positions=(lengths + i)[:, None])
    close(out, jnp.take_along_axis(full, (lengths + i)[:, None, None], 1))
  close(prefill[1, :1], full[1, :1])


def test_init_leaves_the_cache_empty():
  variables = jax.jit(Ours(decode=True).init)(jax.random.key(0), normal(0, 2, 7, 12))
  assert variables["cache"]["cached_key"].shape == variables["cache"]["cached_value"].shape == (2, 7, 4, 3)
  assert not any(jnp.any(x) for x in jax.tree.leaves(variables["cache"]))


def test_an_overflow_that_jit_hides_gives_nan():
  x = normal(0, 2, 4, 12)
  decoder, variables = with_cache(Ours(), checkpoint(Ours(), x), (2, 5, 12))
  step = jax.jit(functools.partial(decoder.apply, mutable="cache"))
  out, new = step(variables, x)
  assert jnp.all(jnp.isfinite(out))
  assert jnp.all(jnp.isnan(step(variables | new, x)[0]))


# The function for Flax's own layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"normalize_qk": True, "force_fp32_for_softmax": True}], ids=["plain", "more"])
def test_attention_fn_in_flax_layer(config):
  moved = Flax(attention_fn=jflash.linen.attention_fn, **config)
  same_outputs_and_gradients(Flax(**config), moved, normal(0, 2, 7, 12), mask=flax_masks()["both"])


def test_attention_fn_in_flax_decoding():
  x = normal(0, 2, 5, 12)
  variables = checkpoint(Flax(), x)
  full = apply(Flax(), variables, x, mask=nn.make_causal_mask(x[..., 0]))
  decoder, variables = with_cache(Flax(attention_fn=jflash.linen.attention_fn), variables, (2, 6, 12))
  step = jax.jit(functools.partial(decoder.apply, mutable="cache"))
  for i in range(5):
    out, new = step(variables, x[:, i:i + 1])
    variables |= new
    close(out, full[:, i:i + 1])


def test_attention_fn_bias_dtype_and_batch_dims():
  q, k, v = normal(0, 3, 2, 3, 5, 4, 8)
  bias = normal(1, 1, 3, 4, 5, 5)
  close(jflash.linen.attention_fn(q, k, v, bias), nn.dot_product_attention(q, k, v, bias))
  assert jflash.linen.attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_attention_fn_with_dropout_switched_off():
  x = normal(0, 2, 7, 12)
  flax, moved = (Flax(dropout_rate=0.5, **more) for more in ({}, {"attention_fn": jflash.linen.attention_fn}))
  variables = checkpoint(flax, x)
  close(apply(moved, variables, x), apply(flax, variables, x))


@pytest.mark.parametrize("config, keywords, message", [
    ({}, {"sow_weights": True}, "sow_weights=False"),
    ({"precision": "highest"}, {}, "precision=None"),
    ({"qk_attn_weights_einsum_cls": lambda: jnp.einsum}, {}, "qk_attn_weights_einsum_cls"),
    ({"attn_weights_value_einsum_cls": lambda: jnp.einsum}, {}, "attn_weights_value_einsum_cls"),
])
def test_attention_fn_refuses_what_it_cannot_do(config, keywords, message):
  layer = Flax(attention_fn=jflash.linen.attention_fn, **config)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(functools.partial(layer.init, **keywords), jax.random.key(0), normal(0, 2, 7, 12))


def test_attention_fn_refuses_a_dot_general():
  with pytest.raises(NotImplementedError, match="einsum_dot_general None"):
    jflash.linen.attention_fn(*normal(0, 3, 1, 5, 2, 4), einsum_dot_general=jax.lax.dot_general)


# Errors --------------------------------------------------------------------------------------------------------------


X, Y = jnp.ones((2, 5, 12)), jnp.ones((2, 6, 12))


@pytest.mark.parametrize("config, inputs, keywords, message", [
    ({"qkv_features": 10}, (X,), {}, "`qkv_features` is 10 and `num_heads` is 4"),
    ({"num_kv_heads": 3}, (X,), {}, "`num_heads` is 4 and `num_kv_heads` is 3"),
    ({}, (X, None, X), {}, "`inputs_k` is None and `inputs_v` is not"),
    ({}, (X, Y, X), {}, "keys and values the same length"),
    ({}, (X,), {"mask": jnp.ones((2, 1, 5, 6))}, r"`mask` has shape \(2, 1, 5, 6\) and the scores"),
    ({}, (X,), {"positions": jnp.arange(4)}, r"`positions` is int32 \(4,\)"),
    ({}, (X, Y), {"segment_ids": jnp.arange(5)}, "pass a pair `segment_ids="),
    ({"decode": True}, (X, Y), {}, "`decode` caches the keys of `inputs_q` itself"),
])
def test_errors(config, inputs, keywords, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(Ours(**config).init, **keywords), jax.random.key(0), *inputs)


def test_cache_errors():
  variables = checkpoint(Ours(), X)
  with pytest.raises(ValueError, match="there is no 'cache' collection"):
    Ours(decode=True).apply(variables, X, mutable="cache")
  decoder, variables = with_cache(Ours(), variables, (2, 8, 12))
  step = functools.partial(decoder.apply, mutable="cache")
  with pytest.raises(ValueError, match="one document per sequence"):
    step(variables, X, segment_ids=jnp.arange(5))
  with pytest.raises(ValueError, match="make the cache for this batch size"):
    step(variables, X[:1])
  with pytest.raises(ValueError, match="has 8 slots and the call brings 10 tokens in one call"):
    jax.eval_shape(step, variables, jnp.ones((2, 10, 12)))
  with pytest.raises(ValueError, match="has 8 slots and the call brings a token at position 8"):
    step(variables, X, positions=jnp.arange(4, 9))
