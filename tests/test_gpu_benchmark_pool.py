"""`benchmarks.gpu` without a GPU: processes that hang or die, the time that is divided among parts, and the command."""

import functools
import io
import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import pytest

from benchmarks import gpu, gpu_pool, gpu_speed, gpu_worker
from benchmarks.gpu_contest import Broken
from benchmarks.gpu_pool import Budget, Died, Job, Limits, Pool, Silent
from benchmarks.gpu_results import Result, lost
from benchmarks.timing import Times


# Processes ------------------------------------------------------------------------------------------------------------
class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_a_part_may_use_what_those_before_it_left_over():
  clock = Clock()
  clock.now = 100.0
  budget = Budget({"checks": 10, "speed": 20}, clock)
  assert budget.open("checks") and budget.open("speed") and budget.left() == 30
  clock.now = 111.0
  assert not budget.open("checks") and budget.open("speed") and budget.left() == 19
  clock.now = 131.0
  assert not budget.open("speed") and budget.left() == 0


def test_the_time_is_divided_by_what_is_asked_for():
  assert sum(gpu.SHARES.values()) == pytest.approx(1) and list(gpu.SHARES) == list(gpu_worker.PARTS)
  assert gpu.budget_of(["speed"], 100).total == pytest.approx(100)
  ends = gpu.budget_of(["variants", "checks"], 90).ends
  assert ends == pytest.approx({"checks": 40, "variants": 90})


class Actor:
  """A process that plays a script: job's name -> what is said after the job, and after "go"; an exception is raised."""

  measuring, most, lock = 0, 0, threading.Lock()

  def __init__(self, script, started):
    self.script, self.said, self.closed = script, [{"ready": {"platform": "gpu"}}], False
    started.append(self)

  def send(self, what):
    if "go" in what:
      self.said += self.after if what["go"] else [{"done": True}]
      with Actor.lock:
        Actor.measuring += 1
        Actor.most = max(Actor.most, Actor.measuring)
    else:
      compiled, after = self.script(Job(what["part"], what["name"], tuple(what["without"])))
      self.said, self.after = [*self.said, *compiled], after

  def receive(self, seconds):
    said = self.said.pop(0)
    if isinstance(said, Exception):
      raise said
    if "done" in said:
      time.sleep(0.01)
      with Actor.lock:
        Actor.measuring -= 1
    return said

  def close(self):
    self.closed = True


def _row(name):
  return Result(part="speed", case={"N": name}, name="jflash", times=Times((1.0, 1.0))).to_json()


def _play(script, names, count=1, budget=None):
  """(results, processes that were started)."""
  results, started = [], []
  Actor.measuring = Actor.most = 0
  Pool([Job("speed", name) for name in names], budget or Budget({"speed": 1e3}), lambda: Actor(script, started), count,
       results.extend, lambda device: None, Limits(1, 1, 1)).run()
  return results, started


def test_jobs_are_done_side_by_side_and_measured_one_at_a_time():
  script = lambda job: ([{"begin": "x"}, {"compiled": True}], [{"begin": "x"}, {"rows": [_row(job.name)]}, {"done": True}])
  names = [str(n) for n in range(20)]
  results, started = _play(script, names, count=4)
  assert sorted(result.case["N"] for result in results) == sorted(names) and results[0].times == Times((1.0, 1.0))
  assert len(started) == 4 and all(actor.closed for actor in started) and Actor.most == 1


def test_what_hangs_is_left_out_and_the_rest_is_measured_in_a_new_process():
  def script(job):
    if job.without:
      return [{"compiled": True}], [{"rows": [_row(f"{job.name} without {job.without[0]}")]}, {"done": True}]
    return [{"compiled": True}], [{"begin": "theirs"}, {"begin": "ours"}, Silent("nothing was heard for 60 s")]

  results, started = _play(script, ["a", "b"])
  assert [result.failed for result in results] == [True, False, True, False]
  assert results[0].note == "ours: nothing was heard for 60 s; the case is tried again without it"
  assert [result.case.get("N") for result in results[1::2]] == ["a without ours", "b without ours"]
  assert len(started) == 3 and all(actor.closed for actor in started)  # the third measures what is left of b


