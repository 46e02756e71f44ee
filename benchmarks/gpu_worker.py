"""The process in which a part's cases are compiled and measured: `benchmarks.gpu` starts several, and lets one measure at a time.

It reads one JSON object a line: `{"part", "name", "without"}`, and after it has said that the case is compiled, `{"go"}`. It writes
`{"ready"}`, and for each case `{"compiled"}`, `{"rows"}` and `{"done"}`, with `{"begin"}` before everything that may hang or crash;
`{"broken"}`, if the device computes nothing any more, is its last word.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jax

import jflash

from . import gpu_checks, gpu_contest, gpu_speed, gpu_variants, machine, report
from .gpu_results import lost

PARTS: dict[str, Callable[[gpu_speed.Setup], gpu_speed.Cases]] = {
  "checks": gpu_checks.checks,
  "ceilings": gpu_speed.ceilings,
  "speed": gpu_speed.speed,
  "masks": gpu_speed.masks,
  "variants": gpu_variants.variants,
}  # the most important first


def work(setup: gpu_speed.Setup, commands: TextIO, out: TextIO) -> None:
  """Does what it is told until there are no more commands, or the device has broken down."""
  def say(**what):
    out.write(json.dumps(what) + "\n")
    out.flush()

  say(ready=device())
  for line in commands:
    try:
      _do(json.loads(line), setup, commands, say)
    except gpu_contest.Broken as broken:
      say(broken=list(broken.args))
      return
    jax.clear_caches()
    gc.collect()
    say(done=True)


def _do(job: dict[str, Any], setup: gpu_speed.Setup, commands: TextIO, say: Callable[..., None]) -> None:
  """One case; raises `Broken` if that was the last that the device computed."""
  try:
    measure = PARTS[job["part"]](setup)[job["name"]]().prepare(lambda label: say(begin=label), job["without"])
    say(compiled=True)
    if json.loads(commands.readline())["go"]:
      say(rows=[row.to_json() for row in measure()])
  except gpu_contest.Broken:
    raise
  except Exception as error:  # reported, so that the other cases are measured
    say(rows=[lost(job["part"], job["name"], report.reason(error), failed=True).to_json()])
    gpu_contest.check_device(job["name"], error)


def device() -> dict[str, Any]:
  """What is measured on."""
  found = jax.devices()[0]
  return {"platform": found.platform, "capability": getattr(found, "compute_capability", ""), "slug": machine.slug(),
          "header": machine.header()}


def main() -> None:
  # Whatever libraries print goes to the log; what is said here goes to whoever started this.
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  tree: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(sys.argv[1]).items()}
  setup = gpu_speed.Setup(**{**tree, "effort": gpu_contest.Effort(*tree["effort"])})
  with jflash.interpret() if setup.interpret else contextlib.nullcontext():
    work(setup, sys.stdin, out)


if __name__ == "__main__":
  main()
