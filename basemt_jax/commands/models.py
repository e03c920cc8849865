"""The trained model of a command, and the search that its flags ask for."""

import argparse
import dataclasses
import pathlib
from typing import Any

from basemt_jax.commands import checks, configuration, console


def is_export(run: Any) -> bool:
  """Whether a run's directory is an export for CTranslate2."""
  from basemt_jax.exports import ctranslate

  return (pathlib.Path(run.model_dir) / ctranslate.MODEL_FILE).exists()


def load(run: Any, which: str, device: str = "auto", threads: int = 0) -> Any:
  """The model of a run's directory, at a checkpoint or as an export has it.

  Device and threads are of an export for CTranslate2.
  """
  from basemt_jax import trained
  from basemt_jax.exports import ctranslate

  if is_export(run):
    return dataclasses.replace(
      ctranslate.load(run, device, threads), console=console.standard()
    )
  return trained.load(run, console.standard(), which)


def tag(model: Any, to: str, source: str | None) -> Any:
  """What asks for the language of --to, out of that of --from.

  Raises:
    UsageError: There is no telling.
  """
  from basemt_jax import trained

  try:
    return model.tag(to, source)
  except trained.UnknownTagError as error:
    flag = " (--from)" if isinstance(error, trained.NoSourceError) else ""
    raise configuration.UsageError(f"--to {to}: {error}{flag}") from error


def with_search(run: Any, options: argparse.Namespace, n_best: int = 1) -> Any:
  """The run with the search that the flags ask for."""
  changes = _given(options, "beam_size", "alpha", "batch_size")
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
  return dataclasses.replace(run, search=_checked(search))


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
  """The flags of these names that there are and that were given."""
  found = {name: getattr(options, name, None) for name in names}
  return {name: value for name, value in found.items() if value is not None}


def _checked(record: Any) -> Any:
  """A record whose fields flags have set.

  Raises:
    UsageError: One does not fit.
  """
  try:
    checks.check_fields(record)
  except ValueError as error:
    flag = str(error).replace(f"{type(record).__name__}.", "--")
    raise configuration.UsageError(flag) from error
  return record


def _sampling(options: argparse.Namespace) -> Any:
  """How the flags ask to draw; None where they do not."""
  from basemt_jax import decoding

  given = _given(options, "temperature", "top_k", "top_p", "seed")
  if not getattr(options, "sample", False):
    if given:
      raise configuration.UsageError(
        f"--{next(iter(given))} is about sampling: add --sample, or leave it "
        "out"
      )
    return None
  return _checked(decoding.Sampling(**given))
