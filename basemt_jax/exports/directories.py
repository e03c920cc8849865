"""What every export holds besides its arrays, so that it is whole.

model.json          what was trained, as in a model directory
vocabulary.model    the SentencePiece model; none for bytes
README.md           the model card
checksums.json      of all but the card
"""

import dataclasses
import importlib
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

from basemt_jax import checksums, description, files, trained
from basemt_jax.data import vocabulary
from basemt_jax.exports import model_card


def library(name: str) -> Any:
  """A module of the extra `export`.

  Raises:
    ValueError: It is not installed.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f"{name.partition('.')[0]} is not installed: "
      "pip install 'basemt_jax[export]'"
    ) from error


def write(
  target: str | pathlib.Path,
  model: trained.Trained,
  fill: Callable[[pathlib.Path], None],
  weights: str,
  use: str,
  licence: str = model_card.UNKNOWN_LICENCE,
) -> None:
  """Writes an export into a new folder, all of it or nothing.

  `fill` writes the arrays. The card says what they are (`weights`), under
  which licence, and with which command to use them ('{}' is the folder).

  Raises:
    ValueError: The target is there; see also `model_card.text`.
  """
  name = pathlib.Path(target).absolute().name
  use = use.format(shlex.quote(name))
  card = model_card.text(model, name, weights, use, licence)
  with files.new_directory(target) as directory:
    fill(directory)
    description.write(directory, _alone(model.description), model.pieces)
    files.write_atomically(directory / model_card.FILE, card)
    checksums.seal(directory, but=(model_card.FILE,))


def _alone(known: description.Description) -> description.Description:
  """The description of a model without its run.

  Averaged weights, if there were any, are now the only ones; and where rows lay
  on the machine of the training is nobody's business.
  """
  return dataclasses.replace(
    known,
    settings={**known.settings, "average_decay": 0.0},
    store=pathlib.Path(known.store).name,
  )


def read(
  directory: str | pathlib.Path, arrays: str
) -> tuple[description.Description, vocabulary.Vocabulary]:
  """Description and vocabulary of an export that is whole.

  The name of its file of arrays tells its kind.

  Raises:
    ValueError: It is no export of that kind, or damaged.
  """
  root = pathlib.Path(directory)
  if not (root / arrays).is_file():
    raise ValueError(
      f"{directory} is no export of that kind: it holds no {arrays}; give a "
      "directory that `basemt export` wrote in that format"
    )
  damage = checksums.damage(root)
  if damage:
    raise ValueError(f"{directory} is damaged: {'; '.join(damage)}")
  known = description.read(root)
  return known, description.read_vocabulary(root, known)
