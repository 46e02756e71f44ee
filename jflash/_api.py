"""`attention`: the public function, from its arguments to a `Problem` and back."""

from __future__ import annotations

import contextlib
from typing import Any

import jax.numpy as jnp

from pallas_kernels import softmax

from . import _autodiff, _backends, _check, _check_functions, _dropout, _mask, _plan, _program, masks
from ._logits import Logits
from ._problem import Problem


def attention(query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, *, scale: Any = None,
              is_causal: bool = False, query_seq_lengths: Any = None, key_value_seq_lengths: Any = None,
              local_window_size: int | tuple[int, int] | None = None, implementation: str | None = None,
              return_residual: bool = False, query_positions: Any = None, key_value_positions: Any = None,
              query_segment_ids: Any = None, key_value_segment_ids: Any = None, logits_soft_cap: Any = None,
              alibi_slopes: Any = None, score_mod: Any = None, score_operands: Any = (), sinks: Any = None,
              dropout_rate: float = 0.0, dropout_key: Any = None, batch_ids: Any = None, head_ids: Any = None,
              tiles: tuple[int, int] | None = None) -> Any:
  r"""Exact attention in linear memory; a superset of `jax.nn.dot_product_attention`.

      s   = cap(score_mod(scale · q·k + bias - slope · |q position - k position|)), -inf where the mask keeps nothing
      lse = log(exp(sink) + Σ_k exp(s))            out = Σ_k drop(exp(s - lse)) v

  with cap(x) = c · tanh(x / c); terms that are not given are left out. Scores and sums are float32 (float64 for float64 inputs).
  B batch, T queries, S keys, N query heads, K key/value heads (N a multiple of K), H query/key width, E value width; all >= 1.

  Args:
    query: `[B, T, N, H]`, or `[T, N, H]` without a batch; bfloat16, float16, float32 or float64.
    key: `[B, S, K, H]`, of the same dtype. K < N is grouped-query, K = 1 multi-query attention.
    value: `[B, S, K, E]`.
    bias: added to the scaled products; any shape that broadcasts to `[B, N, T, S]`. Its gradient has that same shape.
    mask: True where a key is seen: a boolean array that broadcasts to `[B, N, T, S]`, or a mask from `jflash.masks`, which
      lets whole tiles be skipped.
    scale: default 1/sqrt(H). A number, or a scalar array, which may be traced and gets a gradient.
    is_causal: query i sees keys <= i (also when T != S; anything else by positions).
    query_seq_lengths: integers `[B]`; query rows from there on give 0.
    key_value_seq_lengths: integers `[B]`; keys from there on are not seen.
    local_window_size: (left, right), or w for (w, w): query i sees keys i - left to i + right, both inclusive.
    implementation: None chooses the first of these that can; `jflash.explain` says which, and why not the others: "tpu" (Pallas on
      TPU), "mosaic_gpu" (Pallas on Hopper GPUs), "cudnn" (NVIDIA's library, for what it supports), "xla" (plain JAX, everywhere).
    return_residual: whether to return `lse` too.
    query_positions, key_value_positions: integers `[B, T]` or `[T]`, `[B, S]` or `[S]`. They replace the row and column numbers
      in `is_causal`, `local_window_size`, `alibi_slopes` and the masks of `jflash.masks`; not in a `mask` array or in the lengths.
    query_segment_ids, key_value_segment_ids: integers of the same shapes; a query sees only keys of its own segment.
    logits_soft_cap: c > 0 as above. A number, or a scalar array, which gets a gradient.
    alibi_slopes: `[N]` or `[B, N]`, with a gradient (Press et al., arXiv:2108.12409).
    score_mod: `score_mod(score, batch, head, query position, key position, *score_operands) -> score`, any traceable function
      of scores and of integers that broadcast against them; it is part of the compiled program, so define it once.
    score_operands: arrays for `score_mod`, handed over whole, to be indexed: `slopes[head]`. Floats get a gradient, and so does
      what `score_mod` closes over.
    sinks: `[N]`, a logit more for each query head, which takes its share of the weights and has no value; with a gradient.
    dropout_rate: share of the weights that are dropped, a number 0 <= rate < 1; what is left is divided by 1 - rate.
    dropout_key: a key from `jax.random.key`. What is dropped depends on it, on batch, head and positions, and on nothing else.
    batch_ids, head_ids: integers `[B]` and `[N]` in place of batch and head numbers in `score_mod`, `masks.Custom` and dropout:
      what a shard holds of a larger batch.
    tiles: (query rows, key columns) computed at a time, in both passes; by default chosen for the problem and the chip, and shown
      by `jflash.explain`. Multiples of 128 for "tpu"; of 64, and at most 192, for "mosaic_gpu".

  Returns:
    `out [B, T, N, E]` in the inputs' dtype; with `return_residual` also `lse [B, T, N]`, float32 (float64 for float64), which
    is differentiable. A query that may see nothing has out 0, lse -inf and no gradient; what is not finite in a key or value that
    the mask hides reaches neither out nor any gradient. Two runs give the same bits (with "cudnn", out and lse do).

  Raises:
    ValueError, TypeError: shapes, dtypes or values that do not fit, with both sides named.
    NotImplementedError: the named implementation cannot compute this here, with the reason.

  Example:
    >>> import jax, jflash
    >>> q = jax.random.normal(jax.random.key(0), (2, 100, 8, 64))
    >>> k = v = jax.random.normal(jax.random.key(1), (2, 100, 2, 64))
    >>> jflash.attention(q, k, v, is_causal=True, local_window_size=(31, 0)).shape
    (2, 100, 8, 64)

  Dao et al., FlashAttention, arXiv:2205.14135; Dao, FlashAttention-2, arXiv:2307.08691.
  """
  problem = make_problem(query, key, value, bias, mask, scale=scale, is_causal=is_causal, query_seq_lengths=query_seq_lengths,
                         key_value_seq_lengths=key_value_seq_lengths, local_window_size=local_window_size,
                         query_positions=query_positions, key_value_positions=key_value_positions,
                         query_segment_ids=query_segment_ids, key_value_segment_ids=key_value_segment_ids,
                         logits_soft_cap=logits_soft_cap, alibi_slopes=alibi_slopes, score_mod=score_mod,
                         score_operands=score_operands, dropout_rate=dropout_rate, dropout_key=dropout_key,
                         batch_ids=batch_ids, head_ids=head_ids)
  out, lse = compute(problem, sinks, implementation, tiles, return_residual)
  if jnp.ndim(query) == 3:
    out, lse = out[0], lse[0]
  return (out, lse) if return_residual else out


