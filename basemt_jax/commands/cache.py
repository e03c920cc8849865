"""`basemt cache`: build a run's packed rows ahead of training."""

import argparse

from basemt_jax.commands import configuration, console, flags

SUMMARY = "Build a run's packed rows ahead of training."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.modules(parser)
  parser.add_argument(
    "--seqio_dir",
    metavar="DIR",
    type=flags.path,
    help="build SeqIO's own cache of the tasks there instead, for T5X",
  )


def run(options: argparse.Namespace) -> None:
  """Builds the run's row store, or SeqIO's cache of its tasks."""
  run = configuration.configured(options)
  if options.seqio_dir:
    from basemt_jax.data import task_cache

    folders = task_cache.cache_mixture(
      run.mixture_or_task_name,
      options.seqio_dir,
      console.every_few_seconds(
        lambda name, done: console.say(f"{name}: {done:,} examples")
      ),
    )
    print(f"{options.seqio_dir}: {len(folders)} tasks")
    return
  store = run.store(console.standard().building)
  print(f"{store.directory}: {store.rows('train').sum()} training rows")
