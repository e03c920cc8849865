"""The SeqIO side of heated sampling: mixtures, and stores built from them.

Axis legend: N directions, L length.

`HeatedMixture` is an ordinary `seqio.Mixture` whose rates change while it is
read, for SeqIO's and T5X's own tools. Training does not read it: it reads a
`row_store.RowStore`, which `ensure_store` builds once from the mixture's tasks.
"""

import copy
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import seqio
import tensorflow as tf

from basemt_jax import files, heating, sampling
from basemt_jax.data import languages, packing, row_store, vocabulary

# TensorFlow only reads data here; it would take JAX's accelerator memory.
tf.config.set_visible_devices([], "GPU")

_log = logging.getLogger(__name__)

MixtureOrTask: TypeAlias = str | seqio.Task | seqio.Mixture
Progress = Callable[[str, str, int, int | None], None]

SPLITS = ("train", "validation", "test")
# Examples drawn, and examples read from a task, at a time.
_BLOCK = 1024


# ------------------------------------------------------------------ lookup


def get_mixture(mixture: MixtureOrTask) -> seqio.Task | seqio.Mixture:
  """A registered mixture or task, or the object itself.

  Raises:
    ValueError: no such name; the nearest ones are named.
  """
  if not isinstance(mixture, str):
    return mixture
  names = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
  if mixture in names:
    return seqio.get_mixture_or_task(mixture)
  near = difflib.get_close_matches(mixture, names, n=3, cutoff=0.4)
  hint = f"did you mean {' or '.join(near)}" if near else "none is similar"
  raise ValueError(
    f"No mixture or task named {mixture!r} is registered ({hint}); import the "
    "module that registers it first."
  )


def direction_or_name(task_name: str) -> str:
  """The direction of a task, or the end of its name where that tells none."""
  try:
    return str(languages.Direction.of_task(task_name))
  except ValueError:
    return re.split(r"[.:/]", task_name)[-1]


def tasks_by_direction(mixture: MixtureOrTask) -> dict[str, seqio.Task]:
  """The tasks of a mixture by direction, sorted by direction.

  Raises:
    ValueError: two tasks of one direction, or a name that tells none.
  """
  tasks: dict[str, seqio.Task] = {}
  for task in seqio.get_subtasks(get_mixture(mixture)):
    direction = str(languages.Direction.of_task(task.name))
    if direction in tasks:
      raise ValueError(
        f"Tasks {tasks[direction].name!r} and {task.name!r} both translate "
        f"{direction!r}: name them apart after the last '.' or ':'."
      )
    tasks[direction] = task
  return dict(sorted(tasks.items()))


# ----------------------------------------------------------------- heating


