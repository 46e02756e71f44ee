"""The kernels for Hopper through the compiler of an H100: products, registers, spills, shared memory, remarks; no GPU at hand."""

import pytest

from benchmarks.gpu_reports import problems
from tests import gpu_topology

gpu_topology.require_jax()
from tests import gpu_compile_cases  # noqa: E402

pytestmark = pytest.mark.gpu

CASES = "tests.gpu_compile_cases"
FEW = 64  # bytes of scalars that a kernel may spill, outside of its loops; an accumulator takes thousands
REGISTERS = 65536  # of an SM, and so of a thread block


def fixture(name):
  @pytest.fixture(scope="module")
  def reports(tmp_path_factory):
    return gpu_topology.reports(tmp_path_factory, f"{CASES}:{name}")

  return reports


plain, features, more_features, in_turn, others, memory = map(
    fixture, ("plain", "features", "more_features", "in_turn", "others", "memory"))


def without_spills(report):
  """`problems`, but for what is spilled, for kernels that may."""
  return [problem for problem in problems(report) if ": spills " not in problem and "bytes on the stack" not in problem]


def names(report):
  return [kernel.name for kernel in report.kernels]


@pytest.mark.parametrize("case", gpu_compile_cases.plain())
def test_what_must_be_fast(plain, case):
  report = plain[case]
  assert without_spills(report) == []
  assert "full" not in case or problems(report) == [], "without a mask nothing spills"
  assert set(names(report)) == {"jflash_forward", "jflash_dq", "jflash_dkv"}
  for kernel in report.kernels:
    assert max(kernel.spill_stores, kernel.spill_loads) <= FEW, kernel
    computing = kernel.threads // 128 - 1
    if kernel.set_registers:
      least, most = min(kernel.set_registers), max(kernel.set_registers)
      assert set(kernel.set_registers) == {least, most} and 128 * (least + computing * most) <= REGISTERS, kernel
    assert kernel.registers * kernel.threads <= REGISTERS


@pytest.mark.parametrize("case", gpu_compile_cases.plain())
def test_rescaling_is_a_branch(plain, case):
  """In warps where some maximum grew, by a vote, which nothing else in the kernel holds."""
  assert plain[case].kernel("jflash_forward").opcodes["VOTE"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", gpu_compile_cases.features())
def test_features(features, case):
  check_feature(features[case], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", gpu_compile_cases.more_features())
def test_more_features(more_features, case):
  check_feature(more_features[case], case)


def check_feature(report, case):
  assert without_spills(report) == []
  assert {"jflash_forward", "jflash_dq", "jflash_dkv"} <= set(names(report))
  assert ("jflash_dleaf" in names(report)) == case.startswith(("bias, ", "bias in")) or case == "bias"


@pytest.mark.slow
@pytest.mark.parametrize("case", gpu_compile_cases.others())
def test_others(others, case):
  assert without_spills(others[case]) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", gpu_compile_cases.in_turn())
def test_one_product_at_a_time(in_turn, case):
  assert without_spills(in_turn[case]) == []


@pytest.mark.slow
def test_one_product_at_a_time_is_another_kernel(in_turn, plain):
  """What the interpreter runs has each product awaited before the next begins, and no operand in registers."""
  assert in_turn["64"].kernel("jflash_forward").opcodes != plain["causal 64"].kernel("jflash_forward").opcodes


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal", "bias"])
def test_memory_is_linear(memory, case):
  short, long = (memory[f"{case} {length}"] for length in (2048, 8192))
  assert problems(short, want=()) == [] or without_spills(short) == []
  assert 0 < long.temp <= 4.5 * short.temp
