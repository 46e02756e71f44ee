"""The dropout mask said again in NumPy, densely: Threefry-2x32 for each row and column, and the mix of the two for each score."""

from __future__ import annotations

import numpy as np

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def threefry(key, counter):
  """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) of two words under a key of two words."""
  k0, k1, x0, x1 = (np.asarray(x).astype(np.uint32) for x in (*key, *counter))
  keys = k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)
  x0, x1 = x0 + keys[0], x1 + keys[1]
  for group in range(5):
    for r in _ROTATIONS[group % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r)))
    x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
  return x0, x1


def kept(rate, key_words, batch, head, query, key):
  """Whether each weight is kept, by integers that broadcast to `[B, N, T, S]`."""
  with np.errstate(over="ignore"):
    of_head = threefry(key_words, (batch, head))
    x = threefry(of_head, (np.uint32(0), query))[0] ^ threefry(of_head, (np.uint32(1), key))[0]
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97)
    x = x ^ (x >> np.uint32(15))
  return (x >> np.uint32(1)) >= rate * 2**31


def factors(rate, key_words, sizes, query=None, key=None):
  """By what the weights of a problem of `cases.Sizes` are multiplied, `[B, N, T, S]`; positions `[B, T]` and `[B, S]`."""
  b, n = np.arange(sizes.B)[:, None, None, None], np.arange(sizes.N)[None, :, None, None]
  i = np.arange(sizes.T)[:, None] if query is None else query[:, None, :, None]
  j = np.arange(sizes.S) if key is None else key[:, None, None, :]
  return kept(rate, key_words, b, n, i, j) / (1 - rate)
