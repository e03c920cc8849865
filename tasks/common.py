"""What all translation tasks share: names, tags, features, registration.

A *direction* is `en-de`: source language, target language. Its SeqIO task is
named `corpus.en_de` (SeqIO allows no hyphen): the direction is what follows
the last dot. Codes that hold an underscore themselves are joined by two:
`corpus.eng_Latn__deu_Latn` is the direction `eng_Latn-deu_Latn`. The source
text begins with a tag for the language wanted, `<2de>`. See
`basemt_jax.data.languages`.

SeqIO is imported where one of its objects is made or asked for, not before:
see `basemt_jax.data.declared`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from basemt_jax.data import declared, languages
from basemt_jax.data import vocabulary as vocabulary_lib

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

SPLITS = ("train", "validation", "test")
# Pairs handed to TensorFlow at a time; one by one is ten times slower.
_CHUNK = 1000
_SHUFFLE_BUFFER = 10_000

Pair = tuple[str, str]
ReadPairs = Callable[[str], Iterator[Pair]]
NumPairs = Mapping[str, int] | Callable[[], Mapping[str, int]]


class PairSource:
  """Sentence pairs read by a Python function, lazily, in a fixed order.

  A `seqio.DataSourceInterface`, by its shape. Nothing is read before a dataset
  is iterated. `text_pairs` gives the same texts without TensorFlow, for readers
  in a hurry.
  """

  def __init__(
    self,
    read: ReadPairs,
    num_pairs: NumPairs,
    fingerprint: str | Callable[[], str] = "",
    prefix: str = "",
  ):
    """Makes a source of examples {'inputs': text, 'targets': text}.

    Args:
      read: gives the (source, target) pairs of a split, the same every time.
      num_pairs: the split's name to its number of pairs; or a function that
        gives that, called when it is first asked for.
      fingerprint: changes whenever the pairs do: rows that were packed from
        other pairs are then packed again. Or a function, as `num_pairs`.
      prefix: put before every source text: its tag.
    """
    self.read, self.prefix = read, prefix
    self._num_pairs, self._fingerprint = num_pairs, fingerprint

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits."""
    return tuple(self._sizes)

  @property
  def fingerprint(self) -> str:
    """Stands for the pairs."""
    known = self._fingerprint
    return known if isinstance(known, str) else known()

  @functools.cached_property
  def _sizes(self) -> Mapping[str, int]:
    known = self._num_pairs
    return known() if callable(known) else known

  def num_input_examples(self, split: str) -> int:
    """Pairs of a split; 0 if there is no such split."""
    return self._sizes.get(split, 0)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """Sharding is by examples: there are no files to share out."""
    return False

  @property
  def caching_permitted(self) -> bool:
    """Whether SeqIO may keep a copy of it."""
    return True

  def list_shards(self, split: str) -> list[str]:
    """A split is one shard."""
    return [split]

  def text_pairs(self, split: str) -> Iterator[Pair]:
    """The (source, target) texts of a split, the source with its prefix."""
    for source, target in self.read(split):
      yield self.prefix + source, target

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length: Mapping[str, int] | None = None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """The split as raw text; the task shuffles, so `shuffle` does nothing."""
    import tensorflow as tf

    del shuffle, seed, sequence_length, use_cached, num_epochs
    if split not in self.splits:
      raise ValueError(
        f"there is no split {split!r}; there are {', '.join(self.splits)}"
      )

    def chunks() -> Iterator[np.ndarray]:
      pairs = self.text_pairs(split)
      while chunk := list(itertools.islice(pairs, _CHUNK)):
        yield np.array(
          [(a.encode(), b.encode()) for a, b in chunk], dtype=object
        )

    dataset = tf.data.Dataset.from_generator(
      chunks, output_signature=tf.TensorSpec((None, 2), tf.string)
    ).unbatch()
    if shard_info is not None and shard_info.num_shards > 1:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset.map(lambda pair: {"inputs": pair[0], "targets": pair[1]})


