"""An IO ledger: the bytes that a JAX program with Pallas kernels moves between HBM and on-chip memory.

Kernels are counted from what the traced `pallas_call` holds: its grid, its blocks, and its index maps, which are evaluated at every
step of the grid with the very values that are prefetched into scalar memory. As in Pallas' pipeline, a block is loaded when it is
not the one of the step before (one core, the last axis of the grid fastest), a block of an output is stored when the next step
has another one, and a block that reaches past the array moves only what is inside.

What lies around the kernels is counted from the same program (see `jaxprs`), in groups of operations that hang together: a group
reads each of its inputs once, and writes each array that leaves it once. That is the least that a compiler can do by fusing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from . import jaxprs
from .jaxprs import Operation

CHUNK = 1 << 18  # steps of a grid that are looked at together
LANES = 128


@dataclasses.dataclass(frozen=True)
class Operand:
  """An array that a kernel reads or writes, block by block."""

  name: str  # as the `pallas_call` has it
  shape: tuple[int, ...]
  dtype: Any
  block: tuple[int, ...]  # without the axes of which it has one element
  moves: int  # blocks that are loaded, or stored
  bytes: int  # moved
  lane_bytes: int  # the same where a row of less than 128 elements takes 128, as it does in a TPU's memory

  @property
  def times(self) -> float:
    """How many times the array is moved as a whole."""
    return self.bytes / _size(self.shape, self.dtype)

  @property
  def text(self) -> str:
    """"bfloat16[2,8,1024,64]"."""
    return f"{np.dtype(self.dtype).name}[{','.join(map(str, self.shape))}]"

  def __str__(self) -> str:
    return f"{self.name} {self.text}"


@dataclasses.dataclass(frozen=True)
class Pass:
  """A kernel, or a group of operations around the kernels: what it is, and what it moves."""

  name: str
  reads: Sequence[Operand]
  writes: Sequence[Operand]
  grid: tuple[int, ...] = ()  # () if it is no kernel
  on_chip: int = 0  # bytes of one block of each operand, and scratch

  @property
  def bytes(self) -> int:
    return sum(operand.bytes for operand in (*self.reads, *self.writes))

  @property
  def lane_bytes(self) -> int:
    return sum(operand.lane_bytes for operand in (*self.reads, *self.writes))


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The passes of a program in the order in which they run."""

  passes: Sequence[Pass]

  @property
  def kernels(self) -> list[Pass]:
    return [p for p in self.passes if p.grid]

  @property
  def around(self) -> list[Pass]:
    return [p for p in self.passes if not p.grid]

  @property
  def kernel_bytes(self) -> int:
    return sum(p.bytes for p in self.kernels)

  @property
  def around_bytes(self) -> int:
    return sum(p.bytes for p in self.around)

  @property
  def on_chip(self) -> int:
    """M: bytes of on-chip memory that the kernel which takes most of it takes."""
    return max(p.on_chip for p in self.kernels)


def ledger(function: Callable, *args: Any) -> Ledger:
  """The passes of `function(*args)`, which is traced and not run.

  Args:
    function: what to count. Lists that its kernels prefetch must be known while it is traced.
    *args: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    A `Ledger`.

  Raises:
    ValueError: a prefetched list, or the size of a grid, depends on the arguments.

  Example:
    >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    >>> ledger(lambda x: 2 * x + 1, x).around_bytes
    256
  """
  passes = []
  for part in jaxprs.stages(jaxprs.trace(function, *args)):
    passes += [_kernel(part)] if isinstance(part, Operation) else [_group(group) for group in part]
  return Ledger(passes)


def _group(group: jaxprs.Group) -> Pass:
  whole = lambda name, x: Operand(name, x.shape, x.dtype, x.shape, 1, _size(x.shape, x.dtype), _lane_size(x.shape, x.dtype))
  return Pass(group.name, [whole("in", x) for x in group.reads], [whole("out", x) for x in group.writes])


def _kernel(call: Operation) -> Pass:
  mapping, lists = call.params["grid_mapping"], prefetched(call)
  moved = [(0, 0, 0)] * len(mapping.block_mappings)
  for starts in block_starts(call):
    moved = [so_far if _by_hand(block) else tuple(map(sum, zip(so_far, _moves(block, *ends)))) for so_far, block, ends
             in zip(moved, mapping.block_mappings, starts)]
  scalars = [Operand("prefetched", x.shape, x.dtype, x.shape, 1, x.nbytes, x.nbytes) for x in lists]
  blocks = [Operand(b.origin, b.array_aval.shape, b.array_aval.dtype, _block(b), *counts)
            for b, counts in zip(mapping.block_mappings, moved)]
  outputs = mapping.num_outputs
  return Pass(call.params["name"], scalars + blocks[:len(blocks) - outputs], blocks[len(blocks) - outputs:],
              tuple(mapping.grid), on_chip(call))


