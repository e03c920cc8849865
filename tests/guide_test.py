"""The guide's commands run as they stand, on a toy corpus and network."""

import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import pytest
import toy

import gin
from basemt_jax import cli
from basemt_jax import run as run_lib

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = [
  block.strip()
  for block in re.findall(
    r"```sh\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.S
  )
]
TOY = (
  """
from __gin__ import dynamic_registration
from basemt_jax import model
from basemt_jax import translation
VOCAB_SIZE = 400
BATCH_SIZE = 8
TRAIN_STEPS = 4
WARMUP_STEPS = 2
LOG_STEPS = 2
EVAL_STEPS = 4
SAVE_STEPS = 4
BLEU_STEPS = 0
translation.SearchOptions.max_target_length = 4
"""
  + toy.NETWORK_GIN
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working directory with downloads, as the guide has it."""
  (tmp_path / "downloads").mkdir()
  words = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
  ]
  for number, language in enumerate(("de", "sw")):
    pairs = [
      (f"{a} {b} and {c}", f"{c}{number} und {b}{number} {a}{number}")
      for a in words
      for b in words
      for c in words[: 6 - 3 * number]
    ]
    cuts = {"phrases": pairs[40:], "dev": pairs[:20], "test": pairs[20:40]}
    for name, part in cuts.items():
      file = tmp_path / "downloads" / f"{name}.en-{language}.tsv"
      file.write_text("".join(f"{a}\t{b}\n" for a, b in part))
  (tmp_path / "toy.gin").write_text(TOY)
  (tmp_path / "gin").symlink_to(ROOT / "gin")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("BASEMT_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
  yield tmp_path
  gin.clear_config()


def basemt(command, monkeypatch):
  """Runs `basemt ...`, perhaps with `echo ... |` before it."""
  before, _, line = command.rpartition("| ")
  if before:
    text = " ".join(shlex.split(before)[1:]) + "\n"
    stream = io.TextIOWrapper(io.BytesIO(text.encode()))
    monkeypatch.setattr("sys.stdin", stream)
  name, *arguments = shlex.split(line)[1:]
  if any(a.startswith("--gin_file") for a in arguments):
    arguments.append("--gin_file=toy.gin")  # Later files win.
  assert cli.main([name, *arguments]) == 0, command
  gin.clear_config()


def serve_and_ask(serve, curl):
  """Starts the service on a free port; what it answers."""
  arguments = shlex.split(serve)[1:]
  arguments[-1] = "--port=0"
  process = subprocess.Popen(
    [sys.executable, "-m", "basemt_jax.cli", *arguments],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  with process:
    try:
      address = process.stdout.readline().split()[-1]
      _, url, _, header, _, data = shlex.split(curl)
      request = urllib.request.Request(
        url.replace("http://127.0.0.1:8000", address),
        data.encode(),
        dict([header.split(": ")]),
      )
      with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
      process.terminate()
      assert process.wait(20) == 0
    finally:
      process.kill()
  return answer


def test_ten_commands(folder, monkeypatch, capsys):
  assert COMMANDS[0].startswith("pip install 'basemt_jax[")
  *commands, serve, curl = COMMANDS[1:]
  assert len(commands) == 8 and serve.startswith("basemt serve")
  for command in commands:
    *first, command = command.split(" && ")
    for line in first:  # cp -r
      _, _, source, target = shlex.split(line)
      shutil.copytree(source, target)
    basemt(command, monkeypatch)
  assert (folder / "inspect.html").stat().st_size > 10_000
  (scores,) = folder.glob("runs/sparse/evaluation/test_4_beam4/scores.json")
  assert "en-sw" in scores.read_text()
  assert "license: cc-by-4.0" in (folder / "exported/README.md").read_text()
  capsys.readouterr()
  answer = serve_and_ask(serve, curl)
  assert len(answer["translations"]) == 2
