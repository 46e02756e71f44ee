"""What went wrong in other libraries with kernels, memory and caches; `test_what_broke_others` says which cases these are."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jflash
from jflash import _plan, _reference, masks
from pallas_kernels import schedule
from tests.backends import BACKENDS, TILES, attention, using
from tests.test_tpu_interpret import races_found
from tests.tpu_topology import compile_for

B, T, S, N, K, H, E = 2, 150, 280, 2, 1, 8, 4
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype("f") for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, E), (N, 1, S))]


def loss(attend):
  def of(*args):
    out, lse = attend(*args)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0.0))
  return of


# Memory ---------------------------------------------------------------------------------------------------------------

BLOCKS = np.random.default_rng(1).random((5, 10)) < 0.5
BLOCKS[0] = False
# name: arguments, and what is seen [B, 1, T, S]. Ids and lengths are JAX arrays: their lists have entries that are left over.
Q_IDS, K_IDS = np.searchsorted([76, 110, 139], np.arange(T), side="right"), np.searchsorted([1, 2, 160], np.arange(S), side="right")
LENGTHS = np.array([0, 279], np.int32)
POISONED = {
    "packed, block-sparse": ({"query_segment_ids": jnp.asarray(Q_IDS), "key_value_segment_ids": jnp.asarray(K_IDS),
                              "mask": masks.BlockSparse(BLOCKS, (30, 28))},
                             (Q_IDS[:, None] == K_IDS) & BLOCKS[np.arange(T) // 30][:, np.arange(S) // 28]),
    "a length of zero, causal": ({"key_value_seq_lengths": jnp.asarray(LENGTHS), "is_causal": True},
                                 (np.arange(S) < LENGTHS[:, None, None, None]) & np.tri(T, S, dtype=bool))}


@pytest.mark.parametrize("name", POISONED)
def test_kernels_race_not_and_read_nothing_unwritten(name):
  """Several tiles with ragged ends, all memory NaN before it is written, rows and key tiles that nothing is computed for."""
  arrays, (kwargs, keep) = draw(), POISONED[name]
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
  ours = lambda *x: jflash.attention(*x, implementation="tpu", return_residual=True, **kwargs)
  with jflash.interpret(params), _plan.force_tiles(*TILES["tpu"]):
    value, grads = jax.value_and_grad(loss(ours), (0, 1, 2, 3))(*arrays)
  assert not races_found()
  want, want_grads = jax.value_and_grad(loss(lambda *x: _reference.attention(*x, keep)), (0, 1, 2, 3))(*arrays)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for got, expected in zip(grads, want_grads):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@each_backend
def test_every_gradient_has_the_same_bits_again(backend):
  q, k, v, bias = draw()
  terms = {"bias": bias, "alibi_slopes": np.ones(N, "f") / 8, "scale": np.float32(0.3), "logits_soft_cap": np.float32(4)}
  of = lambda q, k, v, terms: loss(lambda: attention(backend, q, k, v, is_causal=True, **jax.tree.map(jnp.asarray, terms)))()
  f = jax.jit(jax.grad(of, (0, 1, 2, 3)))
  first = f(q, k, v, terms)
  for _ in range(10):
    jax.tree.map(np.testing.assert_array_equal, f(q, k, v, terms), first)


def _views(x):
  """The same numbers laid out otherwise: transposed, backwards, and every other one of a larger array."""
  padded = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
  padded[..., ::2] = x
  return np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1), np.ascontiguousarray(x[:, ::-1])[:, ::-1], padded[..., ::2]


@each_backend
def test_strides_do_not_matter(backend):
  """NumPy views, broadcast arrays, and the cotangents of sums and transposes."""
  q, k, v, bias = draw()
  bias = np.broadcast_to(bias, (B, N, T, S))  # of stride 0
  dout = np.broadcast_to(np.float32([1, 2, 3, 4]), (B, T, N, E))
  def gradients(q, k, v, bias, dout):
    (out, lse), pull = jax.vjp(lambda *x: attention(backend, *x, is_causal=True), q, k, v, bias)
    return out, *pull((jnp.asarray(dout), jnp.broadcast_to(jnp.float32(1), lse.shape)))
  want = gradients(*map(np.ascontiguousarray, (q, k, v, bias, dout)))
  for arrays in zip(*map(_views, (q, k, v))):
    assert not any(x.flags.c_contiguous for x in arrays)
    jax.tree.map(np.testing.assert_array_equal, gradients(*arrays, bias, dout), want)

  def heads_first(q, k, v, bias):  # in one program, whose cotangent is a transposed broadcast
    out, lse = attention(backend, *(x.swapaxes(1, 2) for x in (q, k, v)), bias, is_causal=True)
    return jnp.sum(out.transpose(3, 1, 0, 2) * jnp.arange(1.0, E + 1)[:, None, None, None]) + lse.sum()
  grads = jax.jit(jax.grad(heads_first, (0, 1, 2, 3)))(*(x.swapaxes(1, 2) for x in (q, k, v)), bias)
  for got, expected in zip((*(x.swapaxes(1, 2) for x in grads[:3]), grads[3]), want[1:]):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=4e-7 * abs(np.asarray(expected)).max())


# Caches of compiled functions -----------------------------------------------------------------------------------------


def _every(n):
  """Rules with one code and different numbers in it."""
  return masks.Custom(lambda batch, head, q, k: (q + k) % n == 0)


ROW, COLUMN = np.arange(T)[:, None], np.arange(S)
CHECKERS = np.indices((5, 9)).sum(0) % 2 == 0
# Pairs that differ in nothing but static numbers.
PAIRS = {
    "scale": [{"scale": 1}, {"scale": 1.01}], "cap": [{"logits_soft_cap": 2.0}, {"logits_soft_cap": 2.1}],
    "causal": [{"is_causal": True}, {}], "window": [{"local_window_size": (5, 2)}, {"local_window_size": (5, 3)}],
    "lengths": [{"mask": masks.Lengths(key=n)} for n in (30, 31)], "prefix": [{"mask": masks.PrefixLM(n)} for n in (30, 31)],
    "blocks": [{"mask": masks.BlockSparse(CHECKERS, shape)} for shape in ((32, 32), (31, 34))],
    "order": [{"mask": ~(masks.Causal() & masks.Window(3))}, {"mask": ~masks.Causal() & masks.Window(3)}],
    "rule": [{"mask": _every(3)}, {"mask": _every(4)}]}


@pytest.mark.parametrize("name", PAIRS)
def test_static_options_are_part_of_the_key(name):
  """Compiled functions of both passes are kept by the structure of a problem, and by the plan."""
  one, other = (jax.tree.structure(_problem(*draw()[:3], **kwargs)) for kwargs in PAIRS[name])
  assert one != other


def _problem(q, k, v, **kwargs):
  return jflash._api.make_problem(q, k, v, **kwargs)


@each_backend
def test_each_option_matters_to_the_cache(backend):
  """One process, one set of shapes, another block shape, there and back, forward and backward."""
  q, k, v, _ = draw()

  def gradients(attend, **kwargs):
    (out, lse), pull = jax.vjp(functools.partial(attend, **kwargs), q, k, v)
    return out, *pull((jnp.ones_like(out), jnp.zeros_like(lse)))

  dense = jax.jit(lambda keep: gradients(_reference.attention, keep=keep))
  ours = [gradients(functools.partial(attention, backend), **kwargs) for kwargs in PAIRS["blocks"] * 2]
  theirs = [dense(CHECKERS[ROW // rows, COLUMN // columns]) for rows, columns in ((32, 32), (31, 34))]
  for one, other, mine, yours in zip(*ours[:2], *theirs):
    assert abs(one - mine).max() < 1e-4 and abs(other - yours).max() < 1e-4 and abs(mine - yours).max() > 0.1
  jax.tree.map(np.testing.assert_array_equal, ours[:2], ours[2:])


def test_tiles_and_interpreter_are_part_of_the_plan():
  """Compiled functions are kept by the plan, so what a kernel's code depends on must make two plans differ."""
  problem = _problem(*draw()[:3])
  plans = [_plan.plan_tpu(problem)]
  for tiles, params in (((128, 128), False), ((128, 256), False), ((128, 128), True), ((128, 128), pltpu.InterpretParams())):
    with _plan.force_tiles(*tiles), jflash.interpret(params):
      plans.append(_plan.plan_tpu(problem))
  assert len(set(plans)) == len(plans)
  assert dataclasses.replace(plans[0]) == plans[0]


