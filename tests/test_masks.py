"""Masks as an algebra: laws on random expressions first, then what each atom says about tiles, and how masks travel."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jflash
from jflash import _mask, masks
from jflash._logits import Logits

B, N, T, S = 2, 3, 23, 31
SIZES = _mask.Sizes(B, N, T, S)
ROW, COLUMN = np.arange(T).reshape(1, 1, T, 1), np.arange(S).reshape(1, 1, 1, S)
QUICK = settings(max_examples=50, deadline=None)
TILES = st.tuples(st.sampled_from((1, 4, 5, 8, 23, 32)), st.sampled_from((1, 4, 7, 8, 31, 32)))


def keep_of(mask, q=None, k=None):
  """What `mask` keeps, element by element, `[B, N, T, S]`."""
  bound = mask.bind(SIZES._replace(query_positions=q, key_positions=k))
  at = _mask.Coordinates(np.arange(B).reshape(B, 1, 1, 1), np.arange(N).reshape(1, N, 1, 1), ROW, COLUMN,
                         ROW if q is None else q, COLUMN if k is None else k)
  return np.broadcast_to(np.asarray(bound.keep(at)), (B, N, T, S))


def table_of(mask, tiles, q=None, k=None):
  """(some, all) by tile."""
  bound = mask.bind(SIZES._replace(query_positions=q, key_positions=k))
  return Logits(1.0, None, None, None, bound, q, k).table(T, S, tiles)


def by_tiles(keep, tiles, reduce):
  """any or all of `keep` over each tile."""
  rows, columns = -(-T // tiles[0]), -(-S // tiles[1])
  out = np.zeros((B, N, rows, columns), bool)
  for i in range(rows):
    for j in range(columns):
      out[:, :, i, j] = reduce(keep[:, :, i * tiles[0]:(i + 1) * tiles[0], j * tiles[1]:(j + 1) * tiles[1]], axis=(2, 3))
  return out


def _rule(batch, head, q, k):
  return (q + 2 * k + head + batch) % 3 == 0


def _atom(kind, seed):
  rng = np.random.default_rng(seed)
  side = lambda: (None, int(rng.integers(0, 12)))[rng.integers(2)]
  lengths = lambda: (int(rng.integers(0, 33)), rng.integers(0, 33, B))[rng.integers(2)]
  ids = lambda n: (np.sort(rng.integers(0, 4, (B, n))), rng.integers(-1, 3, n))[rng.integers(2)]
  lead, density = ((), (N,), (B, 1), (1, 1), (B, N))[rng.integers(5)], (0.02, 0.5, 0.98)[rng.integers(3)]
  block = int(rng.integers(1, 25)), int(rng.integers(1, 33))
  return {
      "causal": lambda: masks.Causal(), "window": lambda: masks.Window(side(), side()),
      "segments": lambda: masks.Segments(ids(T), ids(S)), "prefix": lambda: masks.PrefixLM(lengths()),
      "lengths": lambda: masks.Lengths(*(lengths() if rng.random() < 0.7 else None for _ in range(2))),
      "dense": lambda: masks.Dense(rng.random((*lead, (1, T)[rng.integers(2)], S)) < density),
      "blocks": lambda: masks.BlockSparse(rng.random((*lead, -(-T // block[0]), -(-S // block[1]))) < density, block),
      "custom": lambda: masks.Custom(_rule)}[kind]()


ATOMS = st.builds(_atom, st.sampled_from(("causal", "window", "segments", "prefix", "lengths", "dense", "blocks", "custom")),
                  st.integers(0, 999))
EXPRESSIONS = st.recursive(ATOMS, lambda inner: st.one_of(
    st.builds(operator.and_, inner, inner), st.builds(operator.or_, inner, inner), st.builds(operator.invert, inner)), max_leaves=5)


@st.composite
def positions(draw):
  """None for both, or arbitrary integers for either, in the layout of a bound problem."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  q = draw(st.sampled_from((None, rng.integers(-9, 40, (B, 1, T, 1)), rng.permutation(T).reshape(1, 1, T, 1), ROW + 8)))
  k = draw(st.sampled_from((None, rng.integers(-9, 40, (B, 1, 1, S)), rng.permutation(S).reshape(1, 1, 1, S))))
  return q, k


# Laws -----------------------------------------------------------------------------------------------------------------


