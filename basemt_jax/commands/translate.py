"""`basemt translate`: translate lines of text."""

import argparse
import pathlib
import sys

from basemt_jax.commands import configuration, console, evaluate, flags

SUMMARY = "Translate lines of text."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.checkpoint(parser)
  flags.search(parser)
  flags.modules(parser)
  parser.add_argument(
    "--to", required=True, metavar="XX", help="target language"
  )
  parser.add_argument(
    "--from",
    dest="source",
    metavar="XX",
    help="language of the text; asked for where the model needs it",
  )
  parser.add_argument(
    "--input", metavar="FILE", type=flags.path, help="default: standard input"
  )
  parser.add_argument(
    "--output", metavar="FILE", type=flags.path, help="default: standard output"
  )
  parser.add_argument(
    "--n_best", type=int, default=1, help="hypotheses a line, with scores"
  )


def run(options: argparse.Namespace) -> None:
  """Translates lines, of a file or standard input, into one language."""
  import dataclasses

  from basemt_jax import evaluation, files, processes
  from basemt_jax import trained as trained_lib

  if options.output:
    files.check_writable(options.output)
  run = evaluate.with_search(
    configuration.trained(options), options, options.n_best
  )
  trained = trained_lib.load(run, console.standard(), options.checkpoint)
  try:
    tag = trained.tag(options.to, options.source)
  except trained_lib.UnknownTagError as error:
    raise configuration.UsageError(f"--to {options.to}: {error}") from error
  lines = _read_lines(options.input)
  processes.check_same("the input", "\n".join(lines))
  # A few lines do not need the batch that an evaluation fills.
  size = min(run.search.batch_size, max(1, len(lines)))
  search = dataclasses.replace(run.search, batch_size=size)
  nbest = evaluation.translate_texts(
    trained.translator(search), trained.pieces, lines, tag
  )
  text = "".join(
    f"{score:.4f}\t{line}\n" if options.n_best > 1 else f"{line}\n"
    for hypotheses in nbest
    for score, line in hypotheses
  )
  if options.output:
    files.write_atomically(options.output, text)
  else:
    sys.stdout.write(text)


def _read_lines(path: str | None) -> list[str]:
  data = pathlib.Path(path).read_bytes() if path else sys.stdin.buffer.read()
  name = path or "standard input"
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    raise configuration.UsageError(
      f"{name}, line {line}: not UTF-8; convert the text first"
    ) from error
  return text.removesuffix("\n").split("\n") if text else []
