"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Turns pairs of features by angles that grow with the position, so that scores see only distances.

  Pair i of a head is turned by the angle `position · base^(-2i / width)`: (a, b) becomes
  (a cos - b sin, b cos + a sin), computed in float32 or better.

  Args:
    base: the angles' base; LLaMA 2 uses 10 000, LLaMA 3 uses 500 000.
    width: how many leading features of a head are turned; the others pass unchanged. None turns all of them.
    interleaved: False pairs feature i with feature `i + width / 2` (GPT-NeoX, LLaMA, `flax.nnx.RoPE`); True pairs
      features 2i and 2i + 1 (GPT-J, the paper).
    rescale: maps the `[width / 2]` frequencies, a NumPy array, to others. For example `lambda f: f / 4` stretches a
      context by four. None leaves them.

  Raises:
    ValueError: `width` is odd, or larger than the head.

  Example:
    >>> import jax.numpy as jnp
    >>> Rotary(base=500_000)(jnp.ones((2, 5, 8, 64)), jnp.arange(5)).shape
    (2, 5, 8, 64)
  """

  base: float = 10_000.0
  width: int | None = None
  interleaved: bool = False
  rescale: Callable[[np.ndarray], np.ndarray] | None = None

  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns `x` `[batch..., T, N, H]` at `positions` `[batch..., T]` or `[T]`; same shape and type as `x`."""
    width = self._checked_width(x.shape[-1])
    frequencies = self.base ** (-np.arange(0, width, 2) / width)  # [W/2]
    if self.rescale is not None:
      frequencies = self.rescale(frequencies)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[..., None, None].astype(dtype) * jnp.asarray(frequencies, dtype)  # [batch..., T, 1, W/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    turned, rest = x[..., :width].astype(dtype), x[..., width:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else jnp.split(turned, 2, axis=-1)
    pairs = a * cos - b * sin, b * cos + a * sin  # each [batch..., T, N, W/2]
    turned = jnp.stack(pairs, axis=-1).reshape(turned.shape) if self.interleaved else jnp.concatenate(pairs, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)

  def _checked_width(self, head_dim: int) -> int:
    width = head_dim if self.width is None else self.width
    if width % 2 or not 0 < width <= head_dim:
      raise ValueError(f"Rotary turns pairs of features: its width is {width} and a head has {head_dim} features; "
                       f"pass an even `width` of at most {head_dim}.")
    return width
