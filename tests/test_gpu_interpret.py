"""The kernels for Hopper in the Mosaic GPU interpreter, with races found and memory that is NaN until it is written."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from tests import gpu_topology, oracle

gpu_topology.require_jax()
from tests import gpu_cases  # noqa: E402
from tests.gpu_interpret import attention, by_kernels, interpret  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]


def split(built, traced):
  """(arguments of the compiled function, a function from them to `attention`'s keywords)."""
  moving = oracle.arrays_of(built)
  others = {name: x for name, x in built.kwargs.items() if name not in moving and name != "score_operands"}
  leaves, structure = jax.tree.flatten(others)
  arrays = {n: x for n, x in enumerate(leaves) if isinstance(x, np.ndarray) and traced}

  def keywords(moving, arrays):
    return oracle.gather_operands(moving) | structure.unflatten([arrays.get(n, x) for n, x in enumerate(leaves)])

  return (moving, arrays), keywords


def answer(walk, built, cotangents):
  """The kernels' `oracle.Answer`."""
  args, keywords = split(built, walk.traced)

  def run(moving, arrays, cotangents):
    result, pull = jax.vjp(lambda x: attention(**keywords(x, arrays), tiles=walk.tiles), moving)
    return *result, *pull(cotangents)

  with jax.default_matmul_precision(walk.precision) if walk.precision else contextlib.nullcontext():
    return oracle.Answer(*jax.tree.map(np.asarray, interpret(run, *args, cotangents)))


@pytest.mark.parametrize("walk", [pytest.param(walk, id=walk.name) for walk in gpu_cases.ALL])
def test_case(walk):
  built = walk.case.build()
  cotangents = oracle.draw_cotangents(built)
  ours = answer(walk, built, cotangents)
  for x in (ours.out, *ours.grads.values()):
    assert np.isfinite(x.astype(np.float64)).all()
  oracle.check(ours, built, cotangents)


# Accuracy and reruns ------------------------------------------------------------------------------------------------------


def allowance(built, cotangents):
  """How far two bfloat16 numbers in place of each float32 may lead, element by element.

  Rounding to bfloat16 errs by at most 2^-9 of a number, and the second piece by 2^-18. The products of pieces that are computed leave
  out at most 3 · 2^-18 of |a b|, below u = 2^-16. With |scores| off by d = u · Σ|q k|, P is off by 2 d P, and so on down to dQ.
  """
  u, scale = 2.0 ** -16, built.q.shape[3] ** -0.5
  q, k, v, dout = (abs(np.asarray(x, np.float64)).transpose(0, 2, 1, 3) for x in (*built[:3], cotangents[0]))
  k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
  signed = lambda x: np.asarray(x, np.float64).transpose(0, 2, 1, 3)
  s = np.where(built.keep, signed(built.q) @ np.repeat(signed(built.k), q.shape[1] // built.k.shape[2], 1).swapaxes(2, 3) * scale, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  d = u * scale * (q @ k.swapaxes(2, 3)).max(-1, keepdims=True)
  out = p @ v
  dp, delta = dout @ v.swapaxes(2, 3), (dout * out).sum(-1, keepdims=True)
  ds = p * (dp + delta + abs(np.asarray(cotangents[1], np.float64)).transpose(0, 2, 1)[..., None])
  of_ds = (4 * d + 2 * u) * ds  # that of P, of dP and of D = Σ dO · out
  of_p = (2 * d + u) * p
  by_head = lambda x: x.reshape(x.shape[0], built.k.shape[2], -1, *x.shape[2:]).sum(2)
  found = {"out": (2 * d + u) * out, "query": scale * (of_ds + u * ds) @ k,
           "key": by_head(scale * (of_ds + u * ds).swapaxes(2, 3) @ q), "value": by_head(of_p.swapaxes(2, 3) @ dout)}
  return {name: x.transpose(0, 2, 1, 3) for name, x in found.items()} | {"lse": d[..., 0].transpose(0, 2, 1)}


def test_float32_in_two_pieces():
  """Not a float32's accuracy, but far from that of a bfloat16, which errs by up to 2^-8 of a product."""
  walk = gpu_cases.walk("causal_square", gpu_cases.SQUARE, "float32")
  built = walk.case.build()
  cotangents = oracle.draw_cotangents(built)
  ours, (truth, _) = answer(walk, built, cotangents), oracle.exact(built, cotangents)
  for name, allowed in allowance(built, cotangents).items():
    got, want = (getattr(x, name) if name in ("out", "lse") else x.grads[name] for x in (ours, truth))
    assert got.dtype == np.float32
    assert (abs(got - want) <= allowed + 1e-6).all(), f"{name}: {(abs(got - want) / allowed).max()} of what is allowed"


def test_reruns_give_the_same_bits():
  walk = gpu_cases.walk("bias_1NTS", tiles=(128, 64))
  built = walk.case.build()
  cotangents = oracle.draw_cotangents(built)
  first, second = (answer(walk, built, cotangents) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)


# Transformations --------------------------------------------------------------------------------------------------------------

M, T, S, N, K, H = 2, 40, 70, 2, 1, 8


def draw(lead=()):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) for shape in ((1, T, N, H), (1, S, K, H), (1, S, K, H)))


def summed(attend, *args, **kwargs):
  """A scalar that depends on out and on lse."""
  out, lse = attend(*args, is_causal=True, **kwargs)
  return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def vmap_of_grad(attend):
  """The key is shared; each has its own gradient for it."""
  f = jax.value_and_grad(lambda *x: summed(attend, *x), (0, 1, 2))
  q, k, v = draw((M,))
  return jax.vmap(f, (0, None, 0))(q, k[0], v)


def grad_of_vmap(attend):
  """With respect to what the calls share: key, and a bias that broadcasts along queries."""
  q, k, v = draw((M,))
  f = lambda k, bias: jax.vmap(lambda q, v: summed(attend, q, k, v, bias=bias))(q, v).sum()
  return jax.grad(f, (0, 1))(k[0], jnp.ones((1, N, 1, S)))


def nested_vmap(attend):
  """Over queries outside; inside over a bias alone."""
  q, k, v = draw((M,))
  biases = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, N, 1, S)), jnp.float32)
  f = jax.grad(lambda q, bias: summed(attend, q, k[0], v[0], bias=bias), (0, 1))
  return jax.vmap(jax.vmap(f, (None, 0)), (0, None))(q, biases)


