"""Pages and plots of measured rows, whatever was measured."""

import dataclasses
import gc
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from .timing import Times

NOTHING = "—"
# How the kinds of a line, such as its dtype, are told apart in a plot.
STYLES: tuple[dict[str, Any], ...] = (
  {"linestyle": "-", "marker": "o"},
  {"linestyle": "--", "marker": "s", "markerfacecolor": "white"},
  {"linestyle": ":", "marker": "^"},
  {"linestyle": "-.", "marker": "D", "markerfacecolor": "white"},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of a table: who, and how long it took; without `times`, `note` says why."""

  name: str
  times: Times | None = None
  note: str = ""

  def key(self) -> dict[str, str]:
    """column -> text, which together say what the row is about."""
    raise NotImplementedError

  def values(self) -> dict[str, str]:
    """column -> text of what was measured, `NOTHING` where it was not."""
    raise NotImplementedError

  def cells(self) -> dict[str, str]:
    return self.key() | self.values()

  def time_cells(self) -> dict[str, str]:
    """The median and the spread."""
    if self.times is None:
      return {"ms": NOTHING, "±%": NOTHING}
    return {"ms": f"{1e3 * self.times.median:.3g}" if self.times.median < 1 else f"{1e3 * self.times.median:.0f}",
            "±%": f"{100 * self.times.spread:.0f}"}

  def round_cells(self) -> dict[str, str]:
    return {"rounds": NOTHING if self.times is None else str(len(self.times.rounds))}


SomeRow = TypeVar("SomeRow", bound=Row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(Row):
  """A row of any columns, of something that was not timed."""

  columns: Mapping[str, str]

  def key(self) -> dict[str, str]:
    return {"": self.name}

  def values(self) -> dict[str, str]:
    return dict(self.columns)

  def cells(self) -> dict[str, str]:
    return self.values()


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of one kind; `heading` may be empty, `legend` explains the columns."""

  heading: str
  rows: Sequence[Row]
  legend: str


def text(value: float | None, form: str) -> str:
  return NOTHING if value is None else format(value, form)


def reason(error: Exception) -> str:
  """Why something could not be measured: the error's kind and its first line."""
  return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def case(row: Row) -> str:
  """The row's key in words; a number needs its column's name."""
  return ", ".join(f"{column} {value}" if _is_number(value) else value for column, value in row.key().items())


def line(row: Row) -> str:
  """The row for a terminal."""
  measured = [f"{value} {column}" for column, value in row.values().items() if value != NOTHING]
  return "  ".join([f"{case(row):48}", *measured, row.note]).rstrip()


def collect(parts: Iterable[Iterable[SomeRow]]) -> list[SomeRow]:
  """All rows, printed as they come; what one part has compiled and holds is let go before the next."""
  rows = []
  for part in parts:
    for row in part:
      print(line(row), flush=True)
      rows.append(row)
    jax.clear_caches()
    gc.collect()
  return rows


def document(title: str, header: Mapping[str, str], tables: Sequence[Table]) -> str:
  """The markdown page: header, tables, and why some rows have no time."""
  parts = [f"# {title}\n", "".join(f"- {name}: {value}\n" for name, value in header.items())]
  for table in tables:
    if table.heading:
      parts.append(f"## {table.heading}\n")
    parts += [_markdown([row.cells() for row in table.rows]), table.legend]
    notes = dict.fromkeys(f"- {case(row)}: {row.note}\n" for row in table.rows if row.note)
    if notes:
      parts.append("Not measured:\n\n" + "".join(notes))
  return "\n".join(parts)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
  """Columns of numbers are aligned to the right."""
  columns = list(rows[0])
  numbers = [all(row[column] == NOTHING or _is_number(row[column]) for row in rows) for column in columns]
  lines = [columns, ["--:" if number else "---" for number in numbers], *(row.values() for row in rows)]
  return "".join("| " + " | ".join(entries) + " |\n" for entries in lines)


def _is_number(value: str) -> bool:
  try:
    float(value)
  except ValueError:
    return False
  return True


@dataclasses.dataclass(frozen=True)
class Panel:
  """One diagram: points (x, y) joined to a line, and how it looks, for each line. Points without a y are left out.

  Both axes are logarithmic or neither; with `from_zero` a logarithmic panel has a linear y axis.
  """

  title: str
  xlabel: str
  ylabel: str
  lines: Sequence[tuple[Sequence[tuple[float, float | None]], Mapping[str, Any]]]
  logarithmic: bool = True
  from_zero: bool = False


def plot(path: pathlib.Path, title: str, panels: Sequence[Sequence[Panel]], legend: Mapping[str, Mapping[str, Any]],
         share: bool = True) -> None:
  """Rows of panels; `legend` is label -> look. With `share` all have one x axis, and those of a row one y axis."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  from matplotlib.lines import Line2D

  rows, columns = len(panels), len(panels[0])
  figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.2 * rows if rows > 1 else 5.2), sharex=share,
                              sharey="row" if share else False, squeeze=False, layout="constrained")
  ticks_of = lambda panels: sorted({x for panel in panels for points, _ in panel.lines for x, _ in points})
  for row, row_axes in zip(panels, axes):
    for panel, axis in zip(row, row_axes):
      for points, style in panel.lines:
        points = sorted((x, y) for x, y in points if y is not None)
        if points:
          axis.plot(*zip(*points), **{"markersize": 5, "linewidth": 1.5, **style})
      _frame(axis, ticks_of(itertools.chain(*panels) if share else [panel]), panel.logarithmic, panel.from_zero)
      axis.set_title(panel.title, fontsize=11)
      axis.set_xlabel(panel.xlabel)
      if not share or panel is row[0]:
        axis.set_ylabel(panel.ylabel)
  handles = [Line2D([], [], label=label, **{"markersize": 5, **style}) for label, style in legend.items()]
  figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
  figure.suptitle(title, fontsize=12)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _frame(axis: Any, ticks: Sequence[float], logarithmic: bool, from_zero: bool) -> None:
  if logarithmic:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(t) if t < 1024 or t % 1024 else f"{t // 1024}K" for t in ticks])
  else:
    axis.set_xlim(0)
  if logarithmic and not from_zero:
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
  else:
    axis.set_ylim(0)
  axis.grid(True, color="0.9")
  axis.spines[["top", "right"]].set_visible(False)


def unique(values: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(values))
