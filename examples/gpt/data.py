"""Text as packed rows of tokens: files -> documents -> one stream -> rows -> batches with a state that can be saved.

Every file is one document and starts with a start token. The documents of a split lie end to end in one stream, which
is cut into rows of `context` tokens, so several documents may share a row. `segments` says which token belongs to
which of them, `positions` count from 0 in each, and `weights` are 0 where the next token belongs to another document.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig

import grain
import numpy as np

# Folders of the standard library that are tables, tests or not Python prose.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "encodings",
           "pydoc_data", "turtledemo", "ensurepip"}
START_TOKENS = ("<|endoftext|>", "<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "[CLS]")


class Bytes:
  """One token per byte; token 256 starts a document."""
  vocab, start, digest = 257, 256, "bytes"

  def encode(self, text):
    """Text (bytes) -> token ids `[L]`."""
    return np.frombuffer(text, np.uint8)

  def decode(self, ids):
    """Token ids -> str; ids that are no byte are left out."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class TokenizerFile:
  """A `tokenizer.json` of the Hugging Face `tokenizers` library.

  Documents start with its own start token, or with one more id where it has none.
  """

  def __init__(self, path):
    import tokenizers  # only needed here
    path = pathlib.Path(path)
    if not path.is_file():
      raise ValueError(f"--tokenizer {path} is not a file; give a tokenizer.json, or leave it out to train on bytes.")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
      raise ValueError(f"--tokenizer {path} is not a tokenizer.json that `tokenizers` can read ({error}); "
                       "give one, or leave it out to train on bytes.") from error
    known = [i for i in map(self._tokenizer.token_to_id, START_TOKENS) if i is not None]
    self.start = known[0] if known else max(self._tokenizer.get_vocab().values()) + 1
    self.vocab = max(max(self._tokenizer.get_vocab().values()), self.start) + 1
    self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

  def encode(self, text):
    """Text (bytes) -> token ids `[L]`."""
    return np.asarray(self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids, np.int64)

  def decode(self, ids):
    """Token ids -> str."""
    size = self._tokenizer.get_vocab_size()
    return self._tokenizer.decode([int(i) for i in ids if i < size and i != self.start])


@dataclasses.dataclass(frozen=True)
class Stream:
  """Documents end to end: `tokens [L]`, the offset `starts [D]` of each one, and their size in bytes."""
  tokens: np.ndarray
  starts: np.ndarray
  bytes: int

  def digest(self):
    """Names the contents, so that a resumed run notices other data."""
    return hashlib.sha256(self.tokens.tobytes() + self.starts.tobytes()).hexdigest()[:16]

  def unigram_entropy(self):
    """Nats per token of the best model that ignores context, start tokens left out: a loss anyone can reach."""
    counts = np.bincount(np.delete(self.tokens, self.starts))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())

  def tokens_per_byte(self):
    """Start tokens are never predicted, so they do not count."""
    return (len(self.tokens) - len(self.starts)) / self.bytes


class Rows:
  """Row i of a stream, cut every `context` tokens: the random-access source that grain shuffles.

  A row is a dict of `[context]` arrays: `tokens`, `targets` (the next token), `positions` (from 0 in each document),
  `segments` (1, 2, … in the order in which documents come) and `weights` (0 where the target is in another document).
  """

  def __init__(self, stream, context):
    self._stream, self._context = stream, context

  def __len__(self):
    return (len(self._stream.tokens) - 1) // self._context

  def __getitem__(self, index):
    offset = np.arange(self._context + 1) + index * self._context                           # [C + 1]
    tokens = self._stream.tokens[offset].astype(np.int32)
    document = np.searchsorted(self._stream.starts, offset, side="right") - 1
    positions = offset - np.maximum(self._stream.starts[document], offset[0])
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "positions": positions[:-1].astype(np.int32),
        "segments": (document - document[0] + 1)[:-1].astype(np.int32),
        "weights": (document[1:] == document[:-1]).astype(np.float32),
    }


def load(path, tokenizer, context):
  """Reads text and returns `(training, validation)` streams.

  Args:
    path: a file, a folder (read recursively), or None for the standard library of the running Python.
    tokenizer: `Bytes()` or `TokenizerFile(path)`.
    context: tokens in a row; each split must fill at least one.

  Raises:
    ValueError: the path does not exist, holds no text, or holds too little of it.
  """
  documents = _split(_read(path))
  streams = [_stream(split, tokenizer) for split in documents]
  shortest = min(len(stream.tokens) for stream in streams)
  if shortest <= context:
    raise ValueError(
        f"--data {path} has {len(streams[0].tokens)} training and {len(streams[1].tokens)} validation tokens, and "
        f"--context {context} needs at least {context + 1} of each; give more text, or a --context of at most "
        f"{shortest - 1}.")
  return streams


def training_batches(stream, context, batch, seed):
  """An endless grain iterator of dicts of `[batch, context]` arrays, shuffled anew in every pass over the rows."""
  rows = grain.MapDataset.source(Rows(stream, context)).seed(seed).shuffle().repeat()
  return iter(rows.batch(batch).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(stream, context, batch, count):
  """The same at most `count` batches every time, their rows spread evenly over the stream.

  A short last batch is filled up with rows of weight 0.
  """
  rows = Rows(stream, context)
  chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), batch * count)).astype(int))
  picked = [rows[int(i)] for i in chosen]
  blank = {name: np.zeros_like(array) for name, array in picked[0].items()}
  picked += [blank] * (-len(picked) % batch)
  return [{name: np.stack([row[name] for row in picked[i:i + batch]]) for name in blank}
          for i in range(0, len(picked), batch)]


def _read(path):
  """Returns `[(relative name, bytes)]`, sorted by name; files that are not UTF-8 text are left out."""
  root = pathlib.Path(path or sysconfig.get_paths()["stdlib"])
  if not root.exists():
    raise ValueError(f"--data {path} does not exist (looked in {pathlib.Path.cwd()}); give a text file or a folder of "
                     "text files, or leave --data out to train on Python's standard library.")
  if root.is_file():
    files = [root]
  elif path is None:
    files = [f for f in root.rglob("*.py") if not SKIPPED.intersection(f.relative_to(root).parts)]
  else:
    files = [f for f in root.rglob("*") if f.is_file() and not any(p[0] == "." for p in f.relative_to(root).parts)]
  named = sorted((f.relative_to(root).as_posix(), f.read_bytes()) for f in files)
  found = [(name, text) for name, text in named if text and _is_text(text)]
  if not found:
    raise ValueError(f"--data {root} has {len(named)} files and none of them is UTF-8 text; give text.")
  return found


def _is_text(raw):
  try:
    return "\0" not in raw.decode("utf-8")
  except UnicodeDecodeError:
    return False


def _split(named, share=0.1):
  """Documents for training and validation: by a hash of their names, or the end of the text where there is one file."""
  if len(named) == 1:
    text = named[0][1].decode("utf-8")
    cut = len(text) - int(len(text) * share)
    return [text[:cut].encode()], [text[cut:].encode()]
  ranked = sorted((hashlib.sha256(name.encode()).digest(), text) for name, text in named)
  count = sum(digest[0] < 256 * share for digest, _ in ranked)
  count = min(max(count, 1), len(ranked) - 1)
  return [text for _, text in ranked[count:]], [text for _, text in ranked[:count]]


def _stream(texts, tokenizer):
  dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32
  pieces = [np.concatenate([[tokenizer.start], tokenizer.encode(text)]).astype(dtype) for text in texts]
  starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])
  return Stream(np.concatenate(pieces), starts, sum(map(len, texts)))
