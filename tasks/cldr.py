"""CLDR phrases: the parallel corpus that ships, made rather than downloaded.

The Unicode Common Locale Data Repository says how 12 languages write dates,
times, quantities, currencies, the names of countries and languages, and lists
of them; Babel renders it, and num2words writes numbers in words. A *phrase* is
a function of a locale, so that the same phrase rendered for English and for
German is a sentence pair. Phrases are short, and their parts (40 countries,
24 languages, 20 units, ...) recur, so that a tiny model can learn to
translate combinations that it has not seen.

Construction, the same on every machine (for one version of CLDR):

1. Each language and split has its own stream of phrases, drawn by
   `random.Random(seed).random()`, whose sequence Python guarantees.
2. The CRC-32 of a phrase's English text decides which split it may be in, of
   whatever language: 5% validation, 10% test, the rest training.
3. Test, then validation, then training splits are filled in order. A pair
   whose English or foreign side is already in its split, or in a held-out
   split of *any* language, is dropped. So no side of a held-out phrase is
   ever seen in training, in any direction, and no split repeats a side.

Sizes fall from 20,000 to 100 pairs by a factor of about 1.6. Text is NFC, with
plain spaces and no bidirectional marks, otherwise as CLDR has it. Importing
this module registers tasks `cldr.en_de`, `cldr.de_en`, ... and the mixture
`cldr`; text is made when a dataset is first read, in about two seconds.

The vocabulary `cldr.model` is trained again, byte for byte, by
`python -c 'from tasks import cldr; cldr.train_vocabulary()'`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import pathlib
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import babel
import num2words
from babel import dates, lists, numbers, units

from basemt_jax.data import languages, normalisation
from basemt_jax.data import vocabulary as vocabulary_lib
from tasks import common

# Training pairs of each language with English.
TRAIN_PAIRS = {
  "de": 20000,
  "es": 12400,
  "fr": 7600,
  "id": 4700,
  "ru": 2900,
  "tr": 1800,
  "hi": 1100,
  "fi": 690,
  "ar": 420,
  "vi": 260,
  "sw": 160,
  "ja": 100,
}
VALIDATION_PAIRS, TEST_PAIRS = 100, 200
MODEL_PATH = pathlib.Path(__file__).with_name("cldr.model")
VOCAB_SIZE = 2500
# What it was trained with; others may give other phrases or pieces.
MODEL_VERSIONS = {
  "babel": "2.18.0",
  "num2words": "0.5.14",
  "sentencepiece": "0.2.3",
}


def _words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


_TERRITORIES = _words("""
  AR AU AT BE BR CA CL CN CO CU EG FI FR DE GR IN ID IE IL IT
  JP KE MX MA NL NG NO PK PE PL PT RU ZA KR ES SE CH TR UA US
""")
_LANGUAGES = _words(
  "ar cs da nl en fi fr de el he hi hu id it ja ko fa pl pt ru es sw tr vi"
)
_CURRENCIES = _words("USD EUR GBP JPY CHF CAD AUD INR CNY BRL")
_UNITS = _words("""
  length-kilometer length-meter length-centimeter length-mile mass-kilogram
  mass-gram volume-liter temperature-celsius speed-kilometer-per-hour
  area-square-meter area-square-kilometer area-hectare digital-megabyte
  digital-gigabyte power-kilowatt
""")
_DURATIONS = _words("""
  duration-minute duration-hour duration-day duration-week duration-month
  duration-year
