"""T5X's configurations, parsed without T5X: stand-ins have its parameters.

What T5X itself does with them is in `t5x_test`.
"""

import pathlib
import re
import shlex
import sys
import types

import pytest

import gin
from basemt_jax.commands import t5x_settings

pytest.importorskip("seqio")
pytest.importorskip("clu")

ROOT = pathlib.Path(__file__).parent.parent

# The parameters of T5X cc342d4 that its files and ours bind.
TRAIN = """model model_dir train_dataset_cfg train_eval_dataset_cfg
  infer_eval_dataset_cfg checkpoint_cfg partitioner trainer_cls total_steps
  eval_steps eval_period relative_steps random_seed use_hardware_rng
  summarize_config_fn get_dataset_fn train_eval_get_dataset_fn
  inference_evaluator_cls stats_period"""
USE = """model dataset_cfg partitioner restore_checkpoint_cfg output_dir
  inference_evaluator_cls mode"""
PARAMETERS = {
  "partitioning.PjitPartitioner": """num_partitions model_parallel_submesh
    ici_mesh_shape dcn_mesh_shape logical_axis_rules""",
  "partitioning.standard_logical_axis_rules": "",
  "trainer.Trainer": "num_microbatches learning_rate_fn",
  "gin_utils.summarize_gin_config": "",
  "utils.create_learning_rate_scheduler": """factors base_learning_rate
    warmup_steps""",
  "utils.CheckpointConfig": "restore save",
  "utils.RestoreCheckpointConfig": """path mode dtype fallback_to_scratch
    state_transformation_fns restore_dataset""",
  "utils.SaveCheckpointConfig": "period dtype keep save_dataset",
  "utils.DatasetConfig": """mixture_or_task_name task_feature_lengths split
    batch_size shuffle seed use_cached pack module""",
  "utils.get_dataset": "",
}
HEAD = """
from __gin__ import dynamic_registration
import __main__ as script
import seqio
from t5x import gin_utils
from t5x import partitioning
from t5x import trainer
from t5x import utils
MIXTURE_OR_TASK_NAME = %gin.REQUIRED
MIXTURE_OR_TASK_MODULE = None
"""
# What T5X's own files bind and ours do not replace.
FILES = {
  "pretrain": """
TASK_FEATURE_LENGTHS = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
MODEL_DIR = %gin.REQUIRED
USE_CACHED_TASKS = True
USE_HARDWARE_RNG = False
RANDOM_SEED = None
script.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  train_dataset_cfg = @train/utils.DatasetConfig()
  checkpoint_cfg = @utils.CheckpointConfig()
  total_steps = %TRAIN_STEPS
  random_seed = %RANDOM_SEED
  use_hardware_rng = %USE_HARDWARE_RNG
train/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  use_cached = %USE_CACHED_TASKS
utils.create_learning_rate_scheduler:
  factors = 'constant * rsqrt_decay'
  base_learning_rate = 1.0
  warmup_steps = 10000
partitioning.PjitPartitioner.num_partitions = 1
trainer.Trainer.num_microbatches = None
""",
  "eval": """
CHECKPOINT_PATH = %gin.REQUIRED
EVAL_OUTPUT_DIR = %gin.REQUIRED
script.evaluate:
  model = %MODEL
  output_dir = %EVAL_OUTPUT_DIR
utils.RestoreCheckpointConfig.path = %CHECKPOINT_PATH
partitioning.PjitPartitioner.num_partitions = 1
""",
  "infer": """
CHECKPOINT_PATH = %gin.REQUIRED
INFER_OUTPUT_DIR = %gin.REQUIRED
script.infer:
  model = %MODEL
  output_dir = %INFER_OUTPUT_DIR
utils.RestoreCheckpointConfig.path = %CHECKPOINT_PATH
partitioning.PjitPartitioner.num_partitions = 1
""",
}


def stand_in(module, name, parameters):
  """A function with these parameters."""
  arguments = ", ".join(f"{p}=None" for p in parameters.split())
  space = {"__name__": module}
  exec(f"def {name}({arguments}): pass", space)
  return space[name]


