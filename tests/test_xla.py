"""The plain-JAX backend's own rules: which code it is made of, what it needs, and products that a compiler once refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _api, _plan, masks


def settled(length, tiles=None, **terms):
  """The plan of self-attention with 4 heads of width 8, once its visits are known."""
  x = jnp.zeros((1, length, 4, 8))
  problem = _api.make_problem(x, x, x, **terms)
  plan = _plan.plan_xla(problem)
  plan = dataclasses.replace(plan, tiles=tiles) if tiles else plan
  return _plan.settle(plan, _plan.make_schedule(problem, plan))


@pytest.mark.parametrize("terms, tiles, one", [
    ({}, (64, 64), True), ({"is_causal": True}, (64, 64), True), ({}, (64, 32), False), ({}, (32, 64), False),
    ({"mask": masks.BlockSparse(np.array([1, 0, 1, 1], bool)[:, None, None], (64, 64))}, (64, 64), False)])  # a head sees nothing
def test_one_tile_of_one_kind_needs_no_loop(terms, tiles, one):
  assert settled(64, tiles, **terms).one_visit == one


def test_a_walk_that_needs_no_loop_has_none():
  x = jnp.zeros((1, 64, 4, 8))
  lower = lambda **terms: jax.jit(lambda x: jflash.attention(x, x, x, implementation="xla", **terms)).lower(x).as_text()
  assert "stablehlo.while" not in lower(is_causal=True)
  assert "stablehlo.while" in lower(is_causal=True, tiles=(32, 32))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [300, 513, 700, 1000, 1100, 1500, 5000])
def test_tiles_divide_a_length_evenly(length, is_causal):
  """Less than 16 rows or columns a tile are computed for nothing, and a tile stays a few megabytes."""
  sides = settled(length, is_causal=is_causal).tiles
  assert np.prod(sides) <= (768 if is_causal else 1280)**2
  for side in sides:
    tiles = -(-length // side)
    assert tiles * side - length < 16 * tiles


@pytest.mark.parametrize("keys", [8192, 8200])
def test_keys_that_one_query_reads_are_not_copied(keys):
  """Neither to whole tiles nor, by XLA's CPU compiler of JAX 0.10, to float32: that took six times as long as all the rest."""
  q, k = (jax.ShapeDtypeStruct((8, n, 8, 128), jnp.bfloat16) for n in (1, keys))
  analysis = jax.jit(jflash.attention).lower(q, k, k).compile().memory_analysis()
  assert analysis is not None
  assert analysis.temp_size_in_bytes < k.size * k.dtype.itemsize / 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_twentieth_of_the_memory_that_scores_take(backward):
  """At T = 4096, 8 heads of width 64, causal, as the compiled programs state it."""
  x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)

  def needs(attend):
    forward = lambda q, k, v: attend(q, k, v, is_causal=True)
    both = lambda q, k, v, dout: jax.vjp(forward, q, k, v)[1](dout)
    analysis = jax.jit(both if backward else forward).lower(*[x] * (4 if backward else 3)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes

  assert 20 * needs(jflash.attention) < needs(jax.nn.dot_product_attention)


@pytest.mark.parametrize("sizes", [(48, 48), (48, 160), (160, 48), (160, 160), (1, 160)], ids=str)
def test_bfloat16_products_run_with_a_left_side_that_was_turned(sizes):
  """Where a loop runs once it is unrolled, and compilers fold what was turned into a product that is not implemented."""
  queries, keys = sizes
  draw = np.random.default_rng(0).standard_normal
  q, k, v, dout = (jnp.asarray(draw((2, n, heads, 16)), jnp.float32) for n, heads in ((queries, 4), (keys, 2), (keys, 2), (queries, 4)))

  @jax.jit
  def run(q, k, v, dout):
    out, pull = jax.vjp(lambda q, k, v: jflash.attention(q, k, v, is_causal=True, tiles=(64, 64)), q, k, v)
    return out, *pull(dout)

  half = run(*(x.astype(jnp.bfloat16) for x in (q, k, v, dout)))
  for found, want in zip(half, run(*(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v, dout)))):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), want, rtol=0.03, atol=0.03 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("queries", [1, 8])
def test_few_queries_read_keys_as_they_lie(queries):
  """No copy of all keys or values with their heads in front is made for one tile of queries."""
  q, k = jnp.zeros((2, queries, 4, 16), jnp.bfloat16), jnp.zeros((2, 4096, 2, 16), jnp.bfloat16)
  text = jax.jit(lambda q, k: jflash.attention(q, k, k, tiles=(queries, 512))).lower(q, k).as_text()
  assert re.search(r"tensor<2x512x2x16xbf16>", text) and "tensor<2x2x4096x16xbf16>" not in text
