"""Finds the files of parallel text in a folder, by their names.

`tasks.files` says which names there are; nothing is read here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable

from basemt_jax.corpora import preparation
from basemt_jax.data import languages as languages_lib
from basemt_jax.data import parallel_text
from tasks import common

# Files by (first language, second language) and split.
Found = dict[tuple[str, str], dict[str, "SplitFile"]]

_SPLITS = {
  **{"train": "train", "test": "test"},
  **dict.fromkeys(("dev", "valid", "validation"), "validation"),
}
_PACKED = "|".join(map(re.escape, parallel_text.COMPRESSIONS))
_LANGUAGE = r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*"
# 'en-de.train.tsv', 'train.en-de.en', 'train.en'; the split may be unknown.
_WHOLE = re.compile(
  r"(?P<pair>[^.]+[-_][^.]+)\.(?P<split>[^.]+?)"
  r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?"
  rf"(?P<kind>\.[^.]+?)(?:{_PACKED})?"
)
_SIDE = re.compile(
  rf"(?P<split>[^.]+)(?:\.(?P<pair>[^.]+[-_][^.]+))?\.(?P<side>{_LANGUAGE})"
  rf"(?:{_PACKED})?"
)
_LAYOUTS = "en-de.train.tsv, train.en-de.en with train.en-de.de, or"
_LAYOUTS += " en-de.train.jsonl (each also with .gz)"


@dataclasses.dataclass(frozen=True)
class SplitFile:
  """The file, shards, or two Moses files, of a split of two languages.

  Attributes:
    kind: a suffix of `parallel_text.FORMATS`, or 'moses'.
    split: 'train', 'validation' or 'test'.
    languages: of the first and the second column or file.
    paths: one path, one for every shard, or two for Moses.
  """

  kind: str
  split: str
  languages: languages_lib.Direction
  paths: tuple[pathlib.Path, ...]

  def __str__(self) -> str:
    if len(self.paths) > 2:
      return f"{self.paths[0]} ... {self.paths[-1].name}"
    return " and ".join(str(path) for path in self.paths)


def discover(folder: pathlib.Path) -> tuple[Found, tuple[str, ...]]:
  """Files by languages and split, and the names that are none of ours.

  Raises:
    ValueError: no folder, no files, two files for a split, half a Moses pair,
      or languages without training text.
  """
  if not folder.is_dir():
    what = "is not a folder" if folder.exists() else "does not exist"
    raise ValueError(
      f"the data folder {str(folder)!r} {what}: give one with {_LAYOUTS}"
    )
  whole, sides, ignored = _match_names(folder)
  found: Found = {}
  for file in [*whole, *_moses_pairs(sides)]:
    first, second = file.languages
    if first == second:
      raise ValueError(f"{file} pairs {str(first)!r} with itself")
    # The same languages in the other order are the same directions.
    key: tuple[str, str] = (first, second)
    if key[::-1] in found:
      key = key[::-1]
    same = found.get(key, {}).get(file.split)
    if same and same.languages != file.languages and file.split != "train":
      key = (first, second) if same.languages == key else key[::-1]
    other = found.setdefault(key, {}).setdefault(file.split, file)
    if other is not file:
      raise ValueError(
        f"{other} and {file} are both the {file.split} split of"
        f" {first} and {second}: keep one of them"
      )
  if not found:
    raise ValueError(
      f"there is no parallel text in {str(folder)!r}: its files must be named"
      f" {_LAYOUTS}"
    )
  for pair, splits in found.items():
    if "train" not in splits | found.get(pair[::-1], {}):
      raise ValueError(
        f"{next(iter(splits.values()))} has no training file beside it: add"
        f" {'-'.join(pair)}.train.tsv or remove it"
      )
  return {key: in_order(found[key]) for key in sorted(found)}, ignored


def in_order(splits: dict[str, SplitFile]) -> dict[str, SplitFile]:
  """The same files by split, training first."""
  return {split: splits[split] for split in common.SPLITS if split in splits}


def _match_names(
  folder: pathlib.Path,
) -> tuple[list[SplitFile], list[tuple[str, SplitFile]], tuple[str, ...]]:
  """Sorts a folder's files: whole ones, Moses sides, and those ignored.

  Raises:
    ValueError: a file of a split that names languages which are none.
  """
  whole, sides, ignored = [], [], []
  shards: dict[SplitFile, dict[int, pathlib.Path]] = {}
  paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
  pair_of_sides = _only_pair(paths)
  for path in paths:
    if path.name.startswith(".") or path.name == preparation.REPORT:
      continue
    groups = _groups(path.name)
    pair = groups.get("pair") or pair_of_sides
    if not groups or groups["split"] not in _SPLITS or pair is None:
      ignored.append(path.name)
      continue
    file = SplitFile(
      groups.get("kind", "moses"),
      _SPLITS[groups["split"]],
      _languages(path, pair),
      (path,),
    )
    if groups.get("shards"):
      # The same key for all shards of a text, with their number.
      key = dataclasses.replace(file, paths=(folder,) * int(groups["shards"]))
      shards.setdefault(key, {})[int(groups["shard"])] = path
    elif "side" not in groups:
      whole.append(file)
    elif side := languages_lib.matching(groups["side"], file.languages):
      sides.append((side[0], file))
    else:
      ignored.append(path.name)
  whole += [_all_shards(key, found) for key, found in shards.items()]
  return whole, sides, tuple(ignored)


def _groups(name: str) -> dict[str, str]:
  """The parts of a file's name; none if it is not like parallel text."""
  match = _WHOLE.fullmatch(name)
  if match and match["kind"] in parallel_text.FORMATS:
    return match.groupdict()
  match = _SIDE.fullmatch(name)
  return match.groupdict() if match else {}


