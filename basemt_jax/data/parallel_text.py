"""The one reader of parallel text: TSV, JSON lines, TMX, Moses pairs, SGM.

A *format* is a function from the paths of a text and its two languages to its
lines: `(number, (first, second))`, or `(number, Trouble(why))` for a line that
is no pair, so that nothing is skipped in silence. `FORMATS` knows the formats
that a file's suffix tells; any file may also be compressed. What puts a whole
file in doubt is a ValueError that names file and line.

Text is streamed, with memory for a line, or a translation unit, at a time.
"""

import bz2
import contextlib
import dataclasses
import gzip
import html
import io
import itertools
import json
import lzma
import os
import pathlib
import re
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeAlias
from xml.parsers import expat

from basemt_jax.data import languages as languages_lib
from basemt_jax.data import normalisation

Pair: TypeAlias = tuple[str, str]
Path: TypeAlias = str | os.PathLike[str]

_CHUNK = 1 << 16
_EXAMPLES = 5  # Of troubles that a report quotes.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Trouble(str):
  """Why a line is no pair."""


Line: TypeAlias = tuple[int, Pair | Trouble]
Format: TypeAlias = Callable[[Sequence[Path], Pair], Iterator[Line]]


# ------------------------------------------------------------------- files


COMPRESSIONS: dict[str, tuple[str, Callable[..., Any]]] = {
  ".gz": ("gzip", gzip.open),
  ".bz2": ("bzip2", bz2.open),
  ".xz": ("xz", lzma.open),
}


def open_text(path: Path) -> Any:
  """A file's bytes, unpacked if its suffix says that it is compressed."""
  _, opens = COMPRESSIONS.get(pathlib.Path(path).suffix, ("", open))
  return opens(path, "rb")


def lines(path: Path) -> Iterator[tuple[int, str | Trouble]]:
  """Numbered lines of a text without line ends; only LF and CR LF end one.

  UTF-8, with or without a byte-order mark, or UTF-16 with one.

  Raises:
    ValueError: a compressed file that breaks off, or another encoding.
  """
  number = 0
  with _whole(path, lambda: f"after line {number}") as stream:
    head = stream.peek(4)[:4]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
      for number, text in _wide_lines(path, stream):
        yield number, text
      return
    if b"\0" in head:
      raise ValueError(
        f"{path} is no UTF-8 text: it begins like UTF-16 or UTF-32 without a "
        "byte-order mark; convert it to UTF-8"
      )
    for number, line in enumerate(stream, start=1):
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
      try:
        yield number, _checked(line.decode("utf-8"))
      except UnicodeDecodeError:
        yield number, Trouble("bad UTF-8")


def _checked(line: str) -> str | Trouble:
  if "\0" in line:
    return Trouble("NUL character")
  return line.removesuffix("\n").removesuffix("\r")


def _wide_lines(
  path: Path, stream: IO[bytes]
) -> Iterator[tuple[int, str | Trouble]]:
  number = 0
  try:
    with io.TextIOWrapper(stream, "utf-16", newline="\n") as texts:
      for number, text in enumerate(texts, start=1):
        yield number, _checked(text)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not whole UTF-16 text: it breaks off after line {number} "
      f"({error.reason})"
    ) from error


@contextlib.contextmanager
def _whole(path: Path, where: Callable[[], str]) -> Iterator[Any]:
  """An open file; says where a compressed one breaks off."""
  name, _ = COMPRESSIONS.get(pathlib.Path(path).suffix, ("", open))
  with open_text(path) as stream:
    try:
      yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
      if not name:
        raise
      raise ValueError(
        f"{path} is not a whole {name} file: it breaks off {where()} ({error})"
      ) from error


# ----------------------------------------------------------------- formats


def _each_line(
  path: Path, pair: Callable[[str], Pair | Trouble]
) -> Iterator[Line]:
  for number, line in lines(path):
    yield number, line if isinstance(line, Trouble) else pair(line)


