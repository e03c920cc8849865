import itertools
import json
import threading

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from basemt_jax import heating, prefetch, sampling
from basemt_jax.data import batches as batches_lib
from basemt_jax.data import packing, permutation, row_store

LAYOUT = packing.RowLayout(16, 12)
SIZES = {"en-de": 3000, "de-en": 700, "en-fr": 150, "en-af": 23}
NAMES = sorted(SIZES)


def _pairs(count, seed):
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


def _write(directory, split, name, count, **options):
  writer = row_store.RowStoreWriter(directory, split, name, LAYOUT, **options)
  inputs, targets = _pairs(count, seed=len(name) + count)
  done = writer.stats.pairs
  for start in range(done, count, 100):
    part = slice(start, start + 100)
    writer.add(
      packing.Ragged.of(inputs[part]), packing.Ragged.of(targets[part])
    )
  return writer.finish()


def _header(directory, splits):
  row_store.write_header(
    directory,
    layout=LAYOUT,
    vocabulary={"kind": "bytes", "file": None, "size": 259},
    fingerprint={},
    splits=splits,
  )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  directory = tmp_path_factory.mktemp("store")
  splits = {
    "train": {
      name: _write(directory, "train", name, n, shuffle=True, chunk_pairs=512)
      for name, n in SIZES.items()
    },
    "validation": {"en-de": _write(directory, "validation", "en-de", 40)},
  }
  _header(directory, splits)
  return row_store.RowStore(directory)


def _heated(store, batch_size=32, seed=5, **options):
  schedule = heating.linear(1, 5, 300)
  strategy = sampling.Strategy(schedule)
  return batches_lib.TrainBatches(store, strategy, batch_size, seed, **options)


def _numbers(batch):
  """The numbers of the pairs in a batch, as (row, number)."""
  tokens, places = batch["encoder_input_tokens"], batch["encoder_positions"]
  starts = (places == 0) & (batch["encoder_segment_ids"] > 0)
  row, at = np.nonzero(starts)
  return row, tokens[row, at] - 3 + 1000 * (tokens[row, at + 1] - 3)


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------ layout


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
  packed = LAYOUT.pack(
    packing.Ragged.of(inputs), packing.Ragged.of(targets), open_rows
  )
  features = LAYOUT.unpack(packed)
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
  inputs, targets = map(packing.Ragged.of, _pairs(2000, seed=1))
  rows = [len(LAYOUT.pack(inputs, targets, k)) for k in (1, 4, 32)]
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
    directory, "test", "en-de", LAYOUT, shuffle=True, chunk_pairs=100
  )
  inputs, targets = _pairs(450, seed=2)
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
  writer = row_store.RowStoreWriter(tmp_path, "test", "en-de", LAYOUT)
  assert writer.stats == stats
  assert stats.finished and stats.pairs == 450


def test_statistics_are_those_of_the_rows(store):
  assert store.directions == tuple(NAMES)
  assert store.pairs("train").tolist() == [SIZES[name] for name in NAMES]
  for name in NAMES:
    stats = store.stats("train", name)
    batch = store.read("train", name, np.arange(stats.rows))
    sources = np.count_nonzero(batch["encoder_input_tokens"])
    targets = np.count_nonzero(batch["decoder_target_tokens"])
    assert (stats.source_tokens, stats.target_tokens) == (sources, targets)
    positions = stats.rows * (LAYOUT.inputs + LAYOUT.targets)
    assert np.isclose(stats.padding, 1 - (sources + targets) / positions, 0.01)
    assert stats.truncated == 0
    _, numbers = _numbers(batch)
    assert sorted(numbers.tolist()) == list(range(SIZES[name]))


def test_pairs_of_a_chunk_are_shuffled(store):
  batch = store.read("train", "en-de", np.arange(20))
  row, numbers = _numbers(batch)
  # In the order of the corpus, the numbers of a row would be neighbours.
  spread = [np.ptp(numbers[row == r]) for r in range(20) if sum(row == r) > 1]
  assert np.median(spread) > 50


def test_long_pairs_are_cut_and_counted(tmp_path):
  writer = row_store.RowStoreWriter(tmp_path, "train", "en-de", LAYOUT)
  writer.add(
    packing.Ragged.of([[5] * 40 + [1], [5, 1], [6, 1]]),
    packing.Ragged.of([[7, 1], [7] * 12 + [1], [7, 1]]),
  )
  stats = writer.finish()
  assert (stats.pairs, stats.truncated) == (3, 2)
  _header(tmp_path, {"train": {"en-de": stats}})
  batch = row_store.RowStore(tmp_path).read("train", "en-de", np.arange(1))
  assert batch["encoder_input_tokens"][0].tolist() == [5] * 15 + [1]


