"""T5X's calls in T5X's order, without T5X; and our training beside it."""

import dataclasses
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from flax import traverse_util
from flax.core import freeze, unfreeze
from flax.linen import partitioning as nn_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from basemt_jax import (
  heating,
  partitioning,
  sampling,
  trainer,
  translation,
)
from basemt_jax import run as run_lib
from basemt_jax.data import batches

pytest.importorskip("seqio")
pytest.importorskip("clu")

import toy_tasks
from clu.data import dataset_iterator

from basemt_jax import t5x_adapter, t5x_data

BATCH_SIZE = 16


def make_run(cache, model_dir, config, settings=None, **changes):
  """A run of the toy network and tasks."""
  values = {
    "model_dir": str(model_dir),
    "mixture_or_task_name": "toy",
    "task_feature_lengths": toy_tasks.LENGTHS,
    "network": lambda vocab_size: dataclasses.replace(
      config, vocab_size=max(vocab_size, 384)
    ),
    "settings": settings or toy.settings(),
    "batch_size": BATCH_SIZE,
    "strategy": sampling.Strategy(heating.linear(1, 5, 4)),
    "cache_dir": cache,
    "search": translation.SearchOptions(max_target_length=8),
    **changes,
  }
  return Run(**values)


@dataclasses.dataclass(frozen=True)
class Run(run_lib.Run):
  """On the first of the simulated devices: data x expert x model."""

  devices: tuple[int, int, int] = (1, 1, 1)

  def mesh(self):
    return toy.mesh(*self.devices)


def dataset_config(**changes):
  """What `utils.DatasetConfig` holds under `gin/t5x/pretrain_base.gin`."""
  values = {
    "mixture_or_task_name": "toy",
    "task_feature_lengths": toy_tasks.LENGTHS,
    "split": "train",
    "batch_size": BATCH_SIZE,
    "shuffle": True,
    "seed": 0,
    "use_cached": False,
    "pack": True,
    **changes,
  }
  return types.SimpleNamespace(**values)


def checkpoint_config(path=(), mode="latest", **changes):
  """What `utils.CheckpointConfig` holds."""
  return types.SimpleNamespace(
    restore=types.SimpleNamespace(
      path=path, mode=mode, restore_dataset=changes.get("restore", False)
    ),
    save=types.SimpleNamespace(
      save_dataset=changes.get("save", False),
      dtype=changes.get("dtype", "float32"),
    ),
  )


def batches_for(run, **changes):
  return t5x_data.get_dataset(
    dataset_config(),
    0,
    1,
    None,
    run=run,
    checkpoint_cfg=checkpoint_config(**changes),
  )


