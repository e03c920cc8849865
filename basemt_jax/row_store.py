"""Packed rows on disk, and the training batches that are drawn from them.

Axis legend: B rows of the global batch, L length (Li of inputs, Lt of
targets), N directions, K steps planned together, R rows read.

A store is a directory. `store.json` names the format, the feature lengths, the
vocabulary, the directions (sorted by name) and their statistics per split;
`SPLIT/DIRECTION.rows` is a plain array of packed rows, each of one direction:
input tokens, target tokens, input segments, target segments. It is memory
mapped, so that a store may be larger than memory and needs no TensorFlow.

The data contract: the global batch of step k is a pure function of (seed, k).
Row r of step k draws its direction with the rates of the temperature T(k), from
a counter-based random stream; the direction then gives its next row in a
permutation of its own for every epoch. The position of a run is k and one
counter per direction, for any number of hosts.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import queue
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from basemt_jax import heating

FORMAT = "basemt_jax row store"
VERSION = 1
EOS_ID = 1

Batch = dict[str, np.ndarray]
PathLike = str | os.PathLike[str]


# ------------------------------------------------------------------ layout


class Ragged(NamedTuple):
  """Sequences of different lengths, laid end to end.

  Attributes:
    values: int [sum of lengths].
    lengths: int [number of sequences].
  """

  values: np.ndarray
  lengths: np.ndarray

  @classmethod
  def of(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
    """From lists of ids."""
    lengths = np.array([len(s) for s in sequences], np.int64)
    values = np.fromiter(
      itertools.chain.from_iterable(sequences), np.int32, lengths.sum()
    )
    return cls(values, lengths)

  def split(self, count: int) -> tuple["Ragged", "Ragged"]:
    """The first `count` sequences, and the others."""
    cut = int(self.lengths[:count].sum())
    return (
      Ragged(self.values[:cut], self.lengths[:count]),
      Ragged(self.values[cut:], self.lengths[count:]),
    )

  def join(self, other: "Ragged") -> "Ragged":
    """The sequences of both, in order."""
    return Ragged(
      np.concatenate([self.values, other.values]),
      np.concatenate([self.lengths, other.lengths]),
    )

  def take(self, order: np.ndarray) -> "Ragged":
    """Sequences in another order."""
    starts = np.cumsum(self.lengths) - self.lengths
    lengths = self.lengths[order]
    index = np.repeat(starts[order], lengths) + _ranks(lengths)
    return Ragged(self.values[index], lengths)

  def truncate(self, limit: int, eos: bool) -> tuple["Ragged", np.ndarray]:
    """Cuts every sequence to `limit` tokens.

    Args:
      limit: tokens that remain at most.
      eos: the last token of a sequence that is cut becomes EOS, as
        `seqio.preprocessors.append_eos_after_trim` has it.

    Returns:
      The sequences, and a bool array that tells which were cut.
    """
    cut = self.lengths > limit
    if not cut.any():
      return self, cut
    lengths = np.minimum(self.lengths, limit)
    starts = np.cumsum(self.lengths) - self.lengths
    values = self.values[np.repeat(starts, lengths) + _ranks(lengths)]
    if eos:
      values[(np.cumsum(lengths) - 1)[cut]] = EOS_ID
    return Ragged(values, lengths), cut


def _ranks(lengths: np.ndarray) -> np.ndarray:
  """0, 1, ... within each of the runs with these lengths."""
  starts = np.cumsum(lengths) - lengths
  return np.arange(lengths.sum()) - np.repeat(starts, lengths)


@dataclasses.dataclass(frozen=True)
class RowLayout:
  """How a packed row lies in its file.

  Attributes:
    inputs: Li, tokens of the source side of a row.
    targets: Lt, tokens of the target side of a row.
    dtype: integer type of the file: '<u2', or '<i4' for vocabularies of more
      than 65,536 pieces.
  """

  inputs: int
  targets: int
  dtype: str = "<u2"

  @classmethod
  def of(cls, lengths: Mapping[str, int], vocab_size: int) -> "RowLayout":
    """For SeqIO's task feature lengths."""
    for name in ("inputs", "targets"):
      if lengths.get(name, 0) < 2:
        raise ValueError(
          "Feature lengths need 'inputs' and 'targets' of at least 2 tokens, "
          f"got {dict(lengths)}."
        )
    if max(lengths["inputs"], lengths["targets"]) > np.iinfo(np.uint16).max:
      raise ValueError(f"Feature lengths must be below 65,536, got {lengths}.")
    dtype = "<u2" if vocab_size <= 1 << 16 else "<i4"
    return cls(int(lengths["inputs"]), int(lengths["targets"]), dtype)

  @property
  def width(self) -> int:
    """Integers in a row."""
    return 2 * (self.inputs + self.targets)

  @property
  def row_bytes(self) -> int:
    """Bytes of a row."""
    return self.width * np.dtype(self.dtype).itemsize

  def pack(
    self, inputs: Ragged, targets: Ragged, open_rows: int = 1
  ) -> np.ndarray:
    """Packs pairs into rows, both sides of a pair into the same row.

    Args:
      inputs: n sequences of at most Li tokens.
      targets: n sequences of at most Lt tokens.
      open_rows: rows that may still take a pair. 1 fills one row after the
        other, as SeqIO does; more waste less.

    Returns:
      [R, width] in `dtype`; within a row the pairs keep their order.
    """
    row = _first_fit(
      inputs.lengths, targets.lengths, self.inputs, self.targets, open_rows
    )
    order = np.argsort(row, kind="stable")
    row = row[order]
    count = int(row[-1]) + 1 if row.size else 0
    segment = _ranks(np.bincount(row, minlength=count)) + 1
    packed = np.zeros((count, self.width), self.dtype)
    tokens = self.inputs + self.targets
    for side, offset in ((inputs, 0), (targets, self.inputs)):
      side = side.take(order)
      # A token's place in its row: its rank among all tokens of the row.
      place = _ranks(np.bincount(row, side.lengths, count).astype(np.int64))
      index = np.repeat(row, side.lengths) * self.width + offset + place
      packed.reshape(-1)[index] = side.values
      packed.reshape(-1)[index + tokens] = np.repeat(segment, side.lengths)
    return packed

  def unpack(self, packed: np.ndarray) -> Batch:
    """The model's features of packed rows.

    Segment ids start at 1 and 0 is padding, exactly as
    `seqio.EncDecFeatureConverter(pack=True)` has it.

    Args:
      packed: [R, width] in `dtype`.

    Returns:
      int32 [R, Li] `encoder_input_tokens`, `encoder_segment_ids`,
      `encoder_positions`; int32 [R, Lt] `decoder_input_tokens`,
      `decoder_target_tokens`, `decoder_segment_ids`, `decoder_positions`; and
      float32 [R, Lt] `decoder_loss_weights`.
    """
    packed = packed.astype(np.int32)
    tokens = self.inputs + self.targets
    bounds = [self.inputs, tokens, tokens + self.inputs]
    source, target, source_ids, target_ids = np.split(packed, bounds, axis=1)
    source_follows = _follows(source_ids)
    target_follows = _follows(target_ids)
    shifted = np.zeros_like(target)
    np.multiply(target[:, :-1], target_follows[:, 1:], out=shifted[:, 1:])
    return {
      "encoder_input_tokens": np.ascontiguousarray(source),
      "encoder_segment_ids": np.ascontiguousarray(source_ids),
      "encoder_positions": _positions(source_ids, source_follows),
      "decoder_input_tokens": shifted,
      "decoder_target_tokens": np.ascontiguousarray(target),
      "decoder_segment_ids": np.ascontiguousarray(target_ids),
      "decoder_positions": _positions(target_ids, target_follows),
      "decoder_loss_weights": (target_ids > 0).astype(np.float32),
    }


