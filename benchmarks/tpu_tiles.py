"""What a visit costs the TPU kernels, by chip, width, dtype, pass and tile, with no TPU at hand: what tiles are chosen by.

    python -m benchmarks.tpu_tiles

compiles `jflash.attention` in each of `TILES` (`benchmarks.tpu_schedule`) and writes `jflash/_tiles_tpu_table.py`; one
process on a busy machine took an hour. With `--chips`, `--widths` or `--dtypes` it replaces those entries alone. A tile that does
not compile has no entry.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax

import jflash
from jflash import _tiles_tpu
from jflash._tiles_tpu import Cost

from . import chips, options, tpu_schedule
from .tpu_schedule import Schedule
from .tpu_static import KERNELS, LENGTH, OURS, UNIT, both, figures

PATH = pathlib.Path(_tiles_tpu.__file__).with_name("_tiles_tpu_table.py")
HEADS = 2
WIDTHS = 64, 128, 256
DTYPES = {"bfloat16": 2, "float32": 4}
# The largest take the compiler twenty seconds in bfloat16 and over a minute in float32, which nobody would wait for.
TILES: dict[str, list[tuple[int, int]]] = {"bfloat16": [(512, 512), (512, 1024), (1024, 512), (1024, 1024)],
                                           "float32": [(512, 512), (512, 1024), (1024, 512)]}
HEADER = '''\
"""Bundles of instructions of the TPU kernels by tile. Written by `benchmarks.tpu_tiles`, with JAX {jax}; not by hand.

(chip, width, bytes of an element, pass): {{(query rows, key columns): (a full tile, a partial one, one alone, once a row or
column)}}
"""

LIBTPU = "{libtpu}"  # whose compiler made them
TABLE: dict[tuple[str, int, int, str], dict[tuple[int, int], tuple[int, int, int, int]]] = {{
'''


def cases() -> dict[str, tuple[Callable, tuple]]:
  """Both passes with a causal mask, whose tiles are full and partial, by width, dtype and tile."""
  found: dict[str, tuple[Callable, tuple]] = {}
  for width, dtype in itertools.product(WIDTHS, DTYPES):
    for tile in TILES[dtype]:
      attend = functools.partial(jflash.attention, is_causal=True, implementation="tpu", tiles=tile)
      found[name(width, dtype, tile)] = both(attend), (jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), dtype),) * 4
  return found


def name(width: int, dtype: str, tile: tuple[int, int]) -> str:
  return f"{width} {dtype} {tile[0]} x {tile[1]}"


def cost(schedule: Schedule) -> Cost:
  """Of whole tiles."""
  f = figures(schedule, UNIT)
  partial = f.full if f.partial is None else f.partial
  return Cost(*map(round, (f.full, partial, partial if f.alone is None else f.alone, f.once)))


def measure(chip: str, width: int, dtype: str, tile: tuple[int, int]) -> dict[str, Cost]:
  """Pass -> cost; empty if it does not compile."""
  case = name(width, dtype, tile)
  try:
    kernels = tpu_schedule.schedules("benchmarks.tpu_tiles:cases", chip, only=case)[case]
  except RuntimeError as error:
    print(f"{chip} {case}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    return {}
  found = {OURS[kernel.kernel]: cost(kernel) for kernel in kernels}
  print(f"{chip} {case}: {found}", file=sys.stderr)
  return found


def text(table: _tiles_tpu.Table) -> str:
  """The module."""
  lines = [HEADER.format(jax=jax.__version__, libtpu=tpu_schedule.libtpu_version())]
  for key, costs in sorted(table.items()):
    lines.append(f"    {key}: {{\n".replace("'", '"'))
    lines += [f"        {tile}: {tuple(cost)},\n" for tile, cost in sorted(costs.items())]
    lines.append("    },\n")
  return "".join([*lines, "}\n"])


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--chips", type=options.words, default=list(chips.CHIPS), help="with commas between")
  parser.add_argument("--widths", type=options.integers, default=list(WIDTHS))
  parser.add_argument("--dtypes", type=options.words, default=list(DTYPES))
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--out", type=pathlib.Path, default=PATH)
  args = parser.parse_args(argv)
  table = dict(_tiles_tpu.TABLE)
  with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:  # each compiles in a process of its own
    for chip, width, dtype in itertools.product(args.chips, args.widths, args.dtypes):
      found = dict(zip(TILES[dtype], pool.map(functools.partial(measure, chip, width, dtype), TILES[dtype])))
      for kernel in KERNELS:
        table[chip, width, DTYPES[dtype], kernel] = {tile: costs[kernel] for tile, costs in found.items() if costs}
      args.out.write_text(text(table))
  return 0


if __name__ == "__main__":
  sys.exit(main())
