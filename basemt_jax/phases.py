"""The phases of a run: dense, then sparse, and the step from one to the other.

A run of experts with `steps.Settings.dense_steps` trains the same network with
plain feed-forwards first; any other run has one phase.
"""

import dataclasses
import functools
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from basemt_jax import conversion, optimizer, partitioning, steps, train_state
from basemt_jax import model as model_lib

Tree = Any


def network(
  config: model_lib.TransformerConfig, settings: steps.Settings, phase: str
) -> model_lib.TransformerConfig:
  """The network of phase 'dense' or 'sparse' of a run that ends with `config`.

  A run without experts has its one network in either.
  """
  if config.feed_forward != "experts":
    return config
  if phase == "dense":
    return config.dense()
  return dataclasses.replace(
    config, converted=config.converted or settings.dense_steps > 0
  )


def learning_rate(settings: steps.Settings, phase: str) -> optimizer.Schedule:
  """The rate by step of the whole run, warmed up again after a conversion."""
  rate = settings.learning_rate
  if phase == "dense" or not settings.dense_steps or not settings.rewarm_steps:
    return rate
  return optimizer.rewarm(rate, settings.dense_steps, settings.rewarm_steps)


def program(
  config: model_lib.TransformerConfig,
  settings: steps.Settings,
  phase: str,
  mesh: Mesh,
  num_directions: int,
) -> steps.Program:
  """What a phase trains with; arguments as of `network` and `steps.Program`."""
  return steps.Program(
    network(config, settings, phase),
    settings,
    learning_rate(settings, phase),
    mesh,
    num_directions,
  )


