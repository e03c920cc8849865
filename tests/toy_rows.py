"""Row stores of pairs that tell their numbers, and batches of them."""

import numpy as np

from basemt_jax import heating, sampling
from basemt_jax.data import batches as batches_lib
from basemt_jax.data import packing, row_store

LAYOUT = packing.RowLayout(16, 12)
SIZES = {"en-de": 3000, "de-en": 700, "en-fr": 150, "en-af": 23}
NAMES = sorted(SIZES)


def pairs(count, seed):
  """Pairs of which token 2 and 3 of both sides tell the number.

  Lengths look random but are arithmetic: numpy's generators may change.
  """
  sides = []
  for longest in (LAYOUT.inputs, LAYOUT.targets):
    noise = (np.arange(count) + seed * longest) * 2654435761 % 2**32 // 65536
    lengths = 3 + noise % (longest - 2)
    sides.append(
      [
        [3 + i % 1000, 3 + i // 1000, *range(3, n), 1]
        for i, n in enumerate(lengths.tolist())
      ]
    )
  return sides


def write(directory, split, name, count, **options):
  writer = row_store.RowStoreWriter(directory, split, name, LAYOUT, **options)
  inputs, targets = pairs(count, seed=len(name) + count)
  done = writer.stats.pairs
  for start in range(done, count, 100):
    part = slice(start, start + 100)
    writer.add(
      packing.Ragged.of(inputs[part]), packing.Ragged.of(targets[part])
    )
  return writer.finish()


def write_header(directory, splits):
  row_store.write_header(
    directory,
    layout=LAYOUT,
    vocabulary={"kind": "bytes", "file": None, "size": 259},
    fingerprint={},
    splits=splits,
  )


def store(directory):
  """Two splits, of which the first is shuffled."""
  splits = {
    "train": {
      name: write(directory, "train", name, n, shuffle=True, chunk_pairs=512)
      for name, n in SIZES.items()
    },
    "validation": {"en-de": write(directory, "validation", "en-de", 40)},
  }
  write_header(directory, splits)
  return row_store.RowStore(directory)


def heated(store, batch_size=32, seed=5, **options):
  schedule = heating.linear(1, 5, 300)
  strategy = sampling.Strategy(schedule)
  return batches_lib.TrainBatches(store, strategy, batch_size, seed, **options)


def numbers(batch):
  """The numbers of the pairs in a batch, as (row, number)."""
  tokens, places = batch["encoder_input_tokens"], batch["encoder_positions"]
  starts = (places == 0) & (batch["encoder_segment_ids"] > 0)
  row, at = np.nonzero(starts)
  return row, tokens[row, at] - 3 + 1000 * (tokens[row, at + 1] - 3)


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