""")
# Units whose amounts stay below 60.
_SMALL = frozenset([*_DURATIONS, "temperature-celsius"])
# Unit of a relative time, its length, and how far it goes before Babel turns
# to the next larger unit.
_RELATIVE = (
  (datetime.timedelta(minutes=1), 59),
  (datetime.timedelta(hours=1), 23),
  (datetime.timedelta(days=1), 6),
  (datetime.timedelta(weeks=1), 4),
  (datetime.timedelta(days=30), 12),
  (datetime.timedelta(days=365), 20),
)
# num2words has no Hindi and Swahili, and spaces Arabic and Turkish oddly.
_IN_WORDS = frozenset(_words("de es fi fr id ja ru vi"))
_FIRST_DAY, _LAST_DAY = datetime.date(1990, 1, 1), datetime.date(2029, 12, 31)

T = TypeVar("T")
Length = Literal["full", "long"]
Style = Literal["standard", "or"]
_LENGTHS: tuple[Length, ...] = ("full", "long")


class _Writer:
  """Writes the parts of phrases as CLDR has them in one language."""

  def __init__(self, language: str):
    self._locale = babel.Locale.parse(language)
    self._language = language

  def date(self, day: datetime.date, length: Length) -> str:
    return dates.format_date(day, length, locale=self._locale)

  def period(self, day: datetime.date, skeleton: str) -> str:
    return dates.format_skeleton(skeleton, day, locale=self._locale)

  def time(self, time: datetime.time) -> str:
    return dates.format_time(time, "short", locale=self._locale)

  def date_and_time(self, moment: datetime.datetime, length: Length) -> str:
    glue = str(dates.get_datetime_format(length, locale=self._locale))
    return (
      glue.replace("'", "")
      .replace("{0}", self.time(moment.time()))
      .replace("{1}", self.date(moment.date(), length))
    )

  def relative(self, difference: datetime.timedelta) -> str:
    return dates.format_timedelta(
      difference, threshold=1, add_direction=True, locale=self._locale
    )

  def quantity(self, amount: int, unit: str) -> str:
    text = units.format_unit(amount, unit, "long", locale=self._locale)
    if unit not in text:
      return text
    # CLDR takes a missing long form from the short one; Babel does not.
    return units.format_unit(amount, unit, "short", locale=self._locale)

  def money(self, amount: int, currency: str) -> str:
    return numbers.format_currency(
      amount,
      currency,
      format_type="name",
      currency_digits=False,
      locale=self._locale,
    )

  def territory(self, code: str) -> str:
    return self._locale.territories[code]

  def language(self, code: str) -> str:
    return self._locale.languages[code]

  def variety(self, language: str, territory: str) -> str:
    # CLDR's localePattern, which Babel spells out for existing locales only.
    return f"{self.language(language)} ({self.territory(territory)})"

  def in_words(self, number: int) -> str:
    return _in_words(number, self._language)

  def join(self, parts: Sequence[str], style: Style) -> str:
    return lists.format_list(parts, style, locale=self._locale)


@functools.cache
def _in_words(number: int, language: str) -> str:
  return num2words.num2words(number, lang=language)


Phrase = Callable[[_Writer], str]


class _Draws:
  """Random choices that are the same for every Python."""

  def __init__(self, seed: int):
    self._random = random.Random(seed)

  def below(self, limit: int) -> int:
    return int(self._random.random() * limit)

  def between(self, low: int, high: int) -> int:
    return low + self.below(high - low + 1)

  def choice(self, values: Sequence[T]) -> T:
    return values[self.below(len(values))]

  def sample(self, values: Sequence[T], count: int) -> list[T]:
    left = list(values)
    return [left.pop(self.below(len(left))) for _ in range(count)]

  def style(self) -> Style:
    """Lists joined by 'and' (two in three) or by 'or'."""
    return "or" if self.below(3) == 0 else "standard"

  def day(self) -> datetime.date:
    days = (_LAST_DAY - _FIRST_DAY).days
    return _FIRST_DAY + datetime.timedelta(self.between(0, days))

  def time(self) -> datetime.time:
    return datetime.time(self.below(24), 5 * self.below(12))

  def amount(self) -> int:
    """1 to 10,000, mostly small; the larger ones are round."""
    kind = self.below(10)
    if kind < 7:
      return self.between(1, 99)
    return 10 * self.between(10, 99) if kind < 9 else 500 * self.between(2, 20)


def _date(draw: _Draws) -> Phrase:
  day, length = draw.day(), draw.choice(_LENGTHS)
  return lambda write: write.date(day, length)


def _date_and_time(draw: _Draws) -> Phrase:
  moment = datetime.datetime.combine(draw.day(), draw.time())
  length = draw.choice(_LENGTHS)
  return lambda write: write.date_and_time(moment, length)


def _list(
  draw: _Draws, part: Callable[..., str], values: Sequence[tuple[Any, ...]]
) -> Phrase:
  """The parts that a method of the writer makes of values, in a list."""
  style = draw.style()
  return lambda write: write.join([part(write, *v) for v in values], style)


def _periods(draw: _Draws) -> Phrase:
  """Months and quarters: 'March 2021 or 2nd quarter 2024'."""
  parts = [
    (draw.day(), draw.choice(["yMMMM", "yMMMM", "yQQQQ"]))
    for _ in range(draw.between(1, 2))
  ]
  return _list(draw, _Writer.period, parts)


def _times(draw: _Draws) -> Phrase:
  times = [(draw.time(),) for _ in range(draw.between(2, 3))]
  return _list(draw, _Writer.time, times)


def _relative_times(draw: _Draws) -> Phrase:
  sign = draw.choice([1, -1])
  differences = [
    (sign * draw.between(1, most) * unit,)
    for unit, most in draw.sample(_RELATIVE, draw.between(1, 3))
  ]
  return _list(draw, _Writer.relative, differences)


def _quantities(draw: _Draws) -> Phrase:
  parts = [
    (draw.between(1, 60) if unit in _SMALL else draw.amount(), unit)
    for unit in draw.sample(_UNITS + _DURATIONS, draw.between(1, 3))
  ]
  return _list(draw, _Writer.quantity, parts)


def _sums_of_money(draw: _Draws) -> Phrase:
  parts = [
    (draw.amount(), currency)
    for currency in draw.sample(_CURRENCIES, draw.between(1, 3))
  ]
  return _list(draw, _Writer.money, parts)


def _territories(draw: _Draws) -> Phrase:
  codes = draw.sample(_TERRITORIES, draw.between(2, 4))
  return _list(draw, _Writer.territory, [(code,) for code in codes])


def _languages(draw: _Draws) -> Phrase:
  codes = draw.sample(_LANGUAGES, draw.between(2, 4))
  return _list(draw, _Writer.language, [(code,) for code in codes])


def _varieties(draw: _Draws) -> Phrase:
  """Languages of territories: 'French (Canada) and Spanish (Chile)'."""
  count = draw.between(1, 2)
  codes = draw.sample(_LANGUAGES, count), draw.sample(_TERRITORIES, count)
  return _list(draw, _Writer.variety, list(zip(*codes, strict=True)))


def _journey(draw: _Draws) -> Phrase:
  """Where, how long, how much: 'Chile, 3 weeks, and 850 euros'."""
  where = draw.choice(_TERRITORIES)
  how_long = draw.between(1, 60), draw.choice(_DURATIONS)
  how_much = draw.amount(), draw.choice(_CURRENCIES)
  return lambda write: write.join(
    [
      write.territory(where),
      write.quantity(*how_long),
      write.money(*how_much),
    ],
    "standard",
  )


def _numbers_in_words(draw: _Draws) -> Phrase:
  values = [(draw.between(1, 120),) for _ in range(draw.between(1, 3))]
  return _list(draw, _Writer.in_words, values)


# Each kind of phrase and its weight.
_KINDS: tuple[tuple[Callable[[_Draws], Phrase], int], ...] = (
  (_date, 14),
  (_date_and_time, 10),
  (_periods, 4),
  (_times, 4),
  (_relative_times, 12),
  (_quantities, 14),
  (_sums_of_money, 8),
  (_territories, 12),
  (_languages, 6),
  (_varieties, 6),
  (_journey, 6),
  (_numbers_in_words, 4),
)


def _phrases(language: str, split: str) -> Iterator[Phrase]:
  """The endless stream of phrases of a language and split."""
  draw = _Draws(zlib.crc32(f"{language} {split}".encode()))
  kinds = [
    kind
    for kind, weight in _KINDS
    for _ in range(weight)
    if kind is not _numbers_in_words or language in _IN_WORDS
  ]
  while True:
    yield draw.choice(kinds)(draw)


def _split_of(english: str) -> str:
  """The split an English phrase may be in, whatever the other language."""
  percent = zlib.crc32(english.encode()) % 100
  return "validation" if percent < 5 else "test" if percent < 15 else "train"


def _fill(
  language: str, split: str, count: int, taken: frozenset[str]
) -> tuple[common.Pair, ...]:
  """The first `count` pairs of a split's stream that it may have."""
  english, foreign = _Writer("en"), _Writer(language)
  pairs: list[common.Pair] = []
  seen_english: set[str] = set()
  seen_foreign: set[str] = set()
  for phrase in _phrases(language, split):
    source = normalisation.normalise(phrase(english))
    if _split_of(source) != split or source in seen_english or source in taken:
      continue
    target = normalisation.normalise(phrase(foreign))
    if target in seen_foreign or target in taken:
      continue
    seen_english.add(source)
    seen_foreign.add(target)
    pairs.append((source, target))
    if len(pairs) == count:
      break
  return tuple(pairs)