def whole_target(
  output: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str:
  """SeqIO postprocessor: references are whole, however short the features."""
  if is_target and example is not None:
    text = example["targets_pretokenized"]
    return text.decode() if isinstance(text, bytes) else str(text)
  return output


def bleu(targets: list[str], predictions: list[str], *, language: str) -> dict:
  """Corpus BLEU of a target language, with its tokenizer (SeqIO metric)."""
  import sacrebleu  # Here: it is slow to import and needed only to score.

  from basemt_jax import evaluation

  tokenizer = evaluation.sacrebleu_tokenizer(language, targets)
  score = sacrebleu.corpus_bleu(predictions, [targets], tokenize=tokenizer)
  return {"bleu": score.score}


def chrf(targets: list[str], predictions: list[str]) -> dict:
  """Corpus chrF++ (SeqIO metric)."""
  import sacrebleu

  score = sacrebleu.corpus_chrf(predictions, [targets], word_order=2)
  return {"chrf++": score.score}


def add_direction(
  corpus: str,
  source: str,
  target: str,
  read: ReadPairs,
  num_pairs: NumPairs,
  vocabulary: seqio.Vocabulary | vocabulary_lib.Vocabulary,
  fingerprint: str | Callable[[], str] = "",
) -> Any:
  """Registers the SeqIO task of one direction.

  Args:
    corpus: what the task's name begins with.
    source: source language.
    target: target language.
    read: gives the (source, target) texts of a split, untagged.
    num_pairs: see `PairSource`.
    vocabulary: of both sides. With one of ours the task is declared, and
      registered when SeqIO is imported.
    fingerprint: see `PairSource`.

  Returns:
    The SeqIO task, or the declared one. Its examples have `inputs` and
    `targets`, int32 ids with EOS, and their texts as `inputs_pretokenized`
    (tagged) and `targets_pretokenized`.
  """
  tag = languages.Language.parse(target).tag
  if label := languages.Language.parse(source).label:
    # Caswell et al., arXiv:1906.06442: a model that is told what its own kind
    # wrote does not take it for how people write.
    tag += f" <{label}>"
  pairs = PairSource(read, num_pairs, fingerprint, prefix=f"{tag} ")
  if not isinstance(vocabulary, vocabulary_lib.Vocabulary):
    return add_task(corpus, source, target, pairs, vocabulary)
  feature = declared.Feature(vocabulary)
  task = declared.Task(
    _task_name(corpus, source, target),
    pairs,
    {"inputs": feature, "targets": feature},
  )
  return declared.declare(
    task,
    lambda: add_task(corpus, source, target, pairs, vocabulary.seqio()),
  )


def _task_name(corpus: str, source: str, target: str) -> str:
  return languages.Direction(
    *map(languages.Language.parse, (source, target))
  ).task(corpus)


def add_task(
  corpus: str,
  source: str,
  target: str,
  data: seqio.DataSource,
  vocabulary: seqio.Vocabulary,
  first_steps: Sequence[Callable[..., tf.data.Dataset]] = (),
) -> seqio.Task:
  """As `add_direction`, of any data source.

  After `first_steps`, SeqIO preprocessors, it gives the texts `inputs`, tagged,
  and `targets`.
  """
  import seqio

  feature = seqio.Feature(vocabulary, add_eos=True)
  return seqio.TaskRegistry.add(
    _task_name(corpus, source, target),
    source=data,
    preprocessors=[
      *first_steps,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={"inputs": feature, "targets": feature},
    postprocess_fn=whole_target,
    metric_fns=[functools.partial(bleu, language=target), chrf],
    shuffle_buffer_size=_SHUFFLE_BUFFER,
  )


def add_mixture(name: str, tasks: Sequence[Any]) -> Any:
  """Registers the mixture of tasks, each at the rate of its training size.

  Of tasks that `add_direction` declared the mixture is declared, too.
  """

  def register() -> seqio.Mixture:
    import seqio

    rates = [(task.name, _train_pairs) for task in tasks]
    return seqio.MixtureRegistry.add(name, rates)

  return declared.declare(declared.Mixture(name, tasks), register)


def _train_pairs(task: seqio.Task) -> float:
  """A rate that is not asked for before the mixture is used."""
  return float(task.num_input_examples("train"))
