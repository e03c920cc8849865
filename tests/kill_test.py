"""kill -9 through the command line, at the worst moments: the same bits."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import simulated
import toy

ROOT = pathlib.Path(__file__).parent.parent
STEPS, DENSE_STEPS = 40, 16
CONFIG = f"""
include 'gin/models/tiny.gin'
include 'gin/recipes/base_heated_dense_pretrained.gin'
MIXTURE_OR_TASK_NAME = 'not looked at'
TASK_FEATURE_LENGTHS = {{'inputs': 32, 'targets': 24}}
BATCH_SIZE = 4
TRAIN_STEPS = {STEPS}
DENSE_STEPS = {DENSE_STEPS}
WARMUP_STEPS = 4
LOG_STEPS = 1
EVAL_STEPS = 20
SAVE_STEPS = 4
model.TransformerConfig.dropout_rate = 0.1
translation.SearchOptions.max_target_length = 4
{toy.NETWORK_GIN}"""


class Command:
  """`basemt train`, always the same command for a directory."""

  def __init__(self, directory: pathlib.Path, store: str, **environment: str):
    self.model_dir = directory / "run"
    self._gin = directory / "run.gin"
    self._gin.write_text(
      CONFIG
      + f"MODEL_DIR = '{self.model_dir}'\nrun.Run.store_dir = '{store}'\n"
    )
    # One device; the runs share compiled code by the suite's own cache.
    self._environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": simulated.xla_flags(devices=1),
      "PYTHONPATH": str(ROOT),
      **environment,
    }

  @contextlib.contextmanager
  def started(self):
    process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "basemt_jax.cli",
        "train",
        f"--gin_file={self._gin}",
        "--traceback",
      ],
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    try:
      yield process
    finally:
      process.kill()
      process.communicate()

  def finish(self) -> str:
    """Runs to the end; what it wrote to standard error."""
    with self.started() as process:
      _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors

  def kill(self, pattern: str, delay: float = 0.0) -> None:
    """Kills when a line on standard error matches, or a little later."""
    with self.started() as process:
      wait_for(process, pattern)
      time.sleep(delay)
      process.kill()
      assert process.wait() == -signal.SIGKILL

  def kill_while_writing(self) -> None:
    """Kills in the sparse phase, with a checkpoint half written."""
    for _ in range(3):
      with self.started() as process:
        wait_for(process, " sparse ")
        while not self.half_written():
          assert process.poll() is None, "the run ended"
          time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
      if self.half_written():
        return
    raise AssertionError("checkpoints were always complete")

  def half_written(self) -> list[str]:
    return [
      n for n in os.listdir(self.model_dir) if "orbax-checkpoint-tmp" in n
    ]


def wait_for(process, pattern: str) -> None:
  seen = []
  for line in process.stderr:
    seen.append(line)
    if re.search(pattern, line):
      return
  raise AssertionError(f"{pattern} was not in:\n{''.join(seen)}")


def assert_same_end(left: Command, right: Command) -> None:
  toy.assert_same_run(
    left.model_dir,
    right.model_dir,
    STEPS,
    toy.SPARSE,
    toy.settings(STEPS, dense_steps=DENSE_STEPS),
    "sparse",
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted, and its store."""
  directory = tmp_path_factory.mktemp("whole")
  store = toy.write_store(directory / "store")
  command = Command(directory, store)
  command.finish()
  return command, store


def test_killed_at_the_worst_moments(whole, tmp_path):
  uninterrupted, store = whole
  command = Command(tmp_path, store)
  command.kill(r"step +2/.* dense ", delay=0.05)
  command.kill("converting")
  assert set(toy.saved(command.model_dir).values()) == {"dense"}
  command.kill_while_writing()
  left = command.half_written()
  errors = command.finish()
  assert "going on from checkpoint_" in errors
  assert left and not command.half_written()
  assert_same_end(command, uninterrupted)


def test_terminated_saves_and_goes_on(whole, tmp_path):
  uninterrupted, store = whole
  command = Command(tmp_path, store)
  with command.started() as process:
    wait_for(process, r"step +5/.* dense ")
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 0
  assert "the same command goes on" in output
  last = max(toy.saved(command.model_dir))
  assert f"going on from checkpoint_{last}, " in command.finish()
  assert_same_end(command, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"places ", "converting"])
def test_interrupted_says_so_and_goes_on(whole, tmp_path, pattern):
  uninterrupted, store = whole
  command = Command(tmp_path, store, JAX_ENABLE_COMPILATION_CACHE="false")
  with command.started() as process:
    wait_for(process, pattern)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
  assert errors.splitlines()[-1].startswith("basemt: interrupted; the same")
  command.finish()
  assert_same_end(command, uninterrupted)


@pytest.mark.slow
def test_killed_anywhere_with_everything_compiled_anew(whole, tmp_path):
  uninterrupted, store = whole
  command = Command(tmp_path, store, JAX_ENABLE_COMPILATION_CACHE="false")
  for pattern, delay in (
    (r"step +1/", 0.0),
    (r"step +3/", 0.3),
    ("converting", 0.5),
    ("converted", 0.0),
    (r" sparse ", 0.0),
    (r" sparse ", 0.1),
  ):
    command.kill(pattern, delay)
  command.finish()
  assert_same_end(command, uninterrupted)
