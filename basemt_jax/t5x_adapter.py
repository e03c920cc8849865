"""What T5X's trainer, evaluation and inference need of this package.

Axes: B batch rows, L length, N directions, E experts.

T5X (google-research/t5x) is not on PyPI. Its trainer takes any objects with
the right methods, so nothing here imports it but `partitioner` and
`stopping_trainer`; `gin/t5x/` puts these objects in their places. What they
compute is the package's own: one step is `steps.gradients`, batches are
`batches.TrainBatches` (see `t5x_data`). So both trainers run the same training,
and a checkpoint of one is a checkpoint of the other.
"""

import functools
import importlib
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from clu import metrics as clu_metrics
from flax import struct
from flax.core import freeze, unfreeze

from basemt_jax import (
  checkpointing,
  losses,
  partitioning,
  phases,
  processes,
  rounding,
  steps,
  t5x_data,
  translation,
)
from basemt_jax import metrics as metrics_lib
from basemt_jax import model as model_lib
from basemt_jax import optimizer as optimizers
from basemt_jax import run as run_lib
from basemt_jax.data import mixtures, vocabulary

Array = jax.Array
Tree = Any


# ----------------------------------------------------------------- start


def join(
  multiprocess: bool = False,
  coordinator_address: str | None = None,
  process_count: int | None = None,
  process_index: int | None = None,
) -> None:
  """Joins the processes of a job, under the names of T5X's flags.

  `t5x.train` has these flags, `t5x.eval` and `t5x.infer` have not; bound in gin
  they work for all three; see `processes.together`. A process that has joined
  is left alone.

  Raises:
    ValueError: They cannot be found; or there are others, and nothing was said
      of joining them.
  """
  if multiprocess and not jax.distributed.is_initialized():
    processes.join(
      coordinator_address,
      process_count,
      process_index,
      give="COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_INDEX",
    )
  processes.check_joined(give="--gin.MULTIPROCESS=True")


def once_joined(value: str, join: Callable[[], None]) -> str:
  """A value that is there only after joining: `t5x.infer` asks for one first.

  It starts JAX's devices, to name this process, before it makes the model.
  """
  join()
  return value


def start(
  make: Callable[[], run_lib.Run],
  check: Callable[[], None] = lambda: None,
  join: Callable[[], None] = lambda: None,
  module: str | None = None,
) -> run_lib.Run:
  """The run that a job of T5X is to train, evaluate or translate with.

  `check`, called first, refuses a configuration with anything that would be
  ignored; `join` is called next. Then T5X's MIXTURE_OR_TASK_MODULE is imported,
  and the run is made.
  """
  check()
  join()
  if module:
    importlib.import_module(module)
  return processes.in_turn(make)


# ------------------------------------------------------------- optimizer


@struct.dataclass
class OptimizerState:
  """T5X's optimizer state: steps, [] int32, and the Optax state."""

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
    target, param_states = rounding.updated(
      self.optimizer_def.optimizer(learning_rate),
      grads,
      self.state.param_states,
      self.target,
      self.state.step,
    )
    return self.replace(
      target=target,
      state=OptimizerState(self.state.step + 1, param_states),
    )

  def state_dict(self) -> dict[str, Any]:
    """What is written to checkpoints, under 'target' and 'state'."""
    return checkpointing.state_dict(
      self.target, self.state.param_states, self.state.step, {}
    )

  def restore_state(self, tree: Mapping[str, Any]) -> "Optimizer":
    """The optimizer with a checkpoint's values."""
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
      jnp.zeros((), jnp.int32), rounding.init(self.optimizer(0.0), params)
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
    """The sums of both, as CLU's metrics merge."""
    arrays = tuple(map(jnp.add, self.arrays, other.arrays))
    return Added(arrays, self.value)

  def compute(self) -> Array:
    """The value of what was added up."""
    return self.value(*self.arrays)


