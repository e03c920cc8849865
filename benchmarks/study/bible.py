"""Bibles as a corpus of the study: 12 languages that it has not seen.

    git clone https://github.com/gratis-bible/bible
    export PYTHONPATH=.
    python benchmarks/study/bible.py --repository bible/.git --out FOLDER
    python benchmarks/study/runs.py prepare --data FOLDER --store DIR \
      --long_pairs drop

Translations of one text, to and from English, into languages of seven scripts
and six families. They are cut to sizes as far apart as those of the first
corpus.

Verses are paired by their numbers, in chapters that have the same verses in
both languages. The dev and test verses are the same for all languages. They are
short in each of them, and in no training text, not even where another verse
says the same.
"""

import argparse
import collections
import hashlib
import io
import pathlib
import subprocess
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

from basemt_jax import files
from basemt_jax.data import normalisation

# Of the repository; later ones have no files of single books.
REVISION = "708525825a2eef161114ffb5cad3d0e112473e01"
ENGLISH = "en/web"
# By language: folder, and training pairs.
LANGUAGES = {
  "uk": ("ru/ukrub", 23_500),
  "he": ("he/hebm", 20_500),
  "fi": ("fi/fin", 14_000),
  "th": ("th/kjvthai", 9_500),
  "ar": ("ar/arasvd", 6_500),
  "hu": ("hu/hun", 6_000),
  "mi": ("mi/mao", 3_500),
  "ko": ("ko/kor", 2_200),
  "ht": ("ht/hat", 1_400),
  "tl": ("tl/tlgangbiblia", 800),
  "el": ("xx/greekm", 300),
  "it": ("it/itadio", 110),
}
HELD_OUT = {"dev": 200, "test": 300}
# Longest side of a pair; a verse has 130 in English.
MAX_CHARACTERS = {"train": 180, "held out": 120}
# A book is used if so many of its chapters have the same verses.
LEAST_ALIGNED = 0.7

Verses = Mapping[str, str]  # '1John.4.16' to text
_VERSE = "{http://www.bibletechnologies.net/2003/OSIS/namespace}verse"


def read(repository: str, folder: str) -> dict[str, str]:
  """The verses of a Bible, normalised; books that are no XML are left out."""
  archive = ("archive", "--format=tar", REVISION, folder)
  raw = subprocess.run(
    ["git", f"--git-dir={repository}", *archive],
    check=True,
    capture_output=True,
  ).stdout
  verses: dict[str, str] = {}
  with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
    for member in tar:
      if not member.name.endswith(".xml"):
        continue
      file = tar.extractfile(member)
      assert file is not None
      try:
        found = ElementTree.parse(file).iter(_VERSE)
      except ElementTree.ParseError as error:
        print(f"{member.name} is left out: {error}")
        continue
      for verse in found:
        text = normalisation.normalise("".join(verse.itertext()))
        if text:
          verses[verse.attrib["osisID"]] = text
  return verses


def aligned(english: Verses, other: Verses) -> list[str]:
  """Verses of chapters that have the same verses in both languages.

  In books of which most chapters do: elsewhere numbers that agree do so by
  chance, as in Psalms.
  """
  own, theirs = _chapters(english), _chapters(other)
  same = {chapter for chapter in own if own[chapter] == theirs.get(chapter)}
  chapters, agreeing = (
    collections.Counter(map(_book, found)) for found in (own, same)
  )
  return [
    verse
    for chapter in own
    for verse in own[chapter]
    if chapter in same
    and agreeing[_book(chapter)] >= LEAST_ALIGNED * chapters[_book(chapter)]
  ]


def _book(chapter: str) -> str:
  return chapter.partition(".")[0]


def _chapters(verses: Verses) -> dict[str, list[str]]:
  """The verses of every chapter, sorted."""
  found: dict[str, list[str]] = {}
  for verse in sorted(verses):
    found.setdefault(verse.rpartition(".")[0], []).append(verse)
  return found


def held_out(english: Verses, others: Mapping[str, Verses]) -> list[str]:
  """Verses for dev and test, in an order of their own: short in all languages.

  Args:
    english: all of its verses; a text that is there twice is not chosen.
    others: by language, those that can be paired.
  """
  key = normalisation.comparison_key
  counts = collections.Counter(map(key, english.values()))
  texts = (english, *others.values())
  chosen = (
    verse
    for verse in set(english).intersection(*others.values())
    if counts[key(english[verse])] == 1
    and all(len(own[verse]) <= MAX_CHARACTERS["held out"] for own in texts)
  )
  return shuffled(chosen, "held out")[: sum(HELD_OUT.values())]


def shuffled(verses: Iterable[str], salt: str) -> list[str]:
  """The verses in an order that depends on nothing but them and the salt."""

  def digest(verse: str) -> bytes:
    return hashlib.blake2b(f"{salt} {verse}".encode()).digest()

  return sorted(verses, key=digest)


def training(
  english: Verses, other: Verses, held: Collection[str], language: str
) -> list[str]:
  """Verses to train with, in an order of their own.

  None is held out, says what one of those does, or is too long.
  """
  key = normalisation.comparison_key
  sides = (english, other)
  kept_apart = [{key(side[verse]) for verse in held} for side in sides]
  return shuffled(
    (
      verse
      for verse in other
      if all(
        len(side[verse]) <= MAX_CHARACTERS["train"]
        and key(side[verse]) not in apart
        for side, apart in zip(sides, kept_apart, strict=True)
      )
    ),
    language,
  )


def write(
  path: pathlib.Path, english: Verses, other: Verses, verses: Iterable[str]
) -> None:
  """Writes pairs as `tasks/files.py` reads them."""
  lines = (f"{english[verse]}\t{other[verse]}\n" for verse in verses)
  files.write_atomically(path, "".join(lines))


def correlation(english: Verses, other: Verses, verses: Iterable[str]) -> float:
  """Of the lengths of both sides: near 0 where the wrong ones are paired."""
  lengths = [(len(english[verse]), len(other[verse])) for verse in verses]
  return float(np.corrcoef(np.array(lengths).T)[0, 1])


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes the corpus and says how large it is."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repository", required=True, help="a git directory")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  options = parser.parse_args(arguments)
  english = read(options.repository, ENGLISH)
  others = {}
  for language, (folder, _) in LANGUAGES.items():
    verses = read(options.repository, folder)
    others[language] = {v: verses[v] for v in aligned(english, verses)}
  held = held_out(english, others)
  print("language  aligned  short enough  training  correlation of lengths")
  for language, other in others.items():
    usable = training(english, other, held, language)
    parts, start = {"train": usable[: LANGUAGES[language][1]]}, 0
    for split, count in HELD_OUT.items():
      parts[split] = held[start : start + count]
      start += count
    for split, verses_of_split in parts.items():
      path = options.out / f"en-{language}.{split}.tsv"
      write(path, english, other, verses_of_split)
    sizes = f"{len(other):7,}  {len(usable):12,}  {len(parts['train']):8,}"
    found = correlation(english, other, parts["train"])
    print(f"{language:8}  {sizes}  {found:.2f}")


if __name__ == "__main__":
  main()
