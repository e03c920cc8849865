"""The CLDR corpus: genuine phrases, honest splits, ordinary SeqIO tasks."""

import hashlib
import itertools
import os
import pathlib
import re
import subprocess
import sys
import unicodedata
from importlib import metadata

import pytest
import seqio

from basemt_jax.data import mixtures, normalisation
from basemt_jax.data.vocabulary import Vocabulary
from tasks import cldr, common

LANGUAGES = list(cldr.TRAIN_PAIRS)
HELD_OUT = ("validation", "test")
ROOT = pathlib.Path(__file__).parents[1]


def _sides(language, split):
  english, foreign = zip(*cldr.pairs(language, split), strict=True)
  return english, foreign


@pytest.mark.parametrize("language", LANGUAGES)
def test_sizes_are_as_registered_and_nothing_repeats(language):
  for split in common.SPLITS:
    english, foreign = _sides(language, split)
    for source, target in (("en", language), (language, "en")):
      task = seqio.TaskRegistry.get(f"cldr.{source}_{target}")
      assert task.num_input_examples(split) == len(english)
    assert len(set(english)) == len(set(foreign)) == len(english)


def test_no_held_out_side_is_in_training_of_any_language():
  texts = {
    split: {
      side
      for language in LANGUAGES
      for pair in cldr.pairs(language, split)
      for side in pair
    }
    for split in common.SPLITS
  }
  for split in HELD_OUT:
    assert not texts[split] & texts["train"]
  assert not texts["validation"] & texts["test"]


def test_parts_of_test_phrases_are_seen_in_training():
  # De, the largest: unseen combinations of words that were all seen.
  for side in (0, 1):
    known = {
      word
      for pair in cldr.pairs("de", "train")
      for word in re.findall(r"\w+", pair[side])
    }
    for pair in cldr.pairs("de", "test"):
      assert set(re.findall(r"\w+", pair[side])) <= known


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_plain(language):
  leaked = re.compile(r"(length|mass|area|digital|duration|speed|power)-|None")
  for split in common.SPLITS:
    for pair in cldr.pairs(language, split):
      for side in pair:
        assert side == unicodedata.normalize("NFC", side)
        assert side == " ".join(side.split()) and side.isprintable()
        assert not leaked.search(side), side
        assert len(side) < 160


def test_sizes_fall_geometrically():
  sizes = list(cldr.TRAIN_PAIRS.values())
  assert (sizes[0], sizes[-1]) == (20000, 100)
  ratios = [a / b for a, b in itertools.pairwise(sizes)]
  assert all(1.5 < ratio < 1.75 for ratio in ratios)


@pytest.mark.parametrize(
  "language, english, foreign",
  [
    ("de", "Sunday, March 7, 2021", "Sonntag, 7. März 2021"),
    ("es", "5 kilometers and 1 week", "5 kilómetros y 1 semana"),
    ("fr", "3 hours ago", "il y a 3 heures"),
    ("ru", "21 euros, 3 weeks", "21 евро, 3 недели"),
    ("sw", "5 kilometers", "kilomita 5"),
    ("ja", "4 weeks", "4 週間"),  # No long form in CLDR: the short one.
    ("tr", "69 miles", "69 mil"),
  ],
)
def test_writer_against_cldr(language, english, foreign):
  # Expected values are CLDR's, written by hand.
  import datetime

  def write(code):
    writer = cldr._Writer(code)
    return {
      "Sunday, March 7, 2021": lambda: writer.date(
        datetime.date(2021, 3, 7), "full"
      ),
      "5 kilometers and 1 week": lambda: writer.join(
        [
          writer.quantity(5, "length-kilometer"),
          writer.quantity(1, "duration-week"),
        ],
        "standard",
      ),
      "3 hours ago": lambda: writer.relative(datetime.timedelta(hours=-3)),
      "21 euros, 3 weeks": lambda: ", ".join(
        [writer.money(21, "EUR"), writer.quantity(3, "duration-week")]
      ),
      "5 kilometers": lambda: writer.quantity(5, "length-kilometer"),
      "4 weeks": lambda: writer.quantity(4, "duration-week"),
      "69 miles": lambda: writer.quantity(69, "length-mile"),
    }[english]()

  assert normalisation.normalise(write("en")) == english
  assert normalisation.normalise(write(language)) == foreign


