"""What T5X reads for training: a run's batches, and dense checkpoints.

Everything T5X is told about data that a run is not, or the other way round, is
refused here, with the binding to change; so is a restart that would not go on
with the same batches. Like `t5x_adapter`, this imports nothing of T5X.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import seqio
from absl import logging
from clu.data import dataset_iterator
from etils import epath
from flax import traverse_util

from basemt_jax import (
  checkpointing,
  conversion,
  description,
  partitioning,
  prefetch,
  processes,
  train_state,
  training,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax.data import batches, mixtures, packing, row_store

Tree = Any

# Written once into a run's directory: what its batches are drawn from.
DATA_FILE = "data_position.json"


class TrainIterator(dataset_iterator.DatasetIterator):
  """`batches.TrainBatches` as T5X reads them.

  It saves nothing: its place follows from the step of the checkpoint.
  """

  def __init__(self, source: batches.TrainBatches):
    self._source = source
    here = source.state()
    self._spec = {
      name: dataset_iterator.ArraySpec(value.dtype, value.shape)
      for name, value in next(source).items()
    }
    source.restore(here)
    self._ahead: prefetch.Prefetcher | None = None

  @property
  def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
    """Shapes and types of this host's rows."""
    return self._spec

  def __next__(self) -> packing.Batch:
    if self._ahead is None:
      self._ahead = prefetch.Prefetcher(self._source)
    return next(self._ahead)[0]


def get_dataset(
  cfg: Any,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  *,
  run: run_lib.Run,
  checkpoint_cfg: Any,
  phase: str = "sparse",
) -> TrainIterator:
  """T5X's `get_dataset_fn`: the run's batches, from where its model stands.

  `cfg` is T5X's DatasetConfig of the training data, and this host has part
  `shard_id` of every batch by T5X's count. T5X starts from the newest
  checkpoint in the model directory, else from `restore.path` of its
  `checkpoint_cfg`, and trains one phase, 'dense' or 'sparse'.

  Raises:
    ValueError: T5X is told something else than the run; the directory holds
      another run; or the batches would not be those of an uninterrupted run.
  """
  del feature_converter_cls
  _check_dataset_config(cfg, run)
  _check_checkpoint_config(checkpoint_cfg)
  found = _start_checkpoint(run.model_dir, checkpoint_cfg.restore)
  step = 0 if found is None else _step_of(found)
  _check_phase(run, phase, step)
  run.check_devices()
  store = run.store()
  _describe(run, store)
  source = batches.TrainBatches(
    store,
    run.strategy,
    run.batch_size,
    run.data_seed,
    host_rows=_host_rows(run, run.batch_size, num_shards),
    start_step=step,
  )
  _check_data(source, epath.Path(run.model_dir), shard_id == 0)
  return TrainIterator(source)


def get_eval_datasets(
  cfg: Any,
  shard_id: int,
  num_shards: int,
  eval_steps: int | None,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  *,
  run: run_lib.Run,
) -> dict[str, "EvalBatches"]:
  """T5X's `train_eval_get_dataset_fn`: all directions as one data set.

  Of T5X's DatasetConfig split and batch size count; without `eval_steps` it is
  the whole split.
  """
  del shard_id, feature_converter_cls
  store = run.store()
  if cfg.split not in store.splits or not store.pairs(cfg.split).any():
    return {}
  name = mixtures.get_mixture(run.mixture_or_task_name).name
  return {
    name: EvalBatches(
      functools.partial(
        batches.eval_batches,
        store,
        cfg.split,
        cfg.batch_size,
        host_rows=_host_rows(run, cfg.batch_size, num_shards),
      ),
      eval_steps,
    )
  }


class EvalBatches:
  """Batches that start over whenever they are iterated, up to a limit."""

  def __init__(
    self, start: Callable[[], Iterator[packing.Batch]], limit: int | None
  ):
    self._start, self._limit = start, limit

  def __iter__(self) -> Iterator[packing.Batch]:
    return itertools.islice(self._start(), self._limit)

  @property
  def element_spec(self) -> dict[str, Any]:
    """Shapes and types of this host's rows."""
    return {
      name: jax.ShapeDtypeStruct(value.shape, value.dtype)
      for name, value in next(self._start()).items()
    }


def _host_rows(
  run: run_lib.Run, batch_size: int, num_shards: int
) -> np.ndarray:
  """The rows this host reads: those its devices hold, in their order.

  T5X would have it read a slice, and put its rows wherever its devices are:
  with another number of hosts a batch would have its rows in another order.
  """
  rows = partitioning.host_rows(run.mesh(), batch_size)
  if len(rows) * num_shards != batch_size:
    raise ValueError(
      f"T5X splits a batch of {batch_size} rows into {num_shards} parts, but "
      f"this host's devices hold {len(rows)} rows of it; bind "
      "train.partitioner = @t5x_adapter.partitioner()"
    )
  return rows


