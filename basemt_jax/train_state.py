"""The state that training changes: its parts, its beginning, its places.

Everything that a step's result depends on, but for the batch, is in it; a
checkpoint holds it as a nested dictionary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from basemt_jax import checkpointing, optimizer, partitioning, rounding
from basemt_jax import model as model_lib

Array = jax.Array
Tree = Any


@struct.dataclass
class TrainState:
  """What a step changes.

  Attributes:
    step: [] int32, steps done.
    params: Nested dict of arrays, float32 but for experts kept in bfloat16.
    opt_state: Optax state.
    mutables: Other collections by name: {'prices': ...}, or {}.
  """

  step: Array
  params: Tree
  opt_state: Tree
  mutables: Tree

  def tree(self) -> dict[str, Any]:
    """The state as the nested dictionary that checkpoints hold."""
    return checkpointing.state_dict(
      self.params, self.opt_state, self.step, self.mutables
    )

  def from_tree(self, tree: dict[str, Any]) -> "TrainState":
    """A state of this one's types with a checkpoint's arrays."""
    return TrainState(
      step=tree["state"]["step"],
      params=tree["target"],
      opt_state=checkpointing.restored_opt_state(
        self.opt_state, tree["state"].get("param_states", {})
      ),
      mutables=tree.get("flax_mutables", {}),
    )


def keys(seed: int) -> tuple[Array, Array]:
  """Keys of the initialisation and of dropout, derived as T5X does."""
  init, dropout = jax.random.split(jax.random.key(seed))
  return init, dropout


def init_state(
  model: model_lib.Transformer,
  tx: optax.GradientTransformation,
  key: Array,
) -> tuple[TrainState, dict[str, Tree]]:
  """A new state, and the logical axes of its variables (`*_axes`)."""
  tokens = jnp.ones((1, 8), jnp.int32)  # Parameters do not depend on it.
  variables = dict(model.init(key, tokens, tokens, tokens, train=True))
  variables.pop("intermediates", None)
  params = variables.pop("params")
  axes = {k: variables.pop(k) for k in list(variables) if k.endswith("_axes")}
  step = jnp.zeros((), jnp.int32)
  opt_state = rounding.init(tx, params)
  return TrainState(step, params, opt_state, variables), axes


def state_shardings(
  state: TrainState,
  axes: dict[str, Tree],
  tx: optax.GradientTransformation,
  mesh: Mesh,
) -> TrainState:
  """Shardings of a state (given by its shapes), from the logical axes."""
  params = partitioning.variable_shardings(
    state.params, axes["params_axes"], mesh
  )
  replicated = partitioning.replicated(mesh)

  def moment(leaf: Any, sharding: NamedSharding, param: Any) -> NamedSharding:
    # Factored moments have lost an axis; experts stay on their devices.
    spec = (*sharding.spec, *(None,) * (param.ndim - len(sharding.spec)))
    axes = partitioning.moment_axes(spec, param.shape, leaf.shape)
    return NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

  return TrainState(
    step=replicated,  # type: ignore[arg-type]
    params=params,
    opt_state=optimizer.map_moments(
      tx, moment, state.opt_state, params, state.params, other=replicated
    ),
    mutables={
      name: partitioning.variable_shardings(tree, axes[f"{name}_axes"], mesh)
      for name, tree in state.mutables.items()
    },
  )
