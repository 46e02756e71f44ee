"""Kernel regression by jflash beside pykeops, scikit-learn and statsmodels: time, and the error of what was computed.

    python -m benchmarks.regression --lengths 1024,4096,16384 --parts predict,wide,prune,search

Four parts: prediction at the data's own points in two coordinates, the same in 64, tiles skipped by `tol`, and the choice of a
bandwidth. Writes tables and a plot, `benchmarks/results/regression-DEVICE.md` and `.png`, or where `--out` says.
"""

import argparse
import dataclasses
import functools
import pathlib
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jflash import kernel_regression

from . import estimators, machine, options, report
from .estimators import Estimator
from .timing import Times, interleave

CHECKED = 256  # queries at which the mean is compared with the definition
COLD_ROUNDS = 3  # fresh processes for each search
FAILURES = (ImportError, OSError, RuntimeError, ValueError, MemoryError)  # after which the others still run
TIMES_LEGEND = """\
ms: median over the rounds, in which the implementations took turns; ±%: half the distance between the quartiles.
"""
PREDICT_LEGEND = TIMES_LEGEND + f"""\
From NumPy arrays to the mean at all n points. first s: seconds of the first call with these shapes, with whatever it compiles;
pykeops compiles once for each dtype and d, and starts without its cache. × jflash: how many times as long as `jflash` in the same
case. cores: how many were busy for it on average, fewer than it could use if other processes ran. max error: of the mean, at
{CHECKED} of the points, against its definition in float64 (for `linear` and `ll` that of a local line). jflash stats: with
variance, density, leverage and sample size. statsmodels computes in float64, and the slopes too.
"""
PRUNE_LEGEND = TIMES_LEGEND + f"""\
× faster: than without `tol`. visited: the share of tiles that were computed. moved: the largest change of the mean at any point
through `tol`, as a share of max y - min y; at most `tol` is promised. max error: as above, at {CHECKED} of the points.
"""
SEARCH_LEGEND = TIMES_LEGEND + f"""\
jflash: `select_bandwidth(criterion="loo")`; statsmodels: `KernelReg(bw="cv_ls")`. cold s: the first search of a fresh process,
compilation included and imports not, median of {COLD_ROUNDS}; ms: later searches of one process. × jflash: how many times as long
as jflash, × cold the same between the cold ones. score: the mean squared leave-one-out error at that bandwidth, by its definition.
"""


