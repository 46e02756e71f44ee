"""Compiled attention, forward and backward apart, and its inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflash import _reference

CACHE = 60e6  # bytes of the largest L2 cache among Hopper GPUs
UNTUNED: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}  # compiles without trying out algorithms on the device
INPUTS = ("query", "key", "value")
Arrays = Mapping[str, Any]


def passes(function: Callable, wrt: Sequence[str]) -> tuple[Callable, Callable]:
  """(`save(arrays) -> (out, saved)`, `pull(saved, dout) -> gradients by name`) of `function(**arrays)`; trace the first first.

  `pull` is the function that `jax.vjp` returns, with what the forward pass saved as its arguments.
  """
  structure = None

  def save(arrays):
    nonlocal structure
    out, pull = jax.vjp(lambda moving: function(**{**arrays, **moving}), {name: arrays[name] for name in wrt})
    saved, structure = jax.tree.flatten(pull)
    return out, saved

  def pull(saved, dout):
    assert structure is not None, "`save` has not been traced"
    return jax.tree.unflatten(structure, saved)(dout)[0]

  return save, pull


class Program:
  """`function(**arrays) -> out [B, T, N, E]` compiled, or its backward pass alone.

  What the backward pass needs is computed by another program, which is not timed.

  Args:
    function: takes arrays by keyword.
    arguments: their shapes and dtypes.
    direction: "forward" or "backward".
    wrt: names of the arguments that get a gradient.
  """

  def __init__(self, function: Callable, arguments: Arrays, direction: str, wrt: Sequence[str] = INPUTS):
    struct = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    arguments = struct(dict(arguments))
    self.first = None
    if direction == "forward":
      self.compiled = jax.jit(lambda arrays: function(**arrays)).lower(arguments).compile()
      return
    save, pull = passes(function, wrt)
    lowered = jax.jit(save).lower(arguments)
    out, saved = struct(lowered.out_info)
    self.first = lowered.compile()
    self.compiled = jax.jit(pull).lower(saved, out).compile()

  @property
  def temporary(self) -> int:
    """Bytes that the larger of its programs asks for besides arguments, with what is saved for the backward pass."""
    programs = [self.compiled] + ([self.first] if self.first is not None else [])
    analyses = [program.memory_analysis() for program in programs]
    return max(a.temp_size_in_bytes + a.output_size_in_bytes for a in analyses if a is not None)

  def call(self, arrays: Arrays, dout: Any) -> Callable[[], Any]:
    """A function that starts it: `out`, or the gradients by name. What is saved for the backward pass is computed here."""
    arrays = dict(arrays)
    if self.first is None:
      return functools.partial(self.compiled, arrays)
    return functools.partial(self.compiled, self.first(arrays)[1], dout)


def rotate(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
  """Calls them one after the other, over and over, so that no call finds its inputs in the cache."""
  turns = itertools.cycle(calls)
  return lambda: next(turns)()


class Draw:
  """Sets of random inputs, drawn on the device: enough of them that a cache holds no set until its next turn.

  Args:
    arguments: shapes and dtypes of what is drawn, standard normal; "dout" is added, of the shape of "query".
    seed: of the first set.
  """

  def __init__(self, arguments: Arrays, seed: int = 0):
    shapes = {**arguments, "dout": arguments["query"]}
    size = sum(x.size * x.dtype.itemsize for x in shapes.values())
    self.count = int(min(max(2, np.ceil(4 * CACHE / size)), 16))
    self.seed = seed

    def draw(seed):
      keys = jax.random.split(jax.random.key(seed), len(shapes))
      return {name: jax.random.normal(key, x.shape, x.dtype) for key, (name, x) in zip(keys, shapes.items())}

    self.compiled = jax.jit(draw).lower(jax.ShapeDtypeStruct((), jnp.uint32)).compile()

  def sets(self) -> list[dict[str, Any]]:
    return [self.compiled(np.uint32(self.seed + n)) for n in range(self.count)]


class Exact:
  """One head's attention in float32 and its gradients, densely, to tell how far off the others are.

  The head is the last one of the last batch element. It compiles `UNTUNED`, so as not to disturb what is timed meanwhile.

  Args:
    arguments: shapes of all that `Draw` draws.
    keep: `[1, 1, T, S]`, or None where everything is kept.
    backward: whether there are gradients.
  """

  def __init__(self, arguments: Arrays, keep: np.ndarray | None = None, backward: bool = True):
    self.keep = keep
    batch, heads = arguments["query"].shape[0], arguments["query"].shape[2]
    self.shared = {name for name, x in arguments.items()
                   if x.shape[0] != batch or (x.shape[1] if name == "bias" else x.shape[2]) != heads}

    def run(keep, moving, dout):
      attend = lambda moving: _reference.attention(**moving, keep=keep, dtype=jnp.float32)[0]
      out, pull = jax.vjp(attend, {name: x.astype(jnp.float32) for name, x in moving.items()})
      return {"out": out} | (pull(dout.astype(jnp.float32))[0] if backward else {})

    moving = jax.eval_shape(_last_of_all, dict(arguments))
    shape = None if keep is None else jax.ShapeDtypeStruct(keep.shape, keep.dtype)
    self.compiled = jax.jit(run).lower(shape, moving, moving["query"]).compile(UNTUNED)

  def __call__(self, drawn: Arrays) -> dict[str, Any]:
    """"out", and the gradients by name, of that head."""
    moving = _last_of_all(drawn)
    dout = moving.pop("dout")
    return self.compiled(self.keep, moving, dout)

  def error(self, got: Any, want: Arrays) -> float:
    """The largest error of `out`, or of all gradients in a dict, each as a share of the largest number in it.

    Gradients of what several heads or batch elements share are left out: `want` has one head's part of them.
    """
    found = got if isinstance(got, dict) else {"out": got}
    return max(float(_error(_last(name, x), want[name])) for name, x in found.items() if name not in self.shared)


def _last(name: str, x: Any) -> Any:
  """The last head's part of an argument, of its gradient, or of the output."""
  return x[-1:, -1:] if name == "bias" else x[-1:, :, -1:]


def _last_of_all(arrays: Arrays) -> dict[str, Any]:
  return {name: _last(name, x) for name, x in arrays.items()}


@jax.jit
def _error(got: Any, want: Any) -> Any:
  got = got.astype(jnp.float32)
  return jnp.max(jnp.where(jnp.isfinite(got), jnp.abs(got - want), jnp.inf)) / jnp.max(jnp.abs(want))
