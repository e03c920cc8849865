"""What a run did: every number against a count of its own."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import toy
import toy_models

from basemt_jax import metrics
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax import trained as trained_lib
from basemt_jax.data import batches
from basemt_jax.inspection import run_report, run_view


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return toy_models.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(trained):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
    return run_report.inspect_run(trained, toy_models.silent())


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())


def test_drawn_rows_tokens_and_losses_of_a_run(trained, report):
  assert (report.step, report.phase) == (4, "sparse")
  assert report.conversion_step is None
  assert report.checkpoints == [2, 4] and not report.warnings
  store = trained.store()
  train = batches.TrainBatches(store, trained.strategy, 8, trained.data_seed)
  rows, tokens = Counter(), Counter()
  for _ in range(4):
    batch = next(train)
    for direction, weights in zip(
      batch["direction"], batch["decoder_loss_weights"], strict=True
    ):
      rows[store.directions[direction]] += 1
      tokens[store.directions[direction]] += weights.sum()
  lines = (pathlib.Path(trained.model_dir) / "metrics.jsonl").read_text()
  metrics = [json.loads(line) for line in lines.splitlines()]
  for d in report.directions:
    assert d.drawn_rows == rows[d.name]
    assert (d.trained_target_tokens or 0) == tokens[d.name]
    assert (
      d.dev_loss
      == [m[f"dev/loss/{d.name}"] for m in metrics if "dev/loss" in m][-1]
    )
  assert sum(d.planned_rows for d in report.directions) == pytest.approx(32)
  dev = next(c for c in report.curves if c.metric == "dev/loss")
  assert dev.steps == [2, 4]
  by_band = Counter(d.band for d in report.directions)
  assert by_band == {"mid": 2, "low": 1}
  middle = [dev.lines[d] for d in ("de-en", "en-de")]
  assert dev.bands["mid"] == pytest.approx(np.mean(middle, axis=0).tolist())
  assert dev.bands["low"] == dev.lines["en-fr"]
  own = next(c for c in report.curves if c.metric == "dev/real")
  assert own.label == "dev real tokens" and own.bands["all"] == [1.0, 1.0]
  layers = ["decoder/layers_0", "encoder/layers_0"]
  for own in report.routers:
    assert list(own.lines) == layers and own.steps == [2, 4]
  assert {own.metric for own in report.routers} >= {"router/load_max"}


def test_expert_maps_count_where_tokens_go(trained, one_device):
  """Against the model applied outside of any program, counted in Python."""
  loaded = trained_lib.load(trained, toy_models.silent())
  store = loaded.store
  maps = run_report.expert_maps(loaded, "validation", rows=2)
  model = model_lib.Transformer(loaded.program.model.config)
  forward = jax.jit(functools.partial(model_lib.forward, model, train=False))
  counts = {}
  for name in store.directions:
    count = store.stats("validation", name).rows
    rows = np.unique(np.linspace(0, count - 1, min(2, count)).astype(int))
    batch = store.read("validation", name, rows)
    _, updates = forward(loaded.variables, batch)
    source, target = name.split("-")
    for part, language, tokens in (
      ("encoder", source, batch["encoder_input_tokens"]),
      ("decoder", target, batch["decoder_target_tokens"]),
    ):
      layer = updates["intermediates"][part]["layers_0"]["base_layer"]
      expert = np.asarray(layer["expert"][0])
      assert ((expert >= 0) == (tokens > 0)).all()
      own = counts.setdefault((part, language), Counter())
      own.update(expert[tokens > 0].tolist())
  assert [m.layer for m in maps] == ["decoder/layers_0", "encoder/layers_0"]
  for own in maps:
    part = own.layer.partition("/")[0]
    expected = {x: c for (p, x), c in counts.items() if p == part}
    assert own.languages == sorted(expected)
    for language, tokens, shares in zip(
      own.languages, own.tokens, own.shares, strict=True
    ):
      total = sum(expected[language].values())
      assert tokens == total
      assert shares == pytest.approx(
        [expected[language][e] / total for e in range(4)], abs=0.02
      )


def test_a_checkpoint_without_position_or_metrics(
  trained, one_device, tmp_path
):
  """As T5X writes them."""
  bare = dataclasses.replace(trained, model_dir=str(tmp_path / "bare"))
  shutil.copytree(trained.model_dir, bare.model_dir)
  (tmp_path / "bare" / "metrics.jsonl").unlink()
  shutil.rmtree(tmp_path / "bare" / "checkpoint_4" / "position")
  (tmp_path / "bare" / "checkpoint_4" / "checksums.json").unlink()
  report = run_report.inspect_run(bare, toy_models.silent())
  assert len(report.warnings) == 2 and len(report.experts) == 2
  assert all(d.drawn_rows is None for d in report.directions)
  assert not report.curves and not report.routers
  titles = [t.title for t in run_view.section(report).tables]
  assert "Directions until step 4" in titles


@pytest.mark.slow
def test_a_run_that_was_converted(one_device, tmp_path):
  run = toy_models.train(tmp_path, dense_steps=2)
  report = run_report.inspect_run(run, toy_models.silent())
  assert (report.phase, report.conversion_step) == ("sparse", 2)
  assert len(report.experts) == 2
  assert all(r.steps == [4] for r in report.routers)
  section = run_view.section(report)
  assert "dense until step 2, then sparse" in section.summary[0]
  curves = [chart for plot in section.plots[1:3] for chart in plot.charts]
  assert ["conversion" in str(chart) for chart in curves] == [True] * 4
  dense = run_report.inspect_run(run, toy_models.silent(), "2")
  assert (dense.phase, dense.experts, dense.step) == ("dense", (), 2)
  assert all(d.drawn_rows is not None for d in dense.directions)
  titles = [t.title for t in run_view.section(dense).tables]
  assert "Directions until step 2" in titles


def test_metrics_without_their_configuration_go_by_their_names():
  names = [
    "dev/real/en-de",
    "real/en-de",
    "loss/en-de",
    "loss/low",
    "a/b/en-de",
  ]
  *own, found = run_report.known_metrics(metrics.METRICS, names, ["en-de"])
  assert tuple(own) == metrics.METRICS
  assert found == metrics.Metric("real", "real", is_main=True)
