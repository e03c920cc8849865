"""Optax chains and learning-rate schedules.

A chain here ends in descent directions for learning rate 1; the trainer
multiplies by the learning rate of the *training* step. Schedules thus go on
through a conversion that resets the optimizer's own state, and T5X's trainer,
which passes a rate too, drives the same optimizer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from basemt_jax import ranges

Schedule = Callable[..., float]


def adamw(
  b1: ranges.Fraction = 0.9,
  b2: ranges.Fraction = 0.98,
  eps: ranges.NotNegative = 1e-9,
  weight_decay: ranges.Decay = 0.0,
  max_grad_norm: ranges.Positive | None = 1.0,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (arXiv:1711.05101) and clipping.

  The defaults for b2 and eps are those of translation models
  (arXiv:1706.03762).

  Args:
    b1: Decay of the mean of gradients.
    b2: Decay of the mean of squared gradients.
    eps: Added to the root.
    weight_decay: Per step and unit of learning rate; matrices only.
    max_grad_norm: Global norm gradients are clipped to; None: not clipped.
  """
  return _chain(
    max_grad_norm,
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    weight_decay,
  )


def adafactor(
  decay_rate: ranges.Fraction = 0.8,
  weight_decay: ranges.Decay = 0.0,
  max_grad_norm: ranges.Positive | None = None,
  min_dim_size_to_factor: ranges.Count = 128,
) -> optax.GradientTransformation:
  """Adafactor (arXiv:1804.04235): second moments factored by row and column.

  Updates are not scaled by the parameters' size, so the learning rate means
  the same as for `adamw`.

  Args:
    decay_rate: Exponent of the decay of second moments.
    weight_decay: As in `adamw`.
    max_grad_norm: As in `adamw`; updates are clipped to a root mean square of
      1 in any case.
    min_dim_size_to_factor: Smaller matrices keep a full second moment.
  """
  return _chain(
    max_grad_norm,
    optax.chain(
      optax.scale_by_factored_rms(
        decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
      ),
      optax.clip_by_block_rms(1.0),
    ),
    weight_decay,
  )


def _chain(
  max_grad_norm: float | None,
  direction: optax.GradientTransformation,
  weight_decay: float,
) -> optax.GradientTransformation:
  parts = [direction]
  if max_grad_norm is not None:
    parts.insert(0, optax.clip_by_global_norm(max_grad_norm))
  if weight_decay:
    # Norm scales, gates and prices of experts are not matrices.
    parts.append(optax.add_decayed_weights(weight_decay, mask=_matrices))
  return optax.chain(*parts, optax.scale(-1.0))


def _matrices(params):
  return jax.tree.map(lambda p: p.ndim >= 2, params)


def inverse_square_root(
  peak: ranges.Rate, warmup_steps: ranges.Count
) -> Schedule:
  """Linear warm-up to `peak`, then peak * sqrt(warmup_steps / step).

  Step 0 has the rate of step 1, so the first update is not lost.
  """

  def rate(step):
    step = jnp.maximum(step, 1.0)
    return peak * jnp.minimum(
      step / warmup_steps, jnp.sqrt(warmup_steps / step)
    )

  return rate


def linear_decay(
  peak: ranges.Rate, warmup_steps: ranges.Steps, train_steps: ranges.Count
) -> Schedule:
  """Linear warm-up to `peak`, then linear to 0 at `train_steps` (BASE's)."""
  return _warm_then(
    peak,
    warmup_steps,
    optax.linear_schedule(peak, 0.0, max(1, train_steps - warmup_steps)),
  )


def cosine_decay(
  peak: ranges.Rate,
  warmup_steps: ranges.Steps,
  train_steps: ranges.Count,
  final: ranges.Share = 0.0,
) -> Schedule:
  """Linear warm-up to `peak`, then half a cosine to `final * peak`."""
  return _warm_then(
    peak,
    warmup_steps,
    optax.cosine_decay_schedule(
      peak, max(1, train_steps - warmup_steps), alpha=final
    ),
  )


def _warm_then(peak: float, warmup_steps: int, decay: Schedule) -> Schedule:
  warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def rewarm(rate: Schedule, start: int, steps: int) -> Schedule:
  """`rate`, with a second linear warm-up of `steps` steps from step `start`.

  For the sparse phase: its optimizer state is new, so its first updates are
  the least certain.
  """

  def rewarmed(step):
    ramp = jnp.clip((step - start + 1.0) / (steps + 1.0), 0.0, 1.0)
    return rate(step) * jnp.where(step < start, 1.0, ramp)

  return rewarmed
