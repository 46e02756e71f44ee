"""A problem a few batch elements and heads at a time, where the lists of visits of all of them outgrow a chip's scalar memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._logits import Logits
from ._plan import Schedule
from ._problem import Problem
from ._program import programs

_TOKENS, _SCORES = (0, 2), (0, 1)  # axes of batch and heads in `[B, T, N, …]`, and in `[B|1, N|1, T|1, S|1, …]`


def each(problem: Problem, chunk: tuple[int, int], visits: Schedule, compute: Callable[..., Any], rest: tuple[Any, ...] = (),
         wanted: tuple[bool, ...] = ()) -> tuple[Any, ...]:
  """`compute(problem, visits, *rest, wanted)`, part by part, for `chunk` batch elements and kv heads each.

  Args:
    compute: gives arrays `[B, T, N, …]`, and last a list of gradients of those leaves of the logits that are wanted.
    rest: more arrays `[B, T, N, …]`.
  """
  counts = problem.batch // chunk[0], problem.kv_heads // chunk[1]
  if counts == (1, 1):
    return compute(problem, visits, *rest, wanted)
  logits = _numbered(problem)
  known = {id(x): w for x, w in zip(jax.tree.leaves(problem.logits), wanted)}
  wanted = tuple(known.get(id(x), False) for x in jax.tree.leaves(logits))

  def part(number):
    place = lax.div(number, counts[1]), lax.rem(number, counts[1])

    def cut(x, axes):
      for axis, count, n in zip(axes, counts, place):
        if x.shape[axis] > 1 and count > 1:
          x = lax.dynamic_slice_in_dim(jnp.asarray(x), n * (x.shape[axis] // count), x.shape[axis] // count, axis)
      return x

    q, k, v, *others = (cut(x, _TOKENS) for x in (problem.q, problem.k, problem.v, *rest))
    of_scores, of_visits = jax.tree.map(lambda x: cut(x, _SCORES), (logits, visits))
    return compute(dataclasses.replace(problem, q=q, k=k, v=v, logits=of_scores), of_visits, *others, wanted)

  def join(x, axes, whole):
    """Of all parts, one after the other, an array of the shape `whole`; along an axis that was not cut they are summed."""
    x = x.reshape(*counts, *x.shape[1:])
    for lead in (1, 0):
      axis = lead + axes[lead]
      if whole[axes[lead]] > 1:
        x = jnp.moveaxis(x, lead, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:])
      else:
        x = x.sum(axis=lead)
    return x

  *tokens, dleaves = lax.map(part, jnp.arange(counts[0] * counts[1], dtype=jnp.int32))
  cotangents = zip(dleaves, [x for x, w in zip(jax.tree.leaves(logits), wanted) if w])
  return *(join(x, _TOKENS, _whole(x, counts)) for x in tokens), [join(d, _SCORES, x.shape).astype(d.dtype) for d, x in cotangents]


def _whole(x: Any, counts: tuple[int, int]) -> tuple[int, ...]:
  """The shape of `[B, T, N, …]`, given all parts of it."""
  _, batch, queries, heads, *width = x.shape
  return batch * counts[0], queries, heads * counts[1], *width


def _numbered(problem: Problem) -> Logits:
  """The logits with the numbers of batch elements and heads as arrays, where functions ask for them: a part has its own."""
  logits = problem.logits
  if not programs(logits):
    return logits
  numbers = lambda own, shape: jnp.arange(max(shape), dtype=jnp.int32).reshape(shape) if own is None else own
  return dataclasses.replace(logits, batch_ids=numbers(logits.batch_ids, (problem.batch, 1, 1, 1)),
                             head_ids=numbers(logits.head_ids, (1, problem.heads, 1, 1)))
