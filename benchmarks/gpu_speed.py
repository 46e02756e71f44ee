"""Who takes part: jflash, cuDNN and others, at the shapes of papers, with masks, with a bias, and the device's own ceilings."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jflash
from jflash import _api, _plan, _tiles_gpu

from . import gpu_shapes
from .gpu_contest import SAMPLE, Begin, Contest, Effort, Entrant, Measure, Rows
from .gpu_programs import INPUTS, Exact, Program
from .gpu_results import Result
from .gpu_shapes import Masking, Shape
from .timing import interleave

Cases = dict[str, Callable[[], Any]]  # name -> what makes a case, with `prepare(without) -> measure(begin) -> rows`


@dataclasses.dataclass(frozen=True)
class Setup:
  """What all parts are told.

  Attributes:
    implementation: of `jflash.attention`.
    peers: implementations of `jax.nn.dot_product_attention`; ratios refer to the first.
    tokens, hidden: of the shapes, in all.
    xla_lengths: where the peer "xla" takes part: it takes memory in proportion to N².
    interpret: whether the kernels run in the Pallas interpreter, to try the checks without a GPU.
  """

  effort: Effort = Effort()
  implementation: str = "mosaic_gpu"
  peers: tuple[str, ...] = ("cudnn", "xla")
  widths: tuple[int, ...] = gpu_shapes.WIDTHS
  lengths: tuple[int, ...] = gpu_shapes.LENGTHS
  tokens: int = gpu_shapes.TOKENS
  hidden: int = gpu_shapes.HIDDEN
  xla_lengths: tuple[int, ...] = (2048,)
  interpret: bool = False

  def shape(self, width: int, length: int) -> Shape:
    return gpu_shapes.paper(width, length, self.tokens, self.hidden)

  def attention(self, who: str) -> Callable:
    """"jflash", "jax.nn cudnn", …: the function."""
    if who == "jflash":
      return functools.partial(jflash.attention, implementation=self.implementation)
    if who == "tokamax":
      import tokamax  # type: ignore[import-not-found]
      return tokamax.dot_product_attention
    peer: Any = who.removeprefix("jax.nn ")
    return functools.partial(jax.nn.dot_product_attention, implementation=peer)

  def names(self, length: int) -> list[str]:
    """Who is measured at this length."""
    peers = [f"jax.nn {peer}" for peer in self.peers if peer != "xla" or length in self.xla_lengths]
    return ["jflash", *peers] + (["tokamax"] if importlib.util.find_spec("tokamax") else [])

  def entrant(self, who: str, direction: str, shape: Shape, given: Masking, **more: Any) -> Entrant:
    """`who` at self-attention of this shape, masked so."""
    static, arrays = given.arguments(who == "jflash")
    function = functools.partial(self.attention(who), **static)
    make = lambda: Program(function, shape.arguments | arrays, direction)
    return Entrant(who, direction, make, {"flops": shape.flops(given.pairs, direction)}, arrays, tunes=who == "jax.nn xla", **more)


def to_peer(peers: Sequence[str], entrant: Entrant, times: Mapping[str, Any]) -> dict[str, Any]:
  """How many times faster than the first of the peers that was measured."""
  name = f"jax.nn {peers[0]}"
  return {"× cuDNN": times[entrant.name].speedup(times[name])} if name in times else {}


def keep_of(name: str, given: Masking, length: int) -> np.ndarray | None:
  """What the last batch element's queries see, `[1, 1, N, N]`."""
  if name == "full":
    return None
  if given.theirs:
    return given.theirs[1]["mask"][-1:]
  causal = np.tri(length, dtype=bool)
  if name.startswith("window"):
    causal &= ~np.tri(length, k=-int(name.split()[1]), dtype=bool)
  return causal[None, None]


