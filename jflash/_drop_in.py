"""`jflash.attention` in the place of Flax's own attention function."""

from . import _api, _multihead

_FIXES = {
    "dropout": "dropout on attention weights is not computed; build the layer with dropout_rate=0, or call it with "
               "deterministic=True.",
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


def attention(query, key, value, bias, mask, *, dtype, is_causal=False):
  """Casts to `dtype` and attends over any batch dims; see `jflash.nnx.attention_fn`."""
  if dtype is not None:
    query, key, value = (x.astype(dtype) for x in (query, key, value))
  return _multihead.flat_attention(_api.attention, query, key, value, mask=mask, bias=bias, is_causal=is_causal)
