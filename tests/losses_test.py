"""Losses against float64 NumPy, written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basemt_jax import losses


def reference(logits, target, smoothing, z_loss):
  """Cross-entropy of one token in float64, from the definition."""
  logits = np.asarray(logits, np.float64)
  log_z = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
  log_p = logits - log_z
  vocab = len(logits)
  q = np.full(vocab, smoothing / (vocab - 1))
  q[target] = 1 - smoothing
  entropy = -np.sum(q * np.log(q, where=q > 0, out=np.zeros(vocab)))
  return -np.sum(q * log_p) - entropy + z_loss * log_z**2, -log_p[target]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_token_losses_match_the_definition(smoothing, z_loss):
  rng = np.random.RandomState(0)
  logits = rng.normal(size=(2, 3, 11)).astype(np.float32) * 4
  targets = rng.randint(11, size=(2, 3))
  loss, nll, correct = losses.token_losses(
    jnp.asarray(logits), jnp.asarray(targets), smoothing, z_loss
  )
  for i, j in np.ndindex(2, 3):
    expected = reference(logits[i, j], targets[i, j], smoothing, z_loss)
    np.testing.assert_allclose(loss[i, j], expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(nll[i, j], expected[1], rtol=1e-5, atol=1e-5)
    assert correct[i, j] == (logits[i, j].argmax() == targets[i, j])


def test_perfect_prediction_under_smoothing_costs_nothing():
  vocab, smoothing = 7, 0.2
  q = np.full(vocab, smoothing / (vocab - 1), np.float32)
  q[3] = 1 - smoothing
  loss, _, _ = losses.token_losses(
    jnp.log(q)[None, None], jnp.array([[3]]), smoothing
  )
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_sums_leave_padding_out_and_add_up_over_any_split():
  rng = np.random.RandomState(1)
  logits = jnp.asarray(rng.normal(size=(6, 5, 9)).astype(np.float32))
  targets = jnp.asarray(rng.randint(9, size=(6, 5)))
  weights = jnp.asarray((rng.uniform(size=(6, 5)) > 0.4).astype(np.float32))
  whole = losses.loss_sums(logits, targets, weights, 0.1, 1e-3)
  parts = [
    losses.loss_sums(logits[s], targets[s], weights[s], 0.1, 1e-3)
    for s in (slice(0, 2), slice(2, 6))
  ]
  for name, value in whole.items():
    joined = jnp.concatenate([p[name] for p in parts])
    np.testing.assert_allclose(value, joined, rtol=1e-6)
  poisoned = jnp.where(weights[..., None] > 0, logits, 50.0)
  again = losses.loss_sums(poisoned, targets, weights, 0.1, 1e-3)
  np.testing.assert_allclose(whole["loss"], again["loss"], rtol=1e-6)
  np.testing.assert_array_equal(whole["weight"], weights.sum(-1))


def test_by_direction_is_a_grouped_sum():
  rows = jnp.array([1.0, 2.0, 4.0, 8.0])
  direction = jnp.array([2, 0, 2, 1])
  np.testing.assert_array_equal(
    losses.by_direction(rows, direction, 4), [2.0, 8.0, 5.0, 0.0]
  )


def test_router_sums_count_tokens_by_direction_and_expert():
  rng = np.random.RandomState(2)
  rows, length, experts, directions = 5, 7, 4, 3
  expert = rng.randint(-1, experts, size=(rows, length))
  favourite = np.where(
    expert < 0, -1, rng.randint(experts, size=(rows, length))
  )
  direction = rng.randint(directions, size=rows)
  intermediates = {
    "decoder": {
      "layers_1": {
        "base_layer": {
          "expert": (jnp.asarray(expert),),
          "favourite": (jnp.asarray(favourite),),
          "routing_entropy": (jnp.float32(0.5),),
          "auxiliary_loss": (jnp.float32(0.25),),
        }
      }
    }
  }
  sums = losses.router_sums(
    intermediates, jnp.asarray(direction), directions, experts
  )["decoder/layers_1"]
  for name, choice in (("expert", expert), ("favourite", favourite)):
    table = np.zeros((directions, experts))
    for i, j in np.ndindex(rows, length):
      if choice[i, j] >= 0:
        table[direction[i], choice[i, j]] += 1
    np.testing.assert_array_equal(sums[name], table)
  agreement = np.zeros(directions)
  for i, j in np.ndindex(rows, length):
    agreement[direction[i]] += expert[i, j] == favourite[i, j] != -1
  np.testing.assert_array_equal(sums["agreement"], agreement)
  assert float(losses.auxiliary_loss(intermediates)) == 0.25
  assert float(losses.auxiliary_loss({})) == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-1])
def test_gradients_are_those_of_finite_differences(smoothing, z_loss):
  rng = np.random.RandomState(3)
  logits = rng.normal(size=(2, 3, 8)) * 3
  targets = rng.randint(8, size=(2, 3))
  weights = rng.normal(size=(2, 2, 3))  # Of loss and nll.

  def total(x):
    pairs = np.array(
      [
        [reference(x[i, j], targets[i, j], smoothing, z_loss) for j in range(3)]
        for i in range(2)
      ]
    )
    return np.sum(weights * np.moveaxis(pairs, -1, 0))

  def program(x):
    loss, nll, _ = losses.token_losses(
      x, jnp.asarray(targets), smoothing, z_loss
    )
    return jnp.sum(loss * weights[0]) + jnp.sum(nll * weights[1])

  gradient = jax.grad(program)(jnp.asarray(logits, jnp.float32))
  expected = np.zeros_like(logits)
  for index in np.ndindex(*logits.shape):
    for sign in (1, -1):
      moved = logits.copy()
      moved[index] += sign * 1e-6
      expected[index] += sign * total(moved) / 2e-6
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_loss_of_infinite_and_nan_logits_is_not_finite():
  for bad in (np.nan, np.inf):
    logits = jnp.zeros((1, 1, 4)).at[0, 0, 2].set(bad)
    loss, nll, _ = losses.token_losses(logits, jnp.array([[1]]), 0.1, 1e-4)
    assert not np.isfinite(loss).any()
    assert not np.isfinite(nll).any()
