"""Parallel text as it is downloaded: which files are what, by their names.

Found in folders and in (nested) archives, each also compressed with gzip, bzip2
or xz, are:

- Moses pairs: `europarl-v7.cs-en.cs` beside `europarl-v7.cs-en.en`;
  `newstest2013.cs` beside `.en`; `casia2015_ch.txt` beside `casia2015_en.txt`;
- tables, `news-commentary-v14.cs-en.tsv`: the last two columns;
- `titles.fi-en`: two texts a line, between them `|||`;
- JSON lines, `x.cs-en.jsonl`: `{"cs": "...", "en": "..."}`, or that object as
  `translation`;
- TMX, `en-cs.bicleaner07.tmx`;
- SGM test sets, `newstest2014-fren-{src.fr,ref.en}.sgm`, which are of one
  direction; IWSLT's in XML, `IWSLT17.TED.tst2015.en-de.{en,de}.xml`.

The sides of a text may be called `src` and `ref`, `newstest2019-src.eng.txt`,
and may be named by the split alone, `eng_Latn.dev` beside `deu_Latn.dev`. Which
split a file is of is told by `splits`. Where the languages are not in a file's
name, they are looked for in the names of its folders; `pt-BR`, `pt_br` and
`por_Latn` are all understood.
"""

import dataclasses
import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from basemt_jax.corpora import archives, splits
from basemt_jax.data import languages as languages_lib
from basemt_jax.data import parallel_text

Pair = parallel_text.Pair

_FORMATS: dict[str, parallel_text.Format] = {
  "moses": parallel_text.moses,
  "sgm": parallel_text.sgm,
  "table": parallel_text.last_columns,
  "bars": parallel_text.bars,
  "jsonl": parallel_text.jsonl,
  "tmx": parallel_text.tmx,
}
_EVALUATION = frozenset((splits.VALIDATION, splits.TEST))


@dataclasses.dataclass(frozen=True)
class Names:
  """How a corpus names its languages and splits.

  Attributes:
    pairs: Pairs of languages that are wanted.
    spellings: Other spellings to languages, 'cz' to 'cs'.
    evaluation: (Name of a dev or test set, its languages) to 'validation',
      'test', or None for one that is not used; None: as `splits.split_of` says.
    tables: Regular expressions for paths of tables whose languages are in no
      name, to the languages of their last two columns.
    decided: Split to globs of files that are of it, whatever their names say;
      'held_out' is neither trained nor evaluated on. A glob is compared with a
      file's path in the folder, and with its name alone.
  """

  pairs: tuple[Pair, ...]
  spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
  evaluation: Callable[[str, Pair], str | None] | None = None
  tables: Mapping[str, Pair] = dataclasses.field(default_factory=dict)
  decided: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )

  def language(self, spelled: str) -> str | None:
    """The wanted language that is spelled so, or None."""
    known = self.spellings.get(spelled)
    return known or _meant(spelled, self.languages)

  @functools.cached_property
  def languages(self) -> tuple[str, ...]:
    """All languages of the pairs."""
    both = (language for pair in self.pairs for language in pair)
    return tuple(dict.fromkeys(both))

  def said(self, path: str) -> str:
    """The split that a path tells; see `splits.split_of`."""
    return splits.split_of(path, {*self.languages, *self.spellings})

  def is_useful(self, path: str) -> bool:
    """Whether a file, by its path, is an archive or parallel text."""
    known = _parse(pathlib.PurePosixPath(path), self)
    return archives.is_archive(path) or known is not None


def _plain(spelled: str) -> languages_lib.Language | None:
  """The language that is spelled so, if need be with script and region."""
  try:
    language = languages_lib.Language.parse(spelled)
  except ValueError:
    return None
  # A variant of a language is rather a word: 'en-train'.
  is_plain = all(len(x) in (2, 3, 4) for x in language.split("_")[1:])
  return language if is_plain else None


@functools.lru_cache(maxsize=1 << 16)
def _meant(spelled: str, wanted: tuple[str, ...]) -> str | None:
  """Which of the wanted languages a spelling is, or is a variety of."""
  language = _plain(spelled)
  if language is None:
    return None
  parsed = {w: languages_lib.Language.parse(w) for w in wanted}
  for is_meant in (
    lambda other: other == language,
    lambda other: other.standard == language.standard,
    language.fits,
  ):
    found = next((w for w, other in parsed.items() if is_meant(other)), None)
    if found:
      return found
  return None


