"""The command line: what it does from end to end, and how it refuses."""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest
import toy

import gin
from basemt_jax import cli, description, files
from basemt_jax import run as run_lib
from basemt_jax.commands import configuration
from basemt_jax.inspection import results

pytestmark = pytest.mark.usefixtures("clean_gin")

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = (
  """
from __gin__ import dynamic_registration
include 'gin/models/tiny.gin'
from basemt_jax import model
from basemt_jax import run
from basemt_jax import translation
MIXTURE_OR_TASK_NAME = 'not looked at'
TASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 24}
BATCH_SIZE = 8
TRAIN_STEPS = 4
LOG_STEPS = 2
EVAL_STEPS = 2
SAVE_STEPS = 2
WARMUP_STEPS = 4
translation.SearchOptions.max_target_length = 4
"""
  + toy.NETWORK_GIN
)


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Has a store and gin files `dense.gin` and `sparse.gin`."""
  directory = tmp_path_factory.mktemp("cli")
  store = toy.write_store(directory / "store")
  for name, recipe in (("dense", "dense"), ("sparse", "base_heated")):
    (directory / f"{name}.gin").write_text(
      f"{CONFIG}\ninclude 'gin/recipes/{recipe}.gin'\n"
      # After the recipe, whose own values would win otherwise.
      + "".join(
        line + "\n"
        for line in CONFIG.splitlines()
        if re.match(r"[A-Z_]+ = ", line)
      )
      + f"MODEL_DIR = '{directory / name}'\nrun.Run.store_dir = '{store}'\n"
    )
  return directory


@pytest.fixture(scope="module")
def dense(folder):
  """A trained dense model's directory."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
    assert cli.main(["train", f"--gin_file={folder}/dense.gin"]) == 0
  gin.clear_config()
  return folder / "dense"


# ---------------------------------------------------------- end to end


def test_training_leaves_checkpoints_metrics_and_scores(dense):
  assert {p.name for p in dense.glob("checkpoint_*")} == {
    "checkpoint_2",
    "checkpoint_4",
  }
  lines = (dense / "metrics.jsonl").read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  assert {m["step"] for m in metrics} == {2, 4}
  losses = [m["loss"] for m in metrics if "loss" in m]
  assert len(losses) == 2 and min(losses) > 0
  assert [m["temperature"] for m in metrics if "loss" in m] == [1.0, 1.0]
  assert list(dense.glob("events.out.tfevents*"))
  scores = json.loads(
    (dense / "evaluation/test_4_greedy/scores.json").read_text()
  )
  assert "en-de" in json.dumps(scores)


def test_the_same_command_again_only_evaluates(
  dense, folder, one_device, capsys
):
  before = sorted(dense.glob("checkpoint_*"))
  assert cli.main(["train", f"--gin_file={folder}/dense.gin"]) == 0
  output = capsys.readouterr()
  assert "going on from checkpoint_4" in output.err
  assert "tokens/s" not in output.err
  assert "en-fr" in output.out and "mean of all" in output.out
  assert sorted(dense.glob("checkpoint_*")) == before


def test_results_that_cannot_be_written_are_shown(
  dense, one_device, capsys, monkeypatch
):
  def full(path, content):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  monkeypatch.setattr(files, "write_atomically", full)
  assert cli.main(["evaluate", f"--model_dir={dense}", "--split=test"]) == 1
  output = capsys.readouterr()
  assert "mean of all" in output.out
  assert re.match(
    rf"basemt: error: {dense}/evaluation/\S+ could not be written: No space",
    output.err.splitlines()[-2],
  )


def test_evaluation_of_another_split_and_checkpoint(dense, one_device, capsys):
  assert (
    cli.main(
      [
        "evaluate",
        f"--model_dir={dense}",
        "--split=validation",
        "--checkpoint=2",
        "--beam_size=2",
      ]
    )
    == 0
  )
  output = capsys.readouterr().out
  assert re.search(r"validation at step 2", output)
  assert "de-en" in output and "nrefs:1" in output
  written = dense / "evaluation" / "validation_2_beam2"
  assert (written / "scores.json").exists()
  assert len(list(written.iterdir())) > 1


