"""The derivatives of attention, the same for every backend, in forward and in reverse mode.

Reverse mode alone could be a `jax.custom_vjp`, but a function with one refuses forward mode. Here a `jax.custom_jvp` states the
tangent, a linear map of the tangents of q, k, v and the logits' arrays, and that map is a primitive that carries its own
transpose: the backend's backward pass. So `grad`, `jvp`, `linearize`, `vmap` and `checkpoint` all see the tiled passes, and what
is saved for the backward pass is q, k, v, out, lse and the logits' own arrays: nothing of size T·S.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from . import _backends, _plan, _xla
from ._linear import linear_map
from ._problem import Problem
from ._program import programs

OUT_NAME, LSE_NAME = "jflash_out", "jflash_lse"  # for policies of `jax.checkpoint`


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def attend(backend: str, plan: _plan.Plan, problem: Problem, schedule: _plan.Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`, both differentiable in q, k, v and every float array of the logits.

  With `plan.alone` lse is nothing that may be used, unless a derivative is taken.
  """
  return _backends.get(backend).load().forward(problem, plan, schedule)


def _attend_jvp(backend, plan, primals, tangents):
  problem, schedule = primals
  plan = dataclasses.replace(plan, alone=None)
  out, lse = attend(backend, plan, problem, schedule)
  out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
  leaves, structure = jax.tree.flatten(problem)
  dleaves = jax.tree.leaves(tangents[0], is_leaf=lambda x: isinstance(x, SymbolicZero))
  moves = tuple(not isinstance(d, SymbolicZero) and jnp.issubdtype(x.dtype, jnp.floating) for x, d in zip(leaves, dleaves))

  def apply(residuals, moving):
    problem, schedule, out, lse = residuals
    moving = iter(moving)
    zero = lambda x: jnp.zeros(x.shape, x.dtype)
    dproblem = structure.unflatten([next(moving) if m else zero(x) for m, x in zip(moves, jax.tree.leaves(problem))])
    return _xla.tangent(problem, *_in_plain_jax(backend, plan, problem, schedule), out, lse, dproblem)

  def transpose(residuals, cotangents):
    problem, schedule, out, lse = residuals
    dq, dk, dv, dlogits = _cotangent(backend, plan, moves[3:], problem, schedule, out, lse, *cotangents)
    return [g for m, g in zip(moves[:3], (dq, dk, dv)) if m] + dlogits

  moving = [d for m, d in zip(moves, dleaves) if m]
  if not moving:
    return (out, lse), (jnp.zeros_like(out), jnp.zeros_like(lse))
  residuals = problem, schedule, out, lse
  if any(program.closed_over for program in programs(problem.logits)):
    # What a function closes over may be gone when these run. Its graphs for their tiles are made now, and kept (`_program`).
    jax.eval_shape(lambda: (apply(residuals, moving), transpose(residuals, (out, lse))))
  return (out, lse), linear_map(apply, transpose, residuals, moving)


attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _in_plain_jax(backend, plan, problem, schedule):
  """(plan, schedule) of the plain-JAX backend, for what no kernel has a pass of its own."""
  if backend == "xla":
    return plan, schedule
  plain = _plan.plan_xla(problem)
  return plain, _plan.make_schedule(problem, plain)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _kernel_cotangent(backend, plan, wanted, *args):
  return _backends.get(backend).load().cotangent(args[0], plan, *args[1:], wanted=wanted)


@_kernel_cotangent.defjvp
def _kernel_cotangent_jvp(backend, plan, wanted, primals, tangents):
  """Of second order: the derivative of the plain-JAX pass, which computes the same."""
  problem, schedule, *rest = primals
  plain, visits = _in_plain_jax(backend, plan, problem, schedule)
  moved = jax.jvp(lambda problem, *rest: _xla.cotangent(problem, plain, visits, *rest, wanted=wanted), [problem, *rest],
                  [tangents[0], *tangents[2:]])[1]
  return _kernel_cotangent(backend, plan, wanted, *primals), moved


def _cotangent(backend, plan, wanted, problem, schedule, *rest):
  if backend == "xla":
    return _xla.cotangent(problem, plan, schedule, *rest, wanted=wanted)
  return _kernel_cotangent(backend, plan, wanted, problem, schedule, *rest)
