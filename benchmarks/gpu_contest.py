"""Programs of one shape that are compiled ahead, tried, checked and timed in turns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import report
from .gpu_programs import Draw, Exact, Program, rotate
from .gpu_results import Result
from .timing import interleave

WRONG = 0.05  # largest error, as a share of the largest number, that rounding to bfloat16 does not explain
SAMPLE = 20e-3  # seconds of calls timed at once: against them, waiting for the last one does not count
Rows = list[Result]
Begin = Callable[[str], None]  # is told what is begun, so that who watches knows what hung
Measure = Callable[[], Rows]


class Broken(RuntimeError):
  """The device computes nothing any more in this process; `args` name what was begun last and how that ended."""


class Effort(NamedTuple):
  """How long to measure."""

  repeats: int = 15  # rounds at most
  seconds: float = 2.0  # for the rounds of one contest in one direction
  memory: float = 4 * 2**30  # bytes of temporary memory beyond which a program is not run


class Entrant(NamedTuple):
  """One who takes part, in one direction.

  Attributes:
    make: compiles its program.
    work: of its call: "flops", "bytes".
    arrays: NumPy arrays by keyword that it is given besides what is drawn.
    tunes: whether compiling tries out algorithms on the device, and so has to wait for its turn there.
    checked: whether its results can be compared with what is exact.
  """

  name: str
  direction: str
  make: Callable[[], Program]
  work: Mapping[str, float]
  arrays: Mapping[str, Any] = {}
  tunes: bool = False
  checked: bool = True

  @property
  def label(self) -> str:
    return f"{self.name}, {self.direction}"


class _State:
  """The programs of a contest, and by label why there is none."""

  def __init__(self, begin: Begin, notes: dict[str, str]):
    self.begin, self.notes = begin, notes
    self.programs: dict[str, Program] = {}

  def make(self, entrant: Entrant) -> None:
    if entrant.label in self.notes:
      return
    self.begin(entrant.label)
    try:
      self.programs[entrant.label] = entrant.make()
    except Exception as error:  # whatever a compiler raises; the others go on
      self.notes[entrant.label] = report.reason(error)

  def start(self, entrant: Entrant, sets: Sequence[dict[str, Any]], limit: float) -> list[Callable[[], Any]]:
    """Calls of its program, one for each set of inputs."""
    program = self.programs[entrant.label]
    if program.temporary > limit:
      raise MemoryError(f"{program.temporary / 2**30:.3g} GiB of temporary memory, the limit is {limit / 2**30:.3g}")
    self.begin(entrant.label)
    arrays = {name: jnp.asarray(x) for name, x in entrant.arrays.items()}
    return [program.call({name: x for name, x in drawn.items() if name != "dout"} | arrays, drawn["dout"]) for drawn in sets]


@dataclasses.dataclass(frozen=True)
class Contest:
  """All who take part in one table row's case, in one or both directions.

  Attributes:
    case: columns of its rows.
    arguments: shapes and dtypes of what is drawn.
    exact: makes what results are compared with, or None.
    ratios: (entrant, times by name) -> numbers that are added to its row.
  """

  part: str
  case: Mapping[str, str]
  arguments: Mapping[str, Any]
  entrants: Sequence[Entrant]
  effort: Effort
  exact: Callable[[], Exact] | None = None
  ratios: Callable[[Entrant, Mapping[str, Any]], dict[str, Any]] = lambda entrant, times: {}

  def prepare(self, begin: Begin, without: Sequence[str] = ()) -> Measure:
    """Compiles all but those `without`, as far as that leaves the device alone; the function that it returns measures."""
    state = _State(begin, dict.fromkeys(without, "it hung or broke down before"))
    for entrant in self.entrants:
      if not entrant.tunes:
        state.make(entrant)
    begin("inputs")
    draw, exact = Draw(self.arguments), self.exact and self.exact()

    def measure() -> Rows:
      for entrant in self.entrants:
        if entrant.tunes:
          state.make(entrant)
      sets = draw.sets()
      begin("what is exact")
      error = _error_of(exact, sets[0])
      return [row for direction in dict.fromkeys(entrant.direction for entrant in self.entrants)
              for row in self._measure(direction, state, sets, error)]

    return measure

  def _measure(self, direction: str, state: _State, sets: Sequence[dict[str, Any]], error: Callable[[Any], float | None]) -> Rows:
    """The rows of one direction."""
    calls, errors = {}, {}
    entrants = [entrant for entrant in self.entrants if entrant.direction == direction]
    for entrant in entrants:
      if entrant.label not in state.notes:
        try:
          starts = state.start(entrant, sets, self.effort.memory)
          got = jax.block_until_ready(starts[0]())
          errors[entrant.name] = error(got) if entrant.checked else None
          calls[entrant.name] = rotate(starts)
        except (RuntimeError, ValueError, MemoryError, TypeError) as raised:
          state.notes[entrant.label] = report.reason(raised)
          check_device(entrant.label, raised)
    state.begin("timing of " + ", ".join(calls))
    times = interleave(calls, repeats=self.effort.repeats, seconds=self.effort.seconds, sample=SAMPLE) if calls else {}
    return [self._row(entrant, state.notes, times, errors) for entrant in entrants]

  def _row(self, entrant, notes, times, errors) -> Result:
    measured: dict[str, Any] = {}
    note, own = notes.get(entrant.label, ""), times.get(entrant.name)
    if own is not None:
      rates = {"flops": ("TFLOP/s", 1e12), "bytes": ("GB/s", 1e9)}
      measured = {column: entrant.work[name] / own.median / unit for name, (column, unit) in rates.items() if name in entrant.work}
      measured |= {"max error": errors.get(entrant.name)} | self.ratios(entrant, times)
      if own.host_bound:
        note = "the device waited for its host: it may be faster than this"
    wrong = (errors.get(entrant.name) or 0) > WRONG
    return Result(part=self.part, case={**self.case, "pass": entrant.direction}, name=entrant.name, times=own, note=note,
                  measured=measured, failed=wrong)


def _error_of(exact: Exact | None, drawn: Mapping[str, Any]) -> Callable[[Any], float | None]:
  """The error of an output or of gradients; None where it is not known."""
  try:
    return functools.partial(exact.error, want=jax.block_until_ready(exact(drawn))) if exact else lambda got: None
  except RuntimeError as error:  # it takes memory in proportion to N²
    check_device("what is exact", error)
    return lambda got: None


def check_device(label: str, error: Exception) -> None:
  """Raises `Broken` if the device has stopped computing."""
  try:
    jax.block_until_ready(jnp.arange(8) + 1)
  except RuntimeError as dead:
    raise Broken(label, report.reason(error)) from dead
