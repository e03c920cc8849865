"""Inspections: every number against a count of its own."""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import seqio
import toy

import gin
from basemt_jax import (
  cli,
  evaluation,
  heating,
  layers,
  metrics,
  partitioning,
  sampling,
  training,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax import trained as trained_lib
from basemt_jax.data import batches, mixtures, row_store, store_building
from basemt_jax.data import vocabulary as vocabulary_lib
from basemt_jax.inspection import (
  forecasting,
  results,
  run_report,
  run_view,
  text_report,
  token_counts,
)
from tasks import common

MODEL = pathlib.Path(mixtures.__file__).parents[2] / "tasks" / "cldr.model"
LENGTHS = {"inputs": 20, "targets": 16}
BANDS = evaluation.BandThresholds(high=100, low=50)


@pytest.fixture(autouse=True)
def _registries():
  """Every test registers what it needs, and leaves nothing."""
  names = {
    registry: set(registry.names())
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry)
  }
  yield
  gin.clear_config()
  for registry, before in names.items():
    for name in set(registry.names()) - before:
      registry.remove(name)


# ------------------------------------------------------------------- text

# Ogham is in no vocabulary: its characters become three bytes each.
_WORDS = ["one", "two", "three", "hundred", "June", "zwölf", "ᚁᚂ", "Freitag"]


def _pair(i):
  words = [_WORDS[(i * k) % len(_WORDS)] for k in range(1, 3 + i * 7919 % 23)]
  return " ".join(words), " ".join(words[::-2]) + f" {i}"


def _planted():
  """Splits of a direction, with trouble in known places."""
  train = [_pair(i) for i in range(120)]
  train[10:14] = train[3:7]  # Four repeats.
  train[20] = train[3]  # And one more.
  train[30] = ("same as before", "same as before")
  train[31] = ("the same ", "the same")
  train[40] = ("", "something")
  dev = [_pair(i) for i in range(1000, 1030)]
  dev[0], dev[1] = train[50], train[51]
  dev[2] = (train[52][0], "another target")
  test = [_pair(i) for i in range(2000, 2020)]
  test[5] = ("another source", train[60][1])
  return {"train": train, "validation": dev, "test": test}


def _register(name, splits, vocabulary):
  return common.add_direction(
    "planted",
    *name.split("-"),
    splits.__getitem__,
    {split: len(pairs) for split, pairs in splits.items()},
    vocabulary.seqio(),
  )


@pytest.fixture
def planted():
  """A mixture of two directions, and their texts."""
  pieces = vocabulary_lib.Vocabulary.load(MODEL)
  splits = {"en-de": _planted()}
  # The other way round, without its test split, and shorter.
  splits["de-en"] = {
    split: [pair[::-1] for pair in splits["en-de"][split]][:70]
    for split in ("train", "validation")
  }
  for name, own in splits.items():
    _register(name, own, pieces)
  seqio.MixtureRegistry.add(
    "planted", [("planted.en_de", 1), ("planted.de_en", 1)]
  )
  return splits


def _inspect(mixture="planted", sample=None, **options):
  return text_report.inspect_data(
    mixture, text_report.Options(LENGTHS, sample, bands=BANDS, **options)
  )


def _found(data, name):
  return next(d for d in data.directions if d.name == name)


@pytest.fixture
def pieces():
  return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def test_lengths_and_tokens_are_those_of_the_vocabulary(planted, pieces):
  """Counted again with SentencePiece alone."""
  data = _inspect()
  for name, splits in planted.items():
    direction = _found(data, name)
    target_language = name.split("-")[1]
    for side, tag, limit, texts in (
      (
        direction.source,
        f"<2{target_language}> ",
        LENGTHS["inputs"],
        [s for s, _ in splits["train"]],
      ),
      (
        direction.target,
        "",
        LENGTHS["targets"],
        [t for _, t in splits["train"]],
      ),
    ):
      ids = [pieces.encode(tag + text) for text in texts]
      lengths = [len(own) + 1 for own in ids]  # And EOS.
      assert side.longest == max(lengths)
      assert side.mean == pytest.approx(np.mean(lengths))
      assert side.median == np.median(lengths)
      below = [n for n in lengths if n <= side.p95]
      assert len(below) >= 0.95 * len(lengths)
      assert len([n for n in lengths if n < side.p95]) < 0.95 * len(lengths)
      assert side.truncated == np.mean([n > limit for n in lengths])
      plain = [i for text in texts for i in pieces.encode(text)]
      is_byte = list(map(pieces.is_byte, plain))
      assert side.bytes == pytest.approx(sum(is_byte) / len(plain))
      assert side.bytes > 0.01  # Ogham was found.
      assert side.unknown == 0
      assert side.characters == sum(map(len, texts))
      assert side.tokens == sum(map(len, map(pieces.encode, texts)))
      assert side.altered == np.mean(
        [
          pieces.decode(own) != tag + t
          for own, t in zip(ids, texts, strict=True)
        ]
      )
      edges = [0, *token_counts.BINS, max(lengths) + token_counts.BINS[-1]]
      assert list(side.histogram) == [
        sum(low < n <= high for n in lengths)
        for low, high in itertools.pairwise(edges)
      ]


