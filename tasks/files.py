"""The user's own parallel text: a folder of files becomes a SeqIO mixture.

A folder may mix these, each also compressed (`.gz`, `.bz2`, `.xz`):

- `en-de.train.tsv`: a line is `English<TAB>German`;
- `train.en-de.en` and `train.en-de.de`: Moses pairs, line n beside line n; or
  `train.en` and `train.de`, where the folder has no other languages;
- `en-de.train.jsonl`: a line is `{"en": "...", "de": "..."}`, or has that
  object as its `translation`; other keys are ignored;
- `en-de.train.tmx`: a translation memory.

All but Moses files may be in shards, `en-de.train-00000-of-00004.tsv.gz`.
Splits are `train`, `dev` (also `valid`, `validation`) and `test`; only `train`
is required. Languages are codes in any spelling, with script or region
(`pt_BR`, `zh-Hans`, `deu_Latn`; see `data.languages`). Both directions of every
pair of languages are made, whatever the order in the file's name; only when
there are dev or test files of both orders is each of its own direction (as
WMT's are since 2019). Text that a model wrote is named so, with a label of up
to eight letters after its language: `en_x_bt-af.train.tsv` is Afrikaans and its
back-translations. Such pairs are one direction of their own, in the order of
the name, beside `en-af`.

Text is normalised (`data.normalisation`). A line that cannot be used is counted
and skipped: `Summary.warnings` tells how many, with the first of them, and
training shows that when it starts. What puts a whole file in doubt is an error
instead: Moses files of unequal length (any line may be the misplaced one), a
broken archive, a split without a usable line, languages that are none.

Files are read as streams, with memory for a line at a time. `mixture` reads
them once, to count (about 170,000 lines a second), unless `basemt prepare` made
and counted them; later reads check that the count is still the same.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from basemt_jax import checksums
from basemt_jax.corpora import preparation
from basemt_jax.data import languages, parallel_text, row_store
from basemt_jax.data import vocabulary as vocabulary_lib
from tasks import common, finding

MAX_CHARACTERS = 1000


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a folder holds.

  Attributes:
    folder: its path.
    files: by (first language, second language) and split. Dev and test files
      of both orders stand under both.
    reports: what was found in each file.
    ignored: names of files that are not parallel text by their names.
    max_characters: lines with a longer side are skipped.
  """

  folder: str
  files: finding.Found
  reports: dict[finding.SplitFile, parallel_text.Report]
  ignored: tuple[str, ...]
  max_characters: int

  @property
  def warnings(self) -> list[str]:
    """What is odd about the folder, a sentence each."""
    found = [
      f"{report}; the first: {report.examples[0]}"
      for report in self.reports.values()
      if report.skipped
    ]
    if self.ignored:
      found.append(
        f"{self.folder}: not used, because the names are not like "
        f"en-de.train.tsv with train, dev or test: {', '.join(self.ignored)}"
      )
    return found

  @property
  def directions(self) -> list[tuple[str, str]]:
    """Both of every pair of languages; one of those that a model wrote."""
    found: dict[tuple[str, str], None] = {}
    for key in self.files:
      found[key] = None
      if not languages.Direction.parse("-".join(key)).label:
        found[key[::-1]] = None
    return list(found)

  def direction(self, source: str, target: str) -> dict[str, finding.SplitFile]:
    """The files of a direction, by split: of its order, else of the other."""
    found = self.files.get((target, source), {})
    return finding.in_order(found | self.files.get((source, target), {}))

  def num_pairs(self, languages: tuple[str, str]) -> dict[str, int]:
    """Usable pairs of every split of a direction."""
    return {
      split: self.reports[file].pairs
      for split, file in self.direction(*languages).items()
    }


