"""Runs side by side: every number against a count by hand."""

import html
import json

import pytest

from basemt_jax import cli, evaluation
from basemt_jax.inspection import compare

REFERENCES = [f"the cat number {i} sits on a mat" for i in range(12)]
WORSE = [r.replace("sits", "sat") for r in REFERENCES]
BETTER = [*REFERENCES[:10], *WORSE[10:]]
CONFIG = """# Macros:
BATCH_SIZE = {batch}

# Parameters for steps.Settings:
# ==============================================================================
JOINS = \\
    {{'gu': 20,
     'kk': {batch}}}
MODEL_DIR = '{name}'
SEED = 0
"""


def write_run(directory, batch, losses, speed, hypotheses, search=None):
  """A model directory as commands leave it, without a model."""
  directory.mkdir(parents=True)
  config = CONFIG.format(batch=batch, name=directory.name)
  (directory / "config.gin").write_text(config)
  lines = []
  for i, loss in enumerate(losses):
    step = 100 * (i + 1)
    own = {"target_tokens": 10.0 * batch}
    lines += [
      {"step": step, "loss": loss, "steps_per_second": speed, **own},
      {"step": step, "dev/loss": loss, "dev/loss/en-de": loss},
    ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (directory / "metrics.jsonl").write_text(text)
  folder = directory / "evaluation" / "test_400"
  scores = evaluation.score(hypotheses, REFERENCES, "de")
  evaluation.write_scores(
    folder / "scores.json",
    [
      evaluation.DirectionResult(
        *("en-de", 100, "low", len(REFERENCES), 1.5),
        *(scores.bleu, scores.chrf, "b", "c"),
      )
    ],
    {"test_set": "test", "step": 400, "search": search or {"beam_size": 4}},
  )
  evaluation.write_translations(
    folder,
    [
      evaluation.DirectionTranslations(
        "en-de", REFERENCES, hypotheses, REFERENCES
      )
    ],
  )
  return directory


@pytest.fixture
def runs(tmp_path):
  return [
    write_run(tmp_path / "a" / "base", 8, [4.0, 3.0, 2.0, 1.0], 10.0, WORSE),
    # Passes 1.0 midway from 100 to 200.
    write_run(tmp_path / "heated", 16, [2.0, 0.0, 0.5], 5.0, BETTER),
  ]


def test_settings_curves_and_factors(runs):
  base, heated = compare.compare(runs, num_samples=50)
  assert (base.name, heated.name) == ("base", "heated")
  assert base.settings == {"BATCH_SIZE": "8", "JOINS": "{'gu': 20, 'kk': 8}"}
  assert heated.settings["BATCH_SIZE"] == "16"
  assert base.curve.axes == {
    "updates": [100, 200, 300, 400],
    "target tokens": [80, 160, 240, 320],
    "seconds": [10, 20, 30, 40],
  }
  assert base.factors == {"updates": 1, "target tokens": 1, "seconds": 1}
  # 150 updates, 160 + 80 tokens, 30 seconds.
  assert heated.factors == pytest.approx(
    {"updates": 400 / 150, "target tokens": 320 / 240, "seconds": 40 / 30}
  )
  assert compare.compare(runs[::-1], 10)[1].factors == {}  # Never reached.


def test_scores_and_their_significance(runs):
  base, heated = compare.compare(runs, num_samples=50)
  (own,) = heated.scores
  assert (own.test, own.direction, own.band) == ("test, beam 4", "en-de", "low")
  expected = evaluation.paired_bootstrap(WORSE, BETTER, REFERENCES, "de", 50)
  for name, found in zip(("bleu", "chrf"), expected, strict=True):
    assert own.scores[name] == pytest.approx(found.system)
    assert own.differences[name] == pytest.approx(found.system - found.baseline)
    assert own.p_values[name] == found.p_value < 0.05
  # A mean over one direction is that direction.
  assert [b.band for b in heated.bands] == ["low", "all"]
  for band in heated.bands:
    assert band.scores == pytest.approx(own.scores)
    assert band.p_values == own.p_values
  assert base.scores[0].differences == {"bleu": 0.0, "chrf": 0.0}
  assert not base.scores[0].p_values


def test_only_the_same_search_compares(runs, tmp_path):
  greedy = write_run(
    tmp_path / "greedy", 8, [2.0], 10.0, BETTER, {"beam_size": 1}
  )
  runs = compare.compare([runs[0], greedy], 10)
  assert not runs[1].scores
  section = compare.section(runs)
  assert [t.title for t in section.tables if "beam" in t.title]


def test_an_export_is_compared_by_its_scores(runs, tmp_path):
  export = write_run(tmp_path / "export", 8, [2.0], 10.0, BETTER)
  (scores,) = export.glob("evaluation/*/scores.json")
  scores.write_text(scores.read_text().replace('"step": 400', '"step": null'))
  _, found = compare.compare([runs[0], export], 10)
  assert [s.direction for s in found.scores] == ["en-de"]


def test_the_command_writes_table_page_and_json(runs, tmp_path, capsys):
  out = [tmp_path / name for name in ("x.json", "x.html")]
  command = ["compare", *map(str, runs), "--samples", "20", "--traceback"]
  command += ["--json", str(out[0]), "--html", str(out[1])]
  assert cli.main(command) == 0
  shown = capsys.readouterr().out
  assert "heated against base" in shown and "2.67" in shown
  rows = [line.split() for line in shown.splitlines() if line]
  assert ["BATCH_SIZE", "8", "16"] in rows
  numbers = json.loads(out[0].read_text())
  assert numbers["runs"][1]["factors"]["updates"] == 400 / 150
  (score,) = numbers["runs"][1]["scores"]
  assert score["direction"] == "en-de" and 0 < score["p_values"]["bleu"] < 0.05
  page = html.unescape(out[1].read_text())
  assert '"title":"dev loss by seconds"' in page
  assert '"x":[20.0,40.0,60.0],"y":[2.0,0.0,0.5]' in page


def test_what_cannot_be_compared_is_told(runs, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  for arguments, message in (
    ([runs[0]], "name two runs or more"),
    ([runs[0], tmp_path / "empty"], "empty is not the directory of a run"),
    ([runs[0], runs[0]], "is given twice"),
    ([*runs, "--samples", "0"], "needs 1 sample at least"),
  ):
    assert cli.main(["compare", *map(str, arguments)]) == 1
    assert message in capsys.readouterr().err
