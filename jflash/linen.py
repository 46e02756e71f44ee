"""Attention for Flax Linen: a layer, and a function to hand to Flax's own layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import _api, _drop_in, _multihead
from ._cache import Cache
from ._rotary import Rotary

__all__ = ["MultiHeadAttention", "Rotary", "attention_fn"]


class MultiHeadAttention(nn.Module):
  """Multi-head attention: `out = softmax(Q Kᵀ / √H) V` per head, between four linear layers.

  The parameters are those of `flax.linen.MultiHeadDotProductAttention`, by name and shape, so its checkpoints load
  unchanged: `query/kernel [D, N, H]`, `key/kernel` and `value/kernel [D, K, H]`, `out/kernel [N, H, D]`, their biases,
  and `query_ln/scale`, `key_ln/scale [H]`.

  Attributes:
    num_heads: N, the number of query heads.
    qkv_features: N · H, the width of all query heads together; default the width of `inputs_q`.
    out_features: the width of the output; default the width of `inputs_q`.
    num_kv_heads: K, the number of key and value heads, a divisor of N; default N.
    dtype: of the computation; default that of inputs and parameters.
    param_dtype: of the parameters; default float32.
    kernel_init: initialises the four kernels; default LeCun normal.
    bias_init: initialises the four biases; default zeros.
    use_bias: whether the four linear layers have a bias; default True.
    normalize_qk: True normalises each query and key head as Flax does (LayerNorm without bias); another norm is
      passed by its class, such as `nn.RMSNorm`. Default False.
    rotary: turns queries and keys: `Rotary(...)`, or any function `(x [batch..., T, N, H], positions) -> x`.
      Default None.
    attention: what attends; options of `jflash.attention` are bound to it, as in
      `functools.partial(jflash.attention, local_window_size=(1023, 0), logits_soft_cap=50.0)`.
    decode: whether calls append to the 'cache' collection and attend over it; default False. `init` with inputs
      `[batch..., capacity, D]` makes that collection.
    dropout_rate: share of the attention weights that are dropped, a number 0 <= rate < 1; the rest is divided by
      1 - rate. Every batch element and every head drops weights of its own. Default 0.
    deterministic: whether dropout is off. If `dropout_rate` is not 0, it is said either here or in each call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jflash.linen import MultiHeadAttention, Rotary
    >>> layer = MultiHeadAttention(num_heads=8, num_kv_heads=2, rotary=Rotary(), dtype=jnp.bfloat16)
    >>> x = jnp.ones((4, 10, 64))
    >>> layer.apply(layer.init(jax.random.key(0), x), x, is_causal=True).shape
    (4, 10, 64)
  """

  num_heads: int
  qkv_features: int | None = None
  out_features: int | None = None
  num_kv_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable[..., Any] = nn.linear.default_kernel_init
  bias_init: Callable[..., Any] = nn.initializers.zeros_init()
  use_bias: bool = True
  normalize_qk: bool | Callable[..., Any] = False
  rotary: Callable[..., jax.Array] | None = None
  attention: Callable[..., Any] = _api.attention
  decode: bool = False
  dropout_rate: float = 0.0
  deterministic: bool | None = None

  @nn.compact
  def __call__(self, inputs_q: jax.Array, inputs_k: jax.Array | None = None, inputs_v: jax.Array | None = None, *,
               mask: Any = None, positions: Any = None, segment_ids: Any = None, is_causal: bool = False,
               deterministic: bool | None = None, dropout_rng: jax.Array | None = None) -> jax.Array:
    """Attends from `inputs_q` to `inputs_k`.

    Args:
      inputs_q: `[batch..., T, D]`, with any number of batch dims.
      inputs_k: `[batch..., S, ...]`; default `inputs_q`. inputs_v: the same; default `inputs_k`.
      mask: broadcasts to `[batch..., N, T, S]`, of any type; True or non-zero may be seen. While decoding S is the
        capacity of the cache. A mask object that `attention` understands is handed on.
      positions: int `[batch..., T]` or `[T]`, for `rotary`, `is_causal` and windows; default 0, 1, 2, … In
        cross-attention a pair `(of_queries, of_keys)`. While decoding also the slots of the cache: default behind
        what it holds, and -1 is padding, which is not kept.
      segment_ids: int `[batch..., T]` or `[T]`, or a pair; tokens see only those of their own segment.
      is_causal: a query sees keys at its own position and before. While decoding always so.
      deterministic: True switches dropout off, False on; default the attribute, but True while decoding.
      dropout_rng: the key of this call's dropout; default `make_rng('dropout')`.

    Returns:
      `[batch..., T, out_features]`. A query that may see nothing attends to nothing: its head outputs are 0. If jit
      hides that a sequence overflows the cache, its out is NaN.

    Raises:
      ValueError: shapes, sizes or types do not fit, the cache is missing, full or of another batch size, or
        `deterministic` is said twice, or not at all and `dropout_rate` is not 0.
      flax.errors.InvalidRngError: dropout is on and there is neither `dropout_rng` nor a 'dropout' rng.
    """
    q, k, v = _multihead.inputs(inputs_q, inputs_k, inputs_v, decode=self.decode)
    num_kv_heads = self.num_kv_heads or self.num_heads
    head_dim = _multihead.head_dim(self.qkv_features or q.shape[-1], self.num_heads, num_kv_heads)
    dropout_key = self._dropout_key(deterministic, dropout_rng)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dense = functools.partial(nn.DenseGeneral, kernel_init=self.kernel_init, bias_init=self.bias_init,
                              use_bias=self.use_bias, **dtypes)
    query = dense((self.num_heads, head_dim), name="query")(q)  # [batch..., T, N, H]
    key = dense((num_kv_heads, head_dim), name="key")(k)  # [batch..., S, K, H]
    value = dense((num_kv_heads, head_dim), name="value")(v)  # [batch..., S, K, H]
    norm = functools.partial(nn.LayerNorm, use_bias=False) if self.normalize_qk is True else self.normalize_qk
    if norm:
      query, key = norm(name="query_ln", **dtypes)(query), norm(name="key_ln", **dtypes)(key)
    cached = self._cached(key) if self.decode else []
    out, cache = _multihead.attend(
        _multihead.dropping(self.attention, self.dropout_rate, dropout_key), query, key, value, rotary=self.rotary,
        mask=mask, is_causal=is_causal,
        cache=Cache(*(x.value for x in cached)) if cached and not self.is_initializing() else None,
        positions=_multihead.sides("positions", positions, q, k),
        segment_ids=_multihead.sides("segment_ids", segment_ids, q, k))
    if cache is not None:
      for variable, new in zip(cached, cache):
        variable.value = new
    return dense(self.out_features or q.shape[-1], axis=(-2, -1), name="out")(out)

  def _dropout_key(self, deterministic, dropout_rng):
    """The key of a call's dropout, or None where nothing is dropped."""
    if self.dropout_rate == 0:
      return None
    if not self.decode:
      deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
    if deterministic is None or deterministic:
      return None
    return self.make_rng("dropout") if dropout_rng is None else dropout_rng

  def _cached(self, key):
    """The three variables of the cache, made by `init` with as many slots as `key` `[batch..., S, K, H]` is long."""
    if not self.is_initializing() and not self.has_variable("cache", "cached_key"):
      raise ValueError("`decode` is on and there is no 'cache' collection; make one with "
                       "`init(rng, inputs of shape [batch, capacity, features])` and pass it to `apply`.")
    names = "cached_key", "cached_value", "cache_index"
    empty = lambda i: Cache.empty(key.shape, key.dtype)[i]
    return [self.variable("cache", name, empty, i) for i, name in enumerate(names)]


