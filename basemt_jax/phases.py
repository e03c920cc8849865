"""The phases of a run: dense, then sparse, with the network and rate of each.

A run of experts with `steps.Settings.dense_steps` trains the same network with
plain feed-forwards first; any other run has one phase.
"""

import dataclasses

from jax.sharding import Mesh

from basemt_jax import model as model_lib
from basemt_jax import optimizer, steps


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
