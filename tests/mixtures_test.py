import os
import pathlib

import numpy as np
import pytest
import scipy.stats
import seqio
import tensorflow as tf

from basemt_jax import checksums, heating, sampling
from basemt_jax.data import (
  heated_mixture,
  mixtures,
  packing,
  row_store,
  store_building,
  subword_sampling,
  task_cache,
)

LENGTHS = {"inputs": 64, "targets": 48}
SIZES = {"en_de": 400, "en_fr": 120, "en_af": 9}
SPLITS = {"train": 1.0, "validation": 0.1, "test": 0.1}
MODEL = pathlib.Path(mixtures.__file__).parents[2] / "tasks" / "cldr.model"
EOS = seqio.preprocessors.append_eos_after_trim


def _text(i):
  return " ".join(f"w{(i * k) % 37}é" for k in range(1, 2 + (i * 7919) % 8))


def _source(size):
  counts = {s: max(1, int(size * share)) for s, share in SPLITS.items()}

  def read(split, shuffle_files, seed=None):
    del shuffle_files, seed
    offset = 10_000 * list(SPLITS).index(split)
    numbers = range(offset, offset + counts[split])
    texts = {
      "inputs": [f"<2xx> {i} {_text(i)}" for i in numbers],
      "targets": [f"{i} {_text(i + 1)}" for i in numbers],
    }
    return tf.data.Dataset.from_tensor_slices(texts)

  return seqio.FunctionDataSource(
    read, splits=list(SPLITS), num_input_examples=counts
  )


def _same(dataset):
  return dataset


def _register(corpus, vocabulary=None, extra=(), sizes=SIZES):
  feature = seqio.Feature(vocabulary or seqio.ByteVocabulary(), add_eos=True)
  for name, size in sizes.items():
    seqio.TaskRegistry.add(
      f"{corpus}.{name}",
      source=_source(size),
      preprocessors=[seqio.preprocessors.tokenize, EOS, *extra],
      output_features={"inputs": feature, "targets": feature},
    )
  return seqio.MixtureRegistry.add(
    corpus, [(f"{corpus}.{name}", size) for name, size in sizes.items()]
  )


@pytest.fixture(autouse=True)
def _registries():
  """Every test registers what it needs, and leaves nothing."""
  tasks = dict(seqio.TaskRegistry._REGISTRY)
  mixes = dict(seqio.MixtureRegistry._REGISTRY)
  yield
  seqio.TaskRegistry._REGISTRY = tasks
  seqio.MixtureRegistry._REGISTRY = mixes


@pytest.fixture
def corpus():
  return _register("corpus")


def _heat(mixture, **options):
  defaults = {"examples_per_step": 20, "total_steps": 300}
  strategy = options.pop("strategy", None) or sampling.Strategy(
    heating.linear(1, 5, 300)
  )
  return heated_mixture.heat(mixture, strategy, **{**defaults, **options})


def _files(directory, pattern="*/*"):
  return {
    str(p.relative_to(directory)): p.read_bytes()
    for p in sorted(directory.glob(pattern))
  }


# ------------------------------------------------------------------ lookup


def test_a_task_that_tells_no_languages_is_refused(corpus):
  _register("other", sizes={"pt_br_en": 5})
  tasks = mixtures.tasks_by_direction("other")
  assert [str(name) for name in tasks] == ["pt_BR-en"]
  _register("third", sizes={"en_fr_ca": 5})
  with pytest.raises(ValueError, match=r"'third.en_fr_ca': direction .* could"):
    mixtures.tasks_by_direction("third")
  assert mixtures.direction_or_name("wmt_t2t_ende") == "wmt_t2t_ende"


def test_unknown_mixture_is_named_with_its_neighbours(corpus):
  with pytest.raises(ValueError, match=r"'corpuss' is registered \(did you me"):
    store_building.build_store("corpuss", LENGTHS, "nowhere")


def test_two_tasks_of_one_direction_are_refused(corpus):
  _register("other", sizes={"en_de": 5})
  both = seqio.Mixture("both", [("corpus.en_de", 1), ("other.en_de", 1)])
  with pytest.raises(ValueError, match=r"'corpus.en_de' and 'other.en_de' bot"):
    mixtures.tasks_by_direction(both)


# ------------------------------------------------------------------- store


