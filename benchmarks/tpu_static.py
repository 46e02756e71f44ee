"""How many bundles of instructions the TPU kernels take for a tile of scores, beside JAX's own two, with no TPU at hand.

    python -m benchmarks.tpu_static

Reads the schedules that libtpu's compiler makes (`benchmarks.tpu_schedule`). Writes `benchmarks/results/tpu-static.md` and `.png`,
or where `--out` says.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jflash
from jflash import _api, _plan, _tiles_tpu
from jflash._tiles_tpu import CORES, PRODUCTS

from . import chips, jaxprs, ledger, options, report, tpu_schedule
from .tpu_schedule import Schedule

WIDTHS = 64, 128, 256
LENGTH, HEADS = 4096, 2
UNIT = 512 * 512  # scores, for which bundles are counted
BLOCKS = 512, 1024  # of splash attention, rows and columns
UNITS = "MATMUL", "VALU", "XLU", "EUP", "VSTORE:SPILL"
KERNELS = _tiles_tpu.PASSES
HALVES = "dQ", "dK/dV"  # kernels of a backward pass that has two, which compute P and dP both
WORK = PRODUCTS | dict(zip(HALVES, (3, 4)))  # products of tiles
OURS = {"jflash_forward": "forward", "jflash_backward": "backward", "jflash_dq": "dQ", "jflash_dkv": "dK/dV"}
THEIRS = {"splash_mha_fwd": "forward", "splash_mha_dq": "dQ", "splash_mha_dkv": "dK/dV", "jvp_jit_flash_attention": "forward",
          "flash_mha_bwd_dq": "dQ", "flash_mha_bwd_dkv": "dK/dV"}  # as kernels' names begin
LONG = {"jflash, spans": 2, "jflash, two kernels": 0}
MASKS: Mapping[str, dict[str, Any]] = {
    "full": {}, "causal": {"is_causal": True}, "window": {"local_window_size": (1024, 0)}, "segments": {}}
LEGEND = f"""\
bfloat16, N = {LENGTH}, {HEADS} heads. tiles: query rows x key columns; ours are those that are chosen. full, partial, alone:
bundles for 512 x 512 scores in tiles without a mask, with one, and with one at the end of a row that has an odd number of
tiles, on the path that finite numbers take; JAX's two have one kind of tile. backward: ours is one kernel, which keeps dQ on
chip, of all queries or, where there are too many, of a span of them at a time; where one tile of all heads of a group is too
much, and in JAX's two, it is two, dQ and dK/dV, which have rows of their own. × splash: full, as a multiple of splash
attention's (causal) with the block size that suits it best. × its kernel: the same with all of the code in its kernels. once:
bundles for the first and the last tile of a row or column, for the grid, and, ours, to see whether V is finite before a tile
with a mask; at most. MATMUL, VALU, XLU, EUP: the share of that unit's slots that a full tile uses (matrix products, vector
arithmetic, moves across lanes, exponentials). spills: the share of the slots for vector stores that go to spills.

