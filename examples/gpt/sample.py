"""Writes text with a trained model: one pass over the prompt fills a key/value cache, one jitted scan does the rest.

    python examples/gpt/sample.py --prompt "def main(" --temperature 0.8 --top-k 40
"""

import argparse
import functools
import logging
import pathlib
import sys

import data
import jax
import jax.numpy as jnp
import model as gpt
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx


def draw(key, logits, temperature, top_k):
  """Token ids `[B]` from logits `[B, V]`: the best one where the temperature is 0, else from the top_k (0: all)."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if 0 < top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def generate(graphdef, params, prompt, key, length, temperature, top_k):
  """Continues prompts `[B, P]` by `length` tokens and returns these, `[B, length]`; P + length <= context + 1."""
  model = nnx.merge(graphdef, params)
  logits, cache = model.decode(prompt, model.empty_cache(prompt.shape[0]), 0)
  key, first = jax.random.split(key)
  token = draw(first, logits[:, -1], temperature, top_k)                                    # [B]

  def step(carry, key):
    token, cache, filled = carry
    logits, cache = model.decode(token[:, None], cache, filled)
    return (draw(key, logits[:, 0], temperature, top_k), cache, filled + 1), token

  start = (token, cache, jnp.int32(prompt.shape[1]))
  (token, _, _), tokens = jax.lax.scan(step, start, jax.random.split(key, length - 1))
  return jnp.concatenate([tokens.T, token[:, None]], axis=1)


def write(graphdef, params, tokenizer, prompt, length, *, temperature=0.8, top_k=40, seed=0):
  """The prompt and `length` more tokens, as text. Past the context it goes on from the last half of the context."""
  context = nnx.merge(graphdef, params).config.context
  ids = np.concatenate([[tokenizer.start], tokenizer.encode(prompt.encode())]).astype(np.int32)
  wanted, key = len(ids) + length, jax.random.key(seed)
  while len(ids) < wanted:
    key, now = jax.random.split(key)
    seen = ids if len(ids) < context else ids[-(context // 2 or 1):]
    count = min(context + 1 - len(seen), length)
    new = generate(graphdef, params, jnp.asarray(seen)[None], now, count, temperature, top_k)
    ids = np.concatenate([ids, np.asarray(new[0])])
  return tokenizer.decode(ids[:wanted])


def load(folder, dtype):
  """`(graphdef, params, tokenizer, step)` of the newest checkpoint that train.py wrote to the folder."""
  folder = pathlib.Path(folder)
  saved = folder / "checkpoints"
  if not saved.is_dir() or not ocp.utils.checkpoint_steps(saved):
    raise ValueError(f"--out {folder} holds no checkpoint; write one with "
                     f"`python examples/gpt/train.py --out {folder}`, or name another folder.")
  with ocp.CheckpointManager(saved.resolve()) as manager:
    step = manager.latest_step()
    config = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
    model = nnx.eval_shape(lambda: gpt.GPT(gpt.Config(**config["model"]), dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes))).params
  is_bytes = config["data"]["tokenizer"] == data.Bytes.digest
  tokenizer = data.Bytes() if is_bytes else data.TokenizerFile(folder / "tokenizer.json")
  return graphdef, params, tokenizer, step


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--out", default="runs/gpt", help="the folder that train.py wrote")
  parser.add_argument("--prompt", default="", help="how the text starts; empty is the start of a document")
  parser.add_argument("--length", type=int, default=400, help="tokens to write")
  parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
  parser.add_argument("--top-k", type=int, default=40, help="draw from this many likeliest tokens; 0 is all")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)
  logging.getLogger("absl").setLevel(logging.ERROR)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  try:
    graphdef, params, tokenizer, step = load(args.out, dtype)
  except ValueError as error:
    sys.exit(f"sample.py: {error}")
  print(f"{args.out}, step {step}, temperature {args.temperature}, top-k {args.top_k}, seed {args.seed}\n")
  print(write(graphdef, params, tokenizer, args.prompt, args.length, temperature=args.temperature, top_k=args.top_k,
              seed=args.seed))


if __name__ == "__main__":
  main()
