"""`basemt train`: train, or go on, and evaluate."""

import argparse

from basemt_jax.commands import (
  configuration,
  console,
  evaluate,
  flags,
  trackers,
)

SUMMARY = "Train, or go on, and evaluate."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.modules(parser)


def run(options: argparse.Namespace) -> int:
  """Trains, and evaluates the trained model; returns the exit code."""
  configuration.keep_memory()  # Before JAX has threads.
  from basemt_jax import trained, training

  run = configuration.configured(options)
  known = run.settings.known_metrics
  with trackers.Writer(run.model_dir, run.trackers, known) as writer:

    def started() -> None:
      configuration.save_config(run.model_dir)
      writer.open()

    outcome = training.train(
      run,
      writer,
      console.standard(),
      started,
    )
    if outcome == "interrupted":
      print(
        "stopped: the same command goes on from the checkpoint just written"
      )
      return 0
    try:
      evaluate.print_evaluation(
        run, trained.evaluate(run, console.standard()), writer
      )
    except trained.NoPairsError as error:
      print(f"trained, but not evaluated: {error}")
  return 0
