"""The benchmark harness runs on tiny sizes and writes what it measured; no speed is asserted here."""

import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention, report
from benchmarks.timing import Times, interleave

TINY = ["--heads", "4", "--kv-heads", "2", "--width", "8", "--repeats", "3", "--seconds", "0.01"]


def _table(text):
  """The rows of the one table in a markdown text, as dicts."""
  lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line[:1] == "|"]
  return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_and_the_plot_are_written(tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "new" / "tiny"
  argv = [*TINY, "--lengths", "16,32", "--dtype", "bfloat16", "--window", "4", "--out", str(out)]
  assert attention.main(argv) == 0
  text = out.with_suffix(".md").read_text()
  rows = _table(text)
  assert tuple(rows[0]) == ("pass", "dtype", "T", "implementation", "ms", "±%", "× jax.nn", "TFLOP/s", "temp MiB", "rounds")
  cases = {(r["pass"], r["dtype"], r["T"], r["implementation"]) for r in rows}
  assert len(cases) == len(rows) == 2 * 2 * 2
  assert all(float(r["ms"]) > 0 and float(r["temp MiB"]) > 0 and int(r["rounds"]) >= 3 for r in rows)
  assert {r["× jax.nn"] for r in rows if r["implementation"] == "jax.nn xla"} == {"1.00"}
  assert f"JAX {jax.__version__}" in text and "B 1, N 4, K 2, H 8, causal, window 4" in text and "Date: 20" in text
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def _measure(functions, *argv, backward=False):
  args = attention.parse([*TINY, *argv])
  shape = attention.Shape(batch=2, length=16, heads=4, kv_heads=2, width=8, causal=True, window=None)
  return {row.name: row for row in attention.measure(shape, "float32", backward, functions, args)}


def test_a_reason_not_to_run_is_reported_and_the_others_run():
  def refuses(q, k, v, **_):
    raise NotImplementedError("no chip of this kind here\nmore")

  functions = {"jflash tpu": refuses, **attention.candidates(["None"], ["xla"])}
  rows = _measure(functions)
  assert rows["jflash tpu"].times is None
  assert rows["jflash tpu"].note == "NotImplementedError: no chip of this kind here"
  assert rows["jflash"].times and rows["jflash"].speedup and rows["jax.nn xla"].speedup == 1
  text = report.document("title", {}, [report.Table("", list(rows.values()), attention.LEGEND)])
  assert "- forward, float32, T 16, jflash tpu: NotImplementedError: no chip of this kind here" in text
  assert _table(text)[0]["ms"] == "—"


def test_what_needs_too_much_memory_is_not_run():
  rows = _measure(attention.candidates(["None"], ["xla"]), "--memory-limit", "1e-9")
  assert all(row.times is None and row.temp_bytes and "the limit is 1e-09" in row.note for row in rows.values())


def test_both_passes_compute_the_same_for_ours_and_theirs():
  shape = attention.Shape(batch=2, length=16, heads=4, kv_heads=2, width=8, causal=True, window=5)
  inputs = shape.inputs("float32", backward=True)
  ours, theirs = (jax.jit(attention._workload(f, shape, True))(*inputs)
                  for f in attention.candidates(["None"], ["xla"]).values())
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert jnp.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("causal, window, pairs", [
  (False, None, 36), (True, None, 18), (True, 0, 6), (True, 2, 15), (False, 1, 16), (True, 99, 21), (False, 99, 36)])
def test_flops_count_the_pairs_in_the_window(causal, window, pairs):
  shape = attention.Shape(batch=2, length=6, heads=3, kv_heads=1, width=5, causal=causal, window=window)
  assert shape.flops(backward=False) == 4 * 2 * 3 * 5 * pairs
  assert shape.flops(backward=True) == 3.5 * shape.flops(backward=False)


def test_calls_take_turns_and_slow_ones_get_fewer_rounds():
  log = []
  calls = {name: lambda name=name: (log.append(name), time.sleep(6e-3))[1] for name in "ab"}
  times = interleave(calls, repeats=50, seconds=0.06)
  assert log[:4] == ["a", "a", "b", "b"]
  assert log[4:] == ["a", "b"] * ((len(log) - 4) // 2)
  assert 3 <= len(times["a"].rounds) == len(times["b"].rounds) <= 5
  assert times["a"].median >= 6e-3


def test_a_speedup_compares_rounds_side_by_side():
  slow_spell = Times((1.0, 1.0, 8.0)), Times((2.0, 2.0, 16.0))
  assert slow_spell[0].speedup(slow_spell[1]) == 2
