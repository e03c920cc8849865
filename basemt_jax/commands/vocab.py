"""`basemt vocab`: train a SentencePiece vocabulary."""

import argparse

from basemt_jax import files
from basemt_jax.commands import configuration, flags

SUMMARY = "Train a SentencePiece vocabulary."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.mixture(parser)
  parser.add_argument(
    "--output", required=True, metavar="FILE", type=flags.path
  )
  parser.add_argument("--size", type=int, default=8000, help="pieces")
  parser.add_argument(
    "--temperature",
    type=float,
    default=5.0,
    help="at which directions are sampled",
  )


def run(options: argparse.Namespace) -> None:
  """Trains a vocabulary on a mixture's text; prints its size."""
  from basemt_jax.data import mixtures, vocabulary

  files.check_writable(options.output)
  configuration.import_modules(options.module)
  mixture = options.mixture
  if mixture is None:
    mixture = configuration.configured(options).mixture_or_task_name
  trained = vocabulary.train_from_mixture(
    mixtures.get_mixture(mixture),
    options.output,
    vocab_size=options.size,
    temperature=options.temperature,
  )
  print(f"{options.output}: {trained.vocab_size} pieces")