def _follows(segments: np.ndarray) -> np.ndarray:
  """Whether a token goes on with the segment before it; bool [R, L]."""
  follows = np.zeros(segments.shape, bool)
  np.equal(segments[:, 1:], segments[:, :-1], out=follows[:, 1:])
  return follows


def _positions(segments: np.ndarray, follows: np.ndarray) -> np.ndarray:
  """0, 1, ... within each segment, 0 on padding; int32 [R, L]."""
  index = np.arange(segments.shape[1], dtype=np.int32)
  starts = np.where(follows, np.int32(0), index)
  np.maximum.accumulate(starts, axis=1, out=starts)
  return (index - starts) * (segments > 0)


def _first_fit(
  inputs: np.ndarray,
  targets: np.ndarray,
  input_limit: int,
  target_limit: int,
  open_rows: int,
) -> np.ndarray:
  """The row of every pair: the first open one that has room for both sides.

  When no open row has room, the oldest is closed. Plain Python: sequential by
  nature, and an order of magnitude faster than tokenising.
  """
  rooms: list[list[int]] = []  # [row, free input tokens, free target tokens]
  rows = []
  count = 0
  for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
    for room in rooms:
      if room[1] >= x and room[2] >= y:
        break
    else:
      room = [count, input_limit, target_limit]
      count += 1
      if len(rooms) == open_rows:
        rooms.pop(0)
      rooms.append(room)
    room[1] -= x
    room[2] -= y
    rows.append(room[0])
  return np.array(rows, np.int64)


