"""Scores by an external command: a process that counts letters."""

import io
import shlex
import sys

import pytest

from basemt_jax import evaluation, metric_command
from basemt_jax.inspection import scores

RECORDS = [
  {"direction": "en-de", "source": "a", "hypothesis": "é\t", "reference": "x"},
  {"direction": "en-de", "source": "b", "hypothesis": "bcd", "reference": "y"},
]


def command(body):
  """A Python program; `rows` are the objects it reads."""
  program = "import json, sys\nrows = [json.loads(x) for x in sys.stdin]\n"
  return shlex.join([sys.executable, "-S", "-c", program + body])


def run(body, records=RECORDS):
  return metric_command.scores(command(body), records)


def test_numbers_and_objects_are_scores_in_order():
  body = "for row in rows: print(len(row['hypothesis']) / 2)"
  assert run(body) == {"metric": [1.0, 1.5]}
  body = "for r in rows: print(json.dumps({'n': len(r), r['direction']: 2}))"
  assert run(body) == {"n": [4, 4], "en-de": [2, 2]}
  assert run("", []) == {}


@pytest.mark.parametrize(
  "body, message",
  [
    ("print(1)", "wrote 1 lines for 2 sentences"),
    ("print('nan\\n1')", "wrote 'nan' in line 1, which is neither"),
    ("print('NaN\\n1')", "wrote 'NaN' in line 1"),
    ("print('1\\n[2]')", r"wrote '\[2\]' in line 2"),
    ("print('1\\ntrue')", "wrote 'true' in line 2"),
    ("print('{}\\n{}')", "wrote '{}' in line 1"),
    ("print('1\\n{\"a\": 2}')", "wrote a in line 2 and metric before"),
    ("sys.exit('no model of that name')", "code 1: no model of that name"),
    ("sys.exit(3)", "ended with code 3$"),
  ],
)
def test_what_is_no_score_is_one_sentence(body, message):
  with pytest.raises(ValueError, match=message):
    run(body)


@pytest.mark.parametrize("command", ["", "/nowhere/comet", "comet 'x"])
def test_what_cannot_be_started_is_told(command):
  with pytest.raises(ValueError, match="cannot be started: "):
    metric_command.scores(command, RECORDS)


def test_means_join_table_and_results_by_direction():
  translations = [
    evaluation.DirectionTranslations("en-de", "abc", ["x", "xyz", "xy"], "rst"),
    evaluation.DirectionTranslations("en-fr", [], [], []),
    evaluation.DirectionTranslations("de-en", ["q"], ["xyz"], ["q"]),
  ]
  plain = [
    evaluation.DirectionResult(t.direction, 9, "low", len(t.sources), bleu=1.0)
    for t in translations
  ]
  body = "for r in rows: print(json.dumps({'length': len(r['hypothesis'])}))"
  found = metric_command.with_metrics(command(body), plain, translations)
  assert [r.metrics for r in found] == [{"length": 2}, {}, {"length": 3}]
  means = {m.name: m.metrics for m in evaluation.summarise(found)}
  assert means["all"] == {"length": 2.5} and means["en->xx"] == {"length": 2}
  file = io.StringIO()
  scores.print_scores(found, file)
  assert "length" in file.getvalue() and "2.5" in file.getvalue()
