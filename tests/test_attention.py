"""Attention's answer and all of its gradients, by every backend, for every case of the table."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import pytest

from tests import function_cases, mask_cases, oracle  # noqa: F401  (adds to the table)
from tests.backends import BACKENDS, attention
from tests.cases import CASES

WALK = [pytest.param(case, backend, id=f"{backend}-{case.name}")
        for case in CASES for backend in BACKENDS if case.only is None or backend in case.only]


def test_names_are_unique():
  names = [case.name for case in CASES]
  assert len(names) == len(set(names))


@functools.lru_cache(maxsize=1)  # the backends follow each other
def judged(case):
  built = case.build()
  cotangents = oracle.draw_cotangents(built)
  return built, cotangents, oracle.judge(built, cotangents)


@pytest.mark.parametrize("case, backend", WALK)
def test_case(case, backend):
  built, cotangents, verdict = judged(case)
  moving = oracle.arrays_of(built)
  others = {name: x for name, x in built.kwargs.items() if name not in moving and name != "score_operands"}
  with jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext():
    ours = oracle.answer(jax.jit(lambda **x: attention(backend, **x, **others)), moving, cotangents)
  for x in (ours.out, *ours.grads.values()):
    assert np.isfinite(x.astype(np.float64)).all()
  oracle.check(ours, built, cotangents, verdict)
