"""What one measurement on a GPU came to, as a row of a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import report
from .timing import Times

# part -> the columns of its table besides times, and how their numbers are written
COLUMNS: dict[str, dict[str, str]] = {
  "checks": {"error": ".1e", "of": "", "allowed": ".0e"},
  "ceilings": {"GB/s": ".4g", "TFLOP/s": ".3g"},
  "speed": {"TFLOP/s": ".3g", "× cuDNN": ".3f", "max error": ".1e"},
  "masks": {"TFLOP/s": ".3g", "GB/s": ".4g", "× cuDNN": ".3f", "of causal": ".2f", "max error": ".1e"},
  "variants": {"TFLOP/s": ".3g", "of best": ".3f"},
}
TIMED = ("ceilings", "speed", "masks", "variants")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(report.Row):
  """A row of the table of one part.

  Attributes:
    part: one of `COLUMNS`.
    case: column -> text: what was measured.
    measured: column -> number, or text.
    failed: whether it computed something wrong.
  """

  part: str
  case: Mapping[str, str]
  measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  failed: bool = False

  def key(self) -> dict[str, str]:
    return {**self.case, "implementation": self.name}

  def values(self) -> dict[str, str]:
    found = {column: self._text(column, form) for column, form in COLUMNS[self.part].items()}
    return {**self.time_cells(), **found, **self.round_cells()} if self.part in TIMED else found

  def _text(self, column: str, form: str) -> str:
    value = self.measured.get(column)
    return value if isinstance(value, str) else report.text(value, form)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, tree: Mapping[str, Any]) -> Result:
    times = tree["times"] and Times(**{name: tuple(values) for name, values in tree["times"].items()})
    return cls(**{**tree, "times": times})


def lost(part: str, case: str, note: str, failed: bool = False) -> Result:
  """The row of a case that came to nothing."""
  return Result(part=part, case={"case": case}, name="", note=note, failed=failed)


def of(results: Sequence[Result], part: str) -> list[Result]:
  return [result for result in results if result.part == part]
