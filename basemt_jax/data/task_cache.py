"""SeqIO's offline cache of tasks: what `use_cached=True` reads.

The layout is that of SeqIO's own `seqio_cache_tasks`, which needs Apache Beam;
this needs nothing more, and keeps the order of the examples: a cached task
gives the same examples as a live one, for any seed. (Our own trainer reads
packed rows instead, see `store_building.ensure_store`.)
"""

import json
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import seqio
import tensorflow as tf

from basemt_jax import checksums
from basemt_jax.data import mixtures, row_store, store_building

# Examples of every split that tell whether a task still gives the same.
_FIRST = 64
_FILES = ("{split}.tfrecord-00000-of-00001", "stats.{split}.json")


def cache_mixture(
  mixture: mixtures.MixtureOrTask,
  cache_dir: row_store.PathLike,
  progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[pathlib.Path]:
  """Caches all tasks of a mixture that are not cached there yet.

  Args:
    mixture: a registered name, or a mixture or task.
    cache_dir: gets a folder per task; `seqio.add_global_cache_dirs` makes it
      known to SeqIO.
    progress: takes the name of a split and the examples written, now and then.

  Returns:
    The folders of the tasks.

  Raises:
    ValueError: a task without `seqio.CacheDatasetPlaceholder`, or that was
      cached there from other data.
  """
  tasks = mixtures.subtasks(mixtures.get_mixture(mixture))
  return [cache_task(task, cache_dir, progress) for task in tasks]


def cache_task(
  task: seqio.Task,
  cache_dir: row_store.PathLike,
  progress: Callable[[str, int], None] = lambda name, done: None,
) -> pathlib.Path:
  """Caches a task; see `cache_mixture`."""
  if not task.supports_caching:
    raise ValueError(
      f"task {task.name!r} cannot be cached: it lacks a "
      "seqio.CacheDatasetPlaceholder among its preprocessors"
    )
  folder = pathlib.Path(cache_dir) / seqio.get_task_dir_from_name(task.name)
  folder.mkdir(parents=True, exist_ok=True)
  lengths = {"inputs": 0, "targets": 0}  # Whole sequences are cached.
  made_of = store_building.fingerprint(task, lengths)
  made_of["first examples"] = _first_examples(task)
  note = folder / "made_of.json"
  if note.exists() and json.loads(note.read_text()) != made_of:
    raise ValueError(
      f"{folder} was cached from other data: delete it, or choose another "
      "folder"
    )
  note.write_text(json.dumps(made_of, indent=1) + "\n")
  for split in task.splits:
    info = folder / f"info.{split}.json"
    if not info.exists():  # Written last.
      features = _write_split(task, split, folder, progress)
      info.write_text(json.dumps(features, indent=1) + "\n")
  (folder / "COMPLETED").write_text("")
  return folder


def _first_examples(task: seqio.Task) -> str:
  """Checksum of all splits' first examples, whatever the files are called."""
  found = [
    seqio.dict_to_tfexample(example).SerializeToString(deterministic=True)
    for split in task.splits
    for example in _examples(task, split).take(_FIRST).as_numpy_iterator()
  ]
  return checksums.bytes_checksum(b"".join(found))


def _examples(task: seqio.Task, split: str) -> tf.data.Dataset:
  dataset = task.source.get_dataset(split=split, shuffle=False)
  return task.preprocess_precache(dataset)


def _write_split(
  task: seqio.Task,
  split: str,
  folder: pathlib.Path,
  progress: Callable[[str, int], None],
) -> dict[str, Any]:
  """Writes examples and statistics; returns what is in an example."""
  dataset = _examples(task, split)
  records, stats = (folder / name.format(split=split) for name in _FILES)
  counts: Counter[str] = Counter()
  longest: dict[str, int] = {}
  with tf.io.TFRecordWriter(str(records)) as writer:
    for example in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
      writer.write(seqio.dict_to_tfexample(example).SerializeToString())
      counts["examples"] += 1
      for name in task.output_features:
        key = f"{name}_max_tokens"
        counts[f"{name}_tokens"] += len(example[name])
        longest[key] = max(longest.get(key, 0), len(example[name]))
      if counts["examples"] % 1000 == 0:
        progress(f"{task.name} {split}", counts["examples"])
  stats.write_text(json.dumps(counts | longest, indent=1) + "\n")
  return {
    "num_shards": 1,
    "features": {
      name: {
        "shape": [None, *spec.shape[1:]] if spec.shape.rank else [],
        "dtype": spec.dtype.name,
      }
      for name, spec in dataset.element_spec.items()
    },
    "seqio_version": seqio.__version__,
  }
