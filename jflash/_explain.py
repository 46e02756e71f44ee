"""`explain`: what a call of `attention` would run, and why, without running it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from pallas_kernels import schedule

from . import _api, _backends, _check, _plan, _show
from ._problem import Problem
from ._program import is_program


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
  """What a call of `attention` would run; `str` tells it in a few lines.

  Attributes:
    backend: the name of the implementation.
    passed_over: the other ones, each with the reason.
    interpreted: whether its kernels run in the Pallas interpreter.
    shapes: of query `[B, T, N, H]`, key `[B, S, K, H]` and value `[B, S, K, E]`, with the batch axis if only for this.
    dtype: of query, key and value.
    mask: everything that masks (mask, is_causal, window, lengths, segments) as one expression; None without any.
    tiles: (query rows, key columns) of a tile of the forward pass; None where a library chooses them, as cuDNN does.
    backward_tiles: the same of the backward pass; with "mosaic_gpu", of the kernel for dK and dV.
    alone_tiles: the same of a forward pass whose lse or derivative nobody asks for, where "xla" has others for it.
    estimate: seconds that one core of the chip is taken to need, by pass: {"forward": ..., "backward": ...}, from the schedule that
      the compiler makes for its kernels and what they load. Empty where that is not known: other backends, chips or score terms.
    tile_count: tiles of all batch elements and query heads, skipped ones included; None likewise.
    skipped, partial, full: the shares of tiles that are not computed, computed with the mask, and computed without it.
      A tile that reaches past the last query or key is partial. Query heads that share a key head share their visits: a
      tile is skipped where all of them skip it. None where data decides at run time, or a library.
    decided: when it is decided which tiles are skipped, and by what.
    saved: bytes kept from the forward for the backward pass, by name: query, key, value, out, lse, `logits` (the arrays
      of bias, slopes, scale, cap, mask and positions), `schedule` (the visit lists). Nothing else is saved.
    naive_saved: the same for dense attention: query, key, value and the probabilities `[B, N, T, S]`, which are float32
      (float64 for float64).
  """

  backend: str
  passed_over: dict[str, str]
  interpreted: bool
  shapes: dict[str, tuple[int, ...]]
  dtype: str
  mask: str | None
  tiles: tuple[int, int] | None
  backward_tiles: tuple[int, int] | None
  alone_tiles: tuple[int, int] | None
  estimate: dict[str, float]
  tile_count: int | None
  skipped: float | None
  partial: float | None
  full: float | None
  decided: str
  saved: dict[str, int]
  naive_saved: int

  @property
  def saved_bytes(self) -> int:
    """The sum of `saved`."""
    return sum(self.saved.values())

  def __str__(self) -> str:
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
    shares = "skipped share unknown" if self.tiles else "those of the library"
    if self.skipped is not None and self.partial is not None and self.full is not None:
      percent = _show._percent
      shares = f"{percent(self.skipped)} skipped, {percent(self.partial)} need the mask, {percent(self.full)} are full"
    parts = " + ".join(f"{name} {_bytes(n)}" for name, n in self.saved.items() if n)
    rows = [("attention", f"{shapes}, {self.dtype}"), ("mask", self.mask or "none"),
            ("backend", self.backend + (", in the Pallas interpreter" if self.interpreted else ""))]
    rows += [("not " + name, reason) for name, reason in self.passed_over.items()]
    if self.tiles is not None:
      shares = f"{self.tile_count} of {self.tiles[0]} x {self.tiles[1]}: {shares}"
    rows += [("tiles", shares), ("", self.decided)]
    if self.tiles is not None and self.backward_tiles not in (None, self.tiles):
      rows.append(("", f"of {self.backward_tiles[0]} x {self.backward_tiles[1]} backward"))  # type: ignore[index]
    if self.alone_tiles:
      rows.append(("", f"of {self.alone_tiles[0]} x {self.alone_tiles[1]} where no derivative is taken"))
    if self.estimate:
      times = ", ".join(f"{_seconds(x)} {name}" for name, x in self.estimate.items())
      rows.append(("estimate", f"{times}, on one core, by the compiler's schedule"))
    rows += [("saved", f"{_bytes(self.saved_bytes)} for the backward pass; dense attention, with its probabilities: "
                       f"{_bytes(self.naive_saved)}"), ("", parts)]
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


def explain(*args: Any, **kwargs: Any) -> Explanation:
  """What `attention` would run with these arguments, and why; it computes no attention.

  Args:
    *args, **kwargs: those of `attention`. Any array may be a `jax.ShapeDtypeStruct` instead, and within `jit` it may be
      traced; where that is part of the mask, the shares of tiles are unknown.

  Returns:
    An `Explanation`: backend, reasons against the others, tiles, shares skipped, bytes saved for the backward pass.

  Raises:
    ValueError, TypeError, NotImplementedError: whatever `attention` raises before it computes.

  Example:
    >>> import jax, jax.numpy as jnp, jflash
    >>> q = jax.ShapeDtypeStruct((2, 8192, 8, 128), jnp.bfloat16)
    >>> k = v = jax.ShapeDtypeStruct((2, 8192, 2, 128), jnp.bfloat16)
    >>> why = jflash.explain(q, k, v, is_causal=True, local_window_size=(1023, 0), implementation="xla")
    >>> why.tiles, why.tile_count, why.skipped
    ((512, 512), 4096, 0.82421875)
  """
  given = _SIGNATURE.bind(*args, **kwargs)
  given.apply_defaults()
  leaves, structure = jax.tree.flatten(given.arguments)
  struct = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]
  explanation = None

  def of_structs(values):
    nonlocal explanation
    values = iter(values)
    # What has a value keeps it here, also inside of a function that is being traced.
    with jax.ensure_compile_time_eval():
      explanation = _explain(structure.unflatten([next(values) if s else x for s, x in zip(struct, leaves)]))

  if any(struct):
    jax.eval_shape(of_structs, [x for s, x in zip(struct, leaves) if s])
  else:
    of_structs([])
  assert explanation is not None
  return explanation


_SIGNATURE = inspect.signature(_api.attention)
_PROBLEM_NAMES = tuple(inspect.signature(_api.make_problem).parameters)
explain.__signature__ = _SIGNATURE.replace(return_annotation="Explanation")  # type: ignore[attr-defined]


def _explain(arguments: dict[str, Any]) -> Explanation:
  with _api.in_tiles(arguments["tiles"]):
    return _explain_tiled(arguments)


def _explain_tiled(arguments: dict[str, Any]) -> Explanation:
  problem = _api.make_problem(**{name: arguments[name] for name in _PROBLEM_NAMES})
  if arguments["sinks"] is not None:
    _check.sinks(arguments["sinks"], problem.heads)
  backend, passed_over = _backends.select(problem, arguments["implementation"])
  plan = backend.plan(problem)
  visits = jax.eval_shape(lambda: _plan.make_schedule(problem, plan))
  with_lse = arguments["return_residual"] or arguments["sinks"] is not None
  kinds = _show.tile_kinds(problem, plan) if backend.tiled else None
  alone = None if with_lse else _plan.out_alone(problem, plan, visits._replace(kinds=kinds)).alone
  skipped, partial, full = (None if kinds is None else float(np.mean(kinds == kind))
                            for kind in (schedule.EMPTY, schedule.PARTIAL, schedule.FULL))
  grid = math.prod(-(-size // tile) for size, tile in zip((problem.queries, problem.keys), plan.tiles))
  mask = problem.logits.mask
  shapes = {"query": problem.q.shape, "key": problem.k.shape, "value": problem.v.shape}
  tensors = {"query": problem.q, "key": problem.k, "value": problem.v}
  scores = np.dtype(problem.dtype).itemsize * problem.batch * problem.heads * problem.queries  # for each key
  inputs = {name: _size(x) for name, x in tensors.items()}
  out = problem.batch * problem.queries * problem.heads * problem.value_width * np.dtype(problem.v.dtype).itemsize
  saved = {**inputs, "out": out, "lse": scores, "logits": _size(problem.logits), "schedule": _size(visits)}
  return Explanation(
      backend=backend.name, passed_over=passed_over, interpreted=bool(plan.interpret), shapes=shapes,
      dtype=str(problem.q.dtype), mask=None if mask is None else repr(mask), tiles=plan.tiles if backend.tiled else None,
      backward_tiles=_backward_tiles(plan) if backend.tiled else None,
      alone_tiles=alone.tiles if alone and alone.tiles != plan.tiles else None,
      estimate={name: x for name, (_, x) in _plan.tpu_estimates(problem).items()} if backend.name == "tpu" else {},
      tile_count=problem.batch * problem.heads * grid if backend.tiled else None, skipped=skipped, partial=partial, full=full,
      decided=_decided(problem) if backend.tiled else f"decided by {backend.name}", saved=saved,
      naive_saved=sum(inputs.values()) + scores * problem.keys)


def _backward_tiles(plan: _plan.Plan) -> tuple[int, int]:
  return plan.launches.dkv.of_scores if plan.launches else plan.backward_tiles or plan.tiles


def _decided(problem: Problem) -> str:
  """When it is known which tiles are skipped."""
  logits = problem.logits
  if logits.mask is None:
    return "there is no mask"
  parts = {"mask": logits.mask, "query_positions": logits.query_positions, "key_value_positions": logits.key_positions}
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  leaves = [(name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(parts, is_leaf=is_program) if not is_program(x)]
  if traced := [name for name, x in leaves if isinstance(x, Tracer)]:
    return f"decided at run time, by what is traced: {', '.join(traced)}"
  if arrays := [name for name, x in leaves if not isinstance(x, np.ndarray)]:
    return f"decided at run time, by JAX arrays (NumPy arrays would be known while tracing): {', '.join(arrays)}"
  return "decided while tracing"


def _size(tree: Any) -> int:
  """Bytes of the arrays in `tree`."""
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def _seconds(x: float) -> str:
  unit, size = next(pair for pair in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if x >= pair[1] or pair[0] == "us")
  return f"{x / size:.3g} {unit}"


def _bytes(n: int) -> str:
  for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
    if n >= size:
      return f"{n / size:.4g} {unit}"
  return f"{n} B"