def test_store_has_what_the_tasks_have(corpus, tmp_path):
  store = store_building.build_store("corpus", LENGTHS, tmp_path)
  assert store.directions == ("en-af", "en-de", "en-fr")
  assert store.pairs("train").tolist() == [9, 400, 120]
  assert store.pairs("validation").tolist() == [1, 40, 12]
  assert store.vocabulary == "bytes" and store.vocab_size == 259
  assert store.lengths == LENGTHS
  texts = store.texts("test", "en-fr")
  assert texts[3] == {
    "source": f"20003 {_text(20003)}",
    "target": f"20003 {_text(20004)}",
    "tagged_source": f"<2xx> 20003 {_text(20003)}",
  }
  assert store.texts("train", "en-fr") == []


def _seqio_rows(dataset):
  """The same examples through SeqIO's own packing: the oracle."""
  converter = seqio.EncDecFeatureConverter(pack=True)
  return list(converter(dataset, LENGTHS).as_numpy_iterator())


def _assert_same_row(ours, row, theirs):
  assert theirs.keys() == ours.keys() - {"direction"}
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name][row], value, err_msg=name)


def _upper(dataset):
  return dataset.map(lambda x: {**x, "targets": tf.strings.upper(x["targets"])})


def _last_differs(dataset):
  last = f"{SIZES['en_de'] - 1} "
  return dataset.map(
    lambda x: {
      **x,
      "targets": tf.where(
        tf.strings.regex_full_match(x["targets"], f"{last}.*"),
        "other",
        x["targets"],
      ),
    }
  )


@pytest.mark.parametrize("change", [_upper, _last_differs])
def test_what_names_and_stamps_do_not_tell_is_noticed(change, tmp_path, caplog):
  """Another preprocessor, or other data of the same name and number."""

  def registered(extra):
    seqio.TaskRegistry.remove("corpus.en_de")
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    return seqio.TaskRegistry.add(
      "corpus.en_de",
      source=_source(SIZES["en_de"]),
      preprocessors=[*extra, seqio.preprocessors.tokenize, EOS],
      output_features={"inputs": feature, "targets": feature},
    )

  before = store_building.ensure_store(registered([]), LENGTHS, tmp_path)
  rows = _files(before.directory)
  header = before.directory / row_store.HEADER
  made = header.stat().st_mtime_ns
  same = store_building.ensure_store(registered([_same]), LENGTHS, tmp_path)
  assert header.stat().st_mtime_ns == made and not caplog.text
  after = store_building.ensure_store(registered([change]), LENGTHS, tmp_path)
  assert same.directory == before.directory == after.directory
  assert "it is packed again" in caplog.text
  found = _files(after.directory)
  assert found.keys() == rows.keys()
  assert found["train/en-de.rows"] != rows["train/en-de.rows"]


def test_segmentations_of_ids_that_are_not_of_texts_are_refused(tmp_path):
  _register("corpus", seqio.SentencePieceVocabulary(str(MODEL)), [_same])
  with pytest.raises(
    ValueError, match=r"task 'corpus\.en_\w+', which does more"
  ):
    store_building.build_store(
      "corpus",
      LENGTHS,
      tmp_path,
      subwords=subword_sampling.SubwordSampling(0.2),
    )
  assert not list(tmp_path.iterdir())


def test_segmentations_are_drawn_of_seqio_s_tasks(tmp_path):
  vocabulary = seqio.SentencePieceVocabulary(str(MODEL))
  _register("corpus", vocabulary)
  store = store_building.build_store(
    "corpus",
    LENGTHS,
    tmp_path,
    subwords=subword_sampling.SubwordSampling(0.3, 2),
  )
  usual, drawn = (
    store.read_mixed("train", np.array([2]), np.array([0]), version)
    for version in (0, 1)
  )
  assert store.directions[2] == "en-fr"
  texts = []
  for batch in (usual, drawn):
    first = batch["encoder_segment_ids"][0] == 1
    ids = batch["encoder_input_tokens"][0][first].tolist()
    texts.append(vocabulary.decode(ids))
    tag = vocabulary.encode("<2xx>")
    assert ids[: len(tag)] == tag and ids[-1] == vocabulary.eos_id
  assert all(text.startswith("<2xx> ") for text in texts)
  known = {f"<2xx> {i} {_text(i)}" for i in range(SIZES["en_fr"])}
  assert known.issuperset(texts)


