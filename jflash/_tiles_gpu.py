"""Tiles of the kernels for Hopper: a table by width of heads, and a rule for what is not in it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._problem import Problem

_in_turn: contextvars.ContextVar[bool] = contextvars.ContextVar("jflash_in_turn", default=False)
_fusing: contextvars.ContextVar[bool | None] = contextvars.ContextVar("jflash_fusing", default=None)


@dataclasses.dataclass(frozen=True)
class Launch:
  """How one kernel is cut up. Warpgroups share out the side that a thread block keeps, 64 rows or columns each."""

  tiles: tuple[int, int]  # query rows, key columns
  stages: int = 2  # tiles loaded ahead
  turns: bool = False  # whether two warpgroups take turns at the tensor cores
  fold: int = 1  # query heads of a kv head that are rows of one tile, where there are few queries

  @property
  def of_scores(self) -> tuple[int, int]:
    """Queries and keys of a tile."""
    return self.tiles[0] // self.fold, self.tiles[1]


@dataclasses.dataclass(frozen=True)
class Launches:
  """The three kernels of a problem."""

  forward: Launch
  dq: Launch
  dkv: Launch
  split: bool  # whether dK and dV have a kernel each, for want of registers; not where heads are wide, which two warpgroups share
  pieces: int  # bfloat16 numbers for each float32
  overlapped: bool = True  # whether products run beside other work, with operands in registers: what no interpreter does
  fused: Launch | None = None  # one kernel in place of dq and dkv, see `FUSED`
  ordered: bool = True  # whether two runs of that kernel give the same bits


def precision() -> str | None:
  return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def pieces(dtype: Any) -> int:
  """How many bfloat16 numbers stand for one number: for float32 two, or three for `jax.default_matmul_precision("highest")`."""
  if dtype != jnp.float32:
    return 1
  return 3 if str(precision()).lower() in ("highest", "float32") else 2


@contextlib.contextmanager
def one_product_at_a_time(on: bool = True):
  """What is traced inside computes as in the interpreter, compiled: to test that it does so on a device as well."""
  token = _in_turn.set(on)
  try:
    yield
  finally:
    _in_turn.reset(token)


@contextlib.contextmanager
def backward_in_one_kernel(ordered: bool = True):
  """What is traced inside has gradients by `hopper.fused` where there is a tile for it in `FUSED`: to test and to time it.

  Args:
    ordered: whether two runs give the same bits.
  """
  token = _fusing.set(ordered)
  try:
    yield
  finally:
    _fusing.reset(token)


def context() -> Any:
  """What these choices depend on besides the problem."""
  return _in_turn.get(), _fusing.get()


def launches(problem: Problem, forced: tuple[int, int] | None) -> Launches:
  """For a problem with heads of up to 256."""
  width = lane_width(max(problem.width, problem.value_width))
  arrays = bool(jax.tree.leaves(problem.logits))
  chosen, fold = _chosen(problem, width, arrays, forced), _fold(problem)
  ordered = _fusing.get()
  if ordered is not None and not forced and chosen.pieces == 1:
    chosen = dataclasses.replace(chosen, fused=FUSED.get((width, problem.logits.dropout is not None)), ordered=ordered)
  if fold == 1:
    return chosen
  forward = dataclasses.replace(chosen.forward, tiles=(64, chosen.forward.tiles[1]), turns=False, fold=fold)
  return dataclasses.replace(chosen, forward=forward)


def _fold(problem: Problem) -> int:
  """All query heads of a kv head where they fill less than a tile together, as when decoding; K and V are loaded once for them."""
  tables = any(x.ndim > 4 and x.shape[1] > 1 for x in jax.tree.leaves(problem.logits))
  few = problem.queries * problem.groups <= 64 and 64 % problem.groups == 0
  return problem.groups if few and not tables else 1


def _chosen(problem: Problem, width: int, arrays: bool, forced: tuple[int, int] | None) -> Launches:
  if forced or _in_turn.get():  # the latter takes room for P and dS
    small = Launch(forced or (64, 64), 2 if forced else 1)
    dkv = small if width <= 128 else dataclasses.replace(small, tiles=(64, 64))  # all that two warpgroups can share
    return Launches(small, small, dkv, False, pieces(problem.q.dtype), overlapped=not _in_turn.get())
  return TABLE[width, pieces(problem.q.dtype), arrays]


def lane_width(n: int) -> int:
  """The width that tiles of heads of width n have."""
  return 64 * -(-n // 64)


# By width, pieces and whether the scores are made of arrays, which take registers. Not tuned on a device yet: these are the largest
# that the compiler fits into registers and shared memory (JAX 0.12.0.1, ptxas 13.5, 2026-11-23).
_TURNS = Launch((128, 128), 2, True)
TABLE: dict[tuple[int, int, bool], Launches] = {
    (64, 1, False): Launches(_TURNS, Launch((128, 128)), Launch((128, 128)), False, 1),
    (64, 1, True): Launches(_TURNS, Launch((128, 64)), Launch((64, 128)), False, 1),
    (128, 1, False): Launches(_TURNS, Launch((128, 128)), Launch((64, 128)), False, 1),
    (128, 1, True): Launches(Launch((128, 64), 3, True), Launch((128, 64)), Launch((64, 128)), True, 1),
    (192, 1, False): Launches(Launch((128, 64), 2, True), Launch((128, 64)), Launch((64, 64)), False, 1),
    (192, 1, True): Launches(Launch((128, 64), 2, True), Launch((64, 64)), Launch((64, 64)), False, 1),
    (256, 1, False): Launches(Launch((128, 64), 2, True), Launch((64, 64)), Launch((64, 64)), False, 1),
    (256, 1, True): Launches(Launch((64, 64)), Launch((64, 64)), Launch((64, 64)), False, 1),
    (64, 2, False): Launches(Launch((128, 64), 2, True), Launch((128, 64)), Launch((64, 128)), False, 2),
    (64, 2, True): Launches(Launch((128, 64), 2, True), Launch((128, 64)), Launch((64, 128)), True, 2),
    (128, 2, False): Launches(Launch((64, 64)), Launch((64, 64), 1), Launch((64, 64), 1), True, 2),
    (128, 2, True): Launches(Launch((64, 64)), Launch((64, 64), 1), Launch((64, 64), 1), True, 2),
    (64, 3, False): Launches(Launch((128, 64), 2, True), Launch((64, 64)), Launch((64, 64)), True, 3),
    (64, 3, True): Launches(Launch((128, 64), 2, True), Launch((64, 64)), Launch((64, 64)), True, 3),
}
# Tiles of the backward pass in one kernel, for operands in one piece: by width, and whether there is dropout, with which ptxas runs
# the products of width 64 one after the other. Not timed on a device yet, and so not in TABLE.
FUSED = {(64, False): Launch((128, 128)), (128, False): Launch((64, 128)), (128, True): Launch((64, 128))}
