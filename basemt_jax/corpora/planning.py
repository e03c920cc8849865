"""What there is to do for a corpus: its archives, texts, dev and test sets."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from basemt_jax.corpora import archives, cleaning, raw_text
from basemt_jax.data import parallel_text

EVALUATION = {"validation": "dev", "test": "test"}
_MAX_SHARDS = 512
_SHOWN = 20  # Names in a message or a line of a table.
_CHUNK = 10_000  # Lines.


@dataclasses.dataclass(frozen=True)
class Job:
  """Training text of a pair of languages, and the number of files to write."""

  pair: raw_text.Pair
  texts: tuple[raw_text.Text, ...]
  shards: int


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
  """A dev or test set: its pairs, normalised, in an order of languages.

  `unread` tells why lines could not be read, with the first of them.
  """

  text: raw_text.Text
  languages: raw_text.Pair
  pairs: Sequence[raw_text.Pair]
  unread: Mapping[str, Sequence[int]]

  def sentence_keys(self) -> list[np.ndarray]:
    """`cleaning.sentence_keys` of both sides."""
    return [
      cleaning.sentence_keys(language, (sides[i] for sides in self.pairs))
      for i, language in enumerate(self.languages)
    ]


@dataclasses.dataclass(frozen=True)
class Todo:
  """What there is to do.

  Attributes:
    jobs: One per pair of languages.
    keys: Sorted `cleaning.sentence_keys` of all dev and test sets.
    evaluation: File name to the set that is written there.
    held_out: Sets that are not used.
    unused: Names of raw files that are not parallel text of the corpus.
    unread: Those among them that are dev or test sets by their names.
    missing: Pairs of languages without training text.
  """

  jobs: tuple[Job, ...]
  keys: np.ndarray
  evaluation: Mapping[str, EvaluationSet]
  held_out: tuple[EvaluationSet, ...]
  unused: tuple[str, ...]
  unread: tuple[str, ...]
  missing: tuple[raw_text.Pair, ...]


def plan(
  raw: pathlib.Path,
  work: pathlib.Path,
  names: raw_text.Names,
  options: cleaning.Options,
) -> Todo:
  """Unpacks archives, and finds what there is to do.

  Raises:
    ValueError: no training text, files that cannot be read, or texts of which
      it is in doubt whether they are for training.
  """
  unpacked = work / "unpacked"
  unpacked.mkdir(parents=True, exist_ok=True)
  limits = archives.Limits(gigabytes=options.max_unpacked_gb)
  useless = archives.unpack(raw, unpacked, names.is_useful, limits)
  found = raw_text.find([raw, unpacked], names)
  _check_doubts(found.doubtful)
  jobs = []
  for pair in names.pairs:
    if texts := found.texts.get(pair, {}).get("train"):
      size = sum(text.text_bytes for text in texts)
      shards = min(_MAX_SHARDS, -(-size // options.shard_bytes)) or 1
      jobs.append(Job(pair, tuple(texts), shards))
  if not jobs:
    languages = listed(["-".join(pair) for pair in names.pairs])
    raise ValueError(
      f"there is no training text of {languages} in {str(raw)!r}: "
      f"found {listed([*useless, *found.unused]) or 'no files'}; files are "
      "known by their names, which docs/data.md lists"
    )
  trained = {job.pair for job in jobs}
  evaluation: dict[str, EvaluationSet] = {}
  held_out = [_evaluation_set(text, text.languages) for text in found.held_out]
  for pair, splits in found.texts.items():
    for split in EVALUATION.keys() & splits.keys():
      for text in splits[split]:
        one = _evaluation_set(text, text.languages if text.directed else pair)
        if pair in trained:
          _check_whole(one)
          name = f"{'-'.join(one.languages)}.{EVALUATION[split]}.tsv"
          evaluation[name] = one
        else:
          held_out.append(one)
  sets = (*evaluation.values(), *held_out)
  keys = [keys for one in sets for keys in one.sentence_keys()]
  return Todo(
    tuple(jobs),
    np.unique(np.concatenate([np.zeros(1, np.uint64), *keys])),
    dict(sorted(evaluation.items())),
    tuple(sorted(held_out, key=lambda one: one.text.name)),
    tuple(sorted([*useless, *found.unused])),
    tuple(sorted(found.unread)),
    tuple(pair for pair in names.pairs if pair not in trained),
  )


def chunks(text: raw_text.Text) -> Iterator[list[parallel_text.Line]]:
  """The lines of a text, some thousands at a time."""
  lines = text.lines()
  while chunk := list(itertools.islice(lines, _CHUNK)):
    yield chunk


def listed(names: Sequence[str]) -> str:
  """The first of some names, and how many more there are."""
  more = len(names) - _SHOWN
  end = f", and {more:,} more" if more > 0 else ""
  return ", ".join(names[:_SHOWN]) + end


def _check_doubts(doubtful: Sequence[str]) -> None:
  """Asks what only the user can know."""
  if doubtful:
    raise ValueError(
      "by their names, these may be training text, or a dev or test set that "
      f"must stay out of it: {listed(doubtful)}; decide with --train GLOB, "
      "--dev GLOB, --test GLOB or --held_out GLOB (neither trained nor "
      f"evaluated on), such as --train '{doubtful[0].split(' and ')[0]}'"
    )


def _evaluation_set(
  text: raw_text.Text, languages: raw_text.Pair
) -> EvaluationSet:
  """Reads a dev or test set.

  Raises:
    ValueError: none of its lines can be read.
  """
  pairs: list[raw_text.Pair] = []
  outcome = cleaning.Outcome()
  for number, line in text.lines():
    found = parallel_text.usable(line)
    if isinstance(found, parallel_text.Trouble):
      outcome.drop(found, number)
    else:
      pairs.append(found if text.languages == languages else found[::-1])
  one = EvaluationSet(text, languages, pairs, outcome.unread)
  if not pairs:
    why = next(iter(outcome.counts), "it is empty")
    raise ValueError(
      f"nothing of {text.name}, a dev or test set by its name, can be used "
      f"({why}): mend it or take it away"
    )
  return one


def _check_whole(one: EvaluationSet) -> None:
  """Refuses a set with lines that cannot be read: scores would be of others."""
  for reason, numbers in one.unread.items():
    raise ValueError(
      f"{one.text.name}:{numbers[0]}: {reason}, in a dev or test set: mend the "
      "line, or keep the set out with --held_out"
    )
