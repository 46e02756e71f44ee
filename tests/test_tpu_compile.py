"""Every TPU kernel, forward and backward, with each feature, through the compiler of every chip; no chip at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import jflash
from jflash import _plan, masks
from tests.tpu_topology import CHIPS, compile_for, device

B, T, N, K, H = 2, 640, 4, 2, 128
QKV = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
BLOCKS = np.random.default_rng(0).random((5, 5)) < 0.5


def attend(q, k, v, **options):
  return jflash.attention(q, k, v, implementation="tpu", return_residual=True, **options)


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


# name: (more arrays as (argument, shape, dtype), options, how many kernels forward and backward make)
I32, F32, BF16, BOOL = "int32", "float32", "bfloat16", "bool"
FEATURES = {
    "full": ((), {}, 2),
    "causal": ((), {"is_causal": True}, 2),
    "window": ((), {"local_window_size": (100, 0)}, 2),
    "traced_window": ((("window", (), I32),), {}, 2),
    "soft_cap": ((), {"is_causal": True, "logits_soft_cap": 30.0}, 2),
    "learned_scale_and_cap": ((("scale", (), F32), ("logits_soft_cap", (), F32)), {"is_causal": True}, 4),
    "bias": ((("bias", (1, N, T, T), F32),), {"is_causal": True}, 3),
    "bias_bfloat16": ((("bias", (B, 1, T, T), BF16),), {}, 3),
    "bias_by_key": ((("bias", (B, 1, 1, T), F32),), {"is_causal": True}, 3),
    "bias_by_query": ((("bias", (1, N, T, 1), BF16),), {}, 3),
    "bias_by_head": ((("bias", (1, N, 1, 1), F32),), {}, 3),
    "alibi": ((("alibi_slopes", (B, N), F32),), {"is_causal": True}, 3),
    "segments": ((("query_segment_ids", (B, T), I32), ("key_value_segment_ids", (B, T), I32)), {"is_causal": True}, 2),
    "positions": ((("query_positions", (B, T), I32), ("key_value_positions", (T,), I32)), {"is_causal": True}, 2),
    "lengths": ((("query_seq_lengths", (B,), I32), ("key_value_seq_lengths", (B,), I32)), {}, 2),
    "mask_array": ((("mask", (B, 1, T, T), BOOL),), {}, 2),
    "mask_array_by_head": ((("mask", (1, N, T, T), BOOL),), {}, 2),
    "mask_array_by_key": ((("mask", (B, 1, 1, T), BOOL),), {}, 2),
    "mask_array_by_query": ((("mask", (B, 1, T, 1), BOOL),), {}, 2),
    "prefix": ((("prefix", (B,), I32),), {}, 2),
    "block_sparse": ((), {"mask": masks.BlockSparse(BLOCKS, (128, 128))}, 2),
    "traced_block_sparse": ((("blocks", (1, N, 10, 7), BOOL),), {}, 2),
    "custom": ((), {"mask": masks.Custom(even_diagonals) & masks.Causal()}, 2),
    "custom_with_operands": ((("documents", (B, T), I32), ("reach", (3, 3), F32)), {}, 2),
    "sinks": ((("sinks", (N,), F32),), {"is_causal": True}, 2),
    "dropout": ((("dropout_key", (2,), "uint32"),), {"is_causal": True, "dropout_rate": 0.1}, 2),
    "alibi_as_score_mod": ((("slopes", (N,), F32),), {"score_mod": alibi, "is_causal": True}, 3),
    "buckets_as_score_mod": ((("table", (32, N), F32),), {"score_mod": t5, "is_causal": True}, 3),
    "score_mod": ((("slopes", (N,), BF16), ("wide_table", (N, 300), F32), ("distance", (B, T), F32), ("factor", (), F32)),
                  {"score_mod": everything, "logits_soft_cap": 30.0}, 6),
    "composed": ((), {"mask": ~masks.Causal() | masks.Window(3, 0)}, 2),
}
MASKS = {
    "window": lambda w: masks.Window(w, 0),
    "prefix": lambda n: masks.PrefixLM(n),
    "blocks": lambda table: masks.BlockSparse(table, (64, 96)),
    "documents": lambda ids, reach: masks.Custom(near_documents, ids, reach),
}


def compile_gradient(chip, qkv, dtype, arrays, options):
  """The executable of forward and backward, and how many kernels it calls."""
  names = [name for name, _, _ in arrays]

  def loss(floats, others):
    given = dict(zip(names, (floats["arrays"].get(n, others.get(n)) for n in names)))
    for n in set(given) & set(MASKS):
      given["mask"] = MASKS[n](given.pop(n), *([given.pop("reach")] if n == "documents" else []))
    if "score_mod" in options:
      given = {"score_operands": tuple(given.values())}
    out, lse = attend(*floats["qkv"], **given, **options)
    return out.astype(jnp.float32).sum() + lse.sum()

  struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  floats = {"qkv": [struct(shape, dtype) for shape in qkv],
            "arrays": {n: struct(shape, d) for n, shape, d in arrays if "float" in d}}
  others = {n: struct(shape, d) for n, shape, d in arrays if "float" not in d}
  gradient = jax.value_and_grad(loss)
  compiled = compile_for(chip, gradient, floats, others)
  return compiled, count_kernels(chip, compiled, gradient, floats, others)


def count_kernels(chip, compiled, fun, *args):
  """Calls of Pallas kernels in the program, or in what goes into the compiler where the program cannot be printed.

  JAX 0.10.2 cannot print what libtpu makes of gathers and sorts on chips with sparse cores.
  """
  try:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')
  except jax.errors.JaxRuntimeError:
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device(chip))), args)
    with jax.default_device(device(chip)):
      return jax.jit(fun).lower(*placed).as_text().count("stablehlo.custom_call @tpu_custom_call")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("chip", CHIPS)
def test_feature_compiles(chip, feature):
  arrays, options, kernels = FEATURES[feature]
  with _plan.force_tiles(256, 256):
    _, count = compile_gradient(chip, QKV, BF16, arrays, options)
  assert count == kernels


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_everything_at_once_compiles_at_full_tiles(chip, dtype):
  """The tiles that users get, with all that wants on-chip memory."""
  qkv = ((1, 1200, 4, 256), (1, 1500, 2, 256), (1, 1500, 2, 256))
  arrays = (("bias", (1, 4, 1200, 1500), F32), ("alibi_slopes", (4,), F32), ("query_segment_ids", (1, 1200), I32),
            ("key_value_segment_ids", (1, 1500), I32), ("key_value_seq_lengths", (1,), I32), ("query_positions", (1200,), I32))
  _, count = compile_gradient(chip, qkv, dtype, arrays, {"is_causal": True, "logits_soft_cap": 20.0})
  assert count == 4


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("width", [1, 7, 64, 80, 96, 192, 512])
def test_head_widths_compile(chip, width):
  qkv = ((1, 300, 2, width), (1, 200, 1, width), (1, 200, 1, width + 3))
  _, count = compile_gradient(chip, qkv, BF16, (), {"is_causal": True})
  assert count == 2


@pytest.mark.parametrize("chip", CHIPS)
def test_float16_compiles(chip):
  _, count = compile_gradient(chip, QKV, "float16", (("bias", (1, 1, 1, T), "float16"),), {"is_causal": True})
  assert count == 3


@pytest.mark.parametrize("chip", CHIPS)
def test_sizes_of_one_compile(chip):
  _, count = compile_gradient(chip, ((1, 1, 1, 1),) * 3, F32, (), {})
  assert count == 2


# name: (coordinates, more options, how many kernels forward and backward make)
REGRESSIONS = {
    "subtracted": (2, {}, 3),
    "multiplied": (9, {"sample_weight": None}, 3),
    "skipping": (3, {"tol": 1e-3, "exclude_self": True}, None),  # JAX cannot print what libtpu makes of its sorts
}


def compile_regression(chip, coordinates, options):
  def loss(x, y, weight):
    given = options | ({"sample_weight": weight} if "sample_weight" in options else {})
    parts = jflash.kernel_regression(x, y, None, 0.3, implementation="tpu", **given)
    return sum(part.sum() for part in jax.tree.leaves(parts))

  struct = lambda *shape: jax.ShapeDtypeStruct(shape, F32)
  with _plan.force_tiles(256, 256):
    return compile_for(chip, jax.value_and_grad(loss, (0, 1, 2)), struct(1000, coordinates), struct(1000), struct(1000))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("regression", REGRESSIONS)
def test_kernel_regression_compiles(chip, regression):
  coordinates, options, kernels = REGRESSIONS[regression]
  compiled = compile_regression(chip, coordinates, options)
  assert kernels is None or compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.slow
def test_local_lines_compile_with_everything():
  """For one chip, as the eigenvalues of the local covariances take the compiler most of a minute."""
  compiled = compile_regression("v5e", 8, {"order": "linear", "exclude_self": True, "return_stats": True})
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize("chip", CHIPS)
def test_packed_sequences_compile(chip):
  """With ends that are traced, slopes of sequences, and dropout by the number of the sequence."""
  def loss(q, k, v, slopes, ends, key):
    return jflash.attention_varlen(q, k, v, ends, ends, is_causal=True, alibi_slopes=slopes, dropout_rate=0.1, dropout_key=key,
                                   implementation="tpu").astype(jnp.float32).sum()

  struct = jax.ShapeDtypeStruct
  qkv = [struct((1000, heads, 64), BF16) for heads in (4, 2, 2)]
  gradient = jax.grad(loss, (0, 1, 2, 3))
  args = *qkv, struct((5, 4), F32), struct((6,), I32), struct((2,), "uint32")
  with _plan.force_tiles(256, 256):
    assert count_kernels(chip, compile_for(chip, gradient, *args), gradient, *args) == 3


def test_a_gradient_of_a_gradient_compiles():
  """Two kernels' passes, forward and backward, and plain JAX for the derivative of the latter."""
  def product(x, direction):
    f = lambda x: attend(x, x, x, is_causal=True)[0].astype(jnp.float32).sum()
    return jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), direction).astype(jnp.float32))(x)

  x = jax.ShapeDtypeStruct((1, 512, 2, 64), BF16)
  assert count_kernels("v6e", compile_for("v6e", product, x, x), product, x, x) >= 1