VMEM: a block of each operand, and scratch; what is loaded ahead has a second one, and the scores of a tile come on top.
KiB: what a full tile brings from memory, for 512 x 512 scores. TFLOP/s: what a core would reach on full tiles by the largest
of bundles / clock, KiB / bandwidth and the time of the products that it computes at the matrix units' peak (bundles may be
packed closer than those take them), where 2 products count forward, 5 backward, 3 in dQ and 4 in dK/dV; of peak: as a share
of that. Left out: the waits of products and copies that start late, contention for memory, power, and the steps above that
are taken once. Clocks are peak / (operations that the matrix units do in a cycle). Segments are ids in arrays; which tiles
they empty is known at run time only.
"""


def cases() -> dict[str, tuple[Callable, tuple]]:
  """Forward and backward, by who, which mask and which width."""
  operand = lambda width: jax.ShapeDtypeStruct((HEADS, LENGTH, width), "bfloat16")
  splash = {f"splash {block} causal {width}": (both(_splash(block)), (operand(width),) * 4)
            for width in WIDTHS for block in BLOCKS}
  in_batch = lambda width: jax.ShapeDtypeStruct((1, HEADS, LENGTH, width), "bfloat16")
  flash = {f"flash {block} causal {width}": (both(_flash(block)), (in_batch(width),) * 4) for width in WIDTHS for block in BLOCKS}
  others = {case: run for mask in MASKS if mask != "causal" for case, run in ours(mask).items()}
  return ours() | others | long() | splash | flash


def ours(mask: str = "causal") -> dict[str, tuple[Callable, tuple]]:
  attend = functools.partial(jflash.attention, **_options(mask), implementation="tpu")
  operand = lambda width: jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), "bfloat16")
  return {f"jflash {mask} {width}": (both(attend), (operand(width),) * 4) for width in WIDTHS}


def long() -> dict[str, tuple[Callable, tuple]]:
  """The backward pass, causal, as it is where there are more queries than dQ has room for on chip, or too many heads of a group."""
  def forced(fun, spans):
    def run(*args):
      with _plan.force_passes(2, spans):
        return fun(*args)
    return run

  return {case.replace("jflash", who): (forced(fun, spans), args)
          for who, spans in LONG.items() for case, (fun, args) in ours().items()}


def _options(mask: str) -> dict[str, Any]:
  ids = lambda: jnp.zeros((1, LENGTH), "int32")
  return MASKS[mask] | ({"query_segment_ids": ids(), "key_value_segment_ids": ids()} if mask == "segments" else {})


def both(attend: Callable) -> Callable:
  def run(q, k, v, dout):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(dout)
  return run


def _splash(block: int) -> Callable:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask
  sizes: Any = kernel.BlockSizes
  sizes = sizes(**{field.name: block for field in dataclasses.fields(sizes) if field.name.startswith("block_")})
  causal = mask.MultiHeadMask([mask.CausalMask((LENGTH, LENGTH))] * HEADS)
  return kernel.make_splash_mha_single_device(causal, block_sizes=sizes)


def _flash(block: int) -> Callable:
  """Blocks of 1024 come and are computed in halves, as that attention has it by default."""
  from jax.experimental.pallas.ops.tpu import flash_attention as module
  within = {name: min(block, 512) for name in ("block_k", "block_k_dkv", "block_q_dkv", "block_k_dq")}
  sizes = dict.fromkeys([f.name for f in dataclasses.fields(module.BlockSizes)], block) | within | {"block_b": 1}
  return functools.partial(module.flash_attention, causal=True, block_sizes=module.BlockSizes(**sizes))


def _pass_of(kernel: str) -> str:
  """Of a kernel by its name."""
  return next(name for start, name in (OURS | THEIRS).items() if kernel.startswith(start))


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of a pass on one chip: bundles for 512 x 512 scores, the share of slots that units use in a full tile, and what it loads."""

  full: float
  partial: float | None
  alone: float | None
  once: float
  shares: Mapping[str, float]
  loaded: float  # bytes for 512 x 512 scores
  products: int = 0  # of tiles, as many as are computed
  tiles: str = ""

  def __add__(self, other: Figures) -> Figures:
    """Of two kernels, one after the other."""
    weigh = lambda a, b: (self.full * a + other.full * b) / (self.full + other.full)
    partial = None if self.partial is None or other.partial is None else self.partial + other.partial
    return Figures(self.full + other.full, partial, None, self.once + other.once,
                   {unit: weigh(share, other.shares[unit]) for unit, share in self.shares.items()},
                   self.loaded + other.loaded, self.products + other.products, self.tiles)


def figures(schedule: Schedule, tile: int, loaded: float = 0.0) -> Figures:
  """
  Args:
    schedule: of a kernel with one step for all tiles, or of one of ours: a step for partial tiles and one for full ones; or for two
      full ones at once and one alone; or for two full ones, for two with a mask, for one with a mask, and those for values that are
      not finite.
    tile: scores of a tile.
    loaded: bytes that come from memory with a tile.
  """
  steps = [UNIT / tile * step.bundles for step in schedule.steps]
  once = schedule.bundles - sum(step.bundles + step.rare for step in schedule.steps)
  if len(steps) == 5:
    full, (whole, partial, alone) = 0, (steps[0] / 2, steps[1] / 2, steps[2])
  elif len(steps) == 2 and schedule.steps[0].use["MATMUL"] > 1.5 * schedule.steps[1].use["MATMUL"]:
    full, (whole, partial, alone) = 0, (steps[0] / 2, None, steps[1])
  else:
    full, (whole, partial, alone) = len(steps) - 1, (steps[-1], steps[0] if len(steps) > 1 else None, None)
  shares = {unit: schedule.share(unit, full) for unit in UNITS if unit in schedule.capacity}
  return Figures(whole, partial, alone, UNIT / tile * once, shares, UNIT / tile * loaded)


def chosen(chip: str, mask: str, width: int) -> dict[str, tuple[int, int]]:
  """Pass -> the tiles of ours."""
  found = []

  def record(q):
    plan = _plan.plan_tpu(_api.make_problem(q, q, q, **_options(mask)))
    found.append({"forward": plan.tiles, "backward": plan.backward_tiles or plan.tiles})

  with jax.default_device(chips.device(chip)):
    jax.eval_shape(record, jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), "bfloat16"))
  return found[0]


def measure(chip: str, make: str = "cases") -> dict[tuple[str, str, str, str], Figures]:
  """(who, mask, width, pass) -> figures; of jflash with a causal mask alone with `make` "ours"."""
  found: dict[tuple[str, str, str, str], Figures] = {}
  for case, several in tpu_schedule.schedules(f"benchmarks.tpu_static:{make}", chip).items():
    *words, mask, width = case.split()
    who = " ".join(words)
    tiles = chosen(chip, mask, int(width)) if words[0].startswith("jflash") else dict.fromkeys(KERNELS, (int(words[1]),) * 2)
    for schedule in several:
      kernel = _pass_of(schedule.kernel)
      if who in LONG and kernel == "forward":  # as of any length
        continue
      rows, columns = tiles["backward" if kernel in HALVES else kernel]
      # Two operands a tile: keys and values, or queries and cotangents, whichever the grid does not keep. Statistics are small.
      one = figures(schedule, rows * columns, 2 * (columns if kernel in ("forward", "dQ") else rows) * int(width) * 2)
      one = dataclasses.replace(one, tiles=f"{rows} x {columns}", products=WORK[kernel])
      found[who, mask, width, kernel] = one
      if kernel in HALVES:
        key = who, mask, width, "backward"
        found[key] = found[key] + one if key in found else one
  return found


