"""`top_k_blocks` against its definition, and what attention makes of the choice."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _mask, _reference, block_sparse, masks
from tests import mask_cases
from tests.backends import attention


def qk(seed=0, dtype="float32", batch=2, queries=200, keys=330, heads=6, kv_heads=2, width=16):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(batch, *shape, width)), dtype) for shape in ((queries, heads), (keys, kv_heads))]


def table_of(mask):
  """The table of the block-sparse part, `[B, N, query blocks, key blocks]`."""
  part, = [part for part in _mask.parts(mask) if isinstance(part, masks.BlockSparse)]
  return np.asarray(part.table)


OPTIONS = {
    "all": {}, "causal": {"is_causal": True}, "lengths": {"query_seq_lengths": [200, 70], "key_value_seq_lengths": [330, 100]},
    "window": {"mask": masks.Window(60, 60)}, "array": {"mask": np.arange(330)[None] % 128 < 64},
    "causal in a window": {"is_causal": True, "mask": masks.Window(100)},
    "per batch": {"is_causal": True, "mask": masks.Lengths(key=np.array([150, 0]))}}


def seen_of(options):
  """What the options let be seen, `[B, T, S]`."""
  i, j = np.arange(200)[:, None], np.arange(330)[None, :]
  far = lambda lengths, x: x[None] < np.array(lengths)[:, None, None]
  every = np.ones((2, 200, 330), bool)
  return {"all": every, "causal": every & (i >= j), "lengths": far([200, 70], i) & far([330, 100], j),
          "window": every & (abs(i - j) <= 60), "array": every & (j % 128 < 64),
          "causal in a window": every & (i >= j) & (i - j <= 100), "per batch": (i >= j) & far([150, 0], j)}[options]


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("count", [1, 3, 99])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_choice_is_its_definition(name, count, per_query_head):
  block, options = 32, OPTIONS[name]
  q, k = qk()
  mask = block_sparse.top_k_blocks(q, k, count, block, per_query_head=per_query_head,
                                   **{key: jnp.asarray(x) if "lengths" in key else x for key, x in options.items()})
  lengths = [np.array(options.get(key, [size] * 2)) for key, size in (("query_seq_lengths", 200), ("key_value_seq_lengths", 330))]
  seen = seen_of(name)
  want = mask_cases.best_blocks(np.asarray(q), np.asarray(k), count, block, seen, lengths, options.get("is_causal", False), per_query_head)
  np.testing.assert_array_equal(table_of(mask), want)
  at = _mask.Coordinates(None, None, *2 * (np.arange(200)[:, None], np.arange(330)[None, :]))
  keep = want.repeat(block, -2).repeat(block, -1)[..., :200, :330] & seen[:, None]
  np.testing.assert_array_equal(mask.bind(_mask.Sizes(2, 6, 200, 330)).keep(at) & np.ones_like(keep), keep, "with the options in it")


def test_a_row_of_blocks_keeps_exactly_as_many_as_it_may():
  q, k = qk(queries=330)
  table = table_of(block_sparse.top_k_blocks(q, k, 4, 32, is_causal=True))
  assert table.shape == (2, 6, 11, 11)
  np.testing.assert_array_equal(table.sum(-1), np.broadcast_to(np.minimum(4, np.arange(1, 12)), (2, 6, 11)))
  assert table[..., np.arange(11), np.arange(11)].all() and not np.triu(table, 1).any()


def test_ties_go_to_the_lowest_keys_and_what_is_no_number_comes_last():
  q, k = np.ones((1, 64, 1, 4), "f"), np.ones((1, 128, 1, 4), "f")
  choose = lambda k, count, **options: table_of(block_sparse.top_k_blocks(q, k, count, 16, **options))[0, 0]
  np.testing.assert_array_equal(choose(k, 3), np.arange(8)[None] < np.full((4, 1), 3))
  k[:, 16:32], k[:, 48:64] = np.nan, 2
  np.testing.assert_array_equal(choose(k, 2), np.isin(np.arange(8), [0, 3])[None] & np.ones((4, 1), bool))
  np.testing.assert_array_equal(choose(k, 7), np.arange(8)[None] != np.ones((4, 1)))
  np.testing.assert_array_equal(choose(np.full_like(k, np.nan), 1), np.arange(8)[None] == np.zeros((4, 1)))
  padded = choose(k, 2, key_value_seq_lengths=np.array([16]))
  np.testing.assert_array_equal(padded, np.arange(8)[None] == np.zeros((4, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_choice_under_jit_and_vmap(dtype):
  q, k = qk(dtype=dtype)
  choose = lambda q, k: jax.tree.leaves(block_sparse.top_k_blocks(q, k, 3, 32, is_causal=True))[0]
  plain = choose(q, k)
  np.testing.assert_array_equal(plain, jax.jit(choose)(q, k))
  np.testing.assert_array_equal(plain, jax.vmap(choose)(q, k)[:, 0])  # each without a batch axis
  means = choose(q.astype("float32"), k.astype("float32"))
  np.testing.assert_array_equal(plain, means)


def clusters(block=32, blocks=12, width=16, noise=0.3):
  """Queries and keys of which each block lies around one of four directions; who belongs together is known."""
  rng = np.random.default_rng(0)
  centres = 4 * np.linalg.qr(rng.normal(size=(width, width)))[0][:4]
  labels = np.resize(np.arange(4), blocks), rng.permutation(np.resize(np.arange(4), blocks))
  q, k = (centres[x].repeat(block, 0) + noise * rng.normal(size=(blocks * block, width)) for x in labels)
  return *(x.astype("f")[None, :, None] for x in (q, k)), labels[0][:, None] == labels[1][None, :]


def test_the_blocks_that_carry_the_softmax_are_chosen():
  q, k, together = clusters()
  np.testing.assert_array_equal(table_of(block_sparse.top_k_blocks(q, k, 3, 32))[0, 0], together)
  scores = q[0, :, 0].astype(float) @ k[0, :, 0].T / 4
  p = np.exp(scores - scores.max(1, keepdims=True))
  mass = (p / p.sum(1, keepdims=True)).reshape(12, 32, 12, 32).sum(3).mean(1)  # of each block, mean over its rows
  by_mass = np.argsort(-mass, axis=1, kind="stable")
  for count in (1, 2, 3):
    table = table_of(block_sparse.top_k_blocks(q, k, count, 32))[0, 0]
    best = np.take_along_axis(mass, by_mass[:, :count], 1).sum(1)
    assert ((mass * table).sum(1) > 0.8 * best).all()
  assert (mass[together].reshape(12, 3).sum(1) > 0.9).all()


def test_attention_comes_closer_to_dense_as_more_blocks_are_taken():
  q, k, _ = clusters(noise=1.0)
  v = np.random.default_rng(1).normal(size=k.shape).astype("f")
  dense = _reference.attention(q, k, v)[0]
  attend = jax.jit(lambda mask: jflash.attention(q, k, v, mask=mask))
  errors = [float(abs(attend(block_sparse.top_k_blocks(q, k, count, 32)) - dense).mean()) for count in (1, 3, 12)]
  assert errors == sorted(errors, reverse=True) and errors[1] < errors[0] / 3 and errors[2] < 1e-6


def test_no_gradient_flows_through_the_choice():
  q, k = qk(queries=140, keys=140, heads=2)
  choose = functools.partial(block_sparse.top_k_blocks, k=2, block=32, is_causal=True)
  keep = table_of(choose(q, k)).repeat(32, -2).repeat(32, -1)[..., :140, :140] & np.tri(140, dtype=bool)
  loss = lambda out: jnp.sum(jnp.sin(out))
  chosen = jax.jit(jax.grad(lambda q, k: loss(attention("xla", q, k, k, mask=choose(q, k))[0]), (0, 1)))(q, k)
  held = jax.grad(lambda q, k: loss(_reference.attention(q, k, k, keep=keep)[0]), (0, 1))(q, k)
  for x, y in zip(chosen, held):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_query_head, most", [(False, 3), (True, 9)])
def test_a_choice_knows_its_bound(per_query_head, most):
  q, k = qk(queries=640, keys=640)
  mask = block_sparse.top_k_blocks(q, k, 3, 32, is_causal=True, per_query_head=per_query_head)
  assert mask.most((32, 32)) == most
  assert block_sparse.top_k_blocks(q, k, 50, 32).most((32, 32)) == 20
  union = table_of(mask).reshape(2, 2, 3, 20, 20).any(2)
  assert union.sum(-1).max() <= most


Q, KEY = np.zeros((1, 64, 4, 8), "f"), np.zeros((1, 96, 2, 8), "f")
ERRORS = {
    "k": (lambda: block_sparse.top_k_blocks(Q, KEY, 0, 8), "`k` is 0; pass an integer >= 1"),
    "top block": (lambda: block_sparse.top_k_blocks(Q, KEY, 2, 0.5), "`block` is 0.5; pass an integer >= 1"),
    "heads": (lambda: block_sparse.top_k_blocks(Q, KEY[:, :, :1].repeat(3, 2), 2, 8), "`key` has 3 heads and `query` has 4"),
    "lengths": (lambda: block_sparse.top_k_blocks(Q, KEY, 2, 8, key_value_seq_lengths=np.array([1, 2])),
                r"`key_value_seq_lengths` has shape \(2,\) and the batch size is 1"),
    "mask": (lambda: block_sparse.top_k_blocks(Q, KEY, 2, 8, mask=np.ones((64, 95), bool)), r"`mask` has shape \(64, 95\).*95 against the key length 96"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
