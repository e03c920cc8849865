"""Many runs one after the other, in a process that compiles each program once.

    PYTHONPATH=. python benchmarks/study/several.py --store DIR --logs DIR \
      --runs benchmarks/study/first.txt --part 0 --seconds 500

A file of runs has a line for each: its part, the log's name, a system of
`systems`, a seed, and changes to the fields of `systems.System` and
`systems.Size`. Text after # is not read. A process makes the runs of one part,
as long as there is time: when it is over, the run that is going on is
stopped, and its log says so.

Two processes on one GPU lose nothing to one: each compiles while the other
trains.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import shutil
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from basemt_jax import model as model_lib
from basemt_jax import phases, reports, steps, trainer
from basemt_jax.data import batches, row_store
from benchmarks.study import runs, systems


@dataclasses.dataclass(frozen=True)
class Planned:
  """A line of a file of runs."""

  part: int  # of which process
  name: str  # of the log
  system: systems.System  # with its changes
  system_name: str  # before the changes
  size: systems.Size  # with its changes
  seed: int  # of model and data

  @property
  def label(self) -> str:
    """Names its files."""
    return f"{self.name}_{self.seed}"


def planned(text: str) -> list[Planned]:
  """Reads a file of runs."""
  found = []
  of_size = {field.name for field in dataclasses.fields(systems.Size)}
  for line in text.splitlines():
    words = line.partition("#")[0].split()
    if not words:
      continue
    part, name, system, seed, *changes = words
    sizes = [c for c in changes if c.partition("=")[0] in of_size]
    others = [c for c in changes if c not in sizes]
    found.append(
      Planned(
        int(part),
        name,
        systems.with_changes(systems.SYSTEMS[system], others),
        system,
        systems.with_changes(systems.Size(), sizes),
        int(seed),
      )
    )
  return found


class Shared:
  """Programs of earlier runs, for later ones."""

  def __init__(self) -> None:
    self._programs: dict[Any, steps.Program] = {}

  def program(
    self,
    config: model_lib.TransformerConfig,
    settings: steps.Settings,
    phase: str,
    mesh: jax.sharding.Mesh,
    num_directions: int,
  ) -> steps.Program:
    """`phases.program`, or one that does the same for the run's settings."""
    key = (
      phases.network(config, settings, phase),
      phases.learning_rate(settings, phase),
      settings.optimizer,
      settings.average_decay,
      settings.label_smoothing,
      settings.z_loss,
      settings.microbatches,
      num_directions,
    )
    if key not in self._programs:
      self._programs[key] = phases.program(
        config, settings, phase, mesh, num_directions
      )
    return self._programs[key].with_settings(settings)


def make(
  plan: Planned,
  store: row_store.RowStore,
  options: argparse.Namespace,
  shared: Shared,
  deadline: float,
) -> str:
  """Makes one run; returns its outcome, as `trainer.Trainer.run` does."""
  model_dir = options.work / plan.label
  shutil.rmtree(model_dir, ignore_errors=True)
  described = systems.run_of(
    plan.system, plan.size, plan.seed, options.store, str(model_dir)
  )
  start = time.perf_counter()
  path = options.logs / f"{plan.label}.jsonl"
  with contextlib.closing(runs.Log(path)) as log:
    log.write(**_header(plan, store, options))
    loop = trainer.Trainer(
      described.config(store),
      described.settings,
      described.mesh(),
      store.directions,
      described.train_batches(store),
      described.model_dir,
      log,
      dev_batches=lambda: batches.eval_batches(
        store, "validation", plan.size.batch_size
      ),
      hooks=reports.Hooks(message=lambda text: _say(plan, text)),
      make_program=lambda phase: shared.program(
        described.config(store),
        described.settings,
        phase,
        described.mesh(),
        len(store.directions),
      ),
    )
    timer = threading.Timer(max(deadline - time.monotonic(), 0), loop.stop)
    timer.daemon = True
    timer.start()
    with contextlib.closing(loop):
      outcome = loop.run()
    timer.cancel()
    seconds = round(time.perf_counter() - start, 1)
    log.write(outcome=outcome, trained_after=seconds)
    print(f"{plan.label}: {outcome} after {seconds} s", flush=True)
  if options.weights and outcome == "done":
    _save(
      options.weights / f"{plan.label}.npz",
      loop.program.averaged_variables(loop.state),
    )
  shutil.rmtree(model_dir)
  return outcome


def _header(
  plan: Planned, store: row_store.RowStore, options: argparse.Namespace
) -> dict[str, Any]:
  """What a log says of its run."""
  return {
    "system": plan.system_name,
    "name": plan.name,
    "seed": plan.seed,
    "settings": systems.settings_of(plan.system),
    "network": systems.network_of(plan.system),
    "size": dataclasses.asdict(plan.size),
    "pairs": runs.pairs_of(store),
    "bands": {"high": options.high, "low": options.low},
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }


def _save(path: pathlib.Path, variables: Any) -> None:
  """Writes a model's collections, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
  part = path.with_suffix(".part.npz")
  np.savez(part, **flat)
  part.rename(path)


def _say(plan: Planned, text: str) -> None:
  print(f"{plan.label}: {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
  """Makes the runs of a part."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--store", required=True)
  parser.add_argument("--logs", type=pathlib.Path, required=True)
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--part", type=int, required=True)
  parser.add_argument("--seconds", type=float, required=True)
  parser.add_argument("--work", type=pathlib.Path, default="/dev/shm/study")
  parser.add_argument("--high", type=int, default=systems.BANDS.high)
  parser.add_argument("--low", type=int, default=systems.BANDS.low)
  parser.add_argument(
    "--weights", type=pathlib.Path, help="leave them there for translations.py"
  )
  options = parser.parse_args(arguments)
  deadline = time.monotonic() + options.seconds
  options.logs.mkdir(parents=True, exist_ok=True)
  store, shared = row_store.RowStore(options.store), Shared()
  for plan in planned(options.runs.read_text(encoding="utf-8")):
    if plan.part == options.part and time.monotonic() < deadline:
      try:
        make(plan, store, options, shared, deadline)
      except Exception:  # One run that fails should not cost the others.
        traceback.print_exc()


if __name__ == "__main__":
  main()
