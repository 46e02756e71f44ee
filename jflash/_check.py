"""Every error that a caller can meet: it names the argument, both sides and the fix, before anything runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

FLOATS = ("bfloat16", "float16", "float32", "float64")


def as_array(x: Any) -> Any:
  """NumPy stays NumPy, so that what is known while tracing stays known; anything else becomes a JAX array."""
  return x if isinstance(x, (np.ndarray, jax.Array)) else np.asarray(x) if isinstance(x, (list, tuple)) else jnp.asarray(x)


# query, key, value ----------------------------------------------------------------------------------------------------


def inputs(query: Any, key: Any, value: Any) -> None:
  """Checks ranks, sizes, head counts and dtypes of `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, E]` (or without B)."""
  for name, x in (("query", query), ("key", key), ("value", value)):
    sharding(name, x)
  if query.ndim not in (3, 4):
    raise ValueError(f"`query` has {query.ndim} axes and shape {query.shape}; pass [B, T, N, H] or, unbatched, [T, N, H].")
  for name, x in (("key", key), ("value", value)):
    if x.ndim != query.ndim:
      raise ValueError(f"`{name}` has {x.ndim} axes and `query` has {query.ndim}; pass both with, or both without, a batch axis.")
  for name, x in (("query", query), ("key", key), ("value", value)):
    if 0 in x.shape:
      raise ValueError(f"`{name}` has shape {x.shape}; every size must be at least 1.")
    if str(x.dtype) not in FLOATS:
      raise ValueError(f"`{name}` has dtype {x.dtype}; cast it to one of {', '.join(FLOATS)}.")
    if x.dtype != query.dtype:
      raise ValueError(f"`{name}` has dtype {x.dtype} and `query` has {query.dtype}; cast them to one dtype.")
  _same("key", key.shape[:-3], "query", query.shape[:-3], "batch size")
  _same("value", value.shape[:-3], "query", query.shape[:-3], "batch size")
  _same("value", value.shape[-3], "key", key.shape[-3], "length")
  _same("value", value.shape[-2], "key", key.shape[-2], "number of heads")
  _same("key", key.shape[-1], "query", query.shape[-1], "head width")
  if query.shape[-2] % key.shape[-2]:
    raise ValueError(f"`key` has {key.shape[-2]} heads and `query` has {query.shape[-2]}; query heads must be a multiple of key "
                     "heads. The layout is [B, T, N, H]: heads come after the sequence.")


def _same(name: str, size: Any, other: str, expected: Any, what: str) -> None:
  if size != expected:
    show = lambda s: s[0] if isinstance(s, tuple) and s else s
    raise ValueError(f"`{name}` has {what} {show(size)} and `{other}` has {what} {show(expected)}; they must be equal. The layout "
                     "is [B, T, N, H], with the sequence before the heads.")


def real_scalar(x: Any, name: str) -> Any:
  """A Python float, or `[1, 1, 1, 1]` where it is an array (which may be traced, and gets a gradient)."""
  if isinstance(x, (bool, str)) or (not isinstance(x, (int, float)) and not hasattr(x, "dtype")):
    raise TypeError(f"`{name}` is {x!r}; pass a number or a scalar array.")
  if isinstance(x, (int, float, np.number)):
    return float(x)
  if x.size != 1 or not jnp.issubdtype(x.dtype, jnp.number):
    raise ValueError(f"`{name}` has shape {x.shape} and dtype {x.dtype}; pass a number or a scalar array.")
  return x.reshape(1, 1, 1, 1)


def positive(x: Any, name: str) -> Any:
  """A real scalar that is greater than zero (as far as that is known while tracing)."""
  if isinstance(x, (int, float, np.number)) and not x > 0:
    raise ValueError(f"`{name}` is {x}; it must be greater than 0, or None for none.")
  return real_scalar(x, name)


def both_or_none(a: Any, name_a: str, b: Any, name_b: str) -> None:
  if (a is None) != (b is None):
    given, missing = (name_a, name_b) if b is None else (name_b, name_a)
    raise ValueError(f"`{given}` is given and `{missing}` is not; pass both.")


def slopes(x: Any, sizes: Any) -> Any:
  """ALiBi slopes `[N]` or `[B, N]` as `[B|1, N, 1, 1]`."""
  x = as_array(x)
  if x.shape not in ((sizes.heads,), (sizes.batch, sizes.heads)):
    raise ValueError(f"`alibi_slopes` has shape {x.shape} and `query` has {sizes.heads} heads; pass one slope per query head, "
                     f"({sizes.heads},) or ({sizes.batch}, {sizes.heads}).")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"`alibi_slopes` has dtype {x.dtype}; cast it to float32.")
  return x.reshape((1, sizes.heads, 1, 1) if x.ndim == 1 else (sizes.batch, sizes.heads, 1, 1))


def ids(x: Any, size: int, name: str, of: str) -> Any:
  """Integers, one for each batch element or head."""
  x = integers(x, name)
  if x.shape != (size,):
    raise ValueError(f"`{name}` has shape {x.shape} and `query` has {size} {of}; pass one integer for each, ({size},).")
  return x


def sinks(x: Any, heads: int) -> Any:
  """One float for each query head."""
  x = as_array(x)
  if x.shape != (heads,):
    raise ValueError(f"`sinks` has shape {x.shape} and `query` has {heads} heads; pass one logit per query head, ({heads},).")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"`sinks` has dtype {x.dtype}; cast it to float32.")
  return x


# Packed sequences -----------------------------------------------------------------------------------------------------


_OF_A_BATCH = ("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids", "batch_ids")

_OF_A_PACKING = ("scale", "is_causal", "local_window_size", "logits_soft_cap", "alibi_slopes", "score_mod", "score_operands",
                 "dropout_rate", "dropout_key", "head_ids")


def varlen(query: Any, key: Any, value: Any, options: dict[str, Any]) -> None:
  """The arrays of `attention_varlen` have no batch axis, and there are no options that speak of one."""
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.ndim != 3:
      raise ValueError(f"`{name}` has {x.ndim} axes and shape {x.shape}; pass [total, heads, width], one sequence after another, "
                       "or use jflash.attention for a batch.")
  for name in options:
    if name in _OF_A_BATCH:
      raise TypeError(f"`{name}` is an argument of attention, not of attention_varlen; `cu_seqlens_q` and `cu_seqlens_k` say where "
                      "sequences begin and end.")
    if name not in _OF_A_PACKING:
      raise TypeError(f"attention_varlen has no argument `{name}`; besides those in its signature it takes "
                      f"{', '.join(_OF_A_PACKING)}.")


def cumulative(x: Any, total: int, name: str) -> Any:
  """Integers `[sequences + 1]`, from 0 up to at most `total` (as far as they are known while tracing)."""
  x = integers(x, name)
  if x.ndim != 1 or x.shape[0] < 2:
    raise ValueError(f"`{name}` has shape {x.shape}; pass [sequences + 1] integers, 0 and the end of each sequence.")
  if isinstance(x, np.ndarray) and (x[0] != 0 or (np.diff(x) < 0).any() or x[-1] > total):
    raise ValueError(f"`{name}` is {x.tolist()} and there are {total} tokens; it must begin with 0, not decrease, and end at "
                     f"{total} or before.")
  return x


def as_many(a: Any, name_a: str, b: Any, name_b: str) -> None:
  if a.shape != b.shape:
    raise ValueError(f"`{name_a}` has shape {a.shape} and `{name_b}` has {b.shape}; they must count the same sequences. An empty "
                     "one repeats the end of the one before.")


# Dropout --------------------------------------------------------------------------------------------------------------


def dropout(rate: Any, key: Any) -> Any:
  """The key as a JAX array, or None where nothing is dropped."""
  if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)):
    raise TypeError(f"`dropout_rate` is {rate!r}; pass a Python number, 0 <= rate < 1, which is part of the compiled program.")
  if not 0 <= rate < 1:
    raise ValueError(f"`dropout_rate` is {rate}; it must be at least 0 and less than 1.")
  if rate == 0:
    return None
  if key is None:
    raise ValueError(f"`dropout_rate` is {rate} and `dropout_key` is None; pass a key, jax.random.key(seed), another one at every "
                     "step, or dropout_rate=0.")
  typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  raw = not typed and getattr(key, "dtype", None) == jnp.uint32
  if not (typed and key.shape == () or raw and key.shape in ((2,), (4,))):
    what = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
    raise ValueError(f"`dropout_key` is {what}; pass one key, jax.random.key(seed). Under jax.vmap, map over the keys.")
  return jnp.asarray(key) if raw else key


# Arrays of masks, laid out as [B|1, N|1, T|1, S|1] --------------------------------------------------------------------


def integers(x: Any, name: str) -> Any:
  x = as_array(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"`{name}` has dtype {x.dtype}; cast it to int32.")
  if isinstance(x, np.ndarray) and x.size:
    for extreme in (x.min(), x.max()):
      fits_int32(int(extreme), name)
  return x.astype(np.int32)


def fits_int32(x: int, name: str) -> None:
  limits = np.iinfo(np.int32)
  if not limits.min <= x <= limits.max:
    raise ValueError(f"`{name}` holds {x}, which does not fit into int32; pass values from {limits.min} to {limits.max}.")


def boolean(x: Any, name: str) -> None:
  dtype = getattr(x, "dtype", None)
  if dtype is None or not isinstance(dtype, np.dtype):  # a label or a span in place of the array
    return
  if dtype != np.bool_:
    raise ValueError(f"`{name}` has dtype {dtype}; it must be bool, True where a key is seen. An additive mask goes to `bias`; "
                     "for 0 and 1 pass `array != 0`.")


def scalar(x: Any, name: str) -> Any:
  x = integers(x, name)
  if x.size != 1:
    raise ValueError(f"`{name}` has shape {x.shape}; pass an integer or an integer scalar array.")
  return x.reshape(1, 1, 1, 1)


def per_batch(x: Any, sizes: Any, name: str) -> Any:
  """Integers `[B]` (or a scalar) as `[B|1, 1, 1, 1]`."""
  x = integers(x, name)
  if x.shape not in ((), (1,), (sizes.batch,)):
    raise ValueError(f"`{name}` has shape {x.shape} and the batch size is {sizes.batch}; pass one integer per batch element, "
                     f"({sizes.batch},).")
  return x.reshape(-1, 1, 1, 1)


def length(x: Any, sizes: Any, name: str) -> Any:
  """A Python integer as it is, which stays static; anything else as `per_batch`."""
  if x is None or isinstance(x, (bool, float, str)):
    raise TypeError(f"`{name}` is {x!r}; pass an integer, or integers [B].")
  if isinstance(x, (int, np.integer)):
    fits_int32(int(x), name)
    return int(x)
  return per_batch(x, sizes, name)


def per_query(x: Any, sizes: Any, name: str) -> Any:
  """Integers `[B, T]` or `[T]` as `[B|1, 1, T, 1]`."""
  return _per_token(x, sizes.batch, sizes.queries, "query", name)[:, None, :, None]


def per_key(x: Any, sizes: Any, name: str) -> Any:
  """Integers `[B, S]` or `[S]` as `[B|1, 1, 1, S]`."""
  return _per_token(x, sizes.batch, sizes.keys, "key", name)[:, None, None, :]


def _per_token(x: Any, batch: int, length: int, side: str, name: str) -> Any:
  x = integers(x, name)
  if x.shape not in ((length,), (1, length), (batch, length)):
    raise ValueError(f"`{name}` has shape {x.shape} and `{side}` has batch size {batch} and length {length}; pass ({length},) or "
                     f"({batch}, {length}).")
  return x.reshape(-1, length)


def at_most_4d(x: Any, name: str) -> None:
  if x.ndim > 4:
    raise ValueError(f"`{name}` has shape {x.shape}; it must broadcast to [B, N, T, S], at most 4 axes.")


def per_score(x: Any, sizes: Any, name: str) -> Any:
  """An array that broadcasts to `[B, N, T, S]`, with its leading axes filled in."""
  x = as_array(x)
  at_most_4d(x, name)
  full = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
  shape = (1,) * (4 - x.ndim) + x.shape
  for size, expected, axis in zip(shape, full, ("batch size", "number of query heads", "query length", "key length")):
    if size not in (1, expected):
      raise ValueError(f"`{name}` has shape {x.shape}, which does not broadcast to [B, N, T, S] = {list(full)}: {size} against "
                       f"the {axis} {expected}. Make that axis {expected} or 1.")
  return x.reshape(shape)


def batch_and_heads(shape: tuple[int, ...], sizes: Any, name: str) -> None:
  for size, expected, axis in zip(shape, (sizes.batch, sizes.heads), ("batch size", "number of query heads")):
    if size not in (1, expected):
      raise ValueError(f"`{name}` has {size} along the axis of the {axis} {expected}; make it {expected} or 1.")


def block_table(table: Any, block_shape: tuple[int, int], sizes: Any) -> Any:
  """`[..., query blocks, key blocks]` as `[B|1, N|1, 1, 1, query blocks, key blocks]`."""
  table = as_array(table)
  if not 2 <= table.ndim <= 4:
    raise ValueError(f"`masks.BlockSparse.table` has shape {table.shape}; pass [query blocks, key blocks], with up to two leading "
                     "axes for batch and heads.")
  leading = (1,) * (4 - table.ndim) + table.shape[:-2]
  batch_and_heads(leading, sizes, "masks.BlockSparse.table")
  if sizes.query_positions is None and sizes.key_positions is None:
    needed = tuple(-(-n // b) for n, b in zip((sizes.queries, sizes.keys), block_shape))
    if table.shape[-2:] != needed:
      raise ValueError(f"`masks.BlockSparse.table` has {table.shape[-2]} x {table.shape[-1]} blocks of {block_shape[0]} x "
                       f"{block_shape[1]}, and {sizes.queries} queries by {sizes.keys} keys need {needed[0]} x {needed[1]}.")
  return table.reshape(*leading, 1, 1, *table.shape[-2:])


def block_shape(shape: Any) -> tuple[int, int]:
  shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
  if len(shape) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape):
    raise ValueError(f"`masks.BlockSparse.block_shape` is {shape}; pass two integers >= 1, (rows, columns).")
  return int(shape[0]), int(shape[1])


def max_blocks(table: Any, count: Any) -> int | None:
  """None, or an integer that no row of a table has more True blocks than, as far as the table has values."""
  if count is None:
    return None
  integer(count, "masks.BlockSparse.max_blocks", 1)
  if isinstance(table, np.ndarray) or isinstance(table, jax.Array) and not isinstance(table, Tracer) and table.is_fully_addressable:
    most = int(np.asarray(table).sum(-1).max(initial=0))
    if most > count:
      raise ValueError(f"`masks.BlockSparse.max_blocks` is {count} and a row of `table` has {most} True blocks; pass at least "
                       f"{most}, or None for no bound.")
  return int(count)


def integer(x: Any, name: str, least: int) -> None:
  """A Python integer that is not below `least`."""
  if not isinstance(x, (int, np.integer)) or isinstance(x, bool) or x < least:
    raise ValueError(f"`{name}` is {x!r}; pass an integer >= {least}.")


def same_lengths(sizes: Any, name: str, missing: str) -> None:
  if sizes.queries != sizes.keys:
    raise ValueError(f"`{name}` has no `{missing}`, which takes as many keys as queries, and there are {sizes.queries} queries and "
                     f"{sizes.keys} keys; pass `{missing}`.")


# Windows and lengths --------------------------------------------------------------------------------------------------


def window_side(value: Any, name: str) -> None:
  if isinstance(value, (bool, float, str, list, tuple)):
    raise TypeError(f"`{name}` is {value!r}; pass an integer >= 0, or None for no limit.")
  if isinstance(value, int) and value < 0:
    raise ValueError(f"`{name}` is {value}; pass an integer >= 0, or None for no limit. A window counts positions to each side, "
                     "its own position not included.")


def window(value: Any) -> tuple[Any, Any]:
  """`local_window_size` as (left, right)."""
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    value = (value, value)
  if not isinstance(value, (tuple, list)) or len(value) != 2:
    raise ValueError(f"`local_window_size` is {value!r}; pass an integer w for (w, w), or (left, right).")
  for side in value:
    window_side(int(side) if isinstance(side, np.integer) else side, "local_window_size")
  return tuple(value)


def tiles(value: Any) -> tuple[int, int]:
  whole = lambda n: isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0
  if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(whole, value)):
    raise ValueError(f"`tiles` is {value!r}; pass (query rows, key columns), two integers > 0, or None for those that suit the "
                     "problem.")
  return int(value[0]), int(value[1])


def mask_array(x: Any, sizes: Any) -> Any:
  """A `mask` argument that is an array."""
  if isinstance(x, type):
    raise TypeError(f"`mask` is the class {x.__name__}; pass an instance, masks.{x.__name__}(…).")
  if callable(x) and not hasattr(x, "dtype"):
    raise TypeError("`mask` is a function; pass masks.Custom(function), which calls it with batch, head and positions.")
  if x is None or isinstance(x, str):
    raise TypeError(f"`mask` is {x!r}; pass a boolean array or a mask from jflash.masks, for example masks.Causal().")
  x = as_array(x)
  if x.dtype != np.bool_:
    raise ValueError(f"`mask` has dtype {x.dtype}; it must be bool, True where a key is seen, or a mask from jflash.masks. An "
                     "additive mask goes to `bias`; for 0 and 1 pass `mask != 0`.")
  return per_score(x, sizes, "mask")


def bias(x: Any, sizes: Any) -> Any:
  """`bias` as floats `[B|1, N|1, T|1, S|1]`."""
  x = as_array(x)
  if x.dtype == np.bool_ or not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
    raise ValueError(f"`bias` has dtype {x.dtype}; it must be real numbers, added to the scores. A boolean mask goes to `mask`.")
  x = per_score(x, sizes, "bias")
  return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(np.float32)


def sharding(name: str, x: Any) -> None:
  """Refuses arrays whose type says how they are sharded: nothing here says how results would be."""
  kind = jax.typeof(x)
  manual = getattr(getattr(kind, "manual_axis_type", None), "varying", ()) or getattr(kind, "vma", ())
  if manual:
    raise NotImplementedError(f"`{name}` is {kind} and varies over the mesh axes {sorted(manual)}, which attention does not track; "
                              "call it inside jax.shard_map(..., check_vma=False).")
  spec = getattr(kind.sharding, "spec", ())
  if any(axis is not None for axis in spec):
    raise NotImplementedError(f"`{name}` is {kind}, sharded over explicit mesh axes, which attention does not follow; wrap the "
                              "call in jax.shard_map(..., check_vma=False) over batch or heads, or make the mesh with "
                              "AxisType.Auto.")
