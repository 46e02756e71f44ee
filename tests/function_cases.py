"""The part of the table in `cases` that is about functions of scores and positions, sinks and dropout."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jflash import masks
from tests import dropout_reference
from tests.cases import XLA, case, columns, rows

# Score functions -------------------------------------------------------------------------------------------------------


def _normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def alibi(score, batch, head, query, key, slopes):
  return score - slopes[head] * jnp.abs(query - key)


@case(dtypes=("float32", "bfloat16", "float64"))
def score_mod_alibi(rng, z):
  slopes = (2.0 ** -np.linspace(1, 6, z.N)).astype(np.float32)
  return {"score_mod": alibi, "score_operands": (slopes,), "is_causal": True}, rows(z) >= columns(z)


def t5(score, batch, head, query, key, table):
  """Half of the buckets for each direction; in each, half of them exact and the others logarithmic (Raffel et al., 2020)."""
  distance = jnp.abs(query - key)
  far = 4 + (jnp.log(jnp.maximum(distance, 1) / 4) / np.log(128 / 4) * 4).astype(jnp.int32)
  bucket = jnp.where(distance < 4, distance, jnp.minimum(far, 7)) + 8 * (key > query)
  return score + table[bucket, head]


@case()
def score_mod_t5(rng, z):
  return {"score_mod": t5, "score_operands": (_normal(rng, 16, z.N),)}, True


def clipped_distance(score, batch, head, query, key, table):
  return score + table[head, jnp.clip(query - key, -150, 149) + 150]


@case(only=("tpu",))
def score_mod_of_three_hundred_distances(rng, z):
  return {"score_mod": clipped_distance, "score_operands": (_normal(rng, z.N, 300),)}, True


def of_documents(score, batch, head, query, key, distance, documents, offsets):
  between = distance[documents[batch, query], documents[batch, key]]
  return score + between + jnp.take(offsets, head)


@case(S=139)
def score_mod_of_documents(rng, z):
  ids = np.sort(rng.integers(0, 7, (z.B, z.T)), axis=1).astype(np.int32)
  jax_ids = jnp.asarray(ids)
  mod = lambda score, b, h, i, j, distance, offsets: of_documents(score, b, h, i, j, distance, jax_ids, offsets)
  return {"score_mod": mod, "score_operands": (_normal(rng, 7, 7), _normal(rng, z.N)), "is_causal": True}, rows(z) >= columns(z)


def by_row_and_column(score, batch, head, query, key, of_row, of_column, offset):
  return score + of_row[batch, query] + of_column[key, head] + offset


@case()
def score_mod_by_row_and_column(rng, z):
  operands = _normal(rng, z.B, z.T), _normal(rng, z.S, z.N), np.float32(0.5) + _normal(rng)
  return {"score_mod": by_row_and_column, "score_operands": tuple(np.asarray(x) for x in operands), "local_window_size": 40}, \
      abs(rows(z) - columns(z)) <= 40


def low_rank(score, batch, head, query, key, left, right):
  """Whole rows of operands are looked up, which kernels refuse."""
  return score + (jnp.abs(left)[query % 9, :] * jnp.abs(right)[head, key % 5, :]).sum(-1)


@case(only=XLA)
def score_mod_of_low_rank(rng, z):
  return {"score_mod": low_rank, "score_operands": (abs(_normal(rng, 9, 3)), abs(_normal(rng, z.N, 5, 3)))}, True


def squashed(score, batch, head, query, key):
  return jnp.where(head % 2 == 0, score, 2 * jnp.tanh(score)) + 0.01 * (batch + 1) * jnp.cos((query + 2 * key).astype(score.dtype))


@case()
def score_mod_without_operands_under_a_cap(rng, z):
  q = np.stack([rng.permutation(z.T) for _ in range(z.B)]).astype(np.int32)
  return {"score_mod": squashed, "query_positions": q, "logits_soft_cap": 3.0, "bias": _normal(rng, z.N, 1, z.S)}, True


# Masks with operands ----------------------------------------------------------------------------------------------------


def _near(batch, head, query, key, place, reach):
  return jnp.abs(place[batch, query] - place[batch, key]) < reach[head]


@case(S=139)
def custom_mask_with_operands(rng, z):
  place, reach = np.cumsum(rng.random((z.B, z.T)), axis=1).astype(np.float32), np.linspace(2, 30, z.N).astype(np.float32)
  keep = abs(place[:, None, :, None] - place[:, None, None, :]) < reach[:, None, None]
  return {"mask": masks.Custom(_near, place, reach) & masks.Causal()}, keep & (rows(z) >= columns(z))


def _allowed(batch, head, query, key, table):
  return table[query % 7, (key + head) % 5]


def _allowed_tiles(query, key):
  return (query.lo < 100) & (key.lo < 200), np.array(False)


@case()
def custom_mask_with_a_tile_rule(rng, z):
  table = rng.random((7, 5)) < 0.5
  n = np.arange(z.N)[:, None, None]
  keep = table[rows(z) % 7, (columns(z) + n) % 5] & (rows(z) < 100) & (columns(z) < 200)
  inside = masks.Lengths(100, 200)
  return {"mask": masks.Custom(_allowed, table, tile=_allowed_tiles) & inside}, keep


# Sinks ------------------------------------------------------------------------------------------------------------------


@case(dtypes=("float32", "bfloat16", "float64"))
def sinks_and_causal(rng, z):
  return {"sinks": _normal(rng, z.N), "is_causal": True}, rows(z) >= columns(z)


@case()
def sinks_where_some_rows_see_nothing(rng, z):
  n = np.array([0, 200])
  return {"sinks": 3 * _normal(rng, z.N), "key_value_seq_lengths": n, "alibi_slopes": abs(_normal(rng, z.N))}, \
      columns(z) < n[:, None, None, None]


# Dropout ----------------------------------------------------------------------------------------------------------------

KEY = np.array([7, 4000000000], np.uint32)


@case(dtypes=("float32", "bfloat16"))
def dropout(rng, z):
  return {"dropout_rate": 0.25, "dropout_key": KEY, "is_causal": True}, rows(z) >= columns(z), dropout_reference.factors(0.25, KEY, z)


@case()
def dropout_by_positions_with_everything(rng, z):
  q = np.stack([rng.permutation(400)[:z.T] for _ in range(z.B)]).astype(np.int32)
  k = np.stack([rng.permutation(400)[:z.S] for _ in range(z.B)]).astype(np.int32)
  keep = rng.random((z.B, 1, z.T, z.S)) < 0.6
  return ({"dropout_rate": 0.5, "dropout_key": KEY, "query_positions": q, "key_value_positions": k, "mask": keep,
           "sinks": _normal(rng, z.N), "bias": _normal(rng, z.N, z.T, 1)},
          keep, dropout_reference.factors(0.5, KEY, z, q, k))
