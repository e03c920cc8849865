"""Optimizers against Optax's own complete ones; schedules against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basemt_jax import optimizer


def run(tx, params, grads, rate=None):
  state = tx.init(params)
  for gradient in grads:
    updates, state = tx.update(gradient, state, params)
    params = jax.tree.map(
      lambda p, u: p + (1.0 if rate is None else rate) * u, params, updates
    )
  return params


def problem():
  rng = np.random.RandomState(0)
  make = lambda: {  # noqa: E731
    "kernel": jnp.asarray(rng.normal(size=(8, 6)).astype(np.float32)),
    "scale": jnp.asarray(rng.normal(size=6).astype(np.float32)),
  }
  return make(), [make() for _ in range(4)]


def test_adamw_times_rate_is_optax_adamw():
  params, grads = problem()
  mine = optimizer.adamw(
    b2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=None
  )
  theirs = optax.adamw(
    0.01,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    mask={"kernel": True, "scale": False},
  )
  a, b = run(mine, params, grads, 0.01), run(theirs, params, grads)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_clipping_bounds_the_global_norm_before_adam():
  params, grads = problem()
  huge = [jax.tree.map(lambda g: 1e6 * g, grads[0]), *grads[1:]]
  clip = optax.clip_by_global_norm(1.0)
  clipped = [clip.update(g, clip.init(params))[0] for g in huge]
  a = run(optimizer.adamw(max_grad_norm=1.0), params, huge, 0.01)
  b = run(optimizer.adamw(max_grad_norm=None), params, clipped, 0.01)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_adafactor_factors_large_matrices_and_descends():
  params = {"kernel": jnp.ones((256, 128)), "scale": jnp.ones(4)}
  tx = optimizer.adafactor()
  sizes = [leaf.size for leaf in jax.tree.leaves(tx.init(params))]
  assert max(sizes) <= 256
  grads = jax.tree.map(jnp.ones_like, params)
  after = run(tx, params, [grads], 0.1)
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
