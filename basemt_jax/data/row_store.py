"""Packed rows on disk.

Axis legend: Li length of inputs, Lt of targets, N directions, R rows read.

A store is a directory. `store.json` names the format, the feature lengths, the
vocabulary, the directions (sorted by name) and their statistics per split;
`SPLIT/DIRECTION.rows` is a plain array of packed rows, each of one direction:
input tokens, target tokens, input segments, target segments. It is memory
mapped, so that a store may be larger than memory and needs no TensorFlow. Of
`train`, `train.1`, ... are other versions (see `subword_sampling`).
"""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax import checksums, files
from basemt_jax.data import packing, pair_sample, permutation

HEADER = "store.json"
FORMAT = "basemt_jax row store"
VERSION = 1
_OPEN_ROWS = 32  # See `packing.RowLayout.pack`.

PathLike = str | os.PathLike[str]


def default_cache_dir() -> str:
  """`$BASEMT_CACHE`, or basemt_jax in the user's cache directory."""
  home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
  return os.environ.get(
    "BASEMT_CACHE", os.path.join(os.path.expanduser(home), "basemt_jax")
  )


@dataclasses.dataclass
class RowStats:
  """What is recorded of one direction in one split.

  Attributes:
    pairs: sentence pairs in the rows.
    rows: packed rows.
    source_tokens: tokens on the source side, EOS included.
    target_tokens: tokens on the target side, EOS included.
    truncated: pairs of which a side was longer than its feature length, and
      was cut.
    dropped: such pairs that were left out.
    padding: share of the rows' token positions that hold padding.
    text_bytes: size of the file of raw texts.
    crc32: checksum of the rows.
    finished: all pairs are in.
    sample: digests of a sample of the pairs as they were tokenised and cut;
      see `pair_sample`.
  """

  pairs: int = 0
  rows: int = 0
  source_tokens: int = 0
  target_tokens: int = 0
  truncated: int = 0
  dropped: int = 0
  padding: float = 0.0
  text_bytes: int = 0
  crc32: int = 0
  finished: bool = False
  sample: list[str] = dataclasses.field(default_factory=list)

  @property
  def read(self) -> int:
    """Pairs that were read."""
    return self.pairs + self.dropped

  @classmethod
  def of_json(cls, values: Mapping[str, Any]) -> "RowStats":
    """What was recorded; what another version recorded besides is left out."""
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in values.items() if k in known})


