"""The benchmark harness runs on tiny sizes and writes what it measured; no speed is asserted here."""

import dataclasses
import importlib.util
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from benchmarks import attention, block_sparse, estimators, regression, report
from benchmarks.timing import Times, interleave

TINY = ["--heads", "4", "--kv-heads", "2", "--width", "8", "--repeats", "3", "--seconds", "0.01"]


def _table(text):
  """The rows of the first table in a markdown text, as dicts."""
  lines = text[text.index("\n| ") + 1:].split("\n\n")[0].splitlines()
  lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
  return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_and_the_plot_are_written(tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "new" / "tiny"
  argv = [*TINY, "--lengths", "16,32", "--dtype", "bfloat16", "--window", "4", "--out", str(out)]
  assert attention.main(argv) == 0
  text = out.with_suffix(".md").read_text()
  rows = _table(text)
  assert tuple(rows[0]) == ("pass", "dtype", "T", "implementation", "ms", "±%", "× jax.nn", "TFLOP/s", "temp MiB", "compile s", "rounds")
  cases = {(r["pass"], r["dtype"], r["T"], r["implementation"]) for r in rows}
  assert len(cases) == len(rows) == 2 * 2 * 2
  assert all(float(r["ms"]) > 0 and float(r["temp MiB"]) > 0 and float(r["compile s"]) > 0 and int(r["rounds"]) >= 3 for r in rows)
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


def test_without_pytorch_its_row_says_so(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  rows = _measure(attention.candidates(["None"], ["xla", "torch"]))
  assert rows["torch"].note.startswith("ModuleNotFoundError") and rows["torch"].times is None and rows["jflash"].speedup


def test_the_cpu_page_has_a_row_for_every_case(tmp_path):
  out = tmp_path / "cpu"
  argv = [*BRIEF, "--uneven", "24", "--length", "48", "--long", "4096", "--dtype", "float32", "--out", str(out)]
  assert attention.main(["--goals", *argv, "--lengths", "16,32", "--compiled", "16,32", "--parts", "causal,shapes,terms,sparse,compiling"]) == 0
  page = out.with_suffix(".md").read_text()
  assert "- Command: `python -m benchmarks.attention --goals" in page
  rows = _table(page)
  cases = {(row["case"], row["beside"]) for row in rows}
  assert len(rows) == 2 * (2 + 4 + 9 + 3 + 2) and len(cases) == 20 and all(float(row["ratio"]) > 0 for row in rows)
  for row in rows:
    how, goal, *star = row["goal"].split()
    assert bool(star) == (float(row["ratio"]) < float(goal) if how == ">=" else float(row["ratio"]) > float(goal))
  assert {("T 32, causal", "jax.nn"), ("compiling, T 32, causal", "jax.nn"), ("T 24, width 64, causal", "jax.nn"), ("bias of all heads", "plain causal"), ("window of 1024", "causal"), ("1/16 of the blocks of 256", "all pairs")} < cases


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
  times = interleave(calls, repeats=50, seconds=0.12)
  assert log[:4] == ["a", "a", "b", "b"]
  assert log[4:] == ["a", "a", "b", "b"] * len(times["a"].rounds)  # what is timed comes after a call that is not
  assert 3 <= len(times["a"].rounds) == len(times["b"].rounds) <= 5
  assert times["a"].median >= 6e-3


def test_busy_cores_are_counted():
  def work():
    end = time.process_time() + 0.01
    while time.process_time() < end:
      pass

  times = interleave({"work": work, "sleep": lambda: time.sleep(0.01)}, repeats=5, seconds=1)
  assert times["work"].cpu == pytest.approx([0.01] * 5, rel=0.5)
  assert times["work"].cores > 2 * times["sleep"].cores
  assert Times((1.0, 1.0)).cores is None


def test_a_speedup_compares_rounds_side_by_side():
  slow_spell = Times((1.0, 1.0, 8.0)), Times((2.0, 2.0, 16.0))
  assert slow_spell[0].speedup(slow_spell[1]) == 2


BRIEF = ["--repeats", "3", "--seconds", "0.01"]
UNIFORM = regression.Case("uniform", 60, 2, "float64", 0.1)


def _predict(case, *argv, budget=60.0, **candidates):
  chosen = candidates or estimators.estimators(1e-3, None)
  rows = regression.predict(case, chosen, regression.Budget(budget), regression.parse([*BRIEF, *argv]))
  return {row.name: row for row in rows}


@pytest.mark.parametrize("dtype, limit", [("float64", 1e-9), ("float32", 1e-3)])
def test_all_estimators_agree_with_the_definition(dtype, limit):
  rows = _predict(dataclasses.replace(UNIFORM, dtype=dtype))
  for name, row in rows.items():
    if name == "pykeops" and not importlib.util.find_spec("pykeops"):
      assert row.note == "ModuleNotFoundError: No module named 'pykeops'"
    else:
      assert not row.note and row.error < (2.5e-3 if "tol" in name else limit), name  # max y - min y is below 2.5
  assert rows["jflash"].times and rows["scikit-learn"].times and rows["jflash"].ratio == 1
  assert ("statsmodels lc" in rows, "statsmodels ll" in rows) == (dtype == "float64",) * 2


def test_fast_and_wrong_shows_in_the_table():
  wrong = estimators.Estimator("wrong", lambda x, y, bandwidth: lambda: np.roll(y, 1))
  right = estimators.estimators(1e-3, None)["jflash"]
  rows = _predict(UNIFORM, wrong=wrong, jflash=right)
  assert rows["wrong"].error > 0.1 > 1e-9 > rows["jflash"].error
  none = estimators.Estimator("none", lambda x, y, bandwidth: lambda: np.full_like(y, np.nan))
  assert _predict(UNIFORM, none=none)["none"].values()["max error"] == "nan"


def test_a_missing_peer_is_listed_with_the_reason_and_the_others_run():
  missing = estimators.Estimator("missing", lambda x, y, bandwidth: __import__("no_such_peer"))
  rows = _predict(UNIFORM, missing=missing, jflash=estimators.estimators(1e-3, None)["jflash"])
  assert rows["missing"].note == "ModuleNotFoundError: No module named 'no_such_peer'" and rows["jflash"].times
  page = report.document("title", {}, [report.Table("heading", list(rows.values()), "")])
  assert "- d 2, n 60, float64, missing: ModuleNotFoundError: No module named 'no_such_peer'" in page


def test_what_takes_too_much_memory_or_time_is_left_out_at_that_size():
  rows = _predict(UNIFORM, "--memory-limit", f"{60 * 60 * 8 / 2**30 * 0.99}")
  assert "GiB for an array" in rows["scikit-learn"].note and not rows["scikit-learn"].times and rows["jflash"].times
  slow = {"slow": estimators.Estimator("slow", lambda x, y, bandwidth: lambda: (time.sleep(0.01), y)[1])}
  budget, args = regression.Budget(0.1), regression.parse(BRIEF)
  small, large = ([*regression.predict(dataclasses.replace(UNIFORM, n=n), slow, budget, args)][0] for n in (60, 600))
  assert small.times and not small.note
  assert large.times is None and "about 1 s a call, the limit is 0.1" in large.note
  assert not budget.refusal(("another", "float64", 2), 600)


def test_the_definition_is_that_of_the_weights():
  x, y = np.array([[0.0], [1.0], [3.0]]), np.array([1.0, 2.0, 5.0])
  near, far = math.exp(-1 / 8), math.exp(-9 / 8)
  assert estimators.dense_fit(x, y, [0], 2.0) == pytest.approx([(1 + 2 * near + 5 * far) / (1 + near + far)])
  assert estimators.dense_fit(x, y, [0], 2.0, exclude_self=True) == pytest.approx([(2 * near + 5 * far) / (near + far)])
  assert estimators.dense_fit(x, 4 + 3 * x[:, 0], [0, 1, 2], 2.0, "linear") == pytest.approx([4, 7, 13])
  assert estimators.leave_one_out(x[:2], y[:2], 0.5) == pytest.approx(1)


def test_all_dtypes_get_the_same_numbers():
  narrow, wide = (dataclasses.replace(UNIFORM, dtype=dtype).data() for dtype in ("float32", "float64"))
  for a, b in zip(narrow, wide, strict=True):
    assert (a.dtype, b.dtype) == (np.float32, np.float64) and (a == b).all()


def test_pruning_rows_say_what_was_skipped_and_that_it_moved_little():
  case = dataclasses.replace(UNIFORM, n=1500, dtype="float32", bandwidth=0.03)
  none, some = regression.prune(case, 0.01, regression.parse(BRIEF))
  assert (none.tol, none.visited, none.moved, none.speedup) == (0, 1, 0, 1)
  assert some.tol == 0.01 and 0 < some.visited < 0.7 and 0 < some.moved <= 0.01
  assert none.error < 1e-4 and some.error <= 0.01 * 2.5 and some.times.median > 0


def test_both_searches_find_bandwidths_of_the_same_score():
  case = regression.Case("uniform", 80, 1, "float64", 0.0)
  args = regression.parse([*BRIEF, "--no-cold"])
  rows = {row.name: row for row in regression.search(case, estimators.SEARCHES, regression.Budget(60), args)}
  ours, theirs = rows["jflash"], rows["statsmodels"]
  assert ours.score == pytest.approx(theirs.score, rel=1e-3) and ours.bandwidth == pytest.approx(theirs.bandwidth, rel=0.05)
  assert ours.score == pytest.approx(estimators.leave_one_out(*case.data(), ours.bandwidth))
  assert ours.ratio == 1 and theirs.ratio > 0 and ours.cold is None and ours.values()["cold s"] == "—"


def test_a_search_in_a_fresh_process_is_timed_or_says_why_not():
  case = regression.Case("uniform", 20, 1, "float64", 0.0)
  assert regression._cold_search("statsmodels", case) > 0
  with pytest.raises(ChildProcessError, match="KeyError"):
    regression._cold_search("nobody", case)


def test_the_regression_page_has_a_table_for_each_part_and_a_plot(tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "regression"
  argv = [*BRIEF, "--lengths", "30", "--dtype", "float32", "--parts", "predict,prune", "--prune-length", "200", "--out", str(out)]
  assert regression.main(argv) == 0
  page = out.with_suffix(".md").read_text()
  rows = _table(page)
  assert {(row["n"], row["implementation"]) for row in rows} >= {("30", "jflash"), ("30", "scikit-learn")}
  assert all(float(row["ms"]) > 0 and float(row["max error"]) < 1e-2 for row in rows if row["ms"] != "—")
  assert page.count("\n## ") == 2 and "| normal | 200 | float32 | 0 |" in page and "scikit-learn 1" in page
  assert "`python -m benchmarks.regression --repeats 3" in page
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_block_sparse_page_has_every_candidate_in_both_passes(tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "sparse"
  argv = [*BRIEF, "--length", "64", "--block", "8", "--heads", "2", "--kv-heads", "1", "--width", "4", "--shares", "4",
          "--no-patterns", "--out", str(out)]
  assert block_sparse.main(argv) == 0
  page = out.with_suffix(".md").read_text()
  rows = _table(page)
  want = {("dense", "", "1.0000"), ("random 1/4", "static", "0.2500"), ("random 1/4", "traced", "0.2500")}
  for direction in block_sparse.PASSES:
    assert {(row["pattern"], row["table"], row["kept"]) for row in rows if row["pass"] == direction} == want
  assert len(rows) == 6 and all(float(row["ms"]) > 0 and float(row["of dense"]) > 0 for row in rows)
  assert "B 1, T 64, N 2, K 1, H 4, float32, blocks of 8" in page and "`python -m benchmarks.block_sparse --repeats 3" in page
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_block_sparse_candidates_keep_what_they_say():
  q = jnp.ones((1, 64, 1, 4))
  found = block_sparse.candidates(64, 8, [4, 1], patterns=True)
  assert len(found) == 1 + 2 * 2 + 5
  for name, candidate in found.items():
    mask = candidate.mask(candidate.table, q, q)
    assert (mask is None and candidate.kept == 1) or 1 - jflash.show(mask, 64, 64, tiles=8).skipped == candidate.kept, name
