"""The study: what the report makes of its logs, and a small run."""

import dataclasses
import importlib
import json
import pathlib
import subprocess

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


def settings_of(script, system):
  """Those of a system as the study has it."""
  systems = script("study.systems")
  return systems.settings_of(systems.SYSTEMS[system])


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


def one_run(reading, path):
  """The run of a log."""
  (found,) = reading.read_set(path)
  return found


def test_convergence_by_hand(script, tmp_path):
  """Base needs 400 steps for 1.0; another passes it midway from 100 to 200."""
  report = script("study.reading")
  read = [
    one_run(report, write_log(tmp_path, "base", [4.0, 3.0, 2.0, 1.0])),
    one_run(
      report, write_log(tmp_path, "dense", [4.0, 3.0, 2.0, 1.5], speed=100.0)
    ),
    one_run(
      report,
      write_log(
        tmp_path,
        "base_dense_pretrained",
        [2.0, 0.0, 0.0, 0.0],
        dense_share=0.25,
      ),
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
  specialisation = script("study.tables").specialisation
  assert specialisation(np.full((3, 4), 0.25)) == pytest.approx(0.0)
  assert specialisation(np.eye(4) * 7.0) == pytest.approx(np.log(4.0))


def test_a_run_of_other_settings_is_not_passed_off_as_its_system(
  script, tmp_path
):
  reading = script("study.reading")
  settings = settings_of(script, "base")

  def of_system(losses, **changes):
    paths = [
      write_log(tmp_path, "base", [2.0, 1.0], **settings),
      write_log(tmp_path, "base", losses, 1, **{**settings, **changes}),
    ]
    reading.pack(paths, tmp_path / "set.jsonl.xz")
    return reading.by_system(reading.read_set(tmp_path / "set.jsonl.xz"))

  assert [one.seed for one in of_system([3.0, 2.0])["base"]] == [0, 1]
  with pytest.raises(SystemExit, match=r"base, seed 1.*'noise': 0.5"):
    of_system([2.0, 1.0], noise=0.5)
  with pytest.raises(SystemExit, match=r"seed 1.*'train_steps': 300"):
    of_system([2.0, 1.0, 0.5])


def test_longer_runs_in_one_table(script, tmp_path):
  reading = script("study.reading")
  logs = [
    write_log(tmp_path, "base", [4.0, 3.0, 2.0, 1.0]),
    write_log(tmp_path, "base_heated", [2.0, 1, 1, 1]),
  ]
  runs = reading.grouped(one_run(reading, log) for log in logs)
  # 400 updates against 200, in all bands; not translated.
  row = "| base_heated | 1 " + "| 1.00 " * 4 + "| 2.00 " * 4 + "|  |  |  |"
  assert row in script("study.tables").short(runs)


def test_a_set_is_read_as_its_logs_are(script, tmp_path):
  reading = script("study.reading")
  logs = [
    write_log(tmp_path, "base", [4.0, 3.0]),
    write_log(tmp_path, "base", [2.0], seed=1),
  ]
  (tmp_path / "never.jsonl").write_text(
    logs[0].read_text().split("\n")[0] + "\n"
  )
  reading.pack([*logs, tmp_path / "never.jsonl"], tmp_path / "set.jsonl.xz")
  found = reading.read_set(tmp_path / "set.jsonl.xz")
  assert [(one.seed, one.steps.tolist()) for one in found] == [
    (0, [100, 200]),
    (1, [100]),
  ]


def test_factors_of_bleu_in_the_course_of_training(script, tmp_path):
  courses = {  # High stays the same; at first it is base's best.
    "base": {100: (2.0, 7.0), 200: (6.0, 7.0)},
    "base_heated": {100: (8.0, 6.0), 200: (8.0, 6.0)},
    "dense": {100: (2.0, 7.0), 200: (5.0, 7.0)},
  }
  for name, course in courses.items():
    settings = settings_of(script, name)
    path = write_log(tmp_path, name, [2.0, 1.0], **settings)
    with path.open("a") as file:
      for step, (value, high) in course.items():
        bands = {f"dev/bleu/{b}": value for b in ("all", "mid", "low")}
        line = {"step": step, **bands, "dev/bleu/high": high}
        file.write(json.dumps(line) + "\n")
  settings = settings_of(script, "switch")
  write_log(tmp_path, "switch", [2.0, 1.0], **settings)  # None measured.
  reading = script("study.reading")
  assert one_run(reading, tmp_path / "dense_0.jsonl").bleu["low"] == [
    (100, 2.0),
    (200, 5.0),
  ]
  logs = sorted(tmp_path.glob("*.jsonl"))
  runs = reading.grouped(one_run(reading, log) for log in logs)
  table = script("study.tables").bleu_factors(runs)
  assert "| base | 1.00 | 1.00 | 1.00 | 1.00 |" in table
  assert "| base_heated | 2.00 | – | 2.00 | 2.00 |" in table
  assert "| dense | – | 1.00 | – | – |" in table
  assert "switch" not in table


def test_a_partly_tested_run_has_no_scores(script, tmp_path):
  report = script("study.reading")
  path = write_log(tmp_path, "base", [2.0])
  score = {"beam": 1, "band": "high", "pairs": 1, "bleu": 10.0, "chrf": 20.0}
  for i, direction in enumerate(DIRECTIONS):
    assert not one_run(report, path).has_scores(1)
    bleu = 10.0 * (i + 1)
    with path.open("a") as file:
      file.write(json.dumps({"test": direction, **score, "bleu": bleu}) + "\n")
  one = one_run(report, path)
  assert one.has_scores(1) and not one.has_scores(4)
  assert one.score("all", 1) == (20.0, 20.0)
  assert one.score("low", 1) == (30.0, 20.0)


def test_scores_of_translations_and_whether_they_differ(script):
  """A perfect system against one that says the same all the time."""
  scoring = script("study.scoring")
  assert scoring.named(pathlib.Path("a_b_12_beam4.json.gz")) == ("a_b", 12, 4)
  texts = [f"this is sentence number {i} of many" for i in range(40)]
  references = {"de-en": texts, "en-de": texts[:20]}
  dull = {
    d: ["this is no sentence at all"] * len(t) for d, t in references.items()
  }
  translations = {("base", 0, 1): dull, ("other", 0, 1): references}
  scorer = scoring.Scorer(references, translations)
  jobs = list(scorer.jobs(["base"]))
  assert len(jobs) == 3 * 2
  found = [scorer.score(job) for job in jobs if job[3] == "en-de"]
  scores = {r["run"]: r["bleu"] for r in found if "bleu" in r}
  assert scores["other"] == pytest.approx(100) and scores["base"] < 50
  (compared,) = (r for r in found if "against" in r)
  assert compared["outcome"] == "better"
  assert (compared["run"], compared["against"]) == ("other", "base")


def test_one_process_writes_a_log(script, tmp_path, monkeypatch):
  study = script("study.runs")
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
  systems = script("study.systems")
  for option, expected in (("max_epochs=30", 30.0), ("max_epochs=0", None)):
    system = systems.with_changes(systems.SYSTEMS["base_heated"], [option])
    found = systems.run_of(
      system, systems.Size(train_steps=70), 0, "", ""
    ).strategy
    assert found.max_epochs == expected
    assert found.steps == 70


def test_changes_of_systems_have_their_type(script):
  systems = script("study.systems")
  system = systems.SYSTEMS["base"]
  changed = systems.with_changes(system, ["rewarm_steps=7", "end=4"])
  assert (changed.rewarm_steps, changed.end) == (7, 4.0)
  for option in ("beam=False", "seeds=2", "nothing=1"):
    with pytest.raises(SystemExit, match="no field"):
      systems.with_changes(system, [option])


def test_experts_of_a_run_are_where_its_line_says(script):
  several, systems = script("study.several"), script("study.systems")

  def blocks(changes):
    (plan,) = several.planned(f"0 name base 1 {changes}")
    config = systems._network(plan.system, plan.size, 100)
    return config.encoder_expert_blocks, config.decoder_expert_blocks

  assert blocks("") == ((2, 5), (2, 5))
  assert blocks("expert_every=2 decoder_experts=4,5") == ((1, 3, 5), (4, 5))
  assert blocks("encoder_experts=none") == ((), (2, 5))


def test_logs_of_earlier_versions_have_the_defaults_of_new_fields(
  script, tmp_path
):
  reading, size = script("study.reading"), script("study.systems").Size()
  old = one_run(reading, write_log(tmp_path, "base", [2.0, 1.0]))
  size = dataclasses.replace(size, train_steps=200)
  header = {**old.header, "size": dataclasses.asdict(size)}
  new = dataclasses.replace(old, header=header)
  assert reading.size_changes(new, old) == reading.size_changes(old, new) == {}
  header["size"]["decoder_experts"] = "4,5"
  assert reading.size_changes(new, old) == {"decoder_experts": "4,5"}


def test_committed_pages_have_the_tables_of_the_committed_logs(script):
  report = script("study.report")
  for page in report.PAGES:
    text = (ROOT / page).read_text()
    assert report.filled(text) == text
  summary = json.loads((ROOT / report.SUMMARY).read_text())
  assert summary == report.summary()


@pytest.mark.slow
def test_a_small_run_and_its_log(script, tmp_path, monkeypatch, capsys):
  """Trained, converted, tested; a second call has nothing to do."""
  study = script("study.runs")
  toy.write_store(tmp_path / "store")
  size = dataclasses.replace(
    script("study.systems").Size(),
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
  command = ["runs.py", "run", *folders, *work, *which, *change]
  monkeypatch.setattr("sys.argv", [*command, "--size", *sizes])
  study.main()
  assert "converted" in capsys.readouterr().out
  one = one_run(
    script("study.reading"), tmp_path / "l" / "base_dense_pretrained_1.jsonl"
  )
  assert one.steps.tolist() == [2, 4]
  assert [step for step, _ in one.bleu["all"]] == [1, 2, 3, 4]
  assert one.has_scores(1)
  assert script("study.reading").changes(one) == {"dense_share": 0.5}
  assert sorted(one.experts) == ["decoder/layers_2", "encoder/layers_2"]
  assert set(one.by_affinity) == set(one.losses) == set(toy.DIRECTIONS)
  found = np.load(tmp_path / "work" / "base_dense_pretrained_1_affinities.npz")
  assert len(found.files) == 2
  for affinities in found.values():
    assert affinities.shape[0] == 6
    assert affinities.shape[2] == 2
  study.main()
  assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_several_runs_share_their_programs(script, tmp_path, monkeypatch):
  several = script("study.several")
  toy.write_store(tmp_path / "store")
  size = "train_steps=4 batch_size=128 emb_dim=64 blocks=3 num_experts=2"
  size += " evaluations=2 average_decay=0.9"
  heated = "schedule=there_and_back top=4 heating_share=0.5 end=1.5"
  (tmp_path / "runs.txt").write_text(
    f"""# part name system seed changes
    1 other dense 0 {size}
    0 a base 0 {size}  # as it is
    0 b base_heated 1 {size} {heated} stop_at=2
    """
  )
  made = []
  program = several.phases.program
  monkeypatch.setattr(
    several.phases, "program", lambda *a: made.append(a) or program(*a)
  )
  several.main(
    [
      f"--store={tmp_path / 'store'}",
      f"--logs={tmp_path / 'logs'}",
      f"--runs={tmp_path / 'runs.txt'}",
      f"--work={tmp_path / 'work'}",
      f"--weights={tmp_path / 'weights'}",
      *("--part=0", "--seconds=600"),
    ]
  )
  script("study.translations").main(
    [
      f"--store={tmp_path / 'store'}",
      f"--logs={tmp_path / 'logs'}",
      f"--runs={tmp_path / 'runs.txt'}",
      f"--weights={tmp_path / 'weights'}",
      *("--parts", "0", "--seconds=600"),
    ]
  )
  assert len(made) == 1
  reading = script("study.reading")
  logs = tmp_path / "logs"
  a, b = (one_run(reading, logs / f"{n}.jsonl") for n in ("a_0", "b_1"))
  assert (a.steps.tolist(), b.steps.tolist()) == ([2, 4], [2])
  assert (b.seed, b.header["settings"]["top"]) == (1, 4.0)
  assert a.loss("all")[0] != b.loss("all")[0]
  scorer = script("study.scoring").load(
    str(tmp_path / "store"), logs / "translations"
  )
  assert set(scorer.translations) == {("a", 0, 1), ("b", 1, 1)}
  for found in scorer.translations.values():
    assert {d: len(t) for d, t in found.items()} == {
      d: len(t) for d, t in scorer.references.items()
    }


def write_bible(folder, books):
  """OSIS files, one of each book: {'Ruth': {(chapter, verse): text}}."""
  folder.mkdir(parents=True)
  for book, texts in books.items():
    verses = "".join(
      f"<verse osisID='{book}.{chapter}.{verse}'>{text}</verse>"
      for (chapter, verse), text in texts.items()
    )
    (folder / f"{book.lower()}.xml").write_text(
      "<osis xmlns='http://www.bibletechnologies.net/2003/OSIS/namespace'>"
      f"<osisText><div>{verses}</div></osisText></osis>"
    )


def commit(folder):
  """Makes a repository of a folder; its git directory."""
  git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
    subprocess.run([*git, *command], cwd=folder, check=True)
  return str(folder / ".git")


def test_verses_of_bibles_are_paired_and_kept_apart(
  script, tmp_path, monkeypatch
):
  ruth = {(c, v): f"ruth {c} {v}" for c in (1, 2) for v in range(1, 21)}
  ruth[2, 1] = "Ruth 1, 1!"  # The same words again.
  job = {(c, 1): f"job {c}" for c in range(1, 11)}
  moved = {(c, 1 if c > 5 else 2): f"job {c}" for c in range(1, 11)}
  german = {place: f"rut  {text}" for place, text in ruth.items()}
  german |= {(2, 2): "lang " * 40, (2, 3): "kurz", (2, 4): "kurz"}
  french = {place: f"routh {text}" for place, text in ruth.items()}
  french[2, 5] = "assez long " * 14
  for folder, books in {
    "en/a": {"Ruth": ruth, "Job": job},
    "de/b": {"Ruth": german, "Job": moved},
    "fr/c": {"Ruth": french, "Job": job},
  }.items():
    write_bible(tmp_path / "r" / folder, books)
  (tmp_path / "r" / "fr" / "c" / "mark.xml").write_text("<osis")
  bible = script("study.bible")
  monkeypatch.setattr(bible, "REVISION", "HEAD")
  monkeypatch.setattr(bible, "ENGLISH", "en/a")
  sizes = {"de": ("de/b", 1000), "fr": ("fr/c", 5)}
  monkeypatch.setattr(bible, "LANGUAGES", sizes)
  monkeypatch.setattr(bible, "HELD_OUT", {"dev": 10, "test": 12})
  repository = commit(tmp_path / "r")
  bible.main([f"--repository={repository}", f"--out={tmp_path / 'out'}"])

  def pairs(language, split):
    path = tmp_path / "out" / f"en-{language}.{split}.tsv"
    return [tuple(line.split("\t")) for line in path.read_text().splitlines()]

  held = {}
  for language in ("de", "fr"):
    dev, test = pairs(language, "dev"), pairs(language, "test")
    assert [len(dev), len(test)] == [10, 12]
    held[language], foreign = zip(*dev, *test, strict=True)
    english, other = zip(*pairs(language, "train"), strict=True)
    assert not set(held[language]) & set(english)
    assert not set(foreign) & set(other)
    assert not any("lang lang" in text for text in (*foreign, *other))
  # The same ones, short in both, once in English; Job's numbers differ.
  assert held["de"] == held["fr"]
  assert len(set(held["de"])) == 22
  never = {"ruth 1 1", "Ruth 1, 1!", "ruth 2 2", "ruth 2 5"}
  assert not never & set(held["de"])
  assert not any("job" in text for text in held["de"])
  assert len(english) == 5  # Of French.
  german = dict(pairs("de", "train"))
  assert {"ruth 1 1", "Ruth 1, 1!", "ruth 2 5"} <= set(german)
  assert german["ruth 1 1"] == "rut ruth 1 1"


def test_directions_are_packed_alone_and_long_pairs_left_out(
  script, tmp_path, monkeypatch
):
  lines = [f"a house of {n} rooms\tein Haus mit {n}" for n in range(300)]
  lines[7] = "a " * 60 + "\tlang"
  data = tmp_path / "houses"
  data.mkdir()
  for split, found in {"train": lines, "dev": lines[:5]}.items():
    (data / f"en-de.{split}.tsv").write_text("\n".join(found))
  monkeypatch.setenv("BASEMT_CACHE", str(tmp_path / "cache"))
  command = f"runs.py prepare --data {data} --store {tmp_path / 'store'}"
  command += " --vocab_size 300 --length 32 --only *-en --long_pairs drop"
  monkeypatch.setattr("sys.argv", command.split())
  script("study.runs").main()
  store = script("study.runs").row_store.RowStore(tmp_path / "store")
  assert [str(d) for d in store.directions] == ["de-en"]
  assert store.pairs("train").tolist() == [299]