class Model:
  """The translation model of a run, with the methods that T5X calls.

  Attributes:
    module: The network of one phase: T5X trains one at a time.
    directions: N names; the index `direction` of a training batch.

  Args:
    run: The run; T5X itself only takes this object.
    phase: 'dense' or 'sparse'; see `phases.network`.
    checkpoint: Path of a checkpoint, whose phase is taken instead.

  Raises:
    ValueError: The checkpoint is not there, or holds experts and the run has
      none; or experts are to be kept in bfloat16.
  """

  FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

  def __init__(
    self,
    run: run_lib.Run,
    phase: str = "sparse",
    checkpoint: str | None = None,
  ):
    self._run = run
    found = mixtures.get_mixture(run.mixture_or_task_name)
    pieces = found.output_features["targets"].vocabulary
    size = vocabulary.Vocabulary.from_seqio(pieces).vocab_size
    mesh = run.mesh()
    self.module = model_lib.Transformer(
      _network(run, size, phase, checkpoint),
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
    """Returns `(loss, metrics)`, or `(loss, (metrics, mutables))` with prices.

    Raises:
      ValueError: The batch is not one of `get_dataset`, or is part of one.
    """
    if "direction" not in batch:
      raise ValueError(
        "the training batches have no feature 'direction': T5X reads the "
        "mixture by itself, and a restart would replay data and begin the "
        "temperature schedule again; bind train.get_dataset_fn = "
        "@t5x_data.get_dataset"
      )
    rows = batch["direction"].shape[0]
    if rows != self._run.batch_size:
      raise ValueError(
        f"the loss is computed over {rows} rows of a batch of "
        f"{self._run.batch_size}: T5X's microbatches take groups of rows "
        "apart; bind trainer.Trainer.num_microbatches = None, and "
        "steps.Settings.microbatches in its place"
      )
    loss, mutables, sums = self._differentiated(
      params,
      unfreeze(flax_mutables) if flax_mutables else {},
      dict(batch),
      dropout_rng,
    )
    metrics = self._metrics({**sums, "steps": jnp.ones(())})
    return loss, (metrics, freeze(mutables)) if flax_mutables else metrics

  def _differentiated(
    self, params: Tree, mutables: Tree, batch: steps.Batch, rng: Array
  ) -> tuple[Array, Tree, dict[str, Any]]:
    """Loss, mutables and sums of `steps.gradients`, with its gradients.

    T5X differentiates a loss; a step accumulates the gradients of several. So
    they are computed together, and what T5X gets is what our trainer gets.
    """

    def whole(params: Tree) -> tuple[tuple[Array, Tree, dict[str, Any]], Tree]:
      loss, grads, *rest = steps.gradients(
        params,
        mutables,
        batch,
        rng,
        self.module,
        self._run.settings,
        len(self.directions),
      )
      return (loss, *rest), grads

    @jax.custom_vjp
    def loss_of(params: Tree) -> tuple[Array, Tree, dict[str, Any]]:
      return whole(params)[0]

    def backward(grads: Tree, outer: tuple[Array, Tree, Any]) -> tuple[Tree]:
      return (jax.tree.map(lambda g: g * outer[0].astype(g.dtype), grads),)

    loss_of.defvjp(whole, backward)
    return loss_of(params)

  def eval_fn(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    flax_mutables: Tree | None = None,
  ) -> tuple[Array, dict[str, Any]]:
    """Returns nats per target token and metrics, with test-time routing."""
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
      self._run.settings.metrics,
    )
    metrics = self._metrics(sums)
    if not has_directions:
      metrics = {k: v for k, v in metrics.items() if "/" not in k}
    return jnp.sum(sums["nll"]) / jnp.sum(sums["weight"]), metrics

  def _metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a step's sums, named as `trainer.Trainer` writes them."""
    return {
      name: Added(arrays, metric.value)
      for name, metric, arrays in metrics_lib.computed(
        sums, self.directions, self._run.settings.known_metrics
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


def _network(
  run: run_lib.Run, vocab_size: int, phase: str, checkpoint: str | None
) -> model_lib.TransformerConfig:
  """The network of a phase, or of the phase that a checkpoint is of."""
  config = run.config_of(vocab_size)
  is_sparse = config.feed_forward == "experts"
  if is_sparse and config.expert_param_dtype != "float32":
    raise ValueError(
      "model.TransformerConfig.expert_param_dtype is "
      f"{config.expert_param_dtype!r}, and T5X restores all parameters in one "
      "type, float32; leave it out, or train with basemt train"
    )
  if checkpoint:
    phase = t5x_data.phase_of(checkpoint)
    if phase == "sparse" and config.feed_forward != "experts":
      raise ValueError(
        f"{checkpoint} holds experts, but the configured network has "
        f"FEED_FORWARD = {config.feed_forward!r}; use the configuration it was "
        "trained with"
      )
  return phases.network(config, run.settings, phase)


def _variables(params: Tree, mutables: Tree | None) -> Tree:
  """Variables of a trained model; T5X's infer restores bfloat16 by default."""
  return {
    "params": jax.tree.map(lambda p: p.astype(jnp.float32), params),
    **(unfreeze(mutables) if mutables else {}),
  }


def learning_rate(
  run: run_lib.Run, phase: str = "sparse"
) -> optimizers.Schedule:
  """Rate by step of the phase that T5X trains."""
  return phases.learning_rate(run.settings, phase)


def stopping_trainer(make: Callable[..., Any], **arguments: Any) -> Any:
  """T5X's trainer, which on SIGTERM saves a checkpoint and ends, with code 0.

  T5X saves one when its trainer, which `make` makes, raises `PreemptionError`,
  which nothing in it does. Here every step does after which all processes have
  agreed to stop, because one of them was asked to.
  """
  from t5x import trainer as t5x_trainer

  class Stopped(t5x_trainer.PreemptionError, SystemExit):
    """Ends the program when T5X has saved."""

  found, asked, done = make(**arguments), threading.Event(), 0
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, lambda *_: asked.set())

  def is_stopped() -> bool:
    if jax.process_count() == 1:
      return asked.is_set()
    return processes.is_stop_agreed(done)

  def compile_train(batch: Any) -> None:
    type(found).compile_train(found, batch)
    step = found._compiled_train_step

    def watched(state: Any, batch: Any) -> Any:
      nonlocal done
      state, metrics = step(state, batch)
      if jax.default_backend() == "cpu":
        # T5X waits for nothing, and XLA's simulated devices stand still once
        # one has many more steps before it than another.
        jax.block_until_ready(metrics)
      done += 1
      if is_stopped():
        found.train_state = state
        raise Stopped
      return state, metrics

    found._compiled_train_step = watched

  found.compile_train = compile_train
  return found


# --------------------------------------------------------------- devices


def partitioner(expert_devices: int = 1, model_devices: int = 1) -> Any:
  """T5X's PjitPartitioner on `partitioning.make_mesh`, with its axis rules.

  Its own meshes have no axis `expert`; that of `t5x.contrib.moe` has, but
  splits rows over it in another order than our layer, which would move every
  batch twice in every layer.
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
