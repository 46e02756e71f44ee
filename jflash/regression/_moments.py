r"""One pass of attention over the data: means of values under the kernel's weights, and the sum of those weights.

With u = x_query / σ, k = x / σ and weights s, softmax attention with scores -|u - k|²/2 + log s is the Nadaraya-Watson estimate:

    out = Σ_j w_j v_j,    w_j = s_j exp(-|u - k_j|²/2) / exp(lse),    exp(lse) = Σ_j s_j exp(-|u - k_j|²/2).

In the form q·k it has scale 1/σ², key bias -|k|²/2σ², and no term of the query's norm, which cancels. That form loses the digits
that |u| and |k| share, so up to `_check.DIRECT` coordinates are subtracted directly (`products.Distance`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import products, schedule

from .. import _autodiff, _backends, _plan, masks
from .._logits import Logits
from .._problem import Problem
from . import _check, _prune
from ._points import Request


class Moments(NamedTuple):
  """Of m queries, for the kernel itself and, where asked for, for its square (weights w², half the bandwidth's square)."""

  mean: Any  # [kernels, m, E]
  log_sum: Any  # [m], log Σ s exp(-|u - k|²/2)
  log_square: Any  # [m], log Σ w², w the weights that sum to one; None if it was not asked for
  visited: Any  # the share of tiles that were computed


def moments(queries: Any, keys: Any, values: Any, weight: Any, tol: Any, request: Request) -> Moments:
  """Attends from `queries [m, d]` to `keys [n, d]`, both in bandwidths, with `values [n, E]`.

  Args:
    weight: `[n]`, or None for ones.
    tol: the share of each query's weights that may be skipped, or None.
    request: with `stats`, the squared kernel is attended with too.
  """
  log_weight = None if weight is None else log_or_minus_inf(weight)
  mask = ~masks.Window(0, 0) if request.exclude_self else None
  kernels = 2 if request.stats else 1
  problem, rest = _problem(queries, keys, values, log_weight, mask, kernels)
  backend, _ = _backends.select(problem, request.implementation)
  back = None
  if tol is not None:
    m, n = queries.shape[0], keys.shape[0]
    size = _plan.finest_blocks(backend.name, m, n)
    order = _prune.order(jax.lax.stop_gradient(keys), size)
    query_order = order if request.same else _prune.order(jax.lax.stop_gradient(queries), size)
    keys, values, queries = keys[order], values[order], queries[query_order]
    log_weight = None if log_weight is None else log_weight[order]
    table = _prune.kept(*jax.lax.stop_gradient((queries, keys, log_weight)), size, tol, request.exclude_self)
    skip = _prune.Kept(table[None, None, None, None], (size, size))
    problem, rest = _problem(queries, keys, values, log_weight, skip if mask is None else skip & mask, kernels)
    back = jnp.zeros(m, np.int32).at[query_order].set(jnp.arange(m, dtype=np.int32))
  plan = backend.plan(problem)
  visits = _plan.make_schedule(problem, plan)
  out, lse = _autodiff.attend(backend.name, _plan.settle(plan, visits), problem, visits)
  visited = jnp.mean(jnp.asarray(visits.kinds) != schedule.EMPTY, dtype=lse.dtype)
  mean, lse = out[0].swapaxes(0, 1), lse[0].T  # [kernels, m, E], [kernels, m]
  if back is not None:
    mean, lse, rest = mean[:, back], lse[:, back], rest[back]
  return Moments(mean, lse[0] - rest, lse[1] - 2 * lse[0] if request.stats else None, visited)


def log_or_minus_inf(weight: Any) -> Any:
  """log s; a weight of 0 leaves a point out, and has no derivative."""
  return jnp.where(weight > 0, jnp.log(jnp.where(weight > 0, weight, 1.0)), -jnp.inf)


def _problem(queries: Any, keys: Any, values: Any, log_weight: Any, mask: Any, kernels: int) -> tuple[Problem, Any]:
  """The attention problem, and what the kernel's lse `[m]` is too large by."""
  powers = np.arange(1, kernels + 1, dtype=queries.dtype)  # the exponents of the kernel, one a head
  if queries.shape[1] <= _check.DIRECT:
    lo, hi = (jax.lax.stop_gradient(f(keys, axis=0)) for f in (jnp.min, jnp.max))
    foot = jnp.clip(queries, lo, hi)
    left = queries - foot
    q, k = jnp.concatenate([foot, left], axis=1), jnp.concatenate([keys, jnp.zeros_like(keys)], axis=1)
    product, bias, rest = products.Distance, log_weight, jnp.sum(left**2, axis=1) / 2
  else:
    q, k, product = queries, keys, products.Dot
    norm = -jnp.sum(keys**2, axis=1) / 2
    bias, rest = norm if log_weight is None else norm + log_weight, jnp.sum(queries**2, axis=1) / 2
  scale = 1.0 if kernels == 1 else jnp.asarray(powers).reshape(1, -1, 1, 1)
  if bias is not None:
    bias = bias * powers[None, :, None, None]  # [1, kernels, 1, n]
  logits = Logits(scale, bias, mask=mask)
  q = jnp.broadcast_to(q[None, :, None, :], (1, q.shape[0], kernels, q.shape[1]))
  return Problem(q, k[None, :, None, :], values[None, :, None, :], logits, product), rest
