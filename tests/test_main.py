"""`python -m jflash`: it says what works, it notices a backend that is wrong, and importing the library stays light."""

import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jflash
from jflash import __main__ as report
from jflash import _xla

CASE = report.Case("grouped, window", jnp.bfloat16, (1, 150, 140, 2, 1, 8, 4), report.CASES[1].make)


@pytest.fixture
def one_case(monkeypatch):
  monkeypatch.setattr(report, "CASES", (CASE,))


@pytest.fixture(scope="module")
def computed():
  """What `check` computes on this case: by "xla", by dense attention in bfloat16, and in float64."""
  results, compute = [], report._outputs_and_gradients

  def record(*args):
    results.append(compute(*args))
    return results[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "_outputs_and_gradients", record)
    assert all(finding.ok for finding in report.check(CASE, "xla"))
  return results


def test_all_is_right(one_case, computed, monkeypatch, capsys):
  results = iter(computed)
  monkeypatch.setattr(report, "_outputs_and_gradients", lambda *args: next(results))
  assert report.main([]) == 0
  text = capsys.readouterr().out
  assert f"jflash {jflash.__version__}" in text and f"jax {jax.__version__}" in text
  assert f"devices    {len(jax.devices())} x cpu" in text
  assert "tpu        not here: it needs a TPU" in text and "xla        works" in text
  lines = [line for line in text.splitlines() if line.startswith("xla        grouped")]
  assert len(lines) == 1 and lines[0].endswith("ok")
  assert not [line for line in text.splitlines() if line.startswith("tpu        interpreted")]


@pytest.mark.parametrize("name, shift", [("out", 0.1), ("lse", 1e-4), ("dquery", 0.3), ("dvalue", 0.3)])
def test_a_wrong_number_fails(name, shift, one_case, computed, monkeypatch, capsys):
  """One number of one output is off by some hundredths of its size, or, in float32, by far less."""
  ours, *references = ({key: x.copy() for key, x in results.items()} for results in computed)
  ours[name].flat[7] += shift
  results = iter([ours, *references])
  monkeypatch.setattr(report, "_outputs_and_gradients", lambda *args: next(results))
  assert report.main([]) == 1
  text = capsys.readouterr().out
  line = next(line for line in text.splitlines() if line.startswith("xla        grouped"))
  assert line.endswith("FAIL") and name in line
  assert "at least one check is wrong" in text


def test_a_backend_that_breaks_fails(one_case, monkeypatch, capsys):
  def forward(*args):
    raise ZeroDivisionError("one by zero")

  monkeypatch.setattr(_xla, "forward", forward)
  assert report.main([]) == 1
  assert "FAIL ZeroDivisionError: one by zero" in capsys.readouterr().out


def test_nan_fails():
  finding = report._compare("out", *(jnp.array([x]).__array__() for x in (float("nan"), 1.0, 1.0)), jnp.float32)
  assert not finding.ok


def test_interpret_checks_what_is_absent(monkeypatch, capsys):
  monkeypatch.setattr(report, "CASES", ())
  assert report.main(["--interpret"]) == 0
  line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tpu        interpreted"))
  assert line.endswith("ok")


def test_runs_as_a_module(capsys):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["jflash", "--help"])
    patch.delitem(sys.modules, "jflash.__main__", raising=False)
    with pytest.raises(SystemExit) as caught:
      runpy.run_module("jflash", run_name="__main__")
  assert caught.value.code == 0 and "--interpret" in capsys.readouterr().out


def test_import_is_light():
  heavy = ("jax.experimental.pallas", "flax", "jflash._tpu", "jflash._cudnn", "jflash.__main__", "jflash._reference")
  code = f"import sys, jflash; print([m for m in {heavy} if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
