"""cuDNN's attention where there is no NVIDIA GPU: what JAX would hand over is checked by JAX, and computed densely, faults and all.

Like the library it ignores the cotangent of lse, multiplies what is masked by 0 rather than leave it out, and has no answer for rows
that see nothing: here they are NaN.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as binding

from jflash import _cudnn, _cudnn_call, _gpu, _plan

REAL = binding.dot_product_attention


class Seen(NamedTuple):
  """One call while it was traced."""

  query: tuple[int, ...]
  mask: str
  window: int | None
  scale: float
  lengths: bool
  bias: bool


def install(monkeypatch, capability=(8, 0), version=91400):
  """An NVIDIA GPU with cuDNN, as far as `jflash` can tell; returns the calls to come, while they are traced."""
  calls: list[Seen] = []
  pretend(monkeypatch, capability, version)
  monkeypatch.setattr(_cudnn_call, "PLATFORM", "cpu")
  monkeypatch.setattr(binding, "dot_product_attention", functools.partial(_attention, calls))
  return calls


def pretend(monkeypatch, capability=(8, 0), version=91400):
  """The same with JAX's own binding: what can be traced and lowered, but not run."""
  device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA GPU", compute_capability="{}.{}".format(*capability))
  monkeypatch.setattr(_plan, "platform", lambda: "gpu")
  monkeypatch.setattr(_gpu, "device", lambda: device)
  monkeypatch.setattr(_gpu, "cudnn_version", lambda: version)
  monkeypatch.setattr(binding, "check_cudnn_version", lambda: version)
  # JAX keeps what it traced by function: these are new ones, so that nothing is shared with another test.
  monkeypatch.setattr(_cudnn, "_refused_by_jax", _cudnn._refused_by_jax.__wrapped__)
  for name in ("forward", "cotangent"):
    inner = getattr(_cudnn, name).__wrapped__
    monkeypatch.setattr(_cudnn, name, jax.jit(lambda *args, inner=inner, **kwargs: inner(*args, **kwargs),
                                              static_argnums=1, static_argnames="wanted"))


def _attention(calls, query, key, value, bias=None, mask=None, q_seqlen=None, kv_seqlen=None, *, scale, mask_type,
               sliding_window_length, return_residual):
  assert mask is None and return_residual
  out, _ = jax.eval_shape(functools.partial(REAL, scale=scale, mask_type=mask_type, sliding_window_length=sliding_window_length,
                                            return_residual=True), query, key, value, bias, None, q_seqlen, kv_seqlen)
  assert out.shape == query.shape
  calls.append(Seen(query.shape, mask_type.name, sliding_window_length, scale, kv_seqlen is not None, bias is not None))
  t, s = np.arange(query.shape[1])[:, None], np.arange(key.shape[1])[None, :]
  keep = jnp.ones((1, 1, t.size, s.size), bool)
  if "CAUSAL" in mask_type.name:
    keep &= s <= t
  if sliding_window_length is not None:
    keep &= s > t - sliding_window_length
  if "PADDING" in mask_type.name:
    each = lambda x: x[:, None, None, None]
    keep &= (t < each(q_seqlen)) & (s < each(kv_seqlen))
  return _dense(scale, query, key, value, bias, keep)


def _probabilities(scale: float, q: Any, k: Any, bias: Any, keep: Any) -> tuple[Any, Any]:
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(keep, scores if bias is None else scores + bias, -jnp.inf)
  top = scores.max(-1, keepdims=True)  # -inf in a row that sees nothing, which makes it NaN
  lse = top + jnp.log(jnp.exp(scores - top).sum(-1, keepdims=True))
  return jnp.exp(scores - lse), lse[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(scale, q, k, v, bias, keep):
  p, lse = _probabilities(scale, q, k, bias, keep)
  v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
  return jnp.einsum("bnts,bsne->btne", p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype), lse


def _forward(scale, q, k, v, bias, keep):
  out, lse = _dense(scale, q, k, v, bias, keep)
  return (out, lse), (q, k, v, bias, keep, out)


def _backward(scale, residuals, cotangents):
  q, k, v, bias, keep, out = residuals
  dout, _ = cotangents
  dtype, groups, f32 = q.dtype, q.shape[2] // k.shape[2], jnp.float32
  p, _ = _probabilities(scale, q, k, bias, keep)
  wide_k, wide_v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  dot = functools.partial(jnp.einsum, preferred_element_type=f32)
  delta = (dout.astype(f32) * out.astype(f32)).sum(-1).transpose(0, 2, 1)[..., None]
  ds = p * (dot("btne,bsne->bnts", dout, wide_v) - delta)
  by_head = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)
  dq = scale * dot("bnts,bsnh->btnh", ds.astype(dtype), wide_k)
  dk = scale * by_head(dot("bnts,btnh->bsnh", ds.astype(dtype), q))
  dv = by_head(dot("bnts,btne->bsne", p.astype(dtype), dout))
  dbias = None if bias is None else ds.sum(0, keepdims=True).astype(bias.dtype)
  return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), dbias, None


_dense.defvjp(_forward, _backward)