def jvp(attend):
  return jax.jvp(lambda *x: attend(*x, is_causal=True), draw(), tuple(jnp.roll(x, 1, 1) for x in draw()))


def grad_of_grad(attend):
  q, k, v = draw()
  f = jax.grad(lambda q: summed(attend, q, k, v))
  return jax.grad(lambda q: jnp.vdot(f(q), jnp.cos(q)))(q)


def grad_of_scan(attend):
  q, k, v = draw()
  layer = lambda x, w: (x + attend(x * w, k, v, is_causal=True)[0], None)
  return jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, q, w)[0] ** 2))(jnp.asarray([0.5, 1.0]))


@pytest.mark.parametrize("transform", [vmap_of_grad, grad_of_vmap, nested_vmap, jvp, grad_of_grad, grad_of_scan])
def test_transformations(transform):
  """As plain JAX has them; the tolerance is that of two bfloat16 pieces."""
  ours = interpret(lambda: transform(attention))
  plain = jax.jit(lambda: transform(functools.partial(jflash.attention, implementation="xla", return_residual=True)))()
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(y))))


def test_packed_sequences():
  """Three sequences, one of them empty, each with slopes of its own, and gradients."""
  rng, ends = np.random.default_rng(0), np.array([0, 30, 30, 130])
  q, k, v = (jnp.asarray(rng.normal(size=(130, heads, H)), jnp.float32) for heads in (N, K, K))

  def gradients(function, *args):
    def loss(q, k, v, slopes):
      out, lse = function(q, k, v, ends, ends, is_causal=True, alibi_slopes=slopes)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))
    return jax.value_and_grad(loss, (0, 1, 2, 3))(*args)

  args = q, k, v, jnp.asarray(rng.random((3, N)), jnp.float32)
  ours = interpret(functools.partial(gradients, functools.partial(by_kernels, jflash.attention_varlen)), *args)
  plain = gradients(functools.partial(jflash.attention_varlen, implementation="xla", return_residual=True), *args)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("tiles", [(64, 64), (128, 64), None])
def test_what_a_function_closes_over_is_there_for_every_kernel(tiles):
  """The backward pass, in other tiles than the forward pass, is traced when what is closed over and differentiated is gone."""
  q = jnp.ones((1, 200, 4, 64), jnp.bfloat16)

  def loss(slopes):
    out, _ = by_kernels(jflash.attention, q, q, q, tiles=tiles, score_mod=lambda s, b, h, i, j: s - slopes[h] * jnp.abs(i - j))
    return out.astype(jnp.float32).sum()

  with jflash.interpret():
    assert jax.eval_shape(jax.grad(loss), jnp.ones(4)).shape == (4,)
