"""SeqIO's offline cache of tasks: what `use_cached=True` reads.

The layout is that of SeqIO's own `seqio_cache_tasks`, which needs Apache Beam;
this needs nothing more, and keeps the order of the examples: a cached task
gives the same examples as a live one, for any seed. (Our own trainer reads
packed rows instead, see `store_building.ensure_store`.)
"""

import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from basemt_jax import files
from basemt_jax.data import mixtures, pair_sample, row_store, store_building

_RECORDS = "{split}.tfrecord-00000-of-00001"
# Seconds in which a cached split is compared with its task.
_CHECK_SECONDS = 1.0


def cache_mixture(
  mixture: mixtures.MixtureOrTask,
  cache_dir: row_store.PathLike,
  progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[pathlib.Path]:
  """Caches all tasks of a mixture that are not cached there yet.

  In a folder per task, which are returned; `seqio.add_global_cache_dirs` makes
  `cache_dir` known to SeqIO. `progress` takes the name of a split and the
  examples written, now and then.

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
  note = folder / "made_of.json"
  infos = {split: folder / f"info.{split}.json" for split in task.splits}
  is_same = not note.exists() or _read_json(note) == made_of
  if not is_same or not all(
    _has_sample(task, split, _read_json(_sample_file(folder, split)))
    for split, info in infos.items()
    if info.exists()
  ):
    raise ValueError(
      f"{folder} was cached from other data: delete it, or choose another "
      "folder"
    )
  files.write_json(note, made_of)
  for split, info in infos.items():
    if not info.exists():  # Written last.
      try:
        features = _write_split(task, split, folder, progress)
      except (
        tf.errors.ResourceExhaustedError,
        tf.errors.PermissionDeniedError,
      ) as error:
        raise ValueError(
          f"the cache of {task.name} cannot be written: {error.message}"
        ) from error
      files.write_json(info, features)
  files.write_atomically(folder / "COMPLETED", "")
  return folder


def _sample_file(folder: pathlib.Path, split: str) -> pathlib.Path:
  return folder / f"sample.{split}.json"


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}): delete the folder, and it is cached "
      "again"
    ) from error


def _has_sample(task: seqio.Task, split: str, noted: list[str]) -> bool:
  """Whether a task still gives what was cached, as far as a second goes."""
  found: list[str] = []
  end = time.monotonic() + _CHECK_SECONDS
  examples = _examples(task, split).as_numpy_iterator()
  for position, example in enumerate(examples):
    whole = pair_sample.block_of(position)
    if whole and time.monotonic() > end:
      return found[:whole] == noted[:whole]
    _add(found, position, example)
  return found == noted


def _add(digests: list[str], position: int, example: Mapping[str, Any]) -> None:
  """Adds an example to the digests, if it is in the sample."""
  if len(pair_sample.positions(position, position + 1)):
    record = seqio.dict_to_tfexample(example)
    data = record.SerializeToString(deterministic=True)
    pair_sample.add(digests, position, data)


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
  records = folder / _RECORDS.format(split=split)
  counts: Counter[str] = Counter()
  longest: dict[str, int] = {}
  sample: list[str] = []
  with tf.io.TFRecordWriter(str(records)) as writer:
    for example in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
      _add(sample, counts["examples"], example)
      writer.write(seqio.dict_to_tfexample(example).SerializeToString())
      counts["examples"] += 1
      for name in task.output_features:
        key = f"{name}_max_tokens"
        counts[f"{name}_tokens"] += len(example[name])
        longest[key] = max(longest.get(key, 0), len(example[name]))
      if counts["examples"] % 1000 == 0:
        progress(f"{task.name} {split}", counts["examples"])
  files.write_json(folder / f"stats.{split}.json", counts | longest)
  files.write_json(_sample_file(folder, split), sample)
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
