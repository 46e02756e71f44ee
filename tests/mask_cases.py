"""The part of the table in `cases` that is about mask objects: what each keeps, said again in NumPy."""

from __future__ import annotations

import numpy as np

from jflash import block_sparse as presets
from jflash import masks
from tests.cases import XLA, case, columns, per_batch, rows


def _blocks(table, z, height, width):
  """The element (i, j) of the mask that `table[..., i // height, j // width]` stands for."""
  return np.repeat(np.repeat(table, height, axis=-2), width, axis=-1)[..., :z.T, :z.S]


@case(only=XLA)
def causal_object(rng, z):
  return {"mask": masks.Causal()}, rows(z) >= columns(z)


@case()
def anti_causal(rng, z):
  return {"mask": ~masks.Causal()}, rows(z) < columns(z)


@case(only=XLA)
def window_without_limits(rng, z):
  return {"mask": masks.Window()}, True


@case(only=XLA)
def window_left(rng, z):
  return {"mask": masks.Window(left=30)}, columns(z) >= rows(z) - 30


@case(only=XLA)
def window_right(rng, z):
  return {"mask": masks.Window(None, 13)}, columns(z) <= rows(z) + 13


@case()
def window_of_arrays(rng, z):
  return ({"mask": masks.Window(np.asarray(21), np.asarray([9]))},
          (columns(z) >= rows(z) - 21) & (columns(z) <= rows(z) + 9))


@case()
def segments_object(rng, z):
  q, k = np.sort(rng.integers(0, 6, (z.B, z.T)), axis=1), np.sort(rng.integers(0, 6, (z.B, z.S)), axis=1)
  return {"mask": masks.Segments(q, k)}, q[:, None, :, None] == k[:, None, None, :]


@case(T=197, S=197, only=XLA)
def segments_of_queries_and_keys_alike(rng, z):
  ids = np.arange(z.T) // 61
  return {"mask": masks.Segments(ids) & masks.Causal()}, (ids[:, None] == ids[None, :]) & (rows(z) >= columns(z))


@case(only=XLA)
def lengths_numbers(rng, z):
  return {"mask": masks.Lengths(101, 7)}, (rows(z) < 101) & (columns(z) < 7)


@case()
def lengths_of_positions(rng, z):
  q, n = np.arange(z.T) + 60, np.array([30, 200])
  return ({"mask": masks.Lengths(query=150, key=n), "query_positions": q},
          (q[:, None] < 150) & (columns(z) < per_batch(n)))


@case()
def prefix_number(rng, z):
  return {"mask": masks.PrefixLM(50)}, (columns(z) < 50) | (rows(z) >= columns(z))


@case(only=XLA)
def prefix_per_batch(rng, z):
  n = np.array([0, 111])
  return {"mask": masks.PrefixLM(n)}, (columns(z) < per_batch(n)) | (rows(z) >= columns(z))


@case()
def dense_per_head(rng, z):
  keep = rng.random((z.N, z.T, z.S)) < 0.5
  keep[3, :100] = False
  keep[4, :, 80:] = False
  return {"mask": masks.Dense(keep)}, keep


@case(only=XLA)
def dense_by_positions(rng, z):
  array = rng.random((z.B, 1, 60, 90)) < 0.5
  q, k = rng.integers(-5, 70, (z.B, z.T)), rng.integers(-5, 100, (z.B, z.S))
  inside = ((q >= 0) & (q < 60))[:, None, :, None] & ((k >= 0) & (k < 90))[:, None, None, :]
  keep = np.stack([array[b, 0][np.clip(q[b], 0, 59)][:, np.clip(k[b], 0, 89)] for b in range(z.B)])[:, None] & inside
  return {"mask": masks.Dense(array), "query_positions": q, "key_value_positions": k}, keep


@case()
def dense_row_by_key_positions(rng, z):
  array, k = rng.random((z.N, 1, z.S)) < 0.5, rng.permutation(z.S)
  return {"mask": masks.Dense(array), "key_value_positions": k}, array[:, :, k]