def test_pair_without_tokens_is_refused(tmp_path):
  writer = row_store.RowStoreWriter(tmp_path, "train", "en-de", LAYOUT)
  with pytest.raises(ValueError, match="train/en-de: pair 1 has a side"):
    writer.add(packing.Ragged.of([[1], []]), packing.Ragged.of([[1], [1]]))


# -------------------------------------------------------------------- read


def test_missing_store_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"no row store in .*store.json"):
    row_store.RowStore(tmp_path)


def test_unfinished_store_is_refused(tmp_path):
  _header(tmp_path, None)
  with pytest.raises(ValueError, match="not finished"):
    row_store.RowStore(tmp_path)


def test_store_of_another_version_is_refused(tmp_path):
  _header(tmp_path, {})
  header = json.loads((tmp_path / "store.json").read_text())
  (tmp_path / "store.json").write_text(json.dumps(header | {"version": 99}))
  with pytest.raises(ValueError, match=r"version 99.*reads.*version 1"):
    row_store.RowStore(tmp_path)


def test_shortened_rows_are_noticed(tmp_path):
  stats = _write_texts(tmp_path)
  _header(tmp_path, {"test": {"en-de": stats}})
  with open(tmp_path / "test/en-de.rows", "r+b") as file:
    file.truncate(100)
  with pytest.raises(ValueError, match=r"en-de.rows has 100 bytes"):
    row_store.RowStore(tmp_path)


def test_texts_come_back_in_order(tmp_path):
  stats = _write_texts(tmp_path)
  _header(tmp_path, {"test": {"en-de": stats}})
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


@pytest.mark.parametrize("host_count", [1, 2])
def test_eval_batches_hold_every_row_once(store, host_count):
  hosts = [
    list(batches_lib.eval_batches(store, "train", 64, host_rows=rows))
    for rows in np.split(np.arange(64), host_count)
  ]
  batches = [
    {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    for parts in zip(*hosts, strict=True)
  ]
  assert {len(b["direction"]) for b in batches} == {64}
  whole = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  count = store.rows("train").sum()
  assert not whole["decoder_loss_weights"][count:].any()
  assert not whole["encoder_segment_ids"][count:].any()
  for index, name in enumerate(NAMES):
    rows = whole["direction"][:count] == index
    part = {k: v[:count][rows] for k, v in whole.items()}
    expected = store.read("train", name, np.arange(rows.sum()))
    _assert_equal(part, expected)


# ------------------------------------------------------------- permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_permuted_is_a_permutation(size):
  for key in (1, 2**63 + 11):
    keys = np.full(size, key, np.uint64)
    out = permutation.permuted(np.arange(size), np.full(size, size), keys)
    assert sorted(out.tolist()) == list(range(size))


def test_permutations_differ_and_are_uniform():
  # Where element 0 of 6 goes, and which pair the first two make, over keys.
  keys = permutation.mix(np.arange(1, 30_001).astype(np.uint64))
  size = np.full(len(keys), 6)
  first, second = (
    permutation.permuted(np.full(len(keys), i), size, keys) for i in (0, 1)
  )
  counts = np.bincount(first, minlength=6)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  pairs = np.bincount(first * 6 + second, minlength=36).reshape(6, 6)
  assert not np.diag(pairs).any()
  off_diagonal = pairs[~np.eye(6, dtype=bool)]
  assert scipy.stats.chisquare(off_diagonal).pvalue > 1e-3


# ------------------------------------------------------------------- train


@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_hosts_read_slices_of_the_same_global_batch(store, host_count):
  whole = _heated(store)
  hosts = [
    _heated(store, host_rows=rows)
    for rows in np.split(np.arange(32), host_count)
  ]
  for _ in range(60):
    parts = [next(host) for host in hosts]
    joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    _assert_equal(joined, next(whole))
  assert all(host.state() == whole.state() for host in hosts)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 300, 9000])
def test_batch_depends_on_nothing_but_seed_and_step(store, batch_size):
  reference = _heated(store, batch_size)
  batches = [next(reference) for _ in range(12)]
  for start in (0, 1, 5, 11):
    late = _heated(store, batch_size, start_step=start)
    for step in range(start, 12):
      _assert_equal(next(late), batches[step])
  assert late.state() == reference.state()


def test_run_in_parts_equals_run_in_one(store):
  reference = _heated(store)
  batches = [next(reference) for _ in range(600)]
  state, step = _heated(store).state(), 0
  for length in (1, 254, 3, 100, 242):
    # Every part on another number of hosts, the state through a file.
    hosts = 2 if length % 2 else 4
    part = [_heated(store, host_rows=r) for r in np.split(np.arange(32), hosts)]
    for host in part:
      host.restore(json.loads(json.dumps(state)))
    for _ in range(length):
      pieces = [next(host) for host in part]
      joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
      _assert_equal(joined, batches[step])
      step += 1
    state = part[-1].state()
  assert state == reference.state()


