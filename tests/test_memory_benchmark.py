"""The memory table: how compilers plan, which is linear in N for jflash and quadratic for dense attention."""

import math

import pytest

from benchmarks import chips, memory
from tests import tpu_topology

LENGTHS = 2048, 4096  # for fewer, a CPU needs one tile only, and a v5p keeps some of the arrays on chip


@pytest.mark.parametrize("target", ["cpu", pytest.param("v5p", marks=pytest.mark.slow)])
def test_slopes(target):
  if target in chips.CHIPS:
    tpu_topology.device(target)
  slope = {}
  for name, function in memory.candidates(target).items():
    few, many = (memory.temporary(function, target, "bfloat16", n).bytes for n in LENGTHS)
    slope[name] = math.log2(many / few)
  assert slope["jflash"] <= 1.1 and min(slope["naive"], slope["jax.nn"]) >= 1.8


def test_dense_attention_is_right():
  import jax
  import jax.numpy as jnp
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, memory.WIDTH))
  theirs = jax.nn.dot_product_attention(q, k, v)
  for function in memory.candidates("cpu").values():
    assert jnp.allclose(function(q, k, v), theirs, atol=1e-5)


def test_a_refusal_has_the_bytes_that_the_compiler_wants():
  tpu_topology.device("v5e")
  need = memory.temporary(memory.naive, "v5e", "bfloat16", 32768, batch=1)
  assert need.refused and "memory" in need.refused.lower()
  assert need.bytes and need.bytes > 16 * 2**30
  assert memory._cell(need).startswith("(")


@pytest.mark.parametrize("text, size", [("(33.00G)", 33 * 2**30), ("(2.01T)", 2.01 * 2**40), ("(512.5M)", 512.5 * 2**20)])
def test_bytes_in_a_message(text, size):
  assert memory.wanted(f"the total memory required for HLO temporaries {text} exceeds available HBM (15.75G)") == size
  assert memory.wanted("something else") is None


def test_the_table_and_the_plot_are_written(tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "memory"
  assert memory.main(["--lengths", "128,256", "--targets", "cpu:float32", "--out", str(out)]) == 0
  page = out.with_suffix(".md").read_text()
  row = next(line for line in page.splitlines() if line.startswith("| 256 |")).split("|")
  assert [cell.strip() for cell in row[-3:-1]] == ["104", "44"]  # the paper's
  assert all(float(cell) > 0 for cell in row[2:-1]) and "## CPU, float32" in page
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_refusal_is_a_hollow_point_and_not_a_number(tmp_path):
  needs = {name: [memory.Need(2.0**20), memory.Need(3 * 2.0**20, "refused")] for name in memory.candidates("cpu")}
  row = memory.table("", [128, 256], needs, paper=False).rows[1].cells()
  assert row["naive"] == "(3.0)" and row["naive ×"] == "3.00"
  needs["naive"][1] = memory.Need(None, "no such device")
  assert memory.table("", [128, 256], needs, paper=False).rows[1].cells()["naive"] == "no such device"
  pytest.importorskip("matplotlib")
  memory.plot(tmp_path / "plot.png", [128, 256], {"here": needs})
  assert (tmp_path / "plot.png").exists()
