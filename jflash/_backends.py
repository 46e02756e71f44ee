"""Who can compute a problem: the backends, why each other one cannot, and which is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


from . import _plan
from ._problem import Problem


class Backend(NamedTuple):
  """One way to compute attention."""

  name: str
  supports: Callable[[Problem], str | None]  # None, or why it cannot compute this problem here
  plan: Callable[[Problem], _plan.Plan]
  forward: Callable[..., tuple[Any, Any]]
  cotangent: Callable[..., tuple[Any, Any, Any, list[Any]]]


NAMES = ("tpu", "xla")  # in the order in which they are asked


def get(name: str) -> Backend:
  """The backend called `name`; its kernels are imported here and not before."""
  if name == "xla":
    from . import _xla
    return Backend("xla", lambda problem: None, _plan.plan_xla, _xla.forward, _xla.cotangent)
  if name == "tpu":
    from . import _tpu
    return Backend("tpu", _tpu.supports, _plan.plan_tpu, _tpu.forward, _tpu.cotangent)
  raise ValueError(f"`implementation` is {name!r}; pass None or one of {', '.join(map(repr, NAMES))}.")


def select(problem: Problem, implementation: str | None) -> tuple[Backend, dict[str, str]]:
  """The backend that computes `problem`, and why each other one was passed over.

  Raises:
    NotImplementedError: the named backend cannot, with its reason.
    ValueError: no backend has that name.
  """
  if implementation is not None:
    backend = get(implementation)
    if reason := backend.supports(problem):
      raise NotImplementedError(f"implementation={implementation!r} cannot compute this: {reason}")
    return backend, {name: f"implementation={implementation!r} was asked for" for name in NAMES if name != implementation}
  passed: dict[str, str] = {}
  chosen = None
  for name in NAMES:
    backend = get(name)
    if chosen is not None:
      passed[name] = f"{chosen.name!r} comes first here"
    elif reason := backend.supports(problem):
      passed[name] = reason
    elif name == "tpu" and _plan.platform() != "tpu":
      passed[name] = "it would run in the Pallas interpreter, which is for tests; name it to do so"
    else:
      chosen = backend
  assert chosen is not None, "the plain JAX backend supports everything"
  return chosen, passed