@pytest.mark.parametrize("change", [_upper, _last_differs])
def test_a_cache_of_seqio_s_notices_it_too(change, tmp_path):
  def registered(extra):
    seqio.TaskRegistry.remove("corpus.en_de")
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    steps = [*extra, seqio.preprocessors.tokenize]
    return seqio.TaskRegistry.add(
      "corpus.en_de",
      source=_source(SIZES["en_de"]),
      preprocessors=[*steps, seqio.CacheDatasetPlaceholder(), EOS],
      output_features={"inputs": feature, "targets": feature},
    )

  folder = task_cache.cache_task(registered([]), tmp_path)
  assert task_cache.cache_task(registered([_same]), tmp_path) == folder
  with pytest.raises(ValueError, match="was cached from other data: delete"):
    task_cache.cache_task(registered([change]), tmp_path)


def test_a_file_of_the_same_name_size_and_time_is_another(tmp_path):
  path = tmp_path / "text"
  for data in (b"some text" * 9, bytes(10_000_000)):
    path.write_bytes(data)
    before, time = checksums.stamp(path), path.stat().st_mtime_ns
    assert checksums.stamp(path) == before
    path.write_bytes(b"x" * len(data))
    os.utime(path, ns=(time, time))
    checksums._sampled.cache_clear()  # As in another process.
    after = checksums.stamp(path)
    assert after[:2] == before[:2] and after != before


def test_a_finished_store_needs_no_lock(corpus, tmp_path, monkeypatch):
  store_building.build_store("corpus", LENGTHS, tmp_path)

  def refuse(*_):
    raise OSError("read-only")

  monkeypatch.setattr(store_building.files, "locked", refuse)
  assert store_building.build_store("corpus", LENGTHS, tmp_path, verify=True)


def test_layout_is_that_of_seqio_on_the_same_rows(corpus, tmp_path):
  store = store_building.build_store(
    "corpus", LENGTHS, tmp_path, splits=["train"]
  )
  rows = store.read("train", "en-fr", np.arange(store.rows("train")[2]))
  assert len(rows["direction"]) > 3
  for row in range(3):  # SeqIO takes more than a second for each.
    pairs = {
      name: tf.ragged.constant(
        [
          rows[tokens][row][rows[ids][row] == s].tolist()
          for s in range(1, rows[ids][row].max() + 1)
        ],
        dtype=tf.int32,
      )
      for name, tokens, ids in (
        ("inputs", "encoder_input_tokens", "encoder_segment_ids"),
        ("targets", "decoder_target_tokens", "decoder_segment_ids"),
      )
    }
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    dataset = dataset.map(
      lambda x: {k: tf.ensure_shape(v, [None]) for k, v in x.items()}
    )
    (theirs,) = _seqio_rows(dataset)
    _assert_same_row(rows, row, theirs)


def test_one_open_row_packs_as_seqio_does(corpus):
  task = seqio.TaskRegistry.get("corpus.en_fr")
  # SeqIO packs as many examples together as the longer feature has tokens.
  dataset = task.get_dataset(
    LENGTHS, "train", shuffle=False, num_epochs=1
  ).take(64)
  examples = list(dataset.as_numpy_iterator())
  layout = packing.RowLayout.of(LENGTHS, 259)
  ours = layout.unpack(
    layout.pack(
      packing.Ragged.of([e["inputs"].tolist() for e in examples]),
      packing.Ragged.of([e["targets"].tolist() for e in examples]),
      open_rows=1,
    )
  )
  theirs = _seqio_rows(dataset)
  assert len(theirs) == len(ours["encoder_positions"]) > 20
  for row, value in enumerate(theirs):
    _assert_same_row(ours | {"direction": None}, row, value)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_fast_reading_equals_seqio_reading(kind, tmp_path):
  """A preprocessor more, and the task is read through all of SeqIO."""
  pieces = (
    seqio.ByteVocabulary()
    if kind == "bytes"
    else seqio.SentencePieceVocabulary(str(MODEL))
  )
  short = {"inputs": 24, "targets": 20}  # So that pairs are truncated too.
  _register("fast", pieces)
  _register("slow", pieces, extra=[_same])
  stores = [
    store_building.build_store(name, short, tmp_path / name)
    for name in ("fast", "slow")
  ]
  assert stores[0].stats("train", "en-de").truncated > 0
  assert _files(tmp_path / "fast") == _files(tmp_path / "slow")
  if kind == "sentencepiece":
    copy = pathlib.Path(stores[0].vocabulary)
    assert copy.parent == tmp_path / "fast"
    assert copy.read_bytes() == pieces.sp_model


