"""The nnx layer and attention function against Flax's own, with the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jflash
import jflash.nnx
from jflash.nnx import MultiHeadAttention, Rotary

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
normal = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
zeros = nnx.initializers.zeros  # `randomized` fills every parameter, and NumPy is quicker than compiling initialisers
WINDOWED = functools.partial(jflash.attention, local_window_size=(2, 0), logits_soft_cap=3.0)


def randomized(layer):
  """`layer` with every parameter random: fresh biases are 0 and scales 1, which would hide a mistake."""
  leaves, tree = jax.tree.flatten(nnx.state(layer, nnx.Param))
  nnx.update(layer, jax.tree.unflatten(tree, [0.5 * normal(i, *x.shape) for i, x in enumerate(leaves)]))
  return layer


@nnx.jit(static_argnames=("is_causal", "decode", "deterministic"))
def call(layer, *inputs, **keywords):
  """`layer(*inputs, **keywords)`, compiled as one program; a cache is updated in place."""
  return layer(*inputs, **keywords)


def pair(num_heads=4, in_features=12, **config):
  """Flax's layer and ours with Flax's parameters."""
  config |= {"kernel_init": zeros, "rngs": nnx.Rngs(0)}
  flax = randomized(nnx.MultiHeadAttention(num_heads, in_features, **config, decode=False))
  ours = MultiHeadAttention(num_heads, in_features, **config)
  load(ours, flax)
  return flax, ours


def load(layer, checkpoint):
  shapes = lambda x: jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(x)))
  assert shapes(layer) == shapes(checkpoint)
  nnx.update(layer, nnx.state(checkpoint))


def same_outputs_and_gradients(flax, ours, *inputs, **keywords):
  def everything(layer):
    graph, params = nnx.split(layer)

    def loss(params, inputs):
      out = nnx.merge(graph, params)(*inputs, **keywords)
      return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, inputs)
    return out, nnx.to_pure_dict(gradients[0]), gradients[1]

  jax.tree.map(close, everything(ours), everything(flax))


@pytest.mark.parametrize("config, is_causal", [
    ({}, False),
    ({"num_kv_heads": 2, "normalize_qk": True}, True),
    ({"qkv_features": 8, "out_features": 5, "use_bias": False}, False),
], ids=["plain", "grouped and normalised", "widths and no bias"])
def test_takes_over_a_checkpoint(config, is_causal):
  same_outputs_and_gradients(*pair(**config), normal(0, 2, 7, 12), is_causal=is_causal)


def test_cross_attention():
  flax, ours = pair(num_kv_heads=2, in_kv_features=6)
  same_outputs_and_gradients(flax, ours, normal(0, 2, 7, 12), normal(1, 2, 5, 6), normal(2, 2, 5, 6))


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_batch_dims(batch):
  flax, ours = pair()
  x = normal(0, *batch, 5, 12)
  ids = jnp.asarray(np.random.default_rng(1).integers(2, size=(*batch, 5)))
  mask = ids[..., None, :, None] == ids[..., None, None, :]
  by_rows = call(flax, x.reshape(-1, 5, 12), mask=mask.reshape(-1, 1, 5, 5)).reshape(x.shape)
  close(call(ours, x, mask=mask), by_rows)
  close(call(ours, x, segment_ids=ids), by_rows)
  first = (0,) * len(batch)
  close(call(ours, x, mask=mask[first])[first], by_rows[first])
  close(call(ours, x, segment_ids=ids[first])[first], by_rows[first])


def flax_masks(lengths=(7, 4)):
  tokens = jnp.arange(7) < jnp.array(lengths)[:, None]
  causal = nnx.make_causal_mask(tokens)
  padding = nnx.make_attention_mask(jnp.ones_like(tokens), tokens)
  return {"causal": causal, "padding": padding, "both": nnx.combine_masks(causal, padding)}


def test_masks_made_by_flax():
  flax, ours = pair()
  x = normal(0, 2, 7, 12)
  for mask in flax_masks().values():
    assert mask.dtype == jnp.float32
    close(call(ours, x, mask=mask), call(flax, x, mask=mask))
  same_outputs_and_gradients(flax, ours, x, mask=mask)


def test_bfloat16_with_float32_parameters():
  flax, ours = pair(dtype=jnp.bfloat16)
  exact, _ = pair()
  x = normal(0, 2, 7, 12)
  out = call(ours, x)
  assert out.dtype == jnp.bfloat16 and ours.query.kernel[...].dtype == jnp.float32
  error = lambda y: np.abs(y.astype(jnp.float32) - exact(x)).max()
  assert error(out) <= 2 * error(flax(x))


def test_param_dtype_and_initialisers():
  layer = MultiHeadAttention(2, 8, param_dtype=jnp.bfloat16, normalize_qk=nnx.RMSNorm, rngs=nnx.Rngs(0),
                             kernel_init=nnx.initializers.ones, bias_init=nnx.initializers.constant(3.0))
  assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.bfloat16.dtype}
  assert jnp.all(layer.out.kernel[...] == 1) and jnp.all(layer.query.bias[...] == 3)
  assert isinstance(layer.key_ln, nnx.RMSNorm)


def test_norm_given_by_its_class():
  layer = randomized(MultiHeadAttention(2, 8, normalize_qk=nnx.RMSNorm, rngs=nnx.Rngs(0)))
  x = normal(0, 1, 5, 8)
  unit = lambda y: y / np.sqrt(np.mean(np.square(y), -1, keepdims=True) + 1e-6)
  q = unit(np.asarray(layer.query(x))) * layer.query_ln.scale[...]
  k = unit(np.asarray(layer.key(x))) * layer.key_ln.scale[...]
  close(layer(x), layer.out(jflash.attention(q, k, layer.value(x))))


def model(attention=WINDOWED, **config):
  """Everything at once: grouped heads, rotary, norm, window, soft cap."""
  return randomized(MultiHeadAttention(4, 12, qkv_features=16, num_kv_heads=2, rotary=Rotary(), normalize_qk=True,
                                       attention=attention, kernel_init=zeros, rngs=nnx.Rngs(0), **config))


def test_packed_documents_equal_separate_ones():
  layer, x = model(), normal(0, 1, 9, 12)
  ids, positions = jnp.array([[5] * 4 + [2] * 5]), jnp.array([[*range(4), *range(5)]])
  packed = call(layer, x, segment_ids=ids, positions=positions, is_causal=True)
  close(packed, jnp.concatenate([call(layer, x[:, :4], is_causal=True), call(layer, x[:, 4:], is_causal=True)], 1))
  close(call(layer, x, segment_ids=ids, is_causal=True), packed)  # only distances matter


def test_cross_attention_takes_pairs():
  layer, x = model(), normal(0, 1, 9, 12)
  ids, positions = jnp.array([0] * 4 + [1] * 5), jnp.arange(9) + 3
  expected = call(layer, x, segment_ids=ids, positions=positions, is_causal=True)
  order = jnp.array([4, 2, 0, 8, 6, 7, 5, 3, 1])  # keys may come in any order, if they bring what belongs to them
  mixed = call(layer, x, x[:, order], segment_ids=(ids, ids[order]), positions=(positions, positions[order]),
               is_causal=True)
  close(mixed, expected)


def test_rotary_and_window_follow_their_positions():
  layer, x = model(), normal(0, 2, 6, 12)
  distance = np.arange(6)[:, None] - np.arange(6)

  @nnx.jit
  def by_hand(layer, x):
    q, k, v = layer.query_ln(layer.query(x)), layer.key_ln(layer.key(x)), layer.value(x)
    return layer.out(jflash.attention(Rotary()(q, jnp.arange(6)), Rotary()(k, jnp.arange(6)), v, logits_soft_cap=3.0,
                                      mask=jnp.asarray((distance >= 0) & (distance <= 2))[None, None]))

  close(call(layer, x, is_causal=True), by_hand(layer, x))


def test_a_mask_object_is_handed_on():
  seen = []
  attention = lambda q, k, v, mask: (seen.append(mask), q)[1]
  MultiHeadAttention(2, 8, attention=attention, rngs=nnx.Rngs(0))(normal(0, 1, 5, 8), mask="a mask object")
  assert seen == ["a mask object"]


# Decoding ------------------------------------------------------------------------------------------------------------


def poisoned(layer, batch, capacity):
  """`layer` with a cache whose slots hold NaN, or numbers that would be noticed where attention lets NaN through."""
  q = jnp.ones((1, 2, 1, 1))
  keeps_nan_out = jnp.all(jnp.isfinite(jflash.attention(q, q, q.at[0, 1].set(jnp.nan), is_causal=True)[0, 0]))
  layer.init_cache((*batch, capacity, 12))
  layer.cached_key[...] = jnp.full_like(layer.cached_key[...], jnp.nan)
  layer.cached_value[...] = jnp.full_like(layer.cached_key[...], jnp.nan if keeps_nan_out else 1e30)
  return layer


@pytest.mark.parametrize("batch, attention", [((2,), jflash.attention), ((), WINDOWED), ((2, 1), WINDOWED)])
def test_decoding_equals_the_causal_pass(batch, attention):
  layer, x = model(attention), normal(0, *batch, 10, 12)
  full = call(layer, x, is_causal=True)
  poisoned(layer, batch, 12)
  prefill = call(layer, x[..., :4, :], decode=True)
  tokens = [call(layer, x[..., i:i + 1, :], decode=True) for i in range(4, 10)]
  close(jnp.concatenate([prefill, *tokens], -2), full)
  assert layer.cache_index[...] == 10


def test_decoding_inside_scan():
  layer, x = model(), normal(0, 2, 8, 12)
  full = call(layer, x, is_causal=True)
  graph, cache, rest = nnx.split(poisoned(layer, (2,), 8), nnx.Cache, ...)

  def step(cache, token):
    layer = nnx.merge(graph, cache, rest)
    out = layer(token[:, None], decode=True)
    return nnx.state(layer, nnx.Cache), out[:, 0]

  cache, out = jax.jit(lambda cache, x: jax.lax.scan(step, cache, x))(cache, x.swapaxes(0, 1))
  close(out.swapaxes(0, 1), full)


def test_prompts_of_different_lengths():
  layer, x, lengths = model(), normal(0, 3, 9, 12), jnp.array([5, 1, 3])
  full = call(layer, x, is_causal=True)
  poisoned(layer, (3,), 9)
  rows = jnp.broadcast_to(jnp.arange(5), (3, 5))
  prompts = jnp.where((rows < lengths[:, None])[..., None], x[:, :5], 99.0)  # what pads a prompt does not matter
  prefill = call(layer, prompts, positions=jnp.where(rows < lengths[:, None], rows, -1), decode=True)
  for i, length in enumerate(lengths):
    close(prefill[i, :length], full[i, :length])
  for i in range(4):
    token = jnp.take_along_axis(x, (lengths + i)[:, None, None], 1)
    expected = jnp.take_along_axis(full, (lengths + i)[:, None, None], 1)
    close(call(layer, token, positions=(lengths + i)[:, None], decode=True), expected)


def test_padding_is_not_kept():
  layer = poisoned(MultiHeadAttention(4, 12, kernel_init=zeros, rngs=nnx.Rngs(0)), (2,), 3)
  call(layer, normal(0, 2, 2, 12), positions=jnp.array([[-1, 2], [0, -1]]), decode=True)
  written = jnp.isfinite(layer.cached_key[...]).all((-1, -2))
  np.testing.assert_array_equal(written, [[False, False, True], [True, False, False]])
  assert layer.cache_index[...] == 3


def test_a_mask_while_decoding_covers_the_cache():
  layer, x = model(jflash.attention), normal(0, 2, 6, 12)
  hidden = jnp.array([1.0, 0, 1, 1, 1, 1, 1, 1])[None, None, None]
  expected = call(layer, x, is_causal=True, mask=hidden[..., :6])
  poisoned(layer, (2,), 8)
  close(layer(x, decode=True, mask=hidden), expected)


def test_an_overflow_that_jit_hides_gives_nan():
  layer, x = poisoned(model(), (2,), 5), normal(0, 2, 4, 12)
  step = functools.partial(call, layer, decode=True)
  assert jnp.all(jnp.isfinite(step(x)))
  assert jnp.all(jnp.isfinite(step(x[:, :1])))
  assert jnp.all(jnp.isnan(step(x[:, :1])))
  out = step(x[:, :1], positions=jnp.array([[4], [5]]))
  assert jnp.all(jnp.isfinite(out[0])) and jnp.all(jnp.isnan(out[1]))


@pytest.mark.parametrize("config, given, expected", [
    ({}, None, jnp.float32), ({"dtype": jnp.bfloat16}, None, jnp.bfloat16),
    ({"param_dtype": jnp.float16}, None, jnp.float16), ({}, jnp.bfloat16, jnp.bfloat16),
])
def test_cache_dtype(config, given, expected):
  layer, x = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), **config), normal(0, 1, 2, 8)
  layer.init_cache((1, 4, 8), given)
  out, causal = (call(layer, x, is_causal=True, decode=decode).astype(jnp.float32) for decode in (True, False))
  assert layer.cached_key[...].dtype == layer.cached_value[...].dtype == expected
  np.testing.assert_allclose(out, causal, atol=0.02)


def test_view_switches_decoding_on():
  class Model(nnx.Module):
    def __init__(self):
      self.attention = model()

    def __call__(self, x):
      return self.attention(x)

  outer, x = Model(), normal(0, 2, 3, 12)
  full = call(outer.attention, x, is_causal=True)
  decoder = nnx.view(outer, decode=True, batch_size=2, max_length=4)
  close(jnp.concatenate([call(decoder, x[:, i:i + 1]) for i in range(3)], 1), full)
  assert outer.attention.decode is False and outer.attention.cached_key is None
  with pytest.raises(ValueError, match="`batch_size` is 2 and `max_length` is None"):
    nnx.view(outer, decode=True, batch_size=2)


# The function for Flax's own layer -----------------------------------------------------------------------------------


def moved(num_heads=4, in_features=12, **config):
  """Flax's layer as it is, and with our function."""
  make = functools.partial(nnx.MultiHeadAttention, num_heads, in_features, decode=False, rngs=nnx.Rngs(0),
                           kernel_init=zeros, **config)
  flax, ours = randomized(make()), make(attention_fn=jflash.nnx.attention_fn)
  load(ours, flax)
  return flax, ours


