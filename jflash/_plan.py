"""How a problem is cut up: tile sizes, heads at a time, and the schedule. The only home of heuristics."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import products, schedule

from . import _tiles_gpu, _tiles_tpu, _tiles_xla, masks
from ._mask import parts
from ._problem import Problem
from ._program import is_program
from ._tiles_xla import divisor

_interpreting: contextvars.ContextVar[Any] = contextvars.ContextVar("jflash_interpret", default=False)
_forced_tiles: contextvars.ContextVar[Any] = contextvars.ContextVar("jflash_tiles", default=None)
_forced_passes: contextvars.ContextVar[Any] = contextvars.ContextVar("jflash_passes", default=None)
_forced_launches: contextvars.ContextVar[Any] = contextvars.ContextVar("jflash_launches", default=None)


SMALLEST = 64  # rows or columns of a tile; below that, the way from tile to tile takes longer than the tile


class Schedule(NamedTuple):
  """The visits row by row (a query tile and its key tiles) and column by column, and the table they come from."""

  rows: schedule.Visits
  columns: schedule.Visits
  kinds: Any  # EMPTY, PARTIAL or FULL for every tile of the backward pass, `[B|1, K|1, T tiles, S tiles]`
  dq: schedule.Visits | None = None  # row by row in tiles of the backward pass, where that has its own and a kernel for dQ


class WalkSchedule(NamedTuple):
  """The visits of all passes of "xla", row by row."""

  rows: schedule.RowVisits
  kinds: Any


class LaunchSchedule(NamedTuple):
  """The same for kernels that have tiles of their own each, "mosaic_gpu"."""

  forward: schedule.RowVisits
  dq: schedule.RowVisits
  dkv: schedule.RowVisits  # of columns
  kinds: Any  # for the forward kernel's tiles
  dq_kinds: Any
  fused: schedule.RowVisits | None = None  # of columns


AnySchedule = Schedule | WalkSchedule | LaunchSchedule


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static choices; hashable, so that compiled functions are kept by it."""

  tiles: tuple[int, int]  # query rows, key columns
  chunk: tuple[int, int]  # batch elements and kv heads that are computed at a time
  widen: bool  # whether "xla" converts tiles to float32 before it multiplies them
  interpret: Any  # False, True, or Pallas' interpreter parameters
  kinds: tuple[int, ...] = (schedule.PARTIAL, schedule.FULL)  # of tiles that have to be reckoned with, besides EMPTY
  backward_tiles: tuple[int, int] | None = None  # of "tpu", where they differ
  together: int = 1  # visits of a step: of the forward pass of "tpu" 1 or 2, of "xla" those of FULL tiles
  spans: int = 0  # of query tiles whose dQ is on chip at a time, in its backward pass of one kernel; 0: dQ has a kernel of its own
  launches: _tiles_gpu.Launches | None = None  # of "mosaic_gpu"
  walks: bool = False  # whether a pass walks from tile to tile in loops of its own, as "xla" does
  one_visit: bool = False  # whether there is one tile, and of one kind for all batch elements and heads
  as_bits: bool = False  # whether "xla" cuts tiles of bfloat16 out as integers
  fuses: bool = False  # whether its softmax of rows that meet all keys at once is written for the compiler to make one call of
  in_place: bool = False  # whether "xla" cuts tiles out of the keys as they are, and not of a copy with the heads in front
  alone: Plan | None = None  # how it computes out, where nobody asks for lse or a derivative


@contextlib.contextmanager
def _within(variable: contextvars.ContextVar[Any], value: Any):
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)


def interpret(params: Any = True):
  """Runs kernel backends in the Pallas interpreter, on any device: slow, and exact enough to test with.

  What is traced inside is interpreted; a function that was compiled before stays as it was compiled.

  Args:
    params: True, or `jax.experimental.pallas.tpu.InterpretParams(...)`, which models memory and finds races.

  Example:
    >>> import jax, jflash
    >>> q = jax.numpy.ones((1, 8, 2, 4))
    >>> with jflash.interpret():
    ...   out = jflash.attention(q, q, q, implementation="tpu")
    >>> out.shape
    (1, 8, 2, 4)
  """
  return _within(_interpreting, params)


