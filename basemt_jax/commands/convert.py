"""`basemt convert`: turn a dense checkpoint into a sparse."""

import argparse

from basemt_jax.commands import configuration, console, flags

SUMMARY = "Turn a dense checkpoint into a sparse."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.checkpoint(parser)
  flags.modules(parser)
  parser.add_argument(
    "--from", dest="source", required=True, metavar="DENSE_DIR", type=flags.path
  )
  parser.add_argument(
    "--to", dest="target", required=True, metavar="SPARSE_DIR", type=flags.path
  )


def run(options: argparse.Namespace) -> None:
  """Converts the checkpoint; prints how well the models agree."""
  from basemt_jax import description, training

  configuration.import_modules(options.module)
  arguments = {}
  if description.exists(options.source):
    # The dense model's own data counts; the configured need not be there.
    arguments = {"mixture_or_task_name": options.source}
  run = configuration.configured(options, arguments, MODEL_DIR=options.target)
  step, error = training.convert(
    run,
    options.source,
    options.checkpoint,
    console.standard(),
    lambda: configuration.save_config(run.model_dir),
  )
  print(
    f"{run.model_dir}/checkpoint_{step}: converted; largest relative "
    f"difference of the function on a training batch {error:.1e}"
  )