@pytest.mark.parametrize("config, mask", [({"num_kv_heads": 2, "normalize_qk": True}, "both"), ({}, None)])
def test_attention_fn_in_flax_layer(config, mask):
  keywords = {"mask": flax_masks()[mask]} if mask else {"is_causal": True}
  same_outputs_and_gradients(*moved(**config), normal(0, 2, 7, 12), **keywords)


def test_attention_fn_in_flax_decoding():
  flax, ours = moved(num_kv_heads=2)
  x = normal(0, 2, 5, 12)
  full = call(flax, x, is_causal=True)
  ours.init_cache((2, 6, 12))
  close(jnp.concatenate([call(ours, x[:, i:i + 1], decode=True) for i in range(5)], 1), full)


def test_attention_fn_bias_dtype_and_batch_dims():
  q, k, v = normal(0, 3, 2, 3, 5, 4, 8)
  bias = normal(1, 2, 3, 4, 5, 5)
  each = jax.vmap(jax.vmap(lambda *x: nnx.dot_product_attention(*x[:3], bias=x[3])))
  close(jflash.nnx.attention_fn(q, k, v, bias), each(q, k, v, bias))
  assert jflash.nnx.attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_attention_fn_with_dropout_switched_off():
  flax, ours = moved(dropout_rate=0.5)
  x = normal(0, 2, 7, 12)
  close(call(ours, x, deterministic=True), call(flax, x, deterministic=True))


