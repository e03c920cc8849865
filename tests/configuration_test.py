"""What a command line and its files may hold: paths, modules, slips."""

import ctypes
import importlib
import io
import logging
import os
import re
import resource
import sys
import warnings

import pytest
from checks_test import configured

import gin
from basemt_jax import cli, files, processes
from basemt_jax.commands import configuration, console, flags
from basemt_jax.inspection import tables

pytestmark = pytest.mark.usefixtures("clean_gin")


def sentence(*bindings, **options):
  with pytest.raises(configuration.UsageError) as error:
    configured(*bindings, **options)
  text = str(error.value)
  assert "\n" not in text, text
  return text


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
  "path",
  [
    *(
      "/tmp/100%done",
      "%-",
      "a b",
      "a\\b",
      "C:\\new\\table",
      "it's",
      'say "x"',
    ),
    *("a#b", "5 runs", "x=y", "[old]", "{x}", "(1", "ünï/語", "run,2", "1e3/x"),
  ],
)
def test_a_path_is_what_was_typed(path, tmp_path):
  if path == "%-":
    path = "./%-"  # A leading % is a macro's, as in T5X.
  run = configured(f"MODEL_DIR={path}")
  assert run.model_dir == path
  # And is still when the saved configuration is read again.
  configuration.save_config(str(tmp_path))
  gin.clear_config()
  saved = tmp_path / "config"
  assert configured(files=(saved,), given=()).model_dir == path


