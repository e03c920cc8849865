"""Optimizers against Optax's own complete ones; schedules against formulas."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from basemt_jax import optimizer, rounding


def run(tx, params, grads):
  state = tx.init(params)
  for gradient in grads:
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def problem():
  rng = np.random.RandomState(0)
  make = lambda: {  # noqa: E731
    "kernel": jnp.asarray(rng.normal(size=(8, 6)).astype(np.float32)),
    "scale": jnp.asarray(rng.normal(size=6).astype(np.float32)),
  }
  return make(), [make() for _ in range(4)]


def test_adamw_is_optax_adamw_on_matrices():
  params, grads = problem()
  mine = optimizer.adamw(
    0.01, b2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=None
  )
  theirs = optax.adamw(
    0.01,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    mask={"kernel": True, "scale": False},
  )
  a, b = run(mine, params, grads), run(theirs, params, grads)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_clipping_bounds_the_global_norm_before_adam():
  params, grads = problem()
  huge = [jax.tree.map(lambda g: 1e6 * g, grads[0]), *grads[1:]]
  clip = optax.clip_by_global_norm(1.0)
  clipped = [clip.update(g, clip.init(params))[0] for g in huge]
  a = run(optimizer.adamw(0.01, max_grad_norm=1.0), params, huge)
  b = run(optimizer.adamw(0.01, max_grad_norm=None), params, clipped)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_adafactor_factors_large_matrices_and_descends():
  params = {"kernel": jnp.ones((256, 128)), "scale": jnp.ones(4)}
  tx = optimizer.adafactor(0.1)
  sizes = [leaf.size for leaf in jax.tree.leaves(tx.init(params))]
  assert max(sizes) <= 256
  grads = jax.tree.map(jnp.ones_like, params)
  after = run(tx, params, [grads])
  jax.tree.map(lambda p: np.testing.assert_allclose(p, 0.9, rtol=1e-3), after)


def test_schedules_at_their_corners():
  rate = optimizer.inverse_square_root(2.0, 100)
  np.testing.assert_allclose(rate(0), 0.02, rtol=1e-6)
  np.testing.assert_allclose(rate(100), 2.0)
  np.testing.assert_allclose(rate(400), 1.0)
  for make in (optimizer.linear_decay, optimizer.cosine_decay):
    rate = make(2.0, 100, 1100)
    np.testing.assert_allclose(rate(100), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(600), 1.0, rtol=1e-6)
    np.testing.assert_allclose(rate(1100), 0.0, atol=1e-6)
    assert 0 < float(rate(0)) < 0.1


@pytest.mark.parametrize("step, factor", [(9, 1), (10, 1 / 5), (13, 4 / 5)])
def test_rewarm_ramps_once_from_its_start(step, factor):
  rate = optimizer.rewarm(lambda _: jnp.float32(3.0), 10, 4)
  np.testing.assert_allclose(rate(step), 3.0 * factor, rtol=1e-6)
  np.testing.assert_allclose(rate(100), 3.0)


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 4, 12), (3, 12, 4)])
def test_muon_is_optax_muon_on_each_kernel_and_adam_elsewhere(shape):
  rng = np.random.RandomState(1)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  params = {
    "experts": {"kernel": make(*shape)},
    "embedding": make(8, 6),
    "expert_centroids": make(3, 8),
  }
  grads = [jax.tree.map(lambda p: make(*p.shape), params) for _ in range(3)]
  found = run(
    optimizer.muon(0.1, max_grad_norm=None, dtype="float32"), params, grads
  )
  for i in range(3):  # An expert's matrix is as if it were alone.
    alone = optax.contrib.muon(0.1, eps=1e-9, consistent_rms=0.2)
    expected = run(
      alone,
      {"w": params["experts"]["kernel"][i]},
      [{"w": g["experts"]["kernel"][i]} for g in grads],
    )
    np.testing.assert_allclose(
      found["experts"]["kernel"][i], expected["w"], atol=1e-5
    )
  nadam = optax.nadam(0.1, b2=0.98, eps=1e-9)
  adam = run(nadam, params, grads)
  for name in ("embedding", "expert_centroids"):
    np.testing.assert_allclose(found[name], adam[name], atol=1e-5)


@hypothesis.given(
  hypothesis.strategies.floats(2.0**-90, 2.0**90, width=32),
  hypothesis.strategies.integers(0, 2**31 - 1),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_rounding_at_random_is_right_on_average(value, salt):
  x = jnp.full((64, 64), value, jnp.float32)
  found = np.asarray(rounding.round_at_random(x, salt), np.float64)
  below = np.float64(np.uint32(x[0, 0].view(jnp.uint32) >> 16 << 16).view("f4"))
  spacing = 2.0 ** (np.floor(np.log2(value)) - 7)
  assert set(np.unique(found)) <= {below, below + spacing}
  # 4,096 draws: five standard errors of the mean of a coin.
  assert abs(found.mean() - np.float64(x[0, 0])) < 5 * spacing * 0.5 / 64
  negative = rounding.round_at_random(-x, salt)
  np.testing.assert_array_equal(np.asarray(negative, np.float64), -found)


def test_rounding_at_random_leaves_what_is_exact_or_not_finite():
  exact = jnp.asarray([0.0, 1.5, -(2.0**100), jnp.inf, -jnp.inf], jnp.float32)
  np.testing.assert_array_equal(rounding.round_at_random(exact, 3), exact)
  assert jnp.isnan(rounding.round_at_random(jnp.float32(jnp.nan), 3))


def test_updates_of_parameters_in_bfloat16_are_kept_on_average():
  params = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(4)}
  tx = optax.sgd(2.0**-12)  # A 32nd of the distance to the next number.
  state = rounding.init(tx, params)
  gradients = jax.tree.map(lambda p: -jnp.ones_like(p), params)
  for step in range(64):
    params, state = rounding.updated(
      tx, gradients, state, params, jnp.int32(step)
    )
  assert params["a"].dtype == jnp.bfloat16
  moved = np.asarray(params["a"], np.float64) - 1
  # Each of 64 steps has a chance of 1/32 of a move by 2^-7: five standard
  # errors of the mean of 4,096.
  assert abs(moved.mean() - 2.0**-6) < 5 * 2.0**-7 * (64 / 32 / 4096) ** 0.5
  np.testing.assert_array_equal(params["b"], 1 + 2.0**-6)


def test_bfloat16_moments_follow_those_of_float32():
  params = {"w": jnp.zeros((64, 32)), "scale": jnp.ones(32)}
  rng = np.random.RandomState(0)
  grads = [
    jax.tree.map(
      lambda p: jnp.asarray(1 + rng.normal(size=p.shape), jnp.float32), params
    )
    for _ in range(50)
  ]
  exact = run(optimizer.adamw(0.01), params, grads)
  tx = optimizer.adamw(0.01, moments="bfloat16")
  kept = jax.tree.leaves(tx.init(params))
  assert [x.dtype for x in kept if x.ndim] == [jnp.bfloat16] * 4
  found = run(tx, params, grads)
  for name in params:
    # An error of 2^-9 of each update would add up to 0.2% if it were biased.
    distance = exact[name] - params[name]
    error = (found[name] - exact[name]) / jnp.abs(distance).mean()
    assert jnp.abs(error).max() < 0.02
    # Five standard errors of the mean of errors of 0.3%.
    assert abs(error.mean()) < 5 * 0.003 / error.size**0.5


def expert_problem():
  rng = np.random.RandomState(2)
  make = lambda: {  # noqa: E731
    "experts": rng.normal(size=(3, 8, 6)).astype(np.float32),
    "kernel": rng.normal(size=(8, 6)).astype(np.float32),
    "scale": rng.normal(size=6).astype(np.float32),
  }
  return make(), [make() for _ in range(4)]


@pytest.mark.parametrize("norm", [None, 1.0])
def test_moments_by_neuron_are_those_of_each_expert_alone(norm):
  params, grads = expert_problem()
  tx = optimizer.adamw(
    1.0, b2=0.9, max_grad_norm=norm, expert_moments="by_neuron"
  )
  state = tx.init(params)
  square = np.zeros((3, 6))
  for step, gradients in enumerate(grads, 1):
    total = np.sqrt(
      sum((g.astype("f8") ** 2).sum() for g in gradients.values())
    )
    g = gradients["experts"] * (1.0 if norm is None else 1.0 / total)
    updates, state = tx.update(gradients, state, params)
    for e in range(3):
      square[e] = 0.9 * square[e] + 0.1 * (g[e] ** 2).mean(0)
      expected = -g[e] / np.sqrt(square[e] / (1 - 0.9**step))
      np.testing.assert_allclose(updates["experts"][e], expected, rtol=2e-5)
    np.testing.assert_allclose(state[0].nu["experts"], square, rtol=1e-5)
    assert state[0].mu["experts"] == optax.MaskedNode()


def test_moments_by_neuron_leave_all_else_to_adam():
  params, grads = expert_problem()
  arguments = {"weight_decay": 0.1, "moments": "bfloat16"}
  found = run(
    optimizer.adamw(0.01, expert_moments="by_neuron", **arguments),
    *(params, grads),
  )
  expected = run(optimizer.adamw(0.01, **arguments), params, grads)
  for name in ("kernel", "scale"):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
  assert not np.allclose(found["experts"], expected["experts"], rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_muon_is_exact_where_matrices_have_few_directions(rank):
  rng = np.random.default_rng(rank)
  grad = rng.normal(size=(16, rank)) @ rng.normal(size=(rank, 64))
  expected = grad / np.linalg.norm(grad)
  for _ in range(5):  # As published, in float64.
    square = expected @ expected.T
    mixed = -4.775 * square + 2.0315 * square @ square
    expected = 3.4445 * expected + mixed @ expected
  tx = optimizer.muon(1.0, max_grad_norm=None, dtype="float32")
  params = {"kernel": jnp.asarray(grad, jnp.float32)}
  update, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(
    -update["kernel"] / (0.2 * 64**0.5), expected, atol=1e-3
  )


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 20, 20)])
def test_muon_in_bfloat16_makes_singular_values_nearly_equal(shape):
  grad = {"kernel": jax.random.normal(jax.random.key(0), shape)}
  tx = optimizer.muon(1.0, max_grad_norm=None)
  update, _ = tx.update(grad, tx.init(grad), grad)
  found = np.linalg.svd(update["kernel"], compute_uv=False)
  found = found / (0.2 * max(shape[-2:]) ** 0.5)
  exact = np.linalg.svd(grad["kernel"], compute_uv=False)
  far = exact > 0.05 * exact.max()  # What is nearly 0 rises in five steps.
  assert found[far].min() > 0.6
  assert found.max() < 1.3


def test_an_average_spans_a_ninth_at_first_and_then_its_own_length():
  tx = optimizer.averaged(optax.sgd(1.0), 0.5)
  params = {"w": jnp.float32(0.0)}
  state = tx.init(params)
  values, expected = [], 0.0
  for step in range(1, 30):
    updates, state = tx.update({"w": jnp.float32(-1.0)}, state, params)
    params = optax.apply_updates(params, updates)
    decay = min(0.5, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * step
    values.append(float(state.average["w"]))
    np.testing.assert_allclose(values[-1], expected, rtol=1e-5)
  assert values[0] == pytest.approx(9 / 11)
  # A line's exponential average lags by decay / (1 - decay) = 1 step.
  assert values[-1] == pytest.approx(29 - 1, abs=1e-3)
  again = optimizer.restarted_average(state, {"w": jnp.float32(7.0)})
  assert (float(again.average["w"]), int(again.updates)) == (7.0, 0)
  assert optimizer.restarted_average(state.inner, params) is state.inner
  with pytest.raises(ValueError, match=r"is 1\.0, not in"):
    optimizer.averaged(optax.sgd(1.0), 1.0)


@pytest.mark.parametrize("name", ["lion", "sgd", "adamw", "rmsprop"])
def test_an_optimizer_of_optax_has_the_rate_of_the_step(name):
  """As Optax's own with the schedule, which counts the same steps."""
  params, grads = problem()
  schedule = optimizer.inverse_square_root(0.1, 2)
  expected = run(getattr(optax, name)(schedule), params, grads)
  settings = toy.settings(optimizer=getattr(optax, name))
  state = settings.transformation().init(params)
  for step, gradient in enumerate(grads):
    tx = settings.transformation(schedule(step))
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), params, expected
  )


def test_a_rate_is_not_applied_twice():
  with pytest.raises(ValueError, match=r"learning rate already.*@optax\.lion"):
    toy.settings(optimizer=optax.lion(0.1))
