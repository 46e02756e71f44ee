"""Who can compute a problem: the backends, why each other one cannot, and which is taken."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from . import _gpu, _plan
from ._problem import Problem


class Module(Protocol):
  """What a backend's module has to offer."""

  supports: Callable[[Problem], str | None]  # None, or why it cannot compute this problem
  forward: Callable[..., tuple[Any, Any]]
  cotangent: Callable[..., tuple[Any, Any, Any, list[Any]]]


class Backend(NamedTuple):
  """One way to compute attention. Its module is imported when it is used, and not before."""

  name: str
  module: str
  unavailable: Callable[[], str | None]  # None, or why it cannot run on this device
  plan: Callable[[Problem], _plan.Plan]
  not_interpreted: Callable[[], str | None] | None = None  # None, or why its kernels cannot be interpreted, if it has any
  tiled: bool = True  # whether it computes in the tiles of the plan
  by_name_alone: str | None = None  # None, or why it is not chosen unless it is named

  def load(self) -> Module:
    return cast(Module, importlib.import_module(self.module, __package__))

  def would_be_interpreted(self) -> bool:
    """Whether its kernels can run here, but in the Pallas interpreter alone."""
    return bool(_plan.interpreting() and self.not_interpreted and self.unavailable() and not self.not_interpreted())

  def reason_against(self, problem: Problem) -> str | None:
    """None, or why this backend cannot compute `problem` here."""
    reason = self.unavailable()
    if reason and self.not_interpreted and _plan.interpreting():
      reason = self.not_interpreted()
    return reason or self._unsupported(problem)

  def _unsupported(self, problem: Problem) -> str | None:
    try:
      module = self.load()
    except Exception as error:  # a library that is missing, or a name that this JAX has no more
      return f"it cannot be imported, {type(error).__name__}: {error}"
    return module.supports(problem)


_INTERPRET = "`with jflash.interpret():` runs its kernels in the Pallas interpreter"


def _no_tpu() -> str | None:
  return None if _plan.platform() == "tpu" else f"it needs a TPU and this is a {_plan.platform()}; {_INTERPRET}"


def _no_nvidia() -> str | None:
  platform = _plan.platform()
  if platform == "cpu" and not _gpu.plugin():
    return "it needs an NVIDIA GPU and this is a cpu; if there is one, JAX sees it with: pip install -U \"jax[cuda13]\""
  if platform != "gpu" or not _gpu.capability():
    return f"it needs an NVIDIA GPU and this is {'a ' + platform if platform != 'gpu' else _gpu.name()}"
  return None


def _no_hopper() -> str | None:
  reason = _no_nvidia()
  if reason is None and _gpu.capability() != (9, 0):
    reason = f"its kernels are for Hopper (sm_90) and this is {_gpu.name()}; use 'cudnn' where it takes the arguments, or 'xla'"
  return f"{reason}; {_INTERPRET}, from JAX {_gpu.MOSAIC_NEEDS} on" if reason else _gpu.without_mosaic()


def _no_cudnn() -> str | None:
  if reason := _no_nvidia():
    return f"{reason}; use 'xla'"
  if _gpu.capability() < (8, 0):  # type: ignore[operator]
    return f"cuDNN's attention needs Ampere (sm_80) or newer and this is {_gpu.name()}; use 'xla'"
  return _gpu.without_cudnn()


_BACKENDS = (
    Backend("tpu", "._tpu", _no_tpu, _plan.plan_tpu, lambda: None),
    Backend("mosaic_gpu", "._mosaic_gpu", _no_hopper, lambda problem: _plan.plan_mosaic_gpu(problem),
            _gpu.without_mosaic,
            by_name_alone="its kernels have been interpreted and compiled, but not run on a GPU yet; name it to run them"),
    Backend("cudnn", "._cudnn", _no_cudnn, _plan.plan_cudnn, tiled=False),
    Backend("xla", "._xla", lambda: None, _plan.plan_xla))
NAMES = tuple(backend.name for backend in _BACKENDS)  # in the order in which they are asked


def get(name: str) -> Backend:
  """The backend called `name`."""
  for backend in _BACKENDS:
    if backend.name == name:
      return backend
  raise ValueError(f"`implementation` is {name!r}; pass None or one of {', '.join(map(repr, NAMES))}.")


def select(problem: Problem, implementation: str | None) -> tuple[Backend, dict[str, str]]:
  """The backend that computes `problem`, and why each other one was passed over.

  Raises:
    NotImplementedError: the named backend cannot, with its reason.
    ValueError: no backend has that name.
  """
  if implementation is not None:
    backend = get(implementation)
    if reason := backend.reason_against(problem):
      raise NotImplementedError(f"implementation={implementation!r} cannot compute this: {reason}")
    return backend, {other.name: f"implementation={implementation!r} was asked for" for other in _BACKENDS if other is not backend}
  passed: dict[str, str] = {}
  chosen = None
  for backend in _BACKENDS:
    if chosen is not None:
      passed[backend.name] = f"{chosen.name!r} comes first here"
    elif backend.would_be_interpreted():
      passed[backend.name] = "it would run in the Pallas interpreter, which is for tests; name it to do so"
    elif reason := backend.reason_against(problem):
      passed[backend.name] = reason
    elif backend.by_name_alone:
      passed[backend.name] = backend.by_name_alone
    else:
      chosen = backend
  assert chosen is not None, "the plain JAX backend supports everything"
  return chosen, passed
