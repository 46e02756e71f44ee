"""Tiles of the kernels for Hopper: a table by width of heads, and a rule for what is not in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._problem import Problem


@dataclasses.dataclass(frozen=True)
class Launch:
  """How one kernel is cut up. Warpgroups share out the side that a thread block keeps, 64 rows or columns each."""

  tiles: tuple[int, int]  # query rows, key columns
  stages: int = 2  # tiles loaded ahead
  turns: bool = False  # whether two warpgroups take turns at the tensor cores


@dataclasses.dataclass(frozen=True)
class Launches:
  """The three kernels of a problem."""

  forward: Launch
  dq: Launch
  dkv: Launch
  split: bool  # whether dK and dV have a kernel each, for want of registers
  pieces: int  # bfloat16 numbers for each float32


def pieces(dtype: Any) -> int:
  """How many bfloat16 numbers stand for one number: for float32 two, or three for `jax.default_matmul_precision("highest")`."""
  if dtype != jnp.float32:
    return 1
  return 3 if str(jax.config.jax_default_matmul_precision).lower() in ("highest", "float32") else 2  # type: ignore[attr-defined]


def launches(problem: Problem, forced: tuple[int, int] | None) -> Launches:
  """For a problem with heads of up to 256."""
  width = lane_width(max(problem.width, problem.value_width))
  arrays = any(isinstance(x, jax.Array) for x in jax.tree.leaves(problem.logits))
  if forced:
    small = Launch(forced)
    return Launches(small, small, small, width > 128, pieces(problem.q.dtype))
  return TABLE[width, pieces(problem.q.dtype), arrays]


def lane_width(n: int) -> int:
  """The width that tiles of heads of width n have."""
  return 64 * -(-n // 64)


TABLE = {
    (width, count, arrays): Launches(Launch((128, 64)), Launch((64, 64), 1), Launch((64, 64), 1), True, count)
    for width in (64, 128, 192, 256) for count in (1, 2, 3) for arrays in (False, True)}