def test_any_test_sets_are_evaluated_without_the_data_of_training(
  dense, folder, one_device, tmp_path, monkeypatch, capsys
):
  moved = tmp_path / "moved"
  shutil.copytree(dense, moved)
  (tmp_path / "sets").mkdir()
  lines = "no 12\tnein 12\nno 345\tnein 345\n"
  (tmp_path / "sets" / "newstest2014.en-de.tsv").write_text(lines)
  arguments = ["evaluate", f"--model_dir={moved}", f"{tmp_path}/sets"]
  for more in ([], ["--beam_size=2"]):
    assert cli.main([*arguments, *more]) == 0
    output = capsys.readouterr().out
    assert output.startswith("newstest2014:\n") and "1 direction " in output
    gin.clear_config()
  for search, beam_size in (("greedy", 1), ("beam2", 2)):
    written = moved / "evaluation" / f"newstest2014_4_{search}"
    scores = json.loads((written / "scores.json").read_text())
    assert scores["test_set"] == "newstest2014" and scores["step"] == 4
    assert scores["search"]["beam_size"] == beam_size
    assert {d["direction"]: d["test_pairs"] for d in scores["directions"]} == {
      "en-de": 2,
      "de-en": 2,
    }
    assert (written / "en-de.src").read_text() == "no 12\nno 345\n"
    assert (written / "de-en.ref").read_text() == "no 12\nno 345\n"
  found = results.evaluations(moved)
  assert {"newstest2014, beam 2", "newstest2014, greedy"} <= set(found)


def translated(dense, lines, *flags, monkeypatch, capsys):
  data = io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8")
  monkeypatch.setattr(sys, "stdin", data)
  capsys.readouterr()
  arguments = ["translate", f"--model_dir={dense}", "--to=de", *flags]
  assert cli.main(arguments) == 0
  gin.clear_config()
  return capsys.readouterr().out


def test_translation_keeps_lines_and_gives_n_best(
  dense, one_device, tmp_path, monkeypatch, capsys
):
  def translate(lines, *flags):
    return translated(
      dense, lines, *flags, monkeypatch=monkeypatch, capsys=capsys
    )

  lines = "no 12\n\nno 345\n"
  plain = translate(lines).split("\n")
  assert len(plain) == 4 and plain[1] == plain[3] == ""
  assert translate("") == ""
  nbest = translate(lines, "--n_best=2", "--beam_size=3").splitlines()
  # Two hypotheses of each line but the empty one, which has one, best first.
  numbers, scores, texts = zip(*(x.split("\t") for x in nbest), strict=True)
  assert numbers == ("1", "1", "2", "3", "3") and nbest[2] == "2\t0.0000\t"
  assert float(scores[0]) >= float(scores[1])
  assert float(scores[3]) >= float(scores[4])
  records = translate(lines, "--n_best=2", "--beam_size=3", "--jsonl")
  records = [json.loads(line) for line in records.splitlines()]
  assert [r["line"] for r in records] == [1, 2, 3]
  assert [r["source"] for r in records] == lines.splitlines()
  assert [t["text"] for r in records for t in r["translations"]] == [*texts]
  # From a file, to a file: the same, and the last line needs no end.
  source, target = tmp_path / "in.txt", tmp_path / "out.txt"
  source.write_text(lines[:-1])
  assert (
    translate("", f"--input={source}", f"--output={target}", "--alpha=0") == ""
  )
  assert len(target.read_text().splitlines()) == 3


def test_converted_model_goes_on_with_another_temperature(
  dense, folder, one_device, capsys
):
  sparse = folder / "converted"
  convert = [
    "convert",
    f"--gin_file={folder}/sparse.gin",
    f"--from={dense}",
    f"--to={sparse}",
  ]
  assert cli.main(convert) == 0
  gin.clear_config()
  found = capsys.readouterr().out
  error = re.search(r"checkpoint_4: converted; .* ([0-9.e+-]+)\n", found)
  assert error and float(error[1]) <= 1e-5
  assert toy.saved(sparse) == {4: "sparse"}
  # Never twice into the same directory.
  assert cli.main(convert) == 1
  gin.clear_config()
  assert "already holds checkpoint_4" in capsys.readouterr().err
  # Longer, with the temperatures of the shorter run.
  train = [
    "train",
    f"--model_dir={sparse}",
    "--gin.TRAIN_STEPS=6",
    "--gin.HEATING_STEPS=4",
  ]
  assert cli.main(train) == 0
  assert "going on from checkpoint_4, sparse" in capsys.readouterr().err
  assert toy.saved(sparse) == {4: "sparse", 6: "sparse"}


