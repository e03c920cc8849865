import io
import json
import os

import pytest

from basemt_jax import evaluation
from basemt_jax.inspection import scores

SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:{}|smooth:exp|version:2.6.0"


def result(direction, pairs, band, bleu, tok="13a"):
  return evaluation.DirectionResult(
    direction,
    pairs,
    band,
    1234,
    1.23456,
    bleu,
    None if bleu is None else bleu + 10,
    SIGNATURE.format(tok) if bleu is not None else "",
    "chrf-signature" if bleu is not None else "",
  )


RESULTS = [
  result("en-de", 45_000_000, "high", 31.25),
  result("de-en", 45_000_000, "high", 33.75),
  result("en-zh-Hans", 20_000, "low", 10.0, "zh"),
  result("en-th", 2_000, "low", None),
]


def written(results):
  text = io.StringIO()
  scores.print_scores(results, text)
  return text.getvalue()


def test_table_holds_results_means_and_signatures():
  text = written(RESULTS)
  lines = [line.strip() for line in text.splitlines()]
  assert "\x1b" not in text
  rows = {line.split()[0]: line.split() for line in lines if line.split()}
  assert rows["en-de"] == [
    *("en-de", "45,000,000", "high", "1,234", "1.235", "31.2", "41.2")
  ]
  assert rows["en-th"][-3:] == ["1.235", "-", "-"]
  means = [line.split() for line in lines if "mean of" in line]
  assert (
    " ".join(means[0]) == "mean of high resource 2 directions 1.235 32.5 42.5"
  )
  assert " ".join(means[-1]) == "mean of all 4 directions 1.235 25.0 35.0"
  assert f"BLEU: {SIGNATURE.format('13a')}" in lines
  assert f"BLEU (en-zh-Hans): {SIGNATURE.format('zh')}" in lines
  assert "chrF++: chrf-signature" in lines


def test_a_metric_of_ones_own_is_in_table_and_scalars():
  own = {"en-de": 0.25, "de-en": 0.75}
  results = evaluation.with_metric(RESULTS, "real", own)
  rows = [line.split() for line in written(results).splitlines()]
  assert ["en-th", "2,000", "low", "1,234", "1.235", "-", "-", "-"] in rows
  assert next(r for r in rows if r[:1] == ["en-de"])[-1] == "0.25"
  means = evaluation.summarise(results)
  found = evaluation.scalars("test", results, means)
  assert found["test/real/en-de"] == 0.25 and found["test/real/high"] == 0.5
  assert found["test/bleu/en-de"] == 31.25
  assert "test/real/en-th" not in found and "test/bleu/en-th" not in found


def test_json_round_trip(tmp_path):
  path = tmp_path / "new" / "results.json"
  broken = evaluation.DirectionResult("en-is", 5, "low", 3, float("nan"))
  evaluation.write_scores(
    path, [*RESULTS, broken], {"step": 7, "langue": "ไทย"}
  )
  contents = json.loads(path.read_text(encoding="utf-8"))
  assert contents["step"] == 7 and contents["langue"] == "ไทย"
  first = contents["directions"][0]
  assert evaluation.DirectionResult(**first) == RESULTS[0]
  assert contents["directions"][4]["loss"] is None
  means = {m["name"]: m for m in contents["means"]}
  assert means["high"]["bleu"] == pytest.approx(32.5)


def test_translations_are_written_line_by_line(tmp_path):
  texts = evaluation.DirectionTranslations(
    "en-de", ["a", "b"], ["c\nd\u2028e", ""], ["é", "g\r"]
  )
  evaluation.write_translations(tmp_path / "out", [texts])
  contents = {
    path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
  }
  assert contents == {
    "en-de.src": b"a\nb\n",
    "en-de.hyp": b"c d e\n\n",
    "en-de.ref": "é\ng\n".encode(),
  }


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  evaluation.write_scores(path, RESULTS)
  before = path.read_bytes()

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    evaluation.write_scores(path, RESULTS[:1])
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ["results.json"]


def test_samples_are_spread_over_directions():
  texts = [
    evaluation.DirectionTranslations(f"en-x{i}", ["s"], [f"h{i}"], ["r"])
    for i in range(9)
  ] + [evaluation.DirectionTranslations("en-none", [], [], [])]
  lines = scores.sample_lines(texts, 3)
  assert [line.split()[-1] for line in lines[1::3]] == ["h0", "h3", "h6"]
  assert scores.sample_lines([], 3) == []