def force_tiles(query_rows: int, key_columns: int):
  """Takes these tile sizes instead of the chosen ones."""
  return _within(_forced_tiles, (query_rows, key_columns))


def forced_tiles() -> tuple[int, int] | None:
  return _forced_tiles.get()


def force_passes(together: int, spans: int):
  """`Plan.together` and `Plan.spans` of "tpu", for tests and for comparing them."""
  return _within(_forced_passes, (together, spans))


def force_launches(launches: _tiles_gpu.Launches):
  """Cuts the kernels of "mosaic_gpu" up like this instead, for benchmarks that compare ways to do it."""
  return _within(_forced_launches, launches)


def interpreting() -> Any:
  return _interpreting.get()


def context() -> Any:
  """What a plan depends on besides the problem: a static argument for compiled functions that make plans inside."""
  chip = _tiles_tpu.chip() if platform() == "tpu" else None
  forced = _forced_tiles.get(), _forced_passes.get(), _forced_launches.get()
  return _interpreting.get(), forced, _tiles_gpu.context(), platform(), chip


def platform() -> str:
  """The kind of device that is computed on: "cpu", "gpu" or "tpu"."""
  device = jax.config.jax_default_device  # type: ignore[attr-defined]
  if device is None:
    return jax.default_backend()
  name = device if isinstance(device, str) else device.platform
  return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def plan_xla(problem: Problem, scores: int | None = None) -> Plan:
  """Tiles, and as many batch elements and heads at a time as keep a step at `scores`; by default, a cache or 1 GiB full of them."""
  on_cpu = platform() == "cpu"
  tiles = _forced_tiles.get() or _blocks(problem, *(_tiles_xla.sides(problem) if on_cpu else _sides_by_length(problem)))
  tiles = min(tiles[0], problem.queries), min(tiles[1], problem.keys)
  most = scores or (_tiles_xla.step(problem, tiles) if on_cpu else 1 << 28)
  lead = _table_lead(problem)
  limit = most // max(tiles[0] * tiles[1] * problem.groups, tiles[1] * max(problem.width, problem.value_width) if on_cpu else 0)
  heads = divisor(problem.kv_heads, limit) if lead[1] == 1 else 1
  batch = divisor(problem.batch, limit // heads) if lead[0] == 1 and heads == problem.kv_heads else 1
  old, new = on_cpu and _tiles_xla.OLD, on_cpu and not _tiles_xla.OLD
  return Plan(tiles, (batch, heads), on_cpu and problem.q.dtype == jnp.float16, False, walks=True, as_bits=old,
              together=_tiles_xla.together(problem, tiles) if on_cpu else 1, fuses=new and problem.product is products.Dot)


def out_alone(problem: Problem, plan: Plan, visits: AnySchedule) -> Plan:
  """The plan of a call that nobody asks for lse, or a derivative: all keys at once for some rows, or keys where they are."""
  if not plan.walks or platform() != "cpu" or _forced_tiles.get() is not None or _tiles_xla.few_queries(problem):
    return plan
  rows = _tiles_xla.rows_at_once(problem, visits.kinds) if plan.fuses else 0
  if not rows:
    in_place = dataclasses.replace(plan, in_place=True)
    return dataclasses.replace(plan, alone=in_place) if _tiles_xla.in_place(problem, visits.kinds) else plan
  masked = problem.logits.mask is not None
  if masked:  # scores are in memory
    limit = (1 << 21) // (rows * problem.keys * problem.groups)
  else:
    head = rows * problem.groups * max(problem.width, problem.value_width)
    limit = max(3 << 17, min(problem.kv_heads * head, 1 << 20)) // head
  heads = divisor(problem.kv_heads, limit)
  chunk = divisor(problem.batch, limit // heads) if heads == problem.kv_heads else 1, heads
  return dataclasses.replace(plan, alone=dataclasses.replace(
      plan, tiles=(rows, problem.keys), chunk=chunk, kinds=(schedule.PARTIAL if masked else schedule.FULL,), one_visit=True))


def every_row(problem: Problem, plan: Plan) -> schedule.RowVisits:
  """The visits of `Plan.alone`: one for each tile of rows."""
  return schedule.row_visits(np.full((1, 1, math.ceil(problem.queries / plan.tiles[0]), 1), plan.kinds[0]))


def _sides_by_length(problem: Problem) -> tuple[int, int]:
  side = 1024 if problem.product is products.Distance else 512 if max(problem.queries, problem.keys) >= 4096 else 256
  return side, side


def plan_tpu(problem: Problem) -> Plan:
  """The cheapest tiles by `_tiles_tpu`, or for what it does not know, up to 512 x 512, and less where heads are wide."""
  chosen, rule = tpu_estimates(problem), _tpu_tiles(problem, _forced_tiles.get() or _tpu_rule(problem))
  forward, backward = (chosen[name][0] if name in chosen else rule for name in _tiles_tpu.PASSES)
  together, spans = _forced_passes.get() or (2 if problem.keys > forward[1] else 1, _spans(problem, backward))
  whole = Plan(forward, (problem.batch, problem.kv_heads), False, interpreting(),
               backward_tiles=None if backward == forward else backward, together=together, spans=spans)
  return dataclasses.replace(whole, chunk=_chunk_tpu(problem, whole))


MOST_VISITS = 240_000  # of the lists of a kernel: they are 4 bytes each, and a chip has 1 MiB of scalar memory


SUMS = 512 * 2**20  # bytes of sums of dK and dV that wait for the next span


def _chunk_tpu(problem: Problem, plan: Plan) -> tuple[int, int]:
  """As many batch elements and kv heads as have lists that fit into scalar memory together, and sums into `SUMS`."""
  (batch, heads), length = tpu_lists(problem, plan)
  limit = MOST_VISITS // length
  if batch * heads <= limit:
    batch, heads = problem.batch, problem.kv_heads
  elif heads <= limit:
    batch, heads = divisor(problem.batch, limit // heads), problem.kv_heads
  else:
    batch, heads = 1 if batch > 1 else problem.batch, divisor(problem.kv_heads, limit)
  if plan.spans <= 1:
    return batch, heads
  most = SUMS // (problem.keys * 4 * sum(128 * math.ceil(n / 128) for n in (problem.width, problem.value_width)))
  heads = divisor(heads, most)
  return divisor(batch, most // heads) if heads == problem.kv_heads else 1, heads


def tpu_lists(problem: Problem, plan: Plan) -> tuple[tuple[int, int], int]:
  """How many batch elements and kv heads have lists of visits of their own, and the length of the longest list."""
  tiles = (plan.tiles, plan.backward_tiles or plan.tiles)
  in_spans = lambda rows: max(plan.spans, 1) * math.ceil(problem.queries / (rows * max(plan.spans, 1)))
  most = max(in_spans(rows) * (math.ceil(problem.keys / columns) + 2) for rows, columns in tiles)
  if problem.batch * problem.kv_heads * most <= MOST_VISITS:  # whatever the mask
    return (problem.batch, problem.kv_heads), most
  visits = jax.eval_shape(lambda: make_schedule(problem, plan))
  length = max(x.codes.shape[2] for x in (visits.rows, visits.columns, visits.dq) if x is not None)
  if any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(problem.logits)):  # the kernel for their gradients
    length = max(length, math.prod(visits.kinds.shape[2:]))
  return visits.kinds.shape[:2], length


def _tpu_rule(problem: Problem) -> tuple[int, int]:
  width = max(problem.width, problem.value_width)
  side = 512 if width <= 256 else 256 if width <= 512 else 128
  return _blocks(problem, side, side)


def _tpu_tiles(problem: Problem, tiles: tuple[int, int]) -> tuple[int, int]:
  """No larger than the problem; what the compiler is given are multiples of 128."""
  up = lambda n: 128 * math.ceil(n / 128)
  return min(tiles[0], up(problem.queries)), min(tiles[1], up(problem.keys))


def tpu_estimates(problem: Problem) -> dict[str, tuple[tuple[int, int], float]]:
  """Pass -> the cheapest tiles and the seconds that one core is estimated to take with them; empty where no costs are known.

  They are known of scores under a mask alone, which is known while tracing and has no smaller blocks of its own.
  """
  logits = problem.logits
  if (platform() != "tpu" or problem.product is not products.Dot or not logits.plain or logits.dropout is not None
      or any(isinstance(x, jax.Array) for x in mask_arrays(problem)) or _blocks(problem, 512, 512) != (512, 512)):
    return {}
  forced = _forced_tiles.get()
  fits = lambda tiles: forced in (None, tiles) and _tpu_tiles(problem, tiles) == tiles
  kinds = functools.cache(lambda tiles: _kinds(problem, tiles))
  five = lambda tiles: _spans(problem, tiles) > 0
  return _tiles_tpu.estimates(problem, fits, kinds, five)


DQ_LIMIT = 28 * 2**20  # bytes, of the 48 MiB that a kernel may use on a TPU


def _spans(problem: Problem, tiles: tuple[int, int]) -> int:
  """`Plan.spans`: of dQ are held, for all query heads of a kv head, the sums and what is copied out of them, in two buffers."""
  rows, columns = (math.ceil(n / side) for n, side in zip((problem.queries, problem.keys), tiles))
  itemsize = 2 if problem.q.dtype == jnp.bfloat16 else 4
  most = DQ_LIMIT // (problem.groups * tiles[0] * 128 * math.ceil(problem.width / 128) * (4 + 2 * itemsize))  # tiles of a span
  if problem.product is not products.Dot or not most:
    return 0
  spans = math.ceil(rows / math.ceil(rows / math.ceil(rows / most)))  # of equal length, and none empty
  return spans if spans * columns <= schedule.MAX_TILES else 0


def plan_mosaic_gpu(problem: Problem) -> Plan:
  """Each kernel's tiles by the width of the heads and by what the scores are made of."""
  launches = _forced_launches.get() or _tiles_gpu.launches(problem, _forced_tiles.get())
  return Plan(launches.forward.of_scores, (1, 1), False, interpreting(), launches=launches)


def plan_cudnn(problem: Problem) -> Plan:
  """Of plain JAX, for what cuDNN leaves to it: 64 MiB of scores a step, as the memory is set aside in every call."""
  return plan_xla(problem, 1 << 24)


def finest_blocks(backend: str, queries: int, keys: int) -> int:
  """Rows and columns of the smallest blocks worth skipping one by one: 128, or more where a chip's lists would grow too long."""
  side = 128
  while backend == "tpu" and side < 512 and math.ceil(queries / side) * math.ceil(keys / side) > 1 << 16:  # 256 KiB, of 1 MiB
    side *= 2
  return side


def make_schedule(problem: Problem, plan: Plan) -> AnySchedule:
  """The visits of both passes; a tile at the ragged end is partial, and query heads that share a kv head share a list."""
  if any(isinstance(x, jax.Array) for x in mask_arrays(problem)):  # one compiled function rather than many small operations
    return _schedule_on_device(problem, plan)
  return _schedule(problem, plan)


def settle(plan: Plan, visits: AnySchedule) -> Plan:
  """The plan without the kinds of tiles that are known not to occur: code that is not compiled."""
  if not isinstance(visits.kinds, np.ndarray):
    return plan
  if isinstance(visits, Schedule):
    visited = [schedule.kind(x.codes) for x in (visits.rows, visits.columns)]  # in tiles that may differ
    return dataclasses.replace(plan, kinds=tuple(kind for kind in plan.kinds if any((x == kind).any() for x in visited)))
  found = [kind for kind in plan.kinds if (visits.kinds == kind).any()]
  if isinstance(visits, WalkSchedule):
    one = visits.kinds.shape[2:] == (1, 1) and len(found) == 1 and not (visits.kinds == schedule.EMPTY).any()
    return dataclasses.replace(plan, kinds=tuple(found), one_visit=one)
  if schedule.PARTIAL not in found:  # other kernels have other tiles
    of_others = [x.partial for x in (visits.dq, visits.dkv, visits.fused) if x is not None]
    found += [schedule.PARTIAL] * any(partial.any() for partial in of_others)
  return dataclasses.replace(plan, kinds=tuple(found))


@functools.partial(jax.jit, static_argnames="plan")
def _schedule_on_device(problem: Problem, plan: Plan) -> AnySchedule:
  return _schedule(problem, plan)


def _schedule(problem: Problem, plan: Plan) -> AnySchedule:
  if plan.launches is not None:
    forward, dq, dkv = (_kinds(problem, x.of_scores) for x in (plan.launches.forward, plan.launches.dq, plan.launches.dkv))
    visits, of_columns = schedule.row_visits, lambda kinds: schedule.row_visits(kinds.swapaxes(-1, -2))
    fused = plan.launches.fused and of_columns(_kinds(problem, plan.launches.fused.of_scores))
    return LaunchSchedule(visits(forward), visits(dq), of_columns(dkv), forward, dq, fused)
  if plan.walks:
    kinds, most = _bounded_kinds(problem, plan.tiles)
    kinds = schedule.in_steps(kinds, plan.together)
    return WalkSchedule(schedule.row_visits(kinds, kinds.shape[2] * most), kinds)
  by_row, kinds = _row_visits(problem, plan.tiles, plan.together)
  dq = None
  if plan.backward_tiles is not None:
    dq, kinds = _row_visits(problem, plan.backward_tiles)
  rows, columns = kinds.shape[2:]
  most = rows * _most_in_a_row(problem, plan.backward_tiles or plan.tiles, columns)
  by_column = schedule.span_visits(kinds, max(plan.spans, 1), most)
  return Schedule(by_row, by_column, kinds, None if plan.spans else dq)


def _row_visits(problem: Problem, tiles: tuple[int, int], together: int = 1) -> tuple[schedule.Visits, Any]:
  """The visits row by row, and the kinds of tiles that they come from."""
  kinds, most = _bounded_kinds(problem, tiles)
  return schedule.visits(kinds, kinds.shape[2] * most, together), kinds


def _bounded_kinds(problem: Problem, tiles: tuple[int, int]) -> tuple[Any, int]:
  """The kinds of all tiles, and how many in a row are visited at most."""
  kinds = _kinds(problem, tiles)
  columns = kinds.shape[3]
  most = _most_in_a_row(problem, tiles, columns)
  if not isinstance(kinds, np.ndarray) and most < columns:
    kinds = schedule.first(kinds, most)
  return kinds, most


def _kinds(problem: Problem, tiles: tuple[int, int]) -> Any:
  """EMPTY, PARTIAL or FULL for every tile, `[B|1, K|1, T tiles, S tiles]`."""
  some, every = problem.logits.table(problem.queries, problem.keys, tiles)
  if some.shape[1] > 1:
    group = lambda x: x.reshape(x.shape[0], problem.kv_heads, problem.groups, *x.shape[2:])
    some, every = group(some).any(axis=2), group(every).all(axis=2)
  inside = [np.arange(1, count + 1) * tile <= size
            for size, tile, count in zip((problem.queries, problem.keys), tiles, some.shape[2:])]
  return schedule.kinds(some, every & (inside[0][:, None] & inside[1][None, :]))


def _most_in_a_row(problem: Problem, tiles: tuple[int, int], columns: int) -> int:
  """How many of the `columns` tiles in a row are visited at most, as far as that is known of a traced mask."""
  logits = problem.logits
  if logits.mask is None or logits.query_positions is not None or logits.key_positions is not None:
    return columns
  most = logits.mask.most(tiles)
  return columns if most is None else min(most, columns)


def tile_table(problem: Problem, plan: Plan) -> tuple[Any, Any]:
  """(some, all) per tile, `[B|1, N|1, T tiles, S tiles]`."""
  return problem.logits.table(problem.queries, problem.keys, plan.tiles)


def mask_arrays(problem: Problem) -> list[Any]:
  """The arrays that decide what is kept."""
  logits = problem.logits
  if logits.mask is None:
    return []
  leaves = jax.tree.leaves((logits.mask, logits.query_positions, logits.key_positions), is_leaf=is_program)
  return [x for x in leaves if not is_program(x)]


def _table_lead(problem: Problem) -> tuple[int, int]:
  """How many batch elements and heads the mask tells apart."""
  return tuple(max([x.shape[axis] for x in mask_arrays(problem)], default=1) for axis in (0, 1))  # type: ignore[return-value]


def _blocks(problem: Problem, *sides: int) -> tuple[int, int]:
  """(rows, columns), or the blocks of a block-sparse mask where they are smaller: in larger tiles they would not be skipped."""
  shapes = [part.block_shape for part in parts(problem.logits.mask) if isinstance(part, masks.BlockSparse)]
  return tuple(min([side, *(max(shape[axis], SMALLEST) for shape in shapes)]) for axis, side in enumerate(sides))  # type: ignore[return-value]