def test_without_test_split_the_dev_split_is_evaluated(
  folder, dense, one_device, tmp_path, capsys
):
  for splits, text in (
    (("train", "validation"), "validation at step 4"),
    (("train",), "trained, but not evaluated: the data has no pairs"),
  ):
    store = toy.write_store(tmp_path / "-".join(splits), splits)
    copy = shutil.copytree(dense, tmp_path / "-".join(("copy", *splits)))
    train = [
      "train",
      f"--gin_file={folder}/dense.gin",
      f"--gin.run.Run.store_dir='{store}'",
      # Its checkpoint is read, for nothing is left to train.
      f"--model_dir={copy}",
    ]
    assert cli.main(train) == 0
    gin.clear_config()
    assert text in capsys.readouterr().out


def test_a_configuration_is_data_to_those_who_only_use_a_model(
  dense, one_device, tmp_path, monkeypatch, capsys
):
  """Nothing that `config.gin` names is imported or called, by any command."""
  stranger = shutil.copytree(dense, tmp_path / "stranger")
  mark = tmp_path / "it-ran"
  text = (stranger / "config.gin").read_text()
  (stranger / "config.gin").write_text(
    f"import subprocess\n{text}\nsubprocess.getoutput.cmd = 'touch {mark}'\n"
    "run.Run.model_dir = @subprocess.getoutput()\n"
  )
  translated(stranger, "no 12\n", monkeypatch=monkeypatch, capsys=capsys)
  for command in ("evaluate", "inspect"):
    assert cli.main([command, f"--model_dir={stranger}"]) == 0
    gin.clear_config()
  capsys.readouterr()
  assert not mark.exists()
  known = json.loads((stranger / "model.json").read_text())
  router = known["description"]["network"]["fields"]["router"]
  router["class"] = "subprocess.Popen"
  # With a checksum that fits, as somebody who means it would write.
  known["checksum"] = description._checksum(known["description"])
  (stranger / "model.json").write_text(json.dumps(known))
  error = fails(capsys, "evaluate", f"--model_dir={stranger}")
  assert "it needs subprocess.Popen" in error and "--module" in error


def test_a_model_alone_is_translated_with_converted_and_looked_at(
  dense, folder, one_device, tmp_path, monkeypatch, capsys
):
  lines = "no 12\n\nno 345\n"
  expected = translated(dense, lines, monkeypatch=monkeypatch, capsys=capsys)
  alone = shutil.copytree(dense, tmp_path / "alone")
  known = json.loads((alone / "model.json").read_text())
  known["description"]["store"] = str(tmp_path / "gone")
  known["checksum"] = description._checksum(known["description"])
  (alone / "model.json").write_text(json.dumps(known))
  (alone / "config.gin").unlink()
  capsys.readouterr()
  assert expected == translated(
    alone, lines, monkeypatch=monkeypatch, capsys=capsys
  )
  error = fails(capsys, "evaluate", f"--model_dir={alone}")
  assert f"no longer in {tmp_path}/gone" in error
  assert cli.main(["inspect", f"--model_dir={alone}"]) == 0
  gin.clear_config()
  assert "en-fr" in capsys.readouterr().out
  convert = [
    "convert",
    f"--gin_file={folder}/sparse.gin",
    "--gin.run.Run.store_dir='/gone'",
    f"--from={alone}",
    f"--to={tmp_path}/sparse",
  ]
  assert cli.main(convert) == 0
  gin.clear_config()
  assert toy.saved(tmp_path / "sparse") == {4: "sparse"}
  assert (tmp_path / "sparse" / "model.json").exists()


