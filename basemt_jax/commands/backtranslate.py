"""`basemt backtranslate`: monolingual text to pairs to train on."""

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

from basemt_jax.commands import configuration, console, flags, models

SUMMARY = "Make training pairs of monolingual text, by translating it."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.checkpoint(parser)
  flags.search(parser)
  flags.sampling(parser)
  flags.modules(parser)
  parser.add_argument(
    "--input",
    required=True,
    metavar="FILE",
    type=flags.path,
    help="a sentence a line, also compressed",
  )
  parser.add_argument(
    "--from",
    dest="source",
    required=True,
    metavar="XX",
    help="language of the text, the target of the pairs",
  )
  parser.add_argument(
    "--to", required=True, metavar="YY", help="language to translate it into"
  )
  synthetic_files(parser, "bt")


def synthetic_files(parser: argparse.ArgumentParser, label: str) -> None:
  """Where pairs go that a model wrote one side of, and what they are called."""
  parser.add_argument(
    "--output",
    dest="folder",  # Of all processes; an `output` is the first one's alone.
    required=True,
    metavar="FOLDER",
    type=flags.path,
    help="gets the file of pairs, named as gin/recipes/files.gin reads it",
  )
  parser.add_argument(
    "--label",
    default=label,
    metavar="NAME",
    help=f"of what the model writes, up to 8 letters; default {label}",
  )
  parser.add_argument(
    "--batch_size", type=int, help="sentences side by side on every device"
  )


def run(options: argparse.Namespace) -> None:
  """Translates the text; the same command goes on after a stop."""
  from basemt_jax import checksums, synthesis
  from basemt_jax.data import languages

  text, other = (
    languages.Language.parse(x) for x in (options.source, options.to)
  )
  written = other.labelled(options.label)
  direction = languages.Direction(written, text)
  path = pathlib.Path(options.folder) / f"{direction}.train.tsv"
  model = loaded(options)
  job = synthesis.Job(
    path,
    direction,
    models.tag(model, options.to, options.source),
    lambda: _texts(options.input),
    sum(1 for _ in _texts(options.input)),
    checksums.file_checksum(options.input),
  )
  write([job], model)


def loaded(options: argparse.Namespace, n_best: int = 1) -> Any:
  """The model, with the search that the flags ask for."""
  from basemt_jax import trained

  run = models.with_search(configuration.trained(options), options, n_best)
  return trained.load(run, console.standard(), options.checkpoint)


def write(jobs: list[Any], model: Any) -> None:
  """Writes files one after the other; progress on standard error."""
  from basemt_jax import synthesis

  left = sum(job.count for job in jobs)

  @console.every_few_seconds
  def told(p: Any) -> None:
    seconds = (left - p.done) / max(p.per_second, 1e-9)
    console.say(
      f"{p.job.path.name}: {p.done:,} of {p.job.count:,} sentences, "
      f"{p.per_second:,.1f}/s, {console.minutes(seconds)} left"
    )

  for done in synthesis.write(jobs, model, model.run.search, told):
    left -= done.job.count
    print(
      f"{done.job.path}: {done.done - done.skipped:,} pairs of {done.done:,} "
      f"sentences ({done.skipped:,} left out: empty, too long, or translated "
      "to nothing)"
    )


def _texts(path: str) -> Iterator[tuple[str, str]]:
  """The sentences of a file, normalised; unusable ones are empty."""
  from basemt_jax.data import normalisation, parallel_text

  for _, line in parallel_text.lines(path):
    is_text = not isinstance(line, parallel_text.Trouble)
    yield normalisation.normalise(line) if is_text else "", ""
