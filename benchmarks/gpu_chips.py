"""Compiling for an NVIDIA GPU that is not there: JAX's CUDA plugin carries the compiler, and needs only a description.

An instruction that the GPU lacks aborts the whole process. `benchmarks.gpu_compile` therefore compiles in a subprocess,
and says what the kernels came to; this module compiles in the process that calls it.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

OLDEST_JAX = (0, 11, 2)  # the first with all of Mosaic GPU that the kernels need
OLDEST = ".".join(map(str, OLDEST_JAX))
PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
INSTALL = "pip install 'jflash[gpu-compile]' (Python 3.12 or newer, Linux on x86-64)"


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the compiler asks about a GPU; memory in bytes, bandwidth in bytes per second, `capability` as (major, minor)."""
  name: str
  capability: tuple[int, int]
  accelerated: bool  # sm_90a, sm_100a: wgmma, tcgen05
  cores: int  # streaming multiprocessors
  threads_per_core: int
  shared_per_core: int
  shared_limit: int  # per block
  memory: int
  bandwidth: int
  l2: int
  clock_ghz: float
  fpus: int = 128  # per core

  @property
  def target(self) -> str:
    """The description as a GpuTargetConfigProto, in text format."""
    major, minor = self.capability
    feature = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads_per_core}
        shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
        shared_memory_per_block_optin: {self.shared_limit}
        core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock_ghz}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2}
        cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 }}
      runtime_version {{ major: 13 minor: 0 patch: 0 }}
      device_description_str: "{self.name}"
    """


_MIB, _GB = 1 << 20, 10**9
_HOPPER = Chip("NVIDIA H100 80GB HBM3", (9, 0), True, 132, 2048, 233472, 232448, 84942979072, 3352320000000, 50 * _MIB, 1.98)
CHIPS = {  # L4 by its data sheet, the others as XLA describes them
  "h100": _HOPPER,
  "h200": dataclasses.replace(_HOPPER, name="NVIDIA H200 141GB HBM3e", memory=151397597184, bandwidth=4800 * _GB),
  "a100": Chip("NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 2048, 167936, 166912, 85100068864, 2039040000000, 40 * _MIB, 1.41, 64),
  "l4": Chip("NVIDIA L4", (8, 9), False, 58, 1536, 102400, 101376, 24 * _GB, 300 * _GB, 48 * _MIB, 2.04),
  "b200": Chip("NVIDIA B200", (10, 0), True, 148, 2048, 233472, 232448, 191514411008, 7672320000000, 132644864, 1.965),
}


def cuda_root() -> pathlib.Path | None:
  """The CUDA toolkit whose ptxas, nvdisasm and libdevice are used: $CUDA_ROOT, the pip packages', or /usr/local/cuda."""
  spec = importlib.util.find_spec("nvidia")
  wheels = [pathlib.Path(path) / "cu13" for path in (spec.submodule_search_locations or () if spec else ())]
  named = [pathlib.Path(os.environ["CUDA_ROOT"])] if "CUDA_ROOT" in os.environ else []
  for root in (*named, *wheels, pathlib.Path("/usr/local/cuda")):
    if all((root / part).exists() for part in ("bin/ptxas", "bin/nvdisasm", "nvvm/libdevice/libdevice.10.bc")):
      return root
  return None


@functools.cache
def ptxas_version() -> str:
  """Of `cuda_root()`, as "13.5.37"."""
  said = subprocess.run([f"{cuda_root()}/bin/ptxas", "--version"], capture_output=True, text=True, check=True).stdout
  return said[said.rindex(" V") + 2:].split()[0]


def too_old() -> str | None:
  """Why GPU kernels cannot be built with this JAX at all, or None."""
  if jax.__version_info__ < OLDEST_JAX:
    return f"GPU kernels need JAX {OLDEST} or newer (Python 3.12); this is {jax.__version__}"
  return None


def missing() -> str | None:
  """What is missing for compiling, and how to get it; None if nothing is."""
  if reason := too_old():
    return reason
  for package in PACKAGES:
    try:
      version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return f"{package}, the CUDA compiler of JAX, is not installed: {INSTALL}"
    if version != jax.__version__:
      return f"{package} is {version}, but jax is {jax.__version__}: pip install {package}=={jax.__version__}"
  if cuda_root() is None:
    return f"no CUDA toolkit with ptxas, nvdisasm and libdevice was found: {INSTALL}"
  return None


def check(chip: str) -> None:
  """Raises ValueError if `chip` is not one of `CHIPS`, and ModuleNotFoundError if something is `missing()`."""
  if chip not in CHIPS:
    raise ValueError(f"`chip` is {chip!r}; it must be one of {', '.join(CHIPS)}.")
  if reason := missing():
    raise ModuleNotFoundError(reason)


def device(chip: str) -> Any:  # a jax.Device, which type checkers take for a variable
  """A device of the named GPU, good for compiling only; raises what `check` does."""
  check(chip)
  return _topology(chip).devices[0]


@functools.cache
def _topology(chip: str) -> topologies.TopologyDescription:
  return topologies.get_topology_desc(platform="cuda", target_config=CHIPS[chip].target, topology="1x1x1")


def lower_for(chip: str, fun: Callable, *args: Any) -> jax.stages.Lowered:
  """`fun(*args)` lowered for one GPU; as `benchmarks.chips.compile_for`, before the compiler proper. `.compile()` runs that."""
  target = device(chip)
  sharding = SingleDeviceSharding(target)
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.default_device(target):  # this is how Pallas learns for which GPU it lowers
    return jax.jit(fun).lower(*placed)
