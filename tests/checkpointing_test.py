"""Checkpoints: the same bits back, T5X's layout, whole ones only."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import traverse_util

from basemt_jax import checkpointing, optimizer, partitioning

PARAMS = {
  "encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7},
  "decoder": {"scale": np.array([1.0, -0.0, 1e-38], np.float32)},
}
MUTABLES = {"prices": {"encoder": {"prices": np.array([0.5, 0.25])}}}


def tree_of(tx, params=PARAMS, mutables=MUTABLES, step=7):
  state = tx.init(jax.tree.map(jnp.asarray, params))
  return checkpointing.state_dict(params, state, np.int32(step), mutables)


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def assert_same_bits(found, expected):
  found, expected = flat(found), flat(expected)
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    left, right = np.asarray(found[path]), np.asarray(value)
    assert left.dtype == right.dtype and left.shape == right.shape, path
    assert left.tobytes() == right.tobytes(), path


@pytest.fixture
def make(tmp_path):
  """Opens checkpoints in one directory; closes them in the end."""
  opened = []

  def make(**options):
    opened.append(checkpointing.Checkpoints(tmp_path / "run", **options))
    return opened[-1]

  yield make
  for checkpoints in opened:
    checkpoints.close()


@pytest.mark.parametrize(
  "tx",
  [
    optimizer.adamw(1.0),
    optimizer.adamw(1.0, weight_decay=0.1, max_grad_norm=None),
    optimizer.adafactor(1.0, min_dim_size_to_factor=2),
    optimizer.adamw(1.0, expert_moments="by_neuron"),
    optax.chain(optax.identity(), optax.trace(0.9)),
  ],
  ids=["adamw", "decay", "adafactor", "by neuron", "identity"],
)
def test_optimizer_states_with_empty_parts_come_back(tx):
  state = tx.init(jax.tree.map(jnp.asarray, PARAMS))
  state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)
  tree = checkpointing.state_dict(PARAMS, state, 3, {})
  assert "flax_mutables" not in tree
  stored = tree["state"]["param_states"]
  # Nothing without an array reaches the disk.
  assert all(hasattr(leaf, "shape") for leaf in flat(stored).values())
  back = checkpointing.restored_opt_state(tx.init(PARAMS), stored)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, back, state)


def test_what_is_saved_is_read_bit_for_bit(make):
  tree = tree_of(optimizer.adamw(1.0))
  tree["target"]["encoder"]["odd"] = np.array([np.nan, np.inf, 1e-45], "f4")
  try:
    checkpoints = make()
    checkpoints.save(7, tree, {"data": {"step": 7}, "best": None})
    checkpoints.wait()
    again = make(read_only=True)
    assert again.latest_step() == 7
    assert_same_bits(again.restore(7, tree, "the test"), tree)
    assert again.position(7) == {"data": {"step": 7}, "best": None}
  finally:
    del tree["target"]["encoder"]["odd"]


def test_arrays_come_back_where_they_are_wanted(make):
  mesh = toy.mesh(2, 4)
  sharding = partitioning.batch_sharding(mesh)
  array = jax.device_put(np.arange(16, dtype=np.float32), sharding)
  checkpoints = make()
  checkpoints.save(1, {"target": {"a": array}}, {})
  checkpoints.wait()
  # Another mesh: a checkpoint does not depend on the devices that wrote it.
  for other in (sharding, partitioning.replicated(toy.mesh())):
    like = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=other)
    found = checkpoints.restore(1, {"target": {"a": like}}, "x")["target"]["a"]
    assert found.sharding.is_equivalent_to(other, 1)
    np.testing.assert_array_equal(found, array)


def test_saved_arrays_may_be_given_away_at_once(make):
  sharding = partitioning.batch_sharding(toy.mesh(2, 4))
  values = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
  arrays = {
    "split": jax.device_put(values, sharding),
    "whole": jax.device_put(values, partitioning.replicated(toy.mesh(2, 4))),
  }
  expected = {"target": {name: values + 1 for name in arrays}}
  add = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  arrays = add(arrays)
  live = len(jax.live_arrays())
  checkpoints = make()
  for step in (1, 2):
    checkpoints.save(step, {"target": arrays}, {"step": step})
    before, arrays = arrays, add(arrays)
    assert all(x.is_deleted() for x in before.values())
    checkpoints.wait()
    found = checkpoints.restore(step, expected, "the test")
    assert_same_bits(found, expected)
    expected["target"] = {k: v + 1 for k, v in expected["target"].items()}
  # The copies are gone too.
  assert len(jax.live_arrays()) == live


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(make):
  checkpoints = make()
  checkpoints.save(1, {"target": PARAMS}, {})
  checkpoints.save(1, {"target": PARAMS}, {})
  with pytest.raises(ValueError, match="step 1 already exists"):
    checkpoints.wait()
  assert checkpoints.steps() == [1]


def test_layout_on_disk_is_t5x_s(make):
  checkpoints = make()
  checkpoints.save(20, tree_of(optimizer.adamw(1.0)), {"data": None}, 1.5)
  checkpoints.wait()
  path = checkpoints.directory / "checkpoint_20"
  assert {p.name for p in path.iterdir() if p.is_dir()} == {
    "state",
    "position",
    "metrics",
  }
  metadata = json.loads((path / "state" / "_METADATA").read_text())
  keys = [
    tuple(part["key"] for part in leaf["key_metadata"])
    for leaf in metadata["tree_metadata"].values()
  ]
  assert {key[0] for key in keys} == {"target", "state", "flax_mutables"}
  assert {key[1] for key in keys if key[0] == "state"} == {
    "step",
    "param_states",
  }
  assert ("target", "encoder", "kernel") in keys
  assert ("flax_mutables", "prices", "encoder", "prices") in keys
  assert ("state", "param_states", "1", "mu", "encoder", "kernel") in keys
  assert checkpoints.stored(20)["target/encoder/kernel"].shape == (2, 3)
  assert checkpoints.phase(20) == "dense"


def test_experts_make_a_checkpoint_sparse(make):
  checkpoints = make()
  params = {"encoder": {"base_layer": {"gate_bias": np.float32(1)}}}
  checkpoints.save(1, {"target": params}, {})
  checkpoints.wait()
  assert checkpoints.phase(1) == "sparse"


def test_part_of_a_checkpoint_can_be_read(make):
  checkpoints = make()
  tree = tree_of(optimizer.adamw(1.0))
  checkpoints.save(1, tree, {})
  checkpoints.wait()
  part = {name: tree[name] for name in ("target", "flax_mutables")}
  assert_same_bits(checkpoints.restore(1, part, "the model"), part)


def test_missing_arrays_and_wrong_shapes_are_named(make):
  checkpoints = make()
  tree = tree_of(optimizer.adamw(1.0))
  checkpoints.save(3, tree, {})
  checkpoints.wait()
  more = {"target": {**PARAMS, "new": {"kernel": np.zeros(2)}}}
  with pytest.raises(
    ValueError,
    match=r"checkpoint_3 holds no array target/new/kernel, which the run",
  ):
    checkpoints.restore(3, more, "the run")
  wider = {"target": {"encoder": {"kernel": np.zeros((2, 4), np.float32)}}}
  with pytest.raises(
    ValueError,
    match=r"target/encoder/kernel has shape \(2, 3\) in .*checkpoint_3, but "
    r"the run needs \(2, 4\)",
  ):
    checkpoints.restore(3, wider, "the run")


def test_reading_where_nothing_is_makes_nothing(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere is not a directory"):
    checkpointing.Checkpoints(tmp_path / "nowhere", read_only=True)
  assert not (tmp_path / "nowhere").exists()


def test_latest_and_best_are_kept(make):
  checkpoints = make(keep=2)
  losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 5.0}
  for step, loss in losses.items():
    checkpoints.save(step, {"target": PARAMS}, {}, loss)
    checkpoints.wait()
  assert checkpoints.steps() == [2, 5, 6]
  assert checkpoints.best_step() == 2
  # Another process knows it too, and lets go of it when there is a better one.
  again = make(keep=2)
  assert again.best_step() == 2
  for step, loss in {7: 0.5, 8: None, 9: None}.items():
    again.save(step, {"target": PARAMS}, {}, loss)
    again.wait()
  assert again.steps() == [7, 8, 9]
  assert again.best_step() == 7


def test_without_dev_losses_there_is_no_best(make):
  checkpoints = make(keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, {"target": PARAMS}, {})
    checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  assert checkpoints.best_step() is None
  assert make().best_step() is None


def half_written(directory: pathlib.Path, step: int) -> pathlib.Path:
  """What a process leaves that is killed while it writes."""
  path = directory / f"checkpoint_{step}.orbax-checkpoint-tmp"
  os.makedirs(path / "state")
  (path / "state" / "_METADATA").write_text("{")
  return path


def test_half_written_checkpoints_do_not_count_and_are_cleaned(make):
  checkpoints = make()
  checkpoints.save(1, {"target": PARAMS}, {})
  checkpoints.wait()
  left = half_written(checkpoints.directory, 2)
  reading = make(read_only=True)
  assert reading.steps() == [1] and left.exists()
  writing = make()
  assert writing.steps() == [1] and writing.latest_step() == 1
  writing.save(2, {"target": PARAMS}, {})
  writing.wait()
  # Orbax cleans in a thread of its own, and has done so before it saves.
  assert not left.exists()
  assert writing.steps() == [1, 2]
