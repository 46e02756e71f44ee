"""`explain`: its numbers against counts by hand and against what JAX saves, its errors against those of `attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _backends, _plan, _xla, masks

Struct = jax.ShapeDtypeStruct


def inputs(b=2, t=64, s=48, n=6, k=2, h=8, e=4, dtype=jnp.float32):
  return jnp.ones((b, t, n, h), dtype), jnp.ones((b, s, k, h), dtype), jnp.ones((b, s, k, e), dtype)


def test_tiles_counted_by_hand():
  q, k, v = inputs(t=64, s=64)
  with _plan.force_tiles(16, 16):
    why = jflash.explain(q, k, v, is_causal=True)
  assert (why.backend, why.tiles, why.interpreted, why.mask) == ("xla", (16, 16), False, "Causal()")
  assert why.tile_count == 2 * 6 * 4 * 4  # batch, query heads, query tiles, key tiles
  assert (why.skipped, why.partial, why.full) == (6 / 16, 4 / 16, 6 / 16)
  assert why.decided == "decided while tracing"


def test_a_ragged_end_needs_the_mask_and_no_mask_skips_nothing():
  with _plan.force_tiles(16, 16):
    why = jflash.explain(*inputs(t=40, s=32))  # 3 x 2 tiles, the last row ragged
  assert (why.skipped, why.partial, why.full) == (0, 2 / 6, 4 / 6)
  assert why.mask is None and "no mask" in why.decided


def test_query_heads_that_share_a_key_head_share_its_visits():
  keep = np.zeros((4, 32, 32), bool)
  keep[0, :16, :16] = keep[1, 16:] = True  # the first key head: 1 + 2 tiles, none of them for both; the second: nothing
  with _plan.force_tiles(16, 16):
    why = jflash.explain(*inputs(b=1, t=32, s=32, n=4, k=2), mask=keep)
  assert (why.skipped, why.partial, why.full) == (5 / 8, 3 / 8, 0)


def test_bytes_saved():
  q, k, v = inputs(dtype=jnp.bfloat16)
  bias, ids = np.ones((6, 1, 48), np.float32), np.zeros((2, 64), np.int32)
  why = jflash.explain(q, k, v, bias, masks.Segments(ids, np.zeros(48, np.int32)), alibi_slopes=np.ones(6, np.float32))
  rows = 2 * 64 * 6
  assert {name: why.saved[name] for name in ("query", "key", "value", "out", "lse", "logits")} == {
      "query": 2 * rows * 8, "key": 2 * 2 * 48 * 2 * 8, "value": 2 * 2 * 48 * 2 * 4, "out": 2 * rows * 4,
      "lse": 4 * rows, "logits": 4 * (6 * 48 + 6 + 2 * 64 + 48)}
  assert why.naive_saved == 2 * (rows * 8 + 2 * 48 * 2 * 12) + 4 * rows * 48
  assert why.saved_bytes == sum(why.saved.values())


def test_bytes_saved_are_those_that_jax_saves():
  q, k, v = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(inputs()))
  bias, query, key = jnp.ones((6, 64, 48)), jnp.zeros((2, 64), jnp.int32), jnp.zeros((2, 48), jnp.int32)
  attend = lambda f, q, k, v, bias, query, key: f(q, k, v, bias, masks.Segments(query, key), return_residual=True)
  args = (q, k, v, bias, query, key)

  # What is saved is what the pullback holds.
  ours = lambda *args: attend(jflash.attention, *args, query, key)
  pullback = jax.eval_shape(lambda *args: jax.vjp(ours, *args)[1], *args[:4])
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))
  assert held == attend(jflash.explain, *args[:4], query, key).saved_bytes


def test_structs_are_enough_and_known_masks_stay_known():
  structs = [Struct(x.shape, x.dtype) for x in inputs()]
  ids = jnp.repeat(jnp.arange(4), 16)
  mask = masks.Segments(ids, ids[:48]) & masks.Dense(jnp.ones((64, 48), bool))
  arguments = {"is_causal": True, "query_positions": jnp.arange(64), "logits_soft_cap": 3.0}
  with _plan.force_tiles(16, 16):
    why = jflash.explain(*structs, Struct((6, 64, 48), jnp.float32), mask, **arguments)
    same = jflash.explain(*inputs(), jnp.ones((6, 64, 48)), mask, **arguments)
    assert (why.skipped, why.partial, why.full) == (9 / 12, 3 / 12, 0)
    assert str(why) == str(same)
    unknown = jflash.explain(*inputs(), mask=masks.Segments(Struct((64,), jnp.int32), ids[:48]))
  assert (unknown.skipped, unknown.partial, unknown.full) == (None, None, None)
  assert "mask.query" in unknown.decided and "mask.key" not in unknown.decided
  assert "unknown" in str(unknown)


def test_within_jit_a_traced_mask_is_unknown_and_a_known_one_is_not():
  found = []

  @jax.jit
  def f(q, k, v, ids):
    found.append(jflash.explain(q, k, v, mask=masks.Segments(ids, ids[:48])))
    found.append(jflash.explain(q, k, v, is_causal=True, local_window_size=(3, 0)))
    return q

  with _plan.force_tiles(16, 16):
    f(*inputs(), jnp.zeros(64, jnp.int32))
  assert found[0].skipped is None and found[0].decided.startswith("decided at run time")
  assert found[1].skipped == 6 / 12 and found[1].decided == "decided while tracing"
  assert found[0].tile_count == found[1].tile_count == 2 * 6 * 12


def test_without_a_batch():
  q, k, v = inputs()
  shapes = {"query": (1, 64, 6, 8), "key": (1, 48, 2, 8), "value": (1, 48, 2, 4)}
  assert jflash.explain(q[0], k[0], v[0]).shapes == shapes


def test_nothing_is_computed(monkeypatch):
  def forward(*args):
    raise AssertionError("it ran")

  monkeypatch.setattr(_xla, "forward", forward)
  with pytest.raises(AssertionError, match="it ran"):
    jflash.attention(*inputs())
  assert jflash.explain(*inputs()).backend == "xla"


@pytest.fixture
def no_mercury(monkeypatch):
  """The kernels' backend cannot run here, for a reason of its own."""
  absent = _backends.get("tpu")._replace(unavailable=lambda: "there is no mercury here")
  monkeypatch.setattr(_backends, "_BACKENDS", (absent, _backends.get("xla")))


