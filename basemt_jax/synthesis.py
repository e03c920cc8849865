"""Pairs of which a model wrote one side: back-translation and distillation.

Text of persons is translated, a chunk at a time, into a TSV file that
`tasks.files` trains on as a direction of its own, `en_x_bt-af` or `en-de_x_kd`.

    FOLDER/.NAME.partial   what has been translated so far
    FOLDER/.NAME.json      how far, and of what; stays, to say what NAME is
    FOLDER/NAME            when all is there

Whoever is killed goes on where the last whole chunk ended. A sentence is padded
to the bucket of its own length, and every device runs the program of one, with
as many rows, so that neither chunks nor the number of devices show in the file.
Of several processes all translate, each with its own devices, and the first
writes.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from basemt_jax import (
  checksums,
  evaluation,
  files,
  partitioning,
  processes,
  trained,
  translation,
)
from basemt_jax.data import languages, normalisation, source_tags

# Batches of every device in a chunk.
_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Job:
  """A file to be written.

  Attributes:
    path: Of the file.
    direction: Of its pairs; one side is labelled.
    tag: Put around a text, asks the model for the other side.
    texts: Starts over on the texts to translate, each with what the choice
      among its translations is compared with, or ''.
    count: How many there are.
    inputs: What the texts are, for telling them from others.
    closest: Take the translation that is closest to what it is compared with,
      rather than the most probable.
  """

  path: pathlib.Path
  direction: languages.Direction
  tag: source_tags.SourceTag
  texts: Callable[[], Iterator[tuple[str, str]]]
  count: int
  inputs: str
  closest: bool = False


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a job is.

  Attributes:
    job: Which.
    done: Texts that were read.
    skipped: Of them, those that are too long, or whose translation is empty.
    per_second: Texts a second since this start.
  """

  job: Job
  done: int
  skipped: int
  per_second: float

  @property
  def seconds_left(self) -> float:
    """Of this job."""
    return (self.job.count - self.done) / max(self.per_second, 1e-9)


def write(
  jobs: Sequence[Job],
  model: trained.Trained,
  search: translation.SearchOptions,
  told: Callable[[Progress], None],
) -> Iterator[Progress]:
  """Translates the texts of jobs, or the rest of them, one job after another.

  Args:
    jobs: What to write.
    model: That translates.
    search: How; `batch_size` is of every device.
    told: Is called after every chunk.

  Yields:
    After each job what was done of it, in all starts together.

  Raises:
    ValueError: A file is there, or half there, of something else; or another
      process is writing it.
  """
  devices = model.program.mesh.size
  translator = _translator(
    model, dataclasses.replace(search, batch_size=search.batch_size * devices)
  )
  for job in jobs:
    yield _write(job, model, translator, _identity(job, model, search), told)


def _write(
  job: Job,
  model: trained.Trained,
  translator: translation.Translator,
  identity: dict[str, Any],
  told: Callable[[Progress], None],
) -> Progress:
  """`write` of one job."""
  state = _State.of(job.path)
  is_there = job.path.exists()
  # Nobody writes before all have looked.
  processes.check_same(
    f"what is in {job.path.parent}", json.dumps([state.values, is_there])
  )
  if state.values and state.identity != identity:
    changed = [k for k in identity if identity[k] != state.identity.get(k)]
    raise ValueError(
      f"{job.path} is being written, or was, with other settings "
      f"({', '.join(changed)}): set them back, remove it and {state.note}, or "
      "choose another place"
    )
  if not state.values and is_there:
    raise ValueError(
      f"{job.path} is there already and was not written by this command: "
      "remove it or choose another place"
    )
  chunk = _BATCHES * translator.options.batch_size
  with state.opened(identity) as file:
    start, began = state.values["done"], time.monotonic()
    texts = itertools.islice(job.texts(), start, None)
    while some := list(itertools.islice(texts, chunk)):
      processes.check_same("the text to translate", json.dumps(some))
      lines = _lines(job, model, translator, some, state.values["done"])
      state.add(file, lines, len(some))
      rate = (state.values["done"] - start) / (time.monotonic() - began)
      told(state.progress(job, rate))
    state.finish(file)
  return state.progress(job, 0.0)


def _translator(
  model: trained.Trained, search: translation.SearchOptions
) -> translation.Translator:
  """Devices that share no layer run one program each."""
  mesh = model.program.mesh
  if mesh.shape["expert"] * mesh.shape["model"] > 1:
    return model.translator(search)
  return translation.Translator(
    model.program.model.clone(mesh=None),
    model.variables,
    search,
    partitioning.batch_sharding(mesh),
    each_alone=True,
  )


