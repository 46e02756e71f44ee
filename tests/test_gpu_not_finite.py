"""The kernels for Hopper, interpreted: what is not finite where nobody looks stays there, and where somebody does, it shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from tests import gpu_topology

gpu_topology.require_jax()
from jflash import masks  # noqa: E402
from pallas_kernels.hopper import mend  # noqa: E402
from tests.gpu_interpret import attention, interpret  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

T, S, N, K, H, E = 70, 130, 2, 1, 8, 12
BAD = [np.nan, np.inf, -np.inf]


def draw(t=T, s=S):
  """q, k, v, the cotangent of out, in bfloat16, and that of lse, as NumPy arrays; one batch element."""
  rng = np.random.default_rng(0)
  shapes = (1, t, N, H), (1, s, K, H), (1, s, K, E), (1, t, N, E)
  return *(np.array(jnp.asarray(rng.normal(size=shape), jnp.bfloat16)) for shape in shapes), rng.normal(size=(1, t, N)).astype("f")


def gradient(attend, tiles=None, **options):
  """A function of `draw`'s arrays and a bias (or None) that gives out, lse, dq, dk, dv and the bias's gradient."""
  tiles = {} if tiles is None else {"tiles": tiles}

  def run(q, k, v, dout, dlse, bias=None):
    (out, lse), pull = jax.vjp(lambda q, k, v, bias: attend(q, k, v, bias, **options, **tiles), q, k, v, bias)
    return out, lse, *pull((dout, dlse))

  return run


NAMES = "out", "lse", "dq", "dk", "dv", "dbias"


def as_numpy(results):
  return {name: np.asarray(x, np.float32) for name, x in zip(NAMES, results) if x is not None}


def assert_same(dirty, clean):
  """As far as bfloat16 goes: what is computed again rounds P against the maxima of other groups of keys."""
  for name, x in clean.items():
    seen = x != -np.inf
    assert np.isfinite(x[seen]).all(), name
    np.testing.assert_array_equal(dirty[name] != -np.inf, seen, name)
    np.testing.assert_allclose(dirty[name][seen], x[seen], rtol=0, atol=2.0**-6 * abs(x[seen]).max(), err_msg=name)


CAUSAL = {"is_causal": True}
# Options, the shape of a bias, tiles, and the keys [S] that no query sees; all of them are in partial tiles.
HIDDEN = {
    "causal": (CAUSAL, None, (64, 64), np.arange(S) >= T),
    "lengths, two warpgroups": ({"key_value_seq_lengths": np.array([33])}, None, (128, 64), np.arange(S) >= 33),
    "mask array, two warpgroups": ({"mask": (np.arange(S) % 3 > 0)[None]}, None, (64, 128), np.arange(S) % 3 == 0),
    "a bias by query and key": (CAUSAL, (1, N, T, S), (64, 64), np.arange(S) >= T),
    "a bias by key, capped, dropped": (CAUSAL | {"logits_soft_cap": 5.0, "dropout_rate": 0.2, "dropout_key": jax.random.key(3)},
                                       (1, 1, 1, S), (64, 64), np.arange(S) >= T)}


@pytest.mark.parametrize("options, bias, tiles, hidden", HIDDEN.values(), ids=HIDDEN.keys())
def test_hidden_keys_and_values_reach_nothing(options, bias, tiles, hidden):
  q, k, v, dout, dlse = draw()
  run = gradient(attention, tiles, **options)
  bias = None if bias is None else np.random.default_rng(1).normal(size=bias).astype("f")
  clean = as_numpy(interpret(run, q, k, v, dout, dlse, bias))
  k[:, hidden], v[:, hidden] = (np.resize(BAD, x[:, hidden].shape) for x in (k, v))
  dirty = as_numpy(interpret(run, q, k, v, dout, dlse, bias))
  assert_same(dirty, clean)
  assert not dirty["dk"][:, hidden].any() and not dirty["dv"][:, hidden].any()


def test_queries_that_see_nothing_reach_nothing():
  """Every fourth query sees no key, and it and its cotangents are not finite."""
  q, k, v, dout, dlse = draw()
  run = gradient(attention, mask=(np.arange(T) % 4 > 0)[:, None] & np.ones((1, S), bool))
  clean = as_numpy(interpret(run, q, k, v, dout, dlse))
  q[:, ::4], dout[:, ::4], dlse[:, ::4] = np.nan, np.inf, np.nan
  dirty = as_numpy(interpret(run, q, k, v, dout, dlse))
  assert_same(dirty, clean)
  assert not dirty["out"][:, ::4].any() and not dirty["dq"][:, ::4].any() and (dirty["lse"][:, ::4] == -np.inf).all()


def kinds(x):
  """0 for what is finite, 1 for NaN, 2 and 3 for infinities."""
  return np.where(np.isnan(x), 1, np.where(x == np.inf, 2, np.where(x == -np.inf, 3, 0)))


def test_what_is_seen_shows_exactly_where_plain_jax_shows_it():
  """In values: NaN in column 1 from query 66 on, infinities in columns 3 and 5, both in column 7, which is NaN from query 40 on."""
  q, k, v, dout, dlse = draw()
  v[0, 66, 0, 1], v[0, 10, 0, 3], v[0, 65, 0, 5], v[0, 20, 0, 7], v[0, 40, 0, 7] = np.nan, np.inf, -np.inf, np.inf, -np.inf
  v[0, T:] = np.nan
  ours = as_numpy(interpret(gradient(attention, **CAUSAL), q, k, v, dout, dlse))
  plain = as_numpy(jax.jit(gradient(jflash.attention, **CAUSAL, implementation="xla", return_residual=True))(q, k, v, dout, dlse))
  found = kinds(ours["out"])
  for name in NAMES[:-1]:
    np.testing.assert_array_equal(kinds(ours[name]), kinds(plain[name]), name)
  np.testing.assert_allclose(ours["out"][found == 0], plain["out"][found == 0], rtol=0.02, atol=0.02)
  want = np.zeros_like(found)
  want[0, 66:, :, 1], want[0, 10:, :, 3], want[0, 65:, :, 5], want[0, 20:40, :, 7], want[0, 40:, :, 7] = 1, 2, 3, 2, 1
  np.testing.assert_array_equal(found, want)


def test_a_seen_key_that_is_nan_reaches_exactly_its_rows():
  q, k, v, dout, dlse = draw()
  run = gradient(attention, **CAUSAL)
  clean = as_numpy(interpret(run, q, k, v, dout, dlse))
  k[0, 50, 0, 3] = np.nan
  dirty = as_numpy(interpret(run, q, k, v, dout, dlse))
  for name in ("out", "lse", "dq"):
    assert np.isnan(dirty[name][:, 50:]).all(), name
    np.testing.assert_array_equal(dirty[name][:, :50], clean[name][:, :50], name)


BLOCKS = np.array([[1, 0, 0], [0, 1, 0]], bool)


@pytest.fixture
def nothing_mended(monkeypatch):
  """So that what is read of a tile that is to be skipped shows."""
  jax.clear_caches()
  monkeypatch.setattr(mend, "wanted", lambda *results: jnp.bool_(False))
  yield
  jax.clear_caches()


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_nothing_of_skipped_tiles_is_read(nothing_mended, traced):
  """Of 2 x 3 tiles two are seen: q and k are NaN where no tile that is seen has them, and so is v."""
  q, k, v, dout, dlse = draw(192, 192)
  table = np.concatenate([BLOCKS, np.zeros((1, 3), bool)])
  run = lambda table, *args: gradient(attention, mask=masks.BlockSparse(table, (64, 64)))(*args)
  call = lambda *args: as_numpy(
      interpret(run, table, *args) if traced else interpret(lambda *args: run(table, *args), *args))
  clean = call(q, k, v, dout, dlse)
  q[:, 128:], dout[:, 128:], k[:, 128:], v[:, 128:] = np.nan, np.nan, np.nan, np.nan
  dirty = call(q, k, v, dout, dlse)
  assert_same(dirty, clean)
  assert np.isfinite(dirty["out"]).all() and not dirty["dk"][:, 128:].any() and (dirty["lse"][:, 128:] == -np.inf).all()


@pytest.mark.parametrize("size, least", [(1e5, 0.0), (1e15, 0.0), (1.0, -1e9), (1.0, float(np.finfo(np.float32).min))])
def test_a_score_does_not_differ_from_itself(size, least):
  """Scores of 10^10 and 10^30, and rows in which a bias puts all scores at the same bottom, as padding does: these see a mean."""
  q, k, v, *_ = draw()
  bias = np.zeros((1, 1, T, S), np.float32)
  bias[:, :, :5], bias[:, :, 10, 3:] = least, least
  arrays = *((x.astype("f") * size).astype(x.dtype) for x in (q, k)), v, jnp.asarray(bias)
  (out, lse), (want, want_lse) = interpret(attention, *arrays), jflash.attention(*arrays, implementation="xla", return_residual=True)
  np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=2.0**-7)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
