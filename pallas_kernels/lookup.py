"""Reading a small table by an index per score: what `table[bucket(q - k)]` becomes inside a TPU kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
LARGEST = 1024  # entries of a table; its gradient takes a pass over the tile for each of them


@jax.custom_vjp
def take(table: Any, index: Any) -> Any:
  """`table[0, index]`: table `[1, n]`, index `[rows, columns]`, each 0 to n - 1; differentiable in the table.

  Lanes of one register are gathered at a time: 128 columns from 128 entries.
  """
  to_lanes = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
  entries, places, groups = to_lanes(table), to_lanes(index), []
  for column in range(0, places.shape[1], LANES):
    here = places[:, column:column + LANES]
    found = jnp.zeros(here.shape, table.dtype)
    for first in range(0, entries.shape[1], LANES):
      some = jnp.broadcast_to(entries[:, first:first + LANES], here.shape)
      value = jnp.take_along_axis(some, jnp.clip(here - first, 0, LANES - 1), axis=1, mode="promise_in_bounds")
      found = value if first == 0 else jnp.where(here >= first, value, found)
    groups.append(found)
  return jnp.concatenate(groups, axis=1)[:, :index.shape[1]]


def _forward(table, index):
  return take(table, index), (table, index)


def _backward(residuals, cotangent):
  """Entry by entry, the sum of the cotangents of the scores that read it."""
  table, index = residuals
  lane = lax.broadcasted_iota(jnp.int32, table.shape, 1)

  def entry(number, sums):
    read = jnp.where(index == number, cotangent, 0.0)
    total = jnp.sum(jnp.sum(read, axis=0, keepdims=True), axis=1, keepdims=True)
    return jnp.where(lane == number, total, sums)

  return lax.fori_loop(0, table.shape[1], entry, jnp.zeros(table.shape, table.dtype)), None


take.defvjp(_forward, _backward)
