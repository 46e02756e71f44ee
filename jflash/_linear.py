"""A linear map that carries its own transpose, as a primitive, and differentiates in what it is a map of.

`jax.custom_derivatives.linear_call` would do, but it has no batching rule, and its transpose rejects operands that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_linear_p = Primitive("jflash_linear_map")
_linear_p.multiple_results = True


def linear_map(apply: Callable, transpose: Callable, residuals: Any, operands: Any) -> Any:
  """`apply(residuals, operands)`, linear in the operands, whose transpose is `transpose(residuals, cotangents)`."""
  constants, constants_tree = jax.tree.flatten(residuals)
  linear, linear_tree = jax.tree.flatten(operands)
  out_tree = jax.tree.structure(jax.eval_shape(apply, residuals, operands))

  def flat_apply(constants, linear):
    return jax.tree.leaves(apply(constants_tree.unflatten(constants), linear_tree.unflatten(linear)))

  def flat_transpose(constants, cotangents):
    return jax.tree.leaves(transpose(constants_tree.unflatten(constants), out_tree.unflatten(cotangents)))

  outs = _linear_p.bind(*constants, *linear, apply=flat_apply, transpose=flat_transpose, constants=len(constants))
  return out_tree.unflatten(outs)


@_linear_p.def_impl
def _linear_impl(*args, apply, transpose, constants):
  del transpose
  return apply(list(args[:constants]), list(args[constants:]))


@_linear_p.def_effectful_abstract_eval
def _linear_abstract_eval(*avals, apply, transpose, constants):
  """Kernels that are interpreted have effects, as the interpreter calls back."""
  del transpose
  traced, outs = jax.make_jaxpr(apply, return_shape=True)(list(avals[:constants]), list(avals[constants:]))
  return [core.ShapedArray(x.shape, x.dtype) for x in outs], traced.effects


def _linear_jvp(primals, tangents, **params):
  """Linear in the operands; derivatives in the residuals, for second orders, are those of `apply` itself."""
  n = params["constants"]
  outs = _linear_p.bind(*primals, **params)
  if all(type(t) is ad.Zero for t in tangents[:n]):
    return outs, _linear_p.bind(*primals[:n], *map(ad.instantiate_zeros, tangents[n:]), **params)
  moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

  def of_moving(*values):
    args = list(primals)
    for i, value in zip(moving, values):
      args[i] = value
    return params["apply"](args[:n], args[n:])

  return outs, jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])[1]


def _linear_transpose(cotangents, *args, apply, transpose, constants):
  given = [ad.instantiate_zeros(c) for c in cotangents]
  outs = _linear_p.bind(*args[:constants], *given, apply=transpose, transpose=apply, constants=constants)
  grads = [out if ad.is_undefined_primal(x) else None for out, x in zip(outs, args[constants:])]
  return [None] * constants + grads


def _linear_batch(args, dims, *, apply, transpose, constants):
  """Every operand gets the batch axis, so that its cotangent has it too; JAX sums that over the batch where it must."""
  size = next(x.shape[d] for x, d in zip(args, dims) if d is not None)
  front = lambda x, d: jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
  linear = [front(x, d) for x, d in zip(args[constants:], dims[constants:])]
  axes = (list(dims[:constants]), 0)
  outs = _linear_p.bind(*args[:constants], *linear, constants=constants, apply=jax.vmap(apply, axes),
                        transpose=jax.vmap(transpose, axes))
  return outs, [0] * len(outs)


ad.primitive_jvps[_linear_p] = _linear_jvp
ad.primitive_transposes[_linear_p] = _linear_transpose
batching.primitive_batchers[_linear_p] = _linear_batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_linear_impl, multiple_results=True))
