"""What one training or evaluation step does, compiled for a mesh.

Axes: B rows of a batch, L length, N directions.

`Program` is one phase's model with its shardings and compiled functions. All
a step does is a function of the state, the batch and the step's number.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from basemt_jax import (
  conversion,
  drawing,
  losses,
  optimizer,
  partitioning,
  ranges,
  rounding,
  train_state,
)
from basemt_jax import metrics as metrics_lib
from basemt_jax import model as model_lib

Array = jax.Array
Batch = dict[str, Any]
Tree = Any

NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to train; the network and the data are described elsewhere.

  Attributes:
    train_steps: Steps of the whole run, the dense phase included.
    learning_rate: step -> rate, over the whole run.
    optimizer: Learning rate -> Optax transformation; see
      `basemt_jax.optimizer`.
    average_decay: Of an exponential average of the weights, which then is
      what is evaluated and used; 0: none is kept.
    dense_steps: Steps of the dense phase before conversion; 0: none.
    conversion_options: How experts start.
    rewarm_steps: Second warm-up of the learning rate after the conversion.
    label_smoothing: See `losses.token_losses`.
    z_loss: See `losses.token_losses`.
    microbatches: Parts of a batch whose gradients are accumulated.
    log_every: Steps between progress reports.
    eval_every: Steps between evaluations on dev.
    save_every: Steps between checkpoints.
    keep_checkpoints: Latest ones to keep, besides the best.
    patience: Evaluations without a better dev loss before stopping early;
      None: never.
    seed: Of initialisation and dropout.
    metrics: More of them than `metrics.METRICS`.
  """

  train_steps: ranges.Count
  learning_rate: optimizer.Schedule
  optimizer: optimizer.Optimizer
  average_decay: ranges.Fraction = 0.0
  dense_steps: ranges.Steps = 0
  conversion_options: conversion.Options = conversion.Options()  # noqa: RUF009
  rewarm_steps: ranges.Steps = 0
  label_smoothing: ranges.Fraction = 0.1
  z_loss: ranges.NotNegative = 1e-4
  microbatches: ranges.Count = 1
  log_every: ranges.Count = 100
  eval_every: ranges.Count = 1000
  save_every: ranges.Count = 1000
  keep_checkpoints: ranges.Count = 3
  patience: ranges.Count | None = None
  seed: ranges.Seed = 0
  metrics: tuple[metrics_lib.Metric, ...] = ()

  def __post_init__(self):
    """Checks what would otherwise fail late."""
    if not 0 <= self.dense_steps <= self.train_steps:
      raise ValueError(
        f"Settings.dense_steps is {self.dense_steps}; it must be between 0 "
        f"and train_steps = {self.train_steps}"
      )
    if isinstance(self.optimizer, optax.GradientTransformation):
      raise ValueError(
        "Settings.optimizer has its learning rate already, and the run's would "
        "be applied on top; give the function that makes it, as in OPTIMIZER = "
        "@optax.lion, and its arguments as in optax.lion.b1 = 0.95"
      )

  @property
  def known_metrics(self) -> tuple[metrics_lib.Metric, ...]:
    """All that a run measures: the package's, and its own."""
    return (*metrics_lib.METRICS, *self.metrics)

  def transformation(
    self, learning_rate: Any = 0.0
  ) -> optax.GradientTransformation:
    """The optimizer at a learning rate, with averaged weights if wanted.

    Its state does not depend on the rate.
    """
    found = self.optimizer(learning_rate=learning_rate)
    if not self.average_decay:
      return found
    return optimizer.averaged(found, self.average_decay)


