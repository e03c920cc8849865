"""Row stores from the tasks of a SeqIO mixture, built at first use.

`ensure_store` tokenises and packs every task, direction by direction, into a
`row_store.RowStore`, which is what training reads. SeqIO and TensorFlow are
imported for tasks that only they can read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from basemt_jax import checksums, files
from basemt_jax.data import (
  declared,
  languages,
  mixtures,
  packing,
  pair_sample,
  row_store,
  vocabulary,
)

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

_log = logging.getLogger(__name__)

Progress = Callable[[str, str, int, int | None], None]

SPLITS = ("train", "validation", "test")
# Pairs read from a task at a time.
_BLOCK = 1024


def sizes(mixture: mixtures.MixtureOrTask) -> tuple[int, int]:
  """Pieces of a mixture's vocabulary, and its directions."""
  found = mixtures.get_mixture(mixture)
  return _vocabulary(found).vocab_size, len(mixtures.tasks_by_direction(found))


def ensure_store(
  mixture: mixtures.MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  cache_dir: row_store.PathLike,
  *,
  splits: Sequence[str] = SPLITS,
  long_pairs: packing.LongPairs = "cut",
  progress: Progress | None = None,
  verify: bool = True,
) -> row_store.RowStore:
  """The store of a mixture, built at first use.

  Args:
    mixture: a registered name, or a mixture or task.
    task_feature_lengths: 'inputs' and 'targets'.
    cache_dir: the store's folder in it is named after the mixture and the
      fingerprint, so that changed data gets a store of its own.
    splits: to build.
    long_pairs: see `build_store`.
    progress: see `build_store`.
    verify: compare the files of a store that is there with their checksums.

  Returns:
    The open store.
  """
  return build_store(
    mixture,
    task_feature_lengths,
    store_directory(
      mixture, task_feature_lengths, cache_dir, splits, long_pairs
    ),
    splits=splits,
    long_pairs=long_pairs,
    progress=progress,
    verify=verify,
  )


def store_directory(
  mixture: mixtures.MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  cache_dir: row_store.PathLike,
  splits: Sequence[str] = SPLITS,
  long_pairs: packing.LongPairs = "cut",
) -> pathlib.Path:
  """Where `ensure_store` keeps a mixture's store, built or not."""
  found = mixtures.get_mixture(mixture)
  parts = fingerprint(found, task_feature_lengths, splits, long_pairs)
  digest = _digest(json.dumps(parts, sort_keys=True).encode())
  name = re.sub(r"[^\w.-]", "-", found.name)
  return pathlib.Path(cache_dir) / f"{name}-{digest}"


