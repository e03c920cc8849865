"""Tokens of text: how long sequences are, and what a vocabulary makes of them.

Axis legend: P pairs looked at, V pieces of the vocabulary.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax.data import packing, vocabulary

# Upper ends of the bins of length histograms: powers of the root of 2.
BINS = tuple(sorted({round(2 ** (i / 2)) for i in range(27)}))

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class Side:
  """One side of the pairs looked at.

  Lengths are in tokens, tag and EOS included, before anything is cut.
  """

  # its code; the direction and side where the direction's name is not two codes
  language: str
  mean: float  # lengths
  median: float
  p95: float  # length that 95% of the sequences do not exceed
  longest: int
  # sequences by length; bin i ends at `BINS[i]`, one more bin is for what is
  # longer
  histogram: tuple[int, ...]
  truncated: float  # share of the sequences that exceed the limit
  characters: int  # of the texts, without tags
  tokens: int  # likewise, without EOS too
  unknown: float  # share of these tokens that are the unknown token
  # share of these tokens that are single bytes of a character without a piece;
  # None for a vocabulary that has no such pieces, or nothing else
  bytes: float | None
  tokens_per_character: float
  altered: float  # share of the texts that decoding does not give back exactly


class Pieces:
  """A task's vocabulary: ours where it can be, else SeqIO's own.

  Attributes:
    unknown: id of the unknown token, or None.
    is_byte: bool [V], pieces for bytes of characters without a piece; None
      where there are none, or nothing else.
  """

  def __init__(self, theirs: Any):
    self._own: vocabulary.Vocabulary | None = None
    with contextlib.suppress(ValueError, AttributeError, NotImplementedError):
      self._own = vocabulary.Vocabulary.from_seqio(theirs)
    self._any = self._own or theirs
    self.unknown = getattr(self._any, "unk_id", None)
    self.is_byte = None
    if self._own and self._own.kind == "sentencepiece":
      pieces = map(self._own.piece, range(self._own.vocab_size))
      is_byte = np.array([bool(_BYTE.fullmatch(piece)) for piece in pieces])
      self.is_byte = is_byte if is_byte.any() else None

  def counts(self, ids: np.ndarray) -> np.ndarray:
    """Tokens, unknown ones and single bytes among ids, without EOS."""
    is_byte = self.is_byte[ids] if self.is_byte is not None else ids < 0
    kinds = (ids != packing.EOS_ID, ids == self.unknown, is_byte)
    return np.array([np.sum(kind) for kind in kinds])

  def encode(self, text: str) -> np.ndarray:
    """Ids of a text, without EOS."""
    return np.array(self._any.encode(text), np.int64)

  def piece(self, token: int) -> str:
    """How a token looks."""
    return self._own.piece(token) if self._own else self.decode([token])

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids."""
    return str(self._any.decode(list(ids)))


def vocabularies(tasks: Iterable[Any]) -> list[tuple[Any, Pieces]]:
  """The different vocabularies of tasks, usually one."""
  found: list[tuple[Any, Pieces]] = []
  for task in tasks:
    for feature in ("inputs", "targets"):
      theirs = task.output_features[feature].vocabulary
      if all(known != theirs for known, _ in found):
        found.append((theirs, Pieces(theirs)))
  return found


def pieces_of(
  found: Sequence[tuple[Any, Pieces]], task: Any, feature: str
) -> Pieces:
  """The one of `vocabularies` that a feature of a task has."""
  theirs = task.output_features[feature].vocabulary
  return next(pieces for known, pieces in found if known == theirs)


class SideCounter:
  """Lengths, tokens and characters of one side; see `Side`."""

  def __init__(self, language: str, limit: int, pieces: Pieces):
    self.language, self.limit, self.pieces = language, limit, pieces
    self._lengths: list[np.ndarray] = []
    self._tag_counts: dict[str, np.ndarray] = {}
    self._counts = np.zeros(3, np.int64)  # See `Pieces.counts`.
    self._characters = self._altered = 0

  def add(
    self,
    ids: packing.Ragged,
    records: Sequence[Mapping[str, str]],
    tagged: str,
    plain: str,
  ) -> None:
    """Takes more sequences, and the records that have their texts.

    The ids stand for `record[tagged]`, which is `record[plain]` with a tag.
    """
    self._lengths.append(ids.lengths)
    self._counts += self.pieces.counts(ids.values)
    starts = np.cumsum(ids.lengths) - ids.lengths
    for record, start, length in zip(
      records, starts.tolist(), ids.lengths.tolist(), strict=True
    ):
      self._characters += len(record[plain])
      if record[tagged] != record[plain]:
        self._counts -= self._of_tag(record[tagged], record[plain])
      own = ids.values[start : start + length].tolist()
      self._altered += self.pieces.decode(own) != record[tagged]

  def _of_tag(self, tagged: str, plain: str) -> np.ndarray:
    """Counts of the tag before a text; looked up once for every tag."""
    tag = tagged.removesuffix(plain)
    if tag not in self._tag_counts:
      both = [self.pieces.encode(text) for text in (tagged, plain)]
      self._tag_counts[tag] = np.subtract(*map(self.pieces.counts, both))
    return self._tag_counts[tag]

  def all_lengths(self) -> np.ndarray:
    """Tokens of every sequence; int64 [P]."""
    return np.concatenate([np.zeros(0, np.int64), *self._lengths])

  def report(self) -> Side:
    """What was counted."""
    lengths = self.all_lengths()
    sequences = max(1, len(lengths))
    tokens, unknown, bytes_ = self._counts.tolist()
    # A sequence as long as a bin's end is in that bin.
    bins = np.searchsorted(BINS, lengths, side="left")
    some = lengths if len(lengths) else np.zeros(1)
    return Side(
      language=self.language,
      mean=float(some.mean()),
      median=float(np.median(some)),
      p95=float(np.percentile(some, 95, method="inverted_cdf")),
      longest=int(some.max()),
      histogram=tuple(np.bincount(bins, minlength=len(BINS) + 1).tolist()),
      truncated=float((lengths > self.limit).sum() / sequences),
      characters=self._characters,
      tokens=tokens,
      unknown=unknown / max(1, tokens),
      bytes=None if self.pieces.is_byte is None else bytes_ / max(1, tokens),
      tokens_per_character=tokens / max(1, self._characters),
      altered=self._altered / sequences,
    )