def _describe(run: run_lib.Run, store: row_store.RowStore) -> None:
  """Makes the model directory one that `basemt` can use without a recipe."""
  own = run_lib.describe(run, store)
  if _newest(epath.Path(run.model_dir)) is not None:
    training.check_continues(run, own, logging.info)
  if processes.is_first():
    description.write(run.model_dir, own, description.pieces_of(store))


def _check_phase(run: run_lib.Run, phase: str, step: int) -> None:
  """Refuses a phase that the run does not have, or not at this step."""
  dense_steps = run.settings.dense_steps
  has_experts = run.network(vocab_size=1).feed_forward == "experts"
  if phase == "dense" and not dense_steps:
    raise ValueError(
      "gin/t5x/pretrain.gin trains a run's dense phase, and this run has none: "
      "DENSE_STEPS is 0; give a system that has one after it, such as "
      "--gin_file=gin/recipes/base_heated_dense_pretrained.gin, or train with "
      "gin/t5x/pretrain_base.gin, which without experts is a dense run"
    )
  if phase == "sparse" and has_experts and step < dense_steps:
    raise ValueError(
      f"the run is dense for its first DENSE_STEPS = {dense_steps} steps and "
      f"T5X starts at step {step} with experts; train the dense phase with "
      "gin/t5x/pretrain.gin in place of this file and go on with "
      "gin/t5x/convert.gin, or set DENSE_STEPS = 0"
    )


def _check_dataset_config(cfg: Any, run: run_lib.Run) -> None:
  """Refuses what T5X was told and the run was not, or the other way round."""
  fixed = {"split": "train", "shuffle": True, "pack": True, "use_cached": False}
  expected = {
    "mixture_or_task_name": mixtures.get_mixture(run.mixture_or_task_name).name,
    "task_feature_lengths": dict(run.task_feature_lengths),
    "batch_size": run.batch_size,
    "seed": run.data_seed,
    **fixed,
  }
  found = {name: getattr(cfg, name) for name in expected} | {
    "mixture_or_task_name": mixtures.get_mixture(cfg.mixture_or_task_name).name,
    "task_feature_lengths": dict(cfg.task_feature_lengths),
  }
  for name, value in expected.items():
    if found[name] != value:
      macro = repr(value) if name in fixed else f"%{name.upper()}"
      raise ValueError(
        f"train/utils.DatasetConfig.{name} is {found[name]!r}, but the run's "
        f"batches are made with {value!r}, and a restart would give others; "
        f"bind train/utils.DatasetConfig.{name} = {macro}"
      )


def _check_checkpoint_config(cfg: Any) -> None:
  """Refuses what could not be restarted from.

  That is positions that T5X would keep, which hold for one job size only, and
  rounded parameters, of which T5X would restore a state of other types.
  """
  dtype = cfg.save.dtype if cfg.save else "float32"
  if dtype != "float32":
    raise ValueError(
      f"utils.SaveCheckpointConfig.dtype is {dtype!r}, but training is in "
      "float32, and T5X cannot go on from a checkpoint of another type; bind "
      "utils.SaveCheckpointConfig.dtype = 'float32'"
    )
  for binding, value in (
    ("SaveCheckpointConfig.save_dataset", cfg.save and cfg.save.save_dataset),
    (
      "RestoreCheckpointConfig.restore_dataset",
      cfg.restore and cfg.restore.restore_dataset,
    ),
  ):
    if value:
      raise ValueError(
        f"utils.{binding} is True, but T5X's own position of the data is one "
        "batch ahead in the checkpoint of the first step and is lost with "
        "another number of hosts, and ours follows from the step; bind "
        f"utils.{binding} = False"
      )


def _start_checkpoint(model_dir: str, restore: Any) -> epath.Path | None:
  """The checkpoint T5X will start from, or None."""
  newest = _newest(epath.Path(model_dir))
  if newest is not None or restore is None or not restore.path:
    return newest
  if not isinstance(restore.path, str):
    raise ValueError(
      f"utils.RestoreCheckpointConfig.path is {restore.path!r}; training "
      "starts from one checkpoint: give its path as text"
    )
  path = epath.Path(restore.path)
  return path if restore.mode == "specific" else _newest(path)


def phase_of(checkpoint: str) -> str:
  """The phase, 'dense' or 'sparse', of the checkpoint at a path.

  Raises:
    ValueError: There is none, or not all of it.
  """
  path = epath.Path(checkpoint)
  step = _step_of(path)
  if not path.parent.is_dir():
    raise ValueError(f"{path} does not exist")
  with checkpointing.Checkpoints(path.parent, read_only=True) as checkpoints:
    if step not in checkpoints.steps():
      raise ValueError(f"{path} does not exist, or is not complete")
    return checkpoints.phase(step)


