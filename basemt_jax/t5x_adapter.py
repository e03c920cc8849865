"""The same network and loss, shaped as T5X expects a model and an optimizer.

Axes: B batch, L length, N directions.

T5X (google-research/t5x) is not on PyPI and is not imported here: its trainer
takes any object with the right methods. `Model` and `OptimizerDef` have them,
and what they compute is `steps`' and `optimizer`'s own, so that a checkpoint
of either trainer is one of the other's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import seqio
from clu import metrics as clu_metrics
from flax import struct
from flax.core import freeze, unfreeze

from basemt_jax import checkpointing, losses, translation
from basemt_jax import model as model_lib

Array = jax.Array
Tree = Any


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
    updates, param_states = self.optimizer_def.optimizer.update(
      grads, self.state.param_states, self.target
    )
    target = jax.tree.map(
      lambda p, u: p + learning_rate * u, self.target, updates
    )
    return self.replace(
      target=target,
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
  """Any Optax chain of `basemt_jax.optimizer`, as T5X's optimizer_def.

  Unlike T5X's own Optax wrapper it uses the trainer's learning rate, and
  derives the sharding of any Optax state, not only of those in a table.
  """

  def __init__(self, optimizer: optax.GradientTransformation):
    self.optimizer = optimizer

  def create(self, params: Tree) -> Optimizer:
    """A new state for these parameters, held in plain dictionaries."""
    params = unfreeze(params)
    state = OptimizerState(
      jnp.zeros((), jnp.int32), self.optimizer.init(params)
    )
    return Optimizer(self, state, params)

  def derive_logical_axes(
    self, optimizer: Optimizer, param_logical_axes: Tree
  ) -> Optimizer:
    """The optimizer with logical axes (or None) in place of arrays."""
    axes = unfreeze(param_logical_axes)

    def moment(leaf: Any, names: Any, param: Any) -> Any:
      return names if jnp.shape(leaf) == jnp.shape(param) else None

    param_states = optax.tree_utils.tree_map_params(
      self.optimizer,
      moment,
      optimizer.state.param_states,
      axes,
      optimizer.target,
      transform_non_params=lambda _: None,
    )
    return optimizer.replace(
      target=axes,
      state=OptimizerState(None, param_states),  # type: ignore[arg-type]
    )


class Model:
  """The translation model, with the methods that T5X calls.

  Args:
    network: vocab_size -> `model.TransformerConfig`; gin binds the class.
    vocabulary: The mixture's SeqIO vocabulary.
    optimizer: A chain of `basemt_jax.optimizer`.
    label_smoothing: See `losses.token_losses`.
    z_loss: See `losses.token_losses`.
    search: How to translate.
    mesh: The partitioner's; None: one device.
  """

  FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

  def __init__(
    self,
    network: Callable[..., model_lib.TransformerConfig],
    vocabulary: seqio.Vocabulary,
    optimizer: optax.GradientTransformation,
    label_smoothing: float = 0.1,
    z_loss: float = 1e-4,
    search: translation.SearchOptions | None = None,
    mesh: Any = None,
  ):
    config = network(vocab_size=-(-vocabulary.vocab_size // 128) * 128)
    self.module = model_lib.Transformer(config, mesh)
    self.input_vocabulary = self.output_vocabulary = vocabulary
    self.optimizer_def = OptimizerDef(optimizer)
    self._label_smoothing, self._z_loss = label_smoothing, z_loss
    self._search = search or translation.SearchOptions()

  def get_initial_variables(
    self,
    rng: Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> Tree:
    """Parameters, prices and their axes; nothing that only reports."""
    del input_types
    tokens = jnp.ones(input_shapes["encoder_input_tokens"], jnp.int32)
    targets = jnp.ones(input_shapes["decoder_target_tokens"], jnp.int32)
    variables = dict(
      self.module.init(rng, tokens, targets, targets, train=True)
    )
    variables.pop("intermediates", None)
    return freeze(variables)

  def loss_fn(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    dropout_rng: Array | None,
    flax_mutables: Tree | None = None,
  ) -> tuple[Array, Any]:
    """(loss, metrics), or (loss, (metrics, mutables)) with prices."""
    mutables = unfreeze(flax_mutables) if flax_mutables else {}
    logits, updates = model_lib.forward(
      self.module,
      {"params": params, **mutables},
      batch,
      train=True,
      enable_dropout=dropout_rng is not None,
      dropout_rng=dropout_rng,
    )
    intermediates = updates.pop("intermediates")
    loss, metrics = self._loss(logits, batch, intermediates)
    if not mutables:
      return loss, metrics
    return loss, (metrics, freeze(updates))

  def eval_fn(
    self,
    params: Tree,
    batch: Mapping[str, Array],
    flax_mutables: Tree | None = None,
  ) -> tuple[Array, dict[str, Any]]:
    """(loss, metrics) with test-time routing."""
    mutables = unfreeze(flax_mutables) if flax_mutables else {}
    logits, updates = model_lib.forward(
      self.module, {"params": params, **mutables}, batch, train=False
    )
    return self._loss(logits, batch, updates["intermediates"])

  def _loss(
    self, logits: Array, batch: Mapping[str, Array], intermediates: Tree
  ) -> tuple[Array, dict[str, Any]]:
    rows = losses.loss_sums(
      logits,
      batch["decoder_target_tokens"],
      batch["decoder_loss_weights"],
      self._label_smoothing,
      self._z_loss,
    )
    sums = {name: jnp.sum(row) for name, row in rows.items()}
    auxiliary = losses.auxiliary_loss(intermediates)
    loss = sums["loss"] / sums["weight"] + auxiliary
    metrics = {
      name: clu_metrics.Average(sums[name], sums["weight"])
      for name in ("loss", "nll")
    }
    metrics["accuracy"] = clu_metrics.Average(sums["correct"], sums["weight"])
    one_direction = jnp.zeros(logits.shape[0], jnp.int32)
    router = losses.router_sums(
      intermediates, one_direction, 1, self.module.config.num_experts
    )
    for layer, values in router.items():
      tokens = jnp.sum(values["favourite"])
      metrics[f"router/{layer}/agreement"] = clu_metrics.Average(
        jnp.sum(values["agreement"]), tokens
      )
      metrics[f"router/{layer}/entropy"] = clu_metrics.Average(
        values["entropy"], jnp.ones(())
      )
    return loss, metrics

  def predict_batch(
    self, params: Tree, batch: Mapping[str, Array], rng: Array | None = None
  ) -> Array:
    """Best translations [B, L] int32."""
    return self.predict_batch_with_aux(params, batch, rng)[0]

  def predict_batch_with_aux(
    self, params: Tree, batch: Mapping[str, Array], rng: Array | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """Best translations [B, L] int32, and {'scores': [B] float32}."""
    del rng
    tokens = batch["encoder_input_tokens"].astype(jnp.int32)
    max_length = batch["decoder_input_tokens"].shape[1]
    lengths = jnp.sum(tokens > 0, axis=-1)
    found = translation.search(
      self.module,
      {"params": _as_float32(params)},
      tokens,
      jnp.minimum(self._search.limit(lengths), max_length),
      max_length,
      self._search,
    )
    return found.ids[:, 0], {"scores": found.scores[:, 0]}

  def score_batch(self, params: Tree, batch: Mapping[str, Array]) -> Array:
    """Log-probability [B] float32 of each row's targets."""
    logits, _ = model_lib.forward(
      self.module, {"params": _as_float32(params)}, batch, train=False
    )
    rows = losses.loss_sums(
      logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    )
    return -rows["nll"]


def _as_float32(params: Tree) -> Tree:
  """T5X's infer restores bfloat16; routing and norms want float32."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def vocabulary_of(mixture_or_task: Any) -> seqio.Vocabulary:
  """The vocabulary of a mixture's or task's targets."""
  if isinstance(mixture_or_task, str):
    mixture_or_task = seqio.get_mixture_or_task(mixture_or_task)
  return mixture_or_task.output_features["targets"].vocabulary