@dataclasses.dataclass(frozen=True)
class Text:
  """A parallel text.

  Attributes:
    name: Path of its file, or 'path and other name', for readers.
    kind: 'moses', 'sgm', 'table', 'bars', 'jsonl' or 'tmx'.
    languages: Of its columns or paths.
    directed: Whether it is made for translation from the first to the second.
    paths: One, or two for Moses and SGM.
    spelled: The languages as the file spells them.
  """

  name: str
  kind: str
  languages: Pair
  directed: bool
  paths: tuple[str, ...]
  spelled: Pair

  @property
  def text_bytes(self) -> int:
    """About the size of the text: compressed files count four times."""
    packed = parallel_text.COMPRESSIONS
    return sum(
      os.path.getsize(p) * (4 if pathlib.Path(p).suffix in packed else 1)
      for p in self.paths
    )

  def lines(self) -> Iterator[parallel_text.Line]:
    """Numbered pairs, in the order of `languages`, or why there is none.

    Raises:
      ValueError: a file that breaks off, or sides of unequal length.
    """
    return _FORMATS[self.kind](self.paths, self.spelled)


# ---------------------------------------------------------------- finding


@dataclasses.dataclass(frozen=True)
class Found:
  """The parallel texts of a corpus.

  Attributes:
    texts: By pair of languages (as in `Names.pairs`) and split, in the order of
      their names.
    held_out: Dev and test sets that are not used. One side alone stands for
      both.
    unused: Names of files that are not parallel text of the corpus.
    unread: Those among them that are dev or test sets by their names.
    doubtful: Names of texts whose split cannot be told.
  """

  texts: dict[Pair, dict[str, list[Text]]]
  held_out: list[Text]
  unused: list[str]
  unread: list[str]
  doubtful: list[str]


def find(folders: Sequence[pathlib.Path], names: Names) -> Found:
  """Finds parallel texts in folders of raw and unpacked files, by their names.

  Of several texts for 'validation' or 'test', those that were decided on are
  taken, of these those that are directed, else the first; the others are held
  out.

  Raises:
    ValueError: a glob of `names.decided` that no text has.
  """
  found = Found({}, [], [], [], [])
  decided: set[str] = set()
  named = [
    (archives.shown_name(str(path.relative_to(folder))), path)
    for folder in folders
    for path in archives.files(folder)
  ]
  texts = _texts(named, names, found.unused)
  _check_globs(names.decided, [name for _, files in texts for name in files])
  for text, files in texts:
    pair = next((p for p in names.pairs if set(p) == set(text.languages)), None)
    split = _decision(files, names.decided)
    if split:
      decided.add(text.name)
    else:
      split = _split(text, files[0], pair, names)
    alone = len(set(text.languages)) == 1
    if split == splits.HELD_OUT or (alone and split in _EVALUATION):
      found.held_out.append(text)
    elif pair is None:
      found.unused.append(text.name)
    elif split == splits.DOUBTFUL:
      found.doubtful.append(text.name)
    else:
      found.texts.setdefault(pair, {}).setdefault(split, []).append(text)
  for of_pair in found.texts.values():
    for split in _EVALUATION & of_pair.keys():
      of_pair[split], others = _best(of_pair[split], decided)
      found.held_out.extend(others)
  found.unread.extend(n for n in found.unused if _is_unread(n, names))
  return found


def sets_of(
  folder: pathlib.Path,
  names: Names,
  split: str | None,
  files: Iterable[pathlib.Path] = (),
) -> list[Text]:
  """All texts of wanted pairs in a folder that are of a split, by their names.

  The split is 'validation' or 'test'; None takes whatever the names say. Where
  `files` are given, only these files of the folder count. Archives are not
  looked into.
  """
  named = [
    (str(path.relative_to(folder)), path)
    for path in sorted(files) or archives.files(folder)
  ]
  return [
    text
    for text, of_text in _texts(named, names, [])
    if text.languages[0] != text.languages[1]
    if any({*pair} == {*text.languages} for pair in names.pairs)
    if split in (None, _split(text, of_text[0], None, names))
  ]


def _is_unread(name: str, names: Names) -> bool:
  """Whether an unused file may be a dev or test set in another format."""
  path = pathlib.PurePosixPath(name)
  ending = path.name.removesuffix(".txt").rpartition(".")[2]
  language = _plain(ending)
  # 'xml' is the code of a language, too.
  is_code = ending not in ("xml", "doc", "csv", "tsv")
  of_others = is_code and language is not None and language.doubt is None
  of_others |= ending in ("sgm", "sgml")
  return not of_others and names.said(path.name) in _EVALUATION


