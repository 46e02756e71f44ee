"""cuDNN as a backend: NVIDIA's attention in bfloat16 and float16, for what it supports, with plain JAX to catch what it drops.

It is trusted with little. A row that sees nothing, whose answer it does not define, never reaches it. It multiplies values that a mask
hides by 0, so that a NaN in one would spread, and some versions make NaN of finite numbers in the backward pass: where anything that
it returns is not finite, the pass is computed again in plain JAX. And it has no cotangent of lse: see `_of_lse`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap

from pallas_kernels import products

from . import _gpu, _xla, masks
from ._mask import And, Mask
from ._plan import Plan, Schedule
from ._problem import Problem

XLA = "use implementation='xla'"


class Masks(NamedTuple):
  """A mask in the terms that cuDNN has. Lengths are integers or `[B|1, 1, 1, 1]`, and the least of them counts."""

  causal: bool
  left: int | None  # how many keys before its own a query sees; None is no limit
  query_lengths: list[Any]
  key_lengths: list[Any]


class Call(NamedTuple):
  """What cuDNN is told besides arrays."""

  scale: float
  causal: bool
  left: int | None


class Arrays(NamedTuple):
  """What it is handed: query, key and value as in `Problem`, bias `[1, N, T, S]`, and how many keys `[B]` there are."""

  q: Any
  k: Any
  v: Any
  bias: Any
  lengths: Any


# What it supports -----------------------------------------------------------------------------------------------------


def supports(problem: Problem) -> str | None:
  """None, or why cuDNN cannot compute this problem."""
  return _of_sizes(problem) or _of_scores(problem) or _of_mask(problem) or _of_jax(problem)


def _of_sizes(problem: Problem) -> str | None:
  dtype, width, values = problem.q.dtype, problem.width, problem.value_width
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN computes in bfloat16 and float16, and `query` has dtype {dtype}; cast query, key and value, or {XLA}"
  if width != values:
    return f"cuDNN wants one head width, and `query` has {width} and `value` has {values}; {XLA}"
  widest = 256 if _gpu.capability() == (9, 0) else 128
  if width % 8 or width > widest:
    return f"cuDNN wants a head width that is a multiple of 8 and at most {widest} on this GPU, and it is {width}; {XLA}"
  return None


def _of_scores(problem: Problem) -> str | None:
  logits = problem.logits
  if problem.product is not products.Dot:
    return f"cuDNN's scores are products, and these are distances; {XLA}"
  others = {"alibi_slopes": logits.alibi_slopes, "score_mod": logits.score_mod, "logits_soft_cap": logits.soft_cap,
            "dropout_rate": logits.dropout, "query_positions": logits.query_positions, "key_value_positions": logits.key_positions}
  if given := [name for name, value in others.items() if value is not None]:
    return f"cuDNN's attention has no {given[0]}; {XLA}"
  if not isinstance(logits.scale, float) or not 0 < logits.scale < math.inf:
    return f"cuDNN wants a `scale` that is a Python number greater than 0; {XLA}"
  if logits.bias is None:
    return None
  shape = 1, problem.heads, problem.queries, problem.keys
  if logits.bias.shape != shape or logits.bias.dtype != problem.q.dtype or shape[2] % 2 or shape[3] % 2:
    return (f"cuDNN has gradients for a `bias` of shape [1, N, T, S] = {list(shape)} with T and S even, in the dtype of query, "
            f"{problem.q.dtype}, and this one is {list(logits.bias.shape)} in {logits.bias.dtype}; {XLA}")
  return None


def _of_mask(problem: Problem) -> str | None:
  mask = problem.logits.mask
  read = _read(mask)
  if read is None:
    return (f"cuDNN has is_causal, a window (left, 0) and lengths, and the mask is {mask!r}; {XLA}. (An array would become a bias, "
            "with T x S numbers more, and rows that see nothing would be means.)")
  causal, left, *lengths = read
  if left is not None and (not causal or problem.logits.bias is not None or any(lengths) or problem.queries > problem.keys):
    return f"cuDNN's window is causal, with no bias, no lengths, and no more queries than keys; {XLA}"
  if causal and problem.queries == 1:
    return f"cuDNN has no causal mask for one query; {XLA}"
  return None


def _of_jax(problem: Problem) -> str | None:
  """What JAX has to say about it: whatever is checked there is checked by tracing both passes, once for each kind of problem."""
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  read = _read(problem.logits.mask)
  lengths = jax.ShapeDtypeStruct((problem.batch,), np.int32) if read and read.key_lengths else None
  arrays = Arrays(*jax.tree.map(struct, (problem.q, problem.k, problem.v, problem.logits.bias)), lengths)
  return _refusal(_call(problem), arrays, _gpu.capability(), _gpu.cudnn_version())


@functools.lru_cache(maxsize=1024)
def _refusal(call: Call, arrays: Arrays, *gpu: Any) -> str | None:
  del gpu  # JAX looks at it
  try:
    with jax.default_device(None):  # where `explain` evaluates constants; a GPU to compile for that is not here could not
      jax.eval_shape(functools.partial(_backward, call), arrays, arrays.q)
  except Exception as error:  # also if JAX has moved its binding
    return f"JAX {jax.__version__} does not call cuDNN for it, {type(error).__name__}: {error}; {XLA}"
  return None


def _read(mask: Mask | None) -> Masks | None:
  """The mask in cuDNN's terms; None if it has none for it."""
  causal, lefts, query, key, ahead = False, [], [], [], False
  for atom in _terms(mask):
    if isinstance(atom, masks.Lengths):
      query += [] if atom.query is None else [atom.query]
      key += [] if atom.key is None else [atom.key]
    elif isinstance(atom, masks.Causal):
      causal = True
    elif isinstance(atom, masks.Window) and all(side is None or isinstance(side, int) for side in (atom.left, atom.right)):
      causal, ahead = causal or atom.right == 0, ahead or atom.right not in (0, None)
      lefts += [] if atom.left is None else [atom.left]
    else:
      return None
  return None if ahead and not causal else Masks(causal, min(lefts, default=None), query, key)


