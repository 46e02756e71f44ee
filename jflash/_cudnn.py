"""cuDNN as a backend: NVIDIA's attention in bfloat16 and float16, for what it supports, with plain JAX to catch what it drops.

It is trusted with little. A row that sees nothing, whose answer it does not define, never reaches it. It multiplies values that a
mask hides by 0, so that a NaN in one would spread, and some versions make NaN of finite numbers in the backward pass: where
anything that it returns is not finite, the pass is computed again in plain JAX. And it has no cotangent of lse: see `_of_lse`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import products

from . import _cudnn_call, _gpu, _plan, _xla, masks
from ._cudnn_call import Arrays, Call, everywhere
from ._mask import And, Mask
from ._plan import Plan, Schedule
from ._problem import Problem

_XLA = "use implementation='xla'"


class Masks(NamedTuple):
  """A mask in the terms that cuDNN has. Lengths are integers or `[B|1, 1, 1, 1]`, and the least of them counts."""

  causal: bool
  left: int | None  # how many keys before its own a query sees; None is no limit
  query_lengths: list[Any]
  key_lengths: list[Any]


def _read(mask: Mask | None) -> Masks | None:
  """The mask in cuDNN's terms; None if it has none for it."""
  causal, ahead, lefts, query, key = False, False, [], [], []
  for term in _terms(mask):
    if isinstance(term, masks.Lengths):
      query += [] if term.query is None else [term.query]
      key += [] if term.key is None else [term.key]
    elif isinstance(term, masks.Causal):
      causal = True
    elif isinstance(term, masks.Window) and all(side is None or isinstance(side, int) for side in (term.left, term.right)):
      causal, ahead = causal or term.right == 0, ahead or term.right not in (0, None)
      lefts += [] if term.left is None else [term.left]
    else:
      return None
  return None if ahead and not causal else Masks(causal, min(lefts, default=None), query, key)


def _terms(mask: Mask | None) -> list[Mask]:
  """What a mask is the conjunction of."""
  if isinstance(mask, And):
    return _terms(mask.a) + _terms(mask.b)
  return [] if mask is None else [mask]


# What it supports -----------------------------------------------------------------------------------------------------


def supports(problem: Problem) -> str | None:
  """None, or why cuDNN cannot compute this problem."""
  if tiles := _plan.forced_tiles():
    return f"cuDNN chooses its own tiles, and `tiles` is {tiles}; leave them out, or {_XLA}"
  return _of_sizes(problem) or _of_scores(problem) or _of_mask(problem)


def _of_sizes(problem: Problem) -> str | None:
  dtype, width, values = problem.q.dtype, problem.width, problem.value_width
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN computes in bfloat16 and float16, and `query` has dtype {dtype}; cast query, key and value, or {_XLA}"
  if width != values:
    return f"cuDNN wants one head width, and `query` has {width} and `value` has {values}; {_XLA}"
  widest = 256 if _gpu.capability() == (9, 0) else 128
  if width % 8 or width > widest:
    return f"cuDNN wants a head width that is a multiple of 8 and at most {widest} on this GPU, and it is {width}; {_XLA}"
  return None


def _of_scores(problem: Problem) -> str | None:
  logits, bias = problem.logits, problem.logits.bias
  if problem.product is not products.Dot:
    return f"cuDNN's scores are products, and these are distances; {_XLA}"
  others = {"alibi_slopes": logits.alibi_slopes, "score_mod": logits.score_mod, "logits_soft_cap": logits.soft_cap,
            "dropout_rate": logits.dropout, "query_positions": logits.query_positions, "key_value_positions": logits.key_positions}
  if given := [name for name, value in others.items() if value is not None]:
    return f"cuDNN as JAX calls it has no {given[0]}; {_XLA}"
  if not isinstance(logits.scale, float) or not 0 < logits.scale < math.inf:
    return f"cuDNN wants a `scale` that is a Python number greater than 0; {_XLA}"
  shape = 1, problem.heads, problem.queries, problem.keys
  if bias is not None and (bias.shape != shape or bias.dtype != problem.q.dtype or shape[2] % 2 or shape[3] % 2):
    return (f"cuDNN has gradients for a `bias` [1, N, T, S] with T and S even, in the dtype of `query`, here {list(shape)} in "
            f"{problem.q.dtype}, and `bias` is {list(bias.shape)} in {bias.dtype}; {_XLA}")
  return None


