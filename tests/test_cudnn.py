"""The backend "cudnn", with a stand-in for the library: what it is handed, and what is made of what comes back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jflash
from jflash import __main__ as report
from jflash import _xla, masks
from tests import cudnn_stand_in, oracle
from tests.cases import Case, Sizes, columns, per_batch, rows


@pytest.fixture
def calls(monkeypatch):
  """What the stand-in is called with."""
  return cudnn_stand_in.install(monkeypatch)


@pytest.fixture
def no_plain_jax(monkeypatch, calls):
  """Plain JAX gives threes, so that an answer that is right is not from there."""
  threes = lambda *xs: [jnp.full_like(x, 3) for x in xs]
  forward = lambda problem, *_: (jnp.full_like(problem.q, 3), jnp.full(problem.q.shape[:3], 3, jnp.float32))
  cotangent = lambda problem, *_, wanted: (*threes(problem.q, problem.k, problem.v),
                                           threes(*[x for x, w in zip(jax.tree.leaves(problem.logits), wanted) if w]))
  monkeypatch.setattr(_xla, "forward", forward)
  monkeypatch.setattr(_xla, "cotangent", cotangent)


def attend(*args, **kwargs):
  return jflash.attention(*args, **kwargs, implementation="cudnn", return_residual=True)


def draw(dtype=jnp.bfloat16, b=2, t=24, s=40, n=4, k=2, h=16):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h)))


# Values and gradients -------------------------------------------------------------------------------------------------

SIZES = Sizes(B=2, T=38, S=52, N=4, K=2, H=16, E=16)
CASES: dict[str, tuple[Case, str]] = {}  # with the name of cuDNN's mask


def case(mask="NO_MASK", dtype="bfloat16", **sizes):
  def add(draw):
    CASES[draw.__name__] = Case(draw.__name__, SIZES._replace(**sizes), draw, dtype), mask
    return draw
  return add


@case()
def scaled(rng, z):
  return {"scale": 0.7}, True


@case("CAUSAL")
def causal_more_keys(rng, z):
  return {"is_causal": True}, rows(z) >= columns(z)


@case("CAUSAL", T=52, S=38)
def causal_more_queries(rng, z):
  return {"mask": masks.Causal() & masks.Window(None, 5)}, rows(z) >= columns(z)


@case("CAUSAL")
def window(rng, z):
  return {"local_window_size": (7, 0)}, (rows(z) >= columns(z)) & (columns(z) >= rows(z) - 7)


@case("CAUSAL")
def two_windows(rng, z):
  mask = masks.Causal() & masks.Window(9, 3) & masks.Window(12)
  return {"mask": mask}, (rows(z) >= columns(z)) & (columns(z) >= rows(z) - 9)


@case("PADDING")
def key_lengths(rng, z):
  n = np.array([400, 33], np.int32)
  return {"key_value_seq_lengths": n}, columns(z) < per_batch(n)


@case("PADDING")
def no_keys(rng, z):
  n = np.array([33, -2], np.int32)
  return {"key_value_seq_lengths": n}, columns(z) < per_batch(n)


@case()
def query_lengths(rng, z):
  n = np.array([17, 0], np.int32)
  return {"query_seq_lengths": n}, rows(z) < per_batch(n)


@case("PADDING_CAUSAL", "float16")
def lengths_and_causal(rng, z):
  t, s = np.array([30, 38], np.int32), np.array([45, 0], np.int32)
  return ({"query_seq_lengths": t, "key_value_seq_lengths": s, "is_causal": True, "mask": masks.Lengths(key=20)},
          (rows(z) < per_batch(t)) & (columns(z) < np.minimum(per_batch(s), 20)) & (rows(z) >= columns(z)))


@case("CAUSAL")
def sinks(rng, z):
  return {"sinks": rng.normal(size=z.N).astype(np.float32), "is_causal": True}, rows(z) >= columns(z)


@case()
def bias(rng, z):
  return {"bias": rng.normal(size=(1, z.N, z.T, z.S)).astype(ml_dtypes.bfloat16)}, True


@case("PADDING_CAUSAL", "float16")
def bias_lengths_and_causal(rng, z):
  n = np.array([50, 33], np.int32)
  return ({"bias": rng.normal(size=(1, z.N, z.T, z.S)).astype(np.float16), "is_causal": True, "key_value_seq_lengths": n},
          (rows(z) >= columns(z)) & (columns(z) < per_batch(n)))


def check(built, of_lse=True):
  """Against the reference; with or without a cotangent of lse."""
  dout, dlse = oracle.draw_cotangents(built)
  cotangents = dout, dlse if of_lse else np.zeros_like(dlse)
  moving = oracle.arrays_of(built)
  others = {name: x for name, x in built.kwargs.items() if name not in moving}
  oracle.check(oracle.answer(jax.jit(lambda **x: attend(**x, **others)), moving, cotangents), built, cotangents)


@pytest.mark.parametrize("name", CASES)
def test_out_and_gradients(name, no_plain_jax, calls):
  check(CASES[name][0].build(), of_lse=name.startswith("sinks"))
  assert {call.mask for call in calls} == {CASES[name][1]}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("bias")])
def test_gradients_of_lse(name, no_plain_jax):
  check(CASES[name][0].build())


def test_gradients_of_lse_with_a_bias_are_from_plain_jax(calls):
  check(CASES["bias_lengths_and_causal"][0].build())


def test_what_it_is_told(calls):
  q, k, v = draw()
  attend(q, k, v, scale=0.3, local_window_size=(5, 0))
  assert set(calls) == {cudnn_stand_in.Seen(q.shape, "CAUSAL", 6, 0.3, lengths=False, bias=False)}  # 5, and its own
  calls.clear()
  attend(q, k, v, local_window_size=(22, 0))
  assert {call.window for call in calls} == {23}, "the last of 24 queries does not see the first key"
  calls.clear()
  attend(q, k, v, local_window_size=(23, 0), mask=masks.Window(2**20))
  assert set(calls) == {cudnn_stand_in.Seen(q.shape, "CAUSAL", None, 0.25, lengths=False, bias=False)}, "wider than the queries"


# What it does not answer for ------------------------------------------------------------------------------------------

HIDDEN = {
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 0)},
    "lengths": {"key_value_seq_lengths": np.array([10, 52])},
    "no keys": {"key_value_seq_lengths": np.array([0, 33]), "is_causal": True}}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_keys_and_values_reach_nothing(name, calls):
  kwargs, z = HIDDEN[name], SIZES
  i, j = rows(z), columns(z)
  left = kwargs.get("local_window_size", (z.S, 0))[0]
  keep = ((j <= i) | (name == "lengths")) & (j >= i - left) & (j < per_batch(kwargs.get("key_value_seq_lengths", [z.S])))
  built = Case(name, z, lambda rng, z: (kwargs, keep), "bfloat16").build()
  hidden = ~built.keep.any((1, 2))  # [B, S]
  assert hidden.any()
  spoilt = {"query": built.q, "key": built.k.copy(), "value": built.v.copy()}
  spoilt["key"][hidden] = spoilt["value"][hidden] = np.resize([np.nan, np.inf, -np.inf], (hidden.sum(), z.K, z.H))
  cotangents = oracle.draw_cotangents(built)
  ours = oracle.answer(jax.jit(lambda **x: attend(**x, **kwargs)), spoilt, cotangents)
  oracle.check(ours, built, cotangents)
  assert not ours.grads["key"][hidden].any() and not ours.grads["value"][hidden].any()


def test_queries_and_cotangents_past_the_length_reach_nothing(calls):
  built = CASES["query_lengths"][0].build()
  dout, dlse = oracle.draw_cotangents(built)
  past = ~built.keep.any((1, 3))  # [B, T]
  spoilt = {"query": built.q.copy(), "key": built.k, "value": built.v}
  spoilt["query"][past] = np.nan
  bad = dout.copy(), dlse.copy()
  bad[0][past], bad[1][past] = np.nan, np.inf
  oracle.check(oracle.answer(lambda **x: attend(**x, **built.kwargs), spoilt, bad), built, (dout, dlse))


def test_a_value_that_is_seen_reaches_exactly_those_who_see_it(calls):
  q, k, v = draw()
  clean = attend(q, k, v, is_causal=True)[0]
  out, _ = attend(q, k, v.at[1, 10, 1, 5].set(np.inf), is_causal=True)
  hit = np.zeros(out.shape, bool)
  hit[1, 10:, 2:, 5] = True
  assert (np.asarray(out)[hit] == np.inf).all()
  np.testing.assert_allclose(np.asarray(out, np.float32)[~hit], np.asarray(clean, np.float32)[~hit], atol=0.03)


def test_nan_of_its_own_is_computed_again(calls, monkeypatch):
  """As some versions of the library give it for finite numbers, in some rows of dq."""
  q, k, v = draw()
  dense, (forward, backward) = cudnn_stand_in._dense, (cudnn_stand_in._forward, cudnn_stand_in._backward)

  def broken(*args):
    dq, *rest = backward(*args)
    return dq.at[0, 3].set(jnp.nan), *rest

  other = jax.custom_vjp(dense.fun, nondiff_argnums=(0,))
  other.defvjp(forward, broken)
  monkeypatch.setattr(cudnn_stand_in, "_dense", other)
  total = lambda name: lambda q: jflash.attention(q, k, v, implementation=name).astype(jnp.float32).sum()
  ours, plain = (jax.grad(total(name))(q) for name in ("cudnn", "xla"))
  np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(plain, np.float32), atol=0.01)


# Transformations ------------------------------------------------------------------------------------------------------

M = 3
MAPPED = {
    "query": lambda rng: {"query": jnp.asarray(rng.normal(size=(M, *SIZES_OF["query"])), jnp.bfloat16)},
    "value": lambda rng: {"value": jnp.asarray(rng.normal(size=(M, *SIZES_OF["key"])), jnp.bfloat16)},
    "all": lambda rng: {name: jnp.asarray(rng.normal(size=(M, *SIZES_OF[name])), jnp.bfloat16) for name in SIZES_OF},
    "lengths": lambda rng: {"key_value_seq_lengths": jnp.array([[3, 40], [0, 17], [22, 23]])},
    "bias": lambda rng: {"bias": jnp.asarray(rng.normal(size=(M, 1, 4, 24, 40)), jnp.bfloat16)},
    "query beside a bias": lambda rng: {"query": jnp.asarray(rng.normal(size=(M, *SIZES_OF["query"])), jnp.bfloat16)}}
SIZES_OF = {"query": (2, 24, 4, 16), "key": (2, 40, 2, 16), "value": (2, 40, 2, 16)}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name, calls, no_plain_jax):
  """Of out and all gradients, with what is mapped over given as part of the batch where that can be."""
  given = dict(zip(SIZES_OF, draw()))
  if "beside" in name:
    given["bias"] = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 24, 40)), jnp.bfloat16)
  mapped = MAPPED[name](np.random.default_rng(2))

  def run(mapped):
    floats = {n: x for n, x in (given | mapped).items() if n != "key_value_seq_lengths"}
    rest = {n: x for n, x in mapped.items() if n not in floats}
    out, pull = jax.vjp(lambda x: jflash.attention(**x, **rest, is_causal=True, implementation="cudnn"), floats)
    return out, pull(jnp.cos(out))

  element = lambda tree, m: jax.tree.map(lambda x: x[m], tree)
  want = [run(element(mapped, m)) for m in range(M)]
  calls.clear()
  got = jax.vmap(run)(mapped)
  batch = 2 if "bias" in name else 2 * M
  assert {call.query[0] for call in calls if call.query[0] != 2} == ({batch} - {2})
  close = lambda x, y: np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.04)
  for m in range(M):
    jax.tree.map(close, element(got, m), want[m])


def test_under_vmap_plain_jax_runs_only_where_it_must(calls, monkeypatch):
  """A condition that differs from one element to the next would make both branches run."""
  taken, plain = [], _xla.forward

  def noted(*args):
    jax.debug.callback(lambda: taken.append(True))
    return plain(*args)

  monkeypatch.setattr(_xla, "forward", noted)
  q, k, v = (x.reshape(2, 1, 1, *x.shape[1:]) for x in draw())
  twice = jax.vmap(jax.vmap(lambda q, k, v: jflash.attention(q, k, v, is_causal=True, implementation="cudnn")))
  for spoilt, expected in ((v, False), (v.at[1, 0, 0, -1, 0, 0].set(jnp.nan), True)):
    assert jnp.isfinite(twice(q, k, spoilt)).all()
    jax.effects_barrier()
    assert bool(taken) == expected


def test_second_derivatives_are_those_of_plain_jax(calls):
  q, k, v = draw(b=1, t=6, s=8, n=2, k=1, h=8)

  def curvature(name):
    f = lambda q: jnp.sin(jflash.attention(q, k, v, is_causal=True, implementation=name).astype(jnp.float32)).sum()
    return jax.grad(lambda q: (jax.grad(f)(q).astype(jnp.float32)**2).sum())(q)

  ours, plain = (np.asarray(curvature(name), np.float32) for name in ("cudnn", "xla"))
  np.testing.assert_allclose(ours, plain, atol=0.05 * abs(plain).max())


def test_forward_mode(calls):
  q, k, v = draw()
  f = lambda name: lambda q: jflash.attention(q, k, v, is_causal=True, implementation=name)
  ours, plain = (jax.jvp(f(name), (q,), (jnp.ones_like(q),))[1] for name in ("cudnn", "xla"))
  np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(plain, np.float32), atol=0.04)


def test_the_report_checks_it(calls):
  assert report.why_not("cudnn") is None
  taken = [case for case in report.CASES if case.name == "lengths"]
  assert len(taken) == 1 and all(finding.ok for finding in report.check(taken[0], "cudnn"))
