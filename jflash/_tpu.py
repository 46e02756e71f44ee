"""The Mosaic TPU kernels as a backend: heads lead, and what is shorter than a tile is filled up to one."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import lookup, softmax, tpu
from pallas_kernels.tpu.backward import Residuals

from . import _plan
from ._problem import Problem
from ._program import programs


def supports(problem: Problem) -> str | None:
  """None, or why the kernels cannot compute this problem."""
  if problem.q.dtype == jnp.float64:
    return "a TPU has no float64; use implementation='xla'"
  if reason := _too_long(problem):
    return reason
  for program in programs(problem.logits):
    if program.reason:
      return program.reason
    if program.largest_table > lookup.LARGEST:
      return (f"{program.name} looks up {program.largest_table} entries by query and key together, and a kernel at most "
              f"{lookup.LARGEST}; use implementation='xla', or bucket the positions")
  return None


MOST_VISITS = 240_000  # of one list: they are 4 bytes each, and a chip has 1 MiB of scalar memory


def _too_long(problem: Problem) -> str | None:
  """Whether the lists of visits outgrow the chip's scalar memory."""
  plan = _plan.plan_tpu(problem)
  tiles = math.prod(-(-n // side) for n, side in zip((problem.queries, problem.keys), plan.tiles))
  if problem.batch * problem.kv_heads * tiles <= MOST_VISITS:
    return None
  visits = jax.eval_shape(lambda: _plan.make_schedule(problem, plan))
  lists = {"visits": max(visits.rows.codes.size, visits.columns.codes.size)}
  if any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(problem.logits)):
    lists["tiles, for the gradients of bias and the like,"] = visits.kinds.size
  for what, size in lists.items():
    if size > MOST_VISITS:
      return (f"a list of {size} {what} does not fit into a chip's scalar memory, which holds {MOST_VISITS} (tiles "
              f"are {plan.tiles[0]} x {plan.tiles[1]}); use implementation='xla', a mask that is known while tracing, "
              "max_blocks of masks.BlockSparse, or fewer batch elements")
  return None


def _call(problem: Problem, plan: _plan.Plan) -> tpu.Call:
  unit, _ = problem.logits.in_units()
  return tpu.Call(problem.queries, problem.keys, problem.groups, problem.product, plan.tiles, plan.kinds, plan.together,
                  plan.one_kernel, unit, plan.interpret)


def _lead(x: Any, tile: int) -> Any:
  """`[B, T, N, H]` as `[B, N, T, H]`, in a type that the chip multiplies, at least one tile long."""
  x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
  return _fill(x.transpose(0, 2, 1, 3), 2, tile)


def _fill(x: Any, axis: int, tile: int) -> Any:
  missing = tile - x.shape[axis]
  return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing > 0 else x


def _fill_logits(problem: Problem, plan: _plan.Plan) -> Any:
  fill = lambda x: functools.reduce(lambda y, a: y if y.shape[a] == 1 else _fill(y, a, plan.tiles[a - 2]), (2, 3), x)
  return jax.tree.map(fill, problem.logits.in_units()[1])


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: _plan.Plan, visits: _plan.Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  q, k, v = (_lead(x, plan.tiles[side]) for side, x in zip((0, 1, 1), (problem.q, problem.k, problem.v)))
  out, lse = tpu.forward(_call(problem, plan), q, k, v, _fill_logits(problem, plan), visits.rows)
  out = out[:, :, :problem.queries].transpose(0, 2, 1, 3).astype(problem.v.dtype)
  return out, lse[:, :, 0, :problem.queries].transpose(0, 2, 1)


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: _plan.Plan, visits: _plan.Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`)."""
  rows, columns = plan.tiles
  call = _call(problem, plan)
  dout, delta = softmax.row_cotangents(out, lse, dout, dlse)
  statistic = lambda x: _fill(x.astype(jnp.float32).transpose(0, 2, 1)[:, :, None, :], 3, rows)
  residuals = Residuals(_lead(problem.q, rows), _lead(problem.k, columns), _lead(problem.v, columns), _lead(dout, rows),
                        statistic(lse), statistic(delta))
  logits = _fill_logits(problem, plan)
  grads = tpu.backward(call, residuals, logits, visits.rows, visits.columns)
  back = lambda x, like: x[:, :, :like.shape[1]].transpose(0, 2, 1, 3).astype(like.dtype)
  dq, dk, dv = (back(x, like) for x, like in zip(grads, (problem.q, problem.k, problem.v)))

  dleaves = []
  for number, (w, leaf) in enumerate(zip(wanted, jax.tree.leaves(problem.logits))):
    if w:
      dleaf = tpu.leaf_gradient(call, residuals, logits, number, visits.kinds)
      dleaves.append(dleaf[tuple(slice(n) for n in leaf.shape)].astype(leaf.dtype))
  return dq, dk, dv, dleaves