def test_a_backend_is_passed_over_with_its_reason(no_mercury):
  why = jflash.explain(*inputs())
  assert why.passed_over == {"tpu": "there is no mercury here"}
  assert "not tpu        there is no mercury here" in str(why)
  named = jflash.explain(*inputs(), implementation="xla")
  assert named.passed_over == {"tpu": "implementation='xla' was asked for"}


def test_a_named_backend_that_cannot_raises_what_attention_raises(no_mercury):
  messages = []
  for f in (jflash.attention, jflash.explain):
    with pytest.raises(NotImplementedError) as caught:
      f(*inputs(), implementation="tpu")
    messages.append(str(caught.value))
  assert messages[0] == messages[1] and "mercury" in messages[0]


@pytest.mark.parametrize("change, error", [
    ({"key": jnp.ones((2, 48, 4, 8)), "value": jnp.ones((2, 48, 4, 4))}, ValueError),
    ({"key": jnp.ones((2, 47, 2, 8))}, ValueError),
    ({"mask": np.ones((63, 48), bool)}, ValueError),
    ({"implementation": "abacus"}, ValueError),
    ({"scale": "large"}, TypeError),
    ({"colour": "red"}, TypeError),
])
def test_errors_are_those_of_attention(change, error):
  arguments = dict(zip(("query", "key", "value"), inputs())) | change
  messages = []
  for f in (jflash.attention, jflash.explain):
    with pytest.raises(error) as caught:
      f(**arguments)
    messages.append(str(caught.value).replace("attention() ", ""))
  assert messages[0] == messages[1]


def test_structs_are_checked_as_arrays_are():
  with pytest.raises(ValueError, match="`key` has 4 heads and `query` has 6"):
    jflash.explain(Struct((2, 64, 6, 8), jnp.float32), *[Struct((2, 48, 4, 8), jnp.float32)] * 2)
