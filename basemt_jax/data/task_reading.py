"""Pairs of a task as token ids, a block at a time.

SeqIO and TensorFlow are imported for tasks that only they can read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from basemt_jax.data import (
  declared,
  languages,
  packing,
  pair_sample,
  subword_sampling,
  vocabulary,
)

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Pairs read from a task at a time.
BLOCK = 1024
_SIDES = ("inputs", "targets")
_TEXT = "_pretokenized"  # SeqIO's suffix of a feature's text.
Block: TypeAlias = tuple[packing.Ragged, packing.Ragged, list[dict[str, str]]]


def read_task(
  task: Any,
  split: str,
  layout: packing.RowLayout,
  skip: int = 0,
  texts: bool = False,
  sampled: bool = False,
  draw: subword_sampling.Draw | None = None,
) -> Iterator[Block]:
  """Tokenised pairs of a task in its own order, a block at a time.

  Tokenising is some twenty times faster outside of TensorFlow. That needs a
  task whose ids are SeqIO's `tokenize` of its texts, and EOS: most are. Any
  other is read as SeqIO gives it. Sequences come whole, or at least with a
  token more than fits into `layout`. Without `draw` segmentations are the usual
  ones; with `sampled` each block has only the pairs of the sample, without
  texts.

  Yields:
    Ids of both sides, and per pair, if texts are asked for, `source`, `target`
    and `tagged_source`.
  """
  if draw or is_of_texts(task):
    return _read_texts(task, split, layout, skip, texts, sampled, draw)
  blocks = _read_tokens(task, split, layout, skip, texts)
  return _only_sample(blocks) if sampled else blocks


def is_of_texts(task: Any) -> bool:
  """Whether its ids are `tokenize` of its texts, by a vocabulary of ours."""
  if isinstance(task, declared.Task):
    return True
  import seqio

  steps = [
    step
    for step in task.preprocessors
    if not isinstance(step, seqio.CacheDatasetPlaceholder)
  ]
  plain = [
    [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    [seqio.preprocessors.tokenize_and_append_eos],
  ]
  is_plain = any(steps[-len(tail) :] == tail for tail in plain)
  return is_plain and _has_our_vocabulary(task)


def _only_sample(blocks: Iterator[Block]) -> Iterator[Block]:
  start = 0
  for inputs, targets, _ in blocks:
    places = pair_sample.positions(start, start + len(inputs.lengths)) - start
    yield inputs.take(places), targets.take(places), []
    start += BLOCK


def _has_our_vocabulary(task: Any) -> bool:
  """Whether `vocabulary.Vocabulary` gives the ids of both sides."""
  first, second = (task.output_features[x].vocabulary for x in _SIDES)
  try:
    vocabulary.Vocabulary.from_seqio(first)
  except (ValueError, AttributeError, NotImplementedError):
    return False
  return first == second


def _read_texts(
  task: Any,
  split: str,
  layout: packing.RowLayout,
  start: int,
  texts: bool,
  sampled: bool,
  draw: subword_sampling.Draw | None,
) -> Iterator[Block]:
  """Reads a task's texts and tokenises them here; arguments as `read_task`."""
  features = [task.output_features[name] for name in ("inputs", "targets")]
  pieces = vocabulary.Vocabulary.from_seqio(features[0].vocabulary)
  pairs = itertools.islice(vocabulary.raw_pairs(task, split), start, None)
  while block := list(itertools.islice(pairs, BLOCK)):
    if sampled:
      places = pair_sample.positions(start, start + len(block)) - start
      block = [block[i] for i in places]
    sources, targets = zip(*block, strict=True) if block else ((), ())
    if draw:
      ids = [
        draw.sources(pieces, sources, start, layout.inputs),
        draw.targets(pieces, targets, start, layout.targets),
      ]
    else:
      ids = [pieces.encode_batch(side) for side in (sources, targets)]
    start += BLOCK
    for side, feature in zip(ids, features, strict=True):
      if feature.add_eos:
        for sequence in side:
          sequence.append(packing.EOS_ID)
    inputs, outputs = map(packing.Ragged.of, ids)
    yield inputs, outputs, _texts(sources, targets) if texts else []


def _read_tokens(
  task: Any,
  split: str,
  layout: packing.RowLayout,
  skip: int,
  texts: bool,
) -> Iterator[Block]:
  """Reads a task through all of its SeqIO preprocessors.

  The task is asked for one token more than fits: a sequence that is still too
  long was cut, which is how truncation is counted.
  """
  dataset = task.get_dataset(
    {"inputs": layout.inputs + 1, "targets": layout.targets + 1},
    split=split,
    shuffle=False,
    num_epochs=1,
    try_in_mem_cache=False,
  )
  names = [name + end for end in ("", _TEXT) for name in _SIDES]
  names = [name for name in names if name in dataset.element_spec]
  dataset = dataset.map(lambda example: {k: example[k] for k in names})
  # Ragged batches: leaving TensorFlow once per block, not once per pair.
  for block in dataset.skip(skip).ragged_batch(BLOCK).prefetch(2):
    inputs, targets = (_ragged(block[name]) for name in _SIDES)
    if not texts:
      yield inputs, targets, []
      continue
    sides = [
      [text.decode() for text in block[name + _TEXT].numpy()]
      if name + _TEXT in block
      else _decode(side, task.output_features[name].vocabulary)
      for name, side in zip(_SIDES, (inputs, targets), strict=True)
    ]
    yield inputs, targets, _texts(*sides)


def _decode(side: packing.Ragged, pieces: seqio.Vocabulary) -> list[str]:
  sequences = np.split(side.values, np.cumsum(side.lengths)[:-1])
  return [pieces.decode(ids.tolist()) for ids in sequences]


def _ragged(tensor: tf.Tensor | tf.RaggedTensor) -> packing.Ragged:
  import tensorflow as tf

  if isinstance(tensor, tf.RaggedTensor):
    return packing.Ragged(tensor.values.numpy(), tensor.row_lengths().numpy())
  count, length = tensor.shape
  return packing.Ragged(
    tensor.numpy().reshape(-1), np.full(count, length, np.int64)
  )


def _texts(
  sources: Sequence[str], targets: Sequence[str]
) -> list[dict[str, str]]:
  """Records for the store's file of raw texts."""
  return [
    {
      "source": languages.split_tag(source)[1],
      "target": target,
      "tagged_source": source,
    }
    for source, target in zip(sources, targets, strict=True)
  ]
