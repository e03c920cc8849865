"""`basemt distil`: a teacher's translations of the training sources."""

import argparse
import pathlib
from typing import Any

from basemt_jax import files as files_lib
from basemt_jax.commands import backtranslate, configuration, flags

SUMMARY = "Translate training sources by a teacher, for a student to train on."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.checkpoint(parser)
  flags.search(parser)
  flags.modules(parser)
  parser.add_argument(
    "--data_dir",
    required=True,
    metavar="FOLDER",
    type=flags.path,
    help="parallel text as gin/recipes/files.gin reads it",
  )
  parser.add_argument(
    "--directions",
    metavar="XX-YY,...",
    help="default: all of the folder that the teacher knows",
  )
  parser.add_argument(
    "--best_by_bleu",
    action="store_true",
    help="of the beam's translations, the one closest to the reference",
  )
  backtranslate.synthetic_files(parser, "kd")


def run(options: argparse.Namespace) -> None:
  """Translates all sources; the same command goes on after a stop."""
  n_best = 1
  if options.best_by_bleu:
    n_best = options.beam_size or 5
  with files_lib.native_output_captured():
    from tasks import files
  from basemt_jax.data import languages

  summary = files.scan(options.data_dir)
  there = {
    f"{a}-{b}": languages.Direction.parse(f"{a}-{b}")
    for pair in summary.files
    for a, b in (pair, pair[::-1])
  }
  there = {name: d for name, d in there.items() if not d.label}
  model = backtranslate.loaded(options, n_best)
  jobs = [
    _job(options, summary, there[name], model)
    for name in _wanted(options.directions, there, model)
  ]
  backtranslate.write(jobs, model)


def _wanted(given: str | None, there: Any, model: Any) -> list[str]:
  """Names of directions, that are in the folder and that the teacher knows."""
  known = [n for n in model.description.directions if n in there]
  if given is None:
    if known:
      return known
    raise configuration.UsageError(
      f"the teacher knows none of the directions of --data_dir: "
      f"{', '.join(there)}; it knows {', '.join(model.description.directions)}"
    )
  names = given.split(",")
  if missing := [name for name in names if name not in known]:
    raise configuration.UsageError(
      f"--directions {', '.join(missing)}: the folder and the teacher have "
      f"only {', '.join(known)} in common"
    )
  return names


def _job(
  options: argparse.Namespace, summary: Any, direction: Any, model: Any
) -> Any:
  from basemt_jax import checksums, synthesis
  from tasks import files

  source, target = direction
  file = summary.direction(source, target)["train"]
  written = type(direction)(source, target.labelled(options.label))
  return synthesis.Job(
    pathlib.Path(options.folder) / f"{written}.train.tsv",
    written,
    model.tag(target, source),
    lambda: files.read_direction(summary, "train", source, target),
    summary.reports[file].pairs,
    " ".join(checksums.file_checksum(path) for path in file.paths),
    options.best_by_bleu,
  )
