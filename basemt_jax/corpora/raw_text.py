"""Parallel text as it is downloaded: archives, and the files in them.

Files are known by their names. These are read, each also compressed with gzip,
bzip2 or xz, in folders and in (nested) tar and zip archives:

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
name, they are looked for in the names of its folders. Text is read as a stream
of *blocks*: a tuple of one `bytes` (tables) or two (one per side), with the
same number of whole lines.
"""

import bz2
import dataclasses
import fnmatch
import functools
import gzip
import html
import itertools
import json
import lzma
import os
import pathlib
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any
from xml.etree import ElementTree

from basemt_jax.corpora import splits

_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UNPACKED = ".files"  # Ends the name of a folder that was an archive.
_BLOCK = 1 << 22
_XML_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"

Block = tuple[bytes, ...]
Pair = tuple[str, str]


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
    """The language that is spelled so, or None."""
    if spelled in self.spellings:
      return self.spellings[spelled]
    return spelled if spelled in self.languages else None

  @functools.cached_property
  def languages(self) -> frozenset[str]:
    """All languages of the pairs."""
    return frozenset(language for pair in self.pairs for language in pair)

  def said(self, path: str) -> str:
    """The split that a path tells; see `splits.split_of`."""
    return splits.split_of(path, self.languages | self.spellings.keys())


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
    return sum(
      os.path.getsize(p) * (4 if pathlib.Path(p).suffix in _OPEN else 1)
      for p in self.paths
    )


# ---------------------------------------------------------------- finding


@dataclasses.dataclass(frozen=True)
class _File:
  """What a path tells of its content."""

  kind: str
  key: str  # Equal for the sides of one text.
  spelled: Pair | None
  side: str | None = None
  directed: bool = False


def unpack(raw: pathlib.Path, work: pathlib.Path, names: Names) -> None:
  """Unpacks what is useful of all archives in `raw`, each once.

  Args:
    raw: folder of downloaded files.
    work: gets a folder for every archive; one that is there is left alone.
    names: of the corpus.

  Raises:
    ValueError: a broken archive.
  """
  todo = [(path, path.relative_to(raw)) for path in _files(raw)]
  while todo:
    path, name = todo.pop()
    if not path.name.lower().endswith(_ARCHIVES):
      continue
    target = work / f"{name}{_UNPACKED}"
    if not target.exists():
      partial = work / f"{name}.partial"
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir(parents=True)
      try:
        for member, stream in _members(path, names, name):
          out = partial / member
          out.parent.mkdir(parents=True, exist_ok=True)
          with open(out, "wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK)
      except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(
          f"{path} is not a whole archive ({error}): download it again."
        ) from error
      partial.rename(target)
    todo += [(inner, inner.relative_to(work)) for inner in _files(target)]


def _members(
  path: pathlib.Path, names: Names, name: pathlib.Path
) -> Iterator[tuple[pathlib.PurePosixPath, IO[bytes]]]:
  """Useful files of an archive, under names that stay inside of it."""

  def useful(member: str) -> pathlib.PurePosixPath | None:
    parts = [p for p in pathlib.PurePosixPath(member).parts if p != ".."]
    inside = pathlib.PurePosixPath(*(p.strip("/") or "_" for p in parts))
    is_archive = member.lower().endswith(_ARCHIVES)
    known = is_archive or _parse(pathlib.PurePosixPath(name) / inside, names)
    return inside if known else None

  if path.suffix.lower() == ".zip":
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        inside = useful(member.filename)
        if inside and not member.is_dir():
          with archive.open(member) as stream:
            yield inside, stream
    return
  with tarfile.open(path, "r|*") as tar:
    for entry in tar:
      inside = useful(entry.name)
      content = tar.extractfile(entry) if inside and entry.isfile() else None
      if inside and content:
        yield inside, content


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file())


@dataclasses.dataclass
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
  """Finds the parallel texts in folders, by their names.

  Of several texts for 'validation' or 'test', those that were decided on are
  taken, of these those that are directed, else the first; the others are held
  out.

  Args:
    folders: of raw and unpacked files.
    names: of the corpus.

  Raises:
    ValueError: a glob of `names.decided` that no text has.
  """
  found = Found({}, [], [], [], [])
  decided: dict[str, str] = {}
  texts = _texts(folders, names, found)
  _check_globs(names.decided, [name for _, files in texts for name in files])
  for text, files in texts:
    pair = next((p for p in names.pairs if set(p) == set(text.languages)), None)
    split = _decision(files, names.decided)
    if split:
      decided[text.name] = split
    else:
      split = names.said(files[0])
      if text.kind == "sgm" and split not in (splits.VALIDATION, splits.TEST):
        split = splits.TEST
      if pair and names.evaluation and split in _EVALUATION:
        split = names.evaluation(files[0], pair) or splits.HELD_OUT
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
      found.held_out += others
  found.unread = [n for n in found.unused if names.said(n) in _EVALUATION]
  return found


