"""The network: packing, causality, decoding and rematerialisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basemt_jax import layers, model

CONFIG = model.TransformerConfig(
  vocab_size=32,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=2,
  num_decoder_layers=2,
  dropout_rate=0.0,
)
SPARSE = dataclasses.replace(
  CONFIG,
  feed_forward="experts",
  encoder_expert_blocks=(1,),
  decoder_expert_blocks=(0, 1),
  num_experts=4,
)
CONFIGS = [
  CONFIG,
  dataclasses.replace(CONFIG, mlp_activations=("gelu", "linear")),
  SPARSE,
  dataclasses.replace(SPARSE, placement="insert", num_sublayers=2),
]
IDS = ["dense", "gated", "replace", "insert"]


def tokens(seed, rows, length):
  return jnp.asarray(
    np.random.RandomState(seed).randint(2, 32, size=(rows, length)), jnp.int32
  )


def shift(targets):
  return jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]


@functools.cache
def drawn(network):
  ones = jnp.ones((1, 4), jnp.int32)
  variables = jax.jit(functools.partial(network.init, train=True))(
    jax.random.key(0), ones, ones, ones
  )
  # Inserted experts start as the identity, which would test nothing.
  params = jax.tree.map(
    lambda p: p + 0.1 * np.random.RandomState(p.size).normal(size=p.shape),
    variables.pop("params"),
  )
  variables.pop("intermediates", None)
  return {**variables, "params": params}


def init(config):
  network = model.Transformer(config)
  return network, dict(drawn(network))


@functools.partial(jax.jit, static_argnames=("network", "train"))
def apply(network, variables, *args, rngs=None, train=False):
  logits, _ = network.apply(
    variables,
    *args,
    train=train,
    rngs=rngs,
    mutable=["prices", "intermediates"],
  )
  return logits


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_decoding_step_by_step_equals_teacher_forcing(config):
  network, variables = init(config)
  source = tokens(0, 3, 6).at[1, 4:].set(0)
  target = tokens(1, 3, 5)
  expected = apply(network, variables, source, shift(target), target)
  memory = jax.jit(network.encode_tokens)(variables, source)
  cache = network.init_cache(variables, memory, 5)
  decode_step = jax.jit(network.decode_step)
  for step in range(5):
    logits, cache = decode_step(
      variables, memory, cache, shift(target)[:, step : step + 1]
    )
    np.testing.assert_allclose(logits, expected[:, step], atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_packed_examples_see_only_themselves(config):
  network, variables = init(config)
  sources = [tokens(2, 1, 4), tokens(3, 1, 3)]
  targets = [tokens(4, 1, 2), tokens(5, 1, 4)]

  def packed(parts):
    ids = [jnp.full(p.shape, i + 1, jnp.int32) for i, p in enumerate(parts)]
    positions = [jnp.arange(p.shape[1])[None] for p in parts]
    return (
      jnp.pad(jnp.concatenate(x, axis=1), ((0, 0), (0, 1)))
      for x in (parts, ids, positions)
    )

  source, source_ids, source_positions = packed(sources)
  target, target_ids, target_positions = packed(targets)
  inputs = jnp.pad(
    jnp.concatenate([shift(t) for t in targets], axis=1), ((0, 0), (0, 1))
  )
  together = apply(
    network,
    variables,
    source,
    inputs,
    target,
    source_ids,
    target_ids,
    source_positions,
    target_positions,
  )
  apart = [
    apply(network, variables, s, shift(t), t)
    for s, t in zip(sources, targets, strict=True)
  ]
  np.testing.assert_allclose(
    together[:, :-1], jnp.concatenate(apart, axis=1), atol=2e-5
  )


def test_padding_and_the_future_change_nothing():
  network, variables = init(CONFIG)
  source, target = tokens(6, 2, 5), tokens(7, 2, 5)
  logits = apply(network, variables, source, shift(target), target)
  padded = apply(
    network, variables, jnp.pad(source, ((0, 0), (0, 3))), shift(target), target
  )
  np.testing.assert_allclose(logits, padded, atol=1e-5)
  other = target.at[:, 3].set(9)
  changed = apply(network, variables, source, shift(other), other)
  np.testing.assert_allclose(logits[:, :4], changed[:, :4], atol=1e-6)
  assert float(jnp.abs(logits[:, 4] - changed[:, 4]).max()) > 1e-3


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_remat_changes_no_value_and_no_gradient(config):
  source, target = tokens(8, 4, 6), tokens(9, 4, 6)

  def loss(params, cfg, rest):
    logits, _ = model.Transformer(cfg).apply(
      {"params": params, **rest},
      source,
      shift(target),
      target,
      train=True,
      mutable=["prices", "intermediates"],
    )
    return jnp.mean(logits**2)

  step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  _, variables = init(config)
  params = variables.pop("params")
  rest = {k: v for k, v in variables.items() if not k.endswith("_axes")}
  plain = step(params, config, rest)
  remat = step(params, dataclasses.replace(config, remat=True), rest)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    plain,
    remat,
  )


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_rounded_matrices_make_the_same_function(config):
  """To the last bit, operation by operation; the rest stays float32."""
  config = dataclasses.replace(config, dtype="bfloat16")
  network, variables = init(config)
  params = layers.rounded(variables["params"], config.dtype)
  rounded = {**variables, "params": params}
  kept = set()
  for path, x in jax.tree_util.tree_leaves_with_path(rounded):
    name = path[-1].key
    matrix = name in ("kernel", "embedding")
    assert x.dtype == (jnp.bfloat16 if matrix else jnp.float32), path
    kept |= set() if matrix else {name}
  assert "scale" in kept
  if config.feed_forward == "experts":
    assert {"expert_centroids", "gate_scale", "prices"} <= kept
  source, targets = tokens(0, 2, 6), tokens(1, 2, 5)
  batch = {
    "encoder_input_tokens": source,
    "decoder_input_tokens": shift(targets),
    "decoder_target_tokens": targets,
  }
  expected, got = (
    model.forward(network, v, batch, train=False)[0]
    for v in (variables, rounded)
  )
  np.testing.assert_array_equal(expected, got)


def test_bfloat16_keeps_float32_parameters_and_logits():
  config = dataclasses.replace(SPARSE, dtype="bfloat16")
  network, variables = init(config)
  assert {p.dtype for p in jax.tree.leaves(variables["params"])} == {
    jnp.dtype("float32")
  }
  source, target = tokens(10, 2, 5), tokens(11, 2, 5)
  low = apply(network, variables, source, shift(target), target)
  assert low.dtype == jnp.float32
  full = apply(
    model.Transformer(SPARSE), variables, source, shift(target), target
  )
  # Two decimal digits of bfloat16, through four blocks.
  assert float(jnp.abs(low - full).mean() / jnp.abs(full).mean()) < 0.1


def test_dropout_needs_its_rng_and_changes_with_it():
  config = dataclasses.replace(CONFIG, dropout_rate=0.5)
  network, variables = init(config)
  source, target = tokens(12, 2, 5), tokens(13, 2, 5)
  a, b = (
    apply(
      network,
      variables,
      source,
      shift(target),
      target,
      train=True,
      rngs={"dropout": jax.random.key(i)},
    )
    for i in (0, 1)
  )
  assert float(jnp.abs(a - b).max()) > 1e-2


def test_rotary_scores_depend_on_distance_alone():
  rng = np.random.RandomState(0)
  query, key = (
    jnp.asarray(rng.normal(size=(1, 1, 2, 8)).astype(np.float32))
    for _ in range(2)
  )

  def score(i, j):
    q = layers.rotary_embedding(query, jnp.full((1, 1), i))
    k = layers.rotary_embedding(key, jnp.full((1, 1), j))
    return jnp.sum(q * k, axis=-1)

  np.testing.assert_allclose(score(3, 1), score(13, 11), atol=1e-5)
  assert float(jnp.abs(score(3, 1) - score(3, 2)).max()) > 1e-3


def test_wide_network_has_the_experts_parameters():
  wide = dataclasses.replace(SPARSE, feed_forward="dense_wide")

  def feed_forward_size(config):
    _, variables = init(config)
    flat = jax.tree_util.tree_leaves_with_path(variables["params"])
    return sum(
      leaf.size
      for path, leaf in flat
      if any(k in jax.tree_util.keystr(path) for k in ("'wi'", "'wo'"))
    )

  assert feed_forward_size(wide) == feed_forward_size(SPARSE)


@pytest.mark.parametrize(
  "change, text",
  [
    ({"feed_forward": "sparse"}, "feed_forward is 'sparse'"),
    ({"placement": "after"}, "placement is 'after'"),
    ({"encoder_expert_blocks": (2,)}, r"blocks \[2\].*blocks 0 to 1"),
    (
      {"feed_forward": "dense_wide", "placement": "insert"},
      "set placement to 'replace'",
    ),
  ],
)
def test_wrong_configurations_are_refused(change, text):
  with pytest.raises(ValueError, match=text):
    dataclasses.replace(CONFIG, **change)


def test_unknown_activation_is_named():
  with pytest.raises(ValueError, match="'rellu'"):
    layers.activation("rellu")


def test_without_empty_rows():
  """cuDNN's gradients are NaN where a query may see nothing."""
  source = jnp.array([[1, 1, 2, 2], [1, 1, 1, 0]])
  target = jnp.array([[1, 2, 2, 0], [1, 1, 0, 0]])
  mask = np.asarray(layers.SegmentMask(target, source).array())
  filled = np.asarray(layers.without_empty_rows(jnp.asarray(mask)))
  is_empty = ~mask.any(axis=-1)
  assert is_empty.sum() == 1  # The source of the first row has no padding.
  np.testing.assert_array_equal(filled[~is_empty], mask[~is_empty])
  assert filled[is_empty].all()


@pytest.mark.parametrize(
  ("length", "expected"), [(64, "xla"), (192, "xla"), (256, "cudnn")]
)
def test_fused_attention_takes_whole_tiles_only(length, expected, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  heads = jnp.zeros((2, length, 4, 64), jnp.bfloat16)
  assert layers._implementation(heads, heads) == expected
  single = jnp.zeros((2, 1, 4, 64), jnp.bfloat16)
  assert layers._implementation(single, heads) == "xla"
