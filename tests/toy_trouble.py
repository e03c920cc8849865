"""Text with trouble in known places, as SeqIO tasks and mixture."""

import pathlib

import seqio

from basemt_jax.data import mixtures
from basemt_jax.data import vocabulary as vocabulary_lib
from tasks import common

MODEL = pathlib.Path(mixtures.__file__).parents[2] / "tasks" / "cldr.model"

# Ogham is in no vocabulary: its characters become three bytes each.
_WORDS = ["one", "two", "three", "hundred", "June", "zwölf", "ᚁᚂ", "Freitag"]


def pair(i):
  words = [_WORDS[(i * k) % len(_WORDS)] for k in range(1, 3 + i * 7919 % 23)]
  return " ".join(words), " ".join(words[::-2]) + f" {i}"


def splits_of_a_direction():
  """Splits of a direction, with trouble in known places."""
  train = [pair(i) for i in range(120)]
  train[10:14] = train[3:7]  # Four repeats.
  train[20] = train[3]  # And one more.
  train[30] = ("same as before", "same as before")
  train[31] = ("the same ", "the same")
  train[40] = ("", "something")
  dev = [pair(i) for i in range(1000, 1030)]
  dev[0], dev[1] = train[50], train[51]
  dev[2] = (train[52][0], "another target")
  test = [pair(i) for i in range(2000, 2020)]
  test[5] = ("another source", train[60][1])
  return {"train": train, "validation": dev, "test": test}


def register(name, splits, vocabulary):
  return common.add_direction(
    "planted",
    *name.split("-"),
    splits.__getitem__,
    {split: len(pairs) for split, pairs in splits.items()},
    vocabulary.seqio(),
  )


def planted():
  """A mixture of two directions, and their texts."""
  pieces = vocabulary_lib.Vocabulary.load(MODEL)
  splits = {"en-de": splits_of_a_direction()}
  # The other way round, without its test split, and shorter.
  splits["de-en"] = {
    split: [pair[::-1] for pair in splits["en-de"][split]][:70]
    for split in ("train", "validation")
  }
  for name, own in splits.items():
    register(name, own, pieces)
  seqio.MixtureRegistry.add(
    "planted", [("planted.en_de", 1), ("planted.de_en", 1)]
  )
  return splits
