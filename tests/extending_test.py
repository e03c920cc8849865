"""The page on extending: its files are written, configured and tested."""

import pathlib
import re
import runpy
import sys

import pytest

import gin
from basemt_jax import cli
from basemt_jax.commands import configuration

ROOT = pathlib.Path(__file__).parent.parent
FILES = {
  name: text
  for name, text in re.findall(
    r"```(?:python|gin)\n# (\S+)\n(.*?)```",
    (ROOT / "docs/extending.md").read_text(),
    re.S,
  )
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  gin.clear_config()
  yield tmp_path
  for name in FILES:
    sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith("_test.py")])
def test_its_tests_pass(name, folder):
  tests = runpy.run_path(str(folder / name))
  found = [f for key, f in tests.items() if key.startswith("test_")]
  assert found
  for test in found:
    test()


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".gin")])
def test_its_configurations_are_runs(name, folder):
  model = str(ROOT / "gin/models/tiny.gin")
  options = cli._parser().parse_args(
    ["train", f"--gin_file={model}", f"--gin_file={folder / name}"]
  )
  options.bindings = [f"MODEL_DIR='{folder}'", "MIXTURE_OR_TASK_NAME='none'"]
  run = configuration.configured(options)
  rate = run.settings.learning_rate(10)
  run.settings.transformation(rate)
  if name == "wave.gin":
    assert [run.strategy.temperature(k) for k in (0, 250)] == [1, 4]
    assert str(run.strategy).startswith("wave (1 at first, ")
