"""The static schedule of TPU kernels, with no TPU at hand: bundles of instructions, and how full the units' slots are.

    python -m benchmarks.tpu_schedule benchmarks.tpu_static:cases --chip v5e

A TPU core issues one bundle of instructions a cycle, in the order in which the compiler packed them, and libtpu prints the bundles.
So the bundles of a grid step are about its cycles, as long as it does not wait for memory. libtpu reads its flags when it is
loaded, so each chip is compiled for in a subprocess.

MODULE:FUNCTION names a function of no arguments that returns a dict of cases, name -> (fun, args).
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax

from . import chips

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
_FILE = re.compile(r"\d+-(?P<name>\w+?)(\.\d+)?-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:")
_REGION = re.compile(r"Start/End empty region (\d+)|Start region (\d+)|End region (\d+)")
_BRANCH = re.compile(r"sbr\.rel .*?target = \$region(\d+)")


@dataclasses.dataclass
class Step:
  """The part of a kernel that computes one tile.

  Attributes:
    bundles: on the common path.
    rare: bundles of branches within that are jumped over as a rule, as for numbers that are not finite.
    use: unit -> slots used on the common path.
  """

  bundles: int
  rare: int
  use: dict[str, int]


@dataclasses.dataclass
class Schedule:
  """A kernel's schedule.

  Attributes:
    kernel: the name given to `pallas_call`.
    bundles: of the whole kernel, each counted once.
    capacity: unit -> slots in a bundle.
    use: unit -> slots used, of the whole kernel. VLOAD:FILL and VSTORE:SPILL are loads and stores of what was spilled.
    steps: in the order of the code.
  """

  kernel: str
  bundles: int
  capacity: dict[str, int]
  use: dict[str, int]
  steps: list[Step]

  def share(self, unit: str, step: int = -1) -> float:
    """The share of a unit's slots that a step uses."""
    return self.steps[step].use[unit] / (self.capacity[unit] * self.steps[step].bundles)

  @staticmethod
  def from_json(tree: dict[str, Any]) -> Schedule:
    return Schedule(**{**tree, "steps": [Step(**step) for step in tree["steps"]]})


def libtpu_version() -> str:
  """The compiler's: figures of different ones do not compare."""
  return importlib.metadata.version("libtpu")


def schedules(cases: str, chip: str, *, only: str = "*") -> dict[str, list[Schedule]]:
  """case -> schedules of its Pallas kernels, in the order in which they were compiled.

  Args:
    cases: "module:function", as the module's docstring says; imported in the subprocess only.
    chip: one of `chips.CHIPS`.
    only: cases of this name or pattern (as in the shell) only.

  Raises:
    RuntimeError: a case does not compile; with what the subprocess printed.
  """
  with tempfile.TemporaryDirectory(prefix="tpu-schedule-") as folder:
    job = json.dumps({"cases": cases, "chip": chip, "only": only, "folder": folder})
    environment = {**os.environ, **chips.ENVIRONMENT, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": _FLAGS.format(folder),
                   "JAX_ENABLE_COMPILATION_CACHE": "false",
                   "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-m", "benchmarks.tpu_schedule", "--job", job], env=environment, capture_output=True,
                          text=True, check=False)
    if done.returncode:
      raise RuntimeError(f"the cases of {cases} do not compile for {chip}:\n{(done.stdout + done.stderr)[-4000:]}")
    found = json.loads(pathlib.Path(folder, "schedules").read_text())
  return {name: [Schedule.from_json(tree) for tree in trees] for name, trees in found.items()}


def _work(job: dict[str, Any]) -> None:
  """In the subprocess: compiles the cases, and reads what was printed about each before the next."""
  folder = pathlib.Path(job["folder"])
  module, _, function = job["cases"].partition(":")
  found = {}
  for name, (fun, args) in getattr(importlib.import_module(module), function)().items():
    if fnmatch.fnmatch(name, job["only"]):
      chips.compile_for(job["chip"], fun, *args)
      found[name] = [dataclasses.asdict(read(path, _beside(path, "final_hlo-static-per-bundle-utilization")))
                     for path in sorted(folder.glob("*-final_bundles.txt")) if _is_kernel(path)]
      for path in folder.iterdir():
        path.unlink()
  (folder / "schedules").write_text(json.dumps(found))


