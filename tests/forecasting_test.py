"""Forecasts: what is expected against what is drawn."""

import json

import numpy as np
import pytest
import toy
import toy_trouble

from basemt_jax import cli, heating, sampling
from basemt_jax.data import batches, row_store, store_building
from basemt_jax.data import vocabulary as vocabulary_lib
from basemt_jax.inspection import forecasting, text_report

pytestmark = pytest.mark.usefixtures("registries", "clean_gin")

HEATED = sampling.Strategy(heating.linear(1.0, 5.0, 60))


@pytest.fixture
def planted():
  return toy_trouble.planted()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return row_store.RowStore(toy.write_store(tmp_path_factory.mktemp("store")))


def _forecast(store, strategy=HEATED, train_steps=60, **options):
  return forecasting.forecast(
    "it",
    strategy,
    forecasting.sizes_of_store(store),
    train_steps,
    8,
    toy.BANDS,
    **options,
  )


def test_expected_draws_are_what_is_drawn(store):
  """Against the batches of many seeds."""
  forecast = _forecast(store)
  names = store.directions
  rows = np.zeros((20, len(names)))
  tokens = np.zeros((20, len(names)))
  for seed in range(20):
    train = batches.TrainBatches(store, HEATED, 8, seed)
    for _ in range(60):
      batch = next(train)
      rows[seed] += np.bincount(batch["direction"], minlength=len(names))
      np.add.at(
        tokens[seed],
        batch["direction"],
        batch["decoder_loss_weights"].sum(axis=1),
      )
    assert rows[seed].astype(int).tolist() == list(train.counters.values())
  for d in forecast.directions:
    i = names.index(d.name)
    error = rows[:, i].std() / np.sqrt(20)
    assert abs(rows[:, i].mean() - d.rows) < 4 * error
    assert tokens[:, i].mean() == pytest.approx(d.target_tokens, rel=0.05)
    assert d.epochs == pytest.approx(d.rows / store.rows("train")[i])
  assert sum(d.rows for d in forecast.directions) == pytest.approx(60 * 8)


def test_milestones_are_the_first_steps_that_reach_them(store):
  forecast = _forecast(store, train_steps=3000)
  plan = HEATED.plan(
    store.directions, store.pairs("train"), store.rows("train"), 8
  )
  drawn = 8 * np.cumsum(plan.rates(np.arange(3000)), axis=0)
  epochs = drawn / store.rows("train")
  for d in forecast.directions:
    own = epochs[:, store.directions.index(d.name)]
    expected = {
      k: int(np.argmax(own >= k)) + 1
      for k in forecasting.MILESTONES
      if own[-1] >= k
    }
    assert expected and d.seen.keys() == expected.keys()
    for k, step in expected.items():
      assert abs(d.seen[k] - step) <= 2  # Interpolated.


def test_trouble_with_a_mixture_is_told(store, tmp_path):
  late = sampling.Strategy(heating.constant(1.0), joins={"fr": 1000})
  (never, often) = _forecast(store, late, max_epochs=5).warnings
  assert never == "never sampled in 60 steps: en-fr (joins at step 1,000)"
  epochs = {d.name: d.epochs for d in _forecast(store, late).directions}
  assert epochs["en-fr"] == 0 and min(epochs["de-en"], epochs["en-de"]) > 5
  assert "more than 5 times" in often and "de-en" in often
  bare = row_store.RowStore(toy.write_store(tmp_path, splits=("train",)))
  assert _forecast(bare, max_epochs=99).warnings == (
    "no dev set, so that overfitting would not be seen: de-en, en-de, en-fr",
  )


def test_a_sample_gives_nearly_the_sizes_of_the_store(planted, tmp_path):
  train = [toy_trouble.pair(i) for i in range(3000)]
  pieces = vocabulary_lib.Vocabulary.load(toy_trouble.MODEL)
  task = toy_trouble.register(
    "en-fr", {"train": train, "validation": train[:7]}, pieces
  )
  lengths = {"inputs": 128, "targets": 128}
  packed = store_building.build_store(
    task, lengths, tmp_path, splits=("train",)
  )
  exact = forecasting.sizes_of_store(packed)
  for sample, tolerance in ((1000, 0.08), (None, 0.02)):
    data = text_report.inspect_data(task, text_report.Options(lengths, sample))
    sizes = forecasting.sizes_of_data(data)
    assert sizes.is_exact is (sample is None)
    assert sizes.directions == ("en-fr",) and sizes.dev_pairs.tolist() == [7]
    assert sizes.pairs.tolist() == exact.pairs.tolist() == [3000]
    for name in ("rows", "source_tokens", "target_tokens"):
      found, expected = getattr(sizes, name), getattr(exact, name)
      assert found == pytest.approx(expected, rel=tolerance)


def test_recipes_are_compared_before_anything_is_built(
  planted, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("BASEMT_CACHE", str(tmp_path / "cache"))
  command = ["inspect", "--gin_file=gin/recipes/base_heated.gin"]
  command += ["--mixture", "planted", "--gin.TRAIN_STEPS=40", "--traceback"]
  command += ["--gin.END_TEMPERATURE=5", "--gin.BATCH_SIZE=4"]
  command += ["--json", str(tmp_path / "out.json")]
  against = [
    "--against",
    "gin/recipes/base.gin",
    "--against",
    "JOINS={'en': 9}",
  ]
  assert cli.main([*command, *against[:2]]) == 0
  numbers = json.loads((tmp_path / "out.json").read_text())
  heated, static = numbers["mixture"]
  assert (heated["name"], static["name"]) == ("configured", "base")
  assert heated["temperatures"][0] == 1 and heated["temperatures"][-1] > 4.8
  assert set(static["temperatures"]) == {1.0}
  assert heated["train_steps"] == 40 and not (tmp_path / "cache").exists()
  shown = capsys.readouterr().out
  assert "configured against base" in shown and "linear(1.0, 5.0, 40)" in shown
