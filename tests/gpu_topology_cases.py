"""Cases for `benchmarks.gpu_compile`: a kernel that is good, and kernels that each have one fault."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention_mgpu


def _shape(*shape, dtype=jnp.float16):
  return jax.ShapeDtypeStruct(shape, dtype)


def attention_of_jax():
  """JAX's own attention, forward and backward."""
  blocks = dict(block_q=64, block_kv=64, max_concurrent_steps=2)
  forward = attention_mgpu.TuningConfig(**blocks)
  both = attention_mgpu.TuningConfig(**blocks, block_q_dq=64, block_kv_dq=64, block_q_dkv=64, block_kv_dkv=64)

  def loss(q, k, v):
    return attention_mgpu.attention(q, k, v, both).astype(jnp.float32).sum()

  x = _shape(1, 1024, 4, 128)
  return {"forward": (functools.partial(attention_mgpu.attention, config=forward), (x, x, x)),
          "again": (lambda q, k, v: attention_mgpu.attention(q, k, v, forward) + 1, (x, x, x)),
          "backward": (jax.grad(loss, (0, 1, 2)), (x, x, x))}