def mixture(
  data_dir: str | os.PathLike[str],
  vocabulary: str | os.PathLike[str] | vocabulary_lib.Vocabulary = "bytes",
  name: str | None = None,
  max_characters: int = MAX_CHARACTERS,
) -> Any:
  """Registers a folder's directions as tasks, and the mixture of them all.

  Doing so again with the same arguments and unchanged files returns the
  registered mixture.

  Args:
    data_dir: the folder.
    vocabulary: a SentencePiece model file, 'bytes', or a `Vocabulary`.
    name: of the mixture; default 'files.<folder>'. The task of a direction is
      '<name>.en_de'.
    max_characters: lines with a longer side are skipped.

  Returns:
    The SeqIO mixture; each task's rate is its number of training pairs. Its
    `summary` tells directions, sizes and skipped lines.

  Raises:
    ValueError: the folder or a file cannot be used, or `name` is taken by
      something else.
  """
  import seqio

  folder = pathlib.Path(data_dir)
  if not isinstance(vocabulary, vocabulary_lib.Vocabulary):
    vocabulary = vocabulary_lib.Vocabulary.load(vocabulary)
  name = name or default_name(folder)
  files, ignored = finding.discover(folder)
  identity = _identity(folder, files, vocabulary, max_characters)
  if name in seqio.MixtureRegistry.names():
    registered = seqio.MixtureRegistry.get(name)
    if getattr(registered, "identity", None) == identity:
      return registered
    raise ValueError(
      f"mixture {name!r} is already registered, for other files, another"
      f" vocabulary or another limit than {folder} now: give another `name`"
    )
  summary = _scan(folder, files, ignored, max_characters)
  pieces, stamp = vocabulary.seqio(), repr(identity)
  tasks = []
  for source, target in summary.directions:
    sizes = summary.num_pairs((source, target))
    read = functools.partial(
      read_direction, summary, source=source, target=target
    )
    tasks.append(
      common.add_direction(name, source, target, read, sizes, pieces, stamp)
    )
  made = common.add_mixture(name, tasks)
  made.summary, made.identity = summary, identity
  made.warnings = summary.warnings  # Shown when training starts.
  return made


def default_name(data_dir: str | os.PathLike[str]) -> str:
  """The mixture's name of a folder: 'files.' and the folder's own name."""
  folder = pathlib.Path(data_dir).resolve().name
  return "files." + (re.sub(r"\W", "_", folder, flags=re.ASCII) or "root")


def scan(
  data_dir: str | os.PathLike[str], max_characters: int = MAX_CHARACTERS
) -> Summary:
  """Finds a folder's files and reads them once; registers nothing.

  Raises:
    ValueError: as `mixture`.
  """
  folder = pathlib.Path(data_dir)
  return _scan(folder, *finding.discover(folder), max_characters)


def train_vocabulary(
  data_dir: str | os.PathLike[str],
  path: str | os.PathLike[str],
  vocab_size: int = 8000,
  temperature: float = 5.0,
  max_characters: int = MAX_CHARACTERS,
) -> vocabulary_lib.Vocabulary:
  """Trains a SentencePiece model on a folder's temperature-sampled text.

  Registers the folder with the byte vocabulary as '<default name>.bytes'.
  """
  raw = mixture(
    data_dir, "bytes", default_name(data_dir) + ".bytes", max_characters
  )
  return vocabulary_lib.train_from_mixture(
    raw, path, vocab_size, temperature=temperature
  )


def vocabulary_file(
  data_dir: str | os.PathLike[str],
  vocab_size: int = 8000,
  temperature: float = 5.0,
  max_characters: int = MAX_CHARACTERS,
) -> str:
  """Path of the folder's own SentencePiece model, trained when first asked for.

  Args:
    data_dir: the folder.
    vocab_size: pieces.
    temperature: at which directions are sampled for training it.
    max_characters: as `mixture`.
  """
  folder = pathlib.Path(data_dir)
  files, _ = finding.discover(folder)
  raw = vocabulary_lib.Vocabulary.load("bytes")
  identity = _identity(folder, files, raw, max_characters)
  text = repr((identity, vocab_size, temperature)).encode()
  digest = hashlib.blake2b(text, digest_size=6).hexdigest()
  path = pathlib.Path(
    row_store.default_cache_dir(),
    "vocabularies",
    f"{default_name(folder)}-{digest}.model",
  )
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    train_vocabulary(folder, path, vocab_size, temperature, max_characters)
  return str(path)