def test_a_failed_start_leaves_no_files(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for binding in ("BATCH_SIZE=12", "run.Run.store_dir='/nowhere'"):
    fails(
      capsys,
      "train",
      f"--gin_file={folder}/sparse.gin",
      "--model_dir=runs/new",
      f"--gin.{binding}",
    )
    gin.clear_config()
  assert not list(tmp_path.iterdir())


# -------------------------------------------------------------- refusals


def fails(capsys, *arguments):
  """The one sentence on standard error."""
  assert cli.main(list(arguments)) == 1
  output = capsys.readouterr()
  assert output.out == ""
  lines = output.err.splitlines()
  assert lines[-1] == "(--traceback shows where it came from)"
  errors = [line for line in lines if line.startswith("basemt: error: ")]
  assert len(errors) == 1 and errors[0] == lines[-2]
  assert "Traceback" not in output.err
  return errors[0]


@pytest.mark.parametrize(
  "binding, text",
  [
    ("model.TransformerConfig.emb_dimm=4", "no.*|doesn't have.*'emb_dimm'"),
    ("BATCHSIZE=4", "BATCHSIZE: nothing uses.*did you mean BATCH_SIZE"),
    ("FROBNICATE=4", "FROBNICATE: nothing uses.*see .*gin/runs/train.gin"),
    ("BATCH_SIZE", r"--gin.BATCH_SIZE has no value"),
    ("BATCH_SIZE=many", "BATCH_SIZE is 'many'; it must be a whole number"),
    ("TRAIN_STEPS=0", "TRAIN_STEPS is 0; it must be at least 1"),
    ("MODEL_DEVICES=16", "model=16.*multiple of 16 devices.*there are 8"),
    ("BATCH_SIZE=12", "batch of 12 rows.*8 devices"),
    ("TEMPERATURE=@heating.lineal()", "heating.lineal"),
  ],
)
def test_wrong_bindings_are_one_sentence(
  binding, text, folder, capsys, tmp_path
):
  error = fails(
    capsys,
    "train",
    f"--gin_file={folder}/sparse.gin",
    f"--model_dir={tmp_path}",
    f"--gin.{binding}",
  )
  assert re.search(text, error), error


def test_a_store_that_is_not_there_is_one_sentence(
  folder, one_device, capsys, tmp_path
):
  error = fails(
    capsys,
    "train",
    f"--gin_file={folder}/sparse.gin",
    f"--model_dir={tmp_path}",
    "--gin.run.Run.store_dir='/nowhere'",
  )
  assert re.search("no row store in /nowhere", error, re.IGNORECASE), error


def test_what_is_missing_is_one_sentence(folder, tmp_path, capsys):
  assert "nothing is configured" in fails(capsys, "train")
  error = fails(capsys, "train", "--gin_file=gin/recipes/quick.gin")
  assert "no gin file gin/recipes/quick.gin" in error
  assert "gin/recipes/quickstart.gin" in error
  gin.clear_config()
  broken = tmp_path / "broken.gin"
  broken.write_text("include 'other.gin'\n")
  assert "other.gin" in fails(capsys, "train", f"--gin_file={broken}")
  gin.clear_config()
  broken.write_text("TRAIN_STEPS = = 4\n")
  assert "broken.gin, line 1" in fails(capsys, "train", f"--gin_file={broken}")
  gin.clear_config()
  broken.write_text(
    "from __gin__ import dynamic_registration\nimport no_such_module\n"
  )
  assert "no_such_module" in fails(capsys, "train", f"--gin_file={broken}")
  gin.clear_config()
  broken.write_text("TRAIN_STEPS = 4\n")
  assert "Run" in fails(capsys, "train", f"--gin_file={broken}")
  gin.clear_config()
  error = fails(
    capsys,
    "train",
    "--gin_file=gin/models/tiny.gin",
    "--gin_file=gin/recipes/dense.gin",
    "--model_dir=/nowhere",
  )
  assert "MIXTURE_OR_TASK_NAME has no value" in error
  gin.clear_config()
  error = fails(
    capsys, "train", "--gin_file=gin/recipes/dense.gin", "--model_dir=/nowhere"
  )
  assert "NETWORK has no value: give a model" in error


def test_unknown_mixture_is_one_sentence(tmp_path, one_device, capsys):
  pytest.importorskip("seqio")
  error = fails(
    capsys,
    "train",
    "--gin_file=gin/recipes/quickstart.gin",
    f"--model_dir={tmp_path}",
    "--gin.MIXTURE_OR_TASK_NAME=clrd",
  )
  assert "'clrd' is registered (did you mean cldr" in error


def test_models_that_are_not_there_are_one_sentence(folder, tmp_path, capsys):
  missing = tmp_path / "missing"
  error = fails(capsys, "evaluate", f"--model_dir={missing}")
  assert f"{missing} is not the directory of a run" in error
  gin.clear_config()
  files = f"--gin_file={folder}/dense.gin"
  error = fails(capsys, "evaluate", files, f"--model_dir={missing}")
  assert f"{missing} is not a directory" in error
  assert not missing.exists()
  gin.clear_config()
  missing.mkdir()
  error = fails(capsys, "translate", files, f"--model_dir={missing}", "--to=de")
  assert f"{missing} holds no checkpoints; train first" in error


def test_wrong_requests_of_a_model_are_one_sentence(
  dense, folder, one_device, tmp_path, capsys
):
  model = f"--model_dir={dense}"
  configuration = (dense / "config.gin").read_text()
  bad = tmp_path / "latin1.txt"
  bad.write_bytes(b"good\nno\xe9l\n")
  for arguments, text in (
    (["evaluate", model, "--checkpoint=3"], r"no checkpoint of step '3'.*4\]"),
    (["evaluate", model, "--checkpoint=last"], "'last'.*'latest' and 'best'"),
    (["evaluate", model, "--split=dev"], "no pairs in split 'dev'.*test"),
    (
      ["evaluate", model, "--beam_size=0"],
      "--beam_size is 0; it must be 1",
    ),
    (["translate", model, "--to=de", "--alpha=nan"], "--alpha is nan"),
    (
      ["translate", model, "--to=de", "--n_best=3", "--beam_size=2"],
      "--n_best is 3 with --beam_size 2",
    ),
    (["translate", model, "--to=xx"], "--to xx: .*it knows de, en, fr"),
    (
      ["translate", model, "--to=de", f"--input={bad}"],
      "latin1.txt, line 2: not UTF-8",
    ),
    (
      ["translate", model, "--to=de", f"--input={tmp_path}/none.txt"],
      "none.txt",
    ),
    (
      [
        "convert",
        f"--gin_file={folder}/dense.gin",
        f"--from={dense}",
        f"--to={tmp_path}/to",
      ],
      "feed_forward 'dense'; converting needs a sparse one",
    ),
    (
      ["train", f"--gin_file={folder}/sparse.gin", model],
      "checkpoint_4 is dense, but the run has no dense phase",
    ),
  ):
    error = fails(capsys, *arguments)
    gin.clear_config()
    assert re.search(text, error), error
  assert not (tmp_path / "to").exists()
  # A command that was refused has not changed what the run is.
  assert (dense / "config.gin").read_text() == configuration


def test_traceback_is_shown_when_asked_for():
  with pytest.raises(configuration.UsageError, match="nothing is configured"):
    cli.main(["train", "--traceback"])


def test_unknown_flags_and_commands_are_refused(capsys):
  for arguments in ([], ["trian"], ["train", "--gin_fil=x"], ["translate"]):
    with pytest.raises(SystemExit) as stop:
      cli.main(arguments)
    assert stop.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
      r"basemt: error: .*; see basemt \[COMMAND\] --help", error
    )


