"""The steps by which raw text becomes training text: pure functions.

A line is normalised, and dropped if a side is empty or too long, if the sides'
lengths are too different, or if a side is a sentence of a dev or test set. Its
digest tells the shard it goes to, and the order in it.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from basemt_jax.data import normalisation, parallel_text

Pair = parallel_text.Pair
_EXAMPLES = 3  # Lines that are quoted by number, for every reason.
HELD_OUT = "in a dev or test set"
# Beginnings of why text is dropped that could be read.
FILTERS = ("empty side", "longer than", "length ratio", HELD_OUT)


@dataclasses.dataclass(frozen=True)
class Options:
  """What training text must be like.

  Attributes:
    max_characters: Of a side.
    max_ratio: Of the longer side's length to the shorter's, in bytes (so that
      scripts compare), each plus `ratio_slack`.
    ratio_slack: Lets short sentences differ more.
    shard_bytes: About the text in a shard; bounds a process's memory.
    max_unpacked_gb: Of all files in archives; changes no result.
  """

  max_characters: int = 1000
  max_ratio: float = 4.0
  ratio_slack: int = 20
  shard_bytes: int = 1 << 26
  max_unpacked_gb: float = dataclasses.field(default=1000, compare=False)

  def __post_init__(self):
    """Refuses impossible numbers."""
    for name, least in (
      ("max_characters", 1),
      ("max_ratio", 1),
      ("ratio_slack", 0),
      ("shard_bytes", 1),
      ("max_unpacked_gb", 0),
    ):
      if not getattr(self, name) >= least:
        raise ValueError(
          f"{name} must be at least {least}, got {getattr(self, name)}"
        )


def usable(
  line: Pair | parallel_text.Trouble, options: Options
) -> Pair | parallel_text.Trouble:
  """Both sides normalised, or why they are no training pair."""
  found = parallel_text.usable(line, options.max_characters)
  if not isinstance(found, parallel_text.Trouble):
    lengths = len(found[0].encode()), len(found[1].encode())
    short, long = (n + options.ratio_slack for n in sorted(lengths))
    if long > options.max_ratio * short:
      return parallel_text.Trouble(f"length ratio above {options.max_ratio:g}")
  return found


def sentence_keys(language: str, texts: Iterable[str]) -> np.ndarray:
  """Keys under which sentences of a language count as the same; uint64.

  The same are those with the same `normalisation.comparison_key`.
  """
  keys = (
    f"{language} {normalisation.comparison_key(text)}".encode()
    for text in texts
  )
  return np.array(
    [
      int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
      for key in keys
    ],
    np.uint64,
  )


def digest(line: bytes) -> bytes:
  """What tells lines apart, and puts them in order."""
  return hashlib.blake2b(line, digest_size=16).digest()


def shard_of(line_digest: bytes, shards: int) -> int:
  """The shard of a line."""
  return int.from_bytes(line_digest[:8], "little") % shards


@dataclasses.dataclass
class Outcome:
  """What became of lines.

  Attributes:
    counts: Number of lines: 'kept', or why they were dropped.
    unread: Why lines could not be read, to the numbers of the first of them.
  """

  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  unread: dict[str, list[int]] = dataclasses.field(default_factory=dict)

  def drop(self, reason: str, number: int) -> None:
    """Counts a line that was dropped."""
    self.counts[reason] += 1
    if not reason.startswith(FILTERS):
      self._quote(reason, [number])

  def add(self, other: "Outcome") -> None:
    """Adds what became of other lines."""
    self.counts += other.counts
    for reason, numbers in other.unread.items():
      self._quote(reason, numbers)

  def _quote(self, reason: str, numbers: Sequence[int]) -> None:
    both = sorted([*self.unread.get(reason, []), *numbers])
    self.unread[reason] = both[:_EXAMPLES]


def clean(
  lines: Sequence[parallel_text.Line],
  languages: Pair,
  pair: Pair,
  options: Options,
  held_out: np.ndarray,
) -> tuple[list[bytes], Outcome]:
  """Normalises and filters numbered lines of a text.

  Args:
    lines: pairs, or why they could not be read.
    languages: of the lines.
    pair: the order of the languages in the output.
    options: what to keep.
    held_out: sorted `sentence_keys` of dev and test sets.

  Returns:
    Lines 'first<TAB>second', and what became of all of them.
  """
  kept: list[Pair] = []
  outcome = Outcome()
  for number, line in lines:
    found = usable(line, options)
    if isinstance(found, parallel_text.Trouble):
      outcome.drop(str(found), number)
    else:
      kept.append(found if languages == pair else found[::-1])
  known = np.zeros(len(kept), bool)
  for i, language in enumerate(pair):
    keys = sentence_keys(language, (sides[i] for sides in kept))
    at = np.searchsorted(held_out, keys)
    known |= held_out[np.minimum(at, len(held_out) - 1)] == keys
  outcome.counts[HELD_OUT] += int(known.sum())
  outcome.counts["kept"] += len(kept) - int(known.sum())
  outcome.counts = +outcome.counts
  texts = [
    f"{first}\t{second}".encode()
    for (first, second), skip in zip(kept, known, strict=True)
    if not skip
  ]
  return texts, outcome


def by_shard(lines: Iterable[bytes], shards: int) -> dict[int, list[bytes]]:
  """Lines by the shard that they go to."""
  parts: dict[int, list[bytes]] = {}
  for line in lines:
    parts.setdefault(shard_of(digest(line), shards), []).append(line)
  return parts