def on_chip(chip: str) -> dict[tuple[str, str], int]:
  """(case, pass) -> bytes in VMEM for a block of each operand and for scratch, of the kernel that has most."""
  found: dict[tuple[str, str], int] = {}
  made = cases()
  with jax.default_device(chips.device(chip)):
    for case, (fun, args) in made.items():
      calls = [x for x in jaxprs.trace(fun, *args).operations if x.name == jaxprs.KERNEL]
      unnamed = "forward", "dK/dV", "dQ"  # as JAX's flash attention has its kernels
      for call, which in zip(calls, unnamed):
        kernel = _pass_of(call.params["name"]) if call.params["name"] else which
        for name in (kernel, "backward") if kernel in HALVES else (kernel,):
          found[case, name] = max(found.get((case, name), 0), ledger.on_chip(call))
  return found


def rows(chip: str, found: Mapping[tuple[str, str, str, str], Figures]) -> list[report.Line]:
  made, core, blocks = [], CORES[chip], on_chip(chip)
  for who, mask, width, kernel in sorted(found, key=lambda key: (int(key[2]), list(WORK).index(key[3]), key[0], key[1])):
    f, best = found[who, mask, width, kernel], _best(found, width, kernel)
    whole = _best(found, width, kernel, whole=True)
    work = WORK[kernel] * 2 * UNIT * int(width)
    cycles = core.products(f.products, UNIT, int(width))
    seconds = max(max(f.full, cycles) / core.clock, f.loaded / core.bandwidth)
    columns = {"chip": chip, "d": width, "pass": kernel, "": who, "mask": mask, "tiles": f.tiles, "full": f"{f.full:.0f}",
               "× splash": f"{f.full / best.full:.2f}", "× its kernel": f"{f.full / (whole.full + whole.once):.2f}",
               "partial": report.text(f.partial, ".0f"), "alone": report.text(f.alone, ".0f"), "once": f"{f.once:.0f}"}
    shares = {("spills" if unit == "VSTORE:SPILL" else unit): f"{share:.2f}" for unit, share in f.shares.items()}
    model = {"VMEM, KiB": f"{blocks[f'{who} {mask} {width}', kernel] / 1024:.0f}", "KiB": f"{f.loaded / 1024:.0f}",
             "TFLOP/s": f"{work / seconds / 1e12:.0f}",
             "of peak": f"{work / seconds / core.peak:.2f}"}
    made.append(report.Line(name=who, columns=columns | shares | model))
  return made


def _best(found: Mapping[tuple[str, str, str, str], Figures], width: str, kernel: str, whole: bool = False) -> Figures:
  """Of splash attention with the block size that suits it best, by its steps or by all of its code."""
  return min((f for (who, _, *case), f in found.items() if who.startswith("splash") and case == [width, kernel]),
             key=lambda f: f.full + whole * f.once)


def versions() -> str:
  """What bundles depend on besides the kernels."""
  return f"JAX {jax.__version__}, libtpu {tpu_schedule.libtpu_version()}"


def plot(path: pathlib.Path, found: Mapping[str, Mapping[tuple[str, str, str, str], Figures]]) -> None:
  """Bundles of a full tile as shares of splash attention's best, in a panel for each pass."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, len(KERNELS), figsize=(9, 3.4), sharey=True, layout="constrained")
  for panel, kernel in zip(axes, KERNELS):
    for n, width in enumerate(map(str, WIDTHS)):
      values = [table["jflash", "causal", width, kernel].full / _best(table, width, kernel).full for table in found.values()]
      panel.bar([x + 0.27 * (n - 1) for x in range(len(found))], values, 0.25, color=f"C{n}", label=f"d = {width}")
    panel.axhline(1.0, color="0.3", linewidth=1)
    panel.set_title(f"{kernel}, full tiles")
    panel.set_xticks(range(len(found)), list(found))
  axes[0].set_ylabel("bundles, of splash attention's best")
  axes[0].set_ylim(0, 1.25)
  axes[0].legend(frameon=False, ncols=3, loc="upper center")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = options.page_parser(__doc__, "tpu-static")
  parser.add_argument("--chips", type=options.words, default=list(chips.CHIPS), help="with commas between")
  args = parser.parse_args(argv)
  found = {chip: measure(chip) for chip in args.chips}
  header = {"Software": versions()} | options.command("tpu_static", argv)
  table = report.Table("", [row for chip, own in found.items() for row in rows(chip, own)], LEGEND)
  options.write(args.out, report.document("Bundles of TPU kernels", header, [table]), lambda path: plot(path, found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
