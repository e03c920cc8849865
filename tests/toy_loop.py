"""The loop on a toy: a run of few steps, and a log of what it tells."""

import contextlib
import dataclasses
import functools

import toy

from basemt_jax import heating, phases, reports, sampling, trainer
from basemt_jax.data import batches

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