@dataclasses.dataclass(frozen=True)
class Case:
  """n points, "uniform" in the unit cube or "normal", with noisy values. All dtypes get the same numbers."""

  points: str
  n: int
  d: int
  dtype: str
  bandwidth: float

  def data(self) -> tuple[Any, Any]:
    draw = np.random.default_rng(self.n)
    x = (draw.uniform if self.points == "uniform" else draw.standard_normal)(size=(self.n, self.d)).astype(np.float32)
    y = np.sin(6 * x[:, 0]) + 0.5 * x[:, -1] ** 2 + 0.1 * draw.standard_normal(self.n)
    return x.astype(self.dtype), y.astype(np.float32).astype(self.dtype)

  def checked(self) -> Any:
    """Some of the points, spread over all."""
    return np.unique(np.linspace(0, self.n - 1, CHECKED).astype(int))

  def error(self, mean: Any, order: str) -> float:
    """The largest error of the mean at the checked points."""
    x, y = self.data()
    rows = self.checked()
    expected = estimators.dense_fit(x, y, rows, self.bandwidth, order)
    return float(np.max(np.abs(np.asarray(mean, np.float64)[rows] - expected)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictRow(report.Row):
  case: Case
  first: float | None = None
  ratio: float | None = None
  error: float | None = None

  def key(self) -> dict[str, str]:
    return {"d": str(self.case.d), "n": str(self.case.n), "dtype": self.case.dtype, "implementation": self.name}

  def values(self) -> dict[str, str]:
    return {"first s": report.text(self.first, ".2f"), **self.time_cells(), "× jflash": report.text(self.ratio, ".2f"),
            "cores": report.text(self.times and self.times.cores, ".1f"), "max error": report.text(self.error, ".1e"),
            **self.round_cells()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneRow(report.Row):
  case: Case
  tol: float
  speedup: float
  visited: float
  moved: float
  error: float

  def key(self) -> dict[str, str]:
    return {"points": self.case.points, "n": str(self.case.n), "dtype": self.case.dtype, "tol": f"{self.tol:g}"}

  def values(self) -> dict[str, str]:
    return {**self.time_cells(), "× faster": f"{self.speedup:.2f}", "visited": f"{self.visited:.3f}", "moved": f"{self.moved:.1e}",
            "max error": f"{self.error:.1e}", **self.round_cells()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRow(report.Row):
  n: int
  cold: Times | None = None
  cold_ratio: float | None = None
  ratio: float | None = None
  bandwidth: float | None = None
  score: float | None = None

  def key(self) -> dict[str, str]:
    return {"n": str(self.n), "implementation": self.name}

  def values(self) -> dict[str, str]:
    return {"cold s": report.text(self.cold and self.cold.median, ".2f"), "× cold": report.text(self.cold_ratio, ".2f"),
            **self.time_cells(), "× jflash": report.text(self.ratio, ".2f"), "bandwidth": report.text(self.bandwidth, ".5f"),
            "score": report.text(self.score, ".8f"), **self.round_cells()}


class Budget:
  """Refuses calls that would take too much time, by what a smaller case took, all of them being quadratic in n."""

  def __init__(self, seconds: float):
    self.seconds = seconds
    self._known: dict[Any, tuple[int, float]] = {}

  def learn(self, key: Any, n: int, seconds: float) -> None:
    self._known[key] = n, seconds

  def refusal(self, key: Any, n: int) -> str:
    before, seconds = self._known.get(key, (n, 0.0))
    expected = seconds * (n / before) ** 2
    return f"about {expected:.0f} s a call, the limit is {self.seconds:g}" if expected > self.seconds else ""


def predict(case: Case, candidates: Mapping[str, Estimator], budget: Budget, args: Any) -> Iterator[PredictRow]:
  """One row for each candidate that knows the dtype: all called once, those that can be measured in turns."""
  x, y = case.data()
  rows, calls = [], {}
  for name, candidate in candidates.items():
    if case.dtype not in candidate.dtypes:
      continue
    row = PredictRow(name=name, case=case)
    note = _too_large(candidate, case, args.memory_limit) or budget.refusal((name, case.dtype, case.d), case.n)
    if not note:
      try:
        call = candidate.prepare(x, y, case.bandwidth)
        result, first = _timed(call)
        mean = result[0] if isinstance(result, tuple) else result
        row = dataclasses.replace(row, first=first, error=case.error(mean, candidate.order))
        calls[name] = call
      except FAILURES as error:
        note = report.reason(error)
    rows.append(dataclasses.replace(row, note=note))
  times = interleave(calls, repeats=args.repeats, seconds=args.seconds) if calls else {}
  for row in rows:
    if row.name in times:
      budget.learn((row.name, case.dtype, case.d), case.n, times[row.name].median)
    yield dataclasses.replace(row, times=times.get(row.name), ratio=_ratio(times, row.name))


def prune(case: Case, tol: float, args: Any) -> Iterator[PruneRow]:
  """Two rows, without and with `tol`."""
  x, y = case.data()

  def call(tol, **more):
    with estimators.widen(case.dtype), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # that far points lose digits; the rows have the error
      return kernel_regression(x, y, None, case.bandwidth, tol=tol, implementation=args.implementation, **more)

  calls = {f"tol {t:g}": functools.partial(call, t) for t in (0.0, tol)}
  times = interleave(calls, repeats=args.repeats, seconds=args.seconds)
  exact, base = np.asarray(call(0.0), np.float64), times["tol 0"]
  for t, (name, taken) in zip((0.0, tol), times.items()):
    mean = np.asarray(call(t), np.float64)
    visited = float(call(t, return_stats=True)[1].visited) if t else 1.0
    yield PruneRow(name=name, case=case, times=taken, tol=t, speedup=taken.speedup(base), visited=visited,
                   moved=float(np.max(np.abs(mean - exact)) / np.ptp(y)), error=case.error(mean, "constant"))


def search(case: Case, searches: Mapping[str, Callable], budget: Budget, args: Any) -> Iterator[SearchRow]:
  """One row for each search: first in fresh processes, taking turns, then in this one."""
  x, y = case.data()
  rows, calls, cold = [], {}, {}
  for name, prepare in searches.items():
    row, note = SearchRow(name=name, n=case.n), budget.refusal(("search", name), case.n)
    if not note:
      try:
        call = prepare(x, y)
        bandwidth = call()
        row = dataclasses.replace(row, bandwidth=float(bandwidth[0]), score=estimators.leave_one_out(x, y, bandwidth))
        calls[name], cold[name] = call, []
      except FAILURES as error:
        note = report.reason(error)
    rows.append(dataclasses.replace(row, note=note))
  for _ in range(COLD_ROUNDS if args.cold else 0):
    for name, taken in cold.items():
      taken.append(_cold_search(name, case))
  cold = {name: Times(tuple(taken)) for name, taken in cold.items() if taken}
  times = interleave(calls, repeats=args.repeats, seconds=args.seconds) if calls else {}
  for row in rows:
    if row.name in times:
      budget.learn(("search", row.name), case.n, times[row.name].median)
    yield dataclasses.replace(row, times=times.get(row.name), ratio=_ratio(times, row.name), cold=cold.get(row.name),
                              cold_ratio=_ratio(cold, row.name))


def first_search(name: str, case: Case) -> float:
  """Seconds of one search; imports do not count."""
  return _timed(estimators.SEARCHES[name](*case.data()))[1]


def _cold_search(name: str, case: Case) -> float:
  program = f"from benchmarks.regression import *; print(first_search({name!r}, {case!r}))"
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=pathlib.Path(__file__).parents[1],
                        capture_output=True, text=True, check=False)
  if done.returncode:
    raise ChildProcessError(f"a fresh process could not search with {name}; --no-cold leaves that out:\n{done.stderr}")
  return float(done.stdout.split()[-1])


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
  start = time.perf_counter()
  result = jax.block_until_ready(call())
  return result, time.perf_counter() - start


def _ratio(times: Mapping[str, Times], name: str) -> float | None:
  """How many times as long as jflash."""
  return times["jflash"].speedup(times[name]) if "jflash" in times and name in times else None


def _too_large(candidate: Estimator, case: Case, limit: float) -> str:
  gib = candidate.bytes(case.n, case.dtype) / 2**30
  return f"{gib:.3g} GiB for an array, the limit is {limit:.3g}" if gib > limit else ""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = options.parser(__doc__, "regression")
  parser.add_argument("--parts", type=options.words, default=["predict", "wide", "prune", "search"], help="with commas between")
  parser.add_argument("--lengths", type=options.integers, default=[1024, 4096, 16384], help="n of `predict`, with commas between")
  parser.add_argument("--dtype", type=options.words, default=["float32", "float64"], help="of `predict`, with commas between")
  parser.add_argument("--bandwidth", type=float, default=0.05, help="of `predict` and `prune`")
  parser.add_argument("--tol", type=float, default=1e-3, help="where tiles are skipped")
  parser.add_argument("--wide-length", type=int, default=8192, help="n of `wide`")
  parser.add_argument("--wide-coordinates", type=int, default=64, help="d of `wide`")
  parser.add_argument("--prune-length", type=int, default=65536, help="n of `prune`")
  parser.add_argument("--search-lengths", type=options.integers, default=[1000, 5000], help="n of `search`, with commas between")
  parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True, help="search in fresh processes as well")
  parser.add_argument("--budget", type=float, default=8.0, metavar="SECONDS", help="what would take longer a call is not run")
  parser.add_argument("--implementation", help="of jflash, for `predict`, `wide` and `prune`")
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[report.Table]:
  """Measures every part, printing as it goes."""
  candidates = estimators.estimators(args.tol, args.implementation)
  budget = Budget(args.budget)
  tables = []
  if "predict" in args.parts:
    cases = [Case("uniform", n, 2, dtype, args.bandwidth) for dtype in args.dtype for n in sorted(args.lengths)]
    heading = f"Prediction at all n points, uniform in the unit square, bandwidth {args.bandwidth:g}"
    tables.append(_table(heading, PREDICT_LEGEND, (predict(case, candidates, budget, args) for case in cases)))
  if "wide" in args.parts:
    case = Case("normal", args.wide_length, args.wide_coordinates, "float32", 0.5 * args.wide_coordinates**0.5)
    some = {name: candidates[name] for name in ("jflash", "pykeops", "scikit-learn")}
    heading = f"Prediction at all n points, standard normal in {case.d} coordinates, bandwidth {case.bandwidth:g}"
    tables.append(_table(heading, "Columns as above.\n", [predict(case, some, budget, args)]))
  if "prune" in args.parts:
    cases = [Case(points, args.prune_length, 2, "float32", args.bandwidth) for points in ("normal", "uniform")]
    heading = f"Skipped tiles: d 2, bandwidth {args.bandwidth:g}, normal with variance 1 and uniform in the unit square"
    tables.append(_table(heading, PRUNE_LEGEND, (prune(case, args.tol, args) for case in cases)))
  if "search" in args.parts:
    cases = [Case("uniform", n, 1, "float64", 0.0) for n in sorted(args.search_lengths)]
    heading = "Choice of the bandwidth: d 1, uniform in the unit interval, float64"
    tables.append(_table(heading, SEARCH_LEGEND, (search(case, estimators.SEARCHES, budget, args) for case in cases)))
  return tables


def _table(heading: str, legend: str, cases: Iterable[Iterator[report.Row]]) -> report.Table:
  print(heading, flush=True)
  return report.Table(heading, report.collect(cases), legend)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = parse(argv)
  load = machine.load()
  tables = run(args)
  title = "Kernel regression with a Gaussian kernel"
  header = machine.header() | load | {"Beside": machine.versions("pykeops", "scikit-learn", "statsmodels")}
  page = report.document(title, header | options.command("regression", argv), tables)
  predicted = [row for table in tables for row in table.rows if isinstance(row, PredictRow) and row.case.d == 2]
  options.write(args.out, page, lambda path: plot(path, f"{title}, d 2, all n points\n{machine.device_name()}", predicted))
  rows = [row for table in tables for row in table.rows]
  broken = [row for row in rows if isinstance(row, PruneRow) and not row.moved <= row.tol]
  return 0 if any(row.times for row in rows) and not broken else 1


def plot(path: pathlib.Path, title: str, rows: Sequence[PredictRow]) -> None:
  """Time against n, a panel for each dtype: colour is the library, line style what it computes."""
  names, dtypes = report.unique(row.name for row in rows), report.unique(row.case.dtype for row in rows)
  libraries = report.unique(name.split()[0] for name in names)
  looks = {}
  for i, library in enumerate(libraries):
    own = [name for name in names if name.split()[0] == library]
    looks |= {name: {"color": f"C{i}", **style} for name, style in zip(own, report.STYLES)}
  panels = []
  for dtype in dtypes:
    lines = [([(r.case.n, r.times and 1e3 * r.times.median) for r in rows if (r.name, r.case.dtype) == (name, dtype)], looks[name])
             for name in names]
    panels.append(report.Panel(dtype, "n, points", "time, ms", lines))
  if panels:
    report.plot(path, title, [panels], looks)


if __name__ == "__main__":
  sys.exit(main())
