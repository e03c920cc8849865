"""Pairs of tasks: read as SeqIO reads them."""

import pathlib

import numpy as np
import pytest
import seqio
import toy_corpus

from basemt_jax.data import store_building

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def corpus():
  return toy_corpus.register("corpus")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_fast_reading_equals_seqio_reading(kind, tmp_path):
  """A preprocessor more, and the task is read through all of SeqIO."""
  pieces = (
    seqio.ByteVocabulary()
    if kind == "bytes"
    else seqio.SentencePieceVocabulary(str(toy_corpus.MODEL))
  )
  short = {"inputs": 24, "targets": 20}  # So that pairs are truncated too.
  toy_corpus.register("fast", pieces)
  toy_corpus.register("slow", pieces, extra=[toy_corpus.same])
  stores = [
    store_building.build_store(name, short, tmp_path / name)
    for name in ("fast", "slow")
  ]
  assert stores[0].stats("train", "en-de").truncated > 0
  assert toy_corpus.files(tmp_path / "fast") == toy_corpus.files(
    tmp_path / "slow"
  )
  if kind == "sentencepiece":
    copy = pathlib.Path(stores[0].vocabulary)
    assert copy.parent == tmp_path / "fast"
    assert copy.read_bytes() == pieces.sp_model


def test_truncation_is_that_of_append_eos_after_trim(corpus, tmp_path):
  short = {"inputs": 24, "targets": 20}
  store = store_building.build_store(
    "corpus", short, tmp_path, splits=["train"]
  )
  task = seqio.TaskRegistry.get("corpus.en_af")
  expected = [
    (e["inputs"].tolist(), e["targets"].tolist())
    for e in task.get_dataset(
      short, "train", shuffle=False, num_epochs=1
    ).as_numpy_iterator()
  ]
  rows = store.read("train", "en-af", np.arange(store.rows("train")[0]))
  found = [
    (
      rows["encoder_input_tokens"][r][ids == s].tolist(),
      rows["decoder_target_tokens"][r][
        rows["decoder_segment_ids"][r] == s
      ].tolist(),
    )
    for r, ids in enumerate(rows["encoder_segment_ids"])
    for s in range(1, ids.max() + 1)
  ]
  assert sorted(found) == sorted(expected)
  lengths = [
    [len(e["inputs"]) > 24 or len(e["targets"]) > 20]
    for e in task.get_dataset(
      None, "train", shuffle=False, num_epochs=1
    ).as_numpy_iterator()
  ]
  assert store.stats("train", "en-af").truncated == np.sum(lengths) > 0
