"""BaseLayer against per-token loops, and sharded against unsharded."""

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st
from jax.sharding import Mesh

from basemt_jax import base_layer, experts, layers, routing

B, L, D, F = 16, 6, 8, 16


def mesh_of(data, expert, model):
  devices = np.array(jax.devices()[: data * expert * model])
  return Mesh(devices.reshape(data, expert, model), ("data", "expert", "model"))


@functools.cache
def inputs():
  draw = np.random.default_rng(0)
  h = draw.normal(size=(B, L, D)).astype(np.float32)
  h[:, :, 0] += 1.0
  mask = np.arange(L)[None] < draw.integers(2, L + 1, size=(B, 1))
  return jnp.asarray(h), jnp.asarray(mask)


def make(num_experts=4, **options):
  options = {"rows_per_group": 2, **options}
  return base_layer.BaseLayer(num_experts, F, **options)


def variables_of(layer):
  h, mask = inputs()
  variables = layer.init(jax.random.key(0), h, mask, train=True)
  scale = 5.0  # affinities that matter
  params = {**variables["params"]}
  params["expert_centroids"] = scale * params["expert_centroids"]
  return {"params": params, "prices": variables["prices"]}


@functools.partial(jax.jit, static_argnames=("layer", "train", "options"))
def jitted(layer, variables, train, h, mask, rngs, options):
  return layer.apply(
    variables,
    h,
    mask,
    train=train,
    mutable=["prices", "intermediates"],
    rngs=rngs,
    **dict(options),
  )


def run(layer, variables, train, h=None, mask=None, rngs=None, **options):
  if h is None:
    h, mask = inputs()
  options = tuple(options.items())
  return jitted(layer, variables, train, h, mask, rngs, options)


def loss_and_gradient(layer, variables, train):
  """Jitted loss, outputs, updates, gradients of parameters and input."""
  h, mask = inputs()

  def loss(params, h):
    out, updates = run(layer, {**variables, "params": params}, train, h, mask)
    auxiliary = updates["intermediates"]["auxiliary_loss"][0]
    return jnp.sum(out * jnp.cos(out)) + auxiliary, (out, updates)

  compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  return compute(variables["params"], h)


def assert_close(actual, expected, tolerance=2e-5):
  def compare(path, a, b):
    np.testing.assert_allclose(
      a,
      b,
      rtol=tolerance,
      atol=tolerance * (float(np.abs(b).max()) + 1e-6),
      err_msg=jax.tree_util.keystr(path),
    )

  jax.tree_util.tree_map_with_path(compare, actual, expected)


def plain_change(params, token, e):
  """f_e(token) - token, in NumPy float64."""
  x = np.asarray(token, np.float64)
  total = np.zeros_like(x)
  for name in sorted(params["experts"]):
    sublayer = params["experts"][name]
    y = x + total
    y = y / np.sqrt((y * y).mean() + 1e-6)
    y = y * np.asarray(sublayer["layer_norm"]["scale"][e])
    hidden = np.maximum(y @ np.asarray(sublayer["wi"]["kernel"][e]), 0)
    total = total + hidden @ np.asarray(sublayer["wo"]["kernel"][e])
  return total


def plain_layer(params, expert, sigmoid=True):
  """The layer's definition, token by token."""
  h, mask = (np.asarray(x) for x in inputs())
  out = h.astype(np.float64)
  for b, i in np.argwhere(mask):
    e = int(expert[b, i])
    affinity = h[b, i] @ np.asarray(params["expert_centroids"][e])
    gate = 1 / (1 + np.exp(-affinity)) if sigmoid else 1.0
    out[b, i] += gate * plain_change(params, h[b, i], e)
  return out


