"""The same training, by T5X itself; skipped where it cannot be imported.

docs/t5x.md says how T5X is put on PYTHONPATH. Every test starts processes of
`python -m t5x.train` and the like, about 20 seconds of CPU each.
"""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from flax import traverse_util

from basemt_jax import checkpointing
from basemt_jax.data import normalisation


def missing():
  """The first module T5X's trainer needs and does not find, or None."""
  # Not imported here: that takes seconds, and warns of what JAX deprecates.
  for name in ("t5x", "airio", "jestimator", "fiddle", "clu", "seqio", "gin"):
    if importlib.util.find_spec(name) is None:
      return name
  places = importlib.util.find_spec("t5x").submodule_search_locations or ()
  if not any((pathlib.Path(p) / "train.py").exists() for p in places):
    return "t5x.train"  # PyPI's t5x is an empty placeholder.
  return None


pytestmark = pytest.mark.skipif(
  missing() is not None,
  reason=f"T5X cannot be run: no module {missing()}; see docs/t5x.md",
)

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from __gin__ import dynamic_registration
import toy_tasks
from basemt_jax import model
from basemt_jax import run
from basemt_jax import steps
MIXTURE_OR_TASK_NAME = 'toy'
TASK_FEATURE_LENGTHS = {{'inputs': 32, 'targets': 24}}
EMB_DIM = 16
NUM_EXPERTS = 4
BATCH_SIZE = 16
TRAIN_STEPS = 4
steps.share_of.share = 0.5
SAVE_STEPS = 1
EVAL_STEPS = 4
LOG_STEPS = 1
model.TransformerConfig:
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 1
  num_decoder_layers = 1
  encoder_expert_blocks = (0,)
  decoder_expert_blocks = (0,)
  rows_per_group = 2
  dropout_rate = 0.1
run.Run.cache_dir = '{cache}'
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
  return Workshop(tmp_path_factory.mktemp("t5x"))


