"""`python -m jflash`: what is installed, what works here, and whether it computes the right numbers.

Every backend that works is compared with dense attention in float64, forward and gradients. An error may be twice (for
gradients three times) the error of dense attention in the inputs' own dtype (in float32 for lse, which is never less),
plus two roundings of the result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jflash
from jflash import _backends, _plan, _reference, masks


class Case(NamedTuple):
  """One comparison: sizes (B, T, S, N, K, H, E), and `make(rng)`: arguments for `attention` and for the reference."""

  name: str
  dtype: Any
  sizes: tuple[int, int, int, int, int, int, int]
  make: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]


def _causal(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  del rng
  return {"is_causal": True}, {"keep": np.tri(130, 130, dtype=bool)}


def _window(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  del rng
  distance = np.arange(150)[:, None] - np.arange(140)[None, :]
  return {"local_window_size": (20, 3)}, {"keep": (distance <= 20) & (distance >= -3)}


def _lengths(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  del rng
  lengths = np.array([140, 77], np.int32)
  seen = np.arange(140) < lengths[:, None]
  return {"is_causal": True, "key_value_seq_lengths": lengths}, {"keep": np.tri(150, 140, dtype=bool) & seen[:, None, None]}


def _segments(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  query, key = (np.sort(rng.integers(0, 5, (2, n))).astype(np.int32) for n in (150, 140))
  return {"mask": masks.Segments(query, key)}, {"keep": (query[:, :, None] == key[:, None, :])[:, None]}


def _bias(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  bias = rng.normal(size=(4, 150, 140)).astype(np.float32)
  return {"bias": bias, "logits_soft_cap": 2.0}, {"bias": bias, "logits_soft_cap": 2.0}


def _by_distance(score: Any, batch: Any, head: Any, query: Any, key: Any, table: Any) -> Any:
  return score + table[head, jnp.clip(query - key, -8, 7) + 8]


def _function(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  options = {"score_mod": _by_distance, "score_operands": (rng.normal(size=(4, 16)).astype(np.float32),),
             "sinks": rng.normal(size=4).astype(np.float32)}
  return options, dict(options)


CASES = (
    Case("causal", jnp.float32, (2, 130, 130, 3, 3, 32, 32), _causal),
    Case("grouped, window", jnp.bfloat16, (2, 150, 140, 4, 2, 32, 16), _window),
    Case("lengths", jnp.bfloat16, (2, 150, 140, 4, 2, 32, 32), _lengths),
    Case("segments", jnp.float32, (2, 150, 140, 3, 1, 16, 32), _segments),
    Case("bias, soft cap", jnp.float32, (1, 150, 140, 4, 2, 32, 32), _bias),
    Case("score_mod, sinks", jnp.bfloat16, (1, 130, 140, 4, 2, 16, 32), _function),
)


class Finding(NamedTuple):
  """The worst of some outputs: its name, its error, and what the error may be."""

  name: str
  error: float
  allowed: float

  @property
  def ok(self) -> bool:
    return self.error <= self.allowed


def check(case: Case, implementation: str) -> tuple[Finding, Finding]:
  """The worst output and the worst gradient of a backend on a case, against dense attention in float64.

  Raises:
    NotImplementedError: the backend cannot compute this.
  """
  rng = np.random.default_rng(0)
  b, t, s, n, k, h, e = case.sizes
  shapes = (b, t, n, h), (b, s, k, h), (b, s, k, e), (b, t, n, e), (b, t, n)
  *tensors, dout, dlse = (np.asarray(rng.normal(size=shape), np.float32) for shape in shapes)
  ours, theirs = case.make(rng)
  tensors = [jnp.asarray(x, case.dtype) for x in tensors]
  moved = {"bias": jnp.asarray(ours.pop("bias"))} if "bias" in ours else {}

  def attend(q, k, v, moved):
    return jflash.attention(q, k, v, **moved, **ours, return_residual=True, implementation=implementation)

  def dense(dtype):
    fixed = {name: x for name, x in theirs.items() if name not in moved}
    return lambda q, k, v, moved: _reference.attention(q, k, v, **moved, **fixed, dtype=dtype)

  with jax.default_matmul_precision("highest"):  # float32 that is judged as such
    got = _outputs_and_gradients(attend, tensors, moved, dout, dlse)
  naive = _outputs_and_gradients(dense(case.dtype), tensors, moved, dout, dlse)
  if case.dtype != jnp.float32:
    naive["lse"] = np.asarray(jax.jit(dense(jnp.float32))(*tensors, moved)[1])
  with jax.enable_x64(True), _on_cpu():
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in tensors]
    moved = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in moved.items()}
    truth = _outputs_and_gradients(dense(jnp.float64), wide, moved, dout, dlse)

  findings = {name: _compare(name, got[name], naive[name], truth[name], case.dtype) for name in truth}
  badness = lambda finding: (not finding.ok, finding.error / max(finding.allowed, 1e-30))
  outputs = [findings.pop(name) for name in ("out", "lse")]
  return max(outputs, key=badness), max(findings.values(), key=badness)


def _outputs_and_gradients(attend: Callable, tensors: list[Any], moved: dict[str, Any], dout: Any,
                           dlse: Any) -> dict[str, Any]:
  """{"out", "lse", "dquery", …} as NumPy arrays, for cotangents `dout [B, T, N, E]` and `dlse [B, T, N]`.

  Where lse is -inf it is left out, and has cotangent 0.
  """

  @jax.jit
  def both(*args):
    (out, lse), pull = jax.vjp(attend, *args)
    seen = jnp.isfinite(lse)
    cotangents = jnp.asarray(dout, out.dtype), jnp.where(seen, dlse, 0).astype(lse.dtype)
    return out, jnp.where(seen, lse, 0), *pull(cotangents)

  out, lse, *gradients, dmoved = jax.tree.map(np.asarray, both(*tensors, moved))
  return {"out": out, "lse": lse, **dict(zip(("dquery", "dkey", "dvalue"), gradients)),
          **{f"d{name}": x for name, x in dmoved.items()}}


def _compare(name: str, got: Any, naive: Any, truth: Any, dtype: Any) -> Finding:
  """Error against what is allowed; outputs that are float32 whatever the inputs are rounded as such."""
  error, dense_error = (float(np.abs(np.asarray(x, np.float64) - truth).max()) for x in (got, naive))
  rounded = truth.astype(np.float32 if name in ("lse", "dbias") else dtype)
  shift = rounded.dtype.type(0.3)
  rounding = float(np.abs(((rounded + shift) - shift).astype(np.float64) - rounded.astype(np.float64)).max())
  error = error if np.isfinite(error) else float("inf")
  return Finding(name, error, (3 if name.startswith("d") else 2) * dense_error + 2 * rounding)


def _on_cpu() -> Any:
  """float64 needs a CPU device where there is one."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:
    return contextlib.nullcontext()