class RowStoreWriter:
  """Writes one direction of one split, and goes on where it was stopped.

  Pairs are packed in chunks. After each chunk a progress record says how many
  pairs are safely on disk; what an interruption left behind it is dropped, the
  source is read from `stats.read` on, and the files come out byte for byte
  as if nothing had happened.

  Attributes:
    stats: what is on disk so far; the source is to be read from pair
      `stats.read` on.
  """

  def __init__(
    self,
    directory: PathLike,
    split: str,
    direction: str,
    layout: packing.RowLayout,
    *,
    shuffle: bool = False,
    eos: bool = True,
    long_pairs: packing.LongPairs = "cut",
    chunk_pairs: int = 1 << 16,
  ):
    """Opens the files, dropping what is not covered by a progress record.

    Args:
      directory: of the store.
      split: folder within it.
      direction: stem of the files' names.
      layout: of the rows.
      shuffle: pairs are permuted within their chunk, so that neighbours in a
        sorted corpus do not share a row.
      eos: sequences that are too long are cut to end in EOS.
      long_pairs: what becomes of them; only pairs without texts are dropped.
      chunk_pairs: pairs packed and recorded together.
      open_rows: see `packing.RowLayout.pack`.
    """
    stem = pathlib.Path(directory) / split / direction
    stem.parent.mkdir(parents=True, exist_ok=True)
    self._rows_path = stem.with_name(f"{direction}.rows")
    self._texts_path = stem.with_name(f"{direction}.jsonl")
    self._record_path = stem.with_name(f"{direction}.json")
    self._name = f"{split}/{direction}"
    self._layout = layout
    self._shuffle = shuffle
    self._eos = eos
    self._long_pairs = long_pairs
    self._chunk_pairs = chunk_pairs
    self._inputs = self._targets = packing.Ragged.of([])
    self._texts: list[Mapping[str, str]] = []
    self.stats = self._recover()

  def _recover(self) -> RowStats:
    """Reads the progress record and cuts the files back to it."""
    try:
      stats = RowStats.of_json(json.loads(self._record_path.read_text("utf-8")))
      with open(self._rows_path, "r+b") as rows:
        rows.truncate(stats.rows * self._layout.row_bytes)
      # A finished direction without texts has no file for them.
      if stats.text_bytes or not stats.finished:
        with open(self._texts_path, "a+b") as texts:
          texts.truncate(stats.text_bytes)
      if _checksum(self._rows_path) == stats.crc32:
        return stats
    except (FileNotFoundError, ValueError, TypeError):
      pass  # No record, or half of one: begin anew.
    self._rows_path.write_bytes(b"")
    self._texts_path.write_bytes(b"")
    return RowStats()

  def add(
    self,
    inputs: packing.Ragged,
    targets: packing.Ragged,
    texts: Sequence[Mapping[str, str]] = (),
  ) -> None:
    """Takes the next pairs: ids of n sources and targets.

    With n records for the file of raw texts, or none at all.

    Raises:
      ValueError: different numbers of sequences, or an empty one.
    """
    if len(inputs.lengths) != len(targets.lengths):
      raise ValueError(
        f"{self._name}: {len(inputs.lengths)} source sequences for "
        f"{len(targets.lengths)} target sequences"
      )
    empty = (inputs.lengths == 0) | (targets.lengths == 0)
    if empty.any():
      pair = self.stats.read + len(self._inputs.lengths) + int(empty.argmax())
      raise ValueError(
        f"{self._name}: pair {pair} has a side without tokens; remove it, or "
        "set add_eos on the task's features"
      )
    self._inputs = self._inputs.join(inputs)
    self._targets = self._targets.join(targets)
    self._texts.extend(texts)
    while len(self._inputs.lengths) >= self._chunk_pairs:
      self._flush(self._chunk_pairs)

  def finish(self) -> RowStats:
    """Writes the pairs that are left and marks the direction as finished.

    Raises:
      ValueError: long pairs are refused and there are some, or none is left.
    """
    if len(self._inputs.lengths):
      self._flush(len(self._inputs.lengths))
    self._check_long()
    self.stats.finished = True
    if not self._texts_path.stat().st_size:
      self._texts_path.unlink()
    files.write_json(self._record_path, dataclasses.asdict(self.stats))
    return self.stats

  def _check_long(self) -> None:
    stats = self.stats
    refused = self._long_pairs == "refuse" and stats.truncated
    if refused or (stats.dropped and not stats.pairs):
      count = stats.truncated or stats.dropped
      raise ValueError(
        f"{self._name}: {count:,} of {stats.read:,} pairs "
        f"({count / stats.read:.1%}) are longer than the {self._layout.inputs} "
        f"and {self._layout.targets} tokens of TASK_FEATURE_LENGTHS: make "
        "these larger, or LONG_PAIRS 'cut' or 'drop'"
      )

  def _flush(self, count: int) -> None:
    inputs, self._inputs = self._inputs.split(count)
    targets, self._targets = self._targets.split(count)
    texts, self._texts = self._texts[:count], self._texts[count:]
    inputs, cut_inputs = inputs.truncate(self._layout.inputs, self._eos)
    targets, cut_targets = targets.truncate(self._layout.targets, self._eos)
    first = self.stats.read
    chosen = pair_sample.positions(first, first + count) - first
    pair_sample.add_pairs(
      self.stats.sample,
      first,
      first + count,
      inputs.take(chosen),
      targets.take(chosen),
    )
    cut = cut_inputs | cut_targets
    dropped = 0
    if self._long_pairs == "drop" and not texts:
      dropped = int(np.count_nonzero(cut))
      kept = np.flatnonzero(~cut)
      inputs, targets, cut = inputs.take(kept), targets.take(kept), cut[kept]
    count -= dropped
    if self._shuffle:
      size = np.full(count, count)
      key = np.full(count, permutation.key_of("chunk", self._name, first))
      order = permutation.permuted(np.arange(count), size, key)
      inputs, targets = inputs.take(order), targets.take(order)
    packed = self._layout.pack(inputs, targets, _OPEN_ROWS).tobytes()
    lines = "".join(
      json.dumps(dict(text), ensure_ascii=False) + "\n" for text in texts
    ).encode()
    _append(self._rows_path, packed)
    _append(self._texts_path, lines)
    stats = self.stats
    stats.pairs += count
    stats.rows += len(packed) // self._layout.row_bytes
    stats.source_tokens += len(inputs.values)
    stats.target_tokens += len(targets.values)
    stats.truncated += int(np.count_nonzero(cut))
    stats.dropped += dropped
    stats.text_bytes += len(lines)
    stats.crc32 = zlib.crc32(packed, stats.crc32)
    positions = stats.rows * (self._layout.inputs + self._layout.targets)
    filled = stats.source_tokens + stats.target_tokens
    stats.padding = round(1 - filled / max(1, positions), 4)
    # The record comes last: it only ever speaks of what is on disk.
    files.write_json(self._record_path, dataclasses.asdict(stats))