def test_repeats_copies_empty_sides_and_overlap_are_found(planted):
  data = _inspect()
  there = _found(data, "en-de")
  assert (there.pairs, there.looked_at, there.is_whole) == (120, 120, True)
  assert (there.duplicates, there.copied, there.empty) == (5, 2, 1)
  assert there.band == "high" and _found(data, "de-en").band == "mid"
  train = planted["en-de"]["train"]
  for held_out in there.held_out:
    own = planted["en-de"][held_out.split]
    assert held_out.pairs == held_out.looked_at == len(own)
    assert held_out.pairs_seen == sum(pair in train for pair in own)
    assert held_out.sources_seen == sum(
      s in {a for a, _ in train} for s, _ in own
    )
    assert held_out.targets_seen == sum(
      t in {b for _, b in train} for _, t in own
    )
  assert [h.pairs_seen for h in there.held_out] == [2, 0]
  assert [h.split for h in _found(data, "de-en").held_out] == ["validation"]
  text = "\n".join(data.warnings)
  assert "held-out pairs are training pairs: en-de (validation) 6.67%" in text
  assert "empty side: de-en 1.43%, en-de 0.833%" in text
  assert "tokens are single bytes" in text and "no dev set" not in text


def test_a_sample_is_the_beginning_and_says_so(planted):
  data = _inspect(sample=15)
  for name, repeats in (("en-de", 4), ("de-en", 4)):
    direction = _found(data, name)
    assert direction.looked_at == 15 and not direction.is_whole
    assert direction.pairs == len(planted[name]["train"])
    assert direction.duplicates == repeats
    held_out = direction.held_out[0]
    assert (held_out.pairs, held_out.looked_at) == (30, 15)
  exactly = _found(_inspect(sample=120), "en-de")
  assert exactly.looked_at == 120 and exactly.is_whole


def test_examples_are_texts_tags_pieces_and_texts_again(planted, pieces):
  direction = _found(_inspect(examples=3), "de-en")
  assert len(direction.examples) == 3
  train = planted["de-en"]["train"]
  assert len({source.text for source, _ in direction.examples}) == 3
  for source, target in direction.examples:
    assert (source.text, target.text) in train
    assert source.tagged == f"<2en> {source.text}"
    ids = [*pieces.encode(source.tagged), 1]
    assert list(source.pieces) == [pieces.id_to_piece(i) for i in ids]
    cut = ids[: LENGTHS["inputs"] - 1] if len(ids) > LENGTHS["inputs"] else ids
    assert source.decoded == pieces.decode([i for i in cut if i != 1])


def test_languages_add_up_over_directions(planted, pieces):
  data = _inspect()
  texts = {"en": [], "de": []}
  for name, splits in planted.items():
    for language, side in zip(name.split("-"), (0, 1), strict=True):
      texts[language] += [pair[side] for pair in splits["train"]]
  assert {x.name for x in data.languages} == {"en", "de"}
  for language in data.languages:
    own = texts[language.name]
    characters = sum(map(len, own))
    tokens = sum(len(pieces.encode(text)) for text in own)
    assert (language.characters, language.tokens) == (characters, tokens)
    assert language.tokens_per_character == pytest.approx(tokens / characters)


