"""Trains a GPT on packed text with jflash attention, and resumes exactly where it was killed.

    python examples/gpt/train.py                                  # a small one, on a CPU, in minutes
    python examples/gpt/train.py --preset gpt2-small --data text/ --tokenizer tokenizer.json --out runs/small
"""

import argparse
import csv
import dataclasses
import logging
import pathlib
import shutil
import statistics
import sys
import time
from typing import Any

import data
import grain
import jax
import jax.numpy as jnp
import model as gpt
import numpy as np
import optax
import orbax.checkpoint as ocp
import rich.progress
import sample
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

SETTINGS = ("layers", "heads", "width", "context", "vocab", "batch", "accumulate", "steps", "learning_rate", "warmup",
            "evaluate_every", "evaluate_batches", "checkpoint_every")
# `vocab` is the least number of rows of the embedding: the GPT-2 presets keep GPT-2's size with every tokenizer.
PRESETS = {name: dict(zip(SETTINGS, values)) for name, values in {
    "tiny": (4, 4, 128, 128, 0, 16, 1, 400, 3e-3, 40, 50, 8, 100),
    "gpt2-small": (12, 12, 768, 1024, 50257, 64, 4, 2000, 6e-4, 200, 100, 4, 500),
    "gpt2-medium": (24, 16, 1024, 1024, 50257, 64, 8, 2000, 3e-4, 200, 100, 4, 500),
}.items()}


@dataclasses.dataclass
class State:
  """What a checkpoint holds of the training: after `step` updates, everything the next one depends on."""
  step: int
  params: Any
  optimizer: Any
  batches: grain.DatasetIterator


class Log:
  """losses.csv: step, training loss, validation loss (empty where not measured); every digit of the float32 numbers.

  A resumed run cuts it back to its checkpoint, so that a killed run leaves the same bytes as an uninterrupted one.
  """

  def __init__(self, path, step):
    lines = path.read_text().splitlines() if step and path.exists() else []
    self.rows = [row for row in csv.reader(lines[1:]) if len(row) == 3 and int(row[0]) <= step]
    new = path.with_suffix(".new")  # replaced in one go: a kill here must not lose lines either
    new.write_text("".join(",".join(row) + "\n" for row in [["step", "training", "validation"], *self.rows]))
    new.replace(path)
    self._file = path.open("a", newline="\n")

  def add(self, step, training, validation=None):
    self.rows.append([str(step), repr(training), "" if validation is None else repr(validation)])
    self._file.write(",".join(self.rows[-1]) + "\n")
    self._file.flush()  # a kill must not take lines that a checkpoint counts on

  def curve(self, column):
    """`(steps, losses)` of column 1 (training) or 2 (validation)."""
    points = [(int(row[0]), float(row[column])) for row in self.rows if row[column]]
    return [step for step, _ in points], [loss for _, loss in points]


