"""A user's function of scores and positions, made into what every backend can compute.

    fn([score,] batch, head, query position, key position, *operands)

is called with integer arrays that broadcast against the tile, and looks things up in its operands: `slopes[head]`,
`table[head, bucket(q - k)]`. A kernel has no gather. But most lookups do not depend on query and key both: they are done ahead, for
all heads, rows or columns, and become arrays of the logits, which are cut into tiles like a bias and get their gradients like one.
What is left is a lookup by query and key in a table that is small once batch and head are chosen, and that table becomes an array
of the logits as well. What neither fits is computed as it stands, which only plain JAX can.

The function is traced for the whole problem to decide this (`bind`), and again for each shape of tile; the lookups of the one
trace are those of the other in the order in which they occur.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.lax import GatherScatterMode

from ._mask import Coordinates, Sizes, conjunction
from ._pytree import pytree

NAMES = ("score", "batch", "head", "query", "key")


class Node:
  """One result of one operation of a traced function, or one of its inputs."""

  def __init__(self, aval: Any, inputs: list[Any], equation: Any = None, output: int = 0, name: str | None = None):
    self.aval, self.inputs, self.equation, self.output = aval, inputs, equation, output
    self.names: frozenset[str] = frozenset([name] if name else []).union(*(x.names for x in inputs if isinstance(x, Node)))

  @property
  def primitive(self) -> str | None:
    return None if self.equation is None else self.equation.primitive.name


class Trace:
  """A function as a graph: its inputs by name, its operands (what it closes over comes after what it is given), its lookups."""

  def __init__(self, fn: Callable, inputs: dict[str, Any], operands: list[Any]):
    closed, (shape,) = jax.make_jaxpr(lambda i, o: (fn(*i, *o),), return_shape=True)(list(inputs.values()), operands)
    self.result_shape = shape
    self.lookups: list[Node] = []
    self.closed_over: list[Any] = []
    self.inputs = {name: Node(x, [], name=name) for name, x in inputs.items()}
    self.operands = [Node(x, [], name=f"operand {n}") for n, x in enumerate(operands)]
    self.result, = self._add(closed.jaxpr, closed.consts, [*self.inputs.values(), *self.operands])

  def _add(self, jaxpr: Any, consts: Any, given: list[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, map(self._constant, consts))) | dict(zip(jaxpr.invars, given))
    read = lambda atom: self._constant(atom.val) if isinstance(atom, Literal) else env[atom]
    for equation in jaxpr.eqns:
      inputs = [read(atom) for atom in equation.invars]
      if equation.primitive.name in ("jit", "pjit", "closed_call"):
        inner = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
        results = self._add(inner.jaxpr, inner.consts, inputs)
      else:
        results = [Node(var.aval, inputs, equation, n) for n, var in enumerate(equation.outvars)]
        if equation.primitive.name == "gather":
          self.lookups += results
      env.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]

  def _constant(self, value: Any) -> Any:
    """A number stays one; an array that the function closes over is an operand more."""
    if not isinstance(value, jax.Array) and np.ndim(value) == 0:
      return value
    for node, other in zip(self.operands[-len(self.closed_over):] if self.closed_over else [], self.closed_over):
      if other is value:
        return node
    self.closed_over.append(value)
    self.operands.append(Node(jax.typeof(value), [], name=f"operand {len(self.operands)}"))
    return self.operands[-1]


def evaluate(node: Any, known: dict[Node, Any]) -> Any:
  """The value of a node, from those of what it depends on; `known` is added to."""
  if not isinstance(node, Node):
    return node
  if node not in known:
    values = [evaluate(x, known) for x in node.inputs]
    primitive = node.equation.primitive
    result = primitive.bind(*values, **primitive.get_bind_params(node.equation.params))
    known[node] = result[node.output] if primitive.multiple_results else result
  return known[node]


# Lookups ----------------------------------------------------------------------------------------------------------------


class Indexed(NamedTuple):
  """A lookup of single entries: an index into each axis of the table, all of them broadcast to the result."""

  table: Node
  indices: list[Any]  # nodes, or numbers


def _indexed(node: Node) -> Indexed | None:
  """The gather as `table[i, j, …]`, if that is what it is."""
  table, starts = node.inputs
  numbers, rank = node.equation.params["dimension_numbers"], len(node.inputs[0].aval.shape)
  every = tuple(range(rank))
  if (set(node.equation.params["slice_sizes"]) != {1} or numbers.collapsed_slice_dims != every
      or numbers.start_index_map != every or not isinstance(starts, Node)):
    return None
  stacked = starts.primitive == "concatenate" and starts.equation.params["dimension"] == len(starts.aval.shape) - 1
  columns = starts.inputs if stacked else [starts]
  indices = [_without_last_axis(x) for x in columns]
  return None if len(indices) != rank or any(x is None for x in indices) else Indexed(table, indices)


def _without_last_axis(node: Any) -> Any:
  """What was laid out as `[…, 1]`, before that and before any broadcast; None if the node is something else."""
  if not isinstance(node, Node) or node.primitive != "broadcast_in_dim" or node.aval.shape[-1:] != (1,):
    return None
  if node.equation.params["broadcast_dimensions"] != tuple(range(len(node.aval.shape) - 1)):
    return None
  node = node.inputs[0]
  while isinstance(node, Node) and _keeps_values(node):
    node = node.inputs[0]
  return node


def _keeps_values(node: Node) -> bool:
  """Whether a node only repeats an index, along axes of size one or from a number, or converts it."""
  return node.primitive == "convert_element_type" or (
      node.primitive == "broadcast_in_dim"
      and node.equation.params["broadcast_dimensions"] in ((), tuple(range(len(node.aval.shape)))))


def _flat(indices: list[Any], sizes: tuple[int, ...]) -> Any:
  """One index into the flattened axes from an index into each."""
  flat = 0
  for index, size in zip(indices, sizes):
    flat = flat * size + jnp.clip(index, 0, size - 1)
  return flat


# Programs ---------------------------------------------------------------------------------------------------------------


@pytree
class Program:
  """A function that is bound to a problem, with its arrays laid out as those of the logits."""

  fn: Callable
  arrays: list[Any]  # of lookups done ahead `[B|1, N|1, T|1, S|1]`, tables `[B|1, N|1, 1, 1, 1, n]`, whole operands
  ways: tuple[Any, ...]  # how each lookup is done
  shapes: tuple[Any, ...]  # (shape, dtype) of each given operand
  closed_over: tuple[Any, ...]  # the same of what the function closes over
  whole: tuple[Any, ...]  # (operand, array) for operands that are used as they are
  reason: str | None  # why no kernel can compute it

  @property
  def largest_table(self) -> int:
    """Entries of the largest table that is read by query and key together."""
    return max([self.arrays[way[0]].shape[-1] for way in self.ways if way is not None and way[1] is not None], default=0)

  @property
  def name(self) -> str:
    return getattr(self.fn, "__name__", repr(self.fn))

  def on_tile(self, at: Coordinates, keep: Any = None, score: Any = None) -> Any:
    """The function's value on a tile.

    Args:
      at: where the tile lies.
      keep: what of a masked tile is kept. What is looked up for nothing that is kept counts as 1, lest it be not finite, or
        become so in a logarithm or a quotient.
      score: of the tile, for a function that wants it.
    """
    rank = max(np.ndim(at.q), np.ndim(at.k), 2)
    lay_out = lambda x: jnp.broadcast_to(jnp.asarray(x, np.int32), (1,) * rank) if np.ndim(x) < 2 else x
    values = {"score": score, "batch": lay_out(at.batch), "head": lay_out(at.head), "query": at.q, "key": at.k}
    values = {name: x for name, x in values.items() if x is not None}
    trace = _tile_trace(self, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in values.items()})
    known = {trace.inputs[name]: x for name, x in values.items()}
    for operand, number in self.whole:
      node = trace.operands[operand]
      x = self.arrays[number]
      known[node] = _as(x if x.shape == node.aval.shape else x.reshape(node.aval.shape), node)
    for node, way in zip(trace.lookups, self.ways):
      if way is None:
        continue
      number, sizes = way
      value = self.arrays[number]
      if sizes is not None:
        indices = _indexed(node).indices  # type: ignore[union-attr]
        inner = [(evaluate(x, known), size) for x, size in zip(indices, sizes) if size is not None]
        value = at.take(value, _flat([x for x, _ in inner], tuple(size for _, size in inner)))
        if _fills(node):
          inside = conjunction([(x >= 0) & (x < size) for x, size in inner], None)
          fill = node.equation.params["fill_value"]
          value = jnp.where(inside, value, jnp.nan if fill is None else fill)
      if keep is not None and jnp.issubdtype(node.aval.dtype, jnp.floating):
        value = jnp.where(_kept_by_any(keep, value.shape), value, 1)
      known[node] = jnp.broadcast_to(_as(value, node), node.aval.shape)
    return evaluate(trace.result, known)


_traces: weakref.WeakKeyDictionary[Any, dict[Any, Trace]] = weakref.WeakKeyDictionary()


def _tile_trace(program: Program, inputs: dict[str, Any]) -> Trace:
  """The function's graph for one shape of tile; kept, as what the function closes over may be gone when the backward pass asks."""
  kept = _traces.setdefault(program.fn, {})
  key = tuple((name, x.shape, x.dtype) for name, x in inputs.items()), program.shapes, program.closed_over
  if key not in kept:
    kept[key] = Trace(program.fn, inputs, [jax.ShapeDtypeStruct(*s) for s in program.shapes])
    kept[key].closed_over.clear()
  return kept[key]


