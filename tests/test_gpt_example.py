"""The GPT example: packing, resuming, gradient accumulation, data parallelism, attentions, sampling, messages."""

import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

for package in ("grain", "matplotlib", "optax", "orbax.checkpoint", "rich", "tokenizers"):
  pytest.importorskip(package, reason="the GPT example needs `pip install jflash[examples]`")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "gpt"
NAMES = ("data", "model", "sample", "train")


def _import_example():
  """The scripts import each other by plain names, which must not stay behind for other examples to find."""
  sys.path.insert(0, str(FOLDER))
  try:
    return [__import__(name) for name in NAMES]
  finally:
    sys.path.remove(str(FOLDER))
    for name in NAMES:
      sys.modules.pop(name, None)


data, gpt, sample, train = _import_example()

CONFIG = gpt.Config(vocab=61, context=24, layers=2, heads=2, width=16)
SMALL = ["--layers", "1", "--heads", "2", "--width", "32", "--context", "32", "--batch", "8", "--warmup", "2",
         "--steps", "24", "--evaluate-batches", "2", "--evaluate-every", "8", "--checkpoint-every", "6",
         "--learning-rate", "1e-2", "--sample-length", "20"]


def make_model(attention="jflash", config=CONFIG, seed=0):
  """Weights ten times GPT-2's, so that attention and positions matter to the logits."""
  model = gpt.GPT(config, attend=gpt.ATTENTIONS[attention], rngs=nnx.Rngs(seed))
  graphdef, params = nnx.split(model)
  return nnx.merge(graphdef, jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params))


def stream_of(lengths, vocab=61, seed=0):
  """Documents of random tokens 1…vocab-1; every one starts with token 0."""
  tokens = np.random.default_rng(seed).integers(1, vocab, sum(lengths)).astype(np.uint16)
  starts = np.cumsum([0, *lengths[:-1]])
  tokens[starts] = 0
  return data.Stream(tokens, starts, sum(lengths) - len(lengths))


def one_row(stream, context=24, index=0):
  return {name: array[None] for name, array in data.Rows(stream, context)[index].items()}


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, row):
  return nnx.merge(graphdef, params)(row["tokens"], row["positions"], row["segments"])


def logits_of(model, row):
  return np.asarray(_logits(*nnx.split(model), row))


def summed_loss(model, row):
  logits = logits_of(model, row).astype(np.float64)
  taken = np.take_along_axis(logits, row["targets"][..., None], axis=-1)[..., 0]
  return float(((np.log(np.exp(logits).sum(-1)) - taken) * row["weights"]).sum())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """A folder of twelve texts of 2,500 letters: mostly the alphabet in order, here and there a jump."""
  folder = tmp_path_factory.mktemp("texts")
  rng = np.random.default_rng(0)
  for i in range(12):
    steps = np.where(rng.random(2500) < 0.9, 1, rng.integers(0, 26, 2500))
    (folder / f"{i}.txt").write_text("".join(chr(ord("a") + n) for n in np.cumsum(steps) % 26))
  return folder


def arguments(out, texts, *more):
  return ["--data", str(texts), "--out", str(out), *SMALL, *more]


def losses_of(out, column=1):
  rows = [line.split(",") for line in (out / "losses.csv").read_text().splitlines()[1:]]
  return np.array([float(row[column]) for row in rows if row[column]])


def script(*command, **env):
  """Runs `python *command`, printing to a pipe as in a batch job; returns the exit status and what it printed."""
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **env}
  done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        text=True, env=env, timeout=300)
  return done.returncode, done.stdout


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
  """`(folder, printed)` of an uninterrupted run of 24 steps."""
  out = tmp_path_factory.mktemp("whole") / "run"
  status, printed = script(FOLDER / "train.py", *arguments(out, texts))
  assert status == 0, printed
  return out, printed


# ---- data ----------------------------------------------------------------------------------------------------------


