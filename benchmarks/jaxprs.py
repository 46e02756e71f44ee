"""A traced program as one flat list of operations, cut at its Pallas kernels.

Calls are inlined, what no result needs is dropped, and what is computed twice from the same values is kept once, as a compiler
would. Values that do not depend on the arguments can be asked for (`Value.known`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

KERNEL = "pallas_call"
SHAPES = ("convert_element_type", "squeeze", "reshape", "broadcast_in_dim", "expand_dims")  # not worth a mention in a name
LOOPS = ("scan", "while", "cond")
# A linear map with a transpose of its own is a primitive without a jaxpr; how it is computed is a JAX function.
COMPUTED_BY_JAX = ("jflash_linear_map",)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """An array of the program."""

  shape: tuple[int, ...]
  dtype: Any
  known: Callable[[], np.ndarray] | None = None  # None if it depends on the arguments


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """One equation, after everything around it was inlined."""

  name: str
  params: dict[str, Any]
  reads: Sequence[Value]
  writes: Sequence[Value]


@dataclasses.dataclass(frozen=True)
class Group:
  """Operations between two kernels that hang together, as what they read and what others read of them."""

  name: str
  reads: Sequence[Value]
  writes: Sequence[Value]


@dataclasses.dataclass(frozen=True)
class Program:
  operations: Sequence[Operation]
  results: Sequence[Value]


def trace(function: Callable, *args: Any) -> Program:
  """The program of `function(*args)`; `args` are pytrees of arrays or `jax.ShapeDtypeStruct`s."""
  closed = jax.make_jaxpr(function)(*args)
  flattener = _Flattener()
  results = flattener.inline(closed, [_unknown(v.aval) for v in closed.jaxpr.invars])
  return Program(_needed(flattener.operations, results), results)


class _Flattener:
  """Inlines a jaxpr, keeping each distinct operation once."""

  def __init__(self):
    self.operations: list[Operation] = []
    self._seen: dict[Any, Sequence[Value]] = {}
    self._literals: dict[Any, Value] = {}

  def inline(self, closed: Any, args: Sequence[Value]) -> list[Value]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, map(self._constant, closed.consts))) | dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: self._constant(v.val) if isinstance(v, core.Literal) else values[v]
    for eqn in jaxpr.eqns:
      reads = [read(v) for v in eqn.invars]
      inner = _inner(eqn)
      results = self._operation(eqn, reads) if inner is None else self.inline(inner, reads)
      values |= dict(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _operation(self, eqn: Any, reads: Sequence[Value]) -> Sequence[Value]:
    if eqn.primitive.name == "name":  # a mark for `jax.checkpoint`
      return reads
    key = (eqn.primitive.name, str(eqn.params), tuple(map(id, reads)))
    if key not in self._seen:
      known = all(x.known for x in reads) and eqn.primitive.name != KERNEL
      writes = _computed(eqn, reads) if known else [_unknown(v.aval) for v in eqn.outvars]
      self.operations.append(Operation(eqn.primitive.name, eqn.params, reads, writes))
      self._seen[key] = writes
    return self._seen[key]

  def _constant(self, x: Any) -> Value:
    key = (np.shape(x), str(np.asarray(x).dtype), np.asarray(x).tobytes())
    return self._literals.setdefault(key, Value(np.shape(x), np.asarray(x).dtype, lambda: np.asarray(x)))


def _inner(eqn: Any) -> Any:
  """The closed jaxpr that an operation is short for, or None."""
  name, params = eqn.primitive.name, eqn.params
  if name == KERNEL:
    return None
  if name in COMPUTED_BY_JAX:
    return jax.make_jaxpr(functools.partial(eqn.primitive.impl, **params))(*(_struct(v.aval) for v in eqn.invars))
  if name in LOOPS:
    if f" {KERNEL}[" in str(params):
      raise ValueError(f"a kernel inside of `{name}` runs a number of times that is not looked into; call it outside.")
    return None
  inner = params.get("call_jaxpr", params.get("jaxpr"))
  return inner if inner is None or hasattr(inner, "consts") else core.ClosedJaxpr(inner, [])


def _computed(eqn: Any, reads: Sequence[Value]) -> list[Value]:
  """The results of an operation on known values, computed when they are asked for."""

  @functools.cache
  def results():
    with jax.ensure_compile_time_eval():
      out = eqn.primitive.bind(*(x.known() for x in reads), **eqn.params)  # pyright: ignore[reportOptionalCall]
    return [np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])]

  return [Value(v.aval.shape, v.aval.dtype, lambda n=n: results()[n]) for n, v in enumerate(eqn.outvars)]


def _unknown(aval: Any) -> Value:
  return Value(aval.shape, aval.dtype)


def _struct(aval: Any) -> Any:
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _needed(operations: Sequence[Operation], results: Sequence[Value]) -> list[Operation]:
  """Those operations that lead to a result; what is known is a constant of the program and not computed."""
  wanted, kept = set(map(id, results)), []
  for operation in reversed(operations):
    if any(id(x) in wanted and not x.known for x in operation.writes):
      wanted |= set(map(id, operation.reads))
      kept.append(operation)
  return kept[::-1]


def stages(program: Program) -> list[Operation | list[Group]]:
  """The kernels in order, and before, between and after them the groups that their inputs and the results need.

  An operation belongs behind the last kernel that it depends on; within such a stage, operations that pass values to each other
  form a group.
  """
  level: dict[int, int] = {}
  stage: list[list[Operation]] = [[]]
  kernels: list[Operation] = []
  for operation in program.operations:
    here = max([level.get(id(x), 0) for x in operation.reads], default=0)
    if operation.name == KERNEL:
      kernels.append(operation)
      stage.append([])
      here = len(kernels)
    else:
      stage[here].append(operation)
    level |= {id(x): here for x in operation.writes}
  parts: list[Operation | list[Group]] = []
  for number, operations in enumerate(stage):
    parts += [kernels[number - 1]] if number else []
    parts += [_groups(operations, program)] if operations else []
  return parts


def _groups(operations: Sequence[Operation], program: Program) -> list[Group]:
  group: dict[int, list[Operation]] = {}  # id of a value -> the operations of the group that makes it
  for operation in operations:
    joined = [operation]
    for other in {id(g): g for x in operation.reads if (g := group.get(id(x)))}.values():
      joined = other + joined
    group |= {id(x): joined for member in joined for x in member.writes}
  distinct = list({id(g): g for g in group.values()}.values())
  return [made for members in distinct if (made := _summary(members, program)).writes]


def _summary(members: Sequence[Operation], program: Program) -> Group:
  made = {id(x): x for member in members for x in member.writes}
  inside = set(map(id, members))
  outside = {id(x) for other in program.operations if id(other) not in inside for x in other.reads} | set(map(id, program.results))
  read = {id(x): x for member in members for x in member.reads if id(x) not in made and not x.known}
  names = dict.fromkeys(member.name for member in members)
  telling = [name for name in names if name not in SHAPES] or names
  return Group(", ".join(telling), list(read.values()), [x for number, x in made.items() if number in outside])