# ------------------------------------------------------------------- write


@dataclasses.dataclass
class RowStats:
  """What is recorded of one direction in one split.

  Attributes:
    pairs: sentence pairs.
    rows: packed rows.
    source_tokens: tokens on the source side, EOS included.
    target_tokens: tokens on the target side, EOS included.
    truncated: pairs of which a side was longer than its feature length.
    padding: share of the rows' token positions that hold padding.
    text_bytes: size of the file of raw texts.
    crc32: checksum of the rows.
    finished: all pairs are in.
  """

  pairs: int = 0
  rows: int = 0
  source_tokens: int = 0
  target_tokens: int = 0
  truncated: int = 0
  padding: float = 0.0
  text_bytes: int = 0
  crc32: int = 0
  finished: bool = False


class RowStoreWriter:
  """Writes one direction of one split, and goes on where it was stopped.

  Pairs are packed in chunks. After each chunk a progress record says how many
  pairs are safely on disk; what an interruption left behind it is dropped, the
  source is read from `stats.pairs` on, and the files come out byte for byte
  as if nothing had happened.

  Attributes:
    stats: what is on disk so far; the source is to be read from pair
      `stats.pairs` on.
  """

  def __init__(
    self,
    directory: PathLike,
    split: str,
    direction: str,
    layout: RowLayout,
    *,
    shuffle: bool = False,
    eos: bool = True,
    chunk_pairs: int = 1 << 16,
    open_rows: int = 32,
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
      chunk_pairs: pairs packed and recorded together.
      open_rows: see `RowLayout.pack`.
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
    self._chunk_pairs = chunk_pairs
    self._open_rows = open_rows
    self._inputs = self._targets = Ragged.of([])
    self._texts: list[Mapping[str, str]] = []
    self.stats = self._recover()

  def _recover(self) -> RowStats:
    """Reads the progress record and cuts the files back to it."""
    try:
      stats = RowStats(**json.loads(self._record_path.read_text("utf-8")))
      with open(self._rows_path, "r+b") as rows:
        rows.truncate(stats.rows * self._layout.row_bytes)
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
    inputs: Ragged,
    targets: Ragged,
    texts: Sequence[Mapping[str, str]] = (),
  ) -> None:
    """Takes the next pairs.

    Args:
      inputs: n sequences of source ids.
      targets: n sequences of target ids.
      texts: n records for the file of raw texts, or none at all.

    Raises:
      ValueError: different numbers of sequences, or an empty one.
    """
    if len(inputs.lengths) != len(targets.lengths):
      raise ValueError(
        f"{self._name}: {len(inputs.lengths)} source sequences for "
        f"{len(targets.lengths)} target sequences."
      )
    empty = (inputs.lengths == 0) | (targets.lengths == 0)
    if empty.any():
      pair = self.stats.pairs + len(self._inputs.lengths) + int(empty.argmax())
      raise ValueError(
        f"{self._name}: pair {pair} has a side without tokens; remove it, or "
        "set add_eos on the task's features."
      )
    self._inputs = self._inputs.join(inputs)
    self._targets = self._targets.join(targets)
    self._texts.extend(texts)
    while len(self._inputs.lengths) >= self._chunk_pairs:
      self._flush(self._chunk_pairs)

  def finish(self) -> RowStats:
    """Writes the pairs that are left and marks the direction as finished."""
    if len(self._inputs.lengths):
      self._flush(len(self._inputs.lengths))
    self.stats.finished = True
    if not self._texts_path.stat().st_size:
      self._texts_path.unlink()
    _write_json(self._record_path, dataclasses.asdict(self.stats))
    return self.stats

  def _flush(self, count: int) -> None:
    inputs, self._inputs = self._inputs.split(count)
    targets, self._targets = self._targets.split(count)
    texts, self._texts = self._texts[:count], self._texts[count:]
    inputs, cut_inputs = inputs.truncate(self._layout.inputs, self._eos)
    targets, cut_targets = targets.truncate(self._layout.targets, self._eos)
    if self._shuffle:
      size = np.full(count, count)
      key = np.full(count, _key("chunk", self._name, self.stats.pairs))
      order = _permuted(np.arange(count), size, key)
      inputs, targets = inputs.take(order), targets.take(order)
    packed = self._layout.pack(inputs, targets, self._open_rows).tobytes()
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
    stats.truncated += int(np.count_nonzero(cut_inputs | cut_targets))
    stats.text_bytes += len(lines)
    stats.crc32 = zlib.crc32(packed, stats.crc32)
    positions = stats.rows * (self._layout.inputs + self._layout.targets)
    filled = stats.source_tokens + stats.target_tokens
    stats.padding = round(1 - filled / positions, 4)
    # The record comes last: it only ever speaks of what is on disk.
    _write_json(self._record_path, dataclasses.asdict(stats))


