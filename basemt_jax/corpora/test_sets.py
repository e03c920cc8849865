"""Test sets of any kind, for a model that knows some directions.

Files are recognised by their names, as `raw_text` says: tables, Moses pairs,
JSON lines, TMX, SGM, FLORES, NTREX, ... A test set is what files of several
languages have in common in their names: 'newstest2014' of
`newstest2014-deen-src.de.sgm`.
"""

import pathlib
import re
from collections.abc import Iterable, Sequence

from basemt_jax.corpora import planning, raw_text
from basemt_jax.data import languages as languages_lib
from basemt_jax.data import parallel_text

# By direction, its (source, target) texts.
Texts = dict[str, list[parallel_text.Pair]]

# Names that say nothing of where a set is from.
_GENERIC = re.compile(
  r"(test|dev|devtest|valid|validation|eval|train|)[-_.\d]*", re.IGNORECASE
)
# In a name, what is no part of the set's.
_WORDS = "src ref refA refB reference source txt tsv jsonl tmx sgm sgml xml"
_NO_NAMES = frozenset([*_WORDS.split(), "gz", "bz2", "xz"])


def find(
  paths: Sequence[str], directions: Iterable[str], split: str
) -> dict[str, Texts]:
  """The test sets of folders and files, by name.

  Of folders the files of the split, 'test' or 'validation', are taken, in the
  directions that the model knows, such as 'en-de'.

  Raises:
    ValueError: a path without a text in a direction of the model's, or a text
      of which a line cannot be read.
  """
  parsed = map(languages_lib.Direction.parse, sorted(directions))
  # Nobody tests on text that a model wrote.
  authentic = [d for d in parsed if not d.label]
  known = [str(d) for d in authentic]
  pairs = {frozenset(d): d for d in authentic}
  names = raw_text.Names(tuple((d.source, d.target) for d in pairs.values()))
  found: dict[str, Texts] = {}
  for folder, files in _places(paths):
    if files:  # Whatever they are called; but their folder may say languages.
      texts = raw_text.sets_of(folder.parent, names, None, files)
    else:
      texts = raw_text.sets_of(folder, names, split)
    if not texts:
      what = ", ".join(path.name for path in files) or str(folder)
      raise ValueError(
        f"{what}: no {split} set of the model's languages, which are of "
        f"{planning.listed(known)}; files are known by their names, such as "
        f"{known[0]}.test.tsv (docs/data.md lists them)"
      )
    for text in texts:
      _add(found, _set_name(text, names), text, known)
  return found


def _places(
  paths: Sequence[str],
) -> list[tuple[pathlib.Path, list[pathlib.Path]]]:
  """Folders, with some of their files; without any where all count."""
  whole, some = [], dict[pathlib.Path, list[pathlib.Path]]()
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      whole.append((path, list[pathlib.Path]()))
    elif path.is_file():
      some.setdefault(path.absolute().parent, []).append(path.absolute())
    else:
      raise ValueError(f"there is no file or folder {path}")
  return [*whole, *some.items()]


def _set_name(text: raw_text.Text, names: raw_text.Names) -> str:
  """What is left of a file's name without languages, sides and endings."""
  path = pathlib.Path(text.paths[0]).absolute()
  codes = {*text.spelled, *names.languages}
  pairs = {a + b for a in text.spelled for b in text.spelled}
  left = path.name
  for word in sorted(codes | pairs | _NO_NAMES, key=len, reverse=True):
    left = re.sub(
      rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", "", left
    )
  name = re.sub(r"[-._]*([-._])", r"\1", left).strip("-._")
  if _GENERIC.fullmatch(name):
    around = (p.name for p in path.parents if not _GENERIC.fullmatch(p.name))
    name = f"{next(around, 'files')}-{name}".strip("-")
  return name


def _add(
  found: dict[str, Texts], name: str, text: raw_text.Text, known: list[str]
) -> None:
  """Adds a text's pairs to the directions that it is of."""
  pairs = _read(text)
  first, second = text.languages
  both = [(f"{first}-{second}", pairs)]
  if not text.directed:
    both.append((f"{second}-{first}", [pair[::-1] for pair in pairs]))
  for direction, own in both:
    if direction not in known:
      continue
    if direction in found.setdefault(name, {}):
      raise ValueError(
        f"{text.name} and another file are both the set {name!r} of "
        f"{direction}: give one of them"
      )
    found[name][direction] = own


def _read(text: raw_text.Text) -> list[parallel_text.Pair]:
  """All lines: without one that is no pair, scores would be of another set."""
  pairs = []
  for number, line in text.lines():
    pair = parallel_text.usable(line)
    if isinstance(pair, parallel_text.Trouble):
      raise ValueError(
        f"{text.name}:{number}: {pair}, in a test set: mend the line"
      )
    pairs.append(pair)
  if not pairs:
    raise ValueError(f"{text.name} is empty: mend it or leave it out")
  return pairs
