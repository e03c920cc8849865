"""Packed rows: by hand, by their definition, and as SeqIO packs them."""

import hypothesis
import numpy as np
import pytest
import seqio
import tensorflow as tf
import toy_corpus
import toy_rows
from hypothesis import strategies as st

from basemt_jax.data import packing, store_building

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def corpus():
  return toy_corpus.register("corpus")


def test_unpacked_row_by_hand():
  layout = packing.RowLayout(10, 7)
  packed = layout.pack(
    packing.Ragged.of([[7, 8, 5, 1], [8, 4, 9, 3, 1]]),
    packing.Ragged.of([[3, 9, 1], [4, 1]]),
  )
  assert packed.dtype == np.uint16
  expected = {
    "encoder_input_tokens": [7, 8, 5, 1, 8, 4, 9, 3, 1, 0],
    "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
    "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
    "decoder_target_tokens": [3, 9, 1, 4, 1, 0, 0],
    "decoder_input_tokens": [0, 3, 9, 0, 4, 0, 0],
    "decoder_segment_ids": [1, 1, 1, 2, 2, 0, 0],
    "decoder_positions": [0, 1, 2, 0, 1, 0, 0],
    "decoder_loss_weights": [1, 1, 1, 1, 1, 0, 0],
  }
  features = layout.unpack(packed)
  assert features.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_array_equal(features[name], [values], err_msg=name)
    is_weight = name == "decoder_loss_weights"
    assert features[name].dtype == (np.float32 if is_weight else np.int32)


_SEQUENCES = st.integers(1, 12).flatmap(
  lambda n: st.lists(st.integers(1, 60000), min_size=n, max_size=n)
)


@hypothesis.given(
  st.lists(st.tuples(_SEQUENCES, _SEQUENCES), min_size=1, max_size=25),
  st.integers(1, 5),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_packing_keeps_every_pair_once_and_together(pairs, open_rows):
  inputs, targets = zip(*pairs, strict=True)
  packed = toy_rows.LAYOUT.pack(
    packing.Ragged.of(inputs), packing.Ragged.of(targets), open_rows
  )
  features = toy_rows.LAYOUT.unpack(packed)
  found = []
  for row in range(len(packed)):
    source_ids = features["encoder_segment_ids"][row]
    target_ids = features["decoder_segment_ids"][row]
    segments = range(1, source_ids.max() + 1)
    assert target_ids.max() == source_ids.max() > 0
    for s in segments:
      source = features["encoder_input_tokens"][row][source_ids == s]
      target = features["decoder_target_tokens"][row][target_ids == s]
      shifted = features["decoder_input_tokens"][row][target_ids == s]
      assert shifted.tolist() == [0, *target[:-1].tolist()]
      places = features["decoder_positions"][row][target_ids == s]
      assert places.tolist() == list(range(len(target)))
      found.append((source.tolist(), target.tolist()))
    for name, ids in (("inputs", source_ids), ("targets", target_ids)):
      filled = np.count_nonzero(ids)
      assert not ids[filled:].any(), name
  assert sorted(found) == sorted(pairs)
  if open_rows == 1:
    assert found == list(pairs)


def test_more_open_rows_waste_less():
  inputs, targets = map(packing.Ragged.of, toy_rows.pairs(2000, seed=1))
  rows = [len(toy_rows.LAYOUT.pack(inputs, targets, k)) for k in (1, 4, 32)]
  assert rows[0] > rows[1] > rows[2]


def test_large_vocabularies_take_four_bytes():
  lengths = {"inputs": 8, "targets": 8}
  assert packing.RowLayout.of(lengths, 65536).dtype == "<u2"
  layout = packing.RowLayout.of(lengths, 65537)
  ids = packing.Ragged.of([[250_000, 1]])
  features = layout.unpack(layout.pack(ids, ids))
  assert features["encoder_input_tokens"][0, 0] == 250_000


def test_truncation_keeps_eos_last():
  ragged = packing.Ragged.of([[5, 6, 7, 1], [5, 6, 1], [9, 9, 9, 9, 1]])
  short, cut = ragged.truncate(3, eos=True)
  assert short.values.tolist() == [5, 6, 1, 5, 6, 1, 9, 9, 1]
  assert short.lengths.tolist() == [3, 3, 3]
  assert cut.tolist() == [True, False, True]
  without_eos, _ = ragged.truncate(3, eos=False)
  assert without_eos.values.tolist() == [5, 6, 7, 5, 6, 1, 9, 9, 9]


@pytest.mark.parametrize(
  "lengths", [{"inputs": 8}, {"inputs": 1, "targets": 8}, {}]
)
def test_unusable_lengths_are_refused(lengths):
  with pytest.raises(ValueError, match="'inputs' and 'targets' of at least 2"):
    packing.RowLayout.of(lengths, 100)


# ------------------------------------------------------------------- SeqIO


def _seqio_rows(dataset):
  """The same examples through SeqIO's own packing: the oracle."""
  converter = seqio.EncDecFeatureConverter(pack=True)
  return list(converter(dataset, toy_corpus.LENGTHS).as_numpy_iterator())


def _assert_same_row(ours, row, theirs):
  assert theirs.keys() == ours.keys() - {"direction"}
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name][row], value, err_msg=name)


def test_layout_is_that_of_seqio_on_the_same_rows(corpus, tmp_path):
  store = store_building.build_store(
    "corpus", toy_corpus.LENGTHS, tmp_path, splits=["train"]
  )
  rows = store.read("train", "en-fr", np.arange(store.rows("train")[2]))
  assert len(rows["direction"]) > 3
  for row in range(3):  # SeqIO takes more than a second for each.
    pairs = {
      name: tf.ragged.constant(
        [
          rows[tokens][row][rows[ids][row] == s].tolist()
          for s in range(1, rows[ids][row].max() + 1)
        ],
        dtype=tf.int32,
      )
      for name, tokens, ids in (
        ("inputs", "encoder_input_tokens", "encoder_segment_ids"),
        ("targets", "decoder_target_tokens", "decoder_segment_ids"),
      )
    }
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    dataset = dataset.map(
      lambda x: {k: tf.ensure_shape(v, [None]) for k, v in x.items()}
    )
    (theirs,) = _seqio_rows(dataset)
    _assert_same_row(rows, row, theirs)


def test_one_open_row_packs_as_seqio_does(corpus):
  task = seqio.TaskRegistry.get("corpus.en_fr")
  # SeqIO packs as many examples together as the longer feature has tokens.
  dataset = task.get_dataset(
    toy_corpus.LENGTHS, "train", shuffle=False, num_epochs=1
  ).take(64)
  examples = list(dataset.as_numpy_iterator())
  layout = packing.RowLayout.of(toy_corpus.LENGTHS, 259)
  ours = layout.unpack(
    layout.pack(
      packing.Ragged.of([e["inputs"].tolist() for e in examples]),
      packing.Ragged.of([e["targets"].tolist() for e in examples]),
      open_rows=1,
    )
  )
  theirs = _seqio_rows(dataset)
  assert len(theirs) == len(ours["encoder_positions"]) > 20
  for row, value in enumerate(theirs):
    _assert_same_row(ours | {"direction": None}, row, value)
