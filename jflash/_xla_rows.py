"""Rows that meet all of their keys in one tile, in plain JAX: a softmax without the online statistics.

It is written such that XLA's CPU compiler, from JAX 0.11 on, makes one library call of it. A call grows around a reduction, over
what has thousands of elements and one use. So a maximum that is used twice is computed twice, of scores that an optimization
barrier tells apart; and reductions start such that rows which see nothing come out right, as a `where` on row statistics would end
the call.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import softmax


def normalised(s: Any, unit: float) -> Any:
  """exp(unit · s) over its sum by row, 0 for rows that see nothing; nothing is left to compute lse from."""
  p = softmax.powers(unit)(s, _highest(s))
  return p / _reduced(p, jnp.finfo(p.dtype).tiny, lax.add)  # where a row sees something, the sum is 1 and more


def state(s: Any, unit: float) -> tuple[Any, Any, Any]:
  """(m, total, p) of the scores, as `softmax.advance` gives them to rows that have seen nothing before."""
  apart, s = lax.optimization_barrier((s, s))
  p = softmax.powers(unit)(s, _highest(s))
  total = jnp.sum(p, axis=-1, keepdims=True)
  return jnp.where(total == 0, -softmax.INF, _highest(apart)), total, p


def _highest(s: Any) -> Any:
  return _reduced(s, jnp.finfo(s.dtype).min, lax.max)


def _reduced(x: Any, start: Any, by: Any) -> Any:
  """`[..., rows, columns]` -> `[..., rows, 1]`."""
  if x.shape[-1] == 1:  # XLA would leave the start out
    return by(x, jnp.full_like(x, start))
  return lax.reduce(x, np.asarray(start, x.dtype), by, (x.ndim - 1,))[..., None]
