"""The training loop: dense phase, conversion, sparse phase.

Axes: N directions.

The loop is the same in both phases; only the program (model, shardings,
compiled step; see `steps`) changes when the dense model is converted. A run
that is killed and started again ends with the same bits, because everything
it does is a function of what a checkpoint holds: the state, and the position
in the data.

The device never waits for the loop: steps are dispatched ahead of it, a report
is told once its steps are done, batches are put on the device by a thread, and
checkpoints are written from a copy.
"""

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from basemt_jax import (
  checkpointing,
  losses,
  metrics,
  partitioning,
  phases,
  prefetch,
  processes,
  reports,
  steps,
  train_state,
)
from basemt_jax import model as model_lib

Batch = dict[str, Any]
Tree = Any

# Steps that the loop may be ahead of the device: enough to outlast what now and
# then holds it up (a report, another thread), few enough that a report comes
# soon and an interruption has little to wait for.
AHEAD = 8


class Trainer:
  """Trains one model in one directory, from wherever it stands.

  Attributes:
    state: The current `train_state.TrainState`.
    program: The current phase's `steps.Program`.
    dev_losses: Nats per token by direction, as last measured.

  Args:
    config: The final network: experts where the run ends sparse.
    settings: How to train.
    mesh: Devices.
    directions: Names, in the order that `direction` in batches indexes.
    batches: This host's rows of the global batches
      (`partitioning.host_rows`), from step 0 on: any iterator of dictionaries
      of arrays, all of one shape. With `state()` and `restore()`, as
      `batches.TrainBatches`, its position is kept in checkpoints; without, a
      restart reads and drops the batches it has already seen.
    model_dir: Where checkpoints live.
    writer: Takes metrics.
    dev_batches: () -> this host's rows of the dev batches, all of one shape;
      None: no dev set.
    hooks: See `reports.Hooks`.
    verify: Compare the checkpoint to go on from with its checksums.
    make_program: 'dense' or 'sparse' -> `phases.program`; several runs of one
      process can share programs, and then compile them once. None: its own.
  """

  def __init__(
    self,
    config: model_lib.TransformerConfig,
    settings: steps.Settings,
    mesh: jax.sharding.Mesh,
    directions: Sequence[str],
    batches: Iterator[Batch],
    model_dir: str,
    writer: reports.Writer,
    dev_batches: Callable[[], Iterable[Batch]] | None = None,
    hooks: reports.Hooks | None = None,
    verify: bool = True,
    make_program: Callable[[str], steps.Program] | None = None,
  ):
    self._config, self._settings, self._mesh = config, settings, mesh
    self._directions = tuple(directions)
    self._make_program = make_program or (
      lambda phase: phases.program(
        config, settings, phase, mesh, len(self._directions)
      )
    )
    self._batches, self._dev_batches = batches, dev_batches
    self._writer, self._hooks = writer, hooks or reports.Hooks()
    self._programs: dict[str, steps.Program] = {}
    self._conversion: phases.Conversion | None = None
    self._threads = futures.ThreadPoolExecutor(2, "compile")
    self._starting: futures.Future[train_state.TrainState] | None = None
    self._compiling: futures.Future[None] | None = None
    self._compiling_evaluation: futures.Future[None] | None = None
    self._checkpoints = checkpointing.Checkpoints(
      model_dir, settings.keep_checkpoints, verify=verify
    )
    self._reports = reports.Reports(
      settings, self._directions, writer, self._hooks, self._checkpoints
    )
    self._metrics: dict[str, Any] | None = None
    self._stop = threading.Event()
    self._best_loss, self._worse = math.inf, 0
    self.dev_losses: dict[str, float] = {}
    self._step = 0
    self._start()

  # ------------------------------------------------------------- programs

  def _program(self, phase: str) -> steps.Program:
    """The program of phase 'dense' or 'sparse', made when first needed."""
    if phase not in self._programs:
      self._programs[phase] = self._make_program(phase)
    return self._programs[phase]

  def _start(self) -> None:
    """Restores the latest checkpoint, or initialises.

    On accelerators the initial state is drawn while the first step is compiled.
    """
    for line in self._checkpoints.set_aside:
      self._hooks.message(line)
    step = self._checkpoints.latest_step()
    is_sparse = self._config.feed_forward == "experts"
    if step is None:
      starts_dense = not is_sparse or self._settings.dense_steps > 0
      self.program = self._program("dense" if starts_dense else "sparse")
      # Several processes are to launch all they compute in the same order.
      if self._compiles_ahead() and jax.process_count() == 1:
        self._starting = self._threads.submit(self.program.init)
      else:
        self.state = self.program.init()
      return
    phase = self._checkpoints.phase(step)
    self._check_phase(step, phase)
    self.program = self._program(phase)
    tree = self._checkpoints.restore(
      step, self.program.abstract_tree(), f"the {self.program.name} phase"
    )
    self.state = self.program.shapes.from_tree(tree)
    self._step = step
    position = self._checkpoints.position(step)
    self._restore_data(step, position.get("data"))
    self._best_loss = position.get("best_dev_loss") or math.inf
    self._worse = position.get("evaluations_without_improvement", 0)
    self._hooks.message(
      f"going on from checkpoint_{step}, {self.program.name} phase"
    )

  def _check_phase(self, step: int, phase: str) -> None:
    """Refuses a checkpoint that is not of a phase of this run."""
    is_sparse = self._config.feed_forward == "experts"
    if phase == "sparse" and not is_sparse:
      raise ValueError(
        f"{self._checkpoints.path(step)} holds experts, but the configured "
        f"network has feed_forward {self._config.feed_forward!r}; use the "
        "configuration it was trained with, or another directory"
      )
    if phase == "dense" and is_sparse and not self._settings.dense_steps:
      raise ValueError(
        f"{self._checkpoints.path(step)} is dense, but the run has no dense "
        "phase; set dense_steps, or convert it into another directory"
      )

  def _prepare_conversion(self, batch: Batch) -> None:
    """Raises now what else would be found out after the dense phase.

    On accelerators the sparse phase's programs are compiled meanwhile; a CPU
    would only train the slower for it.
    """
    prepared = phases.Conversion(self.program, self._program("sparse"))
    prepared.check(batch)
    self._conversion = prepared
    if self._compiles_ahead():
      self._compiling = self._threads.submit(prepared.compile, batch)

  def _prepare_evaluation(self) -> None:
    """Has the phase's evaluation step compiled while the first steps run."""
    if self._dev_batches is None or not self._compiles_ahead():
      return
    batch = next(iter(self._dev_batches()))
    self._compiling_evaluation = self._threads.submit(
      self.program.eval_step.compile,
      self.program.variables(self.program.abstract_state()),
      partitioning.put_batch(batch, self._mesh),
    )

  def _compiles_ahead(self) -> bool:
    return self._mesh.devices.flat[0].platform != "cpu"

  def _restore_data(self, step: int, data: Any) -> None:
    restore = getattr(self._batches, "restore", None)
    if restore is not None and data is not None:
      restore(data)
    elif hasattr(self._batches, "seek"):
      self._batches.seek(step)  # A checkpoint of T5X's has no position.
    else:
      for _ in range(step):
        next(self._batches)

  # ----------------------------------------------------------------- loop

  def run(self) -> str:
    """Trains to the end.

    Returns:
      'done', 'stopped early' (no better dev loss for `patience` evaluations)
      or 'interrupted' (SIGTERM or `stop`; a checkpoint has been written).

    Raises:
      reports.NonFiniteLossError: The loss is not finite. The last checkpoint is
        from before that.
    """
    put = functools.partial(partitioning.put_batch, mesh=self._mesh)
    with (
      processes.on_sigterm(self.stop),
      prefetch.Prefetcher(self._batches, place=put) as ahead,
    ):
      self._reports.begin(self._step)
      if self._gives_up():
        return "stopped early"
      try:
        outcome = self._train(ahead)
      finally:
        self._reports.settle()
      self._checkpoints.wait()
    self._writer.flush()
    return outcome

  def _train(self, ahead: prefetch.Prefetcher) -> str:
    """Steps to the end, or to where `_after_step` says."""
    is_checked = not self._converts()
    compiled: steps.Program | None = None
    while self._step < self._settings.train_steps:
      batch, position = self._next(ahead)
      if not is_checked:
        self._prepare_conversion(batch)
        is_checked = True
      if self._conversion_is_due():
        self._convert(batch)
      start = time.monotonic()
      if self._starting is not None:
        self.program.compile_step(batch)
        self.state, self._starting = self._starting.result(), None
      self.state, self._metrics = self.program.train_step(
        self.state, self._metrics, batch
      )
      if self.program is not compiled:
        # The first call compiles; no estimate of the time left counts that.
        self._reports.leave_out(time.monotonic() - start)
        compiled = self.program
        self._prepare_evaluation()
      self._step += 1
      outcome = self._after_step(position)
      if outcome != "done":
        return outcome
    return "done"

  def _next(self, ahead: prefetch.Prefetcher) -> tuple[Batch, Any]:
    """The next batch, on the devices, and the position after it."""
    try:
      return next(ahead)
    except StopIteration:
      raise ValueError(
        f"the training batches ended at step {self._step} of "
        f"{self._settings.train_steps}; give an iterator that goes on"
      ) from None

  def stop(self) -> None:
    """Ends `run` after the step it is at, with a checkpoint.

    Reports are up to `AHEAD` steps behind. Several processes, which need not
    be at the same step, end after one of the next.
    """
    if jax.process_count() > 1:
      processes.ask_to_stop()
    else:
      self._stop.set()

  def _is_stopped(self) -> bool:
    """Whether to end after this step; the same in all processes."""
    if jax.process_count() > 1:
      return processes.is_stop_agreed(self._step)
    return self._stop.is_set()

  def close(self) -> None:
    """Waits for writing to end."""
    self._threads.shutdown(wait=False, cancel_futures=True)
    self._checkpoints.close()

  def _after_step(self, position: Any) -> str:
    """Reports, evaluates and saves what is due; returns `run`'s outcome."""
    settings, step = self._settings, self._step
    is_last = step == settings.train_steps
    ends_phase = self.program.name == "dense" and step == settings.dense_steps
    is_stopped = self._is_stopped()

    def due(every: int) -> bool:
      return is_last or (every > 0 and step % every == 0)

    evaluates, saves = due(settings.eval_every), due(settings.save_every)
    saves = saves or ends_phase or is_stopped
    scores = self._hooks.evaluate and due(self._hooks.evaluate_every)
    dev_loss = None
    is_due = due(settings.log_every) or evaluates or saves or ends_phase
    assert self._metrics is not None
    self._reports.note(step, self.program.name, self._metrics, is_due)
    if is_due:
      self._metrics = None
    # All else comes after the reports, and nothing that is not finite is saved.
    self._reports.settle(0 if evaluates or saves or scores else AHEAD)
    start = time.monotonic()
    if evaluates or ends_phase or scores:
      # Their arrays get the room of the last checkpoint's copy on the devices.
      self._checkpoints.wait()
    if evaluates or ends_phase:
      dev_loss = self._evaluate()
    if self._hooks.evaluate and scores:
      self._reports.write(
        step,
        self._hooks.evaluate(
          self.program.model,
          self.program.averaged_variables(self.state),
          step,
        ),
      )
    gives_up = self._gives_up()
    if saves or gives_up:
      self._save(position, dev_loss)
    # The next report's speed leaves the time of this out.
    self._reports.leave_out(time.monotonic() - start)
    if is_last:
      return "done"
    if gives_up:
      return "stopped early"
    return "interrupted" if is_stopped else "done"

  def _gives_up(self) -> bool:
    patience = self._settings.patience
    return patience is not None and self._worse >= patience

  # ----------------------------------------------- evaluation, checkpoints

  def _evaluate(self) -> float | None:
    """Dev loss by direction; returns their mean."""
    if self._dev_batches is None:
      return None
    waiting = self._compiling_evaluation
    if waiting is not None and not waiting.cancel():
      waiting.result()
    self._compiling_evaluation = None
    values = self._measured(self.program.averaged_variables(self.state))
    self.dev_losses = metrics.of_directions(values, "loss")
    mean = float(np.mean(list(self.dev_losses.values())))
    if mean < self._best_loss:
      self._best_loss, self._worse = mean, 0
    else:
      self._worse += 1
    named = {f"dev/{name}": value for name, value in values.items()}
    self._reports.write(self._step, {**named, "dev/loss": mean})
    if self._settings.average_decay:
      values = self._measured(self.program.variables(self.state))
      last = metrics.of_directions(values, "loss")
      self._reports.write(
        self._step,
        {
          "dev/last_weights_loss": float(np.mean(list(last.values()))),
          **{f"dev/last_weights_loss/{d}": v for d, v in last.items()},
        },
      )
    self._hooks.message(f"step {self._step}: dev loss {mean:.3f}")
    return mean

  def _measured(self, variables: Tree) -> dict[str, float]:
    """Loss on dev and the run's own metrics, by full name without the split."""
    assert self._dev_batches is not None
    return losses.measured(
      self.program.eval_step,
      variables,
      (partitioning.put_batch(b, self._mesh) for b in self._dev_batches()),
      self._directions,
      self._settings.metrics,
    )

  def _save(self, position: Any, dev_loss: float | None) -> None:
    if self._checkpoints.latest_step() == self._step:
      return
    best = self._best_loss if math.isfinite(self._best_loss) else None
    self._checkpoints.save(
      self._step,
      self.state.tree(),
      {
        "data": position,
        "best_dev_loss": best,
        "evaluations_without_improvement": self._worse,
      },
      dev_loss,
    )

  # ----------------------------------------------------------- conversion

  def _converts(self) -> bool:
    """Whether a conversion is still to come."""
    return (
      self.program.name == "dense"
      and self._config.feed_forward == "experts"
      and self._settings.dense_steps < self._settings.train_steps
    )

  def _conversion_is_due(self) -> bool:
    return self._converts() and self._step >= self._settings.dense_steps

  def _convert(self, batch: Batch) -> None:
    """Goes over to the sparse program; verified on the batch that is next."""
    start = time.monotonic()
    if self._compiling is not None:
      self._compiling.result()
    self._checkpoints.wait()  # Its copy makes room, as before an evaluation.
    self._hooks.message(
      f"step {self._step}: converting the dense model to "
      f"{self._config.num_experts} experts a layer"
    )
    assert self._conversion is not None
    if self._compiling is None:  # Side by side: each takes about one core.
      self._conversion.compile(batch)
    self.state, error = self._conversion(self.state, batch)
    self.program = self._program("sparse")
    self._conversion = self._compiling = None
    del self._programs["dense"]
    self._hooks.message(
      f"step {self._step}: converted; largest relative difference of the "
      f"function on a training batch: {error:.1e}"
    )
    self._reports.write(self._step, {"conversion/relative_error": error})
    # As for what a call compiles.
    self._reports.leave_out(time.monotonic() - start)
