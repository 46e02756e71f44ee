"""A problem is data: query, key, value, and everything else in `Logits`.

Legend: B batch, T queries, S keys, N query heads, K key/value heads (N = K · G), H query/key width, E value width.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels import products

from ._logits import Logits
from ._pytree import pytree


@pytree
class Problem:
  """Attention of `[B, T, N, H]` over `[B, S, K, H]` and `[B, S, K, E]`."""

  q: Any
  k: Any
  v: Any
  logits: Logits
  product: type = products.Dot  # of a query and a key, one of `pallas_kernels.products`

  @property
  def batch(self) -> int:
    return self.q.shape[0]

  @property
  def queries(self) -> int:
    return self.q.shape[1]

  @property
  def heads(self) -> int:
    return self.q.shape[2]

  @property
  def width(self) -> int:
    return self.q.shape[3]

  @property
  def keys(self) -> int:
    return self.k.shape[1]

  @property
  def kv_heads(self) -> int:
    return self.k.shape[2]

  @property
  def groups(self) -> int:
    return self.heads // self.kv_heads

  @property
  def value_width(self) -> int:
    return self.v.shape[3]

  @property
  def dtype(self) -> Any:
    """Of scores, statistics and accumulators."""
    return jnp.promote_types(self.q.dtype, jnp.float32)