@pytest.mark.parametrize("chip, dtype, heads, length", [
    ("v5e", BF16, 1, 28672), ("tpu7x", BF16, 4, 7168), ("v6e", BF16, 1, 29184), ("tpu7x", BF16, 4, 8192),
    pytest.param("v5e", F32, 1, 18944, marks=pytest.mark.slow), pytest.param("v5e", F32, 8, 2560, marks=pytest.mark.slow)])
def test_the_backward_pass_is_one_kernel(chip, dtype, heads, length):
  """Five products a tile, with dQ on chip, of all queries as long as it fits, and beyond of a span of them."""
  _, count = compile_gradient(chip, ((1, length, heads, H), *[(1, length, 1, H)] * 2), dtype, (), {"is_causal": True})
  assert count == 2


@pytest.mark.parametrize("length, spans", [(16384, False), (65536, True), (131072, True)])
def test_memory_is_linear_on_a_tpu(length, spans):
  """Outside the kernels: six arrays of the size of q with heads leading (its 64 columns lie on 128 lanes), row statistics, and,
  where spans of queries follow each other, the sums of dK and dV in float32."""
  compiled, _ = compile_gradient("v5e", ((1, length, 4, 64),) * 3, BF16, (), {})
  sums = spans * 2 * (length * 4 * 128 * 4)
  assert sums <= _plan.SUMS and compiled.memory_analysis().temp_size_in_bytes <= 6 * (length * 4 * 128 * 2) + 8 * (length * 4 * 4) + sums


