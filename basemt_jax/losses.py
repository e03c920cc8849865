"""Losses as plain sums, so that any split of a batch adds up exactly.

Axes: B batch, L length, V vocabulary, N directions.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from basemt_jax import metrics

Array = jax.Array


def token_losses(
  logits: Array,
  targets: Array,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[Array, Array, Array]:
  """Smoothed cross-entropy of every token.

  With smoothing s the target distribution is 1 - s on the target and
  s / (V - 1) on each other token; the entropy of that distribution is
  subtracted, so a perfect prediction has loss 0 (as in T5X).

  Args:
    logits: [B, L, V] float32.
    targets: [B, L] int32.
    label_smoothing: s, in [0, 1).
    z_loss: Weight of log(Z)^2, which keeps logits near normalised
      (arXiv:2204.02311, section 5).

  Returns:
    loss: [B, L] float32, z-loss included, in nats.
    nll: [B, L] float32, the plain negative log-likelihood.
    correct: [B, L] bool, whether no logit is larger than the target's.
  """
  return _token_losses(label_smoothing, z_loss, logits, targets)


# Logits are the largest array of a step by far, so passes over them count:
# the gradient in closed form is one, and needs nothing saved but the logits.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_losses(
  label_smoothing: float, z_loss: float, logits: Array, targets: Array
) -> tuple[Array, Array, Array]:
  """`token_losses`, whose gradient is below."""
  return _token_losses_forward(label_smoothing, z_loss, logits, targets)[0]


def _token_losses_forward(label_smoothing, z_loss, logits, targets):
  vocab_size = logits.shape[-1]
  largest = jnp.max(logits, axis=-1)
  # An infinite largest logit makes the loss infinite or NaN, never the
  # difference of two infinities hidden here.
  log_z = largest + jnp.log(
    jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
  )
  of_target = _pick(logits, targets)
  nll = log_z - of_target
  loss = nll
  if label_smoothing:
    confidence, low = _target_distribution(label_smoothing, vocab_size)
    # sum_v q_v (log Z - l_v), with q low everywhere but at the target.
    all_nll = vocab_size * log_z - jnp.sum(logits, axis=-1)
    entropy = -(
      confidence * jnp.log(confidence)
      + (vocab_size - 1) * low * jnp.log(low + 1e-20)
    )
    loss = (confidence - low) * nll + low * all_nll - entropy
  loss = loss + z_loss * jnp.square(log_z)
  return (loss, nll, of_target == largest), (logits, targets, log_z)


def _token_losses_backward(label_smoothing, z_loss, saved, cotangents):
  """`(1 + 2 z log Z) p_v - q_v` of the loss, `p_v - 1[v]` of nll."""
  logits, targets, log_z = saved
  loss, nll, _ = cotangents
  confidence, low = _target_distribution(label_smoothing, logits.shape[-1])
  shares = jnp.exp(logits - log_z[..., None])
  tokens = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
  is_target = tokens == targets[..., None]
  of_share = (1.0 + 2.0 * z_loss * log_z) * loss + nll
  of_target = (confidence - low) * loss + nll
  gradient = of_share[..., None] * shares - (low * loss)[..., None]
  gradient -= jnp.where(is_target, of_target[..., None], 0.0)
  return gradient, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _target_distribution(
  label_smoothing: float, vocab_size: int
) -> tuple[float, float]:
  """Probability of the target and of each other token."""
  return 1.0 - label_smoothing, label_smoothing / (vocab_size - 1)


def _pick(values: Array, index: Array) -> Array:
  """Picks one value a token: `values[b, l, index[b, l]]`."""
  return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def loss_sums(
  logits: Array,
  targets: Array,
  weights: Array,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> dict[str, Array]:
  """Sums over each row; dividing is left to whoever knows the whole batch.

  Of `token_losses`, whose arguments these are, and weights [B, L] float32, 0 on
  padding.

  Returns:
    `loss`, `nll`, `correct` (no logit is larger) and `weight`, each [B]
    float32.
  """
  loss, nll, correct = token_losses(logits, targets, label_smoothing, z_loss)
  return {
    "loss": jnp.sum(loss * weights, axis=-1),
    "nll": jnp.sum(nll * weights, axis=-1),
    "correct": jnp.sum(jnp.where(correct, weights, 0.0), axis=-1),
    "weight": jnp.sum(weights, axis=-1),
  }


def by_direction(row_sums: Array, direction: Array, count: int) -> Array:
  """Adds row sums [B] up per direction (int32 [B]): [count] float32."""
  return jax.ops.segment_sum(row_sums, direction, num_segments=count)


def router_sums(
  intermediates: dict, direction: Array, count: int, num_experts: int
) -> dict[str, dict[str, Array]]:
  """What the experts' routers did, added up per layer and direction.

  Of what layers sow as `intermediates`: `expert` and `favourite` [B, L] int32
  (-1 on padding), `routing_entropy` [] and `auxiliary_loss` [].

  Returns:
    By layer path ('decoder/layers_1'): `expert` and `favourite` [N, E], tokens
    of each direction at each expert, `agreement` [N], tokens routed to their
    favourite, `entropy` [], `auxiliary_loss` []; all float32.
  """
  sums = {}
  for path, layer in _expert_layers(intermediates):
    expert, favourite = layer["expert"][0], layer["favourite"][0]

    def table(choice: Array) -> Array:
      # One column past the last expert takes the padding.
      column = jnp.where(choice < 0, num_experts, choice)
      flat = direction[:, None] * (num_experts + 1) + column
      size = count * (num_experts + 1)
      counts = jnp.zeros(size, jnp.float32).at[flat.reshape(-1)].add(1.0)
      return counts.reshape(count, num_experts + 1)[:, :num_experts]

    agree = jnp.sum((expert == favourite) & (expert >= 0), axis=-1)
    sums[path] = {
      "expert": table(expert),
      "favourite": table(favourite),
      "agreement": by_direction(agree.astype(jnp.float32), direction, count),
      "entropy": layer["routing_entropy"][0],
      "auxiliary_loss": layer["auxiliary_loss"][0],
    }
  return sums


def auxiliary_loss(intermediates: dict) -> Array:
  """Sum of the routers' own losses, [] float32; 0 without experts."""
  total = jnp.zeros((), jnp.float32)
  for _, layer in _expert_layers(intermediates):
    total += layer["auxiliary_loss"][0]
  return total


def _expert_layers(tree: dict, path: tuple[str, ...] = ()):
  """Pairs (path, sown values) of every layer of experts, in path order."""
  if "auxiliary_loss" in tree:
    yield "/".join(path).removesuffix("/base_layer"), tree
    return
  for name in sorted(tree):
    if isinstance(tree[name], dict):
      yield from _expert_layers(tree[name], (*path, name))


def measured(
  eval_step: Callable[[Any, Any], Mapping[str, Any]],
  variables: Any,
  batches: Iterable[Any],
  directions: Sequence[str],
  own: Sequence[metrics.Metric] = (),
) -> dict[str, float]:
  """The loss, and metrics besides, of a split: by full name without the split.

  Args:
    eval_step: (variables, batch) -> sums, as `steps.eval_step`.
    variables: The model's.
    batches: Global arrays; rows of weight 0 fill up.
    directions: N names.
    own: The run's own metrics.
  """
  total: Any = None
  for batch in batches:
    sums = eval_step(variables, batch)
    total = sums if total is None else jax.tree.map(jnp.add, total, sums)
  if total is None:
    return {}
  known = (metrics.named("loss"), *own)
  return metrics.scalars(jax.device_get(total), directions, known)