def tsv(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """Two columns with a tab between them, as in `en-de.train.tsv`."""

  def pair(line: str) -> Pair | Trouble:
    first, *others = line.split("\t")
    if len(others) == 1:
      return first, others[0]
    tabs = f"{len(others)} tabs" if others else "no tab"
    return Trouble(f"{tabs} instead of one")

  return _each_line(paths[0], pair)


def last_columns(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """The last two columns of a table, which may have others before them."""

  def pair(line: str) -> Pair | Trouble:
    cells = line.rsplit("\t", 2)
    return (cells[-2], cells[-1]) if len(cells) > 1 else Trouble("no tab")

  return _each_line(paths[0], pair)


def bars(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """Two texts a line with `|||` between them."""

  def pair(line: str) -> Pair | Trouble:
    cells = line.split("|||")
    return (cells[0], cells[1]) if len(cells) == 2 else Trouble("not one |||")

  return _each_line(paths[0], pair)


def moses(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """Two files, line n beside line n.

  Raises:
    ValueError: one has more lines: any line may be the misplaced one.
  """
  sides = [lines(path) for path in paths]
  done = 0
  for first, second in itertools.zip_longest(*sides):
    if first is None or second is None:
      shorter = pathlib.Path(paths[first is not None]).name
      raise ValueError(
        f"{paths[0]} and {paths[1]} are not parallel: {shorter} ends after "
        f"{done} lines and the other goes on, so any line may be the misplaced "
        "one"
      )
    done, a, b = first[0], first[1], second[1]
    trouble = next((x for x in (a, b) if isinstance(x, Trouble)), None)
    yield done, (a, b) if trouble is None else trouble


def jsonl(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """A line is `{"en": ..., "de": ...}`, or has that as its `translation`."""
  return _each_line(paths[0], lambda line: _json(line, languages))


def _json(line: str, languages: Pair) -> Pair | Trouble:
  try:
    values = json.loads(line)
  except RecursionError:
    return Trouble("JSON nested too deeply")
  except ValueError:  # The decoder's position would make each reason unique.
    return Trouble("bad JSON")
  if isinstance(values, dict) and isinstance(values.get("translation"), dict):
    values = values["translation"]
  if not isinstance(values, dict):
    return Trouble("no object in JSON")
  sides = []
  for language in languages:
    key = language if language in values else _best(language, tuple(values))
    side = values.get(key) if key else None
    if not isinstance(side, str):
      return Trouble(f"no text {language!r} in JSON")
    sides.append(side)
  return sides[0], sides[1]


def _best(wanted: str, known: Iterable[str]) -> str | None:
  return next(iter(languages_lib.matching(wanted, known)), None)


def sgm(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """The two sides of a WMT test set, segment n beside segment n.

  Raises:
    ValueError: they do not have as many segments, or are not UTF-8.
  """
  sides = []
  for path in paths:
    with _whole(path, lambda: "early") as stream:
      content = stream.read()
    try:
      text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
      line = content[: error.start].count(b"\n") + 1
      raise ValueError(f"{path}:{line}: bad UTF-8") from error
    segments = re.findall(r"(?is)<seg\b[^>]*>(.*?)</seg>", text)
    sides.append([html.unescape(segment) for segment in segments])
  if len(sides[0]) != len(sides[1]):
    raise ValueError(
      f"{paths[0]} and {paths[1]} are not parallel: they have {len(sides[0])} "
      f"and {len(sides[1])} segments"
    )
  yield from enumerate(zip(*sides, strict=True), start=1)


def tmx(paths: Sequence[Path], languages: Pair) -> Iterator[Line]:
  """The units of a translation memory, numbered by the lines they begin in.

  A unit's variants are found by language, `pt-BR` for `pt_BR`, `en-US` for
  `en`. Codes of markup within a segment (`<bpt>`, `<ph>`, ...) are no text.

  Raises:
    ValueError: it is not well-formed, or declares entities.
  """
  units = _Units(paths[0])
  with _whole(paths[0], lambda: f"after line {units.line}") as stream:
    more = True
    while more:
      chunk = stream.read(_CHUNK)
      more = bool(chunk)
      units.feed(chunk)
      while units.done:
        number, variants = units.done.popleft()
        yield number, _sides(variants, languages)


def _sides(variants: dict[str, str], languages: Pair) -> Pair | Trouble:
  left, texts = dict(variants), []
  for language in languages:
    code = _best(language, left)
    if code is None:
      has = ", ".join(variants) or "none"
      return Trouble(f"unit without {language!r}: it has {has}")
    texts.append(left.pop(code))
  return texts[0], texts[1]


class _Units:
  """Translation units of XML that comes in chunks.

  Attributes:
    done: (line, language code to text) of the units that are complete.
  """

  # Elements whose content is a code of the text's own format.
  _CODES = frozenset(("bpt", "ept", "ph", "it", "ut"))

  def __init__(self, path: Path):
    self.done: deque[tuple[int, dict[str, str]]] = deque()
    self._path = path
    self._number = 0
    self._variants: dict[str, str] = {}
    self._code = ""
    self._text: list[str] | None = None  # Of the segment, while within one.
    self._codes = 0  # Depth of elements that are no text.
    self._parser = parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = self._start
    parser.EndElementHandler = self._end
    parser.CharacterDataHandler = self._characters
    parser.SkippedEntityHandler = self._skipped
    parser.EntityDeclHandler = self._declared

  @property
  def line(self) -> int:
    """Where the parser is."""
    return self._parser.CurrentLineNumber

  def feed(self, chunk: bytes) -> None:
    """Takes more of the file; nothing at its end."""
    try:
      self._parser.Parse(chunk, not chunk)
    except expat.ExpatError as error:
      reason = expat.ErrorString(error.code)
      raise ValueError(
        f"{self._path}:{error.lineno}: not well-formed TMX ({reason})"
      ) from error

  def _start(self, name: str, attributes: dict[str, str]) -> None:
    name = name.rpartition(":")[2]
    if self._text is not None:
      self._codes += bool(self._codes or name in self._CODES)
    elif name == "tu":
      self._number, self._variants = self.line, {}
    elif name == "tuv":
      code = attributes.get("xml:lang") or attributes.get("lang")
      self._code = code or "no language"
    elif name == "seg":
      self._text = []

  def _end(self, name: str) -> None:
    name = name.rpartition(":")[2]
    if self._codes:
      self._codes -= 1
    elif name == "seg" and self._text is not None:
      self._variants.setdefault(self._code, "".join(self._text))
      self._text = None
    elif name == "tu":
      self.done.append((self._number, self._variants))

  def _characters(self, text: str) -> None:
    if self._text is not None and not self._codes:
      self._text.append(text)

  def _skipped(self, name: str, is_parameter: bool) -> None:
    if not is_parameter:  # One that a document type elsewhere defines.
      self._characters(html.unescape(f"&{name};"))

  def _declared(self, name: str, *_: Any) -> None:
    raise ValueError(
      f"{self._path}:{self.line}: declares the XML entity {name!r}; such files "
      "are not read"
    )


FORMATS: dict[str, Format] = {".tsv": tsv, ".jsonl": jsonl, ".tmx": tmx}


# ------------------------------------------------------------------- pairs


def usable(
  pair: Pair | Trouble, max_characters: int = sys.maxsize
) -> Pair | Trouble:
  """Both sides normalised, or why they cannot be used."""
  if isinstance(pair, Trouble):
    return pair
  if any(_SURROGATE.search(side) for side in pair if not side.isprintable()):
    return Trouble("lone surrogate")
  first, second = map(normalisation.normalise, pair)
  if not first or not second:
    return Trouble("empty side")
  if max(len(first), len(second)) > max_characters:
    return Trouble(f"longer than {max_characters} characters")
  return first, second


@dataclasses.dataclass
class Report:
  """What was found in a text.

  Attributes:
    file: its path, or both paths.
    pairs: usable lines.
    skipped: reason to number of lines that could not be used.
    examples: 'file:line: reason' of the first few of them.
  """

  file: str
  pairs: int = 0
  skipped: Counter[str] = dataclasses.field(default_factory=Counter)
  examples: list[str] = dataclasses.field(default_factory=list)

  def skip(self, place: str, reason: str) -> None:
    """Counts a line that could not be used."""
    self.skipped[reason] += 1
    if len(self.examples) < _EXAMPLES:
      self.examples.append(f"{place}: {reason}")

  def __str__(self) -> str:
    total = self.skipped.total()
    reasons = ", ".join(f"{n} {why}" for why, n in self.skipped.most_common(9))
    return (
      f"{self.file}: {total} of {total + self.pairs} lines skipped: {reasons}"
    )


def read(
  read_format: Format,
  paths: Sequence[Path],
  languages: Pair,
  max_characters: int,
  report: Report | None = None,
) -> Iterator[Pair]:
  """The usable pairs of a text, normalised.

  Args:
    read_format: such as `moses`, or of `FORMATS`.
    paths: one, or two for a format of two files.
    languages: of its columns or paths.
    max_characters: lines with a longer side are skipped.
    report: counts what is found.

  Raises:
    ValueError: a file that is in doubt as a whole.
  """
  report = report or Report(str(paths[0]))
  for number, line in read_format(paths, languages):
    found = usable(line, max_characters)
    if isinstance(found, Trouble):
      report.skip(f"{paths[0]}:{number}", found)
    else:
      report.pairs += 1
      yield found