@QUICK
@given(EXPRESSIONS, EXPRESSIONS)
def test_de_morgan_and_involution(a, b):
  np.testing.assert_array_equal(keep_of(~(a & b)), keep_of(~a | ~b))
  np.testing.assert_array_equal(keep_of(~(a | b)), keep_of(~a & ~b))
  np.testing.assert_array_equal(keep_of(~~a), keep_of(a))
  np.testing.assert_array_equal(keep_of(a & b), keep_of(a) & keep_of(b))
  np.testing.assert_array_equal(keep_of(a | b), keep_of(a) | keep_of(b))
  np.testing.assert_array_equal(keep_of(~a), ~keep_of(a))


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS, positions(), TILES)
def test_tiles_are_sound(mask, where, tiles):
  keep = keep_of(mask, *where)
  some, every = table_of(mask, tiles, *where)
  assert not (by_tiles(keep, tiles, np.any) & ~some).any(), "a tile that is skipped keeps something"
  assert not (every & ~by_tiles(keep, tiles, np.all)).any(), "a tile that is called full masks something"


_contiguous = lambda n, size: np.arange(n) // size
EXACT = [masks.Causal(), ~masks.Causal(), masks.Window(3, 0), masks.Window(0, 0), masks.Window(None, 5), masks.Window(4), masks.Window(),
         masks.Lengths(9, np.array([0, 20])), masks.PrefixLM(np.array([0, 11])), masks.PrefixLM(6),
         masks.Segments(_contiguous(T, 6), _contiguous(S, 6)),
         masks.Dense(np.random.default_rng(0).random((B, N, T, S)) < 0.1),
         masks.Dense(np.random.default_rng(1).random((N, 1, S)) < 0.5),
         masks.BlockSparse(np.random.default_rng(2).random((3, 4)) < 0.5, (8, 8)),
         masks.BlockSparse(np.random.default_rng(3).random((N, 5, 6)) < 0.6, (5, 6)),
         masks.BlockSparse(np.random.default_rng(4).random((B, 1, 2, 11)) < 0.6, (12, 3))]


@pytest.mark.parametrize("tiles", [(1, 1), (4, 7), (8, 8), (5, 12), (32, 32)])
@pytest.mark.parametrize("mask", EXACT, ids=repr)
def test_tiles_are_exact_where_positions_run_on(mask, tiles):
  keep = keep_of(mask)
  some, every = table_of(mask, tiles)
  np.testing.assert_array_equal(np.broadcast_to(some, (B, N, *some.shape[2:])), by_tiles(keep, tiles, np.any))
  np.testing.assert_array_equal(np.broadcast_to(every, (B, N, *some.shape[2:])), by_tiles(keep, tiles, np.all))


@QUICK
@given(st.sampled_from([masks.Causal(), masks.Lengths(7, 9), masks.PrefixLM(3)]), positions(), TILES)
def test_causal_tiles_are_exact_at_any_positions(mask, where, tiles):
  keep = keep_of(mask, *where)
  some, every = table_of(mask, tiles, *where)
  np.testing.assert_array_equal(np.broadcast_to(some, (B, N, *some.shape[2:])), by_tiles(keep, tiles, np.any))
  if not isinstance(mask, masks.PrefixLM):
    np.testing.assert_array_equal(np.broadcast_to(every, (B, N, *some.shape[2:])), by_tiles(keep, tiles, np.all))


@QUICK
@given(EXPRESSIONS, TILES)
def test_numpy_leaves_give_a_numpy_table(mask, tiles):
  assert all(isinstance(x, np.ndarray) and x.dtype == bool for x in table_of(mask, tiles))


