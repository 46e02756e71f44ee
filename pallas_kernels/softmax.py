"""The online softmax, written once: start, accumulate, finish, merge, and what the backward pass needs.

Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135, Algorithm 1; arXiv:2307.08691 for one division at the end.
How a backend keeps a number for each row of scores `[..., rows, columns]` is its choice (`Rows`), and so is the base of its
powers (`Weight`). A masked score is -inf, and nothing here turns that into a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

INF = float("inf")
LOG2_E = math.log2(math.e)


class Rows(NamedTuple):
  """Statistics of the rows of a tile."""

  max: Callable[[Any], Any]
  sum: Callable[[Any], Any]
  spread: Callable[[Any, int], Any]  # a statistic, as what broadcasts against `[..., rows, width]`
  whole: Callable[[Any], Any] = lambda total: total  # a sum that `sum` may have left in parts, which add up elementwise


# Kept with a last axis of size one.
COLUMNS = Rows(lambda s: jnp.max(s, axis=-1, keepdims=True), lambda s: jnp.sum(s, axis=-1, keepdims=True), lambda x, width: x)

Weight = Callable[[Any, Any], Any]  # exp(s - base), with what has the shape of s or broadcasts against it


def natural(s: Any, base: Any) -> Any:
  return jnp.exp(s - base)


def powers(unit: float) -> Weight:
  """exp(unit · (s - base)), 1 where s is the base, however large."""
  return natural if unit == 1 else lambda s, base: jnp.exp(unit * (s - base))


def powers_of_two(unit: float) -> Weight:
  """The same by exp2, which is what chips have."""
  factor = unit * LOG2_E
  return lambda s, base: jnp.exp2((s - base) * factor)


class State(NamedTuple):
  """What has been seen of some rows: m = max s, or less with slack, total = Σ exp(s - m), acc = Σ exp(s - m) v."""

  m: Any  # [..., rows, 1], or as `Rows` has it
  total: Any  # [..., rows, 1]
  acc: Any  # [..., rows, E]


def start(rows: tuple[int, ...], width: int, dtype: Any) -> State:
  """The state of rows that have seen nothing."""
  zeros = lambda n: jnp.zeros((*rows, n), dtype)
  return State(zeros(1) - INF, zeros(1), zeros(width))


def advance(m: Any, total: Any, s: Any, rows: Rows = COLUMNS, weight: Weight = natural,
            slack: float = 0.0, all_see: bool = False) -> tuple[Any, Any, Any, Any]:
  """(m, total, what was summed before shrinks by this, p) with a tile of scores; `all_see`: each of its rows has a finite one.

  With `slack` m stays, and the last but one is exactly 1, where the scores exceed m by no more than that. m is then any base of
  the powers, p may be as large as the weight of `slack`, and what `finish` returns is the same.
  """
  highest = jnp.maximum(m, rows.max(s))
  if slack:
    highest = jnp.where(highest - m > slack, highest, m)  # m where both are -inf
  base = highest if all_see else jnp.where(highest == -INF, 0.0, highest)  # rows that have seen nothing: exp(-inf - 0) = 0
  p = weight(s, rows.spread(base, s.shape[-1]))
  shrink = weight(m - base, 0.0) if slack else weight(m, base)  # the latter is 1 only up to rounding where m stays
  return highest, shrink * total + rows.sum(p), shrink, p


def accumulate(state: State, s: Any, weigh: Callable[[Any], Any], rows: Rows = COLUMNS, weight: Weight = natural,
               all_see: bool = False) -> State:
  """Adds a tile of scores; `weigh(p)` is p V for that tile's values."""
  m, total, shrink, p = advance(state.m, state.total, s, rows, weight, all_see=all_see)
  return State(m, total, rows.spread(shrink, state.acc.shape[-1]) * state.acc + weigh(p))


def finish(state: State, rows: Rows = COLUMNS, unit: float = 1.0) -> tuple[Any, Any]:
  """out = acc / total and lse = unit · m + log total; 0 and -inf for rows that saw nothing."""
  empty = state.m == -INF
  total = jnp.where(empty, 1.0, rows.whole(state.total))
  return state.acc / rows.spread(total, state.acc.shape[-1]), jnp.where(empty, -INF, state.m * unit + jnp.log(total))


def merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
  """(out, lse) over the union of two disjoint sets of keys; `out [..., E]`, `lse [...]`. Associative; lse -inf is neutral."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  top = jnp.maximum(lse_a, lse_b)
  base = jnp.where(top == -INF, 0.0, top)
  weight_a, weight_b = jnp.exp(lse_a - base), jnp.exp(lse_b - base)
  total = jnp.where(top == -INF, 1.0, weight_a + weight_b)
  share = lambda w: (w / total)[..., None]
  return share(weight_a) * out_a + share(weight_b) * out_b, jnp.where(top == -INF, -INF, base + jnp.log(total))


def probabilities(s: Any, lse: Any, weight: Weight = natural) -> Any:
  """P = exp(s - lse), and 0 for rows that saw nothing; `lse [..., rows, 1]`."""
  return weight(s, jnp.where(lse == -INF, INF, lse))


def dscores(p: Any, dp: Any, delta: Any) -> Any:
  """dS = P ∘ (dP - δ) with dP = dO Vᵀ and δ = rowsum(dO ∘ O) - dlse, `[..., rows, 1]` (arXiv:2205.14135, Algorithm 4)."""
  return p * (dp - delta)


def row_cotangents(out: Any, lse: Any, dout: Any, dlse: Any,
                   dot: Callable[[Any, Any], Any] = lambda a, b: jnp.sum(a * b, axis=-1)) -> tuple[Any, Any]:
  """(dout, δ) for `dscores`: δ = rowsum(dO ∘ O) - dlse, `[...]`, and both 0 for rows that saw nothing, whatever arrives."""
  dead = lse == -INF
  dout = jnp.where(dead[..., None], jnp.zeros_like(dout), dout)
  return dout, jnp.where(dead, 0.0, dot(dout.astype(lse.dtype), out.astype(lse.dtype)) - dlse)


def finite(x: Any) -> Any:
  """`x` with 0 for what is not finite, so that 0 · x is 0: for operands of which some rows count for nothing."""
  return jnp.where(jnp.isfinite(x.astype(jnp.float32)), x, jnp.zeros_like(x))


def guarded(dot: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
  """`dot`, of which elements that are not finite may be thrown away: its derivatives count what is not finite as 0."""
  @jax.custom_jvp
  def product(a, b):
    return dot(a, b)

  @product.defjvp
  def _(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return product(a, b), product(da, finite(b)) + product(finite(a), db)

  return product


def count_not_finite(x: Any) -> Any:
  """Counted, because a maximum may lose a NaN: XLA's CPU compiler (JAX 0.10 to 0.12) does so when it reduces several axes."""
  return jnp.sum(jnp.where(jnp.abs(x.astype(jnp.float32)) < INF, 0.0, 1.0))


def weigh_masked(p: Any, s: Any, v: Any, dot: Callable[[Any, Any], Any], end: Callable[[Any], Any] = lambda out: out,
                 again: Callable[[], Any] | None = None) -> Any:
  """`end(p V)` where a key that a row does not see (s = -inf) must not touch it, even if its value is inf or NaN.

  Finite values are the rule. Otherwise what is not finite is summed apart, over the keys each row does see: NaN as inf - inf.
  A result of that branch is copied, hence `end` within it, and p is kept for it, unless `again` computes it there.
  """
  def add_what_is_not_finite(_):
    out = dot(again() if again else p, finite(v))
    seen = (s != -INF).astype(s.dtype)
    wide = v.astype(jnp.float32)
    for inside, what in ((wide < INF, INF), (wide > -INF, -INF)):
      touched = dot(seen, jnp.where(inside, 0.0, 1.0).astype(v.dtype)) > 0
      out = out + jnp.where(touched, what, 0.0).astype(out.dtype)
    return end(out)

  out = dot(p, v)
  total = jnp.sum(out.astype(jnp.float32))  # finite ones that overflow only take the longer way
  return jax.lax.cond(jnp.abs(total) < INF, end, add_what_is_not_finite, out)
