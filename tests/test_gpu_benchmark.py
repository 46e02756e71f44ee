"""`benchmarks.gpu` without a GPU: what is counted, compiled, compared and checked, with plain JAX in place of kernels."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from benchmarks import gpu_checks, gpu_contest, gpu_shapes, gpu_speed, gpu_worker
from benchmarks.gpu_contest import Broken, Contest, Effort, Entrant
from benchmarks.gpu_programs import INPUTS, Draw, Exact, Program, rotate
from benchmarks.timing import Times
from jflash import _plan
from tests import gpu_topology

SMALL = gpu_speed.Setup(Effort(3, 0.01), "xla", ("xla",), (64,), (128,), tokens=256, hidden=128, xla_lengths=(0, 128))
SHAPE = SMALL.shape(64, 128)


# Shapes and operations ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width, length", [(64, 512), (128, 4096), (256, 16_384)])
def test_shapes_and_operations_are_those_of_papers(width, length):
  shape = gpu_shapes.paper(width, length)
  assert shape.batch * shape.queries == 16_384 and shape.heads * shape.width == 2048 and shape.kv_heads == shape.heads
  full = 4 * 16_384 * length * 2048
  flops = lambda mask, direction: shape.flops(gpu_shapes.masking(mask, 1, length).pairs, direction)
  assert flops("full", "forward") == full and flops("causal", "forward") == full / 2
  assert flops("full", "backward") == 2.5 * full and flops("causal", "backward") == 1.25 * full


def test_bytes_of_one_query_are_those_of_keys_and_values():
  shape = gpu_shapes.Shape(2, 1, 100, 8, 2, 64)
  assert shape.bytes == sum(2 * x.size for x in shape.arguments.values()) + 2 * shape.arguments["query"].size


@pytest.mark.parametrize("name", ["full", "causal", "window 7", "window 500", "documents", "array"])
def test_ours_and_theirs_are_masked_alike_and_pairs_are_counted(name):
  batch, length = 2, 40
  given = gpu_shapes.masking(name, batch, length)
  q, k, v = (jax.random.normal(jax.random.key(n), (batch, length, 2, 8)) for n in range(3))
  outs = []
  for ours, function in ((True, jflash.attention), (False, jax.nn.dot_product_attention)):
    static, arrays = given.arguments(ours)
    outs.append(function(q, k, v, **static, **arrays, implementation="xla"))
  np.testing.assert_allclose(*outs, atol=1e-5)
  keep = gpu_speed.keep_of(name, given, length)
  seen = np.ones((length, length)) if keep is None else keep[0, 0]
  out = jax.nn.dot_product_attention(q[-1:], k[-1:], v[-1:], mask=jnp.asarray(seen[None, None], bool), implementation="xla")
  np.testing.assert_allclose(out[0], outs[0][-1], atol=1e-5)
  if name.startswith("window"):
    assert given.pairs == seen.sum()
  elif name != "documents":  # whose halves are counted for each document
    assert abs(given.pairs - seen.sum()) <= length / 2


def test_documents_are_counted_one_by_one():
  length = 400
  given = gpu_shapes.masking("documents", 1, length)
  ids = given.arrays["query_segment_ids"][0]
  assert given.pairs == sum(n * n / 2 for n in np.unique(ids, return_counts=True)[1])
  several = gpu_shapes.documents(3, 5000, mean=100)
  assert several.shape == (3, 5000) and all(20 < len(np.unique(row)) < 100 for row in several)


# Programs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrt", [INPUTS, ("query",), ("key", "value")])
def test_the_backward_pass_alone_gives_the_gradients(wrt):
  attend = functools.partial(jflash.attention, is_causal=True, implementation="xla")
  drawn = Draw(SHAPE.arguments).sets()[0]
  arrays = {name: drawn[name] for name in INPUTS}
  grads = Program(attend, SHAPE.arguments, "backward", wrt).call(arrays, drawn["dout"])()
  assert set(grads) == set(wrt)
  want = dict(zip(INPUTS, jax.vjp(lambda *qkv: attend(*qkv), *arrays.values())[1](drawn["dout"])))
  for name, got in grads.items():
    np.testing.assert_allclose(got.astype(jnp.float32), want[name].astype(jnp.float32), atol=1e-2)


def test_inputs_are_random_and_take_turns():
  draw = Draw(SHAPE.arguments)
  sets = draw.sets()
  assert len(sets) == draw.count == 16 and set(sets[0]) == {*INPUTS, "dout"}  # as many as small inputs may have
  assert Draw({"query": jax.ShapeDtypeStruct((1 << 25,), jnp.float32)}).count == 2
  assert not np.array_equal(sets[0]["query"], sets[1]["query"]) and not np.array_equal(sets[0]["query"], sets[0]["key"])
  assert abs(float(jnp.std(sets[0]["key"].astype(jnp.float32))) - 1) < 0.05
  call = rotate([lambda: 1, lambda: 2, lambda: 3])
  assert [call() for _ in range(5)] == [1, 2, 3, 1, 2]


def test_errors_are_those_of_the_last_head():
  arguments = SHAPE.arguments | {"bias": jax.ShapeDtypeStruct((1, SHAPE.heads, 128, 128), jnp.bfloat16)}
  drawn, exact = Draw(arguments).sets()[0], Exact(arguments)
  want = exact(drawn)
  attend = lambda arrays: jflash.attention(**arrays, implementation="xla")
  out, pull = jax.vjp(attend, {name: x for name, x in drawn.items() if name != "dout"})
  grads = pull(drawn["dout"])[0]
  assert exact.error(out, want) < 1e-2 and exact.error(grads, want) < 1e-2 and exact.shared == {"bias"}
  assert exact.error(out.at[-1, 5, -1, 3].set(jnp.nan), want) == math.inf
  assert exact.error(out.at[-1, :, -1].multiply(1.5), want) == pytest.approx(0.5, abs=0.05)
  assert exact.error(grads | {"value": -grads["value"]}, want) == pytest.approx(2, abs=0.05)


# Contests -------------------------------------------------------------------------------------------------------------
def _contest(*entrants, **more):
  return Contest("speed", {"d": "64", "mask": "full", "N": "128"}, SHAPE.arguments, entrants, more.pop("effort", SMALL.effort),
                 **more)


def _entrant(name, function=None, direction="forward"):
  function = function or functools.partial(jflash.attention, implementation="xla")
  return Entrant(name, direction, lambda: Program(function, SHAPE.arguments, direction), {"flops": 1e9, "bytes": 2e9})


def _refuses(**arrays):
  raise NotImplementedError("not here\nat all")


def test_who_refuses_or_hung_is_listed_and_the_others_are_timed():
  begun = []
  contest = _contest(_entrant("jflash"), _entrant("jax.nn xla"), _entrant("refuses", _refuses), _entrant("hung"),
                     ratios=functools.partial(gpu_speed.to_peer, ("xla",)))
  rows = {row.name: row for row in contest.prepare(begun.append, ["hung, forward"])()}
  assert rows["refuses"].note == "NotImplementedError: not here" and "hung" in rows["hung"].note
  assert not rows["hung"].times and not rows["refuses"].times
  ours = rows["jflash"]
  assert ours.times and len(ours.times.rounds) == 3 and ours.measured["× cuDNN"] == ours.times.speedup(rows["jax.nn xla"].times)
  assert ours.measured["TFLOP/s"] == pytest.approx(1e-3 / ours.times.median)
  assert ours.measured["GB/s"] == pytest.approx(2 / ours.times.median)
  assert "jflash, forward" in begun and "hung, forward" not in begun and begun[-1] == "timing of jflash, jax.nn xla"


def test_what_is_wrong_fails_and_what_needs_too_much_memory_is_not_run():
  wrong = lambda query, key, value: jflash.attention(query, key, 1.1 * value, implementation="xla")
  contest = _contest(_entrant("jflash"), _entrant("wrong", wrong), exact=lambda: Exact(SHAPE.arguments))
  rows = {row.name: row for row in contest.prepare(lambda label: None)()}
  assert not rows["jflash"].failed and rows["jflash"].measured["max error"] < 1e-2
  assert rows["wrong"].failed and rows["wrong"].measured["max error"] == pytest.approx(0.1, abs=0.02)
  row, = _contest(_entrant("jflash"), effort=Effort(memory=1.0)).prepare(lambda label: None)()
  assert "the limit is" in row.note and row.times is None


def test_a_device_that_computes_nothing_any_more_is_noticed(monkeypatch):
  error = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
  gpu_contest.check_device("a kernel", error)
  monkeypatch.setattr(jax, "block_until_ready", lambda x: (_ for _ in ()).throw(RuntimeError("dead")))
  with pytest.raises(Broken) as broken:
    gpu_contest.check_device("a kernel", error)
  assert broken.value.args == ("a kernel", "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS")


def test_times_of_a_device_that_waits_for_its_host_are_marked():
  assert Times((1.0,) * 3, queued=(0.97,) * 3).host_bound
  assert not Times((1.0,) * 3, queued=(0.7,) * 3).host_bound and not Times((1.0,) * 3).host_bound


def test_every_case_can_be_made_and_small_ones_run():
  for part in ("speed", "masks"):
    cases = gpu_worker.PARTS[part](SMALL)
    assert list(cases) == list(gpu_worker.PARTS[part](SMALL))
    for make in cases.values():
      assert {entrant.direction for entrant in make().entrants} <= set(gpu_shapes.PASSES)
  assert len(gpu_speed.speed(gpu_speed.Setup())) == 3 * 6 * 2
  row = gpu_speed.masks(SMALL)["d 64, documents, N 128"]().prepare(lambda label: None)()[0]
  assert row.name == "jflash" and row.measured["of causal"] > 0 and row.measured["max error"] < 1e-2
  row, = (row for row in gpu_speed.masks(SMALL)["one query"]().prepare(lambda label: None)() if row.name == "jflash")
  assert row.measured["GB/s"] > 0 and "TFLOP/s" not in row.measured


@pytest.mark.parametrize("name, share", [("full", 1), ("array", 3 / 4), ("causal", 3 / 4)])
def test_scores_are_counted_by_the_tiles_that_are_not_skipped(name, share):
  shape, given = gpu_shapes.Shape(2, 512, 512, 2, 2, 64), gpu_shapes.masking(name, 2, 512)
  with _plan.force_tiles(256, 256):
    assert gpu_speed.computed(SMALL, shape, given, "forward") == share * 4 * 512 * 512


# Checks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [
  "d 64, causal", "window to both sides, d 128", "segments", "lengths, empty rows, NaN hidden, d 64", "float32, d 64, causal",
  "mask array, empty rows, NaN hidden, d 64", "bias of head, causal", "sinks", "ALiBi", "table of scores", "dropout"])
def test_plain_jax_passes_the_checks(name):
  row, = gpu_checks.checks(SMALL)[name]().prepare(lambda label: None)()
  assert not row.failed and not row.note and 0 < row.measured["error"] < row.measured["allowed"], row


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["d 64, causal", "lengths, empty rows, NaN hidden, d 64"])
def test_the_kernels_pass_the_checks_in_the_interpreter(name):
  gpu_topology.require_jax()
  setup = dataclasses.replace(SMALL, implementation="mosaic_gpu", interpret=True)
  with jflash.interpret():
    row, = gpu_checks.checks(setup)[name]().prepare(lambda label: None)()
  assert not row.failed and row.measured["error"] < 5e-3, row


def _check():
  return gpu_checks.checks(SMALL)["bias of head, causal"]()


def test_a_wrong_gradient_fails_a_check(monkeypatch):
  right = jflash.attention

  def wrong(query, key, value, bias, **kwargs):
    return right(query, key, value, bias + 0.1 * jax.lax.stop_gradient(bias) - 0.1 * bias, **kwargs)

  monkeypatch.setattr(jflash, "attention", wrong)
  row, = _check().prepare(lambda label: None)()
  assert row.failed and row.note.startswith("dbias is off by 1.0e-01") and row.measured["of"] == "dbias"


@pytest.mark.parametrize("error, failed", [(NotImplementedError, False), (ValueError, True)])
def test_a_refusal_is_no_failure_and_an_error_is(monkeypatch, error, failed):
  def refuse(*args, **kwargs):
    raise error("why")

  monkeypatch.setattr(jflash, "attention", refuse)
  row, = _check().prepare(lambda label: None)()
  assert row.failed == failed and row.note == f"{error.__name__}: why"


def test_runs_that_differ_are_told_and_so_is_one_that_hung():
  check = _check()
  given, _, _ = check.given(0)
  answer = (given.moving["query"], np.ones(3, np.float32)), dict(given.moving)
  assert not check.judge([answer, answer], answer, 0).failed
  other = answer[0], answer[1] | {"key": np.nextafter(answer[1]["key"].astype(np.float32), np.float32(9)).astype(np.float32)}
  row = check.judge([answer, other], answer, 0)
  assert row.failed and row.note == "dkey differs between runs"
  row, = check.prepare(lambda label: None, [check.name])()
  assert row.failed and "hung" in row.note


@pytest.mark.parametrize("found, norm, largest", [
  ([3.0, 4.0], 0, 0), ([3.0, 4.5], 0.1, 0.125), ([3.0, math.nan], math.inf, math.inf), ([math.inf, 4.0], math.inf, math.inf)])
def test_errors_are_norms_and_nothing_hides_what_is_not_finite(found, norm, largest):
  assert gpu_checks._errors(found, [3.0, 4.0]) == pytest.approx((norm, largest))
  assert gpu_checks._errors([-math.inf, 1.0], [-math.inf, 1.0]) == (0, 0)
  assert gpu_checks._errors([0.0, 1.0], [-math.inf, 1.0])[0] == math.inf