@case()
def block_sparse(rng, z):
  table = rng.random((-(-z.T // 32), -(-z.S // 16))) < 0.4
  return {"mask": masks.BlockSparse(table, (32, 16))}, _blocks(table, z, 32, 16)


@case()
def block_sparse_per_batch_and_head(rng, z):
  table = rng.random((z.B, z.N, -(-z.T // 37), -(-z.S // 53))) < 0.4
  return {"mask": masks.BlockSparse(table, (37, 53))}, _blocks(table, z, 37, 53)


@case(only=XLA)
def block_sparse_per_head(rng, z):
  table = rng.random((z.N, 1, -(-z.S // 29))) < 0.4
  return {"mask": masks.BlockSparse(table, (150, 29))}, _blocks(table, z, 150, 29)


@case(only=XLA)
def block_sparse_per_batch(rng, z):
  table = rng.random((z.B, 1, -(-z.T // 16), -(-z.S // 16))) < 0.3
  return {"mask": masks.Causal() & masks.BlockSparse(table, 16)}, _blocks(table, z, 16, 16) & (rows(z) >= columns(z))


@case(only=XLA)
def block_sparse_by_positions(rng, z):
  table, q, k = rng.random((4, 6)) < 0.5, rng.integers(-20, 120, (z.B, z.T)), rng.integers(-20, 200, (z.B, z.S))
  inside = ((q >= 0) & (q < 100))[:, None, :, None] & ((k >= 0) & (k < 180))[:, None, None, :]
  keep = table[np.clip(q // 25, 0, 3)[:, None, :, None], np.clip(k // 30, 0, 5)[:, None, None, :]] & inside
  return {"mask": masks.BlockSparse(table, (25, 30)), "query_positions": q, "key_value_positions": k}, keep


def _numbers(z, block):
  """Block numbers of rows and of columns."""
  return rows(z) // block, columns(z) // block


@case()
def local_global_preset(rng, z):
  i, j = _numbers(z, 32)
  return {"mask": presets.local_global(z.T, z.S, 32, local=1, global_blocks=1)}, (abs(i - j) < 2) | (i == 0) | (j == 0)


@case(T=261, S=139)
def butterfly_preset(rng, z):
  i, j = (x % 5 for x in _numbers(z, 32))  # 9 x 5 blocks
  return {"mask": presets.butterfly(z.T, z.S, 32)}, np.isin(i ^ j, (0, 1, 2, 4))


@case()
def bigbird_preset(rng, z):
  mask = presets.bigbird(z.T, z.S, 32, local=0, random_blocks=2, seed=3)
  return {"mask": masks.Causal() & mask}, _blocks(mask.table, z, 32, 32) & (rows(z) >= columns(z))


@case()
def strided_preset(rng, z):
  i, j = _numbers(z, 24)
  return {"mask": presets.strided(z.T, z.S, 24, local=0, stride=4)}, (i - j) % 4 == 0


def best_blocks(q, k, count, block, seen, lengths, own_first, per_query_head):
  """The table of `top_k_blocks`, row by row: `seen [B, T, S]`, `lengths` of queries and keys `[B]`, own_first: as if causal."""
  groups = q.shape[2] // k.shape[2]
  scores = np.einsum("binh,bjnh->bnij", _means(q, block, lengths[0]), np.repeat(_means(k, block, lengths[1]), groups, 2))
  if not per_query_head:
    scores = scores.reshape(len(q), -1, groups, *scores.shape[2:]).sum(2).repeat(groups, 1)
  table = np.zeros(scores.shape, bool)
  for b, n, i in np.ndindex(*scores.shape[:3]):
    seen_here = seen[b, i * block:(i + 1) * block]
    visible = [j for j in range(scores.shape[3]) if seen_here[:, j * block:(j + 1) * block].any()]
    best_first = sorted((not (own_first and i == j), -scores[b, n, i, j], j) for j in visible)
    table[b, n, i, [j for *_, j in best_first[:count]]] = True
  return table


def _means(x, block, lengths):
  """Of each block of `[B, T, N, H]`, as far as it is below the length, `[B, blocks, N, H]`; 0 where nothing is."""
  cut = lambda x, length: [x[n:min(n + block, length)] for n in range(0, len(x), block)]
  return np.array([[part.mean(0) if len(part) else np.zeros(x.shape[2:]) for part in cut(y, length)]
                   for y, length in zip(x.astype(float), lengths)])


@case(T=197, S=197)
def top_k_preset(rng, z):
  q, k = (rng.normal(size=(z.B, size, heads, 8)).astype("f") for size, heads in ((z.T, z.N), (z.S, z.K)))
  causal = np.broadcast_to(rows(z) >= columns(z), (z.B, z.T, z.S))
  table = best_blocks(q, k, 3, 24, causal, [np.full(z.B, z.T)] * 2, True, True)
  mask = presets.top_k_blocks(q, k, 3, 24, is_causal=True, per_query_head=True)
  return {"mask": mask}, _blocks(table, z, 24, 24) & causal[:, None]


def _rule(batch, head, q, k):
  return (q * 3 + k * (head + 1) + batch) % 5 < 2


@case()
def custom(rng, z):
  b, n = np.arange(z.B)[:, None, None, None], np.arange(z.N)[None, :, None, None]
  return {"mask": masks.Custom(_rule)}, (rows(z) * 3 + columns(z) * (n + 1) + b) % 5 < 2


@case()
def composed(rng, z):
  q, k = np.sort(rng.integers(0, 3, (z.B, z.T)), axis=1), np.sort(rng.integers(0, 3, (z.B, z.S)), axis=1)
  same = q[:, None, :, None] == k[:, None, None, :]
  causal, near = rows(z) >= columns(z), abs(rows(z) - columns(z)) <= 25
  return ({"mask": masks.Segments(q, k) & ~(masks.Causal() & masks.Window(25, 25)) | masks.PrefixLM(9)},
          same & ~(causal & near) | (columns(z) < 9) | causal)


@case(only=XLA)
def composed_with_arrays(rng, z):
  a, b = rng.random((z.N, z.T, z.S)) < 0.6, rng.random((z.B, 1, 1, z.S)) < 0.4
  return ({"mask": (a & masks.Causal()) | ~masks.Lengths(None, 200) & b},
          (a & (rows(z) >= columns(z))) | ~(columns(z) < 200) & b)


@case(only=XLA)
def a_chain_and_a_bias(rng, z):
  n = np.array([30, 77])
  return ({"mask": ~(~masks.Window(40, 0) | ~masks.Lengths(None, n)), "bias": rng.normal(size=(z.N, 1, z.S)).astype("f")},
          (columns(z) <= rows(z)) & (columns(z) >= rows(z) - 40) & (columns(z) < per_batch(n)))
