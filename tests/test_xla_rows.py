"""Rows that meet all of their keys at once, in plain JAX: with lse, and without, as where nobody asks for it."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _api, _plan, _tiles_xla, _xla
from pallas_kernels import schedule
from tests.cases import CASES
from tests.test_not_finite import BAD, HIDDEN, B, S, draw

NOT_TERMS = {"sinks", "implementation", "return_residual"}


def plans(problem, rows):
  """The plan of one tile, and one of `rows` rows at a time whose lse nobody asks for."""
  plan = dataclasses.replace(_plan.plan_xla(problem), tiles=(problem.queries, problem.keys), chunk=(1, problem.kv_heads), fuses=True,
                             as_bits=False)
  plan = _plan.settle(plan, _plan.make_schedule(problem, plan))
  whole = dataclasses.replace(plan, tiles=(rows, problem.keys), one_visit=True,
                              kinds=(schedule.FULL if problem.logits.mask is None else schedule.PARTIAL,))
  return plan, dataclasses.replace(plan, alone=whole)


def walked(problem):
  """(out, lse) by tiles, which `test_attention` checks."""
  with _plan.force_tiles(48, 80):
    plan = _plan.plan_xla(problem)
  return _xla.forward(problem, plan, _plan.make_schedule(problem, plan))


def run(problem, plan):
  return _xla.forward(problem, plan, _plan.make_schedule(problem, plan))


def close(found, want, lse):
  """To rounding; that of exp(s - lse) grows with |lse|."""
  size = lambda x: np.abs(x[np.isfinite(x)]).max(initial=1)
  eps, eps_of_scores = (float(jnp.finfo(x.dtype).eps) for x in (want, lse))
  found, want = (np.asarray(x, np.float64) for x in (found, want))
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(want))
  np.testing.assert_allclose(found, want, rtol=16 * eps, atol=8 * size(want) * (eps + eps_of_scores * size(np.asarray(lse))))


@pytest.mark.parametrize("case", [case for case in CASES if case.only is None or "xla" in case.only], ids=lambda case: case.name)
def test_case(case):
  with jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext():
    built = case.build()
    problem = _api.make_problem(built.q, built.k, built.v, **{k: v for k, v in built.kwargs.items() if k not in NOT_TERMS})
    out, lse = walked(problem)
    at_once, alone = plans(problem, -(-problem.queries // 2) + 1)  # ragged
    found = run(problem, at_once)
    close(found[0], out, lse)
    close(found[1], lse, lse)
    close(run(problem, alone)[0], out, lse)


@pytest.mark.parametrize("kwargs, hidden", HIDDEN.values(), ids=HIDDEN.keys())
def test_hidden_keys_and_values_reach_nothing(kwargs, hidden):
  q, k, v, *_ = draw()
  hidden = np.broadcast_to(hidden, (B, S))
  bad_k, bad_v = k.copy(), v.copy()
  for x in (bad_k, bad_v):
    x[hidden] = np.resize(BAD, x[hidden].shape)
  clean, dirty = (_api.make_problem(*x, **kwargs) for x in ((q, k, v), (q, bad_k, bad_v)))
  for plan in plans(clean, 70):
    for x, y in zip(run(clean, plan), run(dirty, plan)):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("bad", BAD)
def test_what_is_seen_by_some_reaches_exactly_those(bad):
  q, k, v, *_ = draw()
  spoilt = v.copy()
  spoilt[1, 70, 2, 5] = bad
  clean, dirty = (_api.make_problem(q, k, x, is_causal=True) for x in (v, spoilt))
  for plan in plans(clean, 70):
    out, found = run(clean, plan)[0], np.asarray(run(dirty, plan)[0])
    hit = np.zeros(out.shape, bool)
    hit[1, 70:, 4:, 5] = True
    np.testing.assert_array_equal(found[hit], np.full(hit.sum(), bad, "f"))
    np.testing.assert_array_equal(found[~hit], out[~hit])


@pytest.mark.parametrize("size", [1e10, 3e30])
def test_huge_scores(size):
  """The largest wins, as a difference to it of any size is exact, and does not overflow."""
  q = np.full((1, 5, 1, 3), size, "f")
  k = np.linspace(-1, 1, 21, dtype="f").reshape(1, 7, 1, 3)
  v = np.arange(7, dtype="f").reshape(1, 7, 1, 1)
  for causal in (False, True):
    problem = _api.make_problem(q, k, v, is_causal=causal)
    want = np.minimum(np.arange(5), 6) if causal else np.full(5, 6)
    for plan in plans(problem, 4):
      np.testing.assert_array_equal(np.ravel(run(problem, plan)[0]), want)


def test_rows_that_do_not_see_the_one_key():
  """XLA leaves out what a reduction of one element starts from, here what makes 0 of a row that sees nothing."""
  q, k, v = (np.full((1, n, 2, 4), 0.5, "f") for n in (7, 1, 1))
  problem = _api.make_problem(q, k, v, query_seq_lengths=np.array([4], np.int32))
  for plan in plans(problem, 4):
    out, lse = run(problem, plan)
    np.testing.assert_array_equal(np.asarray(out)[0, :, 0, 0], [0.5] * 4 + [0] * 3)
    if plan.alone is None:
      np.testing.assert_array_equal(np.asarray(lse)[0, :, 0], [np.float32(0.5)] * 4 + [-np.inf] * 3)


def chosen(t, dtype="bfloat16", heads=4, s=None, **kwargs):
  """The plan of a call without lse, for a compiler that fuses."""
  x = jax.ShapeDtypeStruct((2, t, heads, 16), dtype)
  y = jax.ShapeDtypeStruct((2, s or t, kwargs.pop("kv_heads", heads), 16), dtype)
  plan = None

  def make(q, k, v):
    nonlocal plan
    problem = _api.make_problem(q, k, v, **kwargs)
    plan = dataclasses.replace(_plan.plan_xla(problem), fuses=True)
    visits = _plan.make_schedule(problem, plan)
    plan = _plan.out_alone(problem, _plan.settle(plan, visits), visits)

  jax.eval_shape(make, x, y, y)
  return plan


def test_when_nobody_asks_for_lse(monkeypatch):
  monkeypatch.setattr(_tiles_xla, "OLD", False)
  walks = lambda plan: plan.alone is None or not plan.alone.one_visit
  assert chosen(300).alone.tiles == (300, 300)
  assert chosen(300, "float32").alone.tiles == (300, 300)
  assert chosen(3000).alone.tiles == (500, 3000)  # ten megabytes of scores a core at most
  assert walks(chosen(3000, "float32"))
  assert walks(chosen(5000))
  assert walks(chosen(300, bias=np.ones((1, 1, 300, 300), "f")))
  assert walks(chosen(1, s=3000))  # decoding
  assert chosen(450, is_causal=True).alone.tiles == chosen(450, "float32", is_causal=True).alone.tiles == (450, 450)
  assert chosen(500, is_causal=True).alone.tiles == (500, 500)
  assert walks(chosen(500, "float32", is_causal=True))
  assert walks(chosen(700, is_causal=True))  # scores under a mask are in memory
  assert walks(chosen(600, local_window_size=(20, 0)))  # tiles are skipped
  plan = chosen(1000, heads=8, kv_heads=2)
  assert plan.alone.tiles[0] * 4 <= 600 and plan.alone.chunk == (2, 2)
  with _plan.force_tiles(64, 64):
    assert chosen(300).alone is None


def test_a_derivative_and_lse_are_those_of_the_walk():
  """Whatever `attention` computes out by, it has an lse where that is asked for, and its derivative."""
  q, k, v = (jax.random.normal(jax.random.key(i), (1, 300, 2, 8)) for i in range(3))
  attend = lambda q, **kwargs: jflash.attention(q, k, v, implementation="xla", **kwargs)
  out, lse = attend(q, return_residual=True)
  np.testing.assert_allclose(attend(q), out, rtol=1e-5, atol=1e-6)
  want = jax.scipy.special.logsumexp(jnp.einsum("btnh,bsnh->btns", q, k, precision="highest") * 8**-0.5, axis=-1)
  np.testing.assert_allclose(lse, want, rtol=1e-5, atol=1e-5)
  whole = jax.grad(lambda q: attend(q).sum())(q)
  tiled = jax.grad(lambda q: attend(q, tiles=(64, 64)).sum())(q)
  np.testing.assert_allclose(whole, tiled, rtol=1e-4, atol=1e-6)
