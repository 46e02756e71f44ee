"""A key-value cache of fixed capacity: the token at position p lives in slot p."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer


class Cache(NamedTuple):
  """What a layer remembers while decoding.

  Slots that were never written may hold anything, NaN included: a query at position p sees slots 0 to p only.
  """

  key: jax.Array  # [batch..., S, K, H]
  value: jax.Array  # [batch..., S, K, H]
  index: jax.Array  # int32 scalar: the slot of the next token, where a call gives no positions

  @classmethod
  def empty(cls, shape, dtype):
    """A cache with keys and values of `shape` `[batch..., S, K, H]`: S slots."""
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

  def next_positions(self, length):
    """Where the next `length` tokens go: int32 `[length]`."""
    return self.index + jnp.arange(length, dtype=jnp.int32)

  def append(self, key, value, positions=None):
    """Writes `[batch..., T, K, H]` at `positions` (`[batch..., T]` or `[T]`; None: behind what is there).

    A negative position is padding: its token is not written. The next call without positions goes on behind the
    largest of these.

    Returns:
      `(cache, full)`: the new cache, and which of the sequences `[batch...]` or `[]` had a token beyond the capacity.

    Raises:
      ValueError: the tokens cannot belong to this cache, or are known not to fit. Positions traced by jit are not
        known; then only `full` tells.
    """
    self._check(key, positions)
    length, capacity = key.shape[-3], self.key.shape[-3]
    key, value = key.astype(self.key.dtype), value.astype(self.value.dtype)
    if positions is None:
      # One contiguous write. Past the end it would be shifted back onto earlier slots: `full` reports it.
      at = lambda cached: (*(0,) * (cached.ndim - 3), self.index, 0, 0)
      put = lambda cached, new: jax.lax.dynamic_update_slice(cached, new, at(cached))
      index, full = self.index + length, self.index + length > capacity
    else:
      slots = jnp.where(positions < 0, capacity, positions)
      put = lambda cached, new: _scatter(cached, new, jnp.broadcast_to(slots, new.shape[:-2]))
      index, full = jnp.max(positions).astype(jnp.int32) + 1, jnp.any(positions >= capacity, axis=-1)
    return Cache(put(self.key, key), put(self.value, value), index), full

  def _check(self, key, positions):
    *batch, length, heads, width = key.shape
    *cached_batch, capacity, cached_heads, cached_width = self.key.shape
    if (batch, heads, width) != (cached_batch, cached_heads, cached_width):
      raise ValueError(f"The new keys have shape {key.shape} [batch..., T, K, H] and the cache {self.key.shape}; all "
                       "but T must agree: make the cache for this batch size.")
    positions = self.next_positions(length) if positions is None else positions
    too_many = length > capacity and f"{length} tokens in one call"
    if not isinstance(positions, Tracer) and positions.size and int(positions.max()) >= capacity:
      too_many = f"a token at position {int(positions.max())}"
    if too_many:
      raise ValueError(f"The cache has {capacity} slots and the call brings {too_many}; make the cache longer, or "
                       "empty it and start again.")


def _scatter(cached, new, slots):
  """`cached` `[batch..., S, K, H]` with `new` `[batch..., T, K, H]` at `slots` `[batch..., T]`; beyond S: dropped."""
  flat = lambda x: x.reshape(math.prod(slots.shape[:-1]), *x.shape[slots.ndim - 1:])
  put = jax.vmap(lambda old, at, rows: old.at[at].set(rows, mode="drop"))
  return put(flat(cached), flat(slots), flat(new)).reshape(cached.shape)
