"""The kernels for Hopper in the Mosaic GPU interpreter, with races found and memory that is NaN until it is written."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import gpu_topology, oracle

gpu_topology.require_jax()
from tests import gpu_cases  # noqa: E402
from tests.gpu_interpret import attention, interpret  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def split(built, traced):
  """(arguments of the compiled function, a function from them to `attention`'s keywords)."""
  moving = oracle.arrays_of(built)
  others = {name: x for name, x in built.kwargs.items() if name not in moving and name != "score_operands"}
  leaves, structure = jax.tree.flatten(others)
  arrays = {n: x for n, x in enumerate(leaves) if isinstance(x, np.ndarray) and traced}

  def keywords(moving, arrays):
    return oracle.gather_operands(moving) | structure.unflatten([arrays.get(n, x) for n, x in enumerate(leaves)])

  return (moving, arrays), keywords


def answer(walk, built, cotangents):
  """The kernels' `oracle.Answer`."""
  args, keywords = split(built, walk.traced)

  def run(moving, arrays, cotangents):
    result, pull = jax.vjp(lambda x: attention(**keywords(x, arrays), tiles=walk.tiles), moving)
    return *result, *pull(cotangents)

  with jax.default_matmul_precision(walk.precision) if walk.precision else contextlib.nullcontext():
    return oracle.Answer(*jax.tree.map(np.asarray, interpret(run, *args, cotangents)))


@pytest.mark.parametrize("walk", [pytest.param(walk, id=walk.name) for walk in gpu_cases.ALL])
def test_case(walk):
  built = walk.case.build()
  cotangents = oracle.draw_cotangents(built)
  ours = answer(walk, built, cotangents)
  for x in (ours.out, *ours.grads.values()):
    assert np.isfinite(x.astype(np.float64)).all()
  oracle.check(ours, built, cotangents)