@pytest.mark.parametrize("compiled, after", [
  ([{"begin": "ours"}, Died("status -6")], []), ([{"begin": "ours"}, {"compiled": True}], [{"broken": ["ours", "illegal address"]}])])
def test_a_culprit_that_stays_one_costs_its_case_only(compiled, after):
  script = lambda job: (list(compiled), list(after)) if job.name == "bad" else (
    [{"compiled": True}], [{"rows": [_row("good")]}, {"done": True}])
  results, started = _play(script, ["bad", "good"])
  assert [result.failed for result in results] == [True, True, False] and "tried again" not in results[1].note
  assert results[0].note.startswith("ours: ") and results[2].case == {"N": "good"} and len(started) == 3


def test_no_case_begins_after_its_time():
  clock = Clock()

  def script(job):
    clock.now += 6
    return [{"compiled": True}], [{"rows": [_row(job.name)]}, {"done": True}]

  results, _ = _play(script, ["a", "b", "c"], budget=Budget({"speed": 10}, clock))
  assert results[0].case == {"N": "a"}
  assert [(result.case["case"], result.note) for result in results[1:]] == [("b", gpu_pool.TIME_WAS_UP), ("c", gpu_pool.TIME_WAS_UP)]


def test_who_does_not_stop_is_ended_when_the_time_is_up():
  class Stuck(Actor):
    def receive(self, seconds):
      if self.said and "ready" in self.said[0]:
        return self.said.pop(0)
      while not self.closed:
        time.sleep(0.01)
      raise Died("killed")

  results, started = [], []
  Pool([Job("speed", "a"), Job("speed", "b")], Budget({"speed": 0.1}), lambda: Stuck(lambda job: ([], []), started), 1,
       results.extend, lambda device: None).run()
  assert [(result.case["case"], result.note, result.failed) for result in results] == [
    ("a", gpu_pool.TIME_WAS_UP, False), ("b", gpu_pool.TIME_WAS_UP, False)]


def test_a_process_without_a_word_is_given_up():
  worker = gpu_pool.Worker.__new__(gpu_pool.Worker)
  worker.log = io.BytesIO(b"first\n\nKilled by the compiler\n")
  command = ["-c", "import sys; sys.stdin.readline(); print('{}', flush=True); sys.stdin.readline(); sys.exit(3)"]
  worker.process, worker.unread = subprocess.Popen([sys.executable, *command], stdin=-1, stdout=-1), b""
  with pytest.raises(Silent, match="nothing was heard for 0 s"):
    worker.receive(0.05)
  worker.send({"go": True})
  assert worker.receive(30) == {}
  worker.send({"go": True})
  with pytest.raises(Died, match=r"status 3: first / Killed by the compiler"):
    worker.receive(30)
  worker.close()


def test_a_worker_says_what_it_does(monkeypatch):
  def broken(begin, without):
    def measure():
      raise Broken("kernel", "illegal address")
    return measure

  def fails(begin, without):
    raise KeyError("no such width")

  def good(begin, without):
    begin("kernel")
    return lambda: [lost("speed", "good", f"without {without}")]

  cases = {name: functools.partial(type("Case", (), {"prepare": staticmethod(prepare)})) for name, prepare in (
    ("good", good), ("fails", fails), ("broken", broken))}
  monkeypatch.setitem(gpu_worker.PARTS, "speed", lambda setup: cases)
  commands = []
  for name in ("good", "fails", "broken", "good"):
    commands += [Job("speed", name, ("x",))._asdict()] + [{"go": True}] * (name != "fails")
  out = io.StringIO()
  gpu_worker.work(gpu_speed.Setup(), io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), out)
  said = [json.loads(line) for line in out.getvalue().splitlines()]
  assert [next(iter(what)) for what in said] == [
    "ready", "begin", "compiled", "rows", "done", "rows", "done", "compiled", "broken"]
  assert said[0]["ready"]["platform"] == "cpu" and said[3]["rows"][0]["note"] == "without ['x']"
  assert "no such width" in said[5]["rows"][0]["note"] and said[-1]["broken"] == ["kernel", "illegal address"]


