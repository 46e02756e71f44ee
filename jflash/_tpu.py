"""The Mosaic TPU kernels as a backend: heads lead, and what is shorter than a tile is filled up to one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import lookup, softmax, tpu
from pallas_kernels.tpu.backward import Residuals

from . import _parts, _plan
from ._problem import Problem
from ._program import programs


def supports(problem: Problem) -> str | None:
  """None, or why the kernels cannot compute this problem."""
  if problem.q.dtype == jnp.float64:
    return "a TPU has no float64; use implementation='xla'"
  if not _plan.interpreting() and (reason := _of_tiles(_plan.forced_tiles()) or _too_long(problem)):
    return reason
  for program in programs(problem.logits):
    if program.reason:
      return program.reason
    if program.largest_table > lookup.LARGEST:
      return (f"{program.name} looks up {program.largest_table} entries by query and key together, and a kernel at most "
              f"{lookup.LARGEST}; use implementation='xla', or bucket the positions")
  return None


def _of_tiles(asked: tuple[int, int] | None) -> str | None:
  if asked is not None and any(side % 128 for side in asked):
    return f"its tiles are multiples of 128 and `tiles` is {asked}"
  return None


def _too_long(problem: Problem) -> str | None:
  """Whether a single list of visits outgrows the chip's scalar memory."""
  plan = _plan.plan_tpu(problem)
  _, length = _plan.tpu_lists(problem, plan)
  if length <= _plan.MOST_VISITS:
    return None
  smallest = min(plan.tiles, plan.backward_tiles or plan.tiles)
  return (f"a list of {length} visits does not fit into a chip's scalar memory, which holds {_plan.MOST_VISITS} (tiles are "
          f"{smallest[0]} x {smallest[1]}); use larger `tiles`, a mask that is known while tracing, max_blocks of "
          "masks.BlockSparse, or implementation='xla'")


def _call(problem: Problem, plan: _plan.Plan, tiles: tuple[int, int]) -> tpu.Call:
  unit, _ = problem.logits.in_units()
  return tpu.Call(problem.queries, problem.keys, problem.groups, problem.product, tiles, plan.kinds, plan.together,
                  plan.spans, unit, plan.interpret)


def _lead(x: Any, tile: int) -> Any:
  """`[B, T, N, H]` as `[B, N, T, H]`, in a type that the chip multiplies, at least one tile long."""
  x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
  return _fill(x.transpose(0, 2, 1, 3), 2, tile)


def _fill(x: Any, axis: int, tile: int) -> Any:
  missing = tile - x.shape[axis]
  return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing > 0 else x


def _fill_logits(problem: Problem, tiles: tuple[int, int]) -> Any:
  fill = lambda x: functools.reduce(lambda y, a: y if y.shape[a] == 1 else _fill(y, a, tiles[a - 2]), (2, 3), x)
  return jax.tree.map(fill, problem.logits.in_units()[1])


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: _plan.Plan, visits: _plan.Schedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  out, lse, _ = _parts.each(problem, plan.chunk, visits, functools.partial(_forward, plan))
  return out, lse


def _forward(plan: _plan.Plan, problem: Problem, visits: _plan.Schedule, _: Any) -> tuple[Any, Any, list[Any]]:
  q, k, v = (_lead(x, plan.tiles[side]) for side, x in zip((0, 1, 1), (problem.q, problem.k, problem.v)))
  out, lse = tpu.forward(_call(problem, plan, plan.tiles), q, k, v, _fill_logits(problem, plan.tiles), visits.rows)
  out = out[:, :, :problem.queries].transpose(0, 2, 1, 3).astype(problem.v.dtype)
  return out, lse[:, :, 0, :problem.queries].transpose(0, 2, 1), []


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: _plan.Plan, visits: _plan.Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`)."""
  return _parts.each(problem, plan.chunk, visits, functools.partial(_cotangent, plan), (out, lse, dout, dlse), wanted)


def _cotangent(plan: _plan.Plan, problem: Problem, visits: _plan.Schedule, out: Any, lse: Any, dout: Any, dlse: Any,
               wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  tiles = rows, columns = plan.backward_tiles or plan.tiles
  call = _call(problem, plan, tiles)
  dout, delta = softmax.row_cotangents(out, lse, dout, dlse)
  statistic = lambda x: _fill(x.astype(jnp.float32).transpose(0, 2, 1)[:, :, None, :], 3, rows)
  residuals = Residuals(_lead(problem.q, rows), _lead(problem.k, columns), _lead(problem.v, columns), _lead(dout, rows),
                        statistic(lse), statistic(delta))
  logits = _fill_logits(problem, tiles)
  grads = tpu.backward(call, residuals, logits, visits.dq or visits.rows, visits.columns)
  back = lambda x, like: x[:, :, :like.shape[1]].transpose(0, 2, 1, 3).astype(like.dtype)
  dq, dk, dv = (back(x, like) for x, like in zip(grads, (problem.q, problem.k, problem.v)))

  dleaves = []
  for number, (w, leaf) in enumerate(zip(wanted, jax.tree.leaves(problem.logits))):
    if w:
      dleaf = tpu.leaf_gradient(call, residuals, logits, number, visits.kinds)
      dleaves.append(dleaf[tuple(slice(n) for n in leaf.shape)].astype(leaf.dtype))
  return dq, dk, dv, dleaves


