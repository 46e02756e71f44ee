"""Lists of visits against the tables that they come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jflash import _api, _plan
from pallas_kernels import schedule

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def tables(draw):
  """(some, every) of shape [B|1, K|1, rows, columns]; every implies some."""
  shape = tuple(draw(st.sampled_from(sizes)) for sizes in ((1, 3), (1, 2), (1, 4, 5), (1, 3, 6)))
  rng, density = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.sampled_from((0.0, 0.2, 0.6, 1.0)))
  some = rng.random(shape) < density
  return some, some & (rng.random(shape) < 0.5)


def walked(visits, rows: int) -> np.ndarray:
  """The table of kinds that the lists visit; -1 where nothing goes. Asserts order, and that no tile is visited twice."""
  codes, starts = np.asarray(visits.codes), np.asarray(visits.starts)
  kinds = {}
  for b in range(codes.shape[0]):
    for h in range(codes.shape[1]):
      for r in range(rows):
        for code in codes[b, h, starts[b, h, r]:starts[b, h, r + 1]]:
          assert schedule.outer(code) == r
          at = b, h, r, int(schedule.inner(code))
          assert at not in kinds
          kinds[at] = int(schedule.kind(code))
  return kinds


@QUICK
@given(tables())
def test_visits_are_the_table(table):
  some, every = table
  kinds = walked(schedule.visits(schedule.kinds(some, every)), some.shape[2])
  for at in np.ndindex(*some.shape):
    if some[at]:
      assert kinds[at] == (schedule.FULL if every[at] else schedule.PARTIAL)
    else:
      assert kinds.get(at, schedule.EMPTY) == schedule.EMPTY


@QUICK
@given(tables())
def test_every_row_has_a_visit_and_empty_ones_are_alone(table):
  visits = schedule.visits(schedule.kinds(*table))
  counts = np.diff(visits.starts, axis=-1)
  np.testing.assert_array_equal(counts, np.maximum(table[0].sum(-1), 1))
  assert (visits.starts[..., 0] == 0).all()


@QUICK
@given(tables())
def test_the_transpose_visits_the_same_tiles(table):
  some, every = table
  kept = lambda kinds: {at: kind for at, kind in kinds.items() if kind != schedule.EMPTY}
  forward = kept(walked(schedule.visits(schedule.kinds(some, every)), some.shape[2]))
  back = kept(walked(schedule.visits(schedule.kinds(some.swapaxes(-1, -2), every.swapaxes(-1, -2))), some.shape[3]))
  assert forward == {(b, h, r, c): kind for (b, h, c, r), kind in back.items()}


_traced = jax.jit(lambda some, every: schedule.visits(schedule.kinds(some, every)))


@QUICK
@given(tables())
def test_static_and_traced_agree(table):
  static, traced = schedule.visits(schedule.kinds(*table)), _traced(*table)
  assert isinstance(static.codes, np.ndarray) and isinstance(traced.codes, jax.Array)
  np.testing.assert_array_equal(static.starts, traced.starts)
  length = static.codes.shape[-1]
  assert length == static.starts[..., -1].max()  # as long as the longest list, and no longer
  np.testing.assert_array_equal(static.codes, traced.codes[..., :length])


@QUICK
@given(tables())
def test_what_is_left_over_repeats_the_last_tile_as_empty(table):
  for visits in (schedule.visits(schedule.kinds(*table)), _traced(*table)):
    codes, starts = np.asarray(visits.codes), np.asarray(visits.starts)
    for at in np.ndindex(*codes.shape[:2]):
      end = starts[at][-1]
      assert (schedule.kind(codes[at][end:]) == schedule.EMPTY).all()
      assert (codes[at][end:] >> 2 == codes[at][end - 1] >> 2).all()


_traced_pairs = jax.jit(lambda kinds: schedule.visits(kinds, together=2))


@QUICK
@given(tables())
def test_rows_are_filled_up_to_pairs_of_visits(table):
  """An odd row gets an EMPTY visit at the tile of the visit two before: of the pairs that follow each other, that half stays."""
  kinds = schedule.kinds(*table)
  single, static, traced = schedule.visits(kinds), schedule.visits(kinds, together=2), _traced_pairs(kinds)
  assert static.codes.shape[-1] == static.starts[..., -1].max()
  np.testing.assert_array_equal(static.starts, traced.starts)
  np.testing.assert_array_equal(static.codes, traced.codes[..., :static.codes.shape[-1]])
  rows, columns = kinds.shape[2:]
  assert traced.codes.shape[-1] == rows * (columns + columns % 2)
  codes = np.asarray(traced.codes)
  for at in np.ndindex(*codes.shape[:2]):
    for r in range(rows):
      alone = single.codes[at][single.starts[at][r]:single.starts[at][r + 1]]
      paired = codes[at][static.starts[at][r]:static.starts[at][r + 1]]
      np.testing.assert_array_equal(paired[:alone.size], alone)
      np.testing.assert_array_equal(paired[alone.size:], [alone[max(alone.size - 2, 0)] >> 2 << 2] * (alone.size % 2))
    end = static.starts[at][-1]
    assert (schedule.kind(codes[at][end:]) == schedule.EMPTY).all()
    assert (codes[at][end:].reshape(-1, 2) >> 2 == codes[at][end - 2:end] >> 2).all()


def test_traced_segments_skip_what_they_empty():
  """At 32,768 tokens of 40 sequences the same tiles are visited as if their ids had been known while tracing."""
  ids = np.repeat(np.arange(40, dtype=np.int32), np.random.default_rng(0).multinomial(32768, np.full(40, 1 / 40)))[None]
  q = jnp.zeros((1, 32768, 1, 8), jnp.bfloat16)

  def lists(ids):
    problem = _api.make_problem(q, q, q, query_segment_ids=ids, key_value_segment_ids=ids, is_causal=True)
    return _plan.make_schedule(problem, _plan.plan_tpu(problem))

  static, traced = lists(ids), jax.jit(lists)(ids)
  assert isinstance(static.rows.codes, np.ndarray) and isinstance(traced.rows.codes, jax.Array)
  assert static.rows.codes.shape[-1] < 64 * 65 // 2 / 5
  for known, found in ((static.rows, traced.rows), (static.columns, traced.columns)):
    np.testing.assert_array_equal(known.starts, found.starts)
    np.testing.assert_array_equal(known.codes, found.codes[..., :known.codes.shape[-1]])


_cut = jax.jit(lambda kinds, count, most: (schedule.first(kinds, count), schedule.visits(kinds, most)), static_argnums=(1, 2))


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("count", [1, 4])
def test_a_row_cut_short_keeps_its_first_tiles_and_fits_its_list(density, count):
  rng = np.random.default_rng(0)
  some = rng.random((2, 3, 5, 6)) < density
  kinds = schedule.kinds(some, some & (rng.random(some.shape) < 0.5))
  cut = np.asarray(_cut(kinds, count, None)[0])
  for at in np.ndindex(2, 3, 5):
    kept = np.flatnonzero(kinds[at])[:count]
    np.testing.assert_array_equal(np.flatnonzero(cut[at]), kept)
    np.testing.assert_array_equal(cut[at][kept], kinds[at][kept])
  for x, most in ((cut, 5 * count), (cut.swapaxes(-1, -2), 5 * count + 6)):
    want, short = schedule.visits(np.ascontiguousarray(x)), _cut(x, count, most)[1]
    length = want.codes.shape[-1]
    assert length <= short.codes.shape[-1] == min(most, 30)
    np.testing.assert_array_equal(short.starts, want.starts)
    np.testing.assert_array_equal(short.codes[..., :length], want.codes)


def test_codes_hold_the_largest_tile_numbers():
  some = np.zeros((1, 1, 2, schedule.MAX_TILES), bool)
  some[..., -1] = True
  code = schedule.visits(schedule.kinds(some, some)).codes[0, 0, 1]
  assert (schedule.outer(code), schedule.inner(code), schedule.kind(code)) == (1, schedule.MAX_TILES - 1, schedule.FULL)
  tall = some.swapaxes(-1, -2)
  code = schedule.visits(schedule.kinds(tall, tall)).codes[0, 0, -1]
  assert schedule.outer(code) == schedule.MAX_TILES - 1 and code > 0


def test_too_many_tiles():
  some = np.ones((1, 1, 1, schedule.MAX_TILES + 1), bool)
  with pytest.raises(NotImplementedError, match="16385 tiles; at most 16384.*larger tiles"):
    schedule.visits(schedule.kinds(some, some))
  with pytest.raises(NotImplementedError):
    schedule.visits(schedule.kinds(jnp.asarray(some), jnp.asarray(some)))


# Turns ------------------------------------------------------------------------------------------------------------------------

_traced_turns = jax.jit(lambda kinds: (lambda visits: (visits, schedule.turns(visits)))(schedule.row_visits(kinds)))


@QUICK
@given(tables())
def test_turns_count_who_comes_before(table):
  """Rows taken up in `order`, each adding to the tiles that it visits: when it comes, as many have added as its turn says."""
  kinds = schedule.kinds(*table)
  static = schedule.row_visits(kinds)
  for visits, turns in ((static, schedule.turns(static)), _traced_turns(kinds)):
    visits, turns = jax.tree.map(np.asarray, (visits, turns))
    assert turns.shape == visits.tiles.shape and turns.dtype == np.int32
    for at in np.ndindex(*visits.tiles.shape[:2]):
      added = np.zeros(kinds.shape[3], int)
      for row in visits.order[at]:
        own = slice(visits.starts[at][row], visits.starts[at][row + 1])
        np.testing.assert_array_equal(turns[at][own], added[visits.tiles[at][own]])
        added[visits.tiles[at][own]] += 1
      np.testing.assert_array_equal(added, (kinds[at if kinds.shape[:2] == visits.tiles.shape[:2] else (0, 0)] != 0).sum(0))


@QUICK
@given(tables(), st.integers(2, 4))
def test_visits_span_by_span(table, spans):
  """Every tile that is not EMPTY is visited once, in its span; all columns and all spans are visited; who was before is known."""
  kinds = schedule.kinds(*table)
  *lead, rows, columns = kinds.shape
  span = -(-rows // spans)
  spans = -(-rows // span)  # none of them empty
  found = schedule.span_visits(kinds, spans, rows * columns)
  traced = jax.jit(schedule.span_visits, static_argnums=(1, 2))(kinds, spans, rows * columns)
  np.testing.assert_array_equal(found.starts, traced.starts)
  for place in np.ndindex(*lead):
    total = found.starts[place][-1]
    codes = found.codes[place][:total]
    np.testing.assert_array_equal(codes, traced.codes[place][:total])
    assert not schedule.kind(traced.codes[place][total:]).any()
    outer, inner, kind = (of(codes) for of in (schedule.outer, schedule.inner, schedule.kind))
    assert (np.diff(outer) >= 0).all()
    i, j, number = outer // columns * span + inner, outer % columns, outer // columns
    seen = np.zeros((spans * span, columns), int)
    seen[i, j] = kind
    np.testing.assert_array_equal(seen[:rows], kinds[place])
    assert len(set(zip(i, j))) == total and (i < rows).all() and set(j) == set(range(columns)) and set(number) == set(range(spans))
    for n, flag in zip(range(total), schedule.continued(codes)):
      assert flag == ((j == j[n]) & (number < number[n])).any()


@QUICK
@given(tables(), st.integers(1, 4))
def test_full_tiles_come_in_steps(table, together):
  """Of each row all but a multiple are PARTIAL, which is always right; nothing else changes."""
  kinds = schedule.kinds(*table)
  stepped = schedule.in_steps(kinds, together)
  full, before = (np.sum(x == schedule.FULL, axis=-1) for x in (stepped, kinds))
  np.testing.assert_array_equal(full, before - before % together)
  changed = stepped != kinds
  assert (kinds[changed] == schedule.FULL).all() and (stepped[changed] == schedule.PARTIAL).all()
  np.testing.assert_array_equal(schedule.in_steps(jnp.asarray(kinds), together), stepped)