def read_pairs(
  file: finding.SplitFile,
  max_characters: int,
  report: parallel_text.Report | None = None,
) -> Iterator[common.Pair]:
  """The usable pairs of a file, in order, first language first.

  Of shards one after the other. `report` counts what is found.
  """
  is_moses = file.kind == "moses"
  parts = [file.paths] if is_moses else [(path,) for path in file.paths]
  read = parallel_text.moses if is_moses else parallel_text.FORMATS[file.kind]
  for paths in parts:
    yield from parallel_text.read(
      read, paths, file.languages, max_characters, report
    )


def read_direction(
  summary: Summary, split: str, source: str, target: str
) -> Iterator[common.Pair]:
  """The (source, target) texts of a split.

  Raises:
    ValueError: at the end, for a file that changed since it was counted.
  """
  file, count = summary.direction(source, target)[split], 0
  backwards = file.languages.source != source
  for pair in read_pairs(file, summary.max_characters):
    count += 1
    yield pair[::-1] if backwards else pair
  expected = summary.reports[file].pairs
  if count != expected:
    raise ValueError(
      f"{file} had {expected} usable pairs when it was registered and has"
      f" {count} now: start again with files that stay as they are"
    )


def fingerprint(
  data_dir: str | os.PathLike[str], max_characters: int = MAX_CHARACTERS
) -> str:
  """Stands for the files of a folder, without reading them."""
  folder = pathlib.Path(data_dir)
  files, _ = finding.discover(folder)
  return repr((*_stamps(folder, files), max_characters))


def _identity(
  folder: pathlib.Path,
  files: finding.Found,
  vocabulary: vocabulary_lib.Vocabulary,
  max_characters: int,
) -> tuple[object, ...]:
  """Everything that a mixture depends on, without reading the files."""
  return (*_stamps(folder, files), vocabulary.fingerprint, max_characters)


def _stamps(folder: pathlib.Path, files: finding.Found) -> tuple[object, ...]:
  paths = sorted(
    path
    for splits in files.values()
    for file in splits.values()
    for path in file.paths
  )
  stamps = tuple((path.name, *checksums.stamp(path)) for path in paths)
  return str(folder.resolve()), stamps


# ------------------------------------------------------------------ reading


def _scan(
  folder: pathlib.Path,
  files: finding.Found,
  ignored: tuple[str, ...],
  max_characters: int,
) -> Summary:
  """Reads every file once: counts pairs, and lines that are of no use."""
  counted = _counted(folder, max_characters)
  reports = {
    file: _known_report(file, counted) or _report(file, max_characters)
    for splits in files.values()
    for file in splits.values()
  }
  return Summary(str(folder), files, reports, ignored, max_characters)


def _counted(folder: pathlib.Path, max_characters: int) -> dict[str, dict]:
  """The files that `basemt prepare` made here, as long as all lines fit."""
  path = folder / preparation.REPORT
  if not path.exists():
    return {}
  report = json.loads(path.read_text(encoding="utf-8"))
  fits = report["max_characters"] <= max_characters
  return report["train_files"] if fits else {}


def _known_report(
  file: finding.SplitFile, counted: dict[str, dict]
) -> parallel_text.Report | None:
  """The report of files that were counted and have not changed since."""
  pairs = 0
  for path in file.paths:
    known = counted.get(path.name)
    size, _, checksum = checksums.stamp(path)
    # Earlier versions wrote the sizes alone.
    if known is None or (known["bytes"], known.get("checksum", checksum)) != (
      size,
      checksum,
    ):
      return None
    pairs += known["pairs"]
  return parallel_text.Report(str(file), pairs) if pairs else None


def _report(
  file: finding.SplitFile, max_characters: int
) -> parallel_text.Report:
  report = parallel_text.Report(str(file))
  for _ in read_pairs(file, max_characters, report):
    pass
  if not report.pairs:
    total = report.skipped.total()
    what = f"none of its {total} lines can be used" if total else "it is empty"
    example = f" ({report.examples[0]})" if total else ""
    raise ValueError(
      f"{report.file} has no pairs, {what}{example}: mend or remove it"
    )
  return report
