"""How plain JAX cuts keys out: several tiles of a row in one step, and tiles of the keys as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _api, _plan, _tiles_xla, masks
from tests.test_not_finite import BAD

B, T, S, N, K, H, E = 2, 90, 250, 4, 2, 8, 6
BLOCKS = (30, 50)
# Full tiles by row, of 5 key tiles: more and fewer than fill a step of 2 or 3, and none.
TABLE = np.array([[1, 1, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)


def draw(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def tensors():
  return draw((B, T, N, H), (B, S, K, H), (B, S, K, E))


def close(found, want):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


TERMS = {
    "blocks": {},
    "all tiles": {"mask": None, "logits_soft_cap": 5.0},
    "bias": {"bias": (1, N, T, S)},
    "bias of keys": {"bias": (B, 1, 1, S)},
    "bias of queries": {"bias": (1, N, T, 1)},
    "dropout and slopes": {"dropout_rate": 0.3, "dropout_key": jax.random.key(0), "alibi_slopes": 0.1 * jnp.arange(1.0, N + 1)},
    "score_mod": {"score_mod": lambda s, b, h, q, k: s * (1 + 0.1 * jnp.cos(q - k + b + h))},
    "a table at run time": {"mask": masks.BlockSparse(jnp.asarray(TABLE), BLOCKS)},
    "with partial tiles": {"mask": masks.BlockSparse(TABLE, BLOCKS) & masks.Window(200, None)},
}


@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_tiles_in_one_step(monkeypatch, terms, together):
  """out, lse, all gradients and a second derivative, whatever the number of tiles in a step."""
  q, k, v = tensors()
  terms = {"mask": masks.BlockSparse(TABLE, BLOCKS), **terms}
  shape = terms.pop("bias", None)
  bias = None if shape is None else draw(shape)[0]

  def results(count):
    monkeypatch.setattr(_tiles_xla, "together", lambda problem, tiles: count)
    attend = lambda *x: jflash.attention(*x, implementation="xla", tiles=BLOCKS, return_residual=True, **terms)
    out, pull = jax.vjp(attend, q, k, v, bias)
    cotangents = jax.tree.map(jnp.cos, out)
    along = lambda q: jax.vjp(lambda k: attend(q, k, v, bias), k)[1](cotangents)
    return out, pull(cotangents), jax.jvp(along, (q,), (jnp.sin(q),))

  close(results(together), results(1))


def test_small_blocks_are_computed_several_at_a_time(monkeypatch):
  monkeypatch.setattr(_tiles_xla, "OLD", True)  # whose tiles are larger than any of these blocks

  def together(side, **kwargs):
    x = jax.ShapeDtypeStruct((1, 4096, 4, 16), jnp.float32)
    table = np.eye(4096 // side, dtype=bool)
    plan = []
    jax.eval_shape(lambda q: plan.append(_plan.plan_xla(_api.make_problem(q, q, q, **kwargs or {
        "mask": masks.BlockSparse(table, (side, side))}))), x)
    return plan[0].together

  assert [together(side) for side in (64, 128, 256, 512)] == [4, 4, 2, 1]
  assert together(256, is_causal=True) == 1


PLACED = {"causal": {"is_causal": True}, "window": {"local_window_size": (20, 30)}, "no mask": {},
          "bias and lengths": {"bias": (1, N, T, S), "key_value_seq_lengths": np.array([70, 201])}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("terms", PLACED.values(), ids=PLACED.keys())
def test_keys_as_they_are(monkeypatch, terms, dtype):
  """The same bits as from keys with their heads in front."""
  q, k, v = (x.astype(dtype) for x in tensors())
  terms = {**terms, "bias": draw(terms["bias"])[0]} if "bias" in terms else terms
  monkeypatch.setattr(_tiles_xla, "sides", lambda problem: (48, 80))
  monkeypatch.setattr(_tiles_xla, "rows_at_once", lambda problem, kinds: 0)

  def result(in_place):
    monkeypatch.setattr(_tiles_xla, "in_place", lambda problem, kinds: in_place)
    return np.asarray(jflash.attention(q, k, v, implementation="xla", **terms).astype("float32"))

  np.testing.assert_array_equal(result(True), result(False))


@pytest.mark.parametrize("bad", BAD)
def test_hidden_values_cut_out_of_keys_as_they_are(monkeypatch, bad):
  q, k, v = tensors()
  monkeypatch.setattr(_tiles_xla, "sides", lambda problem: (48, 80))
  monkeypatch.setattr(_tiles_xla, "in_place", lambda problem, kinds: True)
  attend = lambda k, v: jflash.attention(q, k, v, implementation="xla", is_causal=True)
  np.testing.assert_array_equal(attend(k.at[:, T:].set(bad), v.at[:, T:].set(bad)), attend(k, v))


def test_which_keys_are_cut_as_they_are():
  visits = lambda count: np.ones((1, 1, count, 3), np.int32)
  x = jnp.zeros((1, 4, 2, 8))
  problem = _api.make_problem(x, x, x)
  assert _tiles_xla.in_place(problem, visits(6)) and not _tiles_xla.in_place(problem, visits(7))
  assert not _tiles_xla.in_place(problem, visits(1))  # they are so anyway
  assert not _tiles_xla.in_place(problem, jnp.asarray(visits(6)))  # not known
