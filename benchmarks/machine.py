"""What the numbers were measured on."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

import jax
import jaxlib.version

import jflash


def device_name() -> str:
  """"NVIDIA H100 80GB HBM3", "TPU v6 lite", or a CPU's model and the cores that this process may use."""
  device = jax.devices()[0]
  return device.device_kind if device.platform != "cpu" else f"{_cpu_model()}, {_cores()} cores"


def slug() -> str:
  """The device for a file's name: "nvidia-h100-80gb-hbm3", "tpu-v6-lite", "cpu"."""
  return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def memory() -> int:
  """Bytes that the device has, or, for a CPU, the machine."""
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def header() -> dict[str, str]:
  """What a table must say for its numbers to mean anything."""
  return {"Device": device_name()} | software()


def software() -> dict[str, str]:
  return {
    "Software": f"jflash {jflash.__version__}, JAX {jax.__version__}, jaxlib {jaxlib.version.__version__}, "
                f"Python {platform.python_version()}",
    "Date": datetime.date.today().isoformat(),
  }


def load() -> dict[str, str]:
  """What else kept the machine busy, to be asked before measuring."""
  return {"Load before": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}


def clock() -> tuple[float, float] | None:
  """An NVIDIA GPU's clock in MHz and its power in W just now, None where nvidia-smi does not say."""
  command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
  try:
    said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    megahertz, watts = map(float, said.splitlines()[0].split(","))
  except (OSError, subprocess.SubprocessError, ValueError, IndexError):
    return None
  return megahertz, watts


def versions(*packages: str) -> str:
  """"a 1.2, b not installed"."""
  def version(package):
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return "not installed"

  return ", ".join(f"{package} {version(package)}" for package in packages)


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
  try:
    found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
  except OSError:
    found = None
  return found.group(1) if found else platform.processor() or platform.machine()
