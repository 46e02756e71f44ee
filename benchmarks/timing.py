"""Fair times on a noisy machine: candidates take turns, so what slows the machine down slows all of them."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

SAMPLE = 5e-3  # seconds; calls shorter than this are timed several at once, or the clock and the dispatch would show
HOST_BOUND = 0.9  # share of the time after which a device that was given work early enough has hardly begun


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds per call, one entry a round; entry i of two candidates was measured side by side.

  `cpu` are the CPU seconds, of all threads of this process, that passed meanwhile; `queued` the seconds until the calls of a
  round had been handed over, per call; 0 on a CPU.
  """

  rounds: tuple[float, ...]
  cpu: tuple[float, ...] = ()
  queued: tuple[float, ...] = ()

  @property
  def median(self) -> float:
    return statistics.median(self.rounds)

  @property
  def spread(self) -> float:
    """Half the distance of the quartiles, as a share of the median."""
    low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
    return (high - low) / 2 / self.median

  @property
  def cores(self) -> float | None:
    """How many were busy for this process, on average: fewer than a call could use where others wanted them too."""
    return sum(self.cpu) / sum(self.rounds) if self.cpu else None

  @property
  def host_bound(self) -> bool:
    """Whether an accelerator waited for its host: handing the calls over took nearly all the time."""
    return bool(self.queued) and statistics.median(q / t for q, t in zip(self.queued, self.rounds)) > HOST_BOUND

  def speedup(self, base: "Times") -> float:
    """How many times faster than `base`: the median of the rounds' ratios, which a slow spell leaves alone."""
    return statistics.median(b / a for a, b in zip(self.rounds, base.rounds))


def interleave(calls: Mapping[str, Callable[[], Any]], *, repeats: int, seconds: float, sample: float = SAMPLE) -> dict[str, Times]:
  """Times the calls in turns, A B A B …, after two calls each to warm up.

  Every turn begins with a call that is not timed. A CPU gives the memory of a call back when its result is out already, which takes
  a sixth of the time of a call that asked for 256 MiB: timed at once, the next candidate would pay for it, and for caches that
  hold nothing of its own.

  Args:
    calls: name -> function of no arguments that starts the work and returns arrays.
    repeats: rounds at most.
    seconds: what all rounds together may take; slow calls get fewer rounds, but three at least.
    sample: seconds of calls, 100 at most, that are timed at once.

  Returns:
    name -> `Times`, all with the same number of rounds.
  """
  estimates = {}
  for name, call in calls.items():
    _elapsed(call, 1)
    estimates[name] = max(_elapsed(call, 1)[0], 1e-7)
  counts = {name: min(100, math.ceil(sample / estimate)) for name, estimate in estimates.items()}
  one_round = sum((1 + counts[name]) * estimates[name] for name in calls)
  rounds = max(3, min(repeats, int(seconds / max(one_round, 1e-7))))
  taken = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      _elapsed(call, 1)
      taken[name].append([seconds / counts[name] for seconds in _elapsed(call, counts[name])])
  return {name: Times(*map(tuple, zip(*values))) for name, values in taken.items()}


def _elapsed(call: Callable[[], Any], count: int) -> tuple[float, float, float]:
  """Seconds, CPU seconds, and seconds until all had been handed over, of `count` calls."""
  # An accelerator runs what it is given in order: when the last call is done, all are. The CPU may run several at once,
  # so there each call is awaited, which costs little.
  in_order = jax.default_backend() != "cpu"
  start, cpu = time.perf_counter(), time.process_time()
  for _ in range(count - 1):
    result = call()
    if not in_order:
      jax.block_until_ready(result)
  result = call()
  queued = time.perf_counter() - start if in_order else 0.0
  jax.block_until_ready(result)
  return time.perf_counter() - start, time.process_time() - cpu, queued