@pytest.fixture(scope="module")
def t5x(tmp_path_factory):
  """Parses what a command line of T5X's says."""
  folder = tmp_path_factory.mktemp("t5x")
  for name, text in FILES.items():
    path = folder / "t5x" / "configs" / "runs" / f"{name}.gin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + text)
  with pytest.MonkeyPatch.context() as patch:
    package = types.ModuleType("t5x")
    patch.setitem(sys.modules, "t5x", package)
    for dotted, parameters in PARAMETERS.items():
      module, name = dotted.split(".")
      if not hasattr(package, module):
        found = types.ModuleType(f"t5x.{module}")
        patch.setitem(sys.modules, f"t5x.{module}", found)
        setattr(package, module, found)
      setattr(
        getattr(package, module),
        name,
        stand_in(f"t5x.{module}", name, parameters),
      )
    main = sys.modules["__main__"]
    for name, parameters in (
      ("train", TRAIN),
      ("evaluate", USE),
      ("infer", USE),
    ):
      found = stand_in("__main__", name, parameters)
      patch.setattr(main, name, found, raising=False)
      gin.configurable(found)  # As T5X's programs do.
    patch.syspath_prepend(str(ROOT / "tests"))
    for place in (str(folder), str(ROOT)):
      gin.add_config_file_search_path(place)

    def parse(*arguments):
      gin.clear_config()
      files = [a.split("=", 1)[1] for a in arguments if "--gin_file=" in a]
      bindings = [a[len("--gin.") :] for a in arguments if "--gin." in a]
      gin.parse_config_files_and_bindings(files, bindings)

    yield parse
  gin.clear_config()


def commands():
  """Of T5X, in the pages that show them."""
  for page in ("docs/t5x.md", "docs/scaling.md", "README.md"):
    for block in re.findall(
      r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S
    ):
      for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"] and words[2].startswith("t5x."):
          yield pytest.param(words[3:], id=f"{page} {' '.join(words[2:4])}")


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_of_the_docs_is_complete(t5x, words):
  t5x(*words)
  t5x_settings.check()


BASE = (
  "--gin_file=gin/t5x/pretrain_base.gin",
  "--gin_file=gin/models/tiny.gin",
  "--gin_file=gin/recipes/base_heated.gin",
  "--gin.MODEL_DIR='/nowhere'",
  "--gin.MIXTURE_OR_TASK_NAME='none'",
)


def test_a_run_has_the_defaults_of_every_run(t5x):
  t5x(*BASE)
  t5x_settings.check()
  for macro, value in (
    ("BATCH_SIZE", 128),
    ("WARMUP_STEPS", 4000),
    ("TRAIN_STEPS", 100000),
    ("LEARNING_RATE", 1e-3),
  ):
    assert gin.query_parameter(f"{macro}/gin.macro.value") == value
  for macro in ("HEATING_STEPS", "CAP_STEPS"):
    found = gin.query_parameter(f"{macro}/gin.macro.value")
    assert str(found) == "%TRAIN_STEPS"


@pytest.mark.parametrize(
  ("binding", "said"),
  [
    ("TRAIN_STEP = 2", "TRAIN_STEP: nothing uses that macro; did you mean"),
    ("BATCH_SIZE = 'many'", "BATCH_SIZE is 'many'; it must be"),
    ("RANDOM_SEED = 5", "bind SEED alone"),
    ("RANDOM_SEED = None", "bind SEED alone"),
    ("USE_HARDWARE_RNG = True", "bind USE_HARDWARE_RNG = False"),
    ("t5x.partitioning.PjitPartitioner.num_partitions = 2", "EXPERT_DEVICES"),
    (
      "t5x.trainer.Trainer.num_microbatches = 2",
      "bind steps.Settings.microbatches",
    ),
    (
      "t5x.utils.create_learning_rate_scheduler.warmup_steps = 10",
      "bind LEARNING_RATE, WARMUP_STEPS",
    ),
    ("__main__.train.random_seed = 7", "bind SEED alone"),
    (
      "__main__.train.get_dataset_fn = @t5x.utils.CheckpointConfig",
      "bind train.get_dataset_fn = @t5x_data.get_dataset",
    ),
    (
      "__main__.train.partitioner = @t5x.partitioning.PjitPartitioner()",
      "bind EXPERT_DEVICES and MODEL_DEVICES",
    ),
  ],
)
def test_refuses_what_the_run_would_not_follow(t5x, binding, said):
  t5x(*BASE, f"--gin.{binding}")
  with pytest.raises(ValueError, match=re.escape(said)):
    t5x_settings.check()
  t5x(*BASE, "--gin.SEED = 5")
  t5x_settings.check()


@pytest.mark.parametrize("value", ["/tmp/run", "gs://bucket/run", "cldr"])
def test_a_value_without_quotes_is_named(value):
  with pytest.raises(ValueError, match=rf'write --gin.DIR=\\"{value}\\"'):
    t5x_settings.check_quotes(["SEED = 1", f"DIR = {value}"])
  t5x_settings.check_quotes([f"DIR = {value!r}", "NAME = @some.thing()"])
