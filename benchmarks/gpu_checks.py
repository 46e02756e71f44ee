"""Whether the kernels compute attention: outputs and gradients on fresh random inputs against dense attention in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jflash
from jflash import _reference, _tiles_gpu

from . import gpu_shapes, report
from .gpu_contest import Begin, Measure, Rows, check_device
from .gpu_programs import UNTUNED
from .gpu_results import Result
from .gpu_speed import Cases, Setup

# The error norm(x - exact) / norm(exact) that rounding explains, by dtype and `jax.default_matmul_precision`; of lse, whose sums
# are float32, it is less.
ALLOWED = {("bfloat16", None): 1e-2, ("float16", None): 2e-3, ("float32", None): 5e-5, ("float32", "highest"): 1e-5}
ALLOWED_LSE = 1e-5
LARGEST = 8  # by how much the largest error, as a share of the largest number, may be more than that
RUNS = 3


@dataclasses.dataclass
class Given:
  """A problem: NumPy arrays, and the same once more in the oracle's terms.

  Attributes:
    moving: what gets a gradient, by keyword.
    fixed, static: arrays and other arguments that do not.
    keep: what is seen, broadcasts to `[B, N, T, S]`.
    hidden: keys that no query sees, `[B, S]`: they and their values are NaN.
    oracle: arguments that the oracle takes besides `moving`.
  """

  moving: dict[str, Any]
  rng: np.random.Generator
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  static: dict[str, Any] = dataclasses.field(default_factory=dict)
  keep: Any = None
  hidden: Any = None
  oracle: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    """(B, T, S, N)."""
    q, k = self.moving["query"], self.moving["key"]
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2]

  def see(self, keep: Any) -> None:
    self.keep = keep if self.keep is None else self.keep & keep


Term = Callable[[Given], None]


def causal(given: Given) -> None:
  _, t, s, _ = given.sizes
  given.static["is_causal"] = True
  given.see(np.tri(t, s, dtype=bool))


def window(left: int, right: int) -> Term:
  def apply(given):
    _, t, s, _ = given.sizes
    given.static["local_window_size"] = left, right
    distance = np.arange(s) - np.arange(t)[:, None]
    given.see((distance >= -left) & (distance <= right))
  return apply


def segments(given: Given) -> None:
  b, t, s, _ = given.sizes
  ids = [np.sort(given.rng.integers(0, 4, (b, n)), axis=1).astype(np.int32) for n in (t, s)]
  given.fixed |= dict(zip(("query_segment_ids", "key_value_segment_ids"), ids))
  given.see(ids[0][:, None, :, None] == ids[1][:, None, None, :])


def lengths(given: Given) -> None:
  """Rows and keys past a length of each batch element: empty rows, one batch element of nothing, and hidden keys that are NaN."""
  b, t, s, _ = given.sizes
  queries, keys = (np.linspace(0, n, b).astype(np.int32)[::-1].copy() for n in (t, s))
  given.fixed |= {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
  given.hidden = np.arange(s) >= keys[:, None]
  given.see((np.arange(t)[:, None] < queries[:, None, None, None]) & ~given.hidden[:, None, None, :])


def array(given: Given) -> None:
  """A mask without structure: rows that see nothing, and keys that nobody sees, which are NaN."""
  b, t, s, n = given.sizes
  mask = given.rng.random((b, n, t, s)) < 0.3
  mask[:, :, given.rng.random(t) < 0.1] = False
  given.hidden = given.rng.random((b, s)) < 0.2
  mask &= ~given.hidden[:, None, None, :]
  given.fixed["mask"] = mask
  given.see(mask)


def bias(*broadcast: int) -> Term:
  """`[B, N, T, S]` with sizes of 1 along the axes in `broadcast`."""
  def apply(given):
    shape = [1 if axis in broadcast else n for axis, n in zip(range(4), np.array(given.sizes)[[0, 3, 1, 2]])]
    given.moving["bias"] = given.rng.standard_normal(shape).astype(np.float32)
  return apply


def slopes(given: Given) -> None:
  given.moving["alibi_slopes"] = given.rng.random(given.sizes[3]).astype(np.float32) / 8


def sinks(given: Given) -> None:
  given.moving["sinks"] = given.rng.standard_normal(given.sizes[3]).astype(np.float32)


def cap(given: Given) -> None:
  given.static["logits_soft_cap"] = given.oracle["logits_soft_cap"] = 2.0


def table(given: Given) -> None:
  """A bias by head and distance, read from a table as T5's is."""
  def from_table(score, batch, head, query, key, table):
    return score + table[head, jnp.clip(query - key + 16, 0, 31)]

  given.static["score_mod"] = given.oracle["score_mod"] = from_table
  given.moving["score_operands"] = (given.rng.standard_normal((given.sizes[3], 32)).astype(np.float32),)


