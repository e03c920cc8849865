"""Batches: every row once, from any step, whatever the hosts."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
import toy_rows

from basemt_jax import heating, sampling
from basemt_jax.data import batches as batches_lib
from basemt_jax.data import row_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return toy_rows.store(tmp_path_factory.mktemp("store"))


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
  for index, name in enumerate(toy_rows.NAMES):
    rows = whole["direction"][:count] == index
    part = {k: v[:count][rows] for k, v in whole.items()}
    expected = store.read("train", name, np.arange(rows.sum()))
    toy_rows.assert_equal(part, expected)


# ------------------------------------------------------------------- train


@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_hosts_read_slices_of_the_same_global_batch(store, host_count):
  whole = toy_rows.heated(store)
  hosts = [
    toy_rows.heated(store, host_rows=rows)
    for rows in np.split(np.arange(32), host_count)
  ]
  for _ in range(60):
    parts = [next(host) for host in hosts]
    joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    toy_rows.assert_equal(joined, next(whole))
  assert all(host.state() == whole.state() for host in hosts)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 300, 9000])
def test_batch_depends_on_nothing_but_seed_and_step(store, batch_size):
  reference = toy_rows.heated(store, batch_size)
  batches = [next(reference) for _ in range(12)]
  for start in (0, 1, 5, 11):
    late = toy_rows.heated(store, batch_size, start_step=start)
    for step in range(start, 12):
      toy_rows.assert_equal(next(late), batches[step])
  assert late.state() == reference.state()


def test_run_in_parts_equals_run_in_one(store):
  reference = toy_rows.heated(store)
  batches = [next(reference) for _ in range(600)]
  state, step = toy_rows.heated(store).state(), 0
  for length in (1, 254, 3, 100, 242):
    # Every part on another number of hosts, the state through a file.
    hosts = 2 if length % 2 else 4
    part = [
      toy_rows.heated(store, host_rows=r)
      for r in np.split(np.arange(32), hosts)
    ]
    for host in part:
      host.restore(json.loads(json.dumps(state)))
    for _ in range(length):
      pieces = [next(host) for host in part]
      joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
      toy_rows.assert_equal(joined, batches[step])
      step += 1
    state = part[-1].state()
  assert state == reference.state()


def test_counters_are_the_position(store):
  batches = toy_rows.heated(store)
  drawn = np.zeros(len(toy_rows.NAMES), int)
  for step in range(700):
    if step in (0, 1, 255, 256, 257, 699):
      assert (
        batches.counters == toy_rows.heated(store, start_step=step).counters
      )
      assert batches.counters == dict(
        zip(toy_rows.NAMES, drawn.tolist(), strict=True)
      )
    drawn += np.bincount(
      next(batches)["direction"], minlength=len(toy_rows.NAMES)
    )


def test_every_pair_is_seen_once_in_every_epoch(store):
  batches = toy_rows.heated(store)
  rows = store.rows("train")
  seen = [[] for _ in toy_rows.NAMES]
  for _ in range(250):
    batch = next(batches)
    row, numbers = toy_rows.numbers(batch)
    for r, direction in enumerate(batch["direction"]):
      seen[direction].append(numbers[row == r].tolist())
  for index, name in enumerate(toy_rows.NAMES):
    epochs = len(seen[index]) // rows[index]
    assert epochs >= 1, name
    orders = set()
    for epoch in range(epochs):
      part = seen[index][epoch * rows[index] : (epoch + 1) * rows[index]]
      order = tuple(itertools.chain.from_iterable(part))
      assert sorted(order) == list(range(toy_rows.SIZES[name]))
      orders.add(order)
    assert len(orders) == epochs, name  # Another order in every epoch.


def test_shares_follow_the_schedule(store):
  """Rows against their rates (chi-square), and pairs against p_i."""
  batch_size, window, windows = 32, 100, 5
  batches = toy_rows.heated(store, batch_size)
  pairs, rows = store.pairs("train"), store.rows("train")
  schedule = heating.linear(1, 5, 300)
  statistic, shares = 0.0, []
  for w in range(windows):
    drawn, drawn_pairs = (
      np.zeros(len(toy_rows.NAMES)),
      np.zeros(len(toy_rows.NAMES)),
    )
    for _ in range(window):
      batch = next(batches)
      drawn += np.bincount(batch["direction"], minlength=len(toy_rows.NAMES))
      row, _ = toy_rows.numbers(batch)
      directions = batch["direction"][row]
      drawn_pairs += np.bincount(directions, minlength=len(toy_rows.NAMES))
    steps = np.arange(w * window, (w + 1) * window)
    # Independent of the module: rates from their definition, step by step.
    expected, expected_pairs = (
      np.zeros(len(toy_rows.NAMES)),
      np.zeros(len(toy_rows.NAMES)),
    )
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
  freedom = windows * (len(toy_rows.NAMES) - 1)
  assert scipy.stats.chi2.sf(statistic, freedom) > 1e-3
  # Heating is visible: the smallest direction's share is multiplied.
  smallest = toy_rows.NAMES.index("en-af")
  assert shares[-1][smallest] > 4 * shares[0][smallest]


def test_seeds_and_names_give_other_batches(store):
  first = next(toy_rows.heated(store, seed=5))
  other = next(toy_rows.heated(store, seed=6))
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
  batches = toy_rows.heated(store)
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
  batches = toy_rows.heated(store)
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
      np.bincount(next(batches)["direction"], minlength=len(toy_rows.NAMES))
      for _ in range(steps)
    ]
  )
  starts = batches.plan.starts
  for step, counts in enumerate(drawn):
    assert not counts[step < starts].any()
  windows = drawn.reshape(6, -1, len(toy_rows.NAMES)).sum(axis=1)
  total = batches.plan.expected_rows(np.arange(0, steps + 1, 100))
  expected = np.diff(total, axis=0)
  there = expected > 0
  statistic = ((windows - expected)[there] ** 2 / expected[there]).sum()
  assert scipy.stats.chi2.sf(statistic, there.sum() - 6) > 1e-3
  # Exactly, from any step.
  for step in (36, 37, 299, 301):
    resumed = start(start_step=step)
    assert resumed.counters == dict(
      zip(toy_rows.NAMES, drawn[:step].sum(axis=0).tolist(), strict=True)
    )
    batches.seek(step)
    again = start()
    again.restore(batches.state())
    for _ in range(3):
      batch = next(resumed)
      toy_rows.assert_equal(batch, next(again))
      found = np.bincount(batch["direction"], minlength=len(toy_rows.NAMES))
      np.testing.assert_array_equal(found, drawn[resumed.step - 1])
  with pytest.raises(ValueError, match=r"schedule was 'linear.*' and is"):
    start().restore(toy_rows.heated(store).state())


def test_impossible_batches_are_refused(store, tmp_path):
  with pytest.raises(ValueError, match="must not be negative, got -1"):
    toy_rows.heated(store, start_step=-1)
  splits = {
    split: {name: toy_rows.write(tmp_path, split, name, 5)}
    for split, name in (("train", "en-de"), ("validation", "de-en"))
  }
  toy_rows.write_header(tmp_path, splits)
  with pytest.raises(ValueError, match="'de-en' has no rows in split"):
    toy_rows.heated(row_store.RowStore(tmp_path))