class HeatedMixture(seqio.Mixture):
  """A mixture whose rates follow a sampling strategy while it is read.

  Example j of the whole job is drawn with the strategy's rates at step
  j / examples_per_step. (Only the temperature matters for splits other than
  'train': all languages are in them.) The choices depend on nothing but the
  mixture's own seed, the shard and j: neither on the seed given to
  `get_dataset` (T5X draws a new one at every start) nor on what another shard
  draws.

  Attributes:
    plan: the strategy for the tasks' sizes, in the order of `tasks`.
    sizes: training pairs per task name.
    directions: of the tasks, in their order.
    examples_per_step: sentence pairs a training step uses, over all hosts.
    total_steps: from here on the temperature stays.
  """

  def __init__(
    self,
    name: str,
    tasks: Sequence[str | seqio.Task],
    strategy: sampling.Strategy,
    examples_per_step: float,
    total_steps: int,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
  ):
    """Makes a mixture; `heat` registers one too.

    Args:
      name: of the mixture.
      tasks: names of registered tasks, or tasks.
      strategy: how they are sampled.
      examples_per_step: batch size, times the mean number of pairs in a row
        when rows are packed.
      total_steps: steps the temperature is tabulated for.
      sizes: training pairs per task name; SeqIO's own count when left out.
      seed: of the choices.

    Raises:
      ValueError: a number out of range, a size that is not known, or a
        strategy that cannot be followed with these sizes.
    """
    if not examples_per_step > 0:
      raise ValueError(
        f"Mixture {name!r} needs examples_per_step above 0, got "
        f"{examples_per_step}."
      )
    if total_steps <= 0:
      raise ValueError(
        f"Mixture {name!r} needs total_steps above 0, got {total_steps}."
      )
    names = [t if isinstance(t, str) else t.name for t in tasks]
    found = [get_mixture(task) for task in tasks]
    self.sizes = {
      name: _train_size(task, sizes)
      for name, task in zip(names, found, strict=True)
    }
    self.directions = tuple(map(direction_or_name, sorted(names)))
    self.examples_per_step = float(examples_per_step)
    self.total_steps = int(total_steps)
    self._choice_seed = int(seed)
    heating.mixing_rates(list(self.sizes.values()), 1.0)  # Raises on no data.
    super().__init__(
      name,
      # SeqIO's rates are the sizes: what its own tools show is T = 1.
      [(task, self.sizes[task.name]) for task in found],
      sample_fn=functools.partial(self._sample, "train", 0, 1),
    )
    pairs = [self.sizes[task.name] for task in self.tasks]
    self.plan = strategy.plan(self.directions, pairs, pairs, examples_per_step)

  def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
    """As `seqio.Mixture.get_dataset`, with the rates of the strategy."""
    signature = inspect.signature(seqio.Mixture.get_dataset)
    bound = signature.bind(self, *args, **kwargs)
    bound.apply_defaults()
    shard = bound.arguments["shard_info"] or seqio.ShardInfo(0, 1)
    # SeqIO's hook sees neither the split nor the shard: a copy that knows them.
    clone = copy.copy(self)
    clone._sample_fn = functools.partial(
      self._sample, bound.arguments["split"], shard.index, shard.num_shards
    )
    return seqio.Mixture.get_dataset(clone, *args, **kwargs)

  def _sample(
    self,
    split: str,
    shard: int,
    num_shards: int,
    datasets: Sequence[tf.data.Dataset],
    sizes: Sequence[float],
    unused_seed: int | None,
  ) -> tf.data.Dataset:
    """A `seqio.SampleFn` behind what is bound by `get_dataset`."""
    key = f"{self._choice_seed}/{split}/{shard}/{num_shards}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    del sizes  # The plan's.
    choices = self._choices(
      split, int.from_bytes(digest, "little", signed=True), num_shards
    )
    return tf.data.Dataset.choose_from_datasets(
      list(datasets), choices, stop_on_empty_dataset=True
    )

  def _choices(self, split: str, key: int, num_shards: int) -> tf.data.Dataset:
    """Indices of datasets, drawn a block at a time."""
    table = tf.constant(self.plan.temperatures(np.arange(self.total_steps + 1)))
    # SeqIO leaves out tasks that lack the split.
    there = np.array([split in task.splits for task in self.tasks])
    size = self.plan.sizes[there]
    log_size = np.log(np.maximum(size, 1) / size.max())
    factors = (size > 0).astype(np.float64)
    starts = np.zeros(len(size), np.int64)
    if split == "train":
      factors *= self.plan.multipliers[there]
      starts = self.plan.starts[there]
    steps_per_example = num_shards / self.examples_per_step

    def draw(block: tf.Tensor) -> tf.Tensor:
      example = block * _BLOCK + tf.range(_BLOCK, dtype=tf.int64)
      step = tf.cast(example, tf.float64) * steps_per_example
      step = tf.cast(step, tf.int64)
      temperature = tf.gather(table, tf.minimum(step, self.total_steps))
      weights = tf.exp(log_size / temperature[:, None]) * factors
      weights *= tf.cast(step[:, None] >= starts, tf.float64)
      limits = tf.cumsum(weights, axis=1)
      points = (
        tf.random.stateless_uniform(
          [_BLOCK, 1],
          tf.stack([tf.constant(key, tf.int64), block]),
          dtype=tf.float64,
        )
        * limits[:, -1:]
      )
      # The last limit is left out: rounding cannot lead past the end.
      passed = tf.cast(points >= limits[:, :-1], tf.int64)
      return tf.reduce_sum(passed, axis=1)

    blocks = tf.data.Dataset.range(1 << 40)
    return blocks.map(draw).unbatch()


