"""A look at the data of any SeqIO task or mixture, before it is trained on.

Axis legend: N directions, P pairs looked at.

Numbers as dataclasses; `page` shows them. By default the first few
thousand pairs of every split are looked at, not all of them: every report says
how many. What is counted in a part only (duplicates, overlap) is then a lower
bound.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax.data import doubts, languages, packing, vocabulary
from basemt_jax.inspection import token_counts

SAMPLE = 2000

# Shares from which a warning is due.
MAX_TRUNCATED = 0.02
MAX_UNKNOWN = 0.01
MAX_BYTES = 0.05
MAX_DUPLICATES = 0.05
MAX_COPIED = 0.05

# Sequences are read at this many times their limit, to see how long they are.
_LONGER = 16

Progress = Callable[[str], None]
# Ids of both sides, and the texts of every pair.
Block = tuple[packing.Ragged, packing.Ragged, list[dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class Options:
  """How closely to look."""

  # {'inputs': Li, 'targets': Lt}, where the model cuts, in tokens
  lengths: Mapping[str, int]
  sample: int | None = SAMPLE  # pairs of a split to look at; None: all
  examples: int = 2  # pairs of a direction to show
  # training pairs that make a direction high or mid resource
  bands: languages.BandThresholds = languages.BandThresholds()  # noqa: RUF009


@dataclasses.dataclass(frozen=True)
class Shown:
  """A side of a training pair as the model gets it."""

  text: str  # without the tag
  tagged: str
  pieces: tuple[str, ...]  # tokens as text, EOS and tag included, not cut
  decoded: str  # text that the ids, cut to the limit, stand for


Example = tuple[Shown, Shown]  # Source and target.


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A dev or test split against the training pairs looked at."""

  split: str  # 'validation' or 'test'
  pairs: int | None  # None: not known
  looked_at: int  # compared
  pairs_seen: int  # of those, both sides are a training pair's
  sources_seen: int  # the source is a training pair's
  targets_seen: int  # the target is a training pair's


@dataclasses.dataclass(frozen=True)
class Direction:
  """What was found in a direction's training split."""

  name: str  # or the task's, where it has none of its own
  task: str  # SeqIO's name
  pairs: int | None  # training pairs; None: not known
  looked_at: int  # the first so many of them
  is_whole: bool  # they are all there is
  band: str | None  # 'high', 'mid' or 'low'; None where `pairs` is
  source: token_counts.Side
  target: token_counts.Side
  duplicates: int  # pairs looked at that repeat an earlier one
  empty: int  # pairs with a side that is empty or only spaces
  copied: int  # pairs whose two sides are the same text
  rows: int  # packed rows of the pairs looked at
  row_tokens: tuple[int, int]  # source and target tokens in these rows
  held_out: tuple[HeldOut, ...]  # dev and test splits, those that there are
  examples: tuple[Example, ...]  # spread over the pairs looked at

  def share(self, count: int) -> float:
    """Of the pairs looked at."""
    return count / max(1, self.looked_at)


@dataclasses.dataclass(frozen=True)
class Language:
  """What the vocabulary charges a language, over all its directions."""

  name: str  # code
  characters: int  # looked at
  tokens: int  # that they became, without tags and EOS
  tokens_per_character: float
  unknown: float  # share of its tokens that are the unknown token
  # share of its tokens that are single bytes; None: see `token_counts.Side`
  bytes: float | None


@dataclasses.dataclass(frozen=True)
class Data:
  """The report on a task's or a mixture's text."""

  name: str  # of the task or mixture
  lengths: Mapping[str, int]  # where the model cuts
  sample: int | None  # pairs of a split that were looked at, at most; None: all
  directions: tuple[Direction, ...]  # most training pairs first
  languages: tuple[Language, ...]  # dearest first
  warnings: tuple[str, ...]


def inspect_data(
  mixture: Any, options: Options, progress: Progress | None = None
) -> Data:
  """Looks at every direction of a mixture, or at one task.

  Args:
    mixture: a `seqio.Mixture` or `seqio.Task`, or the name of a registered one.
    options: how closely.
    progress: takes a direction's name when it is done.

  Raises:
    ValueError: no such mixture, a task without inputs and targets, or without
      a training split.
  """
  from basemt_jax.data import mixtures  # Imports SeqIO and TensorFlow.

  found = mixtures.get_mixture(mixture)
  tasks = _named_tasks(found)
  pieces = token_counts.vocabularies(tasks.values())

  def look(name: str) -> Direction:
    direction = _inspect_task(name, tasks[name], pieces, options)
    if progress:
      progress(direction.name)
    return direction

  # Most of the time is TensorFlow's, which lets other threads run, and waits.
  with concurrent.futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
    directions = list(pool.map(look, tasks))
  directions.sort(key=lambda d: (-(d.pairs or 0), d.name))
  return Data(
    found.name,
    dict(options.lengths),
    options.sample,
    tuple(directions),
    _languages(directions),
    (*getattr(found, "warnings", ()), *_warnings(directions)),
  )


