"""Parameters drawn one by one: those of `Module.init`, to the bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

from basemt_jax import layers, steps, train_state

VARIANTS = {
  "dense": toy.DENSE,
  "gated": dataclasses.replace(toy.DENSE, mlp_activations=("gelu", "linear")),
  "experts": dataclasses.replace(toy.SPARSE, num_sublayers=2),
  "inserted": dataclasses.replace(
    toy.SPARSE, placement="insert", converted=True
  ),
}


class OwnAttention(layers.Attention):
  """Draws one parameter in its own way."""

  @nn.compact
  def __call__(self, inputs_q, inputs_kv, *args, **kwargs):
    scale = layers.param_with_axes(
      "own", nn.initializers.normal(0.5), (inputs_q.shape[-1],), axes=("embed",)
    )
    return super().__call__(
      inputs_q * scale[None, None], inputs_kv, *args, **kwargs
    )


def assert_as_init_draws(config, shape=(1, 1, 1)):
  settings = toy.settings(seed=3)
  program = steps.Program(
    config, settings, settings.learning_rate, toy.mesh(*shape), 3
  )
  state = program.init()
  tx = settings.transformation()
  make = functools.partial(train_state.init_state, program.model, tx)
  expected = jax.jit(lambda key: make(key)[0])(train_state.keys(3)[0])
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for (path, found), value in zip(
    jax.tree_util.tree_leaves_with_path(state),
    jax.tree.leaves(expected),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    assert found.dtype == value.dtype, name
    np.testing.assert_array_equal(found, value, err_msg=name)
  for leaf, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(program.shardings), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  return program, state


@pytest.mark.parametrize("name", VARIANTS)
def test_values_are_those_of_one_program(name):
  program, state = assert_as_init_draws(VARIANTS[name])
  some = {("token_embedder", "embedding")}
  (found,) = program.draw(some).values()
  np.testing.assert_array_equal(
    found, state.params["token_embedder"]["embedding"]
  )


def test_values_are_the_same_on_several_devices():
  assert_as_init_draws(toy.SPARSE, (2, 4, 1))


def test_modules_with_initialisers_of_their_own_are_drawn_too():
  _, state = assert_as_init_draws(
    dataclasses.replace(toy.DENSE, attention=OwnAttention())
  )
  own = state.params["encoder"]["layers_0"]["self_attention"]["own"]
  assert float(jnp.std(own)) > 0.1
