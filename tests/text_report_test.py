"""Looks at text: every number against a count of its own."""

import itertools
import json
import sys

import numpy as np
import pytest
import sentencepiece
import seqio
import toy
import toy_trouble

from basemt_jax import cli
from basemt_jax.inspection import text_report, token_counts
from tasks import common

pytestmark = pytest.mark.usefixtures("registries", "clean_gin")

LENGTHS = {"inputs": 20, "targets": 16}


@pytest.fixture
def planted():
  return toy_trouble.planted()


def _inspect(mixture="planted", sample=None, **options):
  return text_report.inspect_data(
    mixture, text_report.Options(LENGTHS, sample, bands=toy.BANDS, **options)
  )


def _found(data, name):
  return next(d for d in data.directions if d.name == name)


@pytest.fixture
def pieces():
  return sentencepiece.SentencePieceProcessor(model_file=str(toy_trouble.MODEL))


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
  source = THEIRS.replace("MODEL", repr(str(toy_trouble.MODEL)))
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