def test_attention_fn_refuses_what_it_cannot_do():
  x = normal(0, 2, 7, 12)
  with pytest.raises(NotImplementedError, match="sow_weights=False"):
    moved()[1](x, sow_weights=True)
  with pytest.raises(NotImplementedError, match="precision=None"):
    moved(precision="highest")[1](x)
  with pytest.raises(NotImplementedError, match="input_positions"):
    jflash.nnx.attention_fn(*normal(0, 3, 1, 5, 2, 4), input_positions=jnp.arange(5))


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, message", [
    ({"qkv_features": 10}, "`qkv_features` is 10 and `num_heads` is 4"),
    ({"num_kv_heads": 3}, "`num_heads` is 4 and `num_kv_heads` is 3"),
])
def test_constructor_errors(config, message):
  with pytest.raises(ValueError, match=message):
    MultiHeadAttention(4, 12, rngs=nnx.Rngs(0), **config)


X, Y = jnp.ones((2, 5, 12)), jnp.ones((2, 6, 12))
ids = lambda *shape: jnp.zeros(shape, jnp.int32)


@pytest.mark.parametrize("inputs, keywords, message", [
    ((X, None, X), {}, "`inputs_k` is None and `inputs_v` is not"),
    ((X[..., :7],), {}, "`inputs_q` has 7 features and the layer was made for 12"),
    ((X, X[..., :7]), {}, "`inputs_k` has 7 features and the layer was made for 12; set `in_kv_features` to 7"),
    ((X, Y, X), {}, "keys and values the same length"),
    ((X, Y[:1]), {}, "the same batch dims"),
    ((X,), {"mask": jnp.ones((2, 1, 5, 6))}, r"`mask` has shape \(2, 1, 5, 6\) and the scores .* \(2, 4, 5, 5\)"),
    ((X,), {"positions": ids(4)}, r"`positions` is int32 \(4,\) and its input has shape \(2, 5, 12\)"),
    ((X,), {"positions": jnp.ones(5)}, r"`positions` is float32 .* pass integers"),
    ((X,), {"segment_ids": ids(1, 5)}, r"`segment_ids` is int32 \(1, 5\)"),
    ((X, Y), {"segment_ids": ids(5)}, "pass a pair `segment_ids="),
    ((X, Y), {"segment_ids": (ids(5), None)}, "`segment_ids` is a tuple of 2 and must be a pair of arrays"),
    ((X, Y), {"decode": True}, "`decode` caches the keys of `inputs_q` itself"),
    ((X,), {"decode": True}, "call `init_cache"),
])
def test_call_errors(inputs, keywords, message):
  with pytest.raises(ValueError, match=message):
    call(MultiHeadAttention(4, 12, kernel_init=zeros, rngs=nnx.Rngs(0)), *inputs, **keywords)


def test_cache_errors():
  layer = MultiHeadAttention(4, 12, kernel_init=zeros, rngs=nnx.Rngs(0))
  layer.init_cache((2, 8, 12))
  with pytest.raises(ValueError, match="one document per sequence"):
    layer(X, segment_ids=ids(5), decode=True)
  with pytest.raises(ValueError, match="make the cache for this batch size"):
    layer(X[:1], decode=True)
  with pytest.raises(ValueError, match="has 8 slots and the call brings 10 tokens in one call"):
    call(layer, jnp.ones((2, 10, 12)), decode=True)
  with pytest.raises(ValueError, match="has 8 slots and the call brings a token at position 8"):
    layer(X[:, :1], positions=ids(1) + 8, decode=True)
  layer(X, decode=True)
  with pytest.raises(ValueError, match="has 8 slots and the call brings a token at position 9"):
    layer(X, decode=True)
