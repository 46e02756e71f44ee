"""The GPT example: packing, resuming, gradient accumulation, data parallelism, attentions, sampling, messages."""

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

for package in ("grain", "matplotlib", "optax", "orbax.checkpoint", "rich", "tokenizers"):
  pytest.importorskip(package, reason="the GPT example needs `pip install jflash[examples]`")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
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
         "--evaluate-batches", "2", "--learning-rate", "1e-2", "--sample-length", "40"]


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


def script(name, *args, **env):
  """A subprocess that prints to a pipe, as in a batch job."""
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return subprocess.Popen([sys.executable, str(FOLDER / name), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **env})


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


def train_here(capsys, *args):
  """main() in this process; returns what it printed."""
  capsys.readouterr()
  train.main(list(args))
  return capsys.readouterr().out


def test_training_beats_the_unigram_entropy_and_leaves_its_files(texts, tmp_path, capsys):
  out = tmp_path / "run"
  printed = train_here(capsys, *arguments(out, texts, "--steps", "60", "--evaluate-every", "20"))
  number = lambda name: float(re.search(rf"^{name} +([\d.,]+)", printed, re.M)[1].replace(",", ""))
  assert number("validation loss") < number("unigram entropy") - 0.5
  assert number("speed") > 0 and losses_of(out, 2)[-1] == pytest.approx(number("validation loss"), abs=1e-4)
  bits = float(re.search(r"= ([\d.]+) bits per byte", printed)[1])
  assert bits == pytest.approx(number("validation loss") / np.log(2), abs=1e-3)
  assert len(losses_of(out)) == 60 and len(losses_of(out, 2)) == 3
  assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert len((out / "sample.txt").read_text()) == 40

  again = train_here(capsys, *arguments(out, texts, "--steps", "60", "--evaluate-every", "20"))
  assert "is at step 60 of 60 already" in again and number("validation loss") == losses_of(out, 2)[-1].round(4)
  sample.main(["--out", str(out), "--prompt", "two words", "--length", "50"])
  assert capsys.readouterr().out.split("\n\n", 1)[1].startswith("two words")


@pytest.mark.parametrize("other", ["jax", "flax"])
def test_other_attentions_train_alike(other, texts, tmp_path, capsys):
  for attention in ("jflash", other):
    train_here(capsys, *arguments(tmp_path / attention, texts, "--steps", "25", "--attention", attention))
  ours, theirs = losses_of(tmp_path / "jflash"), losses_of(tmp_path / other)
  assert ours[0] - ours[-1] > 1
  np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def test_accumulation_changes_nothing(texts, tmp_path, capsys):
  for pieces in ("1", "4"):
    train_here(capsys, *arguments(tmp_path / pieces, texts, "--steps", "8", "--accumulate", pieces))
  np.testing.assert_allclose(losses_of(tmp_path / "1"), losses_of(tmp_path / "4"), rtol=1e-4)


def test_a_stopped_run_resumes_with_the_same_bits(texts, tmp_path, capsys, monkeypatch):
  options = ["--steps", "12", "--evaluate-every", "4", "--checkpoint-every", "3"]
  train_here(capsys, *arguments(tmp_path / "whole", texts, *options))
  add = train.Log.add

  def stop(self, step, *rest):
    add(self, step, *rest)
    if step == 8:
      raise RuntimeError("stopped by the test")

  monkeypatch.setattr(train.Log, "add", stop)
  with pytest.raises(RuntimeError, match="stopped by the test"):
    train_here(capsys, *arguments(tmp_path / "stopped", texts, *options))
  monkeypatch.undo()
  printed = train_here(capsys, *arguments(tmp_path / "stopped", texts, *options))
  assert "after step 6" in printed
  assert (tmp_path / "stopped" / "losses.csv").read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()
  assert (tmp_path / "stopped" / "sample.txt").read_bytes() == (tmp_path / "whole" / "sample.txt").read_bytes()


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_bits(texts, tmp_path):
  options = ["--steps", "400", "--evaluate-every", "50", "--checkpoint-every", "10"]
  whole = script("train.py", *arguments(tmp_path / "whole", texts, *options))
  killed, out = script("train.py", *arguments(tmp_path / "killed", texts, *options)), tmp_path / "killed"
  deadline = time.monotonic() + 120
  while not ((out / "losses.csv").exists() and len(losses_of(out)) > 35):
    assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
    time.sleep(0.01)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert 35 < len((out / "losses.csv").read_text().splitlines()) < 400, "killed too late to show anything"
  resumed = script("train.py", *arguments(out, texts, *options))
  printed, quiet = resumed.communicate()[0], whole.communicate()[0]
  assert resumed.returncode == whole.returncode == 0, printed + quiet
  assert re.search(r"resuming .* after step [1-9]", printed), printed
  assert (out / "losses.csv").read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()
  assert not re.search("warning|absl|\x1b|\r", quiet, re.I), quiet
  assert 10 < quiet.count("tokens/s") < 40


@pytest.mark.slow
def test_four_devices_train_alike(texts, tmp_path, capsys):
  flag = "--xla_force_host_platform_device_count=4"
  four = script("train.py", *arguments(tmp_path / "four", texts, "--steps", "10", "--accumulate", "2"), XLA_FLAGS=flag)
  printed = four.communicate()[0]
  assert four.returncode == 0 and "4 cpu devices" in printed, printed
  train_here(capsys, *arguments(tmp_path / "one", texts, "--steps", "10"))
  np.testing.assert_allclose(losses_of(tmp_path / "four"), losses_of(tmp_path / "one"), rtol=1e-4)


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 9])
def test_cached_decoding_gives_the_logits_of_the_whole_pass(prompt):
  model, row = make_model(), one_row(stream_of([25]))
  expected = logits_of(model, row)
  logits, cache = model.decode(jnp.asarray(row["tokens"][:, :prompt]), model.empty_cache(1), 0)
  found = [logits]
  decode = jax.jit(model.decode)
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
  train_here(capsys, *arguments(out, texts, "--steps", "4", "--tokenizer", str(copy)))
  copy.unlink()
  sample.main(["--out", str(out), "--prompt", "ijklm", "--length", "10"])
  assert capsys.readouterr().out.split("\n\n", 1)[1].startswith("ijklm")


# ---- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more, message", [
    (["--data", "nowhere.txt"], "--data nowhere.txt does not exist .* give a text file or a folder"),
    (["--heads", "5"], "--heads 5 does not divide --width 32; .* for example --heads 4"),
    (["--batch", "6", "--accumulate", "4"], "--batch 6 cannot be cut into --accumulate 4 pieces .* a multiple of 4"),
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


def test_a_checkpoint_of_another_run_is_named(texts, tmp_path, capsys):
  out = tmp_path / "run"
  train_here(capsys, *arguments(out, texts, "--steps", "2"))
  before = (out / "losses.csv").read_bytes()
  with pytest.raises(SystemExit, match=r"another run \(width 32 there and 64 here, batch 8 there and 4 here\); give the "
                                       "same arguments to resume it, or another --out"):
    train.main(arguments(out, texts, "--steps", "4", "--width", "64", "--batch", "4"))
  assert (out / "losses.csv").read_bytes() == before


def test_a_folder_without_checkpoint_is_named(tmp_path):
  with pytest.raises(SystemExit, match="holds no checkpoint; write one with `python examples/gpt/train.py"):
    sample.main(["--out", str(tmp_path)])