def _train_size(task: seqio.Task, sizes: Mapping[str, int] | None) -> int:
  """Training pairs of a task, given or as SeqIO knows them."""
  if sizes is not None and task.name in sizes:
    return int(sizes[task.name])
  size = task.num_input_examples("train") if "train" in task.splits else 0
  if size is None:
    raise ValueError(
      f"Task {task.name!r} does not tell how many training examples it has: "
      "pass sizes={task name: pairs}."
    )
  return int(size)


def heat(
  mixture: MixtureOrTask,
  strategy: sampling.Strategy,
  *,
  examples_per_step: float,
  total_steps: int,
  sizes: Mapping[str, int] | None = None,
  seed: int = 0,
  name: str | None = None,
) -> HeatedMixture:
  """Registers the tasks of any mixture as a `HeatedMixture`.

  Args:
    mixture: a registered name, or a mixture or task.
    strategy: how its tasks are sampled.
    examples_per_step: sentence pairs a training step uses, over all hosts.
    total_steps: steps the temperature is tabulated for.
    sizes: training pairs per task name; SeqIO's own count when left out.
    seed: of the choices.
    name: `<mixture>_heated` when left out. A heated mixture that already has
      this name is replaced.

  Returns:
    The registered mixture.

  Raises:
    ValueError: unknown mixture, a name that something else has, or numbers
      that `HeatedMixture` refuses.
  """
  found = get_mixture(mixture)
  name = name or f"{found.name}_heated"
  if name in seqio.TaskRegistry.names() or (
    name in seqio.MixtureRegistry.names()
    and not isinstance(seqio.MixtureRegistry.get(name), HeatedMixture)
  ):
    raise ValueError(
      f"Cannot register the heated mixture {name!r}: something else has that "
      "name; pass another one."
    )
  heated = HeatedMixture(
    name,
    seqio.get_subtasks(found),
    strategy,
    examples_per_step,
    total_steps,
    sizes,
    seed,
  )
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add_provider(name, heated)
  return heated


# ------------------------------------------------------------------- store


def sizes(mixture: MixtureOrTask) -> tuple[int, int]:
  """Pieces of a mixture's vocabulary, and its directions."""
  found = get_mixture(mixture)
  return _vocabulary(found).vocab_size, len(tasks_by_direction(found))


