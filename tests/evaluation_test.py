import importlib.util
import subprocess
import sys
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from basemt_jax import evaluation, translation
from basemt_jax.data import languages, vocabulary

REFERENCES = {
  "de": [
    "Der Zug kommt morgen um 9 Uhr an.",
    "Wir haben drei Katzen und einen Hund.",
    "Es regnet seit gestern Abend.",
  ],
  "zh": ["火车明天上午九点到。", "我们有三只猫和一只狗。", "昨晚开始下雨。"],
  "th": ["รถไฟจะมาถึงพรุ่งนี้", "เรามีแมวสามตัว", "ฝนตกตั้งแต่เมื่อคืน"],
}
HYPOTHESES = {
  "de": [
    "Der Zug kommt morgen um 9 Uhr.",
    "Wir haben drei Katzen und zwei Hunde.",
    "Seit gestern Abend regnet es.",
  ],
  "zh": ["火车明天九点到。", "我们有三只狗和一只猫。", "昨晚开始下雪。"],
  "th": ["รถไฟจะมาพรุ่งนี้", "เรามีแมวสองตัว", "ฝนตกเมื่อคืน"],
}


def results(*rows):
  """Results from (direction, train_pairs, band, loss, bleu, chrf)."""
  return [
    evaluation.DirectionResult(d, n, b, 10, loss, bleu, chrf)
    for d, n, b, loss, bleu, chrf in rows
  ]


RESULTS = results(
  ("en-de", 20_000, "high", 1.0, 50.0, 60.0),
  ("de-en", 20_000, "high", 2.0, 40.0, 50.0),
  ("en-is", 100, "low", 3.0, 10.0, 20.0),
  ("is-en_XX", 100, "low", None, None, None),
)


@pytest.mark.parametrize("language", ["de", "zh", "th"])
@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_scores_equal_the_sacrebleu_command(tmp_path, language, metric):
  evaluation.write_translations(
    tmp_path,
    [
      evaluation.DirectionTranslations(
        f"en-{language}",
        ["x"] * 3,
        HYPOTHESES[language],
        REFERENCES[language],
      )
    ],
  )
  options = (
    ["--chrf-word-order", "2"]
    if metric == "chrf"
    else ["-tok", {"de": "13a", "zh": "zh", "th": "char"}[language]]
  )
  command = [
    *(sys.executable, "-m", "sacrebleu", tmp_path / f"en-{language}.ref"),
    *("-i", tmp_path / f"en-{language}.hyp", "-m", metric, *options),
    *("--score-only", "--width", "6"),
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  found = evaluation.score(HYPOTHESES[language], REFERENCES[language], language)
  assert getattr(found, metric) == pytest.approx(float(done.stdout), abs=1e-6)


def test_bleu_by_hand():
  # 9 of 9 words, 8 of 8, 7 of 7 and 6 of 6 n-grams match; the reference has
  # 10 tokens (the full stop is one): BLEU is the brevity penalty exp(1 - 10/9).
  found = evaluation.score(["a b c d e f g h i"], ["a b c d e f g h i."], "de")
  assert found.bleu == pytest.approx(100 * np.exp(1 - 10 / 9))


def test_signatures_tell_tokenizer_and_word_order():
  found = evaluation.score(HYPOTHESES["zh"], REFERENCES["zh"], "zh-Hans")
  assert "|tok:zh|" in found.bleu_signature
  assert "|nw:2|" in found.chrf_signature
  assert "version:" in found.bleu_signature


@pytest.mark.parametrize(
  "language, tokenizer",
  [
    ("de", "13a"),
    ("de_DE", "13a"),
    ("en_XX", "13a"),
    ("sr-Latn", "13a"),
    ("zh", "zh"),
    ("zh-Hans", "zh"),
    ("zh_CN", "zh"),
    ("zho_Hant", "zh"),
    ("th", "char"),
    ("km_KH", "char"),
    ("lao_Laoo", "char"),
    ("my", "char"),
  ],
)
def test_tokenizer(language, tokenizer):
  assert evaluation.sacrebleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize(
  "language, package", [("ja_XX", "MeCab"), ("ko", "mecab_ko")]
)
def test_tokenizer_of_optional_packages(monkeypatch, language, package):
  monkeypatch.setattr(evaluation, "has_mecab", evaluation.has_mecab.__wrapped__)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  assert evaluation.sacrebleu_tokenizer(language) == language[:2] + "-mecab"
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name == package else object(),
  )
  assert evaluation.sacrebleu_tokenizer(language) == "char"