def test_truncation_is_that_of_append_eos_after_trim(corpus, tmp_path):
  short = {"inputs": 24, "targets": 20}
  store = store_building.build_store(
    "corpus", short, tmp_path, splits=["train"]
  )
  task = seqio.TaskRegistry.get("corpus.en_af")
  expected = [
    (e["inputs"].tolist(), e["targets"].tolist())
    for e in task.get_dataset(
      short, "train", shuffle=False, num_epochs=1
    ).as_numpy_iterator()
  ]
  rows = store.read("train", "en-af", np.arange(store.rows("train")[0]))
  found = [
    (
      rows["encoder_input_tokens"][r][ids == s].tolist(),
      rows["decoder_target_tokens"][r][
        rows["decoder_segment_ids"][r] == s
      ].tolist(),
    )
    for r, ids in enumerate(rows["encoder_segment_ids"])
    for s in range(1, ids.max() + 1)
  ]
  assert sorted(found) == sorted(expected)
  lengths = [
    [len(e["inputs"]) > 24 or len(e["targets"]) > 20]
    for e in task.get_dataset(
      None, "train", shuffle=False, num_epochs=1
    ).as_numpy_iterator()
  ]
  assert store.stats("train", "en-af").truncated == np.sum(lengths) > 0


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_interrupted_build_goes_on(corpus, tmp_path, calls):
  store_building.build_store("corpus", LENGTHS, tmp_path / "whole")
  done = []

  def interrupt(*progress):
    done.append(progress)
    if len(done) == calls:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    store_building.build_store(
      "corpus", LENGTHS, tmp_path / "parts", progress=interrupt
    )
  with pytest.raises(ValueError, match="not finished"):
    row_store.RowStore(tmp_path / "parts")
  again = []
  store_building.build_store(
    "corpus", LENGTHS, tmp_path / "parts", progress=lambda *p: again.append(p)
  )
  # Finished directions are not read again.
  assert {p[:2] for p in done[:-1]}.isdisjoint(p[:2] for p in again)
  everything = "**/*"
  whole = {p: p for p in (tmp_path / "whole").glob(everything) if p.is_file()}
  # store.json, .lock; rows and record of every direction; texts of two splits.
  assert len(whole) == 2 + 2 * 3 * 3 + 2 * 3
  for path in whole:
    other = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
    assert path.read_bytes() == other.read_bytes(), path.name


def test_progress_tells_split_direction_and_numbers(corpus, tmp_path):
  seen = []
  store_building.build_store(
    "corpus", LENGTHS, tmp_path, progress=lambda *p: seen.append(p)
  )
  assert seen[:2] == [("train", "en-af", 9, 9), ("train", "en-de", 400, 400)]
  assert len(seen) == 9


