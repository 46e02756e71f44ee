"""What the kernels for Hopper refuse, by name and with the fix, before anything runs; `None` computes it elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _api, _plan, _tiles_gpu
from tests import gpu_topology

gpu_topology.require_jax()
pytestmark = pytest.mark.gpu


def draw(dtype=jnp.bfloat16, width=16, value_width=None):
  rng = np.random.default_rng(0)
  shapes = (1, 12, 4, width), (1, 20, 2, width), (1, 20, 2, value_width or width)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def refused(*args, precision=None, **options):
  """Why "mosaic_gpu" does not compute this, by `attention` and by `explain`, which agree."""
  with jflash.interpret(), jax.default_matmul_precision(precision):
    with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu' cannot compute this: ") as error:
      jflash.attention(*args, **options, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError) as explained:
      jflash.explain(*args, **options, implementation="mosaic_gpu")
  assert str(error.value) == str(explained.value)
  assert jnp.isfinite(jflash.attention(*args, **options)).all(), "what `None` takes computes it"
  return str(error.value)


def supported(*args, precision=None, **options):
  with jflash.interpret(), jax.default_matmul_precision(precision):
    return jflash.explain(*args, **options, implementation="mosaic_gpu").backend == "mosaic_gpu"


@pytest.mark.parametrize("dtype, precision, most", [
    ("bfloat16", None, 256), ("float16", "highest", 256), ("float32", None, 128), ("float32", "highest", 64), ("float32", "float32", 64)])
@pytest.mark.parametrize("value_width", [None, 16])
def test_wide_heads(dtype, precision, most, value_width):
  assert supported(*draw(dtype, most, value_width), precision=precision)
  text = refused(*draw(dtype, most + 1, value_width), precision=precision)
  assert f"heads are {most + 1} wide, and its kernels hold {most} of {dtype} at most" in text and "use implementation='xla'" in text
  assert f"jax.default_matmul_precision {precision}" in text


def test_float64():
  with jax.enable_x64(True):
    assert "take no float64; use implementation='xla'" in refused(*draw("float64"))


def bessel(score, batch, head, q, k):
  return score + jax.scipy.special.i0e(score)


def quotient(score, batch, head, q, k):
  """Its derivative has a power of -2."""
  return 1 / (1 + score * score)


@pytest.mark.parametrize("function, operation", [(bessel, "bessel_i0e, bessel_i1e"), (quotient, "integer_pow[-2]")])
def test_functions_of_what_the_kernels_lack(function, operation):
  text = refused(*draw(), score_mod=function)
  assert f"its kernels have nothing for {operation}, of which {function.__name__} or the derivative are made" in text
  assert supported(*draw(), score_mod=lambda score, batch, head, q, k: jnp.tanh(score) + head + 0.01 * score**3)


def test_lookups_that_no_kernel_does():
  table = jnp.ones((12, 20, 3))
  text = refused(*draw(), score_mod=lambda score, batch, head, q, k, table: score + table[q, k].sum(-1), score_operands=(table,))
  assert "looks up more than single entries by query and key together" in text


def test_distances():
  """Kernel regression in few dimensions; in many it is attention with a bias, which the kernels compute."""
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(40, 16)), jnp.float32), jnp.asarray(rng.normal(size=40), jnp.float32)
  run = lambda columns, implementation: np.asarray(jflash.kernel_regression(
      x[:, :columns], y, x[:7, :columns], bandwidth=1.0, implementation=implementation))
  with jflash.interpret():
    with pytest.raises(NotImplementedError, match="these scores are distances; use implementation='xla'"):
      run(2, "mosaic_gpu")
    np.testing.assert_allclose(run(16, "mosaic_gpu"), run(16, None), atol=1e-3)
  assert np.isfinite(run(2, None)).all()


def test_a_number_as_an_operand():
  """It is read as it is, and plain JAX has its gradient."""
  q, k, v = draw()

  def loss(factor, implementation):
    return jflash.attention(q, k, v, score_mod=lambda score, batch, head, q, k, factor: factor * score + head, score_operands=(factor,),
                            implementation=implementation).astype(jnp.float32).sum()

  with jflash.interpret():
    ours = jax.value_and_grad(loss)(jnp.float32(0.5), "mosaic_gpu")
  np.testing.assert_allclose(ours, jax.value_and_grad(loss)(jnp.float32(0.5), "xla"), rtol=2e-2)


@pytest.mark.parametrize("ordered", [True, False])
def test_the_backward_pass_in_one_kernel_is_taken_where_asked_for_and_possible(ordered):
  def chosen(width, dtype="bfloat16", **options):
    return _plan.plan_mosaic_gpu(_api.make_problem(*draw(dtype, width), **options)).launches

  assert chosen(64).fused is None
  with _tiles_gpu.backward_in_one_kernel(ordered):
    for width in (64, 128):
      assert (chosen(width).fused, chosen(width).ordered) == (_tiles_gpu.FUSED[width, False], ordered)
    dropped = chosen(64, dropout_rate=0.1, dropout_key=jax.random.key(0))
    assert [x.fused for x in (chosen(192), chosen(64, "float32"), dropped)] == [None] * 3
