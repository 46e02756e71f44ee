"""Which backend is taken on which machine, and why not the others: on any machine something that works.

Machines are described by what `_gpu` says of them. The kernels of "mosaic_gpu" and cuDNN are stand-ins.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _backends, _gpu, _plan, _xla
from tests import cudnn_stand_in


@dataclasses.dataclass(frozen=True)
class Machine:
  """What there is, and what is installed."""

  platform: str = "gpu"
  kind: str = "NVIDIA H100 80GB HBM3"
  compute: str | None = "9.0"
  jax: str = "0.11.2"
  cudnn: int | None = 91400
  plugin: bool = True
  pallas: bool = True  # whether Pallas Mosaic GPU can be imported


A100 = Machine(kind="NVIDIA A100-SXM4-40GB", compute="8.0")
CPU = Machine("cpu", "cpu", None, cudnn=None)
OLD = {"jax": "0.10.2"}


@pytest.fixture
def on(monkeypatch):
  """Makes `jflash` believe that it is on a machine; "mosaic_gpu" computes as plain JAX does."""

  def pretend(machine):
    cudnn_stand_in.install(monkeypatch, version=machine.cudnn)
    device = types.SimpleNamespace(platform=machine.platform, device_kind=machine.kind)
    if machine.compute is not None:
      device.compute_capability = machine.compute
    monkeypatch.setattr(_gpu, "device", lambda: device)
    monkeypatch.setattr(_gpu, "plugin", lambda: machine.plugin)
    monkeypatch.setattr(_plan, "platform", lambda: machine.platform)
    monkeypatch.setattr(jax, "__version__", machine.jax)
    monkeypatch.setattr(jax, "__version_info__", tuple(map(int, machine.jax.split("."))))
    pallas = types.ModuleType("jax.experimental.pallas.mosaic_gpu") if machine.pallas else None
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", pallas)  # None makes the import fail

  kernels: Any = types.ModuleType("jflash._mosaic_gpu")
  kernels.supports, kernels.forward, kernels.cotangent = lambda problem: None, _xla.forward, _xla.cotangent
  monkeypatch.setitem(sys.modules, "jflash._mosaic_gpu", kernels)
  plan = lambda problem: dataclasses.replace(_plan.plan_xla(problem), interpret=_plan.interpreting())
  monkeypatch.setattr(_plan, "plan_mosaic_gpu", plan, raising=False)
  pretend.kernels = kernels  # type: ignore[attr-defined]
  return pretend


def draw(dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((1, 12, 4, 16), (1, 20, 2, 16), (1, 20, 2, 16)))


NO_CUDNN = r"cuDNN is not found: pip install -U \"jax\[cuda13\]\""
OLD_JAX = r"it needs JAX >= 0.11.2 and this is 0.10.2: pip install -U jax, which needs Python >= 3.12"
NOT_HOPPER = r"its kernels are for Hopper \(sm_90\) and this is {}; use 'cudnn' .*, or 'xla'; `with jflash.interpret\(\):` runs"

HOPPER = Machine()
NOT_YET = "its kernels have been interpreted and compiled, but not run on a GPU yet; name it to run them"

# The machine, what is taken, and why not "mosaic_gpu" and "cudnn".
MACHINES = {
    "no plugin": (dataclasses.replace(CPU, plugin=False), "xla",
                  r"needs an NVIDIA GPU and this is a cpu; .*pip install -U \"jax\[cuda13\]\"; `with jflash.interpret",
                  r"needs an NVIDIA GPU and this is a cpu; .*pip install -U \"jax\[cuda13\]\"; use 'xla'"),
    "a plugin and no device": (CPU, "xla", r"needs an NVIDIA GPU and this is a cpu; `with jflash.interpret\(\):` runs its kernels",
                               "needs an NVIDIA GPU and this is a cpu; use 'xla'"),
    "AMD": (Machine(kind="AMD Instinct MI300X", compute="gfx942", cudnn=None), "xla",
            "needs an NVIDIA GPU and this is AMD Instinct MI300X; `with", "needs an NVIDIA GPU and this is AMD Instinct MI300X; use 'xla'"),
    "Hopper": (HOPPER, "cudnn", NOT_YET, None),
    "Hopper without cuDNN": (Machine(cudnn=None), "xla", NOT_YET, NO_CUDNN),
    "Hopper with an old JAX": (Machine(**OLD), "cudnn", OLD_JAX, None),
    "Hopper with an old JAX and without cuDNN": (Machine(**OLD, cudnn=None), "xla", OLD_JAX, NO_CUDNN),
    "Hopper without Pallas": (Machine(pallas=False), "cudnn", "Pallas Mosaic GPU cannot be imported, .*; pip install -U jax jaxlib", None),
    "Ampere": (A100, "cudnn", NOT_HOPPER.format(r"NVIDIA A100-SXM4-40GB \(sm_80\)"), None),
    "Ampere with an old JAX": (dataclasses.replace(A100, **OLD), "cudnn", NOT_HOPPER.format("NVIDIA A100.*"), None),
    "Ampere without cuDNN": (dataclasses.replace(A100, cudnn=None), "xla", NOT_HOPPER.format("NVIDIA A100.*"), NO_CUDNN),
    "Ampere with a broken cuDNN": (dataclasses.replace(A100, cudnn=91001), "xla", NOT_HOPPER.format("NVIDIA A100.*"),
                                   "cuDNN 9.10.0 and 9.10.1 compute attention wrongly: pip install -U nvidia-cudnn"),
    "Ada": (Machine(kind="NVIDIA L4", compute="8.9"), "cudnn", NOT_HOPPER.format(r"NVIDIA L4 \(sm_89\)"), None),
    "Turing": (Machine(kind="Tesla T4", compute="7.5"), "xla", NOT_HOPPER.format(r"Tesla T4 \(sm_75\)"),
               r"needs Ampere \(sm_80\) or newer and this is Tesla T4 \(sm_75\); use 'xla'"),
    "Blackwell": (Machine(kind="NVIDIA B200", compute="10.0"), "cudnn", NOT_HOPPER.format(r"NVIDIA B200 \(sm_100\)"), None),
    "Blackwell at home": (Machine(kind="NVIDIA GeForce RTX 5090", compute="12.0"), "cudnn", NOT_HOPPER.format(".*sm_120.*"), None),
    "Blackwell without cuDNN": (Machine(kind="NVIDIA B200", compute="10.0", cudnn=None), "xla", NOT_HOPPER.format(".*"), NO_CUDNN),
    "a GPU that says nothing of itself": (Machine(kind="NVIDIA", compute=None), "xla", "this is NVIDIA; ", "this is NVIDIA; ")}


@pytest.mark.parametrize("machine, taken, mosaic, cudnn", MACHINES.values(), ids=MACHINES.keys())
def test_something_that_works_is_taken_and_the_rest_is_explained(machine, taken, mosaic, cudnn, on):
  q, k, v = draw()
  want = jflash.attention(*(x.astype(jnp.float32) for x in (q, k, v)), is_causal=True, implementation="xla")
  on(machine)
  why = jflash.explain(q, k, v, is_causal=True)
  assert why.backend == taken
  for name, reason in (("mosaic_gpu", mosaic), ("cudnn", cudnn)):
    assert (name in why.passed_over) == (name != taken)
    if name != taken:
      assert re.search(reason, why.passed_over[name]) and f"not {name}" in str(why)
      if reason != NOT_YET:
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot compute this: .*{reason}"):
          jflash.attention(q, k, v, is_causal=True, implementation=name)
  np.testing.assert_allclose(np.asarray(jflash.attention(q, k, v, is_causal=True), np.float32), want, atol=0.03)


def test_the_order():
  assert _backends.NAMES == ("tpu", "mosaic_gpu", "cudnn", "xla")


def test_kernels_that_cannot_give_way_to_cudnn(on):
  on(Machine())
  on.kernels.supports = lambda problem: "it is Monday"
  why = jflash.explain(*draw())
  assert (why.backend, why.passed_over["mosaic_gpu"]) == ("cudnn", "it is Monday")
  assert jflash.explain(*draw("float32")).backend == "xla", "nor can cuDNN"


def test_kernels_that_cannot_be_imported_give_way_too(on, monkeypatch):
  on(Machine())
  monkeypatch.setitem(sys.modules, "jflash._mosaic_gpu", None)
  why = jflash.explain(*draw())
  assert why.backend == "cudnn" and why.passed_over["mosaic_gpu"].startswith("it cannot be imported, ModuleNotFoundError")


# The interpreter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine, taken", [(CPU, "xla"), (A100, "cudnn"), (HOPPER, "cudnn")], ids=["CPU", "Ampere", "Hopper"])
def test_the_interpreter_is_taken_only_by_name(machine, taken, on):
  on(machine)
  with jflash.interpret():
    why = jflash.explain(*draw())
    named = jflash.explain(*draw(), implementation="mosaic_gpu")
    out = jflash.attention(*draw(), implementation="mosaic_gpu")
  assert why.backend == taken
  for name in ("tpu",) if machine is HOPPER else ("tpu", "mosaic_gpu"):
    assert why.passed_over[name] == "it would run in the Pallas interpreter, which is for tests; name it to do so"
  assert named.backend == "mosaic_gpu" and named.interpreted
  assert jnp.isfinite(out).all()


def test_an_old_jax_does_not_interpret(on):
  on(dataclasses.replace(CPU, **OLD))
  with jflash.interpret():
    why = jflash.explain(*draw())
    with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu' cannot compute this: " + OLD_JAX):
      jflash.attention(*draw(), implementation="mosaic_gpu")
  assert why.backend == "xla" and why.passed_over["mosaic_gpu"] == OLD_JAX


def test_cudnn_is_not_interpreted(on):
  on(CPU)
  with jflash.interpret(), pytest.raises(NotImplementedError, match="implementation='cudnn' cannot compute this: it needs an NVIDIA GPU"):
    jflash.attention(*draw(), implementation="cudnn")


# The facts ------------------------------------------------------------------------------------------------------------


def test_here():
  """Whatever this machine is, it is described."""
  assert _gpu.device() in jax.local_devices() and (_gpu.capability() is None) == ("(sm_" not in _gpu.name())
  assert isinstance(_gpu.plugin(), bool)
  for fact in (_gpu.without_mosaic(), _gpu.without_cudnn()):
    assert fact is None or "pip install" in fact


def test_the_default_device_is_asked():
  cpu = jax.devices("cpu")[0]
  for chosen in (cpu, "cpu"):
    with jax.default_device(chosen):
      assert _gpu.device() == cpu
      assert _gpu.capability() is None


@pytest.mark.parametrize("error", [RuntimeError("no GPU"), AssertionError()])
def test_a_backend_that_fails_is_no_device(error, monkeypatch):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(jax, "local_devices", fail)
  assert _gpu.device() is None and _gpu.capability() is None and _gpu.name() == "no device"


@pytest.mark.parametrize("found, version", [
    (types.SimpleNamespace(cudnn_get_version=lambda: 91200), 91200), (None, None), (types.SimpleNamespace(), None),
    (types.SimpleNamespace(cudnn_get_version=lambda: exec("raise RuntimeError('cuDNN not found.')")), None)])
def test_cudnn_version(found, version, monkeypatch):
  from jax._src import lib
  monkeypatch.setattr(lib, "cuda_versions", found)
  assert _gpu.cudnn_version() == version
  monkeypatch.delattr(lib, "cuda_versions")
  assert _gpu.cudnn_version() is None