def test_rows_restart_positions_and_never_predict_across_documents():
  stream = stream_of([5, 3, 9])
  rows = data.Rows(stream, 8)
  assert len(rows) == 2
  first, second = rows[0], rows[1]
  assert first["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
  assert first["segments"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
  assert first["weights"].tolist() == [1, 1, 1, 1, 0, 1, 1, 0]
  assert second["positions"].tolist() == list(range(8)) and second["weights"].tolist() == [1] * 8
  np.testing.assert_array_equal(np.concatenate([first["tokens"], second["tokens"]]), stream.tokens[:16])
  np.testing.assert_array_equal(np.concatenate([first["targets"], second["targets"]]), stream.tokens[1:])


def test_a_row_that_starts_inside_a_document_counts_from_zero():
  row = data.Rows(stream_of([20, 4]), 8)[1]
  assert row["positions"].tolist() == list(range(8)) and row["segments"].tolist() == [1] * 8


def test_the_default_text_is_the_standard_library_split_by_file():
  training, validation = data.load(None, data.Bytes(), 256)
  assert training.bytes > 2e6 and 0.03 < validation.bytes / training.bytes < 0.3
  assert 2.5 < validation.unigram_entropy() < 4
  documents = lambda stream: {part.tobytes() for part in np.split(stream.tokens, stream.starts[1:]) if len(part) > 200}
  assert not documents(training) & documents(validation)
  assert data.load(None, data.Bytes(), 256)[1].digest() == validation.digest()


def test_one_file_is_split_by_its_end_and_two_files_by_name(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("é" * 100)
  training, validation = data.load(file, data.Bytes(), 8)
  assert (training.bytes, validation.bytes) == (180, 20)
  (tmp_path / "b.txt").write_text("b" * 50)
  (tmp_path / "image.bin").write_bytes(b"\xff\xfe\0")
  training, validation = data.load(tmp_path, data.Bytes(), 8)
  assert sorted([training.bytes, validation.bytes]) == [50, 200]


def test_batches_cover_every_row_once_per_pass_and_continue_from_a_saved_state():
  stream, context = stream_of([70, 40, 60, 31]), 8                                          # 25 rows
  stream.tokens[:] = np.arange(len(stream.tokens))
  draw = lambda batches, n: [next(batches)["tokens"][:, 0].tolist() for _ in range(n)]
  batches = data.training_batches(stream, context, 5, seed=0)
  first, second = draw(batches, 5), draw(batches, 2)
  assert sorted(sum(first, [])) == list(range(0, 200, context))
  assert first[:2] != second
  batches = data.training_batches(stream, context, 5, seed=0)
  draw(batches, 3)
  state = batches.get_state()
  expected = draw(batches, 4)
  batches = data.training_batches(stream, context, 5, seed=0)
  batches.set_state(state)
  assert draw(batches, 4) == expected
  assert draw(data.training_batches(stream, context, 5, seed=1), 5) != first


def test_validation_batches_are_spread_out_and_padded_with_weightless_rows():
  stream = stream_of([100])
  batches = data.validation_batches(stream, 8, 5, 10)                                       # 12 rows
  assert [len(batch["tokens"]) for batch in batches] == [5, 5, 5]
  assert sum(batch["weights"].sum() for batch in batches) == 12 * 8
  few = data.validation_batches(stream, 8, 2, 1)
  np.testing.assert_array_equal(few[0]["tokens"], stream.tokens[[range(8), range(88, 96)]])


def test_unigram_entropy_and_tokens_per_byte():
  stream = data._stream([b"aabb", b"ba"], data.Bytes())
  assert stream.unigram_entropy() == pytest.approx(np.log(2))
  assert stream.tokens.tolist() == [256, 97, 97, 98, 98, 256, 98, 97] and stream.tokens_per_byte() == 1


@pytest.fixture(scope="module")
def tokenizer_file(texts, tmp_path_factory):
  import tokenizers
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>"], show_progress=False,
                                           initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train([str(f) for f in texts.iterdir()], trainer)
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokenizer.save(str(path))
  return path


def test_a_tokenizer_file_is_used(tokenizer_file):
  tokenizer = data.TokenizerFile(tokenizer_file)
  ids = tokenizer.encode("bcdefg is not xyz, ε".encode())
  assert len(ids) < 18 and tokenizer.start == 0 and tokenizer.vocab == 290
  assert tokenizer.decode([tokenizer.start, *ids]) == "bcdefg is not xyz, ε"


# ---- model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, size", [("gpt2-small", 124_439_808), ("gpt2-medium", 354_823_168)])
def test_presets_have_the_size_of_gpt2(preset, size):
  numbers = train.PRESETS[preset]
  config = gpt.Config(**{name: numbers[name] for name in ("vocab", "context", "layers", "heads", "width")})
  params = nnx.state(nnx.eval_shape(lambda: gpt.GPT(config, rngs=nnx.Rngs(0))))
  assert sum(x.size for x in jax.tree.leaves(params)) == size


def test_residual_projections_start_smaller_with_depth():
  model = gpt.GPT(gpt.Config(vocab=100, context=8, layers=8, heads=2, width=128), rngs=nnx.Rngs(0))
  block = model.blocks[3]
  for layer, std in [(block.qkv, 0.02), (block.up, 0.02), (block.project, 0.005), (block.down, 0.005)]:
    assert float(layer.kernel[...].std()) == pytest.approx(std, rel=0.05)
  assert not np.array_equal(block.up.kernel[...], model.blocks[4].up.kernel[...])


@pytest.mark.parametrize("attention", gpt.ATTENTIONS)
def test_documents_of_a_row_do_not_see_each_other(attention):
  model, lengths = make_model(attention), [7, 10, 7]
  row = one_row(stream_of([*lengths, 9]))
  before = logits_of(model, row)
  for changed in (1, 2, 3):
    inside = row["segments"] == changed
    tokens = np.where(inside & (row["positions"] > 0), (row["tokens"] + 5) % 61, row["tokens"])
    after = logits_of(model, {**row, "tokens": tokens})
    np.testing.assert_allclose(after[~inside], before[~inside], atol=1e-6)
    assert np.abs(after - before)[inside].max() > 0.1


def test_tokens_see_the_past_of_their_document_and_not_its_future():
  model, row = make_model(), one_row(stream_of([25]))
  before = logits_of(model, row)
  row["tokens"][0, 10] = row["tokens"][0, 10] % 60 + 1
  changed = np.abs(logits_of(model, row) - before).max(axis=(0, 2))
  assert changed[:10].max() == 0 and changed[11:].min() > 1e-3


def test_packed_loss_is_the_sum_of_the_losses_of_the_documents():
  model, lengths = make_model(), [7, 10, 8]
  stream = stream_of(lengths)
  alone = [stream.tokens[start:start + length] for start, length in zip(stream.starts, lengths)]
  separate = [summed_loss(model, one_row(data.Stream(tokens, np.array([0]), 0), len(tokens) - 1)) for tokens in alone]
  assert summed_loss(model, one_row(stream)) == pytest.approx(sum(separate), rel=1e-5)


def test_logits_and_loss_are_float32_in_a_bfloat16_model():
  model = gpt.GPT(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  row = one_row(stream_of([25]))
  logits = _logits(*nnx.split(model), row)
  assert logits.dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
  assert np.abs(np.asarray(logits) - logits_of(gpt.GPT(CONFIG, rngs=nnx.Rngs(0)), row)).max() < 0.02


# ---- training ------------------------------------------------------------------------------------------------------


def test_optimizer_warms_up_decays_and_shrinks_matrices_alone():
  args = train.parse(["--steps", "40", "--warmup", "10", "--learning-rate", "0.01"])
  optimizer = train.make_optimizer(args)
  params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
  state, rates = optimizer.init(params), []
  for _ in range(41):
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    rates.append(-float(updates["vector"][0]))                              # Adam with a constant gradient: the rate
  np.testing.assert_allclose([rates[0], rates[5], rates[10], rates[40]], [0, 0.005, 0.01, 0.001], rtol=1e-3, atol=1e-8)
  assert np.argmax(rates) == 10
  state, zero = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
  _, state = optimizer.update(zero, state, params)
  updates, _ = optimizer.update(zero, state, params)
  assert float(updates["matrix"].max()) < 0 and float(jnp.abs(updates["vector"]).max()) == 0


def test_gradients_are_clipped():
  optimizer = train.make_optimizer(train.parse(["--steps", "40", "--warmup", "1"]))
  params = {"vector": jnp.ones(2)}
  state = optimizer.init(params)
  for size in (1e4, 1.0, 1.0):      # unclipped, the first would still rule the second moment
    updates, state = optimizer.update({"vector": jnp.full(2, size)}, state, params)
  assert -float(updates["vector"][0]) > 0.9 * 3e-3


def test_training_beats_the_unigram_entropy_and_leaves_its_files(whole, texts, capsys):
  out, printed = whole
  number = lambda name: float(re.search(rf"^{name} +([\d.,]+)", printed, re.M)[1].replace(",", ""))
  assert number("validation loss") < number("unigram entropy") - 0.5
  assert number("speed") > 0 and losses_of(out, 2)[-1] == pytest.approx(number("validation loss"), abs=1e-4)
  bits = float(re.search(r"= ([\d.]+) bits per byte", printed)[1])
  assert bits == pytest.approx(number("validation loss") / np.log(2), abs=1e-3)
  assert len(losses_of(out)) == 24 and len(losses_of(out, 2)) == 3
  assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert len((out / "sample.txt").read_text()) == 20
  assert not re.search("warning|absl|\x1b|\r", printed, re.I) and 10 < printed.count("\nstep ") < 30, printed

  before = (out / "losses.csv").read_bytes()
  train.main(arguments(out, texts))
  again = capsys.readouterr().out
  assert "is at step 24 of 24 already" in again and "speed" not in again
  assert re.search("^validation loss.*", printed, re.M)[0] == re.search("^validation loss.*", again, re.M)[0]
  assert (out / "losses.csv").read_bytes() == before
  sample.main(["--out", str(out), "--prompt", "two words", "--length", "20"])
  assert capsys.readouterr().out.split("\n\n", 1)[1].startswith("two words")


def test_the_losses_are_those_of_jax_nn(whole, texts, tmp_path):
  train.main(arguments(tmp_path / "run", texts, "--attention", "jax"))
  ours, theirs = losses_of(whole[0]), losses_of(tmp_path / "run")
  assert ours[0] - ours[-1] > 1
  np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def test_all_attentions_give_the_same_logits():
  row = one_row(stream_of([7, 10, 8]))
  logits = {name: logits_of(make_model(name), row) for name in gpt.ATTENTIONS}
  np.testing.assert_allclose(logits["jax"], logits["jflash"], atol=1e-4)
  np.testing.assert_allclose(logits["flax"], logits["jflash"], atol=1e-4)


def test_accumulation_changes_nothing():
  graphdef, params = nnx.split(make_model(config=dataclasses.replace(CONFIG, layers=1)))
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
  optimizer = optax.sgd(1.0)
  step, evaluate = train.make_steps(graphdef, optimizer, mesh)
  rows = data.validation_batches(stream_of([9, 16, 11, 14, 13, 8, 26]), 24, 4, 1)[0]         # weights differ by row
  found = []
  for pieces in (1, 4):
    batch = {name: array.reshape(pieces, 4 // pieces, 24) for name, array in rows.items()}
    loss = evaluate(params, batch)
    updated, _, same = step(jax.tree.map(jnp.copy, params), optimizer.init(params), batch)
    assert float(loss) == pytest.approx(float(same), rel=1e-6)
    found.append((loss, updated))
  assert float(found[0][0]) == pytest.approx(summed_loss(nnx.merge(graphdef, params), rows) / rows["weights"].sum(),
                                             rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train
add = train.Log.add
def add_and_die(self, step, *rest):
  add(self, step, *rest)
  if step == 15:
    os.kill(os.getpid(), signal.SIGKILL)
train.Log.add = add_and_die
train.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_bits(whole, texts, tmp_path):
  out = tmp_path / "run"
  status, printed = script("-c", KILLED, FOLDER, *arguments(out, texts))
  assert status == -signal.SIGKILL and len(losses_of(out)) == 15, printed
  status, printed = script(FOLDER / "train.py", *arguments(out, texts))
  assert status == 0 and re.search(r"resuming .* after step (6|12)\n", printed), printed
  for name in ("losses.csv", "sample.txt"):
    assert (out / name).read_bytes() == (whole[0] / name).read_bytes()


@pytest.mark.slow
def test_four_devices_train_alike(whole, texts, tmp_path):
  status, printed = script(FOLDER / "train.py", *arguments(tmp_path, texts, "--accumulate", "2"),
                           XLA_FLAGS="--xla_force_host_platform_device_count=4")
  assert status == 0 and "4 cpu devices" in printed, printed
  np.testing.assert_allclose(losses_of(tmp_path), losses_of(whole[0]), rtol=2e-4)


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 9])
def test_cached_decoding_gives_the_logits_of_the_whole_pass(prompt):
  model, row = make_model(), one_row(stream_of([25]))
  expected = logits_of(model, row)
  decode = jax.jit(model.decode)
  logits, cache = decode(jnp.asarray(row["tokens"][:, :prompt]), model.empty_cache(1), 0)
  found = [logits]
  for t in range(prompt, 24):
    logits, cache = decode(jnp.asarray(row["tokens"][:, t:t + 1]), cache, t)
    found.append(logits)
  np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-4)


def test_generate_at_temperature_zero_follows_the_likeliest_tokens():
  model, prompt = make_model(), jnp.asarray([[0, 5, 9], [0, 7, 2]])
  graphdef, params = nnx.split(model)
  new = sample.generate(graphdef, params, prompt, jax.random.key(0), 22, 0.0, 0)
  assert new.shape == (2, 22)
  tokens = jnp.concatenate([prompt, new], axis=1)[:, :24]
  positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
  likeliest = logits_of(model, {"tokens": tokens, "positions": positions, "segments": jnp.ones_like(tokens)}).argmax(-1)
  np.testing.assert_array_equal(new, likeliest[:, 2:])


def test_draw_keeps_to_the_top_k_and_to_the_temperature():
  logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3])), (4000, 4))
  key, share = jax.random.key(0), lambda drawn: np.bincount(drawn, minlength=4) / 4000
  np.testing.assert_allclose(share(sample.draw(key, logits, 1.0, 0)), [0.1, 0.4, 0.2, 0.3], atol=0.03)
  np.testing.assert_allclose(share(sample.draw(key, logits, 1.0, 2)), [0, 4 / 7, 0, 3 / 7], atol=0.03)
  np.testing.assert_allclose(share(sample.draw(key, logits, 0.5, 0)), np.array([1, 16, 4, 9]) / 30, atol=0.03)
  assert set(np.asarray(sample.draw(key, logits, 1.0, 1))) == set(np.asarray(sample.draw(key, logits, 0, 0))) == {1}


