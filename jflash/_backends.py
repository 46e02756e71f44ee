"""Who can compute a problem: the backends, why each other one cannot, and which is taken."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from . import _plan
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

  def load(self) -> Module:
    return cast(Module, importlib.import_module(self.module, __package__))

  def reason_against(self, problem: Problem) -> str | None:
    """None, or why this backend cannot compute `problem` here."""
    return self.unavailable() or self.load().supports(problem)


def _no_tpu() -> str | None:
  if _plan.platform() == "tpu" or _plan.interpreting():
    return None
  return (f"it needs a TPU and this is a {_plan.platform()}; `with jflash.interpret():` runs its kernels in the Pallas "
          "interpreter")


def _no_hopper() -> str | None:
  return None if _plan.platform() == "gpu" or _plan.interpreting() else "no"


_BACKENDS = (Backend("tpu", "._tpu", _no_tpu, _plan.plan_tpu), Backend("mosaic_gpu", "._mosaic_gpu", _no_hopper, _plan.plan_mosaic_gpu), Backend("xla", "._xla", lambda: None, _plan.plan_xla))
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
    return backend, {name: f"implementation={implementation!r} was asked for" for name in NAMES if name != implementation}
  passed: dict[str, str] = {}
  chosen = None
  for backend in _BACKENDS:
    if chosen is not None:
      passed[backend.name] = f"{chosen.name!r} comes first here"
    elif backend.name == "mosaic_gpu" and _plan.platform() != "gpu":
      passed[backend.name] = "x"
    elif backend.name == "tpu" and _plan.platform() != "tpu" and _plan.interpreting():
      passed[backend.name] = "it would run in the Pallas interpreter, which is for tests; name it to do so"
    elif reason := backend.reason_against(problem):
      passed[backend.name] = reason
    else:
      chosen = backend
  assert chosen is not None, "the plain JAX backend supports everything"
  return chosen, passed