def _split(text: Text, file: str, pair: Pair | None, names: Names) -> str:
  """What the name of a text's first file tells of it."""
  split = names.said(file)
  if text.kind == "sgm" and split not in _EVALUATION:
    split = splits.TEST  # SGM is never for training.
  if pair and names.evaluation and split in _EVALUATION:
    split = names.evaluation(file, pair) or splits.HELD_OUT
  return split


def _decision(
  files: Sequence[str], decided: Mapping[str, Sequence[str]]
) -> str | None:
  """The split that the user has decided on for a text's files."""
  found = {
    split
    for split, globs in decided.items()
    for glob in globs
    for file in files
    if _matches(file, glob)
  }
  if len(found) > 1:
    raise ValueError(
      f"{files[0]} is matched by the globs of {' and '.join(sorted(found))}: "
      "let one of them decide"
    )
  return found.pop() if found else None


def _matches(file: str, glob: str) -> bool:
  both = (file, pathlib.PurePosixPath(file).name)
  return any(fnmatch.fnmatchcase(name, glob) for name in both)


def _check_globs(
  decided: Mapping[str, Sequence[str]], files: Sequence[str]
) -> None:
  for split, globs in decided.items():
    for glob in globs:
      if not any(_matches(file, glob) for file in files):
        raise ValueError(
          f"no parallel text matches {glob!r}, which is to be {split}: name "
          f"files as they are found, such as {', '.join(files[:3]) or 'none'}"
        )


def _best(
  texts: list[Text], decided: Iterable[str]
) -> tuple[list[Text], list[Text]]:
  """The texts to evaluate on, at most one per direction, and the others."""
  first_choice = [t for t in texts if t.name in decided] or texts
  ranked = sorted(first_choice, key=lambda t: (not t.directed, t.name, t.paths))
  if ranked[0].directed:
    by_direction = {t.languages: t for t in reversed(ranked) if t.directed}
    best = [by_direction[key] for key in sorted(by_direction)]
  else:
    best = ranked[:1]
  return best, [t for t in texts if t not in best]


# ------------------------------------------------------------- pairing sides


@dataclasses.dataclass(frozen=True)
class _File:
  """What a path tells of its content."""

  kind: str
  key: str  # Equal for the sides of one text.
  spelled: Pair | None
  side: str | None = None
  directed: bool = False


def _texts(
  files: Iterable[tuple[str, pathlib.Path]], names: Names, unused: list[str]
) -> list[tuple[Text, list[str]]]:
  """Texts of files, by name and path, with the names of their files.

  The names of files that are no parallel text go to `unused`.
  """
  sides: dict[tuple[pathlib.Path, str], dict[str, tuple[str, str, _File]]] = {}
  texts: list[tuple[Text, list[str]]] = []
  for name, path in files:
    if archives.is_archive(path.name):
      continue
    file = _parse(pathlib.PurePosixPath(name), names)
    if file is None:
      unused.append(name)
    elif file.side is not None:
      language = str(names.language(file.side))
      group = sides.setdefault((path.parent, f"{file.kind}:{file.key}"), {})
      if language in group:  # Such as a second reference.
        texts.append(_alone(str(path), name, file, language))
      else:
        group[language] = (str(path), name, file)
    else:
      assert file.spelled is not None
      text = _text(name, file.kind, file.spelled, (path,), names)
      texts.append((text, [name]))
  for group in sides.values():
    texts += _side_by_side(group, names)
  return sorted(texts, key=lambda t: (t[0].name, t[0].paths))


def _alone(
  path: str, name: str, file: _File, language: str
) -> tuple[Text, list[str]]:
  """A side whose other one is not there, as a text of one language."""
  both, spelled = (language, language), (str(file.side), str(file.side))
  name_shown, paths = f"{name} (one side)", (path, path)
  return Text(name_shown, file.kind, both, False, paths, spelled), [name]


