"""Calling cuDNN's attention through JAX, as functions of arrays that `vmap` may map over.

`jax.nn.dot_product_attention(implementation="cudnn")` would be public, but rounds lse to the dtype of query, so this calls what is
beneath it. All that is known about that private API is in `_attend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap

PLATFORM = "cuda"  # where the library is


class Call(NamedTuple):
  """What cuDNN is told besides arrays."""

  scale: float
  causal: bool
  left: int | None  # how many keys before its own a query sees; None is no limit


class Arrays(NamedTuple):
  """What it is handed."""

  q: Any  # [B, T, N, H]
  k: Any  # [B, S, K, H]
  v: Any  # [B, S, K, H]
  bias: Any  # [1, N, T, S], or None
  lengths: Any  # [B], how many keys there are, at least 1, or None for S


def attend(call: Call, arrays: Arrays) -> tuple[Any, Any]:
  """`(out [B, T, N, H], lse [B, T, N])`."""
  return _over_batches(_where_it_is(functools.partial(_attend, call)), arrays)


def backward(call: Call, arrays: Arrays, dout: Any) -> tuple[Any, ...]:
  """(dq, dk, dv), and dbias if there is a bias.

  The forward pass is part of it; in one program with `attend` of the same arrays, XLA merges the two.
  """
  return _over_batches(_where_it_is(functools.partial(_backward, call)), arrays, dout)


def _attend(call: Call, arrays: Arrays) -> tuple[Any, Any]:
  from jax._src.cudnn import fused_attention_stablehlo as binding
  q, kinds = arrays.q, binding.MaskType
  kind, lengths = kinds.CAUSAL if call.causal else kinds.NO_MASK, {}
  if arrays.lengths is not None:
    kind = kinds.PADDING_CAUSAL if call.causal else kinds.PADDING
    lengths = {"q_seqlen": jnp.full(q.shape[0], q.shape[1], np.int32), "kv_seqlen": arrays.lengths}
  # cuDNN counts the query's own key as part of the window.
  result: Any = binding.dot_product_attention(
      q, arrays.k, arrays.v, arrays.bias, **lengths, scale=call.scale, mask_type=kind,
      sliding_window_length=None if call.left is None else call.left + 1, return_residual=True)
  out, lse = result
  return out, lse.transpose(0, 2, 1)


def _backward(call: Call, arrays: Arrays, dout: Any) -> tuple[Any, ...]:
  moving = arrays._replace(lengths=None)
  pull: Any = jax.vjp(lambda moving: _attend(call, moving._replace(lengths=arrays.lengths))[0], moving)[1]
  return tuple(x for x in pull(dout)[0] if x is not None)


def _where_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, or NaN where a program is compiled for a device without cuDNN, such as the CPU beside a GPU."""

  def call(*args):
    nothing = lambda: jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(function, *args))
    return lax.platform_dependent(**{PLATFORM: lambda: function(*args)}, default=nothing)

  return call


def _over_batches(function: Callable[..., Any], arrays: Arrays, *rest: Any) -> Any:
  """`function(arrays, *rest)`; `vmap` makes its axis part of the batch, or goes one by one where all of a batch share a bias.

  JAX 0.10 has a rule of its own for `vmap`, but not for arrays of which some are mapped over and some are not.
  """
  if arrays.bias is not None:
    return sequential_vmap(function)(arrays, *rest)
  merged = custom_vmap(function)

  @merged.def_vmap
  def _(size, batched, *args):
    whole = lambda b, x: x if b else jnp.broadcast_to(x, (size, *x.shape))
    flat = jax.tree.map(lambda b, x: whole(b, x).reshape(-1, *x.shape[1 + b:]), tuple(batched), args)
    outs = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), merged(*flat))
    return outs, jax.tree.map(lambda _: True, outs)

  return merged(arrays, *rest)


@custom_vmap
def everywhere(*conditions: Any) -> Any:
  """Whether all are True. Under `vmap`, in all of its batches: so the answer is one, and `lax.cond` stays a branch."""
  return functools.reduce(jnp.logical_and, [jnp.all(x) for x in conditions])


@everywhere.def_vmap
def _(size, batched, *conditions):
  del size, batched
  return everywhere(*conditions), False
