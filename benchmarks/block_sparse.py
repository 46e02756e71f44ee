"""Time of block-sparse attention as a share of dense attention's, against the share of blocks that are kept.

    python -m benchmarks.block_sparse --length 16384 --heads 4 --width 64

Random tables of several densities, known while tracing and not, and the patterns of `jflash.block_sparse`, all in turns with
attention without a mask. Writes a table and a plot, `benchmarks/results/block-sparse-DEVICE.md` and `.png`, or where `--out` says.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jflash
from jflash import block_sparse, masks

from . import machine, options, report
from .timing import interleave

PASSES = ("forward", "forward + backward")
DENSE = "dense"
LEGEND = """\
kept: the share of blocks that are computed. table: known while tracing (static), an argument of the compiled function (traced), or
chosen from q and k in the same call, whose time counts. ms: median over the rounds, in which all took turns; ±%: half the distance
between the quartiles. of dense: the time as a share of that without a mask, median of each round's; ÷ kept: that share divided by
the share of blocks, 1 if the kept blocks alone took time, and no more than in dense attention. cores: how many were busy for it.
"""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """`mask(table, q, k)` with a `table` that is static, traced, or None where the mask needs none."""

  mask: Callable[[Any, Any, Any], Any]
  kept: float
  table: np.ndarray | None = None
  traced: bool = False
  kind: str = "static"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(report.Row):
  direction: str
  kept: float
  table: str
  share: float | None = None

  def key(self) -> dict[str, str]:
    return {"pass": self.direction, "pattern": self.name, "table": self.table}

  def values(self) -> dict[str, str]:
    return {"kept": f"{self.kept:.4f}", **self.time_cells(), "of dense": report.text(self.share, ".3f"),
            "÷ kept": report.text(self.share and self.share / self.kept, ".2f"),
            "cores": report.text(self.times and self.times.cores, ".1f"), **self.round_cells()}


def random_table(blocks: int, kept: int) -> np.ndarray:
  """`kept` blocks in each of `blocks` rows."""
  return np.random.default_rng(0).random((blocks, blocks)).argsort(axis=1) < kept


def candidates(length: int, block: int, shares: Sequence[int], patterns: bool) -> dict[str, Candidate]:
  """Name -> what is measured; the first is dense attention, then come random tables and, if wanted, the patterns."""
  blocks = -(-length // block)
  found = {DENSE: Candidate(lambda *_: None, 1.0)}
  of_table = lambda table, q, k: masks.BlockSparse(table, (block, block))
  for share in shares:
    table = random_table(blocks, max(1, blocks // share))
    for kind in ("static", "traced"):
      found[f"random 1/{share} {kind}"] = Candidate(of_table, float(table.mean()), table, kind == "traced", kind)
  return found | (_patterns(length, block) if patterns else {})


def _patterns(length: int, block: int) -> dict[str, Candidate]:
  blocks = -(-length // block)
  stride, k = max(1, blocks // 8), max(1, blocks // 16)
  presets = {"local_global(local=3)": block_sparse.local_global(length, length, block, local=3),
             "bigbird()": block_sparse.bigbird(length, length, block), "butterfly()": block_sparse.butterfly(length, length, block),
             f"strided(local=1, stride={stride})": block_sparse.strided(length, length, block, local=1, stride=stride)}
  found = {name: Candidate(lambda *_, mask=mask: mask, float(mask.table.mean())) for name, mask in presets.items()}
  choose = lambda _, query, key: block_sparse.top_k_blocks(query, key, k, block)
  return found | {f"top_k_blocks(k={k})": Candidate(choose, k / blocks, kind="chosen")}


def measure(found: dict[str, Candidate], args: argparse.Namespace, backward: bool) -> Iterator[Row]:
  """One row for each candidate, measured in turns."""
  inputs = _inputs(args, backward)
  calls = {}
  for name, candidate in found.items():
    table = jnp.asarray(candidate.table) if candidate.traced else None
    work = jax.jit(functools.partial(_work, candidate, args.implementation, backward))
    calls[name] = functools.partial(work.lower(table, *inputs).compile(), table, *inputs)
  times = interleave(calls, repeats=args.repeats, seconds=args.seconds)
  for name, candidate in found.items():
    yield Row(name=name.removesuffix(f" {candidate.kind}"), direction=PASSES[backward], kept=candidate.kept,
              table="" if name == DENSE else candidate.kind, times=times[name], share=1 / times[name].speedup(times[DENSE]))


def _work(candidate: Candidate, implementation: str | None, backward: bool, table: Any, q: Any, k: Any, v: Any, *dout: Any) -> Any:
  def forward(q, k, v):
    mask = candidate.mask(candidate.table if table is None else table, q, k)
    return jflash.attention(q, k, v, mask=mask, implementation=implementation)

  if not backward:
    return forward(q, k, v)
  out, pullback = jax.vjp(forward, q, k, v)
  return out, pullback(*dout)


def _inputs(args: argparse.Namespace, backward: bool) -> list[jax.Array]:
  """q, k, v and, for the backward pass, the cotangent of the output."""
  draw = np.random.default_rng(0).standard_normal
  heads = (args.heads, args.kv_heads or args.heads, args.kv_heads or args.heads, args.heads)
  return [jnp.asarray(draw((args.batch, args.length, n, args.width), np.float32), args.dtype) for n in heads[:4 if backward else 3]]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = options.parser(__doc__, "block-sparse")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--length", type=int, default=16384, help="T = S")
  parser.add_argument("--heads", type=int, default=4)
  parser.add_argument("--kv-heads", type=int, help="as many as --heads if not given")
  parser.add_argument("--width", type=int, default=64, help="of a head")
  parser.add_argument("--block", type=int, default=128, help="positions along a side of a block")
  parser.add_argument("--shares", type=options.integers, default=[16, 8, 4, 2, 1], help="n for random tables that keep 1/n")
  parser.add_argument("--patterns", action=argparse.BooleanOptionalAction, default=True, help="those of jflash.block_sparse too")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--implementation", help="of jflash")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = parse(argv)
  load = machine.load()
  found = candidates(args.length, args.block, args.shares, args.patterns)
  rows = []
  for backward in (False, True):
    for row in measure(found, args, backward):
      print(report.line(row), flush=True)
      rows.append(row)
  heads = f"N {args.heads}, K {args.kv_heads or args.heads}, H {args.width}"
  title = f"Block-sparse attention: B {args.batch}, T {args.length}, {heads}, {args.dtype}, blocks of {args.block}"
  header = machine.header() | load | options.command("block_sparse", argv)
  options.write(args.out, report.document(title, header, [report.Table("", rows, LEGEND)]),
                lambda path: plot(path, f"{title}\n{machine.device_name()}", rows))
  return 0


def plot(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
  """The share of dense attention's time against the share of blocks kept, for random tables."""
  looks = {"static": {"color": "C0", **report.STYLES[0]}, "traced": {"color": "C1", **report.STYLES[1]}}
  bound = {"color": "0.6", "linestyle": ":"}
  panels = []
  for direction in PASSES:
    here = [row for row in rows if row.direction == direction and row.name.startswith("random")]
    lines = [([(row.kept, row.share) for row in here if row.table == kind], look) for kind, look in looks.items()]
    ends = [(row.kept, row.kept) for row in here]
    panels.append(report.Panel(direction, "share of blocks kept", "share of dense attention's time", [*lines, (ends, bound)]))
  legend = {f"random blocks, {kind} table": look for kind, look in looks.items()}
  report.plot(path, title, [panels], legend | {"in proportion": bound})


if __name__ == "__main__":
  sys.exit(main())
