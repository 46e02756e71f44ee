"""Dense attention, obviously right: the oracle of the tests and of `python -m jflash`.

It builds every `[T, S]` array in full and shares no code with the library it checks.
"""

import jax
import jax.numpy as jnp


def attention(query, key, value, bias=None, keep=None, *, scale=None, logits_soft_cap=None, alibi_slopes=None,
              query_positions=None, key_value_positions=None, dtype=None):
  """softmax(cap(scale · Q Kᵀ + bias + alibi)) V over the keys that `keep` allows, in `dtype`.

  Args:
    query: `[B, T, N, H]`. key: `[B, S, K, H]`. value: `[B, S, K, E]`; N is a multiple of K.
    bias: broadcasts to `[B, N, T, S]`. keep: boolean, broadcasts to `[B, N, T, S]`; None keeps everything.
    alibi_slopes: `[N]` or `[B, N]`; adds `-slope · |query position - key position|`.
    query_positions, key_value_positions: `[B, T]` and `[B, S]`, used by ALiBi; None is 0, 1, 2, …
    dtype: in which everything is computed; None is the inputs' own type promoted to at least float32.

  Returns:
    `(out [B, T, N, E], lse [B, T, N])`; a query that may see no key has out 0 and lse -inf.
  """
  dtype = dtype or jnp.promote_types(query.dtype, jnp.float32)
  q, k, v = (x.astype(dtype) for x in (query, key, value))
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  b, t, n, h = q.shape
  s = k.shape[1]
  scale = h**-0.5 if scale is None else scale
  keep = jnp.ones((b, n, t, s), bool) if keep is None else jnp.broadcast_to(keep, (b, n, t, s))

  logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision=jax.lax.Precision.HIGHEST) * scale
  if bias is not None:
    logits += jnp.asarray(bias, dtype)
  if alibi_slopes is not None:
    rows = jnp.arange(t)[None] if query_positions is None else query_positions
    columns = jnp.arange(s)[None] if key_value_positions is None else key_value_positions
    distance = jnp.abs(rows[:, None, :, None] - columns[:, None, None, :])
    slopes = jnp.asarray(alibi_slopes, dtype)
    logits -= slopes.reshape((1,) * (2 - slopes.ndim) + slopes.shape)[:, :, None, None] * distance
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)

  # A masked logit takes no part in anything, so the row maximum and the sums run over the kept ones alone.
  logits = jnp.where(keep, logits, -jnp.inf)
  empty = ~jnp.any(keep, axis=-1)
  top = jnp.where(empty, 0.0, jnp.max(logits, axis=-1))
  weights = jnp.where(keep, jnp.exp(logits - top[..., None]), 0)
  total = jnp.where(empty, 1.0, weights.sum(-1))
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  out = jnp.einsum("bnts,bsne->btne", weights / total[..., None], v, precision=jax.lax.Precision.HIGHEST)
  return out, lse.transpose(0, 2, 1)