@pytest.mark.parametrize("train", [True, False])
def test_matches_a_loop_over_tokens(train):
  layer = make(num_sublayers=2)
  variables = variables_of(layer)
  out, updates = run(layer, variables, train)
  sown = updates["intermediates"]
  expert = np.asarray(sown["expert"][0])
  h, mask = (np.asarray(x) for x in inputs())
  affinities = h @ np.asarray(variables["params"]["expert_centroids"]).T
  favourite = np.where(mask, affinities.argmax(axis=-1), -1)
  np.testing.assert_array_equal(sown["favourite"][0], favourite)
  np.testing.assert_array_equal(expert == -1, ~mask)
  if train:
    for group in expert.reshape(-1, 2 * L):
      load = np.bincount(group[group >= 0], minlength=4)
      assert load.max() <= 3  # ceil(12 / 4)
  else:
    np.testing.assert_array_equal(expert, favourite)
  assert_close(out, plain_layer(variables["params"], expert))
  shares = np.exp(affinities) / np.exp(affinities).sum(-1, keepdims=True)
  entropy = -(shares * np.log(shares)).sum(-1)[mask].mean()
  np.testing.assert_allclose(sown["routing_entropy"][0], entropy, rtol=1e-5)
  assert float(sown["auxiliary_loss"][0]) == 0.0


@pytest.mark.parametrize("num_tokens", [1, 3, 40, 700])
@pytest.mark.parametrize("skew", ["even", "all to one"])
def test_test_time_drops_nothing(num_tokens, skew):
  layer = make(num_experts=8)
  variables = variables_of(layer)
  draw = np.random.default_rng(1)
  h = draw.normal(size=(1, num_tokens, D)).astype(np.float32)
  if skew == "all to one":
    h += 100 * np.asarray(variables["params"]["expert_centroids"][5])
  out, updates = run(layer, variables, False, h, np.ones(h.shape[:2], bool))
  expert = np.asarray(updates["intermediates"]["expert"][0])[0]
  if skew == "all to one":
    assert (expert == 5).all()
  for i in range(0, num_tokens, max(num_tokens // 40, 1)):
    w = np.asarray(variables["params"]["expert_centroids"][expert[i]])
    gate = 1 / (1 + np.exp(-(h[0, i] @ w)))
    change = plain_change(variables["params"], h[0, i], expert[i])
    np.testing.assert_allclose(
      out[0, i], h[0, i] + gate * change, rtol=1e-4, atol=1e-4
    )


@functools.cache
def every_experts_changes(num_tokens, num_experts):
  """Tokens, and a jitted `run_tokens` of their experts beside all answers."""
  layer = make(num_experts)
  params = variables_of(layer)["params"]
  weights = [
    {"norm": w["layer_norm"]["scale"], "wi": [w["wi"]["kernel"]]}
    | {"wo": w["wo"]["kernel"]}
    for _, w in sorted(params["experts"].items())
  ]
  draw = np.random.default_rng(2)
  tokens = draw.normal(size=(num_tokens, D)).astype(np.float32)
  # The last row is that of tokens which have nothing to do.
  answers = np.zeros((num_experts + 1, num_tokens, D))
  for e in range(num_experts):
    answers[e] = [plain_change(params, token, e) for token in tokens]
  compute = jax.jit(
    lambda expert: experts.run_tokens(
      layer._settings(), tokens, expert, weights, None
    )
  )
  return compute, answers


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  num_tokens=st.sampled_from([5, 700]),
  cuts=st.lists(st.integers(0, 700), min_size=5, max_size=5),
  seed=st.integers(0, 99),
)
def test_every_token_gets_its_expert_whatever_the_loads(num_tokens, cuts, seed):
  num_experts = 5
  compute, answers = every_experts_changes(num_tokens, num_experts)
  expert = np.searchsorted(sorted(cuts), np.arange(num_tokens), side="right")
  expert = np.random.default_rng(seed).permutation(expert)
  change = compute(jnp.asarray(expert[:, None], jnp.int32))[:, 0]
  expected = answers[expert, np.arange(num_tokens)]
  np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(change[expert == num_experts], 0)


@pytest.mark.parametrize("train", [True, False])
def test_converted_layer_is_the_dense_one(train):
  layer = make(converted=True)
  variables = variables_of(layer)
  experts = variables["params"]["experts"]
  same = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), experts)
  variables["params"]["experts"] = same
  out, _ = run(layer, variables, train)
  h, mask = inputs()
  dense = jax.tree.map(lambda w: w[0], same["sublayer_0"])
  block = layers.MlpBlock(F)
  norm = layers.RMSNorm().apply({"params": dense["layer_norm"]}, h)
  y = block.apply(
    {"params": {name: dense[name] for name in ("wi", "wo")}},
    norm,
  )
  expected = jnp.where(mask[:, :, None], h + y, h)
  np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_zero_init_output_is_the_identity():
  layer = make(zero_init_output=True)
  h, _ = inputs()
  out, _ = run(layer, variables_of(layer), True)
  np.testing.assert_array_equal(out, h)