def test_float64_is_refused():
  with pytest.raises(NotImplementedError, match="no float64; use implementation='xla'"), jax.enable_x64(True), jflash.interpret():
    q = jnp.ones((1, 4, 1, 4), jnp.float64)
    jflash.attention(q, q, q, implementation="tpu")


def test_without_a_tpu_the_reason_is_given():
  q = jnp.ones((1, 8, 1, 4))
  with pytest.raises(NotImplementedError, match=r"needs a TPU and this is a cpu; `with jflash.interpret\(\):`"):
    jflash.attention(q, q, q, implementation="tpu")


@pytest.mark.slow
def test_lists_of_many_heads_fit_a_few_at_a_time_or_with_a_bound_on_blocks():
  """32 heads of 128 x 128 traced tiles take 2 MiB of a scalar memory of 1 MiB, and with at most 8 in a row an eighth of one."""
  q = jax.ShapeDtypeStruct((1, 16384, 32, 64), BF16)
  table = jax.ShapeDtypeStruct((1, 32, 128, 128), BOOL)
  of = lambda most: lambda q, table: attend(q, q, q, mask=masks.BlockSparse(table, (128, 128), most))
  loops = [compile_for("v5e", of(most), q, table).as_text().count(" while(") for most in (8, None)]
  assert loops == [0, 1]


@pytest.mark.slow
def test_a_list_that_is_too_long_is_refused():
  q = jax.ShapeDtypeStruct((1, 65536, 1, 64), BF16)
  table = jax.ShapeDtypeStruct((1, 1, 512, 512), BOOL)
  with pytest.raises(NotImplementedError, match="a list of 262144 visits does not fit into a chip's scalar memory.*max_blocks"):
    compile_for("v5e", lambda q, table: attend(q, q, q, mask=masks.BlockSparse(table, (128, 128))), q, table)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["causal", "segments"])
def test_very_long_sequences_compile(options):
  """131,072 tokens; with ids that are known at run time only, of eight sequences, two at a time."""
  batch = 1 if options == "causal" else 8
  arrays = (("query_segment_ids", (batch, 131072), I32), ("key_value_segment_ids", (batch, 131072), I32)) if batch > 1 else ()
  compiled, _ = compile_gradient("v5e", ((batch, 131072, 1, 64),) * 3, BF16, arrays, {"is_causal": True})
  assert (compiled.as_text().count(" while(") > 0) == (batch > 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape, kernels", [((28672, 1, 1, 128), 2), ((32768, 1, 1, 128), 2), ((32768, 8, 2, 64), 2), ((8192, 32, 1, 128), 3)])
def test_long_sequences_compile_in_the_largest_tiles(shape, kernels):
  """With dQ of all queries on chip, of a span of them, and, for too many heads of a group, with a kernel of its own."""
  length, heads, kv_heads, width = shape
  qkv = ((1, length, n, width) for n in (heads, kv_heads, kv_heads))
  _, count = compile_gradient("v6e", tuple(qkv), BF16, (), {"is_causal": True, "tiles": (1024, 1024)})
  assert count == kernels
