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
  """The model of a model directory or of an export for CTranslate2.

  Args:
    run: Of the directory.
    which: Checkpoint; an export is one.
    device: Of an export.
    threads: Likewise.
  """
  from basemt_jax import trained
  from basemt_jax.exports import ctranslate

  if is_export(run):
    return dataclasses.replace(
      ctranslate.load(run, device, threads), console=console.standard()
    )
  return trained.load(run, console.standard(), which)


def tag(model: Any, to: str, source: str | None) -> Any:
  """What asks for a language; see `trained.Trained.tag`.

  Args:
    model: The model.
    to: Of the flag --to.
    source: Of the flag --from.

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
