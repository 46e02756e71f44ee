"""Multi-head attention between the projections: everything in a Flax layer that has no parameters.

Letters: `batch...` any number of batch dims, T queries, S keys, D features, N query heads, K kv heads, H head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def head_dim(qkv_features, num_heads, num_kv_heads):
  """H, for `qkv_features` split over the query heads; raises ValueError where the sizes do not divide."""
  if qkv_features % num_heads:
    raise ValueError(f"`qkv_features` is {qkv_features} and `num_heads` is {num_heads}; qkv_features must be a "
                     "multiple of num_heads.")
  if num_heads % num_kv_heads:
    raise ValueError(f"`num_heads` is {num_heads} and `num_kv_heads` is {num_kv_heads}; num_heads must be a multiple "
                     "of num_kv_heads.")
  return qkv_features // num_heads


def inputs(inputs_q, inputs_k, inputs_v, *, decode):
  """`(inputs_q, inputs_k, inputs_v)` with Flax's defaults: keys are the queries, values are the keys."""
  if inputs_k is None and inputs_v is not None:
    raise ValueError("`inputs_k` is None and `inputs_v` is not; to use one array as keys and values pass it as "
                     "`inputs_k` and leave `inputs_v` out.")
  if decode and inputs_k is not None:
    raise ValueError("`decode` caches the keys of `inputs_q` itself, and `inputs_k` was given too; for "
                     "cross-attention call with decode off, or leave `inputs_k` out.")
  inputs_k = inputs_q if inputs_k is None else inputs_k
  inputs_v = inputs_k if inputs_v is None else inputs_v
  if inputs_k.shape[:-1] != inputs_v.shape[:-1] or inputs_q.shape[:-2] != inputs_k.shape[:-2]:
    raise ValueError(f"`inputs_q` {inputs_q.shape}, `inputs_k` {inputs_k.shape} and `inputs_v` {inputs_v.shape} must "
                     "have the same batch dims, and keys and values the same length.")
  return inputs_q, inputs_k, inputs_v


def sides(name, ids, query, key):
  """What belongs to the queries and what to the keys, of `positions` or `segment_ids`: two int arrays, or two Nones.

  `query` and `key` are the inputs `[batch..., T, D]` and `[batch..., S, D]`.
  """
  if ids is None:
    return None, None
  if not isinstance(ids, tuple):
    if key is not query:
      raise ValueError(f"`{name}` is one array and the keys come from another input than the queries; pass a pair "
                       f"`{name}=(of_queries, of_keys)`.")
    ids = ids, ids
  if len(ids) != 2 or any(x is None for x in ids):
    raise ValueError(f"`{name}` is a tuple of {len(ids)} and must be a pair of arrays, `(of_queries, of_keys)`.")
  return tuple(_checked_ids(name, x, like) for x, like in zip(ids, (query, key)))


def _checked_ids(name, ids, like):
  ids = jnp.asarray(ids)
  length, full = like.shape[-2:-1], like.shape[:-1]
  if ids.shape not in (length, full) or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"`{name}` is {ids.dtype} {ids.shape} and its input has shape {like.shape} [batch..., length, "
                     f"features]; pass integers of shape {full} or {length}.")
  return ids


def dropping(attention, rate, key):
  """`attention` with dropout at this rate, or as it is where `key` is None."""
  return attention if key is None else functools.partial(attention, dropout_rate=rate, dropout_key=key)


def attend(attention, query, key, value, *, cache=None, rotary=None, mask=None, positions=(None, None),
           segment_ids=(None, None), is_causal=False):
  """Rotates, remembers and attends.

  Args:
    attention: `jflash.attention` or a function with its keywords; receives only those that the call uses.
    query: `[batch..., T, N, H]`. key, value: `[batch..., S, K, H]`.
    cache: a `Cache` to append to and then attend over, or None.
    rotary: `(x [batch..., T, N, H], positions) -> x`, or None.
    mask: broadcasts to `[batch..., N, T, S]`, non-zero keeps; S is the cache's capacity where there is one.
    positions, segment_ids: pairs as from `sides`.
    is_causal: with a cache always true.

  Returns:
    `(out [batch..., T, N, H], cache)`. Sequences that overflowed the cache have out NaN.
  """
  full = None
  if cache is not None and segment_ids != (None, None):
    raise ValueError("`segment_ids` was given and `decode` is on; a cache holds one document per sequence: give each "
                     "document a row of its own, with -1 as the position of padding.")
  given = positions
  if cache is not None and given[0] is None:
    positions = (cache.next_positions(query.shape[-3]),) * 2
  if rotary is not None:
    query, key = (rotary(x, jnp.arange(x.shape[-3]) if p is None else p) for x, p in zip((query, key), positions))
  if cache is not None:
    cache, full = cache.append(key, value, given[0])
    key, value = cache.key, cache.value
    positions, is_causal = (positions[0], jnp.arange(key.shape[-3], dtype=jnp.int32)), True
  out = flat_attention(attention, query, key, value, mask=mask, is_causal=is_causal, query_positions=positions[0],
                       key_value_positions=positions[1], query_segment_ids=segment_ids[0],
                       key_value_segment_ids=segment_ids[1])
  return out if full is None else jnp.where(full[..., None, None, None], jnp.nan, out), cache


def flat_attention(attention, query, key, value, *, mask=None, bias=None, is_causal=False, **ids):
  """`attention` over any batch dims, masks of any type and inputs of different types.

  `mask` and `bias` broadcast to `[batch..., N, T, S]`; `ids` are positions and segment ids `[batch..., length]` or
  `[length]`. What is None or False is left out of the call.
  """
  dtype = jnp.result_type(query, key, value)
  batch, (t, n), s = query.shape[:-3], query.shape[-3:-1], key.shape[-3]
  rows = lambda x: x.reshape(math.prod(batch), *x.shape[len(batch):])
  keywords = {name: x if x.ndim == 1 else rows(x) for name, x in ids.items() if x is not None}
  if mask is not None:
    keywords["mask"] = _flat_scores("mask", mask, (*batch, n, t, s), bool)
  if bias is not None:
    keywords["bias"] = _flat_scores("bias", bias, (*batch, n, t, s), None)
  if is_causal:
    keywords["is_causal"] = True
  out = attention(*(rows(x.astype(dtype)) for x in (query, key, value)), **keywords)  # [B, T, N, H]
  return out.reshape(*batch, *out.shape[1:])


def _flat_scores(name, x, full, dtype):
  """`x`, which broadcasts to `full = [batch..., N, T, S]`, as `[B or 1, N or 1, T or 1, S or 1]` of type `dtype`."""
  if not isinstance(x, (jax.Array, np.ndarray)):
    return x  # a mask object: it speaks of positions, not of shapes
  if x.ndim > len(full) or any(size not in (1, whole) for size, whole in zip(x.shape[::-1], full[::-1])):
    raise ValueError(f"`{name}` has shape {x.shape} and the scores [batch..., heads, queries, keys] have shape {full}; "
                     f"each axis of `{name}` must be 1 or that size.")
  x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
  if any(size != 1 for size in x.shape[:-3]):
    x = jnp.broadcast_to(x, (*full[:-3], *x.shape[-3:]))
  return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]).astype(dtype or x.dtype)
