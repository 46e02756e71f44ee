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
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

import jax

from benchmarks import gpu_chips, gpu_reports
from benchmarks.gpu_reports import Kernel, Report

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CALL = re.compile(r'custom_call_target="mosaic_gpu.*?op_name="([^"]*)".*?kernel_hash = "((?:[^"\\]|\\.)*)"')
_OTHERS = re.compile(r"/jax/(_src|experimental)/|/jaxlib/|/lib/python[^/]*/[^/]*\.py$|benchmarks/gpu_\w+\.py$|<")
_TAIL = 4000  # characters of a dead process's last words
_BEGIN = "\0case "  # comes before what is printed for a case
_START = 120.0  # seconds for importing JAX and the cases


def compile_cases(cases: str, chip: str = "h100", *, only: str = "*", timeout: float = 120.0,
                  keep: str | os.PathLike | None = None) -> dict[str, Report]:
  """Reports by case name, in the order of the cases.

  Args:
    cases: "module:function", as the module's docstring says; the module is imported in the subprocess only.
    chip: one of `gpu_chips.CHIPS`.
    only: compile cases of this name or pattern (as in the shell) only.
    timeout: seconds that one case may take.
    keep: a folder for the PTX and the disassembly of each kernel, in one folder per case; made if missing.

  Raises:
    ValueError: `chip` is unknown, or `only` matches nothing.
    ModuleNotFoundError: the compiler is not installed.
    RuntimeError: the cases cannot be made; with what the subprocess printed.
  """
  gpu_chips.check(chip)
  reports: dict[str, Report] = {}
  names: list[str] = []
  while not names or len(reports) < len(names):
    job = {"cases": cases, "chip": chip, "only": only, "done": list(reports), "timeout": timeout,
           "keep": str(pathlib.Path(keep).resolve()) if keep else ""}
    lines, printed, code = _run_worker(job)
    if not lines:
      raise RuntimeError(f"the cases of {cases} cannot be made (exit status {code}):\n{printed['']}")
    names = lines[0]["cases"]
    if not names:
      raise ValueError(f"{cases} has no case that matches {only!r}.")
    for line in lines[1:]:
      reports[line["case"]] = report = Report.from_json(line)
      if report.error:
        report.error = "\n".join(filter(None, [report.error, printed.get(report.case)]))
    pending = [name for name in names if name not in reports]
    if pending:  # the process died at the case that it began last
      died = next((name for name in pending if name in printed), pending[0])
      error = f"the compiling process died with exit status {code}\n{printed.get(died)}"
      reports[died] = Report(died, chip, jax.__version__, gpu_chips.ptxas_version(), error)
  return {name: reports[name] for name in names}