def speed(setup: Setup) -> Cases:
  """The shapes of the FlashAttention-3 paper, and whoever else can compute them, both passes."""
  # The lengths that say most come first, in case the time runs out.
  lengths = sorted(setup.lengths, key=lambda n: (n not in (4096, 16_384), -n))
  return {f"d {width}, {name}, N {length}": functools.partial(_plain, setup, width, name, length)
          for length in lengths for width in sorted(setup.widths, key=lambda d: d != 128) for name in ("causal", "full")}


def _plain(setup: Setup, width: int, name: str, length: int) -> Contest:
  shape = setup.shape(width, length)
  given = gpu_shapes.masking(name, shape.batch, length)
  entrants = [setup.entrant(who, direction, shape, given) for direction in gpu_shapes.PASSES for who in setup.names(length)]
  return Contest("speed", {"d": str(width), "mask": name, "N": str(length)}, shape.arguments, entrants, setup.effort,
                 lambda: Exact(shape.arguments, keep_of(name, given, length)), functools.partial(to_peer, setup.peers))


def masks(setup: Setup) -> Cases:
  """What a mask costs against causal attention, per score that is computed; then a bias, and few queries with many keys."""
  lengths = sorted({8192, 16_384} & {*setup.lengths}) or setup.lengths[-1:]
  names = (f"window {min(1024, lengths[0] // 8)}", "documents", "array")
  masked = {f"d {width}, {name}, N {length}": functools.partial(_masked, setup, width, name, length)
            for length in lengths for width in setup.widths if width < 256 for name in names}
  return masked | {"bias": functools.partial(_bias, setup), "one query": functools.partial(_decode, setup)}


def _masked(setup: Setup, width: int, name: str, length: int) -> Contest:
  shape = setup.shape(width, length)
  given, causal = (gpu_shapes.masking(kind, shape.batch, length) for kind in (name, "causal"))
  entrants = []
  for direction in gpu_shapes.PASSES:
    entrants += [setup.entrant(who, direction, shape, given) for who in setup.names(0)]
    entrants.append(setup.entrant("jflash", direction, shape, causal, checked=False)._replace(name="jflash, causal"))
  areas: dict[tuple[str, str], float] = {}

  def ratios(entrant, times):
    """Time for each score that is computed, relative to causal."""
    added = to_peer(setup.peers, entrant, times) if entrant.name != "jflash, causal" else {}
    if entrant.name != "jflash" or "jflash, causal" not in times:
      return added
    own, other = (areas.setdefault((entrant.direction, kind), computed(setup, shape, masking, entrant.direction))
                  for kind, masking in ((name, given), ("causal", causal)))
    return added | {"of causal": other / own / times["jflash"].speedup(times["jflash, causal"])}

  return Contest("masks", {"d": str(width), "mask": name, "N": str(length)}, shape.arguments,
                 entrants, setup.effort, lambda: Exact(shape.arguments, keep_of(name, given, length)), ratios)


def computed(setup: Setup, shape: Shape, given: Masking, direction: str) -> float:
  """How many scores are computed, those of skipped tiles left out; on average over the kernels of the backward pass."""
  static, arrays = given.arguments(True)
  arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
  explain = functools.partial(jflash.explain, **shape.arguments, **arrays, **static, implementation=setup.implementation)
  tiles = [explain().tiles or (1, 1)]
  if direction == "backward" and setup.implementation == "mosaic_gpu":
    launches = launches_of(shape, **arrays, **static)
    tiles = [launches.dq.tiles, launches.dkv.tiles]
  scores = []
  for rows, columns in tiles:
    with _plan.force_tiles(rows, columns):
      why = explain()
    assert why.skipped is not None and why.tile_count, "arrays are given, so it is known which tiles are skipped"
    scores.append(why.tile_count * (1 - why.skipped) * rows * columns)
  return sum(scores) / len(scores)


def launches_of(shape: Shape, **arguments: Any) -> _tiles_gpu.Launches:
  """How the kernels are cut up for a call with these arguments."""
  found = []
  jax.eval_shape(lambda arrays: found.append(_plan.plan_mosaic_gpu(_api.make_problem(**arrays, **arguments)).launches),
                 shape.arguments)
  return found[0]


