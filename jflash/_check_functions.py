"""The errors of `_check` for functions that a caller brings, `score_mod` and `masks.Custom`: each is tried on one abstract tile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _check


def mask_function(fn: Any, operands: Any) -> None:
  """Tries the function of a `masks.Custom`."""
  name = f"masks.Custom({getattr(fn, '__name__', fn)!s})"
  result, full = _try(fn, operands, name, None)
  if result.dtype != np.bool_:
    _check.boolean(result, f"the value of {name}")
  if len(result.shape) > 4 or any(size not in (1, whole) for size, whole in zip(result.shape[::-1], full[::-1])):
    raise ValueError(_shape_message(name, result.shape, full, operands))


def score_mod(fn: Any, operands: Any, dtype: Any) -> None:
  """Tries a `score_mod` on scores of a type."""
  if not callable(fn):
    raise TypeError(f"`score_mod` is {fn!r}; pass a function of (score, batch, head, query position, key position, *operands) that "
                    "returns scores.")
  name = f"`score_mod` {getattr(fn, '__name__', fn)!s}"
  result, full = _try(fn, operands, name, dtype)
  if result.shape != full:
    raise ValueError(_shape_message(name, result.shape, full, operands))
  if result.dtype != dtype:
    raise ValueError(f"{name} returns {result.dtype} and scores are {np.dtype(dtype)}; compute in the scores' dtype, or end with "
                     ".astype(score.dtype).")


def score_operands(operands: Any, score_mod: Any) -> list[Any]:
  if not isinstance(operands, (tuple, list)):
    raise TypeError(f"`score_operands` is {type(operands).__name__}; pass a tuple of arrays, (array,) for a single one.")
  if operands and score_mod is None:
    raise ValueError(f"`score_operands` has {len(operands)} arrays and `score_mod` is None; pass both.")
  return list(operands)


def _try(fn: Any, operands: Any, name: str, score_dtype: Any) -> tuple[Any, tuple[int, ...]]:
  """What the function returns for a tile whose sizes are those of no operand, and the shape of that tile."""
  taken = {size for x in operands for size in np.shape(x)}
  full: tuple[int, ...] = tuple([n for n in (11, 13, 17, 19, *range(101, 1000, 2)) if n not in taken][:4])
  along = lambda axis: jax.ShapeDtypeStruct(tuple(n if a == axis else 1 for a, n in enumerate(full)), np.int32)
  wide = lambda x: (score_dtype or jnp.promote_types(x.dtype, np.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
  arrays = [jnp.asarray(x) for x in operands]
  structs = [jax.ShapeDtypeStruct(x.shape, wide(x)) for x in arrays]
  score = [] if score_dtype is None else [jax.ShapeDtypeStruct(full, score_dtype)]
  try:
    result = jax.eval_shape(fn, *score, *map(along, range(4)), *structs)
  except (TypeError, ValueError, IndexError) as error:
    kind = TypeError if isinstance(error, TypeError) else ValueError
    reason = str(error).strip().splitlines()[0].rstrip(".")
    hint = _TRACED if "truth value" in reason.lower() or "boolean conversion" in reason.lower() else _INDEX if operands else ""
    raise kind(f"{name} fails on a tile of scores {full} with positions {tuple(s.shape for s in map(along, range(4)))}"
               f"{_with(operands)}: {reason}.{hint}") from error
  if not hasattr(result, "dtype"):
    raise TypeError(f"{name} returns {type(result).__name__}; it must return one array.")
  return result, full


_TRACED = " Scores and positions are traced arrays: write `if` as jnp.where, and `and`, `or`, `not` as `&`, `|`, `~`."
_INDEX = " Operands come whole, in their own shape: index them, as in slopes[head] or table[head, bucket(query - key)]."


def _with(operands: Any) -> str:
  shapes = ", ".join(str(np.shape(x)) for x in operands)
  return f" and operands of shape {shapes}" if shapes else ""


def _shape_message(name: str, shape: Any, full: Any, operands: Any) -> str:
  return (f"{name} returns shape {shape} for a tile of scores {full}{_with(operands)}; it must return one value for each score."
          f"{_INDEX if operands else ''}")
