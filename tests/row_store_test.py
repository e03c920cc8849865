"""The row store: what is written is read, interrupted or not."""

import itertools
import json

import numpy as np
import pytest
import toy_rows

from basemt_jax.data import packing, row_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return toy_rows.store(tmp_path_factory.mktemp("store"))


# ------------------------------------------------------------------- write


def _files(directory):
  return {
    p.relative_to(directory): p.read_bytes()
    for p in sorted(directory.rglob("*"))
    if p.is_file()
  }


def _write_texts(directory, interrupt_at=None):
  """450 pairs with texts, in chunks of 100; raises before pair interrupt_at."""
  writer = row_store.RowStoreWriter(
    directory, "test", "en-de", toy_rows.LAYOUT, shuffle=True, chunk_pairs=100
  )
  inputs, targets = toy_rows.pairs(450, seed=2)
  for i in range(writer.stats.pairs, 450):
    if i == interrupt_at:
      raise KeyboardInterrupt
    writer.add(
      packing.Ragged.of([inputs[i]]),
      packing.Ragged.of([targets[i]]),
      [{"source": f"s\u2028{i}", "target": "t", "tagged_source": f"<2de> {i}"}],
    )
  return writer.finish()


def _nothing(test):
  del test


def _garbage_after(test):
  for name in ("en-de.rows", "en-de.jsonl"):
    with open(test / name, "ab") as file:
      file.write(b"\x01half a row")


def _half_record(test):
  (test / "en-de.json").write_text('{"pairs": 1')


def _damaged_rows(test):
  content = bytearray((test / "en-de.rows").read_bytes())
  content[5] ^= 1
  (test / "en-de.rows").write_bytes(content)


def _rows_lost(test):
  with open(test / "en-de.rows", "r+b") as file:
    file.truncate(10)


@pytest.mark.parametrize(
  "damage", [_nothing, _garbage_after, _half_record, _damaged_rows, _rows_lost]
)
@pytest.mark.parametrize("interrupt_at", [50, 250])
def test_interrupted_build_gives_the_same_bytes(tmp_path, damage, interrupt_at):
  _write_texts(tmp_path / "whole")
  parts = tmp_path / "parts"
  with pytest.raises(KeyboardInterrupt):
    _write_texts(parts, interrupt_at)
  if interrupt_at > 100:
    damage(parts / "test")
  _write_texts(parts)
  assert _files(parts) == _files(tmp_path / "whole")


