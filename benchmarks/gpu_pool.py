"""Processes that compile side by side and measure one at a time, watched: one that hangs or dies takes no other with it."""

from __future__ import annotations

import collections
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from .gpu_results import Result, lost

TIME_WAS_UP = "the time was up"


class Job(NamedTuple):
  """A case of a part, without what hung or broke the device down in it before."""

  part: str
  name: str
  without: tuple[str, ...] = ()


class Limits(NamedTuple):
  """Seconds of silence after which a process counts as hung."""

  start: float = 120.0
  compile: float = 300.0
  measure: float = 60.0


LIMITS = Limits()


class Budget:
  """Each part may begin cases until its own seconds, and what the parts before it left over, are used up.

  Args:
    seconds: by part, in the order of the parts.
    clock: tells the time in seconds.
  """

  def __init__(self, seconds: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
    self.clock, self.start = clock, clock()
    ends, total = {}, 0.0
    for part, own in seconds.items():
      total += own
      ends[part] = total
    self.ends, self.total = ends, total

  def open(self, part: str) -> bool:
    return self.clock() - self.start < self.ends[part]

  def left(self) -> float:
    """Seconds until the end of the last part."""
    return max(0.0, self.total - (self.clock() - self.start))


class Silent(TimeoutError):
  """A process said nothing for too long."""


class Died(RuntimeError):
  """A process ended; the message is the end of what it printed."""


class Process(Protocol):  # hashable
  """Who compiles and measures; see `gpu_worker` for what is said."""

  def send(self, what: Mapping[str, Any]) -> None: ...
  def receive(self, seconds: float) -> dict[str, Any]: ...  # raises Silent, Died
  def close(self) -> None: ...


class Worker:
  """`python -m benchmarks.gpu_worker`; `setup` is handed to it as JSON, and that share of the device's memory."""

  def __init__(self, setup: Mapping[str, Any], memory_share: float):
    self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed in `close`
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": f"{memory_share:.3f}"}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name of the same
    self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(setup)], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=self.log, env=environment)
    self.unread = b""

  def send(self, what: Mapping[str, Any]) -> None:
    assert self.process.stdin is not None
    try:
      self.process.stdin.write((json.dumps(what) + "\n").encode())
      self.process.stdin.flush()
    except BrokenPipeError:
      raise self._died() from None

  def receive(self, seconds: float) -> dict[str, Any]:
    assert self.process.stdout is not None
    end = time.monotonic() + seconds
    while b"\n" not in self.unread:
      ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
      if not ready:
        raise Silent(f"nothing was heard for {seconds:.0f} s")
      data = os.read(self.process.stdout.fileno(), 1 << 16)
      if not data:
        raise self._died()
      self.unread += data
    line, _, self.unread = self.unread.partition(b"\n")
    return json.loads(line)

  def _died(self) -> Died:
    code = self.process.wait()
    self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 2000))
    lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
    return Died(f"the process ended with status {code}: {' / '.join(lines[-3:])}")

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
    self.log.close()


class Pool:
  """Runs jobs in the order given, with `count` processes.

  Args:
    start: starts a process, which first says `{"ready": …}`.
    deliver: is given results as they come, one call at a time.
    ready: is given what the first process says about the device; may raise to end everything.
  """

  def __init__(self, jobs: Sequence[Job], budget: Budget, start: Callable[[], Process], count: int,
               deliver: Callable[[list[Result]], None], ready: Callable[[Mapping[str, Any]], None], limits: Limits = LIMITS):
    self.jobs, self.budget, self.start, self.count, self.limits = collections.deque(jobs), budget, start, count, limits
    self.deliver, self.ready = deliver, ready
    self.turn, self.state = threading.Lock(), threading.Lock()
    self.processes: set[Process] = set()
    self.over = False

  def run(self) -> None:
    """Returns when all jobs are done, or the time is up."""
    try:
      first = self._begin()
      threads = [threading.Thread(target=self._serve, args=(first if n == 0 else None,), daemon=True) for n in range(self.count)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join(self.budget.left())
    finally:
      with self.state:
        self.over = True
        for process in self.processes:
          process.close()
    for thread in threads:
      thread.join()
    self._deliver([lost(job.part, job.name, TIME_WAS_UP) for job in self.jobs])

  def _begin(self) -> Process:
    process = self.start()
    with self.state:
      self.processes.add(process)
      if self.over:
        process.close()
    self.ready(process.receive(self.limits.start)["ready"])
    return process

  def _serve(self, process: Process | None) -> None:
    """One thread: job after job, in a process that is started again when it has to be."""
    while job := self._take():
      try:
        process = process or self._begin()
      except (Silent, Died, OSError, ValueError) as error:
        self._lose(job, f"no process for it: {error}")
        return
      if not self._do(process, job):
        with self.state:
          self.processes.discard(process)
        process.close()
        process = None

  def _take(self) -> Job | None:
    with self.state:
      while self.jobs and not self.over:
        job = self.jobs.popleft()
        if self.budget.open(job.part):
          return job
        self.deliver([lost(job.part, job.name, TIME_WAS_UP)])
    return None

  def _do(self, process: Process, job: Job) -> bool:
    """Whether the process is still good after it."""
    begun: list[str] = []
    try:
      process.send(job._asdict())
      said = self._listen(process, job, begun, self.limits.compile)
      if said == "compiled":
        with self.turn:
          go = self.budget.open(job.part)
          if not go:
            self._lose(job)
          process.send({"go": go})
          said = self._listen(process, job, begun, self.limits.measure)
      return said == "done"
    except (Silent, Died, OSError, ValueError) as error:
      self._again(job, begun[-1] if begun else "", str(error))
      return False

  def _listen(self, process: Process, job: Job, begun: list[str], seconds: float) -> str:
    """Until "compiled", "done" or "broken", which it returns."""
    while True:
      said = process.receive(seconds)
      if "begin" in said:
        begun.append(said["begin"])
      elif "rows" in said:
        self._deliver([Result.from_json(row) for row in said["rows"]])
      elif "broken" in said:
        self._again(job, *said["broken"])
        return "broken"
      else:
        return next(word for word in ("compiled", "done") if word in said)

  def _again(self, job: Job, culprit: str, why: str) -> None:
    """What hung is left out the next time; where that is not known, or did not help, the case is lost."""
    again = culprit and culprit not in job.without and len(job.without) < 8
    self._lose(job, f"{culprit or 'compiling'}: {why}{'; the case is tried again without it' * bool(again)}")
    if again:
      with self.state:
        self.jobs.appendleft(job._replace(without=(*job.without, culprit)))

  def _lose(self, job: Job, why: str = "") -> None:
    """A failure, unless it comes of the time being up."""
    failed = bool(why) and not self.over
    self._deliver([lost(job.part, job.name, why if failed else TIME_WAS_UP, failed)])

  def _deliver(self, results: list[Result]) -> None:
    with self.state:
      self.deliver(results)
