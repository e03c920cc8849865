"""The training loop: interrupted or not, the same bits; and its refusals."""

import dataclasses
import functools
import itertools
import math
import os
import signal

import jax
import numpy as np
import pytest
import toy
import toy_loop

from basemt_jax import checkpointing, conversion, optimizer, trainer
from basemt_jax import model as model_lib
from basemt_jax.data import row_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return row_store.RowStore(toy.write_store(tmp_path_factory.mktemp("store")))


# ------------------------------------------------------ dense, then sparse


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
  """Directory, log and last state of a run that nothing interrupted."""
  directory = tmp_path_factory.mktemp("whole")
  log = toy_loop.Log()
  with toy_loop.make(directory, store, log=log, shares=False) as loop:
    assert loop.run() == "done"
    return directory, log, loop


def test_phases_reports_and_checkpoints(whole):
  directory, log, _ = whole
  assert [(r.step, r.phase) for r in log.reports] == [
    (step, "dense" if step <= 6 else "sparse") for step in range(1, 13)
  ]
  # Every fifth, the last dense one and the last; the latest three of them.
  assert toy.saved(directory) == {6: "dense", 10: "sparse", 12: "sparse"}
  assert [m.split(";")[0] for m in log.messages if "convert" in m] == [
    "step 6: converting the dense model to 4 experts a layer",
    "step 6: converted",
  ]
  assert log.scalars[6]["conversion/relative_error"] <= conversion.TOLERANCE
  measured = [s for s, m in log.scalars.items() if "dev/loss" in m]
  assert measured == [4, 6, 8, 12]
  last = log.scalars[12]
  assert last["dev/loss"] == np.mean(
    [last[f"dev/loss/{d}"] for d in toy.DIRECTIONS]
  )
  for name in ("real", *(f"real/{d}" for d in toy.DIRECTIONS)):
    assert last.get(name, 1.0) == last[f"dev/{name}"] == 1.0
  assert "router/encoder/layers_0/load_max" in last
  assert "router/encoder/layers_0/load_max" not in log.scalars[6]
  assert all(math.isfinite(v) for m in log.scalars.values() for v in m.values())
  # It learns.
  assert last["dev/loss"] < log.scalars[4]["dev/loss"] - 0.05


def test_dev_losses_are_those_of_each_direction_alone(whole, store):
  _, _, loop = whole
  model = loop.program.model
  forward = jax.jit(
    lambda variables, batch: model_lib.forward(
      model, variables, batch, train=False
    )[0]
  )
  for name in toy.DIRECTIONS:
    count = int(store.stats("validation", name).rows)
    rows = store.read("validation", name, np.arange(count))
    # All rows in one shape, filled up with the last.
    rows = {
      k: np.pad(v, [(0, 8 - count)] + [(0, 0)] * (v.ndim - 1), "edge")
      for k, v in rows.items()
    }
    logits = np.asarray(
      forward(loop.program.averaged_variables(loop.state), rows), np.float64
    )
    rows, logits = {k: v[:count] for k, v in rows.items()}, logits[:count]
    picked = np.take_along_axis(
      logits, rows["decoder_target_tokens"][..., None], -1
    )[..., 0]
    nll = np.log(np.exp(logits).sum(-1)) - picked
    weights = rows["decoder_loss_weights"]
    np.testing.assert_allclose(
      loop.dev_losses[name], (nll * weights).sum() / weights.sum(), rtol=1e-5
    )


def test_a_run_stopped_in_every_phase_ends_with_the_same_bits(
  whole, store, tmp_path, monkeypatch
):
  # Reports at once, so that they can say where to stop.
  monkeypatch.setattr(trainer, "AHEAD", 0)

  def stopped(at=None, on_message=None):
    def report(progress):
      # What is asked for in a report holds after the next step.
      if at is not None and progress.step == at - 1:
        loop.stop()

    def message(text):
      if on_message is not None and on_message in text:
        loop.stop()

    with toy_loop.make(
      tmp_path, store, log=toy_loop.Log(report, message)
    ) as loop:
      return loop.run()

  # As on accelerators, which compile while they draw the state and train.
  monkeypatch.setattr(trainer.Trainer, "_compiles_ahead", lambda loop: True)
  assert stopped(at=3) == "interrupted"
  assert toy.saved(tmp_path) == {3: "dense"}
  assert stopped(at=6) == "interrupted"
  assert toy.saved(tmp_path)[6] == "dense"
  # Stopped while it converts: the step after the conversion is done first.
  assert stopped(on_message="converting") == "interrupted"
  assert toy.saved(tmp_path)[7] == "sparse"
  assert stopped(at=11) == "interrupted"
  assert toy.saved(tmp_path)[11] == "sparse"
  assert stopped() == "done"
  toy.assert_same_run(
    tmp_path, whole[0], 12, toy.SPARSE, toy_loop.SETTINGS, "sparse"
  )
  # Once more changes nothing.
  assert stopped() == "done"
  toy.assert_same_run(
    tmp_path, whole[0], 12, toy.SPARSE, toy_loop.SETTINGS, "sparse"
  )


def test_sigterm_saves_and_the_old_handler_comes_back(store, tmp_path):
  old = signal.getsignal(signal.SIGTERM)

  def terminate(progress):
    if progress.step == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  assert toy_loop.run(
    tmp_path,
    store,
    toy_loop.SHORT,
    toy.DENSE,
    toy_loop.Log(terminate),
    dev=False,
  ) in ("interrupted",)
  assert max(toy.saved(tmp_path)) == 2
  assert signal.getsignal(signal.SIGTERM) is old