def _texts(splits: dict[str, tuple[common.Pair, ...]]) -> frozenset[str]:
  return frozenset(
    side for pairs in splits.values() for pair in pairs for side in pair
  )


@functools.cache
def _held_out(split: str) -> dict[str, tuple[common.Pair, ...]]:
  """The test or validation pairs of every language, and none of the other."""
  count, taken = TEST_PAIRS, frozenset[str]()
  if split == "validation":
    count, taken = VALIDATION_PAIRS, _texts(_held_out("test"))
  return {code: _fill(code, split, count, taken) for code in TRAIN_PAIRS}


@functools.cache
def pairs(language: str, split: str) -> tuple[common.Pair, ...]:
  """The (English, foreign) phrases of a language and split, in random order."""
  if split != "train":
    return _held_out(split)[language]
  taken = _texts(_held_out("test")) | _texts(_held_out("validation"))
  return _fill(language, split, TRAIN_PAIRS[language], taken)


def num_pairs(language: str) -> dict[str, int]:
  """Pairs of every split, known without making them."""
  sizes = (TRAIN_PAIRS[language], VALIDATION_PAIRS, TEST_PAIRS)
  return dict(zip(common.SPLITS, sizes, strict=True))


def _read(split: str, language: str, way: int) -> Iterator[common.Pair]:
  found = pairs(language, split)
  return (pair if way > 0 else pair[::-1] for pair in found)


