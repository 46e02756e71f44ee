"""Time and memory of `jflash.attention` beside `jax.nn.dot_product_attention`, forward and with the backward pass.

    python -m benchmarks.attention --lengths 256,512,1024 --dtype float32,bfloat16 --window 256
    python -m benchmarks.attention --goals

Writes a table and a plot, `benchmarks/results/attention-DEVICE.md` and `.png`, or where `--out` says. Runs on whatever
device JAX finds. With `--goals` it is one table of all that is aimed at on a CPU, which `cpu.py` measures.
"""

import argparse
import dataclasses
import functools
import importlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jflash

from . import machine, options, report
from .timing import interleave

PASSES = ("forward", "forward + backward")
TORCH = "torch"
GOALS = "--goals"
LEGEND = """\
ms: median over the rounds, in which the implementations took turns; ±%: half the distance between the quartiles.
× jax.nn: how many times faster than the first measured `jax.nn.dot_product_attention` of the same case; below 1 slower.
TFLOP/s: 4·B·N·H flops a kept pair, 3.5 times that with the backward pass. temp MiB: temporary memory that the compiled
program asks for, beside its inputs and outputs. compile s: from the call to the compiled program, once, tracing included.
"""


@dataclasses.dataclass(frozen=True)
class Shape:
  """One case: self-attention of T = `length` tokens, layout [B, T, N, H] with K = `kv_heads` heads of keys."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  width: int
  causal: bool
  window: int | None

  @property
  def local_window(self) -> tuple[int, int] | None:
    return None if self.window is None else (self.window, 0 if self.causal else self.window)

  def flops(self, backward: bool) -> float:
    """4·B·N·H per kept pair of query and key, of which there are T², or half as many if causal, or those in the window.

    The backward pass counts 2.5 times the forward: five matrix products for two. Recomputation does not count.
    """
    t = self.length
    if self.local_window is None:
      pairs = t * t / (2 if self.causal else 1)
    else:
      left, right = self.local_window
      pairs = sum(min(i + right, t - 1) - max(i - left, 0) + 1 for i in range(t))
    return 4 * self.batch * self.heads * self.width * pairs * (3.5 if backward else 1)

  def inputs(self, dtype: str, backward: bool) -> tuple[jax.Array, ...]:
    """q, k, v and, for the backward pass, the cotangent of the output."""
    q = (self.batch, self.length, self.heads, self.width)  # [B, T, N, H]
    kv = (self.batch, self.length, self.kv_heads, self.width)  # [B, T, K, H]
    shapes = (q, kv, kv, q) if backward else (q, kv, kv)
    draw = np.random.default_rng(0).standard_normal
    return tuple(jnp.asarray(draw(shape, np.float32), dtype) for shape in shapes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(report.Row):
  direction: str
  dtype: str
  length: int
  speedup: float | None = None
  flops: float = 0.0
  temp_bytes: int | None = None
  compile_seconds: float | None = None

  def key(self) -> dict[str, str]:
    return {"pass": self.direction, "dtype": self.dtype, "T": str(self.length), "implementation": self.name}

  def values(self) -> dict[str, str]:
    flops = None if self.times is None else self.flops / self.times.median / 1e12
    temp = None if self.temp_bytes is None else self.temp_bytes / 2**20
    return {**self.time_cells(), "× jax.nn": report.text(self.speedup, ".2f"), "TFLOP/s": report.text(flops, ".3g"),
            "temp MiB": report.text(temp, ".4g"), "compile s": report.text(self.compile_seconds, ".2f"), **self.round_cells()}


def candidates(implementations: Sequence[str], peers: Sequence[str]) -> dict[str, Callable]:
  """name -> attention function of (q, k, v, is_causal, local_window_size); the peers come first."""
  chosen = lambda name: None if name == "None" else name
  ours = {"jflash" if i == "None" else f"jflash {i}": (jflash.attention, chosen(i)) for i in implementations}
  theirs = {f"jax.nn {i}": (jax.nn.dot_product_attention, chosen(i)) for i in peers if i != TORCH}
  made = {name: functools.partial(f, implementation=i) for name, (f, i) in (theirs | ours).items()}
  return made | {TORCH: torch_attention} if TORCH in peers else made


def torch_attention(shape: Shape, dtype: str, backward: bool) -> Callable[[], Any]:
  """PyTorch's attention, with its layout `[B, N, T, H]` prepared, as a call. `pip install torch` is what it takes."""
  torch = importlib.import_module("torch")
  if shape.window is not None or shape.kv_heads != shape.heads:
    raise NotImplementedError("not asked of PyTorch: windows, grouped queries")
  arrays = [np.array(x.astype(jnp.float32)).swapaxes(1, 2) for x in shape.inputs(dtype, backward)]
  q, k, v, *dout = (torch.tensor(x, dtype=getattr(torch, dtype)).contiguous() for x in arrays)
  attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=shape.causal)
  if not backward:
    return attend
  for x in (q, k, v):
    x.requires_grad_(True)
  return lambda: torch.autograd.grad(attend(), (q, k, v), *dout)


