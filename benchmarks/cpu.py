"""What attention costs on a CPU, beside what was set out to be reached: lengths, terms of the scores, windows, blocks, decoding, a
GPT's step, time to compile.

    python -m benchmarks.attention --goals

Every case takes turns with what it is compared with. Writes one table, `benchmarks/results/cpu.md`, or where `--out` says.
PyTorch is compared with where it is installed. Without `--goals` there is the memory, and a plot against T.
"""

import argparse
import dataclasses
import functools
import importlib.util
import operator
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jflash
from jflash import masks

from . import machine, options, report
from .attention import GOALS, PASSES, Shape, torch_attention, with_backward
from .timing import Times, interleave

LEGEND = """\
ms: median over the rounds, in which the case and what it is beside took turns; ±%: half the distance between the quartiles.
ratio: the median of each round's; × beside: how many times faster than that, ÷ beside: how many times as long; ÷ share: that,
divided by the share of blocks that are kept; of copying: bytes of keys and values a second as a share of NumPy's copying, read and
written. goal: what was set out to be reached, and * where it was not.
"""
HEADS, WIDTH = 8, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(report.Row):
  direction: str
  dtype: str
  beside: str
  kind: str
  ratio: float | None = None
  goal: str = ""  # a comparison and a number

  @property
  def missed(self) -> bool:
    if self.ratio is None:
      return False
    how, number = self.goal.split()
    return not {">=": operator.ge, ">": operator.gt, "<=": operator.le}[how](round(self.ratio, 2), float(number))

  def key(self) -> dict[str, str]:
    return {"case": self.name, "pass": self.direction, "dtype": self.dtype, "beside": self.beside}

  def values(self) -> dict[str, str]:
    return {**self.time_cells(), "ratio": report.text(self.ratio, ".2f"), "is": self.kind, "goal": self.goal + " *" * self.missed,
            **self.round_cells()}


Call = Callable[[], Any]


def compiled(function: Callable, *args: Any) -> Call:
  return functools.partial(jax.jit(function).lower(*args).compile(), *args)


def attend(backward: bool, *args: Any, function: Callable = jflash.attention, **terms: Any) -> Call:
  """A compiled call with q, k, v and, backward, dO; arrays among the terms are arguments of the program, not constants."""
  arrays = {name: x for name, x in terms.items() if isinstance(x, jax.Array)}
  static = {name: x for name, x in terms.items() if name not in arrays}

  def forward(q, k, v, arrays):
    return function(q, k, v, **static, **arrays)

  return compiled(with_backward(forward) if backward else forward, *args[:4 if backward else 3], arrays)


