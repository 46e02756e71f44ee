"""The environment of the tests, set before anything imports jax; what the user has set already stays."""

import os


def _threads_per_worker() -> int:
  """Each xdist worker's share of the cores, but at least two: with one thread a host callback can wait for itself."""
  workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
  return max(2, (os.cpu_count() or 2) // workers)


_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  # XLA's CPU client reads the size of its thread pool from here.
  "NPROC": str(_threads_per_worker()),
  # libtpu, which is here for its compiler: do not ask the cloud which TPU this is, take any host as good, and let
  # several processes load it at once (tests/tpu_topology.py).
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

for _name, _value in _ENVIRONMENT.items():
  os.environ.setdefault(_name, _value)
