"""`jflash.attention` in the place of Flax's own attention function."""

from . import _api, _multihead

_FIXES = {
    "precision": "`precision` would be ignored: scores and sums are always float32 or better; build the layer with "
                 "precision=None.",
    "module": "the attention weights are never formed, so they cannot be sown; call the layer with sow_weights=False, "
              "or use Flax's own dot_product_attention to look at them.",
    "input_positions": "`input_positions` are for rotary embedding, which is not in this function; use "
                       "jflash.nnx.MultiHeadAttention(rotary=jflash.nnx.Rotary(), ...) and its `positions`.",
    "qk_attn_weights_einsum": "a custom einsum has no place in tiled attention; leave qk_attn_weights_einsum_cls None.",
    "attn_weights_value_einsum": "a custom einsum has no place in tiled attention; leave attn_weights_value_einsum_cls "
                                 "None.",
    "einsum_dot_general": "a custom dot_general has no place in tiled attention; leave einsum_dot_general None.",
}


def refuse(**options):
  """Raises NotImplementedError for the first option that is neither None nor False."""
  for name, option in options.items():
    if option is not None and option is not False:
      raise NotImplementedError(f"jflash's attention_fn: {_FIXES[name]}")


def dropping(rate, rng, deterministic):
  """`jflash.attention` with the dropout that Flax's three arguments ask for."""
  if deterministic or rate == 0:
    return _api.attention
  if rng is None:
    raise ValueError(f"`dropout_rate` is {rate} and `dropout_rng` is None; pass dropout_rng=jax.random.key(seed), another one "
                     "at every step, or switch dropout off by deterministic=True.")
  return _multihead.dropping(_api.attention, rate, rng)


def attention(attend, query, key, value, bias, mask, *, dtype, is_causal=False):
  """Casts to `dtype` and attends over any batch dims; see `jflash.nnx.attention_fn`."""
  if dtype is not None:
    query, key, value = (x.astype(dtype) for x in (query, key, value))
  return _multihead.flat_attention(attend, query, key, value, mask=mask, bias=bias, is_causal=is_causal)
