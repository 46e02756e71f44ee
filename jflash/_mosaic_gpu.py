"""The Mosaic GPU kernels for Hopper as a backend: heads filled up to multiples of 64, float32 in pieces of bfloat16."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, products, schedule, softmax
from pallas_kernels.hopper import launch

from . import _plan, _tiles_gpu, _xla
from ._batching import fold_into_batch
from ._logits import Logits
from ._problem import Problem
from ._program import programs

# What Mosaic GPU has of what functions of scores may be made of, with derivatives, from JAX 0.11.2 on.
OPERATIONS = frozenset((
    "abs", "add", "add_any", "and", "atan2", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf",
    "exp", "exp2", "ge", "gt", "integer_pow", "le", "log", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not",
    "one_minus_square", "or", "rem", "reshape", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sign", "sin", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "xor"))
MOST_WIDTH = {1: 256, 2: 128, 3: 64}  # by how many numbers stand for one


def supports(problem: Problem) -> str | None:
  """None, or why the kernels cannot compute this problem."""
  if problem.product is not products.Dot:
    return "its kernels multiply queries with keys, and these scores are distances; use implementation='xla'"
  if problem.q.dtype == jnp.float64:
    return "the tensor cores of a GPU of this kind take no float64; use implementation='xla'"
  most = MOST_WIDTH[_tiles_gpu.pieces(problem.q.dtype)]
  if (widest := max(problem.width, problem.value_width)) > most:
    return (f"heads are {widest} wide, and its kernels hold {most} of {problem.q.dtype} at most with "
            f"jax.default_matmul_precision {_tiles_gpu.precision()}; use implementation='xla'")
  tiles = _plan.forced_tiles()
  if tiles is not None and any(side % 64 or side > 192 for side in tiles):
    return f"its tiles are multiples of 64, at most 192, and `tiles` is {tiles}"
  for program in programs(problem.logits):
    if program.reason:
      return program.reason
  if programs(problem.logits) and (beyond := sorted(_operations(problem.logits) - OPERATIONS)):
    names = " and ".join(program.name for program in programs(problem.logits))
    return (f"its kernels have nothing for {', '.join(beyond)}, of which {names} or the derivative are made; use "
            "implementation='xla'")
  return None


def _operations(logits: Logits) -> set[str]:
  """The primitives that the scores of a tile and their derivatives are made of."""
  shape, whole = (8, 8), _whole(logits)
  stand_in = lambda x: jax.ShapeDtypeStruct(
      x.shape if x.ndim > 4 else () if id(x) in whole else shape,
      jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
  leaves, structure = jax.tree.flatten(logits)
  floats = [x.ndim <= 4 and id(x) not in whole and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

  def scores(qk, moving):
    moving = iter(moving)
    zeros = lambda x: x if len(x.shape) > 2 else jnp.zeros(x.shape, x.dtype)
    tiles = structure.unflatten([next(moving) if f else zeros(stand_in(x)) for f, x in zip(floats, leaves)])
    take = lambda table, index: jnp.ones(index.shape, table.dtype)
    at = tiles.coordinates(*(jnp.zeros(shape, jnp.int32) for _ in range(4)), take, gathers=True)
    return tiles.scores(qk, at, True)

  def both_ways(qk, moving):
    s, pull = jax.vjp(scores, qk, moving)
    return pull(s)

  given = [jax.ShapeDtypeStruct(shape, jnp.float32), [stand_in(x) for f, x in zip(floats, leaves) if f]]
  return _named(jax.make_jaxpr(both_ways)(*given).jaxpr)


def _whole(logits: Logits) -> set[int]:
  """The identities of numbers that functions use as they are: kernels read them, and plain JAX has their gradients."""
  return {id(program.arrays[n]) for program in programs(logits) for _, n in program.whole}


def _named(jaxpr: Any) -> set[str]:
  found: set[str] = set()
  for equation in jaxpr.eqns:
    name, inner = equation.primitive.name, equation.params.get("jaxpr")
    if name in ("jit", "pjit"):
      found |= _named(inner.jaxpr)
    elif name == "integer_pow" and not (equation.params["y"] == -1 or equation.params["y"] >= 2):
      found.add(f"integer_pow[{equation.params['y']}]")
    else:
      found.add(name)
  return found


def _call(problem: Problem, plan: _plan.Plan, of: _tiles_gpu.Launch, unit: float) -> hopper.Call:
  overlapped = _launches(plan).overlapped and not plan.interpret
  return hopper.Call(
      problem.queries, problem.keys, problem.heads // of.fold, problem.kv_heads, _operand_dtype(problem), of.tiles, of.stages, unit,
      schedule.PARTIAL in plan.kinds, problem.logits.dropout is not None, _launches(plan).pieces, overlapped=overlapped,
      turns=of.turns and overlapped, fold=of.fold, interpret=_interpreter(plan.interpret))


def _launches(plan: _plan.Plan) -> _tiles_gpu.Launches:
  assert plan.launches is not None
  return plan.launches


def _interpreter(params: Any) -> Any:
  """`jflash.interpret(True)` models memory, too: these kernels have no other interpreter."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  return params if not isinstance(params, bool) else plgpu.InterpretGPUParams() if params else False  # type: ignore[attr-defined]


