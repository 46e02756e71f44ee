"""Attention for Flax NNX: a layer, and a function to hand to Flax's own layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from . import _api, _drop_in, _multihead
from ._cache import Cache
from ._rotary import Rotary

__all__ = ["MultiHeadAttention", "Rotary", "attention_fn"]


class MultiHeadAttention(nnx.Module):
  """Multi-head attention: `out = softmax(Q Kᵀ / √H) V` per head, between four linear layers.

  The parameters are those of `flax.nnx.MultiHeadAttention`, by name and shape, so its checkpoints load unchanged:
  `query.kernel [D, N, H]`, `key.kernel` and `value.kernel [D, K, H]`, `out.kernel [N, H, D]`, their biases, and
  `query_ln.scale`, `key_ln.scale [H]`.

  Args:
    num_heads: N, the number of query heads.
    in_features: D, the width of the inputs.
    qkv_features: N · H, the width of all query heads together; default `in_features`.
    out_features: the width of the output; default `in_features`.
    num_kv_heads: K, the number of key and value heads, a divisor of N; default N.
    in_kv_features: the width of `inputs_k` and `inputs_v` in cross-attention; default `in_features`.
    normalize_qk: True normalises each query and key head as Flax does (LayerNorm without bias); another norm is
      passed by its class, such as `nnx.RMSNorm`. Default False.
    rotary: turns queries and keys: `Rotary(...)`, or any function `(x [batch..., T, N, H], positions) -> x`.
      Default None.
    attention: what attends; options of `jflash.attention` are bound to it, as in
      `functools.partial(jflash.attention, local_window_size=(1023, 0), logits_soft_cap=50.0)`.
    dropout_rate: share of the attention weights that are dropped, a number 0 <= rate < 1; the rest is divided by
      1 - rate. Every batch element and every head drops weights of its own. Default 0.
    deterministic: whether dropout is off, where a call does not say; `model.train()` and `model.eval()` set it.
      Default None: each call must say, if `dropout_rate` is not 0.
    keep_rngs: whether the layer keeps a `dropout` stream of its own, forked from `rngs`, if `dropout_rate` is not 0;
      default True. Otherwise each call brings `rngs`.
    rngs: `nnx.Rngs` with a `params` stream, and a `dropout` stream where one is kept.
    **linear: keywords for the four `nnx.LinearGeneral` layers, among them `dtype` (of the computation; default that
      of inputs and parameters), `param_dtype` (float32), `kernel_init` (LeCun normal), `bias_init` (zeros),
      `use_bias` (True), `precision` and `kernel_metadata`.

  Raises:
    ValueError: `num_heads` does not divide `qkv_features`, or `num_kv_heads` does not divide `num_heads`.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jflash.nnx import MultiHeadAttention, Rotary
    >>> layer = MultiHeadAttention(8, 64, num_kv_heads=2, rotary=Rotary(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 10, 64)), is_causal=True).shape
    (4, 10, 64)
  """

  def __init__(self, num_heads: int, in_features: int, qkv_features: int | None = None,
               out_features: int | None = None, num_kv_heads: int | None = None, in_kv_features: int | None = None, *,
               normalize_qk: bool | Callable[..., Any] = False, rotary: Callable[..., jax.Array] | None = None,
               attention: Callable[..., Any] = _api.attention, dropout_rate: float = 0.0,
               deterministic: bool | None = None, keep_rngs: bool = True, rngs: nnx.Rngs, **linear: Any):
    self.num_heads, self.in_features = num_heads, in_features
    self.qkv_features = qkv_features or in_features
    self.out_features = out_features or in_features
    self.num_kv_heads = num_kv_heads or num_heads
    self.in_kv_features = in_kv_features or in_features
    self.head_dim = _multihead.head_dim(self.qkv_features, num_heads, self.num_kv_heads)
    self.rotary, self.attention = rotary, attention
    self.dropout_rate, self.deterministic = dropout_rate, deterministic
    self.decode = False
    self.dtype, self.param_dtype = linear.get("dtype"), linear.get("param_dtype", jnp.float32)

    dense = functools.partial(nnx.LinearGeneral, rngs=rngs, **linear)
    self.query = dense(in_features, (num_heads, self.head_dim))
    self.key = dense(self.in_kv_features, (self.num_kv_heads, self.head_dim))
    self.value = dense(self.in_kv_features, (self.num_kv_heads, self.head_dim))
    norm = functools.partial(nnx.LayerNorm, use_bias=False) if normalize_qk is True else normalize_qk
    norms = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
    self.query_ln: Any = norm(self.head_dim, **norms) if norm else nnx.data(None)
    self.key_ln: Any = norm(self.head_dim, **norms) if norm else nnx.data(None)
    self.out = dense((num_heads, self.head_dim), self.out_features, axis=(-2, -1))
    self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate else None
    self.cached_key: Any = nnx.data(None)  # nnx.Cache once `init_cache` was called, as the next two
    self.cached_value: Any = nnx.data(None)
    self.cache_index: Any = nnx.data(None)

  def __call__(self, inputs_q: jax.Array, inputs_k: jax.Array | None = None, inputs_v: jax.Array | None = None, *,
               mask: Any = None, positions: Any = None, segment_ids: Any = None, is_causal: bool = False,
               decode: bool | None = None, deterministic: bool | None = None,
               rngs: nnx.Rngs | nnx.RngStream | None = None) -> jax.Array:
    """Attends from `inputs_q` to `inputs_k`.

    Args:
      inputs_q: `[batch..., T, D]`, with any number of batch dims.
      inputs_k: `[batch..., S, in_kv_features]`; default `inputs_q`. inputs_v: the same; default `inputs_k`.
      mask: broadcasts to `[batch..., N, T, S]`, of any type; True or non-zero may be seen. While decoding S is the
        capacity of the cache. A mask object that `attention` understands is handed on.
      positions: int `[batch..., T]` or `[T]`, for `rotary`, `is_causal` and windows; default 0, 1, 2, … In
        cross-attention a pair `(of_queries, of_keys)`. While decoding also the slots of the cache: default behind
        what it holds, and -1 is padding, which is not kept.
      segment_ids: int `[batch..., T]` or `[T]`, or a pair; tokens see only those of their own segment.
      is_causal: a query sees keys at its own position and before. While decoding always so.
      decode: append to the cache and attend over it; default `self.decode`, which is False at first.
      deterministic: True switches dropout off, False on; default `self.deterministic`, but True while decoding.
      rngs: where dropout draws its key: an `nnx.Rngs` with a `dropout` stream, or a stream; default `self.rngs`.

    Returns:
      `[batch..., T, out_features]`. A query that may see nothing attends to nothing: its head outputs are 0. If jit
      hides that a sequence overflows the cache, its out is NaN.

    Raises:
      ValueError: shapes, widths or types do not fit, the cache is missing, full or of another batch size, or
        `dropout_rate` is not 0 and `deterministic` or `rngs` are missing.
    """
    decode = self.decode if decode is None else decode
    q, k, v = _multihead.inputs(inputs_q, inputs_k, inputs_v, decode=decode)
    for name, x, width in zip("qkv", (q, k, v), (self.in_features, self.in_kv_features, self.in_kv_features)):
      if x.shape[-1] != width:
        raise ValueError(f"`inputs_{name}` has {x.shape[-1]} features and the layer was made for {width}; set "
                         f"`{'in_features' if name == 'q' else 'in_kv_features'}` to {x.shape[-1]}.")
    dropout_key = self._dropout_key(deterministic, rngs, decode)
    query, key, value = self.query(q), self.key(k), self.value(v)  # [batch..., T, N, H], [batch..., S, K, H] twice
    if self.query_ln is not None:
      query, key = self.query_ln(query), self.key_ln(key)
    out, cache = _multihead.attend(
        _multihead.dropping(self.attention, self.dropout_rate, dropout_key), query, key, value,
        cache=self._cache() if decode else None, rotary=self.rotary, mask=mask,
        positions=_multihead.sides("positions", positions, q, k),
        segment_ids=_multihead.sides("segment_ids", segment_ids, q, k), is_causal=is_causal)
    if cache is not None:
      self.cached_key[...], self.cached_value[...], self.cache_index[...] = cache
    return self.out(out)

  def init_cache(self, input_shape: tuple[int, ...], dtype: Any = None):
    """Makes an empty cache for inputs of shape `[batch..., capacity, D]`, or empties the one there is.

    `dtype` is that of the cached keys and values; default the layer's `dtype`, else its `param_dtype`.
    """
    shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
    cache = Cache.empty(shape, dtype or self.dtype or self.param_dtype)
    self.cached_key, self.cached_value, self.cache_index = map(nnx.Cache, cache)

  def set_view(self, deterministic: bool | None = None, decode: bool | None = None,
               batch_size: int | tuple[int, ...] | None = None, max_length: int | None = None):
    """Called by `nnx.view`.

    Args:
      deterministic: whether dropout is off.
      decode: if True, calls append to the cache and attend over it.
      batch_size: with `max_length`, makes an empty cache for this many sequences.
      max_length: the capacity of that cache, in tokens.
    """
    if deterministic is not None:
      self.deterministic = deterministic
    if decode is not None:
      self.decode = decode
    if (batch_size is None) != (max_length is None):
      raise ValueError(f"`batch_size` is {batch_size} and `max_length` is {max_length}; a cache needs both.")
    if batch_size is not None and max_length is not None:
      batch = (batch_size,) if isinstance(batch_size, int) else batch_size
      self.init_cache((*batch, max_length, self.in_features))

  def _dropout_key(self, deterministic, rngs, decode):
    """The key of a call's dropout, or None where nothing is dropped."""
    if self.dropout_rate == 0:
      return None
    if deterministic is None:
      deterministic = True if decode else self.deterministic
    if deterministic is None:
      raise ValueError(f"`dropout_rate` is {self.dropout_rate} and neither the call nor the layer has `deterministic`; call "
                       "`model.train()` or `model.eval()`, or pass deterministic=False to drop, True not to.")
    if deterministic:
      return None
    rngs = self.rngs if rngs is None else rngs
    if rngs is None:
      raise ValueError(f"`dropout_rate` is {self.dropout_rate} and `rngs` is None in the call and in the layer; pass "
                       "rngs=nnx.Rngs(dropout=seed) to the call, or build the layer with keep_rngs=True.")
    return (rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs)()

  def _cache(self) -> Cache:
    if self.cached_key is None:
      raise ValueError("`decode` is on and the layer has no cache; call "
                       "`init_cache((batch, capacity, features))` first.")
    return Cache(self.cached_key[...], self.cached_value[...], self.cache_index[...])


