"""`basemt prepare`: turn downloaded text into training, dev, test files."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from basemt_jax import files
from basemt_jax.commands import configuration, console, flags

_COUNTS = ("read", "kept")  # Of lines, in a report.

SUMMARY = "Turn downloaded text into training, dev, test files."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "corpus",
    choices=("wmt15", "ml50", "opus100", "files"),
    help="benchmark, or 'files': any with the names of docs/data.md",
  )
  parser.add_argument(
    "--raw", required=True, metavar="DIR", type=flags.path, help="downloads"
  )
  parser.add_argument(
    "--out",
    required=True,
    metavar="DIR",
    type=flags.path,
    help="for the result",
  )
  parser.add_argument(
    "--languages",
    metavar="XX,YY",
    help="of which all pairs are wanted; default: the benchmark's with English",
  )
  for flag, what in (
    ("train", "training text"),
    ("dev", "the dev set"),
    ("test", "the test set"),
    ("held_out", "neither trained nor evaluated on"),
  ):
    parser.add_argument(
      f"--{flag}",
      action="append",
      default=[],
      metavar="GLOB",
      help=f"files that are {what}, whatever their names say; repeatable",
    )
  parser.add_argument(
    "--max_characters", type=int, help="of a side; default 1000"
  )
  parser.add_argument(
    "--max_ratio", type=float, help="of the sides' lengths in bytes; default 4"
  )
  parser.add_argument(
    "--processes", type=int, metavar="N", help="default: one per core"
  )
  parser.add_argument(
    "--max_unpacked_gb",
    type=float,
    metavar="N",
    help="of all files in archives; default 1000",
  )
  parser.add_argument(
    "--beam",
    metavar="OPTIONS",
    help="run on Apache Beam with these options, such as "
    "'--runner=FlinkRunner ...'",
  )


def run(options: argparse.Namespace) -> None:
  """Prepares the raw text; prints a table of pairs of languages, and notes."""
  import dataclasses
  import shlex

  from basemt_jax.corpora import cleaning, preparation
  from basemt_jax.inspection import tables

  decided = {
    "validation" if flag == "dev" else flag: tuple(getattr(options, flag))
    for flag in ("train", "dev", "test", "held_out")
    if getattr(options, flag)
  }
  limits = {
    name: getattr(options, name)
    for name in ("max_characters", "max_ratio", "max_unpacked_gb")
    if getattr(options, name) is not None
  }
  arguments = (
    options.raw,
    options.out,
    dataclasses.replace(_raw_names(options), decided=decided),
    cleaning.Options(**limits),
  )
  if options.beam is not None:
    from basemt_jax.corpora import beam_preparation

    report = beam_preparation.prepare(
      *arguments, beam_options=shlex.split(options.beam)
    )
  else:
    report = preparation.prepare(
      *arguments,
      processes=options.processes,
      progress=console.every_few_seconds(console.say),
    )
  tables.show(_table(report), tables.terminal())
  for line in preparation.notes(report):
    print(files.printable(line))
  print(
    f"{pathlib.Path(options.out, preparation.REPORT)}: all of this, by file"
  )


def _table(report: Mapping[str, Any]) -> Any:
  """A row for each pair of languages."""
  from basemt_jax.inspection import tables

  counts = [pair[name] for pair in report["pairs"].values() for name in _COUNTS]
  return tables.Table(
    "",
    [
      "pair",
      *(tables.Column(name, tables.count) for name in _COUNTS),
      "dropped",
    ],
    [
      [
        name,
        *(pair[column] for column in _COUNTS),
        ", ".join(f"{n:,} {why}" for why, n in pair["dropped"].items()),
      ]
      for name, pair in report["pairs"].items()
    ],
    foot=[["all", sum(counts[::2]), sum(counts[1::2]), ""]],
  )


def _raw_names(options: argparse.Namespace) -> Any:
  """How the files of the corpus are named."""
  import dataclasses
  import importlib
  import itertools

  from basemt_jax.corpora import raw_text
  from basemt_jax.data import languages as languages_lib

  languages = [
    languages_lib.Language.parse(spelled.strip())
    for spelled in (options.languages or "").split(",")
    if spelled.strip()
  ]
  if options.corpus == "files":
    if len(set(languages)) < 2:
      raise configuration.UsageError(
        "prepare files: say --languages, such as en,de,fr"
      )
    different = dict.fromkeys(languages)
    return raw_text.Names(tuple(itertools.combinations(different, 2)))
  module = importlib.import_module(f"tasks.{options.corpus}")
  names = module.BENCHMARK.raw
  if not languages:
    return names
  unknown = sorted({*languages} - {"en", *module.BENCHMARK.languages})
  if unknown:
    raise configuration.UsageError(
      f"--languages: {options.corpus} does not have {', '.join(unknown)}"
    )
  pairs = tuple(pair for pair in names.pairs if pair[1] in languages)
  return dataclasses.replace(names, pairs=pairs)