def test_finished_store_is_opened_and_a_stale_one_refused(corpus, tmp_path):
  store_building.build_store("corpus", LENGTHS, tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.rows")}
  store_building.build_store("corpus", LENGTHS, tmp_path)
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.rows")}
  other = {"inputs": 32, "targets": 32}
  with pytest.raises(ValueError, match=r"something else \(other feature leng"):
    store_building.build_store("corpus", other, tmp_path)
  assert row_store.RowStore(tmp_path).lengths == LENGTHS


def test_changed_files_get_a_store_of_their_own(tmp_path):
  data = tmp_path / "data.tsv"
  data.write_text("one\teins\ntwo\tzwei\n")
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  task = seqio.TaskRegistry.add(
    "lines.en_de",
    source=seqio.TextLineDataSource({"train": str(data)}),
    preprocessors=[_split_tabs, seqio.preprocessors.tokenize, EOS],
    output_features={"inputs": feature, "targets": feature},
  )
  cache = tmp_path / "cache"
  first = store_building.ensure_store(task, LENGTHS, cache)
  assert first.splits == ("train", "validation", "test")
  assert first.pairs("validation").tolist() == [0]
  again = store_building.ensure_store("lines.en_de", LENGTHS, cache)
  assert again.directory == first.directory
  data.write_text("one\teins\ntwo\tzwei\nthree\tdrei\n")
  second = store_building.ensure_store(task, LENGTHS, cache)
  assert second.directory != first.directory
  assert second.pairs("train").tolist() == [3]


def _split_tabs(dataset):
  def split(line):
    parts = tf.strings.split(line, "\t")
    return {"inputs": parts[0], "targets": parts[1]}

  return dataset.map(split)


def test_dev_is_read_as_validation(tmp_path):
  files = {}
  for split in ("train", "dev"):
    files[split] = str(tmp_path / split)
    pathlib.Path(files[split]).write_text("one\teins\n", encoding="utf-8")
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  task = seqio.Task(
    "lines.en_de",
    source=seqio.TextLineDataSource(files),
    preprocessors=[_split_tabs, seqio.preprocessors.tokenize, EOS],
    output_features={"inputs": feature, "targets": feature},
  )
  store = store_building.build_store(task, LENGTHS, tmp_path / "store")
  assert store.pairs("validation").tolist() == [1]
  assert store.texts("validation", "en-de")[0]["target"] == "eins"
  assert store.pairs("test").tolist() == [0]


def test_a_source_can_tell_its_fingerprint(corpus):
  before = store_building.fingerprint(corpus, LENGTHS)
  seqio.TaskRegistry.get("corpus.en_fr").source.fingerprint = "two"
  after = store_building.fingerprint(corpus, LENGTHS)
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {"source files"}


def test_several_vocabularies_are_refused(corpus, tmp_path):
  _register("pieces", seqio.SentencePieceVocabulary(str(MODEL)))
  both = seqio.Mixture("both", [("corpus.en_de", 1), ("pieces.en_fr", 1)])
  with pytest.raises(ValueError, match=r"'pieces.en_fr' has a vocabulary of i"):
    store_building.build_store(both, LENGTHS, tmp_path)


# ----------------------------------------------------------------- heating


def _draws(mixture, count, **options):
  """Indices of the directions of the first examples, in sorted order."""
  dataset = mixture.get_dataset(
    LENGTHS, "train", shuffle=False, num_epochs=None, **options
  )
  return [
    int(e["targets"][0]) - 3 for e in dataset.take(count).as_numpy_iterator()
  ]


def _constant_task(name, index, size):
  """Endless copies of one example, that tells which task it is of."""

  def read(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    data = {"inputs": [[5]], "targets": [[3 + index]]}
    data = {k: tf.constant(v, tf.int32) for k, v in data.items()}
    return tf.data.Dataset.from_tensor_slices(data).repeat(size)

  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      read, splits=["train"], num_input_examples={"train": size}
    ),
    preprocessors=[EOS],
    output_features={"inputs": feature, "targets": feature},
  )


@pytest.fixture
def constant():
  """Three tasks of 10,000, 1,000 and 100 examples."""
  sizes = [10_000, 1_000, 100]
  tasks = [_constant_task(f"constant.t{i}", i, n) for i, n in enumerate(sizes)]
  return seqio.Mixture("constant", [(t, 1.0) for t in tasks])


def test_heated_mixture_is_a_registered_seqio_mixture(corpus):
  heated = _heat("corpus")
  assert seqio.get_mixture_or_task("corpus_heated") is heated
  assert isinstance(heated, seqio.Mixture)
  assert heated.directions == ("en-af", "en-de", "en-fr")
  assert heated.sizes == {f"corpus.{k}": v for k, v in SIZES.items()}
  assert str(heated.plan.strategy) == "linear(1.0, 5.0, 300)"
  assert heated.num_input_examples("train") == sum(SIZES.values())


