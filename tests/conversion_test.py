"""Conversion: function preserved, experts as stated, nothing silent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from basemt_jax import base_layer, conversion, model, optimizer, routing

DENSE = model.TransformerConfig(
  vocab_size=64,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=2,
  num_decoder_layers=2,
  dropout_rate=0.0,
)
SPARSE = dataclasses.replace(
  DENSE,
  feed_forward="experts",
  encoder_expert_blocks=(0,),
  decoder_expert_blocks=(1,),
  num_experts=4,
  converted=True,
)
VARIANTS = {
  "replace": SPARSE,
  "insert": dataclasses.replace(SPARSE, placement="insert"),
  "gated": dataclasses.replace(SPARSE, mlp_activations=("gelu", "linear")),
  "top-2": dataclasses.replace(
    SPARSE,
    # So much room that nothing is dropped in training.
    router=routing.TopKRouter(num_selected_experts=2, capacity_factor=4.0),
  ),
}
KERNEL = "encoder/layers_0/base_layer/experts/sublayer_0/wi/kernel"


@functools.cache
def drawn(network, seed):
  ones = jnp.ones((16, 4), jnp.int32)
  variables = jax.jit(functools.partial(network.init, train=True))(
    jax.random.key(seed), ones, ones, ones
  )
  variables.pop("intermediates", None)
  return {k: v for k, v in variables.items() if not k.endswith("_axes")}


def init(config, seed):
  network = model.Transformer(config)
  return network, dict(drawn(network, seed))


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def batch(seed=0, rows=16, length=6):
  rng = np.random.RandomState(seed)
  source, target = rng.randint(2, 64, size=(2, rows, length))
  target[::3, 4:] = 0
  return {
    "encoder_input_tokens": jnp.asarray(source),
    "decoder_input_tokens": jnp.pad(jnp.asarray(target), ((0, 0), (1, 0)))[
      :, :-1
    ],
    "decoder_target_tokens": jnp.asarray(target),
    "decoder_loss_weights": jnp.asarray(target > 0, jnp.float32),
  }


def convert(sparse_config, options=None):
  dense_config = sparse_config.dense()
  dense, dense_variables = init(dense_config, 0)
  # As after training: nothing is at a special value such as a norm's 1.
  dense_variables["params"] = jax.tree.map(
    lambda p: p * 1.1 + 0.01, dense_variables["params"]
  )
  sparse, variables = init(sparse_config, 1)
  rules = conversion.default_rules(sparse_config.placement)
  variables["params"] = conversion.convert_params(
    dense_variables["params"], variables["params"], rules, options
  )
  return dense, dense_variables, sparse, variables


@functools.partial(jax.jit, static_argnames=("network", "train"))
def logits(network, variables, data, train):
  return model.forward(
    network, variables, data, train=train, enable_dropout=False
  )[0]


def error_of(converted, train):
  dense, dense_variables, sparse, variables = converted
  data = batch()
  return float(
    conversion.relative_error(
      logits(dense, dense_variables, data, train),
      logits(sparse, variables, data, train),
      data["decoder_loss_weights"],
    )
  )


@pytest.mark.parametrize("train", [True, False], ids=["balanced", "greedy"])
@pytest.mark.parametrize("name", VARIANTS)
def test_function_is_preserved(name, train):
  assert error_of(convert(VARIANTS[name]), train) <= conversion.TOLERANCE


def test_preservation_check_sees_a_difference():
  """The check would notice the sigmoid gate that halves a copied expert."""
  config = dataclasses.replace(SPARSE, converted=False)
  assert error_of(convert(config), True) > 1e-2


def test_every_expert_is_the_dense_feed_forward():
  _, dense_variables, _, variables = convert(SPARSE)
  dense = flat(dense_variables["params"])
  sparse = flat(variables["params"])
  for part in ("wi", "wo"):
    expert = sparse[KERNEL.replace("wi", part)]
    for e in range(4):
      np.testing.assert_array_equal(
        expert[e], dense[f"encoder/layers_0/mlp/{part}/kernel"]
      )
  for path in set(dense) & set(sparse):
    np.testing.assert_array_equal(dense[path], sparse[path])


def test_centroids_still_learn_after_conversion():
  """The gate is 1 at step 0, and yet centroids move within two steps."""
  _, _, sparse, variables = convert(SPARSE)
  data = batch()
  tx = optimizer.adamw(1.0)

  def loss(params):
    out = logits(sparse, {**variables, "params": params}, data, True)
    return jnp.mean(jnp.square(out))

  step = jax.jit(jax.grad(loss))
  params, state = variables["params"], tx.init(variables["params"])
  for _ in range(2):
    updates, state = tx.update(step(params), state, params)
    params = jax.tree.map(lambda p, u: p + 1e-2 * u, params, updates)
  before, after = flat(variables["params"]), flat(params)
  path = "decoder/layers_1/base_layer/expert_centroids"
  assert float(jnp.abs(before[path] - after[path]).max()) > 1e-4


def test_reinitialised_units_agree_between_kernels_and_differ_by_expert():
  options = conversion.Options(reinitialise=0.5)
  _, dense_variables, _, variables = convert(SPARSE, options)
  dense, sparse = flat(dense_variables["params"]), flat(variables["params"])
  wi = sparse[KERNEL] != dense["encoder/layers_0/mlp/wi/kernel"][None]
  wo = (
    sparse[KERNEL.replace("wi", "wo")]
    != dense["encoder/layers_0/mlp/wo/kernel"][None]
  )
  new_wi, new_wo = wi.all(axis=1), wo.all(axis=2)  # [E, F]
  np.testing.assert_array_equal(new_wi, wi.any(axis=1))
  np.testing.assert_array_equal(new_wi, new_wo)
  np.testing.assert_array_equal(new_wi.sum(axis=1), [16] * 4)
  assert len({tuple(row) for row in new_wi.tolist()}) == 4
  drawn = sparse[KERNEL][0][:, new_wi[0]]
  old = dense["encoder/layers_0/mlp/wi/kernel"]
  np.testing.assert_allclose(drawn.std(), old.std(), rtol=0.2)


def test_noise_has_the_asked_size():
  options = conversion.Options(noise=0.1)
  _, dense_variables, _, variables = convert(SPARSE, options)
  old = flat(dense_variables["params"])["encoder/layers_0/mlp/wi/kernel"]
  difference = flat(variables["params"])[KERNEL] - old[None]
  np.testing.assert_allclose(difference.std(), 0.1 * old.std(), rtol=0.1)


def test_clustered_centroids_separate_tokens():
  """Tokens of two directions in space get experts of their own."""
  rng = np.random.RandomState(0)
  centres = np.eye(3, 16)
  members = rng.randint(3, size=300)
  tokens = centres[members] + 0.05 * rng.normal(size=(300, 16))
  tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
  centroids = conversion._spherical_k_means(tokens, 3, seed=1)
  found = np.argmax(tokens @ centroids.T, axis=1)
  pairs = {(int(a), int(b)) for a, b in zip(members, found, strict=True)}
  assert len(pairs) == 3


def test_centroids_from_activations_have_their_place_and_norm():
  _, _, sparse, variables = convert(SPARSE)
  centroids = conversion.cluster_centroids(
    sparse, variables, batch(), conversion.Options(centroids="activations")
  )
  assert sorted(centroids) == [
    "decoder/layers_1/base_layer/expert_centroids",
    "encoder/layers_0/base_layer/expert_centroids",
  ]
  for value in centroids.values():
    assert value.shape == (4, 16)
    np.testing.assert_allclose(
      np.linalg.norm(value, axis=1), base_layer.CONVERTED_NORM, rtol=1e-4
    )


@pytest.mark.parametrize("tx", [optimizer.adamw(1.0), optimizer.adafactor(1.0)])
def test_moments_are_copied_where_they_fit(tx):
  _, dense_variables, _, variables = convert(SPARSE)
  params = dense_variables["params"]
  state = tx.init(params)
  _, state = tx.update(params, state, params)
  fresh = tx.init(variables["params"])
  rules = conversion.default_rules("replace")
  copied = conversion.convert_opt_state(state, fresh, rules)
  assert jax.tree.structure(copied) == jax.tree.structure(fresh)
  old = flat(_first_moments(state))
  new = flat(_first_moments(copied))
  np.testing.assert_array_equal(
    new[KERNEL], np.stack([old["encoder/layers_0/mlp/wi/kernel"]] * 4)
  )
  centroids = "encoder/layers_0/base_layer/expert_centroids"
  np.testing.assert_array_equal(new[centroids], 0.0)
  embedding = "token_embedder/embedding"
  assert float(jnp.abs(old[embedding]).max()) > 0
  np.testing.assert_array_equal(new[embedding], old[embedding])


def test_moments_by_neuron_are_those_of_the_dense_matrices():
  tx = optimizer.adamw(1.0, expert_moments="by_neuron")
  _, dense_variables, _, variables = convert(SPARSE)
  params = dense_variables["params"]
  _, state = tx.update(params, tx.init(params), params)
  fresh = tx.init(variables["params"])
  rules = conversion.default_rules("replace")
  found = conversion.convert_opt_state(state, fresh, rules)[0]
  assert jax.tree.structure(found) == jax.tree.structure(fresh[0])
  square = flat(state[0].nu)["encoder/layers_0/mlp/wi/kernel"]
  np.testing.assert_allclose(
    flat(found.nu)[KERNEL], np.stack([square.mean(0)] * 4), rtol=1e-6
  )


def _first_moments(state):
  """The first tree of a state that is shaped like the parameters."""
  for part in jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, dict) and "encoder" in x
  ):
    if (
      isinstance(part, dict) and flat(part)["token_embedder/embedding"].ndim > 1
    ):
      return part
  raise AssertionError("no moments")


def rule(pattern, source, stack=False):
  return conversion.Rule(pattern, source, stack)


@pytest.mark.parametrize(
  "rules, text",
  [
    ([rule("a", "a")], "no conversion rule matches the sparse parameter b"),
    ([rule("(.*)", r"\1x")], "fills a from the dense parameter ax"),
    (
      [rule("a", "a"), rule("b", None)],
      "no conversion rule uses the dense parameter b",
    ),
    (
      [rule("a", "a"), rule("b", "b", stack=True)],
      r"dense b has shape \(2,\), but sparse b has shape \(2,\)",
    ),
  ],
)
def test_what_no_rule_covers_stops_with_its_path(rules, text):
  tree = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
  with pytest.raises(ValueError, match=text):
    conversion.convert_params(tree, tree, rules)


def test_optax_is_what_the_states_come_from():
  """Guards `_first_moments`: Adam's state holds parameter-shaped trees."""
  _, variables = init(DENSE, 0)
  state = optimizer.adamw(1.0).init(variables["params"])
  assert optax.tree_utils.tree_get(state, "mu") is not None