def draw(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
  normal = np.random.default_rng(0).standard_normal
  return [jnp.asarray(normal(shape, np.float32), dtype) for shape in shapes]


def taken(args: argparse.Namespace, calls: dict[str, Call], kind: str, goal: str, direction: str, dtype: str,
          ratio: Callable[[Times, Times], float]) -> Iterator[Row]:
  """A row for each call but the first, beside it."""
  for call in calls.values():
    jax.block_until_ready(call())
  times = interleave(calls, repeats=args.repeats, seconds=args.seconds)
  (beside, base), *rest = times.items()
  for case, ours in rest:
    yield Row(name=case, direction=direction, dtype=dtype, beside=beside, kind=kind, goal=goal, times=ours,
              ratio=ratio(ours, base))


def faster(time: Times, base: Times) -> float:
  return time.speedup(base)


def slower(time: Times, base: Times) -> float:
  return 1 / time.speedup(base)


def shapes(args: argparse.Namespace, dtype: str, backward: bool) -> Iterator[Row]:
  """Short and uneven lengths, causal or not, of two widths, beside `jax.nn`."""
  for t in args.uneven:
    for width in (64, 128):
      for causal in (False, True):
        inputs = draw(dtype, *[(1, t, HEADS, width)] * 4)
        calls = {"jax.nn": attend(backward, *inputs, function=jax.nn.dot_product_attention, is_causal=causal),
                 f"T {t}, width {width}{', causal' * causal}": attend(backward, *inputs, is_causal=causal)}
        yield from taken(args, calls, "× beside", ">= 1", PASSES[backward], dtype, faster)


def causal(args: argparse.Namespace, dtype: str, backward: bool) -> Iterator[Row]:
  """Causal attention of one width against T, beside `jax.nn` and PyTorch."""
  for t in args.lengths:
    shape = Shape(batch=1, length=t, heads=HEADS, kv_heads=HEADS, width=WIDTH, causal=True, window=None)
    inputs = shape.inputs(dtype, backward)
    ours = {f"T {t}, causal": attend(backward, *inputs, is_causal=True)}
    goal = f">= {4.5 if backward else 4}" if t in (2048, 4096) else ">= 1"
    theirs = {"jax.nn": attend(backward, *inputs, function=jax.nn.dot_product_attention, is_causal=True)}
    yield from taken(args, theirs | ours, "× beside", goal, PASSES[backward], dtype, faster)
    if importlib.util.find_spec("torch") and t >= 1024:
      yield from taken(args, {"PyTorch": torch_attention(shape, dtype, backward)} | ours, "× beside", ">= 1", PASSES[backward],
                       dtype, faster)


def compiling(args: argparse.Namespace, dtype: str, backward: bool) -> Iterator[Row]:
  """From a call to the compiled program, tracing included."""
  for t in args.compiled:
    inputs = [jax.ShapeDtypeStruct((1, t, HEADS, WIDTH), dtype)] * (4 if backward else 3)

    def seconds(function, inputs=inputs):
      jax.clear_caches()
      forward = lambda q, k, v: function(q, k, v, is_causal=True)
      start = time.perf_counter()
      jax.jit(with_backward(forward) if backward else forward).lower(*inputs).compile()
      return time.perf_counter() - start

    rounds = [(seconds(jax.nn.dot_product_attention), seconds(jflash.attention)) for _ in range(args.repeats + 1)][1:]
    base, ours = (Times(tuple(x)) for x in zip(*rounds))
    yield Row(name=f"compiling, T {t}, causal", direction=PASSES[backward], dtype=dtype, beside="jax.nn", kind="÷ beside",
              goal="<= 3", times=ours, ratio=slower(ours, base))


def terms(args: argparse.Namespace, dtype: str, backward: bool) -> Iterator[Row]:
  """Each term of the scores beside plain causal attention."""
  t = args.length
  inputs, (bias,) = draw(dtype, *[(1, t, HEADS, WIDTH)] * 4), draw(dtype, (1, HEADS, t, t))
  whole = jnp.zeros((1, t), jnp.int32)
  cases = {
    "plain causal": {}, "one segment, traced": {"query_segment_ids": whole, "key_value_segment_ids": whole},
    "lengths, traced": {"key_value_seq_lengths": jnp.full((1,), t, jnp.int32)}, "bias of one head": {"bias": bias[:, :1]},
    "bias of all heads": {"bias": bias}, "mask array": {"mask": jnp.ones((1, 1, t, t), bool)},
    "soft cap": {"logits_soft_cap": 30.0}, "ALiBi": {"alibi_slopes": 2.0 ** -jnp.arange(1.0, HEADS + 1)},
    "score_mod": {"score_mod": lambda s, b, n, i, j: s - 0.01 * jnp.abs(i - j)},
    "dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
  }
  calls = {name: attend(backward, *inputs, is_causal=True, **case) for name, case in cases.items()}
  yield from taken(args, calls, "÷ beside", "<= 1.25", PASSES[backward], dtype, slower)


def sparse(args: argparse.Namespace, dtype: str, backward: bool) -> Iterator[Row]:
  """A window beside all of causal attention, and random blocks beside all pairs."""
  t = args.long
  inputs = draw(dtype, *[(1, t, HEADS, WIDTH)] * 4)
  calls = {"causal": attend(backward, *inputs, is_causal=True),
           "window of 1024": attend(backward, *inputs, is_causal=True, local_window_size=(1023, 0))}
  yield from taken(args, calls, "× beside", ">= 8", PASSES[backward], dtype, faster)
  blocks = t // 256
  for part in (16, 4):
    table = np.zeros((blocks, blocks), bool)
    for row in table:
      row[np.random.default_rng(int(table.sum())).choice(blocks, blocks // part, replace=False)] = True
    calls = {"all pairs": attend(backward, *inputs),
             f"1/{part} of the blocks of 256": attend(backward, *inputs, mask=masks.BlockSparse(table, (256, 256)))}
    yield from taken(args, calls, "÷ share", "<= 1.25", PASSES[backward], dtype,
                     lambda time, base, part=part: part / time.speedup(base))


def decoding(args: argparse.Namespace) -> Iterator[Row]:
  """One query: 8 batch elements, 32 heads over 8 of keys, 8192 keys of width 128."""
  q, k, v = draw("bfloat16", (8, 1, 32, 128), (8, 8192, 8, 128), (8, 8192, 8, 128))
  source = np.ones(k.nbytes // 4, np.float32)  # read and written, as many bytes as keys and values have
  peers = {"jax.nn": (attend(False, q, k, v, function=jax.nn.dot_product_attention), "× beside", "> 1"),
           "copying": (functools.partial(np.copyto, np.empty_like(source), source), "of copying", ">= 0.6")}
  ours = attend(False, q, k, v)
  for name, (call, kind, goal) in peers.items():
    yield from taken(args, {name: call, "one query, 8192 keys": ours}, kind, goal, PASSES[0], "bfloat16", faster)


def training(args: argparse.Namespace) -> Iterator[Row]:
  """Loss and gradients of the example's GPT, 4 layers of 4 heads of width 32, context 1024."""
  path = pathlib.Path(__file__).parent.parent / "examples/gpt/model.py"
  spec = importlib.util.spec_from_file_location("gpt_model", path)
  assert spec is not None and spec.loader is not None
  gpt = importlib.util.module_from_spec(spec)
  sys.modules["gpt_model"] = gpt  # dataclasses look it up
  spec.loader.exec_module(gpt)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 1024)), jnp.int32)
  positions, segments = jnp.broadcast_to(jnp.arange(1024), tokens.shape), jnp.zeros_like(tokens)
  config = gpt.Config(vocab=256, context=1024, layers=4, heads=4, width=128)

  def step(name):
    graph, params = nnx.split(gpt.GPT(config, attend=gpt.ATTENTIONS[name], rngs=nnx.Rngs(0)))

    def loss(params, tokens, positions, segments):
      logits = jax.nn.log_softmax(nnx.merge(graph, params)(tokens, positions, segments)[:, :-1])
      return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

    return compiled(jax.value_and_grad(loss), params, tokens, positions, segments)

  calls = {"--attention jax": step("jax"), "GPT, context 1024, loss and gradients": step("jflash")}
  yield from taken(args, calls, "× beside", ">= 1.5", PASSES[1], "float32", faster)


BY_DTYPE = {"causal": causal, "shapes": shapes, "terms": terms, "sparse": sparse, "compiling": compiling}
OTHERS = {"decoding": decoding, "training": training}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = options.parser(__doc__, "cpu")
  parser.set_defaults(out=pathlib.Path("benchmarks/results/cpu"))
  parser.add_argument("--lengths", type=options.integers, default=[1024, 2048, 4096], help="T of causal")
  parser.add_argument("--compiled", type=options.integers, default=[2048, 8192], help="T of compiling")
  parser.add_argument("--uneven", type=options.integers, default=[128, 197, 300, 577, 1000, 1500], help="T of shapes")
  parser.add_argument("--length", type=int, default=2048, help="T where terms of the scores are compared")
  parser.add_argument("--long", type=int, default=16384, help="T of windows and blocks")
  parser.add_argument("--dtype", type=options.words, default=["float32", "bfloat16"], help="with commas between")
  parser.add_argument("--parts", type=options.words, default=[*BY_DTYPE, *OTHERS], help="with commas between")
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[report.Row]:
  """Measures every case, printing as it goes."""
  parts = [functools.partial(BY_DTYPE[part], args, dtype, backward) for part in args.parts if part in BY_DTYPE
           for dtype in args.dtype for backward in (False, True)]
  parts += [functools.partial(OTHERS[part], args) for part in args.parts if part not in BY_DTYPE]
  return report.collect(part() for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = parse(argv)
  page = report.document("Attention on a CPU", machine.header() | options.command("attention", [GOALS, *argv]),
                         [report.Table("", run(args), LEGEND)])
  path = args.out.with_name(args.out.name + ".md")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page)
  print(f"{path} written")
  return 0

