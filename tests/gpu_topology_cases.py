"""Cases for `benchmarks.gpu_compile`: kernels that are good, and kernels that each have one fault."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.gpu import attention_mgpu

_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _shape(*shape, dtype=jnp.float16):
  return jax.ShapeDtypeStruct(shape, dtype)


def attention_of_jax():
  """JAX's own attention, forward, once more in another program, and backward."""
  blocks = {"block_q": 64, "block_kv": 64, "max_concurrent_steps": 2}
  forward = attention_mgpu.TuningConfig(**blocks)
  both = attention_mgpu.TuningConfig(**blocks, block_q_dq=64, block_kv_dq=64, block_q_dkv=64, block_kv_dkv=64)

  def loss(q, k, v):
    return attention_mgpu.attention(q, k, v, both).astype(jnp.float32).sum()

  x = _shape(1, 1024, 4, 128)
  return {"forward": (functools.partial(attention_mgpu.attention, config=forward), (x, x, x)),
          "again": (lambda q, k, v: attention_mgpu.attention(q, k, v, forward) + 1, (x, x, x)),
          "backward": (jax.grad(loss, (0, 1, 2)), (x, x, x))}


def matmul(name: str, m: int, n: int, k: int, *, products: int = 1, registers: int | None = None):
  """A kernel of one warpgroup and its arguments: a [m, k] b [k, n] -> [m, n], all in shared memory at once.

  Args:
    products: how many accumulators are in flight together, of m n / 128 registers a thread each.
    registers: what the warpgroup sets itself.
  """
  def body(a_ref, b_ref, out_ref, a, b, out, barrier):
    if registers is not None:
      plgpu.set_max_registers(registers, action="increase")
    plgpu.copy_gmem_to_smem(a_ref, a, barrier)
    plgpu.copy_gmem_to_smem(b_ref, b, barrier)
    plgpu.barrier_wait(barrier)

    def accumulate(*accumulators):
      for accumulator in accumulators:
        plgpu.wgmma(accumulator, a, b)
      return sum(accumulator[...] for accumulator in accumulators)

    accumulators = [plgpu.ACC((m, n), jnp.float32)] * products
    out[...] = pl.run_scoped(accumulate, *accumulators).astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, out_ref)
    plgpu.wait_smem_to_gmem(0)

  def tile(*shape):
    return plgpu.SMEM(shape, jnp.float16, transforms=_TRANSFORMS)

  scratch = {"a": tile(m, k), "b": tile(k, n), "out": tile(m, n), "barrier": plgpu.Barrier(num_arrivals=2)}
  return plgpu.kernel(body, out_type=_shape(m, n), kernel_name=name, scratch_types=scratch), (_shape(m, k), _shape(k, n))


def double(name: str):
  """A kernel without products that goes through shared memory, with a fence that only Hopper and newer have."""
  def body(x_ref, out_ref, copy):
    copy[...] = x_ref[...]
    plgpu.commit_smem()
    out_ref[...] = copy[...] * 2

  x = _shape(64, 128)
  return plgpu.kernel(body, out_type=x, kernel_name=name, scratch_types={"copy": plgpu.SMEM(x.shape, x.dtype)}), (x,)


def transformed():
  """The gradient of a kernel whose backward pass is another, under `vmap`, `scan`, `checkpoint` and a nested `jit`."""
  @jax.custom_vjp
  def fun(x):
    return double("forward")[0](x)

  fun.defvjp(lambda x: (fun(x), None), lambda _, cotangent: (double("backward")[0](cotangent),))

  def loss(x):
    step = jax.checkpoint(jax.jit(jax.vmap(lambda x: jnp.sin(fun(x)))))
    return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=4)[0].astype(jnp.float32).sum()

  return jax.grad(loss)


def racing(name: str):
  """A kernel that does not wait for its output to be copied before it writes something else there."""
  def body(x_ref, out_ref, copy):
    copy[...] = x_ref[...]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(copy, out_ref)
    copy[...] = x_ref[...] * 2
    plgpu.wait_smem_to_gmem(0)

  x = _shape(64, 128)
  return plgpu.kernel(body, out_type=x, kernel_name=name, scratch_types={"copy": plgpu.SMEM(x.shape, x.dtype)}), (x,)


def hopper():
  return {"matmul": matmul("matmul", 64, 128, 64),
          "registers": matmul("registers", 64, 128, 64, registers=232),
          "spilling": matmul("spilling", 64, 256, 64, products=2),
          "too much shared memory": matmul("greedy", 128, 256, 512),
          "no product": double("double"),
          "transformed": (transformed(), (_shape(3, 64, 128),)),
          "no kernel": (jnp.sin, (_shape(128),)),
          "both": (lambda x, y, z: (matmul("matmul", 64, 128, 64)[0](x, y), double("double")[0](z)),
                   (_shape(64, 64), _shape(64, 128), _shape(64, 128)))}


def older():
  """For a chip older than Hopper: one that it takes, one that is refused, one at which the compiler aborts, and one after that."""
  add = lambda x: x + 1
  return {"before": (add, (_shape(128),)), "refused": matmul("matmul", 64, 128, 64),
          "aborting": double("double"), "after": (add, (_shape(256),))}


def hanging():
  def hang(x):
    while True:
      pass

  return {"hanging": (hang, (_shape(128),)), "after": (jnp.sin, (_shape(128),))}


def broken():
  raise LookupError("there are no cases")
