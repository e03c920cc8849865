"""Where metrics go; and that no tracker stops a run."""

import json
import pathlib

import pytest
from tensorboard.backend.event_processing import event_accumulator

from basemt_jax.commands import trackers

SCALARS = {
  "loss": 2.5,
  "loss/en-de": 2.0,
  "dev/bleu/en->xx": 7.0,
  "target_tokens/en-de": 9.0,
}
SHOWN = {
  "loss": 2.5,
  "loss_by_direction/en-de": 2.0,
  "dev/bleu/en->xx": 7.0,
}


def write(directory, *openers):
  with trackers.Writer(str(directory), openers) as writer:
    writer.write_scalars(3, SCALARS)
    writer.flush()
    writer.write_scalars(4, {"loss": 2.0})
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_files_have_all_and_tensorboard_what_is_shown(tmp_path):
  first, second = write(tmp_path / "run")
  assert first.pop("time") > 1e9
  assert first == {"step": 3, **SCALARS} and second["loss"] == 2.0
  events = event_accumulator.EventAccumulator(str(tmp_path / "run"))
  events.Reload()
  tags = events.Tags()["scalars"]
  assert set(tags) == set(SHOWN)
  assert [(e.step, e.value) for e in events.Scalars("loss")] == [
    (3, 2.5),
    (4, 2.0),
  ]


class Broken:
  """Fails when it is told to."""

  def __init__(self, at):
    self.at, self.calls = at, []

  def start(self, model_dir):
    self._do("open")
    return self

  def _do(self, what):
    self.calls.append(what)
    if what == self.at:
      raise ConnectionError(f"no network\nat {what}")

  def write_scalars(self, step, scalars):
    self._do("write")

  def flush(self):
    self._do("flush")

  def close(self):
    self._do("close")


@pytest.mark.parametrize(
  "at, calls",
  [
    ("open", ["open"]),
    ("write", ["open", "write"]),
    ("flush", ["open", "write", "flush"]),
    ("close", ["open", "write", "flush", "write", "flush", "close"]),
  ],
)
def test_a_tracker_that_fails_is_told_of_once(tmp_path, capsys, at, calls):
  broken, works = Broken(at), Broken(None)
  assert [
    line["step"] for line in write(tmp_path, broken.start, works.start)
  ] == [3, 4]
  assert broken.calls == calls and works.calls[-1] == "close"
  assert capsys.readouterr().err == (
    "metrics no longer go to Broken: no network; training goes on\n"
  )


def test_a_tracker_that_is_not_installed_says_how_to(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(trackers.sys.modules, "wandb", None)
  assert len(write(tmp_path, trackers.wandb("tried", mode="offline"))) == 2
  assert "wandb: wandb is not installed: pip install basemt_jax[wandb]" in (
    capsys.readouterr().err
  )


def test_mlflow(tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  uri = (tmp_path / "mlruns").as_uri()
  write(tmp_path / "run", trackers.mlflow("tried", uri))
  client = mlflow.MlflowClient(uri)
  experiment = client.get_experiment_by_name("tried")
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.run_name == "run" and run.info.status == "FINISHED"
  assert run.data.metrics == {
    "loss": 2.0,
    "loss_by_direction/en-de": 2.0,
    "dev/bleu/en to xx": 7.0,
  }
  history = client.get_metric_history(run.info.run_id, "loss")
  assert [(m.step, m.value) for m in history] == [(3, 2.5), (4, 2.0)]


def test_wandb_without_a_network(tmp_path):
  wandb = pytest.importorskip("wandb")
  write(tmp_path / "run", trackers.wandb("tried", mode="offline"))
  wandb.teardown()  # Its process writes when it ends.
  (file,) = pathlib.Path(tmp_path / "run").glob("wandb/offline-*/*.wandb")
  assert b"loss_by_direction/en-de" in file.read_bytes()
