"""What the benchmarks' command lines share."""

import argparse
import os
import pathlib
from collections.abc import Callable, Sequence

from . import machine


def words(text: str) -> list[str]:
  return text.split(",")


def integers(text: str) -> list[int]:
  return [int(word) for word in words(text)]


def page_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
  """For whatever writes a page; the first line of `doc` describes it."""
  made = argparse.ArgumentParser(description=(doc or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  made.add_argument("--out", type=pathlib.Path, help="where to write, without .md and .png",
                    default=pathlib.Path("benchmarks/results") / name)
  return made


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
  """With the options that everything timed has besides."""
  made = page_parser(doc, f"{name}-{machine.slug()}")
  made.add_argument("--repeats", type=int, default=30, help="rounds at most")
  made.add_argument("--seconds", type=float, default=10.0, help="that one case may take, after compiling")
  made.add_argument("--memory-limit", type=float, default=machine.memory() * 0.6 / 2**30, metavar="GIB",
                    help="what needs more temporary memory is not run")
  return made


def command(name: str, argv: Sequence[str]) -> dict[str, str]:
  """The command, for the header of a page."""
  return {"Command": "`" + " ".join([f"python -m benchmarks.{name}", *argv]) + "`"}


def write(out: pathlib.Path, page: str, plot: Callable[[pathlib.Path], None]) -> None:
  """The page to `out`.md and the plot, if there is anything to draw, to `out`.png."""
  out.parent.mkdir(parents=True, exist_ok=True)
  path = out.with_name(out.name + ".md")
  path.write_text(page)
  plot(out.with_name(out.name + ".png"))
  print(f"{os.path.relpath(path)} and .png written")
