"""The TPU kernels' static schedules: how they are read, and that the kernels do not grow."""

import pathlib

import pytest

from benchmarks import chips, tpu_schedule, tpu_static, tpu_tiles
from jflash import _tiles_tpu
from tests import tpu_topology

ALLOWED = 1.03  # times the bundles on record

# A grid loop (region 1) with a partial tile (2), in it a branch that is rare (3), a full tile (4), and what stores the result (5).
BUNDLES = """\
CT: control target
= control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd 1 } /* Start region 1 */
   0x2   : > { %5 = sbr.rel (%p1) target = $region6 } /* Start region 2 */
   0x3   : > { %v1 = vmatmul }
second line of a comment */ }
   0x4   : > { %6 = sbr.rel (%p2) target = $region3 }
   0x5   : > { %v2 = vmatmul }
   0x6   : > { %v2 = vmatmul }
   0x7 PF: > { %v3 = vadd } /* Start/End empty region 3 :: End region 2 */
   0x8 PF: > { %7 = sbr.rel (%p3) target = $region5 } /* Start/End empty region 6 :: Start region 4 */
   0x9   : > { %v4 = vmatmul } /* End region 4 */
   0xa PF: > { %v5 = vst } /* Start region 5 :: End region 5 :: End region 1 */
"""
USE = """\
== CAPACTIY:
MATMUL, VSTORE:SPILL
    4     1
== UTILIZATION:
0 0
0 0
0 0
2 1
0 0
4 1
4 0
0 0
0 0
3 0
0 1
"""


def write(folder, bundles=BUNDLES, use=USE):
  paths = folder / "17-kernel.1-72-final_bundles.txt", folder / "17-kernel.1-70-final_hlo-static-per-bundle-utilization.txt"
  for path, text in zip(paths, (bundles, use)):
    path.write_text(text)
  return paths


def test_reading(tmp_path):
  found = tpu_schedule.read(*write(tmp_path))
  assert (found.kernel, found.bundles, found.capacity) == ("kernel", 11, {"MATMUL": 4, "VSTORE:SPILL": 1})
  assert found.use == {"MATMUL": 13, "VSTORE:SPILL": 3}
  partial, full = found.steps
  assert (partial.bundles, partial.rare, partial.use) == (4, 2, {"MATMUL": 2, "VSTORE:SPILL": 1})
  assert (full.bundles, full.rare, full.use) == (2, 0, {"MATMUL": 3, "VSTORE:SPILL": 0})
  assert found.share("MATMUL", 0) == 2 / 16 and found.share("MATMUL") == 3 / 8
  figures = tpu_static.figures(found, tpu_static.UNIT // 2)
  assert (figures.partial, figures.full, figures.once) == (8, 4, 2 * (11 - 6 - 2))


def schedule(*steps):
  """Of steps (bundles, products), with 100 bundles around them."""
  made = [tpu_schedule.Step(bundles, 0, {"MATMUL": products}) for bundles, products in steps]
  return tpu_schedule.Schedule("jflash_forward", 100 + sum(b for b, _ in steps), {"MATMUL": 1}, {}, made)


@pytest.mark.parametrize("steps, found", [
    ([(50, 40)], (50, None, None)), ([(60, 40), (50, 40)], (50, 60, None)), ([(90, 80), (50, 40)], (45, None, 50)),
    ([(90, 80), (120, 80), (70, 40), (75, 40), (76, 40)], (45, 60, 70))])
def test_steps_of_two_visits_are_halved(steps, found):
  """One step; with a mask and without; two without a mask and one; two without, two with and one with, and what is not finite."""
  figures = tpu_static.figures(schedule(*steps), tpu_static.UNIT)
  assert (figures.full, figures.partial, figures.alone, figures.once) == (*found, 100)
  full, partial, alone = found
  assert tpu_tiles.cost(schedule(*steps)) == (full, partial or full, alone or partial or full, 100)


def test_the_search_writes_a_table_that_can_be_read():
  space = {}
  exec(tpu_tiles.text(_tiles_tpu.TABLE), space)
  assert {key: {tile: _tiles_tpu.Cost(*cost) for tile, cost in costs.items()} for key, costs in space["TABLE"].items()} == _tiles_tpu.TABLE
  assert space["LIBTPU"] == tpu_schedule.libtpu_version()


def test_another_format_is_refused(tmp_path):
  with pytest.raises(ValueError, match="has 11 bundles and .* 10 rows"):
    tpu_schedule.read(*write(tmp_path, use=USE.rpartition("0 1")[0]))


def test_what_does_not_compile_is_said():
  tpu_topology.device("v5e")
  with pytest.raises(RuntimeError, match="do not compile for v5e:(.|\n)*module 'tests.test_tpu_static' has no attribute 'nothing'"):
    tpu_schedule.schedules("tests.test_tpu_static:nothing", "v5e")


@pytest.mark.slow
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_no_kernel_has_grown(chip):
  """In the tiles that are chosen. After a change that is worth it: `python -m benchmarks.tpu_tiles`."""
  tpu_topology.device(chip)
  if (now := tpu_schedule.libtpu_version()) != _tiles_tpu.LIBTPU:
    pytest.skip(f"on record are the bundles of libtpu {_tiles_tpu.LIBTPU}, and this is {now}")
  grown, cases = {}, tpu_static.ours()
  for case, kernels in tpu_schedule.schedules("benchmarks.tpu_static:ours", chip).items():
    width = int(case.split()[-1])
    tiles = tpu_static.chosen(chip, "causal", width)
    assert {tpu_static.OURS[kernel.kernel] for kernel in kernels} == set(tiles)
    for kernel in kernels:
      name = tpu_static.OURS[kernel.kernel]
      now, was = tpu_tiles.cost(kernel), _tiles_tpu.TABLE[chip, width, 2, name][tiles[name]]
      grown |= {f"{case}, {name}, {kind}": (a, b) for kind, a, b in zip(was._fields, was, now) if b > ALLOWED * a}
  assert len(cases) == len(tpu_static.WIDTHS) and not grown, f"bundles of a tile, on record and now: {grown}"


@pytest.mark.slow
def test_no_kernel_for_long_sequences_has_grown():
  """Beside the page of figures. After a change that is worth it: `python -m benchmarks.tpu_static`."""
  tpu_topology.device(chip := "v6e")
  page = (pathlib.Path(tpu_static.__file__).parent / "results/tpu-static.md").read_text()
  if f"libtpu {(now := tpu_schedule.libtpu_version())}\n" not in page:
    pytest.skip(f"the page has the bundles of another libtpu than {now}")
  table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if line.startswith("|")]
  was = {(row[""], row["pass"], row["d"]): row for row in (dict(zip(table[0], cells)) for cells in table[2:])
         if row["chip"] == chip and row[""] in tpu_static.LONG}
  now = tpu_static.measure(chip, "long")
  assert {(who, kernel, width) for who, _, width, kernel in now} == set(was) and len(was) == (1 + 3) * len(tpu_static.WIDTHS)
  for (who, _, width, kernel), found in now.items():
    for kind in ("full", "partial"):
      assert getattr(found, kind) <= ALLOWED * float(was[who, kernel, width][kind]), (who, kernel, width, kind)
