"""`benchmarks.gpu` without a GPU: which variants of kernels it would choose, and what it prints, from times that are made up."""

import dataclasses
import functools
import json
import math

import pytest

from benchmarks import gpu_shapes, gpu_tables, gpu_variants, gpu_worker
from benchmarks.gpu_results import COLUMNS, Result, lost
from benchmarks.gpu_variants import Variant
from benchmarks.timing import Times
from jflash._tiles_gpu import Launch, Launches
from tests import gpu_topology


def _compiled(kernel, tiles, spilled=0, shared=60_000, **more):
  return {"kernel": kernel, "width": 64, "launch": {"tiles": tiles, "stages": 2 if kernel == "forward" else 1, "turns": False},
          "split": False, "spilled": spilled, "shared": shared, "serial": False} | more


def test_candidates_do_not_spill_and_fit_with_their_stages():
  rows = [_compiled("forward", [128, 128]), _compiled("forward", [128, 64], shared=220_000), _compiled("forward", [192, 128], 500),
          _compiled("forward", [192, 64], serial=True), _compiled("dq", [64, 64], 400), _compiled("dq", [128, 64], 104),
          _compiled("dq", [128, 128], 900), _compiled("dq", [192, 128], 600)]
  found = {"chip": "h200", "variants": rows}
  forward = [(v.launch.tiles, v.launch.stages) for v in gpu_variants.candidates("forward", 64, found)]
  assert forward == [((128, 128), 2), ((128, 128), 3), ((128, 64), 2)]  # another stage are 32 and 16 KiB
  dq = [v.launch.tiles for v in gpu_variants.candidates("dq", 64, found) if v.launch.stages == 1]
  assert dq == [(192, 128), (128, 64), (64, 64)]  # all spill


def test_there_are_candidates_for_every_width_and_kernel():
  found = json.loads(gpu_variants.PATH.read_text())
  for width in gpu_shapes.WIDTHS:
    for kernel in gpu_variants.KERNELS:
      made = gpu_variants.candidates(kernel, width, found)
      assert 0 < len(made) <= gpu_variants.MOST and len({v.label for v in made}) == len(made), (width, kernel)
      assert all(v.launches(gpu_variants.SMALL) != gpu_variants.SMALL or v.launch == getattr(gpu_variants.SMALL, kernel) for v in made)


def _timed(kernel, mask, launch, seconds, now=False, split=False, width=64):
  variant = Variant(kernel, width, launch, split)
  return Result(part="variants", case={"d": str(width), "mask": mask, "kernel": kernel}, name=variant.label,
                times=Times((seconds, seconds)), measured={"now": now, "variant": dataclasses.asdict(variant), "of best": 1.0})


SMALLER, LARGER, THIRD = Launch((64, 64), 1), Launch((128, 128), 2, True), Launch((192, 64), 3)
TIMED = [_timed("forward", "causal", SMALLER, 4.0, now=True), _timed("forward", "causal", LARGER, 2.0),
         _timed("forward", "causal", THIRD, 1.99), _timed("forward", "full", SMALLER, 4.0, now=True),
         _timed("forward", "full", LARGER, 3.0), _timed("forward", "full", THIRD, 5.0)]
TIMED += [_timed(kernel, mask, launch, seconds, now=launch == SMALLER, split=kernel == "dkv")
          for kernel in ("dq", "dkv") for mask in ("causal", "full") for launch, seconds in ((SMALLER, 1.0), (THIRD, 0.5))]


def test_the_fastest_is_chosen_and_noise_is_not():
  forward = functools.partial(gpu_variants.choose, TIMED, 64, "forward")
  assert forward(["causal", "full"]) == (Variant("forward", 64, LARGER), pytest.approx(math.sqrt(16 / 6)))
  assert forward(["causal"]) == (Variant("forward", 64, LARGER), 2.0)  # the third is faster by half a percent
  assert forward(["full"])[0].launch == LARGER and gpu_variants.choose(TIMED, 128, "forward", ["full"]) is None
  assert gpu_variants.choose(TIMED, 64, "dkv", ["full"]) == (Variant("dkv", 64, THIRD, True), 2.0)
  assert math.isnan(gpu_variants.choose(TIMED[1:3], 64, "forward", ["causal"])[1])


def test_the_choice_is_python_for_the_table():
  table = {}
  text = gpu_variants.literal(TIMED, [64, 128], "a device, JAX 1.2")
  exec(text.replace("TABLE |=", "table |="), {"table": table, "Launch": Launch, "Launches": Launches}, space := {"table": table})
  assert space["table"] == {(64, 1, False): Launches(LARGER, THIRD, THIRD, True, 1)}
  assert "a device, JAX 1.2" in text and "forward 1.63, dq 2.00, dkv 2.00" in text
  assert "# (128, 1, False): not measured: forward, dq, dkv" in text and "# causal alone: " in text


