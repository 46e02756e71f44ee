"""Bytes that the attention kernels move between HBM and on-chip memory, counted from their grids and index maps.

    python -m benchmarks.io_ledger

Nothing is run, and no TPU is needed: see `ledger` for what is counted, and `io_counts` for where. Writes
`benchmarks/results/io-ledger.md` and `.png`, or where `--out` says.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from jflash import _plan

from . import io_counts, machine, options, report, standard
from .io_counts import ALL, PAPER, Point, Shape, Sparse, Walked
from .ledger import Ledger
from .report import Line, Table

GB = 1e9
MEASURED = {"standard attention": 40.3, "FlashAttention": 4.4}  # GB on an A100, Dao et al., arXiv:2205.14135, Figure 2, left
SETTING_LEGEND = """\
tiles: query rows x key columns. M: bytes of one block of each operand and of the scratch, of the kernel that needs most; the scores
of a tile are not in it. GB: 10⁹ bytes, moved by the kernels. 128 lanes: the same where a row of 64 takes the place of 128, as in a
TPU's memory. around: transposes and row sums outside of the kernels, each group of operations in one pass. × fewer: bytes of
standard attention over those of the kernels. Tiles of fewer than 128 rows are counted only: a TPU's compiler does not take them.
Measured: by the paper, on an A100; it does not say which passes its standard attention has.
"""
PASSES_LEGEND = """\
×: how many times an array is moved as a whole. A kernel's operands come in its own order, and with its own names: the list of
visits; whatever arrays the logits have; q, k, v; in the backward pass also dout, lse, δ. What is around the kernels is named by its
operations.
"""
FIT_LEGEND = """\
Exponents of bytes ≈ c · N^a · d^b · M^c by least squares of the logarithms, over all combinations of N, d and the sides of square
tiles: d {widths}; sides {sides}; one head, no mask. M is that of the kernel itself, and for all kernels the greatest.
"""
SPARSE_LEGEND = """\
Blocks of 128 x 128, of which a random share is kept; tiles are as large as the blocks. × density 1: share of the bytes of a full
table. The line is fitted to all but the first row, a mask that keeps nothing.
"""


WINDOW_LEGEND = """\
One head, d {width}, bfloat16, tiles of 512 x 512 and the passes that are used: from N = 28,672 on, dQ of all queries has no room
on chip and comes span by span, between which sums of dK and dV move, too. window: keys that a query sees, itself included;
causal: all up to itself. steps: of the grids. list: the longest list of visits, which lies in scalar memory; there is room for
{most} visits of 4 bytes.
"""


def window_table(width: int, found: Sequence[Walked]) -> Table:
  def row(x):
    return Line(name=x.direction, columns={
      "pass": x.direction, "window": "causal" if x.window is None else str(x.window), "N": str(x.length), "steps": str(x.steps),
      "MB": f"{x.bytes / 1e6:.1f}", "KiB for each query": f"{x.bytes / x.length / 2**10:.2f}",
      "list, KiB": f"{x.list_bytes / 2**10:.2f}"})

  ordered = sorted(found, key=lambda x: (x.direction != "forward", x.window or sys.maxsize, x.length))
  return Table("Windows", list(map(row, ordered)), WINDOW_LEGEND.format(width=width, most=_plan.MOST_VISITS))


def setting_table(shape: Shape, found: dict[str, Ledger]) -> Table:
  """The setting of the paper: `found` is tiles -> ledger."""
  sizes = dataclasses.astuple(shape)
  bare, unfused = (standard.total(steps, *sizes) for steps in (standard.BARE, standard.UNFUSED))

  def row(what, moved, tiles="", memory=None, around=None, lanes=None, compare=True):
    ratio = lambda than: f"{than / moved:.1f}" if compare else report.NOTHING
    gb = lambda size: report.text(size and size / GB, ".2f")
    return Line(name=what, columns={
      "what": what, "tiles": tiles or report.NOTHING, "M, KiB": report.text(memory and memory / 2**10, ".0f"), "GB": gb(moved),
      "128 lanes, GB": gb(lanes), "around, GB": gb(around), "× fewer than bare": ratio(bare), "than unfused": ratio(unfused)})

  rows = [row("standard, bare", bare), row("standard, unfused", unfused)]
  if shape == PAPER:
    rows += [row(f"{name}, measured", gb * GB, compare=False) for name, gb in MEASURED.items()]
  rows += [row("jflash", x.kernel_bytes, tiles, x.on_chip, x.around_bytes, sum(p.lane_bytes for p in x.kernels))
           for tiles, x in found.items()]
  return Table(_heading("Forward and backward", shape), rows, SETTING_LEGEND)


def standard_table(heading: str, steps: Sequence[standard.Step], shape: Shape) -> Table:
  sizes = dataclasses.astuple(shape)

  def row(name, reads, writes, squares, moved):
    return Line(name=name, columns={"pass": name, "reads": reads, "writes": writes, "N² arrays": str(squares),
                                    "GB": f"{moved / GB:.3f}"})

  rows = [row(step.name, step.reads, step.writes, step.squares, step.bytes(*sizes)) for step in steps]
  rows.append(row("**all**", "", "", sum(step.squares for step in steps), standard.total(steps, *sizes)))
  return Table(heading, rows, (standard.__doc__ or "").split("\n\n")[1])


def passes_table(heading: str, found: Ledger) -> Table:
  def row(what, array, block, times, moved):
    return Line(name=what, columns={"pass": what, "array": array, "block": block, "×": times, "GB": f"{moved / GB:.3f}"})

  rows = []
  for p in found.passes:
    if p.grid:
      rows.append(row(f"**{p.name}**", f"grid {_by(p.grid)}, M {p.on_chip / 2**10:.0f} KiB", "", "", p.bytes))
      rows += [row(direction, str(x), _by(x.block), f"{x.times:.4g}", x.bytes)
               for direction, operands in (("reads", p.reads), ("writes", p.writes)) for x in operands]
    else:
      arrays = [", ".join(x.text for x in operands) for operands in (p.reads, p.writes)]
      rows.append(row(f"around: {p.name}", " to ".join(arrays), "whole", "1", p.bytes))
  rows.append(row("**all**", "", "", "", found.kernel_bytes + found.around_bytes))
  return Table(heading, rows, PASSES_LEGEND)


def fit_table(fits: dict[str, list[Point]]) -> Table:
  """`fits`: lengths as text -> points."""
  rows = []
  for where, points in fits.items():
    for kernel in report.unique(p.kernel for p in points):
      found = io_counts.fit([p for p in points if p.kernel == kernel])
      rows.append(Line(name=kernel, columns={"N": where, "kernel": kernel, "N^": f"{found.length:.3f}", "d^": f"{found.width:.3f}",
                                             "M^": f"{found.on_chip:.3f}", "R²": f"{found.r2:.5f}"}))
  points = [p for some in fits.values() for p in some]
  text = lambda values: ", ".join(map(str, sorted(set(values))))
  return Table("Θ(N²d²/M)", rows, FIT_LEGEND.format(sides=text(p.side for p in points), widths=text(p.width for p in points)))


def sparse_table(length: int, width: int, rows: Sequence[Sparse]) -> Table:
  slope, intercept, r2 = io_counts.line(rows[1:])
  full = rows[-1].kernel_bytes
  cells = [Line(name=f"{r.density}", columns={"density": f"{r.density:.4f}", "MB": f"{r.kernel_bytes / 1e6:.1f}",
                                              "× density 1": f"{r.kernel_bytes / full:.4f}"}) for r in rows]
  fitted = f"MB = {slope / 1e6:.1f} · density + {intercept / 1e6:.1f}, R² = {r2:.6f}."
  return Table(f"Block-sparse masks: N {length}, d {width}, one head", cells, SPARSE_LEGEND + fitted + "\n")


def _heading(what: str, shape: Shape) -> str:
  return f"{what}: batch {shape.batch}, {shape.heads} heads, N {shape.length}, d {shape.width}, 2 bytes an element"


def _by(sizes: Sequence[int]) -> str:
  return " x ".join(map(str, sizes))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = options.page_parser(__doc__, "io-ledger")
  parser.add_argument("--lengths", type=options.integers, default=[4096, 16384, 65536], help="N of the fit")
  parser.add_argument("--short", type=options.integers, default=[256, 512, 1024], help="N of a second fit")
  parser.add_argument("--widths", type=options.integers, default=[128, 256, 512, 1024], help="d of the fits")
  parser.add_argument("--sides", type=options.integers, default=[64, 128, 256, 512], help="rows and columns of tiles of the fits")
  parser.add_argument("--setting", type=options.integers, default=list(dataclasses.astuple(PAPER)), metavar="B,T,N,H",
                      help="of the comparison with standard attention: batch, length, heads, width")
  parser.add_argument("--sparse-length", type=int, default=8192, help="N of the block-sparse masks")
  parser.add_argument("--densities", type=int, default=16, metavar="COUNT", help="of block-sparse masks, from 1/COUNT to 1")
  parser.add_argument("--window-lengths", type=options.integers, default=[8192, 16384, 32768, 65536, 131072], help="N of windows")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = parse(argv)
  shape = Shape(*args.setting)
  chosen, fitting = io_counts.chosen_tiles(shape), io_counts.best_tiles(shape, io_counts.A100_SM, [32, 64, 128, 256, 512])
  found = {tiles: io_counts.count(shape, tiles) for tiles in dict.fromkeys([fitting, (128, 128), (256, 256), chosen])}
  rows = io_counts.block_sparse(args.sparse_length, 64, [n / args.densities for n in range(args.densities + 1)])
  fits = {", ".join(map(str, n)): io_counts.sweep(n, args.widths, args.sides) for n in (args.lengths, args.short)}
  roles = {fitting: ", best within 192 KiB", chosen: ", used"}
  tables = [
    fit_table(fits), setting_table(shape, {_by(t) + roles.get(t, ""): x for t, x in found.items()}),
    passes_table(f"Passes of jflash, tiles of {_by(chosen)}", found[chosen]),
    passes_table(f"Passes of jflash, tiles of {_by(fitting)}", found[fitting]),
    standard_table("Passes of standard attention, bare", standard.BARE, shape),
    standard_table("Passes of standard attention, unfused", standard.UNFUSED, shape),
    sparse_table(args.sparse_length, 64, rows),
    window_table(128, [x for n in args.window_lengths for w in (1024, None) for x in io_counts.walked(n, w)])]
  header = {"Counted": "no device was used"} | machine.software() | options.command("io_ledger", argv)
  points = [p for some in fits.values() for p in some if p.kernel == ALL]
  options.write(args.out, report.document("Bytes moved by the TPU kernels, forward and backward", header, tables),
                lambda path: plot(path, points, rows, args.sparse_length))
  return 0


def plot(path: pathlib.Path, points: Sequence[Point], sparse: Sequence[Sparse], sparse_length: int) -> None:
  """Bytes against M, N, d and density, with what the theorem says as a grey line."""
  ends = lambda field: (max(getattr(p, field) for p in points), min(getattr(p, field) for p in points))
  (longest, shortest), (_, width), (coarse, fine) = ends("length"), ends("width"), ends("side")
  shortest = max([n for n in {p.length for p in points} if n <= 1024], default=shortest)
  look = dict(zip(("longest", "shortest", "fine", "coarse"), ({"color": f"C{i}", **report.STYLES[i]} for i in range(4))))
  grey, dashed = {"color": "0.6", "linewidth": 1}, {"color": "C5", "linestyle": "--"}

  def series(x, **fixed):
    some = [p for p in points if all(getattr(p, name) == value for name, value in fixed.items())]
    return sorted((x(p), p.bytes / GB) for p in some)

  def guide(line, slope):
    """A power of x through the last point of a line."""
    x, y = line[-1]
    return [(at, y * (at / x)**slope) for at, _ in line], grey

  memory = [series(lambda p: round(p.on_chip / 2**10), length=n, width=width) for n in (longest, shortest)]
  length = [series(lambda p: p.length, width=width, side=side) for side in (fine, coarse)]
  dense = [(n, standard.total(standard.BARE, 1, n, 1, width) / GB) for n, _ in length[0]]
  same = [p for p in points if p.length == longest and p.side * p.width == coarse * width]
  widths = sorted((p.width, p.bytes / GB) for p in same)
  slope, intercept, _ = io_counts.line(sparse[1:])
  fitted = [(r.density, (slope * r.density + intercept) / GB) for r in sparse]
  panels = [
    [report.Panel(f"d {width}: bytes ∝ 1/M", "M, KiB", "GB", [
       *(guide(line[::-1], -1) for line in memory), (memory[0], look["longest"]),
       (memory[1], look["shortest"])]),
     report.Panel(f"d {width}: bytes ∝ N²", "N", "GB", [
       *(guide(line, 2) for line in length), (length[0], look["fine"]), (length[1], look["coarse"]), (dense, dashed)])],
    [report.Panel(f"tiles such that M is {_span(same)} KiB: bytes ∝ d²", "d", "GB", [guide(widths, 2), (widths, look["longest"])]),
     report.Panel(f"blocks of {io_counts.BLOCK}, N {sparse_length}: bytes ∝ density", "share of blocks kept", "GB", [
       (fitted, grey), ([(r.density, r.kernel_bytes / GB) for r in sparse], {"color": "0.2", "marker": "o", "linestyle": ""})],
                  logarithmic=False)]]
  names = {"longest": f"N {longest}", "shortest": f"N {shortest}", "fine": f"tiles {fine} x {fine}",
           "coarse": f"tiles {coarse} x {coarse}"}
  legend = {names[key]: style for key, style in look.items()} | {"standard, bare": dashed, "in proportion": grey}
  report.plot(path, "Bytes between HBM and on-chip memory, forward and backward, one head, counted from the index maps", panels,
              legend, share=False)


def _span(points: Sequence[Point]) -> str:
  sizes = sorted(round(p.on_chip / 2**10) for p in points)
  return f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


if __name__ == "__main__":
  sys.exit(main())
