"""Dropout whose bits are a pure function of key, batch, head, query position and key position.

Every query and every key of every head gets a word by Threefry (Salmon et al., SC 2011), a strong hash; they cost as much memory
as lse. A score's bit is the mix of its query's and its key's word, a handful of operations that every tile repeats wherever it is
computed: forward, backward, in any tile size, on any backend or shard. No array of size T·S exists.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._mask import Sizes
from ._pytree import pytree


@pytree
class Dropout:
  """Keeps each weight with probability 1 - rate, and divides what it keeps by that."""

  rate: float
  query_words: Any  # int32 [B, N, T, 1]
  key_words: Any  # int32 [B, N, 1, S]

  def on_tile(self, weights: Any) -> Any:
    """A tile of weights, or of what multiplies them, with 0 where it is dropped."""
    return jnp.where(self.kept(), weights * (1 / (1 - self.rate)), 0.0)

  def kept(self) -> Any:
    """Which weights of a tile are kept."""
    x = self.query_words ^ self.key_words
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):  # the mixer "lowbias32" of C. Wellons' hash-prospector
      x = (x ^ lax.shift_right_logical(x, np.int32(shift))) * np.uint32(factor).astype(np.int32)
    x = x ^ lax.shift_right_logical(x, np.int32(15))
    return lax.shift_right_logical(x, np.int32(1)) >= np.int32(min(round(self.rate * 2**31), 2**31 - 1))


def bind(rate: float, key: Any, sizes: Sizes) -> Dropout:
  """The words of a problem, for a PRNG key."""
  batch, head, query, column = sizes.numbers()
  of_key = batch if sizes.key_batch_ids is None else jnp.asarray(sizes.key_batch_ids)
  return Dropout(rate, _words(key, batch, head, 0, query), _words(key, of_key, head, 1, column))


def _words(key: Any, batch: Any, head: Any, side: int, position: Any) -> Any:
  data = key if jnp.issubdtype(key.dtype, jnp.unsignedinteger) else jax.random.key_data(key)
  state = data[0], data[1]
  for n in range(2, data.size, 2):  # keys of other generators have more than two words
    state = _threefry(state, data[n], data[n + 1])
  first, _ = _threefry(_threefry(state, batch, head), np.uint32(side), position)
  return lax.bitcast_convert_type(first, np.int32)


def _threefry(key: tuple[Any, Any], a: Any, b: Any) -> tuple[Any, Any]:
  """Threefry-2x32, 20 rounds, on integers that broadcast. (JAX's own primitive does not, under `vmap`, in JAX 0.10.2.)"""
  k0, k1, x0, x1 = (jnp.asarray(x).astype(np.uint32) for x in (*key, a, b))
  keys = k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)
  x0, x1 = x0 + keys[0], x1 + keys[1]
  for group in range(5):
    for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << np.uint32(turn)) | (x1 >> np.uint32(32 - turn)))
    x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
  return x0, x1