@functools.cache
def unsharded(num_experts, router, train):
  layer = make(num_experts, router=router, activations=("gelu", "linear"))
  variables = variables_of(layer)
  return variables, loss_and_gradient(layer, variables, train)


BALANCED, TOP_2 = routing.BalancedRouter(), routing.TopKRouter(2)


@pytest.mark.parametrize(
  ("shape", "num_experts", "router", "train"),
  [
    ((1, 2, 1), 8, BALANCED, True),
    ((8, 1, 1), 8, BALANCED, True),
    ((2, 4, 1), 4, BALANCED, True),
    ((1, 8, 1), 16, BALANCED, True),
    ((2, 2, 2), 8, BALANCED, True),
    ((2, 2, 1), 8, TOP_2, True),
    ((1, 8, 1), 8, BALANCED, False),
    ((2, 2, 2), 8, TOP_2, False),
  ],
)
def test_sharded_equals_unsharded(shape, num_experts, router, train):
  """Values, routing, prices and all gradients, on 1, 2, 4 and 8 devices."""
  variables, expected = unsharded(num_experts, router, train)
  layer = make(
    num_experts,
    router=router,
    activations=("gelu", "linear"),
    mesh=mesh_of(*shape),
  )
  actual = loss_and_gradient(layer, variables, train)
  routed = actual[0][1][1]["intermediates"]["expert"][0]
  wanted = expected[0][1][1]["intermediates"]["expert"][0]
  np.testing.assert_array_equal(routed, wanted)
  assert_close(actual, expected)


def test_exchange_is_all_to_all():
  layer = make(8, mesh=mesh_of(2, 4, 1))
  variables = variables_of(layer)
  h, mask = inputs()

  @jax.jit
  def gradient(params, h):
    def loss(params, h):
      out = layer.apply({**variables, "params": params}, h, mask, train=True)
      return jnp.sum(out**2)

    return jax.grad(loss, argnums=(0, 1))(params, h)

  text = gradient.lower(variables["params"], h).as_text()
  # Two forward, and their two transposes.
  assert text.count('"stablehlo.all_to_all"') == 4
  assert "all_gather" not in text


