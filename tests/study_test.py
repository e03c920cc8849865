"""The study: what the report makes of its logs, and a small run."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest
import toy

ROOT = pathlib.Path(__file__).parent.parent
DIRECTIONS = {"de-en": 100_000, "en-id": 1_000}


@pytest.fixture
def script(monkeypatch):
  """Imports a script of `benchmarks/`."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def write_log(folder, system, losses, seed=0, dense_share=0.0, speed=50.0):
  """A log of evaluations every 100 steps, the same loss in both directions."""
  header = {
    "system": system,
    "seed": seed,
    "dense_share": dense_share,
    "learning_rate": 3e-3,
    "network": "dense" if system == "dense" else "BalancedRouter",
    "changes": {},
    "size": {"train_steps": 100 * len(losses)},
    "pairs": DIRECTIONS,
    "device": "none",
    "jax": "0",
  }
  records = [header]
  for i, loss in enumerate(losses):
    step = 100 * (i + 1)
    records.append({"step": step, "loss": loss, "steps_per_second": speed})
    each = {f"dev/loss/{d}": loss for d in DIRECTIONS}
    records.append({"step": step, "dev/loss": loss, **each})
  path = folder / f"{system}_{seed}.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def test_convergence_by_hand(script, tmp_path):
  """Base needs 400 steps for 1.0; another passes it midway from 100 to 200."""
  report = script("study_report")
  read = [
    report.read(write_log(tmp_path, "base", [4.0, 3.0, 2.0, 1.0])),
    report.read(
      write_log(tmp_path, "dense", [4.0, 3.0, 2.0, 1.5], speed=100.0)
    ),
    report.read(
      write_log(
        tmp_path, "base_dense_pretrained", [2.0, 0.0, 0.0, 0.0], 0, 0.25
      )
    ),
  ]
  # A step takes 20 ms sparse; dense 10, or 20 in the converted run's log.
  step_ms = report.step_times(read[:2])
  assert step_ms == {"BalancedRouter": 20.0, "dense": 10.0}
  runs = {one.system: [report.with_seconds(one, step_ms)] for one in read}
  converted = runs["base_dense_pretrained"][0]
  assert converted.seconds.tolist() == [1.0, 3.0, 5.0, 7.0]
  assert converted.bands == {"de-en": "high", "en-id": "low"}
  for axis, expected in (("steps", 400 / 150), ("seconds", 8.0 / 2.0)):
    for band in ("all", "high", "low"):
      found = report.convergence(runs, converted.system, band, axis)
      assert found == pytest.approx([expected])
  assert report.convergence(runs, "base", "all", "seconds") == [1.0]
  assert report.convergence(runs, "dense", "all", "steps") is None


def test_specialisation_by_hand(script):
  """Languages all alike know nothing; one expert each, log of their number."""
  specialisation = script("study_report").specialisation
  assert specialisation(np.full((3, 4), 0.25)) == pytest.approx(0.0)
  assert specialisation(np.eye(4) * 7.0) == pytest.approx(np.log(4.0))


def test_committed_report_is_that_of_the_committed_logs(
  script, tmp_path, monkeypatch
):
  out = tmp_path / "results.md"
  arguments = ["study_report.py", "--logs", str(ROOT / "docs/study")]
  monkeypatch.setattr("sys.argv", [*arguments, "--out", str(out)])
  script("study_report").main()
  assert out.read_text() == (ROOT / "docs/results.md").read_text()


@pytest.mark.slow
def test_a_small_run_and_its_log(script, tmp_path, monkeypatch, capsys):
  """Trained, converted, not tested; a second call has nothing to do."""
  study = script("study")
  toy.write_store(tmp_path / "store")
  size = dataclasses.replace(
    study.Size(),
    train_steps=4,
    batch_size=128,
    emb_dim=64,
    blocks=3,
    num_experts=2,
    evaluations=2,
  )
  sizes = [f"{k}={v}" for k, v in dataclasses.asdict(size).items()]
  folders = ["--store", str(tmp_path / "store"), "--logs", str(tmp_path / "l")]
  work = ["--work", str(tmp_path / "work"), "--affinities", "--beams"]
  which = ["--systems", "base_dense_pretrained", "--seeds", "1"]
  change = ["--change", "dense_share=0.5"]
  command = ["study.py", "run", *folders, *work, *which, *change]
  monkeypatch.setattr("sys.argv", [*command, "--size", *sizes])
  study.main()
  assert "converted" in capsys.readouterr().out
  one = script("study_report").read(
    tmp_path / "l" / "base_dense_pretrained_1.jsonl"
  )
  assert one.steps.tolist() == [2, 4]
  assert one.header["changes"] == {"dense_share": 0.5}
  assert sorted(one.experts) == ["decoder/layers_2", "encoder/layers_2"]
  assert set(one.by_affinity) == set(one.losses) == set(toy.DIRECTIONS)
  found = np.load(tmp_path / "work" / "base_dense_pretrained_1_affinities.npz")
  assert len(found.files) == 2
  for affinities in found.values():
    assert affinities.shape[0] == 6
    assert affinities.shape[2] == 2
  study.main()
  assert capsys.readouterr().out == ""