def build_store(
  mixture: mixtures.MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  directory: row_store.PathLike,
  *,
  splits: Sequence[str] = SPLITS,
  long_pairs: packing.LongPairs = "cut",
  progress: Progress | None = None,
  overwrite: bool = False,
  verify: bool = False,
) -> row_store.RowStore:
  """Tokenises and packs every task of a mixture, direction by direction.

  A finished store is opened as it is, if its tasks still give the pairs that
  it holds (`_gives_the_same`), and is built again if not; an interrupted build
  goes on where it stopped. Several processes may call this at once: one builds,
  the others wait.

  Args:
    mixture: a registered name, or a mixture or task.
    task_feature_lengths: 'inputs' and 'targets'.
    directory: of the store.
    splits: to build; a task may lack some. 'validation' is read from a task's
      split 'dev' when it has no other. Raw texts are kept of all but 'train'.
    long_pairs: whether training pairs with a longer side are cut (with EOS as
      the last token) and counted, left out and counted, or refused. Of other
      splits they are cut: their texts are whole.
    progress: called after every block with split, direction, pairs that are
      done, and pairs in all (None when not known).
    overwrite: replace a store that was built from something else.
    verify: see `ensure_store`.

  Returns:
    The open store.

  Raises:
    ValueError: unknown mixture, a vocabulary that cannot be used, two tasks of
      one direction, or a store there that was built from something else.
  """
  tasks = mixtures.tasks_by_direction(mixture)
  parts = fingerprint(mixture, task_feature_lengths, splits, long_pairs)
  pieces = _vocabulary(mixtures.get_mixture(mixture))
  layout = packing.RowLayout.of(task_feature_lengths, pieces.vocab_size)
  directory = pathlib.Path(directory)
  # Without a lock first: a finished store may be where nothing can be written.
  store = _finished(directory, parts, verify)
  if store and _gives_the_same(tasks, store):
    return store
  directory.mkdir(parents=True, exist_ok=True)
  with files.locked(directory):
    files.remove_left_behind(directory)
    store = _finished(directory, parts, verify)
    if store and not _gives_the_same(tasks, store):
      _log.warning(
        "%s: its text or its preprocessing is not what was packed into %s; it "
        "is packed again",
        mixtures.get_mixture(mixture).name,
        directory,
      )
      _remove_rows(directory)
    elif store:
      return store
    elif (directory / row_store.HEADER).exists():
      _check_stale(directory, parts, overwrite)
    file = None if pieces.model is None else "vocabulary.model"
    if file:
      pieces.save(directory / file)
    header: dict[str, Any] = {
      "layout": layout,
      "vocabulary": {
        "kind": pieces.kind,
        "file": file,
        "size": pieces.vocab_size,
      },
      "fingerprint": parts,
    }
    row_store.write_header(directory, **header)
    stats: dict[str, dict[str, row_store.RowStats]] = {}
    for split in splits:
      stats[split] = {
        direction: _build_direction(
          task, split, direction, directory, layout, long_pairs, progress
        )
        for direction, task in tasks.items()
        if mixtures.task_split(task, split)
      }
    row_store.write_header(directory, **header, splits=stats)
  return row_store.RowStore(directory)


def _finished(
  directory: pathlib.Path, parts: Mapping[str, str], verify: bool
) -> row_store.RowStore | None:
  """The store that was built there from these parts, if it was finished."""
  if not (directory / row_store.HEADER).exists():
    return None
  header = row_store.read_header(directory)
  is_same = not _differences(header.get("fingerprint", {}), parts)
  if not is_same or not header.get("complete"):
    return None
  return row_store.RowStore(directory, verify)


def _check_stale(
  directory: pathlib.Path, parts: Mapping[str, str], overwrite: bool
) -> None:
  """Removes what was built there from something else, or refuses to."""
  header = row_store.read_header(directory)
  stale = _differences(header.get("fingerprint", {}), parts)
  if stale and not overwrite:
    raise ValueError(
      f"the row store in {directory} was built from something else (other "
      f"{', '.join(stale)}): delete it or choose another directory"
    )
  if stale:
    _remove_rows(directory)


# Seconds in which a store is compared with its tasks, about, and at most.
_CHECK_SECONDS, _MOST_SECONDS = 1.0, 1.5


def _gives_the_same(
  tasks: Mapping[str, Any], store: row_store.RowStore
) -> bool:
  """Whether tasks still give the pairs that were packed.

  Names, sizes and times of files do not tell of a changed preprocessor, or of
  what a function reads. So the sample of every split (`pair_sample`) is
  tokenised again, in an order that is the same for a store every time: a block
  of it at least, and as far as a second goes, which all of them share.
  """
  splits = [
    (tasks[name], own, store.stats(split, name).sample)
    for split in store.splits
    for name in tasks
    if (own := mixtures.task_split(tasks[name], split))
  ]
  splits = [each for each in splits if each[2]]  # Of this version.
  order = np.random.default_rng(len(splits)).permutation(len(splits))
  start = time.monotonic()
  for rank, i in enumerate(order):
    now = time.monotonic()
    if now > start + _MOST_SECONDS:
      break
    # What a small split leaves goes to those after it.
    left = max(0.0, start + _CHECK_SECONDS - now)
    end = now + left / (len(splits) - rank)
    task, own, noted = splits[i]
    if not _has_sample(task, own, noted, store.layout, end):
      return False
  return True