class Conversion:
  """The sparse state that continues a dense one, verified on a real batch.

  All it runs can be compiled before: see `compile`.

  Args:
    dense: Program of the state.
    sparse: Program to go on with; its settings say how experts start.
  """

  def __init__(self, dense: steps.Program, sparse: steps.Program):
    self._dense, self._sparse = dense, sparse
    self._options = sparse.settings.conversion_options
    self._rules = conversion.default_rules(sparse.model.config.placement)
    shapes = traverse_util.flatten_dict(sparse.shapes.params)
    plan = conversion.plan(
      traverse_util.flatten_dict(dense.shapes.params, sep="/"),
      ("/".join(path) for path in shapes),
      self._rules,
    )
    # Only what no dense value fills is drawn.
    self._new_paths = [p for p in shapes if plan["/".join(p)][1] is None]
    # Types in which the sparse network keeps dense parameters.
    self._kept = {
      source: shapes[tuple(path.split("/"))].dtype
      for path, (_, source) in plan.items()
    }
    self._new: dict[tuple[str, ...], jax.Array] | None = None
    self._convert = partitioning.Compiled(
      self._converted, sparse.mesh, out_shardings=sparse.shardings.params
    )
    self._copy_moments = partitioning.Compiled(
      lambda old, new: conversion.convert_opt_state(old, new, self._rules),
      sparse.mesh,
      out_shardings=sparse.shardings.opt_state,
      donate_argnums=1,
    )
    self._error = partitioning.Compiled(
      self._function_error,
      sparse.mesh,
      out_shardings=partitioning.replicated(sparse.mesh),
    )

  def check(self, batch: steps.Batch) -> None:
    """Raises what is wrong with a batch's shapes for the sparse program."""
    self._sparse.check(batch)

  def compile(self, batch: steps.Batch) -> None:
    """Compiles conversion and sparse phase, at once and in any thread.

    Of a batch of global arrays only the shapes count.
    """
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      batch,
    )
    dense, sparse = (
      program.abstract_state() for program in (self._dense, self._sparse)
    )
    work = [
      functools.partial(self._sparse.compile, shapes),
      functools.partial(
        self._error.compile,
        self._dense.variables(dense),
        self._sparse.variables(sparse),
        shapes,
      ),
      functools.partial(self._convert.compile, dense.params, self._drawn()),
    ]
    if self._options.optimizer == "copy":
      work.append(
        functools.partial(
          self._copy_moments.compile, dense.opt_state, sparse.opt_state
        )
      )
    with futures.ThreadPoolExecutor(len(work)) as pool:
      for waiting in [pool.submit(function) for function in work]:
        waiting.result()

  def __call__(
    self, state: train_state.TrainState, batch: steps.Batch
  ) -> tuple[train_state.TrainState, float]:
    """Converts the state after the last dense step, and proves it on a batch.

    Returns:
      The sparse state; and the relative error of the function (see
      `conversion.relative_error`) in float32 and without dropout, the worse of
      balanced and greedy routing.

    Raises:
      ValueError: The function should have been preserved, but the error
        exceeds `conversion.TOLERANCE`.
    """
    params = self._convert(state.params, self._drawn())
    converted = dataclasses.replace(self._sparse.begin(params), step=state.step)
    if self._options.optimizer == "copy":
      moments = self._copy_moments(state.opt_state, converted.opt_state)
      converted = dataclasses.replace(converted, opt_state=moments)
    if self._options.centroids == "activations":
      converted = self._with_centroids(converted, batch)
    moments = optimizer.restarted_average(converted.opt_state, converted.params)
    converted = dataclasses.replace(converted, opt_state=moments)
    error = float(
      self._error(
        self._dense.variables(state), self._sparse.variables(converted), batch
      )
    )
    if self._options.preserves_function and not error <= conversion.TOLERANCE:
      raise ValueError(
        f"the converted model differs from the dense one by {error:.1e} of the "
        f"largest logit, more than {conversion.TOLERANCE:.0e}; nothing was "
        "written"
      )
    return converted, error

  def _drawn(self) -> dict[tuple[str, ...], jax.Array]:
    if self._new is None:
      self._new = self._sparse.draw(self._new_paths)
    return self._new

  def _converted(self, dense: Tree, new: Tree) -> Tree:
    """Sparse parameters from dense ones, to be traced."""
    shapes = traverse_util.flatten_dict(self._sparse.shapes.params)
    return conversion.convert_params(
      dense,
      traverse_util.unflatten_dict({**shapes, **new}),
      self._rules,
      self._options,
    )

  def _rows(self, batch: steps.Batch) -> steps.Batch:
    """Rows that fit on the devices, taken apart as a step does."""
    parts = self._sparse.settings.microbatches
    return jax.tree.map(
      lambda x: x.reshape(-1, parts, *x.shape[1:])[:, 0], batch
    )

  def _with_centroids(
    self, state: train_state.TrainState, batch: steps.Batch
  ) -> train_state.TrainState:
    sparse = self._sparse
    centroids = conversion.cluster_centroids(
      sparse.model, sparse.variables(state), self._rows(batch), self._options
    )
    params = traverse_util.flatten_dict(state.params, sep="/")
    params = traverse_util.unflatten_dict({**params, **centroids}, sep="/")
    return dataclasses.replace(
      state, params=jax.device_put(params, sparse.shardings.params)
    )

  def _function_error(
    self, dense: Tree, sparse: Tree, batch: steps.Batch
  ) -> jax.Array:
    """Largest relative error of sparse logits, in training and at test.

    To be traced; the dense network runs once for both. Experts that are kept in
    bfloat16 are compared with feed-forwards that are, too.
    """
    rows = self._rows(batch)
    params = traverse_util.flatten_dict(dense["params"], sep="/")
    params = {path: x.astype(self._kept[path]) for path, x in params.items()}
    dense = {**dense, "params": traverse_util.unflatten_dict(params, sep="/")}

    def logits(program: steps.Program, variables: Tree, train: bool):
      config = dataclasses.replace(program.model.config, dtype="float32")
      network = model_lib.Transformer(config, program.model.mesh)
      return model_lib.forward(
        network, variables, rows, train=train, enable_dropout=False
      )[0]

    with jax.default_matmul_precision("float32"):
      expected = logits(self._dense, dense, False)
      errors = [
        conversion.relative_error(
          expected,
          logits(self._sparse, sparse, train),
          rows["decoder_loss_weights"],
        )
        for train in (True, False)
      ]
    return jnp.max(jnp.stack(errors))
