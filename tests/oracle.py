"""Accuracy by ratio: an answer may be off by what dense attention in the same dtype is off, times 2, or 3 for gradients.

The truth is `jflash._reference` in float64. To that allowance come two rounding errors that no algorithm escapes: of a number in
the result's dtype, 2 · max|(ref + 0.3 - 0.3) - ref|, and of a sum, eps · Σ|terms|, because the dense one may happen to be
exact: the gradient of a single number, or dS = P ∘ (dP - D + dlse) of a row that sees one key, 0 but for dlse. As P is
exp(s - lse), its eps grows by half of |lse|, the rounding of lse itself. float64 has no better dtype to be judged by: its
allowance is that of float32, scaled by the ratio of their eps, and doubled, because the truth is no better than what it judges.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflash import _reference
from tests.cases import OTHER_TERMS, SCORE_TERMS, Built


class Answer(NamedTuple):
  """out, lse, and the gradients by argument name, as NumPy arrays."""

  out: Any
  lse: Any
  grads: dict[str, Any]


def arrays_of(built: Built) -> dict[str, Any]:
  """The arguments that get a gradient."""
  terms = {name: built.kwargs[name] for name in (*SCORE_TERMS, "sinks") if isinstance(built.kwargs.get(name), np.ndarray)}
  terms |= {f"operand {n}": x for n, x in enumerate(built.kwargs.get("score_operands", ()))}
  return {"query": built.q, "key": built.k, "value": built.v, **terms}


def gather_operands(moving: dict[str, Any]) -> dict[str, Any]:
  """The keywords of a call from what `arrays_of` gives: operands by their number become `score_operands`."""
  operands = sorted(name for name in moving if name.startswith("operand "))
  rest = {name: x for name, x in moving.items() if name not in operands}
  return rest | ({"score_operands": tuple(moving[name] for name in operands)} if operands else {})


def draw_cotangents(built: Built, seed: int = 0) -> tuple[Any, Any]:
  """Random cotangents for `out [B, T, N, E]` and for `lse [B, T, N]`."""
  rng = np.random.default_rng(seed)
  shape = (*built.q.shape[:3], built.v.shape[3])
  wide = np.float64 if built.q.dtype == np.float64 else np.float32
  return rng.normal(size=shape).astype(built.q.dtype), rng.normal(size=shape[:3]).astype(wide)


def answer(function: Any, arrays: dict[str, Any], cotangents: Any) -> Answer:
  """`function(**arrays) -> (out, lse)` and its gradients."""
  return jax.tree.map(np.asarray, _answers(function, arrays, cotangents)[0])


def at_once(function: Any, arrays: dict[str, Any], *cotangents: Any) -> list[Answer]:
  """`answer` for each of the cotangents, of one program that rounds where it says so: compiled in half the time of its operations."""
  run = jax.jit(functools.partial(_answers, function), compiler_options={"xla_allow_excess_precision": False})
  return jax.tree.map(np.asarray, run(arrays, *cotangents))


def _answers(function: Any, arrays: dict[str, Any], *cotangents: Any) -> list[Answer]:
  (out, lse), pull = jax.vjp(lambda x: function(**gather_operands(x)), {name: jnp.asarray(x) for name, x in arrays.items()})
  return [Answer(out, lse, pull(tuple(jnp.asarray(c).astype(y.dtype) for c, y in zip(pair, (out, lse))))[0]) for pair in cotangents]


def _positions(built: Built) -> dict[str, Any]:
  names = ("query_positions", built.q), ("key_value_positions", built.k)
  return {n: np.broadcast_to(built.kwargs[n], x.shape[:2]) for n, x in names if n in built.kwargs}


def _finite_bias(built: Built) -> tuple[Any, Any]:
  """(bias, keep): a bias of -inf is a mask by another name."""
  bias = built.kwargs.get("bias")
  if bias is None:
    return None, built.keep
  return np.where(bias == -np.inf, 0, bias), built.keep & (bias > -np.inf)


def dense(built: Built, cotangents: Any, dtype: Any) -> Answer:
  """What `_reference.attention` answers when all is computed in `dtype`."""
  bias, keep = _finite_bias(built)
  kwargs = {name: built.kwargs[name] for name in (*SCORE_TERMS, *OTHER_TERMS, "score_mod") if name in built.kwargs}
  kwargs |= _positions(built) | {"factors": built.factors}
  arrays = arrays_of(built) | ({"bias": bias} if bias is not None else {})

  def function(**moving):
    moving = jax.tree.map(lambda x: x.astype(dtype), moving)
    for name in ("scale", "logits_soft_cap"):
      if name in moving:
        moving[name] = moving[name].reshape(())
    return _reference.attention(**{**kwargs, **moving}, keep=keep, dtype=dtype)

  return at_once(function, arrays, cotangents)[0]


def exact(built: Built, cotangents: Any) -> tuple[Answer, dict[str, Any]]:
  """The answer in float64, and Σ|terms| of the gradients that are sums over scores.

  Every score term is blown up to `[B, N, T, S]` first, so that the gradient of a term is a plain sum of what is returned.
  """
  bias, keep = _finite_bias(built)
  arrays = arrays_of(built) | ({"bias": bias} if bias is not None else {})
  lay_out = {"alibi_slopes": lambda x: x.reshape(-1, x.shape[-1], 1, 1), "bias": lambda x: x.reshape((1,) * (4 - x.ndim) + x.shape)}
  arrays.setdefault("bias", np.zeros((1, 1, 1, 1), np.float32))
  flat = {name: lay_out.get(name, lambda x: x.reshape(1, 1, 1, 1))(x) for name, x in arrays.items() if name in SCORE_TERMS}
  b, t, n, _ = built.q.shape
  i, j = (_positions(built).get(name, np.arange(size)[None])
          for name, size in (("query_positions", t), ("key_value_positions", built.k.shape[1])))
  distance = abs(i[:, None, :, None].astype(np.float64) - j[:, None, None, :])
  names = "scale", "logits_soft_cap", "score_mod"
  numbers = {name: built.kwargs[name] for name in names if name in built.kwargs and name not in arrays} | _positions(built)

  def function(query, key, value, **full):
    slopes = full.pop("alibi_slopes", None)
    if slopes is not None:
      full["bias"] = full.get("bias", 0) - slopes * distance
    return _reference.attention(query, key, value, keep=keep, dtype=jnp.float64, factors=built.factors, **numbers, **full)

  with jax.enable_x64(True):
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    wide |= {name: np.array(np.broadcast_to(np.asarray(x, np.float64), keep.shape)) for name, x in flat.items()}
    only_lse = tuple(np.full_like(x, n) for n, x in enumerate(cotangents))
    result, of_lse = at_once(function, wide, cotangents, only_lse)
  p = of_lse.grads["bias"]  # [B, N, T, S], with the derivative of the soft cap
  gross = _gross(built, p, result, cotangents, distance)
  grads, sums = dict(result.grads), {name: gross[name].max() for name in ("query", "key", "value")} | _gross_others(built, gross)
  for name, x in flat.items():
    axes = tuple(axis for axis in range(4) if x.shape[axis] == 1)
    grads[name] = result.grads[name].sum(axes, keepdims=True).reshape(arrays[name].shape)
    sums[name] = gross.get(name, abs(result.grads[name])).sum(axes).max()
  return result._replace(grads=grads), sums


def _gross(built: Built, p: Any, truth: Answer, cotangents: Any, distance: Any) -> dict[str, Any]:
  """Σ|terms| of dS = P ∘ (dP - D + dlse), of dQ = scale · dS K, dK = scale · dSᵀ Q and dV = Pᵀ dO, and the terms of score terms."""
  q, k, v, dout, dlse = (abs(np.asarray(x, np.float64)) for x in (*built[:3], *cotangents))
  groups = q.shape[2] // k.shape[2]
  k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
  row = lambda x: x.transpose(0, 2, 1)[..., None]
  p = abs(p) * (1 + row(np.where(np.isfinite(truth.lse), abs(truth.lse), 0)) / 2)
  ds = p * (built.factors * np.einsum("btne,bsne->bnts", dout, v) + row((dout * abs(truth.out)).sum(-1) + dlse))
  scale = np.max(abs(np.asarray(built.kwargs.get("scale", q.shape[-1] ** -0.5))))
  by_head = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)
  return {"query": scale * np.einsum("bnts,bsnh->btnh", ds, k), "key": by_head(scale * np.einsum("bnts,btnh->bsnh", ds, q)),
          "value": by_head(np.einsum("bnts,btne->bsne", built.factors * p, dout)), "bias": ds, "alibi_slopes": ds * distance,
          "scale": ds * np.einsum("btnh,bsnh->bnts", q, k), "sinks": ((dout * abs(truth.out)).sum(-1) + dlse).sum((0, 1))}


def _gross_others(built: Built, gross: dict[str, Any]) -> dict[str, Any]:
  """The largest Σ|terms| of sinks (each row's share of the sink is at most 1) and of operands that add to the scores."""
  mod, operands = built.kwargs.get("score_mod"), built.kwargs.get("score_operands", ())
  sums = {"sinks": gross["sinks"].max()}
  if mod is not None:
    b, n, t, s = built.keep.shape
    at = [np.arange(size).reshape([-1 if a == axis else 1 for a in range(4)]) for axis, size in enumerate((b, n, t, s))]
    floats = [jnp.asarray(x, jnp.float32) for x in operands]
    pulled = jax.vjp(lambda *x: mod(jnp.zeros(built.keep.shape), *at, *x), *floats)[1](jnp.asarray(gross["bias"], jnp.float32))
    sums |= {f"operand {i}": float(abs(x).max()) for i, x in enumerate(pulled)}
  return sums


class Verdict(NamedTuple):
  """What is right, and how far off an answer may be."""

  truth: Answer
  sums: dict[str, Any]  # Σ|terms| by argument name
  error: Answer  # of dense attention in the same dtype
  shrink: float  # by which that error is scaled


def judge(built: Built, cotangents: Any) -> Verdict:
  """The verdict for an answer to `built`, by the dtype of its queries."""
  truth, sums = exact(built, cotangents)
  dtype = built.q.dtype
  if dtype == np.float64:  # judged as float32 is, times the ratio of their eps
    narrow = lambda x: np.asarray(x, np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
    as_float32 = Built(*map(narrow, built[:3]), {n: narrow(x) for n, x in built.kwargs.items()}, built.keep, built.factors)
    naive, base = dense(as_float32, cotangents, np.float32), exact(as_float32, cotangents)[0]
    shrink = 2 * np.finfo(np.float64).eps / np.finfo(np.float32).eps
  else:
    naive, base, shrink = dense(built, cotangents, dtype), truth, 1.0
  seen = truth.lse > -np.inf
  grads = {name: naive.grads[name].astype(np.float64) - base.grads[name] for name in arrays_of(built)}
  return Verdict(truth, sums, Answer(naive.out - base.out, naive.lse[seen] - base.lse[seen], grads), shrink)


def check(ours: Answer, built: Built, cotangents: Any, verdict: Verdict | None = None) -> None:
  """Asserts shapes, dtypes and values of out, lse and all gradients."""
  truth, sums, error, shrink = verdict or judge(built, cotangents)
  dtype = built.q.dtype
  wide = dtype if dtype == np.float64 else np.dtype(np.float32)
  assert ours.out.dtype == dtype and ours.lse.dtype == wide
  close(ours.out, truth.out, error.out, 2 * shrink, "out")
  seen = truth.lse > -np.inf
  np.testing.assert_array_equal(ours.lse == -np.inf, ~seen, "lse is -inf exactly where nothing is seen")
  close(ours.lse[seen], truth.lse[seen], error.lse, 2 * shrink, "lse")
  assert not ours.out.astype(np.float64)[~seen].any(), "out is 0 where nothing is seen"
  assert not ours.grads["query"].astype(np.float64)[~seen].any(), "no gradient where nothing is seen"
  for name, x in arrays_of(built).items():
    got = ours.grads[name]
    assert got.dtype == x.dtype and got.shape == x.shape, name
    close(got, truth.grads[name], error.grads[name], 3 * shrink, f"d{name}", np.finfo(wide).eps * sums.get(name, 0))


def close(got: Any, truth: Any, naive_error: Any, factor: float, name: str, sum_error: float = 0.0) -> None:
  """Asserts |got - truth| <= factor · max|naive_error| + rounding of the result + rounding of its sum."""
  if not truth.size:
    return
  rounded = truth.astype(got.dtype)
  shift = np.asarray(0.3, got.dtype)
  rounding = 2 * np.max(abs(((rounded + shift) - shift).astype(np.float64) - rounded.astype(np.float64)))
  rounding = max(rounding, np.max(abs(truth)) * float(jnp.finfo(got.dtype).eps))  # a few numbers may bear 0.3 exactly
  error, allowed = np.max(abs(got.astype(np.float64) - truth)), factor * np.max(abs(naive_error)) + rounding + sum_error
  assert error <= allowed, f"{name}: off by {error:.3g}, and {allowed:.3g} is allowed (largest value {abs(truth).max():.3g})"