def attention_fn(query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0,
                 deterministic=False, dtype=None, precision=None, module=None, is_causal=False, input_positions=None):
  """`jflash.attention` with the interface of `flax.nnx.dot_product_attention`.

  It moves a model and its checkpoint over: `nnx.MultiHeadAttention(..., attention_fn=jflash.nnx.attention_fn)`.

  Args:
    query: `[batch..., T, N, H]`. key: `[batch..., S, K, H]`. value: `[batch..., S, K, E]`; N is a multiple of K.
    bias, mask: broadcast to `[batch..., N, T, S]`; a mask of any type, non-zero may be seen.
    broadcast_dropout: accepted and ignored. Every batch element and head drops weights of its own, as with False; True,
      Flax's default, would share one mask among them. A single weight's chance to be dropped is the same.
    dropout_rng: a key from `jax.random.key` or `jax.random.PRNGKey`.
    dropout_rate: share of the weights that are dropped, a number 0 <= rate < 1; the rest is divided by 1 - rate.
    deterministic: True switches dropout off.
    dtype: of the computation; default that of the inputs. Scores and sums are float32 at least.
    precision, module, input_positions: must be None.
    is_causal: query i sees keys 0 to i.

  Returns:
    `[batch..., T, N, E]`; a query that may see nothing gives 0, where Flax gives the mean of the values.

  Raises:
    ValueError: dropout is on and `dropout_rng` is None, or shapes do not fit.
    NotImplementedError: an option that it cannot honour.

  Example:
    >>> from flax import nnx
    >>> import jflash.nnx
    >>> layer = nnx.MultiHeadAttention(8, 64, attention_fn=jflash.nnx.attention_fn, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 10, 64)), is_causal=True).shape
    (4, 10, 64)
  """
  del broadcast_dropout
  _drop_in.refuse(precision=precision, module=module, input_positions=input_positions)
  attend = _drop_in.dropping(dropout_rate, dropout_rng, deterministic)
  return _drop_in.attention(attend, query, key, value, bias, mask, dtype=dtype, is_causal=is_causal)
