"""`basemt inspect`: which views, of what, and where they are written."""

import argparse
import copy
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from basemt_jax import description, files
from basemt_jax.commands import configuration, console, flags
from basemt_jax.data import languages, row_store
from basemt_jax.inspection import (
  forecasting,
  page,
  run_report,
  run_view,
  sampling_view,
  text_report,
  text_view,
)

SUMMARY = "Look at data, sampling or a run, before and after."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "--view",
    action="append",
    choices=("task", "mixture", "run"),
    help="task: text; mixture: sampling; run: what was trained; repeatable; "
    "default: whatever there is",
  )
  flags.mixture(parser)
  parser.add_argument("--task", dest="mixture", help="a single task instead")
  flags.checkpoint(parser)
  parser.add_argument(
    "--against",
    action="append",
    default=[],
    metavar="FILE_OR_NAME=VALUE",
    help="a second sampling strategy beside the configured one: a recipe, or "
    "a binding such as MAX_EPOCHS=4; repeatable",
  )
  parser.add_argument(
    "--sample",
    type=int,
    metavar="PAIRS",
    help="of a split to look at; default 2000",
  )
  parser.add_argument("--full", action="store_true", help="look at all pairs")
  parser.add_argument(
    "--lengths",
    metavar="INPUTS,TARGETS",
    help="where the model cuts, in tokens; default: configured, or 256,256",
  )
  parser.add_argument(
    "--max_epochs",
    type=float,
    default=10.0,
    help="warn of directions that are gone through more often",
  )
  flags.report_files(parser)


def run(options: argparse.Namespace) -> None:
  """Prints and writes the views that the flags ask for."""
  for path in filter(None, (options.json, options.html)):
    files.check_writable(path)
  configuration.import_modules(options.module)
  views = options.view or _views_there_are(options)
  run = _inspected_run(options, views)
  mixture = options.mixture or (run and run.mixture_or_task_name)
  sections: list[Any] = []
  numbers: dict[str, Any] = {}
  data = None
  if "task" in views or ("mixture" in views and not _store_there_is(run)):
    data = _inspect_data(options, run, mixture)
  if data and "task" in views:
    sections.append(text_view.section(data))
    numbers["task"] = dataclasses.asdict(data)
  if "mixture" in views:
    forecasts = _forecasts(options, run, data)
    name = getattr(mixture, "name", mixture)
    sections.append(sampling_view.section(name, forecasts))
    numbers["mixture"] = [dataclasses.asdict(f) for f in forecasts]
  if "run" in views:
    report = run_report.inspect_run(run, console.standard(), options.checkpoint)
    sections.append(run_view.section(report))
    numbers["run"] = dataclasses.asdict(report)
  page.print_sections(sections)
  title = (
    f"basemt inspect: {options.model_dir or getattr(mixture, 'name', mixture)}"
  )
  page.write(options.json, options.html, title, sections, numbers)


def _views_there_are(options: argparse.Namespace) -> list[str]:
  """What can be shown of what was given."""
  if options.model_dir:
    return ["mixture", "run"]
  if options.gin_file:
    return ["task", "mixture"]
  if options.mixture:
    return ["task"]
  raise configuration.UsageError(
    "nothing to inspect: give --mixture or --task (and --module, which "
    "registers it), --gin_file of a recipe, or --model_dir of a run"
  )


def _inspected_run(options: argparse.Namespace, views: Sequence[str]) -> Any:
  """The configured run; None where there is no configuration."""
  if not options.gin_file and not options.model_dir:
    if set(views) & {"mixture", "run"}:
      raise configuration.UsageError(
        f"--view {views[0]} needs a run: give --gin_file of a recipe, or "
        "--model_dir"
      )
    return None
  if not options.gin_file and not options.mixture:
    return configuration.trained(options)
  macros = {"MIXTURE_OR_TASK_NAME": options.mixture} if options.mixture else {}
  if "run" not in views:
    # Neither a model nor a directory matters to data.
    macros["MODEL_DIR"] = options.model_dir or "unused"
  options = copy.copy(options)
  if options.gin_file and "run" not in views:
    options.gin_file = ["gin/models/tiny.gin", *options.gin_file]
  return configuration.configured(options, **macros)


