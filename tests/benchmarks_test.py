"""WMT-15, ML-50, OPUS-100 as mixtures, SeqIO's cache; the measurements.

The measurements of `benchmarks/` run here for what they compute, not for times.
"""

import dataclasses
import gzip
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import seqio
import simulated
import tensorflow_datasets as tfds
import toy

import gin
from basemt_jax import cli, heating, sampling, steps
from basemt_jax.data import mixtures, store_building, task_cache
from tasks import ml50, opus100, wmt15

pytestmark = pytest.mark.usefixtures("registries")

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / "tasks/cldr.model"
BENCHMARKS = {"wmt15": 15, "ml50": 51, "opus100": 99}
LENGTHS = {"inputs": 32, "targets": 32}
# Shares at T = 1, 2, 5 in %, as published sizes give them.
SHARES = {
  "cs": (32.09, 20.05, 11.63),
  "de": (2.25, 5.31, 6.83),
  "gu": (0.08, 0.99, 3.49),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Czech and Gujarati with English; sharded, and tests of one direction."""
  folder = tmp_path_factory.mktemp("data") / "wmt15"
  folder.mkdir()
  lines = [f"{i} apples\tjablek {i}\n" for i in range(300)]
  for shard in (0, 1):
    name = f"en-cs.train-0000{shard}-of-00002.tsv.gz"
    text = "".join(lines[shard::2])
    (folder / name).write_bytes(gzip.compress(text.encode()))
  (folder / "en-gu.train.tsv").write_text("".join(lines[:40]))
  (folder / "en-cs.test.tsv").write_text("one\tjeden\n")
  (folder / "cs-en.test.tsv").write_text("dva\ttwo\n")
  shutil.copy(MODEL, folder / "vocabulary.model")
  return folder


def run_python(code, **environment):
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def test_all_are_registered_and_nothing_is_read(tmp_path):
  """Neither a folder that is not there nor a broken one matters."""
  (tmp_path / "ml50").mkdir()
  (tmp_path / "ml50/en-de.train.tsv.gz").write_bytes(b"broken")
  code = """
import json, seqio, tasks
print(json.dumps({m: len(seqio.MixtureRegistry.get(m).tasks)
                  for m in seqio.MixtureRegistry.names()}))
"""
  found = json.loads(run_python(code, BASEMT_DATA_DIR=str(tmp_path)))
  for name, languages in BENCHMARKS.items():
    languages = 1 if name == "ml50" else languages  # As the folder is named.
    assert found[name] == 2 * languages
    for way in ("from_english", "to_english"):
      assert found[f"{name}_{way}"] == languages
  assert found["wmt15_tfds"] == 30


def test_sizes_are_those_published(monkeypatch):
  monkeypatch.setenv("BASEMT_DATA_DIR", "/nowhere")
  mixture = wmt15.mixture()
  assert mixture.num_input_examples("train") == 2 * 200_499_032
  sizes = {
    mixtures.direction_or_name(t.name): mixture.get_rate(t)
    for t in mixture.tasks
  }
  assert sizes == wmt15.sizes()
  to_english = seqio.get_mixture_or_task("wmt15_to_english").tasks
  pairs = [sizes[mixtures.direction_or_name(t.name)] for t in to_english]
  shares = 100 * heating.mixing_rates(pairs, [1, 2, 5])
  names = [mixtures.direction_or_name(t.name)[:2] for t in to_english]
  for language, expected in SHARES.items():
    found = shares[:, names.index(language)]
    np.testing.assert_allclose(found, expected, atol=0.006)


def test_given_and_counted_sizes_give_rates_the_same_way():
  directions = sorted(wmt15.sizes())
  published = [wmt15.sizes()[name] for name in directions]
  schedule = heating.linear(1, 5, 100)
  counted = sampling.Strategy(schedule).plan(
    directions, published, published, 8
  )
  here = np.arange(1, 31)  # A small sample of the data.
  given = sampling.Strategy(schedule, sizes=wmt15.sizes()).plan(
    directions, here, here, 8
  )
  steps = np.arange(0, 120, 7)
  np.testing.assert_allclose(given.pair_rates(steps), counted.pair_rates(steps))


def test_a_folder_has_some_of_the_languages(folder, tmp_path):
  mixture = wmt15.mixture(folder)
  sizes = {t.name: mixture.get_rate(t) for t in mixture.tasks}
  assert sizes == {
    "wmt15.cs_en": 300,
    "wmt15.en_cs": 300,
    "wmt15.en_gu": 40,
    "wmt15.gu_en": 40,
  }
  from_english = seqio.get_mixture_or_task("wmt15_from_english")
  assert [t.name for t in from_english.tasks] == ["wmt15.en_cs", "wmt15.en_gu"]
  store = store_building.ensure_store("wmt15", LENGTHS, tmp_path)
  assert store.directions == ("cs-en", "en-cs", "en-gu", "gu-en")
  assert store.pairs("train").tolist() == [300, 300, 40, 40]
  tests = {
    d: [x["source"] for x in store.texts("test", d)] for d in ("cs-en", "en-cs")
  }
  assert tests == {"cs-en": ["dva"], "en-cs": ["one"]}
  with pytest.raises(ValueError, match="has none of the languages of ml50"):
    (tmp_path / "en-xx.train.tsv").write_text("a\tb\n")
    ml50.mixture(tmp_path)


def test_by_name_with_the_folder_from_the_environment(folder, tmp_path):
  code = f"""
import tasks
from basemt_jax.data import store_building
store = store_building.ensure_store("wmt15.en_cs", {LENGTHS}, {str(tmp_path)!r})
print(store.pairs("train").tolist())
"""
  out = run_python(code, BASEMT_DATA_DIR=str(folder.parent))
  assert out.splitlines()[-1] == "[300]"


def test_missing_data_and_vocabulary_are_explained(monkeypatch, tmp_path):
  monkeypatch.setenv("BASEMT_DATA_DIR", str(tmp_path))
  opus100.mixture()
  message = "opus100 is not in .*: prepare it with `basemt prepare opus100`"
  with pytest.raises(ValueError, match=message):
    store_building.ensure_store("opus100", LENGTHS, tmp_path / "cache")
  (tmp_path / "opus100").mkdir()
  (tmp_path / "opus100/en-af.train.tsv").write_text("a\tb\n")
  opus100.mixture()
  with pytest.raises(ValueError, match="train it with `basemt vocab --module"):
    store_building.ensure_store("opus100.en_af", LENGTHS, tmp_path / "cache")


def test_tfds_text_is_tagged():
  """The builder's own features, with made-up content for the download."""
  with tfds.testing.mock_data(num_examples=4):
    task = seqio.TaskRegistry.get("wmt15_tfds.fr_en")
    source = task.source.get_dataset("train", shuffle=False)
    raw = list(source.as_numpy_iterator())
    tagged = task.preprocessors[0](source).as_numpy_iterator()
    for texts, example in zip(raw, tagged, strict=True):
      assert set(texts) == {"en", "fr"}
      assert example["inputs"] == b"<2en> " + texts["fr"]
      assert example["targets"] == texts["en"]
  assert task.source.splits == ("train", "validation", "test")


# ------------------------------------------------------------------ cache


def _examples(name, seed=None, split="train", use_cached=False):
  dataset = seqio.get_dataset(
    name,
    LENGTHS,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
    dataset_split=split,
    use_cached=use_cached,
    shuffle=seed is not None,
    seed=seed,
    num_epochs=1,
  )
  return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("seed", [None, 3])
def test_cached_tasks_give_the_live_batches(
  folder, tmp_path, seed, monkeypatch
):
  wmt15.mixture(folder)
  live = _examples("wmt15.en_cs", seed)
  folders = task_cache.cache_mixture("wmt15_from_english", tmp_path)
  assert [f.name for f in folders] == ["wmt15.en_cs", "wmt15.en_gu"]
  wmt15.mixture(folder)  # Tasks that have not looked for a cache yet.
  before = seqio.get_global_cache_dirs()
  seqio.set_global_cache_dirs([str(tmp_path)])
  try:
    # Nothing is read but the cache.
    monkeypatch.setattr(
      seqio.TaskRegistry.get("wmt15.en_cs").source, "get_dataset", None
    )
    cached = _examples("wmt15.en_cs", seed, use_cached=True)
    tests = _examples("wmt15.en_cs", split="test", use_cached=True)
  finally:
    seqio.set_global_cache_dirs(before)
  assert len(cached) == len(live) > 5 and len(tests) == 1
  for a, b in zip(live, cached, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_command_writes_the_cache(folder, tmp_path, capsys):
  arguments = ["cache", "--gin_file=gin/models/tiny.gin"]
  arguments += [f"--gin_file=gin/recipes/{x}.gin" for x in ("base", "wmt15")]
  arguments += [f"--gin.DATA_DIR={folder}", "--gin.VOCABULARY=bytes"]
  arguments += ["--gin.MODEL_DIR=unused", f"--seqio_dir={tmp_path}"]
  try:
    assert cli.main(arguments) == 0
  finally:
    gin.clear_config()
  assert capsys.readouterr().out == f"{tmp_path}: 4 tasks\n"
  assert len(list(tmp_path.glob("wmt15.*/COMPLETED"))) == 4


def test_a_cache_is_finished_once_and_of_one_source(folder, tmp_path):
  own = tmp_path / "own"
  shutil.copytree(folder, own)
  wmt15.mixture(own)
  task = seqio.TaskRegistry.get("wmt15.en_gu")
  done = task_cache.cache_task(task, tmp_path / "cache")
  content = {p.name: p.read_bytes() for p in done.iterdir()}
  stats = json.loads(content["stats.train.json"])
  assert stats["examples"] == 40 and stats["targets_max_tokens"] > 0
  # Interrupted before the end, it is completed.
  (done / "COMPLETED").unlink()
  (done / "info.train.json").unlink()
  task_cache.cache_task(task, tmp_path / "cache")
  assert {p.name: p.read_bytes() for p in done.iterdir()} == content
  with open(own / "en-gu.train.tsv", "a") as file:
    file.write("more\ttext\n")
  wmt15.mixture(own)
  task = seqio.TaskRegistry.get("wmt15.en_gu")
  with pytest.raises(ValueError, match="was cached from other data"):
    task_cache.cache_task(task, tmp_path / "cache")


# ----------------------------------------------------------- measurements


@pytest.fixture
def script(monkeypatch):
  """Imports a script of `benchmarks/`."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_synthetic_rows_are_padded_as_real_ones(script):
  rows = script("training_step").batch(3, 32, 0, 100)
  for name in ("input_tokens", "segment_ids", "positions"):
    assert not rows[f"decoder_{name}"][:, 30:].any()
    assert rows[f"encoder_{name}"][:, 30:].all()
  is_real = np.arange(32)[None] < 30
  targets = rows["decoder_target_tokens"]
  np.testing.assert_array_equal(targets > 0, np.tile(is_real, (3, 1)))
  np.testing.assert_array_equal(rows["decoder_loss_weights"], targets > 0)
  # Targets shifted within each of four segments.
  inputs = rows["decoder_input_tokens"].reshape(3, 4, 8)
  assert not inputs[:, :, 0].any()
  expected = targets.reshape(3, 4, 8)[:, :, :-1]
  shown = rows["decoder_segment_ids"].reshape(3, 4, 8)[:, :, 1:] > 0
  np.testing.assert_array_equal(inputs[:, :, 1:], expected * shown)


def test_time_of_kernels_beside_others(script):
  """Spans by hand; ns. Two streams, one kernel inside of another."""
  trace = script("device_trace").Trace(
    [
      ("ncclSendRecv", "", 0e6, 10e6),
      ("gemm", "", 4e6, 4e6),
      ("copy", "", 7e6, 4e6),
      ("other", "all-reduce.1", 9e6, 2e6),
      ("ncclSendRecv", "", 20e6, 1e6),
    ]
  )
  found = trace.overlaps(
    {"exchange": "SendRecv", "sum": "all-reduce", "none": "nothing"}
  )
  # 0 to 10 and 20 to 21, of which others run 4 to 10; 9 to 11.
  assert found == {
    "exchange": (11.0, 6.0, 2),
    "sum": (2.0, 2.0, 1),
    "none": (0.0, 0.0, 0),
  }


def test_table_joins_what_the_scripts_wrote(script, tmp_path):
  """Figures written by hand; one device, network and batch is one row."""
  h100 = "NVIDIA H100 80GB HBM3"
  size = {"blocks": 6, "rows": 64}
  step = {**size, "ms": 52.04, "mfu": 0.41804, "tokens_per_s": 1261000}
  memory = {"peak": None, "planned": 13 * 2**30}
  figures = [{**step, "model": "dense", "memory": memory}]
  ours = {"device": h100, "devices": 2, "width": 1024, "figures": figures}
  ours["moments"] = "float32"
  theirs = {**step, "width": 1024, "first_step_s": 40.3, "peak_gib": 14.4}
  first = {**size, "width": 1024, "total": 60.0, "import": 3.0, "device": 2.5}
  first |= {"step": 60.04, "mfu": 0.36249, "tokens_per_s": 546000}
  first |= {"moments": "float32", "memory": 20 * 2**30}
  rounded = {**first, "moments": "bfloat16", "memory": None}
  small = {**first, "expert_moments": "by_neuron"}
  lines = [
    f"big cold {h100} {json.dumps({**first, 'experts': 0})}",
    f"big warm {h100} {json.dumps({**first, 'experts': 0, 'total': 9.0})}",
    f"big_sparse cold {h100} {json.dumps({**first, 'experts': 32})}",
    f"rounded cold {h100} {json.dumps({**rounded, 'experts': 32})}",
    f"small cold {h100} {json.dumps({**small, 'experts': 32})}",
  ]
  files = {
    "large.json": json.dumps(ours),
    "theirs.json": json.dumps({"torch": "2", "device": h100, "rows": [theirs]}),
    "first.txt": "\n".join(lines),
  }
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  found = script("training_table").table(sorted(tmp_path.iterdir()))
  head, own = "| H100 | 1024 | 6 | 64 |", "52.0 | 630,500 | 0.418 | 13.0"
  assert found.splitlines()[2:] == [
    f"{head} PyTorch, dense | 52.0 | 1,261,000 | 0.418 | 14.4 | 40.3 |",
    f"{head} dense | {own} | 54.5 |",
    f"{head} sparse | 60.0 | 546,000 | 0.362 | 20.0 | 54.5 |",
    f"{head} sparse, bfloat16 moments | 60.0 | 546,000 | 0.362 | - | 54.5 |",
    f"{head} sparse, small experts | 60.0 | 546,000 | 0.362 | 20.0 | 54.5 |",
  ]


def test_a_step_is_measured(script):
  """The smallest network: only that the measurement fits the trainer."""
  training_step = script("training_step")
  found = training_step.compiled(toy.DENSE, toy.mesh(), rows=4, length=8)
  assert found.seconds > 0 and found.bytes > 0
  peaks = training_step.first_steps({"toy": found}, {"toy": 4}, 8)
  assert peaks.keys() == {"toy"}
  seconds = training_step.times({"toy": found}, 4, 8, 1)
  assert len(seconds["toy"]) == 1


def test_figures_of_steps_that_are_not_finite_are_refused(script):
  training_step = script("training_step")
  sums = {
    "loss": np.array([np.nan, 1.0]),
    "weight": np.ones(2),
    "grad_norm": np.float32(np.inf),
    "bad_step": np.int32(steps.NEVER),
  }
  training_step.check_finite("dense", sums)
  sums["bad_step"] = np.int32(7)
  message = (
    "dense: loss nan and gradient norm inf of step 7 are not both finite"
  )
  with pytest.raises(SystemExit, match=message):
    training_step.check_finite("dense", sums)


@pytest.mark.slow
def test_two_devices_do_what_one_does(tmp_path):
  """The whole measurement of several devices, on two simulated ones."""
  out = tmp_path / "devices.json"
  flags = "--width 64 --length 32 --vocabulary 384 --experts 4 --rows 16"
  flags += f" --blocks 3 --check_width 64 --repeats 1 --steps 4 --json {out}"
  subprocess.run(
    [sys.executable, "benchmarks/devices.py", *flags.split()],
    cwd=ROOT,
    env={
      **os.environ,
      "PYTHONPATH": ".",
      "XLA_FLAGS": simulated.xla_flags(devices=2),
    },
    check=True,
  )
  found = json.loads(out.read_text())
  assert [(r["devices"], r["model"]) for r in found["speed"]] == [
    (devices, name) for devices in (1, 2) for name in ("dense", "experts")
  ]
  assert all(r["tokens_per_s"] > 0 for r in found["speed"])
  equality = found["equality"]
  assert equality["tokens_with_another_expert"] == 0
  # 32 rows, 32 source and 30 target tokens.
  assert equality["tokens_routed"] == 32 * (32 + 30)
  assert equality["loss_difference"] < 1e-5
  assert equality["gradient_difference_worst"] < 1e-4
  assert equality["curve_difference_before"] < 1e-5
  # There and back, forward and backward, in two layers; half goes away.
  (split,) = {
    tuple(c["split_bytes"]) for c in found["exchanges"]["all_to_alls"]
  }
  slots = 16 * 32  # a device's tokens, for all experts
  assert len(found["exchanges"]["all_to_alls"]) == 8
  assert found["exchanges"]["equal_splits"]
  assert split == (slots * 64 * 4 // 2,) * 2


def small_tatoeba(folder):
  """Three languages with English: two of many pairs, one of few are taken."""
  folder.mkdir()
  for number, language in enumerate(("de", "fr", "es")):
    rows = [
      f"{i} apples on a tree\t{i} {language}{number} are on it"
      for i in range(120)
    ]
    for split, part in (
      ("train", rows[40:]),
      ("dev", rows[:20]),
      ("test", rows[20:40]),
    ):
      text = "".join(f"{row}\n" for row in part)
      (folder / f"en-{language}.{split}.tsv").write_text(text)
  return folder


PREPARE = ["--high", "de=60", "fr=50", "--low", "es=20", "--mono=30"]
PREPARE.append("--vocab_size=320")


def run_synthesis(script, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["synthesis.py", *map(str, arguments)])
  script("synthesis").main()


def test_synthesis_keeps_pairs_and_monolingual_text_apart(
  script, tmp_path, monkeypatch, capsys
):
  data, work = small_tatoeba(tmp_path / "data"), tmp_path / "work"
  flags = ("--data", data, "--work", work, *PREPARE)
  run_synthesis(script, monkeypatch, "prepare", *flags)
  with gzip.open(work / "data/en-es.train.tsv.gz", "rt") as file:
    pairs = [line.rstrip("\n").split("\t") for line in file]
  with gzip.open(work / "mono/es.txt.gz", "rt") as file:
    alone = file.read().splitlines()
  assert len(pairs) == 20 and len(alone) == 30
  assert not {own for _, own in pairs} & set(alone)
  assert not (work / "mono/de.txt.gz").exists()
  # A system that copies the references beside one that says nothing of use.
  references = [f"{i} es2 are on it" for i in range(20, 40)]
  for name, hypotheses in (
    ("sparse", [f"{i} fr1 is under that" for i in range(40, 60)]),
    ("sparse_bt", references),
  ):
    scores = {"band": "low", "bleu": 1.0, "chrf": 2.0, "hypotheses": hypotheses}
    found = {"step": 5, "beams": {"1": {"en-es": scores}}}
    (work / f"{name}.json").write_text(json.dumps(found))
  capsys.readouterr()
  run_synthesis(script, monkeypatch, "report", "--work", work)
  row = "| low, from English | 1 | 1.00 | 1.00 | 2.00 | 2.00 | 1, 0 |"
  assert row in capsys.readouterr().out


@pytest.mark.slow
def test_synthesis_at_toy_size(script, tmp_path, monkeypatch, capsys):
  """All four systems, that is: the whole way from pairs to the table."""
  data, work = small_tatoeba(tmp_path / "texts"), tmp_path / "work"
  flags = ("--data", data, "--work", work, *PREPARE)
  run_synthesis(script, monkeypatch, "prepare", *flags)
  module = script("synthesis")
  monkeypatch.setattr(
    module, "SEARCH", dataclasses.replace(module.SEARCH, batch_size=16)
  )
  size = "train_steps=4 evaluations=2 emb_dim=32 head_dim=16 blocks=2"
  size += " num_experts=2 batch_size=8 rows_per_group=1 warmup_steps=1"
  flags = ("--work", work, "--size", *size.split())
  run_synthesis(script, monkeypatch, "run", *module.SYSTEMS, *flags)
  capsys.readouterr()
  run_synthesis(script, monkeypatch, "report", "--work", work)
  table = capsys.readouterr().out
  assert table.count("| all | 6 |") == 4  # Two comparisons, two beams.
