"""Cases for `benchmarks.gpu_compile`: attention by the kernels for Hopper, forward and backward, with each feature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jflash
from jflash import _tiles_gpu, masks

WIDTHS = 64, 128, 192, 256
B, T, N, K, H = 2, 640, 4, 2, 64
I32, F32, BF16, F16, BOOL = "int32", "float32", "bfloat16", "float16", "bool"
BLOCKS = np.random.default_rng(0).random((5, 5)) < 0.5


def even_diagonals(batch, head, q, k):
  return ((q - k) % 2 == head % 2) & (batch >= 0)


def near_documents(batch, head, q, k, documents, reach):
  return reach[documents[batch, q] % 3, documents[batch, k] % 3] + head > 0.5


def alibi(score, batch, head, q, k, slopes):
  return score - slopes[head] * jnp.abs(q - k)


def t5(score, batch, head, q, k, table):
  return score + table[jnp.clip((q - k) // 16, 0, 31), head]


def everything(score, batch, head, q, k, slopes, table, distance, factor):
  return factor * alibi(score, batch, head, q, k, slopes) + table[head, jnp.abs(q - k) % 300] + jnp.sin(distance[batch, k])


# name: (more arrays as (argument, shape, dtype), options)
FEATURES = {
    "window": ((), {"local_window_size": (100, 0)}),
    "traced window": ((("window", (), I32),), {}),
    "soft cap": ((), {"is_causal": True, "logits_soft_cap": 30.0}),
    "learned scale and cap": ((("scale", (), F32), ("logits_soft_cap", (), F32)), {"is_causal": True}),
    "bias": ((("bias", (1, N, T, T), F32),), {"is_causal": True}),
    "bias in bfloat16": ((("bias", (B, 1, T, T), BF16),), {}),
    "bias by key": ((("bias", (B, 1, 1, T), F32),), {"is_causal": True}),
    "bias by query": ((("bias", (1, N, T, 1), BF16),), {}),
    "bias by head": ((("bias", (1, N, 1, 1), F32),), {}),
    "alibi": ((("alibi_slopes", (B, N), F32),), {"is_causal": True}),
    "segments": ((("query_segment_ids", (B, T), I32), ("key_value_segment_ids", (B, T), I32)), {"is_causal": True}),
    "positions": ((("query_positions", (B, T), I32), ("key_value_positions", (T,), I32)), {"is_causal": True}),
    "lengths": ((("query_seq_lengths", (B,), I32), ("key_value_seq_lengths", (B,), I32)), {}),
    "mask array": ((("mask", (B, 1, T, T), BOOL),), {}),
    "mask array by key": ((("mask", (B, 1, 1, T), BOOL),), {}),
    "mask array by query": ((("mask", (B, 1, T, 1), BOOL),), {}),
    "prefix": ((("prefix", (B,), I32),), {}),
    "block sparse": ((), {"mask": masks.BlockSparse(BLOCKS, (128, 128))}),
    "traced block sparse": ((("blocks", (1, N, 10, 7), BOOL),), {}),
    "custom": ((), {"mask": masks.Custom(even_diagonals) & masks.Causal()}),
    "custom with operands": ((("documents", (B, T), I32), ("reach", (3, 3), F32)), {}),
    "sinks": ((("sinks", (N,), F32),), {"is_causal": True}),
    "dropout": ((("dropout_key", (2,), "uint32"),), {"is_causal": True, "dropout_rate": 0.1}),
    "alibi as score_mod": ((("slopes", (N,), F32),), {"score_mod": alibi, "is_causal": True}),
    "buckets as score_mod": ((("table", (32, N), F32),), {"score_mod": t5, "is_causal": True}),
    "score_mod": ((("slopes", (N,), BF16), ("wide_table", (N, 300), F32), ("distance", (B, T), F32), ("factor", (), F32)),
                  {"score_mod": everything, "logits_soft_cap": 30.0})}
MASKS = {
    "window": lambda w: masks.Window(w, 0),
    "prefix": lambda n: masks.PrefixLM(n),
    "blocks": lambda table: masks.BlockSparse(table, (64, 96)),
    "documents": lambda ids, reach: masks.Custom(near_documents, ids, reach),
}


def struct(shape, dtype=BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


def gradient(qkv, dtype=BF16, arrays=(), options=None, precision=None, in_turn=False):
  """(value and gradient in every float argument, its arguments)."""
  names, options = [name for name, _, _ in arrays], options or {}

  def loss(floats, others):
    given = {n: floats["arrays"].get(n, others.get(n)) for n in names}
    for n in set(given) & set(MASKS):
      given["mask"] = MASKS[n](given.pop(n), *([given.pop("reach")] if n == "documents" else []))
    if "score_mod" in options:
      given = {"score_operands": tuple(given.values())}
    out, lse = jflash.attention(*floats["qkv"], **given, **options, implementation="mosaic_gpu", return_residual=True)
    return out.astype(F32).sum() + lse.sum()

  @functools.wraps(loss)
  def run(*args):
    with jax.default_matmul_precision(precision), _tiles_gpu.one_product_at_a_time(in_turn):
      return jax.value_and_grad(loss)(*args)

  floats = {"qkv": [struct(shape, dtype) for shape in qkv], "arrays": {n: struct(x, d) for n, x, d in arrays if "float" in d}}
  return run, (floats, {n: struct(x, d) for n, x, d in arrays if "float" not in d})


def sizes(width, length=T, heads=N, kv_heads=K, value_width=None):
  return (B, length, heads, width), (B, length, kv_heads, width), (B, length, kv_heads, value_width or width)


def plain():
  """What must be fast: full in whole tiles, and causal in others."""
  found = {}
  for width in WIDTHS:
    found[f"full {width}"] = gradient(sizes(width, 1024))
    found[f"causal {width}"] = gradient(sizes(width, 1000), options={"is_causal": True})
  found["causal 64 float16"] = gradient(sizes(64, 1000), F16, options={"is_causal": True})
  return found


def _features(names):
  return {name: gradient(sizes(H), BF16, *FEATURES[name]) for name in names}


HALF = len(FEATURES) // 2  # a set of cases is compiled in one go, which is not to take too long


def features():
  return _features(list(FEATURES)[:HALF])


def more_features():
  """And some that take many registers, at width 128."""
  wide = {f"{name}, width 128": gradient(sizes(128), BF16, *FEATURES[name]) for name in ("segments", "bias", "mask array", "dropout")}
  return _features(list(FEATURES)[HALF:]) | wide


def in_turn():
  """What the interpreter runs."""
  causal = {"is_causal": True}
  found = {f"{width}": gradient(sizes(width), BF16, (), causal, None, True) for width in WIDTHS}
  return found | {f"{width} float32": gradient(sizes(width), F32, (), causal, None, True) for width in (64, 128)}


def others():
  """Other dtypes, widths and lengths."""
  causal = {"is_causal": True}
  found = {f"float32 {width} {precision or 'default'}": gradient(sizes(width), F32, (), causal, precision)
           for width, precision in ((64, None), (128, None), (64, "highest"))}
  for dtype in (BF16, F32):
    found[f"narrow and wide, {dtype}"] = gradient(sizes(7, 300, value_width=100), dtype, (), causal)
    found[f"wide and narrow, {dtype}"] = gradient(sizes(100, value_width=7), dtype, *FEATURES["bias"])
  found["narrow and widest"] = gradient(sizes(7, 300, value_width=200), BF16, (), causal)
  found["widest and narrow"] = gradient(sizes(250, 300, value_width=7), BF16, (), causal)
  found["sizes of one"] = gradient(((1, 1, 1, 1),) * 3)
  found["decoding"] = gradient(((B, 1, 8, 128), (B, 3000, 2, 128), (B, 3000, 2, 128)), BF16, (
      ("key_value_seq_lengths", (B,), I32),))
  found["packed"] = packed()
  return found


def packed():
  def loss(q, k, v, slopes, ends, key):
    return jflash.attention_varlen(q, k, v, ends, ends, is_causal=True, alibi_slopes=slopes, dropout_rate=0.1, dropout_key=key,
                                   implementation="mosaic_gpu").astype(F32).sum()

  qkv = [struct((1000, heads, 64)) for heads in (4, 2, 2)]
  return jax.grad(loss, (0, 1, 2, 3)), (*qkv, struct((5, 4), F32), struct((6,), I32), struct((2,), "uint32"))


def memory():
  """Two lengths of each."""
  found = {}
  for length in (2048, 8192):
    for name, arrays in (("causal", ()), ("bias", (("bias", (1, 4, 1, length), F32),))):
      found[f"{name} {length}"] = gradient(((1, length, 4, 64),) * 3, BF16, arrays, {"is_causal": True})
  return found
