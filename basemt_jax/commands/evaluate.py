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


def run(options: argparse.Namespace) -> None:
  """Evaluates the checkpoint; prints and writes the scores."""
  from basemt_jax import trained

  run = with_search(configuration.trained(options), options)
  print_evaluation(
    run,
    trained.evaluate(
      run, console.standard(), options.checkpoint, options.split
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
  search = dataclasses.replace(
    run.search,
    **{**changes, "beam_size": beam_size, "num_return": n_best},
    sampling=_sampling(options),
  )
  checks.check_fields(search)
  return dataclasses.replace(run, search=search)


def _sampling(options: argparse.Namespace) -> Any:
  """How the flags ask to draw; None where they do not."""
  from basemt_jax import decoding

  names = ("temperature", "top_k", "top_p", "seed")
  if not getattr(options, "sample", False):
    return None
  found = decoding.Sampling(*(getattr(options, name) for name in names))
  checks.check_fields(found)
  return found


def print_evaluation(run: Any, result: Any, writer: Any = None) -> None:
  """The table, some translations, and what to do next; scores to a writer."""
  from basemt_jax import evaluation
  from basemt_jax.data import languages
  from basemt_jax.inspection import scores

  scores.print_scores(result.results)
  print()
  for line in scores.sample_lines(result.translations, 4):
    print(line)
  targets = [
    languages.Direction.parse(r.direction).target for r in result.results
  ]
  target = next((x for x in targets if x.base != "en"), targets[0])
  print(f"""
{result.split} at step {result.step}; scores, translations: {result.directory}
next: echo "..." | basemt translate --model_dir {run.model_dir} --to {target}
      tensorboard --logdir {run.model_dir}""")
  if writer is not None:
    means = evaluation.summarise(result.results)
    writer.write_scalars(
      result.step, evaluation.scalars(result.split, result.results, means)
    )
