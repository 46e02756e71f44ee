"""What the TPU kernels share: the operands' blocks, the walk along a list of visits, and the scores of a tile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import leaves, lookup, products, schedule


@dataclasses.dataclass(frozen=True)
class Call:
  """One problem on one chip: sizes, tiles and how to launch.

  Heads lead here: q `[B, N, T, H]`, k `[B, K, S, H]`, v `[B, K, S, E]`, row statistics `[B, N, 1, T]`.
  """

  queries: int  # T before any filling up to a whole tile
  keys: int
  groups: int  # query heads per kv head
  product: type  # of a query and a key, one of `products`
  tiles: tuple[int, int]
  kinds: tuple[int, ...]  # of tiles, that may occur
  together: int  # visits in one step of the forward pass
  spans: int  # of query tiles whose dQ is on chip at a time; 0 for a kernel of its own, and seven products a tile rather than five
  unit: float  # by which products are multiplied, as `logits` then do not
  interpret: Any

  def dot(self, a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """A product with float32 sums; float32 operands are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)

  @property
  def algebra(self) -> products.Algebra:
    return products.Algebra(
        nt=lambda q, k: self.dot(q, k, (1, 1)), nn=lambda s, k: self.dot(s, k, (1, 0)), tn=lambda s, q: self.dot(s, q, (0, 0)),
        lay_down=leaves.row, over_rows=lambda s: leaves.column(jnp.sum(s, axis=0, keepdims=True)))

  def scores(self, logits: Any, tiles: Any, at: Place, qk: Any, masked: bool, turned: bool = False,
             differentiated: bool = True) -> Any:
    """The scores of a tile, or their transpose; what lies past the last query or key is masked."""
    rows, columns = self.tiles
    line = lambda n, axis: lax.broadcasted_iota(jnp.int32, (1, n) if axis else (n, 1), axis)
    row = at.i * rows + line(rows, int(turned))
    column = at.j * columns + line(columns, int(not turned))
    inside = None
    if masked and self.queries % rows:
      inside = row < self.queries
    if masked and self.keys % columns:
      inside = (column < self.keys) if inside is None else inside & (column < self.keys)
    tile = jax.tree.unflatten(jax.tree.structure(logits), tiles)
    return tile.scores(qk, tile.coordinates(at.batch, at.head, row, column, _take, turned=turned), masked, inside,
                       differentiated)

  def products(self, q: Any, k: Any) -> Any:
    """What `scores` starts from, `[rows, columns]`, as it leaves the matrix unit: there a multiplication costs least."""
    qk = self.product.scores(self.algebra, q, k)
    return qk if self.unit == 1.0 else qk * self.unit

  def drop(self, logits: Any, tiles: Any, x: Any) -> Any:
    """Dropout of a tile of weights, or of what multiplies them."""
    return jax.tree.unflatten(jax.tree.structure(logits), tiles).drop(x)

  def launch(self, kernel: Callable, name: str, grid: tuple[int, ...], codes: Any, ins: list[Operand], outs: list[Operand],
             scratch: list[Any], parallel: int) -> list[Any]:
    """Runs `kernel(codes, *ins, *outs, *scratch)`; the first `parallel` axes of the grid may run in any order."""
    semantics: Any = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    return pl.pallas_call(
        kernel, name=name, interpret=self.interpret,
        out_shape=[jax.ShapeDtypeStruct(o.array.shape, o.array.dtype) for o in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=[x.spec for x in ins], out_specs=[x.spec for x in outs],
            scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT),
    )(codes, *[x.array for x in ins])


def _take(table: Any, index: Any) -> Any:
  """`table[…, index]` with a table `[1, 1, 1, n]` and an index `[rows, columns]`."""
  return lookup.take(table.reshape(1, table.shape[-1]), index)


VMEM_LIMIT = 48 * 2**20  # of 64 MiB on TPU7x and 128 MiB on the other chips


class Operand(NamedTuple):
  """An array (or its shape and dtype) and how it is cut into blocks."""

  array: Any
  spec: pl.BlockSpec