def is_program(x: Any) -> bool:
  """For walks over a mask's arrays that stop there: what a function looks up decides nothing about tiles."""
  return isinstance(x, Program)


def _as(x: Any, node: Node) -> Any:
  return x != 0 if node.aval.dtype == np.bool_ else x.astype(node.aval.dtype)


def _kept_by_any(keep: Any, shape: tuple[int, ...]) -> Any:
  """Whether anything is kept, along the axes on which `shape` broadcasts."""
  axes = tuple(n for n, (size, kept) in enumerate(zip(shape, keep.shape)) if size == 1 and kept > 1)
  return keep if not axes else jnp.max(jnp.where(keep, 1.0, 0.0), axis=axes, keepdims=True) > 0


def bind(fn: Callable, operands: Any, sizes: Sizes, score_dtype: Any = None) -> Program:
  """`fn` with its operands (and what it closes over) for a problem; it is given scores if they have a dtype."""
  full = sizes.batch, sizes.heads, sizes.queries, sizes.keys
  values = dict(zip(NAMES[1:], sizes.numbers()))
  inputs: dict[str, Any] = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in values.items()}
  if score_dtype is not None:
    inputs = {"score": jax.ShapeDtypeStruct(full, score_dtype)} | inputs
  operands = [_wide(x, score_dtype) for x in operands]
  shapes = tuple((x.shape, x.dtype) for x in operands)
  trace = Trace(fn, inputs, [jax.ShapeDtypeStruct(*s) for s in shapes])
  known = {trace.inputs[name]: x for name, x in values.items()} | dict(zip(trace.operands, [*operands, *trace.closed_over]))
  run = {"batch": {"T"} if values["batch"].shape[2] > 1 else set(), "query": {"T"}, "key": {"S"}, "score": {"T", "S"}}
  runs_along = lambda node: set().union(*(run.get(name, set()) for name in node.names)) if isinstance(node, Node) else set()

  arrays: list[Any] = []
  ways: list[Any] = []
  for node in trace.lookups:
    indexed = _indexed(node)
    if runs_along(node) != {"T", "S"} and _broadcasts(node.aval.shape, full):
      ways.append((len(arrays), None))
      arrays.append(evaluate(node, known))
    elif indexed is not None and _looked_up_in_tiles(indexed, node, runs_along):
      outer = [not runs_along(x) for x in indexed.indices]
      ways.append((len(arrays), tuple(None if o else size for o, size in zip(outer, indexed.table.aval.shape))))
      arrays.append(_rows(indexed, outer, known))
    else:
      ways.append(None)
  done = {node for node, way in zip(trace.lookups, ways) if way is not None}
  index_nodes = [x for node, way in zip(trace.lookups, ways) if way and way[1] for x in _indexed(node).indices]  # type: ignore[union-attr]
  used = _reached([trace.result, *index_nodes], done)
  whole = []
  for number, node in enumerate(trace.operands):
    if node in used:
      whole.append((number, len(arrays)))
      x = known[node]
      arrays.append(x.reshape((1, 1, 1, 1) if x.size == 1 else (1, 1, 1, 1) + (1,) * max(2 - x.ndim, 0) + x.shape))
  closed_over = tuple((x.shape, x.dtype) for x in trace.closed_over)
  return Program(fn, arrays, tuple(ways), shapes, closed_over, tuple(whole), _reason(fn, trace, ways, whole, arrays))


