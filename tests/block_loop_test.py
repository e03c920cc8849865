"""Repeated blocks as a loop: the function of blocks written out."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from basemt_jax import block_loop, model

CONFIG = model.TransformerConfig(
  vocab_size=32,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=4,
  num_decoder_layers=3,
  dropout_rate=0.2,
  feed_forward="experts",
  encoder_expert_blocks=(1, 3),
  decoder_expert_blocks=(0,),
  num_experts=4,
  rows_per_group=2,
  scan_blocks=True,
)
VARIANTS = {
  "float32": CONFIG,
  "remat": dataclasses.replace(CONFIG, remat=True),
  # Rounded at other places, a token would go to another expert.
  "bfloat16": dataclasses.replace(
    CONFIG, dtype="bfloat16", feed_forward="dense"
  ),
}


@hypothesis.given(st.lists(st.sampled_from("ab"), max_size=14))
def test_segments_cover_a_list_once_and_in_order(kinds):
  rebuilt = []
  for start, length, repeats in block_loop.segments(kinds):
    assert start == len(rebuilt)
    rebuilt += kinds[start : start + length] * repeats
  assert rebuilt == kinds


@pytest.mark.parametrize(
  "kinds, expected",
  [
    ("", []),
    ("a", [(0, 1, 1)]),
    ("aaaa", [(0, 1, 4)]),
    ("aabaab", [(0, 3, 2)]),
    ("aab" * 8, [(0, 3, 8)]),
    ("abba", [(0, 1, 1), (1, 1, 2), (3, 1, 1)]),
  ],
)
def test_segments_are_the_longest_repeated_patterns(kinds, expected):
  assert block_loop.segments(kinds) == expected


def batch():
  draw = np.random.RandomState(0)
  source, target = draw.randint(2, 32, size=(2, 4, 6))
  target[1, 4:] = 0
  return {
    "encoder_input_tokens": jnp.asarray(source),
    "decoder_input_tokens": jnp.asarray(np.roll(target, 1, axis=1)),
    "decoder_target_tokens": jnp.asarray(target),
  }


@functools.cache
def variables(feed_forward):
  network = model.Transformer(
    dataclasses.replace(CONFIG, feed_forward=feed_forward)
  )
  tokens = jnp.ones((1, 4), jnp.int32)
  found = jax.jit(functools.partial(network.init, train=True))(
    jax.random.key(0), tokens, tokens, tokens
  )
  return {name: found.get(name, {}) for name in ("params", "prices")}


def outcome(config):
  """Loss, gradients, and what collections became, dropout included."""
  given = variables(config.feed_forward)

  def loss(params):
    logits, updates = model.forward(
      model.Transformer(config),
      {**given, "params": params},
      batch(),
      train=True,
      dropout_rng=jax.random.key(1),
      reported=["intermediates", "expert_inputs"],
    )
    return jnp.mean(jnp.square(logits)), updates

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return step(given["params"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loop_is_the_function_written_out(name):
  config = VARIANTS[name]
  looped = outcome(config)
  written = outcome(dataclasses.replace(config, scan_blocks=False))
  assert jax.tree.structure(looped) == jax.tree.structure(written)
  if config.feed_forward == "experts":
    assert "layers_3" in looped[0][1]["prices"]["encoder"]
  # Half precision is rounded at other places of another program.
  tolerance = 1e-5 if config.dtype == "float32" else 3e-2
  for found, expected in zip(
    jax.tree.leaves(looped), jax.tree.leaves(written), strict=True
  ):
    assert found.dtype == expected.dtype
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    scale = np.abs(expected).max() if expected.size else 0.0
    np.testing.assert_allclose(found, expected, atol=tolerance * scale + 1e-9)


def test_a_deep_network_s_program_is_hardly_larger():
  def size(blocks):
    config = dataclasses.replace(
      CONFIG,
      feed_forward="dense",
      encoder_expert_blocks=(),
      decoder_expert_blocks=(),
      num_encoder_layers=blocks,
      num_decoder_layers=blocks,
    )
    network = model.Transformer(config)
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    shapes = jax.eval_shape(
      functools.partial(network.init, train=True),
      jax.random.key(0),
      tokens,
      tokens,
      tokens,
    )

    def loss(params, tokens):
      logits, _ = model.forward(
        network,
        {"params": params},
        {
          name: tokens
          for name in (
            "encoder_input_tokens",
            "decoder_input_tokens",
            "decoder_target_tokens",
          )
        },
        train=True,
        dropout_rng=jax.random.key(0),
      )
      return jnp.sum(logits)

    text = jax.jit(jax.grad(loss)).lower(shapes["params"], tokens).as_text()
    return text.count("dot_general")

  assert size(8) == size(2)
