"""Routers against plain loops; dispatch and combine with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basemt_jax import routing


def scores(num_tokens, num_experts, seed=0):
  draw = np.random.default_rng(seed)
  return draw.normal(size=(num_tokens, num_experts)).astype(np.float32)


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def plain_top_k(affinities, mask, num_selected, capacity):
  """(expert, slot) of every choice: first choices first, then token order."""
  num_tokens, num_experts = affinities.shape
  expert = np.argsort(-affinities, axis=1)[:, :num_selected]
  slot = np.full((num_tokens, num_selected), num_experts * capacity)
  load = np.zeros(num_experts, int)
  for k in range(num_selected):
    for s in range(num_tokens):
      e = expert[s, k]
      if mask[s]:
        if load[e] < capacity:
          slot[s, k] = e * capacity + load[e]
        load[e] += 1
  return expert, slot


@pytest.mark.parametrize("num_selected", [1, 2])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.25, 8.0])
def test_top_k_matches_a_loop(num_selected, capacity_factor):
  affinities = scores(24, 4)
  affinities[:, 0] += 1.0
  mask = np.arange(24) % 5 != 0
  router = routing.TopKRouter(num_selected, capacity_factor)
  capacity = router.capacity(24, 4)
  plan = jax.jit(router.plan)(affinities, mask, np.zeros(4, np.float32))
  expert, slot = plain_top_k(affinities, mask, num_selected, capacity)
  np.testing.assert_array_equal(plan.expert, expert)
  np.testing.assert_array_equal(plan.slot, slot)
  gate = np.take_along_axis(softmax(affinities), expert, 1) * mask[:, None]
  np.testing.assert_allclose(plan.gate, gate, rtol=1e-5)
  assert plan.source.shape == (4 * capacity,)
  for s in range(24):
    for k in range(num_selected):
      if slot[s, k] < 4 * capacity:
        assert plan.source[slot[s, k]] == s * num_selected + k
  used = (slot < 4 * capacity).sum()
  assert (np.asarray(plan.source) < 24 * num_selected).sum() == used


def test_switch_losses():
  affinities = scores(12, 3)
  mask = np.arange(12) < 9
  router = routing.TopKRouter(1, 1.0, 0.5, 0.25)
  plan = jax.jit(router.plan)(affinities, mask, np.zeros(3, np.float32))
  real = affinities[:9]
  # Fedus et al. 2021, equations 4 to 6, by hand.
  load = np.bincount(real.argmax(axis=1), minlength=3) / 9
  balance = 3 * (load * softmax(real).mean(axis=0)).sum()
  z_loss = (np.log(np.exp(real).sum(axis=1)) ** 2).mean()
  expected = 0.5 * balance + 0.25 * z_loss
  np.testing.assert_allclose(plan.auxiliary_loss, expected, rtol=1e-5)


def test_balanced_load_has_auxiliary_loss_one():
  affinities = 50 * np.tile(np.eye(4, dtype=np.float32), (6, 1))
  router = routing.TopKRouter(auxiliary_loss_weight=1.0)
  plan = jax.jit(router.plan)(
    affinities, np.ones(24, bool), np.zeros(4, np.float32)
  )
  np.testing.assert_allclose(plan.auxiliary_loss, 1.0, rtol=1e-5)


def test_balanced_router():
  affinities = scores(32, 4)
  affinities[:, 1] += 2.0
  mask = np.arange(32) < 30
  router = routing.BalancedRouter()
  plan = jax.jit(router.plan)(affinities, mask, np.zeros(4, np.float32))
  assert np.bincount(np.ravel(plan.expert)).tolist() == [8, 8, 8, 8]
  assert sorted(np.ravel(plan.slot)) == list(range(32))
  np.testing.assert_array_equal(
    np.asarray(plan.source)[np.ravel(plan.slot)], np.arange(32)
  )
  picked = np.take_along_axis(affinities, np.asarray(plan.expert), 1)
  expected = 1 / (1 + np.exp(-picked)) * mask[:, None]
  np.testing.assert_allclose(plan.gate, expected, rtol=1e-5)
  assert float(plan.auxiliary_loss) == 0.0
  plain = routing.BalancedRouter(prices_at_test=False)
  choice = jax.jit(plain.choose)(affinities, mask, plan.prices)
  np.testing.assert_array_equal(
    choice.expert[:30, 0], affinities[:30].argmax(axis=1)
  )


def test_prices_at_test_time():
  affinities = scores(256, 4)
  affinities[:, 1] += 2.0
  mask = np.ones(256, bool)
  router = routing.BalancedRouter()
  plan = jax.jit(router.plan)(affinities, mask, np.zeros(4, np.float32))
  choice = jax.jit(router.choose)(affinities, mask, plan.prices)
  load = np.bincount(np.ravel(choice.expert), minlength=4)
  assert abs(load - 64).max() <= 4


def test_gates_are_differentiable_and_assignments_constant():
  affinities = jnp.asarray(scores(8, 4))
  mask = jnp.ones(8, bool)

  def total(a):
    plan = routing.BalancedRouter().plan(a, mask, jnp.zeros(4))
    return jnp.sum(plan.gate), plan.expert

  gradient, expert = jax.jit(jax.grad(total, has_aux=True))(affinities)
  share = jax.nn.sigmoid(affinities)
  chosen = jax.nn.one_hot(expert[:, 0], 4)
  np.testing.assert_allclose(gradient, chosen * share * (1 - share), rtol=1e-5)


@pytest.mark.parametrize(
  "router",
  [routing.BalancedRouter(), routing.TopKRouter(2, 0.75)],
  ids=["balanced", "top 2"],
)
def test_dispatch_and_combine(router):
  num_groups, num_tokens, num_experts, width = 3, 10, 4, 6
  affinities = scores(num_groups * num_tokens, num_experts).reshape(
    num_groups, num_tokens, num_experts
  )
  mask = np.ones((num_groups, num_tokens), bool)
  plans = jax.jit(jax.vmap(router.plan, (0, 0, None)))(
    affinities, mask, np.zeros(num_experts, np.float32)
  )
  moves = routing.dispatcher(plans, num_experts)
  rows = jnp.asarray(scores(num_groups * num_tokens, width, seed=1))
  slots = jax.jit(moves.dispatch)(rows)
  capacity = router.capacity(num_tokens, num_experts)
  assert slots.shape == (num_experts, num_groups * capacity, width)
  # Every expert multiplies by its own number, so that mixing up would show.
  factor = jnp.arange(1.0, num_experts + 1)[:, None, None]

  def there_and_back(rows):
    return moves.combine(moves.dispatch(rows) * factor)

  result = np.asarray(jax.jit(there_and_back)(rows))
  expected = np.zeros_like(result)
  weight = np.zeros(num_groups * num_tokens)
  num_slots = num_experts * capacity
  for g in range(num_groups):
    for s in range(num_tokens):
      n = g * num_tokens + s
      for k in range(router.num_selected_experts):
        if plans.slot[g, s, k] < num_slots:
          e = int(plans.expert[g, s, k])
          expected[n, k] = np.asarray(rows[n]) * (e + 1)
          weight[n] += e + 1
  np.testing.assert_allclose(result, expected, rtol=1e-6)
  gradient = jax.jit(jax.grad(lambda r: jnp.sum(there_and_back(r))))(rows)
  expected_gradient = np.tile(weight[:, None], (1, width))
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)
  text = jax.jit(jax.grad(lambda r: jnp.sum(there_and_back(r) ** 2)))
  assert "scatter" not in text.lower(rows).as_text()


def test_bad_options():
  with pytest.raises(ValueError, match="at least 1 expert"):
    routing.TopKRouter(num_selected_experts=0)
  with pytest.raises(ValueError, match="must be positive"):
    routing.TopKRouter(capacity_factor=0.0)
  router = routing.TopKRouter(num_selected_experts=5)
  with pytest.raises(ValueError, match="there are 4 experts"):
    router.choose(scores(8, 4), np.ones(8, bool), np.zeros(4, np.float32))