THEIRS = """
import functools
import seqio
import tensorflow as tf

def split(dataset):
  def parts(line):
    own = tf.strings.split(line, "\\t")
    return {"inputs": "translate: " + own[0], "targets": own[1]}
  return dataset.map(parts)

def shout(dataset, output_features):
  '''Tokenises in its own way.'''
  piece = output_features["inputs"].vocabulary
  return dataset.map(lambda x: {
    k: tf.concat([piece.encode_tf(tf.strings.upper(x[k])), [1]], 0)
    for k in ("inputs", "targets")})

BYTES = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
PIECES = seqio.Feature(seqio.SentencePieceVocabulary(MODEL), add_eos=True)
for name, steps, feature in (
  ("corpus_v1", [seqio.preprocessors.tokenize,
                 seqio.preprocessors.append_eos], PIECES),
  ("corpus.de_en", [shout], BYTES),
  ("other.de_en", [seqio.preprocessors.tokenize_and_append_eos], BYTES),
):
  seqio.TaskRegistry.add(
    name,
    source=seqio.TextLineDataSource({"train": FILE, "dev": FILE}),
    preprocessors=[split, *steps],
    output_features={"inputs": feature, "targets": feature},
  )
seqio.MixtureRegistry.add(
  "theirs", ["corpus_v1", "corpus.de_en", "other.de_en"], default_rate=1)
"""


def test_tasks_of_anyone_are_inspected(tmp_path, monkeypatch, capsys):
  """No tags, no sizes, names without languages, vocabularies that differ."""
  file = tmp_path / "lines.tsv"
  lines = [f"hallo {i}\tgood day {i}" for i in range(30)]
  file.write_text("\n".join(lines) + "\n", encoding="utf-8")
  source = THEIRS.replace("MODEL", repr(str(MODEL)))
  (tmp_path / "their_tasks.py").write_text(
    source.replace("FILE", repr(str(file)))
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  command = ["inspect", "--module", "their_tasks", "--traceback"]
  command += ["--json", "out.json", "--html", "out.html"]
  assert cli.main([*command, "--mixture", "theirs", "--lengths", "30,11"]) == 0
  data = json.loads((tmp_path / "out.json").read_text())["task"]
  found = {d["name"]: d for d in data["directions"]}
  assert set(found) == {"corpus_v1", "corpus.de_en", "other.de_en"}
  for direction in found.values():
    assert direction["pairs"] == direction["looked_at"] == 30
    assert direction["duplicates"] == 0
    (held_out,) = direction["held_out"]
    assert (held_out["pairs"], held_out["pairs_seen"]) == (30, 30)
  # 11 characters of 'translate: ', 7 or 8 of the text, and EOS.
  for name in ("corpus.de_en", "other.de_en"):
    assert found[name]["source"]["longest"] == 11 + 8 + 1
    assert found[name]["target"]["truncated"] == pytest.approx(20 / 30)
    assert found[name]["source"]["bytes"] is None
  source, _ = found["corpus.de_en"]["examples"][0]
  assert source["text"].startswith("TRANSLATE: HALLO")
  assert source["pieces"][-1] == "</s>"
  shown = capsys.readouterr().out
  assert "looked at the first 2,000 pairs of every split: 90" in shown
  page = (tmp_path / "out.html").read_text(encoding="utf-8")
  assert "corpus.de_en" in page
  assert cli.main([*command, "--task", "corpus.de_en", "--full"]) == 0
  data = json.loads((tmp_path / "out.json").read_text())["task"]
  assert [d["name"] for d in data["directions"]] == ["corpus_v1"] or [
    d["task"] for d in data["directions"]
  ] == ["corpus.de_en"]


def test_what_cannot_be_inspected_is_told(tmp_path, capsys):
  feature = seqio.Feature(seqio.ByteVocabulary())
  seqio.TaskRegistry.add(
    "only.targets",
    source=common.PairSource(lambda split: iter([]), {"train": 0}),
    preprocessors=[],
    output_features={"targets": feature},
  )
  with pytest.raises(ValueError, match=r"'only\.targets' has features targets"):
    _inspect("only.targets")
  with pytest.raises(ValueError, match="no mixture or task named 'planned'"):
    _inspect("planned")
  for arguments, message in (
    ([], "nothing to inspect: give --mixture"),
    (["--mixture", "x", "--view", "mixture"], "--view mixture needs a run"),
    (["--mixture", "x", "--lengths", "9"], "write two numbers of tokens"),
    (["--mixture", "x", "--sample", "0"], "look at 1 pair at least"),
  ):
    assert cli.main(["inspect", *arguments]) == 1
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- mixture

HEATED = sampling.Strategy(heating.linear(1.0, 5.0, 60))


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
    BANDS,
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
  train = [_pair(i) for i in range(3000)]
  pieces = vocabulary_lib.Vocabulary.load(MODEL)
  task = _register("en-fr", {"train": train, "validation": train[:7]}, pieces)
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


# -------------------------------------------------------------------- run


class _Jsonl:
  """A writer as the command's, without TensorBoard."""

  def __init__(self, path):
    self._path = path

  def write_scalars(self, step, scalars):
    with open(self._path, "a") as file:
      file.write(json.dumps({"step": step, **scalars}) + "\n")

  def flush(self):
    pass


def _silent():
  return run_lib.SILENT


def _train(directory, dense_steps=0):
  """A run of 4 steps."""
  run = run_lib.Run(
    str(directory / "model"),
    "not looked at",
    {"inputs": 32, "targets": 24},
    functools.partial(dataclasses.replace, toy.SPARSE),
    toy.settings(4, dense_steps=dense_steps, eval_every=2, metrics=(toy.REAL,)),
    8,
    sampling.Strategy(heating.linear(1.0, 5.0, 4)),
    store_dir=toy.write_store(directory / "store"),
    bands=BANDS,
  )
  (directory / "model").mkdir()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
    writer = _Jsonl(directory / "model" / "metrics.jsonl")
    assert training.train(run, writer, _silent()) == "done"
  return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return _train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(trained):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
    return run_report.inspect_run(trained, _silent())


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


@pytest.mark.parametrize("expert", [1, 4])
def test_a_model_is_loaded_in_the_type_it_multiplies_in(
  trained, expert, monkeypatch
):
  """The rounded parameters of float32, and the same dev losses."""
  mesh = toy.mesh(expert=expert)
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: mesh)
  full = trained_lib.load(trained, _silent())
  half = functools.partial(dataclasses.replace, toy.SPARSE, dtype="bfloat16")
  loaded = trained_lib.load(
    dataclasses.replace(trained, network=half), _silent()
  )
  expected = layers.rounded(full.variables["params"], "bfloat16")

  def check(path, x, y):
    assert x.dtype == y.dtype and x.sharding == y.sharding, path
    np.testing.assert_array_equal(x, y)

  jax.tree.map_with_path(check, loaded.variables["params"], expected)
  assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(expected))
  batch = next(batches.eval_batches(loaded.store, "validation", 8))
  batch = partitioning.put_batch(batch, mesh)
  kept = {**loaded.variables, "params": full.variables["params"]}
  losses = [
    jax.device_get(loaded.program.eval_step(v, batch)["nll"])
    for v in (loaded.variables, kept)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-7)


