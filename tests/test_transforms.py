"""JAX's transformations of attention: each against the same thing done by hand, and what is saved and allocated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jflash
from jflash import masks
from tests.backends import BACKENDS, attention

B, T, S, N, K, H, E, M = 2, 70, 90, 4, 2, 6, 5, 3  # M is the size of what is mapped over

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(seed=0, lead=()):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, E)
  return tuple(jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) for shape in shapes)


def summed(backend, *args, **kwargs):
  """A scalar that depends on out and on lse."""
  out, lse = attention(backend, *args, **kwargs)
  return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(lse == -jnp.inf, 0.0, lse)))


def close(a, b, tolerance=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# jit, grad, vmap ------------------------------------------------------------------------------------------------------


@each_backend
def test_jit_of_grad_and_grad_of_jit(backend):
  q, k, v = draw()
  f = functools.partial(summed, backend, is_causal=True)
  plain = jax.grad(f, (0, 1, 2))(q, k, v)
  close(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v), plain)
  close(jax.grad(jax.jit(f), (0, 1, 2))(q, k, v), plain)


def _rng():
  return np.random.default_rng(5)


# Every argument that may be mapped over, by itself: M of them.
MAPPED = {
    "query": lambda: {"query": draw(1, (M,))[0]},
    "key": lambda: {"key": draw(1, (M,))[1]},
    "value": lambda: {"value": draw(1, (M,))[2]},
    "bias": lambda: {"bias": _rng().normal(size=(M, N, 1, S)).astype("f")},
    "mask": lambda: {"mask": _rng().random((M, B, 1, T, S)) < 0.5},
    "query_seq_lengths": lambda: {"query_seq_lengths": np.array([[3, 70], [0, 50], [64, 65]])},
    "key_value_seq_lengths": lambda: {"key_value_seq_lengths": np.array([[3, 90], [0, 50], [80, 81]])},
    "query_positions": lambda: {"query_positions": _rng().integers(0, 90, (M, T)), "is_causal": True},
    "key_value_positions": lambda: {"key_value_positions": _rng().integers(0, 70, (M, B, S)), "is_causal": True},
    "query_segment_ids": lambda: {"query_segment_ids": _rng().integers(0, 3, (M, B, T)), "key_value_segment_ids": np.arange(S) // 40},
    "key_value_segment_ids": lambda: {"key_value_segment_ids": _rng().integers(0, 3, (M, S)), "query_segment_ids": np.arange(T) // 30},
    "alibi_slopes": lambda: {"alibi_slopes": _rng().random((M, N)).astype("f")},
    "scale": lambda: {"scale": np.array([0.1, 0.5, 1.0], "f")},
    "logits_soft_cap": lambda: {"logits_soft_cap": np.array([0.5, 2.0, 9.0], "f")}}


def _mapped(name):
  q, k, v = draw()
  given = MAPPED[name]()
  mapped = jnp.asarray(given.pop(name))
  return {"query": q, "key": k, "value": v, **given}, mapped


@pytest.mark.parametrize("name", MAPPED)
@each_backend
def test_vmap_over_each_argument_and_its_gradients(backend, name):
  rest, mapped = _mapped(name)
  rest.pop(name, None)
  moves = [n for n in ("query", "key", "value") if n in rest]

  def value_and_grads(x):
    f = lambda arrays, x: summed(backend, **{**rest, **arrays, name: x})
    arrays = {n: rest[n] for n in moves}
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.value_and_grad(f, (0, 1))(arrays, x)
    return jax.value_and_grad(f)(arrays, x)

  if backend != "xla":  # the kernels' own gradients have their tests; here the batching of a call matters
    value_and_grads = lambda x: summed(backend, **{**rest, name: x})
  one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *[value_and_grads(x) for x in mapped])
  close(jax.vmap(value_and_grads)(mapped), one_by_one)  # vmap of grad


@pytest.mark.parametrize("name", ["query", "bias", "mask", "scale"])
def test_grad_of_vmap(name):
  rest, mapped = _mapped(name)
  rest.pop(name, None)
  key = rest.pop("key")
  f = lambda x, key: summed("xla", **rest, key=key, **{name: x})
  mapped_then_summed = lambda x, key: jax.vmap(f, (0, None))(x, key).sum()
  one_by_one = lambda x, key: sum(f(y, key) for y in x)
  numbers = (0, 1) if jnp.issubdtype(mapped.dtype, jnp.floating) else 1
  close(jax.grad(mapped_then_summed, numbers)(mapped, key), jax.grad(one_by_one, numbers)(mapped, key))


def test_vmap_with_axes_elsewhere_and_inside_another():
  q, k, v = draw(2, (M,))
  f = lambda q, k, v: attention("xla", q, k, v, is_causal=True)[0]
  want = jnp.stack([f(*x) for x in zip(q, k, v)])
  close(jax.vmap(f, (3, 1, 0), 2)(jnp.moveaxis(q, 0, 3), jnp.moveaxis(k, 0, 1), v), jnp.moveaxis(want, 0, 2))
  close(jax.vmap(jax.vmap(f))(*(x.reshape(1, *x.shape) for x in (q, k, v)))[0], want)


def test_vmap_over_a_mask_object():
  q, k, v = draw()
  n = np.array([[3, 9], [70, 0], [90, 89]])
  f = lambda n: attention("xla", q, k, v, mask=masks.Lengths(None, n) | masks.Causal())[0]
  close(jax.vmap(f)(jnp.asarray(n)), jnp.stack([f(x) for x in n]))


# scan, checkpoint, forward mode -----------------------------------------------------------------------------------------


@each_backend
def test_grad_of_scan(backend):
  q, k, v = draw()
  layer = lambda x, w: (x + attention(backend, x * w, k, v[..., :1].repeat(H, -1), is_causal=True)[0], None)
  weights = jnp.asarray([0.5, 1.0, 2.0])
  scanned = lambda w: jax.lax.scan(layer, q, w)[0].sum()
  unrolled = lambda w: functools.reduce(lambda x, y: layer(x, y)[0], w, q).sum()
  close(jax.grad(scanned)(weights), jax.grad(unrolled)(weights), 1e-4)


def _count_forward(f, *args):
  """How often the compiled gradient of `f` runs the forward pass, by its jaxpr."""
  return str(jax.make_jaxpr(jax.grad(f))(*args)).count("name=forward")


def test_checkpoint_and_its_policies():
  q, k, v = draw()
  f = lambda q: summed("xla", jnp.sin(q), k, v)
  plain = jax.grad(f)(q)
  save = jax.checkpoint_policies.save_only_these_names("jflash_out", "jflash_lse")
  close(jax.grad(jax.checkpoint(f))(q), plain)
  close(jax.grad(jax.checkpoint(f, policy=save))(q), plain)
  counts = [_count_forward(g, q) for g in (f, jax.checkpoint(f, policy=save), jax.checkpoint(f))]
  assert counts[1] == counts[0] >= 1, "with the policy the forward pass runs once"
  assert counts[2] > counts[0], "without a policy the forward pass runs again"
  saved = [name for name in _saved(jax.checkpoint(f, policy=save), q) if "jflash_" in name]
  assert any("jflash_out" in name for name in saved) and any("jflash_lse" in name for name in saved)


def _saved(f, *args):
  import contextlib
  import io
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    jax.ad_checkpoint.print_saved_residuals(f, *args)
  return text.getvalue().splitlines()


def test_residuals_hold_nothing_of_size_t_times_s():
  q, k, v = draw()
  bias = jnp.ones((1, N, 1, S))
  f = lambda q, k, v, bias: attention("xla", q, k, v, bias, is_causal=True, logits_soft_cap=3.0)
  _, pull = jax.vjp(f, q, k, v, bias)
  sizes = [np.size(x) for x in jax.tree.leaves(pull)]
  assert sizes and max(sizes) < T * S, sizes


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True, "logits_soft_cap": 2.0}], ids=["plain", "causal and capped"])
@each_backend
def test_jvp_linearize_and_linear_transpose_agree(backend, kwargs):
  primals, tangents, cotangents = draw(0), draw(1), (draw(2)[0][..., :E], jnp.ones((B, T, N)))
  f = functools.partial(attention, backend, **kwargs)
  out, moved = jax.jvp(f, primals, tangents)
  close(out, f(*primals))
  step = 1e-2
  ahead, back = (f(*(x + sign * step * d for x, d in zip(primals, tangents))) for sign in (1, -1))
  close(moved, jax.tree.map(lambda x, y: (x - y) / (2 * step), ahead, back), 5e-3)
  _, linear = jax.linearize(f, *primals)
  close(linear(*tangents), moved)
  grads = jax.linear_transpose(linear, *tangents)(cotangents)
  close(grads, jax.vjp(f, *primals)[1](cotangents))
  inner = lambda a, b: sum(float(jnp.vdot(x, y)) for x, y in zip(a, b))
  np.testing.assert_allclose(inner(cotangents, moved), inner(grads, tangents), rtol=1e-4, atol=1e-3)


def test_jvp_along_every_score_term():
  q, k, v = draw()
  terms = {"bias": jnp.ones((N, 1, S)), "scale": jnp.float32(0.3), "logits_soft_cap": jnp.float32(2.0), "alibi_slopes": jnp.ones(N) / 8}
  f = lambda terms: attention("xla", q, k, v, is_causal=True, **terms)
  check_grads(f, (terms,), order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


# The same again ---------------------------------------------------------------------------------------------------------


@each_backend
def test_reruns_give_the_same_bits(backend):
  q, k, v = draw()
  f = jax.jit(jax.value_and_grad(functools.partial(summed, backend, is_causal=True, bias=jnp.ones((1, 1, 1, S))), (0, 1, 2)))
  first = f(q, k, v)
  for _ in range(3):
    jax.tree.map(np.testing.assert_array_equal, f(q, k, v), first)


def test_a_second_call_compiles_nothing():
  q, k, v = draw()
  f = lambda q, mask: summed("xla", q, k, v, mask=mask, local_window_size=9)
  mask = masks.Lengths(None, np.array([60, 30]))
  jax.grad(f)(q, mask)
  other = q + 1
  with jax.log_compiles(), _no_compilation():
    jax.grad(f)(other, masks.Lengths(None, np.array([60, 30])))


class _no_compilation:
  """Fails if anything is compiled inside."""

  def __enter__(self):
    import logging
    self.records = []
    self.handler = logging.Handler()
    self.handler.emit = lambda record: self.records.append(record.getMessage())
    logging.getLogger("jax").addHandler(self.handler)

  def __exit__(self, *_):
    import logging
    logging.getLogger("jax").removeHandler(self.handler)
    # Operations around the kernels are run one by one here, and JAX keeps those compiled too.
    assert not [r for r in self.records if "Compiling" in r], self.records


def test_jit_traces_once():
  q, k, v = draw()
  traced = []

  @jax.jit
  def f(q, mask):
    traced.append(1)
    return summed("xla", q, k, v, mask=mask)

  for n in (60, 30, 1):
    f(q, masks.Causal() & masks.Lengths(None, np.array([n, n])))
  assert len(traced) == 1


# Memory -----------------------------------------------------------------------------------------------------------------


def _temporary_mebibytes(length, causal):
  x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
  f = lambda q, k, v: jflash.attention(q, k, v, is_causal=causal, implementation="xla").sum()
  return jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear(causal):
  """Forward and backward of 4 heads of width 64, float32: at most 100 MiB at T = 16384, twice that of 8192."""
  half, whole = (_temporary_mebibytes(n, causal) for n in (8192, 16384))
  assert whole <= 100 and whole <= 2.05 * half, (half, whole)
