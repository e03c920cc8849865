"""What T5X's trainer, evaluation and inference need of this package.

Axes: B batch rows, L length, N directions, E experts.

T5X (google-research/t5x) is not on PyPI. Its trainer takes any objects with
the right methods, so nothing here imports it but `partitioner`; `gin/t5x/` puts
these objects in their places. What they compute is the package's own: one step
is `steps.microbatch_loss`, batches are `batches.TrainBatches`. So both trainers
run the same training, and a checkpoint of one is a checkpoint of the other.
"""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
from clu import metrics as clu_metrics
from clu.data import dataset_iterator
from etils import epath
from flax import struct, traverse_util
from flax.core import freeze, unfreeze

from basemt_jax import (
  checkpointing,
  conversion,
  losses,
  partitioning,
  phases,
  prefetch,
  steps,
  translation,
)
from basemt_jax import metrics as metrics_lib
from basemt_jax import model as model_lib
from basemt_jax import optimizer as optimizers
from basemt_jax import run as run_lib
from basemt_jax.data import batches, mixtures, packing, vocabulary

Array = jax.Array
Tree = Any


# ------------------------------------------------------------- optimizer


@struct.dataclass
class OptimizerState:
  """T5X's optimizer state.

  Attributes:
    step: [] int32.
    param_states: The Optax state.
  """

  step: Array
  param_states: Tree


class Optimizer(struct.PyTreeNode):
  """Parameters with their optimizer state, as T5X's train state holds them."""

  optimizer_def: "OptimizerDef" = struct.field(pytree_node=False)
  state: OptimizerState
  target: Tree

  def apply_gradient(
    self, grads: Tree, *, learning_rate: Array, **unused: Any
  ) -> "Optimizer":
    """One update at this learning rate."""
    updates, param_states = self.optimizer_def.optimizer(learning_rate).update(
      grads, self.state.param_states, self.target
    )
    return self.replace(
      target=optax.apply_updates(self.target, updates),
      state=OptimizerState(self.state.step + 1, param_states),
    )

  def state_dict(self) -> dict[str, Any]:
    """{'target', 'state'}: what is written to checkpoints."""
    return checkpointing.state_dict(
      self.target, self.state.param_states, self.state.step, {}
    )

  def restore_state(self, tree: Mapping[str, Any]) -> "Optimizer":
    """With a checkpoint's values."""
    param_states = checkpointing.restored_opt_state(
      self.state.param_states, tree["state"].get("param_states", {})
    )
    return self.replace(
      target=unfreeze(tree["target"]),
      state=OptimizerState(tree["state"]["step"], param_states),
    )


class OptimizerDef:
  """An optimizer of the learning rate, as T5X's optimizer_def.

  Unlike T5X's own Optax wrapper it uses the trainer's learning rate, and
  derives the sharding of any Optax state, not only of those in a table.
  """

  def __init__(self, optimizer: optimizers.Optimizer):
    self.optimizer = optimizer

  def create(self, params: Tree) -> Optimizer:
    """A new state for these parameters, held in plain dictionaries."""
    params = unfreeze(params)
    state = OptimizerState(
      jnp.zeros((), jnp.int32), self.optimizer(0.0).init(params)
    )
    return Optimizer(self, state, params)

  def derive_logical_axes(
    self, optimizer: Optimizer, param_logical_axes: Tree
  ) -> Optimizer:
    """The optimizer with logical axes (or None) in place of arrays."""
    axes = unfreeze(param_logical_axes)

    def moment(leaf: Any, names: Any, param: Any) -> Any:
      found = partitioning.moment_axes(names, param.shape, leaf.shape)
      return jax.sharding.PartitionSpec(*found)

    state = optimizer.state.param_states
    param_states = optimizers.map_moments(
      self.optimizer(0.0), moment, state, axes, optimizer.target, other=None
    )
    return optimizer.replace(
      target=axes,
      state=OptimizerState(None, param_states),  # type: ignore[arg-type]
    )


# ----------------------------------------------------------------- model