def _bias(setup: Setup) -> Contest:
  """Self-attention with a bias that is shared by the batch, as of AlphaFold 3, which has one gradient for all its elements."""
  small = setup.tokens < gpu_shapes.TOKENS
  shape = Shape(2, 128, 128, 2, 2, 64) if small else Shape(64, 768, 768, 4, 4, 64)
  arguments = shape.arguments | {"bias": jax.ShapeDtypeStruct((1, shape.heads, shape.queries, shape.keys), shape.dtype)}
  entrants = []
  for direction in gpu_shapes.PASSES:
    work = {"flops": shape.flops(shape.queries * shape.keys, direction)}
    for who in setup.names(0):
      attend = setup.attention(who)
      program = functools.partial(Program, attend, arguments, direction)
      entrants.append(Entrant(who, direction, functools.partial(program, wrt=(*INPUTS, "bias")), work))
      if direction == "backward":
        entrants.append(Entrant(f"{who}, bias fixed", direction, program, work))
      plain = lambda attend=attend, bias=None, **arrays: attend(**arrays)
      program = functools.partial(Program, plain, arguments, direction)
      entrants.append(Entrant(f"{who}, no bias", direction, program, work, checked=False))
  return Contest("masks", {"d": "64", "mask": "bias", "N": str(shape.keys)}, arguments, entrants, setup.effort,
                 lambda: Exact(arguments), functools.partial(to_peer, setup.peers))


def _decode(setup: Setup) -> Contest:
  """One query of each sequence against many keys: what counts is the bytes of the keys and values."""
  shape = Shape(2, 1, 256, 4, 2, 64) if setup.tokens < gpu_shapes.TOKENS else Shape(16, 1, 16_384, 32, 8, 128)
  given = Masking(shape.keys)
  entrants = [setup.entrant(who, "forward", shape, given)._replace(work={"bytes": shape.bytes}) for who in setup.names(0)]
  return Contest("masks", {"d": str(shape.width), "mask": "T = 1", "N": str(shape.keys)}, shape.arguments, entrants,
                 setup.effort, lambda: Exact(shape.arguments, backward=False), functools.partial(to_peer, setup.peers))


def ceilings(setup: Setup) -> Cases:
  return {"copy and matrix product": functools.partial(Ceilings, setup)}


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """How fast the device copies, and multiplies matrices of random bfloat16 numbers: what other numbers can be held against."""

  setup: Setup

  def prepare(self, begin: Begin, without: Sequence[str] = ()) -> Measure:
    del without  # none of this is ours to hang
    small = self.setup.tokens < gpu_shapes.TOKENS
    return functools.partial(self._measure, begin, 1 << 16 if small else 1 << 30, 256 if small else 8192)

  def _measure(self, begin: Begin, count: int, side: int) -> Rows:
    begin("ceilings")
    draw = jax.jit(lambda key, shape: jax.random.normal(jax.random.key(key), shape, jnp.bfloat16), static_argnums=1)
    negate, product = jax.jit(jnp.negative), jax.jit(jnp.matmul)
    x, a, b = draw(0, (count,)), draw(1, (side, side)), draw(2, (side, side))
    cases = {f"copy of {2 * count / 1e6:.0f} MB": (functools.partial(negate, x), "GB/s", 4 * count / 1e9),
             f"{side} x {side} x {side} product": (functools.partial(product, a, b), "TFLOP/s", 2 * side**3 / 1e12)}
    effort = self.setup.effort
    times = interleave({name: call for name, (call, _, _) in cases.items()}, repeats=effort.repeats, seconds=effort.seconds,
                       sample=SAMPLE)
    return [Result(part="ceilings", case={"what": name}, name="XLA", times=times[name], measured={rate: work / times[name].median})
            for name, (_, rate, work) in cases.items()]