_EVALUATION = frozenset((splits.VALIDATION, splits.TEST))


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


def _texts(
  folders: Sequence[pathlib.Path], names: Names, found: Found
) -> list[tuple[Text, list[str]]]:
  """Texts with the names of their files; notes the files that are none."""
  sides: dict[tuple[pathlib.Path, str], dict[str, tuple[str, str, _File]]] = {}
  texts: list[tuple[Text, list[str]]] = []
  for folder in folders:
    for path in _files(folder):
      name = str(path.relative_to(folder)).replace(f"{_UNPACKED}/", "/")
      if path.name.lower().endswith(_ARCHIVES):
        continue
      file = _parse(pathlib.PurePosixPath(name), names)
      if file is None:
        found.unused.append(name)
      elif file.side is not None:
        language = str(names.language(file.side))
        group = sides.setdefault((path.parent, f"{file.kind}:{file.key}"), {})
        if language in group:  # Such as a second reference.
          texts.append(_alone(str(path), name, file, language))
        else:
          group[language] = (str(path), name, file)
      else:
        assert file.spelled is not None
        texts.append(
          (_text(name, file.kind, file.spelled, (path,), names), [name])
        )
  for group in sides.values():
    texts += _side_by_side(group, names)
  return sorted(texts, key=lambda t: (t[0].name, t[0].paths))


def _alone(
  path: str, name: str, file: _File, language: str
) -> tuple[Text, list[str]]:
  """A side whose other one is not there, as a text of one language."""
  both, spelled = (language, language), (str(file.side), str(file.side))
  text = Text(
    f"{name} (one side)", file.kind, both, False, (path, path), spelled
  )
  return text, [name]


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


def _parse(path: pathlib.PurePosixPath, names: Names) -> _File | None:
  """What a path tells, or None when it is no parallel text of the corpus."""
  name = path.name
  for suffix in _OPEN:
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
  if names.language(language) and split in ("dev", "devtest", "test"):
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
    if language is None:
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
  for match in re.finditer(r"(?=(?<![A-Za-z0-9])([A-Za-z][A-Za-z_-]+))", text):
    for cut in re.finditer("[-_]", match[1]):
      first, rest = match[1][: cut.start()], match[1][cut.end() :]
      ends = [len(rest), *(m.start() for m in re.finditer("[-_]", rest))]
      for end in ends:
        both = (first, rest[:end])
        known = [names.language(side) for side in both]
        if None not in known and known[0] != known[1]:
          return both
  return None


# ---------------------------------------------------------------- reading


