"""Subword sampling: training text in more than one segmentation.

A word that is always cut into the same pieces is learnt from these alone.
Segmentations drawn at random, of sources and targets alike, regularise: most
where there is little text, which is repeated often (Kudo, arXiv:1804.10959;
Provilkov et al., arXiv:1910.13267).

Both draw anew whenever a sentence is read. Here rows are packed once, so a
store holds some *versions* of its training rows, and the epochs of a direction
take turns with them. Version 0 is the segmentation that `translate` uses, the
others are drawn: what is seen once is seen as ever, and repetitions differ.
What is drawn depends on the text, the vocabulary and the settings, not on the
seed of a run: all its seeds share a store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from basemt_jax import ranges
from basemt_jax.data import languages, permutation, vocabulary

# Versions cost time and space. Large directions are hardly repeated, and need
# no regularisation: the versions of one have so many pairs together, or else
# it has version 0 alone.
_MOST_PAIRS = 1_000_000


@dataclasses.dataclass(frozen=True)
class SubwordSampling:
  """How training text is segmented.

  Attributes:
    alpha: of a unigram vocabulary, the power to which the probabilities of
      segmentations are raised before one of all is drawn: the smaller, the more
      they differ. Of a BPE vocabulary the share of merges left out. None: all
      text is segmented as `translate` does.
    versions: of the rows of a direction at most, the first of them undrawn.
  """

  alpha: ranges.Positive | None = None
  versions: ranges.Count = 4

  def __str__(self) -> str:
    """For people, and to tell one store from another; '' without sampling."""
    if self.alpha is None or self.versions == 1:
      return ""
    return f"alpha {self.alpha:g}, {self.versions} versions"

  def versions_of(self, pairs: int) -> int:
    """Versions of the rows of a direction with so many training pairs."""
    if not str(self):
      return 1
    return min(self.versions, max(1, _MOST_PAIRS // max(1, pairs)))


@dataclasses.dataclass(frozen=True)
class Draw:
  """Draws the segmentations of one version of a direction.

  Attributes:
    alpha: see `SubwordSampling`.
    name: of version and direction; another name gives other segmentations.
  """

  alpha: float
  name: str

  def sources(
    self,
    pieces: vocabulary.Vocabulary,
    texts: Sequence[str],
    start: int,
    limit: int,
  ) -> list[list[int]]:
    """As `targets`, of texts with a tag, which stays whole."""
    tags, bare = zip(*map(languages.split_tag, texts), strict=True)
    before = [pieces.encode(tag) if tag else [] for tag in tags]
    drawn = pieces.sample_batch(bare, self.alpha, self._seed("sources", start))
    found = [a + b for a, b in zip(before, drawn, strict=True)]
    return _fitting(pieces, texts, found, limit)

  def targets(
    self,
    pieces: vocabulary.Vocabulary,
    texts: Sequence[str],
    start: int,
    limit: int,
  ) -> list[list[int]]:
    """Draws a segmentation of each text of a block, without EOS.

    A block, whose first text has position `start` in its split, is drawn on its
    own, so that an interrupted store goes on with the same bytes. A
    segmentation of more than `limit` tokens, EOS included, gives way to the
    usual one: sampling cuts or drops no text.
    """
    drawn = pieces.sample_batch(texts, self.alpha, self._seed("targets", start))
    return _fitting(pieces, texts, drawn, limit)

  def _seed(self, side: str, start: int) -> int:
    return int(permutation.key_of("subwords", self.name, side, start)) >> 33


def _fitting(
  pieces: vocabulary.Vocabulary,
  texts: Sequence[str],
  drawn: Sequence[list[int]],
  limit: int,
) -> list[list[int]]:
  return [
    ids if len(ids) < limit else pieces.encode(text)
    for text, ids in zip(texts, drawn, strict=True)
  ]
