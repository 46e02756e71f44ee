"""Which GPU is computed on, and what is installed for it. Nothing here raises: what is missing is a fact like any other."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

import jax

MOSAIC_NEEDS = "0.11.2"  # the first JAX whose Mosaic GPU has what the kernels use


def device() -> Any:
  """The device that is computed on, which may be one to compile for that is not here; None where JAX finds none at all."""
  chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
  try:
    return jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
  except Exception:  # a plugin without its libraries or its device fails in ways of its own
    return None


def capability() -> tuple[int, int] | None:
  """The compute capability of an NVIDIA GPU, (9, 0) for sm_90; None for any other device. (AMD's is no number: "gfx942".)"""
  found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device(), "compute_capability", None)))
  return None if found is None else (int(found[1]), int(found[2]))


def name() -> str:
  """What the device calls itself, with its architecture if it is an NVIDIA GPU: "NVIDIA A100-SXM4-40GB (sm_80)"."""
  found = capability()
  kind = str(getattr(device(), "device_kind", "no device"))
  return kind if found is None else f"{kind} (sm_{found[0]}{found[1]})"


def plugin() -> bool:
  """Whether JAX's plugin for NVIDIA GPUs is installed, of any version and whether or not it finds a GPU."""
  return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def cudnn_version() -> int | None:
  """As cuDNN counts, 91002 for 9.10.2; None without it. JAX has no public way to ask, so this asks where JAX itself does."""
  try:
    from jax._src.lib import cuda_versions
    return int(cuda_versions.cudnn_get_version())  # type: ignore[union-attr]
  except Exception:  # no CUDA plugin, no library, or a JAX that keeps it elsewhere
    return None


def without_mosaic() -> str | None:
  """None, or why the installed JAX cannot make Mosaic GPU kernels."""
  if jax.__version_info__ < tuple(map(int, MOSAIC_NEEDS.split("."))):
    return f"it needs JAX >= {MOSAIC_NEEDS} and this is {jax.__version__}: pip install -U jax, which needs Python >= 3.12"
  try:
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
  except Exception as error:
    return f"Pallas Mosaic GPU cannot be imported, {type(error).__name__}: {error}; pip install -U jax jaxlib"
  return None


def without_cudnn() -> str | None:
  """None, or why cuDNN is not to be used here."""
  version = cudnn_version()
  if version is None:
    return "cuDNN is not found: pip install -U \"jax[cuda13]\", or \"jax[cuda12]\" for an older driver"
  if version in (91000, 91001):
    return "cuDNN 9.10.0 and 9.10.1 compute attention wrongly: pip install -U nvidia-cudnn-cu13, or -cu12"
  return None