def _register() -> None:
  """Registers both directions of every language, and their mixture."""
  vocabulary = vocabulary_lib.Vocabulary.load(MODEL_PATH)
  tasks = []
  for code in TRAIN_PAIRS:
    for way in (1, -1):  # From English, to English.
      source, target = ("en", code)[::way]
      read = functools.partial(_read, language=code, way=way)
      sizes, stamp = num_pairs(code), _fingerprint()
      tasks.append(
        common.add_direction(
          "cldr", source, target, read, sizes, vocabulary, stamp
        )
      )
  common.add_mixture("cldr", tasks)


def _fingerprint() -> str:
  """The generator and the data it formats."""
  versions = [
    importlib.metadata.version(name) for name in ("babel", "num2words")
  ]
  digest = hashlib.blake2b(
    pathlib.Path(__file__).read_bytes(), digest_size=8
  ).hexdigest()
  return " ".join([*versions, digest])


def train_vocabulary(path: pathlib.Path = MODEL_PATH) -> None:
  """Trains the vocabulary that ships, the same bytes every time."""

  def texts() -> Iterator[str]:
    # Temperature sampling by hand: sizes^(1/5) differ by a factor of 3.
    for code, size in TRAIN_PAIRS.items():
      quota = round(3000 * (size / 20000) ** 0.2)
      pool = pairs(code, "train")
      for index in range(quota):
        yield from pool[index % size]

  vocabulary_lib.train_sentencepiece(
    texts(),
    path,
    VOCAB_SIZE,
    tags=[
      languages.Language(code).tag for code in sorted([*TRAIN_PAIRS, "en"])
    ],
    character_coverage=1.0,
  )


_register()