def test_counters_are_the_position(store):
  batches = _heated(store)
  drawn = np.zeros(len(NAMES), int)
  for step in range(700):
    if step in (0, 1, 255, 256, 257, 699):
      assert batches.counters == _heated(store, start_step=step).counters
      assert batches.counters == dict(zip(NAMES, drawn.tolist(), strict=True))
    drawn += np.bincount(next(batches)["direction"], minlength=len(NAMES))


def test_every_pair_is_seen_once_in_every_epoch(store):
  batches = _heated(store)
  rows = store.rows("train")
  seen = [[] for _ in NAMES]
  for _ in range(250):
    batch = next(batches)
    row, numbers = _numbers(batch)
    for r, direction in enumerate(batch["direction"]):
      seen[direction].append(numbers[row == r].tolist())
  for index, name in enumerate(NAMES):
    epochs = len(seen[index]) // rows[index]
    assert epochs >= 1, name
    orders = set()
    for epoch in range(epochs):
      part = seen[index][epoch * rows[index] : (epoch + 1) * rows[index]]
      order = tuple(itertools.chain.from_iterable(part))
      assert sorted(order) == list(range(SIZES[name]))
      orders.add(order)
    assert len(orders) == epochs, name  # Another order in every epoch.


def test_shares_follow_the_schedule(store):
  """Rows against their rates (chi-square), and pairs against p_i."""
  batch_size, window, windows = 32, 100, 5
  batches = _heated(store, batch_size)
  pairs, rows = store.pairs("train"), store.rows("train")
  schedule = heating.linear(1, 5, 300)
  statistic, shares = 0.0, []
  for w in range(windows):
    drawn, drawn_pairs = np.zeros(len(NAMES)), np.zeros(len(NAMES))
    for _ in range(window):
      batch = next(batches)
      drawn += np.bincount(batch["direction"], minlength=len(NAMES))
      row, _ = _numbers(batch)
      directions = batch["direction"][row]
      drawn_pairs += np.bincount(directions, minlength=len(NAMES))
    steps = np.arange(w * window, (w + 1) * window)
    # Independent of the module: rates from their definition, step by step.
    expected, expected_pairs = np.zeros(len(NAMES)), np.zeros(len(NAMES))
    for step in steps:
      p = pairs ** (1 / schedule(step))
      p = p / p.sum()
      q = p / (pairs / rows)
      q = q / q.sum()
      expected += batch_size * q
      expected_pairs += batch_size * q * (pairs / rows)
    statistic += ((drawn - expected) ** 2 / expected).sum()
    shares.append(drawn_pairs / drawn_pairs.sum())
    np.testing.assert_allclose(
      shares[-1], expected_pairs / expected_pairs.sum(), atol=0.03
    )
  freedom = windows * (len(NAMES) - 1)
  assert scipy.stats.chi2.sf(statistic, freedom) > 1e-3
  # Heating is visible: the smallest direction's share is multiplied.
  smallest = NAMES.index("en-af")
  assert shares[-1][smallest] > 4 * shares[0][smallest]


def test_seeds_and_names_give_other_batches(store):
  first = next(_heated(store, seed=5))
  other = next(_heated(store, seed=6))
  assert not np.array_equal(first["direction"], other["direction"])
  assert not np.array_equal(
    first["encoder_input_tokens"], other["encoder_input_tokens"]
  )


def test_rows_stay_in_random_order(store):
  # Groups of tokens are made of consecutive rows and need many languages.
  strategy = sampling.Strategy(heating.constant(100))
  batch = next(batches_lib.TrainBatches(store, strategy, 512, 0))
  neighbours = np.mean(batch["direction"][1:] == batch["direction"][:-1])
  assert 0.15 < neighbours < 0.35


def test_golden_draws(store):
  """The stream of directions and rows is part of the contract.

  Update it only with a new format version of the position or store, and say
  so in the change log: runs begun before cannot be continued exactly.
  """
  batches = _heated(store)
  batch = next(batches)
  assert batch["direction"][:12].tolist() == GOLDEN_DIRECTIONS
  assert batches._plan_rows[0, :6].tolist() == GOLDEN_ROWS
  batches.seek(1000)
  assert batches.counters == GOLDEN_COUNTERS