def dropout(given: Given) -> None:
  b, t, s, n = given.sizes
  drop = {"dropout_rate": 0.3, "dropout_key": jax.random.key(int(given.rng.integers(1 << 31)))}
  given.static |= drop
  # Of equal weights of the rows of an identity matrix, what is left are the factors, once the mask does not matter.
  equal, identity = jnp.zeros((b, max(t, s), n, 1)), jnp.broadcast_to(jnp.eye(s)[:, None], (b, s, n, s))
  left = jflash.attention(equal[:, :t], equal[:, :s], identity, implementation="xla", **drop)
  given.oracle["factors"] = np.asarray(left * s).transpose(0, 2, 1, 3).round(4)


@dataclasses.dataclass(frozen=True)
class Check:
  """A problem of random numbers: B, T, S, N, K, H, E, dtype, what is added to it, `jax.default_matmul_precision`.

  Attributes:
    context: in which it is traced.
  """

  setup: Setup
  name: str
  sizes: tuple[int, ...]
  terms: tuple[Term, ...] = ()
  dtype: str = "bfloat16"
  precision: str | None = None
  context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

  def given(self, seed: int) -> tuple[Given, Any, Any]:
    """The problem, and cotangents of out and of lse."""
    rng = np.random.default_rng(seed)
    b, t, s, n, k, h, e = self.sizes
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), self.dtype))
    given = Given({"query": draw(b, t, n, h), "key": draw(b, s, k, h), "value": draw(b, s, k, e)}, rng)
    for term in self.terms:
      term(given)
    return given, draw(b, t, n, e), rng.standard_normal((b, t, n)).astype(np.float32)

  def prepare(self, begin: Begin, without: Sequence[str] = ()) -> Measure:
    if self.name in without:
      lost = self._row("it hung, or the device broke down", True)
      return lambda: [lost]
    begin(self.name)
    seed = time.time_ns() % 2**32
    given, dout, dlse = self.given(seed)
    cotangents = dout, dlse
    seen = dict(given.moving)
    if given.hidden is not None:  # whatever is there must not matter
      seen |= {name: np.where(given.hidden[:, :, None, None], np.nan, seen[name]).astype(seen[name].dtype)
               for name in ("key", "value")}
    attend = functools.partial(jflash.attention, **given.static, implementation=self.setup.implementation, return_residual=True)
    try:
      ours = self._compile(functools.partial(_answer, attend), seen, given.fixed, cotangents)
    except Exception as error:  # whatever a compiler raises
      failed = self._row(report.reason(error), not isinstance(error, NotImplementedError))
      return lambda: [failed]
    wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    inputs = wide(given.moving), {}, wide(cotangents)
    oracle = functools.partial(_reference.attention, keep=given.keep, dtype=jnp.float64, **given.oracle)
    with jax.enable_x64(True):
      exact = jax.jit(functools.partial(_answer, oracle)).lower(*inputs).compile(UNTUNED)

    def measure() -> Rows:
      try:
        runs = [self._run(ours, seen, given.fixed, cotangents) for _ in range(1 if self.setup.interpret else RUNS)]
      except RuntimeError as error:
        check_device(self.name, error)
        return [self._row(report.reason(error), True)]
      with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, exact(*inputs))
      return [self.judge(runs, want, seed)]

    return measure

  def _compile(self, function: Callable, *arguments: Any) -> Callable:
    def precisely(*arguments):
      with self.context(), jax.default_matmul_precision(self.precision) if self.precision else contextlib.nullcontext():
        return function(*arguments)

    return precisely if self.setup.interpret else jax.jit(precisely).lower(*arguments).compile()

  def _run(self, ours: Callable, seen: Any, fixed: Any, cotangents: Any) -> Any:
    """One run, into memory that is most likely full of NaN: what is not written is seen."""
    poison = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves((seen, cotangents))]  # the shapes of all results
    jax.block_until_ready(poison)
    del poison
    return jax.tree.map(np.asarray, ours(seen, fixed, cotangents))

  def judge(self, runs: Sequence[Any], want: Any, seed: int) -> Result:
    """Errors by name, and whether all runs gave the same bits."""
    kind = self.dtype, self.precision
    errors, wrong = {}, []
    for name, found in _named(runs[0]):
      allowed = ALLOWED_LSE if name == "lse" else ALLOWED[kind]
      norm, largest = _errors(found, dict(_named(want))[name])
      errors[name] = norm
      if not (norm <= allowed and largest <= LARGEST * allowed):
        wrong.append(f"{name} is off by {norm:.1e} (largest error {largest:.1e}), allowed is {allowed:.0e}")
      if any(dict(_named(run))[name].tobytes() != found.tobytes() for run in runs[1:]):
        wrong.append(f"{name} differs between runs")
    worst = max((name for name in errors if name != "lse"), key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return self._row("; ".join(wrong), bool(wrong), error=errors[worst], of=worst, allowed=ALLOWED[kind], errors=errors,
                     seed=seed)

  def _row(self, note: str, failed: bool, **measured: Any) -> Result:
    return Result(part="checks", case={"check": self.name}, name=self.setup.implementation, note=note, failed=failed,
                  measured=measured)


def _answer(attention: Callable, moving: Any, fixed: Any, cotangents: Any) -> Any:
  """`((out, lse), gradients)` of an attention function."""
  values, pull = jax.vjp(lambda moving: attention(**moving, **fixed), moving)
  return values, pull(tuple(jnp.asarray(c).astype(x.dtype) for c, x in zip(cotangents, values)))[0]


def _named(answer: Any) -> Iterator[tuple[str, Any]]:
  (out, lse), grads = answer
  yield from (("out", out), ("lse", lse))
  for name, x in grads.items():
    yield f"d{name}", x[0] if isinstance(x, tuple) else x


def _errors(found: Any, want: Any) -> tuple[float, float]:
  """(norm of the error / norm, largest error / largest number); infinite where one is infinite or NaN and the other is not so."""
  found, want = (np.asarray(x, np.float64) for x in (found, want))
  same = found == want  # also of infinities
  with np.errstate(invalid="ignore"):
    error, size = np.where(same, 0, found - want), np.where(np.isfinite(want), want, 0)
  error = np.where(np.isfinite(error), error, np.inf)
  relative = lambda norm: float(norm(error) / (norm(size) or 1.0))
  return relative(lambda x: np.sqrt((np.abs(x)**2).sum())), relative(lambda x: np.abs(x).max(initial=0))


def checks(setup: Setup) -> Cases:
  """Name -> check; of at most 100 queries and keys where shapes are small."""
  found: dict[str, Check] = {}

  def add(name, sizes, *terms, **kind):
    if setup.tokens < gpu_shapes.TOKENS:
      sizes = (min(sizes[0], 2), *(min(n, 100) for n in sizes[1:3]), *sizes[3:])
    found[name] = Check(setup, name, sizes, terms, **kind)

  for d in (64, 128, 256):
    add(f"d {d}", (2, 777, 777, 4, 2, d, d))
    add(f"d {d}, causal", (2, 777, 777, 4, 2, d, d), causal)
  add("window", (2, 1000, 1000, 4, 2, 64, 64), causal, window(100, 0))
  add("window to both sides, d 128", (2, 700, 900, 2, 2, 128, 128), window(30, 50))
  add("segments, causal, d 128", (2, 600, 600, 4, 2, 128, 128), causal, segments)
  add("segments", (2, 300, 500, 2, 2, 64, 64), segments)
  for d in (64, 128, 256):
    add(f"lengths, empty rows, NaN hidden, d {d}", (4, 300, 400, 4, 2, d, d), lengths)
    add(f"mask array, empty rows, NaN hidden, d {d}", (2, 300, 333, 4, 2, d, d), array)
  add("bias of batch and head", (2, 300, 330, 2, 2, 64, 64), bias())
  add("bias of head, causal", (3, 320, 320, 4, 2, 64, 64), bias(0), causal)
  add("bias of head, d 128", (2, 320, 320, 4, 2, 128, 128), bias(0))
  add("bias of keys", (2, 200, 320, 4, 2, 64, 64), bias(1, 2))
  add("bias of queries, d 256", (2, 320, 200, 4, 2, 256, 256), bias(0, 3))
  for d in (64, 128, 256):
    add(f"one query, d {d}", (3, 1, 1111, 8, 1, d, d))
  add("three keys", (2, 500, 3, 2, 2, 64, 64))
  add("d 96", (2, 333, 500, 4, 4, 96, 96))
  add("d 192, values of 128, causal", (2, 400, 400, 4, 2, 192, 128), causal)
  add("d 40, values of 256", (2, 150, 400, 4, 2, 40, 256))
  for d in (64, 128):
    add(f"float32, d {d}, causal", (2, 500, 500, 4, 2, d, d), causal, dtype="float32")
    add(f"float32, highest precision, d {d}", (2, 333, 500, 4, 2, d, d), dtype="float32", precision="highest")
  add("float32, d 256", (2, 333, 500, 4, 2, 256, 256), dtype="float32")
  add("float32, bias, mask array", (2, 300, 333, 4, 2, 64, 64), bias(0), array, dtype="float32")
  add("float16, d 128, causal", (2, 500, 500, 4, 2, 128, 128), causal, dtype="float16")
  # A gradient of 4 numbers, sums that cancel, is at times so small that the error of its terms looks large beside it.
  add("ALiBi", (2, 300, 300, 16, 2, 64, 64), causal, slopes)
  add("sinks", (2, 300, 300, 16, 2, 64, 64), causal, sinks)
  add("soft cap, d 256", (2, 300, 300, 4, 2, 256, 256), causal, cap)
  add("table of scores", (2, 300, 300, 4, 2, 64, 64), table)
  add("dropout", (2, 400, 150, 4, 2, 64, 64), causal, dropout)
  in_one = {"context": _tiles_gpu.backward_in_one_kernel}
  add("backward in one kernel, causal, d 64", (2, 777, 777, 4, 2, 64, 64), causal, **in_one)
  add("backward in one kernel, d 128", (2, 1000, 1300, 4, 2, 128, 128), **in_one)
  add("backward in one kernel, NaN hidden, d 128", (4, 300, 400, 4, 2, 128, 128), lengths, **in_one)
  add("backward in one kernel, many keys, d 64", (1, 1000, 20_000, 8, 8, 64, 64), causal, **in_one)
  add("long, causal, d 64", (1, 4096, 4096, 8, 8, 64, 64), causal)
  add("long, causal, d 128", (1, 4096, 4096, 8, 8, 128, 128), causal)
  add("long, d 256", (1, 4096, 4096, 4, 4, 256, 256))
  return {name: functools.partial(lambda check: check, check) for name, check in found.items()}