def _side_by_side(
  group: Mapping[str, tuple[str, str, _File]], names: Names
) -> Iterator[tuple[Text, list[str]]]:
  """The texts that the sides in one folder with one stem make."""
  together = set()
  for first, second in names.pairs:
    if first not in group or second not in group:
      continue
    together |= {first, second}
    (path_a, name_a, a), (path_b, name_b, b) = group[first], group[second]
    spelled: Pair = (str(a.side), str(b.side))
    paths: tuple[str, ...] = (path_a, path_b)
    if a.directed and a.spelled and names.language(a.spelled[0]) == second:
      spelled, paths = spelled[::-1], paths[::-1]
    name = f"{name_a} and {pathlib.Path(path_b).name}"
    text = _text(name, a.kind, spelled, paths, names)
    yield dataclasses.replace(text, directed=a.directed), [name_a, name_b]
  for language in group.keys() - together:
    path, name, file = group[language]
    yield _alone(path, name, file, language)


def _text(
  name: str, kind: str, spelled: Pair, paths: Sequence[Any], names: Names
) -> Text:
  first, second = (str(names.language(side)) for side in spelled)
  return Text(
    name, kind, (first, second), False, tuple(map(str, paths)), spelled
  )


# ------------------------------------------------------------ reading names


def _parse(path: pathlib.PurePosixPath, names: Names) -> _File | None:
  """What a path tells, or None when it is no parallel text of the corpus."""
  name = path.name
  for suffix in parallel_text.COMPRESSIONS:
    name = name.removesuffix(suffix)
  for pattern, languages in names.tables.items():
    if re.search(pattern, str(path)):
      return _File("table", name, languages)
  spelled = _pair_in(name, names) or next(
    filter(None, (_pair_in(part, names) for part in path.parts[-2::-1])), None
  )
  kinds = {".tsv": "table", ".jsonl": "jsonl", ".tmx": "tmx"}
  stem, suffix = os.path.splitext(name)
  if suffix in kinds:
    return _File(kinds[suffix], stem, spelled) if spelled else None
  is_markup = suffix in (".sgm", ".sgml") or (
    suffix == ".xml" and names.said(str(path)) in _EVALUATION
  )
  if is_markup:
    return _parse_sgm(stem, names) or _side(stem, names, spelled, "sgm")
  if suffix and _pair_in(suffix, names) and spelled:
    return _File("bars", stem, spelled)
  language, _, split = name.partition(".")
  if split in ("dev", "devtest", "test") and names.language(language):
    return _File("moses", split, spelled, language)
  return _side(name.removesuffix(".txt"), names, spelled, "moses")


def _side(
  name: str, names: Names, spelled: Pair | None, kind: str
) -> _File | None:
  """One side of a pair: what stands before a language at the end."""
  # The longest ending that is a language: 'pt_XX' before 'XX'.
  for match in re.finditer(r"[._]", name):
    side = name[match.end() :]
    language = names.language(side)
    if language is None or _pair_in(side, names):
      continue
    if spelled and language not in map(names.language, spelled):
      return None
    key = re.sub(r"[-.](src|ref([-.](ref)?[A-Z])?)$", "", name[: match.start()])
    return _File(kind, key, spelled, side)
  return None


def _parse_sgm(stem: str, names: Names) -> _File | None:
  """A side of a test set, 'newstest2014-fren-src.fr'."""
  match = re.fullmatch(r"(.+?)-([a-z]{2})([a-z]{2})-(?:src|ref)\.(\w+)", stem)
  if not match or names.language(match[4]) is None:
    return None
  spelled = (match[2], match[3])
  if None in map(names.language, spelled):
    return None
  return _File("sgm", match[1] + match[2] + match[3], spelled, match[4], True)


def _pair_in(text: str, names: Names) -> Pair | None:
  """Two languages with a hyphen or underscore between them in a name."""
  starts = re.finditer(r"(?=(?<![A-Za-z0-9])([A-Za-z][A-Za-z_-]+))", text)
  found = (_pair_at(match[1], names) for match in starts)
  return next(filter(None, found), None)


def _pair_at(text: str, names: Names) -> Pair | None:
  """The two wanted languages that a text begins with, as long as may be."""
  ends = [*(match.start() for match in re.finditer("[-_]", text)), len(text)]
  for end in reversed(ends):
    try:
      first, second = languages_lib.Direction.parse(text[:end])
    except ValueError:
      continue
    if _plain(first) and _plain(second):
      known = {names.language(first), names.language(second)}
      # 'en-pt_PT' is not cut to 'en-pt': that would be a wanted 'pt_BR'.
      return (first, second) if None not in known and len(known) > 1 else None
  return None
