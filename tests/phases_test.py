"""From dense to sparse in the loop: every way, and what cannot be converted."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import toy
import toy_loop

from basemt_jax import conversion, heating, optimizer, sampling
from basemt_jax.data import batches, row_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return row_store.RowStore(toy.write_store(tmp_path_factory.mktemp("store")))


def test_small_states_of_experts_are_converted_and_resumed_to_the_bit(
  store, tmp_path
):
  config = dataclasses.replace(toy.SPARSE, expert_param_dtype="bfloat16")
  settings = dataclasses.replace(
    toy_loop.SHORT,
    optimizer=functools.partial(optimizer.adamw, expert_moments="by_neuron"),
    dense_steps=1,
    conversion_options=conversion.Options(optimizer="copy"),
    average_decay=0.5,
    save_every=2,
  )
  whole, parts, log = tmp_path / "whole", tmp_path / "parts", toy_loop.Log()
  assert toy_loop.run(whole, store, settings, config, log) == "done"
  # Against the dense network with what it gave to experts in bfloat16, too.
  assert log.scalars[1]["conversion/relative_error"] <= conversion.TOLERANCE
  half = dataclasses.replace(settings, train_steps=2)
  assert toy_loop.run(parts, store, half, config) == "done"
  assert toy_loop.run(parts, store, settings, config) == "done"
  toy.assert_same_run(parts, whole, 4, config, settings, "sparse")
  tree, _ = toy.checkpoint(
    whole, 4, toy.abstract_tree(config, settings, "sparse")
  )
  kernel = "encoder/layers_0/base_layer/experts/sublayer_0/wi/kernel"
  assert tree[f"target/{kernel}"].dtype == "bfloat16"
  average = tree[f"state/param_states/average/{kernel}"]
  assert average.dtype == np.float32
  # It is not what it would be if it were rounded each step.
  assert (average != average.astype("bfloat16")).mean() > 0.5


OPTIONS = {
  "reinitialised": (conversion.Options(reinitialise=0.5, noise=0.1), 0),
  "clustered": (conversion.Options(centroids="activations"), 0),
  "copied": (conversion.Options(optimizer="copy"), 2),
}


@pytest.mark.parametrize("variant", OPTIONS)
def test_ways_to_convert(variant, store, tmp_path):
  options, rewarm_steps = OPTIONS[variant]
  settings = dataclasses.replace(
    toy_loop.SHORT,
    average_decay=0.0 if variant == "clustered" else 0.5,
    train_steps=3,
    dense_steps=2,
    conversion_options=options,
    rewarm_steps=rewarm_steps,
  )
  log = toy_loop.Log()
  assert (
    toy_loop.run(tmp_path / "a", store, settings, log=log, dev=False) == "done"
  )
  error = log.scalars[2]["conversion/relative_error"]
  assert (error <= conversion.TOLERANCE) == options.preserves_function
  if variant == "clustered":
    # From the batch that is next, which a restart has to find again.
    shutil.copytree(
      tmp_path / "a" / "checkpoint_2", tmp_path / "b" / "checkpoint_2"
    )
    assert toy_loop.run(tmp_path / "b", store, settings, dev=False) == "done"
    toy.assert_same_run(
      tmp_path / "a", tmp_path / "b", 3, toy.SPARSE, settings, "sparse"
    )
  arrays, _ = toy.checkpoint(
    tmp_path / "a", 3, toy.abstract_tree(toy.SPARSE, settings, "sparse")
  )
  # The optimizer's own count of steps says whether its state was kept.
  count = next(v for k, v in arrays.items() if k.endswith("1/count"))
  assert count == (3 if options.optimizer == "copy" else 1)
  if settings.average_decay:  # The average begins anew in any case.
    assert arrays["state/param_states/updates"] == 1
    path = "encoder/layers_0/base_layer/experts/sublayer_0/wi/kernel"
    now = arrays[f"target/{path}"]
    average = arrays[f"state/param_states/average/{path}"]
    # One step moved it by 9/11 of that step; it was never far away.
    assert 0 < np.abs(average - now).max() < 0.02


@pytest.mark.parametrize(
  "changes, rows, text",
  [
    ({"num_sublayers": 2}, 8, r"no conversion rule matches .*sublayer_1"),
    ({}, 8, r"8 rows.*rows_per_group=2 rows on 8 devices"),
    ({"num_experts": 6}, 16, r"num_experts is 6.* 4 devices"),
  ],
)
def test_a_conversion_that_cannot_work_is_refused_at_the_start(
  changes, rows, text, store, tmp_path
):
  log = toy_loop.Log()
  strategy = sampling.Strategy(heating.constant(1))
  rows = batches.TrainBatches(store, strategy, rows, 0)
  config = dataclasses.replace(toy.SPARSE, **changes)
  with pytest.raises(ValueError, match=text):
    toy_loop.run(
      tmp_path,
      store,
      toy_loop.SETTINGS,
      config,
      log,
      rows,
      False,
      toy.mesh(2, 4, 1),
    )
  assert not log.reports and not toy.saved(tmp_path)
