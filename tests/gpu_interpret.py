"""Running Mosaic GPU kernels on the CPU: barriers, copies and threads as on the GPU, with races found."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the races are found out; there is no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

import jflash
from jflash import _plan

PARAMS = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def interpret(fun: Callable, *args: Any) -> Any:
  """`fun(*args)`, jitted, with its kernels interpreted; memory is NaN until it is written.

  A barrier at which nobody arrives hangs: mark the test with `pytest.mark.timeout(seconds)`.

  Raises:
    jax.errors.JaxRuntimeError, before JAX 0.12 AssertionError: "RACE DETECTED", of two threads or of a thread and a copy; older
      JAX prints where.
  """
  gpu_callbacks.reset_gpu_interpret_mode_state()  # what a kernel that failed has left
  with plgpu.force_gpu_interpret_mode(PARAMS):
    out = jax.block_until_ready(jax.jit(fun)(*args))
  assert not gpu_callbacks.get_races().races_found, "RACE DETECTED, as printed"
  return out


def by_kernels(function: Callable, *args: Any, tiles: tuple[int, int] | None = (64, 64), **kwargs: Any) -> tuple[Any, Any]:
  """`(out, lse)` of a function such as `jflash.attention`, for use inside `interpret`; tiles None are those that users get."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(jflash.interpret(PARAMS))
    if tiles is not None:
      stack.enter_context(_plan.force_tiles(*tiles))
    return function(*args, **kwargs, implementation="mosaic_gpu", return_residual=True)


attention = functools.partial(by_kernels, jflash.attention)