def on_chip(call: Operation) -> int:
  """Bytes of one block of each operand and of the scratch; Pallas holds two of those blocks that it loads ahead."""
  mapping = call.params["grid_mapping"]
  blocks = sum(_size(_block(b), b.array_aval.dtype) for b in mapping.block_mappings if not _by_hand(b))
  refs = call.params["jaxpr"].invars
  scratch = refs[len(refs) - mapping.num_scratch_operands:]
  return blocks + sum(_size(ref.aval.shape, ref.aval.dtype) for ref in scratch)


def prefetched(call: Operation) -> list[np.ndarray]:
  """What a kernel has in scalar memory before its first step."""
  mapping = call.params["grid_mapping"]
  if mapping.num_dynamic_grid_bounds:
    raise ValueError(f"the grid of kernel {call.params['name']!r} is known only at run time; give static sizes.")
  lists = [x.known() if x.known else None for x in call.reads[:mapping.num_index_operands]]
  if any(x is None for x in lists):
    raise ValueError(f"what kernel {call.params['name']!r} prefetches depends on the arguments of the traced function; "
                     "close over it as NumPy arrays.")
  return lists  # type: ignore[return-value]


def block_starts(call: Operation) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
  """Where the blocks of each operand begin, `[steps, axes]`, chunk by chunk of the grid, and where that of the next step does.

  The step after the last one has a block of its own, at -1.
  """
  mapping, lists = call.params["grid_mapping"], prefetched(call)
  grid = tuple(mapping.grid)
  steps = math.prod(grid)
  maps = [(str(block.index_map_jaxpr), block.block_shape) for block in mapping.block_mappings]
  distinct = dict(zip(maps, mapping.block_mappings))  # q, dout and out are cut alike, for instance

  def at(step):
    place = jnp.unravel_index(step, grid)
    return [jnp.stack([jnp.asarray(i, jnp.int32) for i in block.compute_start_indices_interpret(place, *lists)])
            for block in distinct.values()]

  look_up = jax.jit(jax.vmap(at))
  chunk = min(CHUNK, steps)
  for first in range(0, steps, chunk):
    there = [np.asarray(x) for x in look_up(np.minimum(np.arange(first, first + chunk + 1), steps - 1))]
    count = min(chunk, steps - first)
    ends = [(x[:count], x[1:count + 1].copy()) for x in there]
    if first + count == steps:
      for _, after in ends:
        after[-1] = -1
    found = dict(zip(distinct, ends))
    yield [found[key] for key in maps]


def _moves(block: Any, starts: np.ndarray, after: np.ndarray) -> tuple[int, int, int]:
  """How often the block changes, counted where it is left, the bytes of what was there, and those in a TPU's layout."""
  left = starts[np.any(starts != after, axis=1)]
  sizes = np.array([_extent(b) for b in block.block_shape])
  inside = np.minimum(left + sizes, block.array_aval.shape) - left
  item = np.dtype(block.array_aval.dtype).itemsize
  lanes = inside.copy()
  lanes[:, -1] = -(-lanes[:, -1] // LANES) * LANES
  return len(left), int(inside.prod(axis=1).sum()) * item, int(lanes.prod(axis=1).sum()) * item


def _by_hand(block: Any) -> bool:
  """Whether an operand stays in memory, and the kernel itself copies what it needs, which is not seen here."""
  return block.block_aval.memory_space == pl.ANY


def _extent(axis: Any) -> int:
  """The elements of a block along an axis; one where the kernel does not see the axis."""
  return getattr(axis, "block_size", 1)


def _block(block: Any) -> tuple[int, ...]:
  return tuple(axis.block_size for axis in block.block_shape if hasattr(axis, "block_size"))


def _size(shape: Sequence[int], dtype: Any) -> int:
  return math.prod(shape) * np.dtype(dtype).itemsize


def _lane_size(shape: Sequence[int], dtype: Any) -> int:
  return _size((*shape[:-1], -(-shape[-1] // LANES) * LANES) if shape else (), dtype)
