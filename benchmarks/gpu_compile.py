"""Compile named cases for a GPU that is not there, in a subprocess, and report what the kernels came to.

    python -m benchmarks.gpu_compile tests.gpu_topology_cases:attention_of_jax --chip h100

MODULE:FUNCTION names a function of no arguments that returns a dict of cases, name -> (fun, args): a function to jit and its
arguments, pytrees of `jax.ShapeDtypeStruct`s. One subprocess compiles one case after the other. When the compiler aborts it, or
a case takes too long, that case's report has the end of what was printed, and the rest is compiled in a new subprocess.
"""

import argparse
import dataclasses
import faulthandler
import fnmatch
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, TextIO

import jax

from benchmarks import gpu_chips, gpu_reports
from benchmarks.gpu_reports import Kernel, Report

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CALL = re.compile(r'custom_call_target="mosaic_gpu.*?op_name="([^"]*)".*?kernel_hash = "((?:[^"\\]|\\.)*)"')
_TAIL = 4000  # characters of a dead process's last words
_START = 120.0  # seconds for importing JAX and the cases


def compile_cases(cases: str, chip: str = "h100", *, only: str = "*", timeout: float = 120.0) -> dict[str, Report]:
  """Reports by case name, in the order of the cases.

  Args:
    cases: "module:function", as the module's docstring says; the module is imported in the subprocess only.
    chip: one of `gpu_chips.CHIPS`.
    only: compile cases of this name or pattern (as in the shell) only.
    timeout: seconds that one case may take.

  Raises:
    ValueError: `chip` is unknown.
    ModuleNotFoundError: the compiler is not installed.
    RuntimeError: the cases cannot be made; with what the subprocess printed.
  """
  if chip not in gpu_chips.CHIPS:
    raise ValueError(f"`chip` is {chip!r}; it must be one of {', '.join(gpu_chips.CHIPS)}.")
  if reason := gpu_chips.missing():
    raise ModuleNotFoundError(reason)
  reports: dict[str, Report] = {}
  names = None
  with tempfile.TemporaryDirectory(prefix="gpu-compile-") as directory:
    while names is None or len(reports) < len(names):
      lines, last_words = _run_worker(directory, cases, chip, only, list(reports), timeout)
      if names is None and (not lines or "cases" not in lines[0]):
        raise RuntimeError(f"the cases of {cases} cannot be made:\n{last_words}")
      names = names or lines[0]["cases"]
      for line in lines[1:]:
        if "report" in line:
          reports[line["report"]["case"]] = Report.from_json(line["report"])
      pending = [name for name in names if name not in reports]
      if pending:  # the process died: at the case that it began last, or else before all
        started = [line["start"] for line in lines if line.get("start") in pending]
        died = started[-1] if started else pending[0]
        reports[died] = Report(died, chip, jax.__version__, error=f"the compiling process died: {last_words}")
  return {name: reports[name] for name in names}


