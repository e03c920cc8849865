"""`basemt evaluate`: loss, BLEU and chrF++ per direction."""

import argparse
from typing import Any

from basemt_jax.commands import configuration, console, flags, models

SUMMARY = "Loss, BLEU and chrF++ per direction, of a model or an export."


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.checkpoint(parser)
  flags.search(parser)
  flags.modules(parser)
  parser.add_argument("--split", default="test", help="test or validation")
  parser.add_argument(
    "--metric_command",
    metavar="COMMAND",
    help="scores the translations too, such as COMET (docs/use.md)",
  )
  parser.add_argument(
    "test_sets",
    nargs="*",
    type=flags.path,
    metavar="FOLDER_OR_FILE",
    help="test sets of any kind that docs/data.md lists; default: the split of "
    "the data that the model was trained on, which no export has",
  )


def run(options: argparse.Namespace) -> None:
  """Evaluates the checkpoint; prints and writes the scores."""
  from basemt_jax import trained

  run = models.with_search(configuration.trained(options), options)
  if options.test_sets:
    _evaluate_test_sets(run, options)
    return
  if models.is_export(run):
    raise configuration.UsageError(
      f"{run.model_dir} is an export, which has no data of its own: name test "
      f"sets, as in basemt evaluate --model_dir {run.model_dir} FOLDER"
    )
  print_evaluation(
    run,
    trained.evaluate(
      run,
      console.standard(),
      options.checkpoint,
      options.split,
      options.metric_command,
    ),
  )


def _evaluate_test_sets(run: Any, options: argparse.Namespace) -> None:
  """Evaluates on files, whatever has become of the model's own data."""
  from basemt_jax import trained as trained_lib
  from basemt_jax.corpora import test_sets

  trained_lib.check_evaluation(run)
  trained = models.load(run, options.checkpoint)
  # All are read before the first is translated.
  found = {
    name: [
      trained_lib.tagged_texts(trained.description, direction, pairs)
      for direction, pairs in texts.items()
    ]
    for name, texts in test_sets.find(
      options.test_sets, trained.description.directions, options.split
    ).items()
  }
  translator = trained.translator()
  for name, texts in found.items():
    print(f"{name}:\n")
    print_evaluation(
      run,
      trained_lib.evaluate_texts(
        *(trained, translator, name, texts),
        command=options.metric_command,
      ),
    )


def print_evaluation(run: Any, result: Any, writer: Any = None) -> None:
  """The table, some translations, and what to do next; scores to a writer."""
  from basemt_jax import evaluation
  from basemt_jax.data import languages
  from basemt_jax.inspection import scores

  scores.print_scores(result.results)
  print()
  for line in scores.sample_lines(result.translations, 4):
    print(line)
  if result.not_written:  # They have been shown all the same.
    raise result.not_written
  targets = [
    languages.Direction.parse(r.direction).target for r in result.results
  ]
  target = next((x for x in targets if x.base != "en"), targets[0])
  at = "" if result.step is None else f" at step {result.step}"
  print(f"""
{result.test_set}{at}; scores, translations:
      {result.directory}
next: echo "..." | basemt translate --model_dir {run.model_dir} --to {target}\
""")
  if result.step is not None:
    print(f"      tensorboard --logdir {run.model_dir}")
  if writer is not None:
    means = evaluation.summarise(result.results)
    writer.write_scalars(
      result.step, evaluation.scalars(result.test_set, result.results, means)
    )
