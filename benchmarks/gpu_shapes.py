"""What is measured on a GPU: shapes, masks, and how their floating-point operations are counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOKENS, HIDDEN = 16_384, 2048  # in all, of the FlashAttention-3 paper's figures
WIDTHS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
PASSES = {"forward": 1.0, "backward": 2.5}  # matrix products relative to the forward pass: five for two
DOCUMENT = 1024  # tokens of a packed document, on average


@dataclasses.dataclass(frozen=True)
class Shape:
  """q `[B, T, N, H]`, k and v `[B, S, K, H]`."""

  batch: int
  queries: int
  keys: int
  heads: int
  kv_heads: int
  width: int
  dtype: str = "bfloat16"

  @property
  def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
    """query, key and value."""
    of = lambda length, heads: jax.ShapeDtypeStruct((self.batch, length, heads, self.width), self.dtype)
    return {"query": of(self.queries, self.heads), "key": of(self.keys, self.kv_heads), "value": of(self.keys, self.kv_heads)}

  @property
  def bytes(self) -> int:
    """Of query, key, value and out: the least that a forward pass moves."""
    item = jnp.dtype(self.dtype).itemsize
    return 2 * item * self.batch * self.width * (self.queries * self.heads + self.keys * self.kv_heads)

  def flops(self, pairs: float, direction: str) -> float:
    """4·B·N·H for each of the `pairs` of query and key that a head keeps; 2.5 times that backward. Recomputation is not counted."""
    return 4 * self.batch * self.heads * self.width * pairs * PASSES[direction]


def paper(width: int, length: int, tokens: int = TOKENS, hidden: int = HIDDEN) -> Shape:
  """16,384 tokens in all, heads that make 2048 together: Shah et al., FlashAttention-3, arXiv:2407.08608, section 4.1."""
  heads = hidden // width
  return Shape(tokens // length, length, length, heads, heads, width)


@dataclasses.dataclass(frozen=True)
class Masking:
  """One way to mask self-attention of N tokens, as arguments of `jflash.attention`.

  Attributes:
    pairs: of query and key that a head keeps, of all batch elements on average.
    static: arguments that are known while tracing.
    arrays: arguments that the program is given when it runs.
    theirs: the same two for `jax.nn.dot_product_attention`, where they differ.
  """

  pairs: float
  static: dict[str, Any] = dataclasses.field(default_factory=dict)
  arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  theirs: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None

  def arguments(self, ours: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return (self.static, self.arrays) if ours or self.theirs is None else self.theirs


def masking(name: str, batch: int, length: int) -> Masking:
  """"full", "causal", "window W" (causal, W keys), "documents" (packed, causal), or "array", the causal mask as an array.

  Causal counts half of the pairs, as papers do, and so does each document; a window's are counted exactly.
  """
  kind, _, size = name.partition(" ")
  rows = np.arange(length)
  if kind == "full":
    return Masking(length**2)
  if kind == "causal":
    return Masking(length**2 / 2, {"is_causal": True})
  if kind == "array":
    return Masking(length**2 / 2, {}, {"mask": np.tri(length, dtype=bool)[None, None]})
  if kind == "window":
    left = int(size) - 1
    return Masking(float(np.minimum(rows, left).sum() + length), {"is_causal": True, "local_window_size": (left, 0)})
  if kind == "documents":
    ids = documents(batch, length)
    pairs = sum((np.bincount(row).astype(float)**2).sum() / 2 for row in ids) / batch
    seen = (ids[:, None, :, None] == ids[:, None, None, :]) & (rows[:, None] >= rows)
    return Masking(pairs, {"is_causal": True}, {"query_segment_ids": ids, "key_value_segment_ids": ids}, ({}, {"mask": seen}))
  raise ValueError(f"`name` is {name!r}; it must be full, causal, array, documents or window W.")


def documents(batch: int, length: int, mean: int = DOCUMENT) -> np.ndarray:
  """Segment ids `[B, N]` of documents of random lengths, `mean` on average; the same for every call."""
  return np.cumsum(np.random.default_rng(0).random((batch, length)) < 1 / mean, axis=1).astype(np.int32)
