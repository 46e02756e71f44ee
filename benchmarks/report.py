"""The table and the plot of measured rows: anything with the fields of `benchmarks.attention.Row`."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = ("pass", "dtype", "T", "implementation", "ms", "±%", "× jax.nn", "TFLOP/s", "temp MiB", "rounds")
# How the dtypes are told apart in the plot.
STYLES: tuple[dict[str, Any], ...] = (
  {"linestyle": "-", "marker": "o"},
  {"linestyle": "--", "marker": "s", "markerfacecolor": "white"},
  {"linestyle": ":", "marker": "^"},
)
LEGEND = """\
ms: median over the rounds, in which the implementations took turns; ±%: half the distance between the quartiles.
× jax.nn: how many times faster than the first measured `jax.nn.dot_product_attention` of the same case; below 1 slower.
TFLOP/s: 4·B·N·H flops a kept pair, 3.5 times that with the backward pass. temp MiB: temporary memory that the compiled
program asks for, beside its inputs and outputs.
"""


def cells(row: Any) -> tuple[str, ...]:
  """The row as text, one entry for each of `COLUMNS`."""
  times = row.times
  measured = ("—",) * 4 if times is None else (
    f"{1e3 * times.median:.3g}" if times.median < 1 else f"{1e3 * times.median:.0f}",
    f"{100 * times.spread:.0f}",
    "—" if row.speedup is None else f"{row.speedup:.2f}",
    f"{row.flops / times.median / 1e12:.3g}",
  )
  temp = "—" if row.temp_bytes is None else f"{row.temp_bytes / 2**20:.4g}"
  rounds = "—" if times is None else str(len(times.rounds))
  return (row.direction, row.dtype, str(row.length), row.name, *measured, temp, rounds)


def line(row: Any) -> str:
  """The row for a terminal."""
  named = [f"{value} {column}" for column, value in zip(COLUMNS[4:], cells(row)[4:]) if value != "—"]
  return "  ".join([f"{row.direction:18} {row.dtype:8} T {row.length:<6} {row.name:12}", *named, row.note]).rstrip()


def document(title: str, header: Mapping[str, str], rows: Sequence[Any]) -> str:
  """The markdown page: header, table, and why some rows have no time."""
  table = [COLUMNS, tuple("---" if i < 2 or i == 3 else "--:" for i in range(len(COLUMNS))), *map(cells, rows)]
  parts = [f"# {title}\n", "".join(f"- {name}: {value}\n" for name, value in header.items()),
           "".join("| " + " | ".join(entries) + " |\n" for entries in table), LEGEND]
  notes = dict.fromkeys(f"- {r.direction}, {r.dtype}, T {r.length}, {r.name}: {r.note}\n" for r in rows if r.note)
  if notes:
    parts.append("Not measured:\n\n" + "".join(notes))
  return "\n".join(parts)


def plot(path: pathlib.Path, title: str, rows: Sequence[Any]) -> None:
  """Time (above) and temporary memory (below) against T, both axes logarithmic: colour is who, line style is dtype."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  from matplotlib.lines import Line2D

  directions, names, dtypes = (_unique(getattr(r, field) for r in rows) for field in ("direction", "name", "dtype"))
  colours = {name: f"C{i}" for i, name in enumerate(names)}
  widths = {name: 3.2 if i == 0 else 1.5 for i, name in enumerate(names)}  # the first stays visible below the others
  styles = dict(zip(dtypes, STYLES))
  quantities = {
    "time, ms": lambda r: None if r.times is None else 1e3 * r.times.median,
    # A logarithmic axis has no zero: a program without temporary memory is drawn at 1 KiB.
    "temporary memory, MiB": lambda r: None if r.temp_bytes is None else max(r.temp_bytes / 2**20, 2**-10),
  }
  figure, axes = plt.subplots(len(quantities), len(directions), figsize=(5.2 * len(directions), 8.4), sharex=True,
                              sharey="row", squeeze=False, layout="constrained")
  for (label, quantity), row_axes in zip(quantities.items(), axes):
    for direction, axis in zip(directions, row_axes):
      for name in names:
        for dtype in dtypes:
          points = [(r.length, quantity(r)) for r in rows if (r.direction, r.name, r.dtype) == (direction, name, dtype)]
          points = sorted((x, y) for x, y in points if y is not None)
          if points:
            axis.plot(*zip(*points), color=colours[name], markersize=5, linewidth=widths[name], **styles[dtype])
      _frame(axis, sorted({r.length for r in rows}))
    row_axes[0].set_ylabel(label)
  for direction, top, bottom in zip(directions, axes[0], axes[-1]):
    top.set_title(direction, fontsize=11)
    bottom.set_xlabel("T, tokens")
  handles = [Line2D([], [], color=colours[name], linewidth=3, label=name) for name in names]
  handles += [Line2D([], [], color="0.3", markersize=5, label=dtype, **styles[dtype]) for dtype in dtypes]
  figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
  figure.suptitle(title, fontsize=12)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _frame(axis: Any, lengths: Sequence[int]) -> None:
  axis.set_xscale("log", base=2)
  axis.set_yscale("log")
  axis.set_xticks(lengths, [str(t) if t < 1024 or t % 1024 else f"{t // 1024}K" for t in lengths])
  axis.yaxis.set_major_formatter("{x:g}")
  axis.minorticks_off()
  axis.grid(True, color="0.9")
  axis.spines[["top", "right"]].set_visible(False)


def _unique(values: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(values))
