"""The study: what the report makes of its logs, and a small run."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest
import toy

ROOT = pathlib.Path(__file__).parent.parent
DIRECTIONS = {"de-en": 100_000, "en-mr": 10_000, "en-id": 1_000}


@pytest.fixture
def script(monkeypatch):
  """Imports a script of `benchmarks/`."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def write_log(folder, system, losses, seed=0, speed=50.0, **settings):
  """A log of evaluations every 100 steps, the same loss in both directions."""
  header = {
    "system": system,
    "seed": seed,
    "settings": {"dense_share": 0.0, **settings},
    "network": "dense" if system == "dense" else "BalancedRouter",
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
        tmp_path,
        "base_dense_pretrained",
        [2.0, 0.0, 0.0, 0.0],
        dense_share=0.25,
      )
    ),
  ]
  # A step takes 20 ms sparse; dense 10, or 20 in the converted run's log.
  step_ms = report.step_times(read[:2])
  assert step_ms == {"BalancedRouter": 20.0, "dense": 10.0}
  runs = {one.system: [report.with_seconds(one, step_ms)] for one in read}
  converted = runs["base_dense_pretrained"][0]
  assert converted.seconds.tolist() == [1.0, 3.0, 5.0, 7.0]
  assert list(converted.bands.values()) == ["high", "mid", "low"]
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


def test_a_run_of_other_settings_is_not_passed_off_as_its_system(
  script, tmp_path, monkeypatch
):
  settings = script("study").settings_of(script("study").SYSTEMS["base"])
  write_log(tmp_path, "base", [2.0, 1.0], **settings)
  arguments = ["study_report.py", "--logs", str(tmp_path)]
  monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "r.md")])
  (tmp_path / "notes.md").write_text("")
  script("study_report").main()
  write_log(tmp_path, "base", [2.0, 1.0], 1, **{**settings, "noise": 0.5})
  with pytest.raises(SystemExit, match=r"base, seed 1.*'noise': 0.5.*pilot"):
    script("study_report").main()
  write_log(tmp_path, "base", [2.0, 1.0, 0.5], 1, **settings)
  with pytest.raises(SystemExit, match=r"seed 1.*'train_steps': 300.*pilot"):
    script("study_report").main()


def test_longer_runs_have_a_section_of_their_own(script, tmp_path, monkeypatch):
  (tmp_path / "notes.md").write_text("")
  (tmp_path / "long").mkdir()
  usual = {
    name: script("study").settings_of(script("study").SYSTEMS[name])
    for name in ("base", "base_heated")
  }
  write_log(tmp_path, "base", [2.0, 1.0], **usual["base"])
  write_log(tmp_path / "long", "base", [4.0, 3.0, 2.0, 1.0], **usual["base"])
  write_log(
    tmp_path / "long", "base_heated", [2.0, 1, 1, 1], **usual["base_heated"]
  )
  arguments = ["study_report.py", "--logs", str(tmp_path)]
  monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "r.md")])
  script("study_report").main()
  report = (tmp_path / "r.md").read_text()
  assert "1 runs on" in report
  section = report.partition("400 updates: best dev loss")[2]
  # 400 updates against 200, in all bands; not translated.
  row = "| base_heated | 1 " + "| 1.00 " * 4 + "| 2.00 " * 4 + "|  |  |  |"
  assert row in section


def test_bleu_in_the_course_of_training_is_plotted(
  script, tmp_path, monkeypatch
):
  courses = {  # High stays the same; at first it is base's best.
    "base": {100: (2.0, 7.0), 200: (6.0, 7.0)},
    "base_heated": {100: (8.0, 6.0), 200: (8.0, 6.0)},
    "dense": {100: (2.0, 7.0), 200: (5.0, 7.0)},
  }
  for name, course in courses.items():
    settings = script("study").settings_of(script("study").SYSTEMS[name])
    path = write_log(tmp_path, name, [2.0, 1.0], **settings)
    with path.open("a") as file:
      for step, (value, high) in course.items():
        bands = {f"dev/bleu/{b}": value for b in ("all", "mid", "low")}
        line = {"step": step, **bands, "dev/bleu/high": high}
        file.write(json.dumps(line) + "\n")
  settings = script("study").settings_of(script("study").SYSTEMS["switch"])
  write_log(tmp_path, "switch", [2.0, 1.0], **settings)  # None measured.
  one = script("study_report").read(path)
  assert one.bleu["low"] == [(100, 2.0), (200, 5.0)]
  (tmp_path / "notes.md").write_text("")
  arguments = ["study_report.py", "--logs", str(tmp_path)]
  monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "r.md")])
  script("study_report").main()
  section = (tmp_path / "r.md").read_text().partition("## Dev BLEU")[2]
  assert "| base | 1.00 | 1.00 | 1.00 | 1.00 |" in section
  assert "| base_heated | 2.00 | – | 2.00 | 2.00 |" in section
  assert "| dense | – | 1.00 | – | – |" in section
  assert "| switch |" not in section.partition("##")[0]
  assert "plots/bleu.svg" in section
  assert "<svg" in (tmp_path / "plots" / "bleu.svg").read_text()


