"""Block-sparse patterns against their definitions, what they drop, and what is chosen from the data."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _mask, _plan, _reference, block_sparse, masks
from jflash._logits import Logits
from jflash._problem import Problem
from pallas_kernels import schedule
from tests import mask_cases
from tests.backends import BACKENDS, attention, using

# Definitions ----------------------------------------------------------------------------------------------------------

SIZES = [(1000, 1000, 64), (1024, 1024, 128), (50, 700, 48), (700, 50, 48), (5, 7, 1), (1, 1, 16), (640, 384, 128)]


def by_definition(queries, keys, block, kept):
  """The table with `kept(i, j, query blocks, key blocks)` at (i, j), block by block."""
  rows, columns = len(range(0, queries, block)), len(range(0, keys, block))
  return np.array([[bool(kept(i, j, rows, columns)) for j in range(columns)] for i in range(rows)])


def in_band(i, j, local):
  return j in range(i - local, i + local + 1)


def one_flip(i, j, limit=10**9):
  """Whether j is i, or i with one of its bits flipped that is worth at most `limit`."""
  return j in [i] + [i ^ 2**bit for bit in range(20) if 2**bit <= limit]


PATTERNS = {
    "band": (functools.partial(block_sparse.local_global, local=2), lambda i, j, r, c: in_band(i, j, 2)),
    "diagonal": (functools.partial(block_sparse.local_global, local=0), lambda i, j, r, c: i == j),
    "local_global": (functools.partial(block_sparse.local_global, local=1, global_blocks=2),
                     lambda i, j, r, c: in_band(i, j, 1) or i in (0, 1) or j in (0, 1)),
    "no random blocks": (functools.partial(block_sparse.bigbird, random_blocks=0, global_blocks=1),
                         lambda i, j, r, c: in_band(i, j, 1) or i == 0 or j == 0),
    "butterfly": (block_sparse.butterfly, lambda i, j, r, c: one_flip(i % min(r, c), j % min(r, c))),
    "low strides": (functools.partial(block_sparse.butterfly, max_stride=3, global_blocks=1),
                    lambda i, j, r, c: one_flip(i % min(r, c), j % min(r, c), 3) or i == 0 or j == 0),
    "strided": (functools.partial(block_sparse.strided, local=1, stride=3),
                lambda i, j, r, c: in_band(i, j, 1) or j in range(i % 3, c, 3)),
}


@pytest.mark.parametrize("queries, keys, block", SIZES)
@pytest.mark.parametrize("preset, kept", PATTERNS.values(), ids=PATTERNS.keys())
def test_tables_are_their_definitions(preset, kept, queries, keys, block):
  mask = preset(queries, keys, block)
  assert isinstance(mask.table, np.ndarray) and mask.table.dtype == bool and mask.block_shape == (block, block)
  np.testing.assert_array_equal(mask.table, by_definition(queries, keys, block, kept))


@pytest.mark.parametrize("queries, keys, block", SIZES)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_bigbird_draws_as_many_blocks_as_it_says(queries, keys, block, count):
  base = block_sparse.local_global(queries, keys, block, local=1, global_blocks=1).table
  draw = lambda seed: block_sparse.bigbird(queries, keys, block, random_blocks=count, seed=seed).table
  table = draw(7)
  assert (table >= base).all()
  np.testing.assert_array_equal((table & ~base).sum(1), np.minimum(count, (~base).sum(1)))
  np.testing.assert_array_equal(table, draw(7))


def test_bigbird_draws_uniformly_and_by_seed():
  drawn = np.array([block_sparse.bigbird(12, 12, 1, random_blocks=2, seed=seed).table for seed in range(2000)])
  base = block_sparse.local_global(12, 12, 1, local=1, global_blocks=1).table
  left = (~base).sum(1, keepdims=True)
  want = np.where(base, 1, np.minimum(2 / np.maximum(left, 1), 1))
  np.testing.assert_allclose(drawn.mean(0), want, atol=5 * 0.5 / 2000**0.5)
  assert len({table.tobytes() for table in drawn}) > 1900


def test_a_butterfly_connects_everything_in_as_many_layers_as_bits():
  table = block_sparse.butterfly(16, 16, 1).table.astype(int)
  assert (table.sum(1) == 5).all()
  assert (np.linalg.matrix_power(table, 4) > 0).all() and not (np.linalg.matrix_power(table, 3) > 0).all()


@pytest.mark.parametrize("seen", [np.ones((25, 25), bool), np.tri(25, dtype=bool)], ids=["both ways", "causal"])
def test_strided_attention_connects_everything_in_two_layers(seen):
  step = (block_sparse.strided(25, 25, 1, local=4, stride=5).table & seen).astype(int)
  np.testing.assert_array_equal(step @ step > 0, seen)


@pytest.mark.parametrize("queries, keys", [(1000, 1000), (70, 1000)])
@pytest.mark.parametrize("preset", [preset for preset, _ in PATTERNS.values()], ids=PATTERNS.keys())
def test_under_causal_every_query_sees_something(preset, queries, keys):
  table = preset(queries, keys, 64).table.repeat(64, 0).repeat(64, 1)[:queries, :keys]
  assert (table & np.tri(queries, keys, dtype=bool)).any(1).all()


# What is dropped ------------------------------------------------------------------------------------------------------

B, T, S, N, K, H, E = 1, 400, 300, 4, 2, 8, 12
BLOCK = 64
NAMES = "out", "lse", "dq", "dk", "dv"
PRESETS = [block_sparse.local_global(T, S, BLOCK, local=0, global_blocks=1), block_sparse.bigbird(T, S, BLOCK, random_blocks=1),
           block_sparse.butterfly(T, S, BLOCK, max_stride=2), block_sparse.strided(T, S, BLOCK, local=0, stride=3)]


def draw():
  rng = np.random.default_rng(0)
  return [rng.normal(size=(B, *shape)).astype("f") for shape in ((T, N, H), (S, K, H), (S, K, E), (T, N, E), (T, N))]


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_block_reaches_those_that_see_it_and_no_others(backend, traced):
  """NaN in a block of keys and values: queries that do not see it, and keys that nobody sees together with it, stay as they were."""
  table = np.stack([mask.table for mask in PRESETS])  # one preset for each head, `[N, query blocks, key blocks]`
  table[:, 2] = False
  table[:, :, 3] = False

  most = int(table.reshape(K, N // K, *table.shape[1:]).any(1).sum(-1).max())

  def answer(table, q, k, v, dout, dlse):
    mask = masks.BlockSparse(table, BLOCK, max_blocks=most)
    with using(backend, {"xla": (BLOCK, BLOCK), "tpu": (128, 128)}[backend]):
      attend = functools.partial(jflash.attention, mask=mask, implementation=backend, return_residual=True)
      (out, lse), pull = jax.vjp(attend, q, k, v)
      return out, lse, *pull((dout, dlse))

  run = functools.partial(jax.jit(answer), table) if traced else jax.jit(functools.partial(answer, table))
  q, k, v, *cotangents = draw()
  clean = run(q, k, v, *cotangents)
  for bad in (3, 4):
    hurt = (np.arange(S) // BLOCK == bad)[None, :, None, None]
    dirty = run(q, np.where(hurt, np.nan, k), np.where(hurt, np.nan, v), *cotangents)
    see = table[:, :, bad]  # [N, query blocks]
    with_it = (table & see[:, :, None]).any(1).reshape(K, N // K, -1).any(1)  # [K, key blocks] that those who see it see
    assert see.any() == (bad == 4) and not see.all() and not with_it.all()
    rows, columns = (x.repeat(BLOCK, 1)[:, :size].T[None] for x, size in ((see, T), (with_it, S)))
    for name, x, y, hit in zip(NAMES, dirty, clean, (rows, rows, rows, columns, columns)):
      assert np.isnan(x[hit]).any() == (bad == 4), name
      np.testing.assert_array_equal(x[~hit], y[~hit], name)
  blind, unseen = (slice(block * BLOCK, (block + 1) * BLOCK) for block in (2, 3))
  assert not clean[0][:, blind].any() and not clean[2][:, blind].any() and (clean[1][:, blind] == -np.inf).all()
  assert not clean[3][:, unseen].any() and not clean[4][:, unseen].any()


@pytest.mark.parametrize("lead", [(), (N,), (2, 1), (2, N)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_tiles_are_visited_as_blocks_are_kept(backend, lead):
  """Of tiles as large as blocks, those are visited that some head of a group keeps, and no others, forward and backward."""
  table = np.random.default_rng(0).random((*lead, 8, 6)) < 0.3
  q, k = np.zeros((2, 8 * 128, N, 2), "f"), np.zeros((2, 6 * 128, K, 2), "f")
  rows, columns, plan = lists(backend, masks.BlockSparse(table, 128), q, k)
  assert plan.tiles == (128, 128)
  heads = N if lead[-1:] == (N,) else 1
  full = np.broadcast_to(table, (*(lead[:1] if len(lead) == 2 else (1,)), heads, 8, 6))
  want = full.reshape(full.shape[0], -1, N // K, 8, 6).any(2) if heads > 1 else full
  np.testing.assert_array_equal(visited(rows, (8, 6)), want)
  np.testing.assert_array_equal(visited(columns, (6, 8)), want.swapaxes(-1, -2))


@pytest.mark.parametrize("preset", PRESETS, ids=["local_global", "bigbird", "butterfly", "strided"])
def test_the_ragged_end_is_visited_too(preset):
  rows, columns, plan = lists("xla", preset, *draw()[:2])
  assert plan.tiles == (BLOCK, BLOCK)
  np.testing.assert_array_equal(visited(rows, preset.table.shape)[0, 0], preset.table)
  np.testing.assert_array_equal(visited(columns, preset.table.T.shape)[0, 0], preset.table.T)


def lists(backend, mask, q, k, **positions):
  """The visits by row and by column as `attention` takes them, and the plan."""
  sizes = _mask.Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1], **positions)
  problem = Problem(q, k, k, Logits(1.0, mask=mask.bind(sizes), **positions))
  plan = {"xla": _plan.plan_xla, "tpu": _plan.plan_tpu}[backend](problem)
  rows, columns, _ = _plan.make_schedule(problem, plan)
  return rows, columns, plan


def visited(visits, shape):
  """How often each tile is visited that is not empty, `[B|1, K|1, *shape]`."""
  codes, starts = np.asarray(visits.codes), np.asarray(visits.starts)
  count = np.zeros((*codes.shape[:2], *shape), int)
  for b, h in np.ndindex(*codes.shape[:2]):
    for code in codes[b, h, :starts[b, h, -1]]:
      count[b, h, schedule.outer(code), schedule.inner(code)] += schedule.kind(code) != schedule.EMPTY
  return count


# Lists whose length is known though the table is traced ----------------------------------------------------------------


@pytest.mark.parametrize("tile", range(1, 13))
def test_how_many_pieces_a_piece_reaches_into(tile):
  for block in range(1, 13):
    most = max(len({n // block for n in range(i * tile, (i + 1) * tile)}) for i in range(block))
    assert masks._crossed(tile, block) == most


def sparse_table(count, shape):
  """`count` True blocks in each row of `[B, N, rows, columns]`, the same for the N // K heads of a group."""
  lots = np.random.default_rng(0).random((*shape[:1], K, *shape[2:]))
  return np.repeat(lots.argsort(-1) < count, shape[1] // K, 1)


@pytest.mark.parametrize("tiles, block, most", [  # of two blocks in a row
    ((64, 64), (64, 64), 2), ((128, 128), (64, 64), 4), ((48, 80), (64, 64), 8), ((48, 80), (40, 96), 8), ((100, 32), (40, 96), 18)])
def test_lists_are_as_long_as_the_bound_and_visit_the_same(tiles, block, most):
  q, k = np.zeros((2, 1000, N, 1), "f"), np.zeros((2, 1500, K, 1), "f")
  table = jnp.asarray(sparse_table(2, (2, N, -(-1000 // block[0]), -(-1500 // block[1]))))
  rows, columns = -(-1000 // tiles[0]), -(-1500 // tiles[1])
  with _plan.force_tiles(*tiles):
    loose, loose_back, _ = lists("xla", masks.BlockSparse(table, block), q, k)
    tight, tight_back, _ = lists("xla", masks.BlockSparse(table, block, 2), q, k)
  assert loose.codes.shape[-1] == rows * columns
  assert tight.codes.shape[-1] == rows * most and tight_back.codes.shape[-1] == min(rows * columns, rows * most + columns)
  for a, b, shape in ((loose, tight, (rows, columns)), (loose_back, tight_back, (columns, rows))):
    np.testing.assert_array_equal(a.starts, b.starts)
    assert a.starts[..., -1].max() <= b.codes.shape[-1]
    np.testing.assert_array_equal(visited(a, shape), visited(b, shape))


def test_bounds_compose():
  three, five = (masks.BlockSparse(np.eye(8, dtype=bool), 64, n) for n in (3, 5))
  free = masks.BlockSparse(np.eye(8, dtype=bool), 64)
  for mask, most in ((three, 3), (three & five, 3), (three | five, 8), (masks.Causal() & five, 5), (five & masks.Causal(), 5),
                     (three | masks.Causal(), None), (masks.Causal() | three, None), (~three, None), (free, None),
                     (free & three, 3), (masks.Causal() & masks.Window(3), None)):
    assert mask.most((64, 64)) == most, mask


def test_positions_lift_the_bound():
  """Rows that lie in any order may need any tiles."""
  mask, (q, k, *_) = masks.BlockSparse(jnp.eye(7, 5, dtype=bool), (64, 64), 1), draw()
  with _plan.force_tiles(64, 64):
    assert lists("xla", mask, q, k)[0].codes.shape[-1] == 7 * 1
    for positions in ({"query_positions": np.arange(T)[None, None, ::-1, None]}, {"key_positions": np.arange(S)[None, None, None] * 7 % S}):
      assert lists("xla", mask, q, k, **positions)[0].codes.shape[-1] == 7 * 5


def test_a_broken_promise_cuts_rows_off_in_both_passes():
  """The table says three blocks in a row, the promise two: the third is seen by nobody, and no row is left unwritten."""
  table = jnp.asarray(sparse_table(3, (1, N, 7, 5)))
  cut = np.asarray(table & (jnp.cumsum(table, -1) <= 2))
  q, k, v, *cotangents = draw()

  @functools.partial(jax.jit, static_argnums=1)
  def answer(table, most):
    with using("xla", (BLOCK, BLOCK)):
      attend = functools.partial(jflash.attention, mask=masks.BlockSparse(table, BLOCK, most), implementation="xla", return_residual=True)
      out, pull = jax.vjp(attend, q, k, v)
      return *out, *pull(tuple(cotangents))

  for x, y in zip(answer(table, 2), answer(cut, None)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("per_query_head, most", [(False, 3), (True, 9)])
def test_a_choice_knows_its_bound(per_query_head, most):
  q, k = qk(queries=640, keys=640)
  mask = block_sparse.top_k_blocks(q, k, 3, 32, is_causal=True, per_query_head=per_query_head)
  assert mask.most((32, 32)) == most
  assert block_sparse.top_k_blocks(q, k, 50, 32).most((32, 32)) == 20
  union = table_of(mask).reshape(2, 2, 3, 20, 20).any(2)
  assert union.sum(-1).max() <= most


# What is chosen -------------------------------------------------------------------------------------------------------


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


# Errors ---------------------------------------------------------------------------------------------------------------

Q, KEY = np.zeros((1, 64, 4, 8), "f"), np.zeros((1, 96, 2, 8), "f")
ERRORS = {
    "block zero": (lambda: block_sparse.butterfly(64, 64, 0), "`block` is 0; pass an integer >= 1"),
    "block pair": (lambda: block_sparse.strided(64, 64, (8, 8), local=1, stride=2), r"`block` is \(8, 8\); pass an integer >= 1"),
    "queries": (lambda: block_sparse.butterfly(0, 64, 8), "`queries` is 0; pass an integer >= 1"),
    "keys": (lambda: block_sparse.butterfly(64, 64.0, 8), r"`keys` is 64.0; pass an integer >= 1"),
    "local": (lambda: block_sparse.local_global(64, 64, 8, local=-1), "`local` is -1; pass an integer >= 0"),
    "global": (lambda: block_sparse.local_global(64, 64, 8, local=0, global_blocks=-2), "`global_blocks` is -2; pass an integer >= 0"),
    "butterfly global": (lambda: block_sparse.butterfly(64, 64, 8, global_blocks=-2), "`global_blocks` is -2; pass an integer >= 0"),
    "max_stride": (lambda: block_sparse.butterfly(64, 64, 8, max_stride=0), "`max_stride` is 0; pass an integer >= 1"),
    "random": (lambda: block_sparse.bigbird(64, 64, 8, random_blocks=-1), "`random_blocks` is -1; pass an integer >= 0"),
    "seed": (lambda: block_sparse.bigbird(64, 64, 8, seed=-1), "`seed` is -1; pass an integer >= 0"),
    "stride": (lambda: block_sparse.strided(64, 64, 8, local=1, stride=0), "`stride` is 0; pass an integer >= 1"),
    "strided local": (lambda: block_sparse.strided(64, 64, 8, local=True, stride=2), "`local` is True; pass an integer >= 0"),
    "max_blocks": (lambda: masks.BlockSparse(np.eye(4, dtype=bool), 8, 0), "`masks.BlockSparse.max_blocks` is 0; pass an integer >= 1"),
    "promise": (lambda: masks.BlockSparse(np.tri(4, dtype=bool), 8, 3),
                "`masks.BlockSparse.max_blocks` is 3 and a row of `table` has 4 True blocks; pass at least 4, or None"),
    "jax promise": (lambda: masks.BlockSparse(jnp.tri(4, dtype=bool), 8, 2), "max_blocks` is 2 and a row of `table` has 4 True"),
    "k": (lambda: block_sparse.top_k_blocks(Q, KEY, 0, 8), "`k` is 0; pass an integer >= 1"),
    "top block": (lambda: block_sparse.top_k_blocks(Q, KEY, 2, 0.5), "`block` is 0.5; pass an integer >= 1"),
    "heads": (lambda: block_sparse.top_k_blocks(Q, KEY[:, :, :1].repeat(3, 2), 2, 8), "`key` has 3 heads and `query` has 4"),
    "lengths": (lambda: block_sparse.top_k_blocks(Q, KEY, 2, 8, key_value_seq_lengths=np.array([1, 2])),
                r"`key_value_seq_lengths` has shape \(2,\) and the batch size is 1"),
    "mask": (lambda: block_sparse.top_k_blocks(Q, KEY, 2, 8, mask=np.ones((64, 95), bool)), r"`mask` has shape \(64, 95\).*95 against the key length 96"),
    "does not fit": (lambda: jflash.attention(Q, KEY, KEY, mask=block_sparse.butterfly(64, 64, 16)),
                     "has 4 x 4 blocks of 16 x 16, and 64 queries by 96 keys need 4 x 6"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
