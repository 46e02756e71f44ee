"""The TPU compiler works here, for each chip, and refuses what a chip would refuse."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.tpu_topology import CHIPS, compile_for, device

BLOCK = 256


def _gram(x, scale, *, block=BLOCK):
  """[T, H] -> [T, T]: scale * x x^T, one [block, block] tile a step."""

  def kernel(left, right, out):
    product = jax.lax.dot_general(left[...], right[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    out[...] = scale["factor"] * product

  t, h = x.shape
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((t, t), jnp.float32),
    grid=(t // block, t // block),
    in_specs=[pl.BlockSpec((block, h), lambda i, j: (i, 0)), pl.BlockSpec((block, h), lambda i, j: (j, 0))],
    out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
    name="gram",
  )(x, x)


def _shape(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_kernel_compiles_for_each_chip(chip):
  compiled = compile_for(chip, lambda x: _gram(x, {"factor": 0.5}), _shape(512, 128))
  assert "tpu_custom_call" in compiled.as_text()
  assert compiled.memory_analysis().output_size_in_bytes == 512 * 512 * 4
  assert jax.tree.leaves(compiled.input_shardings)[0].device_set == {device(chip)}


def test_arguments_may_be_nested():
  def fun(tree, y):
    return tree["a"] @ y + tree["b"][0]

  compiled = compile_for("v5e", fun, {"a": _shape(128, 256), "b": (_shape(64), None)}, _shape(256, 64))
  assert compiled.memory_analysis().argument_size_in_bytes >= 2 * (128 * 256 + 64 + 256 * 64)


def test_what_is_traced_for_one_chip_is_not_reused_for_another():
  kinds = []

  @jax.jit
  def fun(x):
    kinds.append(jax.config.jax_default_device.device_kind)
    return x

  for chip in CHIPS:
    compile_for(chip, fun, _shape(8, 128))
  assert kinds == [device(chip).device_kind for chip in CHIPS]
  assert len(set(kinds)) == len(CHIPS)


def test_the_flash_attention_of_jax_compiles_forward_and_backward():
  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

  def loss(q, k, v):
    return flash_attention(q, k, v, causal=True).astype(jnp.float32).sum()

  x = _shape(1, 2, 1024, 128)
  assert compile_for("v6e", jax.grad(loss, (0, 1, 2)), x, x, x).as_text().count("tpu_custom_call") >= 3


def test_too_much_vmem_is_refused():
  with pytest.raises(Exception, match="(?i)vmem"):
    compile_for("v5e", lambda x: _gram(x, {"factor": 1.0}, block=4096), _shape(4096, 128))


def test_an_unknown_chip_is_named():
  with pytest.raises(ValueError, match="`chip` is 'v9'; it must be one of v5e, v5p, v6e, tpu7x"):
    device("v9")


@pytest.mark.parametrize("required, outcome", [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_missing_compiler_skips_but_fails_in_ci(monkeypatch, required, outcome):
  monkeypatch.setenv("JFLASH_REQUIRE_LIBTPU", required)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(outcome, match="libtpu, the TPU compiler, is not installed"):
    device("v5e")


def test_the_kernel_is_right_when_interpreted():
  x = np.random.default_rng(0).normal(size=(512, 128)).astype(np.float32)
  with pltpu.force_tpu_interpret_mode():
    out = jax.jit(lambda x: _gram(x, {"factor": 0.5}))(x)
  np.testing.assert_allclose(out, 0.5 * x @ x.T, atol=1e-3)
