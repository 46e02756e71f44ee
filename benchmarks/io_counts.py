"""What the attention kernels move: `ledger` at many sizes, tiles and masks, and fits to what it finds.

The claims that are looked at are those of Dao et al., arXiv:2205.14135: Θ(N²d²/M) bytes, fewer than standard attention, and in
proportion to the density of a block-sparse mask.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jflash
from jflash import _api, _plan, masks
from pallas_kernels import schedule

from .ledger import Ledger, ledger

BLOCK = 128  # rows and columns of a block of the block-sparse masks
A100_SM = 192 * 2**10  # bytes of on-chip memory of one of its multiprocessors


@dataclasses.dataclass(frozen=True)
class Shape:
  """Self-attention of `length` tokens, bfloat16: as many bytes as float16, which the kernels would compute in float32."""

  batch: int
  length: int
  heads: int
  width: int

  @property
  def array(self) -> Any:
    return jax.ShapeDtypeStruct((self.batch, self.length, self.heads, self.width), jnp.bfloat16)


PAPER = Shape(batch=64, length=1024, heads=16, width=64)  # Figure 2, left


def count(shape: Shape, tiles: tuple[int, int] | None = None, backward: bool = True, as_used: bool = False, **mask: Any) -> Ledger:
  """The ledger of the TPU kernels, forward and backward; `tiles` (rows, columns) instead of those that are chosen.

  Of those that hold a tile at a time, one visit a step and dQ in a kernel of its own, whatever the length; or of those `as_used`.
  """
  def forward(q, k, v):
    return jflash.attention(q, k, v, implementation="tpu", **mask)

  def both(q, k, v, dout):
    out, pullback = jax.vjp(forward, q, k, v)
    return out, pullback(dout)

  # Interpreted kernels are traced like any other, and ask for no chip.
  with contextlib.ExitStack() as stack:
    stack.enter_context(jflash.interpret())
    if not as_used:
      stack.enter_context(_plan.force_passes(1, 0))
    if tiles:
      stack.enter_context(_plan.force_tiles(*tiles))
    return ledger(both if backward else forward, *[shape.array] * (4 if backward else 3))


# Θ(N²d²/M) ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
  """One head: N, d, the sides of its square tiles, and what one kernel (or all of them) then needs and moves."""

  kernel: str
  length: int
  width: int
  side: int
  on_chip: int
  bytes: int


ALL = "all kernels"


def sweep(lengths: Sequence[int], widths: Sequence[int], sides: Sequence[int]) -> list[Point]:
  """A point for each kernel, and one for all of them, at each N, d and tile that fits into N.

  There the largest M counts: it is what a chip needs to have.
  """
  points = []
  for length, width, side in itertools.product(lengths, widths, sides):
    if side <= length:
      found = count(Shape(1, length, 1, width), (side, side))
      points += [Point(k.name, length, width, side, k.on_chip, k.bytes) for k in found.kernels]
      points.append(Point(ALL, length, width, side, found.on_chip, found.kernel_bytes))
  return points


@dataclasses.dataclass(frozen=True)
class Fit:
  """bytes ≈ constant · N^length · d^width · M^on_chip by least squares of the logarithms; `r2` is the share explained."""

  length: float
  width: float
  on_chip: float
  r2: float


def fit(points: Sequence[Point]) -> Fit:
  y = np.log([p.bytes for p in points])
  x = np.log([[np.e, p.length, p.width, p.on_chip] for p in points])
  slopes, *_ = np.linalg.lstsq(x, y, rcond=None)
  length, width, memory = map(float, slopes[1:])
  return Fit(length, width, memory, 1 - float(np.var(y - x @ slopes) / np.var(y)))


# Block-sparse masks ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sparse:
  """How much is moved with this share of the blocks kept."""

  density: float
  kernel_bytes: int


def block_sparse(length: int, width: int, densities: Sequence[float]) -> list[Sparse]:
  """One head, a random table for each density, and the tiles that are chosen, which are the table's blocks."""
  blocks, found = length // BLOCK, []
  order = np.random.default_rng(0).permutation(blocks**2).reshape(blocks, blocks)
  for density in densities:
    table = order < round(density * blocks**2)
    moved = count(Shape(1, length, 1, width), mask=masks.BlockSparse(table, (BLOCK, BLOCK))).kernel_bytes
    found.append(Sparse(float(table.mean()), moved))
  return found


def line(rows: Sequence[Sparse]) -> tuple[float, float, float]:
  """(slope, intercept, R²) of the bytes against the density."""
  x, y = np.array([r.density for r in rows]), np.array([r.kernel_bytes for r in rows], float)
  slope, intercept = np.polyfit(x, y, 1)
  return float(slope), float(intercept), 1 - float(np.var(y - slope * x - intercept) / np.var(y))


# Windows --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Walked:
  """One pass under a window of so many keys, or none: its grid steps, what its kernels move, and the longest list of visits."""

  length: int
  window: int | None
  direction: str
  steps: int
  bytes: int
  list_bytes: int


def walked(length: int, window: int | None, width: int = 128) -> list[Walked]:
  """Forward and backward, of one head and a causal mask, by the kernels as they are used."""
  mask: dict[str, Any] = {"is_causal": True} if window is None else {"local_window_size": (window - 1, 0)}
  shape = Shape(1, length, 1, width)
  kernels = count(shape, as_used=True, **mask).kernels
  found = []
  for direction, some in (("forward", kernels[:1]), ("backward", kernels[1:])):
    steps, moved = sum(math.prod(k.grid) for k in some), sum(k.bytes for k in some)
    if direction == "backward":
      moved += of_spans(shape, mask)
    found.append(Walked(length, window, direction, steps, moved, max(k.reads[0].bytes for k in some)))
  return found


def of_spans(shape: Shape, mask: dict[str, Any]) -> int:
  """Bytes of the sums of dK and dV, in float32, that the backward kernel itself writes at the end of a span's columns and reads
  at their begin, but for the first span's; 0 where there is one span, whose dK and dV are blocks like any other."""
  made = []

  def plan(q):
    problem = _api.make_problem(q, q, q, **mask)
    made.append((chosen := _plan.plan_tpu(problem), _plan.make_schedule(problem, chosen)))

  with jflash.interpret():
    jax.eval_shape(plan, shape.array)
  chosen, visits = made[0]
  starts, tile = np.unique(visits.columns.codes >> 16), chosen.tiles[1] * 2 * shape.width * 4
  return shape.batch * shape.heads * tile * int(len(starts) + schedule.continued(starts << 16).sum()) if chosen.spans > 1 else 0


# The paper's setting --------------------------------------------------------------------------------------------------


def chosen_tiles(shape: Shape) -> tuple[int, int]:
  with jflash.interpret():
    tiles = jflash.explain(*[shape.array] * 3, implementation="tpu").tiles
  assert tiles is not None
  return tiles


def best_tiles(shape: Shape, limit: int, sides: Sequence[int]) -> tuple[int, int]:
  """Those (rows, columns) that move least among those whose blocks and scratch fit into `limit` bytes."""
  one = dataclasses.replace(shape, batch=1, heads=1)
  sides = [n for n in sides if n <= shape.length]
  found = {(rows, columns): count(one, (rows, columns)) for rows in sides for columns in sides}
  return min((tiles for tiles in found if found[tiles].on_chip <= limit), key=lambda tiles: found[tiles].kernel_bytes)