GOLDEN_DIRECTIONS = [3, 0, 2, 1, 2, 0, 2, 2, 3, 2, 2, 2]
GOLDEN_ROWS = [110, 72, 2023, 6, 1393, 261]
GOLDEN_COUNTERS = {"de-en": 8551, "en-af": 4311, "en-de": 12830, "en-fr": 6308}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"seed": 6}, "seed was 6 and is 5"),
    ({"batch_size": 64}, "batch_size was 64 and is 32"),
    ({"schedule": "constant(1.0)"}, r"schedule was 'constant\(1.0\)' and is"),
    ({"lengths": {"inputs": 1, "targets": 2}}, "lengths was"),
    ({"data": {}}, "direction 'en-af' is new"),
  ],
)
def test_position_of_another_run_is_refused(store, change, message):
  batches = _heated(store)
  state = batches.state()
  with pytest.raises(ValueError, match=message):
    batches.restore(state | change)
  data = {k: dict(v) for k, v in state["data"].items()}
  data["en-fr"]["rows"] += 1
  data["en-de"]["crc32"] += 1
  data["en-xx"] = {"rows": 1, "crc32": 1}
  with pytest.raises(ValueError) as error:
    batches.restore(state | {"data": data, "seed": 1})
  for part in (
    "'en-fr' had",
    "'en-de' hold other text",
    "'en-xx' is no longer there",
    "seed was 1",
  ):
    assert part in str(error.value)


STRATEGIES = {
  "joining": sampling.Strategy(
    heating.linear(1, 5, 300), {"af": 37, "de-en": 300}
  ),
  "capped": sampling.Strategy(heating.linear(1, 5, 300), {}, 11, 600),
  "unimax": sampling.unimax(600, 20),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_the_contract(store, name):
  """Draws as expected, resumed anywhere, and counters from nothing."""
  steps, batch_size = 600, 32

  def start(**options):
    return batches_lib.TrainBatches(
      store, STRATEGIES[name], batch_size, 5, **options
    )

  batches = start()
  drawn = np.stack(
    [
      np.bincount(next(batches)["direction"], minlength=len(NAMES))
      for _ in range(steps)
    ]
  )
  starts = batches.plan.starts
  for step, counts in enumerate(drawn):
    assert not counts[step < starts].any()
  windows = drawn.reshape(6, -1, len(NAMES)).sum(axis=1)
  total = batches.plan.expected_rows(np.arange(0, steps + 1, 100))
  expected = np.diff(total, axis=0)
  there = expected > 0
  statistic = ((windows - expected)[there] ** 2 / expected[there]).sum()
  assert scipy.stats.chi2.sf(statistic, there.sum() - 6) > 1e-3
  # Exactly, from any step.
  for step in (36, 37, 299, 301):
    resumed = start(start_step=step)
    assert resumed.counters == dict(
      zip(NAMES, drawn[:step].sum(axis=0).tolist(), strict=True)
    )
    batches.seek(step)
    again = start()
    again.restore(batches.state())
    for _ in range(3):
      batch = next(resumed)
      _assert_equal(batch, next(again))
      found = np.bincount(batch["direction"], minlength=len(NAMES))
      np.testing.assert_array_equal(found, drawn[resumed.step - 1])
  with pytest.raises(ValueError, match=r"schedule was 'linear.*' and is"):
    start().restore(_heated(store).state())


def test_impossible_batches_are_refused(store, tmp_path):
  with pytest.raises(ValueError, match="must not be negative, got -1"):
    _heated(store, start_step=-1)
  splits = {
    split: {name: _write(tmp_path, split, name, 5)}
    for split, name in (("train", "en-de"), ("validation", "de-en"))
  }
  _header(tmp_path, splits)
  with pytest.raises(ValueError, match="'de-en' has no rows in split"):
    _heated(row_store.RowStore(tmp_path))


# ---------------------------------------------------------------- prefetch


def test_prefetching_changes_nothing(store):
  plain = _heated(store)
  with prefetch.Prefetcher(_heated(store), depth=3) as prefetched:
    for _ in range(50):
      batch, state = next(prefetched)
      _assert_equal(batch, next(plain))
      assert state == plain.state()


def test_prefetcher_ends_and_raises_as_its_iterator():
  def broken():
    yield {"x": np.zeros(1)}
    raise RuntimeError("disk on fire")

  with prefetch.Prefetcher(broken()) as ahead:
    batch, state = next(ahead)
    assert batch["x"].shape == (1,) and state is None
    with pytest.raises(RuntimeError, match="disk on fire"):
      next(ahead)
    with pytest.raises(StopIteration):
      next(ahead)
  assert len(list(prefetch.Prefetcher(iter([{}, {}, {}])))) == 3


def test_closed_prefetcher_leaves_no_thread():
  before = threading.active_count()
  for _ in range(3):
    ahead = prefetch.Prefetcher(({} for _ in itertools.count()), depth=1)
    next(ahead)
    ahead.close()
    ahead.close()
    with pytest.raises(StopIteration):
      next(ahead)
  assert threading.active_count() == before


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
