"""Numbers kept in bfloat16 between steps, and rounded so that nothing is lost.

A small update of a number in bfloat16 is less than half the distance to the
next one: rounded to the nearest, it would be lost every time. Rounded up or
down at random, it is kept on average.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


def init(optimizer: optax.GradientTransformation, params: Tree) -> Tree:
  """The optimizer's state, of float32 whatever the parameters' types."""
  return optimizer.init(optax.tree.cast(params, jnp.float32))


def updated(
  optimizer: optax.GradientTransformation,
  gradients: Tree,
  state: Tree,
  params: Tree,
  step: jax.Array,
) -> tuple[Tree, Tree]:
  """New parameters, and the optimizer's new state.

  All is computed in float32. Parameters that are kept in bfloat16 are rounded
  at random, as `step`, [] int32, decides.
  """
  gradients, exact = optax.tree.cast((gradients, params), jnp.float32)
  updates, state = optimizer.update(gradients, state, exact)
  exact = optax.apply_updates(exact, updates)

  def kept(old: jax.Array, new: jax.Array) -> jax.Array:
    # The salts of moments are not negative.
    return new if old.dtype == new.dtype else round_at_random(new, ~step)

  return jax.tree.map(kept, params, exact), state


def round_at_random(x: jax.Array, salt: jax.Array) -> jax.Array:
  """Rounds float32 to bfloat16, up or down so that the expectation is x itself.

  The random bits are a hash of an element's index and of the salt, [] int32: no
  memory is read or written for them, and they are the same on any devices. What
  is not finite is rounded as usual.
  """
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  # "lowbias32" of https://github.com/skeeto/hash-prospector, twice.
  noise = _hashed(index ^ _hashed(jnp.asarray(salt).astype(jnp.uint32)))
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
  up_or_down = jax.lax.bitcast_convert_type(
    (bits >> 16).astype(jnp.uint16), jnp.bfloat16
  )
  return jnp.where(jnp.isfinite(x), up_or_down, x.astype(jnp.bfloat16))


def _hashed(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)