@pytest.mark.parametrize("mask", [
    masks.Window(np.asarray(3), None) & masks.Causal(), masks.Segments(np.arange(T) // 5, np.arange(S) // 7),
    masks.Lengths(np.array([3, 9]), np.array([22, 0])), ~masks.PrefixLM(np.array([5, 12])),
    masks.Dense(np.random.default_rng(0).random((N, T, S)) < 0.1),
    masks.BlockSparse(np.random.default_rng(3).random((B, N, 5, 6)) < 0.6, (5, 6))], ids=repr)
def test_traced_leaves_give_the_same_table(mask):
  bound = mask.bind(SIZES)
  traced = jax.jit(lambda m: Logits(1.0, None, None, None, m).table(T, S, (4, 8)))(bound)
  for ours, want in zip(traced, table_of(mask, (4, 8))):
    np.testing.assert_array_equal(ours, want)


# The values that the atoms keep ------------------------------------------------------------------------------------------


def test_a_window_of_none_and_none_keeps_everything():
  assert keep_of(masks.Window()).all()


@pytest.mark.parametrize("far", [2**30, 2**31 - 1, 2**63 - 1, np.asarray(2**31 - 1, np.int32), np.asarray(2**31 - 1)], ids=repr)
def test_a_window_wider_than_any_sequence_keeps_everything(far):
  """Position + width must not wrap around, neither for elements nor for tiles."""
  q = np.arange(T).reshape(1, 1, T, 1) + 10**9
  k = np.arange(S).reshape(1, 1, 1, S) + 10**9
  for mask in (masks.Window(far, far), masks.Window(0, far) | masks.Window(far, 0)):
    assert keep_of(mask).all() and keep_of(mask, q, k).all() and table_of(mask, (4, 8))[0].all()
  assert table_of(masks.Window(far, far), (4, 8))[1].all()


def test_positions_outside_a_dense_mask_or_a_block_table_see_nothing():
  q = np.full((1, 1, T, 1), -1)
  assert not keep_of(masks.Dense(np.ones((4, 4), bool)), q).any()
  assert not keep_of(masks.BlockSparse(np.ones((4, 4), bool), 8), q).any()
  assert not keep_of(masks.BlockSparse(np.ones((2, 4), bool), 8), q + 17).any()
  assert keep_of(masks.BlockSparse(np.ones((2, 4), bool), 8), q + 16).all()


def test_a_block_shape_may_be_one_number():
  assert masks.BlockSparse(np.ones((2, 2), bool), 16).block_shape == (16, 16)


def test_row_lengths_ignore_positions():
  q = np.full((1, 1, T, 1), 100)
  lengths = np.array([4, 9])
  np.testing.assert_array_equal(keep_of(masks.RowLengths(lengths, None), q), np.broadcast_to(lengths.reshape(B, 1, 1, 1) > ROW, (B, N, T, S)))
  assert not keep_of(masks.Lengths(lengths, None), q).any()


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask, text", [
    (masks.Causal() & masks.Window(31, 0), "Causal() & Window(left=31, right=0)"),
    (masks.Causal() & masks.Window(None, 2), "Causal() & Window(right=2)"),
    ((masks.Causal() | masks.Window()) & ~masks.PrefixLM(3), "(Causal() | Window()) & ~PrefixLM(n=3)"),
    (masks.Causal() | masks.Lengths(key=4) & masks.Causal(), "Causal() | Lengths(key=4) & Causal()"),
    (~(masks.Causal() | masks.Causal()), "~(Causal() | Causal())"),
    (masks.Dense(np.ones((3, 4), bool)), "Dense(array=bool[3,4])"),
    (masks.Lengths(np.zeros(2, np.int32), None), "Lengths(query=int32[2])"),
    (masks.BlockSparse(np.ones((2, 2), bool), (8, 4)), "BlockSparse(table=bool[2,2], block_shape=(8, 4))"),
    (masks.Custom(_rule), "Custom(fn=_rule)")])
def test_repr(mask, text):
  assert repr(mask) == str(mask) == text


def test_a_mask_has_no_truth_value():
  with pytest.raises(TypeError, match="no truth value.*`&`, `\\|` and `~`"):
    bool(masks.Causal())
  with pytest.raises(TypeError, match="no truth value"):
    masks.Causal() and masks.Window()


@pytest.mark.parametrize("array", [np.tri(T, S, dtype=bool), jnp.tri(T, S, dtype=bool)], ids=["numpy", "jax"])
@pytest.mark.parametrize("combine", [operator.and_, operator.or_], ids=["and", "or"])
def test_arrays_join_in_on_either_side(array, combine):
  mask = masks.Window(3, 3)
  left, right = combine(array, mask), combine(mask, array)
  assert isinstance(left, masks.Mask) and isinstance(right, masks.Mask)
  want = combine(np.asarray(array), keep_of(mask))
  np.testing.assert_array_equal(keep_of(left), want)
  np.testing.assert_array_equal(keep_of(right), want)


MANY = [masks.Causal(), masks.Window(4, None), masks.Window(np.asarray(4)), masks.Segments(np.arange(T) // 5, np.arange(S) // 5),
        masks.Lengths(3, np.array([2, 9])), masks.PrefixLM(np.array([2, 9])), masks.Dense(np.ones((T, S), bool)),
        masks.BlockSparse(np.ones((3, 4), bool), 8), masks.Custom(_rule), ~(masks.Causal() & masks.PrefixLM(3)) | masks.Window(1)]


@pytest.mark.parametrize("mask", MANY, ids=repr)
def test_masks_are_pytrees(mask):
  leaves, structure = jax.tree.flatten(mask)
  again = structure.unflatten(leaves)
  assert repr(again) == repr(mask) and jax.tree.structure(again) == structure
  np.testing.assert_array_equal(keep_of(again), keep_of(mask))
  assert hash(structure) is not None
  assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


@pytest.mark.parametrize("mask", [MANY[2], MANY[9], MANY[7] & MANY[4]], ids=repr)
def test_masks_go_through_jit_as_arguments(mask):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=shape).astype("f") for shape in ((B, T, N, 4), (B, S, N, 4), (B, S, N, 5)))
  call = functools.partial(jflash.attention, implementation="xla")
  inside = jax.jit(lambda m: call(q, k, v, mask=m))(mask)
  np.testing.assert_allclose(inside, call(q, k, v, mask=mask), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(inside, call(q, k, v, mask=keep_of(mask)), rtol=1e-6, atol=1e-6)
