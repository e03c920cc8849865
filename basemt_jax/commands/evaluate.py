"""`basemt evaluate`: loss, BLEU and chrF++ per direction."""

import argparse
from typing import Any

from basemt_jax.commands import checks, configuration, console, flags

SUMMARY = "Loss, BLEU and chrF++ per direction."


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
    "the data that the model was trained on",
  )


def run(options: argparse.Namespace) -> None:
  """Evaluates the checkpoint; prints and writes the scores."""
  from basemt_jax import trained

  run = with_search(configuration.trained(options), options)
  if options.test_sets:
    _evaluate_test_sets(run, options)
    return
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
  trained = trained_lib.load(run, console.standard(), options.checkpoint)
  # All are read before the first is translated.
  found = {
    name: [
      trained.texts(direction, pairs) for direction, pairs in texts.items()
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


def with_search(run: Any, options: argparse.Namespace, n_best: int = 1) -> Any:
  """The run with the search that the flags ask for."""
  import dataclasses

  changes = {
    name: getattr(options, name)
    for name in ("beam_size", "alpha")
    if getattr(options, name) is not None
  }
  beam_size = changes.get("beam_size", max(run.search.beam_size, n_best))
  if beam_size < 1:
    raise configuration.UsageError(
      f"--beam_size is {beam_size}; it must be 1 (greedy search) or more"
    )
  if not 1 <= n_best <= beam_size:
    raise configuration.UsageError(
      f"--n_best is {n_best} with --beam_size {beam_size}; a search gives from "
      "1 to as many hypotheses as its beam is large"
    )
  search = dataclasses.replace(
    run.search,
    **{**changes, "beam_size": beam_size, "num_return": n_best},
    sampling=_sampling(options),
  )
  try:
    checks.check_fields(search)
  except ValueError as error:
    raise configuration.UsageError(
      str(error).replace("SearchOptions.", "--")
    ) from error
  return dataclasses.replace(run, search=search)


def _sampling(options: argparse.Namespace) -> Any:
  """How the flags ask to draw; None where they do not."""
  from basemt_jax import decoding

  names = ("temperature", "top_k", "top_p", "seed")
  found = {name: getattr(options, name, None) for name in names}
  given = {name: value for name, value in found.items() if value is not None}
  if not getattr(options, "sample", False):
    if given:
      raise configuration.UsageError(
        f"--{next(iter(given))} is about sampling: add --sample, or leave it "
        "out"
      )
    return None
  sampling = decoding.Sampling(**given)
  try:
    checks.check_fields(sampling)
  except ValueError as error:
    raise configuration.UsageError(
      str(error).replace("Sampling.", "--")
    ) from error
  return sampling


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
  print(f"""
{result.test_set} at step {result.step}; scores, translations:
      {result.directory}
next: echo "..." | basemt translate --model_dir {run.model_dir} --to {target}
      tensorboard --logdir {run.model_dir}""")
  if writer is not None:
    means = evaluation.summarise(result.results)
    writer.write_scalars(
      result.step, evaluation.scalars(result.test_set, result.results, means)
    )
