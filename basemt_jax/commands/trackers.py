"""Where metrics go: files, TensorBoard, and the trackers people use.

A tracker is one gin line and an extra:

    run.Run.trackers = (@trackers.wandb(),)  # pip install basemt_jax[wandb]

`metrics.jsonl` and TensorBoard are always written. A tracker that fails is told
of once and left out from then on: it never stops a run.
"""

import dataclasses
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from basemt_jax import metrics


@dataclasses.dataclass(frozen=True)
class Tracker:
  """A place for metrics, out of a library's functions."""

  # (step, values by name or tag)
  write_scalars: Callable[[int, Mapping[str, float]], Any]
  flush: Callable[[], Any] = lambda: None  # writes out what is buffered
  # ends files and connections; nothing is written afterwards
  close: Callable[[], Any] = lambda: None


# model_dir -> an open tracker.
Opener = Callable[[str], Tracker]


def json_lines(model_dir: str) -> Tracker:
  """A line of `metrics.jsonl` for every call: time, step and metrics."""
  pathlib.Path(model_dir).mkdir(parents=True, exist_ok=True)
  path = pathlib.Path(model_dir) / "metrics.jsonl"
  file = path.open("a", encoding="utf-8")

  def write(step: int, scalars: Mapping[str, Any]) -> None:
    line = {"step": step, "time": time.time(), **scalars}
    file.write(json.dumps(line) + "\n")

  return Tracker(write, file.flush, file.close)


def tensorboard() -> Opener:
  """TensorBoard's event files, in the model directory."""

  def start(model_dir: str) -> Tracker:
    import tensorboardX  # Needs no TensorFlow, which takes seconds to import.
    from tensorboardX.proto import summary_pb2

    # Not its SummaryWriter, which alters tags such as 'bleu/en->xx'.
    writer = tensorboardX.FileWriter(model_dir)

    def write(step: int, values: Mapping[str, float]) -> None:
      scalars = [
        summary_pb2.Summary.Value(tag=tag, simple_value=value)
        for tag, value in values.items()
      ]
      writer.add_summary(summary_pb2.Summary(value=scalars), step)

    return Tracker(write, writer.flush, writer.close)

  return start


def wandb(project: str, **options: Any) -> Opener:
  """Weights & Biases; options of `wandb.init`, such as `mode='offline'`."""

  def start(model_dir: str) -> Tracker:
    library = _library("wandb")
    run = library.init(
      project=project, **{**_named(model_dir), "dir": model_dir, **options}
    )
    # Two lines of a step (training, dev) are two calls, and steps may be
    # written again after a restart: the step is a value of its own.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Tracker(
      lambda step, values: run.log({"step": step, **values}), close=run.finish
    )

  return start


def mlflow(experiment: str, tracking_uri: str | None = None) -> Opener:
  """MLflow, on a server or in a folder; None: MLFLOW_TRACKING_URI's."""

  def start(model_dir: str) -> Tracker:
    library = _library("mlflow")
    if tracking_uri:
      library.set_tracking_uri(tracking_uri)
    library.set_experiment(experiment)
    library.start_run(run_name=pathlib.Path(model_dir).name)

    def write(step: int, values: Mapping[str, float]) -> None:
      # Names may not hold '>'.
      named = {k.replace("->", " to "): v for k, v in values.items()}
      library.log_metrics(named, step=step)

    return Tracker(write, close=library.end_run)

  return start


def trackio(project: str, **options: Any) -> Opener:
  """Trackio; options of `trackio.init`, such as `space_id`."""

  def start(model_dir: str) -> Tracker:
    library = _library("trackio")
    library.init(project=project, **{**_named(model_dir), **options})
    return Tracker(
      lambda step, values: library.log(values, step=step),
      close=library.finish,
    )

  return start


def _named(model_dir: str) -> dict[str, str]:
  return {"name": pathlib.Path(model_dir).name}


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
      f"{name} is not installed: pip install basemt_jax[{name}]"
    ) from error


class Writer:
  """Metrics to `metrics.jsonl`, TensorBoard and trackers; a `reports.Writer`.

  The file gets all of them, the others those with a `metrics.tag`, by that tag.
  Files are made by `open`, or with the first metrics: a run that fails at its
  start leaves none. `known` are the metrics that the run measures.
  """

  def __init__(
    self,
    model_dir: str,
    trackers: Sequence[Opener] = (),
    known: Sequence[metrics.Metric] = metrics.METRICS,
  ):
    self._model_dir, self._known = model_dir, known
    self._openers = (tensorboard(), *trackers)
    self._file: Tracker | None = None
    self._trackers: list[tuple[str, Tracker]] = []  # With their names.

  def __enter__(self) -> "Writer":
    return self

  def open(self) -> None:
    """Makes the files, unless that has been done."""
    import jax

    if jax.process_index() != 0 or self._file:
      return
    self._file = json_lines(self._model_dir)
    for opener in self._openers:
      name = opener.__qualname__.partition(".")[0]
      try:
        self._trackers.append((name, opener(self._model_dir)))
      except Exception as error:  # Whatever it is, training goes on.
        _tell(name, error)

  def _each(self, call: Callable[[Tracker], Any]) -> None:
    """Calls a function with every tracker; one that fails is left out then."""
    for name, tracker in list(self._trackers):
      try:
        call(tracker)
      except Exception as error:
        self._trackers.remove((name, tracker))
        _tell(name, error)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Takes the metrics of a step."""
    self.open()
    if self._file:
      self._file.write_scalars(step, scalars)
      shown = metrics.tagged(scalars, self._known)
      self._each(lambda tracker: tracker.write_scalars(step, shown))

  def flush(self) -> None:
    """Writes out what is buffered."""
    if self._file:
      self._file.flush()
      self._each(lambda tracker: tracker.flush())

  def __exit__(self, *exception: object) -> None:
    self.flush()
    if self._file:
      self._file.close()
      self._each(lambda tracker: tracker.close())


def _tell(name: str, error: Exception) -> None:
  first = str(error).strip().splitlines() or [type(error).__name__]
  print(
    f"metrics no longer go to {name}: {first[0]}; training goes on",
    file=sys.stderr,
    flush=True,
  )
