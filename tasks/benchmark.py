"""Published benchmarks: English to and from N languages.

A benchmark is read from a folder in the project's format (`tasks.files`), such
as `basemt prepare NAME` makes. Its tasks are registered on import, without
reading anything: `NAME.en_xx` and `NAME.xx_en`, and the mixtures `NAME`,
`NAME_from_english` and `NAME_to_english`. They read the folder NAME in that of
the environment variable BASEMT_DATA_DIR (`data` when it is not set), with the
SentencePiece model `vocabulary.model` there; `mixture` of a benchmark's module
names another folder and vocabulary. Languages that a folder lacks are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from basemt_jax.corpora import raw_text
from basemt_jax.data import vocabulary as vocabulary_lib
from tasks import common, files, finding

ENVIRONMENT = "BASEMT_DATA_DIR"
MODEL_FILE = "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """English and N languages.

  Attributes:
    name: Of the mixture.
    languages: But for English.
    raw: How the files are named that users download.
    published: Training pairs by language, where they are published.
  """

  name: str
  languages: tuple[str, ...]
  raw: raw_text.Names
  published: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def data_dir(self) -> pathlib.Path:
    """The folder, unless another is named."""
    return pathlib.Path(os.environ.get(ENVIRONMENT, "data")) / self.name

  def sizes(self) -> dict[str, int]:
    """Published training pairs by direction, for `sampling.Strategy`."""
    return {
      f"{source}-{target}": pairs
      for language, pairs in self.published.items()
      for source, target in (("en", language), (language, "en"))
    }

  def register(
    self,
    data_dir: str | os.PathLike[str] | None = None,
    vocabulary: str | os.PathLike[str] | None = None,
  ) -> Any:
    """Registers tasks and mixtures, in place of earlier ones of the benchmark.

    Args:
      data_dir: folder; None: `self.data_dir`. Only languages that it has are
        registered, by the names of its files; all, while there is no folder.
      vocabulary: a SentencePiece model file, or 'bytes'; None: the folder's
        `vocabulary.model`.

    Returns:
      The mixture of both ways.

    Raises:
      ValueError: the folder or its files cannot be used, or it has none of the
        languages.
    """
    from tasks import in_seqio  # Imports SeqIO.

    folder = Folder(pathlib.Path(data_dir or self.data_dir), self)
    pieces: Any = in_seqio.ModelFile(str(folder.path / MODEL_FILE))
    if vocabulary is not None:
      pieces = vocabulary_lib.Vocabulary.load(vocabulary).seqio()
    languages = self.languages
    if data_dir is not None:
      folder.check()
    if folder.path.is_dir():
      there = finding.languages_with_text(folder.path)
      languages = tuple(x for x in languages if ("en", x) in there)
    if not languages and data_dir is None:
      languages = self.languages
    if not languages:
      raise ValueError(
        f"{folder.path} has none of the languages of {self.name}: "
        f"{', '.join(self.languages)}"
      )
    self._unregister()
    ways = (
      ("_from_english", [("en", language) for language in languages]),
      ("_to_english", [(language, "en") for language in languages]),
    )
    both: list[Any] = []
    for ending, directions in ways:
      tasks = [
        common.add_direction(
          *(self.name, source, target),
          functools.partial(folder.read, source=source, target=target),
          functools.partial(folder.num_pairs, source, target),
          pieces,
          folder.fingerprint,
        )
        for source, target in directions
      ]
      common.add_mixture(self.name + ending, tasks)
      both += tasks
    return common.add_mixture(self.name, both)

  def _unregister(self) -> None:
    import seqio

    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
      for name in list(registry.names()):
        if name.split(".")[0] == self.name or name in (
          f"{self.name}_from_english",
          f"{self.name}_to_english",
        ):
          registry.remove(name)


class Folder:
  """A benchmark's folder, looked into when it is first needed."""

  def __init__(self, path: pathlib.Path, benchmark: Benchmark):
    self.path, self._benchmark = path, benchmark

  def check(self) -> None:
    """Raises a ValueError that says where the folder is expected."""
    if not self.path.exists():
      raise ValueError(
        f"the data of {self._benchmark.name} is not in {self.path}: prepare it "
        f"with `basemt prepare {self._benchmark.name}` (see docs/data.md), or "
        f"set {ENVIRONMENT} to the folder that {self._benchmark.name} is in"
      )

  @functools.cached_property
  def _summary(self) -> files.Summary:
    self.check()
    return files.scan(self.path)

  def num_pairs(self, source: str, target: str) -> dict[str, int]:
    """Pairs by split: counted, or as published if there is no folder."""
    published = self._benchmark.published
    if published and not self.path.exists():
      return {"train": published[source if target == "en" else target]}
    return self._summary.num_pairs((source, target))

  def read(self, split: str, source: str, target: str) -> Iterator[common.Pair]:
    """The (source, target) texts of a split."""
    return files.read_direction(self._summary, split, source, target)

  def fingerprint(self) -> str:
    """Stands for the files' content."""
    self.check()
    return files.fingerprint(self.path)
