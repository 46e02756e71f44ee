"""Block-sparse patterns against their definitions, what they drop, and how long their lists of visits are."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _mask, _plan, block_sparse, masks
from jflash._logits import Logits
from jflash._problem import Problem
from pallas_kernels import schedule
from tests.backends import BACKENDS, using

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


@pytest.mark.parametrize("blocks, layers", [(16, 4), (11, 4), (17, 5)])
def test_a_butterfly_connects_everything_in_as_many_layers_as_bits(blocks, layers):
  table = block_sparse.butterfly(blocks, blocks, 1).table.astype(int)
  assert (np.linalg.matrix_power(table, layers) > 0).all() and table.sum(1).max() == layers + 1


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
  """The visits by row and by column as kernels take them, and the plan."""
  sizes = _mask.Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1], **positions)
  problem = Problem(q, k, k, Logits(1.0, mask=mask.bind(sizes), **positions))
  plan = {"xla": _plan.plan_xla, "tpu": _plan.plan_tpu}[backend](problem)
  visits = _plan.make_schedule(problem, dataclasses.replace(plan, walks=False, together=1))
  if plan.walks:  # one walk row by row for both passes, over the same tiles
    walk = _plan.make_schedule(problem, plan).rows
    shape = visits.kinds.shape[2:]
    np.testing.assert_array_equal(walked(walk, shape), visited(visits.rows, shape))
    assert walk.tiles.shape[-1] <= visits.rows.codes.shape[-1]
  return visits.rows, visits.columns, plan


def walked(visits, shape):
  """How often each tile is visited by those who take `RowVisits`, `[B|1, K|1, *shape]`."""
  tiles, starts = np.asarray(visits.tiles), np.asarray(visits.starts)
  count = np.zeros((*tiles.shape[:2], *shape), int)
  for b, h, row in np.ndindex(*tiles.shape[:2], shape[0]):
    np.add.at(count[b, h, row], tiles[b, h, starts[b, h, row]:starts[b, h, row + 1]], 1)
  return count


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


def test_a_bound_is_part_of_the_program():
  mask = masks.BlockSparse(np.eye(4, dtype=bool), 64, np.int64(2))
  assert len(jax.tree.leaves(mask)) == 1 and jax.tree.map(jnp.asarray, mask).most((64, 64)) == 2
  assert repr(mask) == "BlockSparse(table=bool[4,4], block_shape=(64, 64), max_blocks=2)"


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
    "does not fit": (lambda: jflash.attention(Q, KEY, KEY, mask=block_sparse.butterfly(64, 64, 16)),
                     "has 4 x 4 blocks of 16 x 16, and 64 queries by 96 keys need 4 x 6"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