def _languages(path: pathlib.Path, pair: str) -> languages_lib.Direction:
  try:
    return languages_lib.Direction.parse(pair)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def _only_pair(paths: Iterable[pathlib.Path]) -> str | None:
  """The languages of `train.en` and `train.de`, if they are the only ones."""
  sides: set[str] = set()
  for path in paths:
    groups = _groups(path.name)
    if "side" in groups and not groups["pair"] and groups["split"] in _SPLITS:
      sides.add(groups["side"])
  sides.discard("txt")  # More often a suffix than the language Citak.
  return "-".join(sorted(sides)) if len(sides) == 2 else None


def _all_shards(key: SplitFile, found: dict[int, pathlib.Path]) -> SplitFile:
  """The text that shards make; `key` has as many paths as there must be."""
  missing = [i for i in range(len(key.paths)) if i not in found]
  if missing or len(found) != len(key.paths):
    raise ValueError(
      f"{next(iter(found.values()))} is one of {len(key.paths)} shards and"
      f" shard {missing[0] if missing else max(found)} is not there: add it"
    )
  return dataclasses.replace(key, paths=tuple(found[i] for i in sorted(found)))


def _moses_pairs(sides: list[tuple[str, SplitFile]]) -> list[SplitFile]:
  """Puts the two sides of each Moses pair together."""
  found: dict[tuple[str, languages_lib.Direction], dict[str, SplitFile]] = {}
  for side, file in sides:
    key = (file.split, file.languages)
    other = found.setdefault(key, {}).setdefault(side, file)
    if other is not file:
      raise ValueError(
        f"{other} and {file} are the same side of the same split: keep one"
      )
  pairs = []
  for (_, (first, second)), both in found.items():
    if len(both) == 1:
      side, file = next(iter(both.items()))
      missing = second if side == first else first
      raise ValueError(
        f"{file} is one side of a Moses pair and the {str(missing)!r} side is"
        " missing: add it or remove this one"
      )
    paths = both[first].paths + both[second].paths
    pairs.append(dataclasses.replace(both[first], paths=paths))
  return pairs


def languages_with_text(
  data_dir: str | os.PathLike[str],
) -> set[tuple[str, str]]:
  """Pairs of languages, in both orders, that have a file for training.

  Goes by the names of the files, and finds no fault with any of them.
  """
  found: set[tuple[str, str]] = set()
  for path in pathlib.Path(data_dir).iterdir():
    match = _WHOLE.fullmatch(path.name) or _SIDE.fullmatch(path.name)
    if match and match["split"] == "train" and match["pair"]:
      with contextlib.suppress(ValueError):
        pair = languages_lib.Direction.parse(match["pair"])
        found |= {(pair.source, pair.target), (pair.target, pair.source)}
  return found