def attention_fn(query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0,
                 deterministic=False, dtype=None, precision=None, module=None, force_fp32_for_softmax=False,
                 einsum_dot_general=None, qk_attn_weights_einsum=None, attn_weights_value_einsum=None):
  """`jflash.attention` with the interface of `flax.linen.dot_product_attention`.

  It moves a model and its checkpoint over:
  `nn.MultiHeadDotProductAttention(..., attention_fn=jflash.linen.attention_fn)`.

  Args:
    query: `[batch..., T, N, H]`. key: `[batch..., S, K, H]`. value: `[batch..., S, K, E]`; N is a multiple of K.
    bias, mask: broadcast to `[batch..., N, T, S]`; a mask of any type, non-zero may be seen.
    broadcast_dropout: accepted and ignored. Every batch element and head drops weights of its own, as with False; True,
      Flax's default, would share one mask among them. A single weight's chance to be dropped is the same.
    dropout_rng: a key from `jax.random.key` or `jax.random.PRNGKey`.
    dropout_rate: share of the weights that are dropped, a number 0 <= rate < 1; the rest is divided by 1 - rate.
    deterministic: True switches dropout off.
    dtype: of the computation; default that of the inputs. Scores and sums are float32 at least.
    force_fp32_for_softmax: always so.
    precision, module, einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: must be None.

  Returns:
    `[batch..., T, N, E]`; a query that may see nothing gives 0, where Flax gives the mean of the values.

  Raises:
    ValueError: dropout is on and `dropout_rng` is None, or shapes do not fit.
    NotImplementedError: an option that it cannot honour.

  Example:
    >>> from flax import linen as nn
    >>> import jflash.linen
    >>> layer = nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=jflash.linen.attention_fn)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((4, 10, 64)))[0].shape
    (4, 10, 64)
  """
  del broadcast_dropout, force_fp32_for_softmax
  _drop_in.refuse(precision=precision, module=module, einsum_dot_general=einsum_dot_general,
                  qk_attn_weights_einsum=qk_attn_weights_einsum, attn_weights_value_einsum=attn_weights_value_einsum)
  attend = _drop_in.dropping(dropout_rate, dropout_rng, deterministic)
  return _drop_in.attention(attend, query, key, value, bias, mask, dtype=dtype)
