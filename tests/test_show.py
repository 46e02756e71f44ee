"""`show`: the drawn map against tables that are computed element by element here."""

import contextlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import masks, show

FULL, PARTIAL, EMPTY = "█", "▒", "·"


def drawn(text: str) -> list[list[str]]:
  """The marks of the drawn rows, one for each cell."""
  lines = [line.split()[-1] for line in text.splitlines()[:-2] if line[-1] in FULL + PARTIAL + EMPTY]
  assert all(mark[::2] == mark[1::2] for mark in lines)
  return [list(line[::2]) for line in lines]


def expected(keep: np.ndarray, rows: int, columns: int) -> list[list[str]]:
  """Marks for `keep [T, S]`; a tile that reaches past the end is never full."""
  table = []
  for i in range(0, keep.shape[0], rows):
    table.append([])
    for j in range(0, keep.shape[1], columns):
      tile = keep[i:i + rows, j:j + columns]
      table[-1].append(EMPTY if not tile.any() else FULL if tile.all() and tile.shape == (rows, columns) else PARTIAL)
  return table


SEGMENTS_Q, SEGMENTS_K = np.repeat([0, 1, 2, 3], [10, 30, 8, 12]), np.repeat([0, 1, 2, 3, 4], [20, 10, 3, 7, 50])
SAME = SEGMENTS_Q[:, None] == SEGMENTS_K[None, :]
TABLE = np.random.default_rng(0).random((4, 5)) < 0.5
POSITIONS = np.arange(60) + 40
T, S = 60, 90
Q, K = np.arange(T)[:, None], np.arange(S)[None, :]
WHOLE = np.ones((T, S), bool)
MAPS = {
    "causal": (masks.Causal(), {}, Q >= K),
    "window": (masks.Window(7, 12), {}, (K >= Q - 7) & (K <= Q + 12)),
    "left": (masks.Window(left=20), {}, K >= Q - 20),
    "segments": (masks.Segments(SEGMENTS_Q, SEGMENTS_K), {}, SAME),
    "lengths": (masks.Lengths(33, 71), {}, (Q < 33) & (K < 71)),
    "prefix": (masks.PrefixLM(25), {}, (K < 25) | (Q >= K)),
    "array": (TABLE.repeat(15, 0).repeat(18, 1), {}, TABLE.repeat(15, 0).repeat(18, 1)),
    "blocks": (masks.BlockSparse(TABLE, (15, 18)), {}, TABLE.repeat(15, 0).repeat(18, 1)),
    "custom": (masks.Custom(lambda b, h, q, k: q < k - 1000), {}, None),
    "not": (~masks.Causal(), {}, Q < K),
    "or": (masks.Causal() | masks.Lengths(key=20), {}, (Q >= K) | (K < 20) & WHOLE),
    "positions": (masks.Causal(), {"query_positions": POSITIONS}, Q + 40 >= K),
    "jax": (masks.Segments(jnp.asarray(SEGMENTS_Q), jnp.asarray(SEGMENTS_K)), {}, SAME),
}


@pytest.mark.parametrize("tiles", [(10, 9), (16, 32)])
@pytest.mark.parametrize("name", MAPS)
def test_the_map_is_that_of_the_elements(name, tiles):
  mask, positions, keep = MAPS[name]
  shown = show(mask, T, S, tiles=tiles, **positions)
  table = expected(WHOLE, *tiles) if keep is None else expected(keep, *tiles)
  if keep is None:  # Custom has no tile rule: every tile is partial
    table = [[PARTIAL] * len(row) for row in table]
  assert drawn(str(shown)) == table
  flat = sum(table, [])
  for share, mark in ((shown.skipped, EMPTY), (shown.partial, PARTIAL), (shown.full, FULL)):
    assert share == pytest.approx(flat.count(mark) / len(flat))


def test_the_sentence_and_the_legend():
  shown = show(masks.Causal(), 64, 64, tiles=16)
  assert repr(shown) == str(shown)
  assert str(shown).splitlines() == [
      "Causal()", "64 queries (down) by 64 keys (across), tiles of 16 x 16",
      " 0 ▒▒······", "16 ██▒▒····", "32 ████▒▒··", "48 ██████▒▒",
      "█ full, ▒ partial, · skipped", "37.5% of 16 tiles skipped, 25% need the mask, 37.5% are full"]


