"""`attention_varlen`: attention over sequences of different lengths, one after another in one array."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from . import _api, _check, _mask


def attention_varlen(query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, bias: Any = None, mask: Any = None, *,
                     query_positions: Any = None, key_value_positions: Any = None, sinks: Any = None,
                     implementation: str | None = None, return_residual: bool = False, tiles: tuple[int, int] | None = None,
                     **options: Any) -> Any:
  """Exact attention over packed sequences: sequence n's queries see sequence n's keys, and nothing is padded.

      out[cu_q[n]:cu_q[n+1]] = attention(query[cu_q[n]:cu_q[n+1]], key[cu_k[n]:cu_k[n+1]], value[cu_k[n]:cu_k[n+1]], ...)

  Positions begin at 0 in each sequence, and `batch` in `score_mod`, `masks.Custom` and dropout is the number of the sequence, so
  that the answer is that of a padded batch. Tiles that hold no sequence's queries and keys together are skipped: work grows with
  the sum of the products of lengths. Lengths that are known while tracing (NumPy arrays) make the shortest lists of tiles.

  Args:
    query: `[total_q, N, H]`, all sequences' queries one after another.
    key: `[total_k, K, H]`. value: `[total_k, K, E]`.
    cu_seqlens_q: integers `[sequences + 1]` that do not decrease, from 0: where each sequence begins, and where the last one ends.
      A sequence may be empty. Tokens behind the last sequence see nothing and are not seen.
    cu_seqlens_k: the same for keys, for as many sequences.
    bias, mask: as in `attention`, broadcast to `[N, total_q, total_k]`; or a mask from `jflash.masks`, which speaks of positions.
    query_positions, key_value_positions: integers `[total_q]` and `[total_k]` in place of those within the sequences.
    sinks, implementation, return_residual, tiles: as in `attention`.
    **options: `scale`, `is_causal`, `local_window_size`, `logits_soft_cap`, `alibi_slopes` (`[N]` or `[sequences, N]`),
      `score_mod`, `score_operands`, `dropout_rate`, `dropout_key`, `head_ids`, as in `attention`.

  Returns:
    `out [total_q, N, E]`; with `return_residual` also `lse [total_q, N]`.

  Raises:
    ValueError, TypeError, NotImplementedError: as `attention`.

  Example:
    >>> import jax, numpy as np, jflash
    >>> q = k = v = jax.random.normal(jax.random.key(0), (100, 8, 64))
    >>> ends = np.array([0, 30, 30, 100])  # three sequences, of 30, 0 and 70 tokens
    >>> jflash.attention_varlen(q, k, v, ends, ends, is_causal=True).shape
    (100, 8, 64)

  The interface is that of Dao's flash-attn, `flash_attn_varlen_func`; `is_causal` with two lengths is that of `attention`.
  """
  query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
  _check.varlen(query, key, value, options)
  cu_q, cu_k = (_check.cumulative(x, total, name) for x, total, name in (
      (cu_seqlens_q, query.shape[0], "cu_seqlens_q"), (cu_seqlens_k, key.shape[0], "cu_seqlens_k")))
  _check.as_many(cu_q, "cu_seqlens_q", cu_k, "cu_seqlens_k")
  of_query, of_key = _tokens(cu_q, query.shape[0], -1), _tokens(cu_k, key.shape[0], -2)
  slopes = options.pop("alibi_slopes", None)
  problem = _api.make_problem(
      query, key, value, bias, mask, query_segment_ids=of_query.segments, key_value_segment_ids=of_key.segments,
      batch_ids=_mask.OfTokens(of_query.sequences, of_key.sequences),
      query_positions=of_query.positions if query_positions is None else query_positions,
      key_value_positions=of_key.positions if key_value_positions is None else key_value_positions, **options)
  if slopes is not None:
    slopes = _check.slopes(slopes, _mask.Sizes(cu_q.shape[0] - 1, query.shape[1], 1, 1))  # [sequences|1, N, 1, 1]
    if slopes.shape[0] > 1:
      slopes = jnp.asarray(slopes)[of_query.sequences, :, 0, 0].T[None, :, :, None]  # [1, N, total_q, 1]
    problem = dataclasses.replace(problem, logits=dataclasses.replace(problem.logits, alibi_slopes=slopes))
  out, lse = _api.compute(problem, sinks, implementation, tiles, return_residual)
  return (out[0], lse[0]) if return_residual else out[0]


class Tokens(NamedTuple):
  """What is known of each token: a segment id, the number of its sequence, and its position there."""

  segments: Any
  sequences: Any
  positions: Any


def _tokens(cu: Any, total: int, behind: int) -> Tokens:
  """Of sequences that begin and end at `cu`; tokens behind the last one have `behind` as their segment, and its number."""
  xp: Any = np if isinstance(cu, np.ndarray) else jnp
  token = xp.arange(total, dtype=np.int32)
  number = xp.searchsorted(cu[1:], token, side="right").astype(np.int32)
  last = cu.shape[0] - 2
  return Tokens(xp.where(number > last, np.int32(behind), number), xp.minimum(number, np.int32(last)), token - cu[number])
