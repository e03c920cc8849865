"""Scores by an external command: a process that counts letters."""

import shlex
import sys

import pytest

from basemt_jax import metric_command

RECORDS = [
  {"direction": "en-de", "source": "a", "hypothesis": "é\t", "reference": "x"},
  {"direction": "en-de", "source": "b", "hypothesis": "bcd", "reference": "y"},
]


def run(body, records=RECORDS):
  """Scores by a Python program; `rows` are the objects it reads."""
  program = "import json, sys\nrows = [json.loads(x) for x in sys.stdin]\n"
  words = [sys.executable, "-S", "-c", program + body]
  return metric_command.scores(shlex.join(words), records)


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