# Sizes ----------------------------------------------------------------------------------------------------------------

HUGE = jax.ShapeDtypeStruct((17, 16384, 64, 128), "bfloat16")  # 2**31 elements and a sixteenth more
HUGE_BYTES = 2 * 17 * 16384 * 64 * 128


@each_backend
def test_more_than_2_to_31_elements_compile(backend):
  """Forward and backward, with lengths that are traced; nothing of that size is allocated."""
  def gradient(q, k, v, lengths):
    of = lambda *x: jflash.attention(*x, is_causal=True, key_value_seq_lengths=lengths, implementation=backend).astype("f").sum()
    return jax.grad(of, (0, 1, 2))(q, k, v)

  args = HUGE, HUGE, HUGE, jax.ShapeDtypeStruct((17,), "int32")
  compiled = compile_for("v5p", gradient, *args) if backend == "tpu" else jax.jit(gradient).lower(*args).compile()
  sizes = compiled.memory_analysis()
  assert HUGE_BYTES > 2**32 and 3 * HUGE_BYTES <= sizes.output_size_in_bytes < 3.01 * HUGE_BYTES
  assert sizes.temp_size_in_bytes < 16 * HUGE_BYTES, "linear memory: the probabilities would take 256 times an argument"


def test_what_is_said_of_more_than_2_to_31_elements():
  why = jflash.explain(HUGE, HUGE, HUGE, is_causal=True)
  assert why.saved["query"] == HUGE_BYTES and why.naive_saved == 3 * HUGE_BYTES + 4 * 17 * 64 * 16384**2


