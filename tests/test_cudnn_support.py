"""What the backend "cudnn" takes and refuses, and what it becomes with JAX's own binding, which lowers without a GPU."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as binding

import jflash
from jflash import _api, _backends, _gpu, masks
from pallas_kernels import products
from tests import cudnn_stand_in


@pytest.fixture
def real(monkeypatch):
  """JAX's own binding, which can be traced and lowered."""
  cudnn_stand_in.pretend(monkeypatch)


def attend(*args, **kwargs):
  return jflash.attention(*args, **kwargs, implementation="cudnn", return_residual=True)


def draw(dtype=jnp.bfloat16, b=2, t=24, s=40, n=4, k=2, h=16):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h)))


# JAX's own binding ----------------------------------------------------------------------------------------------------


def lowered(*arrays, **kwargs):
  """The calls of cuDNN in the gradient's program for CUDA: (target, its settings) in order."""
  def run(*arrays):
    (out, lse), pull = jax.vjp(lambda *arrays: attend(*arrays, **kwargs), *arrays)
    return lse, pull((out, lse))
  text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  found = re.findall(r'custom_call @__cudnn\$(\w+)\(.*?backend_config = "(.*?)"[,}]', text)
  return [(target, json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]) for target, config in found]


LOWERED = {
    "plain": ({}, "NO_MASK", 0),
    "causal": ({"is_causal": True}, "CAUSAL", 0),
    "window": ({"local_window_size": (5, 0)}, "CAUSAL", 6),
    "lengths": ({"key_value_seq_lengths": np.array([3, 4])}, "PADDING", 0),
    "lengths and causal": ({"query_seq_lengths": np.array([3, 4]), "key_value_seq_lengths": np.array([3, 4]), "is_causal": True},
                           "PADDING_CAUSAL", 0)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kwargs, mask, window", LOWERED.values(), ids=LOWERED.keys())
def test_lowers_for_cuda(kwargs, mask, window, dtype, real):
  found = lowered(*draw(dtype), scale=0.3, **kwargs)
  assert {target for target, _ in found} == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
  for _, config in found:
    assert (config["mask_type"], config["sliding_window_length"], config["fmha_scale"]) == (mask, window, 0.3)
    assert config["dropout_rate"] == 0 and config["intermediate_tensor_shape"]["dimensions"] == ["2", "4", "24", "40"]


def test_a_bias_lowers_for_cuda(real):
  bias = jnp.ones((1, 4, 24, 40), jnp.bfloat16)
  targets = {target for target, _ in lowered(*draw(), bias, is_causal=True)}
  assert targets == {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}


@pytest.mark.parametrize("kwargs", [{"is_causal": True}, {"key_value_seq_lengths": np.array([0, 17])}], ids=["causal", "lengths"])
def test_on_the_cpu_beside_a_gpu_plain_jax_computes(kwargs, real):
  """Arrays that are committed to a CPU compute there, whatever the default device is."""
  def run(name):
    (out, lse), pull = jax.vjp(lambda *x: jflash.attention(*x, **kwargs, implementation=name, return_residual=True), *draw())
    return out, lse, pull((out, jnp.where(lse == -jnp.inf, 0, lse)))
  jax.tree.map(np.testing.assert_array_equal, run(None), run("xla"))


# What it refuses ------------------------------------------------------------------------------------------------------


def by_key(score, batch, head, query, key):
  return score - key


REFUSED = {
    "float32": ({"dtype": "float32"}, {}, "bfloat16 and float16, and `query` has dtype float32; cast"),
    "odd width": ({"h": 12}, {}, "multiple of 8 and at most 128 on this GPU, and it is 12"),
    "wide heads": ({"h": 136}, {}, "at most 128 on this GPU, and it is 136"),
    "soft cap": ({}, {"logits_soft_cap": 5.0}, "no logits_soft_cap"),
    "alibi": ({}, {"alibi_slopes": np.ones(4, "f")}, "no alibi_slopes"),
    "score_mod": ({}, {"score_mod": by_key}, "no score_mod"),
    "dropout": ({}, {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "no dropout_rate"),
    "positions": ({}, {"query_positions": np.arange(24), "is_causal": True}, "no query_positions"),
    "key positions": ({}, {"key_value_positions": np.arange(40)}, "no key_value_positions"),
    "traced scale": ({}, {"scale": np.ones((), "f")}, "`scale` that is a Python number greater than 0"),
    "negative scale": ({}, {"scale": -1.0}, "`scale` that is a Python number greater than 0"),
    "mask array": ({}, {"mask": np.ones((24, 40), bool)}, r"of an array it makes a bias.*the mask is Elements\(array=bool"),
    "segments": ({}, {"query_segment_ids": np.zeros(24, int), "key_value_segment_ids": np.zeros(40, int)}, "the mask is Segments"),
    "a union": ({}, {"mask": masks.Causal() | masks.PrefixLM(3)}, r"the mask is Causal\(\) \| PrefixLM"),
    "right window": ({}, {"local_window_size": (5, 2)}, r"a window \(left, 0\).*the mask is Window\(left=5, right=2\)"),
    "traced window": ({}, {"mask": masks.Causal() & masks.Window(np.array(3))}, "the mask is Causal"),
    "window alone": ({}, {"mask": masks.Window(left=5)}, "window is causal"),
    "window and lengths": ({}, {"local_window_size": (5, 0), "key_value_seq_lengths": np.array([3, 4])}, "no lengths"),
    "window and bias": ({}, {"local_window_size": (5, 0), "bias": np.ones((1, 4, 24, 40), ml_dtypes.bfloat16)}, "with no bias"),
    "window, more queries": ({"t": 41}, {"local_window_size": (5, 0)}, "no more queries than keys"),
    "one causal query": ({"t": 1}, {"is_causal": True}, "no causal mask for one query"),
    "float32 bias": ({}, {"bias": np.ones((1, 4, 24, 40), "f")},
                     r"`bias` \[1, N, T, S\].*here \[1, 4, 24, 40\] in bfloat16, and `bias` is \[1, 4, 24, 40\] in float32"),
    "bias per batch": ({}, {"bias": np.ones((2, 4, 24, 40), ml_dtypes.bfloat16)}, r"`bias` is \[2, 4, 24, 40\]"),
    "bias of keys": ({}, {"bias": np.ones((1, 4, 1, 40), ml_dtypes.bfloat16)}, r"`bias` is \[1, 4, 1, 40\]"),
    "odd length with a bias": ({"s": 39}, {"bias": np.ones((1, 4, 24, 39), ml_dtypes.bfloat16)}, "T and S even")}


@pytest.mark.parametrize("sizes, kwargs, reason", REFUSED.values(), ids=REFUSED.keys())
def test_refuses_and_plain_jax_is_taken(sizes, kwargs, reason, real):
  arrays = draw(**sizes)
  with pytest.raises(NotImplementedError, match="implementation='cudnn' cannot compute this: .*" + reason + ".*use implementation='xla'"):
    attend(*arrays, **kwargs)
  why = jflash.explain(*arrays, **kwargs)
  assert why.backend == "xla" and re.search(reason, why.passed_over["cudnn"])


def test_refuses_other_value_widths_and_distances(real):
  q, k, v = draw()
  with pytest.raises(NotImplementedError, match="one head width, and `query` has 16 and `value` has 8"):
    attend(q, k, v[..., :8])
  distances = dataclasses.replace(_api.make_problem(q, k, v), product=products.Distance)
  assert "these are distances" in (_backends.get("cudnn").reason_against(distances) or "")


@pytest.mark.parametrize("capability, widest", [((8, 0), 128), ((8, 9), 128), ((9, 0), 256), ((10, 0), 128), ((12, 0), 128)])
def test_widest_head(capability, widest, real, monkeypatch):
  monkeypatch.setattr(_gpu, "capability", lambda: capability)
  monkeypatch.setattr(binding, "check_compute_capability", lambda needed: capability >= (9, 0))
  assert _backends.get("cudnn").reason_against(_api.make_problem(*draw(h=widest))) is None
  assert f"at most {widest}" in (_backends.get("cudnn").reason_against(_api.make_problem(*draw(h=widest + 8))) or "")


def test_what_jax_refuses_is_a_reason(real, monkeypatch):
  def refuse(*args, **kwargs):
    raise NotImplementedError("not on a Tuesday")

  monkeypatch.setattr(binding, "check_is_flash_attention", refuse)
  why = jflash.explain(*draw())
  assert why.backend == "xla" and "NotImplementedError: not on a Tuesday" in why.passed_over["cudnn"]


def test_a_binding_that_has_moved_is_a_reason(real, monkeypatch):
  monkeypatch.delattr(binding, "dot_product_attention")
  why = jflash.explain(*draw())
  assert why.backend == "xla" and "does not call cuDNN for it, AttributeError" in why.passed_over["cudnn"]


# What a user sees -----------------------------------------------------------------------------------------------------


def test_explain(real):
  why = jflash.explain(*draw(), is_causal=True)
  assert (why.backend, why.tiles, why.tile_count, why.skipped, why.interpreted) == ("cudnn", None, None, None, False)
  assert "tiles          those of the library" in str(why) and why.decided == "decided by cudnn"
  assert set(why.saved) == {"query", "key", "value", "out", "lse", "logits", "schedule"}
