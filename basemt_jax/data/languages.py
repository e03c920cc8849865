"""Languages and directions: one spelling from a file's name to a report.

A *language* is a BCP-47 tag in whatever spelling people use: `de`, `pt-BR`,
`pt_br`, `zh-Hant`, `es-419`, `eng_Latn`. It is kept as it was written, but for
the case and with underscores: `pt_BR`, `zh_Hant`, `eng_Latn`. So the one hyphen
of a *direction* is between its languages, `en-pt_BR`. Which languages are the
same is another question, `Language.standard`: `eng_Latn` is `en`.

Text that a model wrote is told apart by BCP-47's private use: `en_x_bt` is
English from back-translation. It is English, but no person's, and pairs with it
are a direction of their own, `en_x_bt-af`.

Knowledge of codes is `langcodes`', that is IANA's registry and CLDR.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import langcodes
import regex

from basemt_jax import ranges

BANDS = ("high", "mid", "low")

_LANGUAGE = re.compile(
  r"(?P<language>[a-z]{2,3})"
  r"(?:[-_](?P<script>[a-z]{4}))?"
  r"(?:[-_](?P<region>[a-z]{2}|[0-9]{3}))?"
  r"(?P<variants>(?:[-_](?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*)"
  r"(?:[-_]x[-_](?P<label>[a-z0-9]{1,8}))?",
  re.IGNORECASE,
)
_TAG = re.compile(r"<2(?P<language>[^<>\s]+)>\s*")


class Language(str):
  """A language in its canonical spelling; made by `Language.parse`."""

  __slots__ = ()

  @classmethod
  def parse(cls, spelled: str) -> Language:
    """The language that is spelled so, with '-' or '_', in any case.

    Raises:
      ValueError: it is not spelled as a language code, or has a script or a
        region that does not exist.
    """
    found = _parsed(spelled)
    if found is None:
      raise ValueError(
        f"{spelled!r} is not a language code: write two or three letters, with "
        "script or region where they matter, such as de, pt_BR, zh_Hant or "
        "eng_Latn"
      )
    return found

  @property
  def tag(self) -> str:
    """What asks a model for this language: '<2de>', also for 'de_x_kd'."""
    return f"<2{self.authentic}>"

  @property
  def label(self) -> str:
    """What the text is made by: 'bt' of 'en_x_bt'; '' if it is authentic."""
    return self.partition("_x_")[2]

  @property
  def authentic(self) -> Language:
    """The language without its label: 'en' of 'en_x_bt'."""
    return Language(self.partition("_x_")[0])

  def labelled(self, label: str) -> Language:
    """The language of text that a model wrote: 'en_x_bt' of 'en' and 'bt'.

    Raises:
      ValueError: the label is not one to eight letters and digits.
    """
    return Language.parse(f"{self.authentic}_x_{label}")

  @property
  def standard(self) -> str:
    """The shortest BCP-47 tag of the same language: 'en' of 'eng_Latn'.

    The main language of a macrolanguage is that: 'zh' of 'cmn'. A country's
    code that is no language's stands for its main language: 'zh' of 'cn'.
    """
    return _known(self.authentic)[0]

  @property
  def base(self) -> str:
    """The standard code without script and region: 'pt' of 'pt_BR'."""
    return self.standard.split("-")[0]

  @property
  def script(self) -> str:
    """The script it is most likely written in, 'Hans' of 'zh_CN'.

    'Latn' where nothing is known.
    """
    return langcodes.Language.get(self.standard).maximize().script or "Latn"

  @property
  def doubt(self) -> str | None:
    """What is odd about the code, for a warning; None if it is a known one."""
    return _known(self.authentic)[1]

  def fits(self, wanted: str | Language) -> bool:
    """Whether text in this language is text in the language `wanted`.

    A bare `pt` is any Portuguese; `pt_BR` is neither `pt_PT` nor, in another
    script, anything. Text that is just `pt` counts as its main variety.
    """
    mine, other = (
      langcodes.Language.get(Language.parse(x).standard) for x in (self, wanted)
    )
    if mine.language != other.language:
      return False
    if other.script is None and other.territory is None:
      return True
    a, b = mine.maximize(), other.maximize()
    return a.script == b.script and (
      other.territory is None or a.territory == b.territory
    )


class Direction(NamedTuple):
  """From which language into which; `str` gives 'en-de'."""

  source: Language
  target: Language

  def __str__(self) -> str:
    return f"{self.source}-{self.target}"

  @classmethod
  def parse(cls, spelled: str) -> Direction:
    """The direction that is spelled so: 'en-de', 'en_pt-BR', 'zh-Hant-en'.

    Where more than one hyphen or underscore could be the one between the
    languages ('en-pt-br'), a region in small letters counts as one only where
    the language is its main one; two underscores always stand between.

    Raises:
      ValueError: it is not two languages, or it can be read in two ways.
    """
    likely, possible = _directions(spelled)
    if len(likely) == 1:
      return likely[0]
    if not possible:
      raise ValueError(
        f"direction {spelled!r} is not two language codes; name it like en-de, "
        "en-pt_BR or eng_Latn-deu_Latn"
      )
    raise ValueError(
      f"direction {spelled!r} could be {' or '.join(map(str, possible))}: "
      "write scripts and regions in capitals, or two underscores between the "
      "languages"
    )

  @classmethod
  def of_task(cls, task: str) -> Direction:
    """The direction of a SeqIO task: en-de of 'cldr.en_de'.

    It is what follows the last '.', ':' or '/' of the name.

    Raises:
      ValueError: see `parse`.
    """
    try:
      return cls.parse(re.split(r"[.:/]", task)[-1])
    except ValueError as error:
      raise ValueError(f"task {task!r}: {error}") from None

  @property
  def label(self) -> str:
    """The label of the side that a model wrote; '' if both are authentic."""
    return self.source.label or self.target.label

  def task(self, corpus: str) -> str:
    """The name of its SeqIO task, which can hold no hyphen: 'cldr.en_de'."""
    joint = "__" if "_" in self.source + self.target else "_"
    return f"{corpus}.{self.source}{joint}{self.target}"


@functools.cache
def _parsed(spelled: str) -> Language | None:
  match = _LANGUAGE.fullmatch(spelled)
  if not match:
    return None
  script, region = match["script"] or "", match["region"] or ""
  variants = re.split("[-_]", match["variants"].lower())[1:]
  parts = filter(None, (script, region, *variants))
  if not all(langcodes.tag_is_valid(f"und-{part}") for part in parts):
    return None
  code = match["language"].lower()
  label = f"x_{match['label'].lower()}" if match["label"] else ""
  spelled_so = (code, script.title(), region.upper(), *variants, label)
  return Language("_".join(filter(None, spelled_so)))


@functools.cache
def _known(language: str) -> tuple[str, str | None]:
  """The standard tag, and what is odd about the code."""
  code, *rest = language.split("_")
  if langcodes.tag_is_valid(code):
    return langcodes.standardize_tag(language, macro=True), None
  main = _main_language(code) if len(code) == 2 else ""
  if main and langcodes.Language.get(main).maximize().territory == code.upper():
    return (
      langcodes.standardize_tag("-".join([main, *rest]), macro=True),
      f"{language!r} is not a language code; it is taken for {main!r}, the "
      f"main language of {code.upper()}",
    )
  return language.replace("_", "-"), f"{language!r} is not a known language"


@functools.cache
def _directions(
  spelled: str,
) -> tuple[tuple[Direction, ...], tuple[Direction, ...]]:
  """The likely ways to read a direction, mostly one; and all possible ones."""
  joint = next((x for x in ("__", "-") if spelled.count(x) == 1), None)
  cuts = [match.span() for match in re.finditer("__|-|_", spelled)]
  readings = []
  for start, end in cuts:
    sides = spelled[:start], spelled[end:]
    source, target = map(_parsed, sides)
    if source is not None and target is not None:
      direction = Direction(source, target)
      if spelled[start:end] == joint:  # Nothing is more plainly between them.
        return (direction,), (direction,)
      readings.append((direction, sides))
  likely = [
    direction
    for direction, sides in readings
    if len(cuts) == 1 or all(map(_is_likely, sides, direction))
  ]
  return tuple(likely), tuple(direction for direction, _ in readings)


def _is_likely(spelled: str, language: Language) -> bool:
  """Whether this was meant to be one language, of several ways to cut."""
  code, *rest = re.split("[-_]", spelled)
  if not code.islower() or language.doubt:
    return False
  small = [part for part in rest if len(part) == 2 and part.islower()]
  return all(_main_language(region) == language.base for region in small)


def _main_language(region: str) -> str:
  """The most likely language of a country: 'pt' of 'BR'."""
  return str(langcodes.Language.get(f"und-{region}").maximize().language)


# --------------------------------------------------------------------- tags


def split_tag(text: str) -> tuple[str, str]:
  """The tag that begins a source text, '' if there is none, and the rest."""
  match = _TAG.match(text)
  return (match[0].rstrip(), text[match.end() :]) if match else ("", text)


def matching(wanted: str, known: Iterable[str]) -> list[str]:
  """Which of the codes `known` are meant by a language, however spelled.

  The same spelling counts before the same language, that before a variety of
  it, and that before the language of which it is a variety in the same script.
  What is no language code matches nothing.
  """
  language = _parsed(wanted)
  return list(_matching(language, tuple(known))) if language else []


@functools.lru_cache(maxsize=1024)
def _matching(wanted: Language, known: tuple[str, ...]) -> tuple[str, ...]:
  spelled = [(name, code) for name in known if (code := _parsed(name))]
  for is_meant in (
    lambda other: other == wanted,
    lambda other: other.standard == wanted.standard,
    lambda other: other.fits(wanted),
    lambda other: wanted.fits(other) and wanted.script == other.script,
  ):
    found = tuple(name for name, code in spelled if is_meant(code))
    if found:
      return found
  return ()


def label_of(direction: str) -> str:
  """The label of a direction by its name; '' if it has none, or is none."""
  likely, _ = _directions(direction)
  return likely[0].label if likely else ""


def meant(name: str, directions: Sequence[str]) -> list[str]:
  """Which of some directions a name means: one, or all from or to a language.

  It is of a direction or a language, however spelled; or a label such as 'bt',
  or 'authentic' for all directions without any.
  """
  if name in directions:
    return [name]
  parsed = {d: likely[0] for d in directions if (likely := _directions(d)[0])}
  found = [d for d, own in parsed.items() if name == (own.label or "authentic")]
  if found:
    return found
  sides = [{*side} for side in zip(*parsed.values(), strict=True)]
  for wanted in _directions(name)[1] if sides else ():
    sources, targets = map(matching, wanted, sides)
    found = [d for d, (a, b) in parsed.items() if a in sources and b in targets]
    if found:
      return found
  authentic = {d: {x.authentic for x in own} for d, own in parsed.items()}
  spoken = {*matching(name, {x for own in authentic.values() for x in own})}
  return [d for d, own in authentic.items() if spoken & own]


# ------------------------------------------------------------------ writing

# Letters by how their words are told apart. Scripts of South-East Asia (Thai,
# Lao, Khmer, Burmese, ...) have the line breaking class SA: no spaces. Those of
# `_UNSPACED` are of other classes, and have none either.
_UNSPACED = ("Tibt", "Yiii", "Java", "Bali", "Bugi", "Tang", "Nshu")
_LETTERS = {
  "Kana": regex.compile(r"[\p{sc=Hira}\p{sc=Kana}]"),
  "Hani": regex.compile(r"[\p{sc=Hani}\p{sc=Bopo}]"),
  "Kore": regex.compile(r"\p{sc=Hang}"),
  "unspaced": regex.compile(
    r"[\p{LB=SA}" + "".join(rf"\p{{sc={x}}}" for x in _UNSPACED) + "]"
  ),
  "all": regex.compile(r"\p{L}"),
}
# The same for text that is not there.
_WRITINGS = {
  **dict.fromkeys(("Hans", "Hant", "Hani"), "Hani"),
  **{"Jpan": "Jpan", "Kore": "Kore", "Hang": "Kore"},
  **dict.fromkeys(
    (
      *("Thai", "Laoo", "Khmr", "Mymr", "Lana", "Tale", "Talu", "Tavt", "Ahom"),
      *_UNSPACED,
    ),
    "unspaced",
  ),
}
# Text that is looked at, in characters.
_SAMPLE = 100_000


def writing_of(language: str, texts: Iterable[str] = ()) -> str:
  """How words are told apart in a language: by its text, if there is any.

  Most of the letters decide, not the code, which counts where there are none.

  Returns:
    'Jpan', 'Hani' (Chinese), 'Kore', 'unspaced' for other scripts without
    spaces between words, or 'spaced'.

  Raises:
    ValueError: `language` is not a language code.
  """
  spelled = Language.parse(language)
  sample = "".join(texts)[:_SAMPLE]
  letters = {name: len(kind.findall(sample)) for name, kind in _LETTERS.items()}
  kana, total = letters.pop("Kana"), letters.pop("all")
  if not total:
    return _WRITINGS.get(spelled.script, "spaced")
  letters["Hani"] += kana
  most = max(letters, key=lambda name: letters[name])
  if 2 * letters[most] <= total:
    return "spaced"
  # Japanese is a good part kana, but for short text; Chinese has hardly any.
  if most == "Hani" and (spelled.base == "ja" or 20 * kana > letters[most]):
    return "Jpan"
  return most


# -------------------------------------------------------------------- bands


@dataclasses.dataclass(frozen=True)
class BandThresholds:
  """Training pairs that divide the resource bands of directions.

  High resource from `high` pairs on, low below `low`; by default those of NLLB
  (arXiv:2207.04672).
  """

  high: ranges.Steps = 1_000_000
  low: ranges.Steps = 100_000

  def __post_init__(self):
    if not 0 <= self.low <= self.high:
      raise ValueError(
        f"band thresholds need 0 <= low <= high, got low {self.low} and high"
        f" {self.high}"
      )


def band(pairs: int, thresholds: BandThresholds | None = None) -> str:
  """The band of a direction by its training pairs: 'high', 'mid' or 'low'."""
  thresholds = thresholds or BandThresholds()
  if pairs >= thresholds.high:
    return "high"
  return "low" if pairs < thresholds.low else "mid"