def measure(shape: Shape, dtype: str, backward: bool, functions: dict[str, Callable], args: Any) -> Iterator[Row]:
  """One row for each function: all of them compiled, those that run measured in turns."""
  inputs = shape.inputs(dtype, backward)
  rows, calls = [], {}
  for name, function in functions.items():
    row = Row(direction=PASSES[backward], dtype=dtype, length=shape.length, name=name, flops=shape.flops(backward))
    try:
      if function is torch_attention:
        calls[name] = torch_attention(shape, dtype, backward)
        rows.append(row)
        continue
      start = time.perf_counter()
      compiled = jax.jit(_workload(function, shape, backward)).lower(*inputs).compile()
      row = dataclasses.replace(row, temp_bytes=_temp_bytes(compiled), compile_seconds=time.perf_counter() - start)
      if (row.temp_bytes or 0) > args.memory_limit * 2**30:
        raise MemoryError(f"{row.temp_bytes / 2**30:.3g} GiB of temporary memory, the limit is {args.memory_limit:.3g}")
      jax.block_until_ready(compiled(*inputs))
      calls[name] = functools.partial(compiled, *inputs)
    except (RuntimeError, ValueError, MemoryError, ImportError) as error:  # NotImplementedError, JaxRuntimeError are RuntimeErrors
      row = dataclasses.replace(row, note=report.reason(error))
    rows.append(row)
  times = interleave(calls, repeats=args.repeats, seconds=args.seconds) if calls else {}
  base = next((time for name, time in times.items() if name.startswith("jax.nn")), None)
  for row in rows:
    speedup = times[row.name].speedup(base) if row.name in times and base else None
    yield dataclasses.replace(row, times=times.get(row.name), speedup=speedup)


def _temp_bytes(compiled: Any) -> int | None:
  analysis = compiled.memory_analysis()
  return None if analysis is None else analysis.temp_size_in_bytes


def _workload(function: Callable, shape: Shape, backward: bool) -> Callable:
  def forward(q, k, v):
    return function(q, k, v, is_causal=shape.causal, local_window_size=shape.local_window)

  return with_backward(forward) if backward else forward


def with_backward(forward: Callable) -> Callable:
  """`(q, k, v, dout, *rest) -> (out, (dq, dk, dv))` of `forward(q, k, v, *rest)`."""
  def both(q, k, v, dout, *rest):
    out, pullback = jax.vjp(lambda q, k, v: forward(q, k, v, *rest), q, k, v)
    return out, pullback(dout)

  return both


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = options.parser(__doc__, "attention")
  parser.add_argument(GOALS, action="store_true", help=f"what is aimed at on a CPU, instead; `{GOALS} --help` has its options")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--kv-heads", type=int, help="as many as --heads if not given")
  parser.add_argument("--width", type=int, default=64, help="of a head")
  parser.add_argument("--lengths", type=options.integers, default=[256, 512, 1024, 2048, 4096], help="with commas between")
  parser.add_argument("--dtype", type=options.words, default=["float32", "bfloat16"], help="with commas between")
  parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--window", type=int, help="keys to the left, and without --causal to the right, that are seen")
  parser.add_argument("--implementation", type=options.words, default=["None"], help="of jflash, with commas between")
  parser.add_argument("--peers", type=options.words, default=["xla", "cudnn"] if jax.default_backend() == "gpu" else ["xla"],
                      help="implementations of jax.nn.dot_product_attention, to the first of which ratios refer, and torch")
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Row]:
  """Measures every case, printing as it goes."""
  functions = candidates(args.implementation, args.peers)
  shape = lambda length: Shape(args.batch, length, args.heads, args.kv_heads or args.heads, args.width, args.causal, args.window)
  return report.collect(measure(shape(length), dtype, backward, functions, args)
                        for dtype in args.dtype for backward in (False, True) for length in args.lengths)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  if GOALS in argv:
    from . import cpu  # which has its workloads from here
    return cpu.main([word for word in argv if word != GOALS])
  args = parse(argv)
  rows = run(args)
  title = _title(args)
  header = machine.header() | options.command("attention", argv)
  options.write(args.out, report.document(title, header, [report.Table("", rows, LEGEND)]),
                lambda path: plot(path, f"{title}\n{machine.device_name()}", rows))
  return 0 if any(row.times for row in rows if row.name.startswith("jflash")) else 1


def _title(args: argparse.Namespace) -> str:
  mask = "causal" if args.causal else "not causal"
  if args.window is not None:
    mask += f", window {args.window}"
  heads = f"N {args.heads}, K {args.kv_heads or args.heads}, H {args.width}"
  return f"Attention: B {args.batch}, {heads}, {mask}"


def plot(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
  """Time (above) and temporary memory (below) against T: colour is who, line style is dtype."""
  directions, names, dtypes = (report.unique(getattr(r, field) for r in rows) for field in ("direction", "name", "dtype"))
  colours = {name: f"C{i}" for i, name in enumerate(names)}
  widths = {name: 3.2 if i == 0 else 1.5 for i, name in enumerate(names)}  # the first stays visible below the others
  styles = dict(zip(dtypes, report.STYLES))
  quantities: dict[str, Callable[[Row], float | None]] = {
    "time, ms": lambda r: None if r.times is None else 1e3 * r.times.median,
    # A logarithmic axis has no zero: a program without temporary memory is drawn at 1 KiB.
    "temporary memory, MiB": lambda r: None if r.temp_bytes is None else max(r.temp_bytes / 2**20, 2**-10),
  }

  def lines(quantity, direction):
    for name in names:
      for dtype in dtypes:
        some = [r for r in rows if (r.direction, r.name, r.dtype) == (direction, name, dtype)]
        yield [(r.length, quantity(r)) for r in some], {"color": colours[name], "linewidth": widths[name], **styles[dtype]}

  panels = [[report.Panel("" if i else direction, "T, tokens" if i else "", label, list(lines(quantity, direction)))
             for direction in directions] for i, (label, quantity) in enumerate(quantities.items())]
  legend = {name: {"color": colours[name], "linewidth": 3} for name in names}
  legend |= {dtype: {"color": "0.3", **styles[dtype]} for dtype in dtypes}
  report.plot(path, title, panels, legend)


if __name__ == "__main__":
  sys.exit(main())