def compute(problem: Problem, sinks: Any, implementation: str | None, tiles: Any, with_lse: bool) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])` by the backend that is named or chosen; without `with_lse` lse may be anything."""
  if sinks is not None:
    sinks = _check.sinks(sinks, problem.heads)
  with in_tiles(tiles):
    backend, _ = _backends.select(problem, implementation)
    plan = backend.plan(problem)
    visits = _plan.make_schedule(problem, plan)
    plan = _plan.settle(plan, visits)
    if not with_lse and sinks is None:
      plan = _plan.out_alone(problem, plan, visits)
  out, lse = _autodiff.attend(backend.name, plan, problem, visits)
  if sinks is None:
    return out, lse
  # A key more for every row, whose value is 0.
  merged, lse = softmax.merge((out.astype(lse.dtype), lse), (jnp.zeros((), lse.dtype), jnp.asarray(sinks).astype(lse.dtype)))
  return merged.astype(out.dtype), lse


def in_tiles(tiles: Any) -> contextlib.AbstractContextManager[None]:
  """Plans that are made inside have the tiles that are asked for, if any are."""
  return contextlib.nullcontext() if tiles is None else _plan.force_tiles(*_check.tiles(tiles))


def make_problem(query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, *, scale: Any = None,
                 is_causal: bool = False, query_seq_lengths: Any = None, key_value_seq_lengths: Any = None,
                 local_window_size: Any = None, query_positions: Any = None, key_value_positions: Any = None,
                 query_segment_ids: Any = None, key_value_segment_ids: Any = None, logits_soft_cap: Any = None,
                 alibi_slopes: Any = None, score_mod: Any = None, score_operands: Any = (), dropout_rate: Any = 0.0,
                 dropout_key: Any = None, batch_ids: Any = None, head_ids: Any = None) -> Problem:
  """The arguments of `attention`, checked and laid out; `batch_ids` may also be `_mask.OfTokens`."""
  q, k, v = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
  _check.inputs(q, k, v)
  if q.ndim == 3:
    q, k, v = q[None], k[None], v[None]
  sizes = _sizes(q, k, query_positions, key_value_positions, batch_ids, head_ids)
  _check.both_or_none(query_segment_ids, "query_segment_ids", key_value_segment_ids, "key_value_segment_ids")

  parts: list[_mask.Mask] = []
  if mask is not None:
    parts.append(mask.bind(sizes) if isinstance(mask, _mask.Mask) else masks.Elements(_check.mask_array(mask, sizes)))
  if is_causal:
    parts.append(masks.Causal())
  if local_window_size is not None:
    parts.append(masks.Window(*_check.window(local_window_size)).bind(sizes))
  if query_seq_lengths is not None or key_value_seq_lengths is not None:
    lengths = [None if x is None else _check.per_batch(x, sizes, name) for x, name in (
        (query_seq_lengths, "query_seq_lengths"), (key_value_seq_lengths, "key_value_seq_lengths"))]
    parts.append(masks.RowLengths(*lengths))
  if query_segment_ids is not None:
    parts.append(masks.Segments(_check.per_query(query_segment_ids, sizes, "query_segment_ids"),
                                _check.per_key(key_value_segment_ids, sizes, "key_value_segment_ids")))
  operands = _check_functions.score_operands(score_operands, score_mod)
  key_of_dropout = _check.dropout(dropout_rate, dropout_key)
  logits = Logits(
      scale=q.shape[-1]**-0.5 if scale is None else _check.real_scalar(scale, "scale"),
      bias=None if bias is None else _check.bias(bias, sizes),
      alibi_slopes=None if alibi_slopes is None else _check.slopes(alibi_slopes, sizes),
      soft_cap=None if logits_soft_cap is None else _check.positive(logits_soft_cap, "logits_soft_cap"),
      mask=_all_of(parts), query_positions=sizes.query_positions, key_positions=sizes.key_positions,
      batch_ids=sizes.batch_ids, head_ids=sizes.head_ids,
      score_mod=None if score_mod is None else _score_mod(score_mod, operands, sizes, jnp.promote_types(q.dtype, jnp.float32)),
      dropout=None if key_of_dropout is None else _dropout.bind(float(dropout_rate), key_of_dropout, sizes))
  return Problem(q, k, v, logits)


def _sizes(q: Any, k: Any, query_positions: Any, key_value_positions: Any, batch_ids: Any, head_ids: Any) -> _mask.Sizes:
  sizes = _mask.Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
  if query_positions is not None:
    sizes = sizes._replace(query_positions=_check.per_query(query_positions, sizes, "query_positions"))
  if key_value_positions is not None:
    sizes = sizes._replace(key_positions=_check.per_key(key_value_positions, sizes, "key_value_positions"))
  if isinstance(batch_ids, _mask.OfTokens):
    sizes = sizes._replace(batch_ids=batch_ids.query.reshape(1, 1, -1, 1), key_batch_ids=batch_ids.key.reshape(1, 1, 1, -1))
  elif batch_ids is not None:
    sizes = sizes._replace(batch_ids=_check.ids(batch_ids, sizes.batch, "batch_ids", "batch elements").reshape(-1, 1, 1, 1))
  if head_ids is not None:
    sizes = sizes._replace(head_ids=_check.ids(head_ids, sizes.heads, "head_ids", "heads").reshape(1, -1, 1, 1))
  return sizes


def _score_mod(score_mod: Any, operands: list[Any], sizes: _mask.Sizes, dtype: Any) -> _program.Program:
  _check_functions.score_mod(score_mod, operands, dtype)
  return _program.bind(score_mod, operands, sizes, dtype)


def _all_of(parts: list[_mask.Mask]) -> _mask.Mask | None:
  mask = parts[0] if parts else None
  for part in parts[1:]:
    mask = mask & part
  return mask


