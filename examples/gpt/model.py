"""GPT-2 in Flax NNX: learned positions, pre-norm blocks, tied embeddings, and the attention function as an argument.

Shapes: B rows, T tokens, S cache slots, N heads, H width of a head, D = N·H, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import jflash


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides the shapes of the parameters."""
  vocab: int
  context: int
  layers: int
  heads: int
  width: int

  def __post_init__(self):
    if self.width % self.heads:
      divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
      near = min(divisors, key=lambda n: abs(n - self.heads))
      raise ValueError(f"--heads {self.heads} does not divide --width {self.width}; every head gets width/heads "
                       f"features, so use for example --heads {near}.")


def jflash_attention(query, key, value, segments):
  """Causal attention within each document of a row. `query, key, value [B, T, N, H]`, `segments [B, T]`."""
  return jflash.attention(query, key, value, is_causal=True, query_segment_ids=segments,
                          key_value_segment_ids=segments)


def _with_mask(attend):
  """The same for functions that know no segments: these become a boolean mask `[B, 1, T, T]`."""
  def attention(query, key, value, segments):
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return attend(query, key, value, mask=same, is_causal=True)
  return attention


ATTENTIONS = {
    "jflash": jflash_attention,
    "jax": _with_mask(jax.nn.dot_product_attention),
    "flax": _with_mask(nnx.dot_product_attention),
}


class Block(nnx.Module):
  """x + Attention(LN(x)), then x + MLP(LN(x)). `attend(query, key, value)` is given at the call."""

  def __init__(self, config, dtype, rngs):
    d, out_std = config.width, 0.02 / (2 * config.layers)**0.5   # GPT-2: residual branches shrink with depth
    linear = lambda n_in, n_out, std: nnx.Linear(n_in, n_out, dtype=dtype, rngs=rngs,
                                                 kernel_init=nnx.initializers.normal(std))
    self.heads = config.heads
    self.norm1 = nnx.LayerNorm(d, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.norm2 = nnx.LayerNorm(d, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.qkv, self.project = linear(d, 3 * d, 0.02), linear(d, d, out_std)
    self.up, self.down = linear(d, 4 * d, 0.02), linear(4 * d, d, out_std)

  def __call__(self, x, attend):                                                            # [B, T, D]
    b, t, d = x.shape
    qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads)             # [B, T, 3, N, H]
    x = x + self.project(attend(*(qkv[:, :, i] for i in range(3))).reshape(b, t, d))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
  """The language model.

  Args:
    config: the shapes.
    attend: one of `ATTENTIONS`.
    dtype: of the activations; parameters and logits are float32.
    rngs: `nnx.Rngs`.
  """

  def __init__(self, config, *, attend=jflash_attention, dtype=jnp.float32, rngs):
    table = lambda rows: nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, config.width)))
    self.config, self.attend, self.dtype = config, attend, dtype
    self.tokens, self.positions = table(config.vocab), table(config.context)
    self.blocks = nnx.List([Block(config, dtype, rngs) for _ in range(config.layers)])
    self.norm = nnx.LayerNorm(config.width, epsilon=1e-5, dtype=dtype, rngs=rngs)

  def __call__(self, tokens, positions, segments):
    """Logits `[B, T, V]` (float32) of packed rows; tokens, positions and segments are `[B, T]`."""
    x = self._embed(tokens, positions)
    for block in self.blocks:
      x = block(x, lambda q, k, v: self.attend(q, k, v, segments))
    return self._logits(x)

  def empty_cache(self, rows):
    """One `(keys, values)` pair per layer, each `[B, S, N, H]` with S = context."""
    shape = (rows, self.config.context, self.config.heads, self.config.width // self.config.heads)
    return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in self.blocks]

  def decode(self, tokens, cache, filled):
    """Logits `[B, T, V]` of the next T tokens of one document per row, and the cache with their keys and values.

    Args:
      tokens: `[B, T]`, at positions filled, …, filled + T - 1. T is the prompt's length, then 1.
      cache: what `empty_cache` or the last call gave.
      filled: number of slots that are filled, a traced integer; filled + T must not exceed the context.
    """
    positions = jnp.broadcast_to(filled + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x, new_cache = self._embed(tokens, positions), []
    for block, slots in zip(self.blocks, cache):
      def attend(query, key, value, slots=slots):
        keys, values = (jax.lax.dynamic_update_slice_in_dim(slot, new.astype(slot.dtype), filled, axis=1)
                        for slot, new in zip(slots, (key, value)))
        new_cache.append((keys, values))
        # Slot s holds position s, so the causal rule also hides the slots that are not filled yet.
        return jflash.attention(query, keys, values, is_causal=True, query_positions=positions)
      x = block(x, attend)
    return self._logits(x), new_cache

  def _embed(self, tokens, positions):
    return (self.tokens[...][tokens] + self.positions[...][positions]).astype(self.dtype)   # [B, T, D]

  def _logits(self, x):
    table = self.tokens[...].astype(self.dtype)
    return jnp.einsum("btd,vd->btv", self.norm(x), table, preferred_element_type=jnp.float32)