def _identity(
  job: Job, model: trained.Trained, search: translation.SearchOptions
) -> dict[str, Any]:
  """What the bytes of the file depend on, as JSON has it."""
  checkpoint = pathlib.Path(model.run.model_dir) / f"checkpoint_{model.step}"
  sums = checkpoint / checksums.FILE
  stamp = checksums.file_checksum(sums) if sums.exists() else ""
  identity = {
    "model": f"step {model.step} {stamp}".strip(),
    "averaged": model.is_averaged,
    "direction": str(job.direction),
    "tag": dataclasses.asdict(job.tag),
    "inputs": job.inputs,
    "closest": job.closest,
    "search": dataclasses.asdict(search),
  }
  return json.loads(json.dumps(identity))


def _lines(
  job: Job,
  model: trained.Trained,
  translator: translation.Translator,
  texts: Sequence[tuple[str, str]],
  first: int,
) -> list[str]:
  """The lines of a chunk whose first text is number `first` of all."""
  options = translator.options
  buckets: dict[int, list[tuple[int, list[int]]]] = {}
  for place, (text, _) in enumerate(texts):
    ids = model.pieces.encode(job.tag(text)) if text else []
    if 0 < len(ids) < options.max_source_length:
      bucket = options.bucket(len(ids) + 1)
      buckets.setdefault(bucket, []).append((place, ids))
  found: dict[int, str] = {}
  for bucket in sorted(buckets):
    places = [place for place, _ in buckets[bucket]]
    nbest = translator.translate(
      [ids for _, ids in buckets[bucket]],
      numbers=[first + place for place in places],
      whole_batches=True,
    )
    for place, hypotheses in zip(places, nbest, strict=True):
      candidates = [
        normalisation.normalise(model.pieces.decode(list(h.ids)))
        for h in hypotheses
      ]
      found[place] = _chosen(job, candidates, texts[place][1])
  written_first = bool(job.direction.source.label)
  return [
    "\t".join((found[place], text) if written_first else (text, found[place]))
    for place, (text, _) in enumerate(texts)
    if found.get(place)
  ]


def _chosen(job: Job, candidates: Sequence[str], reference: str) -> str:
  if not job.closest:
    return candidates[0]
  target = job.direction.target.authentic
  return candidates[evaluation.closest(candidates, reference, target)]


@dataclasses.dataclass
class _State:
  """How far the file is, as its note says.

  Attributes:
    path: Of the file.
    values: `identity`, `done` texts, `lines` and `bytes` written, and whether
      it is `whole`; empty before the first start.
  """

  path: pathlib.Path
  values: dict[str, Any]

  @classmethod
  def of(cls, path: pathlib.Path) -> "_State":
    """What was left by the last start, if there was one."""
    state = cls(path, {})
    try:
      state.values = json.loads(state.note.read_text("utf-8"))
    except FileNotFoundError:
      pass
    except ValueError as error:
      raise ValueError(
        f"{state.note} is damaged: remove it and {path}, and start anew"
      ) from error
    return state

  @property
  def note(self) -> pathlib.Path:
    """Where this is kept."""
    return self.path.with_name(f".{self.path.name}.json")

  @property
  def partial(self) -> pathlib.Path:
    """The file while it grows."""
    return self.path.with_name(f".{self.path.name}.partial")

  @property
  def identity(self) -> Mapping[str, Any]:
    """Of what the file is made."""
    return self.values.get("identity", {})

  @contextlib.contextmanager
  def opened(self, identity: Mapping[str, Any]) -> Iterator[BinaryIO | None]:
    """The growing file, with nothing behind the last whole chunk.

    None where there is nothing to write: all is there, or another process is
    the one that does.
    """
    if not self.values:
      empty = {"done": 0, "lines": 0, "bytes": 0, "whole": False}
      self.values = {"identity": identity, **empty}
    if not processes.is_first():
      yield None
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if self.path.exists():
      if self.path.stat().st_size != self.values["bytes"]:
        raise ValueError(
          f"{self.path} is not as it was written: remove it and {self.note}"
        )
      yield None
      return
    with files.named(self.partial), self.partial.open("ab") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(
          f"another process is writing {self.path}: wait until it has ended"
        ) from None
      if os.fstat(file.fileno()).st_size < self.values["bytes"]:
        raise ValueError(
          f"{self.partial} has lost its end: remove it and {self.note}, and "
          "start anew"
        )
      file.truncate(self.values["bytes"])
      yield file

  def add(
    self, file: BinaryIO | None, lines: Sequence[str], texts: int
  ) -> None:
    """Adds a chunk's lines: first to the file, then to the note."""
    data = "".join(f"{line}\n" for line in lines).encode()
    self.values["done"] += texts
    self.values["lines"] += len(lines)
    self.values["bytes"] += len(data)
    if file is not None:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      self._write()

  def finish(self, file: BinaryIO | None) -> None:
    """Gives the file its name."""
    if file is not None:
      self.values["whole"] = True
      self._write()
      os.replace(self.partial, self.path)

  def progress(self, job: Job, per_second: float) -> Progress:
    """For whoever waits."""
    done = self.values["done"]
    return Progress(job, done, done - self.values["lines"], per_second)

  def _write(self) -> None:
    files.write_json(self.note, self.values)
