"""`vmap` of a backend's passes: the mapped axis becomes part of the batch axis, so that a kernel never sees it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def fold_into_batch(run: Any, batch: int, whole: Any, others: Any, like: Any = ()) -> Any:
  """`run(whole, others)`, whose results are a pytree, led by the batch, and a list with gradients of some leaves of `others`.

  Args:
    batch: its size.
    whole: a pytree of arrays that lead with the batch.
    others: a pytree of arrays that lead with it, or with 1 where the batch shares them.
    like: the leaves of `others` that have a gradient, by number.
  """
  first, rest = jax.tree.leaves(whole), jax.tree.leaves(others)
  leaves, structure = first + rest, jax.tree.structure((whole, others))
  like = tuple(len(first) + n for n in like)

  @custom_vmap
  def call(*leaves):
    return run(*structure.unflatten(leaves))

  @call.def_vmap
  def rule(size, mapped, *leaves):
    shared = [x.shape[int(m)] == 1 and batch > 1 for x, m in zip(leaves, mapped)]

    def fold(n, x, m):
      """`[size · batch, …]`, or as it is where it is shared by everything."""
      if not m and x.shape[0] == 1 and n >= len(first) and n not in like:
        return x
      x = x if m else jnp.broadcast_to(x, (size, *x.shape))
      x = jnp.broadcast_to(x, (size, batch, *x.shape[2:])) if x.shape[1] == 1 else x
      return x.reshape(size * batch, *x.shape[2:])

    folded = [fold(n, x, m) for n, (x, m) in enumerate(zip(leaves, mapped))]
    results, of_leaves = fold_into_batch(run, size * batch, *structure.unflatten(folded), [n - len(first) for n in like])
    unfold = lambda x: x.reshape(size, batch, *x.shape[1:])
    of_leaves = [jnp.sum(unfold(x), axis=1, keepdims=True) if shared[n] else unfold(x) for n, x in zip(like, of_leaves)]
    out = jax.tree.map(unfold, results), of_leaves
    return out, jax.tree.map(lambda _: True, out)

  return call(*leaves)
