"""The online softmax against the dense one, and the laws of `merge`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jflash import _reference
from pallas_kernels import softmax

QUICK = settings(max_examples=40, deadline=None)
ROWS, KEYS, WIDTH = 5, 12, 3


def dense(s, v):
  """(out, lse) in float64 NumPy."""
  s, v = np.asarray(s, np.float64), np.asarray(v, np.float64)
  top = s.max(-1, keepdims=True)
  p = np.exp(s - np.where(top == -np.inf, 0, top))
  total = p.sum(-1, keepdims=True)
  with np.errstate(divide="ignore"):
    return p / np.where(total == 0, 1, total) @ v, np.where(top == -np.inf, 0, top) + np.log(total)


@st.composite
def scores(draw):
  """Scores with some -inf, some rows of nothing else, values, and where to cut."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  s = rng.normal(size=(ROWS, KEYS)) * draw(st.sampled_from((1.0, 30.0, 1e4)))
  s[rng.random(s.shape) < draw(st.sampled_from((0.0, 0.5, 0.95)))] = -np.inf
  return s.astype(np.float32), rng.normal(size=(KEYS, WIDTH)).astype(np.float32), draw(
      st.lists(st.integers(0, KEYS), max_size=4).map(sorted))


def tiled(s, v, cuts):
  state = softmax.start((ROWS,), WIDTH, jnp.float32)
  for lo, hi in zip([0, *cuts], [*cuts, KEYS]):
    if hi > lo:
      state = softmax.accumulate(state, jnp.asarray(s[:, lo:hi]), lambda p, tile=v[lo:hi]: p @ tile)
  out, lse = softmax.finish(state)
  return np.asarray(out), np.asarray(lse)


@QUICK
@given(scores())
def test_any_split_is_the_dense_softmax(drawn):
  s, v, cuts = drawn
  out, lse = tiled(s, v, cuts)
  want_out, want_lse = dense(s, v)
  np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-6)
  assert not out[(s == -np.inf).all(-1)].any()


def grown(kind):
  """Scores `[ROWS, KEYS]` for tiles of two keys; the last row sees nothing."""
  rng, keys = np.random.default_rng(0), np.arange(KEYS)
  s = {"random": lambda: 10 * rng.normal(size=(ROWS, KEYS)),
       "growing": lambda: np.outer(np.linspace(0.1, 4, ROWS), keys),
       "a little": lambda: np.outer(np.linspace(0.1, 0.4, ROWS), keys),
       "far": lambda: 400.0 * (keys > 6) + 3.0 * (keys > 3) + rng.normal(size=(ROWS, KEYS)),
       "huge": lambda: 1e4 * rng.normal(size=(ROWS, KEYS)),
       "masked": lambda: np.where((rng.random((ROWS, KEYS)) < 0.6) | (keys < 4), -np.inf, 6 * rng.normal(size=(ROWS, KEYS)))}[kind]()
  s[-1] = -np.inf
  return s.astype(np.float32)


@pytest.mark.parametrize("unit", [None, 1.0, 0.125])
@pytest.mark.parametrize("kind", ["random", "growing", "a little", "far", "huge", "masked"])
def test_slack_changes_the_base_alone(kind, unit):
  """The maximum stays where the scores exceed it by no more than the slack, and out and lse are what they are without."""
  s, v = grown(kind), np.random.default_rng(1).normal(size=(KEYS, WIDTH)).astype(np.float32)
  weight = softmax.natural if unit is None else softmax.powers_of_two(unit)
  unit = unit or 1.0
  slack = 8 / (unit * softmax.LOG2_E)
  state, stays, moves = softmax.start((ROWS,), WIDTH, jnp.float32), 0, 0
  for lo in range(0, KEYS, 2):
    tile, before = jnp.asarray(s[:, lo:lo + 2]), state.m
    m, total, shrink, p = softmax.advance(before, state.total, tile, weight=weight, slack=slack)
    state = softmax.State(m, total, shrink * state.acc + p @ v[lo:lo + 2])
    kept = np.asarray((m == before) & (before > -np.inf))
    assert (np.asarray(shrink)[kept] == 1).all() and (np.asarray(p) <= 2 ** 8 * (1 + 1e-4)).all()
    assert (np.asarray(shrink)[~kept] < 2 ** -7.9).all()
    over = np.asarray(tile).max(-1, keepdims=True) > np.asarray(before)
    stays, moves = stays + (kept & over).sum(), moves + (over & ~kept & np.isfinite(before)).sum()
  out, lse = softmax.finish(state, unit=unit)
  want_out, want_lse = dense(unit * s.astype(np.float64), v)
  error = 1e-5 + 2.0 ** -21 * unit * np.max(np.abs(s), where=np.isfinite(s), initial=0)
  np.testing.assert_allclose(out, want_out, rtol=error, atol=error)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-5)
  assert not np.asarray(out)[-1].any() and (np.asarray(lse)[-1] == -np.inf).all()
  if unit == 1:
    assert stays or kind == "huge"
    assert moves or kind == "a little"