def ensure_store(
  mixture: MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  cache_dir: row_store.PathLike,
  *,
  splits: Sequence[str] = SPLITS,
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
    progress: see `build_store`.
    verify: compare the files of a store that is there with their checksums.

  Returns:
    The open store.
  """
  return build_store(
    mixture,
    task_feature_lengths,
    store_directory(mixture, task_feature_lengths, cache_dir, splits),
    splits=splits,
    progress=progress,
    verify=verify,
  )


def store_directory(
  mixture: MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  cache_dir: row_store.PathLike,
  splits: Sequence[str] = SPLITS,
) -> pathlib.Path:
  """Where `ensure_store` keeps a mixture's store, built or not."""
  found = get_mixture(mixture)
  parts = fingerprint(found, task_feature_lengths, splits)
  digest = _digest(json.dumps(parts, sort_keys=True).encode())
  name = re.sub(r"[^\w.-]", "-", found.name)
  return pathlib.Path(cache_dir) / f"{name}-{digest}"


def build_store(
  mixture: MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  directory: row_store.PathLike,
  *,
  splits: Sequence[str] = SPLITS,
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
    task_feature_lengths: 'inputs' and 'targets'. Longer sequences are cut
      (with EOS as their last token) and counted.
    directory: of the store.
    splits: to build; a task may lack some. 'validation' is read from a task's
      split 'dev' when it has no other. Raw texts are kept of all but 'train'.
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
  tasks = tasks_by_direction(mixture)
  parts = fingerprint(mixture, task_feature_lengths, splits)
  pieces = _vocabulary(get_mixture(mixture))
  layout = packing.RowLayout.of(task_feature_lengths, pieces.vocab_size)
  directory = pathlib.Path(directory)
  # Without a lock first: a finished store may be where nothing can be written.
  store = _finished(directory, parts, verify)
  if store and _gives_the_same(tasks, store):
    return store
  directory.mkdir(parents=True, exist_ok=True)
  with files.locked(directory):
    store = _finished(directory, parts, verify)
    if store and not _gives_the_same(tasks, store):
      _log.warning(
        "%s: its text or its preprocessing is not what was packed into %s; it "
        "is packed again",
        get_mixture(mixture).name,
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
          task, split, direction, directory, layout, progress
        )
        for direction, task in tasks.items()
        if task_split(task, split)
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
      f"The row store in {directory} was built from something else (other "
      f"{', '.join(stale)}): delete it or choose another directory."
    )
  if stale:
    _remove_rows(directory)


# Seconds in which a store is compared with its tasks, about.
_CHECK_SECONDS = 1.0


def _gives_the_same(
  tasks: Mapping[str, seqio.Task], store: row_store.RowStore
) -> bool:
  """Whether tasks still give the pairs that were packed.

  Names, sizes and times of files do not tell of a changed preprocessor, or of
  what a function reads. So the first pairs are tokenised again: of one
  direction of every split at least, of the others in a random order (the same
  for a store every time), as far as a second goes.
  """
  order = np.random.default_rng(len(tasks)).permutation(len(tasks))
  names = [list(tasks)[i] for i in order]
  end = time.monotonic() + _CHECK_SECONDS
  for rank, name in enumerate(names):
    for split in store.splits:
      if rank and time.monotonic() > end:
        return True
      source_split = task_split(tasks[name], split)
      noted = store.stats(split, name).first_pairs
      if not source_split or not noted:
        continue
      found, is_all = _first_pairs(tasks[name], source_split, store.layout, end)
      if found != (noted if is_all else noted[: len(found)]):
        return False
  return True


def _first_pairs(
  task: seqio.Task, split: str, layout: packing.RowLayout, end: float
) -> tuple[list[str], bool]:
  """As `RowStats.first_pairs`, until `end`; and whether these are all."""
  features = task.output_features
  eos = features["inputs"].add_eos and features["targets"].add_eos
  found: list[str] = []
  # Blocks as the writer has them, from blocks as they are read.
  per_read = _BLOCK // row_store.SAMPLE_BLOCK
  for inputs, targets, _ in read_task(task, split, layout):
    found += row_store.block_digests(
      inputs.truncate(layout.inputs, eos)[0],
      targets.truncate(layout.targets, eos)[0],
      per_read,
    )
    if len(found) >= row_store.SAMPLE_BLOCKS:
      break
    if time.monotonic() > end:
      return found, False
  return found[: row_store.SAMPLE_BLOCKS], True


def _build_direction(
  task: seqio.Task,
  split: str,
  direction: str,
  directory: pathlib.Path,
  layout: packing.RowLayout,
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
    eos=features["inputs"].add_eos and features["targets"].add_eos,
  )
  if writer.stats.finished:
    return writer.stats
  source_split = str(task_split(task, split))
  total = task.num_input_examples(source_split)
  done = writer.stats.pairs
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
  task: seqio.Task,
  split: str,
  layout: packing.RowLayout,
  skip: int = 0,
  texts: bool = False,
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

  Yields:
    Ids of both sides, and per pair `source`, `target` and `tagged_source`.
  """
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
    return _read_texts(task, split, skip, texts)
  return _read_tokens(task, split, layout, skip, texts)


def _has_our_vocabulary(task: seqio.Task) -> bool:
  """Whether `vocabulary.Vocabulary` gives the ids of both sides."""
  first, second = (task.output_features[x].vocabulary for x in _SIDES)
  try:
    vocabulary.Vocabulary.from_seqio(first)
  except (ValueError, AttributeError, NotImplementedError):
    return False
  return first == second


def _read_texts(
  task: seqio.Task, split: str, skip: int, texts: bool
) -> Iterator[_Block]:
  """Reads a task's texts and tokenises them here."""
  features = [task.output_features[name] for name in ("inputs", "targets")]
  pieces = vocabulary.Vocabulary.from_seqio(features[0].vocabulary)
  pairs = itertools.islice(vocabulary.raw_pairs(task, split), skip, None)
  while block := list(itertools.islice(pairs, _BLOCK)):
    sources, targets = zip(*block, strict=True)
    ids = [pieces.encode_batch(side) for side in (sources, targets)]
    for side, feature in zip(ids, features, strict=True):
      if feature.add_eos:
        for sequence in side:
          sequence.append(packing.EOS_ID)
    inputs, outputs = map(packing.Ragged.of, ids)
    yield inputs, outputs, _texts(sources, targets) if texts else []


def _read_tokens(
  task: seqio.Task,
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


def task_split(task: seqio.Task, split: str) -> str | None:
  """The task's own name of a split, or None."""
  names = (split, "dev") if split == "validation" else (split,)
  return next((name for name in names if name in task.splits), None)


# ------------------------------------------------- vocabulary, fingerprint


def _vocabulary(
  mixture: seqio.Task | seqio.Mixture,
) -> vocabulary.Vocabulary:
  """The one vocabulary of a mixture.

  Raises:
    ValueError: several, or one with other special ids than the store's.
  """
  tasks = seqio.get_subtasks(mixture)
  first = tasks[0].output_features["inputs"].vocabulary
  for task in tasks:
    for name in ("inputs", "targets"):
      if name not in task.output_features:
        raise ValueError(f"Task {task.name!r} has no feature {name!r}.")
      if task.output_features[name].vocabulary != first:
        raise ValueError(
          f"Feature {name!r} of task {task.name!r} has a vocabulary of its "
          f"own: a store needs the same one for all tasks and both sides."
        )
  if first.pad_id != 0 or first.eos_id != packing.EOS_ID:
    raise ValueError(
      f"The vocabulary of {mixture.name!r} has padding id {first.pad_id} and "
      f"EOS id {first.eos_id}: 0 and {packing.EOS_ID} are needed."
    )
  return vocabulary.Vocabulary.from_seqio(first)


def fingerprint(
  mixture: MixtureOrTask,
  task_feature_lengths: Mapping[str, int],
  splits: Sequence[str] = SPLITS,
) -> dict[str, str]:
  """What a store depends on, one digest per part; computed without reading.

  A data source may have an attribute `fingerprint` (a text) that stands for
  data that is not in files.
  """
  tasks = tasks_by_direction(mixture)
  known = {
    d: [s for s in splits if task_split(task, s)] for d, task in tasks.items()
  }
  parts: dict[str, Any] = {
    "tasks": [task.name for task in tasks.values()],
    "feature lengths": {
      name: task_feature_lengths.get(name) for name in ("inputs", "targets")
    },
    "splits": list(splits),
    "split sizes": {
      d: [task.num_input_examples(str(task_split(task, s))) for s in known[d]]
      for d, task in tasks.items()
    },
    "source files": {
      d: [
        _source_stamp(task.source, str(task_split(task, s))) for s in known[d]
      ]
      for d, task in tasks.items()
    },
  }
  digests = {
    name: _digest(json.dumps(part, sort_keys=True).encode())
    for name, part in parts.items()
  }
  return digests | {"vocabulary": _vocabulary(get_mixture(mixture)).fingerprint}


def _source_stamp(source: Any, split: str) -> list[Any]:
  """Sizes and times of a source's files, and its own fingerprint."""
  stamp: list[Any] = [str(getattr(source, "fingerprint", ""))]
  for shard in source.list_shards(split):
    if os.path.isfile(shard):
      status = os.stat(shard)
      stamp.append([str(shard), status.st_size, status.st_mtime_ns])
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