def _named_tasks(mixture: Any) -> dict[str, Any]:
  """Tasks by direction; those that share one by their own names.

  Raises:
    ValueError: a task that is not one of translation, or cannot be trained on.
  """
  from basemt_jax.data import mixtures

  tasks = sorted(getattr(mixture, "tasks", [mixture]), key=lambda t: t.name)
  for task in tasks:
    if not {"inputs", "targets"} <= task.output_features.keys():
      raise ValueError(
        f"task {task.name!r} has features {', '.join(task.output_features)}; "
        "'inputs' and 'targets' are needed"
      )
    if "train" not in task.splits:
      raise ValueError(
        f"task {task.name!r} has splits {', '.join(task.splits)}; 'train' is "
        "needed"
      )
  names = [mixtures.direction_or_name(task.name) for task in tasks]
  count = collections.Counter(names)
  return {
    name if count[name] == 1 else task.name: task
    for name, task in zip(names, tasks, strict=True)
  }


def _inspect_task(
  name: str,
  task: Any,
  pieces: Sequence[tuple[Any, token_counts.Pieces]],
  options: Options,
) -> Direction:
  """Looks at one direction."""
  from basemt_jax.data import mixtures, task_reading

  layout = packing.RowLayout.of(options.lengths, 1)
  long = packing.RowLayout(_LONGER * layout.inputs, _LONGER * layout.targets)
  head = _Head(
    task_reading.read_task(task, "train", long, texts=True), options.sample
  )
  limits = (layout.inputs, layout.targets)
  sides = [
    token_counts.SideCounter(
      language, limit, token_counts.pieces_of(pieces, task, feature)
    )
    for language, limit, feature in zip(
      _side_languages(name), limits, ("inputs", "targets"), strict=True
    )
  ]
  texts, examples = _TextCounter(), []
  for inputs, targets, records in head:
    if not texts.count:
      examples = _examples(inputs, targets, records, sides, options.examples)
    texts.add([r["source"] for r in records], [r["target"] for r in records])
    sides[0].add(inputs, records, "tagged_source", "source")
    sides[1].add(targets, records, "target", "target")
  pairs = texts.count
  if not head.is_whole:
    pairs = task.num_input_examples("train")
  seen = texts.seen()
  lengths = [np.minimum(side.all_lengths(), side.limit) for side in sides]
  rows = packing.first_fit(
    lengths[0], lengths[1], layout.inputs, layout.targets, open_rows=32
  )
  return Direction(
    name=name,
    task=task.name,
    pairs=pairs,
    looked_at=texts.count,
    is_whole=head.is_whole,
    band=None if pairs is None else languages.band(pairs, options.bands),
    source=sides[0].report(),
    target=sides[1].report(),
    duplicates=texts.count - len(seen[0]),
    empty=texts.empty,
    copied=texts.copied,
    rows=int(rows.max(initial=-1)) + 1,
    row_tokens=(int(lengths[0].sum()), int(lengths[1].sum())),
    held_out=tuple(
      _held_out(task, split, seen, options.sample)
      for split in ("validation", "test")
      if mixtures.task_split(task, split)
    ),
    examples=tuple(examples),
  )


def _side_languages(name: str) -> tuple[str, str]:
  """Source and target language of a direction's name, if it has them."""
  with contextlib.suppress(ValueError):
    return languages.Direction.of_task(name)
  return f"source of {name}", f"target of {name}"


class _Head:
  """The first blocks of a split.

  Attributes:
    is_whole: known at the end: there was nothing more.
  """

  def __init__(self, blocks: Iterator[Block], limit: int | None):
    self._blocks, self._limit = blocks, limit
    self.is_whole = False

  def __iter__(self) -> Iterator[Block]:
    left = math.inf if self._limit is None else self._limit
    for inputs, targets, records in self._blocks:
      if len(records) > left:
        if left:
          count = int(left)
          first = (side.split(count)[0] for side in (inputs, targets))
          yield (*first, records[:count])  # type: ignore[misc]
        return
      yield inputs, targets, records
      left -= len(records)
    self.is_whole = True


# ------------------------------------------------------------------- text


class _TextCounter:
  """Repeated, empty and copied pairs; texts are kept as 64-bit hashes."""

  def __init__(self) -> None:
    self.count = self.empty = self.copied = 0
    self._hashes: tuple[list[np.ndarray], ...] = ([], [], [])

  def add(self, sources: Sequence[str], targets: Sequence[str]) -> None:
    """Takes more pairs, the sources without tags."""
    pairs = list(zip(sources, targets, strict=True))
    self.count += len(pairs)
    for source, target in pairs:
      stripped = source.strip(), target.strip()
      self.empty += not all(stripped)
      self.copied += all(stripped) and stripped[0] == stripped[1]
    for hashes, values in zip(
      self._hashes, (pairs, sources, targets), strict=True
    ):
      hashes.append(_hashes(values))

  def seen(self) -> tuple[np.ndarray, ...]:
    """Sorted hashes of the distinct pairs, sources and targets."""
    return tuple(
      np.unique(np.concatenate([*hashes, _hashes([])]))
      for hashes in self._hashes
    )


def _hashes(values: Sequence[Any]) -> np.ndarray:
  return np.fromiter(map(hash, values), np.int64, len(values))


