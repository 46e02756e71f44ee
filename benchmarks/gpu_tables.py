"""The page, the plot and the short table of what was measured on a GPU."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from . import gpu_shapes, gpu_variants, report
from .gpu_results import Result, of
from .report import NOTHING

LEGENDS = {
  "checks": """\
error: the largest norm(x - exact) / norm(exact) among the output and all gradients, and of which; exact is dense attention in
float64. Each check runs three times and fails unless all runs give the same bits.
""",
  "ceilings": "GB/s: bytes read and written. Random numbers, not zeros.\n",
  "speed": """\
bfloat16, 16,384 tokens in all, heads that make 2048 together. ms: median over the rounds, in which all took turns, each with 20 ms
of calls that were handed over at once and awaited once, rotating through several sets of random inputs; ±%: half the distance
between the quartiles. The backward pass alone: the function that `jax.vjp` returns. TFLOP/s: 4·B·H·N²·d operations, half as many
if causal, 2.5 times as many backward. × cuDNN: how many times faster, the median of the rounds' ratios. max error: of one head,
against float32, as a share of the largest number.
""",
  "masks": """\
As above. TFLOP/s count the pairs that are kept. of causal: the time for each score that is computed, those of skipped tiles left
out, as a multiple of the same with the causal mask in the same rounds.
""",
  "variants": "One kernel alone, N = 4096. of best: the best time as a share of this one.\n",
}
SHOWN = 8  # failures
HEADINGS = {"checks": "Correctness", "ceilings": "What the device can do", "speed": "Attention without and with the causal mask",
            "masks": "Masks, bias, one query", "variants": "Ways to cut the kernels up"}


def line(result: Result) -> str:
  """The row for a terminal, failures loud."""
  start = "FAIL " if result.failed else ""
  return f"{start}[{result.part}] {report.line(result)}"


def page(results: Sequence[Result], header: Mapping[str, str], widths: Sequence[int], title: str) -> str:
  """Markdown with a table for each part."""
  tables = [report.Table(HEADINGS[part], rows, LEGENDS[part]) for part in HEADINGS if (rows := _measured(results, part))]
  failures = "".join(f"- {line(result)}\n" for result in results if result.failed)
  parts = [report.document("Kernels for Hopper", header, tables)]
  lost = "".join(f"- [{result.part}] {result.case['case']}: {result.note}\n" for result in results if "case" in result.case)
  parts += [f"## Failures\n\n{failures}"] * bool(failures) + [f"## Not finished\n\n{lost}"] * bool(lost)
  if of(results, "variants"):
    parts.append(f"## Choice\n\n```python\n{gpu_variants.literal(results, widths, title)}\n```\n")
  return "\n".join(parts)


def _measured(results: Sequence[Result], part: str) -> list[Result]:
  """Rows of a table: without those of cases that came to nothing, which have columns of their own."""
  return [result for result in of(results, part) if "case" not in result.case]


def summary(results: Sequence[Result], widths: Sequence[int], title: str) -> str:
  """What matters, in less than 12,000 characters."""
  parts = [title, _speed_table(results), _mask_table(results), _ceilings(results)]
  if of(results, "variants"):
    parts.append(gpu_variants.literal(results, widths, title))
  if late := [result for result in results if "case" in result.case and not result.failed]:
    parts.append(f"not measured: {len(late)} cases, " + "; ".join(f"[{r.part}] {r.case['case']}: {r.note}" for r in late[:5]))
  failed = [line(result)[:250] for result in results if result.failed]
  checks = _measured(results, "checks")
  refused = sum(bool(check.note) and not check.failed for check in checks)
  parts += [f"and {len(failed) - SHOWN} more failures"] * (len(failed) > SHOWN) + failed[:SHOWN]
  parts.append(f"{sum(not check.failed for check in checks) - refused} of {len(checks)} checks passed, {refused} refused")
  return "\n\n".join(filter(None, parts))


def _speed_table(results: Sequence[Result]) -> str:
  """A line for each width, mask and N: our TFLOP/s and the ratio to the first peer, in both directions."""
  rows = of(results, "speed")
  found = {(r.case["d"], r.case["mask"], r.case["N"], r.case["pass"]): r for r in rows if r.name == "jflash" and r.times}
  keys = sorted({key[:3] for key in found}, key=lambda key: (int(key[0]), key[1], int(key[2])))
  if not keys:
    return ""
  columns = "".join(f" {direction + ' TFLOP/s':>17} {'x cuDNN':>8} {'error':>8}" for direction in gpu_shapes.PASSES)
  lines = [f"{'d':>4} {'mask':>7} {'N':>6}{columns}"]
  for key in keys:
    cells = [f"{key[0]:>4} {key[1]:>7} {key[2]:>6}"]
    for direction in gpu_shapes.PASSES:
      values = found[*key, direction].values() if (*key, direction) in found else {}
      widths = {"TFLOP/s": 17, "× cuDNN": 8, "max error": 8}
      cells += [f" {values.get(column, NOTHING):>{width}}" for column, width in widths.items()]
    lines.append("".join(cells))
  return "\n".join(lines)


def _mask_table(results: Sequence[Result]) -> str:
  rows = [r for r in _measured(results, "masks") if r.times and r.name.startswith("jflash") and not r.name.endswith(", causal")]
  wanted = ("ms", "TFLOP/s", "GB/s", "× cuDNN", "of causal")
  return "\n".join(f"d {r.case['d']:>3} {r.case['mask']:>12} N {r.case['N']:>5} {r.case['pass']:>8} {r.name:20} "
                   + ", ".join(f"{value} {column}" for column, value in r.values().items() if column in wanted and value != NOTHING)
                   for r in rows)


def _ceilings(results: Sequence[Result]) -> str:
  return "\n".join(report.line(result) for result in _measured(results, "ceilings"))


def plot(path: pathlib.Path, title: str, results: Sequence[Result]) -> None:
  """TFLOP/s against N: a row of diagrams for each direction, one for each width; dashed without a mask."""
  rows = [result for result in _measured(results, "speed") if result.times]
  if not rows:
    return
  names = report.unique(row.name for row in rows)
  widths = sorted({int(row.case["d"]) for row in rows})
  colours = {name: f"C{n}" for n, name in enumerate(names)}
  styles = dict(zip(("causal", "full"), report.STYLES))

  def lines(direction, width):
    for name in names:
      for mask, style in styles.items():
        some = [row for row in rows if (row.name, row.case["pass"], row.case["d"], row.case["mask"]) == (
            name, direction, str(width), mask)]
        yield [(int(row.case["N"]), row.measured["TFLOP/s"]) for row in some], {"color": colours[name], **style}

  panels = [[report.Panel(f"d = {width}" if first else "", "" if first else "N, tokens", f"{direction}, TFLOP/s",
                          list(lines(direction, width)), from_zero=True) for width in widths]
            for first, direction in zip((True, False), gpu_shapes.PASSES)]
  legend = {name: {"color": colours[name], "linewidth": 3} for name in names}
  legend |= {mask: {"color": "0.3", **style} for mask, style in styles.items()}
  report.plot(path, title, panels, legend)
