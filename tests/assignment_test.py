"""Balanced assignment: guarantees on any input, quality against the optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy import optimize

from basemt_jax import assignment

balanced = jax.jit(assignment.balanced_assignment)

# Fixed shape of the tests on properties, so that the solver compiles once.
S, E = 22, 5
C = 5


def realistic(num_tokens, num_experts, seed, batches=2):
  """Scores of drifting, clustered features: Zipf clusters and a common mean."""
  draw = np.random.default_rng(seed)
  width, clusters = 64, 200
  share = np.arange(1, clusters + 1) ** -1.1
  centres = draw.normal(size=(clusters, width))
  mean = 2 * draw.normal(size=width)
  centroids = draw.normal(size=(num_experts, width))
  result = []
  for _ in range(batches):
    which = draw.choice(clusters, size=num_tokens, p=share / share.sum())
    noise = 0.5 * draw.normal(size=(num_tokens, width))
    features = centres[which] + mean + noise
    result.append((features @ centroids.T).astype(np.float32))
    for part in (centres, mean, centroids):
      part += 0.02 * draw.normal(size=part.shape)
  return result


def optimum(affinities, prices=None):
  """The best balanced total, by SciPy: every expert's column C times.

  Any prices [E] may be taken off the columns if all slots are filled: every
  assignment pays the same then. Good ones save SciPy nearly all its time.
  """
  num_tokens, num_experts = affinities.shape
  columns = np.repeat(np.arange(num_experts), -(-num_tokens // num_experts))
  values = affinities[:, columns].astype(np.float64)
  paid = 0
  if prices is not None:
    assert len(columns) == num_tokens
    paid = np.asarray(prices, np.float64)[columns]
  row, column = optimize.linear_sum_assignment(values - paid, maximize=True)
  return values[row, column].sum()


def quality(affinities, expert, prices=None):
  values = affinities.astype(np.float64)
  score = values[np.arange(len(values)), np.asarray(expert)].sum()
  random = values.mean(axis=1).sum()
  return (score - random) / (optimum(affinities, prices) - random)


def check(result, num_tokens, num_experts, mask=None):
  """The guarantees that hold for any input."""
  capacity = -(-num_tokens // num_experts)
  expert, slot = np.asarray(result.expert), np.asarray(result.slot)
  assert expert.dtype == slot.dtype == np.int32
  assert len(set(slot.tolist())) == num_tokens
  assert slot.min() >= 0 and slot.max() < num_experts * capacity
  np.testing.assert_array_equal(expert, slot // capacity)
  mask = np.ones(num_tokens, bool) if mask is None else mask
  assert np.bincount(expert[mask], minlength=num_experts).max() <= capacity
  prices = np.asarray(result.prices)
  assert np.isfinite(prices).all()
  assert abs(prices.mean()) <= 1e-5 * (1 + np.abs(prices).max())


@pytest.mark.parametrize(
  ("num_tokens", "num_experts"),
  [(128, 4), (512, 8), (512, 64), (64, 64), (4096, 64)],
)
def test_near_optimal_cold_and_warm(num_tokens, num_experts):
  first, second = realistic(num_tokens, num_experts, seed=1)
  cold = balanced(first)
  check(cold, num_tokens, num_experts)
  assert quality(first, cold.expert, cold.prices) >= 0.999
  warm = balanced(second, None, cold.prices)
  check(warm, num_tokens, num_experts)
  assert quality(second, warm.expert, warm.prices) >= 0.999


def test_tight_clusters_cold_and_warm():
  """Few sorts of tokens, in other numbers in the next batch."""
  num_tokens, num_experts = 1024, 8
  for seed in range(6):
    draw = np.random.default_rng(seed)
    centres = 3 * draw.normal(size=(2 * num_experts, 32))
    centroids = draw.normal(size=(32, num_experts)) / np.sqrt(32)
    share = draw.dirichlet(np.full(len(centres), 0.5))
    first, second = (
      (
        (
          centres[draw.choice(len(centres), num_tokens, p=share)]
          + 0.05 * draw.normal(size=(num_tokens, 32))
        )
        @ centroids
      ).astype(np.float32)
      for _ in range(2)
    )
    cold = balanced(first)
    assert quality(first, cold.expert, cold.prices) >= 0.999
    # A weak spot: see docs/performance.md.
    warm = balanced(second, None, cold.prices)
    assert quality(second, warm.expert, warm.prices) >= 0.998


@pytest.mark.parametrize(
  ("num_tokens", "num_experts"), [(16, 8), (7, 3), (3, 8), (1, 4), (5, 1)]
)
def test_small_groups(num_tokens, num_experts):
  for seed in range(20):
    (affinities,) = realistic(num_tokens, num_experts, seed, batches=1)
    result = balanced(affinities)
    check(result, num_tokens, num_experts)
    if num_experts > 1:
      assert quality(affinities, result.expert) >= 0.99
  assert balanced(affinities).prices.shape == (num_experts,)


def test_nearly_equal_tokens_are_split():
  draw = np.random.default_rng(0)
  few = draw.normal(size=(6, E)).astype(np.float32)
  equal = few[draw.integers(0, 6, size=S)]
  near = equal + 1e-3 * draw.normal(size=(S, E)).astype(np.float32)
  for affinities in (equal, near):
    result = balanced(affinities)
    check(result, S, E)
    assert quality(affinities, result.expert) >= 0.99


extreme = st.sampled_from(
  [0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30, 3e38, 1e-45]
)


@settings(deadline=None, max_examples=60)
@given(
  values=st.lists(
    extreme | st.floats(width=32), min_size=S * E, max_size=S * E
  ),
  mask=st.lists(st.booleans(), min_size=S, max_size=S),
  prices=st.lists(extreme, min_size=E, max_size=E),
)
def test_any_input_gives_a_balanced_assignment(values, mask, prices):
  affinities = np.array(values, np.float32).reshape(S, E)
  mask = np.array(mask)
  check(balanced(affinities, mask), S, E, mask)
  warm = balanced(affinities, mask, np.array(prices, np.float32))
  check(warm, S, E, mask)


@pytest.mark.parametrize(
  "affinities",
  [
    np.zeros((S, E), np.float32),
    np.full((S, E), np.nan, np.float32),
    np.full((S, E), np.inf, np.float32),
    np.tile(np.arange(E, dtype=np.float32), (S, 1)),
    np.tile(np.arange(S, dtype=np.float32)[:, None], (1, E)),
  ],
  ids=["zero", "nan", "inf", "one favourite", "constant rows"],
)
def test_degenerate_scores(affinities):
  check(balanced(affinities), S, E)


def test_many_experts_with_many_slots_on_adversarial_scores():
  """Where tokens bid for the last slots; more tokens are late than may bid."""
  num_tokens, num_experts = 33 * 64 - 5, 33
  draw = np.random.default_rng(0)
  normal = draw.normal(size=(num_tokens, num_experts)).astype(np.float32)
  favourite = np.tile(np.arange(num_experts, dtype=np.float32), (num_tokens, 1))
  few = np.repeat(normal[:7], 302, axis=0)[:num_tokens]
  extreme_values = np.where(draw.random(normal.shape) < 0.3, np.inf, normal)
  for affinities in (
    np.zeros_like(normal),
    favourite,
    few,
    extreme_values.astype(np.float32),
    np.full_like(normal, np.nan),
  ):
    for mask in (np.ones(num_tokens, bool), draw.random(num_tokens) < 0.4):
      check(balanced(affinities, mask), num_tokens, num_experts, mask)
  # Some slots stay free, which the optimum by SciPy knows too.
  assert quality(normal, balanced(normal).expert) >= 0.999


def test_infinite_scores_rank_as_extremes():
  affinities = np.zeros((S, E), np.float32)
  affinities[3, 2] = np.inf
  affinities[4, :] = -np.inf
  affinities[4, 1] = 0.0
  affinities[5, :] = np.nan
  affinities[5, 4] = 0.0
  expert = balanced(affinities).expert
  assert expert[3] == 2 and expert[4] == 1 and expert[5] == 4


@settings(deadline=None, max_examples=15)
@given(
  seed=st.integers(0, 1000), scale=st.sampled_from([2.0**-90, 0.5, 2.0**90])
)
def test_row_shifts_and_scale_change_nothing(seed, scale):
  draw = np.random.default_rng(seed)
  # Small integers over 64, so that shifts and scales are exact.
  affinities = draw.integers(-256, 256, size=(S, E)).astype(np.float32) / 64
  expert = balanced(affinities).expert
  shift = draw.integers(-64, 64, size=(S, 1)).astype(np.float32)
  shifted = balanced(affinities + shift)
  np.testing.assert_array_equal(shifted.expert, expert)
  scaled = balanced(affinities * np.float32(scale))
  value = np.take_along_axis(affinities, np.asarray(expert)[:, None], 1).sum()
  scaled_value = np.take_along_axis(
    affinities, np.asarray(scaled.expert)[:, None], 1
  ).sum()
  # Logarithms of the scale are rounded: ties may fall differently.
  assert abs(value - scaled_value) <= 0.01 * abs(value) + 0.1


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000))
def test_padding_is_ignored(seed):
  draw = np.random.default_rng(seed)
  mask = draw.random(S) < 0.7
  affinities = draw.normal(size=(S, E)).astype(np.float32)
  other = affinities.copy()
  other[~mask] = draw.choice(
    [np.nan, np.inf, 1e30, 5.0], size=((~mask).sum(), E)
  )
  result, changed = balanced(affinities, mask), balanced(other, mask)
  check(result, S, E, mask)
  np.testing.assert_array_equal(result.expert, changed.expert)
  np.testing.assert_array_equal(result.prices, changed.prices)


def test_padding_leaves_room():
  """With half the slots free, tokens compete only where an expert is full."""
  draw = np.random.default_rng(3)
  affinities = draw.normal(size=(S, E)).astype(np.float32)
  affinities[:, 0] += 1.0
  mask = np.arange(S) < S // 2
  expert = np.asarray(balanced(affinities, mask).expert)[mask]
  columns = np.repeat(np.arange(E), C)
  values = affinities[mask][:, columns]
  row, column = optimize.linear_sum_assignment(values, maximize=True)
  best = values[row, column].sum()
  random = affinities[mask].mean(axis=1).sum()
  score = affinities[mask][np.arange(mask.sum()), expert].sum()
  assert (score - random) / (best - random) >= 0.99


def test_same_answer_every_time_and_without_jit():
  (affinities,) = realistic(S, E, 5, batches=1)
  first, second = balanced(affinities), balanced(affinities)
  plain = assignment.balanced_assignment(affinities)
  for a, b, c in zip(first, second, plain, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)


def test_vmap_and_shard_map_equal_a_loop():
  groups = np.stack([realistic(S, E, seed, batches=1)[0] for seed in range(8)])
  mask = np.random.default_rng(0).random((8, S)) < 0.8
  many = jax.vmap(assignment.balanced_assignment)
  together = jax.jit(many)(groups, mask)
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  sharded = jax.jit(
    jax.shard_map(many, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  )(groups, mask)
  for g in range(8):
    alone = balanced(groups[g], mask[g])
    for result in (together, sharded):
      np.testing.assert_array_equal(result.expert[g], alone.expert)
      np.testing.assert_array_equal(result.slot[g], alone.slot)
      np.testing.assert_allclose(result.prices[g], alone.prices, atol=1e-4)


def test_prices_favour_who_is_wanted_least():
  (affinities,) = realistic(128, 4, 0, batches=1)
  affinities[:, 2] += 100.0
  prices = np.asarray(balanced(affinities).prices)
  assert prices.argmax() == 2
  # Prices solve the dual: choosing by affinity minus price is nearly balanced.
  load = np.bincount((affinities - prices).argmax(axis=1), minlength=4)
  assert abs(load - 32).max() <= 4


def test_zero_prices_mean_none_yet():
  (affinities,) = realistic(128, 4, 0, batches=1)
  affinities[:, 2] += 100.0
  result = balanced(affinities, None, jnp.zeros(4))
  assert quality(affinities, result.expert) >= 0.99


def test_greedy():
  affinities = np.array(
    [[1, 3, 2], [5, 5, 1], [np.nan, -9, np.nan]], np.float32
  )
  expert = assignment.greedy_assignment(affinities)
  np.testing.assert_array_equal(expert, [1, 0, 1])
  mask = np.array([False, True, True])
  expert = assignment.greedy_assignment(affinities, mask)
  np.testing.assert_array_equal(expert, [0, 0, 1])
