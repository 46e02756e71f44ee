"""Compiling for a TPU that is not there (`benchmarks.chips`), in tests: where libtpu is missing, they are skipped."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest

from benchmarks import chips
from benchmarks.chips import CHIPS as CHIPS


def device(chip: str) -> Any:
  """`chips.device`, which skips the calling test where libtpu is not installed.

  With `JFLASH_REQUIRE_LIBTPU=1`, as in CI, the test fails instead: there, a skip would hide that nothing was compiled.
  """
  try:
    return chips.device(chip)
  except ModuleNotFoundError as error:
    pytest.fail(str(error)) if os.environ.get("JFLASH_REQUIRE_LIBTPU") == "1" else pytest.skip(str(error))


def compile_for(chip: str, fun: Callable, *args: Any) -> jax.stages.Compiled:
  """`chips.compile_for`, likewise."""
  device(chip)
  return chips.compile_for(chip, fun, *args)
