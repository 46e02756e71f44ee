"""The process in which a part's cases are compiled and measured: `benchmarks.gpu` starts several, and lets one measure at a time.

It reads one JSON object a line: `{"part", "name", "without"}`, and after it has said that the case is compiled, `{"go"}`. It writes:
`{"ready", …}`; for each case `{"compiled"}`, `{"begin"}` before everything that may hang, `{"rows"}`, `{"done"}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jax

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
    job = json.loads(line)
    try:
      measure = PARTS[job["part"]](setup)[job["name"]]().prepare(job["without"])
      say(compiled=True)
      if json.loads(commands.readline())["go"]:
        rows = measure(lambda label: say(begin=label))
        say(rows=[row.to_json() for row in rows])
    except gpu_contest.Broken as broken:
      say(broken=list(broken.args))
      return
    except Exception as error:  # reported, so that the other cases are measured
      say(rows=[lost(job["part"], job["name"], report.reason(error)).to_json()])
    say(done=True)
    jax.clear_caches()


def device() -> dict[str, Any]:
  """What is measured on."""
  found = jax.devices()[0]
  return {"platform": found.platform, "capability": getattr(found, "compute_capability", ""), "slug": machine.slug(),
          "header": machine.header()}


def main() -> None:
  # Whatever libraries print goes to the log; what is said here goes to whoever started this.
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  setup = json.loads(sys.argv[1])
  effort = gpu_contest.Effort(**setup.pop("effort"))
  if setup.pop("interpret"):
    import jflash
    with jflash.interpret():
      work(_setup(setup, effort), sys.stdin, out)
  else:
    work(_setup(setup, effort), sys.stdin, out)


def _setup(tree: dict[str, Any], effort: gpu_contest.Effort) -> gpu_speed.Setup:
  return gpu_speed.Setup(effort, **{name: tuple(x) if isinstance(x, list) else x for name, x in tree.items()})


if __name__ == "__main__":
  main()