def _has_sample(
  task: Any,
  split: str,
  noted: list[str],
  layout: packing.RowLayout,
  end: float,
) -> bool:
  """Whether a split has the sample that was noted, as far as read by `end`."""
  features = task.output_features
  eos = features["inputs"].add_eos and features["targets"].add_eos
  found: list[str] = []
  position = 0
  for inputs, targets, _ in read_task(task, split, layout, sampled=True):
    pair_sample.add_pairs(
      found,
      position,
      position + _BLOCK,
      inputs.truncate(layout.inputs, eos)[0],
      targets.truncate(layout.targets, eos)[0],
    )
    position += _BLOCK
    whole = pair_sample.block_of(position)
    if found[:whole] != noted[:whole]:
      return False
    if time.monotonic() > end and whole:
      return True
  return found == noted


def _build_direction(
  task: Any,
  split: str,
  direction: str,
  directory: pathlib.Path,
  layout: packing.RowLayout,
  long_pairs: packing.LongPairs,
  progress: Progress | None,
) -> row_store.RowStats:
  """Writes one direction of one split, from where it was left."""
  train = split == "train"
  features = task.output_features
  writer = row_store.RowStoreWriter(
    directory,
    split,
    direction,
    layout,
    shuffle=train,
    long_pairs=long_pairs if train else "cut",
    eos=features["inputs"].add_eos and features["targets"].add_eos,
  )
  if writer.stats.finished:
    return writer.stats
  source_split = str(mixtures.task_split(task, split))
  total = task.num_input_examples(source_split)
  done = writer.stats.read
  for block in read_task(task, source_split, layout, done, texts=not train):
    writer.add(*block)
    done += len(block[0].lengths)
    if progress:
      progress(split, direction, done, total)
  return writer.finish()


_SIDES = ("inputs", "targets")
_TEXT = "_pretokenized"  # SeqIO's suffix of a feature's text.
_Block: TypeAlias = tuple[packing.Ragged, packing.Ragged, list[dict[str, str]]]


def read_task(
  task: Any,
  split: str,
  layout: packing.RowLayout,
  skip: int = 0,
  texts: bool = False,
  sampled: bool = False,
) -> Iterator[_Block]:
  """Tokenised pairs of a task in its own order, a block at a time.

  Tokenising is some twenty times faster outside of TensorFlow. That needs a
  task whose ids are SeqIO's `tokenize` of its texts, and EOS: most are. Any
  other is read as SeqIO gives it.

  Args:
    task: with features `inputs` and `targets`.
    split: of the task.
    layout: sequences come whole, or at least with a token more than fits.
    skip: pairs to leave out at the beginning.
    texts: give the texts, too.
    sampled: give of each block only the pairs of the sample, without texts.

  Yields:
    Ids of both sides, and per pair `source`, `target` and `tagged_source`.
  """
  if isinstance(task, declared.Task):
    return _read_texts(task, split, skip, texts, sampled)
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
  if is_plain and _has_our_vocabulary(task):
    return _read_texts(task, split, skip, texts, sampled)
  blocks = _read_tokens(task, split, layout, skip, texts)
  return _only_sample(blocks) if sampled else blocks


def _only_sample(blocks: Iterator[_Block]) -> Iterator[_Block]:
  start = 0
  for inputs, targets, _ in blocks:
    places = pair_sample.positions(start, start + len(inputs.lengths)) - start
    yield inputs.take(places), targets.take(places), []
    start += _BLOCK


def _has_our_vocabulary(task: Any) -> bool:
  """Whether `vocabulary.Vocabulary` gives the ids of both sides."""
  first, second = (task.output_features[x].vocabulary for x in _SIDES)
  try:
    vocabulary.Vocabulary.from_seqio(first)
  except (ValueError, AttributeError, NotImplementedError):
    return False
  return first == second