def largest_array(function, *arguments):
  """Elements of the largest array of a compiled program, fusions' included."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_training_holds_no_array_of_tokens_by_slots_or_by_experts_widths():
  """Neither a one-hot dispatch [T, E, C] nor all experts' outputs [T, E, D]."""
  tokens, experts, width = 2048, 16, 32
  slots = tokens // experts
  least = tokens * experts * min(slots, width)
  h = jax.ShapeDtypeStruct((8, tokens // 8, width), jnp.float32)
  mask = jax.ShapeDtypeStruct(h.shape[:2], bool)
  layer = base_layer.BaseLayer(experts, 2 * width, rows_per_group=8)
  variables = jax.eval_shape(
    lambda h: layer.init(jax.random.key(0), h, train=True), h
  )

  def step(params, prices, h, mask):
    def loss(params, h):
      out, updates = layer.apply(
        {"params": params, "prices": prices},
        h,
        mask,
        train=True,
        mutable=["prices"],
      )
      return jnp.sum(out**2), updates

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, h)

  def one_hot_step(weights, place, h):
    """The same exchange of tokens by products with [T, E, C]."""

    def loss(weights, h):
      expert, slot = place // slots, place % slots
      to_expert = jax.nn.one_hot(expert, experts)[:, :, None]
      to_slot = jax.nn.one_hot(slot, slots)[:, None, :]
      moves = to_expert * to_slot
      x = jnp.einsum("tec,td->ecd", moves, h)
      y = jnp.einsum("ecd,edf->ecf", x, weights)
      return jnp.sum(jnp.einsum("tec,ecf->tf", moves, y) ** 2)

    return jax.grad(loss, argnums=(0, 1))(weights, h)

  params, prices = variables["params"], variables["prices"]
  assert largest_array(step, params, prices, h, mask) < least
  weights = jax.ShapeDtypeStruct((experts, width, width), jnp.float32)
  place = jax.ShapeDtypeStruct((tokens,), jnp.int32)
  flat = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
  held = largest_array(one_hot_step, weights, place, flat)
  assert held >= tokens * experts * slots


def test_test_batches_of_any_size():
  layer = make(8)
  variables = variables_of(layer)
  sharded = make(8, mesh=mesh_of(2, 4, 1))
  h, mask = (x[:5, :3] for x in inputs())
  out, updates = run(layer, variables, False, h, mask)
  other, other_updates = run(sharded, variables, False, h, mask)
  assert_close(other, out)
  assert_close(other_updates["intermediates"], updates["intermediates"])


def test_prices_follow_training_only():
  layer = make()
  variables = variables_of(layer)
  _, updates = run(layer, variables, True)
  prices = np.asarray(updates["prices"]["prices"])
  assert prices.any()
  h, mask = inputs()
  groups = h.reshape(-1, 2 * L, D)
  centroids = variables["params"]["expert_centroids"]
  plans = jax.jit(jax.vmap(layer.router.plan, (0, 0, None)))(
    groups @ centroids.T, mask.reshape(-1, 2 * L), jnp.zeros(4)
  )
  np.testing.assert_allclose(prices, plans.prices.mean(axis=0), atol=1e-5)
  _, updates = run(layer, variables, False)
  assert not np.asarray(updates["prices"]["prices"]).any()


class Rematerialised(nn.Module):
  """The layer inside nn.remat, as a network's block has it."""

  @nn.compact
  def __call__(self, h, mask, train):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, h, mask):
        options = {"rows_per_group": 2, "dtype": jnp.bfloat16}
        layer = base_layer.BaseLayer(4, F, **options, name="layer")
        return layer(h, mask, train=train)

    nn.share_scope(self, block := nn.remat(Block)())
    return block(h, mask)


def test_remat_and_bfloat16():
  layer = make(dtype=jnp.bfloat16)
  variables = variables_of(layer)
  h, mask = inputs()
  h = h.astype(jnp.bfloat16)
  rematerialised = Rematerialised()
  variables_again = {
    name: {"layer": value} for name, value in variables.items()
  }

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
  def loss(which, params, prices):
    out, updates = which.apply(
      {"params": params, "prices": prices},
      h,
      mask,
      train=True,
      mutable=["prices", "intermediates"],
    )
    assert out.dtype == jnp.bfloat16
    return jnp.sum(out.astype(jnp.float32) ** 2), updates["prices"]

  expected = loss(layer, variables["params"], variables["prices"])
  (value, prices), gradient = loss(
    rematerialised, variables_again["params"], variables_again["prices"]
  )
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
  actual = ((value, prices["layer"]), gradient["layer"])
  assert_close(actual, expected, 1e-2)


