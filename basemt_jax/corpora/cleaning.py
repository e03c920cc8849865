"""The steps by which raw text becomes training text: pure functions.

A line is normalised, and dropped if a side is empty or too long, if the sides'
lengths are too different, or if a side is a sentence of a dev or test set. Its
digest tells the shard it goes to, and the order in it.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np

from basemt_jax.corpora import raw_text

# Control characters, soft hyphens, zero-width spaces, direction marks,
# byte-order marks. Joiners stay: Indic scripts and Persian need them.
_CONTROL = re.compile(
  "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e"
  "\u2060\u2066-\u2069\ufeff\ufffe\uffff]"
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What training text must be like.

  Attributes:
    max_characters: Of a side.
    max_ratio: Of the longer side's length to the shorter's, in bytes (so that
      scripts compare), each plus `ratio_slack`.
    ratio_slack: Lets short sentences differ more.
    shard_bytes: About the text in a shard; bounds a process's memory.
  """

  max_characters: int = 1000
  max_ratio: float = 4.0
  ratio_slack: int = 20
  shard_bytes: int = 1 << 26

  def __post_init__(self):
    """Refuses impossible numbers."""
    for name, least in (
      ("max_characters", 1),
      ("max_ratio", 1),
      ("ratio_slack", 0),
      ("shard_bytes", 1),
    ):
      if not getattr(self, name) >= least:
        raise ValueError(
          f"{name} must be at least {least}, got {getattr(self, name)}."
        )


def normalise(text: str) -> str:
  """Unicode NFC, single plain spaces, no control characters."""
  # After control characters, which may stand between a letter and its mark.
  text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
  return " ".join(text.split())


def fault(first: str, second: str, options: Options) -> str | None:
  """Why normalised texts are no training pair; None if they are one."""
  if not first or not second:
    return "empty side"
  if max(len(first), len(second)) > options.max_characters:
    return f"longer than {options.max_characters} characters"
  lengths = len(first.encode()), len(second.encode())
  short, long = (n + options.ratio_slack for n in sorted(lengths))
  if long > options.max_ratio * short:
    return f"length ratio above {options.max_ratio:g}"
  return None


def sentence_keys(language: str, texts: Iterable[str]) -> np.ndarray:
  """Keys under which sentences of a language count as the same; uint64."""
  return np.array(
    [
      int.from_bytes(
        hashlib.blake2b(
          f"{language} {compared(text)}".encode(), digest_size=8
        ).digest(),
        "little",
      )
      for text in texts
    ],
    np.uint64,
  )


def compared(text: str) -> str:
  """What of a text is compared: all but case, punctuation and spacing.

  Letters, digits, symbols, and the marks of every script stay; a text without
  any is compared as it is.
  """
  folded = unicodedata.normalize("NFC", normalise(text).casefold())
  kept = "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC")
  return unicodedata.normalize("NFC", kept) or folded


def digest(line: bytes) -> bytes:
  """What tells lines apart, and puts them in order."""
  return hashlib.blake2b(line, digest_size=16).digest()


def shard_of(line_digest: bytes, shards: int) -> int:
  """The shard of a line."""
  return int.from_bytes(line_digest[:8], "little") % shards


def clean_block(
  text: raw_text.Text,
  block: raw_text.Block,
  pair: raw_text.Pair,
  options: Options,
  held_out: np.ndarray,
) -> tuple[list[bytes], Counter[str]]:
  """Normalises and filters a block.

  Args:
    text: that the block is of.
    block: see `raw_text.blocks`.
    pair: the order of the languages in the output.
    options: what to keep.
    held_out: sorted `sentence_keys` of dev and test sets.

  Returns:
    Lines 'first<TAB>second', and the number of lines by what became of them:
    'kept', or why they were dropped.
  """
  backwards = text.languages != pair
  found: list[raw_text.Pair] = []
  counts: Counter[str] = Counter()
  for sides in raw_text.pairs_of(text, block):
    if isinstance(sides, str):
      counts[sides] += 1
      continue
    first, second = map(normalise, sides[::-1] if backwards else sides)
    reason = fault(first, second, options)
    if reason:
      counts[reason] += 1
    else:
      found.append((first, second))
  lines = []
  if found:
    known = np.zeros(len(found), bool)
    for language, texts in zip(pair, zip(*found, strict=True), strict=True):
      keys = sentence_keys(language, texts)
      at = np.searchsorted(held_out, keys)
      known |= held_out[np.minimum(at, len(held_out) - 1)] == keys
    lines = [
      f"{first}\t{second}".encode()
      for (first, second), skip in zip(found, known, strict=True)
      if not skip
    ]
    counts["in a dev or test set"] += len(found) - len(lines)
  counts["kept"] += len(lines)
  return lines, +counts


def clean_block_by_shard(
  text: raw_text.Text,
  block: raw_text.Block,
  pair: raw_text.Pair,
  options: Options,
  held_out: np.ndarray,
  shards: int,
) -> tuple[dict[int, list[bytes]], Counter[str]]:
  """As `clean_block`, with the lines by the shard that they go to."""
  lines, counts = clean_block(text, block, pair, options, held_out)
  parts: dict[int, list[bytes]] = {}
  for line in lines:
    parts.setdefault(shard_of(digest(line), shards), []).append(line)
  return parts, counts
