"""Ways to cut the kernels for Hopper up: which ones compile well, known without a GPU, and which one is fastest there.

    python -m benchmarks.gpu_variants --chip h200

compiles all of `grid()` and writes what it came to, `benchmarks/gpu_variants.json`; `benchmarks.gpu` times those without spills.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jflash
from jflash import _plan, _tiles_gpu
from jflash._tiles_gpu import Launch

from . import gpu_chips, gpu_compile, gpu_shapes
from .gpu_contest import Contest, Entrant
from .gpu_programs import INPUTS, Program, passes
from .gpu_results import Result, of
from .gpu_speed import Cases, Setup, launches_of

PATH = pathlib.Path(__file__).with_suffix(".json")
MASKS = "causal", "full"
TWO = "two kernels"
KERNELS = {"forward": INPUTS, "dq": ("query",), "dkv": ("key", "value")}  # and the arguments whose gradient it alone computes
SMALL = _tiles_gpu.Launches(Launch((128, 64)), Launch((64, 64), 1), Launch((64, 64), 1), True, 1)
LENGTH = 4096
MOST = 10  # variants of one kernel that are timed
SCALARS = 64  # bytes that may spill: scalars, outside of the loops
SPILLED = 3  # how many of those that spill least, where all spill
SERIAL = ("C7511", "C7512", "C7513", "C7514")  # remarks of ptxas: products run one after the other
NOISE = 0.01  # of two variants that differ by less, the earlier one is taken


@dataclasses.dataclass(frozen=True)
class Variant:
  """One kernel cut up in one way, for heads of `width`."""

  kernel: str
  width: int
  launch: Launch
  split: bool = False  # of dkv: whether dK and dV have a kernel each

  @property
  def label(self) -> str:
    launch = self.launch
    notes = ", in turns" * launch.turns + ", split" * self.split
    return f"{launch.tiles[0]} x {launch.tiles[1]}, {launch.stages} stage{'s' * (launch.stages > 1)}{notes}"

  def launches(self, rest: _tiles_gpu.Launches) -> _tiles_gpu.Launches:
    """`rest` with this kernel cut up so."""
    split = {"split": self.split} if self.kernel == "dkv" else {}
    return dataclasses.replace(rest, **{self.kernel: self.launch}, **split)

  @property
  def stage(self) -> int:
    """Bytes of one stage more: two tiles of the side that is walked along, and for dkv two statistics for each of its rows."""
    rows, columns = self.launch.tiles
    side = rows if self.kernel == "dkv" else columns
    return 2 * side * 2 * self.width + (2 * side * 4 if self.kernel == "dkv" else 0)

  def function(self, rest: _tiles_gpu.Launches, causal: bool) -> Callable:
    """`jflash.attention` with this kernel cut up so."""
    def attend(**arrays):
      with _plan.force_launches(self.launches(rest)):
        return jflash.attention(**arrays, is_causal=causal, implementation="mosaic_gpu")
    return attend


def grid() -> list[Variant]:
  """All that are compiled, with as few stages as there may be."""
  rows = {"forward": (128, 192, 64), "dq": (64, 128, 192), "dkv": (64, 128)}
  columns = {"forward": (64, 128), "dq": (64, 128), "dkv": (64, 128, 192)}
  made = []
  for width, kernel in itertools.product(gpu_shapes.WIDTHS, KERNELS):
    for r, c in itertools.product(rows[kernel], columns[kernel]):
      shared = kernel == "dkv" and width > 128  # by two warpgroups, 64 x 64 scores at a time
      if not shared or (r, c) == (64, 64):
        turns = (False, True) if kernel == "forward" and r == 128 else (False,)
        splits = (False, True) if kernel == "dkv" and not shared else (False,)
        launch = Launch((r, c), 2 if kernel == "forward" else 1)
        made += [Variant(kernel, width, dataclasses.replace(launch, turns=turn), split)
                 for turn, split in itertools.product(turns, splits)]
  return made


def compile_cases() -> dict[str, tuple[Callable, tuple]]:
  """For `gpu_compile`: each variant of the grid alone, causal, so that it has a loop with the mask and one without."""
  with jax.default_device(gpu_chips.device("h200")):
    return {f"{variant.kernel} {variant.width} {variant.label}": _program(variant) for variant in grid()}


def _program(variant: Variant) -> tuple[Callable, tuple]:
  shape = gpu_shapes.paper(variant.width, LENGTH)
  function = variant.function(SMALL, causal=True)
  if variant.kernel == "forward":
    return lambda arrays: function(**arrays), (shape.arguments,)
  save, pull = passes(function, KERNELS[variant.kernel])
  out, saved = jax.eval_shape(save, shape.arguments)
  return pull, (saved, out)


def found_by_compiling(chip: str) -> dict[str, Any]:
  """What is kept in `PATH`."""
  reports = gpu_compile.compile_cases("benchmarks.gpu_variants:compile_cases", chip)
  rows = []
  for variant, report in zip(grid(), reports.values()):
    if not report.error:
      notes = [note for kernel in report.kernels for note in kernel.notes]
      rows.append({"kernel": variant.kernel, "width": variant.width, "launch": dataclasses.asdict(variant.launch),
                   "split": variant.split, "registers": [kernel.registers for kernel in report.kernels],
                   "spilled": sum(kernel.spill_stores for kernel in report.kernels),
                   "shared": max(kernel.shared for kernel in report.kernels),
                   "serial": any(code in note for note in notes for code in SERIAL)})
  return {"chip": chip, "jax": jax.__version__, "ptxas": gpu_chips.ptxas_version(), "variants": rows}


def candidates(kernel: str, width: int, found: Mapping[str, Any]) -> list[Variant]:
  """Those that neither spill nor run products one after the other, also with one stage more where there is room; large tiles first.

  Where there are none, those that spill least.
  """
  rows = [row for row in found["variants"] if (row["kernel"], row["width"]) == (kernel, width)]
  good = ([row for row in rows if row["spilled"] <= SCALARS and not row["serial"]]
          or sorted(rows, key=lambda row: (row["serial"], row["spilled"]))[:SPILLED])
  limit, made = gpu_chips.CHIPS[found["chip"]].shared_limit, []
  for row in sorted(good, key=lambda row: -math.prod(row["launch"]["tiles"])):
    for more in range(2):
      launch = Launch(**row["launch"] | {"tiles": tuple(row["launch"]["tiles"])})
      variant = Variant(kernel, width, launch, row["split"])
      if row["shared"] + more * variant.stage <= limit:
        made.append(dataclasses.replace(variant, launch=dataclasses.replace(launch, stages=launch.stages + more)))
  return made[:MOST]


def variants(setup: Setup) -> Cases:
  """For each width, mask and kernel, what is in the table now and the candidates; and the backward pass in one kernel."""
  found = json.loads(PATH.read_text())
  several = {f"d {width}, {mask}, {kernel}": functools.partial(_contest, setup, found, width, mask, kernel)
             for kernel in KERNELS for width in setup.widths for mask in MASKS}
  fused = {f"d {width}, {mask}, backward in one kernel": functools.partial(_fusion, setup, width, mask)
           for width in setup.widths if (width, False) in _tiles_gpu.FUSED for mask in MASKS}
  return fused | several


def _contest(setup: Setup, found: Mapping[str, Any], width: int, mask: str, kernel: str) -> Contest:
  length = min(LENGTH, max(setup.lengths))
  shape = setup.shape(width, length)
  given = gpu_shapes.masking(mask, shape.batch, length)
  rest = launches_of(shape, is_causal=mask == "causal")
  now = Variant(kernel, width, getattr(rest, kernel), rest.split if kernel == "dkv" else False)
  direction = "forward" if kernel == "forward" else "backward"
  work = {"flops": shape.flops(given.pairs, direction)} if kernel == "forward" else {}
  chosen = list(dict.fromkeys([now, *candidates(kernel, width, found)]))
  entrants = [Entrant(variant.label, direction, functools.partial(
      Program, variant.function(rest, mask == "causal"), shape.arguments, direction, KERNELS[kernel]), work) for variant in chosen]
  by_label = {variant.label: variant for variant in chosen}

  def ratios(entrant, times):
    return {"of best": min(t.median for t in times.values()) / times[entrant.name].median, "now": entrant.name == now.label,
            "variant": dataclasses.asdict(by_label[entrant.name])}

  return Contest("variants", {"d": str(width), "mask": mask, "kernel": kernel}, shape.arguments, entrants, setup.effort,
                 ratios=ratios)


def _fusion(setup: Setup, width: int, mask: str) -> Contest:
  """All gradients by the kernels of the table, and by one kernel: its additions in order, or as they come."""
  length = min(LENGTH, max(setup.lengths))
  shape = setup.shape(width, length)
  given = gpu_shapes.masking(mask, shape.batch, length)
  ways = {TWO: contextlib.nullcontext, **{name: functools.partial(_tiles_gpu.backward_in_one_kernel, ordered)
                                          for name, ordered in (("one kernel", True), ("one kernel, as they come", False))}}

  def attend(way, **arrays):
    with way():
      return jflash.attention(**arrays, is_causal=mask == "causal", implementation="mosaic_gpu")

  make = lambda way: functools.partial(Program, functools.partial(attend, way), shape.arguments, "backward")
  entrants = [Entrant(name, "backward", make(way), {"flops": shape.flops(given.pairs, "backward")}) for name, way in ways.items()]

  def ratios(entrant, times):
    return {"of best": min(t.median for t in times.values()) / times[entrant.name].median, "now": entrant.name == TWO}

  return Contest("variants", {"d": str(width), "mask": mask, "kernel": "backward"}, shape.arguments, entrants, setup.effort,
                 ratios=ratios)


def choose(results: Sequence[Result], width: int, kernel: str, masks: Sequence[str]) -> tuple[Variant, float] | None:
  """The variant with the least product of times over the masks, and how many times faster than the table's that is.

  None if no variant was measured with all of the masks; nan if the table's was not.
  """
  rows = [row for row in of(results, "variants") if row.times and (row.case["d"], row.case["kernel"]) == (str(width), kernel)]
  times: dict[str, dict[str, float]] = {}
  for row in rows:
    assert row.times is not None
    times.setdefault(row.name, {})[row.case["mask"]] = row.times.median
  complete = {name: math.prod(own[mask] for mask in masks)**(1 / len(masks)) for name, own in times.items() if {*masks} <= {*own}}
  if not complete:
    return None
  least = min(complete.values())
  name = next(name for name, time in complete.items() if time <= least * (1 + NOISE))
  tree = next(row.measured["variant"] for row in rows if row.name == name)
  now = next((row.name for row in rows if row.measured["now"]), "")
  launch = Launch(**tree["launch"] | {"tiles": tuple(tree["launch"]["tiles"])})
  return Variant(**tree | {"launch": launch}), complete.get(now, math.nan) / complete[name]


def literal(results: Sequence[Result], widths: Sequence[int], title: str) -> str:
  """Python for the table in `jflash/_tiles_gpu.py`: by width for both masks, and as comments for each alone."""
  lines = [f"TABLE |= {{  # {title}"]
  for width in widths:
    for masks in (("causal", "full"), ("causal",), ("full",)):
      chosen = {kernel: choose(results, width, kernel, masks) for kernel in KERNELS}
      if all(chosen.values()):
        forward, dq, dkv = (variant for variant, _ in chosen.values())  # type: ignore[misc]
        written = ", ".join(_written(variant.launch) for variant in (forward, dq, dkv))
        gains = ", ".join(f"{kernel} {gain:.2f}" for kernel, (_, gain) in chosen.items())  # type: ignore[misc]
        start = f"    ({width}, 1, False): " if len(masks) == 2 else f"    # {masks[0]} alone: "
        lines.append(f"{start}Launches({written}, {dkv.split}, 1),  # times as fast as now: {gains}")
      elif len(masks) == 2:
        lines.append(f"    # ({width}, 1, False): not measured: {', '.join(kernel for kernel, x in chosen.items() if x is None)}")
    lines += _fusion_notes(results, width)
  return "\n".join([*lines, "}"])


def _fusion_notes(results: Sequence[Result], width: int) -> list[str]:
  """Comments: how many times faster the backward pass in one kernel is."""
  rows = [row for row in of(results, "variants") if row.times and (row.case["d"], row.case["kernel"]) == (str(width), "backward")]
  times = {(row.name, row.case["mask"]): row.times for row in rows}
  gains: dict[str, list[str]] = {}
  for (name, mask), own in times.items():
    if name != TWO and own and (two := times.get((TWO, mask))):
      gains.setdefault(name, []).append(f"{mask} {own.speedup(two):.2f}")
  return [f"    # backward in {name}: times as fast as now: {', '.join(found)}" for name, found in gains.items()]


def _written(launch: Launch) -> str:
  return f"Launch({launch.tiles}, {launch.stages}{', True' * launch.turns})"


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--chip", default="h200", choices=gpu_chips.CHIPS)
  args = parser.parse_args(argv)
  found = found_by_compiling(args.chip)
  rows = ",\n".join(json.dumps(row) for row in found.pop("variants"))
  PATH.write_text(json.dumps(found)[:-1] + f', "variants": [\n{rows}\n]}}\n')
  return 0


if __name__ == "__main__":
  sys.exit(main())