class Workshop:
  """Starts T5X and our commands on the toy tasks, in one directory."""

  def __init__(self, directory):
    self.directory = directory
    self._config = directory / "toy.gin"
    self._config.write_text(CONFIG.format(cache=directory / "cache"))

  def start(self, module, arguments, devices=1):
    """Starts a module in a process of its own."""
    flags = (
      f"--xla_force_host_platform_device_count={devices} "
      # Devices that share busy cores wait for each other; 40 s were too few.
      "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    tests = str(pathlib.Path(__file__).parent)
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": flags,
      "TF_CPP_MIN_LOG_LEVEL": "3",
      "PYTHONPATH": os.pathsep.join(
        [
          *(str(ROOT), tests, str(self.directory)),
          os.environ.get("PYTHONPATH", ""),
        ]
      ),
    }
    return subprocess.Popen(
      [sys.executable, "-m", module, *arguments],
      cwd=ROOT,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def start_t5x(self, script, file, *bindings, config=None, devices=1):
    """Starts a T5X script on the toy tasks."""
    arguments = [
      f"--gin_file=gin/t5x/{file}.gin",
      "--gin_file=gin/recipes/quickstart.gin",
      f"--gin_file={self._config}",
      *([f"--gin_file={config}"] if config else []),
      *(f"--gin.{b}" for b in bindings),
    ]
    return self.start(f"t5x.{script}", arguments, devices)

  def t5x(self, *arguments, fails=False, **options):
    """Runs a T5X script; returns what it writes to standard error."""
    process = self.start_t5x(*arguments, **options)
    _, errors = process.communicate()
    assert (process.returncode != 0) == fails, errors[-3000:]
    return errors

  def t5x_in_two_processes(self, *arguments):
    """Runs a T5X script in two processes, which find each other on loopback."""
    together = (
      "MULTIPROCESS=True",
      f"COORDINATOR_ADDRESS={self.address!r}",
      "PROCESS_COUNT=2",
    )
    started = [
      self.start_t5x(*arguments, *together, f"PROCESS_INDEX={i}")
      for i in range(2)
    ]
    ended(started)

  @property
  def address(self):
    """A free port of this machine."""
    with socket.socket() as free:
      free.bind(("localhost", 0))
      return f"localhost:{free.getsockname()[1]}"

  def ours(self, command, *arguments, devices=1):
    process = self.start(
      "basemt_jax.cli",
      [
        command,
        "--gin_file=gin/recipes/quickstart.gin",
        f"--gin_file={self._config}",
        *arguments,
      ],
      devices,
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return output

  def path(self, name):
    return str(self.directory / name)

  def text(self, name):
    """A path, as gin writes it."""
    return repr(self.path(name))

  def state(self, model_dir, step):
    """All arrays of a checkpoint by path."""
    reader = ocp.PyTreeCheckpointHandler()
    path = pathlib.Path(self.path(model_dir)) / f"checkpoint_{step}" / "state"
    with checkpointing.Checkpoints(
      path.parent.parent, read_only=True
    ) as checkpoints:
      stored = checkpoints.stored(step)
    args = traverse_util.unflatten_dict(
      {p: ocp.RestoreArgs(restore_type=np.ndarray) for p in stored}, sep="/"
    )
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    return traverse_util.flatten_dict(tree, sep="/")


def ended(started, text=""):
  """Reads what all write at once: one that nobody reads from stands still."""
  with concurrent.futures.ThreadPoolExecutor(len(started)) as pool:
    written = list(pool.map(lambda p: p.communicate(text)[1], started))
  for process, errors in zip(started, written, strict=True):
    assert process.returncode == 0, errors[-3000:]


def assert_equal(left, right):
  assert left.keys() == right.keys() and len(left) > 20
  different = [p for p in left if not np.array_equal(left[p], right[p])]
  assert not different


@pytest.fixture(scope="module")
def two_phases(workshop):
  """Dense, converted, interrupted and gone on with; returns our same run."""
  workshop.ours("train", "--model_dir", workshop.path("ours"))
  workshop.t5x("train", "pretrain", f"MODEL_DIR={workshop.text('dense')}")
  sparse = (
    f"MODEL_DIR={workshop.text('sparse')}",
    f"INITIAL_CHECKPOINT_PATH={workshop.text('dense/checkpoint_2')}",
  )
  workshop.t5x("train", "convert", *sparse, "train.total_steps=3")
  workshop.t5x("train", "convert", *sparse)
  return "ours"


def test_two_phases_and_a_restart_are_our_run_bit_by_bit(workshop, two_phases):
  for model_dir, step in (("dense", 2), ("sparse", 3), ("sparse", 4)):
    expected = workshop.state(two_phases, step) if step != 3 else None
    found = workshop.state(model_dir, step)
    if expected is not None:
      assert_equal(found, expected)
    assert any("prices" in path for path in found) == (model_dir == "sparse")


def test_the_directory_is_one_of_ours(workshop, two_phases):
  """Translated with nothing but what T5X has left in it."""
  del two_phases
  process = workshop.start(
    "basemt_jax.cli",
    [
      "translate",
      "--model_dir",
      workshop.path("sparse"),
      "--to=de",
      f"--input={workshop.directory / 'toy.gin'}",
    ],
  )
  output, errors = process.communicate()
  assert process.returncode == 0, errors[-3000:]
  lines = (workshop.directory / "toy.gin").read_text().count("\n")
  assert output.count("\n") == lines


def test_scores_are_written_by_direction(workshop, two_phases):
  folder = workshop.directory / "sparse" / "inference_eval"
  for direction in toy.PAIRS:
    name = direction.replace("-", "_")
    lines = (folder / f"toy.{name}-metrics.jsonl").read_text().splitlines()
    assert {"bleu", "chrf++"} <= json.loads(lines[-1]).keys()


def test_infers_what_we_translate(workshop, two_phases):
  workshop.t5x(
    "infer",
    "infer",
    f"CHECKPOINT_PATH={workshop.text('sparse/checkpoint_4')}",
    f"INFER_OUTPUT_DIR={workshop.text('inferred')}",
  )
  folder = workshop.directory / "ours" / "evaluation" / "test_4_greedy"
  for direction in toy.PAIRS:
    name = direction.replace("-", "_")
    (file,) = (workshop.directory / "inferred").glob(f"toy.{name}-*-00001")
    found = [
      # JSON keeps a line break that a sentence holds; a file of lines cannot.
      normalisation.normalise(json.loads(line)["prediction"])
      for line in file.read_text().splitlines()
    ]
    expected = (folder / f"{direction}.hyp").read_text().split("\n")[:-1]
    assert found == expected


def test_experts_on_eight_devices_are_our_run_bit_by_bit(workshop):
  common = ("DENSE_STEPS=0", "EXPERT_DEVICES=4", "TRAIN_STEPS=2")
  workshop.t5x(
    "train",
    "pretrain_base",
    *common,
    f"MODEL_DIR={workshop.text('eight')}",
    "train.infer_eval_dataset_cfg=None",
    devices=8,
  )
  workshop.ours(
    "train",
    *(f"--gin.{b}" for b in common),
    "--model_dir",
    workshop.path("ours_eight"),
    devices=8,
  )
  assert_equal(workshop.state("eight", 2), workshop.state("ours_eight", 2))


def test_two_processes_train_evaluate_and_infer(workshop):
  workshop.t5x_in_two_processes(
    *("train", "pretrain_base", "DENSE_STEPS=0", "TRAIN_STEPS=2"),
    f"MODEL_DIR={workshop.text('two')}",
    "train.infer_eval_dataset_cfg=None",
  )
  trained = (
    f"CHECKPOINT_PATH={workshop.text('two/checkpoint_2')}",
    "MIXTURE_OR_TASK_NAME='toy.en_de'",
  )
  workshop.t5x_in_two_processes(
    *("infer", "infer", *trained),
    f"INFER_OUTPUT_DIR={workshop.text('two_inferred')}",
  )
  (file,) = (workshop.directory / "two_inferred").glob("*-00001")
  assert len(file.read_text().splitlines()) == 6
  workshop.t5x_in_two_processes(
    *("eval", "evaluate", *trained),
    f"EVAL_OUTPUT_DIR={workshop.text('two_scores')}",
  )
  assert list((workshop.directory / "two_scores").rglob("*-metrics.jsonl"))


def test_sigterm_saves(workshop):
  model_dir = workshop.directory / "stopped"
  process = workshop.start_t5x(
    *("train", "pretrain_base", "DENSE_STEPS=0", "TRAIN_STEPS=100000"),
    *("SAVE_STEPS=100000", "EVAL_STEPS=100000"),
    f"MODEL_DIR={str(model_dir)!r}",
    "train.infer_eval_dataset_cfg=None",
  )
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(ended, [process])
    while not (model_dir / "checkpoint_0").exists():
      assert not done.done(), done.result()
      time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    done.result()
  assert list(model_dir.glob("checkpoint_[1-9]*"))


IMPORTS = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import partitioning
from t5x import trainer
from t5x import utils
"""


@pytest.mark.parametrize(
  ("binding", "said"),
  [
    (
      "train_script.train.get_dataset_fn = @utils.get_dataset",
      "bind train.get_dataset_fn = @t5x_data.get_dataset",
    ),
    (
      "utils.SaveCheckpointConfig.save_dataset = True",
      "bind utils.SaveCheckpointConfig.save_dataset = False",
    ),
    (
      "trainer.Trainer.num_microbatches = 2",
      "bind steps.Settings.microbatches",
    ),
  ],
)
def test_refuses_what_would_not_be_our_run(workshop, tmp_path, binding, said):
  config = tmp_path / "more.gin"
  config.write_text(IMPORTS + binding)
  errors = workshop.t5x(
    "train",
    "pretrain_base",
    f"MODEL_DIR={str(tmp_path / 'run')!r}",
    "train.infer_eval_dataset_cfg=None",
    config=config,
    fails=True,
  )
  assert said in errors
  assert not list((tmp_path / "run").glob("checkpoint_[1-9]*"))


# ------------------------------------------------------------ docs/t5x.md

MY_TASKS = """
import seqio
import toy_tasks

tasks = seqio.get_mixture_or_task("toy").tasks
seqio.MixtureRegistry.add("my_mixture", [(task.name, 1.0) for task in tasks])
"""
# Of commands for more than this machine's cores: less of the same.
SMALL = (
  *("TRAIN_STEPS=2", "EMB_DIM=16", "SAVE_STEPS=2", "EVAL_STEPS=2"),
  "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}",
)


def documented():
  """The commands of docs/t5x.md, as a shell would split them."""
  for block in re.findall(
    r"```sh\n(.*?)```", (ROOT / "docs" / "t5x.md").read_text(), re.S
  ):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      if words and words[0] in ("python", "basemt"):
        yield words


def started(workshop, words, address, index):
  """A documented command, in a directory of the test and on this machine."""
  text = "\n".join(words)
  for place, here in (
    ("/shared/run", "/tmp/sparse"),
    ("HOST:12345", address),
    ("PROCESS_INDEX=0", f"PROCESS_INDEX={index}"),
  ):
    text = text.replace(place, here)
  # Other tests have trained other models beside them.
  text = re.sub(r"/(?:tmp|data|shared)/", f"{workshop.directory}/page/", text)
  words = text.split("\n")
  if words[0] == "basemt":
    return workshop.start("basemt_jax.cli", words[1:])
  if "--gin_file=gin/recipes/quickstart.gin" in words:
    return workshop.start(words[2], words[3:])
  small = [f"--gin.{binding}" for binding in SMALL]
  return workshop.start(words[2], [*words[3:], *small], devices=8)


@pytest.mark.slow
def test_every_command_of_the_page(workshop):
  """As it stands, but for folders; one that is for 256 chips is left out."""
  (workshop.directory / "my_tasks.py").write_text(MY_TASKS)
  ran = 0
  for words in documented():
    if any("pod_" in word for word in words):
      continue
    count = 2 if any("PROCESS_COUNT=2" in word for word in words) else 1
    address = workshop.address
    together = [started(workshop, words, address, i) for i in range(count)]
    ended(together, "Guten Tag\n")
    ran += count
  assert ran == 8
