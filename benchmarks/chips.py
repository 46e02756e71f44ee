"""Compiling for a TPU that is not there: libtpu carries the whole compiler, and needs only a topology's name."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CHIPS = tuple(TOPOLOGIES)
# libtpu is wanted for its compiler: do not ask the cloud which TPU this is, and let several processes load it.
ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
               "TPU_WORKER_HOSTNAMES": "localhost"}


def device(chip: str) -> Any:  # a jax.Device, which type checkers take for a variable
  """A device of the named chip, good for compiling only.

  Raises:
    ValueError: `chip` is not one of `CHIPS`.
    ModuleNotFoundError: libtpu is not installed.
  """
  if chip not in TOPOLOGIES:
    raise ValueError(f"`chip` is {chip!r}; it must be one of {', '.join(CHIPS)}.")
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError("libtpu, the TPU compiler, is not installed: pip install 'jflash[libtpu]' (Linux on x86-64)")
  return _topology(TOPOLOGIES[chip]).devices[0]


@functools.cache
def _topology(name: str) -> topologies.TopologyDescription:
  if "tpu" not in (jax.config.jax_platforms or ""):  # type: ignore[attr-defined]  # a real one describes itself
    for variable, value in ENVIRONMENT.items():
      os.environ.setdefault(variable, value)
  return topologies.get_topology_desc(platform="tpu", topology_name=name)


def compile_for(chip: str, fun: Callable, *args: Any) -> jax.stages.Compiled:
  """The executable of `fun(*args)` for one TPU chip, made with no TPU at hand.

  Args:
    chip: one of `CHIPS`.
    fun: what to compile, jitted or not.
    *args: pytrees of `jax.ShapeDtypeStruct`s (or arrays, of which only shape and dtype are read). Anything that is
      static belongs into `fun`, by `functools.partial` or a closure.

  Returns:
    The `jax.stages.Compiled`: ask it for `memory_analysis()`, `cost_analysis()` or `as_text()`; it cannot be called.

  Raises:
    What the lowering or the compiler raises, for instance where a kernel wants more VMEM than the chip has.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 512, 8, 128), "bfloat16")
    >>> compile_for("v6e", jax.nn.dot_product_attention, x, x, x).memory_analysis().output_size_in_bytes
    1048576
  """
  target = device(chip)
  sharding = SingleDeviceSharding(target)
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  # Lowerings that depend on the chip ask the default device, and jit's caches are keyed by it.
  with jax.default_device(target):
    return jax.jit(fun).lower(*placed).compile()
