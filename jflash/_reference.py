"""Dense attention, obviously right: the oracle of the tests and of `python -m jflash`.

It builds every `[T, S]` array in full and shares no code with the library it checks.
"""

import jax
import jax.numpy as jnp


def attention(query, key, value, bias=None, keep=None, *, scale=None, logits_soft_cap=None, alibi_slopes=None,
              query_positions=None, key_value_positions=None, score_mod=None, score_operands=(), sinks=None,
              factors=None, dtype=None):
  """softmax(cap(score_mod(scale · Q Kᵀ + bias + alibi))) V over the keys that `keep` allows, in `dtype`.

  Args:
    query: `[B, T, N, H]`. key: `[B, S, K, H]`. value: `[B, S, K, E]`; N is a multiple of K.
    bias: broadcasts to `[B, N, T, S]`. keep: boolean, broadcasts to `[B, N, T, S]`; None keeps everything.
    alibi_slopes: `[N]` or `[B, N]`; adds `-slope · |query position - key position|`.
    query_positions, key_value_positions: `[B, T]` and `[B, S]`, used by ALiBi and `score_mod`; None is 0, 1, 2, …
    score_mod: `(score, batch, head, query position, key position, *score_operands) -> score` on whole arrays.
    sinks: `[N]`, the logit of one key more for each head, whose value is 0.
    factors: `[B, N, T, S]`, by which the weights are multiplied in the end: 0 or 1 / (1 - rate) for dropout.
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
  rows = (jnp.arange(t)[None] if query_positions is None else jnp.asarray(query_positions))[:, None, :, None]
  columns = (jnp.arange(s)[None] if key_value_positions is None else jnp.asarray(key_value_positions))[:, None, None, :]
  if alibi_slopes is not None:
    distance = jnp.abs(rows - columns)
    slopes = jnp.asarray(alibi_slopes, dtype)
    logits -= slopes.reshape((1,) * (2 - slopes.ndim) + slopes.shape)[:, :, None, None] * distance
  if score_mod is not None:
    batches, heads = jnp.arange(b)[:, None, None, None], jnp.arange(n)[None, :, None, None]
    logits = score_mod(logits, batches, heads, rows, columns, *(jnp.asarray(x) for x in score_operands))
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  return _weigh(logits, keep, v, sinks, factors)


def _weigh(logits, keep, v, sinks, factors):
  """`(out [B, T, N, E], lse [B, T, N])` of logits and `keep`, both `[B, N, T, S]`, and values `[B, S, N, E]`."""
  b, n, t, s = logits.shape
  # A masked logit takes no part in anything, so the row maximum and the sums run over the kept ones alone.
  logits = jnp.where(keep, logits, -jnp.inf)
  if sinks is not None:
    sink = jnp.broadcast_to(jnp.asarray(sinks, v.dtype)[None, :, None, None], (b, n, t, 1))
    logits, keep = jnp.concatenate([logits, sink], -1), jnp.concatenate([keep, jnp.ones((b, n, t, 1), bool)], -1)
  empty = ~jnp.any(keep, axis=-1)
  top = jnp.where(empty, 0.0, jnp.max(logits, axis=-1))
  weights = jnp.where(keep, jnp.exp(logits - top[..., None]), 0)
  total = jnp.where(empty, 1.0, weights.sum(-1))
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  weights = weights[..., :s] / total[..., None]
  if factors is not None:
    weights = weights * jnp.asarray(factors, v.dtype)
  out = jnp.einsum("bnts,bsne->btne", weights, v, precision=jax.lax.Precision.HIGHEST)
  return out, lse.transpose(0, 2, 1)