@struct.dataclass
class Added(clu_metrics.Metric):
  """A metric of `metrics.METRICS`: arrays that add up, and their value."""

  arrays: tuple[Array, ...]
  value: Callable[..., Array] = struct.field(pytree_node=False)

  def merge(self, other: "Added") -> "Added":
    """Adds another's."""
    arrays = tuple(map(jnp.add, self.arrays, other.arrays))
    return Added(arrays, self.value)

  def compute(self) -> Array:
    """The value of what was added up."""
    return self.value(*self.arrays)


class Model:
  """The translation model of a run, with the methods that T5X calls.

  Attributes:
    module: The network, of the run's last phase: T5X trains one at a time.
    directions: N names; the index `direction` of a training batch.

  Args:
    run: The run; T5X itself only takes this object.
  """

  FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

  def __init__(self, run: run_lib.Run):
    if run.settings.microbatches != 1:
      raise ValueError(
        f"steps.Settings.microbatches is {run.settings.microbatches}, which "
        "T5X knows nothing of; set it to 1"
      )
    self._run = run
    found = mixtures.get_mixture(run.mixture_or_task_name)
    pieces = found.output_features["targets"].vocabulary
    size = vocabulary.Vocabulary.from_seqio(pieces).vocab_size
    mesh = run.mesh()
    self.module = model_lib.Transformer(
      phases.network(run.config_of(size), run.settings, "sparse"),
      mesh if mesh.size > 1 else None,
    )
    self.directions = tuple(mixtures.tasks_by_direction(found))
    self.input_vocabulary = self.output_vocabulary = pieces
    self.optimizer_def = OptimizerDef(run.settings.transformation)

  def get_initial_variables(
    self,
    rng: Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> Tree:
    """Parameters, prices and their axes; nothing that only reports."""
    del input_shapes, input_types  # Parameters do not depend on them.
    tokens = jnp.ones((1, 8), jnp.int32)
    variables = dict(self.module.init(rng, tokens, tokens, tokens, train=True))
    variables.pop("intermediates", None)
    return freeze(variables)

  def loss_fn(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    dropout_rng: Array,
    flax_mutables: Tree | None = None,
  ) -> tuple[Array, Any]:
    """(loss, metrics), or (loss, (metrics, mutables)) with prices.

    Raises:
      ValueError: The batch is not one of `get_dataset`, or is part of one.
    """
    if "direction" not in batch:
      raise ValueError(
        "the training batches have no feature 'direction': T5X reads the "
        "mixture by itself, and a restart would replay data and begin the "
        "temperature schedule again; bind train.get_dataset_fn = "
        "@t5x_adapter.get_dataset"
      )
    rows = batch["direction"].shape[0]
    if rows != self._run.batch_size:
      raise ValueError(
        f"the loss is computed over {rows} rows of a batch of "
        f"{self._run.batch_size}: T5X adds the gradients of microbatches up, "
        "but ours are means; bind trainer.Trainer.num_microbatches = None"
      )
    loss, (mutables, sums) = steps.microbatch_loss(
      params,
      unfreeze(flax_mutables) if flax_mutables else {},
      dict(batch),
      dropout_rng,
      jnp.sum(batch["decoder_loss_weights"]),
      self.module,
      self._run.settings,
      len(self.directions),
    )
    metrics = self._metrics({**sums, "steps": jnp.ones(())})
    return loss, (metrics, freeze(mutables)) if flax_mutables else metrics

  def eval_fn(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    flax_mutables: Tree | None = None,
  ) -> tuple[Array, dict[str, Any]]:
    """(nats per target token, metrics) with test-time routing."""
    batch = dict(batch)
    has_directions = "direction" in batch
    if not has_directions:
      rows = batch["decoder_target_tokens"].shape[0]
      batch["direction"] = jnp.zeros(rows, jnp.int32)
    sums = steps.eval_step(
      _variables(params, flax_mutables),
      batch,
      self.module,
      len(self.directions),
    )
    metrics = self._metrics(sums)
    if not has_directions:
      metrics = {k: v for k, v in metrics.items() if "/" not in k}
    return jnp.sum(sums["nll"]) / jnp.sum(sums["weight"]), metrics

  def _metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Of a step's sums, named as `trainer.Trainer` writes them."""
    known = (*metrics_lib.METRICS, *self._run.settings.metrics)
    return {
      name: Added(arrays, metric.value)
      for name, metric, arrays in metrics_lib.computed(
        sums, self.directions, known
      )
    }

  def predict_batch(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    flax_mutables: Tree | None = None,
  ) -> Array:
    """Best translations [B, L] int32."""
    return self.predict_batch_with_aux(params, batch, rng, flax_mutables)[0]

  def predict_batch_with_aux(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    flax_mutables: Tree | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    """Best translations [B, L] int32, and {'scores': [B] float32}."""
    del rng
    options = self._run.search
    tokens = batch["encoder_input_tokens"].astype(jnp.int32)
    found = translation.search(
      self.module,
      _variables(params, flax_mutables),
      tokens,
      options.limit(jnp.sum(tokens > 0, axis=-1)),
      options.limit(tokens.shape[1]),
      options,
    )
    return found.ids[:, 0], {"scores": found.scores[:, 0]}

  def score_batch(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    flax_mutables: Tree | None = None,
  ) -> Array:
    """Log-probability [B] float32 of each row's targets."""
    variables = _variables(params, flax_mutables)
    logits, _ = model_lib.forward(self.module, variables, batch, train=False)
    rows = losses.loss_sums(
      logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    )
    return -rows["nll"]


def _variables(params: Tree, mutables: Tree | None) -> Tree:
  """Of a trained model; T5X's infer restores bfloat16 unless told otherwise."""
  return {
    "params": jax.tree.map(lambda p: p.astype(jnp.float32), params),
    **(unfreeze(mutables) if mutables else {}),
  }


def learning_rate(run: run_lib.Run) -> optimizers.Schedule:
  """Rate by step of the run's last phase, which is the one that T5X trains."""
  is_sparse = run.network(vocab_size=1).feed_forward == "experts"
  return phases.learning_rate(run.settings, "sparse" if is_sparse else "dense")


# --------------------------------------------------------------- devices


def partitioner(expert_devices: int = 1, model_devices: int = 1) -> Any:
  """T5X's PjitPartitioner on `partitioning.make_mesh`, with its axis rules.

  Its own meshes have no axis `expert`; that of `t5x.contrib.moe` has, but
  splits rows over it in another order than our layer, which would move every
  batch twice in every layer.

  Args:
    expert_devices: Size of the mesh axis `expert`.
    model_devices: Size of the mesh axis `model`.
  """
  from t5x import partitioning as t5x_partitioning

  class Partitioner(t5x_partitioning.PjitPartitioner):
    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
      return partitioning.make_mesh(expert_devices, model_devices)

  return Partitioner(
    num_partitions=model_devices,
    logical_axis_rules=partitioning.LOGICAL_AXIS_RULES,
  )


# ------------------------------------------------------------------ data

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
    """Of this host's rows."""
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
) -> TrainIterator:
  """T5X's `get_dataset_fn`: the run's batches, from where its model stands.

  Args:
    cfg: T5X's DatasetConfig of the training data.
    shard_id: This host's part of every batch, by T5X's count.
    num_shards: Parts.
    feature_converter_cls: Not needed; rows are packed already.
    run: The run.
    checkpoint_cfg: The CheckpointConfig that T5X has; T5X starts from the
      newest checkpoint in the model directory, else from `restore.path`.

  Raises:
    ValueError: T5X is told something else than the run; or the batches would
      not be those of an uninterrupted run.
  """
  del feature_converter_cls
  _check_dataset_config(cfg, run)
  _check_checkpoint_config(checkpoint_cfg)
  found = _start_checkpoint(run.model_dir, checkpoint_cfg.restore)
  step = 0 if found is None else _step_of(found)
  network = run.network(vocab_size=1)
  if network.feed_forward == "experts" and step < run.settings.dense_steps:
    raise ValueError(
      f"the run is dense for its first DENSE_STEPS = "
      f"{run.settings.dense_steps} steps and T5X starts at step {step} with "
      "experts; train the dense phase with gin/t5x/pretrain.gin and go on with "
      "gin/t5x/convert.gin, or set DENSE_STEPS = 0"
    )
  source = batches.TrainBatches(
    run.store(),
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

  Args:
    cfg: T5X's DatasetConfig; its split and batch size count.
    shard_id: Not needed; the mesh tells.
    num_shards: Parts of every batch.
    eval_steps: Batches; None: the whole split.
    feature_converter_cls: Not needed.
    run: The run.
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
  """Batches that start over whenever they are iterated.

  Args:
    start: () -> the batches.
    limit: How many of them; None: all.
  """

  def __init__(
    self, start: Callable[[], Iterator[packing.Batch]], limit: int | None
  ):
    self._start, self._limit = start, limit

  def __iter__(self) -> Iterator[packing.Batch]:
    return itertools.islice(self._start(), self._limit)

  @property
  def element_spec(self) -> dict[str, Any]:
    """Of this host's rows."""
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


def _check_dataset_config(cfg: Any, run: run_lib.Run) -> None:
  """Refuses what T5X was told and the run was not, or the other way round."""
  mixture = mixtures.get_mixture(cfg.mixture_or_task_name)
  expected = {
    "mixture_or_task_name": mixtures.get_mixture(run.mixture_or_task_name),
    "task_feature_lengths": dict(run.task_feature_lengths),
    "batch_size": run.batch_size,
    "seed": run.data_seed,
    "split": "train",
    "shuffle": True,
    "pack": True,
    "use_cached": False,
  }
  for name, value in expected.items():
    found = getattr(cfg, name)
    if name == "mixture_or_task_name":
      found, value = mixture.name, value.name
    elif name == "task_feature_lengths":
      found = dict(found)
    if found != value:
      macro = {
        "mixture_or_task_name": "%MIXTURE_OR_TASK_NAME",
        "task_feature_lengths": "%TASK_FEATURE_LENGTHS",
        "batch_size": "%BATCH_SIZE",
        "seed": "%SEED",
      }.get(name, repr(value))
      raise ValueError(
        f"train/utils.DatasetConfig.{name} is {found!r}, but the run's batches "
        f"are made with {value!r}, and a restart would give others; bind "
        f"train/utils.DatasetConfig.{name} = {macro}"
      )


def _check_checkpoint_config(cfg: Any) -> None:
  """Refuses positions that T5X would keep: they hold for one job size only."""
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


def _newest(directory: epath.Path) -> epath.Path | None:
  if not directory.is_dir():
    return None
  with contextlib.closing(
    checkpointing.Checkpoints(directory, read_only=True)
  ) as checkpoints:
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
    with contextlib.closing(
      checkpointing.Checkpoints(model_dir, read_only=True)
    ) as checkpoints:
      known = checkpoints.position(_step_of(newest)).get("data")
  if known is not None:
    source.restore({**known, **_place(here)})
  if writes and (newest is None or not file.exists()):
    model_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(here))


def _place(position: Mapping[str, Any]) -> dict[str, Any]:
  """Where in the data a position is, without what it is valid with."""
  return {name: position[name] for name in ("step", "counters")}


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
  is the same.

  Args:
    ckpt_state: What the checkpoint holds; leaves say where.
    optimizer_state: Shapes of the sparse train state, as T5X stores it.
    path: Of the dense checkpoint.
    run: The sparse run.
    is_resuming: T5X goes on from a checkpoint of its own; nothing is done.

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
    functools.partial(steps.init_state, model, run.settings.transformation()),
    jax.random.key(0),
  )
  tree = shapes.tree()
  if run.settings.conversion_options.optimizer != "copy":
    del tree["state"]
  with contextlib.closing(
    checkpointing.Checkpoints(checkpoint.parent, read_only=True)
  ) as checkpoints:
    if step not in checkpoints.steps():
      raise ValueError(f"{checkpoint} does not exist, or is not complete")
    if checkpoints.phase(step) != "dense":
      raise ValueError(f"{checkpoint} is not dense: it holds experts")
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
