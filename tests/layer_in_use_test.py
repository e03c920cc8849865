"""BaseLayer and the assignment in other people's programs.

Against the layer called plainly: 64 bits, vmap, scan, remat, half precision,
buffers that are given away.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from basemt_jax import assignment, base_layer

B, L, D, E = 4, 6, 8, 4


def layer(**options):
  return base_layer.BaseLayer(E, 16, rows_per_group=2, **options)


@functools.cache
def inputs():
  return np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)


def variables_of(module, h):
  variables = dict(module.init(jax.random.key(0), h, train=True))
  return {name: variables[name] for name in ("params", "prices")}


@functools.partial(jax.jit, static_argnames=("module", "train"))
def apply(module, variables, h, train=True):
  return module.apply(variables, h, train=train, mutable=["prices"])


@functools.partial(jax.jit, static_argnames="module")
def gradients(module, variables, h):
  def loss(params, h):
    out, _ = module.apply(
      {**variables, "params": params}, h, train=True, mutable=["prices"]
    )
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))

  return jax.grad(loss, argnums=(0, 1))(variables["params"], h)


def close(found, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(b, np.float64), tolerance, tolerance
    ),
    found,
    expected,
  )


@pytest.mark.parametrize("experts", [4, 40])
@pytest.mark.parametrize("is_warm", [False, True])
def test_assignment_does_not_depend_on_64_bits(experts, is_warm):
  draw = np.random.default_rng(experts)
  # 40 experts with 64 slots and more go the way of bids.
  tokens = 67 * experts
  scores = draw.normal(size=(tokens, experts)).astype(np.float32)
  mask = draw.random(tokens) < 0.9
  prices = draw.normal(size=experts).astype(np.float32) if is_warm else None
  expected = jax.jit(assignment.balanced_assignment)(scores, mask, prices)
  with jax.enable_x64(True):
    found = jax.jit(assignment.balanced_assignment)(scores, mask, prices)
  assert found.expert.dtype == found.slot.dtype == np.int32
  assert found.prices.dtype == np.float32
  np.testing.assert_array_equal(found.expert, expected.expert)
  np.testing.assert_array_equal(found.slot, expected.slot)
  np.testing.assert_allclose(found.prices, expected.prices, rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_with_64_bits(train):
  h = inputs()
  variables = variables_of(layer(), h)
  expected, _ = apply(layer(), variables, h, train)
  with jax.enable_x64(True):
    found, updates = apply(layer(), variables, h, train)
    assert found.dtype == np.float32
    assert updates["prices"]["prices"].dtype == np.float32
    close(found, expected)
    if train:
      close(gradients(layer(), variables, h), gradients(layer(), variables, h))
      found, _ = apply(layer(), variables, h.astype(np.float64))
      assert found.dtype == np.float64
      close(found, expected)


def test_under_vmap():
  """Each of several layers on inputs of its own."""
  h = np.stack([inputs(), inputs()[::-1] * 1.5])
  module = layer()
  keys = jax.random.split(jax.random.key(0))
  init = functools.partial(module.init, train=True)
  stacked = dict(jax.vmap(init)(keys, h))
  stacked = {name: stacked[name] for name in ("params", "prices")}

  def call(variables, h):
    return module.apply(variables, h, train=True, mutable=["prices"])

  found = jax.jit(jax.vmap(call))(stacked, h)
  for i in range(2):
    own = jax.tree.map(lambda x, i=i: x[i], stacked)
    expected = apply(module, own, h[i])
    close(jax.tree.map(lambda x, i=i: x[i], found), expected)


class Scanned(nn.Module):
  """Three layers in a scan, and their prices with them."""

  remat: bool = False

  @nn.compact
  def __call__(self, h, train):
    def call(block, h):
      return block(h, train=train)

    if self.remat:
      call = nn.remat(call)

    def body(block, h, _):
      return call(block, h), None

    scan = nn.scan(
      body,
      variable_axes={"params": 0, "prices": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=3,
    )
    block = base_layer.BaseLayer(E, 16, rows_per_group=2, name="layers")
    return scan(block, h, None)[0]


def test_in_a_scan():
  h = inputs()
  variables = variables_of(Scanned(), h)
  found, updates = apply(Scanned(), variables, h)
  out, prices = h, []
  for i in range(3):
    own = {
      name: jax.tree.map(lambda x, i=i: x[i], variables[name]["layers"])
      for name in ("params", "prices")
    }
    out, changed = apply(layer(), own, out)
    prices.append(changed["prices"]["prices"])
  close(found, out)
  close(updates["prices"]["layers"]["prices"], np.stack(prices))
  assert not np.allclose(prices[0], prices[1])


def test_gradients_in_a_scan_with_remat():
  h = inputs()
  variables = variables_of(Scanned(), h)
  close(
    gradients(Scanned(remat=True), variables, h),
    gradients(Scanned(), variables, h),
  )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_in_half_precision_out(dtype):
  h = jnp.asarray(inputs(), dtype)
  module = layer(dtype=dtype)
  variables = variables_of(layer(), np.asarray(h, np.float32))
  found, updates = apply(module, variables, h)
  assert found.dtype == dtype
  assert updates["prices"]["prices"].dtype == np.float32
  # Routing is in float32 for the same, rounded tokens: the same experts.
  expected, same = apply(layer(), variables, h.astype(jnp.float32))
  close(updates, same)
  close(found, expected, 40 * float(jnp.finfo(dtype).eps))
  for part in jax.tree.leaves(gradients(module, variables, h)):
    assert np.isfinite(np.asarray(part, np.float32)).all()


def test_buffers_given_away():
  h = inputs()
  module = layer()
  variables = variables_of(module, h)
  expected = variables
  for _ in range(3):
    _, updates = apply(module, expected, h)
    expected = {**expected, **updates}

  @functools.partial(jax.jit, donate_argnums=0)
  def step(variables, h):
    _, updates = module.apply(variables, h, train=True, mutable=["prices"])
    return {**variables, **updates}

  given = jax.tree.map(jnp.copy, variables)
  for _ in range(3):
    given = step(given, h)
  close(given, expected)