@pytest.mark.parametrize("xp", [np, jnp], ids=["static", "traced"])
def test_a_visit_has_room_for_16384_tiles(xp):
  """Kernels' lists number tiles in 14 bits: beyond that, an error before anything is computed."""
  visits = lambda *counts: schedule.visits(xp.full((1, 1, *counts), schedule.FULL, np.int32))
  assert schedule.inner(visits(2, 16384).codes[0, 0, -1]) == 16383
  for counts in ((16385, 1), (1, 16385)):
    with pytest.raises(NotImplementedError, match=r"16385.* tiles; at most 16384 fit along an axis"):
      visits(*counts)


def test_plain_jax_has_room_for_more():
  shapes = (1, 2, 1, 1), (1, 16390, 1, 1), (1, 16390, 1, 1)
  q, k, v = (jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes))
  with using("xla", (1, 1)):
    ours = jflash.attention(q, k, v, implementation="xla", key_value_seq_lengths=jnp.array([16388]))
  np.testing.assert_allclose(ours, _reference.attention(q, k[:, :16388], v[:, :16388])[0], rtol=1e-4, atol=1e-6)


def test_a_list_too_long_for_a_chip_is_refused_in_words():
  """512 x 512 tiles of 512 x 512: a list of 1 MiB."""
  x = jax.ShapeDtypeStruct((1, 262144, 1, 128), "bfloat16")
  with pytest.raises(NotImplementedError, match="tiles"):
    compile_for("v5e", lambda q, k, v: jflash.attention(q, k, v, implementation="tpu"), x, x, x)