def _operand_dtype(problem: Problem) -> Any:
  return jnp.dtype(jnp.bfloat16) if problem.q.dtype == jnp.float32 else problem.q.dtype


def _fold(problem: Problem, fold: int, x: Any) -> Any:
  """A leaf `[B|1, N|1, T|1, S|1]` as `[B|1, K|1, T · G|1, S|1]`; tables as they are."""
  if fold == 1 or x.ndim > 4 or x.shape[1:3] == (1, 1):
    return x
  heads = problem.kv_heads if x.shape[1] > 1 else 1
  x = x.reshape(x.shape[0], heads, -1, *x.shape[2:])  # [B|1, K|1, G|1, T|1, S|1]
  x = jnp.broadcast_to(x, (*x.shape[:2], fold, problem.queries, x.shape[4])).swapaxes(2, 3)
  return x.reshape(x.shape[0], heads, problem.queries * fold, -1)


def _lay_out(x: Any, plan: _plan.Plan, dtype: Any) -> Any:
  """`[B, S filled up, P · K, width filled up]` from `[B, S, K, width]`."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, _tiles_gpu.lane_width(x.shape[3]) - x.shape[3])))
  return jnp.concatenate(launch.pieces(x, _launches(plan).pieces, dtype), axis=2)


@functools.partial(jax.jit, static_argnames="plan")
def forward(problem: Problem, plan: _plan.Plan, visits: _plan.LaunchSchedule) -> tuple[Any, Any]:
  """`(out [B, T, N, E], lse [B, T, N])`."""
  def run(qkv, others):
    (q, k, v), (logits, visits) = qkv, others
    return _forward(Problem(q, k, v, logits), visits, plan), []

  return fold_into_batch(run, problem.batch, (problem.q, problem.k, problem.v), (problem.logits, visits.forward))[0]


def _forward(problem: Problem, visits: schedule.RowVisits, plan: _plan.Plan) -> tuple[Any, Any]:
  unit, logits = problem.logits.in_units()
  call = _call(problem, plan, _launches(plan).forward, unit)
  fold = call.fold
  rows = problem.queries * fold
  q = problem.q.reshape(*problem.q.shape[:2], problem.kv_heads, -1, problem.width)  # [B, T, K, G, H]
  q = q.swapaxes(2, 3).reshape(problem.batch, rows, -1, problem.width) if fold > 1 else problem.q
  q, k, v = (_lay_out(x, plan, call.dtype) for x in (q, problem.k, problem.v))
  out, lse = hopper.forward(call, q, k, v, jax.tree.map(functools.partial(_fold, problem, fold), logits), visits)
  if fold > 1:
    unfold = lambda x: x.reshape(problem.batch, problem.queries, fold, problem.kv_heads, -1).swapaxes(2, 3)
    out = unfold(out[:, :rows]).reshape(problem.batch, problem.queries, problem.heads, -1)
    lse = unfold(lse[:, :, :rows].transpose(0, 2, 1)).reshape(problem.batch, problem.queries, -1).transpose(0, 2, 1)
  return out[:, :problem.queries, :, :problem.value_width].astype(problem.v.dtype), lse[:, :, :problem.queries].transpose(0, 2, 1)


@functools.partial(jax.jit, static_argnames=("plan", "wanted"))
def cotangent(problem: Problem, plan: _plan.Plan, visits: _plan.LaunchSchedule, out: Any, lse: Any, dout: Any, dlse: Any,
              wanted: tuple[bool, ...]) -> tuple[Any, Any, Any, list[Any]]:
  """(dq, dk, dv, gradients of those leaves of `logits` that are `wanted`)."""
  def run(whole, others):
    (q, k, v, *rest), (logits, visits) = whole, others
    return _cotangent(Problem(q, k, v, logits), visits, *rest, plan=plan, wanted=wanted)

  (dq, dk, dv), grads = fold_into_batch(run, problem.batch, (problem.q, problem.k, problem.v, out, lse, dout, dlse),
                                        (problem.logits, visits), [n for n, w in enumerate(wanted) if w])
  return dq, dk, dv, grads


def _cotangent(problem: Problem, visits: _plan.LaunchSchedule, out: Any, lse: Any, dout: Any, dlse: Any, plan: _plan.Plan,
               wanted: tuple[bool, ...]) -> tuple[tuple[Any, Any, Any], list[Any]]:
  unit, logits = problem.logits.in_units()
  launches = _launches(plan)
  of_dq, of_dkv = (_call(problem, plan, of, unit) for of in (launches.dq, launches.dkv))
  dout, delta = softmax.row_cotangents(out, lse, dout, dlse)
  longest = max(of.tiles[0] for of in (launches.dq, launches.dkv, launches.fused) if of)
  fill = lambda x, value: jnp.pad(x.transpose(0, 2, 1), ((0, 0), (0, 0), (0, -problem.queries % longest)), constant_values=value)
  q, k, v, laid_out = (_lay_out(x, plan, of_dq.dtype) for x in (problem.q, problem.k, problem.v, dout))
  residuals = hopper.Residuals(q, k, v, laid_out, fill(lse / unit, softmax.INF), fill(delta, 0.0))
  by_query, by_key, by_both, others = _by_axes(problem, wanted)

  def in_two():
    dq, query_sums = hopper.dq(of_dq, residuals, logits, visits.dq, tuple(by_query))
    if _shared(problem):
      (dk, dv), key_sums = hopper.wide.dkv(of_dkv, residuals, logits, visits.dkv, tuple(by_key))
    elif launches.split:
      (dk,), key_sums = hopper.dkv(of_dkv, residuals, logits, visits.dkv, tuple(by_key), (True, False))
      (dv,), _ = hopper.dkv(of_dkv, residuals, logits, visits.dkv, (), (False, True))
    else:
      (dk, dv), key_sums = hopper.dkv(of_dkv, residuals, logits, visits.dkv, tuple(by_key))
    return dq, dk, dv, query_sums, [x[:, :, :problem.keys] for x in key_sums]

  if launches.fused and visits.fused is not None and not by_query:
    call = _call(problem, plan, launches.fused, unit)
    dq, dk, dv, key_sums = hopper.fused(call, residuals, logits, visits.fused, tuple(by_key), launches.ordered)
    found = dq, dk, dv, [], [x[:, :, :problem.keys] for x in key_sums]
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(found)]).all()
    found = lax.cond(finite, lambda: found, in_two) if call.masked else found  # hidden keys may be the reason
  else:
    found = in_two()
  dq, dk, dv, query_sums, key_sums = found
  cut = lambda x, like: x[:, :like.shape[1], :, :like.shape[3]].astype(like.dtype)

  leaves = jax.tree.leaves(problem.logits)
  grads = {n: _sum_to(sums[:, :, :problem.queries, None], leaves[n]) for n, sums in zip(by_query, query_sums)}
  grads |= {n: _sum_to(sums[:, :, None], leaves[n]) for n, sums in zip(by_key, key_sums)}
  of_dq = dataclasses.replace(of_dq, stages=1) if _shared(problem) else of_dq  # it has all four operands in rings
  grads |= {n: hopper.tile_gradient(of_dq, residuals, logits, n, visits.dq_kinds).astype(leaves[n].dtype) for n in by_both}
  if others:
    grads |= _in_plain_jax(problem, others, out, lse, dout, dlse)
  return (cut(dq, problem.q), cut(dk, problem.k), cut(dv, problem.v)), [grads[n] for n, w in enumerate(wanted) if w]


def _shared(problem: Problem) -> bool:
  """Whether heads are so wide that a warpgroup cannot sum 64 rows of dK and dV alone."""
  return max(problem.width, problem.value_width) > 128


def _by_axes(problem: Problem, wanted: tuple[bool, ...]) -> tuple[list[int], list[int], list[int], list[int]]:
  """The wanted leaves by what their gradients are sums over: keys (or all), queries, neither; and tables, for plain JAX."""
  whole = _whole(problem.logits)
  by_query, by_key, by_both, others = [], [], [], []
  for n, (w, x) in enumerate(zip(wanted, jax.tree.leaves(problem.logits))):
    if w:
      # A cap's derivative divides by its square, for which the kernels have nothing.
      if x.ndim > 4 or id(x) in whole or x is problem.logits.soft_cap:
        others.append(n)
      else:
        (by_both if x.shape[2] > 1 and x.shape[3] > 1 else by_key if x.shape[3] > 1 else by_query).append(n)
  return by_query, by_key, by_both, others


def _sum_to(x: Any, like: Any) -> Any:
  """`x` summed over the axes along which `like` broadcasts."""
  axes = tuple(axis for axis, (n, size) in enumerate(zip(x.shape, like.shape)) if size == 1 and n > 1)
  return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype) if axes else x.astype(like.dtype)


def _in_plain_jax(problem: Problem, numbers: list[int], out: Any, lse: Any, dout: Any, dlse: Any) -> dict[int, Any]:
  """Gradients of tables that scores look things up in: sums over scattered scores, of which a kernel has no fixed order."""
  plan = _plan.plan_xla(problem)
  visits = _plan.make_schedule(problem, plan)
  wanted = tuple(n in numbers for n in range(len(jax.tree.leaves(problem.logits))))
  *_, grads = _xla.cotangent(problem, plan, visits, out, lse, dout, dlse, wanted=wanted)
  return dict(zip(numbers, grads))
