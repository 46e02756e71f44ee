"""The backward pass in one kernel: how it is chosen, and cases of it for `benchmarks.gpu_compile`."""

import contextlib

import jax

import jflash
from benchmarks import gpu_chips
from benchmarks.gpu_programs import INPUTS, passes
from jflash import _plan
from jflash._tiles_gpu import FUSED, Launch, Launches

SMALL = Launch((64, 64))
B, T, N, K = 2, 1000, 8, 2
WIDTHS = 64, 128


@contextlib.contextmanager
def in_one(tiles, *, ordered=True, stages=2):
  """What is traced inside computes its gradients in one kernel, as far as it can."""
  with _plan.force_launches(Launches(SMALL, SMALL, SMALL, False, 1, fused=Launch(tiles, stages), ordered=ordered)):
    yield


def struct(shape, dtype="bfloat16"):
  return jax.ShapeDtypeStruct(shape, dtype)


def backward(width, dtype="bfloat16", *, length=T, heads=(N, K), tiles=None, ordered=True, more=(), wrt=INPUTS,
             **options):
  """The backward pass alone: `pull` and its arguments. `more` are arrays as (argument, shape, dtype)."""
  shapes = (B, length, heads[0], width), (B, length, heads[1], width), (B, length, heads[1], width)
  arrays = dict(zip(INPUTS, (struct(shape, dtype) for shape in shapes))) | {name: struct(*x) for name, *x in more}

  def attend(**arrays):
    with in_one(tiles or FUSED[width, "dropout_rate" in options].tiles, ordered=ordered):
      return jflash.attention(**arrays, **options, implementation="mosaic_gpu")

  save, pull = passes(attend, wrt)
  out, saved = jax.eval_shape(save, arrays)
  return pull, (saved, out)


def _plain():
  """What is to be fast: full in whole tiles, and causal in others."""
  found = {}
  for width in WIDTHS:
    causal = {"width": width, "is_causal": True}
    for name, of in (("full", {"width": width, "length": 1024}), ("causal", causal)):
      found[f"{width} {name}"] = of
      found[f"{width} {name}, as they come"] = of | {"ordered": False}
    found[f"{width} of whole tiles, multi-head"] = causal | {"dtype": "float16", "length": 1024, "heads": (K, K)}
    found[f"{width} one warpgroup"] = causal | {"tiles": (64, 64)}
  return found


def _features():
  """Scores made of arrays."""
  ids = ("query_segment_ids", (B, T), "int32"), ("key_value_segment_ids", (B, T), "int32")
  positions = ("query_positions", (B, T), "int32"), ("key_value_positions", (B, T), "int32"), ("logits_soft_cap", (), "float32")
  arrays = {"bias": [("bias", (B, N, T, T), "bfloat16")], "segments and alibi": [*ids, ("alibi_slopes", (N,), "float32")],
            "positions and soft cap": positions, "mask array": [("mask", (1, 1, T, T), "bool")]}
  found = {f"{name}, {width}": {"width": width, "more": more, "is_causal": True} for name, more in arrays.items() for width in WIDTHS}
  return found | {"dropout, 128": {"width": 128, "more": [("dropout_key", (2,), "uint32")], "dropout_rate": 0.1}}


PLAIN, FEATURES, SUMS = _plain(), _features(), "bias by query"


def _built(options):
  with jax.default_device(gpu_chips.device("h100")):
    return {name: backward(**own) for name, own in options.items()}


def plain():
  return _built(PLAIN)


def features():
  return _built(FEATURES | {SUMS: {"width": 64, "more": [("bias", (B, N, T, 1), "float32")], "wrt": (*INPUTS, "bias")}})