def test_expert_maps_count_where_tokens_go(trained, one_device):
  """Against the model applied outside of any program, counted in Python."""
  loaded = trained_lib.load(trained, _silent())
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
  report = run_report.inspect_run(bare, _silent())
  assert len(report.warnings) == 2 and len(report.experts) == 2
  assert all(d.drawn_rows is None for d in report.directions)
  assert not report.curves and not report.routers
  titles = [t.title for t in run_view.section(report).tables]
  assert "Directions until step 4" in titles


@pytest.mark.slow
def test_a_run_that_was_converted(one_device, tmp_path):
  run = _train(tmp_path, dense_steps=2)
  report = run_report.inspect_run(run, _silent())
  assert (report.phase, report.conversion_step) == ("sparse", 2)
  assert len(report.experts) == 2
  assert all(r.steps == [4] for r in report.routers)
  section = run_view.section(report)
  assert "dense until step 2, then sparse" in section.summary[0]
  curves = [chart for plot in section.plots[1:3] for chart in plot.charts]
  assert ["conversion" in str(chart) for chart in curves] == [True] * 4
  dense = run_report.inspect_run(run, _silent(), "2")
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


def test_metrics_of_a_run_that_was_killed(tmp_path):
  """Steps that were done again count once."""
  lines = [
    {"step": 2, "loss": 5.0, "target_tokens/a": 10},
    {"step": 2, "dev/loss": 4.5},
    {"step": 4, "loss": 4.0, "target_tokens/a": 20},
    {"step": 6, "loss": 3.0, "target_tokens/a": 30},
    {"step": 6, "dev/loss": 2.5},
    # Killed, and on from checkpoint_3.
    {"step": 4, "loss": 4.1, "target_tokens/a": 21},
    {"step": 4, "conversion/relative_error": 0.0},
    {"step": 5, "loss": float("nan")},
  ]
  text = "\n".join(map(json.dumps, lines)) + '\n{"step": 6, "lo'
  path = tmp_path / "metrics.jsonl"
  path.write_text(text)
  metrics = results.read_metrics(path)
  assert metrics["target_tokens/a"] == {2: 10, 4: 21}
  assert metrics["dev/loss"] == {2: 4.5}
  assert metrics["conversion/relative_error"] == {4: 0.0}
  assert set(metrics["loss"]) == {2, 4, 5} and metrics["loss"][4] == 4.1
  assert results.read_metrics(tmp_path / "none") == {}
