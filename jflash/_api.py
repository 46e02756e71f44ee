"""The public function."""

import jax.numpy as jnp

from . import _reference


def attention(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, query_seq_lengths=None,
              key_value_seq_lengths=None, local_window_size=None, implementation=None, return_residual=False,
              query_positions=None, key_value_positions=None, query_segment_ids=None, key_value_segment_ids=None,
              logits_soft_cap=None, alibi_slopes=None):
  """Attention (dense stand-in, replaced by the tiled backends)."""
  batched = query.ndim == 4
  if not batched:
    query, key, value = query[None], key[None], value[None]
  b, t, n, _ = query.shape
  s = key.shape[1]
  as2 = lambda x, size: jnp.broadcast_to(jnp.arange(size) if x is None else x, (b, size))
  qp, kp = as2(query_positions, t)[:, None, :, None], as2(key_value_positions, s)[:, None, None, :]
  keep = jnp.ones((b, n, t, s), bool)
  if mask is not None:
    keep &= mask
  if is_causal:
    keep &= qp >= kp
  if local_window_size is not None:
    left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    keep &= (kp >= qp - left) & (kp <= qp + right)
  if query_seq_lengths is not None:
    keep &= (jnp.arange(t)[None, :] < query_seq_lengths[:, None])[:, None, :, None]
  if key_value_seq_lengths is not None:
    keep &= (jnp.arange(s)[None, :] < key_value_seq_lengths[:, None])[:, None, None, :]
  if query_segment_ids is not None:
    keep &= as2(query_segment_ids, t)[:, None, :, None] == as2(key_value_segment_ids, s)[:, None, None, :]
  out, lse = _reference.attention(query, key, value, bias, keep, scale=scale, logits_soft_cap=logits_soft_cap,
                                  alibi_slopes=alibi_slopes, query_positions=as2(query_positions, t),
                                  key_value_positions=as2(key_value_positions, s))
  out = out.astype(query.dtype)
  if not batched:
    out, lse = out[0], lse[0]
  return (out, lse) if return_residual else out