def _append(path: pathlib.Path, data: bytes) -> None:
  with files.named(path), open(path, "ab") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _checksum(path: pathlib.Path) -> int:
  checksum = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 24):
      checksum = zlib.crc32(block, checksum)
  return checksum


def write_header(
  directory: PathLike,
  *,
  layout: packing.RowLayout,
  vocabulary: Mapping[str, Any],
  fingerprint: Mapping[str, Any],
  splits: Mapping[str, Mapping[str, RowStats]] | None = None,
) -> None:
  """Writes `store.json`: before the first row, and again with all the splits.

  Of the vocabulary it has 'kind' ('sentencepiece' or 'bytes'), 'file' (name in
  the directory, or None) and 'size'; as fingerprint what the store was built
  from, one JSON value per part; of splits statistics per direction, or None
  while the store is built.
  """
  files.write_json(
    pathlib.Path(directory) / HEADER,
    {
      "format": FORMAT,
      "version": VERSION,
      "complete": splits is not None,
      "layout": dataclasses.asdict(layout),
      "vocabulary": dict(vocabulary),
      "fingerprint": dict(fingerprint),
      "splits": {
        split: {name: dataclasses.asdict(s) for name, s in stats.items()}
        for split, stats in (splits or {}).items()
      },
    },
  )
  if splits is not None:
    checksums.seal(directory)