def _run_worker(job: dict[str, Any]) -> tuple[list[dict], dict[str, str], int]:
  """Runs a subprocess.

  Returns:
    What it reported, a dict per line; the end of what it printed, by case (before the first, by ""); its exit status.
  """
  with tempfile.TemporaryDirectory(prefix="gpu-compile-") as directory:
    out, log = pathlib.Path(directory, "reports"), pathlib.Path(directory, "log")
    with log.open("w") as stream:
      code = subprocess.run([sys.executable, "-m", "benchmarks.gpu_compile", "--job", json.dumps({**job, "out": str(out)})],
                            env=_environment(directory), stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    parts = log.read_text(errors="replace").split(_BEGIN)
    printed = {"": parts[0][-_TAIL:]}
    for part in parts[1:]:
      name, _, text = part.partition("\n")
      printed[name] = "\n".join(line for line in text.splitlines() if line.strip())[-_TAIL:]
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else [], printed, code


def _environment(dumps: str) -> dict[str, str]:
  """The subprocess's: no device but the CPU, tools from one place, everything compiled anew, with files about it in `dumps`."""
  root = gpu_chips.cuda_root()
  return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off", "JAX_ENABLE_COMPILATION_CACHE": "false",
          "MOSAIC_GPU_DUMP_TO": dumps, "CUDA_ROOT": str(root), "PATH": f"{root}/bin{os.pathsep}{os.environ.get('PATH', '')}",
          "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}


def _work(job: dict[str, Any]) -> None:
  """In the subprocess: say which cases there are, and compile each, with a line for its report."""
  faulthandler.dump_traceback_later(_START, exit=True)
  module, _, function = job["cases"].partition(":")
  cases = getattr(importlib.import_module(module), function)()
  names = [name for name in cases if fnmatch.fnmatch(name, job["only"])]
  gpu_chips.device(job["chip"])
  known: dict[str, Kernel] = {}
  with open(job["out"], "a", buffering=1) as out:
    out.write(json.dumps({"cases": names}) + "\n")
    for name in names:
      if name not in job["done"]:
        print(_BEGIN + name, flush=True)
        faulthandler.dump_traceback_later(job["timeout"], exit=True)  # from its own thread, whatever holds the interpreter
        fun, args = cases[name]
        report = _compile(name, job["chip"], fun, args, known)
        out.write(json.dumps(dataclasses.asdict(report)) + "\n")
        _clear(job["keep"] and os.path.join(job["keep"], re.sub(r"\W+", "-", name)))
  faulthandler.cancel_dump_traceback_later()


def _compile(name: str, chip: str, fun: Any, args: tuple, known: dict[str, Kernel]) -> Report:
  report = Report(name, chip, jax.__version__, gpu_chips.ptxas_version(), shared_limit=gpu_chips.CHIPS[chip].shared_limit)
  try:
    start = time.perf_counter()
    lowered = gpu_chips.lower_for(chip, fun, *args)
    report.lower_seconds = time.perf_counter() - start
    compiled = lowered.compile()
    report.compile_seconds = time.perf_counter() - start - report.lower_seconds
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and program is not None
    report.temp = memory.temp_size_in_bytes
    report.kernels = _kernels(_CALL.findall(program), known)
  except Exception as error:  # reported, so that the other cases are compiled
    report.error = _describe(error)
  return report


def _dumps(pattern: str) -> list[pathlib.Path]:
  return list(pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"]).glob(pattern))


def _clear(keep: str) -> None:
  """Removes the files about kernels, tens of megabytes for each, but moves PTX and disassembly to `keep` if that is not ""."""
  for path in _dumps("*_[0-9]*.*"):
    if keep and path.suffix in (".ptx", ".ptxas", ".sass", ".sass_ctrl"):
      os.makedirs(keep, exist_ok=True)
      shutil.move(path, keep)
    else:
      path.unlink()


def _describe(error: BaseException) -> str:
  """Type and message, then the innermost lines that are neither of JAX nor of this module."""
  text, frames, link = "".join(traceback.format_exception_only(error)).strip(), [], error
  while link is not None:
    frames += [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(link.__traceback__)
               if not _OTHERS.search(frame.filename)]
    link = link.__cause__ or link.__context__
  return "\n  ".join([text, *list(dict.fromkeys(frames))[-4:]])


def _kernels(calls: list[tuple[str, str]], known: dict[str, Kernel]) -> list[Kernel]:
  """The kernels that a program calls, from the name stack and the hash of each call and the files about those just compiled.

  JAX 0.11 compiles every call. JAX 0.12 compiles no kernel twice in one process: what it has compiled is in `known`, by hash.
  Different kernels of one name in one program are told apart by their order only: give them names.
  """
  fresh: dict[str, list[Kernel]] = {}
  for path in sorted(_dumps("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2])):
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
  parser = argparse.ArgumentParser(description="Compile cases for a GPU that is not there, and say what the kernels came to.")
  parser.add_argument("cases", metavar="MODULE:FUNCTION", nargs="+")
  parser.add_argument("--chip", default="h100", choices=gpu_chips.CHIPS)
  parser.add_argument("--only", default="*", help="name of a case, or a pattern")
  parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one case")
  parser.add_argument("--keep", metavar="DIRECTORY", help="keep PTX and disassembly here")
  parser.add_argument("--json", action="store_true", help="print the reports as one JSON object")
  options = parser.parse_args(arguments)
  reports = {}
  for cases in options.cases:
    reports |= compile_cases(cases, options.chip, only=options.only, timeout=options.timeout, keep=options.keep)
  if options.json:
    print(json.dumps({name: dataclasses.asdict(report) for name, report in reports.items()}, indent=2))
  else:
    print("\n".join(map(gpu_reports.as_text, reports.values())))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--job"]:
    _work(json.loads(sys.argv[2]))
  else:
    main()