def test_a_partly_tested_run_has_no_scores(script, tmp_path):
  report = script("study_report")
  path = write_log(tmp_path, "base", [2.0])
  score = {"beam": 1, "band": "high", "pairs": 1, "bleu": 10.0, "chrf": 20.0}
  for i, direction in enumerate(DIRECTIONS):
    assert not report.read(path).has_scores(1)
    bleu = 10.0 * (i + 1)
    with path.open("a") as file:
      file.write(json.dumps({"test": direction, **score, "bleu": bleu}) + "\n")
  one = report.read(path)
  assert one.has_scores(1) and not one.has_scores(4)
  assert one.score("all", 1) == (20.0, 20.0)
  assert one.score("low", 1) == (30.0, 20.0)


def test_a_bootstrap_belongs_to_the_runs_of_the_logs(
  script, tmp_path, monkeypatch
):
  for system, scale in (("base", 10.0), ("dense", 11.0)):
    settings = script("study").settings_of(script("study").SYSTEMS[system])
    path = write_log(tmp_path, system, [2.0], **settings)
    with path.open("a") as file:
      for i, direction in enumerate(DIRECTIONS):
        score = {"beam": 1, "band": "high", "bleu": scale * i, "chrf": 20.0}
        file.write(json.dumps({"test": direction, **score}) + "\n")
  (tmp_path / "notes.md").write_text("")
  arguments = ["study_report.py", "--logs", str(tmp_path)]
  monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "r.md")])

  def found(system, *means):
    kept = {system: {"bleu": {"0": means}, "high better": 1}}
    (tmp_path / "bootstrap.json").write_text(json.dumps(kept))
    script("study_report").main()

  found("dense", 10.0, 11.0)
  assert "| dense | 1 | 1 |" in (tmp_path / "r.md").read_text()
  for other in (("dense", 10.0, 11.1), ("dense", 9.9, 11.0), ("switch", 10, 1)):
    with pytest.raises(SystemExit, match=r"of other runs.*--translations"):
      found(*other)


def test_one_process_writes_a_log(script, tmp_path, monkeypatch):
  study = script("study")
  first = study.Log(tmp_path / "a.part")
  with pytest.raises(BlockingIOError):
    study.Log(tmp_path / "a.part")
  first.write(step=1)
  (tmp_path / "a.part").rename(tmp_path / "a.jsonl")
  first.close()
  study.Log(tmp_path / "a.part").close()
  assert (tmp_path / "a.jsonl").read_text() == '{"step": 1}\n'
  # Finished by another between opening and locking.
  (tmp_path / "a.part").write_text("whole")
  lock = study.fcntl.flock

  def late(*arguments):
    (tmp_path / "a.part").rename(tmp_path / "b.jsonl")
    lock(*arguments)

  monkeypatch.setattr(study.fcntl, "flock", late)
  with pytest.raises(BlockingIOError, match="finished"):
    study.Log(tmp_path / "a.part")
  assert (tmp_path / "b.jsonl").read_text() == "whole"


def test_a_cap_on_epochs_reaches_the_run(script):
  study = script("study")
  for option, expected in (("max_epochs=30", 30.0), ("max_epochs=0", None)):
    system = study.with_changes(study.SYSTEMS["base_heated"], [option])
    found = study.run_of(system, study.Size(train_steps=70), 0, "", "").strategy
    assert found.max_epochs == expected
    assert found.steps == 70


def test_changes_of_systems_have_their_type(script):
  study = script("study")
  system = study.SYSTEMS["base"]
  changed = study.with_changes(system, ["rewarm_steps=7", "end=4"])
  assert (changed.rewarm_steps, changed.end) == (7, 4.0)
  for option in ("beam=False", "seeds=2", "nothing=1"):
    with pytest.raises(SystemExit, match="no field"):
      study.with_changes(system, [option])


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
  """Trained, converted, tested; a second call has nothing to do."""
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
  work = ["--work", str(tmp_path / "work"), "--affinities", "--beams", "1"]
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
  assert [step for step, _ in one.bleu["all"]] == [1, 2, 3, 4]
  assert one.has_scores(1)
  assert script("study_report").changes(one) == {"dense_share": 0.5}
  assert sorted(one.experts) == ["decoder/layers_2", "encoder/layers_2"]
  assert set(one.by_affinity) == set(one.losses) == set(toy.DIRECTIONS)
  found = np.load(tmp_path / "work" / "base_dense_pretrained_1_affinities.npz")
  assert len(found.files) == 2
  for affinities in found.values():
    assert affinities.shape[0] == 6
    assert affinities.shape[2] == 2
  study.main()
  assert capsys.readouterr().out == ""