CHINESE, JAPANESE = "\u6211\u7231\u732b", "\u732b\u304c\u597d\u304d"
THAI, KOREAN = "\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01", "\uace0\uc591\uc774"


@pytest.mark.parametrize(
  "language, text, tokenizer",
  [
    ("cn", CHINESE, "zh"),
    ("de", CHINESE, "zh"),
    ("xx", "NATO " + THAI, "char"),
    ("lo", "romanised", "13a"),
    ("jp", JAPANESE, "ja-mecab"),
    ("zh", JAPANESE, "ja-mecab"),
    ("ja", CHINESE, "ja-mecab"),
    ("xx", KOREAN, "ko-mecab"),
    ("zh", "?", "zh"),
    ("de", "stra\u00dfe \u6211", "13a"),
  ],
)
def test_the_text_decides_on_the_tokenizer(
  monkeypatch, language, text, tokenizer
):
  monkeypatch.setattr(evaluation, "has_mecab", lambda writing: True)
  assert evaluation.sacrebleu_tokenizer(language, [text]) == tokenizer


def test_a_missing_tokenizer_is_told():
  made = [
    evaluation.DirectionResult(
      direction,
      9,
      "low",
      9,
      bleu=1.0,
      bleu_signature=f"nrefs:1|tok:{tokenizer}",
    )
    for direction, tokenizer in (
      ("en-ja", "char"),
      ("en-th", "char"),
      ("en-ko", "ko-mecab-0.1"),
      ("ja-en", "13a"),
    )
  ]
  (sentence,) = evaluation.missing_tokenizers(made)
  assert sentence.startswith("BLEU into ja is of characters")
  assert sentence.endswith("install basemt_jax[ja]")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_form_of_text_costs_no_score(form, mark):
  references = ["Vi\u1ec7t b\u1ea1n h\u1ecdc s\u00e1ng ti\u1ebfng n\u1eafng"]
  hypotheses = [mark + unicodedata.normalize(form, references[0]) + " "]
  for a, b in ((hypotheses, references), (references, hypotheses)):
    scores = evaluation.score(a, b, "vi")
    assert scores.bleu == pytest.approx(100)
    assert scores.chrf == pytest.approx(100)


def test_summary_means_by_hand():
  # One direction of low resource, into English, was not measured.
  means = {m.name: m for m in evaluation.summarise(RESULTS)}
  assert means == {
    m.name: m
    for m in (
      evaluation.Mean("high", 2, 1.5, 45.0, 55.0),
      evaluation.Mean("low", 1, 3.0, 10.0, 20.0),
      evaluation.Mean("en->xx", 2, 2.0, 30.0, 40.0),
      evaluation.Mean("xx->en", 1, 2.0, 40.0, 50.0),
      evaluation.Mean("all", 3, 2.0, 100 / 3, 130 / 3),
    )
  }


@hypothesis.given(
  st.lists(
    st.tuples(
      st.sampled_from(["en-de", "de-en", "fr-de"]),
      st.integers(0, 10**7),
      st.floats(0, 100),
    ),
    min_size=1,
  )
)
def test_bands_partition_the_directions(rows):
  made = results(
    *[(d, n, languages.band(n), 1.0, bleu, bleu) for d, n, bleu in rows]
  )
  means = {m.name: m for m in evaluation.summarise(made)}
  bands = [means[name] for name in languages.BANDS if name in means]
  assert sum(m.directions for m in bands) == means["all"].directions
  weighted = sum(m.directions * m.bleu for m in bands) / len(made)
  assert means["all"].bleu == pytest.approx(weighted)
  bleus = [r.bleu for r in made]
  assert min(bleus) - 1e-9 <= means["all"].bleu <= max(bleus) + 1e-9


