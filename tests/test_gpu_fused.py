"""The backward pass in one kernel for Hopper: interpreted, against the oracle, and through the compiler of an H100."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu_reports import problems
from tests import gpu_topology, oracle

gpu_topology.require_jax()
from pallas_kernels import hopper, schedule  # noqa: E402
from tests import gpu_fused_cases  # noqa: E402
from tests.gpu_cases import BATCH, SQUARE, TALL, walk  # noqa: E402
from tests.gpu_fused_cases import in_one  # noqa: E402
from tests.gpu_interpret import attention, interpret  # noqa: E402
from tests.test_gpu_interpret import answer  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

FEW = 64  # bytes of scalars that a kernel may spill, outside of its loops, where scores are made of arrays


# Interpreted ------------------------------------------------------------------------------------------------------------------

WIDE = {"H": 128, "E": 128}
CASES = [  # of the table, and tiles; two warpgroups share out rows of dQ where these are 128, else columns
    (walk("plain", SQUARE, "float16", T=150), (128, 128)), (walk("plain", SQUARE, T=150, **WIDE), (64, 128)),
    (walk("plain", SQUARE, H=100, E=40), (64, 128)), (walk("multi_head", BATCH), (64, 64)),
    (walk("causal_square", SQUARE, T=150, S=150), (128, 128)), (walk("causal_square", SQUARE, **WIDE), (64, 128)),
    (walk("causal_more_queries", TALL), (128, 64)), (walk("window_pair_with_rows_that_see_nothing", TALL), (64, 64)),
    (walk("segments_with_empty_rows", BATCH), (64, 64)), (walk("mask_that_keeps_nothing"), (64, 64)),
    (walk("mask_BNTS", BATCH), (128, 128)), (walk("block_sparse_of_whole_tiles", T=200, S=190), (128, 128)),
    (walk("bias_BNTS", BATCH), (128, 128)), (walk("bias_B11S", BATCH), (128, 128)), (walk("soft_cap"), (64, 64)),
    (walk("score_mod_t5"), (64, 64)), (walk("dropout", BATCH), (64, 64))]


@pytest.mark.parametrize("case, tiles", [pytest.param(*x, id="{}-{}x{}".format(x[0].case.name, *x[1])) for x in CASES])
def test_case(case, tiles):
  case = case._replace(tiles=None)
  built = case.case.build()
  cotangents = oracle.draw_cotangents(built)
  with in_one(tiles):
    ours = answer(case, built, cotangents)
  oracle.check(ours, built, cotangents)


def gradients(q, k, v, **options):
  return jax.grad(lambda *x: attention(*x, tiles=None, **options)[0].astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)


def draw(t, s, *, heads=2, width=64):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(1, n, h, width)), jnp.bfloat16) for n, h in ((t, heads), (s, 1), (s, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_and_hidden_reaches_nothing(bad):
  """What this kernel makes of it is not finite; then both kernels compute everything again."""
  q, k, v = draw(70, 130)
  hidden = jnp.arange(130)[:, None, None] >= 70
  with in_one((64, 64)):
    clean = interpret(lambda *x: gradients(*x, is_causal=True), q, k, v)
    dirty = interpret(lambda *x: gradients(*x, is_causal=True), q, jnp.where(hidden, bad, k), jnp.where(hidden, -bad, v))
  for x, y in zip(dirty, clean):
    assert np.isfinite(np.asarray(x, np.float32)).all()
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=2e-2)


def test_what_it_cannot_share_out_is_refused():
  call = hopper.Call(256, 256, 1, 1, jnp.bfloat16, (64, 128), 2, 1.0, False, False, 1, True, False, 1, False)
  x, statistic = jnp.zeros((1, 256, 1, 64), jnp.bfloat16), jnp.zeros((1, 1, 256))
  visits = schedule.row_visits(np.full((1, 1, 2, 4), schedule.FULL))
  run = lambda call: hopper.fused(call, hopper.Residuals(x, x, x, x, statistic, statistic), (), visits)
  with pytest.raises(AssertionError, match=r"2 warpgroups cannot share out 64 x 64 of dQ .* other tiles than \(64, 128\)"):
    run(call)
  with pytest.raises(AssertionError, match=r"operands come in 2 pieces, and this kernel takes one; use `dq` and `dkv`"):
    run(dataclasses.replace(call, pieces=2))


# Compiled ---------------------------------------------------------------------------------------------------------------------

def fixture(name):
  @pytest.fixture(scope="module")
  def reports(tmp_path_factory):
    return gpu_topology.reports(tmp_path_factory, f"tests.gpu_fused_cases:{name}")

  return reports


plain, features = fixture("plain"), fixture("features")


def alone(report):
  """The report with this kernel only; what is not finite is for the others."""
  assert report.error == ""
  return dataclasses.replace(report, kernels=[report.kernel("jflash_fused")])


@pytest.mark.parametrize("case", gpu_fused_cases.PLAIN)
def test_it_compiles(plain, case):
  report = alone(plain[case])
  assert problems(report, want=("HGMMA", "UTMALDG", "UTMAREDG", "UTMASTG")) == []
  [kernel] = report.kernels
  assert ("RED" in kernel.opcodes or "REDG" in kernel.opcodes) == ("as they come" not in case), "who counts the additions"
  assert kernel.registers * kernel.threads <= 65536
  if kernel.set_registers:
    assert sorted(kernel.set_registers) == [24, 240]
    assert kernel.registers * kernel.threads >= 128 * (24 + 2 * 240)


@pytest.mark.parametrize("case", gpu_fused_cases.FEATURES)
def test_features_compile(features, case):
  report = alone(features[case])
  [kernel] = report.kernels
  assert max(kernel.spill_stores, kernel.spill_loads) <= FEW, kernel
  rest = [problem for problem in problems(report, want=("HGMMA", "UTMAREDG")) if ": spills " not in problem]
  assert rest == []


def test_it_takes_the_place_of_both_kernels(plain, features):
  """Except where hidden keys may be in a tile, or a bias for each query has a gradient: no thread block sees all keys of a query."""
  names = lambda report: {kernel.name for kernel in report.kernels}
  assert names(plain["64 full"]) == {"jflash_fused"}
  assert names(plain["64 causal"]) == {"jflash_fused", "jflash_dq", "jflash_dkv"}
  assert features[gpu_fused_cases.SUMS].error == "" and names(features[gpu_fused_cases.SUMS]) == {"jflash_dq", "jflash_dkv"}


def test_five_products_instead_of_seven(plain):
  kernel = plain["128 full"].kernel("jflash_fused")
  per_product = {"S": 128 // 16, "dP": 128 // 16, "dV": 64 // 16, "dK": 64 // 16, "dQ": 128 // 16}
  assert kernel.opcodes["HGMMA"] == sum(per_product.values())


def test_dq_is_the_only_large_temporary(plain):
  """A float32 dQ, to which nothing is copied: the kernel adds to it where it is."""
  rows = -(-gpu_fused_cases.T // 64) * 64
  report = plain["128 full"]
  assert report.temp < 1.1 * gpu_fused_cases.B * rows * gpu_fused_cases.N * 128 * 4
