"""Commands for a trained model: scores, samples, pairs to train on, means."""

import io
import json
import math
import pathlib
import shlex
import sys

import pytest
import toy

import gin
from basemt_jax import cli, trained, training, translation
from basemt_jax import run as run_lib

SEARCH = translation.SearchOptions(
  batch_size=4, max_source_length=32, max_target_length=12
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
  yield
  gin.clear_config()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """Of a dense model that has learnt which letters there are."""
  directory = tmp_path_factory.mktemp("use")
  store = toy.write_store(directory / "store")
  settings = toy.settings(60, log_every=60, eval_every=60, save_every=60)
  run = toy.a_run(directory / "model", store, settings=settings, search=SEARCH)
  assert training.train(run, toy.Writer(), run_lib.SILENT) == "done"
  return str(directory / "model")


def basemt(command, directory, *arguments):
  return cli.main([command, f"--model_dir={directory}", *map(str, arguments)])


def test_a_line_in_is_a_line_of_scores_out(directory, tmp_path, capsys):
  pairs = [("no 1", "NO 1"), ("no 22", "NO 2")]
  (tmp_path / "pairs.tsv").write_bytes(
    b"no 1\tNO 1\n\nno tab\n" + b"x" * 40 + b"\tX\nno\t\nno 22\tNO  2\r\n"
  )
  output = tmp_path / "scores.tsv"
  assert not basemt(
    *("score", directory, "--to=de", "--input", tmp_path / "pairs.tsv"),
    *("--output", output, "--alpha=0.5"),
  )
  rows = [line.split("\t") for line in output.read_text().splitlines()]
  assert [row[3] for row in rows] == ["5", "0", "0", "0", "0", "5"]
  model = trained.load(directory)
  expected = model.scorer().score(
    [model.pieces.encode(f"<2de> {a}") for a, _ in pairs],
    [model.pieces.encode(b) for _, b in pairs],
  )
  for row, score in zip((rows[0], rows[5]), expected, strict=True):
    found = [float(x) for x in row[:3]]
    three = [score.total, score.per_token, score.normalised(0.5)]
    assert found == pytest.approx(three, abs=1e-5)
  assert all(math.isnan(float(rows[i][0])) for i in (1, 2, 3, 4))
  said = capsys.readouterr().err
  assert "4 of 6 lines skipped" in said and "pairs.tsv:2: blank line" in said


def test_scores_of_several_directions_as_json(directory, tmp_path):
  (tmp_path / "pairs.tsv").write_text(
    "en-de\tno 1\tNO 1\neng-fr\tno 1\tNO 1\nen-xx\ta\tb\nno\ta\tb\n"
  )
  assert not basemt(
    *("score", directory, "--jsonl", "--input", tmp_path / "pairs.tsv"),
    *("--output", tmp_path / "scores.jsonl"),
  )
  lines = (tmp_path / "scores.jsonl").read_text().splitlines()
  one, two, unknown, no_direction = map(json.loads, lines)
  assert one["line"] == 1 and one["target"] == "NO 1"
  tokens = [token for token, _ in one["tokens"]]
  assert len(tokens) == 5 and tokens[0] == "N"
  total = math.fsum(value for _, value in one["tokens"])
  assert one["total"] == pytest.approx(total)
  assert one["total"] != two["total"]  # The tag is another.
  assert unknown["trouble"].startswith("en-xx: the model was not trained")
  assert no_direction["trouble"].startswith("no: ")


def translated(directory, text, *flags, monkeypatch, capsys):
  data = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
  monkeypatch.setattr(sys, "stdin", data)
  capsys.readouterr()
  assert not basemt("translate", directory, "--to=de", *flags)
  gin.clear_config()
  return capsys.readouterr().out.splitlines()


def test_translations_are_drawn_and_begin_as_told(
  directory, monkeypatch, capsys
):
  def translate(text, *flags):
    return translated(
      directory, text, *flags, monkeypatch=monkeypatch, capsys=capsys
    )

  text = "no 1\n\nno 22\n"
  found = translate(text, "--prefix=NO 7")
  assert [line[:4] for line in found] == ["NO 7", "", "NO 7"]
  found = translate("no 1\tAB\nno 22\n", "--prefix_column")
  assert found[0].startswith("AB") and not found[1].startswith("AB")
  sample = ("--sample", "--temperature=2", "--n_best=3", "--seed=5")
  drawn = translate(text, *sample)
  assert drawn == translate(text, *sample)
  assert [line[0] for line in drawn] == list("1112333")
  assert drawn != translate(text, *sample[:-1], "--seed=6")


def test_sampling_flags_without_sampling_are_refused(directory, capsys):
  assert basemt("translate", directory, "--to=de", "--top_p=0.5") == 1
  assert "--top_p is about sampling: add --sample" in capsys.readouterr().err
  flags = ("--sample", "--temperature=0")
  assert basemt("translate", directory, "--to=de", *flags) == 1
  assert "--temperature" in capsys.readouterr().err


def test_backtranslated_and_distilled_pairs_are_files_to_train_on(
  directory, tmp_path, capsys
):
  pytest.importorskip("seqio")
  from tasks import files

  data = tmp_path / "data"
  data.mkdir()
  (data / "en-de.train.tsv").write_text("no 1\tNO 1\nno 2\tNO 2\n")
  (tmp_path / "mono.de").write_text("NO 3\n\nNO 4\n" + "X" * 50 + "\n")
  flags = ("--input", tmp_path / "mono.de", "--from=de", "--to=en")
  assert not basemt(
    "backtranslate", directory, *flags, "--output", data, "--sample"
  )
  told = capsys.readouterr().out
  assert "2 pairs of 4 sentences (2 left out" in told
  assert not basemt(
    *("distil", directory, "--data_dir", data, "--output", data),
    *("--best_by_bleu", "--beam_size=2", "--directions=en-de"),
  )
  summary = files.scan(data)
  assert set(summary.files) == {
    ("en", "de"),
    ("en_x_bt", "de"),
    ("en", "de_x_kd"),
  }
  pairs = list(files.read_direction(summary, "train", "en_x_bt", "de"))
  assert [target for _, target in pairs] == ["NO 3", "NO 4"]
  pairs = list(files.read_direction(summary, "train", "en", "de_x_kd"))
  assert [source for source, _ in pairs] == ["no 1", "no 2"]
  assert basemt(
    "distil", directory, "--data_dir", data, "--output", data, "--directions=x"
  )
  assert "only de-en, en-de in common" in capsys.readouterr().err


def test_evaluation_takes_a_metric_command(directory, capsys):
  program = "import sys\nfor line in sys.stdin: print(len(line))"
  command = shlex.join([sys.executable, "-S", "-c", program])
  assert not basemt("evaluate", directory, "--metric_command", command)
  (file,) = pathlib.Path(directory).glob("evaluation/test_60_*/scores.json")
  values = json.loads(file.read_text())
  rows = values["directions"] + values["means"]
  assert all(row["metrics"]["metric"] > 50 for row in rows)
  assert "metric" in capsys.readouterr().out
  assert basemt("evaluate", directory, "--metric_command", "/nowhere/comet")
  assert "cannot be started: No such file" in capsys.readouterr().err


def test_checkpoints_are_averaged(directory, tmp_path, capsys):
  assert not basemt(
    "average", directory, "--last=1", "--output", tmp_path / "m"
  )
  assert "mean of the weights of steps 60" in capsys.readouterr().out
  assert trained.load(tmp_path / "m").step == 60
