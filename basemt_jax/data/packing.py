"""Sentence pairs packed into rows of fixed length.

Axis legend: L length (Li of inputs, Lt of targets), R rows.

Several short pairs share a row, told apart by segment ids, as SeqIO's packing
does; both sides of a pair lie in the same row.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

EOS_ID = 1
# What becomes of training pairs of which a side is longer than its feature
# length: cut to it, left out, or an error that tells how many there are.
LongPairs = Literal["cut", "drop", "refuse"]

Batch = dict[str, np.ndarray]


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
    """Lays lists of ids end to end."""
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
    index = np.repeat(starts[order], lengths) + ranks(lengths)
    return Ragged(self.values[index], lengths)

  def truncate(self, limit: int, eos: bool) -> tuple["Ragged", np.ndarray]:
    """Cuts every sequence to `limit` tokens, and tells which were cut, bool.

    With `eos` the last token of one that is cut becomes EOS, as
    `seqio.preprocessors.append_eos_after_trim` has it.
    """
    cut = self.lengths > limit
    if not cut.any():
      return self, cut
    lengths = np.minimum(self.lengths, limit)
    starts = np.cumsum(self.lengths) - self.lengths
    values = self.values[np.repeat(starts, lengths) + ranks(lengths)]
    if eos:
      values[(np.cumsum(lengths) - 1)[cut]] = EOS_ID
    return Ragged(values, lengths), cut


def ranks(lengths: np.ndarray) -> np.ndarray:
  """Numbers 0, 1, ... within each of the runs with these lengths."""
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
          "feature lengths need 'inputs' and 'targets' of at least 2 tokens, "
          f"got {dict(lengths)}"
        )
    if max(lengths["inputs"], lengths["targets"]) > np.iinfo(np.uint16).max:
      raise ValueError(f"feature lengths must be below 65,536, got {lengths}")
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

    Sequences have at most Li and Lt tokens. `open_rows` may still take a pair:
    1 fills one row after the other, as SeqIO does; more waste less.

    Returns:
      [R, width] in `dtype`; within a row the pairs keep their order.
    """
    row = first_fit(
      inputs.lengths, targets.lengths, self.inputs, self.targets, open_rows
    )
    order = np.argsort(row, kind="stable")
    row = row[order]
    count = int(row[-1]) + 1 if row.size else 0
    segment = ranks(np.bincount(row, minlength=count)) + 1
    packed = np.zeros((count, self.width), self.dtype)
    tokens = self.inputs + self.targets
    for side, offset in ((inputs, 0), (targets, self.inputs)):
      side = side.take(order)
      # A token's place in its row: its rank among all tokens of the row.
      place = ranks(np.bincount(row, side.lengths, count).astype(np.int64))
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
  """Positions 0, 1, ... in each segment, 0 on padding; int32 [R, L]."""
  index = np.arange(segments.shape[1], dtype=np.int32)
  starts = np.where(follows, np.int32(0), index)
  np.maximum.accumulate(starts, axis=1, out=starts)
  return (index - starts) * (segments > 0)


def first_fit(
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
