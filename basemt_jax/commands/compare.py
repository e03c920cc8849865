"""`basemt compare`: runs side by side."""

import argparse
import dataclasses
import pathlib

from basemt_jax import files
from basemt_jax.commands import configuration, flags

SUMMARY = "Compare runs: settings, scores and their significance, curves."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "runs",
    nargs="+",
    metavar="RUN",
    help="model directories, the baseline first",
  )
  parser.add_argument(
    "--samples",
    type=int,
    default=1000,
    help="of the paired bootstrap; default 1000",
  )
  flags.report_files(parser)


def run(options: argparse.Namespace) -> None:
  """Compares two runs or more; prints, and writes files if asked to."""
  from basemt_jax.inspection import compare, page

  if len(options.runs) < 2:
    raise configuration.UsageError(
      f"only {options.runs[0]} is given: name two runs or more to compare"
    )
  if options.samples < 1:
    raise configuration.UsageError(
      f"--samples {options.samples}: the bootstrap needs 1 sample at least"
    )
  for path in filter(None, (options.json, options.html)):
    files.check_writable(path)
  runs = compare.compare([*map(pathlib.Path, options.runs)], options.samples)
  section = compare.section(runs)
  page.print_sections([section])
  numbers = {"runs": [dataclasses.asdict(run) for run in runs]}
  page.write(options.json, options.html, "basemt compare", [section], numbers)