@pytest.mark.parametrize("fails", range(1, 16, 2))
def test_interruption_in_the_middle_of_any_write(tmp_path, monkeypatch, fails):
  _write_texts(tmp_path / "whole")
  calls = itertools.count(1)
  whole_append = row_store._append

  def half_append(path, data):
    if next(calls) == fails:
      whole_append(path, data[: len(data) // 2])
      raise KeyboardInterrupt
    whole_append(path, data)

  monkeypatch.setattr(row_store, "_append", half_append)
  parts = tmp_path / "parts"
  for _ in range(2):
    try:
      _write_texts(parts)
      break
    except KeyboardInterrupt:
      pass
  assert _files(parts) == _files(tmp_path / "whole")


def test_finished_direction_is_left_alone(tmp_path):
  stats = _write_texts(tmp_path)
  writer = row_store.RowStoreWriter(tmp_path, "test", "en-de", toy_rows.LAYOUT)
  assert writer.stats == stats
  assert stats.finished and stats.pairs == 450


def test_statistics_are_those_of_the_rows(store):
  assert store.directions == tuple(toy_rows.NAMES)
  assert store.pairs("train").tolist() == [
    toy_rows.SIZES[name] for name in toy_rows.NAMES
  ]
  for name in toy_rows.NAMES:
    stats = store.stats("train", name)
    batch = store.read("train", name, np.arange(stats.rows))
    sources = np.count_nonzero(batch["encoder_input_tokens"])
    targets = np.count_nonzero(batch["decoder_target_tokens"])
    assert (stats.source_tokens, stats.target_tokens) == (sources, targets)
    positions = stats.rows * (toy_rows.LAYOUT.inputs + toy_rows.LAYOUT.targets)
    assert np.isclose(stats.padding, 1 - (sources + targets) / positions, 0.01)
    assert stats.truncated == 0
    _, numbers = toy_rows.numbers(batch)
    assert sorted(numbers.tolist()) == list(range(toy_rows.SIZES[name]))


def test_pairs_of_a_chunk_are_shuffled(store):
  batch = store.read("train", "en-de", np.arange(20))
  row, numbers = toy_rows.numbers(batch)
  # In the order of the corpus, the numbers of a row would be neighbours.
  spread = [np.ptp(numbers[row == r]) for r in range(20) if sum(row == r) > 1]
  assert np.median(spread) > 50


def test_long_pairs_are_cut_and_counted(tmp_path):
  writer = row_store.RowStoreWriter(tmp_path, "train", "en-de", toy_rows.LAYOUT)
  writer.add(
    packing.Ragged.of([[5] * 40 + [1], [5, 1], [6, 1]]),
    packing.Ragged.of([[7, 1], [7] * 12 + [1], [7, 1]]),
  )
  stats = writer.finish()
  assert (stats.pairs, stats.truncated) == (3, 2)
  toy_rows.write_header(tmp_path, {"train": {"en-de": stats}})
  batch = row_store.RowStore(tmp_path).read("train", "en-de", np.arange(1))
  assert batch["encoder_input_tokens"][0].tolist() == [5] * 15 + [1]


def test_pair_without_tokens_is_refused(tmp_path):
  writer = row_store.RowStoreWriter(tmp_path, "train", "en-de", toy_rows.LAYOUT)
  with pytest.raises(ValueError, match="train/en-de: pair 1 has a side"):
    writer.add(packing.Ragged.of([[1], []]), packing.Ragged.of([[1], [1]]))


def long_pairs_store(directory, long_pairs, limit=8, **options):
  """A store of pairs of 3 to 10 tokens, in rows of `limit` tokens."""
  layout = packing.RowLayout(limit, limit)
  writer = row_store.RowStoreWriter(
    directory, "train", "de-en", layout, long_pairs=long_pairs, **options
  )
  lengths = [2 + i % 8 for i in range(40)]
  sides = [
    packing.Ragged.of([[10 + i] * n + [1] for i, n in enumerate(order)])
    for order in (lengths, lengths[::-1])
  ]
  start = writer.stats.read
  writer.add(*(side.split(start)[1] for side in sides))
  longest = map(max, zip(*(side.lengths for side in sides), strict=True))
  fits = [i for i, length in enumerate(longest) if length <= limit]
  return writer, fits


def test_long_pairs_are_cut_dropped_or_refused(tmp_path):
  writer, fits = long_pairs_store(tmp_path / "cut", "cut")
  stats = writer.finish()
  assert (stats.pairs, stats.dropped) == (40, 0)
  assert stats.truncated == 40 - len(fits) > 0
  writer, fits = long_pairs_store(tmp_path / "drop", "drop", chunk_pairs=16)
  stats = writer.finish()
  assert (stats.pairs, stats.truncated) == (len(fits), 0)
  assert stats.read == 40
  rows = np.fromfile(tmp_path / "drop/train/de-en.rows", "<u2").reshape(-1, 32)
  assert set(rows[:, :16].ravel()) - {0, 1} == {10 + i for i in fits}
  writer, _ = long_pairs_store(tmp_path / "refuse", "refuse")
  with pytest.raises(ValueError, match=r"de-en: \d+ of 40 pairs .* LONG_PAIRS"):
    writer.finish()
  writer, _ = long_pairs_store(tmp_path / "none", "drop", limit=2)
  with pytest.raises(ValueError, match="40 of 40 pairs"):
    writer.finish()


def test_dropping_goes_on_where_it_was_interrupted(tmp_path):
  whole, _ = long_pairs_store(tmp_path / "a", "drop", chunk_pairs=16)
  stats = whole.finish()
  # Two chunks are on the disk; the rest is lost with the writer.
  long_pairs_store(tmp_path / "b", "drop", chunk_pairs=16)
  again, _ = long_pairs_store(tmp_path / "b", "drop", chunk_pairs=16)
  assert again.finish() == stats
  a, b = (tmp_path / name / "train/de-en.rows" for name in "ab")
  assert a.read_bytes() == b.read_bytes()


# -------------------------------------------------------------------- read


def test_missing_store_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"no row store in .*store.json"):
    row_store.RowStore(tmp_path)


def test_unfinished_store_is_refused(tmp_path):
  toy_rows.write_header(tmp_path, None)
  with pytest.raises(ValueError, match="not finished"):
    row_store.RowStore(tmp_path)


def test_store_of_another_version_is_refused(tmp_path):
  toy_rows.write_header(tmp_path, {})
  header = json.loads((tmp_path / "store.json").read_text())
  (tmp_path / "store.json").write_text(json.dumps(header | {"version": 99}))
  with pytest.raises(ValueError, match=r"version 99.*reads.*version 1"):
    row_store.RowStore(tmp_path)


def test_shortened_rows_are_noticed(tmp_path):
  stats = _write_texts(tmp_path)
  toy_rows.write_header(tmp_path, {"test": {"en-de": stats}})
  with open(tmp_path / "test/en-de.rows", "r+b") as file:
    file.truncate(100)
  with pytest.raises(ValueError, match=r"en-de.rows has 100 bytes"):
    row_store.RowStore(tmp_path)


def test_texts_come_back_in_order(tmp_path):
  stats = _write_texts(tmp_path)
  toy_rows.write_header(tmp_path, {"test": {"en-de": stats}})
  texts = row_store.RowStore(tmp_path).texts("test", "en-de")
  assert [t["source"] for t in texts] == [f"s\u2028{i}" for i in range(450)]
  assert texts[7]["tagged_source"] == "<2de> 7"


def test_unknown_split_and_direction_are_named(store):
  with pytest.raises(ValueError, match=r"no split 'dev', it has train"):
    store.rows("dev")
  with pytest.raises(ValueError, match=r"no direction 'en-xx', it has de-en"):
    store.stats("train", "en-xx")
  assert store.stats("validation", "en-af").pairs == 0
  assert store.texts("train", "en-de") == []
  assert store.vocabulary == "bytes"