@pytest.mark.parametrize("train", [True, False])
def test_dropout(train):
  layer = make(dropout_rate=0.5)
  variables = variables_of(layer)
  sharded = make(dropout_rate=0.5, mesh=mesh_of(2, 4, 1))

  @functools.partial(jax.jit, static_argnums=0)
  def sample(which, seed):
    rngs = {"dropout": jax.random.key(seed)}
    return run(which, variables, train, rngs=rngs, enable_dropout=True)[0]

  samples = [np.asarray(sample(layer, seed)) for seed in range(60)]
  np.testing.assert_array_equal(sample(layer, 0), samples[0])
  assert not np.array_equal(samples[0], samples[1])
  if train:  # Neither devices nor their order change the masks.
    assert_close(np.asarray(sample(sharded, 0)), samples[0])
  plain = run(layer, variables, train, enable_dropout=False)[0]
  error = np.mean(samples, axis=0) - np.asarray(plain)
  # The mean of 60 masks is within a fraction of a single mask's deviation.
  single = np.mean([np.abs(s - plain).mean() for s in samples])
  assert single > 0 and np.abs(error).mean() < 0.3 * single


def test_parameters_and_logical_axes():
  layer = make(activations=("gelu", "linear"))
  h, mask = inputs()
  variables = layer.init(jax.random.key(0), h, mask, train=True)
  shapes = jax.tree.map(jnp.shape, variables["params"])
  assert shapes == {
    "expert_centroids": (4, D),
    "gate_bias": (),
    "gate_scale": (),
    "experts": {
      "sublayer_0": {
        "layer_norm": {"scale": (4, D)},
        "wi_0": {"kernel": (4, D, F)},
        "wi_1": {"kernel": (4, D, F)},
        "wo": {"kernel": (4, F, D)},
      }
    },
  }
  axes = variables["params_axes"]
  assert axes["expert_centroids_axes"].names == ("unmodeled", "embed")
  kernel = axes["experts"]["sublayer_0"]["wi_0"]["kernel_axes"].names
  assert kernel == ("expert", "embed", "expert_mlp")
  assert variables["prices_axes"]["prices_axes"].names == ("unmodeled",)
  # Each expert has the variance of the dense layer: 1 / fan-in.
  kernel = variables["params"]["experts"]["sublayer_0"]["wi_0"]["kernel"]
  np.testing.assert_allclose(np.var(kernel), 1 / D, rtol=0.2)


def test_errors_name_valid_sizes():
  h, mask = inputs()
  layer = make(rows_per_group=3)
  with pytest.raises(ValueError, match="multiple of 3: 3, 6, 9"):
    run(layer, variables_of(layer), True)
  layer = make(rows_per_group=4, mesh=mesh_of(4, 2, 1))
  with pytest.raises(ValueError, match=r"16 rows.*multiple of 32: 32, 64"):
    run(layer, variables_of(make()), True)
  with pytest.raises(ValueError, match=r"num_experts is 6.*multiple"):
    variables_of(make(6, mesh=mesh_of(1, 4, 1)))
  wrong = Mesh(np.array(jax.devices()[:2]), ("data",))
  with pytest.raises(ValueError, match="needs data, expert and model"):
    variables_of(make(mesh=wrong))
  # A small batch on one device is one group.
  out, _ = run(make(rows_per_group=64), variables_of(make()), True, h, mask)
  assert out.shape == h.shape


def test_prices_count_at_test_time():
  """Every token goes to its best affinity minus price, by plain NumPy."""
  layer = make()
  variables = variables_of(layer)
  prices = np.array([0.5, -0.5, 0.0, 0.2], np.float32)
  variables["prices"] = {"prices": jnp.asarray(prices)}
  h, mask = (np.asarray(x) for x in inputs())
  _, updates = run(layer, variables, False)
  affinities = h @ np.asarray(variables["params"]["expert_centroids"]).T
  (expert,) = updates["intermediates"]["expert"]
  best = (affinities - prices).argmax(axis=-1)
  np.testing.assert_array_equal(np.asarray(expert)[mask], best[mask])
  assert (best != affinities.argmax(axis=-1))[mask].any()
