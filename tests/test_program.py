"""Functions of scores and positions: what is looked up where, what kernels refuse, and what reaches their operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _mask, _program, _reference, masks
from tests.backends import BACKENDS, attention
from tests.function_cases import alibi, low_rank, t5

B, T, S, N, K, H = 2, 20, 24, 4, 2, 6
SIZES = _mask.Sizes(B, N, T, S)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))


def normal(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def bound(fn, *operands, sizes=SIZES):
  return _program.bind(fn, list(operands), sizes, jnp.float32)


# Where lookups are done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn, operands, shapes", [
    (alibi, [(N,)], [(1, N, 1, 1)]),
    (t5, [(16, N)], [(1, N, 1, 1, 1, 16)]),
    (lambda s, b, h, q, k, x: s + x[b, q], [(B, T)], [(B, 1, T, 1)]),
    (lambda s, b, h, q, k, x: s + x[k, h], [(S, N)], [(1, N, 1, S)]),
    (lambda s, b, h, q, k, x: s + x[b, h, q], [(B, N, T)], [(B, N, T, 1)]),
    (lambda s, b, h, q, k, x: s + x[b, abs(q - k), h], [(B, 30, N)], [(B, N, 1, 1, 1, 30)]),
    (lambda s, b, h, q, k, x: s + x[q % 3, k % 5], [(3, 5)], [(1, 1, 1, 1, 1, 15)]),
    (lambda s, b, h, q, k, x: s + x[2, q % 5 + k % 5], [(3, 9)], [(1, 1, 1, 1, 1, 9)]),
    (lambda s, b, h, q, k, x: s + x[:, 0][h] + x.T[abs(q - k) % 9, h], [(N, 9)], [(1, N, 1, 1), (1, N, 1, 1, 1, 9)]),
    (lambda s, b, h, q, k, x: s * x, [()], [(1, 1, 1, 1)]),
    (lambda s, b, h, q, k, x: s + jnp.exp(x)[h], [(N,)], [(1, N, 1, 1)]),
    (lambda s, b, h, q, k, x, y: s + x[h] * y[k], [(N,), (S,)], [(1, N, 1, 1), (1, 1, 1, S)]),
    (lambda s, b, h, q, k, x: s + jnp.take(x, h), [(N,)], [(1, N, 1, 1)]),
    (lambda s, b, h, q, k: s + k, [], []),
])
def test_arrays_of_a_program(fn, operands, shapes):
  program = bound(fn, *[normal(*shape) for shape in operands])
  assert [x.shape for x in program.arrays] == shapes and program.reason is None


def test_lookups_of_lookups():
  documents = jnp.arange(T) // 7
  program = bound(lambda s, b, h, q, k, between: s + between[documents[q], documents[k % T]], normal(3, 3))
  assert sorted(x.shape for x in program.arrays) == [(1, 1, 1, 1, 1, 9), (1, 1, 1, S), (1, 1, T, 1)] and program.reason is None


@pytest.mark.parametrize("fn, operands, message", [
    (low_rank, [(9, 3), (N, 5, 3)], "low_rank looks up more than single entries.*only plain JAX.*Index every axis"),
    (lambda s, b, h, q, k, x: s + x.sum(), [(3, 5)], r"uses an operand of shape \(3, 5\) as a whole; only plain JAX"),
    (lambda s, b, h, q, k, x: s + x[q - k], [(1025,)], "looks up 1025 entries by query and key together, and a kernel at most 1024"),
])
def test_what_kernels_refuse(fn, operands, message):
  operands = tuple(normal(*shape) for shape in operands)
  q, k, v = draw()
  options = {"score_mod": fn, "score_operands": operands}
  with jflash.interpret(), pytest.raises(NotImplementedError, match=message):
    jflash.attention(q, k, v, implementation="tpu", **options)
  grads = jax.grad(lambda operands: attention("xla", q, k, v, score_mod=fn, score_operands=operands)[0].sum())(operands)
  assert all(np.isfinite(g).all() for g in grads)


def test_a_mask_that_kernels_refuse():
  mask = masks.Custom(lambda b, h, q, k, x: (x[h] > k[..., None]).any(-1), normal(N, 3) * 10)
  q, k, v = draw()
  with jflash.interpret(), pytest.raises(NotImplementedError, match="looks up more than single entries"):
    jflash.attention(q, k, v, mask=mask, implementation="tpu")
  assert np.isfinite(attention("xla", q, k, v, mask=mask)[0]).all()


# What reaches operands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_what_is_closed_over(backend):
  q, k, v = draw()
  slopes, table, factor = normal(N), normal(16, N), jnp.float32(1.5)

  def closed(slopes, table, factor):
    mod = lambda score, b, h, i, j: factor * t5(alibi(score, b, h, i, j, slopes), b, h, i, j, table)
    return jnp.sin(attention(backend, q, k, v, score_mod=mod)[0]).sum()

  def given(*operands):
    mod = lambda score, b, h, i, j, slopes, table, factor: factor * t5(alibi(score, b, h, i, j, slopes), b, h, i, j, table)
    return jnp.sin(attention(backend, q, k, v, score_mod=mod, score_operands=operands)[0]).sum()

  got, want = (jax.grad(f, (0, 1, 2))(slopes, table, factor) for f in (closed, given))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  assert all(np.abs(g).max() > 1e-3 for g in got)
  _, pushed = jax.linearize(closed, slopes, table, factor)
  np.testing.assert_allclose(pushed(*got), sum((a * b).sum() for a, b in zip(got, want)), rtol=1e-4)


def test_gradients_have_the_dtype_and_shape_of_their_operands():
  q, k, v = draw()
  operands = normal(N).astype(jnp.bfloat16), normal(16, N).astype(jnp.float16)
  mod = lambda s, b, h, i, j, slopes, table: t5(alibi(s, b, h, i, j, slopes), b, h, i, j, table)
  grads = jax.grad(lambda x: attention("xla", q, k, v, score_mod=mod, score_operands=x)[0].sum())(operands)
  assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in operands]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_operands(backend):
  q, k, v = draw()
  tables = normal(3, 16, N)
  f = lambda table: jax.value_and_grad(lambda x: attention(backend, q, k, v, score_mod=t5, score_operands=(x,))[0].sum())(table)
  if backend != "xla":  # the kernels' gradients have their cases
    f = lambda table: attention(backend, q, k, v, score_mod=t5, score_operands=(table,))[0]
  one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *map(f, tables))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), jax.vmap(f)(tables), one_by_one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_what_is_hidden_are_not_read(backend):
  """NaN in entries that only masked scores look up reaches nothing, not even through a product with another operand."""
  q, k, v = draw()
  mod = lambda s, b, h, i, j, of_key, of_head, of_both: s * jnp.log(of_key[b, j]) * of_head[h] + of_key[b, j] * of_both[h, (i - j) % 24]
  lengths = np.array([10, 17])
  of_key, of_head, of_both = 2 + normal(B, S) / 9, 1 + normal(N) / 9, normal(N, 24)
  hidden = np.arange(S) >= lengths[:, None]

  def grads(of_key):
    f = lambda *x: jnp.sin(attention(backend, q, k, v, score_mod=mod, score_operands=x, key_value_seq_lengths=lengths)[0]).sum()
    return jax.value_and_grad(f, (0, 1, 2))(of_key, of_head, of_both)

  clean = grads(of_key)
  for worst in (jnp.nan, 0.0):
    spoilt = grads(jnp.where(hidden, worst, of_key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), spoilt, clean)


def test_nan_that_is_looked_up_for_what_is_kept_shows():
  q, k, v = draw()
  out = attention("xla", q, k, v, score_mod=lambda s, b, h, i, j, x: s + x[j], score_operands=(normal(S).at[3].set(jnp.nan),),
                  is_causal=True)[0]
  assert np.isnan(out[:, 3:]).all() and np.isfinite(out[:, :3]).all()


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_indices_out_of_range_do_what_jax_says(mode):
  """By head, done ahead; and by query and key, in the tile."""
  q, k, v = draw()
  row, both = normal(3), normal(N, 9)
  mod = lambda s, b, h, i, j, row, both: (s + jnp.take(row, h % 2 + 1, mode=mode) + both.at[h, abs(i - j)].get(mode=mode, fill_value=0.5))
  ours = attention("xla", q, k, v, score_mod=mod, score_operands=(row, both))[0]
  want = _reference.attention(q, k, v, score_mod=mod, score_operands=(row, both))[0]
  np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)
  beyond = attention("xla", q, k, v, score_mod=lambda s, b, h, i, j, row: s + jnp.take(row, h, mode=mode), score_operands=(row,))[0]
  assert np.isnan(beyond[:, :, 3]).all() == (mode == "fill") and np.isfinite(beyond[:, :, :3]).all()


def test_a_function_sees_positions_and_ids():
  q, k, v = draw()
  positions, batch, head = np.arange(T) * 3 + 1, np.array([5, 7]), np.array([3, 2, 1, 0])
  mod = lambda s, b, h, i, j: s + jnp.sin((b * 31 + h * 17 + i * 5 + j).astype(s.dtype))
  ours = attention("xla", q, k, v, score_mod=mod, query_positions=positions, batch_ids=batch, head_ids=head)[0]
  bias = np.sin(batch[:, None, None, None] * 31 + head[:, None, None] * 17 + positions[:, None] * 5 + np.arange(S)).astype("f")
  np.testing.assert_allclose(ours, attention("xla", q, k, v, bias)[0], atol=1e-5)


def test_a_function_of_nothing_leaves_the_tiles_alone():
  """Operands do not make a mask unknown: what is known while tracing stays so."""
  q, k, v = draw()
  mask = masks.Causal() & masks.Custom(lambda b, h, i, j, x: x[h] > 0, normal(N))
  explained = jflash.explain(q, k, v, mask=mask)
  assert explained.decided == "decided while tracing" and explained.skipped is not None


def test_tile_rule_skips():
  """Of 8 x 8 tiles, those four below the diagonal cross the border, and those further down are inside."""
  far = masks.Custom(lambda b, h, i, j: i - j >= 512, tile=lambda i, j: (i.hi - j.lo >= 512, i.lo - j.hi >= 512))
  shown = jflash.show(far, 1024, 1024, tiles=128)
  assert (shown.skipped, shown.partial, shown.full) == (54 / 64, 4 / 64, 6 / 64)
