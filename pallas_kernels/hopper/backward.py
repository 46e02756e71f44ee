"""What the kernels of the backward pass share: the gradients of a window of scores, and the two products that they come from.

The probabilities are computed again from lse. `jax.vjp` of the logits themselves gives the gradients of their arrays.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal

from .. import softmax
from . import launch, leaves, lookup


class TileGradients(NamedTuple):
  """What all passes compute alike, of one window."""

  p: Any  # the probabilities
  dqk: Any  # d(q·k)
  dleaves: tuple[Any, ...]  # the wanted leaves' parts of it, all of the window's shape
  drop: Any  # dropout of this window


def tile_weights(call: launch.Call, logits: Any, tiles: list[Any], window: leaves.Window, masked: bool, wanted: tuple[int, ...],
                 qk: Any, lse: Any, hide: bool = False) -> tuple[Any, Any]:
  """From q kᵀ and `lse()`, in the unit of the scores: functions for P after dropout, and, given `dp` and `delta`, for gradients.

  Functions are called where they are needed, and not before: a thread has few registers.

  Args:
    hide: whether what is not finite in hidden keys must not touch anything.
  """
  take = lookup.Replay(call.take)

  def scores(qk, given):
    filled = list(tiles)
    for number, x in zip(wanted, given):
      filled[number] = x
    return call.scores(logits, filled, window, qk, masked, take)

  given = [x if jnp.ndim(x) else window.everywhere(x) for x in (tiles[n] for n in wanted)]
  if any(isinstance(x, leaves.Table) for x in tiles):
    scores(qk, given)
    take.ready = True
  s, pull = jax.vjp(scores, qk, given)
  p = softmax.probabilities(s, lse(), call.weight)
  drop = functools.partial(call.drop, logits, tiles)
  seen = lambda x: jnp.where(s == -softmax.INF, 0.0, x) if hide else x

  def gradients(dp, delta):
    ds = softmax.dscores(p, drop(dp()), delta()) if call.dropped else softmax.dscores(p, dp(), 0.0)
    dqk, dleaves = _with_plain_sums(pull, seen(ds))
    return TileGradients(seen(p), dqk, tuple(dleaves), drop)

  return lambda: drop(seen(p)), gradients


def tile_gradients(call: launch.Call, logits: Any, tiles: list[Any], window: leaves.Window, masked: bool, wanted: tuple[int, ...],
                   qk: Any, lse: Any, dp: Any, delta: Any, hide: bool = False) -> TileGradients:
  """As `tile_weights`, and with `dp()`, which is dO Vᵀ, less δ unless there is dropout, and `delta()`."""
  return tile_weights(call, logits, tiles, window, masked, wanted, qk, lse, hide)[1](dp, delta)


def _with_plain_sums(fun: Any, x: Any) -> Any:
  """`fun(x)`, with additions for the sums of cotangents, which have a primitive of their own that Mosaic GPU lacks."""
  traced, shape = jax.make_jaxpr(fun, return_shape=True)(x)

  def evaluate(jaxpr, consts, args):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
      inputs, primitive, params = [read(a) for a in equation.invars], equation.primitive, equation.params
      if primitive.name in ("jit", "pjit"):
        outputs = evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)
      elif primitive.name == "add_any":
        outputs = [inputs[0] + inputs[1]]
      else:
        outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
        outputs = outputs if primitive.multiple_results else [outputs]
      values.update(zip(equation.outvars, outputs))
    return [read(a) for a in jaxpr.outvars]

  return jax.tree.unflatten(jax.tree.structure(shape), evaluate(traced.jaxpr, traced.consts, [x]))


def two_products(call: launch.Call, first: Any, second: Any, wait: Any, release: Any, start: Any, use: Any,
                  shape: tuple[int, int]) -> Any:
  """`use(s, dp)` of two products of tiles; the second comes less `start()`, and may still run until `dp()` is called."""
  acc = plgpu.ACC(shape, jnp.float32)
  if not call.overlapped:
    s = launch.product(call, first, acc)
    wait()
    dp = launch.product(call, second, acc)
    release()
    return use(s, lambda: dp if call.dropped else dp - start())

  def products(s_ref, dp_ref):
    if not call.dropped:
      dp_ref[...] = -start()  # between the products ptxas would have to wait for the first (C7517)
    for pair in call.products:
      plgpu.wgmma(s_ref, *first(*pair))
    wait()
    for pair in call.products:
      plgpu.wgmma(dp_ref, *second(*pair))
    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(call.products))

    def dp():
      result = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
      release()
      return result

    return use(s, dp)

  return pl.run_scoped(products, acc, acc)