def _run_worker(directory: str, cases: str, chip: str, only: str, done: list[str], timeout: float) -> tuple[list[dict], str]:
  """What one subprocess reported, a dict per line, and its exit status with the end of what it printed."""
  out, log = pathlib.Path(directory, "reports"), pathlib.Path(directory, "log")
  out.write_text("")
  root = str(gpu_chips.cuda_root())
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_ROOT": root, "MOSAIC_GPU_DUMP_TO": directory,
                 "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}
  job = json.dumps({"cases": cases, "chip": chip, "only": only, "done": done, "timeout": timeout, "out": str(out)})
  with log.open("w") as stream:
    code = subprocess.run([sys.executable, "-m", "benchmarks.gpu_compile", "--job", job], env=environment,
                          stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
  return ([json.loads(line) for line in out.read_text().splitlines()],
          f"exit status {code}\n{log.read_text(errors='replace')[-_TAIL:]}")


def _work(job: dict[str, Any]) -> None:
  """In the subprocess: compile each case, and write a line before and after it."""
  known: dict[str, Kernel] = {}
  with open(job["out"], "a", buffering=1) as out:
    faulthandler.dump_traceback_later(_START, exit=True)
    module, _, function = job["cases"].partition(":")
    cases = getattr(importlib.import_module(module), function)()
    names = [name for name in cases if fnmatch.fnmatch(name, job["only"])]
    _write(out, {"cases": names})
    gpu_chips.device(job["chip"])
    for name in names:
      if name not in job["done"]:
        _write(out, {"start": name})
        faulthandler.dump_traceback_later(job["timeout"], exit=True)  # from a thread of its own, whatever holds the interpreter
        _write(out, {"report": dataclasses.asdict(_compile(name, job["chip"], *cases[name], known))})
    faulthandler.cancel_dump_traceback_later()


def _write(out: TextIO, line: dict[str, Any]) -> None:
  out.write(json.dumps(line) + "\n")


def _compile(name: str, chip: str, fun: Any, args: tuple, known: dict[str, Kernel]) -> Report:
  report = Report(name, chip, jax.__version__, shared_limit=gpu_chips.CHIPS[chip].shared_limit)
  dumps = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
  try:
    start = time.perf_counter()
    lowered = gpu_chips.lower_for(chip, fun, *args)
    report.lower_seconds = time.perf_counter() - start
    compiled = lowered.compile()
    report.compile_seconds = time.perf_counter() - start - report.lower_seconds
    report.temp = compiled.memory_analysis().temp_size_in_bytes
    report.kernels = _kernels(_CALL.findall(compiled.as_text()), dumps, known)
  except Exception:  # reported, so that the other cases are compiled
    report.error = traceback.format_exc(limit=-6)
  for path in dumps.glob("*_[0-9]*.*"):  # tens of megabytes a kernel
    path.unlink()
  return report


def _kernels(calls: list[tuple[str, str]], dumps: pathlib.Path, known: dict[str, Kernel]) -> list[Kernel]:
  """The kernels that a program calls, from the name stack and the hash of each call and the files about those just compiled.

  JAX 0.11 compiles every call. JAX 0.12 compiles no kernel twice in one process: what it has compiled is in `known`, by hash.
  Different kernels of one name in one program are told apart by their order only: give them names.
  """
  fresh: dict[str, list[Kernel]] = {}
  for path in sorted(dumps.glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2])):
    kernel = gpu_reports.read_kernel(path.with_suffix(""))
    fresh.setdefault(kernel.name, []).append(kernel)
  keys: dict[str, list[str]] = {}
  for stack, key in calls:
    keys.setdefault(stack.split("/")[-2], []).append(key)  # "jit(f)/.../NAME/mpmd_map"
  for name, called in keys.items():
    compiled = fresh.pop(name, [])
    new = list(dict.fromkeys(key for key in called if key not in known))
    if len(compiled) not in (len(called), len(new)):
      raise ValueError(f"{len(called)} calls of kernel {name}, {len(new)} of them new, but {len(compiled)} were compiled")
    known.update(zip(new if len(compiled) == len(new) else called, compiled))
  if fresh:
    raise ValueError(f"compiled, but not called: {', '.join(fresh)}")
  return [known[key] for _, key in calls]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("cases", metavar="MODULE:FUNCTION", nargs="+")
  parser.add_argument("--chip", default="h100", choices=gpu_chips.CHIPS)
  parser.add_argument("--only", default="*", help="name of a case, or a pattern")
  parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one case")
  parser.add_argument("--json", action="store_true", help="print the reports as one JSON object")
  options = parser.parse_args(arguments)
  reports = {}
  for cases in options.cases:
    reports |= compile_cases(cases, options.chip, only=options.only, timeout=options.timeout)
  if options.json:
    print(json.dumps({name: dataclasses.asdict(report) for name, report in reports.items()}, indent=2))
  else:
    print("\n".join(gpu_reports.lines(report) for report in reports.values()))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--job"]:
    _work(json.loads(sys.argv[2]))
  else:
    main()