def test_text_goes_on_past_the_context():
  config = gpt.Config(vocab=257, context=16, layers=1, heads=2, width=16)
  graphdef, params = nnx.split(make_model(config=config))
  write = lambda seed: sample.write(graphdef, params, data.Bytes(), "a long prompt of 29 characters", 50, seed=seed)
  assert write(1).startswith("a long prompt of 29 characters") and len(write(1)) > 40
  assert write(1) == write(1) != write(2)


def test_a_tokenizer_travels_with_the_run(texts, tokenizer_file, tmp_path, capsys):
  copy, out = tmp_path / "mine.json", tmp_path / "run"
  copy.write_bytes(tokenizer_file.read_bytes())
  train.main(arguments(out, texts, "--steps", "4", "--tokenizer", str(copy)))
  copy.unlink()
  capsys.readouterr()
  sample.main(["--out", str(out), "--prompt", "ijklm", "--length", "10"])
  assert capsys.readouterr().out.split("\n\n", 1)[1].startswith("ijklm")


# ---- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more, message", [
    (["--data", "nowhere.txt"], "--data nowhere.txt does not exist .* give a text file or a folder"),
    (["--heads", "5"], "--heads 5 does not divide --width 32; .* for example --heads 4"),
    (["--accumulate", "3"], "--batch 8 cannot be cut into --accumulate 3 pieces .* a multiple of"),
    (["--tokenizer", "nowhere.json"], "--tokenizer nowhere.json is not a file; give a tokenizer.json"),
    (["--steps", "0"], "--steps is 0, and must be more than 0"),
    (["--context", "5000"], "has .* training and .* validation tokens, and --context 5000 needs at least 5001"),
])
def test_a_wrong_argument_names_both_sides_and_the_fix(more, message, texts, tmp_path):
  with pytest.raises(SystemExit, match=message):
    train.main(arguments(tmp_path / "run", texts, *more))
  assert not (tmp_path / "run").exists()


def test_data_without_text_is_named(tmp_path):
  (tmp_path / "a.bin").write_bytes(b"\xff\0")
  with pytest.raises(ValueError, match="has 1 files and none of them is UTF-8 text; give text"):
    data.load(tmp_path, data.Bytes(), 8)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  (tmp_path / "t.json").write_text("{}")
  with pytest.raises(ValueError, match="t.json is not a tokenizer.json that `tokenizers` can read"):
    data.TokenizerFile(tmp_path / "t.json")


def test_a_checkpoint_of_another_run_is_named(whole, texts):
  before = (whole[0] / "losses.csv").read_bytes()
  message = (r"another run \(width 32 there and 64 here, batch 8 there and 4 here\); "
             "give the same arguments to resume it, or another --out")
  with pytest.raises(SystemExit, match=message):
    train.main(arguments(whole[0], texts, "--width", "64", "--batch", "4"))
  assert (whole[0] / "losses.csv").read_bytes() == before


def test_a_folder_without_checkpoint_is_named(tmp_path):
  with pytest.raises(SystemExit, match="holds no checkpoint; write one with `python examples/gpt/train.py"):
    sample.main(["--out", str(tmp_path)])