def microbatch_loss(
  params: Tree,
  mutables: Tree,
  batch: Batch,
  rng: Array,
  total_weight: Array,
  model: model_lib.Transformer,
  settings: Settings,
  num_directions: int,
) -> tuple[Array, tuple[Tree, dict[str, Any]]]:
  """This microbatch's part of the batch's mean loss.

  Args:
    params: Differentiated.
    mutables: Collections that the step updates.
    batch: T5X's features, and `direction` [B].
    rng: For dropout.
    total_weight: [] float32, target tokens of the whole batch.
    model: The network.
    settings: Smoothing, z-loss, microbatches.
    num_directions: N.

  Returns:
    Loss [] float32; new mutables and sums for reporting.
  """
  logits, updates = model_lib.forward(
    model,
    {"params": params, **mutables},
    batch,
    train=True,
    dropout_rng=rng,
  )
  intermediates = updates.pop("intermediates")
  rows = losses.loss_sums(
    logits,
    batch["decoder_target_tokens"],
    batch["decoder_loss_weights"],
    settings.label_smoothing,
    settings.z_loss,
  )
  rows |= _own_rows(settings.metrics, logits, batch)
  auxiliary = losses.auxiliary_loss(intermediates) / settings.microbatches
  loss = jnp.sum(rows["loss"]) / total_weight + auxiliary
  direction = batch["direction"]
  sums: dict[str, Any] = {
    name: losses.by_direction(row, direction, num_directions)
    for name, row in rows.items()
  }
  sums["tokens"] = jnp.sum(rows["weight"]) + jnp.sum(
    batch["encoder_input_tokens"] > 0
  )
  router = losses.router_sums(
    intermediates, direction, num_directions, model.config.num_experts
  )
  for layer in router.values():
    for mean in ("entropy", "auxiliary_loss"):
      layer[mean] /= settings.microbatches
  sums["router"] = router
  return loss, (updates, sums)


def _own_rows(
  metrics: Sequence[metrics_lib.Metric], logits: Array, batch: Batch
) -> dict[str, Array]:
  """Values by row [B] of the metrics that have a `row` function."""
  return {m.name: m.row(logits, batch) for m in metrics if m.row}