def blocks(text: Text, size: int = _BLOCK) -> Iterator[Block]:
  """The text as blocks of whole lines, of about `size` bytes.

  Raises:
    ValueError: a file that breaks off, or sides of unequal length.
  """
  try:
    if text.kind == "moses":
      yield from _parallel_blocks(text, size)
    elif text.kind in ("sgm", "tmx"):
      pairs = _sgm(text) if text.kind == "sgm" else _tmx(text)
      while chunk := list(itertools.islice(pairs, max(1, size // 256))):
        yield tuple(
          b"".join(side.replace("\n", " ").encode() + b"\n" for side in sides)
          for sides in zip(*chunk, strict=True)
        )
    else:
      with _open(text.paths[0]) as stream:
        while block := _whole_lines(stream, size):
          yield (block,)
  except (EOFError, OSError, lzma.LZMAError, ElementTree.ParseError) as error:
    raise ValueError(
      f"{text.name} cannot be read to its end ({error}): download it again."
    ) from error


def pairs_of(text: Text, block: Block) -> Iterator[Pair | str]:
  """The lines of a block: both sides, in the order of `languages`, or why not.

  Args:
    text: that the block is of.
    block: see `blocks`.
  """
  columns = [_decoded(part) for part in block]
  if len(columns) == 2:
    for first, second in zip(*columns, strict=True):
      if first is None or second is None:
        yield "bad UTF-8"
      else:
        yield first, second
    return
  parse = {"table": _cells, "bars": _bars, "jsonl": _json}[text.kind]
  for line in columns[0]:
    yield "bad UTF-8" if line is None else parse(line, text)


def _open(path: str) -> Any:
  return _OPEN.get(pathlib.Path(path).suffix, open)(path, "rb")


def _whole_lines(stream: Any, size: int) -> bytes:
  """About `size` bytes up to a line's end; the last line gets one."""
  block: bytes = stream.read(size)
  if block and not block.endswith(b"\n"):
    block += stream.readline()
    if not block.endswith(b"\n"):
      block += b"\n"
  return block


def _parallel_blocks(text: Text, size: int) -> Iterator[Block]:
  with _open(text.paths[0]) as first, _open(text.paths[1]) as second:
    done, rest = 0, b""
    while block := _whole_lines(first, size):
      count = block.count(b"\n")
      missing = count - rest.count(b"\n")
      parts = [rest]
      while missing > 0 and (more := _whole_lines(second, size)):
        parts.append(more)
        missing -= more.count(b"\n")
      if missing > 0:
        _not_parallel(text, 1, done + count - missing)
      lines = b"".join(parts).split(b"\n", count)
      rest = lines.pop()
      yield block, b"\n".join(lines) + b"\n"
      done += count
    if rest or second.read(1):
      _not_parallel(text, 0, done)


def _not_parallel(text: Text, shorter: int, lines: int) -> None:
  raise ValueError(
    f"{text.paths[0]} and {text.paths[1]} are not parallel: the "
    f"{('first', 'second')[shorter]} ends after {lines} lines and the other "
    "goes on, so any line may be the misplaced one."
  )


def _decoded(block: bytes) -> list[str | None]:
  """Lines; None for those that are not UTF-8."""
  try:
    return [*block.decode("utf-8").split("\n")[:-1]]
  except UnicodeDecodeError:
    return [_decoded_line(line) for line in block.split(b"\n")[:-1]]


def _decoded_line(line: bytes) -> str | None:
  try:
    return line.decode("utf-8")
  except UnicodeDecodeError:
    return None


def _cells(line: str, unused_text: Text) -> Pair | str:
  cells = line.split("\t")
  return (cells[-2], cells[-1]) if len(cells) > 1 else "no tab"


def _bars(line: str, unused_text: Text) -> Pair | str:
  cells = line.split("|||")
  return (cells[0], cells[1]) if len(cells) == 2 else "not one |||"


def _json(line: str, text: Text) -> Pair | str:
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    return "bad JSON"
  if isinstance(value, dict) and isinstance(value.get("translation"), dict):
    value = value["translation"]
  sides = [
    value.get(s) if isinstance(value, dict) else None for s in text.spelled
  ]
  if not all(isinstance(side, str) for side in sides):
    return "texts missing in JSON"
  if any("\ud800" <= c <= "\udfff" for side in sides for c in str(side)):
    return "lone surrogate"
  return str(sides[0]), str(sides[1])


def _sgm(text: Text) -> Iterator[Pair]:
  sides = []
  for path in text.paths:
    with _open(path) as stream:
      content = stream.read().decode("utf-8", errors="replace")
    segments = re.findall(r"(?is)<seg\b[^>]*>(.*?)</seg>", content)
    sides.append([html.unescape(s.strip()) for s in segments])
  if len(sides[0]) != len(sides[1]):
    shorter = int(len(sides[0]) > len(sides[1]))
    _not_parallel(text, shorter, len(sides[shorter]))
  yield from zip(*sides, strict=True)


def _tmx(text: Text) -> Iterator[Pair]:
  """Translation units that have both languages."""
  wanted = [spelled.lower() for spelled in text.spelled]
  with _open(text.paths[0]) as stream:
    root = None
    for event, element in ElementTree.iterparse(stream, ("start", "end")):
      root = element if root is None else root
      if event != "end" or element.tag != "tu":
        continue
      sides: dict[str, str] = {}
      for variant in element.iter("tuv"):
        code = variant.get(_XML_LANGUAGE) or variant.get("lang") or ""
        segment = variant.find("seg")
        if segment is not None:
          said = "".join(segment.itertext())
          # 'cs-CZ' is 'cs'; 'pt_BR' may be wanted as such.
          sides.setdefault(re.split("[-_]", code.lower())[0], said)
          sides.setdefault(code.lower(), said)
      if all(language in sides for language in wanted):
        yield sides[wanted[0]], sides[wanted[1]]
      root.clear()