def _looked_up_in_tiles(indexed: Indexed, node: Node, runs_along: Callable) -> bool:
  outer = [x for x in indexed.indices if not runs_along(x)]
  fixed = not indexed.table.names & set(NAMES) and len(outer) < len(indexed.indices)
  fixed = fixed and all(not isinstance(x, Node) or x.aval.shape[-2:] in ((), (1, 1)) for x in outer)
  return fixed and not (_fills(node) and not jnp.issubdtype(node.aval.dtype, jnp.floating))


def _fills(node: Node) -> bool:
  """Whether an index that is out of range gives a value of its own, NaN by default."""
  return node.equation.params["mode"] == GatherScatterMode.FILL_OR_DROP


def _wide(x: Any, score_dtype: Any) -> Any:
  """Floats in the dtype in which scores are computed."""
  x = jnp.asarray(x)
  return x.astype(score_dtype or jnp.promote_types(x.dtype, np.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
  return len(shape) == 4 and all(size in (1, whole) for size, whole in zip(shape, full))


def _rows(indexed: Indexed, outer: list[bool], known: dict[Node, Any]) -> Any:
  """The table with the indices by batch and head already chosen, `[B|1, N|1, 1, 1, 1, n]`."""
  table = evaluate(indexed.table, known)
  axes = [a for a, o in enumerate(outer) if o] + [a for a, o in enumerate(outer) if not o]
  chosen = [evaluate(x, known) for x, o in zip(indexed.indices, outer) if o]
  sizes = tuple(table.shape[a] for a, o in enumerate(outer) if o)
  flat = table.transpose(axes).reshape(int(np.prod(sizes)), -1)
  rows = flat[_flat(chosen, sizes) + np.zeros((1, 1, 1, 1), np.int32)]  # [B|1, N|1, 1, 1, n]
  return rows.reshape(*rows.shape[:2], 1, 1, 1, rows.shape[-1])


def _reached(nodes: list[Any], stop: set[Node]) -> set[Node]:
  """All that these nodes depend on, not going past `stop`."""
  seen: set[Node] = set()
  todo = [x for x in nodes if isinstance(x, Node)]
  while todo:
    node = todo.pop()
    if node not in seen and node not in stop:
      seen.add(node)
      todo += [x for x in node.inputs if isinstance(x, Node)]
  return seen


def _reason(fn: Callable, trace: Trace, ways: list[Any], whole: list[Any], arrays: list[Any]) -> str | None:
  """Why no kernel can compute this, if so."""
  name = getattr(fn, "__name__", repr(fn))
  if None in ways:
    return (f"{name} looks up more than single entries by query and key together; only plain JAX, implementation='xla', can. Index "
            "every axis of an operand, as in table[h, bucket(q - k)]")
  for number, array in whole:
    if arrays[array].size > 1:
      return (f"{name} uses an operand of shape {tuple(trace.operands[number].aval.shape)} as a whole; only plain JAX, "
              "implementation='xla', can. Index it by batch, head and positions")
  return None


def programs(logits: Any) -> list[Program]:
  """All functions in a problem's logits."""
  return [x for x in jax.tree.leaves(logits, is_leaf=is_program) if is_program(x)]
