"""Rotary embedding against plain NumPy, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash._rotary import Rotary


def numpy_rotary(x, positions, base, width, interleaved):
  """One pair at a time, as complex numbers in float64."""
  x, out = np.asarray(x, np.float64), np.array(x, np.float64)
  for i in range(width // 2):
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
    turn = np.exp(1j * np.asarray(positions, np.float64) * base ** (-2 * i / width))[..., None]
    pair = (x[..., a] + 1j * x[..., b]) * turn
    out[..., a], out[..., b] = pair.real, pair.imag
  return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [None, 6])
def test_equals_complex_multiplication(width, interleaved):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
  positions = jnp.array([[0, 1, 2, 3, 4], [7, 0, 30, 2, 100]])
  out = Rotary(base=500.0, width=width, interleaved=interleaved)(x, positions)
  np.testing.assert_allclose(out, numpy_rotary(x, positions, 500.0, width or 8, interleaved), atol=2e-5)


def test_scores_see_only_distances():
  q, k = jax.random.normal(jax.random.key(1), (2, 6, 2, 16))
  turn = lambda x, shift: Rotary()(x, jnp.arange(6) + shift)
  scores = lambda shift: jnp.einsum("tnh,snh->nts", turn(q, shift), turn(k, shift))
  np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)
  assert np.abs(scores(0) - jnp.einsum("tnh,snh->nts", q, k)).max() > 0.1


def test_equals_flax_where_flax_has_it():
  nnx = pytest.importorskip("flax.nnx")
  if not hasattr(nnx, "RoPE"):
    pytest.skip("this Flax has no RoPE")
  x = jax.random.normal(jax.random.key(2), (2, 5, 3, 8))
  flax = jnp.swapaxes(nnx.RoPE()(jnp.swapaxes(x, 1, 2)), 1, 2)
  np.testing.assert_allclose(Rotary()(x, jnp.arange(5)), flax, atol=1e-5)


def test_rescale_stretches_positions():
  x = jax.random.normal(jax.random.key(3), (5, 1, 8))
  stretched = Rotary(rescale=lambda f: f / 4)(x, 4 * jnp.arange(5))
  np.testing.assert_allclose(stretched, Rotary()(x, jnp.arange(5)), atol=1e-6)


def test_bfloat16_is_turned_in_float32():
  x = jax.random.normal(jax.random.key(4), (300, 1, 8), jnp.bfloat16)
  out = Rotary()(x, jnp.arange(300))
  assert out.dtype == jnp.bfloat16
  exact = Rotary()(x.astype(jnp.float32), jnp.arange(300))
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("width, head_dim", [(None, 7), (5, 8), (10, 8), (0, 8)])
def test_width_must_be_even_and_fit(width, head_dim):
  with pytest.raises(ValueError, match=rf"its width is \d+ and a head has {head_dim} features"):
    Rotary(width=width)(jnp.ones((2, 1, head_dim)), jnp.arange(2))