@pytest.mark.parametrize("shards", [1, 2])
def test_shares_follow_the_schedule(constant, shards):
  per_step, window = 20, 50
  heated = _heat(constant, examples_per_step=per_step)
  draws = np.array(
    [
      _draws(heated, 6000, shard_info=seqio.ShardInfo(i, shards))
      for i in range(shards)
    ]
  )
  # Shards draw apart from one another, and share the clock.
  if shards == 2:
    assert np.mean(draws[0] == draws[1]) < 0.9
  statistic = 0.0
  sizes = np.array([10_000, 1_000, 100])
  per_window = window * per_step // shards
  for w in range(6000 // per_window):
    drawn = draws[:, w * per_window : (w + 1) * per_window]
    counts = np.bincount(drawn.reshape(-1), minlength=3)
    expected = np.zeros(3)
    for step in range(w * window, (w + 1) * window):
      rates = sizes ** (1 / min(5, 1 + 4 * step / 300))
      expected += per_step * rates / rates.sum()
    statistic += ((counts - expected) ** 2 / expected).sum()
  freedom = 2 * (6000 // per_window)
  assert scipy.stats.chi2.sf(statistic, freedom) > 1e-3


@pytest.mark.parametrize("shards", [1, 2])
def test_joins_and_caps_are_followed(constant, shards):
  """Against the definition, and the whole run against the cap."""
  per_step, steps = 20, 300
  strategy = sampling.Strategy(
    heating.linear(1, 5, steps), {"t1": 100}, max_epochs=6, steps=steps
  )
  heated = _heat(constant, strategy=strategy, examples_per_step=per_step)
  draws = np.stack(
    [
      _draws(
        heated,
        steps * per_step // shards,
        shard_info=seqio.ShardInfo(i, shards),
      )
      for i in range(shards)
    ],
    axis=1,
  ).reshape(steps, per_step)
  assert not (draws[:100] == 1).any() and (draws[100] == 1).any()
  expected = heated.plan.expected_rows([100, 200, 300])
  np.testing.assert_allclose(expected[-1][2], 600, rtol=1e-4)  # 6 epochs.
  counts = [np.bincount(draws[:k].reshape(-1), minlength=3) for k in (100, 300)]
  for found, wanted in zip(counts, expected[[0, 2]], strict=True):
    assert (np.abs(found - wanted) < 4 * np.sqrt(wanted) + 1e-9).all()


def test_draws_depend_on_the_mixture_s_seed_alone(constant):
  heated = _heat(constant)
  first = _draws(heated, 500)
  # T5X gives another seed at every start.
  assert first == _draws(heated, 500, seed=None)
  assert first == _draws(_heat(constant), 500)
  assert first != _draws(_heat(constant, seed=1), 500)


def _packed(mixture, seed=3):
  return seqio.get_dataset(
    mixture,
    LENGTHS,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
    dataset_split="train",
    shuffle=True,
    num_epochs=None,
    seed=seed,
  )


def test_seqio_iterates_and_packs_it(corpus):
  _heat("corpus")
  rows = list(_packed("corpus_heated").take(40).as_numpy_iterator())
  assert max(row["encoder_segment_ids"].max() for row in rows) > 1
  again = list(_packed("corpus_heated").take(40).as_numpy_iterator())
  for a, b in zip(rows, again, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_iterator_checkpoint_restores_exactly(corpus, tmp_path):
  heated = _heat("corpus")
  iterator = iter(_packed(heated))
  for _ in range(7):
    next(iterator)
  saved = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "it"))
  expected = [next(iterator) for _ in range(30)]
  restored = iter(_packed(heated))
  tf.train.Checkpoint(iterator=restored).read(saved).assert_consumed()
  for value in expected:
    for name, tensor in next(restored).items():
      np.testing.assert_array_equal(tensor, value[name])


def test_heat_takes_a_task_a_mixture_or_a_name(corpus):
  task = seqio.TaskRegistry.get("corpus.en_de")
  assert [t.name for t in _heat("corpus.en_de").tasks] == ["corpus.en_de"]
  assert _heat(task).name == "corpus.en_de_heated"
  first = _heat(corpus)
  assert _heat("corpus") is not first  # Registered anew, without complaint.
  assert _heat("corpus", name="mine").name == "mine"
  assert (
    len(_heat(seqio.Mixture("both", [("corpus", 1), (task, 1)])).tasks) == 3
  )


def test_heat_uses_given_sizes(constant):
  sizes = {"constant.t0": 0, "constant.t1": 1, "constant.t2": 0}
  assert set(_draws(_heat(constant, sizes=sizes), 100)) == {1}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"examples_per_step": 0}, "examples_per_step above 0, got 0"),
    ({"total_steps": 0}, "total_steps above 0, got 0"),
    ({"name": "corpus"}, "'corpus': something else has that name"),
    ({"sizes": dict.fromkeys(["corpus." + k for k in SIZES], 0)}, "above 0"),
  ],
)
def test_impossible_heating_is_refused(corpus, options, message):
  with pytest.raises(ValueError, match=message):
    _heat("corpus", **options)


def test_unknown_sizes_have_to_be_given(tmp_path):
  data = tmp_path / "x.tsv"
  data.write_text("a\tb\n")
  feature = seqio.Feature(seqio.ByteVocabulary())
  task = seqio.TaskRegistry.add(
    "sizeless.en_de",
    source=seqio.TextLineDataSource({"train": str(data)}),
    preprocessors=[_split_tabs, seqio.preprocessors.tokenize],
    output_features={"inputs": feature, "targets": feature},
  )
  with pytest.raises(ValueError, match=r"'sizeless.en_de' does not tell how"):
    _heat(task)
  assert _heat(task, sizes={"sizeless.en_de": 7}).sizes["sizeless.en_de"] == 7