def _of_mask(problem: Problem) -> str | None:
  mask = problem.logits.mask
  read = _read(mask)
  if read is None:
    return ("cuDNN has is_causal, a window (left, 0) and lengths (of an array it makes a bias, and of a row that sees nothing the "
            f"mean of all values), and the mask is {mask!r}; {_XLA}")
  limited = read.query_lengths or read.key_lengths or problem.logits.bias is not None or problem.queries > problem.keys
  if read.left is not None and (not read.causal or limited):
    return f"cuDNN's window is causal, with no bias, no lengths, and no more queries than keys; {_XLA}"
  if read.causal and problem.queries == 1:
    return f"cuDNN has no causal mask for one query; {_XLA}"
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  lengths = jax.ShapeDtypeStruct((problem.batch,), np.int32) if read.key_lengths else None
  arrays = Arrays(*jax.tree.map(struct, (problem.q, problem.k, problem.v, problem.logits.bias)), lengths=lengths)
  return _refused_by_jax(_call(problem), arrays, _gpu.capability(), _gpu.cudnn_version())


@functools.lru_cache(maxsize=1024)
def _refused_by_jax(call: Call, arrays: Arrays, *gpu: Any) -> str | None:
  """What JAX itself checks, found by tracing both passes; it looks at `gpu` on its own."""
  del gpu
  try:
    with jax.default_device(None):  # where `explain` evaluates constants, which on a GPU that is not here it could not
      jax.eval_shape(functools.partial(_cudnn_call.backward, call), arrays, arrays.q)
  except Exception as error:  # a limit of this JAX, or a binding that has moved
    return f"JAX {jax.__version__} does not call cuDNN for it, {type(error).__name__}: {error}; {_XLA}"
  return None


# The two passes -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: Plan, visits: Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  seen = _rows_that_see(problem)
  out, lse = _cudnn_call.attend(_call(problem), _arrays(problem))
  out, lse = jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, 0)
  return lax.cond(everywhere(jnp.isfinite(out), jnp.isfinite(lse)),
                  lambda: (out, jnp.where(seen, lse, -jnp.inf)), lambda: _xla.forward(problem, plan, visits))


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: Plan, visits: Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`): of the bias, as no other leaf is supported."""
  call, arrays, seen = _call(problem), _arrays(problem), _rows_that_see(problem)
  seen_dout, seen_dlse = jnp.where(seen[..., None], dout, 0), jnp.where(seen, dlse, 0)
  dq, dk, dv, *dbias = _cudnn_call.backward(call, arrays, seen_dout)
  usable = still = everywhere(seen_dlse == 0)
  if arrays.bias is None:
    more = lambda: tuple((x + y).astype(x.dtype) for x, y in zip((dq, dk), _of_lse(call, arrays, seen_dlse)))
    dq, dk = lax.cond(still, lambda: (dq, dk), more)
    usable = True
  usable &= everywhere(*map(jnp.isfinite, (dq, dk, dv, *dbias)))
  return lax.cond(usable, lambda: (dq, dk, dv, dbias if any(wanted) else []),
                  lambda: _xla.cotangent(problem, plan, visits, out, lse, dout, dlse, wanted=wanted))


def _of_lse(call: Call, arrays: Arrays, dlse: Any) -> tuple[Any, Any]:
  """What a cotangent of lse adds to dq and dk, in float32.

  dS = P ∘ dlse, so dq = scale · dlse · P K, which is attention with the keys for values, and dk = scale · Pᵀ (dlse · q), which is
  the gradient of values whose cotangent is scale · dlse · q. (That of a bias is neither, and left to plain JAX.)
  """
  keys, weight = arrays._replace(v=arrays.k), call.scale * dlse[..., None]
  mean, _ = _cudnn_call.attend(call, keys)
  _, _, dk = _cudnn_call.backward(call, keys, (weight * arrays.q).astype(arrays.q.dtype))
  return weight * mean, dk.astype(jnp.float32)


def _masks(problem: Problem) -> Masks:
  read = _read(problem.logits.mask)
  assert read is not None, "`supports` is asked first"
  return read


def _call(problem: Problem) -> Call:
  read = _masks(problem)
  return Call(problem.logits.scale, read.causal, None if (read.left or 0) >= problem.queries - 1 else read.left)


def _arrays(problem: Problem) -> Arrays:
  """Where there are no keys cuDNN gets one, for rows whose answer is not used."""
  given, lengths = _masks(problem).key_lengths, None
  if given:
    least = functools.reduce(jnp.minimum, [jnp.reshape(jnp.asarray(x, np.int32), -1) for x in given])
    lengths = jnp.broadcast_to(least.clip(1, problem.keys), (problem.batch,))
  return Arrays(problem.q, problem.k, problem.v, problem.logits.bias, lengths)


def _rows_that_see(problem: Problem) -> Any:
  """Which queries see a key at all, `[B|1, T, 1]`."""
  read, rows = _masks(problem), np.arange(problem.queries, dtype=np.int32)[None, :, None]
  each = lambda x: jnp.reshape(x, (-1, 1, 1))
  terms = [rows < each(x) for x in read.query_lengths] + [each(x) > 0 for x in read.key_lengths]
  return functools.reduce(jnp.logical_and, terms, jnp.ones(rows.shape, bool))
