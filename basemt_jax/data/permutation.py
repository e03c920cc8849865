"""Random permutations computed point by point, so that size costs nothing.

No state and no table: the place of an index follows from a key. The same in
every process and in every version of NumPy.
"""

import hashlib
import json
from typing import Any

import numpy as np


def key_of(*parts: Any) -> np.uint64:
  """A 64-bit key of the parts; the same in every process."""
  text = json.dumps(parts).encode()
  digest = hashlib.blake2b(text, digest_size=8).digest()
  return np.uint64(int.from_bytes(digest, "little"))


def mix(x: np.ndarray) -> np.ndarray:
  """A bijection of 64-bit integers that spreads every bit (SplitMix64)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


_FEISTEL_ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permuted(
  index: np.ndarray, size: np.ndarray, key: np.ndarray
) -> np.ndarray:
  """A random permutation of 0 ... size - 1, computed point by point.

  A Feistel network permutes the numbers below the next power of two; points
  that fall outside the range are sent through again until they are inside
  (cycle walking), which leaves a permutation of the range. No table is kept,
  so ten million rows cost nothing.

  Of int [n] below sizes [n]; each key, uint64 [n], has its own permutation;
  int64 [n].
  """
  size = size.astype(np.uint64)
  # frexp's exponent is the bit length. Six bits at least: a narrower network
  # has too few round functions to reach all permutations equally often.
  bits = np.maximum(np.frexp((size - np.uint64(1)).astype(float))[1], 6)
  low_bits = (bits // 2).astype(np.uint64)
  low = (np.uint64(1) << low_bits) - np.uint64(1)
  high = (np.uint64(1) << (bits.astype(np.uint64) - low_bits)) - np.uint64(1)

  def scramble(x: np.ndarray, at: Any) -> np.ndarray:
    left, right = x >> low_bits[at], x & low[at]
    round_key = key[at]
    for number in range(_FEISTEL_ROUNDS):
      round_key = mix(round_key + GOLDEN)
      if number % 2:
        right = right ^ (mix(left ^ round_key) & low[at])
      else:
        left = left ^ (mix(right ^ round_key) & high[at])
    return (left << low_bits[at]) | right

  x = scramble(index.astype(np.uint64), slice(None))
  outside = np.flatnonzero(x >= size)
  while outside.size:
    x[outside] = scramble(x[outside], outside)
    outside = outside[x[outside] >= size[outside]]
  return x.astype(np.int64)