def test_importing_makes_no_text_and_every_process_makes_the_same():
  code = (
    "import hashlib, tasks; from tasks import cldr;"
    "print(cldr.pairs.cache_info().currsize, end=' ');"
    "print(cldr._held_out.cache_info().currsize, end=' ');"
    "text = repr(cldr.pairs('fi', 'train')).encode();"
    "print(hashlib.sha256(text).hexdigest())"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONHASHSEED": "123"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  text = repr(cldr.pairs("fi", "train")).encode()
  expected = ["0", "0", hashlib.sha256(text).hexdigest()]
  assert result.stdout.split() == expected


def test_tasks_are_ordinary_seqio_tasks():
  vocabulary = Vocabulary.load(cldr.MODEL_PATH)
  mixture = seqio.get_mixture_or_task("cldr")
  assert len(mixture.tasks) == 24
  assert mixture.total_rate == 2 * sum(cldr.TRAIN_PAIRS.values())
  task = seqio.TaskRegistry.get("cldr.en_ja")
  assert mixtures.direction_or_name(task.name) == "en-ja"
  dataset = task.get_dataset(
    {"inputs": 64, "targets": 64}, split="validation", shuffle=False
  )
  examples = list(dataset.as_numpy_iterator())
  assert len(examples) == cldr.VALIDATION_PAIRS
  for example, pair in zip(
    examples, cldr.pairs("ja", "validation"), strict=True
  ):
    source = f"<2ja> {pair[0]}"
    assert example["inputs_pretokenized"].decode() == source
    assert example["inputs"].tolist() == [*vocabulary.encode(source), 1]
    assert example["targets"].tolist() == [*vocabulary.encode(pair[1]), 1]
  shards = [
    seqio.get_dataset(
      "cldr.ja_en",
      {"inputs": 64, "targets": 64},
      dataset_split="train",
      shuffle=False,
      feature_converter=seqio.EncDecFeatureConverter(pack=True),
      shard_info=seqio.ShardInfo(index, 2),
    )
    for index in range(2)
  ]
  rows = [len(list(shard.as_numpy_iterator())) for shard in shards]
  assert min(rows) > 5


def test_metrics_score_whole_targets():
  task = seqio.TaskRegistry.get("cldr.en_de")
  example = {"targets_pretokenized": b"4. M\xc3\xa4rz 2021 und so"}
  reference = task.postprocess_fn("4. M", example=example, is_target=True)
  guess = task.postprocess_fn(reference, example=example, is_target=False)
  assert reference == "4. März 2021 und so"
  scores = {}
  for metric in task.predict_metric_fns:
    scores.update(metric([reference], [guess]))
  assert scores == pytest.approx({"bleu": 100.0, "chrf++": 100.0})


def test_shipped_vocabulary():
  vocabulary = Vocabulary.load(cldr.MODEL_PATH)
  assert cldr.MODEL_PATH.stat().st_size <= 120_000
  assert vocabulary.vocab_size == cldr.VOCAB_SIZE
  for language in [*LANGUAGES, "en"]:
    assert len(vocabulary.encode(f"<2{language}>")) == 1
  for language in LANGUAGES:
    pairs = cldr.pairs(language, "test")
    ids = vocabulary.encode_batch([side for pair in pairs for side in pair])
    assert max(map(len, ids)) <= 48
    assert [vocabulary.decode(i) for i in ids] == [s for p in pairs for s in p]


def test_shipped_vocabulary_is_what_the_command_trains(tmp_path):
  versions = {name: metadata.version(name) for name in cldr.MODEL_VERSIONS}
  if versions != cldr.MODEL_VERSIONS:
    pytest.skip(f"the model was made with {cldr.MODEL_VERSIONS}: {versions}")
  cldr.train_vocabulary(tmp_path / "again.model")
  again = Vocabulary.load(tmp_path / "again.model")
  assert again == Vocabulary.load(cldr.MODEL_PATH), (
    "The phrases changed: cldr.train_vocabulary() makes the model that fits;"
    " checkpoints need the one they were trained with."
  )


def test_unknown_split():
  task = seqio.TaskRegistry.get("cldr.en_de")
  with pytest.raises(ValueError, match="no split 'dev'; there are train, val"):
    task.get_dataset(None, split="dev")
