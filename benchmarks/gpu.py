"""Check and time the kernels for Hopper on a GPU in ten minutes, and say which of their variants it would choose.

    python -m benchmarks.gpu --parts checks,speed --seconds 540

Needs an NVIDIA GPU of compute capability 9.0 and JAX 0.11.2 or newer. Writes a page, all numbers as JSON (as
they come) and a plot, `benchmarks/results/gpu-DEVICE.md`, `.json` and `.png`, or where `--out` says; the short table comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import gpu_chips, gpu_tables, machine, options
from .gpu_contest import Effort
from .gpu_pool import Budget, Job, Pool, Worker
from .gpu_results import Result
from .gpu_speed import Setup
from .gpu_worker import PARTS

SHARES = {"checks": 0.2, "ceilings": 0.03, "speed": 0.37, "masks": 0.15, "variants": 0.25}  # of the time
# To try the script without a GPU: small shapes, plain JAX on both sides.
REHEARSAL = {"implementation": "xla", "peers": ("xla",), "widths": (64,), "lengths": (256,), "tokens": 512, "hidden": 128,
             "xla_lengths": (0, 256)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--parts", type=options.words, default=list(PARTS), help="with commas between")
  parser.add_argument("--seconds", type=float, default=540.0, help="for everything; what is not done by then is left out")
  parser.add_argument("--out", type=pathlib.Path,
                      help="where to write, without .md; if not given, gpu-DEVICE in $OUT or else in benchmarks/results")
  parser.add_argument("--implementation", default="mosaic_gpu", help="of jflash")
  parser.add_argument("--widths", type=options.integers, default=list(Setup.widths), help="of heads")
  parser.add_argument("--lengths", type=options.integers, default=list(Setup.lengths), help="N, with commas between")
  parser.add_argument("--repeats", type=int, default=15, help="rounds of one comparison at most")
  parser.add_argument("--case-seconds", type=float, default=2.0, help="for the rounds of one comparison")
  parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="processes that compile")
  parser.add_argument("--rehearse", action="store_true", help="small shapes in plain JAX, on any device: tries this script")
  args = parser.parse_args(argv)
  if unknown := [part for part in args.parts if part not in PARTS]:
    parser.error(f"--parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
  return args


def setup_of(args: argparse.Namespace) -> Setup:
  effort = Effort(args.repeats, args.case_seconds)
  setup = Setup(effort, args.implementation, widths=tuple(args.widths), lengths=tuple(args.lengths))
  return dataclasses.replace(setup, **REHEARSAL) if args.rehearse else setup


def budget_of(parts: Sequence[str], seconds: float) -> Budget:
  """The time divided among those parts by their shares."""
  ordered = [part for part in PARTS if part in parts]
  total = sum(SHARES[part] for part in ordered)
  return Budget({part: seconds * SHARES[part] / total for part in ordered})


def jobs_of(parts: Sequence[str], setup: Setup) -> list[Job]:
  """All cases, the most important part first; variants only of our own kernels."""
  wanted = [part for part in PARTS if part in parts and (part != "variants" or setup.implementation == "mosaic_gpu")]
  return [Job(part, name) for part in wanted for name in PARTS[part](setup)]


def unfit(device: Mapping[str, Any]) -> str | None:
  """Why nothing can be measured on this device, or None."""
  needs = f"benchmarks.gpu needs an NVIDIA GPU of compute capability 9.0 (H100, H200) and JAX {gpu_chips.OLDEST} or newer"
  if device["platform"] != "gpu" or device["capability"] != "9.0":
    kind = device["header"]["Device"] + (f", {device['capability']}" if device["capability"] else "")
    return f"{needs}; this is {kind}. --rehearse tries the script on any device."
  reason = gpu_chips.too_old()
  return reason and f"{needs}; {reason}"


class Run:
  """Collects what is measured, and writes it down as it comes."""

  def __init__(self, args: argparse.Namespace, argv: Sequence[str], setup: Setup):
    self.args, self.setup, self.results = args, setup, []
    self.header: dict[str, str] = {}
    self.clocks: list[tuple[float, float]] = []
    self.argv, self.out = argv, args.out

  def ready(self, device: Mapping[str, Any]) -> None:
    """The first process has found a device; raises SystemExit if it will not do."""
    if not self.args.rehearse and (reason := unfit(device)):
      raise SystemExit(reason)
    if not self.header:
      self.header = device["header"] | options.command("gpu", self.argv)
      if self.args.rehearse:
        self.header |= {"Rehearsal": "small shapes in plain JAX on both sides; it says nothing about a GPU"}
      folder = pathlib.Path(os.environ.get("OUT") or "benchmarks/results")
      self.out = self.args.out or folder / f"gpu-{'rehearsal' if self.args.rehearse else device['slug']}"
      self.out.parent.mkdir(parents=True, exist_ok=True)
      print(self.header["Device"], flush=True)

  def deliver(self, results: Sequence[Result]) -> None:
    self.results += results
    if any(result.times for result in results) and (now := machine.clock()):
      self.clocks.append(now)  # the device was busy until now
    for result in results:
      print(gpu_tables.line(result), flush=True)
    tree = {"header": self.header, "results": [result.to_json() for result in self.results]}
    path = self.out.with_name(self.out.name + ".json")
    path.with_suffix(".part").write_text(json.dumps(tree))
    path.with_suffix(".part").replace(path)

  def finish(self) -> None:
    """The page, the plot, and the short table."""
    if self.clocks:
      clocks, watts = zip(*self.clocks)
      self.header["Clock"] = (f"median {statistics.median(clocks):.0f} MHz, {min(clocks):.0f} to {max(clocks):.0f}; at most "
                              f"{max(watts):.0f} W, asked for after each comparison")
    title = f"{self.header['Device']}, {self.header['Software']}"
    page = gpu_tables.page(self.results, self.header, self.setup.widths, title)
    options.write(self.out, page, lambda path: gpu_tables.plot(path, title, self.results))
    print(self.header.get("Clock", ""))
    print(gpu_tables.summary(self.results, self.setup.widths, f"{title}, {self.header['Date']}"))


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = parse(argv)
  setup = setup_of(args)
  run, tree = Run(args, argv, setup), dataclasses.asdict(setup) | {"effort": list(setup.effort)}
  pool = Pool(jobs_of(args.parts, setup), budget_of(args.parts, args.seconds), lambda: Worker(tree, 0.9 / args.workers),
              args.workers, run.deliver, run.ready)
  pool.run()
  run.finish()
  return 1 if any(result.failed for result in run.results) else 0


if __name__ == "__main__":
  sys.exit(main())