class T5X:
  """The order and form of the calls of T5X's `train`, and nothing else.

  Its `train.train`, `utils.TrainStateInitializer`,
  `train_state.FlaxOptimTrainState` and `trainer.train_with_lr` in one.
  """

  def __init__(self, run, **checkpoints):
    self.run, self.model, self.mesh = run, t5x_adapter.Model(run), run.mesh()
    init_rng, self._base_rng = jax.random.split(
      jax.random.PRNGKey(run.settings.seed)
    )
    spec = batches_for(run, **checkpoints).element_spec
    self._input_shapes = {
      k: (BATCH_SIZE, *v.shape[1:]) for k, v in spec.items()
    }
    self._input_types = {k: v.dtype for k, v in spec.items()}
    self.shapes, axes = jax.eval_shape(self._initial, jax.random.PRNGKey(0))
    self.shardings = self._shardings(self.shapes, axes)
    init = jax.jit(lambda rng: self._initial(rng)[0])
    self._fresh = self._scoped(init)(init_rng)
    self._step = self._scoped(jax.jit(self._train_step))

  def start(self, tree=None, **checkpoints):
    """Begins, or goes on from a checkpoint that T5X finds."""
    self.batches = dataset_iterator.PeekableDatasetIterator(
      batches_for(self.run, **checkpoints)
    )
    self._restore(tree or {})
    self.batches.peek_async().result()
    self.metrics = None
    return self

  def _initial(self, rng):
    """((optimizer, mutables), the axes of both), as `FlaxOptimTrainState`."""
    variables = freeze(
      self.model.get_initial_variables(
        rng=rng,
        input_shapes=self._input_shapes,
        input_types=self._input_types,
      )
    )
    variables, params = variables.pop("params")
    variables, axes = variables.pop("params_axes")
    mutables = freeze(
      {k: v for k, v in variables.items() if not k.endswith("_axes")}
    )
    mutable_axes = freeze({k: variables[f"{k}_axes"] for k in mutables})
    state = self.model.optimizer_def.create(params)
    return (state, mutables), (axes, mutable_axes)

  def _shardings(self, state, axes):
    """Of the state dict's leaves, by path."""
    params_axes, mutable_axes = map(nn_partitioning.get_axis_names, axes)
    logical = state[0].optimizer_def.derive_logical_axes(state[0], params_axes)
    named = {**logical.state_dict(), "flax_mutables": unfreeze(mutable_axes)}
    return {
      path: NamedSharding(
        self.mesh,
        PartitionSpec()
        if names is None
        else nn_partitioning.logical_to_mesh_axes(
          names, partitioning.LOGICAL_AXIS_RULES
        ),
      )
      for path, names in traverse_util.flatten_dict(named, sep="/").items()
    }

  def _restore(self, tree):
    """The checkpoint's arrays, and initial ones where it has none."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    initial = traverse_util.flatten_dict(self.state_dict(self._fresh), sep="/")
    assert flat.keys() <= initial.keys() == self.shardings.keys()
    placed = {
      path: jax.device_put(flat.get(path, value), self.shardings[path])
      for path, value in initial.items()
    }
    tree = traverse_util.unflatten_dict(placed, sep="/")
    optimizer = self._fresh[0].restore_state(tree)
    self.state = optimizer, freeze(tree.get("flax_mutables", {}))

  def _scoped(self, function):
    def call(*args):
      rules = nn_partitioning.axis_rules(partitioning.LOGICAL_AXIS_RULES)
      with self.mesh, rules:
        return function(*args)

    return call

  def _train_step(self, state, batch):
    optimizer, mutables = state
    rng = jax.random.fold_in(self._base_rng, optimizer.state.step)
    gradients = jax.value_and_grad(self.model.loss_fn, has_aux=True)
    if mutables:
      (_, (metrics, mutables)), grads = gradients(
        optimizer.target, batch, rng, mutables
      )
    else:
      (_, metrics), grads = gradients(optimizer.target, batch, rng)
    rate = t5x_adapter.learning_rate(self.run)(optimizer.state.step)
    optimizer = optimizer.apply_gradient(grads, learning_rate=rate)
    return (optimizer, mutables), metrics

  def train(self, num_steps):
    """`trainer.Trainer.train`; returns the state dict."""
    for _ in range(num_steps):
      batch = partitioning.put_batch(next(self.batches), self.mesh)
      self.state, metrics = self._step(self.state, batch)
      if self.metrics is None:
        self.metrics = metrics
      else:
        self.metrics = {k: v.merge(metrics[k]) for k, v in self.metrics.items()}
    return jax.device_get(self.state_dict(self.state))

  def state_dict(self, state):
    optimizer, mutables = state
    tree = optimizer.state_dict()
    if mutables:
      tree["flax_mutables"] = unfreeze(mutables)
    return tree

  def values(self):
    """The metrics, as `MetricsManager` writes them."""
    return {k: float(v.compute_value().value) for k, v in self.metrics.items()}


class Writer:
  """Keeps what is written."""

  def __init__(self):
    self.scalars = {}

  def write_scalars(self, step, scalars):
    self.scalars |= scalars

  def flush(self):
    pass


def our_training(run, end, **changes):
  """State and last metrics of our own loop, at step `end`."""
  store, writer = run.store(), Writer()
  loop = trainer.Trainer(
    run.config(store),
    dataclasses.replace(run.settings, train_steps=end, **changes),
    run.mesh(),
    store.directions,
    batches.TrainBatches(store, run.strategy, run.batch_size, run.data_seed),
    run.model_dir,
    writer,
  )
  loop.run()
  tree = jax.device_get(loop.state.tree())
  loop.close()
  return tree, writer.scalars


def save(tree, model_dir, step):
  """A checkpoint as T5X writes it: no position, no metrics."""
  manager = ocp.CheckpointManager(
    model_dir,
    options=ocp.CheckpointManagerOptions(step_prefix="checkpoint"),
    item_handlers={"state": ocp.PyTreeCheckpointHandler()},
  )
  manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
  manager.close()


def differences(left, right):
  left, right = (traverse_util.flatten_dict(x, sep="/") for x in (left, right))
  assert left.keys() == right.keys() and len(left) > 20
  return {
    path: float(np.max(np.abs(np.float64(left[path]) - right[path])))
    for path in left
    if not np.array_equal(left[path], right[path])
  }
