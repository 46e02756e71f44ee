"""One table of cases, walked by every backend, forward and backward.

Each case says its sizes, draws its arguments from a seeded generator, and states apart, in plain NumPy that shares nothing with
`jflash.masks`, which keys each query may see. Sizes are pairwise distinct, and 1 only where 1 is the point.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jflash import masks

SCORE_TERMS = ("bias", "alibi_slopes", "scale", "logits_soft_cap")  # the keywords that get a gradient if they are arrays
OTHER_TERMS = ("sinks", "score_operands")  # and those that are no terms of single scores


class Sizes(NamedTuple):
  """B batch, T queries, S keys, N query heads, K key/value heads, H query/key width, E value width."""

  B: int = 2
  T: int = 139
  S: int = 261
  N: int = 6
  K: int = 3
  H: int = 20
  E: int = 12


class Built(NamedTuple):
  """The arguments of `jflash.attention` as NumPy arrays, and the truth about the mask."""

  q: Any
  k: Any
  v: Any
  kwargs: dict[str, Any]
  keep: Any  # [B, N, T, S]
  factors: Any = 1.0  # of dropout, [B, N, T, S]


@dataclasses.dataclass(frozen=True)
class Case:
  """A named problem; `draw(rng, sizes) -> (kwargs, keep[, factors])`, and keep broadcasts to `[B, N, T, S]`."""

  name: str
  sizes: Sizes
  draw: Callable[[np.random.Generator, Sizes], tuple[dict[str, Any], Any]]
  dtype: str = "float32"
  stretch: tuple[float, float] = (1.0, 1.0)  # of queries and keys
  only: tuple[str, ...] | None = None  # the backends that walk it; None is all

  def build(self) -> Built:
    rng, z = np.random.default_rng(zlib.crc32(self.name.encode())), self.sizes
    to_dtype = lambda x: np.asarray(x, np.float32).astype(_dtype(self.dtype))
    q = to_dtype(rng.normal(size=(z.B, z.T, z.N, z.H)) * self.stretch[0])
    k = to_dtype(rng.normal(size=(z.B, z.S, z.K, z.H)) * self.stretch[1])
    v = to_dtype(rng.normal(size=(z.B, z.S, z.K, z.E)))
    kwargs, keep, *factors = self.draw(rng, z)
    return Built(q, k, v, kwargs, np.array(np.broadcast_to(keep, (z.B, z.N, z.T, z.S))), *factors)


def _dtype(name: str) -> Any:
  import ml_dtypes  # a dependency of JAX
  return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


CASES: list[Case] = []


def case(*, dtypes: tuple[str, ...] = ("float32",), stretch: tuple[float, float] = (1.0, 1.0),
         only: tuple[str, ...] | None = None, **sizes: int) -> Any:
  """Adds the decorated function to the table under its own name, once per dtype; float64 is for plain JAX alone."""

  def add(draw):
    for dtype in dtypes:
      name = draw.__name__ + ("" if dtype == "float32" else f"_{dtype}")
      CASES.append(Case(name, Sizes(**sizes), draw, dtype, stretch, ("xla",) if dtype == "float64" else only))
    return draw

  return add


def rows(z: Sizes) -> Any:
  return np.arange(z.T)[:, None]


def columns(z: Sizes) -> Any:
  return np.arange(z.S)[None, :]


def per_batch(x: Any) -> Any:
  return np.asarray(x)[:, None, None, None]


ALL_DTYPES = ("float32", "bfloat16", "float16", "float64")
XLA = ("xla",)

# Shapes ---------------------------------------------------------------------------------------------------------------


@case(dtypes=ALL_DTYPES)
def plain(rng, z):
  return {}, True


@case(N=3)
def multi_head(rng, z):
  return {}, True


@case(K=1)
def multi_query(rng, z):
  return {}, True


for _width in (1, 7, 40, 80, 96):
  @case(H=_width, E=_width + 4 if _width % 2 else _width // 2 + 1, only=XLA if _width in (40, 80) else None)
  def width(rng, z):
    return {}, True
  CASES[-1] = dataclasses.replace(CASES[-1], name=f"width_{_width}")


@case(T=1)
def one_query(rng, z):
  return {}, True


@case(S=1)
def one_key(rng, z):
  return {}, True


@case(B=1, T=1, S=1, N=1, K=1, H=1, E=1)
def one_of_everything(rng, z):
  return {}, True


@case(T=128, S=256, only=("tpu",))
def whole_tiles(rng, z):
  return {}, True


@case(T=96, S=240, only=XLA)
def whole_tiles_of_48_and_80(rng, z):
  return {}, True


# Causal and windows ---------------------------------------------------------------------------------------------------


@case(T=197, S=197, dtypes=ALL_DTYPES)
def causal_square(rng, z):
  return {"is_causal": True}, rows(z) >= columns(z)


@case()
def causal_more_keys(rng, z):
  return {"is_causal": True}, rows(z) >= columns(z)


@case(T=261, S=139)
def causal_more_queries(rng, z):
  return {"is_causal": True}, rows(z) >= columns(z)


@case()
def window_one_number(rng, z):
  return {"local_window_size": 31}, abs(rows(z) - columns(z)) <= 31


@case(T=261, S=139)
def window_pair_with_rows_that_see_nothing(rng, z):
  i, j = rows(z), columns(z)
  return {"local_window_size": (17, 40)}, (j >= i - 17) & (j <= i + 40)


@case(only=XLA)
def window_right_only(rng, z):
  i, j = rows(z), columns(z)
  return {"local_window_size": (0, 53)}, (j >= i) & (j <= i + 53)


@case(only=XLA)
def window_of_itself(rng, z):
  return {"local_window_size": 0}, rows(z) == columns(z)


for _left in (47, 48, 79, 80, 127, 128):
  @case(T=197, S=197, only=("tpu",) if _left > 100 else XLA)
  def window(rng, z, left=_left):
    i, j = rows(z), columns(z)
    return {"local_window_size": (left, 0), "is_causal": True}, (j >= i - left) & (j <= i)
  CASES[-1] = dataclasses.replace(CASES[-1], name=f"causal_window_{_left}")


# Mask arrays ----------------------------------------------------------------------------------------------------------


def _mask_array(name: str, axes: str, only: Any = None, strip: bool = False) -> None:
  """A random mask that varies along `axes` of BNTS, and has no leading axes of size 1 if `strip`."""

  @case(only=only)
  def draw(rng, z):
    shape = [getattr(z, axis) if axis in axes else 1 for axis in "BNTS"]
    keep = rng.random(shape) < 0.6
    return {"mask": keep.reshape(shape["BNTS".index(axes[0]):]) if strip else keep}, keep

  CASES[-1] = dataclasses.replace(CASES[-1], name=name)


_mask_array("mask_11TS", "TS")
_mask_array("mask_B11S", "BS")
_mask_array("mask_1NT1", "NT", XLA)
_mask_array("mask_TS", "TS", XLA, strip=True)
_mask_array("mask_NTS", "NTS", strip=True)
_mask_array("mask_BNTS", "BNTS")
_mask_array("mask_S", "S", XLA, strip=True)


@case()
def mask_with_empty_rows_and_heads(rng, z):
  keep = rng.random((z.B, z.N, z.T, z.S)) < 0.5
  keep[:, :, 40:60] = False
  keep[1, 4] = False
  keep[0, :, :, 100:240] = False
  return {"mask": keep}, keep


@case()
def mask_that_keeps_nothing(rng, z):
  return {"mask": np.zeros((z.B, 1, 1, z.S), bool)}, False


@case(only=XLA)
def mask_and_everything_structural(rng, z):
  keep, i, j = rng.random((z.B, 1, z.T, z.S)) < 0.7, rows(z), columns(z)
  return ({"mask": keep, "is_causal": True, "local_window_size": (60, 3), "key_value_seq_lengths": np.array([200, 70])},
          keep & (i >= j) & (j >= i - 60) & (j < per_batch([200, 70])))


# Bias -----------------------------------------------------------------------------------------------------------------


def _bias(axes: str, only: Any = None, dtypes: tuple[str, ...] = ("float32",), strip: bool = False) -> None:
  label = "".join(axis if axis in axes else "1" for axis in "BNTS")
  label = label[label.index(axes[0]):] if strip else label

  def draw(rng, z):
    shape = [getattr(z, axis) if axis in axes else 1 for axis in "BNTS"]
    bias = rng.normal(size=shape).astype(np.float32)
    return {"bias": bias.reshape(shape["BNTS".index(axes[0]):]) if strip else bias, "is_causal": True}, rows(z) >= columns(z)

  draw.__name__ = f"bias_{label}"
  case(only=only, dtypes=dtypes)(draw)


for _number in range(16):
  _axes = "".join(axis for axis, bit in zip("BNTS", (8, 4, 2, 1)) if _number & bit)
  _bias(_axes, None if _axes in ("BNTS", "TS", "BS", "NT", "N", "") else XLA,
        ("float32", "bfloat16", "float16") if _axes == "NTS" else ("float32",))
_bias("TS", XLA, strip=True)
_bias("NTS", XLA, strip=True)


@case()
def bias_of_minus_infinity(rng, z):
  bias = rng.normal(size=(z.N, z.T, z.S)).astype(np.float32)
  hidden = rng.random(bias.shape) < 0.4
  hidden[2, 30:50] = True  # rows that see nothing
  return {"bias": np.where(hidden, -np.inf, bias).astype(np.float32)}, ~hidden


@case()
def bias_below_any_sentinel(rng, z):
  bias = np.full((z.B, 1, z.T, z.S), -2e32, np.float32)
  bias[:, :, np.arange(z.T), rng.integers(0, z.S, z.T)] = -1e32
  return {"bias": bias}, True


# Lengths and segments -------------------------------------------------------------------------------------------------


@case()
def query_lengths(rng, z):
  n = np.array([67, 128], np.int32)
  return {"query_seq_lengths": n}, rows(z) < per_batch(n)


@case()
def key_lengths(rng, z):
  n = np.array([256, 33], np.int32)
  return {"key_value_seq_lengths": n}, columns(z) < per_batch(n)


@case(B=4, N=3, only=XLA)
def both_lengths_zero_and_full(rng, z):
  t, s = np.array([z.T, 0, 48, 100], np.int32), np.array([z.S, 100, 0, 80], np.int32)
  return {"query_seq_lengths": t, "key_value_seq_lengths": s}, (rows(z) < per_batch(t)) & (columns(z) < per_batch(s))


@case()
def both_lengths_and_causal(rng, z):
  t, s = np.array([100, 0], np.int32), np.array([90, 260], np.int32)
  return ({"query_seq_lengths": t, "key_value_seq_lengths": s, "is_causal": True},
          (rows(z) < per_batch(t)) & (columns(z) < per_batch(s)) & (rows(z) >= columns(z)))


@case(T=197, S=197)
def segments_packed(rng, z):
  ids = np.sort(rng.integers(0, 5, (z.B, z.T)), axis=1).astype(np.int32)
  return ({"query_segment_ids": ids, "key_value_segment_ids": ids, "is_causal": True},
          (ids[:, None, :, None] == ids[:, None, None, :]) & (rows(z) >= columns(z)))


@case()
def segments_with_empty_rows(rng, z):
  q, k = rng.integers(0, 4, (z.B, z.T)).astype(np.int32), np.sort(rng.integers(1, 4, (z.B, z.S)), axis=1).astype(np.int32)
  return {"query_segment_ids": q, "key_value_segment_ids": k}, q[:, None, :, None] == k[:, None, None, :]


@case(only=XLA)
def segments_shared_by_the_batch(rng, z):
  q, k = np.arange(z.T) // 50 - 1, np.arange(z.S) // 60 - 1  # -1 is an id like any other
  return {"query_segment_ids": q, "key_value_segment_ids": k}, q[:, None] == k[None, :]


# Positions ------------------------------------------------------------------------------------------------------------


@case(only=XLA)
def positions_shared_by_the_batch(rng, z):
  q, k = np.arange(z.T) * 2 + 5, np.arange(z.S)
  return {"query_positions": q, "key_value_positions": k, "is_causal": True}, q[:, None] >= k[None, :]


@case()
def positions_permuted(rng, z):
  q = np.stack([rng.permutation(z.T) for _ in range(z.B)]).astype(np.int32)
  k = np.stack([rng.permutation(z.S) for _ in range(z.B)]).astype(np.int32)
  d = q[:, None, :, None] - k[:, None, None, :]
  return {"query_positions": q, "key_value_positions": k, "is_causal": True, "local_window_size": (70, 2)}, (d >= 0) & (d <= 70)


@case(T=3)
def positions_of_a_decoding_step(rng, z):
  q = np.array([[250, 251, 252], [99, 100, 101]], np.int32)
  return ({"query_positions": q, "is_causal": True, "alibi_slopes": _slopes(z.N)}, q[:, None, :, None] >= columns(z))


@case(only=XLA)
def positions_of_keys_only(rng, z):
  k = (np.arange(z.S) - 150)[None] * np.array([[1], [-1]])
  return {"key_value_positions": k, "mask": masks.Window(20, 40)}, abs(k[:, None, None, :] - rows(z) - 10) <= 30


# Score terms ----------------------------------------------------------------------------------------------------------


def _slopes(n: int) -> Any:
  return (2.0 ** -np.linspace(1, 6, n)).astype(np.float32)


@case()
def alibi(rng, z):
  return {"alibi_slopes": _slopes(z.N)}, True


@case(only=XLA)
def alibi_per_batch_with_positions(rng, z):
  slopes = np.stack([_slopes(z.N), _slopes(z.N)[::-1]])
  q, k = np.sort(rng.integers(0, 300, (z.B, z.T))), np.sort(rng.integers(0, 300, (z.B, z.S)))
  return ({"alibi_slopes": slopes, "query_positions": q, "key_value_positions": k, "is_causal": True},
          q[:, None, :, None] >= k[:, None, None, :])


@case(dtypes=("float32", "bfloat16", "float16"))
def soft_cap(rng, z):
  return {"logits_soft_cap": 2.5, "is_causal": True}, rows(z) >= columns(z)


@case(only=XLA)
def soft_cap_with_a_gradient(rng, z):
  return {"logits_soft_cap": np.full((), 1.5, np.float32)}, True


@case(only=XLA)
def scale_number(rng, z):
  return {"scale": 0.7}, True


@case()
def scale_with_a_gradient(rng, z):
  return {"scale": np.full((), 0.3, np.float32), "is_causal": True}, rows(z) >= columns(z)


@case(dtypes=ALL_DTYPES)
def everything_at_once(rng, z):
  n = np.array([137, 90], np.int32)
  keep = (rng.random((z.B, z.N, z.T, z.S)) < 0.7)
  return ({"bias": rng.normal(size=(1, z.N, z.T, z.S)).astype(np.float32), "alibi_slopes": _slopes(z.N),
           "logits_soft_cap": np.full((), 3.0, np.float32), "scale": np.full((1,), 0.4, np.float32), "mask": keep,
           "is_causal": True, "local_window_size": (90, 5), "query_seq_lengths": n},
          keep & (rows(z) >= columns(z)) & (columns(z) >= rows(z) - 90) & (rows(z) < per_batch(n)))


# Hard numbers ---------------------------------------------------------------------------------------------------------


@case(stretch=(5.0, 3.0), dtypes=("float32", "bfloat16"))
def huge_logits(rng, z):
  return {"is_causal": True}, rows(z) >= columns(z)


@case(stretch=(100.0, 100.0))
def scores_of_ten_thousand(rng, z):
  return {}, True


@case(only=XLA)
def bias_of_ten_thousand(rng, z):
  return {"bias": (1e4 * rng.choice([-1, 1], (z.B, 1, 1, z.S))).astype(np.float32), "local_window_size": 2}, \
      abs(rows(z) - columns(z)) <= 2
