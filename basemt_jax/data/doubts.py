"""What is odd about the data of a run, told before an hour is spent on it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from basemt_jax.data import languages, row_store, vocabulary

# From which share on pairs that are cut, or targets that the vocabulary cannot
# give back, are worth a word.
_MAX_CUT = 0.02
_MAX_ALTERED = 0.02
# Targets of a direction that are looked at.
_SAMPLE = 100


def of_data(mixture: Any, store: row_store.RowStore) -> list[str]:
  """A sentence for every kind of trouble, to be shown once.

  Of a store and of the mixture that it was made of, whose `warnings`, if it has
  any, come first.
  """
  return [
    *getattr(mixture, "warnings", ()),
    *_codes(store),
    *_without_dev(store),
    *_cut(store),
    *_altered(store),
  ]


def listed(trouble: str, items: Sequence[str], most: int = 6) -> Iterator[str]:
  """A warning such as 'trouble: a, b and 3 more', if there are items."""
  if items:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    yield f"{trouble}: {', '.join(items[:most])}{more}"


def _codes(store: row_store.RowStore) -> Iterator[str]:
  """Languages whose codes are not known."""
  found = dict.fromkeys(
    language.doubt
    for direction in store.directions
    for language in languages.Direction.parse(direction)
  )
  yield from filter(None, found)


def _without_dev(store: row_store.RowStore) -> Iterator[str]:
  names = list(store.directions)
  if "validation" in store.splits:
    counts = store.pairs("validation")
    names = [name for name, n in zip(names, counts, strict=True) if not n]
  # What a model wrote is nothing to measure with.
  authentic = [name for name in names if not languages.label_of(name)]
  yield from listed("no dev set", authentic)


def _cut(store: row_store.RowStore) -> Iterator[str]:
  """Directions of whose pairs many are longer than the lengths."""
  stats = {name: store.stats("train", name) for name in store.directions}
  shares = {n: s.truncated / s.pairs for n, s in stats.items() if s.pairs}
  worst = sorted(
    (name for name in shares if shares[name] > _MAX_CUT),
    key=lambda name: -shares[name],
  )
  pairs = sum(s.pairs for s in stats.values())
  cut = sum(s.truncated for s in stats.values())
  yield from listed(
    f"{cut / max(1, pairs):.0%} of the training pairs are longer than the "
    f"{store.lengths['inputs']} and {store.lengths['targets']} tokens of "
    "TASK_FEATURE_LENGTHS and lose their ends",
    [f"{name} {shares[name]:.0%}" for name in worst],
  )


def _altered(store: row_store.RowStore) -> Iterator[str]:
  """Directions of whose dev or test targets the vocabulary alters many."""
  pieces = vocabulary.Vocabulary.load(store.vocabulary)
  shares = {}
  for name in store.directions:
    splits = [split for split in store.splits if split != "train"]
    texts = [t for split in splits for t in store.texts(split, name)[:_SAMPLE]]
    targets = [text["target"] for text in texts]
    back = [pieces.decode(pieces.encode(target)) for target in targets]
    if targets:
      pairs = zip(targets, back, strict=True)
      shares[name] = float(np.mean([a.split() != b.split() for a, b in pairs]))
  yield from listed(
    "the vocabulary cannot give back targets as they are (its characters are "
    "others)",
    [f"{n} {s:.0%}" for n, s in shares.items() if s > _MAX_ALTERED],
  )
