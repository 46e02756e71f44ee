"""Tiles of the TPU kernels: the model of what they cost by hand, what is chosen by it, and tiles that the user asks for."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _api, _plan, _tiles_tpu, masks
from jflash._tiles_tpu import Core, Cost
from pallas_kernels.schedule import EMPTY, FULL, PARTIAL
from tests import tpu_topology
from tests.test_tpu_compile import CHIPS

Struct = jax.ShapeDtypeStruct
CORE = Core(peak=8e9, bandwidth=1e9, per_cycle=8)  # a cycle and a byte take a nanosecond
COST = Cost(full=100, partial=150, alone=170, once=10)
KINDS = np.array([[[[PARTIAL, EMPTY, EMPTY, EMPTY], [FULL, PARTIAL, EMPTY, EMPTY],
                    [FULL, FULL, PARTIAL, EMPTY], [FULL, FULL, FULL, FULL], [EMPTY, FULL, EMPTY, FULL]]]], np.int32)


def test_the_forward_model_by_hand():
  rows = 170, 2 * 150, 2 * 100 + 170, 4 * 100, 2 * 100
  assert _tiles_tpu._forward(CORE, COST, KINDS, 0) == pytest.approx(1e-9 * (sum(rows) + 5 * 10))
  assert _tiles_tpu._forward(CORE, COST, KINDS, 1000) == pytest.approx(1e-9 * 12 * 1000)


def test_the_backward_model_by_hand():
  assert _tiles_tpu._backward(CORE, COST, KINDS, 0) == pytest.approx(1e-9 * (9 * 100 + 3 * 150 + 5 * 10))
  assert _tiles_tpu._backward(CORE, COST, KINDS, 1000) == pytest.approx(1e-9 * 12 * 1000)


def test_products_take_the_matrix_units_time():
  core = _tiles_tpu.CORES["v5e"]
  assert core.products(2, 512 * 512, 128) == core.products(2, 512 * 512, 64) == 1024
  assert core.products(5, 512 * 512, 256) == 5120 and core.products(2, 512 * 512, 128, 4) == 6144
  assert COST.at_least(120) == Cost(120, 150, 170, 10)


def test_the_table_is_whole():
  """Every chip, width, dtype and pass has the tiles that always compile, and some that are larger."""
  found = set(_tiles_tpu.TABLE)
  assert found == set(itertools.product(CHIPS, (64, 128, 256), (2, 4), _tiles_tpu.PASSES))
  for costs in _tiles_tpu.TABLE.values():
    assert (512, 512) in costs and len(costs) >= 2
    assert all(min(cost.full, cost.partial, cost.alone) > 0 and cost.once > 0 for cost in costs.values())
  assert _tiles_tpu.costs("v5e", 100, 2, "forward") == _tiles_tpu.TABLE["v5e", 128, 2, "forward"]
  assert _tiles_tpu.costs("v5e", 257, 2, "forward") == {} and _tiles_tpu.LIBTPU


# What is chosen -------------------------------------------------------------------------------------------------------


def explain(chip, *shape, dtype=jnp.bfloat16, **options):
  x = Struct(shape, dtype)
  with jax.default_device(tpu_topology.device(chip)):
    return jflash.explain(x, x, x, implementation="tpu", **options)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("mask", [{}, {"is_causal": True}, {"local_window_size": (1023, 0)}])
@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_the_cheapest_are_chosen(chip, mask, length):
  why = explain(chip, 1, length, 2, 128, **mask)
  chosen = {"forward": why.tiles, "backward": why.backward_tiles}
  for name, tiles in chosen.items():
    for other in _tiles_tpu.TABLE[chip, 128, 2, name]:
      asked = explain(chip, 1, length, 2, 128, **mask, tiles=other)
      assert asked.tiles == other and (other != tiles or asked.estimate[name] == why.estimate[name])
      less = 1 - _tiles_tpu.WORTH if math.prod(other) > math.prod(tiles) else 1.0
      assert asked.estimate[name] >= less * why.estimate[name]


def test_an_estimate_by_hand():
  (tiles, cost), *_ = _tiles_tpu.TABLE["v6e", 128, 2, "forward"].items()
  why = explain("v6e", 2, 4096, 6, 128, tiles=tiles)
  rows, columns = 4096 // tiles[0], 4096 // tiles[1]
  full = max(cost.full, _tiles_tpu.CORES["v6e"].products(2, math.prod(tiles), 128))
  assert why.estimate["forward"] == pytest.approx(12 * rows * (columns * full + cost.once) / _tiles_tpu.CORES["v6e"].clock)
  assert f"{1e6 * why.estimate['forward']:.3g} us forward" in str(why)


def test_narrow_windows_have_narrow_tiles():
  """Of 1024 columns most would be computed for nothing."""
  wide, narrow = (explain("v6e", 1, 32768, 1, 128, local_window_size=(w, 0)) for w in (32767, 255))
  assert math.prod(narrow.tiles) < math.prod(wide.tiles) and math.prod(narrow.backward_tiles) < math.prod(wide.backward_tiles)


def plan(chip, arrays, **options):
  """With arrays by name that are known at run time only."""
  found = []

  def record(q, arrays):
    found.append(_plan.plan_tpu(_api.make_problem(q, q, q, **arrays, **options)))

  with jax.default_device(tpu_topology.device(chip)):
    jax.eval_shape(record, Struct((1, 4096, 2, 128), jnp.bfloat16), arrays)
  return found[0]


IDS = Struct((1, 4096), jnp.int32)


@pytest.mark.parametrize("arrays, options", [
    ({"bias": Struct((1, 1, 4096, 4096), jnp.float32)}, {}), ({}, {"logits_soft_cap": 30.0}), ({"scale": Struct((), jnp.float32)}, {}),
    ({"query_segment_ids": IDS, "key_value_segment_ids": IDS}, {}), ({}, {"mask": masks.BlockSparse(np.eye(16, dtype=bool), (256, 256))}),
    ({"dropout_key": Struct((2,), jnp.uint32)}, {"dropout_rate": 0.1})])
def test_what_no_costs_are_known_of_has_the_rule(arrays, options):
  assert plan("v6e", {}).tiles != (512, 512)
  found = plan("v6e", arrays, **options)
  assert found.tiles == ((256, 256) if "mask" in options else (512, 512)) and found.backward_tiles is None


def test_other_chips_and_no_chip_have_the_rule(monkeypatch):
  monkeypatch.setattr(_tiles_tpu, "_KINDS", {})
  assert explain("v6e", 1, 8192, 2, 128).tiles == (512, 512)
  x = Struct((1, 8192, 2, 128), jnp.bfloat16)
  with jflash.interpret():
    why = jflash.explain(x, x, x, implementation="tpu")
  assert (why.tiles, why.estimate) == ((512, 512), {})


def test_shares_are_those_of_the_forward_tiles():
  why = explain("v6e", 1, 4096, 2, 128, is_causal=True)
  assert why.tiles != why.backward_tiles
  with _plan.force_tiles(*why.tiles):
    alone = explain("v6e", 1, 4096, 2, 128, is_causal=True)
  assert (why.tile_count, why.skipped, why.partial, why.full) == (alone.tile_count, alone.skipped, alone.partial, alone.full)
  assert why.tile_count == 2 * 4096**2 // math.prod(why.tiles)


# Tiles that differ between passes, and tiles that are asked for --------------------------------------------------------


@pytest.mark.parametrize("spans", [0, 1, 2])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": (70, 200)}, {}])
def test_passes_in_tiles_of_their_own(monkeypatch, spans, options):
  q, k, v = (jax.random.normal(jax.random.key(n), (1, size, heads, 32)) for n, (size, heads) in enumerate(((300, 4), (500, 2), (500, 2))))
  run = lambda **how: jax.value_and_grad(lambda *qkv: (jflash.attention(*qkv, **options, **how)**2).sum(), (0, 1, 2))(q, k, v)
  want = run(implementation="xla")
  estimates = {"forward": ((128, 256), 1.0), "backward": ((256, 128), 1.0)}
  monkeypatch.setattr(_plan, "tpu_estimates", lambda problem: estimates)
  with jflash.interpret(), _plan.force_passes(2, spans):
    why = jflash.explain(q, k, v, **options, implementation="tpu")
    found = run(implementation="tpu")
  assert (why.tiles, why.backward_tiles) == ((128, 256), (256, 128)) and "of 256 x 128 backward" in str(why)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, want)


@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_tiles_that_are_asked_for(backend):
  q, k, v = (jax.random.normal(jax.random.key(n), (2, 300, 2, 16)) for n in range(3))
  run = lambda **how: jax.value_and_grad(lambda *qkv: (jflash.attention(*qkv, is_causal=True, **how)**2).sum(), (0, 1, 2))(q, k, v)
  with jflash.interpret():
    assert jflash.explain(q, k, v, tiles=(128, 256), implementation=backend).tiles == (128, 256)
    assert jflash.explain(q, k, v, tiles=(4096, 128), implementation=backend).tiles == ((300 if backend == "xla" else 384), 128)
    found = run(tiles=(128, 256), implementation=backend)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, run())


def test_tiles_of_packed_sequences():
  q = jax.random.normal(jax.random.key(0), (300, 2, 16))
  ends = np.array([0, 100, 300])
  one, other = (jflash.attention_varlen(q, q, q, ends, ends, tiles=tiles) for tiles in (None, (64, 32)))
  np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiles", [3, (1,), (0, 128), (128.0, 128), (True, 128), "big", (128, 128, 128)])
def test_tiles_that_are_none(tiles):
  q = jnp.ones((1, 8, 1, 4))
  for function in (jflash.attention, jflash.explain):
    with pytest.raises(ValueError, match=r"`tiles` is .*; pass \(query rows, key columns\), two integers > 0, or None"):
      function(q, q, q, tiles=tiles)


def test_tiles_that_do_not_suit_a_backend():
  x = Struct((1, 1024, 2, 64), jnp.bfloat16)
  with jax.default_device(tpu_topology.device("v6e")):
    with pytest.raises(NotImplementedError, match=r"its tiles are multiples of 128 and `tiles` is \(100, 128\)"):
      jflash.explain(x, x, x, tiles=(100, 128), implementation="tpu")
    why = jflash.explain(x, x, x, tiles=(100, 128))
  assert why.backend == "xla" and why.tiles == (100, 128) and "multiples of 128" in why.passed_over["tpu"]


# Spans of queries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, length, spans", [
    ({"is_causal": True}, 300, 2), ({"local_window_size": (100, 0)}, 650, 3), ({"ids": True}, 640, 5), ({"dropout_rate": 0.3}, 300, 2)])
def test_gradients_are_summed_from_span_to_span(options, length, spans):
  """dK and dV wait in memory while dQ of the next queries is summed: columns that a span does not see keep what they have."""
  options = dict(options)
  q, k, v = (jax.random.normal(jax.random.key(n), (2, size, heads, 32)) for n, (size, heads) in enumerate(((length, 4), (500, 2), (500, 2))))
  if options.pop("ids", False):
    options |= {"query_segment_ids": jnp.sort(jax.random.randint(jax.random.key(3), (2, length), 0, 4)),
                "key_value_segment_ids": jnp.sort(jax.random.randint(jax.random.key(4), (2, 500), 0, 4))}
  if "dropout_rate" in options:
    options["dropout_key"] = jax.random.key(5)
  bias = jax.random.normal(jax.random.key(6), (1, 4, 1, 500))

  def gradients(backend):
    loss = lambda q, k, v, bias: (jflash.attention(q, k, v, bias, **options, implementation=backend)**2).sum()
    return jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

  with jflash.interpret(), _plan.force_tiles(128, 128), _plan.force_passes(1, spans):
    found = gradients("tpu")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, gradients("xla"))


@pytest.mark.parametrize("length, heads, width, dtype, expected", [
    (4096, (2, 2), 128, "bfloat16", 1), (28_672, (2, 2), 128, "bfloat16", 1), (32_768, (2, 2), 128, "bfloat16", 2),
    (131_072, (2, 2), 128, "bfloat16", 5), (131_072, (2, 2), 64, "bfloat16", 5), (32_768, (8, 1), 128, "bfloat16", 10),
    (32_768, (2, 2), 256, "float32", 4), (32_768, (64, 1), 128, "bfloat16", 0)])
def test_how_many_spans(length, heads, width, dtype, expected):
  """As many as 28 MiB of dQ ask for, of equal length; and none where a tile of all query heads is more than that."""
  made = {}
  q, k = (Struct((1, length, n, width), dtype) for n in heads)
  with _plan.force_tiles(512, 512):
    jax.eval_shape(lambda q, k: made.update(plan=_plan.plan_tpu(_api.make_problem(q, k, k))), q, k)
  assert made["plan"].spans == expected


@pytest.mark.parametrize("batch, length, heads, width, chunk", [
    (16, 65_536, 8, 64, (1, 8)), (16, 65_536, 4, 64, (2, 4)), (2, 131_072, 8, 256, (1, 2)), (2, 131_072, 6, 128, (1, 3)), (64, 4096, 8, 64, (64, 8))])
def test_sums_of_spans_take_half_a_gibibyte_at_most(batch, length, heads, width, chunk):
  """As many batch elements and heads at a time; all of them where there is one span."""
  made = {}
  q = Struct((batch, length, heads, width), "bfloat16")
  with _plan.force_tiles(512, 512):
    jax.eval_shape(lambda q: made.update(plan=_plan.plan_tpu(_api.make_problem(q, q, q, is_causal=True))), q)
  assert made["plan"].chunk == chunk
