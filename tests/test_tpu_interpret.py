"""The TPU kernels in the interpreter that models memory spaces and copies: races, and NaN in all that nobody has written."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jflash
from jflash import _plan, _reference, masks

T, S, N, K, H, E = 200, 300, 4, 2, 24, 16
SEGMENTS = [jnp.asarray(np.sort(np.random.default_rng(n).integers(0, 3, (1, size))), jnp.int32) for n, size in ((0, T), (1, S))]
CASES = {
    "causal": {"is_causal": True},
    "lengths_and_window": {"key_value_seq_lengths": jnp.array([170], jnp.int32), "local_window_size": (60, 5)},
    "segments": {"query_segment_ids": SEGMENTS[0], "key_value_segment_ids": SEGMENTS[1]},
    "soft_cap_and_blocks": {"logits_soft_cap": 3.0, "mask": masks.BlockSparse(np.eye(4, 5, dtype=bool), (50, 60))},
}


def keep(name):
  q, k = np.arange(T)[:, None], np.arange(S)[None]
  return {"causal": q >= k, "lengths_and_window": (k < 170) & (k >= q - 60) & (k <= q + 5),
          "segments": np.asarray(SEGMENTS[1]) == np.asarray(SEGMENTS[0]).T, "soft_cap_and_blocks": q // 50 == k // 60}[name]


@pytest.mark.parametrize("name, spans", [*((name, None) for name in CASES), ("causal", 0), ("lengths_and_window", 0),
                                         ("causal", 2), ("lengths_and_window", 2), ("segments", 2)])
def test_no_races_and_nothing_unwritten_is_read(name, spans):
  shapes = (1, T, N, H), (1, S, K, H), (1, S, K, E), (1, N, 1, S)
  q, k, v, bias = (jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes))

  def loss(attend):
    def of(*args):
      out, lse = attend(*args)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0.0))
    return of

  ours = lambda q, k, v, bias: jflash.attention(q, k, v, bias, implementation="tpu", return_residual=True, **CASES[name])
  dense = lambda q, k, v, bias: _reference.attention(q, k, v, bias, keep(name), logits_soft_cap=CASES[name].get("logits_soft_cap"))
  # As it is chosen, or as where there are too many queries, or query heads, for dQ to stay on chip.
  passes = contextlib.ExitStack()
  if spans is not None:
    passes.enter_context(_plan.force_passes(1, spans))
    passes.enter_context(_plan.force_tiles(128, 128))
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
  with jflash.interpret(params), passes:
    value, grads = jax.value_and_grad(loss(ours), (0, 1, 2, 3))(q, k, v, bias)
  want, want_grads = jax.value_and_grad(loss(dense), (0, 1, 2, 3))(q, k, v, bias)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for got, expected in zip(grads, want_grads):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert not races_found()


def test_gradients_under_vmap_with_a_schedule_for_each():
  """Batched ids and lengths make batched lists of visits."""
  q, k, v = (jax.random.normal(key, (2, 1, 150, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
  ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 150))), jnp.int32)
  lengths = jnp.array([[140], [30]], jnp.int32)

  def gradients(implementation):
    def loss(q, k, v, ids, lengths):
      out = jflash.attention(q, k, v, query_segment_ids=ids, key_value_segment_ids=ids, key_value_seq_lengths=lengths,
                             implementation=implementation)
      return jnp.sum(out**2)
    return jax.vmap(jax.grad(loss, (0, 1, 2)))(q, k, v, ids, lengths)

  with jflash.interpret():
    ours = gradients("tpu")
  for got, expected in zip(ours, gradients("xla")):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def races_found():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # nowhere public
  return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found
