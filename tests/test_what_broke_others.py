"""What went wrong in other attention libraries: each case with its public threads and the tests that would catch it here.

`KNOWN` is the map. A case that the table of `cases` or another file already proves is named there and not tested again; what
was missing is below, and what concerns kernels, memory and caches is in `test_what_broke_other_kernels`.
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import mask_cases, oracle  # noqa: F401  (adds to the table)
from tests.backends import BACKENDS, TILES, attention
from tests.cases import CASES, Built

# What went wrong: threads, and tests as "case NAME" (of the table, on every backend) or "module.function".
KNOWN = {
    "causal with T != S aligned to the wrong corner": (
        "flash-attention#436 pytorch#103082 onnx#8068 mlx#2836 jax#24491 #24495",
        "case causal_more_keys, case causal_more_queries, test_what_broke_others.test_structure"),
    "causal has no effect": ("jax#19237", "case causal_square, case causal_square_bfloat16"),
    "sequences of length zero, tiles without anything": (
        "flash-attention#1537 #1713 #2258 #2421 #2470 #2515 #2562 #2568",
        "test_what_broke_others.test_structure, test_what_broke_other_kernels.test_kernels_race_not_and_read_nothing_unwritten"),
    "rows that see nothing are NaN, the mean of the values, or what lay in memory; NaN in a masked value leaks as 0 * NaN": (
        "pytorch#101967 #103963 #109517 #110213 #136232 #139462 #141126 #153799 onnxruntime#28904 cudnn-frontend#160",
        "case mask_that_keeps_nothing, case mask_with_empty_rows_and_heads, test_not_finite.test_rows_that_see_nothing, "
        "test_not_finite.test_hidden_keys_and_values_reach_nothing"),
    "real scores below the number that stands for a mask": (
        "flashinfer#4267", "case bias_below_any_sentinel, test_what_broke_others.test_huge_scores"),
    "huge scores: inf - inf, row maximum, lse": (
        "pytorch#121558 flash-attention#442 #2082 #2083 EasyContext#14",
        "case huge_logits, case scores_of_ten_thousand, test_what_broke_others.test_huge_scores"),
    "offsets beyond int32": (
        "flash-attention#47 #500 #767 #1500 #2214 #2260 #2611 #2662",
        "test_what_broke_other_kernels.test_more_than_2_to_31_elements_compile, "
        "test_masks.test_a_window_wider_than_any_sequence_keeps_everything"),
    "races in the backward pass": (
        "flash-attention#2033 #2063 #2229 #2756",
        "test_transforms.test_reruns_give_the_same_bits, "
        "test_what_broke_other_kernels.test_every_gradient_has_the_same_bits_again, "
        "test_what_broke_other_kernels.test_kernels_race_not_and_read_nothing_unwritten"),
    "broadcast or transposed inputs and cotangents": (
        "flash-attention#2189 #2209 #2545 #2670", "test_what_broke_other_kernels.test_strides_do_not_matter"),
    "lengths in the backward pass": (
        "flash-attention#2167 #2315",
        "test_not_finite.test_hidden_keys_and_values_reach_nothing, case key_lengths, case query_lengths"),
    "a compiled kernel reused for another static argument": (
        "flash-attention#2143 #2507",
        "test_what_broke_other_kernels.test_static_options_are_part_of_the_key, "
        "test_what_broke_other_kernels.test_each_option_matters_to_the_cache"),
    "8-bit floats saturate": ("flash-attention#2717", "test_what_broke_others.test_8_bit_floats_are_refused"),
    "decoding differs from prefill": ("flash-attention#2595", "test_what_broke_others.test_decoding_is_prefill"),
    "packing x block-sparse deadlocks": (
        "flash-attention#2761", "test_what_broke_other_kernels.test_kernels_race_not_and_read_nothing_unwritten"),
    "a window off by one at the border of a tile": (
        "flash-attention#2091", "test_what_broke_others.test_structure, test_masks.test_tiles_are_exact_where_positions_run_on"),
    "gradients are NaN with a float32 bias beside bfloat16": ("jax#32242", "case everything_at_once_bfloat16"),
    "key lengths ignored without query lengths": ("jax#23349", "case key_lengths"),
    "a window ignored without a mask": ("jax#32300", "case window_one_number"),
    "the gradient of a bias is missing, or of batch 1 only": (
        "jax#27184 jax#30593", "case bias_BNTS, case bias_11TS, case bias_1N11"),
    "lengths that are no multiple of a block": ("jax#23819 jax#27224", "case plain, case one_query, case one_key"),
    "padding of segment -1 attends, packing lost beside other masks": (
        "maxtext#4476 #4478 #4908", "test_what_broke_others.test_structure, test_what_broke_others.test_nothing_is_redundant"),
    "head widths that are no power of two, or that differ": (
        "triton#621 jax#26433 cudnn-frontend#242",
        "case width_1, case width_7, case width_96, test_what_broke_others.test_head_widths"),
    "no default scale, a scale of no effect": (
        "torchax#39", "case plain, case scale_with_a_gradient, test_what_broke_others.test_scales"),
    "grouped queries refused, or of the wrong key heads": ("jax#17267", "case plain, case multi_query, case multi_head"),
    "heads before the sequence": ("jax#35916", "test_errors.test_attention_says_what_is_wrong"),
    "lse missing, rounded, or without a gradient": (
        "jax#32484 TransformerEngine#2945", "case plain, case plain_bfloat16, case plain_float16"),
    "constants that debugging finds": ("jax#37422", "test_what_broke_others.test_debugging_finds_nothing"),
    "masks that may not be traced": ("keras#21808", "test_transforms.test_vmap_over_each_argument_and_its_gradients"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_tests_that_are_named_exist(name):
  table = {case.name: case for case in CASES}
  for test in KNOWN[name][1].split(", "):
    kind, _, rest = test.rpartition(" ")
    if kind == "case":
      assert rest in table and table[rest].only is None, f"{rest} has to be a case of every backend"
    else:
      module, function = test.split(".")
      assert callable(getattr(importlib.import_module(f"tests.{module}"), function))


# Structure: one compiled function, in which everything that masks is traced ------------------------------------------

B, T, S, N, K, H, E = 2, 139, 261, 4, 2, 8, 4
FAR = 2**31 - 1
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(dtype="float32"):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, E), (B, T, N, E), (B, T, N))]


@functools.partial(jax.jit, static_argnames="backend")
def gradients(backend, q, k, v, dout, dlse, structure, terms):
  """out, lse and the gradients by name; `structure` goes in as keywords."""
  window = structure["local_window_size"]
  masked = {**structure, "local_window_size": tuple(window), "is_causal": True}
  results, pull = jax.vjp(lambda x: attention(backend, **x, **masked), {"query": q, "key": k, "value": v, **terms})
  return oracle.Answer(*results, *pull((dout.astype(results[0].dtype), dlse)))


def run(backend, arrays, structure, terms=None):
  return jax.tree.map(np.asarray, gradients(backend, *arrays, structure, terms or {}))


def structured(**changes):
  """Arguments that hide nothing, but for `changes`: the queries come after all keys."""
  return {"query_positions": np.tile(np.arange(T) + S, (B, 1)), "key_value_positions": np.tile(np.arange(S), (B, 1)),
          "query_segment_ids": np.zeros((B, T), int), "key_value_segment_ids": np.zeros((B, S), int),
          "query_seq_lengths": np.full(B, T), "key_value_seq_lengths": np.full(B, S), "local_window_size": [FAR, FAR],
          "mask": np.ones((1, 1, T, S), bool), **changes}


def keep_of(x):
  """What those arguments mean, `[B, N, T, S]`, in integers that do not wrap."""
  q, k = (x[name].astype(np.int64) for name in ("query_positions", "key_value_positions"))
  distance = q[:, None, :, None] - k[:, None, None, :]
  left, right = x["local_window_size"]
  seen = (distance >= 0) & (distance <= left) & (-distance <= right) & x["mask"]
  seen &= x["query_segment_ids"][:, None, :, None] == x["key_value_segment_ids"][:, None, None, :]
  seen &= np.arange(T)[:, None] < x["query_seq_lengths"][:, None, None, None]
  return np.broadcast_to(seen & (np.arange(S) < x["key_value_seq_lengths"][:, None, None, None]), (B, N, T, S))


def in_order(**changes):
  """Row and column numbers are the positions."""
  return structured(query_positions=np.tile(np.arange(T), (B, 1)), **changes)


def _without(*spans, axis):
  mask = np.ones((1, 1, T, S), bool)
  for span in spans:
    mask[(..., span, slice(None)) if axis == 0 else (..., span)] = False
  return mask


def _documents(cumulative, length, rest):
  """Ids of packed documents, `[length]`, from where each begins."""
  ids = np.searchsorted(cumulative, np.arange(length), side="right")
  return np.tile(np.where(np.arange(length) < cumulative[-1], ids, rest), (B, 1))


def _everything():
  rng = np.random.default_rng(1)
  ids = lambda n: np.arange(n)[None] // np.array([[45], [70]])
  return in_order(query_segment_ids=ids(T), key_value_segment_ids=ids(S), local_window_size=[60, 3],
                  mask=rng.random((1, 1, T, S)) < 0.7, query_seq_lengths=np.array([130, 139]),
                  key_value_seq_lengths=np.array([100, 70]))


STRUCTURES = {
    "nothing hidden": structured(),
    "causal by row and column": in_order(),
    "causal to the last key": structured(query_positions=np.tile(np.arange(T) + S - T, (B, 1))),
    "lengths of zero": structured(query_seq_lengths=np.array([0, T]), key_value_seq_lengths=np.array([S, 0])),
    "no lengths at all": structured(query_seq_lengths=np.zeros(B, int), key_value_seq_lengths=np.zeros(B, int)),
    "lengths below zero and past the end": structured(query_seq_lengths=np.array([FAR, T + 1]),
                                                      key_value_seq_lengths=np.array([-1, FAR])),
    "lengths of one": structured(query_seq_lengths=np.array([1, T]), key_value_seq_lengths=np.array([S, 1])),
    "no keys at the start": structured(mask=_without(slice(0, 130), axis=1)),
    "no keys in the middle": structured(mask=_without(slice(70, 257), axis=1)),
    "no keys at the end": structured(mask=_without(slice(128, S), axis=1)),
    "no queries at the start and in the middle": structured(mask=_without(slice(0, 50), slice(90, 100), axis=0)),
    "no queries at the end": structured(mask=_without(slice(96, T), axis=0)),
    "documents of one key": structured(query_segment_ids=_documents([0, 50, 84, 130], T, -1),
                                       key_value_segment_ids=_documents([0, 1, 2, 3], S, -2)),
    "documents without queries, or without keys": structured(query_segment_ids=_documents([0, 50, 50, 139], T, -1),
                                                             key_value_segment_ids=_documents([0, 0, 129, 200], S, -2)),
    # An id is an id: where -1 pads both sides, padding sees padding; two ids keep it apart.
    "segment -1": structured(query_segment_ids=_documents([0, 48, 96], T, -1),
                             key_value_segment_ids=_documents([0, 80, 240], S, -1)),
    "segments -1 and -2": structured(query_segment_ids=_documents([0, 48, 96], T, -1),
                                     key_value_segment_ids=_documents([0, 80, 240], S, -2)),
    "positions that say unused": structured(query_positions=np.tile(np.where(np.arange(T) < 100, np.arange(T) + 60, -1), (B, 1)),
                                            key_value_positions=np.tile(np.where(np.arange(S) < 160, np.arange(S), FAR), (B, 1))),
    "everything": _everything(),
}
# Windows and diagonals of which a tile sees one corner, or just none: by either backend's tiles.
for _rows, _columns in TILES.values():
  for _by in (-2, -1, 0, 1, 2):
    _at = lambda first: np.tile(np.arange(T) + first, (B, 1))
    STRUCTURES[f"window of {_rows + _by}"] = structured(query_positions=_at(_columns), local_window_size=[_rows + _by, 0])
    STRUCTURES[f"diagonal at {_columns - _rows + _by}"] = structured(query_positions=_at(_columns - _rows + _by))


@pytest.mark.parametrize("name", STRUCTURES)
@each_backend
def test_structure(backend, name):
  q, k, v, *cotangents = draw()
  ours = run(backend, (q, k, v, *cotangents), STRUCTURES[name])
  assert all(np.isfinite(x).all() for x in (ours.out, *ours.grads.values()))
  oracle.check(ours, Built(q, k, v, {}, keep_of(STRUCTURES[name])), cotangents)


@pytest.mark.parametrize("part", STRUCTURES["everything"])
def test_nothing_is_redundant(part):
  """Of what "everything" hides, no part is hidden by the others: were one of them lost, the case would show it."""
  if part != "key_value_positions":  # where nothing is changed
    lost = {**STRUCTURES["everything"], part: structured()[part]}
    assert (keep_of(lost) != keep_of(STRUCTURES["everything"])).any()


@each_backend
def test_batch_elements_and_heads_are_apart(backend):
  """Whatever is not finite in one batch element, or in one key head and its queries, leaves the bits of the others alone."""
  arrays = draw()
  clean = run(backend, arrays, in_order())
  for number, bad in ((0, np.nan), (1, np.inf), (2, np.nan), (3, np.inf), (4, -np.inf)):
    batch, head = ([x.copy() for x in arrays] for _ in range(2))
    batch[number][1] = bad
    head[number][:, :, head[number].shape[2] // 2:] = bad
    for at, dirty in ((np.s_[:1], run(backend, batch, in_order())), (np.s_[:, :, :1], run(backend, head, in_order()))):
      for x, y in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean)):
        np.testing.assert_array_equal(x[at], y[at])
        assert np.isfinite(y).all()


@each_backend
def test_a_bias_that_is_not_a_number_reaches_who_sees_it(backend):
  rng, structure = np.random.default_rng(0), in_order()
  bias, hidden = rng.normal(size=(B, N, T, S)).astype("f"), ~keep_of(structure)
  clean = run(backend, draw(), structure, {"bias": bias})
  unseen = np.where(hidden, np.nan, bias)
  for x, y in zip(jax.tree.leaves(run(backend, draw(), structure, {"bias": unseen})), jax.tree.leaves(clean)):
    np.testing.assert_array_equal(x, y)
  bias[1, 2, 100, 40] = np.nan
  seen = run(backend, draw(), structure, {"bias": bias})
  hit = np.zeros((B, T, N), bool)
  hit[1, 100, 2] = True
  for x, y in ((seen.out, clean.out), (seen.lse, clean.lse), (seen.grads["query"], clean.grads["query"])):
    assert np.isnan(x[hit]).all()
    np.testing.assert_array_equal(x[~hit], y[~hit])


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, size", [("float32", 1e4), ("float32", 1e10), ("float32", 1e30), ("float16", 1e6)])
@each_backend
def test_huge_scores(backend, dtype, size):
  """Scores of ±size, also below all that usually stands for a mask, products beyond float16: every row is its largest score."""
  q, k, v, dout, dlse = (jnp.asarray(x, dtype) for x in draw())
  q, k = (x * size**0.5 for x in (q, k))
  assert q.dtype == dtype and np.isfinite(k.astype("f")).all()
  ours = run(backend, (q, k, v, dout, dlse.astype("f")), in_order())
  q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  s = np.where(keep_of(in_order()), np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5, -np.inf)
  second, first = np.sort(s)[..., 1:, -2:].transpose(3, 0, 1, 2)
  clear = np.concatenate([np.full((B, N, 1), True), first - second > 100], axis=-1).transpose(0, 2, 1)  # [B, T, N]
  assert clear.mean() > 0.8 and (s.max(-1) < -size / 100).any()
  at = s.argmax(-1).transpose(0, 2, 1)[..., None]
  eps = float(jnp.finfo(dtype).eps)
  pick = lambda x: np.take_along_axis(x, at, axis=1)
  np.testing.assert_allclose(ours.out[clear].astype(np.float64), pick(v)[clear], rtol=eps)
  np.testing.assert_allclose(ours.lse[clear], s.max(-1).transpose(0, 2, 1)[clear], rtol=1e-5, atol=1e-6 * size)
  assert all(np.isfinite(x.astype(np.float64)).all() for x in (ours.out, ours.lse, *ours.grads.values()))
  # One score a row: dS = P ∘ (dP - D + dlse) is dlse, up to the rounding of dP - D.
  dq, rounding = pick(k) * dlse[..., None] * H**-0.5, 8 * eps * E * np.abs(dout).max() * np.abs(v).max() * np.abs(k).max()
  np.testing.assert_allclose(ours.grads["query"][clear].astype(np.float64), dq[clear], rtol=4 * eps, atol=rounding)


@pytest.mark.parametrize("tiles", [(5, 64), (5, 160), (48, 80)])
@pytest.mark.parametrize("size", [1e6, 1e10, 1e14])
def test_huge_scores_with_a_scale_that_rounds(size, tiles):
  """Where XLA contracts the scale's product and the subtraction of the maximum, a score differs from itself by its last digit."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, n, 1, 7)) for n in (5, 160, 160))
  q, k = (x * size**0.5 for x in (q, k))
  attend = functools.partial(attention, "xla", tiles=tiles)
  (out, _), pull = jax.vjp(attend, *(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
  s = np.einsum("bthd,bshd->bts", *(x.astype("f").astype(float) for x in (q, k)))[0] * 7**-0.5
  first, at = np.diff(np.sort(s)[:, -2:])[:, 0], s.argmax(-1)
  assert (first > 100).all()
  np.testing.assert_allclose(out[0, :, 0], v[0, at, 0], rtol=1e-6)
  dq, dk, dv = pull((jnp.ones_like(out), jnp.zeros((1, 5, 1))))
  np.testing.assert_array_equal(dv[0, :, 0, 0], np.bincount(at, minlength=160))
  assert np.isfinite(dq).all() and np.isfinite(dk).all()
  _, moved = jax.jvp(lambda v: attend(*(jnp.asarray(x, jnp.float32) for x in (q, k)), v)[0], (jnp.asarray(v, jnp.float32),),
                     (jnp.ones(v.shape, jnp.float32),))
  np.testing.assert_array_equal(moved, jnp.ones_like(out))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@each_backend
def test_scales(backend, scale):
  """A negative scale makes the least product the largest score; a scale of 0 makes the mean."""
  q, k, v, *cotangents = draw()
  scale = np.full((), scale, np.float32)
  ours = run(backend, (q, k, v, *cotangents), in_order(), {"scale": scale})
  oracle.check(ours, Built(q, k, v, {"scale": scale}, keep_of(in_order())), cotangents)
  bad = k.copy()
  bad[:, T:] = np.nan  # which no query sees, nor does the gradient of the scale
  jax.tree.map(np.testing.assert_array_equal, run(backend, (q, bad, v, *cotangents), in_order(), {"scale": scale}), ours)


@pytest.mark.parametrize("width, value_width", [(65, 192), (129, 17)])
@each_backend
def test_head_widths(backend, width, value_width):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, 20, 1, n)).astype("f") for n in (width, width, value_width))
  cotangents = rng.normal(size=v.shape).astype("f"), rng.normal(size=v.shape[:3]).astype("f")
  ours = oracle.answer(lambda **x: attention(backend, **x, is_causal=True), {"query": q, "key": k, "value": v}, cotangents)
  oracle.check(ours, Built(q, k, v, {}, np.tri(20, dtype=bool)[None, None]), cotangents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_backend
def test_decoding_is_prefill(backend, dtype):
  """A few queries at their positions are those rows of all of them, to a rounding or two: the tiles need not be the same ones."""
  q, k, v = (jnp.asarray(x, dtype) for x in draw()[:3])
  out, lse = attention(backend, q, k, v, is_causal=True)
  step = jax.jit(lambda q, at: attention(backend, q, k, v, is_causal=True, query_positions=at + jnp.arange(3)))
  for at in (0, 46, 127, T - 3):
    few, few_lse = step(q[:, at:at + 3], at)
    allowed = 2 * float(jnp.finfo(dtype).eps) * abs(v.astype("f")).max()
    np.testing.assert_allclose(few.astype("f"), out[:, at:at + 3].astype("f"), rtol=0, atol=allowed)
    np.testing.assert_allclose(few_lse, lse[:, at:at + 3], rtol=4e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_are_refused(dtype):
  q = jnp.ones((1, 4, 1, 4), dtype)
  with pytest.raises(ValueError, match=f"`query` has dtype {dtype}; cast it to one of bfloat16"):
    attention("xla", q, q, q)


@each_backend
def test_debugging_finds_nothing(backend):
  """No NaN where rows see nothing, no infinity where all rows see something: `jax_debug_nans` and `jax_debug_infs` stay silent."""
  arrays = draw()
  with jax.debug_nans(True):
    run(backend, arrays, STRUCTURES["lengths of zero"])
  with jax.debug_infs(True):
    run(backend, arrays, in_order())
