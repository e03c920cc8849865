"""What a run tells: metrics as written, progress, events.

Axes: N directions.

A report is of steps that the device may not have done yet when it is due; it is
told once they are done, so that the device need not wait for the loop.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from basemt_jax import checkpointing, metrics, steps
from basemt_jax import model as model_lib

Tree = Any


class NonFiniteLossError(ValueError):
  """The loss or a gradient became infinite or NaN."""


class Writer(Protocol):
  """Where metrics go; `clu.metric_writers` fit."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Takes the metrics of a step."""

  def flush(self) -> None:
    """Writes out what is buffered."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """One progress report.

  Attributes:
    step: Steps done.
    train_steps: Steps of the whole run.
    phase: 'dense' or 'sparse'.
    loss: Training loss per target token since the last report, in nats.
    tokens_per_second: Source and target tokens, without padding.
    seconds_left: Estimate to the end of the run.
  """

  step: int
  train_steps: int
  phase: str
  loss: float
  tokens_per_second: float
  seconds_left: float


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What the loop tells to, and asks of, whoever started it.

  Attributes:
    report: Takes a `Progress`.
    message: Takes one line on an event: conversion, checkpoint, stop.
    scalars: step -> further metrics, such as the temperature.
    evaluate: (model, variables, step) -> metrics such as BLEU; every
      `evaluate_every` steps.
    evaluate_every: 0: never.
    bands: resource band of each direction; means by band are written too.
  """

  report: Callable[[Progress], None] = lambda progress: None
  message: Callable[[str], None] = lambda text: None
  scalars: Callable[[int], Mapping[str, float]] = lambda step: {}
  evaluate: (
    Callable[[model_lib.Transformer, Tree, int], Mapping[str, float]] | None
  ) = None
  evaluate_every: int = 0
  bands: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
  """A step that the device need not have done yet.

  Its sums of `steps.train_step`, since the last report, are ready when it is.
  It has a learning rate where a report is due after it.
  """

  step: int
  phase: str
  sums: dict[str, Any]
  learning_rate: Any = None


class Reports:
  """Tells what steps come to, in their order.

  Args:
    settings: How to train.
    directions: N names.
    writer: Takes metrics.
    hooks: Takes progress; has further metrics.
    checkpoints: Where the run can go on from, should the loss not be finite.
  """

  def __init__(
    self,
    settings: steps.Settings,
    directions: Sequence[str],
    writer: Writer,
    hooks: Hooks,
    checkpoints: checkpointing.Checkpoints,
  ):
    self._settings, self._directions = settings, tuple(directions)
    self._writer, self._hooks = writer, hooks
    self._checkpoints = checkpoints
    self._dispatched: collections.deque[_Dispatched] = collections.deque()
    self._last_time, self._last_step = 0.0, 0

  def begin(self, step: int) -> None:
    """Starts the clock, with `step` steps done."""
    self._last_time, self._last_step = time.monotonic(), step

  def leave_out(self, seconds: float) -> None:
    """Has the next report's speed leave out what was not spent on steps."""
    self._last_time += seconds

  def note(
    self, step: int, phase: str, sums: dict[str, Any], is_due: bool
  ) -> None:
    """Remembers the step just dispatched.

    Args:
      step: Its number, from 1.
      phase: 'dense' or 'sparse'.
      sums: Of `steps.train_step`, since the last report.
      is_due: Whether to report after it; the next step begins new sums.
    """
    rate = None
    if is_due:
      # Computed now: later it would queue behind the steps dispatched by then.
      rate = self._settings.learning_rate(step - 1)
      for array in jax.tree.leaves((sums, rate)):
        if isinstance(array, jax.Array):
          array.copy_to_host_async()
    self._dispatched.append(_Dispatched(step, phase, sums, rate))

  def settle(self, ahead: int = 0) -> None:
    """Waits for all steps but the last `ahead`, and tells their reports.

    Raises:
      NonFiniteLossError: The loss is not finite.
    """
    while len(self._dispatched) > ahead:
      done = self._dispatched.popleft()
      jax.block_until_ready(done.sums["steps"])
      if done.learning_rate is not None:
        self._report(done, time.monotonic())

  def _report(self, done: _Dispatched, now: float) -> None:
    """Checks and writes the sums up to a step that was done at `now`."""
    sums = jax.device_get(done.sums)
    self._check_finite(sums, done.phase)
    seconds, count = now - self._last_time, done.step - self._last_step
    self._last_time, self._last_step = now, done.step
    loss = float(sums["nll"].sum() / sums["weight"].sum())
    left = seconds / count * (self._settings.train_steps - done.step)
    speed = float(sums["tokens"]) / seconds
    self.write(
      done.step,
      {
        **metrics.scalars(sums, self._directions, self._settings.known_metrics),
        "tokens_per_second": speed,
        "steps_per_second": count / seconds,
        "learning_rate": float(done.learning_rate),
        **self._hooks.scalars(done.step - 1),
      },
    )
    all_steps = self._settings.train_steps
    self._hooks.report(
      Progress(done.step, all_steps, done.phase, loss, speed, left)
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics, and their means by band."""
    if jax.process_index() == 0:
      means = metrics.band_means(
        scalars, self._hooks.bands, self._settings.known_metrics
      )
      self._writer.write_scalars(step, {**scalars, **means})

  def _check_finite(self, sums: dict[str, Any], phase: str) -> None:
    bad = int(sums["bad_step"])
    if bad == steps.NEVER:
      return
    names = [
      name
      for name, is_bad in zip(
        self._directions, sums["bad_direction"], strict=True
      )
      if is_bad
    ]
    where = (
      "in rows of " + ", ".join(names)
      if names
      else "in the gradients, not in the loss of any direction"
    )
    latest = self._checkpoints.latest_step()
    kept = (
      "no checkpoint was written yet"
      if latest is None
      else f"checkpoint_{latest} is from before it and was kept"
    )
    self._checkpoints.wait()
    self._dispatched.clear()  # They have nothing to say after this.
    raise NonFiniteLossError(
      f"the loss is not finite at step {bad} ({phase} phase), "
      f"{where}; {kept}: lower the learning rate or clip gradients more, and "
      "run the same command again"
    )
