"""Arrays on several devices: what works, and a clear word about what does not."""

import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np, jflash
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
q = jax.random.normal(jax.random.key(0), (4, 40, 2, 8))
loss = lambda q: (jflash.attention(q, q, q, is_causal=True)**2).sum()
want = jax.grad(loss)(q)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.%s,))
"""
WORKS = SCRIPT % "Auto" + """
sharded = jax.device_put(q, NamedSharding(mesh, P("data")))
np.testing.assert_allclose(jax.jit(jax.grad(loss))(sharded), want, rtol=1e-5, atol=1e-5)
f = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
np.testing.assert_allclose(jax.jit(f)(sharded), want, rtol=1e-5, atol=1e-5)
print("right")
"""
VARYING = SCRIPT % "Auto" + """
try:
  jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=P("data"), out_specs=P("data")))(q)
except NotImplementedError as error:
  print(error)
"""
EXPLICIT = SCRIPT % "Explicit" + """
with jax.set_mesh(mesh):
  try:
    jax.jit(loss)(jax.device_put(q, NamedSharding(mesh, P("data"))))
  except NotImplementedError as error:
    print(error)
"""


@pytest.mark.parametrize("script, answer", [
    (WORKS, "right"), (VARYING, "check_vma=False"), (EXPLICIT, "explicit mesh axes")], ids=["works", "varying", "explicit"])
def test_four_devices(script, answer, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert answer in done.stdout, done.stderr[-2000:]