def command(*arguments, **environment):
  return subprocess.run(
    [sys.executable, "-m", "basemt_jax.cli", *arguments],
    env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **environment},
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_process_of_its_own_says_the_same(folder, tmp_path):
  flags = (f"--gin_file={folder}/dense.gin", "--gin.BATCHSIZE=4")
  quiet = command("train", *flags)
  assert quiet.returncode == 1 and quiet.stdout == ""
  assert quiet.stderr.count("\n") == 2
  assert quiet.stderr.startswith("basemt: error: configuration: --gin.BATCHS")
  loud = command("train", *flags, "--traceback")
  assert loud.returncode == 1 and "Traceback" in loud.stderr


@pytest.mark.parametrize("own", [None, "/elsewhere"])
def test_compiled_programs_are_kept_unless_jax_s_own_variable_says_where(
  own, monkeypatch, tmp_path
):
  names = [name for name in os.environ if name.startswith("JAX_")]
  for name in names:
    monkeypatch.delenv(name)
  monkeypatch.setattr(os, "environ", dict(os.environ))
  os.environ["BASEMT_CACHE"] = str(tmp_path)
  if own:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = own
  configuration.keep_programs()  # JAX is imported: too late.
  assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == own
  monkeypatch.delitem(sys.modules, "jax")
  configuration.keep_programs()
  folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
  assert folder == (own or str(tmp_path / "programs"))
  # Whoever names a folder of their own decides on its size.
  assert ("JAX_COMPILATION_CACHE_MAX_SIZE" in os.environ) == (own is None)
  for name in (n for n in os.environ if n.startswith("JAX_")):
    assert hasattr(jax.config, name.lower())
