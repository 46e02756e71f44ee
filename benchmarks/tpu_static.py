"""How many bundles of instructions the TPU kernels take for a tile of scores, beside splash attention, with no TPU at hand.

    python -m benchmarks.tpu_static

Reads the schedules that libtpu's compiler makes (`benchmarks.tpu_schedule`). Writes `benchmarks/results/tpu-static.md` and `.png`,
or where `--out` says. `--record` writes `benchmarks/tpu_static.json`, too: what a test holds the kernels to.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jflash

from . import chips, options, report, tpu_schedule
from .tpu_schedule import Schedule

RECORD = pathlib.Path(__file__).with_suffix(".json")
WIDTHS = 64, 128, 256
LENGTH, HEADS = 4096, 2
UNIT = 512 * 512  # scores, for which bundles are counted
BLOCKS = 512, 1024  # of splash attention, rows and columns
UNITS = "MATMUL", "VALU", "XLU", "EUP", "VSTORE:SPILL"
OURS = {"jflash_forward": "forward", "jflash_dq": "dQ", "jflash_dkv": "dK, dV"}
SPLASH = {"splash_mha_fwd_residuals": "forward", "splash_mha_dq_no_residuals": "dQ", "splash_mha_dkv_no_residuals": "dK, dV"}
LEGEND = f"""\
bfloat16, causal, N = {LENGTH}, {HEADS} heads. full, partial: bundles for 512 x 512 scores in tiles without and with a mask, on the
path that finite numbers take; splash attention has one kind of tile. × splash: full, as a multiple of splash attention's with the
block size that suits it best. once: bundles for the first and the last tile of a row or column and for the grid, at most. MATMUL,
VALU, XLU, EUP: the share of that unit's slots that a full tile uses (matrix products, vector arithmetic, moves across lanes,
exponentials). spills: the share of the slots for vector stores that go to spills. A bundle is a cycle as long as nothing waits for
memory: that, and copies between chip and memory, are left out.
"""


def cases() -> dict[str, tuple[Callable, tuple]]:
  """Forward and backward, by who and at which width."""
  operand = lambda width: jax.ShapeDtypeStruct((HEADS, LENGTH, width), "bfloat16")
  splash = {f"splash {block} {width}": (_both(_splash(block)), (operand(width),) * 4) for width in WIDTHS for block in BLOCKS}
  return ours() | splash


def ours() -> dict[str, tuple[Callable, tuple]]:
  attend = functools.partial(jflash.attention, is_causal=True, implementation="tpu")
  operand = lambda width: jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), "bfloat16")
  return {f"jflash {width}": (_both(attend), (operand(width),) * 4) for width in WIDTHS}


def _both(attend: Callable) -> Callable:
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


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of one kernel on one chip: bundles for 512 x 512 scores, and the share of slots that units use in a full tile."""

  full: float
  partial: float | None
  once: float
  shares: Mapping[str, float]


def figures(schedule: Schedule, tile: int) -> Figures:
  """
  Args:
    schedule: of a kernel that has a step for partial tiles and one for full ones, or one step.
    tile: scores of a step.
  """
  steps = [UNIT / tile * step.bundles for step in schedule.steps]
  once = schedule.bundles - sum(step.bundles + step.rare for step in schedule.steps)
  shares = {unit: schedule.share(unit) for unit in UNITS if unit in schedule.capacity}
  return Figures(steps[-1], steps[0] if len(steps) > 1 else None, UNIT / tile * once, shares)


def measure(chip: str, make: str = "cases") -> dict[tuple[str, str, str], Figures]:
  """(who, width, kernel) -> figures; of jflash alone with `make` "ours"."""
  found = {}
  for case, several in tpu_schedule.schedules(f"benchmarks.tpu_static:{make}", chip).items():
    who, _, width = case.rpartition(" ")
    side = 512 if who == "jflash" else int(who.split()[1])  # `_plan.plan_tpu`'s, for these widths
    names = OURS if who == "jflash" else SPLASH
    found |= {(who, width, names[schedule.kernel]): figures(schedule, side**2) for schedule in several}
  return found


def rows(chip: str, found: Mapping[tuple[str, str, str], Figures]) -> list[report.Line]:
  kernels, made = list(OURS.values()), []
  for who, width, kernel in sorted(found, key=lambda key: (int(key[1]), kernels.index(key[2]), key[0])):
    f = found[who, width, kernel]
    columns = {"chip": chip, "d": width, "kernel": kernel, "": who, "full": f"{f.full:.0f}",
               "× splash": f"{f.full / _best(found, width, kernel):.2f}", "partial": report.text(f.partial, ".0f"),
               "once": f"{f.once:.0f}"}
    shares = {("spills" if unit == "VSTORE:SPILL" else unit): f"{share:.2f}" for unit, share in f.shares.items()}
    made.append(report.Line(name=who, columns=columns | shares))
  return made


def _best(found: Mapping[tuple[str, str, str], Figures], width: str, kernel: str) -> float:
  """Bundles of splash attention with the block size that suits it best."""
  return min(f.full for (who, *case), f in found.items() if who != "jflash" and case == [width, kernel])


def versions() -> str:
  """What bundles depend on besides the kernels."""
  return f"JAX {jax.__version__}, libtpu {tpu_schedule.libtpu_version()}"


def recorded() -> dict[str, dict[str, dict[str, list[int]]]]:
  """versions -> chip -> "width kernel" -> bundles of a full and of a partial tile."""
  return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def to_record(found: Mapping[tuple[str, str, str], Figures]) -> dict[str, list[int]]:
  return {f"{width} {kernel}": [round(f.full), round(f.partial)]
          for (who, width, kernel), f in found.items() if who == "jflash" and f.partial is not None}


def plot(path: pathlib.Path, found: Mapping[str, Mapping[tuple[str, str, str], Figures]]) -> None:
  """Bundles of a full tile as shares of splash attention's best, in a panel for each kernel."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, len(OURS), figsize=(11, 3.4), sharey=True, layout="constrained")
  for panel, kernel in zip(axes, OURS.values()):
    for n, width in enumerate(map(str, WIDTHS)):
      values = [table["jflash", width, kernel].full / _best(table, width, kernel) for table in found.values()]
      panel.bar([x + 0.27 * (n - 1) for x in range(len(found))], values, 0.25, color=f"C{n}", label=f"d = {width}")
    panel.axhline(1.0, color="0.3", linewidth=1)
    panel.set_title(f"{kernel}, full tiles")
    panel.set_xticks(range(len(found)), list(found))
  axes[0].set_ylabel("bundles, of splash attention's best")
  axes[0].legend(frameon=False)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = options.page_parser(__doc__, "tpu-static")
  parser.add_argument("--chips", type=options.words, default=list(chips.CHIPS), help="with commas between")
  parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
  args = parser.parse_args(argv)
  found = {chip: measure(chip) for chip in args.chips}
  header = {"Software": versions()} | options.command("tpu_static", argv)
  table = report.Table("", [row for chip, own in found.items() for row in rows(chip, own)], LEGEND)
  options.write(args.out, report.document("Bundles of TPU kernels", header, [table]), lambda path: plot(path, found))
  if args.record:
    tables = recorded() | {versions(): {chip: to_record(own) for chip, own in found.items()}}
    RECORD.write_text(json.dumps(tables, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