def _held_out(
  task: Any, split: str, seen: Sequence[np.ndarray], sample: int | None
) -> HeldOut:
  """Compares a split with the training texts."""
  from basemt_jax.data import mixtures

  own = str(mixtures.task_split(task, split))
  pairs = vocabulary.raw_pairs(task, own)
  texts = [
    (languages.split_tag(source)[1], target)
    for source, target in itertools.islice(pairs, sample)
  ]
  is_whole = sample is None or next(pairs, None) is None
  sides: list[Sequence[Any]] = [
    texts,
    [source for source, _ in texts],
    [target for _, target in texts],
  ]
  found = [
    int(np.isin(_hashes(values), known).sum())
    for values, known in zip(sides, seen, strict=True)
  ]
  total = len(texts) if is_whole else task.num_input_examples(own)
  return HeldOut(split, total, len(texts), *found)


def _examples(
  inputs: packing.Ragged,
  targets: packing.Ragged,
  records: Sequence[Mapping[str, str]],
  sides: Sequence[token_counts.SideCounter],
  count: int,
) -> list[Example]:
  """Some pairs, spread evenly over a block."""
  count = min(count, len(records))
  examples = []
  for j in range(count):
    i = (2 * j + 1) * len(records) // (2 * count)
    pair = []
    for side, ids, text, tagged in (
      (sides[0], inputs, "source", "tagged_source"),
      (sides[1], targets, "target", "target"),
    ):
      own = ids.take(np.array([i]))
      cut, _ = own.truncate(side.limit, eos=True)
      pair.append(
        Shown(
          records[i][text],
          records[i][tagged],
          tuple(side.pieces.piece(t) for t in own.values.tolist()),
          side.pieces.decode(cut.values.tolist()),
        )
      )
    examples.append((pair[0], pair[1]))
  return examples


# ---------------------------------------------------------------- summary


def _languages(directions: Sequence[Direction]) -> tuple[Language, ...]:
  """Adds the sides of all directions up by language."""
  sides = collections.defaultdict(list)
  for direction in directions:
    for side in (direction.source, direction.target):
      sides[side.language].append(side)
  found = [joined(name, own) for name, own in sides.items()]
  return tuple(sorted(found, key=lambda x: -x.tokens_per_character))


def joined(name: str, sides: Sequence[token_counts.Side]) -> Language:
  """Sides taken together."""
  characters = sum(side.characters for side in sides)
  tokens = sum(side.tokens for side in sides)

  def mean(shares: Sequence[float]) -> float:
    each = zip(sides, shares, strict=True)
    return sum(side.tokens * share for side, share in each) / max(1, tokens)

  known = [side.bytes for side in sides if side.bytes is not None]
  return Language(
    name,
    characters,
    tokens,
    tokens / max(1, characters),
    mean([side.unknown for side in sides]),
    mean(known) if len(known) == len(sides) else None,
  )


def _warnings(directions: Sequence[Direction]) -> Iterator[str]:
  """A sentence for every kind of trouble, with the directions that have it."""
  yield from doubts.listed(
    "no training pairs", [d.name for d in directions if not d.looked_at]
  )
  own = [d for d in directions if d.looked_at]
  for trouble, limit, shares in _troubles(own):
    worst = sorted((x for x in shares if x[2] > limit), key=lambda x: -x[2])
    yield from doubts.listed(
      trouble,
      [
        f"{name}{of and f' ({of})'} {100 * share:.3g}%"
        for name, of, share in worst
      ],
    )
  yield from doubts.listed(
    "no dev set",
    [
      d.name
      for d in own
      if not any(h.split == "validation" and h.looked_at for h in d.held_out)
    ],
  )


def _troubles(
  directions: Sequence[Direction],
) -> tuple[tuple[str, float, list[tuple[str, str, float]]], ...]:
  """Kinds of trouble, the share each is due from, and shares found.

  A share is (direction, what it is of where that is not the whole, share).
  """
  sides = [(d.name, side) for d in directions for side in (d.source, d.target)]
  return (
    (
      "sequences are cut off",
      MAX_TRUNCATED,
      [(name, side.language, side.truncated) for name, side in sides],
    ),
    (
      "tokens are unknown",
      MAX_UNKNOWN,
      [(name, side.language, side.unknown) for name, side in sides],
    ),
    (
      "tokens are single bytes",
      MAX_BYTES,
      [(name, side.language, side.bytes or 0.0) for name, side in sides],
    ),
    (
      "pairs have an empty side",
      0.0,
      [(d.name, "", d.share(d.empty)) for d in directions],
    ),
    (
      "pairs are copies, both sides the same",
      MAX_COPIED,
      [(d.name, "", d.share(d.copied)) for d in directions],
    ),
    (
      "pairs repeat an earlier one",
      MAX_DUPLICATES,
      [(d.name, "", d.share(d.duplicates)) for d in directions],
    ),
    (
      "held-out pairs are training pairs",
      0.0,
      [
        (d.name, h.split, h.pairs_seen / max(1, h.looked_at))
        for d in directions
        for h in d.held_out
      ],
    ),
  )
