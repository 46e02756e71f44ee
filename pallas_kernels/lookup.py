"""Reading a small table by an index per score: what `table[bucket(q - k)]` becomes inside a TPU kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
LARGEST = 1024  # entries of a table; its gradient takes a pass over the tile for each of them


def take(table: Any, index: Any) -> Any:
  """`table[0, index]`: table `[1, n]`, index `[rows, columns]`, each 0 to n - 1; differentiable in the table."""
  n, columns = table.shape[1], index.shape[1]
  to_lanes = lambda x, fill: jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)), constant_values=fill)
  return _take(n, to_lanes(table, 0), to_lanes(index, 0))[:, :columns]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(n: int, table: Any, index: Any) -> Any:
  """Lanes of one register are gathered at a time: 128 columns from 128 entries."""
  groups = []
  for column in range(0, index.shape[1], LANES):
    here = index[:, column:column + LANES]
    found = jnp.zeros(here.shape, table.dtype)
    for first in range(0, table.shape[1], LANES):
      entries = jnp.broadcast_to(table[:, first:first + LANES], here.shape)
      local = jnp.clip(here - first, 0, LANES - 1)
      value = jnp.take_along_axis(entries, local, axis=1, mode="promise_in_bounds")
      found = value if first == 0 else jnp.where(here >= first, value, found)
    groups.append(found)
  return jnp.concatenate(groups, axis=1)


def _forward(n, table, index):
  return _take(n, table, index), (table, index)


def _backward(n, residuals, cotangent):
  """Entry by entry, the sum of the cotangents of the scores that read it."""
  table, index = residuals
  lane = lax.broadcasted_iota(jnp.int32, table.shape, 1)

  def entry(number, sums):
    read = jnp.where(index == number, cotangent, 0.0)
    total = jnp.sum(jnp.sum(read, axis=0, keepdims=True), axis=1, keepdims=True)
    return jnp.where(lane == number, total, sums)

  return lax.fori_loop(0, n, entry, jnp.zeros(table.shape, table.dtype)), None


_take.defvjp(_forward, _backward)
