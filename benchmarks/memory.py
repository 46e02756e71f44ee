"""Temporary memory of attention, forward and backward, against N, as the compilers for a TPU and for the CPU plan it.

    python -m benchmarks.memory

Programs are compiled and not run, and no TPU is needed. The shape is that of Table 21 of Dao et al., arXiv:2205.14135, whose own
numbers are set beside. Writes `benchmarks/results/memory.md` and `.png`, or where `--out` says.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jflash

from . import chips, machine, options, report

BATCH, HEADS, WIDTH = 16, 8, 64
MIB = 2**20
# MB on an A100 with 40 GB, float16, for N = 128, 256, …: Table 21.
PAPER = {"PyTorch": (36, 104, 336, 1184, 4416, 17024), "FlashAttention": (22, 44, 104, 209, 418, 836, 1672, 3344, 6688, 13376)}
PAPER_LENGTHS = [128 << n for n in range(10)]
CPU = "cpu"
LEGEND = f"""\
MiB of temporary memory beside inputs and outputs: batch {BATCH}, {HEADS} heads, d {WIDTH}, forward and backward, not causal. naive:
einsum, softmax in float32, einsum. ×: over the row above. In brackets: the compiler refuses, as the chip has less than it would
need.
"""
PAPER_LEGEND = """\
PyTorch, FlashAttention: MB that the paper measured in runs on an A100 with 40 GB, float16, where PyTorch ran out of memory from
8192 on; not what is beside inputs and outputs, so that slopes compare and values do not.
"""


def naive(q: Any, k: Any, v: Any) -> Any:
  """Attention by its definition, with the probabilities in memory."""
  s = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1]**-0.5
  p = jax.nn.softmax(s.astype(jnp.float32)).astype(q.dtype)
  return jnp.einsum("bnts,bsnh->btnh", p, v)


def candidates(target: str) -> dict[str, Callable]:
  """name -> attention function of (q, k, v)."""
  ours = functools.partial(jflash.attention, implementation="xla" if target == CPU else "tpu")
  return {"naive": naive, "jax.nn": jax.nn.dot_product_attention, "jflash": ours}


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of temporary memory, as the compiler reports them or, if `refused`, as it says that it would have to have."""

  bytes: float | None
  refused: str = ""


def temporary(function: Callable, target: str, dtype: str, length: int, batch: int = BATCH) -> Need:
  """What forward and backward of `function` need; `target` is one of `chips.CHIPS`, or "cpu"."""
  def both(q, k, v, dout):
    out, pullback = jax.vjp(function, q, k, v)
    return out, pullback(dout)

  x = jax.ShapeDtypeStruct((batch, length, HEADS, WIDTH), dtype)
  try:
    compiled = jax.jit(both).lower(*[x] * 4).compile() if target == CPU else chips.compile_for(target, both, *[x] * 4)
  except jax.errors.JaxRuntimeError as error:
    return Need(wanted(str(error)), report.reason(error))
  analysis = compiled.memory_analysis()
  return Need(None, "this compiler does not say") if analysis is None else Need(analysis.temp_size_in_bytes)


def wanted(message: str) -> float | None:
  """The bytes in the message of a compiler that ran out of a chip's memory."""
  found = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
  return float(found[1]) * 2.0**(10 * (1 + "KMGT".index(found[2]))) if found else None


def measure(target: str, dtype: str, lengths: Sequence[int]) -> dict[str, list[Need]]:
  """name -> needs, one for each of `lengths`; prints as it goes."""
  needs = {name: [] for name in candidates(target)}
  for length in lengths:
    for name, function in candidates(target).items():
      needs[name].append(temporary(function, target, dtype, length))
      print(f"{target} {dtype} N {length} {name}: {_cell(needs[name][-1])} MiB", flush=True)
    jax.clear_caches()
  return needs


