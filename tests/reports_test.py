"""Reports of a loop that is ahead of the device, and of losses gone wrong."""

import dataclasses

import jax
import numpy as np
import pytest
import toy
import toy_loop

from basemt_jax import metrics, partitioning, reports, steps, trainer
from basemt_jax.data import row_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return row_store.RowStore(toy.write_store(tmp_path_factory.mktemp("store")))


# ----------------------------------------- the loop is ahead of the device


# Reports every third step, at a checkpoint and at the end.
AHEAD_SETTINGS = dataclasses.replace(
  toy_loop.SHORT, train_steps=13, log_every=3, save_every=7
)
REPORTED = [3, 6, 7, 9, 12, 13]


def eager_records(store):
  """What a loop writes that waits for every step and fetches its sums."""
  settings = AHEAD_SETTINGS
  program = steps.Program(
    toy.DENSE, settings, settings.learning_rate, toy.mesh(), 3
  )
  state, sums, source, records = program.init(), None, toy_loop.data(store), []
  for step in range(1, settings.train_steps + 1):
    rows = partitioning.put_batch(next(source), program.mesh)
    state, sums = program.train_step(state, sums, rows)
    fetched = jax.device_get(sums)
    if step in REPORTED:
      scalars = {
        **metrics.scalars(fetched, toy.DIRECTIONS),
        "learning_rate": float(settings.learning_rate(step - 1)),
        "temperature": float(step),
      }
      records.append((step, scalars))
      sums = None
  return records


def test_reports_are_those_of_a_loop_that_waits(store, tmp_path):
  lags = []

  def report(progress):
    lags.append(int(loop.state.step) - progress.step)

  log = toy_loop.Log(report)
  with toy_loop.make(
    tmp_path, store, AHEAD_SETTINGS, toy.DENSE, log, dev=False
  ) as loop:
    assert loop.run() == "done"
  speeds = ("tokens_per_second", "steps_per_second")
  for _, scalars in log.records:
    assert all(scalars.pop(name) > 0 for name in speeds)
  assert log.records == eager_records(store)
  assert [p.step for p in log.reports] == REPORTED
  assert [p.loss for p in log.reports] == [s["loss"] for _, s in log.records]
  # Some are told later, none much later, and all before a checkpoint.
  assert lags == [4, 1, 0, 4, 1, 0]
  assert max(lags) <= trainer.AHEAD


def test_the_loop_is_never_further_ahead_than_it_may_be(store, tmp_path):
  lags = {}

  def report(progress):
    lags[progress.step] = int(loop.state.step) - progress.step

  settings = dataclasses.replace(toy_loop.SHORT, train_steps=12, save_every=12)
  with toy_loop.make(
    tmp_path, store, settings, toy.DENSE, toy_loop.Log(report), dev=False
  ) as loop:
    loop.run()
  ahead = trainer.AHEAD
  assert lags == {step: min(ahead, 12 - step) for step in range(1, 13)}


def test_a_stop_tells_the_reports_that_are_due(store, tmp_path):
  settings = dataclasses.replace(
    toy_loop.SHORT, train_steps=100, log_every=2, save_every=100
  )
  log = toy_loop.Log(lambda progress: loop.stop())
  with toy_loop.make(
    tmp_path, store, settings, toy.DENSE, log, dev=False
  ) as loop:
    assert loop.run() == "interrupted"
  (last,) = toy.saved(tmp_path)
  assert last <= 3 + trainer.AHEAD
  told = [p.step for p in log.reports]
  assert told == sorted({*range(2, last, 2), last})
  assert [step for step, _ in log.records] == told


# ---------------------------------------------- losses that are not finite


class Poisoned:
  """Batches of which one has an infinite weight in a row of one direction."""

  def __init__(self, inner, step):
    self._inner, self._step = inner, step
    self.state, self.restore = inner.state, inner.restore

  def __iter__(self):
    return self

  def __next__(self):
    step, batch = self._inner.step, next(self._inner)
    if step == self._step:
      batch["direction"][:] = [0, 2, 0, 2]
      batch["decoder_loss_weights"][1, 0] = np.inf
    return batch


def test_a_bad_step_is_named_though_later_ones_were_dispatched(store, tmp_path):
  settings = dataclasses.replace(
    toy_loop.SHORT, train_steps=24, log_every=2, save_every=6
  )
  log = toy_loop.Log()
  with pytest.raises(
    reports.NonFiniteLossError,
    match=r"not finite at step 7 \(dense phase\), in rows of en-fr; "
    r"checkpoint_6 is from before it",
  ):
    rows = Poisoned(toy_loop.data(store), 7)
    toy_loop.run(tmp_path, store, settings, toy.DENSE, log, rows, dev=False)
  assert toy.saved(tmp_path) == {6: "dense"}
  assert [p.step for p in log.reports] == [2, 4, 6]


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good(store, tmp_path):
  settings = dataclasses.replace(
    toy_loop.SHORT, train_steps=6, log_every=3, save_every=2
  )
  with pytest.raises(
    reports.NonFiniteLossError,
    match=r"not finite at step 2 \(sparse phase\), in rows of en-fr; "
    r"checkpoint_2 is from before it and was kept: .*run the same command",
  ):
    toy_loop.run(
      tmp_path,
      store,
      settings,
      rows=Poisoned(toy_loop.data(store), 2),
      dev=False,
    )
  assert toy.saved(tmp_path) == {2: "sparse"}
  assert toy_loop.run(tmp_path, store, settings, dev=False) == "done"
  assert toy_loop.run(tmp_path / "whole", store, settings, dev=False) == "done"
  toy.assert_same_run(
    tmp_path, tmp_path / "whole", 6, toy.SPARSE, settings, "sparse"
  )


def test_without_a_checkpoint_the_error_says_so(store, tmp_path):
  settings = dataclasses.replace(toy_loop.SHORT, train_steps=4, save_every=4)
  with pytest.raises(
    reports.NonFiniteLossError, match=r"step 0 \(dense phase\).* no checkpoint"
  ):
    toy_loop.run(
      tmp_path,
      store,
      settings,
      toy.DENSE,
      rows=Poisoned(toy_loop.data(store), 0),
      dev=False,
    )
  assert not toy.saved(tmp_path)
