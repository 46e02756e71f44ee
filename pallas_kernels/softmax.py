"""The online softmax, written once: start, accumulate, finish, merge, and what the backward pass needs.

Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135, Algorithm 1; arXiv:2307.08691 for one division at the end.
Row statistics keep a last axis of size one, so that they broadcast against scores `[..., rows, columns]`. A masked score is
-inf, and nothing here turns that into a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

INF = float("inf")


class State(NamedTuple):
  """What has been seen of some rows: m = max s, total = Σ exp(s - m), acc = Σ exp(s - m) v."""

  m: Any  # [..., rows, 1]
  total: Any  # [..., rows, 1]
  acc: Any  # [..., rows, E]


def start(rows: tuple[int, ...], width: int, dtype: Any) -> State:
  """The state of rows that have seen nothing."""
  zeros = lambda n: jnp.zeros((*rows, n), dtype)
  return State(zeros(1) - INF, zeros(1), zeros(width))


def accumulate(state: State, s: Any, weigh: Callable[[Any], Any]) -> State:
  """Adds a tile of scores; `weigh(p)` is p V for that tile's values."""
  m = jnp.maximum(state.m, jnp.max(s, axis=-1, keepdims=True))
  base = jnp.where(m == -INF, 0.0, m)  # rows that have seen nothing yet: exp(-inf - 0) = 0
  p = jnp.exp(s - base)
  shrink = jnp.exp(state.m - base)
  return State(m, shrink * state.total + jnp.sum(p, axis=-1, keepdims=True), shrink * state.acc + weigh(p))


def finish(state: State) -> tuple[Any, Any]:
  """out = acc / total and lse = m + log total; 0 and -inf for rows that saw nothing."""
  empty = state.m == -INF
  total = jnp.where(empty, 1.0, state.total)
  return state.acc / total, jnp.where(empty, -INF, state.m + jnp.log(total))


def merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
  """(out, lse) over the union of two disjoint sets of keys; `out [..., E]`, `lse [...]`. Associative; lse -inf is neutral."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  top = jnp.maximum(lse_a, lse_b)
  base = jnp.where(top == -INF, 0.0, top)
  weight_a, weight_b = jnp.exp(lse_a - base), jnp.exp(lse_b - base)
  total = jnp.where(top == -INF, 1.0, weight_a + weight_b)
  share = lambda w: (w / total)[..., None]
  return share(weight_a) * out_a + share(weight_b) * out_b, jnp.where(top == -INF, -INF, base + jnp.log(total))


def probabilities(s: Any, lse: Any) -> Any:
  """P = exp(s - lse), and 0 for rows that saw nothing; `lse [..., rows, 1]`."""
  return jnp.exp(s - jnp.where(lse == -INF, INF, lse))


def dscores(p: Any, dp: Any, delta: Any) -> Any:
  """dS = P ∘ (dP - δ) with dP = dO Vᵀ and δ = rowsum(dO ∘ O) - dlse, `[..., rows, 1]` (arXiv:2205.14135, Algorithm 4)."""
  return p * (dp - delta)


def row_cotangents(out: Any, lse: Any, dout: Any, dlse: Any) -> tuple[Any, Any]:
  """(dout, δ) for `dscores`: δ = rowsum(dO ∘ O) - dlse, `[...]`, and both 0 for rows that saw nothing, whatever arrives."""
  dead = lse == -INF
  dout = jnp.where(dead[..., None], jnp.zeros_like(dout), dout)
  products = dout.astype(lse.dtype) * out.astype(lse.dtype)
  return dout, jnp.where(dead, 0.0, jnp.sum(products, axis=-1) - dlse)


def finite(x: Any) -> Any:
  """`x` with 0 for what is not finite, so that 0 · x is 0: for operands of which some rows count for nothing."""
  return jnp.where(jnp.isfinite(x.astype(jnp.float32)), x, jnp.zeros_like(x))


def weigh_masked(p: Any, s: Any, v: Any, dot: Callable[[Any, Any], Any]) -> Any:
  """p V where a key that a row does not see (s = -inf) must not touch it, even if its value is inf or NaN.

  Finite values are the rule. Otherwise what is not finite is summed apart, over the keys each row does see.
  """
  out = dot(p, finite(v))

  def add_what_is_not_finite(out):
    seen = (s != -INF).astype(p.dtype)
    touched = lambda which: dot(seen, which.astype(v.dtype)) > 0
    wide = v.astype(jnp.float32)
    for which, what in ((wide != wide, float("nan")), (wide == INF, INF), (wide == -INF, -INF)):
      out = out + jnp.where(touched(which), what, 0.0).astype(out.dtype)
    return out

  # Counted, because a maximum may lose a NaN: XLA's CPU compiler (JAX 0.10 to 0.12) does so when it reduces several axes.
  broken = jnp.sum(jnp.where(jnp.abs(v.astype(jnp.float32)) < INF, 0.0, 1.0))
  return jax.lax.cond(broken == 0, lambda out: out, add_what_is_not_finite, out)