class Place(NamedTuple):
  """Where a grid step computes."""

  batch: Any
  head: Any
  i: Any  # query tile
  j: Any  # key tile


class Walk(NamedTuple):
  """A grid's steps along lists of visits, `codes [B|1, K|1, length]`; flat, as scalar memory pads every row of an array."""

  lists: tuple[int, int]
  length: int

  def code(self, codes: Any, batch: Any, kv_head: Any, n: Any) -> Any:
    number = (batch * self.lists[1] if self.lists[0] > 1 else 0) + (kv_head if self.lists[1] > 1 else 0)
    return codes[number * self.length + n]

  def ends(self, codes: Any, batch: Any, kv_head: Any, n: Any, together: int = 1) -> tuple[Any, Any]:
    """Whether the visits from n on, of one step, are the first, and whether they are the last, of their outer tile."""
    _, first, last = self.ends_of(lambda outer: outer, codes, batch, kv_head, n, together)
    return first, last

  def ends_of(self, run: Callable[[Any], Any], codes: Any, batch: Any, kv_head: Any, n: Any,
              together: int = 1) -> tuple[Any, Any, Any]:
    """The run that an outer tile belongs to, and whether the visits are the first and the last of that run."""
    run_at = lambda m: run(schedule.outer(self.code(codes, batch, kv_head, m)))
    here, end = run_at(n), self.length - together
    first = (n == 0) | (run_at(jnp.maximum(n - 1, 0)) != here)
    last = (n == end) | (run_at(jnp.minimum(n + together, end)) != here)
    return here, first, last

  def row_by_row(self, groups: int, together: int = 1, side: int = 0) -> Callable[..., Place]:
    """Where step (batch, head, n) of a grid along lists of rows computes, with number `side` of its visits."""
    def where(batch, head, n, codes):
      code = self.code(codes, batch, lax.div(head, groups), n * together + side)
      return Place(batch, head, schedule.outer(code), schedule.inner(code))
    return where


def walk(visits: schedule.Visits) -> Walk:
  return Walk(visits.codes.shape[:2], visits.codes.shape[2])


def leaf_operands(logits: Any, tiles: tuple[int, int], where: Callable) -> list[Operand]:
  return [Operand(leaves.store(x), leaves.block_spec(x, tiles, where)) for x in jax.tree.leaves(logits)]


def leaf_tiles(logits: Any, refs: Any, turned: bool = False) -> list[Any]:
  return [leaves.tile(x, ref, turned) for x, ref in zip(jax.tree.leaves(logits), refs)]


def by_kind(call: Call, code: Any, step: Callable[[bool], None]) -> None:
  """`step(masked)` for a partial and for a full tile, nothing for an empty one."""
  for kind in (schedule.PARTIAL, schedule.FULL):
    if kind in call.kinds:
      pl.when(schedule.kind(code) == kind)(functools.partial(step, kind == schedule.PARTIAL))


def query_spec(width: int, tiles: tuple[int, int], where: Callable) -> pl.BlockSpec:
  """A block of `[B, N, T, width]`."""
  def index(*grid):
    b, h, i, _ = where(*grid)
    return b, h, i, 0
  return pl.BlockSpec((None, None, tiles[0], width), index)


def key_spec(width: int, tiles: tuple[int, int], groups: int, where: Callable) -> pl.BlockSpec:
  """A block of `[B, K, S, width]`."""
  def index(*grid):
    b, h, _, j = where(*grid)
    return b, lax.div(h, groups) if groups > 1 else h, j, 0
  return pl.BlockSpec((None, None, tiles[1], width), index)


def statistic_spec(tiles: tuple[int, int], where: Callable) -> pl.BlockSpec:
  """A block of row statistics `[B, N, 1, T]`."""
  def index(*grid):
    b, h, i, _ = where(*grid)
    return b, h, 0, i
  return pl.BlockSpec((None, None, 1, tiles[0]), index)


