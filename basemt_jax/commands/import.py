# ruff: noqa: N999
"""`basemt import`: a model directory of what `basemt export` wrote."""

import argparse
import pathlib

from basemt_jax.commands import configuration, flags

SUMMARY = "Make a model directory of a model exported as safetensors."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.modules(parser)
  parser.add_argument(
    "--from", dest="source", required=True, metavar="DIR", type=flags.path
  )
  parser.add_argument(
    "--to", required=True, metavar="MODEL_DIR", type=flags.path
  )


def run(options: argparse.Namespace) -> None:
  """Writes a checkpoint, the description and the vocabulary."""
  from basemt_jax.exports import safetensors_files

  configuration.import_modules(options.module)
  step = safetensors_files.to_model_directory(
    pathlib.Path(options.source), pathlib.Path(options.to), options.module
  )
  print(f"{options.to}/checkpoint_{step}: imported")
