"""The kernel regression example: its figures, and its pictures."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

for package in ("matplotlib", "sklearn"):
  pytest.importorskip(package, reason="the regression example needs `pip install jflash[examples]`")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_example_draws_its_pictures_and_beats_the_mean(tmp_path):
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  command = [sys.executable, str(ROOT / "examples" / "regression" / "fit.py"), "--out", str(tmp_path / "run")]
  done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
                        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}, encoding="utf-8")
  printed = done.stdout
  assert done.returncode == 0 and not re.search("warning", printed, re.I), printed
  one, several = printed.split("bmi, bp, s1, s5")
  figures = re.findall(r"^  (\S.*?)  +(loo|gcv|aicc)? +(∞|[\d.]+) +([\d.]+) +(-?[\d.]+)$", one, re.M)
  rows = {(fit, criterion): (width, float(error), float(r2)) for fit, criterion, width, error, r2 in figures}
  mean, line = rows.pop(("mean of all", "")), rows.pop(("straight line", ""))
  assert len(rows) == 6 and mean[2] < 0.05 and line[1] < mean[1]
  for width, error, r2 in rows.values():
    assert 0.1 < float(width) < 1 and error < line[1] and r2 > line[2] > mean[2]
  for fit in ("Nadaraya-Watson", "local-linear"):
    assert rows[fit, "loo"][1] == min(error for (name, _), (_, error, _) in rows.items() if name == fit)
  assert re.search(r"^ +switched off: s1$", several, re.M)
  assert min(float(r2) for r2 in re.findall(r" (-?\d\.\d{3})$", several, re.M)) > max(r2 for *_, r2 in rows.values())
  assert float(re.search(r"largest difference (\S+)", printed)[1]) < 1e-9
  for name in ("fit.png", "weights.png", "bandwidth.png"):
    assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
