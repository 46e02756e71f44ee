"""A few batch elements and heads at a time, where lists of visits outgrow scalar memory: the same as all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _plan, masks

B, T, S, N, K, H = 4, 200, 300, 4, 2, 16
Normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
Q, KEYS, V = Normal(0, B, T, N, H), Normal(1, B, S, K, H), Normal(2, B, S, K, H)
IDS = tuple(np.sort(np.random.default_rng(n).integers(0, 3, (B, size)), axis=1).astype(np.int32) for n, size in enumerate((T, S)))
TABLE = np.random.default_rng(3).random((1, N, 2, 3)) < 0.6


def by_place(score, batch, head, q, k, slopes):
  return score - slopes[head] * (batch + 1) * jnp.abs(q - k) / 50


# name: (arrays that get a gradient, those that do not, options made of both, the batch elements and kv heads of a part)
CASES = {
    "segments": ((), IDS, lambda q, k: {"query_segment_ids": q, "key_value_segment_ids": k}, (2, 2)),
    "blocks": ((), (TABLE,), lambda table: {"mask": masks.BlockSparse(table, (128, 128))}, (4, 1)),
    "segments and blocks": ((), (*IDS, TABLE), lambda q, k, table: {
        "query_segment_ids": q, "key_value_segment_ids": k, "mask": masks.BlockSparse(table, (128, 128))}, (1, 1)),
    "bias": ((Normal(4, 1, N, T, S), Normal(5, B, N)), IDS, lambda bias, slopes, q, k: {
        "bias": bias, "alibi_slopes": slopes, "query_segment_ids": q, "key_value_segment_ids": k}, (2, 2)),
    "bias by batch": ((Normal(4, B, 1, T, S),), (TABLE,), lambda bias, table: {
        "bias": bias, "mask": masks.BlockSparse(table, (128, 128))}, (4, 1)),
    "functions": ((Normal(6, N),), IDS, lambda slopes, q, k: {
        "score_mod": by_place, "score_operands": (slopes,), "query_segment_ids": q, "key_value_segment_ids": k}, (2, 2)),
    "dropout": ((), (*IDS, TABLE), lambda q, k, table: {
        "query_segment_ids": q, "key_value_segment_ids": k, "mask": masks.BlockSparse(table, (128, 128)), "dropout_rate": 0.3,
        "dropout_key": jax.random.key(7)}, (1, 1))}


@pytest.mark.parametrize("case", CASES)
def test_parts_make_the_whole(case, monkeypatch):
  moving, still, options, chunk = CASES[case]

  @jax.jit
  def run(arrays, still):
    def loss(q, k, v, *arrays):
      out, lse = jflash.attention(q, k, v, **options(*arrays, *still), implementation="tpu", return_residual=True)
      return (out * Normal(8, *out.shape)).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum(), (out, lse)
    return jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays)

  chunks, choose = [], _plan._chunk_tpu
  monkeypatch.setattr(_plan, "_chunk_tpu", lambda *args: chunks.append(choose(*args)) or chunks[-1])
  with jflash.interpret(), _plan.force_tiles(128, 128):
    whole = run((Q, KEYS, V, *moving), still)
    run.clear_cache()
    monkeypatch.setattr(_plan, "MOST_VISITS", 16 if chunk == (2, 2) else 8)  # 2 rows of 3 tiles, in pairs, are 8
    parts = run((Q, KEYS, V, *moving), still)
  assert chunks[0] == (B, K) and chunks[-1] == chunk
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), parts, whole)