# ---------------------------------------------------- best, early stopping


@pytest.fixture
def scripted(monkeypatch):
  """Dev losses as listed, one an evaluation."""

  def script(losses):
    losses = iter(losses)
    monkeypatch.setattr(
      "basemt_jax.losses.measured", lambda *_: {"loss/en-de": next(losses)}
    )

  return script


def test_best_checkpoint_is_kept_and_patience_ends_the_run(
  scripted, store, tmp_path
):
  settings = dataclasses.replace(
    toy_loop.SHORT, train_steps=20, eval_every=1, keep_checkpoints=2, patience=3
  )
  scripted([3.0, 1.0, 2.0])
  log = toy_loop.Log()

  def stop(progress):
    return progress.step == 2 and loop.stop()

  with toy_loop.make(
    tmp_path, store, settings, toy.DENSE, toy_loop.Log(stop)
  ) as loop:
    assert loop.run() == "interrupted"
  assert list(toy.saved(tmp_path)) == [2, 3]
  # Step 2 was the best, step 3 the first that was not better.
  scripted([1.5, 1.25])
  assert (
    toy_loop.run(tmp_path, store, settings, toy.DENSE, log) == "stopped early"
  )
  assert list(toy.saved(tmp_path)) == [2, 4, 5]
  with checkpointing.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.best_step() == 2
  # The same command again does not train past the end it found.
  scripted([])
  assert (
    toy_loop.run(tmp_path, store, settings, toy.DENSE, log) == "stopped early"
  )
  assert list(toy.saved(tmp_path)) == [2, 4, 5]
  # With more patience it goes on.
  scripted([0.5])
  more = dataclasses.replace(settings, patience=4, train_steps=6)
  assert toy_loop.run(tmp_path, store, more, toy.DENSE, log) == "done"
  assert list(toy.saved(tmp_path)) == [5, 6]


# --------------------------------------------------------- what goes wrong


def test_iterators_without_a_position_are_read_from_the_start(tmp_path):
  def rows():
    return (toy.batch(step, rows=toy_loop.ROWS) for step in itertools.count())

  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert (
    toy_loop.run(whole, None, toy_loop.SHORT, toy.DENSE, rows=rows(), dev=False)
    == "done"
  )
  for end in (1, 3, 4):
    settings = dataclasses.replace(toy_loop.SHORT, train_steps=end)
    toy_loop.run(parts, None, settings, toy.DENSE, rows=rows(), dev=False)
  toy.assert_same_run(whole, parts, 4, toy.DENSE, toy_loop.SHORT, "dense")


def test_batches_that_end_too_early_say_so(tmp_path):
  rows = iter([toy.batch(step, rows=toy_loop.ROWS) for step in range(3)])
  settings = dataclasses.replace(toy_loop.SHORT, save_every=2)
  log = toy_loop.Log()
  with pytest.raises(ValueError, match="batches ended at step 3 of 4"):
    toy_loop.run(tmp_path, None, settings, toy.DENSE, log, rows=rows, dev=False)
  # They can be brought back with more data.
  assert list(toy.saved(tmp_path)) == [2]
  assert [p.step for p in log.reports] == [1, 2, 3]


def test_a_checkpoint_of_another_run_is_refused(store, tmp_path):
  one = dataclasses.replace(toy_loop.SHORT, train_steps=1)
  toy_loop.run(tmp_path, store, one, toy.DENSE, dev=False)
  wider = dataclasses.replace(toy.DENSE, mlp_dim=64)
  with pytest.raises(
    ValueError,
    match=r"mlp/wi/kernel has shape \(16, 32\) in .*checkpoint_1, but the "
    r"dense phase needs \(16, 64\)",
  ):
    toy_loop.run(tmp_path, store, toy_loop.SHORT, wider, dev=False)
  deeper = dataclasses.replace(toy.DENSE, num_encoder_layers=2)
  with pytest.raises(ValueError, match=r"holds no array .*encoder/layers_1"):
    toy_loop.run(tmp_path, store, toy_loop.SHORT, deeper, dev=False)
  other = dataclasses.replace(
    toy_loop.SHORT,
    optimizer=functools.partial(optimizer.adafactor, min_dim_size_to_factor=8),
  )
  with pytest.raises(ValueError, match=r"holds no array state/param_states"):
    toy_loop.run(tmp_path, store, other, toy.DENSE, dev=False)
  with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
    toy_loop.run(
      tmp_path,
      store,
      toy_loop.SHORT,
      toy.DENSE,
      rows=toy_loop.data(store, seed=1),
      dev=False,
    )


def test_a_sparse_checkpoint_does_not_fit_a_dense_network(whole, store):
  with pytest.raises(ValueError, match="experts"):
    toy_loop.run(whole[0], store, toy_loop.SETTINGS, toy.DENSE)


def test_a_dense_checkpoint_needs_a_dense_phase(store, tmp_path):
  one = dataclasses.replace(toy_loop.SHORT, train_steps=1)
  toy_loop.run(tmp_path, store, one, toy.DENSE, dev=False)
  with pytest.raises(ValueError, match=r"checkpoint_1 is dense.*dense_steps"):
    toy_loop.run(tmp_path, store, toy_loop.SHORT, toy.SPARSE, dev=False)
