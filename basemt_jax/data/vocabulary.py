"""Vocabularies: text to token ids and back, without TensorFlow.

A `Vocabulary` is a SentencePiece model or plain UTF-8 bytes. Its ids are those
of `seqio.SentencePieceVocabulary` and `seqio.ByteVocabulary`: 0 padding, 1 end
of sentence, 2 unknown. Training, evaluation and translation use this class, so
that they run where TensorFlow is not installed; `Vocabulary.seqio` gives SeqIO
tasks the same vocabulary. SeqIO is imported only inside the functions that
need it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece

from basemt_jax import files, heating
from basemt_jax.data import languages, normalisation

_log = logging.getLogger(__name__)

BYTES = "bytes"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_NUM_SPECIAL, _NUM_BYTES = 3, 256
_CHUNK = 1000
# Sentence pairs that a vocabulary is trained on, at most.
_EXAMPLES = 1_000_000
_TELL_SECONDS = 5.0
# The seed is the library's and one for all; the generator is that of a thread,
# seeded when it first draws, and a batch is encoded by a new thread.
_DRAWING = threading.Lock()
# No-break, em, thin, ideographic, ... spaces, and line ends.
_SPACES = (
  "\t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
  "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


class Vocabulary:
  """A SentencePiece model, or bytes if `model` is None.

  Equal vocabularies have equal models; instances can be pickled and hashed.

  Attributes:
    model: the serialised SentencePiece model, None for bytes.
    path: the file the model was read from, if any.
  """

  pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID

  def __init__(
    self,
    model: bytes | None = None,
    *,
    path: str | None = None,
    extra_ids: int = 0,
  ):
    """Makes a vocabulary of a serialised model; see `load` for files.

    Args:
      model: a serialised SentencePiece model, or None for bytes.
      path: the file it came from; error messages and `seqio` use it.
      extra_ids: ids that only enlarge a byte vocabulary, as SeqIO's do. (A
        SentencePiece model holds its extra ids as pieces.)

    Raises:
      ValueError: the model cannot be read, or its special ids are not pad 0,
        eos 1, unk 2.
    """
    self.model = model
    self.path = path
    self._extra_ids = extra_ids
    self._pieces = None if model is None else _processor(model, path)

  @classmethod
  def load(cls, source: str | os.PathLike[str]) -> Vocabulary:
    """Loads a SentencePiece model file; 'bytes' is the byte vocabulary."""
    if source == BYTES:
      return cls()
    path = pathlib.Path(source)
    if not path.is_file():
      raise ValueError(
        f"there is no vocabulary file {str(path)!r}: give a SentencePiece"
        " model (`basemt vocab` trains one) or 'bytes'"
      )
    return cls(path.read_bytes(), path=str(path))

  @classmethod
  def from_seqio(cls, vocabulary: Any) -> Vocabulary:
    """The same vocabulary as a SeqIO SentencePiece or byte vocabulary.

    They are told apart by shape, so that neither SeqIO nor TensorFlow is
    imported; both may have extra ids. One of ours is returned as it is.

    Raises:
      ValueError: it is another kind of vocabulary.
    """
    if isinstance(vocabulary, cls):
      return vocabulary
    if hasattr(vocabulary, "sp_model"):
      path = vocabulary.sentencepiece_model_file
      return cls(vocabulary.sp_model, path=str(path))
    if vocabulary.vocab_size - vocabulary.extra_ids == len(cls()):
      return cls(extra_ids=vocabulary.extra_ids)
    raise ValueError(
      f"vocabulary {type(vocabulary).__name__} is neither SentencePiece nor"
      " bytes; tasks must use seqio.SentencePieceVocabulary or"
      " seqio.ByteVocabulary"
    )

  @property
  def kind(self) -> str:
    """The kind of vocabulary: 'bytes' or 'sentencepiece'."""
    return BYTES if self.model is None else "sentencepiece"

  @property
  def vocab_size(self) -> int:
    """Number of ids, the special ones and extra ids included."""
    if self._pieces is None:
      return _NUM_SPECIAL + _NUM_BYTES + self._extra_ids
    return self._pieces.get_piece_size()

  @property
  def fingerprint(self) -> str:
    """SHA-256 of what decides the ids, in hexadecimal."""
    content = self.model or f"{BYTES}+{self._extra_ids}".encode()
    return hashlib.sha256(content).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; no EOS is added."""
    if self._pieces is None:
      return [byte + _NUM_SPECIAL for byte in text.encode()]
    return self._pieces.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of every text."""
    if self._pieces is None:
      return [self.encode(text) for text in texts]
    return self._pieces.encode(list(texts), num_threads=1)

  def sample_batch(
    self, texts: Sequence[str], alpha: float, seed: int
  ) -> list[list[int]]:
    """Segmentations drawn at random, of which each decodes to its text.

    Args:
      texts: any; the same ones with the same seed give the same.
      alpha: see `subword_sampling.SubwordSampling`.
      seed: from 0, below 2^31.
    """
    if self._pieces is None:
      return self.encode_batch(texts)  # There is no other.
    with _DRAWING:
      sentencepiece.set_random_generator_seed(seed)
      return self._pieces.encode(
        list(texts),
        enable_sampling=True,
        alpha=alpha,
        nbest_size=-1,
        num_threads=1,
      )

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids` up to the first EOS; padding is dropped.

    Ids outside the vocabulary (a model may pad its embedding) count as
    unknown, and bytes that are not UTF-8 are dropped, as in SeqIO.
    """
    kept: list[int] = []
    size = self.vocab_size  # Asking for every token would take longest.
    for token in map(int, ids):
      if token == EOS_ID:
        break
      if token != PAD_ID:
        kept.append(token if token < size else UNK_ID)
    if self._pieces is not None:
      return self._pieces.decode(kept)
    values = [token - _NUM_SPECIAL for token in kept]
    return bytes(v for v in values if 0 <= v < _NUM_BYTES).decode(
      "utf-8", errors="ignore"
    )

  def piece(self, token: int) -> str:
    """How a token looks in a table: its piece, byte or special name."""
    if self._pieces is not None:
      return self._pieces.id_to_piece(int(token))
    special = ("<pad>", "</s>", "<unk>")
    if token < _NUM_SPECIAL:
      return special[token]
    value = token - _NUM_SPECIAL
    if value >= _NUM_BYTES:
      return f"<extra_{value - _NUM_BYTES}>"
    return chr(value) if 32 < value < 127 else f"<0x{value:02X}>"

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the SentencePiece model; a byte vocabulary has no file."""
    if self.model is None:
      raise ValueError("a byte vocabulary has no file: load it as 'bytes'")
    pathlib.Path(path).write_bytes(self.model)

  def seqio(self) -> Any:
    """The SeqIO vocabulary with the same ids (imports TensorFlow)."""
    import seqio  # Only here: training needs neither SeqIO nor TensorFlow.

    if self.model is None:
      return seqio.ByteVocabulary(extra_ids=self._extra_ids)
    if self.path is None:
      raise ValueError(
        "SeqIO reads SentencePiece models from files: `save` this vocabulary"
        " and `load` it again"
      )
    return seqio.SentencePieceVocabulary(self.path)

  def __len__(self) -> int:
    return self.vocab_size

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint
    )

  def __hash__(self) -> int:
    return hash(self.fingerprint)

  def __repr__(self) -> str:
    return f"Vocabulary({self.path or self.kind!r}, size={self.vocab_size})"

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_pieces": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    if self.model is not None:
      self._pieces = _processor(self.model, self.path)


def _processor(
  model: bytes, path: str | None
) -> sentencepiece.SentencePieceProcessor:
  """Loads a serialised model and checks its special ids."""
  name = path or "The given SentencePiece model"
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
  except (RuntimeError, TypeError) as error:
    raise ValueError(f"{name} is not a SentencePiece model") from error
  if ids != (PAD_ID, EOS_ID, UNK_ID):
    raise ValueError(
      f"{name} has pad, eos, unk ids {ids}, but (0, 1, 2) is needed: train it"
      " with `basemt vocab`"
    )
  return processor


def train_sentencepiece(
  texts: Iterable[str],
  path: str | os.PathLike[str],
  vocab_size: int = 8000,
  *,
  tags: Sequence[str] = (),
  character_coverage: float = 0.9995,
) -> Vocabulary:
  """Trains a unigram SentencePiece model; the same texts give the same bytes.

  Of the text only spaces are normalised: every kind of space becomes a plain
  one, and repeated, leading and trailing ones go; apart from that, decoding
  gives back what was encoded. Characters without a piece become bytes; digits
  are pieces of their own, so that numbers can be copied.

  Args:
    texts: sentences, consumed once; those of more than 4192 bytes are not used.
    path: where the model is written (replaced atomically).
    vocab_size: the most pieces; few texts give fewer.
    tags: whole tokens such as '<2de>', wherever they begin a word.
    character_coverage: share of the text's characters that get a piece.

  Returns:
    The vocabulary, loaded from `path`.

  Raises:
    ValueError: no texts, or fewer pieces than bytes, tags and characters need.
  """
  least = _NUM_SPECIAL + _NUM_BYTES + len(tags) + 1
  if vocab_size < least:
    raise ValueError(
      f"vocab_size is {vocab_size}, but the bytes, special tokens and"
      f" {len(tags)} tags alone take {least - 1}: ask for more"
    )
  counted = _Counted((text for text in texts if text.strip()), vocab_size)
  options = {
    "model_type": "unigram",
    "vocab_size": vocab_size,
    "hard_vocab_limit": False,
    # The word marker makes '<2de> text' two tokens, not three.
    "user_defined_symbols": ["\u2581" + tag for tag in tags],
    "pad_id": PAD_ID,
    "eos_id": EOS_ID,
    "unk_id": UNK_ID,
    "bos_id": -1,
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": character_coverage,
    "max_sentence_length": 4192,
    # Sums are taken per thread: a fixed number makes them reproducible.
    "num_threads": 4,
    "minloglevel": 2,  # Progress and warnings are told here.
  }
  try:
    model = _train(counted, options)
  except RuntimeError as error:
    if not counted.count:
      raise ValueError("there are no texts to train a vocabulary on") from None
    needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    why = (
      f"their characters, the bytes and the tags alone take {needed[1]}: ask "
      "for more"
      if needed
      else f"SentencePiece says: {error}"
    )
    raise ValueError(
      f"a vocabulary of {vocab_size} pieces cannot be made of {counted.count} "
      f"texts; {why}"
    ) from error
  files.write_atomically(path, model)
  trained = Vocabulary.load(path)
  if trained.vocab_size < vocab_size:
    _log.warning(
      "%s has %d pieces, not the %d asked for: the texts give no more",
      path,
      trained.vocab_size,
      vocab_size,
    )
  return trained


def _train(texts: Iterator[str], options: dict[str, Any]) -> bytes:
  """Trains a model that turns every kind of space into a plain one."""
  # Here: it needs protobuf. Its classes are made at run time: no types.
  from sentencepiece import sentencepiece_model_pb2 as protos

  model = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    rules = pathlib.Path(folder, "spaces.tsv")
    rules.write_text("".join(f"{ord(space):X}\t20\n" for space in _SPACES))
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=texts,
      model_writer=model,
      normalization_rule_tsv=str(rules),
      **options,
    )
  proto = vars(protos)["ModelProto"].FromString(model.getvalue())
  # The model records where the rules were: drop it, or no two were equal.
  proto.normalizer_spec.ClearField("normalization_rule_tsv")
  return proto.SerializeToString(deterministic=True)


class _Counted:
  """An iterator that knows, and tells, how much was taken from it."""

  def __init__(self, values: Iterator[str], pieces: int):
    self.count = 0
    self._values, self._pieces = values, pieces
    self._told, self._ended = time.monotonic(), False

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    try:
      value = next(self._values)
    except StopIteration:
      if not self._ended:  # SentencePiece asks again.
        _log.info(
          "vocabulary: fitting %s pieces to %s sentences",
          f"{self._pieces:,}",
          f"{self.count:,}",
        )
      self._ended = True
      raise
    self.count += 1
    if time.monotonic() > self._told + _TELL_SECONDS:
      self._told = time.monotonic()
      _log.info("vocabulary: read %s sentences", f"{self.count:,}")
    return value


def train_from_mixture(
  mixture: Any,
  path: str | os.PathLike[str],
  vocab_size: int = 8000,
  *,
  temperature: float = 5.0,
) -> Vocabulary:
  """Trains a vocabulary for any mixture, on temperature-sampled text.

  Args:
    mixture: a `seqio.Mixture` or task.
    path: where the model is written.
    vocab_size: the most pieces.
    temperature: of the sampling of directions, p_i proportional to n_i^(1/T);
      5 is mBART50's and keeps small languages' words whole.

  Returns:
    The vocabulary. Its tags are those that begin the mixture's sources.
  """
  tags: set[str] = set()

  def texts() -> Iterator[str]:
    for source, target in sampled_examples(mixture, temperature, _EXAMPLES):
      yield languages.split_tag(source)[1]
      yield target

  for task in _tasks(mixture):
    for source, _ in itertools.islice(raw_pairs(task), 1):
      tags |= {languages.split_tag(source)[0]} - {""}
  return train_sentencepiece(texts(), path, vocab_size, tags=sorted(tags))


def sampled_examples(
  mixture: Any, temperature: float, num_examples: int
) -> Iterator[tuple[str, str]]:
  """Training text of a mixture, directions sampled with a temperature.

  Deterministic, in the order of the directions' names: direction i gives
  about num_examples * p_i pairs, evenly spaced over its training data, or the
  data several times over if there are fewer. Never more pairs are drawn than
  the whole mixture has at its largest direction's rate of one epoch, so that
  a small corpus is not repeated without need.

  Yields:
    (source, target), the source with its language tag.
  """
  tasks = _tasks(mixture)
  sizes = np.array([_train_size(task) for task in tasks])
  rates = heating.mixing_rates(sizes, temperature)
  largest = int(np.argmax(sizes))
  num_examples = min(num_examples, round(sizes[largest] / rates[largest]))
  for task, size, rate in zip(tasks, sizes, rates, strict=True):
    quota = max(1, round(num_examples * float(rate)))
    repeats, rest = divmod(quota, int(size))
    for index, example in enumerate(raw_pairs(task)):
      # One more for `rest` of the `size` positions, evenly spaced.
      extra = (index + 1) * rest // size - index * rest // size
      for _ in range(repeats + int(extra)):
        yield example


def _tasks(mixture: Any) -> list[Any]:
  """The tasks of a mixture (or the task itself), sorted by name."""
  return sorted(getattr(mixture, "tasks", [mixture]), key=lambda t: t.name)


def _train_size(task: Any) -> int:
  """Training examples of a task, counted if the task does not know."""
  size = task.num_input_examples("train")
  size = sum(1 for _ in raw_pairs(task)) if size is None else size
  if not size:
    raise ValueError(f"task {task.name!r} has no training examples")
  return size


def raw_pairs(task: Any, split: str = "train") -> Iterator[tuple[str, str]]:
  """Pairs (source, target) of a SeqIO task's texts, normalised, untokenised.

  Runs the task's preprocessors up to SeqIO's `tokenize`, which is several
  times faster than the whole task; where there are none, and the data source
  has a method `text_pairs`, ten times faster again, without TensorFlow. A task
  that tokenises in another way is read whole: from `inputs_pretokenized` and
  `targets_pretokenized`, or decoded from its tokens.

  Args:
    task: a `seqio.Task` with features `inputs` and `targets`, or a
      `declared.Task`.
    split: the split to read.
  """
  if not hasattr(task, "preprocessors"):
    yield from task.source.text_pairs(split)
    return
  import seqio  # Here: the rest of the module does without TensorFlow.

  tokenizers = (
    seqio.preprocessors.tokenize,
    seqio.preprocessors.tokenize_and_append_eos,
  )
  steps = list(task.preprocessors)
  end = next((i for i, s in enumerate(steps) if s in tokenizers), None)
  options = {"split": split, "shuffle": False, "try_in_mem_cache": False}
  if end is None:
    for example in task.get_dataset(None, **options).as_numpy_iterator():
      source, target = (
        _text(example, name, task.output_features[name].vocabulary)
        for name in ("inputs", "targets")
      )
      yield source, target
    return
  if end == 0 and hasattr(task.source, "text_pairs"):
    yield from task.source.text_pairs(split)
    return
  raw = task.replace(preprocessors=steps[:end], output_features={})
  dataset = raw.get_dataset(None, **options, trim_output_features=False).map(
    lambda example: (example["inputs"], example["targets"])
  )
  for sources, targets in dataset.batch(_CHUNK).as_numpy_iterator():
    for source, target in zip(sources, targets, strict=True):
      yield (
        normalisation.normalise(source.decode()),
        normalisation.normalise(target.decode()),
      )


def _text(example: dict[str, Any], name: str, vocabulary: Any) -> str:
  """Text of a feature, kept by the task or decoded from its tokens."""
  text = example.get(f"{name}_pretokenized")
  if text is None:
    return vocabulary.decode(example[name].tolist())
  return text.decode() if isinstance(text, bytes) else str(text)
