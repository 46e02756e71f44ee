"""The environment of the tests, set before anything imports jax; what the user has set already stays."""

import collections
import os


def _threads_per_worker() -> int:
  """Each xdist worker's share of the cores, but more than an interpreted GPU kernel has warpgroups.

  Where one of those waits for another in a host callback, it keeps its thread; with as few as two, all threads may wait.
  """
  workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
  return max(8, (os.cpu_count() or 2) // workers)


os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU client reads the size of its thread pool from here.
os.environ.setdefault("NPROC", str(_threads_per_worker()))
# libtpu is here for its compiler (tests/tpu_topology.py), and several processes load it at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
if "tpu" not in os.environ["JAX_PLATFORMS"]:  # a real one describes itself; otherwise do not ask the cloud which it is
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser):
  parser.addoption("--one-in", type=int, default=1, metavar="N",
                   help="one in N of each file's tests, the first, the N+1st, …; those of GPU kernels all")


@pytest.hookimpl(trylast=True)  # of what the other options have left
def pytest_collection_modifyitems(config, items):
  seen, kept, others = collections.Counter(), [], []
  for item in items:
    gpu = item.get_closest_marker("gpu") is not None
    (kept if gpu or seen[item.path] % config.option.one_in == 0 else others).append(item)
    seen[item.path] += not gpu
  items[:] = kept
  if others:
    config.hook.pytest_deselected(items=others)


def _memory_maps() -> int:
  """How many regions of memory this process has mapped; 0 where the system does not say."""
  try:
    with open("/proc/self/maps", "rb") as lines:
      return sum(1 for _ in lines)
  except OSError:
    return 0


@pytest.fixture(autouse=True)
def _forget_compiled_functions():
  """What XLA compiles for the CPU stays mapped, and Linux aborts a process that maps more than 65,530 regions."""
  yield
  if _memory_maps() > 20_000:
    jax.clear_caches()