def _newest(directory: epath.Path) -> epath.Path | None:
  if not directory.is_dir():
    return None
  with checkpointing.Checkpoints(directory, read_only=True) as checkpoints:
    step = checkpoints.latest_step()
    return None if step is None else checkpoints.path(step)


def _step_of(checkpoint: epath.Path) -> int:
  match = re.fullmatch(rf"{checkpointing.PREFIX}_(\d+)", checkpoint.name)
  if match is None:
    raise ValueError(
      f"{checkpoint} is not the path of a checkpoint; give one that ends in "
      f"{checkpointing.PREFIX}_STEP"
    )
  return int(match[1])


def _check_data(
  source: batches.TrainBatches, model_dir: epath.Path, writes: bool
) -> None:
  """Refuses to go on with other data than the run in the directory has had."""
  newest, file, here = _newest(model_dir), model_dir / DATA_FILE, source.state()
  known = None
  if newest is not None and file.exists():
    known = json.loads(file.read_text())
  elif newest is not None:  # Our trainer's, or T5X's with other batches.
    with checkpointing.Checkpoints(model_dir, read_only=True) as checkpoints:
      known = checkpoints.position(_step_of(newest)).get("data")
  if known is not None:
    place = {name: here[name] for name in ("step", "counters")}
    source.restore({**known, **place})
  if writes and (newest is None or not file.exists()):
    model_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(here))


# ------------------------------------------------------------ conversion


def from_dense(
  ckpt_state: Tree,
  optimizer_state: Tree,
  *,
  path: str,
  run: run_lib.Run,
  is_resuming: bool = False,
) -> Tree:
  """A T5X state transformation: experts out of a dense checkpoint.

  Needs `RestoreCheckpointConfig.fallback_to_scratch`, which initialises what
  is not returned here: new parameters, prices and, if its moments are not
  copied, the optimizer. T5X gives no arrays, only what it knows of them, so
  the dense ones are read here; every host holds all experts in memory for
  that. `basemt convert` does not, and proves on real batches that the function
  is the same. Where T5X goes on from a checkpoint of its own, nothing is done.

  Returns:
    {'target', 'state'} with parameters as numpy arrays.

  Raises:
    ValueError: The checkpoint is not dense, not of this network, or of
      another step than the run's dense phase ends with.
  """
  if is_resuming:
    return ckpt_state
  settings, checkpoint = run.settings, epath.Path(path)
  options = settings.conversion_options
  step = _step_of(checkpoint)
  if step != run.settings.dense_steps:
    raise ValueError(
      f"{path} is of step {step}, but the run's dense phase ends with step "
      f"{run.settings.dense_steps}; set DENSE_STEPS = {step}"
    )
  if options.centroids != "orthogonal":
    raise ValueError(
      f"conversion.Options.centroids is {options.centroids!r}, which needs "
      "training batches, and T5X has none when it restores; convert with "
      "basemt convert"
    )
  dense = _dense_state(checkpoint, step, optimizer_state, run)
  config = run.network(vocab_size=1)
  rules = conversion.default_rules(config.placement)
  params = conversion.convert_params(
    dense["target"], optimizer_state["target"], rules, options
  )
  state = {"step": ckpt_state["state"]["step"]}
  if options.optimizer == "copy":
    state["param_states"] = _arrays(
      conversion.convert_opt_state(
        dense["state"]["param_states"],
        optimizer_state["state"]["param_states"],
        rules,
      )
    )
  if settings.average_decay:  # It begins at what the run goes on with.
    state.setdefault("param_states", {}).update(
      average=_arrays(params), updates=np.zeros((), np.int32)
    )
  return {"target": _arrays(params), "state": state}


def _dense_state(
  checkpoint: epath.Path, step: int, like: Tree, run: run_lib.Run
) -> dict[str, Any]:
  """The dense train state of a checkpoint, as numpy arrays."""
  vocab_size = like["target"]["token_embedder"]["embedding"].shape[0]
  model = model_lib.Transformer(run.network(vocab_size=vocab_size).dense())
  shapes, _ = jax.eval_shape(
    functools.partial(
      train_state.init_state, model, run.settings.transformation()
    ),
    jax.random.key(0),
  )
  tree = shapes.tree()
  if run.settings.conversion_options.optimizer != "copy":
    del tree["state"]
  if phase_of(str(checkpoint)) != "dense":
    raise ValueError(f"{checkpoint} is not dense: it holds experts")
  with checkpointing.Checkpoints(
    checkpoint.parent, read_only=True
  ) as checkpoints:
    return checkpoints.restore(step, tree, "the dense model")


def _arrays(tree: Tree) -> Tree:
  """Leaves that have values, as numpy arrays; mere shapes are left out."""
  flat = traverse_util.flatten_dict(tree, sep="/")
  return traverse_util.unflatten_dict(
    {
      name: np.asarray(leaf)
      for name, leaf in flat.items()
      if not isinstance(leaf, jax.ShapeDtypeStruct)
    },
    sep="/",
  )