def test_how_much_faster_one_kernel_is_than_two():
  def timed(name, mask, *rounds):
    return Result(part="variants", case={"d": "128", "mask": mask, "kernel": "backward"}, name=name, times=Times(rounds),
                  measured={"of best": 1.0})

  rows = [timed("two kernels", "causal", 3.0, 6.0, 3.0), timed("two kernels", "full", 4.0), timed("one kernel", "causal", 2.0, 4.0, 2.0),
          timed("one kernel", "full", 5.0), timed("one kernel, as they come", "causal", 1.0, 2.0, 1.0)]
  lines = gpu_variants.literal([*TIMED, *rows], [64, 128], "a device").splitlines()
  assert lines[-3:] == ["    # backward in one kernel: times as fast as now: causal 1.50, full 0.80",
                        "    # backward in one kernel, as they come: times as fast as now: causal 3.00", "}"]
  assert not [line for line in gpu_variants.literal(TIMED, [64, 128], "a device").splitlines() if "backward" in line]


def test_a_variant_replaces_its_kernel_and_no_other():
  table = Launches(LARGER, LARGER, LARGER, False, 1)
  assert Variant("dq", 64, SMALLER).launches(table) == dataclasses.replace(table, dq=SMALLER)
  assert Variant("dkv", 64, SMALLER, True).launches(table) == dataclasses.replace(table, dkv=SMALLER, split=True)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_variant_is_timed_alone(tmp_path_factory):
  gpu_topology.require_jax()
  reports = gpu_topology.reports(tmp_path_factory, "benchmarks.gpu_variants:compile_cases", "h200", only="* 64 64 x 64, *")
  kernels = {name.split()[0] + ", split" * name.endswith("split"): [kernel.name for kernel in report.kernels]
             for name, report in reports.items()}
  assert kernels == {"forward": ["jflash_forward"], "dq": ["jflash_dq"], "dkv": ["jflash_dkv"], "dkv, split": ["jflash_dkv"] * 2}, [
    report.error for report in reports.values()]


# What is printed ------------------------------------------------------------------------------------------------------
def _everything():
  """As many results as a whole run has."""
  results = [Result(part="checks", case={"check": f"check {n}"}, name="mosaic_gpu", failed=n > 30, note="dkey is off" * (n > 30),
                    measured={"error": 1e-3, "of": "dkey", "allowed": 1e-2}) for n in range(50)]
  results.append(Result(part="ceilings", case={"what": "copy"}, name="XLA", times=Times((1.0, 1.0)), measured={"GB/s": 4000.0}))
  for part, cases in (("speed", [(str(d), m, str(n)) for d in (64, 128, 256) for m in ("causal", "full") for n in gpu_shapes.LENGTHS]),
                      ("masks", [(str(d), m, str(n)) for d in (64, 128) for m in ("window 1024", "documents", "array")
                                 for n in (8192, 16_384)])):
    for d, mask, n in cases:
      results += [Result(part=part, case={"d": d, "mask": mask, "N": n, "pass": direction}, name=name, times=Times((1.0, 1.1)),
                         measured={"TFLOP/s": 512.3, "× cuDNN": 0.987, "max error": 1e-3, "of causal": 1.1})
                  for direction in gpu_shapes.PASSES for name in ("jflash", "jflash, causal", "jax.nn cudnn")]
  return results + TIMED + [lost("variants", "d 128", "the time was up"), lost("speed", "d 64", "kernel: it hung", failed=True)]


def test_the_short_table_fits_into_the_end_of_a_log():
  text = gpu_tables.summary(_everything(), [64, 128], "NVIDIA H200, JAX 0.11.2")
  assert len(text) < 12_000
  lines = text.splitlines()
  assert lines[-1] == "31 of 50 checks passed, 0 refused"
  assert sum(line.split()[:1] == ["128"] for line in lines) == 2 * len(gpu_shapes.LENGTHS)
  assert sum(line.startswith("FAIL") for line in lines) == gpu_tables.SHOWN and f"and {20 - gpu_tables.SHOWN} more failures" in text
  assert "TABLE |= {" in text and "not measured: 1 cases, [variants] d 128: the time was up" in text


def test_the_page_has_a_table_for_each_part_and_a_plot(tmp_path):
  pytest.importorskip("matplotlib")
  page = gpu_tables.page(_everything(), {"Device": "a device"}, [64, 128], "a device, JAX 1.2")
  for heading in [*gpu_tables.HEADINGS.values(), "Failures", "Not finished", "Choice"]:
    assert f"\n## {heading}\n" in page
  assert "| d | mask | N | pass | implementation | ms | ±% | TFLOP/s | × cuDNN | max error | rounds |" in page
  assert "| 64 | causal | 512 | forward | jflash | 1050 | 2 | 512 | 0.987 | 1.0e-03 | 2 |" in page
  gpu_tables.plot(tmp_path / "x.png", "title", _everything())
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_results_survive_being_written_down():
  for result in _everything():
    again = Result.from_json(json.loads(json.dumps(result.to_json())))
    assert (again.times, again.cells(), again.note, again.failed) == (result.times, result.cells(), result.note, result.failed)
  assert set(COLUMNS) == set(gpu_worker.PARTS) == set(gpu_tables.HEADINGS) == set(gpu_tables.LEGENDS)
