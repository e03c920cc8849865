"""A model of a run, loaded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_models

from basemt_jax import layers, partitioning
from basemt_jax import run as run_lib
from basemt_jax import trained as trained_lib
from basemt_jax.data import batches


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return toy_models.train(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("expert", [1, 4])
def test_a_model_is_loaded_in_the_type_it_multiplies_in(
  trained, expert, monkeypatch
):
  """The rounded parameters of float32, and the same dev losses."""
  mesh = toy.mesh(expert=expert)
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: mesh)
  full = trained_lib.load(trained, toy_models.silent())
  half = functools.partial(dataclasses.replace, toy.SPARSE, dtype="bfloat16")
  loaded = trained_lib.load(
    dataclasses.replace(trained, network=half), toy_models.silent()
  )
  expected = layers.rounded(full.variables["params"], "bfloat16")

  def check(path, x, y):
    assert x.dtype == y.dtype and x.sharding == y.sharding, path
    np.testing.assert_array_equal(x, y)

  jax.tree.map_with_path(check, loaded.variables["params"], expected)
  assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(expected))
  batch = next(batches.eval_batches(loaded.store, "validation", 8))
  batch = partitioning.put_batch(batch, mesh)
  kept = {**loaded.variables, "params": full.variables["params"]}
  losses = [
    jax.device_get(loaded.program.eval_step(v, batch)["nll"])
    for v in (loaded.variables, kept)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-7)