def parts(drawn, cuts=(4, 9)):
  s, v, _ = drawn
  return [tuple(map(np.float32, dense(s[:, lo:hi], v[lo:hi]))) for lo, hi in zip((0, *cuts), (*cuts, KEYS))]


def as_pair(part):
  return jnp.asarray(part[0]), jnp.asarray(part[1][..., 0])


def same(a, b, exact=False):
  for x, y in zip(a, b):
    if exact:
      np.testing.assert_array_equal(x, y)
    else:
      np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@QUICK
@given(scores())
def test_merge_is_associative_commutative_and_has_an_identity(drawn):
  a, b, c = map(as_pair, parts(drawn))
  same(softmax.merge(softmax.merge(a, b), c), softmax.merge(a, softmax.merge(b, c)))
  same(softmax.merge(a, b), softmax.merge(b, a), exact=True)
  nothing = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
  same(softmax.merge(a, nothing), a, exact=True)
  same(softmax.merge(nothing, a), a, exact=True)


@QUICK
@given(scores())
def test_merge_of_the_parts_is_the_whole(drawn):
  a, b, c = map(as_pair, parts(drawn))
  out, lse = softmax.merge(softmax.merge(a, b), c)
  want_out, want_lse = dense(drawn[0], drawn[1])
  np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse[..., 0], rtol=1e-6, atol=1e-6)


def _attend(q, k, v, keep):
  return _reference.attention(q, k, v, keep=keep)


@pytest.mark.parametrize("empty", [False, True])
def test_gradients_through_merge_are_those_of_the_whole(empty):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3, 4), (2, 12, 3, 4), (2, 12, 3, 6)))
  keep = rng.random((2, 3, 5, 12)) < 0.6
  if empty:
    keep[:, :, 1, :7] = False  # nothing in the first half
    keep[:, :, 2, 7:] = False  # nothing in the second
    keep[:, :, 3] = False  # nothing at all
  dout, dlse = jnp.asarray(rng.normal(size=(2, 5, 3, 6)), jnp.float32), jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)

  def loss(split):
    def f(q, k, v):
      if split:
        out, lse = softmax.merge(_attend(q, k[:, :7], v[:, :7], keep[..., :7]), _attend(q, k[:, 7:], v[:, 7:], keep[..., 7:]))
      else:
        out, lse = _attend(q, k, v, keep)
      return (out * dout).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * dlse).sum()
    return jax.grad(f, (0, 1, 2))(q, k, v)

  for halves, whole in zip(loss(True), loss(False)):
    assert np.isfinite(halves).all()
    np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-5)


def test_masked_values_that_are_not_finite_stay_out():
  s = jnp.asarray([[0.0, -jnp.inf, 1.0], [-jnp.inf, 2.0, 0.0], [-jnp.inf, -jnp.inf, 3.0]])
  p = jnp.exp(s)
  dot = lambda p, v: p @ v
  for bad in (np.nan, np.inf, -np.inf):
    v = jnp.asarray([[bad, 1.0], [2.0, 3.0], [4.0, 5.0]])
    out = np.asarray(softmax.weigh_masked(p, s, v, dot))
    np.testing.assert_array_equal(out[0, 0], bad)
    np.testing.assert_allclose(out[1:], np.asarray(p[1:, 1:] @ v[1:]), rtol=1e-6)
    np.testing.assert_allclose(out[0, 1], p[0] @ v[:, 1], rtol=1e-6)


def test_opposite_infinities_make_nan():
  s, v = jnp.zeros((1, 2)), jnp.asarray([[np.inf], [-np.inf]])
  assert np.isnan(softmax.weigh_masked(jnp.exp(s), s, v, lambda p, v: p @ v)).all()


def test_probabilities_and_dscores_of_rows_that_saw_nothing():
  s, lse = jnp.asarray([[-jnp.inf, 5.0]]), jnp.asarray([[-jnp.inf]])
  p = softmax.probabilities(s, lse)
  np.testing.assert_array_equal(p, [[0, 0]])
  np.testing.assert_array_equal(softmax.dscores(p, jnp.ones((1, 2)), jnp.zeros((1, 1))), [[0, 0]])