def _is_kernel(path: pathlib.Path) -> bool:
  """Whether these are the bundles of a Pallas kernel, and not of what XLA made, of which TLP is the program around all."""
  match = _FILE.fullmatch(path.name)
  of_a_call = lambda: "tpu_custom_call" in _beside(path, "schedule-analysis_final_bundles").read_text()
  return match is not None and match["name"] != "TLP" and of_a_call()


def _beside(bundles: pathlib.Path, kind: str) -> pathlib.Path:
  """The file of another kind about the same kernel."""
  path, = bundles.parent.glob(f"{bundles.name.rpartition('-final_bundles')[0].rpartition('-')[0]}-*-{kind}.txt")
  return path


# Reading what libtpu prints ---------------------------------------------------------------------------------------------


def read(bundles: pathlib.Path, use: pathlib.Path) -> Schedule:
  """A schedule from the text of the bundles and that of the slots that each uses.

  Raises:
    ValueError: the texts are not as they were; their format may have changed.
  """
  lines = use.read_text().splitlines()
  units = [unit.strip() for unit in lines[1].split(",")]
  capacity = dict(zip(units, map(int, lines[2].split())))
  slots = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
  regions, branches, count = _regions(bundles.read_text())
  if count != len(slots) or "MATMUL" not in capacity or any(len(row) != len(units) for row in slots):
    raise ValueError(f"{bundles.name} has {count} bundles and {use.name} {len(slots)} rows of {units}")
  match = _FILE.fullmatch(bundles.name)
  total = lambda numbers: {unit: sum(slots[n][k] for n in numbers) for k, unit in enumerate(units)}
  steps = []
  for first, last in _steps(regions, lambda a, b: sum(row[units.index("MATMUL")] for row in slots[a:b + 1])):
    rare = {n for at, target in branches if first <= at <= last and target in regions and at < regions[target][0] <= last
            for n in range(at + 1, regions[target][0])}
    common = [n for n in range(first, last + 1) if n not in rare]
    steps.append(Step(len(common), len(rare), total(common)))
  return Schedule(match["name"] if match else bundles.name, count, capacity, total(range(count)), steps)


def _regions(text: str) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int]], int]:
  """region -> (first bundle, last bundle); (bundle, region that it may jump to); number of bundles."""
  regions: dict[int, tuple[int, int]] = {}
  branches, at = [], -1
  for line in text.splitlines():
    at += bool(_BUNDLE.match(line))
    for empty, start, end in _REGION.findall(line):
      number = int(empty or start or end)
      regions[number] = (regions[number][0] if end and number in regions else at, at)
    branches += [(at, int(target)) for target in _BRANCH.findall(line)]
  return regions, branches, at + 1


def _steps(regions: dict[int, tuple[int, int]], products: Any) -> list[tuple[int, int]]:
  """The regions that compute a tile: those with products that lie side by side, innermost where they lie in one another."""
  busy = sorted({span for span in regions.values() if products(*span)}, key=lambda span: (span[0], -span[1]))
  inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
  if not busy:
    return []
  level = [span for span in busy if not any(inside(span, other) for other in busy)]
  while len(level) == 1:
    within = [span for span in busy if inside(span, level[0])]
    outer = [span for span in within if not any(inside(span, other) for other in within)]
    if sum(products(*span) for span in outer) < products(*level[0]):
      break
    level = outer
  return level


# The command line -------------------------------------------------------------------------------------------------------


def as_text(case: str, schedule: Schedule) -> str:
  """For reading: a line for the kernel and one for each step."""
  lines = [f"{case}, {schedule.kernel}: {schedule.bundles} bundles in all"]
  for n, step in enumerate(schedule.steps):
    shares = ", ".join(f"{unit} {schedule.share(unit, n):.2f}" for unit in schedule.capacity)
    lines.append(f"  {step.bundles} bundles (and {step.rare} as a rule jumped over): {shares}")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("cases", metavar="MODULE:FUNCTION")
  parser.add_argument("--chip", default="v5e", choices=chips.CHIPS)
  parser.add_argument("--only", default="*", help="name of a case, or a pattern")
  args = parser.parse_args(argv)
  found = schedules(args.cases, args.chip, only=args.only)
  print(f"{args.chip}, JAX {jax.__version__}, libtpu {libtpu_version()}")
  print("\n".join(as_text(case, schedule) for case, several in found.items() for schedule in several))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--job"]:
    _work(json.loads(sys.argv[2]))
  else:
    main()