def test_paired_bootstrap_tells_better_from_equal():
  references = [
    f"the train of {i} o'clock is {i} hours late" for i in range(40)
  ]
  worse = [r.replace("late", "early") for r in references]
  bleu, chrf = evaluation.paired_bootstrap(
    worse, references, references, "en", num_samples=200
  )
  assert (bleu.metric, chrf.metric) == ("BLEU", "chrF2++")
  assert bleu.baseline < bleu.system == pytest.approx(100)
  assert bleu.p_value < 0.01 and chrf.p_value < 0.01
  assert "bs:200" in bleu.signature
  same, _ = evaluation.paired_bootstrap(
    worse, worse, references, "en", num_samples=200
  )
  assert same.p_value == 1


@pytest.mark.parametrize("count", [0, 2])
def test_score_errors(count):
  with pytest.raises(ValueError, match=f"got 0 hypotheses for {count} ref"):
    evaluation.score([], ["a"] * count, "de")


class Letters:
  """A vocabulary of letters: id 2 is 'a'. Ids above are line breaks."""

  def encode(self, text):
    return [ord(c) - ord("a") + 2 for c in text if c.isalpha()]

  def decode(self, ids):
    return "".join(chr(i - 2 + ord("a")) if i < 28 else "\n" for i in ids)


class Echo:
  """A translator that returns each source, and counts its calls."""

  def __init__(self, change=lambda ids: ids):
    self.calls = 0
    self.change = change

  def translate(self, sources, progress=None, prefixes=(), numbers=()):
    self.calls += 1
    return [
      [translation.Hypothesis(-1.0, tuple(self.change(ids)))] for ids in sources
    ]


def test_evaluate_pools_directions_and_orders_by_size():
  texts = [
    evaluation.DirectionTexts("en-is", ["abc"], ["abd"], 100),
    evaluation.DirectionTexts(
      "en-de", ["hallo", "welt"], ["hallo", "welt"], 9000
    ),
    evaluation.DirectionTexts("de-en", [], [], 500),
  ]
  echo = Echo()
  found, translations = evaluation.evaluate(
    echo,
    Letters(),
    texts,
    losses={"en-de": 0.5},
    thresholds=languages.BandThresholds(1000, 200),
  )
  assert echo.calls == 1
  assert [(r.direction, r.band, r.test_pairs, r.loss) for r in found] == [
    ("en-de", "high", 2, 0.5),
    ("de-en", "mid", 0, None),
    ("en-is", "low", 1, None),
  ]
  assert [t.hypotheses for t in translations] == [
    ["hallo", "welt"],
    [],
    ["abc"],
  ]
  assert found[0].chrf == pytest.approx(100)
  assert found[1].bleu is None and found[1].bleu_signature == ""
  expected = evaluation.score(["abc"], ["abd"], "is")
  assert (found[2].bleu, found[2].chrf) == (expected.bleu, expected.chrf)


def test_input_has_the_form_of_training_text():
  lines = ["\ufeffcafe\u0301 au  lait\r", "a\u200bb\u00a0c", "\ufeff", ""]
  found = evaluation.translate_texts(
    Echo(), vocabulary.Vocabulary(), lines, lambda text: f"<2de> {text}"
  )
  assert [text for ((_, text),) in found] == [
    "<2de> caf\u00e9 au lait",
    "<2de> ab c",
    "",
    "",
  ]


def test_hypotheses_are_one_line_each():
  texts = [evaluation.DirectionTexts("en-de", ["ab", "c"], ["a b\r\n", "c"], 1)]
  echo = Echo(lambda ids: [ids[0], 40, *ids[1:]])
  _, (found,) = evaluation.evaluate(echo, Letters(), texts)
  assert found.hypotheses == ["a b", "c"]
  assert found.references == ["a b", "c"]


def test_translate_texts_keeps_blank_lines():
  echo = Echo()
  found = evaluation.translate_texts(
    echo, Letters(), ["ab", "", "  ", "c"], tag="z{}".format
  )
  assert [nbest[0][1] for nbest in found] == ["zab", "", "", "zc"]


def test_texts_need_a_reference_each():
  with pytest.raises(ValueError, match="en-de has 2 sources but 1 references"):
    evaluation.DirectionTexts("en-de", ["a", "b"], ["c"], 3)
