"""The GPU compiler works here: what it makes of good kernels, and of kernels that each have one fault, is reported."""

import importlib.metadata
import json
import re

import jax
import numpy as np
import pytest

from benchmarks import gpu_chips, gpu_compile, gpu_reports
from benchmarks.gpu_reports import problems
from tests import gpu_topology

gpu_topology.require_jax()
from tests import gpu_topology_cases  # noqa: E402
from tests.gpu_interpret import interpret  # noqa: E402

pytestmark = pytest.mark.gpu

CASES = "tests.gpu_topology_cases"
H100_SHARED = 232448  # bytes a block


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
  return gpu_topology.reports(tmp_path_factory, f"{CASES}:attention_of_jax", "h100")


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
  return gpu_topology.reports(tmp_path_factory, f"{CASES}:hopper", "h100")


@pytest.fixture(scope="module")
def older(tmp_path_factory):
  return gpu_topology.reports(tmp_path_factory, f"{CASES}:older", "a100")


def test_the_attention_of_jax_compiles_forward(attention):
  report = attention["forward"]
  assert problems(report, registers=65536 // 384) == []
  [kernel] = report.kernels
  assert kernel is report.kernel("entry")
  assert (kernel.grid, kernel.threads, kernel.registers) == ((1, 8, 4), 384, 168)  # the most that 384 threads can have
  assert kernel.set_registers == [232, 40]
  assert 6 * 64 * 128 * 2 < kernel.shared < 7 * 64 * 128 * 2  # two tiles of q, two steps of k and v, and barriers
  assert {"HGMMA", "UTMALDG", "UTMASTG", "MUFU"} <= set(kernel.opcodes)
  assert kernel.notes == [] and report.temp == 0
  assert report.jax == jax.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", report.ptxas)
  assert report.lower_seconds > 0 and report.compile_seconds > 0


def test_the_attention_of_jax_compiles_backward(attention):
  report = attention["backward"]
  assert problems(report) == []
  assert [kernel.name for kernel in report.kernels] == ["entry", "anonymous", "anonymous"]
  backward = report.kernels[1:]
  assert all(kernel.registers == 255 for kernel in backward)
  assert len({kernel.opcodes["HGMMA"] for kernel in backward}) == 2, "one kernel was taken for the other"
  assert report.temp >= 4 * 1024 * 128 * 2  # the output, from which the sum of rows is made


def test_a_kernel_that_was_compiled_in_another_case_is_reported_again(attention):
  first, again = attention["forward"].kernel("entry"), attention["again"].kernel("entry")
  assert first.opcodes == again.opcodes and first.shared == again.shared


def test_kernels_of_one_program_are_told_apart(hopper):
  report = hopper["both"]
  assert [kernel.name for kernel in report.kernels] == ["matmul", "double"]
  assert report.kernel("matmul").opcodes == hopper["matmul"].kernel("matmul").opcodes
  assert report.kernel("double").opcodes == hopper["no product"].kernel("double").opcodes
  with pytest.raises(KeyError, match=r"no kernel 'dq' in 'both' for h100; there are \['matmul', 'double'\]"):
    report.kernel("dq")


def test_kernels_are_found_by_name_under_transformations(hopper):
  report = hopper["transformed"]
  assert problems(report, want=()) == []
  assert {kernel.name for kernel in report.kernels} == {"forward", "backward"}
  assert all(kernel.grid == (3, 1, 1) and kernel.dynamic_shared == 64 * 128 * 2 for kernel in report.kernels)


def test_registers_that_a_kernel_sets_itself(hopper):
  assert hopper["registers"].kernel("registers").set_registers == [232]
  assert hopper["matmul"].kernel("matmul").set_registers == []


def test_spills_are_found(hopper):
  kernel = hopper["spilling"].kernel("spilling")
  assert kernel.registers == 255 and kernel.opcodes["STL"] > 0 and kernel.opcodes["LDL"] > 0
  assert kernel.spill_stores >= 4 * (2 * 64 * 256 // 128 - 255), "at least what does not fit into 255 registers"
  assert f"spilling for h100, kernel spilling: spills {kernel.spill_stores} bytes" in problems(hopper["spilling"])[0]


def test_products_that_run_one_after_the_other_are_found(hopper):
  found = problems(hopper["spilling"])
  assert any("C7511" in problem and "wgmma.mma_async instructions are serialized" in problem for problem in found), found


def test_too_much_shared_memory_is_found(hopper):
  needed = 2 * (128 * 512 + 512 * 256 + 128 * 256)
  [found] = problems(hopper["too much shared memory"])
  assert re.search(rf"exceeds available shared memory: smem_bytes={str(needed)[:3]}\d+ > max_smem_bytes={H100_SHARED}", found)


def test_a_missing_product_is_found(hopper):
  report = hopper["no product"]
  assert problems(report, want=()) == []
  count = sum(report.kernel("double").opcodes.values())
  assert problems(report) == [f"no product for h100, kernel double: has no HGMMA in {count} instructions"]


def test_a_program_without_kernels_is_found(hopper):
  assert hopper["no kernel"].error == "" and hopper["no kernel"].kernels == []
  assert problems(hopper["no kernel"]) == ["no kernel for h100: there is no Mosaic GPU kernel in it"]


def test_too_many_registers_are_found(hopper):
  [found] = problems(hopper["matmul"], registers=64)
  assert re.search(r"matmul: takes \d+ registers, of 64$", found)


def test_a_case_at_which_the_compiler_aborts_does_not_take_the_others_along(older):
  assert list(older) == ["before", "refused", "aborting", "after"]
  assert older["before"].error == older["after"].error == ""
  assert "Hopper and newer" in older["refused"].error
  assert "gpu_topology_cases.py:" in older["refused"].error, "the line of the kernel"
  assert older["aborting"].error.startswith("the compiling process died with exit status")
  assert "Cannot select: intrinsic %llvm.nvvm.fence.proxy.async" in older["aborting"].error
  assert problems(older["aborting"]) == [f"aborting for a100: {older['aborting'].error}"]


def test_a_case_that_takes_too_long_does_not_take_the_others_along(tmp_path_factory):
  found = gpu_topology.reports(tmp_path_factory, f"{CASES}:hanging", "h100", timeout=3.0)
  assert "Timeout (0:00:03)!" in found["hanging"].error and "in hang" in found["hanging"].error
  assert found["after"].error == ""


def test_cases_that_cannot_be_made_are_an_error(tmp_path_factory):
  with pytest.raises(RuntimeError, match=r"(?s)the cases of .*:broken cannot be made .*LookupError: there are no cases"):
    gpu_topology.reports(tmp_path_factory, f"{CASES}:broken")


def test_the_command_line(attention, capsys, tmp_path):
  gpu_compile.main([f"{CASES}:hopper", "--only", "mat*", "--chip", "h200", "--keep", str(tmp_path)])
  printed = capsys.readouterr().out
  assert printed.startswith(f"matmul (h200, JAX {jax.__version__}, ptxas ")
  assert re.search(r"matmul: \d+ registers, 0 \+ 0 bytes spilled, \d+ bytes of shared memory of 232448, 128 threads", printed)
  assert {path.suffix for path in (tmp_path / "matmul").iterdir()} >= {".ptx", ".sass_ctrl"}
  gpu_compile.main([f"{CASES}:hopper", "--only", "no kernel", "--json"])
  assert json.loads(capsys.readouterr().out)["no kernel"]["shared_limit"] == H100_SHARED
  with pytest.raises(ValueError, match=r"gpu_topology_cases:hopper has no case that matches 'x\*'"):
    gpu_compile.compile_cases(f"{CASES}:hopper", only="x*")


def test_every_line_of_ptxas_that_is_not_routine_is_a_note(tmp_path):
  ignored = "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry."
  (tmp_path / "k_0.ptxas").write_text(f"""ptxas info    : {ignored}
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for k_mosaic_gpu_kernel
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 16 barriers, 16 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 71.184 ms
""")
  (tmp_path / "k_0.sass_ctrl").write_text("""   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   1:-:-:-:13        /*0190*/              @!P0 HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ, !UPT
""")
  (tmp_path / "k_0.mlir-passes.log").write_text("""    %c1 = arith.constant 1 : index loc(#loc)
    %bytes = arith.constant 300000 : i32 loc(#loc)
    %1 = gpu.launch_func async [%0] @k::@k blocks in (%c1, %2, %c1) threads in (%3, %c1, %c1)  dynamic_shared_memory_size %bytes args()
    %2 = llvm.mlir.constant(8 : index) : i64 loc(#loc)
    %3 = arith.constant 384 : index loc(#loc)
    gpu.launch_func <%0 : !llvm.ptr> @k::@k blocks in (%c1, %2, %c1) threads in (%3, %c1, %c1) : i64 dynamic_shared_memory_size %bytes
""")
  kernel = gpu_reports.read_kernel(tmp_path / "k_0")
  report = gpu_reports.Report("case", "h100", shared_limit=H100_SHARED, kernels=[kernel])
  assert kernel.opcodes == {"LDC": 1, "HGMMA": 1} and kernel.grid == (1, 8, 1) and kernel.threads == 384
  assert problems(report) == ["case for h100, kernel k: keeps 16 bytes on the stack",
                              "case for h100, kernel k: takes 300001 bytes of shared memory, of 232448",
                              f"case for h100, kernel k: ptxas: info: {ignored}"]
  (tmp_path / "k_0.ptxas").write_text("something else")
  with pytest.raises(ValueError, match="not a report of ptxas -v: 'something else'"):
    gpu_reports.read_kernel(tmp_path / "k_0")


def test_an_unknown_chip_is_named():
  with pytest.raises(ValueError, match="`chip` is 'v100'; it must be one of h100, h200, a100, l4, b200"):
    gpu_compile.compile_cases(f"{CASES}:hopper", "v100")


@pytest.mark.parametrize("required, outcome", [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_missing_compiler_skips_but_fails_in_ci(monkeypatch, tmp_path_factory, required, outcome):
  def version(package):
    raise importlib.metadata.PackageNotFoundError(package)

  monkeypatch.setenv("JFLASH_REQUIRE_CUDA_COMPILER", required)
  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(outcome, match="jax-cuda13-plugin, the CUDA compiler of JAX, is not installed: pip install"):
    gpu_topology.reports(tmp_path_factory, f"{CASES}:hopper")


def test_a_compiler_of_another_version_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.1.0")
  assert gpu_chips.missing() == f"jax-cuda13-plugin is 0.1.0, but jax is {jax.__version__}: pip install jax-cuda13-plugin=={jax.__version__}"


def test_an_old_jax_is_skipped_even_in_ci(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("JFLASH_REQUIRE_CUDA_COMPILER", "1")
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  with pytest.raises(pytest.skip.Exception, match=r"GPU kernels need JAX 0\.11\.2 or newer"):
    gpu_topology.reports(tmp_path_factory, f"{CASES}:hopper")


@pytest.mark.timeout(120)
def test_the_kernels_are_right_when_interpreted():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(64, 64)).astype(np.float16), rng.normal(size=(64, 128)).astype(np.float16)
  out = interpret(gpu_topology_cases.matmul("matmul", 64, 128, 64)[0], a, b)
  np.testing.assert_allclose(out, a.astype(np.float32) @ b.astype(np.float32), atol=0.02)
  np.testing.assert_array_equal(interpret(gpu_topology_cases.double("double")[0], b), 2 * b)


@pytest.mark.timeout(120)
def test_a_race_is_found_when_interpreted():
  x = np.ones((64, 128), np.float16)
  with pytest.raises((jax.errors.JaxRuntimeError, AssertionError), match="RACE DETECTED"):
    interpret(gpu_topology_cases.racing("racing")[0], x)
  np.testing.assert_array_equal(interpret(gpu_topology_cases.double("double")[0], x), 2 * x)  # and nothing is left of it