def _run_against(options: argparse.Namespace, run: Any) -> Any:
  """The run with the other sampling: bindings changed, or another recipe's.

  A recipe sets everything, so that it is read by itself; steps and batch stay
  the run's, unless they are what is compared.
  """
  import gin

  gin.clear_config()
  bindings = [x.removeprefix("--gin.") for x in options.against if "=" in x]
  files = [x for x in options.against if "=" not in x]
  options = copy.copy(options)
  if not files and not options.gin_file:
    raise configuration.UsageError(
      f"--against {bindings[0]} changes a recipe: give the run's --gin_file too"
    )
  if not files:
    options.bindings = [*options.bindings, *bindings]
    return _inspected_run(options, ["mixture"])
  bound = {binding.partition("=")[0].strip() for binding in bindings}
  macros = {
    "TRAIN_STEPS": run.settings.train_steps,
    "BATCH_SIZE": run.batch_size,
    "MIXTURE_OR_TASK_NAME": "unused",
    "MODEL_DIR": "unused",
  }
  options.gin_file = ["gin/models/tiny.gin", *files]
  options.bindings, options.model_dir = bindings, None
  return configuration.configured(
    options, **{k: v for k, v in macros.items() if k not in bound}
  )


def _store_there_is(run: Any) -> Any:
  """The run's row store, if it has been built, or what is known of it."""
  if run is None:
    return None
  if run.store_dir and not pathlib.Path(run.store_dir).exists():
    return description.read(run.model_dir).header
  if run.store_dir:
    return run.store()
  from basemt_jax.data import store_building  # Imports SeqIO and TensorFlow.

  directory = store_building.store_directory(
    run.mixture_or_task_name,
    run.task_feature_lengths,
    run.cache_dir or row_store.default_cache_dir(),
    long_pairs=run.long_pairs,
    subwords=run.subwords,
  )
  if not (directory / "store.json").exists():
    return None
  if not row_store.read_header(directory)["complete"]:
    return None
  return row_store.RowStore(directory)


def _inspect_data(options: argparse.Namespace, run: Any, mixture: Any) -> Any:
  lengths = {"inputs": 256, "targets": 256}
  if run:
    lengths = dict(run.task_feature_lengths)
  if options.lengths:
    found = re.fullmatch(r"(\d+),(\d+)", options.lengths)
    if not found:
      raise configuration.UsageError(
        f"--lengths {options.lengths}: write two numbers of tokens, such as "
        "256,256"
      )
    lengths = {"inputs": int(found[1]), "targets": int(found[2])}
  if options.sample is not None and options.sample < 1:
    raise configuration.UsageError(
      f"--sample {options.sample}: look at 1 pair at least"
    )
  sample = None if options.full else options.sample or text_report.SAMPLE
  done, say = itertools.count(1), console.every_few_seconds(console.say)
  return text_report.inspect_data(
    mixture,
    text_report.Options(
      lengths,
      sample,
      bands=run.bands if run else languages.BandThresholds(),
    ),
    lambda name: say(f"looked at {name}, {next(done)} directions done"),
  )


def _forecasts(options: argparse.Namespace, run: Any, data: Any) -> list[Any]:
  """What the configured strategy will draw, and another one's beside it."""
  store = _store_there_is(run)
  sizes = (
    forecasting.sizes_of_store(store)
    if store
    else forecasting.sizes_of_data(data)
  )
  runs = {"configured": run}
  if options.against:
    name = " ".join(
      x if "=" in x else pathlib.Path(x).stem for x in options.against
    )
    runs[name] = _run_against(options, run)
  return [
    forecasting.forecast(
      name,
      own.strategy,
      sizes,
      own.settings.train_steps,
      own.batch_size,
      run.bands,
      options.max_epochs,
    )
    for name, own in runs.items()
  ]
