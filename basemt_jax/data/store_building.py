"""Row stores from the tasks of a SeqIO mixture, built at first use.

`ensure_store` tokenises and packs every task, direction by direction, into a
`row_store.RowStore`, which is what training reads. SeqIO and TensorFlow are
imported for tasks that only they can read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax import checksums, files
from basemt_jax.data import (
  mixtures,
  packing,
  pair_sample,
  row_store,
  subword_sampling,
  task_reading,
  vocabulary,
)

_log = logging.getLogger(__name__)

Progress = Callable[[str, str, int, int | None], None]

SPLITS = ("train", "validation", "test")
_UNDRAWN = subword_sampling.SubwordSampling()


def sizes(mixture: mixtures.MixtureOrTask) -> tuple[int, int]:
  """Pieces of a mixture's vocabulary, and its directions."""
  found = mixtures.get_mixture(mixture)
  return _vocabulary(found).vocab_size, len(mixtures.tasks_by_direction(found))


def ensure_store(
  mixture: mixtures.MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  cache_dir: row_store.PathLike,
  *,
  progress: Progress | None = None,
  verify: bool = True,
  **packed: Any,
) -> row_store.RowStore:
  """The store of a mixture, built at first use in its `store_directory`.

  `packed` are the options of `build_store` that decide what is in it.
  """
  directory = store_directory(
    mixture, task_feature_lengths, cache_dir, **packed
  )
  return build_store(
    *(mixture, task_feature_lengths, directory),
    progress=progress,
    verify=verify,
    **packed,
  )


def store_directory(
  mixture: mixtures.MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  cache_dir: row_store.PathLike,
  **packed: Any,
) -> pathlib.Path:
  """Where `ensure_store` keeps a mixture's store, built or not.

  Named after the mixture and the fingerprint, so that changed data gets a store
  of its own.
  """
  found = mixtures.get_mixture(mixture)
  parts = fingerprint(found, task_feature_lengths, **packed)
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
  subwords: subword_sampling.SubwordSampling = _UNDRAWN,
  progress: Progress | None = None,
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
    subwords: which other versions of the training split there are.
    progress: called after every block with split, direction, pairs that are
      done, and pairs in all (None when not known).
    verify: compare the files of a store that is there with their checksums.

  Raises:
    ValueError: unknown mixture, a vocabulary that cannot be used, two tasks of
      one direction, or a store there that was built from something else.
  """
  tasks = mixtures.tasks_by_direction(mixture)
  parts = fingerprint(
    mixture, task_feature_lengths, splits, long_pairs, subwords
  )
  pieces = _vocabulary(mixtures.get_mixture(mixture))
  _check_drawn(tasks.values(), pieces, subwords)
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
      _check_same(directory, parts)
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
    stats = _build_splits(
      tasks, directory, layout, splits, long_pairs, subwords, progress
    )
    row_store.write_header(directory, **header, splits=stats)
  return row_store.RowStore(directory)


def _build_splits(
  tasks: Mapping[str, Any],
  directory: pathlib.Path,
  layout: packing.RowLayout,
  splits: Sequence[str],
  long_pairs: packing.LongPairs,
  subwords: subword_sampling.SubwordSampling,
  progress: Progress | None,
) -> dict[str, dict[str, row_store.RowStats]]:
  """Rows of every split and of the other versions of the training split."""

  def build(split: str, direction: str, alpha: float | None = None) -> Any:
    return _build_direction(
      *(tasks[direction], split, direction, directory),
      *(layout, long_pairs, progress, alpha),
    )

  stats = {
    split: {
      direction: build(split, direction)
      for direction, task in tasks.items()
      if mixtures.task_split(task, split)
    }
    for split in splits
  }
  for version in range(1, subwords.versions if "train" in splits else 1):
    drawn = {
      direction: build(f"train.{version}", direction, subwords.alpha)
      for direction, known in stats["train"].items()
      if version < subwords.versions_of(known.read)
    }
    if drawn:
      stats[f"train.{version}"] = drawn
  return stats


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


def _check_drawn(
  tasks: Iterable[Any],
  pieces: vocabulary.Vocabulary,
  subwords: subword_sampling.SubwordSampling,
) -> None:
  """Refuses to draw segmentations where there is but one, or no telling.

  Raises:
    ValueError: a vocabulary of bytes, or a task that tokenises by itself.
  """
  if not str(subwords):
    return
  if pieces.model is None:
    raise ValueError(
      "SUBWORD_SAMPLING draws pieces of a SentencePiece vocabulary, and this "
      "one is bytes: leave it None, or use another vocabulary"
    )
  for task in tasks:
    if not task_reading.is_of_texts(task):
      raise ValueError(
        f"SUBWORD_SAMPLING cannot segment the texts of task {task.name!r}, "
        "which does more to its tokens than SeqIO's `tokenize`: leave it None"
      )


def _check_same(directory: pathlib.Path, parts: Mapping[str, str]) -> None:
  """Refuses what was built there from something else."""
  header = row_store.read_header(directory)
  stale = _differences(header.get("fingerprint", {}), parts)
  if stale:
    raise ValueError(
      f"the row store in {directory} was built from something else (other "
      f"{', '.join(stale)}): delete it or choose another directory"
    )


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
  for inputs, targets, _ in task_reading.read_task(
    task, split, layout, sampled=True
  ):
    pair_sample.add_pairs(
      found,
      position,
      position + task_reading.BLOCK,
      inputs.truncate(layout.inputs, eos)[0],
      targets.truncate(layout.targets, eos)[0],
    )
    position += task_reading.BLOCK
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
  alpha: float | None = None,
) -> row_store.RowStats:
  """Writes one direction of one split, from where it was left.

  With an `alpha` that is a version of the training split, drawn with it.
  """
  train = split == "train" or alpha is not None
  name = f"{split}/{direction}"
  draw = None if alpha is None else subword_sampling.Draw(alpha, name)
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
  source_split = str(mixtures.task_split(task, split.split(".")[0]))
  total = task.num_input_examples(source_split)
  done = writer.stats.read
  for block in task_reading.read_task(
    task, source_split, layout, done, texts=not train, draw=draw
  ):
    writer.add(*block)
    done += len(block[0].lengths)
    if progress:
      progress(split, direction, done, total)
  return writer.finish()


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
  subwords: subword_sampling.SubwordSampling = _UNDRAWN,
) -> dict[str, str]:
  """What a store depends on, mostly as digests; computed without reading.

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
  pieces = _vocabulary(mixtures.get_mixture(mixture))
  drawn = {"subwords": str(subwords)} if str(subwords) else {}
  return digests | {"vocabulary": pieces.fingerprint} | drawn


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