def _append(path: pathlib.Path, data: bytes) -> None:
  with open(path, "ab") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Replaces a file in one step."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w", encoding="utf-8") as file:
    json.dump(value, file, indent=1, ensure_ascii=False)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _checksum(path: pathlib.Path) -> int:
  checksum = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 24):
      checksum = zlib.crc32(block, checksum)
  return checksum


def write_header(
  directory: PathLike,
  *,
  layout: RowLayout,
  vocabulary: Mapping[str, Any],
  fingerprint: Mapping[str, Any],
  splits: Mapping[str, Mapping[str, RowStats]] | None = None,
) -> None:
  """Writes `store.json`: before the first row, and again with all the splits.

  Args:
    directory: of the store.
    layout: of its rows.
    vocabulary: 'kind' ('sentencepiece' or 'bytes'), 'file' (name in the
      directory, or None) and 'size'.
    fingerprint: what the store was built from, one JSON value per part.
    splits: statistics per split and direction; None while the store is built.
  """
  _write_json(
    pathlib.Path(directory) / "store.json",
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


def read_header(directory: PathLike) -> dict[str, Any]:
  """Reads `store.json`, of a finished store or not.

  Raises:
    ValueError: no store there, or one of another version.
  """
  path = pathlib.Path(directory) / "store.json"
  try:
    header = json.loads(path.read_text("utf-8"))
  except FileNotFoundError:
    raise ValueError(
      f"No row store in {directory}: store.json is missing."
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON: {error}.") from None
  if header.get("format") != FORMAT or header.get("version") != VERSION:
    raise ValueError(
      f"{path} is of format {header.get('format')!r} version "
      f"{header.get('version')}, this program reads {FORMAT!r} version "
      f"{VERSION}: delete the directory and build the store again."
    )
  return header


# -------------------------------------------------------------------- read


class RowStore:
  """A finished store, open for reading.

  Attributes:
    directory: where it lies.
    directions: names, sorted; a batch's `direction` is an index into them.
    splits: names of the splits.
    layout: of the rows.
    vocab_size: pieces of the vocabulary.
    fingerprint: what it was built from.
  """

  def __init__(self, directory: PathLike):
    """Opens a store.

    Raises:
      ValueError: none there, of another version, unfinished, or damaged.
    """
    self.directory = pathlib.Path(directory)
    header = read_header(directory)
    if not header["complete"]:
      raise ValueError(
        f"The row store in {directory} is not finished: build it again, it "
        "goes on where it stopped."
      )
    self.layout = RowLayout(**header["layout"])
    self.fingerprint: dict[str, Any] = header["fingerprint"]
    self._vocabulary = header["vocabulary"]
    self.vocab_size: int = self._vocabulary["size"]
    self._stats = {
      split: {name: RowStats(**s) for name, s in stats.items()}
      for split, stats in header["splits"].items()
    }
    self.splits = tuple(self._stats)
    names = {name for stats in self._stats.values() for name in stats}
    self.directions: tuple[str, ...] = tuple(sorted(names))
    self._arrays: dict[tuple[str, int], np.ndarray] = {}
    for split, stats in self._stats.items():
      for name, direction in stats.items():
        self._check_size(split, name, direction.rows)

  def _check_size(self, split: str, name: str, rows: int) -> None:
    path = self.directory / split / f"{name}.rows"
    size = path.stat().st_size if path.exists() else 0
    if size != rows * self.layout.row_bytes:
      raise ValueError(
        f"{path} has {size} bytes, {rows * self.layout.row_bytes} were "
        "written: delete the store and build it again."
      )

  @classmethod
  def open(cls, directory: PathLike) -> "RowStore":
    """The same as the constructor."""
    return cls(directory)

  @property
  def lengths(self) -> dict[str, int]:
    """Feature lengths, {'inputs': Li, 'targets': Lt}."""
    return {"inputs": self.layout.inputs, "targets": self.layout.targets}

  @property
  def vocabulary(self) -> str:
    """Path of the SentencePiece model in the store, or 'bytes'."""
    file = self._vocabulary["file"]
    return str(self.directory / file) if file else "bytes"

  def stats(self, split: str, direction: str) -> RowStats:
    """Statistics of a direction; all 0 where it lacks the split."""
    if split not in self._stats:
      raise ValueError(
        f"The row store in {self.directory} has no split {split!r}, it has "
        f"{', '.join(self.splits)}."
      )
    if direction not in self.directions:
      raise ValueError(
        f"The row store in {self.directory} has no direction {direction!r}, "
        f"it has {', '.join(self.directions)}."
      )
    return self._stats[split].get(direction, RowStats(finished=True))

  def pairs(self, split: str) -> np.ndarray:
    """Sentence pairs per direction; int64 [N]."""
    return np.array([self.stats(split, d).pairs for d in self.directions])

  def rows(self, split: str) -> np.ndarray:
    """Packed rows per direction; int64 [N]."""
    return np.array([self.stats(split, d).rows for d in self.directions])

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

  def read(self, split: str, direction: str, rows: np.ndarray) -> Batch:
    """Features of some rows of one direction.

    Args:
      split: a split of the store.
      direction: a direction of the store.
      rows: int [R], each below the number of rows.

    Returns:
      As `read_mixed`.
    """
    self.stats(split, direction)
    index = self.directions.index(direction)
    return self.read_mixed(split, np.full(len(rows), index), rows)

  def read_mixed(
    self, split: str, directions: np.ndarray, rows: np.ndarray
  ) -> Batch:
    """Features of rows of several directions, in the order asked for.

    Args:
      split: a split of the store.
      directions: int [R], indices into the store's directions.
      rows: int [R], each below the number of rows of its direction.

    Returns:
      The features of `RowLayout.unpack` and `direction`, int32 [R].
    """
    packed = np.empty((len(rows), self.layout.width), self.layout.dtype)
    for direction in np.unique(directions):
      at = np.flatnonzero(directions == direction)
      packed[at] = self._array(split, int(direction))[rows[at]]
    features = self.layout.unpack(packed)
    return features | {"direction": directions.astype(np.int32)}

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


def eval_batches(
  store: RowStore,
  split: str,
  batch_size: int,
  *,
  direction: str | None = None,
  host_index: int = 0,
  host_count: int = 1,
) -> Iterator[Batch]:
  """All rows of a split once, in order, direction after direction.

  Args:
    store: an open store.
    split: a split of it.
    batch_size: B, rows of a global batch.
    direction: only this one; None for all.
    host_index: this host's slice of every batch, as in `TrainBatches`.
    host_count: number of hosts; divides `batch_size`.

  Yields:
    Batches; the last is filled up with empty rows, in which all is 0 but the
    direction, so that every batch has the same shape on every host.

  Raises:
    ValueError: sizes that do not fit, or an unknown split or direction.
  """
  share = _host_slice(batch_size, host_index, host_count)
  counts = store.rows(split)
  if direction is not None:
    store.stats(split, direction)
    counts = counts * (np.array(store.directions) == direction)
  directions = np.repeat(np.arange(len(counts)), counts)
  rows = _ranks(counts)
  for start in range(0, len(rows), batch_size):
    at = np.arange(start, start + batch_size)[share]
    is_row = at < len(rows)
    at = np.minimum(at, len(rows) - 1)
    batch = store.read_mixed(split, directions[at], rows[at])
    for name, value in batch.items():
      if name != "direction":
        value[~is_row] = 0
    yield batch


def _host_slice(batch_size: int, host_index: int, host_count: int) -> slice:
  """The rows of a global batch that a host reads."""
  if batch_size <= 0 or host_count <= 0 or batch_size % host_count:
    raise ValueError(
      f"A global batch of {batch_size} rows cannot be divided over "
      f"{host_count} hosts: choose a multiple of the number of hosts."
    )
  if not 0 <= host_index < host_count:
    raise ValueError(
      f"host_index must be in 0 ... {host_count - 1}, got {host_index}."
    )
  share = batch_size // host_count
  return slice(host_index * share, (host_index + 1) * share)


# ------------------------------------------------------------------- train


def _key(*parts: Any) -> np.uint64:
  """64 bits that name the parts; the same in every process."""
  text = json.dumps(parts).encode()
  digest = hashlib.blake2b(text, digest_size=8).digest()
  return np.uint64(int.from_bytes(digest, "little"))


def _mix(x: np.ndarray) -> np.ndarray:
  """A bijection of 64-bit integers that spreads every bit (SplitMix64)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


_FEISTEL_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _permuted(
  index: np.ndarray, size: np.ndarray, key: np.ndarray
) -> np.ndarray:
  """A random permutation of 0 ... size - 1, computed point by point.

  A Feistel network permutes the numbers below the next power of two; points
  that fall outside the range are sent through again until they are inside
  (cycle walking), which leaves a permutation of the range. No table is kept,
  so ten million rows cost nothing.

  Args:
    index: int [n], below `size`.
    size: int [n].
    key: uint64 [n]; each key has its own permutation.

  Returns:
    int64 [n].
  """
  size = size.astype(np.uint64)
  # frexp's exponent is the bit length. Six bits at least: a narrower network
  # has too few round functions to reach all permutations equally often.
  bits = np.maximum(np.frexp((size - np.uint64(1)).astype(float))[1], 6)
  low_bits = (bits // 2).astype(np.uint64)
  low = (np.uint64(1) << low_bits) - np.uint64(1)
  high = (np.uint64(1) << (bits.astype(np.uint64) - low_bits)) - np.uint64(1)

  def scramble(x: np.ndarray, at: Any) -> np.ndarray:
    left, right = x >> low_bits[at], x & low[at]
    round_key = key[at]
    for number in range(_FEISTEL_ROUNDS):
      round_key = _mix(round_key + _GOLDEN)
      if number % 2:
        right = right ^ (_mix(left ^ round_key) & low[at])
      else:
        left = left ^ (_mix(right ^ round_key) & high[at])
    return (left << low_bits[at]) | right

  x = scramble(index.astype(np.uint64), slice(None))
  outside = np.flatnonzero(x >= size)
  while outside.size:
    x[outside] = scramble(x[outside], outside)
    outside = outside[x[outside] >= size[outside]]
  return x.astype(np.int64)


class TrainBatches:
  """Endless training batches, a pure function of (seed, step).

  Neither the number of hosts nor prefetching, interruptions or the parts a run
  is split into change the global batch of a step.

  Attributes:
    step: the step whose batch comes next.
    batch_size: B, rows of the global batch.
    directions: names; `direction` in a batch is an index into them.
  """

  def __init__(
    self,
    store: RowStore,
    schedule: heating.Schedule,
    batch_size: int,
    seed: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    start_step: int = 0,
    counters: Mapping[str, int] | None = None,
    split: str = "train",
  ):
    """Starts at a step.

    Args:
      store: an open store.
      schedule: the temperature at a step.
      batch_size: B, rows of the global batch.
      seed: any integer.
      host_index: this host reads rows host_index B / host_count ... of every
        global batch.
      host_count: number of hosts; divides `batch_size`.
      start_step: the first batch is this step's.
      counters: rows already drawn per direction; recomputed when left out.
      split: the split to draw from.

    Raises:
      ValueError: a direction without rows, or sizes that do not fit.
    """
    self._slice = _host_slice(batch_size, host_index, host_count)
    if start_step < 0:
      raise ValueError(f"start_step must not be negative, got {start_step}.")
    self._store, self._schedule, self._split = store, schedule, split
    self.batch_size, self._seed, self.step = batch_size, int(seed), start_step
    self.directions = store.directions
    self._pairs, self._rows = store.pairs(split), store.rows(split)
    if not self._rows.all():
      name = self.directions[int(np.argmin(self._rows))]
      raise ValueError(
        f"Direction {name!r} has no rows in split {split!r} of the store in "
        f"{store.directory}: leave its task out of the mixture."
      )
    # Planned together: enough rows to make numpy's overhead small. A chunk of
    # steps begins at a multiple of its length wherever a run begins, so that
    # rates are always computed at the same place of the same array and cannot
    # differ in the last bit. (The composite keys below need K <= 2047.)
    self._chunk = int(np.clip(8192 // batch_size, 1, 1024))
    self._keys = np.array(
      [_key("rows", self._seed, name) for name in self.directions]
    )
    self._plan_start = self._plan_end = start_step
    if counters is None:
      counters = self.position_at(start_step)
    self._counters = np.array(
      [counters[name] for name in self.directions], np.int64
    )

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Batch:
    if self.step == self._plan_end:
      self._plan()
    at = self.step - self._plan_start
    batch = self._store.read_mixed(
      self._split,
      self._plan_directions[at, self._slice],
      self._plan_rows[at, self._slice],
    )
    self._counters = self._plan_counters[at]
    self.step += 1
    return batch

  def _plan(self) -> None:
    """Chooses the rows of the steps up to the end of the current chunk."""
    chunk = self.step // self._chunk
    skip = self.step - chunk * self._chunk
    directions = self._draw(chunk)[skip:]
    steps, count = len(directions), len(self.directions)
    flat = directions.reshape(-1)
    # The j-th row drawn from a direction has its counter + j.
    order = np.argsort(flat, kind="stable")
    counter = np.empty(len(flat), np.int64)
    counter[order] = _ranks(np.bincount(flat, minlength=count))
    counter += self._counters[flat]
    epoch, index = np.divmod(counter, self._rows[flat])
    key = _mix(self._keys[flat] + _GOLDEN * epoch.astype(np.uint64))
    rows = _permuted(index, self._rows[flat], key)
    cells = flat + count * np.repeat(np.arange(steps), self.batch_size)
    drawn = np.bincount(cells, minlength=steps * count).reshape(steps, count)
    self._plan_directions = directions
    self._plan_rows = rows.reshape(directions.shape)
    self._plan_counters = self._counters + np.cumsum(drawn, axis=0)
    self._plan_start, self._plan_end = self.step, self.step + steps

  def _draw(self, chunk: int) -> np.ndarray:
    """Directions of all rows of a chunk of steps; int [K, B].

    Philox is a counter-based generator whose raw words are the same in every
    version of numpy (its floats and integers need not be); the chunk is part
    of the counter.
    """
    steps = chunk * self._chunk + np.arange(self._chunk)
    rates = heating.row_rates(
      self._pairs, self._rows, heating.temperatures(self._schedule, steps)
    )
    cumulative = np.cumsum(rates, axis=1)
    cumulative /= cumulative[:, -1:]
    # In units of 2^-53, and with the step in the upper bits, so that one
    # binary search serves all steps, exactly.
    step = np.arange(self._chunk, dtype=np.uint64)[:, None] << np.uint64(53)
    limits = step + np.floor(np.ldexp(cumulative, 53)).astype(np.uint64)
    key = np.array([_key("draw", self._seed), _key("directions")])
    counter = np.array([0, chunk, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(
      self._chunk * self.batch_size
    )
    points = step + (words.reshape(self._chunk, -1) >> np.uint64(11))
    found = np.searchsorted(limits.reshape(-1), points, side="right")
    return found - len(self.directions) * np.arange(self._chunk)[:, None]

  def position_at(self, step: int) -> dict[str, int]:
    """Rows drawn from each direction before a step, computed from nothing."""
    counts = np.zeros(len(self.directions), np.int64)
    for start in range(0, step, self._chunk):
      directions = self._draw(start // self._chunk)[: step - start]
      counts += np.bincount(directions.reshape(-1), minlength=len(counts))
    return self._by_name(counts)

  @property
  def counters(self) -> dict[str, int]:
    """Rows drawn from each direction before the current step."""
    return self._by_name(self._counters)

  @property
  def temperature(self) -> float:
    """The temperature of the current step."""
    steps = np.array([self.step])
    return float(heating.temperatures(self._schedule, steps)[0])

  def _identity(self) -> dict[str, Any]:
    """What a position is only valid with."""
    return {
      "seed": self._seed,
      "batch_size": self.batch_size,
      "lengths": self._store.lengths,
      "schedule": heating.describe(self._schedule),
    }

  def _data(self) -> dict[str, dict[str, int]]:
    """Size and checksum of every direction's rows."""
    stats = {d: self._store.stats(self._split, d) for d in self.directions}
    return {d: {"rows": s.rows, "crc32": s.crc32} for d, s in stats.items()}

  def state(self) -> dict[str, Any]:
    """The position before the next batch; plain JSON, the same on all hosts."""
    return {
      "step": self.step,
      "counters": self.counters,
      "data": self._data(),
      **self._identity(),
    }

  def restore(
    self, state: Mapping[str, Any], *, new_schedule: bool = False
  ) -> None:
    """Goes to a position that `state` returned, on any number of hosts.

    Args:
      state: of a run with the same seed, batch size, rows and schedule.
      new_schedule: go on from there even though the schedule is another; what
        follows is then not what either schedule alone would have given.

    Raises:
      ValueError: naming everything that differs.
    """
    differences = [
      f"{name} was {state.get(name)!r} and is {value!r}"
      for name, value in self._identity().items()
      if state.get(name) != value and not (name == "schedule" and new_schedule)
    ]
    differences += _row_differences(state.get("data", {}), self._data())
    if differences:
      raise ValueError(
        "The saved data position does not fit this run: "
        f"{'; '.join(differences)}. Set them back, or begin a new run."
      )
    self.step = self._plan_start = self._plan_end = int(state["step"])
    self._counters = np.array(
      [state["counters"][name] for name in self.directions], np.int64
    )

  def _by_name(self, values: np.ndarray) -> dict[str, int]:
    return dict(zip(self.directions, values.tolist(), strict=True))


def _row_differences(
  old: Mapping[str, Mapping[str, int]], new: Mapping[str, Mapping[str, int]]
) -> list[str]:
  """Directions that came, went or changed, in words."""
  differences = []
  for name in sorted(old.keys() | new.keys()):
    if name not in new:
      differences.append(f"direction {name!r} is no longer there")
    elif name not in old:
      differences.append(f"direction {name!r} is new")
    elif old[name]["rows"] != new[name]["rows"]:
      differences.append(
        f"direction {name!r} had {old[name]['rows']} rows and has "
        f"{new[name]['rows']}"
      )
    elif old[name] != new[name]:
      differences.append(f"the rows of direction {name!r} hold other text")
  return differences


class Prefetcher:
  """Reads batches ahead in a thread of its own.

  Yields (batch, state): state is the iterator's after that batch, so that a
  checkpoint never runs ahead of what was used; None for iterators without
  `state()`. Use it as a context manager, or call `close`.
  """

  def __init__(self, iterator: Iterator[Batch], depth: int = 2):
    """Starts reading.

    Args:
      iterator: batches; from now on only the thread may use it.
      depth: batches kept ready, above 0.
    """
    if depth <= 0:
      raise ValueError(f"depth must be above 0, got {depth}.")
    self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    self._stop = threading.Event()
    self._done = False
    self._thread = threading.Thread(
      target=self._read, args=(iterator,), daemon=True, name="prefetch"
    )
    self._thread.start()

  def _read(self, iterator: Iterator[Batch]) -> None:
    state = getattr(iterator, "state", lambda: None)
    try:
      for batch in iterator:
        if not self._put(("batch", (batch, state()))):
          return
      self._put(("end", StopIteration()))
    except BaseException as error:  # Raised again by the reader.
      self._put(("end", error))

  def _put(self, item: tuple[str, Any]) -> bool:
    """False when the prefetcher was closed in the meantime."""
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __iter__(self) -> "Prefetcher":
    return self

  def __next__(self) -> tuple[Batch, Any]:
    if self._done:
      raise StopIteration
    kind, value = self._queue.get()
    if kind == "end":
      self._done = True
      raise value
    return value

  def close(self) -> None:
    """Stops the thread; batches read ahead are dropped."""
    self._done = True
    self._stop.set()
    self._thread.join()

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()