def test_home_is_home_and_an_unset_variable_is_told(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert configured("MODEL_DIR=~/x").model_dir == f"{tmp_path}/x"
  assert configured("MODEL_DIR='~/x'").model_dir == f"{tmp_path}/x"
  assert flags.path("~/x") == f"{tmp_path}/x"
  assert "is a variable unset?" in sentence("MODEL_DIR=")
  assert not (tmp_path / "x").exists()


def test_empty_paths_of_flags_are_refused(capsys):
  with pytest.raises(SystemExit):
    cli.main(["train", "--model_dir="])
  assert "--model_dir: the path is empty" in capsys.readouterr().err


# -------------------------------------------------------------- modules


def test_the_command_line_uses_what_gin_files_import():
  run = configured("optax.lion.b1=0.9", "OPTIMIZER=@optax.lion")
  optimizer = run.settings.optimizer
  assert optimizer.func.__name__ == "lion" and optimizer.keywords["b1"] == 0.9
  found = sentence("OPTIMIZER=@optax.lionn")
  assert "optax has no lionn" in found
  assert "a gin file has to import" in sentence("OPTIMIZER=@elsewhere.lion")


def test_modules_of_the_working_directory_are_found(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
  name = f"mine_{os.getpid()}"
  (tmp_path / f"{name}.py").write_text(
    "def steps(n: int) -> int:\n  return n\n"
  )
  (tmp_path / "own.gin").write_text(
    f"from __gin__ import dynamic_registration\nimport {name}\n"
    f"LOG_STEPS = @{name}.steps()\n{name}.steps.n = 7\n"
  )
  importlib.invalidate_caches()
  options = {"files": ("models/tiny", "recipes/base", tmp_path / "own")}
  assert configured(**options).settings.log_every == 7
  configuration.import_modules([name])
  # What a function of the user's returns is checked when it is known.
  with pytest.raises(ValueError, match=r"log_every is 0; .* at least 1"):
    configured(f"{name}.steps.n=0", **options)


@pytest.mark.parametrize(
  "text, expected",
  [
    ("import task.cldr", "did you mean tasks"),
    ("import tasks.cldrr", "'tasks.cldrr' .*; did you mean tasks.cldr?"),
    (
      "import nowhere_at_all",
      "'nowhere_at_all' .*; looked in the current folder",
    ),
    ("import raises_{pid}", "KeyError: 'oops'"),
    ("include '{path}'", "includes itself"),
    ("\udcff\udcfe\x00", "no UTF-8 text"),
    ("\0", "line 2"),
    ("LOG_STEPS = = 4", "line 2"),
    ("steps.Settings.tran_steps = 4", "did you mean train_steps?"),
    ("TEMPERATURE = @heating.lineal()", "did you mean heating.linear?"),
    # Nothing has named it before.
    ("S = @cosine_decy()", "did you mean optimizer.cosine_decay?"),
    ("LOG_STEP = 4", "LOG_STEP: nothing uses .* mean LOG_STEPS?"),
  ],
)
def test_broken_gin_files_are_one_sentence(
  text, expected, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path, pid = tmp_path / "broken.gin", os.getpid()
  (tmp_path / f"raises_{pid}.py").write_text("{}['oops']\n")
  importlib.invalidate_caches()
  header = "from __gin__ import dynamic_registration\n"
  if "steps." in text or "heating." in text:
    header += "from basemt_jax import heating\nfrom basemt_jax import steps\n"
  text = header + text.format(path=path, pid=pid) + "\n"
  path.write_bytes(text.encode("utf-8", "surrogateescape"))
  found = sentence(files=("models/tiny", "recipes/base", tmp_path / "broken"))
  assert re.search(expected.replace("?", "\\?"), found), found


EVIL = """
from __gin__ import dynamic_registration
from basemt_jax import files
from basemt_jax import run
from basemt_jax.commands import configuration
from basemt_jax.commands import trackers
"""


@pytest.mark.parametrize(
  "text, told",
  [
    (
      "import subprocess\n"
      "run.Run.model_dir = @subprocess.getoutput()\n"
      "subprocess.getoutput.cmd = 'touch ran'\n",
      "imports subprocess; .*--module subprocess",
    ),
    ("import planted\n", "imports planted; "),
    ("from os import path\n", "imports os.path; "),
    ("include 'planted.gin'\n", "includes planted.gin"),
    # By way of what this package imports.
    (
      "run.Run.trackers = (@files.os.system(),)\n"
      "files.os.system.command = 'touch ran'\n",
      "refers to posix.system",
    ),
    (
      "run.Run.trackers = (@files.write_atomically(),)\n"
      "files.write_atomically.path = 'ran'\n"
      "files.write_atomically.content = ''\n",
      "refers to basemt_jax.files.write_atomically",
    ),
    (
      "run.Run.trackers = (@configuration.import_modules(),)\n"
      "configuration.import_modules.names = ('planted',)\n",
      "refers to basemt_jax.commands.configuration.import_modules",
    ),
  ],
)
def test_somebody_elses_configuration_runs_nothing(
  text, told, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "planted.py").write_text("open('ran', 'w')\n")
  (tmp_path / "planted.gin").write_text("import planted\n")
  importlib.invalidate_caches()
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.gin").write_text(EVIL + text)
  for command in ("train", "cache", "compile", "vocab --output=x"):
    assert cli.main([*command.split(), "--model_dir=model"]) == 1
    assert re.search(told, capsys.readouterr().err)
    gin.clear_config()
  assert not (tmp_path / "ran").exists()
  assert "planted" not in sys.modules


def test_modules_that_are_named_may_be_in_a_saved_configuration(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  configured()
  configuration.save_config(str(tmp_path))
  name = f"trusted_{os.getpid()}"
  (tmp_path / f"{name}.py").write_text("def steps() -> int:\n  return 7\n")
  importlib.invalidate_caches()
  with open(tmp_path / "config.gin", "a") as file:
    file.write(f"import {name}\nLOG_STEPS = @{name}.steps()\n")
  for module, expected in (([], None), (["tasks"], None), ([name], 7)):
    gin.clear_config()
    options = cli._parser().parse_args(
      ["train", f"--model_dir={tmp_path}", *(f"--module={m}" for m in module)]
    )
    options.bindings = []
    if expected:
      assert configuration.configured(options).settings.log_every == expected
    else:
      with pytest.raises(ValueError, match=f"imports {name}; of a config"):
        configuration.configured(options)


# ------------------------------------------------------------- commands


def test_another_package_adds_a_command(tmp_path, monkeypatch, capsys):
  (tmp_path / "stranger.py").write_text(
    "SUMMARY = 'Say hello.'\n"
    "def add_flags(parser):\n  parser.add_argument('--name')\n"
    "def run(options):\n  print('hello', options.name)\n"
  )
  info = tmp_path / "stranger-1.0.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Name: stranger\nVersion: 1.0\n")
  (info / "entry_points.txt").write_text(
    "[basemt_jax.commands]\nhello = stranger\nbroken = not_there_at_all\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  assert cli.main(["hello", "--name=you"]) == 0
  output = capsys.readouterr()
  assert output.out == "hello you\n"
  assert output.err == (
    "basemt: warning: the command broken (not_there_at_all) cannot be loaded: "
    "No module named 'not_there_at_all'\n"
  )


class Full(io.StringIO):
  """A standard output that takes nothing."""

  def flush(self):
    raise OSError(28, "No space left on device")

  def fileno(self):
    return self.number


def test_a_full_standard_output_is_one_sentence(monkeypatch, capsys, tmp_path):
  output = Full()
  with open(tmp_path / "x", "w") as file:
    output.number = file.fileno()
    monkeypatch.setattr(sys, "stdout", output)
    options = cli._parser().parse_args(["train"])
    assert cli._guarded(options, lambda options: print("lost")) == 1
  error = capsys.readouterr().err.splitlines()
  assert error[0] == (
    "basemt: error: standard output: No space left on device; not all was "
    "written there"
  )


# ------------------------------------------------------------ terminals


def test_text_tells_a_terminal_nothing():
  text = "\x1b[2Ja\tb\x07\x9b1m\u202egfed\u2066 ž語 \u200d"
  assert files.printable(text) == (
    "\\x1b[2Ja\tb\\x07\\x9b1m\\u202egfed\\u2066 ž語 \u200d"
  )


def test_warnings_of_this_package_are_sentences_of_the_command(capsys):
  here = str(configuration.PACKAGE / "translation.py")
  with cli._warnings_told():
    logging.getLogger("basemt_jax.data.x").warning("%d pieces\x1b[2J", 7)
    warnings.simplefilter("always")
    warnings.warn_explicit("long sources", UserWarning, here, 1)
  assert capsys.readouterr().err == (
    "basemt: warning: 7 pieces\\x1b[2J\nbasemt: warning: long sources\n"
  )


def test_tables_and_progress_tell_a_terminal_nothing(capsys):
  console.standard().message("packing \x1b[2J")
  table = tables.Table("", ["x"], [["\x1b[31m"]], note="")
  tables.show(table, tables.terminal())
  output = capsys.readouterr()
  assert output.err == "packing \\x1b[2J\n"
  assert "\x1b" not in output.out and "\\x1b[31m" in output.out


def test_the_first_process_listens_where_it_was_told():
  assert processes._bind_address("localhost:1234") == "localhost:1234"
  assert processes._bind_address("127.0.0.1:1234") == "127.0.0.1:1234"
  if os.path.exists("/proc/net/if_inet6"):
    assert processes._bind_address("[::1]:1234") == "[::1]:1234"
  # Of no interface here (a documentation address): JAX's default.
  assert processes._bind_address("192.0.2.1:1234") is None
  assert processes._bind_address(None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_not_fetched_again(monkeypatch):
  monkeypatch.setattr(configuration, "_ACCELERATORS", ())
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    pytest.skip("another C library")
  libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
  size = 2**26

  def pages_fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    libc.memset(memory, 1, ctypes.c_size_t(size))
    libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

  configuration.keep_memory()
  pages_fetched()
  # A tenth: other threads fetch pages, too.
  assert pages_fetched() < size / resource.getpagesize() / 10
