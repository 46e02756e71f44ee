"""Tiles of the TPU kernels: what they cost by the compiler's own schedules, and the cheapest for a problem.

The model: a core issues a bundle of instructions a cycle, bundles may be packed closer than the matrix units need for their
products, and what a visit loads comes meanwhile: the slowest of these is the time. It leaves out waits of products and of copies
that start late, contention for memory, and power.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import schedule

from ._problem import Problem
from ._tiles_tpu_table import LIBTPU as LIBTPU
from ._tiles_tpu_table import TABLE as _TABLE

PRODUCTS = {"forward": 2, "backward": 5}  # of tiles
PASSES = tuple(PRODUCTS)
Tiles = tuple[int, int]  # query rows, key columns
WORTH = 0.03  # what larger tiles must save: the compiler takes a time for them that grows with their scores


class Cost(NamedTuple):
  """Bundles of a visit of a full tile and of a partial one, of one that is alone in a step for two, and once a row or column."""

  full: float
  partial: float
  alone: float
  once: float

  def at_least(self, cycles: float) -> Cost:
    """Where a visit takes so many cycles of something else."""
    return Cost(max(self.full, cycles), max(self.partial, cycles), max(self.alone, cycles), self.once)


Table = dict[tuple[str, int, int, str], dict[Tiles, Cost]]
TABLE: Table = {key: {tile: Cost(*cost) for tile, cost in costs.items()} for key, costs in _TABLE.items()}


@dataclasses.dataclass(frozen=True)
class Core:
  """What its makers say of a chip, for one of its tensor cores."""

  peak: float  # bfloat16 operations a second
  bandwidth: float  # bytes a second
  per_cycle: int  # operations of the matrix units in a cycle

  @property
  def clock(self) -> float:
    return self.peak / self.per_cycle

  def products(self, count: int, scores: int, width: int, itemsize: int = 2) -> float:
    """Cycles of the matrix units for so many products; 64 columns take the time of 128, and float32 six products for one."""
    return count * 2 * scores * max(width, 128) * (6 if itemsize == 4 else 1) / self.per_cycle


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm: 4 units of 128 x 128, or 4 of 256 x 256 from v6e on.
CORES = {"v5e": Core(197e12, 819e9, 4 * 2 * 128**2), "v5p": Core(459e12 / 2, 2765e9 / 2, 4 * 2 * 128**2),
         "v6e": Core(918e12, 1640e9, 4 * 2 * 256**2), "tpu7x": Core(2307e12 / 2, 7380e9 / 2, 4 * 2 * 256**2)}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
          "TPU7x": "tpu7x"}


def chip() -> str | None:
  """The TPU that is computed on, if it is one of `CORES`."""
  device = jax.config.jax_default_device  # type: ignore[attr-defined]
  if device is None or isinstance(device, str):
    device = jax.devices(device)[0]
  return _KINDS.get(device.device_kind)


def costs(on: str, width: int, itemsize: int, kernel: str) -> dict[Tiles, Cost]:
  """Tile -> cost of the pass "forward" or "backward"; a width that is not in the table has the cost of the next larger one."""
  widths = sorted(w for c, w, size, k in TABLE if (c, size, k) == (on, itemsize, kernel) and w >= width)
  return TABLE[on, widths[0], itemsize, kernel] if widths else {}


def estimates(problem: Problem, fits: Callable[[Tiles], bool], kinds: Callable[[Tiles], np.ndarray],
              five: Callable[[Tiles], bool]) -> dict[str, tuple[Tiles, float]]:
  """Pass -> the cheapest of the tiles that fit, or nearly so, and the seconds that one core takes; empty where no costs are known.

  Args:
    kinds: EMPTY, PARTIAL or FULL for every tile, `[B|1, K|1, T tiles, S tiles]`.
    five: whether the backward pass is one kernel, with five products a tile; as two it has seven.
  """
  on, itemsize, width = chip(), 2 if problem.q.dtype == jnp.bfloat16 else 4, max(problem.width, problem.value_width)
  if on is None:
    return {}
  bytes_of_two = (problem.width + problem.value_width) * itemsize  # a row of keys and values, or of queries and cotangents
  found = {}
  for name in PASSES:
    seconds = {}
    for tiles, cost in costs(on, width, itemsize, name).items():
      if fits(tiles):
        core, table = CORES[on], kinds(tiles)
        cost = cost.at_least(core.products(PRODUCTS[name], math.prod(tiles), width, itemsize))
        of_lists = (_forward(core, cost, table, tiles[1] * bytes_of_two) if name == "forward" else
                    _backward(core, cost, table.swapaxes(-1, -2), tiles[0] * bytes_of_two) * (1 if five(tiles) else 7 / 5))
        seconds[tiles] = of_lists * problem.batch * problem.heads / math.prod(table.shape[:2])
    for tiles in sorted(seconds, key=math.prod):
      if name not in found or seconds[tiles] < (1 - WORTH) * found[name][1]:
        found[name] = tiles, seconds[tiles]
  return found


def _forward(core: Core, cost: Cost, kinds: np.ndarray, visit_bytes: int) -> float:
  """Seconds for a head of each list, row by row, two visits a step; a full tile beside a partial one is masked as that is."""
  listed = np.take_along_axis(kinds, np.argsort(kinds == schedule.EMPTY, axis=-1, stable=True), axis=-1)
  pairs = np.pad(listed, [(0, 0)] * 3 + [(0, listed.shape[-1] % 2)]).reshape(*listed.shape[:-1], -1, 2)
  full, some = (pairs == schedule.FULL).all(axis=-1), pairs != schedule.EMPTY
  two = some.all(axis=-1)
  bundles = 2 * cost.full * full.sum() + 2 * cost.partial * (two & ~full).sum() + cost.alone * (some[..., 0] & ~two).sum()
  return _slower(core, bundles + cost.once * math.prod(kinds.shape[:3]), some.sum() * visit_bytes)


def _backward(core: Core, cost: Cost, kinds: np.ndarray, visit_bytes: int) -> float:
  """Seconds for a head of each list, column by column."""
  full, partial = ((kinds == kind).sum() for kind in (schedule.FULL, schedule.PARTIAL))
  bundles = cost.full * full + cost.partial * partial + cost.once * math.prod(kinds.shape[:3])
  return _slower(core, bundles, (full + partial) * visit_bytes)


def _slower(core: Core, bundles: float, moved: float) -> float:
  return float(max(bundles / core.clock, moved / core.bandwidth))