def test_a_large_map_is_scaled_down_to_the_page(monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  mask = masks.Causal()
  for _ in range(10):
    mask &= masks.Causal()  # the expression is wider than the page, too
  text = str(show(mask, 4096, 2048, tiles=16))
  assert max(map(len, text.splitlines())) <= 100
  factor = 6  # 256 tiles in at most 47 cells
  assert f"each mark is {factor} x {factor} tiles" in text
  side = factor * 16
  keep = np.arange(4096)[:, None] >= np.arange(2048)[None, :]
  want = expected(keep, side, side)
  got = drawn(text)
  assert (len(got), len(got[0])) == (43, 22)
  assert [row[:21] for row in got[:42]] == [row[:21] for row in want[:42]]  # whole cells; the last ones are ragged
  monkeypatch.setenv("COLUMNS", "40")
  narrow = str(show(masks.Causal(), 4096, 2048, tiles=16))
  assert max(len(line) for line in narrow.splitlines() if line[-1] in "█▒·") <= 40


def test_few_batches_and_heads_are_all_drawn_and_many_are_not():
  ids = np.array([[0] * 32, [0] * 16 + [1] * 16])
  text = str(show(masks.Segments(ids), 32, 32, tiles=16))
  assert drawn(text) == [[FULL, FULL], [FULL, FULL], [FULL, EMPTY], [EMPTY, FULL]]
  assert "batch 0" in text and "batch 1" in text
  assert "25% of 8 tiles skipped" in text and "over all 2 x 1 of batch x heads" in text
  keep = np.ones((2, 3, 32, 32), bool)
  keep[1, 2] = False
  shown = show(keep, 32, 32, tiles=16)
  assert drawn(str(shown)) == [[FULL, FULL]] * 2
  assert "batch 0, head 0, the first of 2 x 3 maps" in str(shown)
  assert shown.skipped == pytest.approx(1 / 6)
  heads = show(keep[0, :, :1], 32, 32, tiles=16)
  assert heads.kinds.shape == (1, 3, 2, 2) and "head 2" in str(heads)


def test_batches_of_different_atoms_combine():
  mask = masks.PrefixLM(np.array([4, 8])) & masks.Lengths(key=np.array([32, 16]))
  mask &= masks.BlockSparse(np.ones((3, 2, 2), bool), 16)
  assert show(mask, 32, 32, tiles=16).kinds.shape == (2, 3, 2, 2)
  assert show(masks.Causal(), 8, 8, tiles=4, query_positions=np.arange(16).reshape(2, 8)).kinds.shape == (2, 1, 2, 2)


def test_tiles_are_no_larger_than_the_mask():
  assert show(masks.Causal(), 20, 30).tiles == (20, 30)


@pytest.mark.parametrize("call, message", [
    (lambda: show(np.ones((8, 9), bool), 8, 8), "`mask` has shape.*9 against the key length 8"),
    (lambda: show(masks.Segments(np.zeros(8, int)), 9, 9), "`masks.Segments.query` has shape .8,. .*length 9"),
    (lambda: show(masks.Segments(np.zeros(8, int)), 8, 9), "`masks.Segments` has no `key`"),
    (lambda: show(masks.BlockSparse(np.ones((2, 2), bool), 4), 8, 16), "8 queries by 16 keys need 2 x 4"),
    (lambda: show(masks.Segments(np.zeros((2, 8), int)) & masks.Lengths(np.ones(3, int)), 8, 8), "batch size"),
    (lambda: show(np.ones((8, 8)), 8, 8), "`mask` has dtype float64"),
    (lambda: show(masks.Causal(), 8, 8, key_value_positions=np.arange(7)), "`key_value_positions` has shape"),
    (lambda: show(masks.Causal(), 0, 8), "`queries` is 0"),
    (lambda: show(masks.Causal(), 8, 2.5), "`keys` is 2.5"),
    (lambda: show(masks.Causal(), 8, 8, tiles=(4, 0)), "`tiles` is .4, 0."),
    (lambda: jax.jit(lambda x: show(masks.Window(x, 0), 8, 8) and x)(jnp.int32(3)), "traced; call `show` outside jit"),
])
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_page_shows_what_is_drawn(monkeypatch):
  """The outputs in docs/masks.md are those of the code above them, and one function is compiled as often as it says."""
  monkeypatch.setattr(jflash, "attention", lambda q, k, v, mask: q)  # which is not what is looked at here
  page = (pathlib.Path(__file__).parent.parent / "docs" / "masks.md").read_text()
  names, compared = {}, 0
  for code, text in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, flags=re.S):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(code, names)
    assert printed.getvalue() == text
    compared += bool(text)
  assert compared > 10
  assert names["windowed"]._cache_size() == 1