def read_header(directory: PathLike) -> dict[str, Any]:
  """Reads `store.json`, of a finished store or not.

  Raises:
    ValueError: no store there, or one of another version.
  """
  path = pathlib.Path(directory) / HEADER
  try:
    header = json.loads(path.read_text("utf-8"))
  except FileNotFoundError:
    raise ValueError(
      f"no row store in {directory}: store.json is missing"
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON: {error}") from None
  if not isinstance(header, dict):
    raise ValueError(
      f"{path} is not the description of a row store: delete the directory, and"
      " it is built again"
    )
  if header.get("format") != FORMAT or header.get("version") != VERSION:
    raise ValueError(
      f"{path} is of format {header.get('format')!r} version "
      f"{header.get('version')}, this program reads {FORMAT!r} version "
      f"{VERSION}: delete the directory and build the store again"
    )
  return header


class Header:
  """What a store holds, without its rows: sizes, lengths, vocabulary.

  Attributes:
    place: where it was read, for errors.
    directions: names, sorted; a batch's `direction` is an index into them.
    splits: names of the splits, their versions left out.
    layout: of the rows.
    vocab_size: pieces of the vocabulary.
    vocabulary_kind: 'sentencepiece' or 'bytes'.
    fingerprint: what the store was built from.
  """

  def __init__(self, place: PathLike, values: Mapping[str, Any]):
    """Takes the values of `store.json`, or of `to_json`.

    Raises:
      ValueError: they are not those of a header.
    """
    self.place = str(place)
    try:
      self.layout = packing.RowLayout(**values["layout"])
      self.fingerprint: dict[str, Any] = values["fingerprint"]
      self._vocabulary = values["vocabulary"]
      self.vocab_size: int = int(self._vocabulary["size"])
      self.vocabulary_kind: str = self._vocabulary["kind"]
      self._vocabulary["file"]
      self._stats = {
        split: {name: RowStats.of_json(s) for name, s in stats.items()}
        for split, stats in values["splits"].items()
      }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise ValueError(
        f"{self.place} does not describe a row store ({error}): it is damaged"
        " or of another version; delete the store and build it again"
      ) from error
    self.splits = tuple(name for name in self._stats if "." not in name)
    names = {name for stats in self._stats.values() for name in stats}
    self.directions: tuple[str, ...] = tuple(sorted(names))

  def to_json(self) -> dict[str, Any]:
    """The values that make an equal header."""
    return {
      "layout": dataclasses.asdict(self.layout),
      "vocabulary": dict(self._vocabulary),
      "fingerprint": dict(self.fingerprint),
      "splits": {
        split: {name: dataclasses.asdict(s) for name, s in stats.items()}
        for split, stats in self._stats.items()
      },
    }

  @property
  def lengths(self) -> dict[str, int]:
    """Feature lengths, {'inputs': Li, 'targets': Lt}."""
    return {"inputs": self.layout.inputs, "targets": self.layout.targets}

  def stats(self, split: str, direction: str) -> RowStats:
    """Statistics of a direction; all 0 where it lacks the split."""
    if split not in self._stats:
      raise ValueError(
        f"{self.place} has no split {split!r}, it has {', '.join(self.splits)}"
      )
    if direction not in self.directions:
      raise ValueError(
        f"{self.place} has no direction {direction!r}, it has "
        f"{', '.join(self.directions)}"
      )
    return self._stats[split].get(direction, RowStats(finished=True))

  def pairs(self, split: str) -> np.ndarray:
    """Sentence pairs per direction; int64 [N]."""
    return np.array([self.stats(split, d).pairs for d in self.directions])

  def rows(self, split: str) -> np.ndarray:
    """Packed rows per direction; int64 [N]."""
    return np.array([self.stats(split, d).rows for d in self.directions])

  def versions(self, split: str) -> tuple[str, ...]:
    """A split and its other versions; a direction may lack the last ones."""
    count = sum(1 for name in self._stats if name.split(".")[0] == split)
    return (split, *(f"{split}.{i}" for i in range(1, count)))

  def epoch_rows(self, split: str) -> np.ndarray:
    """Rows that hold all pairs once, the mean of the versions; float64 [N]."""
    rows = np.array([self.rows(version) for version in self.versions(split)])
    return rows.sum(axis=0) / np.maximum(1, (rows > 0).sum(axis=0))

  def has_pairs(self, split: str) -> bool:
    """Whether any direction has pairs in a split."""
    return split in self.splits and bool(self.pairs(split).any())


class RowStore(Header):
  """A finished store, open for reading.

  Attributes:
    directory: where it lies.
  """

  def __init__(self, directory: PathLike, verify: bool = False):
    """Reads the header and checks sizes; rows are mapped when first read.

    With `verify` all files are read, in parallel, and compared with their
    checksums.

    Raises:
      ValueError: none there, of another version, unfinished, or damaged.
    """
    self.directory = pathlib.Path(directory)
    values = read_header(directory)
    super().__init__(self.directory / HEADER, values)
    if not values.get("complete"):
      raise ValueError(
        f"the row store in {directory} is not finished: build it again, it "
        "goes on where it stopped"
      )
    self._arrays: dict[tuple[str, int], np.ndarray] = {}
    for split, stats in self._stats.items():
      for name, direction in stats.items():
        self._check_size(split, name, direction)
    found = checksums.damage(self.directory) if verify else []
    if found:
      raise ValueError(
        f"the row store in {directory} is damaged: {checksums.told(found)}; "
        "delete the directory, and it is built again"
      )

  def _check_size(self, split: str, name: str, stats: RowStats) -> None:
    stem = self.directory / split
    for file, expected in (
      (f"{name}.rows", stats.rows * self.layout.row_bytes),
      (f"{name}.jsonl", stats.text_bytes),
    ):
      path = stem / file
      size = path.stat().st_size if path.exists() else 0
      if size != expected:
        raise ValueError(
          f"{path} has {size} bytes, {expected} were written: delete the store"
          f" in {self.directory}, and it is built again"
        )

  @property
  def vocabulary(self) -> str:
    """Path of the SentencePiece model in the store, or 'bytes'."""
    file = self._vocabulary["file"]
    return str(self.directory / file) if file else "bytes"

  def texts(self, split: str, direction: str) -> list[dict[str, str]]:
    """Raw texts, one per pair in the source's order.

    Returns:
      Records with `source`, `target` and `tagged_source`; none for splits of
      which no texts are kept (the training split).
    """
    self.stats(split, direction)
    path = self.directory / split / f"{direction}.jsonl"
    if not path.exists():
      return []
    # Not splitlines(): a text may hold other line separators of Unicode.
    return [json.loads(t) for t in path.read_text("utf-8").split("\n") if t]

  def read(self, split: str, direction: str, rows: np.ndarray) -> packing.Batch:
    """Features of some rows, int [R], of one direction; as `read_mixed`."""
    self.stats(split, direction)
    index = self.directions.index(direction)
    return self.read_mixed(split, np.full(len(rows), index), rows)

  def read_mixed(
    self,
    split: str,
    directions: np.ndarray,
    rows: np.ndarray,
    versions: np.ndarray | int = 0,
  ) -> packing.Batch:
    """Features of rows of several directions, in the order asked for.

    Args:
      split: a split of the store.
      directions: int [R], indices into the store's directions.
      rows: int [R], each below the number of rows of its direction.
      versions: int [R], indices into `versions(split)`; or of all.

    Returns:
      The features of `packing.RowLayout.unpack` and `direction`, int32 [R].
    """
    packed = np.empty((len(rows), self.layout.width), self.layout.dtype)
    files = directions + len(self.directions) * versions
    for file in np.unique(files):
      at = np.flatnonzero(files == file)
      version, direction = divmod(int(file), len(self.directions))
      rows_there = self._array(self.versions(split)[version], direction)
      packed[at] = rows_there[rows[at]]
    features = self.layout.unpack(packed)
    return features | {"direction": directions.astype(np.int32)}

  def some_sources(
    self, split: str, direction: str, count: int
  ) -> list[list[int]]:
    """Token ids of at most `count` sources, spread over a direction's rows.

    Sequences are as they were packed, EOS included.
    """
    total = self.stats(split, direction).rows
    rows = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
    batch = self.read(split, direction, rows)
    tokens = batch["encoder_input_tokens"]
    segments = batch["encoder_segment_ids"]
    found: list[list[int]] = []
    for number in range(1, 1 + int(segments.max(initial=0))):
      for row, segment in zip(tokens, segments, strict=True):
        if len(found) < count and (segment == number).any():
          found.append(row[segment == number].tolist())
    return found

  def _array(self, split: str, direction: int) -> np.ndarray:
    """All rows of a direction, mapped; [rows, width]."""
    key = (split, direction)
    if key not in self._arrays:
      name = self.directions[direction]
      count = self.stats(split, name).rows
      shape = (count, self.layout.width)
      if count:
        path = self.directory / split / f"{name}.rows"
        memory = np.memmap(path, self.layout.dtype, mode="r", shape=shape)
        # A memmap's own indexing is slow; its plain view is not.
        self._arrays[key] = memory.view(np.ndarray)
      else:
        self._arrays[key] = np.zeros(shape, self.layout.dtype)
    return self._arrays[key]