def _terms(mask: Mask | None) -> list[Mask]:
  """What a mask is the conjunction of."""
  if isinstance(mask, And):
    return _terms(mask.a) + _terms(mask.b)
  return [] if mask is None else [mask]


# The two passes -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: Plan, visits: Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  call, arrays = _call(problem), _arrays(problem)
  out, lse = _over_batches(functools.partial(_attend, call), arrays)
  seen = _rows_that_see(problem)
  out, lse = jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, 0)
  return lax.cond(_everywhere(jnp.isfinite(out), jnp.isfinite(lse)),
                  lambda: (out, jnp.where(seen, lse, -jnp.inf)), lambda: _xla.forward(problem, plan, visits))


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: Plan, visits: Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`): of the bias, as no other leaf is supported."""
  call, arrays = _call(problem), _arrays(problem)
  seen = _rows_that_see(problem)
  seen_dout, seen_dlse = jnp.where(seen[..., None], dout, 0), jnp.where(seen, dlse, 0)
  dq, dk, dv, *dbias = _over_batches(functools.partial(_backward, call), arrays, seen_dout)
  still = _everywhere(seen_dlse == 0)
  if arrays.bias is None:
    more = lambda: tuple((x + y).astype(x.dtype) for x, y in zip((dq, dk), _of_lse(call, arrays, seen_dlse)))
    dq, dk = lax.cond(still, lambda: (dq, dk), more)
    still = True
  usable = _everywhere(*map(jnp.isfinite, (dq, dk, dv, *dbias))) & still
  return lax.cond(usable, lambda: (dq, dk, dv, dbias if any(wanted) else []),
                  lambda: _xla.cotangent(problem, plan, visits, out, lse, dout, dlse, wanted=wanted))


def _of_lse(call: Call, arrays: Arrays, dlse: Any) -> tuple[Any, Any]:
  """What a cotangent of lse adds to dq and dk, in float32.

  dS = P ∘ dlse, so dq = scale · dlse · P K, which is attention with the keys for values, and dk = (scale · P)ᵀ (dlse · q), which is
  the gradient of values whose cotangent is scale · dlse · q.
  """
  keys = arrays._replace(v=arrays.k)
  weight = call.scale * dlse[..., None]
  mean, _ = _over_batches(functools.partial(_attend, call), keys)
  _, _, dk = _over_batches(functools.partial(_backward, call), keys, (weight * arrays.q).astype(arrays.q.dtype))
  return weight * mean, dk.astype(jnp.float32)


def _call(problem: Problem) -> Call:
  read = _read(problem.logits.mask)
  assert read is not None and isinstance(problem.logits.scale, float)
  left = None if read.left is None or read.left >= problem.queries - 1 else read.left
  return Call(problem.logits.scale, read.causal, left)


def _arrays(problem: Problem) -> Arrays:
  """Where there are no keys cuDNN gets one, for rows whose answer is not used."""
  read, lengths = _read(problem.logits.mask), None
  if read and read.key_lengths:
    least = functools.reduce(jnp.minimum, [jnp.reshape(jnp.asarray(x, np.int32), -1) for x in read.key_lengths])
    lengths = jnp.broadcast_to(least.clip(1, problem.keys), (problem.batch,))
  return Arrays(problem.q, problem.k, problem.v, problem.logits.bias, lengths)


def _rows_that_see(problem: Problem) -> Any:
  """Which queries see a key at all, `[B|1, T, 1]`."""
  read = _read(problem.logits.mask)
  assert read is not None
  rows = np.arange(problem.queries, dtype=np.int32)[None, :, None]
  each = lambda x: jnp.reshape(x, (-1, 1, 1))
  terms = [rows < each(x) for x in read.query_lengths] + [each(x) > 0 for x in read.key_lengths]
  return functools.reduce(jnp.logical_and, terms, jnp.ones(rows.shape, bool))


# Calling it -----------------------------------------------------------------------------------------------------------


def _attend(call: Call, arrays: Arrays) -> tuple[Any, Any]:
  """`(out, lse)`, of JAX's own binding: `jax.nn.dot_product_attention` rounds lse to the dtype of query."""
  from jax._src.cudnn import fused_attention_stablehlo as binding
  kinds, q = binding.MaskType, arrays.q
  kind, lengths = kinds.CAUSAL if call.causal else kinds.NO_MASK, {}
  if arrays.lengths is not None:
    kind = kinds.PADDING_CAUSAL if call.causal else kinds.PADDING
    lengths = {"q_seqlen": jnp.full(q.shape[0], q.shape[1], np.int32), "kv_seqlen": arrays.lengths}
  # cuDNN counts the query's own key as part of the window.
  out, lse = binding.dot_product_attention(
      q, arrays.k, arrays.v, arrays.bias, **lengths, scale=call.scale, mask_type=kind,
      sliding_window_length=None if call.left is None else call.left + 1, return_residual=True)
  return out, lse.transpose(0, 2, 1)


def _backward(call: Call, arrays: Arrays, dout: Any) -> tuple[Any, ...]:
  """(dq, dk, dv), and dbias if there is a bias. The forward pass within it is merged with the first one, in one program."""
  moving = arrays._replace(lengths=None)
  _, pull = jax.vjp(lambda moving: _attend(call, moving._replace(lengths=arrays.lengths))[0], moving)
  return tuple(x for x in pull(dout)[0] if x is not None)


def _over_batches(function: Any, arrays: Arrays, *rest: Any) -> Any:
  """`function(arrays, *rest)`; `vmap` makes its axis part of the batch, or goes one by one if a bias is shared by the batch."""
  if arrays.bias is not None:
    return sequential_vmap(function)(arrays, *rest)
  merged = custom_vmap(function)

  @merged.def_vmap
  def merge(size, batched, *args):
    whole = lambda b, x: x if b else jnp.broadcast_to(x, (size, *x.shape))
    flat = jax.tree.map(lambda b, x: whole(b, x).reshape(-1, *x.shape[1 + b:]), batched, args)
    outs = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), merged(*flat))
    return outs, jax.tree.map(lambda _: True, outs)

  return merged(arrays, *rest)


@custom_vmap
def _everywhere(*conditions: Any) -> Any:
  """Whether all are True. Under `vmap`, in all of its batches: so the answer is one, and `lax.cond` stays a branch."""
  return functools.reduce(jnp.logical_and, [jnp.all(x) for x in conditions])


@_everywhere.def_vmap
def _everywhere_in_batches(size, batched, *conditions):
  del size, batched
  return _everywhere(*conditions), False