# The command ----------------------------------------------------------------------------------------------------------
def test_unknown_parts_are_refused(capsys):
  with pytest.raises(SystemExit):
    gpu.parse(["--parts", "checks,sped"])
  assert "sped; there are checks, ceilings, speed, masks, variants" in capsys.readouterr().err


@pytest.mark.parametrize("platform, capability, kind", [("cpu", "", "a CPU"), ("gpu", "8.0", "NVIDIA A100, 8.0")])
def test_another_device_is_refused_in_one_line(platform, capability, kind):
  reason = gpu.unfit({"platform": platform, "capability": capability, "header": {"Device": kind.split(",")[0]}})
  assert reason and "\n" not in reason
  assert reason.startswith("benchmarks.gpu needs an NVIDIA GPU of compute capability 9.0 (H100, H200) and JAX 0.11.2 or newer")
  assert f"this is {kind}" in reason and "--rehearse" in reason


def test_without_a_gpu_it_ends_at_once(tmp_path):
  with pytest.raises(SystemExit, match=r"^benchmarks.gpu needs an NVIDIA GPU .*; this is .*, \d+ cores"):
    gpu.main(["--parts", "checks", "--workers", "1", "--out", str(tmp_path / "x")])
  assert not list(tmp_path.iterdir())


def test_results_go_where_out_says(tmp_path, monkeypatch):
  monkeypatch.setenv("OUT", str(tmp_path))
  monkeypatch.setattr(gpu.machine, "clock", lambda: (1755.0, 700.0))
  run = gpu.Run(gpu.parse(["--rehearse"]), [], gpu_speed.Setup())
  device = {"platform": "gpu", "capability": "9.0", "slug": "nvidia-h200", "header": {"Device": "x", "Software": "y", "Date": "z"}}
  run.ready(device)
  run.deliver([Result.from_json(_row("512"))])
  assert json.loads((tmp_path / "gpu-rehearsal.json").read_text())["results"][0]["times"]["rounds"] == [1.0, 1.0]
  run = gpu.Run(gpu.parse(["--out", str(tmp_path / "own")]), [], gpu_speed.Setup())
  if jax.__version_info__ >= (0, 11, 2):
    run.ready(device)
    assert run.out == tmp_path / "own" and "Rehearsal" not in run.header
  else:
    with pytest.raises(SystemExit, match="JAX 0.11.2 or newer"):
      run.ready(device)


@pytest.mark.slow
def test_a_rehearsal_measures_and_writes_everything(tmp_path, capsys):
  pytest.importorskip("matplotlib")
  out = tmp_path / "gpu"
  argv = ["--rehearse", "--parts", "ceilings,speed,masks", "--seconds", "300", "--repeats", "3", "--case-seconds", "0.01",
          "--workers", "2", "--out", str(out)]
  assert gpu.main(argv) == 0
  printed = capsys.readouterr().out
  assert "  64  causal    256" in printed and printed.rstrip().endswith("0 of 0 checks passed, 0 refused")
  tree = json.loads(pathlib.Path(f"{out}.json").read_text())
  parts = {result["part"] for result in tree["results"]}
  assert parts == {"ceilings", "speed", "masks"} and tree["header"]["Rehearsal"]
  assert all(result["times"] for result in tree["results"])
  page = pathlib.Path(f"{out}.md").read_text()
  assert "## Masks, bias, one query" in page and pathlib.Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
