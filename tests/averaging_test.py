"""Means of checkpoints, against NumPy's, and the directory they make."""

import numpy as np
import pytest
import toy
from flax import traverse_util

from basemt_jax import averaging, checkpointing, trained, training
from basemt_jax import run as run_lib


def arrays(directory, step):
  """All arrays of a checkpoint by path, read without a network."""
  with checkpointing.Checkpoints(directory, read_only=True) as checkpoints:
    nested = traverse_util.unflatten_dict(checkpoints.stored(step), sep="/")
    tree = checkpoints.restore(step, nested, "the test")
  return traverse_util.flatten_dict(tree, sep="/")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Three dense checkpoints and two sparse ones, with averaged weights."""
  directory = tmp_path_factory.mktemp("averaging")
  store = toy.write_store(directory / "store")
  settings = toy.settings(
    *(10,), dense_steps=6, eval_every=2, save_every=2, average_decay=0.9
  )
  run = toy.a_run(directory / "model", store, toy.SPARSE, settings=settings)
  assert training.train(run, toy.Writer(), run_lib.SILENT) == "done"
  return run


def test_the_mean_is_that_of_the_weights_and_all_else_is_the_newest(
  run, tmp_path
):
  steps = averaging.average(run.model_dir, tmp_path / "mean", 2)
  assert steps == [8, 10]
  old, new = (arrays(run.model_dir, step) for step in steps)
  found = arrays(tmp_path / "mean", 10)
  assert found.keys() == new.keys()
  weights = 0
  for path, value in found.items():
    expected = new[path]
    if path.startswith(("target/", "state/param_states/average/")):
      expected = (np.float64(old[path]) + new[path]) / 2
      weights += not np.array_equal(old[path], new[path])
    assert value.dtype == new[path].dtype
    np.testing.assert_allclose(value, expected, rtol=1e-7, err_msg=path)
  assert weights > 20
  kept = {path.name for path in (tmp_path / "mean").iterdir()}
  assert {"model.json", "checkpoint_10"} <= kept
  run = run_lib.described(tmp_path / "mean")
  model = trained.load(
    toy.a_run(run.model_dir, None, toy.SPARSE, settings=run.settings)
  )
  assert model.step == 10 and model.tag("fr").prefix == "<2fr> "


def test_the_best_are_those_of_lowest_dev_loss(run, tmp_path, capsys):
  with checkpointing.Checkpoints(run.model_dir, read_only=True) as checkpoints:
    losses = checkpoints.dev_losses()
  best = sorted(sorted(losses, key=losses.get)[:1])
  assert len(losses) == 3  # Of the last three, which a run keeps.
  assert averaging.average(run.model_dir, tmp_path / "best", 1, True) == best
  found, expected = (
    arrays(tmp_path / "best", *best),
    arrays(run.model_dir, *best),
  )
  for path in expected:
    np.testing.assert_array_equal(found[path], expected[path])


def test_what_has_no_mean_is_refused(run, tmp_path):
  with pytest.raises(
    ValueError, match=r"between steps 6 and 8.* at most the 2 .* from 8 on"
  ):
    averaging.average(run.model_dir, tmp_path / "both", 3)
  with pytest.raises(ValueError, match=r"has 3 checkpoints there \(6, 8, 10\)"):
    averaging.average(run.model_dir, tmp_path / "many", 9)
  assert not list(tmp_path.iterdir())
  averaging.average(run.model_dir, tmp_path / "mean", 1)
  with pytest.raises(ValueError, match="already holds checkpoint_10"):
    averaging.average(run.model_dir, tmp_path / "mean", 2)