def _read_texts(
  task: Any, split: str, skip: int, texts: bool, sampled: bool
) -> Iterator[_Block]:
  """Reads a task's texts and tokenises them here; arguments as `read_task`."""
  features = [task.output_features[name] for name in ("inputs", "targets")]
  pieces = vocabulary.Vocabulary.from_seqio(features[0].vocabulary)
  pairs = itertools.islice(vocabulary.raw_pairs(task, split), skip, None)
  start = 0
  while block := list(itertools.islice(pairs, _BLOCK)):
    if sampled:
      places = pair_sample.positions(start, start + len(block)) - start
      block = [block[i] for i in places]
      start += _BLOCK
    sources, targets = zip(*block, strict=True) if block else ((), ())
    ids = [pieces.encode_batch(side) for side in (sources, targets)]
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
) -> Iterator[_Block]:
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
  for block in dataset.skip(skip).ragged_batch(_BLOCK).prefetch(2):
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


# ------------------------------------------------- vocabulary, fingerprint


def _vocabulary(mixture: Any) -> vocabulary.Vocabulary:
  """The one vocabulary of a mixture.

  Raises:
    ValueError: several, or one with other special ids than the store's.
  """
  tasks = mixtures.subtasks(mixture)
  first = tasks[0].output_features["inputs"].vocabulary
  for task in tasks:
    for name in ("inputs", "targets"):
      if name not in task.output_features:
        raise ValueError(f"task {task.name!r} has no feature {name!r}")
      if task.output_features[name].vocabulary != first:
        raise ValueError(
          f"feature {name!r} of task {task.name!r} has a vocabulary of its "
          f"own: a store needs the same one for all tasks and both sides"
        )
  if first.pad_id != 0 or first.eos_id != packing.EOS_ID:
    raise ValueError(
      f"the vocabulary of {mixture.name!r} has padding id {first.pad_id} and "
      f"EOS id {first.eos_id}: 0 and {packing.EOS_ID} are needed"
    )
  return vocabulary.Vocabulary.from_seqio(first)


def fingerprint(
  mixture: mixtures.MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  splits: Sequence[str] = SPLITS,
  long_pairs: packing.LongPairs = "cut",
) -> dict[str, str]:
  """What a store depends on, one digest per part; computed without reading.

  A data source may have an attribute `fingerprint` (a text) that stands for
  data that is not in files.
  """
  tasks = mixtures.tasks_by_direction(mixture)
  known = {
    direction: [
      own for split in splits if (own := mixtures.task_split(task, split))
    ]
    for direction, task in tasks.items()
  }
  parts: dict[str, Any] = {
    "tasks": [task.name for task in tasks.values()],
    "feature lengths": {
      name: task_feature_lengths.get(name) for name in ("inputs", "targets")
    },
    "splits": list(splits),
    # What is the default is not said, nor was it before there was a choice.
    **({} if long_pairs == "cut" else {"long pairs": long_pairs}),
    "split sizes": {
      d: [task.num_input_examples(s) for s in known[d]]
      for d, task in tasks.items()
    },
    "source files": {
      d: [_source_stamp(task.source, s) for s in known[d]]
      for d, task in tasks.items()
    },
  }
  digests = {
    name: _digest(json.dumps(part, sort_keys=True).encode())
    for name, part in parts.items()
  }
  return digests | {
    "vocabulary": _vocabulary(mixtures.get_mixture(mixture)).fingerprint
  }


def _source_stamp(source: Any, split: str) -> list[Any]:
  """Stamps of a source's files, and its own fingerprint."""
  stamp: list[Any] = [str(getattr(source, "fingerprint", ""))]
  for shard in source.list_shards(split):
    if os.path.isfile(shard):
      stamp.append([str(shard), *checksums.stamp(shard)])
  return stamp


def _digest(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=6).hexdigest()


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
  return sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))


def _remove_rows(directory: pathlib.Path) -> None:
  """Empties a store's directory, and nothing that is not a store's."""
  (directory / row_store.HEADER).unlink()
  for rows in directory.glob("*/*.rows"):
    shutil.rmtree(rows.parent, ignore_errors=True)
