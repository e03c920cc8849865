"""The training loop: interrupted or not, the same bits; and its refusals."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import toy

from basemt_jax import (
  checkpointing,
  conversion,
  heating,
  metrics,
  optimizer,
  partitioning,
  phases,
  prefetch,
  reports,
  sampling,
  steps,
  trainer,
)
from basemt_jax import model as model_lib
from basemt_jax.data import batches, row_store

ROWS = 4
# Often enough that there is something to find at every kind of step.
SETTINGS = toy.settings(
  12,
  average_decay=0.5,
  dense_steps=6,
  metrics=(toy.REAL,),
  log_every=1,
  eval_every=4,
  save_every=5,
)
SHORT = toy.settings(4, log_every=1, eval_every=100, save_every=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return row_store.RowStore(toy.write_store(tmp_path_factory.mktemp("store")))


class Log:
  """Takes metrics and lines; does what a test asks for on one of them."""

  def __init__(self, on_report=None, on_message=None):
    self.scalars, self.records = {}, []
    self.reports, self.messages = [], []
    self._on_report, self._on_message = on_report, on_message

  def write_scalars(self, step, scalars):
    self.records.append((step, dict(scalars)))
    self.scalars.setdefault(step, {}).update(scalars)

  def flush(self):
    pass

  def report(self, progress):
    self.reports.append(progress)
    if self._on_report:
      self._on_report(progress)

  def message(self, text):
    self.messages.append(text)
    if self._on_message:
      self._on_message(text)

  def hooks(self):
    return reports.Hooks(
      report=self.report,
      message=self.message,
      scalars=lambda step: {"temperature": 1.0 + step},
    )


def data(store, seed=0):
  schedule = heating.linear(1, 5, 12)
  return batches.TrainBatches(store, sampling.Strategy(schedule), ROWS, seed)


@functools.cache
def program(config, settings, phase, mesh):
  return phases.program(config, settings, phase, mesh, len(toy.DIRECTIONS))


def shared(config, settings, mesh):
  """Programs for all runs that differ in what no step is made of."""
  counts = "train_steps log_every eval_every save_every keep_checkpoints"
  same = dict.fromkeys(counts.split(), 100)
  alike = dataclasses.replace(settings, patience=None, **same)
  return lambda phase: program(config, alike, phase, mesh).with_settings(
    settings
  )


@contextlib.contextmanager
def make(
  model_dir,
  store,
  settings=SETTINGS,
  config=toy.SPARSE,
  log=None,
  rows=None,
  dev=True,
  mesh=None,
  shares=True,
):
  log, mesh = log or Log(), mesh or toy.mesh()
  loop = trainer.Trainer(
    config,
    settings,
    mesh,
    toy.DIRECTIONS,
    rows or data(store),
    str(model_dir),
    log,
    (lambda: batches.eval_batches(store, "validation", ROWS)) if dev else None,
    log.hooks(),
    # Other batches than the store's have another shape.
    make_program=shared(config, settings, mesh) if store and shares else None,
  )
  with contextlib.closing(loop):
    yield loop


def run(model_dir, store, *args, **kwargs):
  with make(model_dir, store, *args, **kwargs) as loop:
    return loop.run()


# ---------------------------------------------------- dense, then sparse


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
  """Directory, log and last state of a run that nothing interrupted."""
  directory = tmp_path_factory.mktemp("whole")
  log = Log()
  with make(directory, store, log=log, shares=False) as loop:
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

    with make(tmp_path, store, log=Log(report, message)) as loop:
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
  toy.assert_same_run(tmp_path, whole[0], 12, toy.SPARSE, SETTINGS, "sparse")
  # Once more changes nothing.
  assert stopped() == "done"
  toy.assert_same_run(tmp_path, whole[0], 12, toy.SPARSE, SETTINGS, "sparse")


def test_small_states_of_experts_are_converted_and_resumed_to_the_bit(
  store, tmp_path
):
  config = dataclasses.replace(toy.SPARSE, expert_param_dtype="bfloat16")
  settings = dataclasses.replace(
    SHORT,
    optimizer=functools.partial(optimizer.adamw, expert_moments="by_neuron"),
    dense_steps=1,
    conversion_options=conversion.Options(optimizer="copy"),
    average_decay=0.5,
    save_every=2,
  )
  whole, parts, log = tmp_path / "whole", tmp_path / "parts", Log()
  assert run(whole, store, settings, config, log) == "done"
  # Against the dense network with what it gave to experts in bfloat16, too.
  assert log.scalars[1]["conversion/relative_error"] <= conversion.TOLERANCE
  half = dataclasses.replace(settings, train_steps=2)
  assert run(parts, store, half, config) == "done"
  assert run(parts, store, settings, config) == "done"
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


def test_sigterm_saves_and_the_old_handler_comes_back(store, tmp_path):
  old = signal.getsignal(signal.SIGTERM)

  def terminate(progress):
    if progress.step == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  assert run(tmp_path, store, SHORT, toy.DENSE, Log(terminate), dev=False) in (
    "interrupted",
  )
  assert max(toy.saved(tmp_path)) == 2
  assert signal.getsignal(signal.SIGTERM) is old


OPTIONS = {
  "reinitialised": (conversion.Options(reinitialise=0.5, noise=0.1), 0),
  "clustered": (conversion.Options(centroids="activations"), 0),
  "copied": (conversion.Options(optimizer="copy"), 2),
}


@pytest.mark.parametrize("variant", OPTIONS)
def test_ways_to_convert(variant, store, tmp_path):
  options, rewarm_steps = OPTIONS[variant]
  settings = dataclasses.replace(
    SHORT,
    average_decay=0.0 if variant == "clustered" else 0.5,
    train_steps=3,
    dense_steps=2,
    conversion_options=options,
    rewarm_steps=rewarm_steps,
  )
  log = Log()
  assert run(tmp_path / "a", store, settings, log=log, dev=False) == "done"
  error = log.scalars[2]["conversion/relative_error"]
  assert (error <= conversion.TOLERANCE) == options.preserves_function
  if variant == "clustered":
    # From the batch that is next, which a restart has to find again.
    shutil.copytree(
      tmp_path / "a" / "checkpoint_2", tmp_path / "b" / "checkpoint_2"
    )
    assert run(tmp_path / "b", store, settings, dev=False) == "done"
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
  log = Log()
  strategy = sampling.Strategy(heating.constant(1))
  rows = batches.TrainBatches(store, strategy, rows, 0)
  config = dataclasses.replace(toy.SPARSE, **changes)
  with pytest.raises(ValueError, match=text):
    run(tmp_path, store, SETTINGS, config, log, rows, False, toy.mesh(2, 4, 1))
  assert not log.reports and not toy.saved(tmp_path)


# ------------------------------------- the loop is ahead of the device


# Reports every third step, at a checkpoint and at the end.
AHEAD_SETTINGS = dataclasses.replace(
  SHORT, train_steps=13, log_every=3, save_every=7
)
REPORTED = [3, 6, 7, 9, 12, 13]


def eager_records(store):
  """What a loop writes that waits for every step and fetches its sums."""
  settings = AHEAD_SETTINGS
  program = steps.Program(
    toy.DENSE, settings, settings.learning_rate, toy.mesh(), 3
  )
  state, sums, source, records = program.init(), None, data(store), []
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

  log = Log(report)
  with make(tmp_path, store, AHEAD_SETTINGS, toy.DENSE, log, dev=False) as loop:
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

  settings = dataclasses.replace(SHORT, train_steps=12, save_every=12)
  with make(
    tmp_path, store, settings, toy.DENSE, Log(report), dev=False
  ) as loop:
    loop.run()
  ahead = trainer.AHEAD
  assert lags == {step: min(ahead, 12 - step) for step in range(1, 13)}


def test_a_stop_tells_the_reports_that_are_due(store, tmp_path):
  settings = dataclasses.replace(
    SHORT, train_steps=100, log_every=2, save_every=100
  )
  log = Log(lambda progress: loop.stop())
  with make(tmp_path, store, settings, toy.DENSE, log, dev=False) as loop:
    assert loop.run() == "interrupted"
  (last,) = toy.saved(tmp_path)
  assert last <= 3 + trainer.AHEAD
  told = [p.step for p in log.reports]
  assert told == sorted({*range(2, last, 2), last})
  assert [step for step, _ in log.records] == told


def test_a_bad_step_is_named_though_later_ones_were_dispatched(store, tmp_path):
  settings = dataclasses.replace(
    SHORT, train_steps=24, log_every=2, save_every=6
  )
  log = Log()
  with pytest.raises(
    reports.NonFiniteLossError,
    match=r"not finite at step 7 \(dense phase\), in rows of en-fr; "
    r"checkpoint_6 is from before it",
  ):
    rows = Poisoned(data(store), 7)
    run(tmp_path, store, settings, toy.DENSE, log, rows, dev=False)
  assert toy.saved(tmp_path) == {6: "dense"}
  assert [p.step for p in log.reports] == [2, 4, 6]


def test_batches_are_put_in_place_by_the_thread_that_reads_them():
  names = []

  def place(batch):
    names.append(threading.current_thread().name)
    if batch == 3:
      raise ValueError("no place for 3")
    return 2 * batch

  with prefetch.Prefetcher(iter([1, 2, 3]), place=place) as ahead:
    assert [next(ahead), next(ahead)] == [(2, None), (4, None)]
    with pytest.raises(ValueError, match="no place for 3"):
      next(ahead)
  assert names == ["prefetch_0"] * 3


# --------------------------------------------------- best, early stopping


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
    SHORT, train_steps=20, eval_every=1, keep_checkpoints=2, patience=3
  )
  scripted([3.0, 1.0, 2.0])
  log = Log()

  def stop(progress):
    return progress.step == 2 and loop.stop()

  with make(tmp_path, store, settings, toy.DENSE, Log(stop)) as loop:
    assert loop.run() == "interrupted"
  assert list(toy.saved(tmp_path)) == [2, 3]
  # Step 2 was the best, step 3 the first that was not better.
  scripted([1.5, 1.25])
  assert run(tmp_path, store, settings, toy.DENSE, log) == "stopped early"
  assert list(toy.saved(tmp_path)) == [2, 4, 5]
  with checkpointing.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.best_step() == 2
  # The same command again does not train past the end it found.
  scripted([])
  assert run(tmp_path, store, settings, toy.DENSE, log) == "stopped early"
  assert list(toy.saved(tmp_path)) == [2, 4, 5]
  # With more patience it goes on.
  scripted([0.5])
  more = dataclasses.replace(settings, patience=4, train_steps=6)
  assert run(tmp_path, store, more, toy.DENSE, log) == "done"
  assert list(toy.saved(tmp_path)) == [5, 6]


# ----------------------------------------------------------- what goes wrong


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


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good(store, tmp_path):
  settings = dataclasses.replace(
    SHORT, train_steps=6, log_every=3, save_every=2
  )
  with pytest.raises(
    reports.NonFiniteLossError,
    match=r"not finite at step 2 \(sparse phase\), in rows of en-fr; "
    r"checkpoint_2 is from before it and was kept: .*run the same command",
  ):
    run(tmp_path, store, settings, rows=Poisoned(data(store), 2), dev=False)
  assert toy.saved(tmp_path) == {2: "sparse"}
  assert run(tmp_path, store, settings, dev=False) == "done"
  assert run(tmp_path / "whole", store, settings, dev=False) == "done"
  toy.assert_same_run(
    tmp_path, tmp_path / "whole", 6, toy.SPARSE, settings, "sparse"
  )


def test_without_a_checkpoint_the_error_says_so(store, tmp_path):
  settings = dataclasses.replace(SHORT, train_steps=4, save_every=4)
  with pytest.raises(
    reports.NonFiniteLossError, match=r"step 0 \(dense phase\).* no checkpoint"
  ):
    run(
      tmp_path,
      store,
      settings,
      toy.DENSE,
      rows=Poisoned(data(store), 0),
      dev=False,
    )
  assert not toy.saved(tmp_path)


def test_iterators_without_a_position_are_read_from_the_start(tmp_path):
  def rows():
    return (toy.batch(step, rows=ROWS) for step in itertools.count())

  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert run(whole, None, SHORT, toy.DENSE, rows=rows(), dev=False) == "done"
  for end in (1, 3, 4):
    settings = dataclasses.replace(SHORT, train_steps=end)
    run(parts, None, settings, toy.DENSE, rows=rows(), dev=False)
  toy.assert_same_run(whole, parts, 4, toy.DENSE, SHORT, "dense")


def test_batches_that_end_too_early_say_so(tmp_path):
  rows = iter([toy.batch(step, rows=ROWS) for step in range(3)])
  settings = dataclasses.replace(SHORT, save_every=2)
  log = Log()
  with pytest.raises(ValueError, match="batches ended at step 3 of 4"):
    run(tmp_path, None, settings, toy.DENSE, log, rows=rows, dev=False)
  # They can be brought back with more data.
  assert list(toy.saved(tmp_path)) == [2]
  assert [p.step for p in log.reports] == [1, 2, 3]


def test_a_checkpoint_of_another_run_is_refused(store, tmp_path):
  one = dataclasses.replace(SHORT, train_steps=1)
  run(tmp_path, store, one, toy.DENSE, dev=False)
  wider = dataclasses.replace(toy.DENSE, mlp_dim=64)
  with pytest.raises(
    ValueError,
    match=r"mlp/wi/kernel has shape \(16, 32\) in .*checkpoint_1, but the "
    r"dense phase needs \(16, 64\)",
  ):
    run(tmp_path, store, SHORT, wider, dev=False)
  deeper = dataclasses.replace(toy.DENSE, num_encoder_layers=2)
  with pytest.raises(ValueError, match=r"holds no array .*encoder/layers_1"):
    run(tmp_path, store, SHORT, deeper, dev=False)
  other = dataclasses.replace(
    SHORT,
    optimizer=functools.partial(optimizer.adafactor, min_dim_size_to_factor=8),
  )
  with pytest.raises(ValueError, match=r"holds no array state/param_states"):
    run(tmp_path, store, other, toy.DENSE, dev=False)
  with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
    run(tmp_path, store, SHORT, toy.DENSE, rows=data(store, seed=1), dev=False)


def test_a_sparse_checkpoint_does_not_fit_a_dense_network(whole, store):
  with pytest.raises(ValueError, match="experts"):
    run(whole[0], store, SETTINGS, toy.DENSE)


def test_a_dense_checkpoint_needs_a_dense_phase(store, tmp_path):
  one = dataclasses.replace(SHORT, train_steps=1)
  run(tmp_path, store, one, toy.DENSE, dev=False)
  with pytest.raises(ValueError, match=r"checkpoint_1 is dense.*dense_steps"):
    run(tmp_path, store, SHORT, toy.SPARSE, dev=False)
