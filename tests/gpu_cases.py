"""Which cases of the table the interpreted GPU kernels walk, at which sizes: each feature once or twice, as each takes seconds.

The sizes make two to nine tiles of 64 x 64 with ragged ends, and are few, because the oracle compiles anew for each.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jflash import masks
from tests import function_cases, mask_cases  # noqa: F401  (adds to the table)
from tests.cases import CASES, Case, Sizes, columns, rows


class Walk(NamedTuple):
  """A case, and how it is computed."""

  case: Case
  tiles: tuple[int, int] | None = (64, 64)  # None: those of `_tiles_gpu.TABLE`
  traced: bool = False  # whether arrays of the mask are arguments of the compiled function
  precision: str | None = None

  @property
  def name(self) -> str:
    tiles = "" if self.tiles == (64, 64) else "-own_tiles" if self.tiles is None else "-{}x{}".format(*self.tiles)
    return self.case.name + tiles + "-traced" * self.traced


GROUPS = Sizes(B=1, T=70, S=130, N=2, K=1)
BATCH = Sizes(B=2, T=70, S=130, N=2, K=2)
SQUARE = GROUPS._replace(T=130)
TALL = GROUPS._replace(T=130, S=70)
BOTH = BATCH._replace(N=4)
_KNOWN = {case.name: case for case in CASES}


def walk(name: str, sizes: Sizes = GROUPS, dtype: str = "bfloat16", *, tiles: Any = (64, 64), traced: bool = False,
         precision: str | None = None, **changed: int) -> Walk:
  """The case of that name in the table, at other sizes, and in another dtype."""
  case = _KNOWN[name]
  return Walk(dataclasses.replace(case, sizes=sizes._replace(**changed), dtype=dtype), tiles, traced, precision)


def _large_blocks(rng, z):
  """Of two tiles' rows and of one tile's columns."""
  table = np.array([[1, 0, 1], [0, 1, 0]], bool)
  return {"mask": masks.BlockSparse(table, (128, 64))}, np.repeat(np.repeat(table, 128, 0), 64, 1)[:z.T, :z.S]


def _bias_bfloat16(rng, z):
  return {"bias": rng.normal(size=(1, z.N, z.T, z.S)).astype(ml_dtypes.bfloat16), "is_causal": True}, rows(z) >= columns(z)


def _maxima_that_grow(rng, z):
  """From tile to tile by 3, by 6, by 3; in odd rows by 9, by 3, by 12: the output is rescaled from 8 / log2(e) = 5.5 on."""
  steps = np.array([[0, 3, 9, 12], [0, 9, 12, 24]], np.float32)
  return {"bias": steps[np.arange(z.T)[:, None] % 2, columns(z) // 64][None, None]}, True


_KNOWN["maxima_that_grow"] = Case("maxima_that_grow", GROUPS, _maxima_that_grow)
_KNOWN["block_sparse_of_whole_tiles"] = Case("block_sparse_of_whole_tiles", GROUPS, _large_blocks)
_KNOWN["bias_in_bfloat16"] = Case("bias_in_bfloat16", GROUPS, _bias_bfloat16)

SHAPES = [
    walk("plain", BOTH, "float16"), walk("plain", H=150, E=70), walk("causal_more_keys", H=200, E=256), walk("multi_head", BATCH),
    walk("multi_query", N=4),
    walk("width_96", H=96, E=49), walk("width_7", H=7, E=11), walk("one_query", T=1), walk("one_key", S=1),
    walk("one_of_everything", Sizes(1, 1, 1, 1, 1, 1, 1)), walk("huge_logits", SQUARE),
    walk("maxima_that_grow", S=250), walk("maxima_that_grow", dtype="float16", tiles=(128, 64), T=130, S=250),
    # A warpgroup for each 64 rows, or in dK and dV columns.
    walk("causal_square", SQUARE, tiles=(128, 64), S=130), walk("causal_square", SQUARE, tiles=(64, 128)),
    walk("plain", SQUARE, tiles=(128, 128), T=200, S=190), walk("causal_square", SQUARE, tiles=None, T=150, S=150),
    walk("soft_cap_with_a_gradient", SQUARE, tiles=None)]
MASKS = [
    walk("causal_square", BOTH, T=130), walk("causal_more_queries", TALL), walk("window_one_number"),
    walk("window_pair_with_rows_that_see_nothing", TALL), walk("window_of_arrays", traced=True),
    walk("query_lengths", BATCH), walk("key_lengths", BATCH, traced=True), walk("both_lengths_and_causal", BATCH),
    walk("segments_packed", BATCH, T=130, traced=True), walk("segments_with_empty_rows", BATCH),
    walk("positions_permuted", BATCH, traced=True), walk("positions_of_a_decoding_step", B=2, T=3),
    walk("prefix_number"), walk("prefix_per_batch", BATCH, traced=True),
    walk("mask_11TS"), walk("mask_B11S", BATCH), walk("mask_1NT1"), walk("mask_BNTS", BATCH, traced=True),
    walk("mask_with_empty_rows_and_heads", BOTH, N=6), walk("mask_that_keeps_nothing"),
    walk("custom", BOTH), walk("custom_mask_with_operands", SQUARE), walk("custom_mask_with_a_tile_rule"), walk("composed"),
    walk("block_sparse"), walk("block_sparse_per_batch_and_head", BATCH, traced=True),
    walk("block_sparse_of_whole_tiles", T=200, S=190), walk("block_sparse_of_whole_tiles", tiles=(128, 64), T=200, S=190, traced=True),
    walk("block_sparse_of_whole_tiles", SQUARE, tiles=None, T=256, S=192, H=128, E=128)]  # whole in the forward pass alone
SCORES = [
    *(walk(f"bias_{axes}", sizes) for axes, sizes in (
        ("BNTS", BATCH), ("11TS", GROUPS), ("1NTS", GROUPS), ("B11S", BATCH), ("1NT1", GROUPS), ("1N11", GROUPS), ("1111", GROUPS))),
    walk("bias_in_bfloat16"), walk("bias_11TS", tiles=(128, 64), T=150), walk("bias_of_minus_infinity", BATCH, N=3, K=3),
    walk("alibi"), walk("scale_number"), walk("scale_with_a_gradient"), walk("soft_cap"), walk("soft_cap_with_a_gradient"),
    walk("everything_at_once", BOTH),
    walk("score_mod_alibi"), walk("score_mod_t5"), walk("score_mod_of_documents", SQUARE), walk("score_mod_by_row_and_column", BATCH),
    walk("score_mod_without_operands_under_a_cap", BATCH),
    walk("sinks_and_causal"), walk("sinks_where_some_rows_see_nothing", BATCH),
    walk("dropout", BATCH), walk("dropout_by_positions_with_everything", BATCH)]
EXACT = [walk(name, sizes, "float32", precision="highest") for name, sizes in (
    ("causal_square", SQUARE), ("bias_1NTS", GROUPS))]
ALL = SHAPES + MASKS + SCORES + EXACT
