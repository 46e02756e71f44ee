"""Dataclasses that are pytrees: Python values are structure, arrays and nested pytrees are children."""

from __future__ import annotations

import dataclasses
from typing import Any, dataclass_transform

import jax

_CHILD = "<child>"  # stands in the structure for what is a child


def is_static(value: Any) -> bool:
  """Whether a field's value belongs to the structure: numbers, names, tuples of them, and functions."""
  return value is None or isinstance(value, (bool, int, float, str, tuple)) or callable(value)


@dataclass_transform(frozen_default=True)
def pytree(cls: type) -> Any:
  """Makes `cls` a frozen dataclass and a pytree; unflattening runs no checks, so that leaves may be anything."""
  cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
  names = tuple(f.name for f in dataclasses.fields(cls))

  def flatten_with_keys(self):
    values = [(n, getattr(self, n)) for n in names]
    children = [(jax.tree_util.GetAttrKey(n), v) for n, v in values if not is_static(v)]
    return children, tuple((n, v if is_static(v) else _CHILD) for n, v in values)

  def unflatten(structure, children):
    self = object.__new__(cls)
    children = iter(children)
    for name, value in structure:
      object.__setattr__(self, name, next(children) if isinstance(value, str) and value == _CHILD else value)
    return self

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
  return cls
