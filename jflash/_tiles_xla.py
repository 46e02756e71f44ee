"""Tiles of "xla" on CPUs, as measured (docs/design.md, "Plain JAX on CPUs")."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import products, schedule

from . import masks
from ._mask import parts
from ._problem import Problem

OLD = jax.__version_info__ < (0, 11)  # whose CPU compiler differs from the later ones


def rows_at_once(problem: Problem, kinds: Any) -> int:
  """How many rows meet all their keys at once where nobody asks for lse or a derivative; 0: none.

  Args:
    kinds: of the tiles that the walk would have.
  """
  queries, keys, half = problem.queries, problem.keys, problem.q.dtype == jnp.bfloat16
  if not problem.logits.plain or keys > (4096 if half else 2048):
    return 0
  if problem.logits.mask is not None:  # float32 is as fast with lse while one tile will do
    empty = np.mean(kinds == schedule.EMPTY) if isinstance(kinds, np.ndarray) else 0
    skips = empty > (0.2 if queries > 464 and not half else 0.4)  # of causal tiles a quarter or a third
    return queries if (256 if half else 361) <= queries <= 600 >= keys and not skips else 0
  if queries < 256 and not half:
    return 0
  one = queries * keys * problem.groups <= 1280**2
  return queries if one else _near(queries, max(128, 512 // problem.groups))


def sides(problem: Problem) -> tuple[int, int]:
  """Rows and columns of a tile."""
  if problem.product is products.Distance:  # n = 16,384, d = 2 takes an eighth less in 1024 x 1024 than in 512 x 512
    return 1024, 1024
  if few_queries(problem):  # the keys are read once, and how fast is all that counts: filling them up to whole tiles copies them
    whole = divisor(problem.keys, 1024)
    return problem.queries, whole if whole >= 256 else _even(problem.keys, 1024)
  queries, keys, groups, masked = problem.queries, problem.keys, problem.groups, problem.logits.mask is not None
  if not masked:  # small tiles would leave nothing out
    one = max(queries, keys) <= 512 or queries * keys * groups <= 1280**2
    return (queries, keys) if one else (_near(queries, max(256, 1024 // groups)), _near(keys, 512))
  if not OLD:
    longest = max(queries, keys)
    side = 160 if longest <= 480 else 192 if 600 < longest <= 900 else 256
    return (queries, keys) if longest <= 360 else (_even(queries, side), _even(keys, side))
  rows = _near(queries, 512)  # its products for less than 2^17 scores stay on one core
  narrow = rows >= 512 and keys % 256 == 0 or groups > 4 and keys > 512
  return rows, _even(keys, 256) if narrow else _near(keys, 512)


def step(problem: Problem, tiles: tuple[int, int]) -> int:
  """Scores of a step; where queries are few, of numbers of the keys."""
  if few_queries(problem):
    return (1 << 22) // problem.q.dtype.itemsize
  large = (tiles == (problem.queries, problem.keys) and tiles[0] > 256) or tiles[0] * tiles[1] > 1 << 17
  return 1 << 20 if large else 1 << 19


def together(problem: Problem, tiles: tuple[int, int]) -> int:
  """How many tiles of a row are computed as one, where the blocks of a mask keep them small."""
  blocks = any(isinstance(part, masks.BlockSparse) for part in parts(problem.logits.mask))
  return min(max((1 << 17) // (tiles[0] * tiles[1]), 1), 4) if blocks and problem.product is products.Dot else 1


def in_place(problem: Problem, kinds: Any) -> bool:
  """Whether tiles of keys are visited so rarely that they are cut out of the keys as they are."""
  known = isinstance(kinds, np.ndarray) and kinds.shape[2] > 1 and problem.product is products.Dot
  return known and float(np.mean(np.sum(kinds != schedule.EMPTY, axis=2))) <= 6


def _even(length: int, side: int) -> int:
  """At most `side`, such that as many tiles end soon after `length`: 384 are two of 192, and not one and a half of 256."""
  tiles = math.ceil(length / side)
  return min(side, 16 * math.ceil(length / (16 * tiles)))


def _near(length: int, side: int) -> int:
  """As near to `side` as equal tiles get: 700 are one, and 850 two of 425, with a side of 512."""
  return math.ceil(length / max(1, round(length / side)))


def few_queries(problem: Problem) -> bool:
  return problem.queries * problem.groups <= 32 and problem.product is products.Dot


def divisor(n: int, limit: int) -> int:
  """The greatest divisor of n that is at most `limit`, and at least 1."""
  return next(d for d in range(min(n, max(limit, 1)), 0, -1) if n % d == 0)