def gradients(
  params: Tree,
  mutables: Tree,
  batch: Batch,
  rng: Array,
  model: model_lib.Transformer,
  settings: Settings,
  num_directions: int,
) -> tuple[Array, Tree, Tree, dict[str, Any]]:
  """Loss, gradients, new mutables and report sums of a whole batch.

  The batch is taken apart by strides, so that every device's rows stay on it.
  `rng` is of the step's dropout.
  """
  parts = settings.microbatches
  total = jnp.sum(batch["decoder_loss_weights"])
  loss_and_grad = jax.value_and_grad(
    functools.partial(
      microbatch_loss,
      total_weight=total,
      model=model,
      settings=settings,
      num_directions=num_directions,
    ),
    has_aux=True,
  )
  if parts == 1:
    (loss, (mutables, sums)), grads = loss_and_grad(
      params, mutables, batch, rng
    )
    return loss, grads, mutables, sums

  def part(mutables: Tree, i: Array) -> tuple[Any, Tree, Any]:
    rows = jax.tree.map(
      lambda x: x.reshape(-1, parts, *x.shape[1:])[:, i], batch
    )
    (loss, (mutables, sums)), grads = loss_and_grad(
      params, mutables, rows, jax.random.fold_in(rng, i)
    )
    # Sums of many are of float32 whatever the parameters' types.
    return mutables, optax.tree.cast(grads, jnp.float32), (loss, sums)

  def body(carry, i):
    mutables, total_grads, total_rest = carry
    mutables, grads, rest = part(mutables, i)
    add = functools.partial(jax.tree.map, jnp.add)
    return (mutables, add(total_grads, grads), add(total_rest, rest)), None

  # From zeros, so that the step holds the network once.
  first = jnp.zeros((), jnp.int32)
  _, *shapes = jax.eval_shape(part, mutables, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (mutables, grads, (loss, sums)), _ = jax.lax.scan(
    body, (mutables, *zeros), jnp.arange(parts)
  )
  return loss, grads, mutables, sums


def train_step(
  state: train_state.TrainState,
  batch: Batch,
  key: Array,
  model: model_lib.Transformer,
  settings: Settings,
  learning_rate: optimizer.Schedule,
  num_directions: int,
) -> tuple[train_state.TrainState, dict[str, Any]]:
  """One update, of a batch of global arrays; see `microbatch_loss`.

  The key is of dropout, and the same at every step; `learning_rate` gives the
  rate of a step.

  Returns:
    The new state; and sums over the batch: by direction [N] `loss`, `nll`,
    `correct`, `weight`; `router` by layer (see `losses.router_sums`); `tokens`,
    `grad_norm`, `steps` []; and where the loss or a gradient is not finite,
    `bad_step` [], else `NEVER`, and `bad_direction` [N].
  """
  loss, grads, mutables, sums = gradients(
    state.params,
    state.mutables,
    batch,
    jax.random.fold_in(key, state.step),
    model,
    settings,
    num_directions,
  )
  tx = settings.transformation(learning_rate(state.step))
  params, opt_state = rounding.updated(
    tx, grads, state.opt_state, state.params, state.step
  )
  sums["grad_norm"] = optimizer.global_norm(grads)
  sums["steps"] = jnp.ones((), jnp.int32)
  is_finite = jnp.isfinite(loss) & jnp.isfinite(sums["grad_norm"])
  sums["bad_step"] = jnp.where(is_finite, NEVER, state.step)
  sums["bad_direction"] = ~jnp.isfinite(sums["loss"])
  return train_state.TrainState(
    state.step + 1, params, opt_state, mutables
  ), sums


def add_sums(total: dict[str, Any], sums: dict[str, Any]) -> dict[str, Any]:
  """Sums of `train_step` over more steps; the first bad step is kept."""
  is_first = total["bad_step"] == NEVER
  added = jax.tree.map(jnp.add, total, sums)
  for name in ("bad_step", "bad_direction"):
    added[name] = jnp.where(is_first, sums[name], total[name])
  return added


def eval_step(
  variables: Tree,
  batch: Batch,
  model: model_lib.Transformer,
  num_directions: int,
  metrics: Sequence[metrics_lib.Metric] = (),
) -> dict[str, Array]:
  """Sums [N] by direction, with test-time routing: `nll`, `correct`, `weight`.

  No smoothing, no z-loss: nll / weight is nats per target token. Of `metrics`,
  those with a `row` function are added up, too.
  """
  logits, _ = model_lib.forward(model, variables, batch, train=False)
  rows = losses.loss_sums(
    logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
  )
  del rows["loss"]
  rows |= _own_rows(metrics, logits, batch)
  return {
    name: losses.by_direction(row, batch["direction"], num_directions)
    for name, row in rows.items()
  }


def routing_step(
  variables: Tree,
  batch: Batch,
  model: model_lib.Transformer,
  num_directions: int,
) -> dict[str, Any]:
  """Which experts the tokens of a batch go to at test time, by layer.

  See `losses.router_sums`; {} for a dense model.
  """
  _, updates = model_lib.forward(model, variables, batch, train=False)
  return losses.router_sums(
    updates["intermediates"],
    batch["direction"],
    num_directions,
    model.config.num_experts,
  )


class Program:
  """One phase's model with its shardings and compiled functions.

  The network is that of the phase; `learning_rate` gives the rate of a step;
  there are N directions.
  """

  def __init__(
    self,
    config: model_lib.TransformerConfig,
    settings: Settings,
    learning_rate: optimizer.Schedule,
    mesh: Mesh,
    num_directions: int,
  ):
    partitioning.draw_by_kernels(mesh)
    # On one device the exchange between devices is left out altogether.
    self.model = model_lib.Transformer(config, mesh if mesh.size > 1 else None)
    self.mesh = mesh
    self.settings = settings
    self.name = "sparse" if config.feed_forward == "experts" else "dense"
    self._key, self._dropout_key = train_state.keys(settings.seed)
    tx = settings.transformation()
    noted: dict[str, Any] = {}

    def init(key: Array) -> train_state.TrainState:
      with drawing.recording() as found:
        state, noted["axes"] = train_state.init_state(self.model, tx, key)
      noted["draws"] = drawing.draws_of(found, state.params)
      return state

    self.shapes = jax.eval_shape(init, self._key)
    self._draws = noted["draws"]
    self.shardings = train_state.state_shardings(
      self.shapes, noted["axes"], tx, mesh
    )
    self._begin = partitioning.Compiled(
      lambda params: dataclasses.replace(
        init(self._key), params={}, opt_state=rounding.init(tx, params)
      ),
      mesh,
      out_shardings=dataclasses.replace(self.shardings, params={}),
    )
    self._draw_all = partitioning.Compiled(
      lambda key: traverse_util.flatten_dict(
        train_state.init_state(self.model, tx, key)[0].params
      ),
      mesh,
      out_shardings=traverse_util.flatten_dict(self.shardings.params),
    )
    self._make_steps(learning_rate, num_directions)

  def _make_steps(
    self, learning_rate: optimizer.Schedule, num_directions: int
  ) -> None:
    mesh, replicated = self.mesh, partitioning.replicated(self.mesh)
    batch = partitioning.batch_sharding(mesh)
    self._train_step = partitioning.Compiled(
      functools.partial(
        train_step,
        model=self.model,
        settings=self.settings,
        learning_rate=learning_rate,
        num_directions=num_directions,
      ),
      mesh,
      in_shardings=(self.shardings, batch, replicated),
      out_shardings=(self.shardings, replicated),
      donate_argnums=0,
    )
    # Apart from the step, so that the step is compiled only once.
    # No sums are given away: the loop waits for those of earlier steps.
    self._add_sums = jax.jit(add_sums)
    evaluates = functools.partial(eval_step, metrics=self.settings.metrics)
    self.eval_step, self.routing_step = (
      partitioning.Compiled(
        functools.partial(
          function, model=self.model, num_directions=num_directions
        ),
        mesh,
        out_shardings=replicated,
      )
      for function in (evaluates, routing_step)
    )

  def init(self) -> train_state.TrainState:
    """The initial state, the same on any devices."""
    paths = traverse_util.flatten_dict(self.shapes.params)
    return self.begin(traverse_util.unflatten_dict(self.draw(paths)))

  def draw(self, paths: Iterable[drawing.Path]) -> dict[drawing.Path, Array]:
    """Initial values of the parameters of these paths."""
    if self._draws is None:  # A module draws in its own way.
      drawn = self._draw_all(self._key)
      return {path: drawn[path] for path in paths}
    return drawing.drawn(
      {path: self._draws[path] for path in paths},
      self.shapes.params,
      self.shardings.params,
      self._key,
    )

  def begin(self, params: Tree) -> train_state.TrainState:
    """The state before the first step, with these parameters."""
    return dataclasses.replace(self._begin(params), params=params)

  def train_step(
    self,
    state: train_state.TrainState,
    metrics: dict[str, Any] | None,
    batch: Batch,
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """`train_step`, compiled; its sums are added to `metrics`, if given."""
    state, sums = self._train_step(state, batch, self._dropout_key)
    return state, sums if metrics is None else self._add_sums(metrics, sums)

  def check(self, batch: Batch) -> None:
    """Traces a step, and so raises what is wrong with a batch's shapes."""
    self._train_step.trace(self.shapes, batch, self._dropout_key)

  def lower(self, batch: Batch) -> jax.stages.Lowered:
    """The training step, ready to be compiled, for a batch given by shapes."""
    return self._train_step.lower(self.shapes, batch, self._dropout_key)

  def compile(self, batch: Batch) -> None:
    """Compiles what a phase begins with, before it does."""
    self._begin.compile(self.abstract_state().params)
    self.compile_step(batch)

  def compile_step(self, batch: Batch) -> None:
    """Compiles the training step, for a batch given by shapes."""
    self._train_step.compile(self.shapes, batch, self._dropout_key)

  def abstract_state(self) -> train_state.TrainState:
    """Shapes and shardings of the state."""
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      self.shapes,
      self.shardings,
    )

  def abstract_tree(self) -> dict[str, Any]:
    """Shapes and shardings of the state, as a checkpoint holds it."""
    return self.abstract_state().tree()

  def variables(self, state: train_state.TrainState) -> Tree:
    """What `model.apply` takes, out of a state."""
    return {"params": state.params, **state.mutables}

  def averaged_variables(self, state: train_state.TrainState) -> Tree:
    """`variables` with averaged weights, where the optimizer keeps them."""
    params = state.params
    if isinstance(state.opt_state, optimizer.AveragedState):
      # Of the parameters' types, so that the same program evaluates both.
      params = jax.tree.map(
        lambda x, p: x.astype(p.dtype), state.opt_state.average, params
      )
    return {"params": params, **state.mutables}

  def with_settings(self, settings: Settings) -> "Program":
    """The same compiled functions for another run.

    Its settings may differ in seed, counts of steps and conversion, and in
    nothing that a step is made of.
    """
    other = copy.copy(self)
    other._key, other._dropout_key = train_state.keys(settings.seed)
    other.settings = settings
    return other


def share_of(steps: ranges.Steps, share: ranges.Share) -> ranges.Steps:
  """A share of a number of steps, rounded: 'half of TRAIN_STEPS' in gin."""
  return round(steps * share)