class Progress:
  """A bar on a terminal, a line now and then elsewhere; keeps the time between updates for the tokens per second."""

  def __init__(self, step, steps, tokens_per_step):
    columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
               rich.progress.TimeRemainingColumn(), "{task.fields[text]}")
    console = rich.console.Console()
    self._bar = rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)
    self._task = self._bar.add_task("training", completed=step, total=steps, text="compiling")
    self._bar.start()
    self._steps, self._tokens, self._last, self._seconds = steps, tokens_per_step, None, []
    self._validation = ""

  def update(self, step, loss):
    now = time.perf_counter()
    if self._last is not None:
      self._seconds.append(now - self._last)
    self._last = now
    speed = f"  {self.tokens_per_second(20):,.0f} tokens/s" if self._seconds else ""
    text = f"loss {loss:.3f}{self._validation}{speed}"
    self._bar.update(self._task, completed=step, text=text)
    if self._bar.disable and (step == 1 or step % max(1, self._steps // 20) == 0 or step == self._steps):
      print(f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}", flush=True)

  def pause(self, validation=None):
    """Says that the time until the next update is not only the training's."""
    self._last = None
    if validation is not None:
      self._validation = f"  validation {validation:.3f}"

  def stop(self):
    self._bar.stop()

  def tokens_per_second(self, last=0):
    """Median over the last steps (0: all); nan before there are any."""
    return self._tokens / statistics.median(self._seconds[-last:]) if self._seconds else float("nan")


def parse(argv=None):
  """The arguments, with the preset's numbers where the user gave none."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("--preset", choices=PRESETS, default="tiny", help="tiny is for a CPU, the others for accelerators")
  add("--data", help="text file or folder of text files; default: the Python standard library's sources")
  add("--tokenizer", help="a tokenizer.json (Hugging Face tokenizers); default: one token per byte")
  add("--out", default="runs/gpt", type=pathlib.Path, help="folder of results; a checkpoint in it is resumed")
  add("--attention", choices=gpt.ATTENTIONS, default="jflash")
  add("--seed", type=int, default=0)
  add("--sample-length", type=int, default=400, help="tokens of the sample at the end")
  helps = {"batch": "sequences per step", "accumulate": "pieces in which a step's batch is computed",
           "vocab": "least size of the vocabulary", "evaluate_batches": "batches in an evaluation"}
  for name, value in PRESETS["tiny"].items():
    add("--" + name.replace("_", "-"), type=type(value), help=f"{helps.get(name, '')} (from the preset)".strip())
  args = parser.parse_args(argv)
  for name, value in PRESETS[args.preset].items():
    given = getattr(args, name)
    if given is None:
      setattr(args, name, value)
    elif given <= 0 and name not in ("vocab", "warmup"):
      raise ValueError(f"--{name.replace('_', '-')} is {given}, and must be more than 0.")
  return args


def make_optimizer(args):
  """AdamW with warm-up, cosine decay to a tenth, clipping, and weight decay on matrices alone."""
  warmup = min(args.warmup, args.steps - 1)
  rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, warmup, args.steps, args.learning_rate / 10)
  matrices = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
  return optax.chain(optax.clip_by_global_norm(1.0),
                     optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices))


def make_steps(graphdef, optimizer, mesh):
  """`(train_step, evaluate)`, each jitted: every device of the mesh computes its share of the rows, then they add up.

  Batches are dicts of `[A, B, T]` arrays: A pieces one after the other (gradient accumulation), B rows over the
  devices. Losses and gradients are sums over tokens, divided by the number of tokens at the very end, so neither A nor
  the number of devices changes what is computed.
  """
  def summed_loss(params, piece):                                                           # leaves [B / devices, T]
    logits = nnx.merge(graphdef, params)(piece["tokens"], piece["positions"], piece["segments"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, piece["targets"])      # float32
    return jnp.sum(losses * piece["weights"])

  def mean_over_tokens(function, zero, params, batch):                                      # runs on every device
    add = lambda total, piece: (jax.tree.map(jnp.add, total, function(params, piece)), None)
    total, _ = jax.lax.scan(add, zero, batch)
    total, count = jax.lax.psum((total, batch["weights"].sum()), "data")
    return jax.tree.map(lambda x: x / count, total)

  over_devices = lambda function: jax.shard_map(function, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P(),
                                                check_vma=False)

  @over_devices
  def loss_and_gradients(params, batch):
    return mean_over_tokens(jax.value_and_grad(summed_loss), (0.0, jax.tree.map(jnp.zeros_like, params)), params, batch)

  @over_devices
  def loss_alone(params, batch):
    return mean_over_tokens(summed_loss, 0.0, params, batch)

  def train_step(params, optimizer_state, batch):
    loss, gradients = loss_and_gradients(params, batch)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss

  return jax.jit(train_step, donate_argnums=(0, 1)), jax.jit(loss_alone)


class Run:
  """Everything of one training: data, model, mesh, checkpoints. Making it checks what the user asked for."""

  def __init__(self, args):
    devices = jax.device_count()
    if args.batch % (args.accumulate * devices):
      raise ValueError(f"--batch {args.batch} cannot be cut into --accumulate {args.accumulate} pieces for each of "
                       f"{devices} devices; use a multiple of {args.accumulate * devices}.")
    self.args = args
    self.tokenizer = data.TokenizerFile(args.tokenizer) if args.tokenizer else data.Bytes()
    self.config = gpt.Config(max(args.vocab, self.tokenizer.vocab), args.context, args.layers, args.heads, args.width)
    self.training, self.validation = data.load(args.data, self.tokenizer, args.context)
    self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    self.mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    self.optimizer = make_optimizer(args)
    self.saved_config = {
        "model": dataclasses.asdict(self.config),
        "data": {"tokenizer": self.tokenizer.digest, "contents": self.training.digest(), "batch": args.batch,
                 "seed": args.seed},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer and not (args.out / "tokenizer.json").exists():
      shutil.copyfile(args.tokenizer, args.out / "tokenizer.json")  # so that sample.py needs the folder alone
    self.manager = ocp.CheckpointManager((args.out / "checkpoints").resolve(),
                                         options=ocp.CheckpointManagerOptions(max_to_keep=2))
    if self.manager.latest_step() is not None:
      self._check_same_config()
    model = gpt.GPT(self.config, attend=gpt.ATTENTIONS[args.attention], dtype=self.dtype, rngs=nnx.Rngs(args.seed))
    self.graphdef, self._fresh = nnx.split(model)
    self.size = sum(x.size for x in jax.tree.leaves(self._fresh))
    self.train_step, self._loss = make_steps(self.graphdef, self.optimizer, self.mesh)
    self._held_out = data.validation_batches(self.validation, args.context, args.batch, args.evaluate_batches)

  def state(self):
    """The newest checkpoint's state, or a fresh one."""
    batches = data.training_batches(self.training, self.args.context, self.args.batch, self.args.seed)
    params = jax.device_put(self._fresh, NamedSharding(self.mesh, P()))
    state = State(0, params, jax.device_put(self.optimizer.init(params), NamedSharding(self.mesh, P())), batches)
    step = self.manager.latest_step()
    if step is not None:
      item = ocp.args.StandardRestore
      found = self.manager.restore(step, args=ocp.args.Composite(
          params=item(state.params), optimizer=item(state.optimizer),
          batches=grain.checkpoint.CheckpointRestore(batches)))
      state = State(step, found.params, found.optimizer, found.batches)
    return state

  def save(self, state):
    item = ocp.args.StandardSave
    self.manager.save(state.step, args=ocp.args.Composite(
        params=item(state.params), optimizer=item(state.optimizer),
        batches=grain.checkpoint.CheckpointSave(state.batches), config=ocp.args.JsonSave(self.saved_config)))

  def validate(self, params):
    """Mean loss per token over the held-out batches."""
    losses = [float(self._loss(params, self.shard(batch))) for batch in self._held_out]
    return float(np.average(losses, weights=[batch["weights"].sum() for batch in self._held_out]))

  def shard(self, batch):
    """`[A·B, T]` arrays of the host -> `[A, B, T]`, B over the devices."""
    pieces = {k: v.reshape(self.args.accumulate, -1, v.shape[-1]) for k, v in batch.items()}
    return jax.device_put(pieces, NamedSharding(self.mesh, P(None, "data")))

  def _check_same_config(self):
    found = self.manager.restore(self.manager.latest_step(), args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    differences = [f"{name} {found.config[part].get(name)} there and {value} here" for part in ("model", "data")
                   for name, value in self.saved_config[part].items() if found.config[part].get(name) != value]
    if differences:
      raise ValueError(f"--out {self.args.out} holds a checkpoint of another run ({', '.join(differences)}); give the "
                       "same arguments to resume it, or another --out.")


def train(run, state, log, progress):
  """Runs the steps that are left; returns the last state."""
  args = run.args
  unread = []  # the loss of the step before: read one step late, so that the device never waits for the host

  def read(validation=None):
    for step, loss in unread:
      progress.update(step, float(loss))
      log.add(step, float(loss), validation)
    unread.clear()

  for step in range(state.step + 1, args.steps + 1):
    batch = run.shard(next(state.batches))
    params, optimizer, loss = run.train_step(state.params, state.optimizer, batch)
    state = State(step, params, optimizer, state.batches)
    read()
    unread.append((step, loss))
    is_last = step == args.steps
    if is_last or step % args.evaluate_every == 0:
      validation = run.validate(params)
      progress.pause(validation)
      read(validation)
    if is_last or step % args.checkpoint_every == 0:
      read()
      run.save(state)
      progress.pause()
  run.manager.wait_until_finished()
  return state


def draw_losses(log, entropy, path, title):
  """loss.png: training and validation loss, and the loss of a model that ignores context."""
  import matplotlib  # slow to import, and only needed here
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
  axes.plot(*log.curve(1), color="0.7", linewidth=1, label="training")
  axes.plot(*log.curve(2), color="C0", marker="o", markersize=4, label="validation")
  axes.axhline(entropy, color="C1", linestyle="--", label=f"unigram entropy of the validation text ({entropy:.3f})")
  axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
  axes.set_ylim(bottom=0)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def header(run):
  """Two lines: what is trained, on what."""
  args, config = run.args, run.config
  device = jax.devices()[0]
  name = "" if device.device_kind == device.platform else f" ({device.device_kind})"
  print(f"{args.preset}: {run.size / 1e6:.2f}M parameters, {config.layers} layers, {config.heads} heads, width "
        f"{config.width}, context {config.context}; {args.attention} attention, {run.dtype.__name__}, "
        f"{jax.device_count()} {device.platform} device{'s' * (jax.device_count() > 1)}{name}")
  print(f"{args.data or 'Python standard library'}: {run.training.bytes:,} bytes for training, "
        f"{run.validation.bytes:,} for validation; {args.batch} x {args.context} tokens per step, {args.steps} steps, "
        f"vocabulary {config.vocab}", flush=True)


def finish(run, state, log, progress):
  """The picture, the numbers and the sample."""
  args, entropy = run.args, run.validation.unigram_entropy()
  draw_losses(log, entropy, args.out / "loss.png", f"{args.preset}, {args.attention} attention")
  validation = float(log.rows[-1][2] or run.validate(state.params)) if log.rows else run.validate(state.params)
  per_byte = validation * run.validation.tokens_per_byte() / np.log(2)
  params = jax.device_put(state.params, jax.devices()[0])
  text = sample.write(run.graphdef, params, run.tokenizer, "", args.sample_length, seed=args.seed)
  (args.out / "sample.txt").write_text(text, encoding="utf-8")
  print(f"\nvalidation loss   {validation:.4f} nats per token = {per_byte:.3f} bits per byte")
  print(f"unigram entropy   {entropy:.4f} nats per token (the best that a model without context can do)")
  if progress.tokens_per_second() > 0:
    print(f"speed             {progress.tokens_per_second():,.0f} tokens/s (median over the steps)")
  print(f"files in {args.out}/   checkpoints/ losses.csv loss.png sample.txt")
  print(f"\n--- sample (more: python examples/gpt/sample.py --out {args.out}) ---\n{text}")


def main(argv=None):
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    run = Run(parse(argv))
  except ValueError as error:
    sys.exit(f"train.py: {error}")
  args = run.args
  header(run)
  state = run.state()
  if state.step:
    print(f"resuming {args.out} after step {state.step}"
          if state.step < args.steps else f"{args.out} is at step {state.step} of {args.steps} already; "
          "give more --steps to go on, or another --out to start anew")
  log = Log(args.out / "losses.csv", state.step)
  progress = Progress(state.step, args.steps, args.batch * args.context)
  try:
    state = train(run, state, log, progress)
  except KeyboardInterrupt:
    sys.exit("\nstopped; the same command resumes from the last checkpoint")
  finally:
    progress.stop()
    run.manager.close()
  finish(run, state, log, progress)


if __name__ == "__main__":
  main()
