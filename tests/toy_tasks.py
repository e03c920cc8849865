"""The corpus of `toy` as SeqIO tasks and mixture, for those who want a name."""

import seqio
import toy

from tasks import common

LENGTHS = {"inputs": toy.LAYOUT.inputs, "targets": toy.LAYOUT.targets}


def _read(direction):
  def read(split):
    for record in toy.texts(split, direction):
      yield record["source"], record["target"]

  return read


def _register():
  tasks = [
    common.add_direction(
      "toy",
      *direction.split("-"),
      _read(direction),
      {"train": pairs, "validation": 6, "test": 6},
      seqio.ByteVocabulary(),
    )
    for direction, pairs in toy.PAIRS.items()
  ]
  return common.add_mixture("toy", tasks)


MIXTURE = _register()