def table(heading: str, lengths: Sequence[int], needs: dict[str, list[Need]], paper: bool) -> report.Table:
  """`paper`: whether to set the paper's numbers beside."""
  rows = []
  for n, length in enumerate(lengths):
    columns = {"N": str(length)}
    for name, column in needs.items():
      before, after = (column[m].bytes for m in (max(n - 1, 0), n))
      columns |= {name: _cell(column[n]), f"{name} ×": f"{after / before:.2f}" if n and before and after else report.NOTHING}
    for name, measured in PAPER.items() if paper else ():
      columns[f"{name}, A100"] = report.text(dict(zip(PAPER_LENGTHS, measured)).get(length), "d")
    rows.append(report.Line(name=str(length), columns=columns))
  return report.Table(heading, rows, LEGEND + (PAPER_LEGEND if paper else ""))


def _cell(need: Need) -> str:
  if need.bytes is None:
    return need.refused
  value = f"{need.bytes / MIB:.1f}" if need.bytes < 100 * MIB else f"{need.bytes / MIB:.0f}"
  return f"({value})" if need.refused else value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = options.page_parser(__doc__, "memory")
  parser.add_argument("--lengths", type=options.integers, default=PAPER_LENGTHS, help="N, with commas between")
  parser.add_argument("--targets", type=options.words, default=["v5p:bfloat16", "cpu:bfloat16", "cpu:float32"],
                      help=f"device:dtype; the devices are {', '.join(chips.CHIPS)} and {CPU}")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = parse(argv)
  found = {}
  for name in args.targets:
    target, _, dtype = name.partition(":")
    found[f"{'TPU ' if target != CPU else ''}{target}, {dtype}".replace(CPU, "CPU")] = measure(target, dtype, args.lengths)
  tables = [table(heading, args.lengths, needs, paper=n == 0) for n, (heading, needs) in enumerate(found.items())]
  header = {"Compiled, not run, for": ", ".join(found)} | machine.software()
  header |= {"Compilers": machine.versions("libtpu", "jaxlib")} | options.command("memory", argv)
  options.write(args.out, report.document("Temporary memory of attention, forward and backward", header, tables),
                lambda path: plot(path, args.lengths, found))
  return 0


def plot(path: pathlib.Path, lengths: Sequence[int], found: dict[str, dict[str, list[Need]]]) -> None:
  """Memory against N for each target; hollow where the compiler refused. A program without temporary memory is not drawn."""
  colours = {"naive": "C3", "jax.nn": "C0", "jflash": "C1"}
  widths = {"naive": 3.2, "jax.nn": 1.5, "jflash": 2.0}  # the first stays visible below the second
  grey = {"color": "0.7", "linewidth": 1, "linestyle": "--"}

  def lines(needs):
    for name, column in needs.items():
      style = {"color": colours[name], "marker": "o", "linewidth": widths[name]}
      yield [(n, x.bytes / MIB if x.bytes else None) for n, x in zip(lengths, column)], style
      refused = [(n, x.bytes / MIB) for n, x in zip(lengths, column) if x.bytes and x.refused]
      yield refused, {**style, "linestyle": "", "markerfacecolor": "white"}
    for slope in (1, 2):
      top = (needs["jflash"] if slope == 1 else needs["naive"])[-1].bytes
      if top:
        yield [(n, 2 * top / MIB * (n / lengths[-1])**slope) for n in lengths], grey

  panels = [[report.Panel(heading, "N", "temporary memory, MiB", list(lines(needs))) for heading, needs in found.items()]]
  legend = {name: {"color": colour, "linewidth": 3} for name, colour in colours.items()}
  legend |= {"refused: more than the chip has": {"color": "0.3", "marker": "o", "linestyle": "", "markerfacecolor": "white"},
             "∝ N and ∝ N²": grey}
  report.plot(path, f"Temporary memory, forward and backward: batch {BATCH}, {HEADS} heads, d {WIDTH}", panels, legend)


if __name__ == "__main__":
  sys.exit(main())
