"""Compiling for a GPU that is not there (`benchmarks.gpu_compile`), in tests: where the compiler is missing, they are skipped."""

import dataclasses
import fcntl
import json
import os
import re

import pytest

from benchmarks import gpu_chips, gpu_compile
from benchmarks.gpu_reports import Report


def require_jax() -> None:
  """Skips the calling test, or the module if called at its top, where JAX is too old for GPU kernels."""
  if reason := gpu_chips.too_old():
    pytest.skip(reason, allow_module_level=True)


def reports(factory: pytest.TempPathFactory, cases: str, chip: str = "h100", *, only: str = "*",
            timeout: float = 120.0) -> dict[str, Report]:
  """`gpu_compile.compile_cases`, once in a run of the tests, however many workers ask. For a fixture:

      @pytest.fixture(scope="module")
      def compiled(tmp_path_factory):
        return reports(tmp_path_factory, "tests.my_cases:hopper", "h100")

  Skips where the compiler is not installed. With `JFLASH_REQUIRE_CUDA_COMPILER=1`, as in CI, it fails instead: there, a skip
  would hide that nothing was compiled. Where JAX is too old, it skips always.
  """
  require_jax()
  if reason := gpu_chips.missing():
    pytest.fail(reason) if os.environ.get("JFLASH_REQUIRE_CUDA_COMPILER") == "1" else pytest.skip(reason)
  common = factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    common = common.parent  # of all workers in this run
  path = common / (re.sub(r"\W", "-", f"{cases}-{chip}-{only}") + ".json")
  with open(path.with_suffix(".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not path.exists():
      found = gpu_compile.compile_cases(cases, chip, only=only, timeout=timeout)
      path.write_text(json.dumps([dataclasses.asdict(report) for report in found.values()]))
  return {tree["case"]: Report.from_json(tree) for tree in json.loads(path.read_text())}