# The report -----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
  """Of everything that matters in a report of a bug; only what is installed."""
  found = {"jflash": jflash.__version__, "Python": platform.python_version()}
  for name in ("jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
               "nvidia-cudnn-cu13"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def why_not(name: str) -> str | None:
  """Why a backend cannot run on this machine's devices, without the interpreter; None if it can."""
  x = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
  try:
    explanation = jflash.explain(x, x, x, implementation=name)
  except NotImplementedError as error:
    return str(error).partition("cannot compute this: ")[2] or str(error)
  except ImportError as error:
    return f"it cannot be imported: {error}"
  return "it would run in the Pallas interpreter" if explanation.interpreted else None


def report_checks(name: str, cases: tuple[Case, ...]) -> bool:
  """Prints a line for each case; whether all of them are right."""
  right = True
  for case in cases:
    label = f"{name:<10} {case.name:<16} {jnp.dtype(case.dtype).name:<9}"
    try:
      findings = check(case, name)
    except NotImplementedError as error:
      print(f"{label} not supported: {error}")
      continue
    except Exception as error:  # whatever breaks here is what the report is for
      print(f"{label} FAIL {type(error).__name__}: {error}")
      right = False
      continue
    ok = all(f.ok for f in findings)
    figures = "  ".join(f"{f.name:<7}{f.error:8.1e} / {f.allowed:7.1e}" for f in findings)
    print(f"{label} {figures}  {'ok' if ok else 'FAIL'}")
    right = right and ok
  return right


def main(argv: list[str] | None = None) -> int:
  """Prints the report; 1 when a check fails, else 0."""
  parser = argparse.ArgumentParser("python -m jflash", description="What works here, checked against dense attention.")
  parser.add_argument("--interpret", action="store_true",
                      help="check kernels whose hardware is absent too, in the Pallas interpreter, on a small case")
  arguments = parser.parse_args(argv)

  print("  ".join(f"{name} {version}" for name, version in versions().items()))
  try:
    devices = jax.devices()
  except Exception as error:  # RuntimeError, or whatever a plugin without its libraries fails with
    print(f"no device: {type(error).__name__}: {error}")
    return 1
  kinds = [device.device_kind for device in devices]
  counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
  print(f"{'devices':<10} {counted} ({_plan.platform()})")

  reasons = {name: why_not(name) for name in _backends.NAMES}
  for name, reason in reasons.items():
    print(f"{name:<10} {'works' if reason is None else 'not here: ' + reason}")
  print(f"\n{'backend':<10} {'case':<16} {'dtype':<9} worst output, error / allowed  worst gradient")
  right = True
  for name, reason in reasons.items():
    if reason is None:
      right = report_checks(name, CASES) and right
    elif arguments.interpret:
      with jflash.interpret():
        right = report_checks(name, (SMALL,)) and right
  print("\nall is right" if right else "\nFAIL: at least one check is wrong here; please report it with these lines")
  return 0 if right else 1


def _small(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
  del rng
  return {"is_causal": True}, {"keep": np.tri(24, 40, dtype=bool)}


SMALL = Case("interpreted", jnp.float32, (1, 24, 40, 2, 1, 16, 8), _small)

if __name__ == "__main__":
  sys.exit(main())
