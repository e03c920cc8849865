"""A sample of a split, by which a changed task is told from the same one.

Which pairs are in it is a pure function of their positions, drawn once and for
all: of the first `_DENSE` all, of every doubling of the split after that as
many as before, about. So it reaches across a split of any length, and is known
before the length is. What is kept are digests of blocks of it, some dozens for
a split of millions of pairs, so that a reader in a hurry can compare the first.
"""

import numpy as np
import xxhash

from basemt_jax.data import packing, permutation

_DENSE = 1 << 14
_BLOCKS = 32  # Of the first `_DENSE` pairs, and of every doubling.


def positions(start: int, stop: int) -> np.ndarray:
  """Those from `start` to `stop` that are in the sample; int64, rising."""
  at = np.arange(start, stop)
  # 0 up to _DENSE, then 1, 2, ...: one more for each doubling.
  level = np.frexp((at // _DENSE).astype(float))[1].astype(np.uint64)
  drawn = permutation.mix(at.astype(np.uint64) + permutation.GOLDEN)
  return at[drawn & ((np.uint64(1) << level) - np.uint64(1)) == 0]


def block_of(position: int) -> int:
  """Number of the block that a position falls in."""
  level = (position // _DENSE).bit_length()
  start = (_DENSE << level) >> 1 if level else 0
  size = start or _DENSE
  return level * _BLOCKS + (position - start) * _BLOCKS // size


def add(digests: list[str], position: int, data: bytes) -> None:
  """Adds a pair of the sample to the digests of its split, by its position.

  They are of the blocks, 16 hexadecimal digits each, in order; `data` is what
  must be the same.
  """
  block = block_of(position)
  digests.extend("0" * 16 for _ in range(block + 1 - len(digests)))
  # A sum, so that it can be gone on with wherever writing was interrupted.
  total = int(digests[block], 16) + xxhash.xxh3_64_intdigest(data, position)
  digests[block] = f"{total % (1 << 64):016x}"


def add_pairs(
  digests: list[str],
  start: int,
  stop: int,
  inputs: packing.Ragged,
  targets: packing.Ragged,
) -> None:
  """Adds the pairs of the sample among those at `start` to `stop`.

  Inputs and targets are the ids of just these pairs, cut to length; there are
  fewer where the split ends before `stop`.
  """
  sides = [
    np.split(side.values.astype("<i4"), np.cumsum(side.lengths))[:-1]
    for side in (inputs, targets)
  ]
  places = positions(start, stop)
  for place, source, target in zip(places.tolist(), *sides, strict=False):
    # The length keeps the sides apart.
    data = len(source).to_bytes(4, "little") + source.tobytes()
    add(digests, place, data + target.tobytes())
