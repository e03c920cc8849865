"""`basemt average`: the mean of several checkpoints' weights."""

import argparse

from basemt_jax.commands import flags

SUMMARY = "Average the weights of several checkpoints."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--last", type=int, metavar="K", help="the newest K")
  which.add_argument(
    "--best", type=int, metavar="K", help="the K with the lowest dev loss"
  )
  parser.add_argument(
    "--output",
    required=True,
    metavar="DIR",
    type=flags.path,
    help="the new model directory",
  )


def run(options: argparse.Namespace) -> None:
  """Averages; the new directory is as whole as the old one."""
  from basemt_jax import averaging
  from basemt_jax.commands import configuration

  if not options.model_dir:
    raise configuration.UsageError("--model_dir of a run is needed")
  count, is_best = options.last or options.best, options.best is not None
  steps = averaging.average(options.model_dir, options.output, count, is_best)
  print(
    f"{options.output}/checkpoint_{max(steps)}: the mean of the weights of "
    f"steps {', '.join(map(str, steps))}"
  )
