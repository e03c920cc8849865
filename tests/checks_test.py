"""Bindings against annotations: every macro, wrong values, one sentence."""

import dataclasses
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import toy

import gin
from basemt_jax import cli, conversion, heating, training, translation
from basemt_jax import run as run_lib
from basemt_jax.commands import checks, configuration

pytestmark = pytest.mark.usefixtures("clean_gin")

ROOT = pathlib.Path(__file__).parent.parent
MACROS = re.findall(
  r"^([A-Z_]+) = ",
  "".join(
    (ROOT / "gin" / name).read_text()
    for name in ("runs/train.gin", "models/tiny.gin")
  ),
  re.MULTILINE,
)
HUGE = "1" + 30 * "0"
WRONG = (
  *("None", "nan", "1e999", "-1", "0", "0.5", "x", "''", "[]", "{}", "True"),
  *("@optimizer.adamw", "@optimizer.adamw()", "@heating.linear", HUGE),
)
# What of these has a meaning, and so is taken.
FITS = {
  "MODEL_DIR": {"x", "nan"},
  "MIXTURE_OR_TASK_NAME": {"x", "nan"},
  **{name: {"0"} for name in ("SEED", "DENSE_STEPS", "BLEU_STEPS")},
  "HEATING_STEPS": {"0"},  # The last temperature at once.
  "START_TEMPERATURE": {"0.5", HUGE},  # As good as uniform.
  "END_TEMPERATURE": {"0.5", HUGE},
  "JOINS": {"{}"},
  "WEIGHTS": {"{}"},
  "MAX_EPOCHS": {"None", "0.5", HUGE},  # No cap at all.
  "SIZES": {"None"},
  "STEP_BOUNDARIES": {"[]"},
  "OPTIMIZER": {"@optimizer.adamw"},
  "PATIENCE": {"None"},
  "SUBWORD_SAMPLING": {"None", "0.5", HUGE},
  "TOP_TEMPERATURE": {"0.5", HUGE},
  "TOP_STEPS": {"0"},
  "AVERAGE_DECAY": {"0", "0.5"},
  "USE_AVERAGE": {"True"},
  "WEIGHT_DECAY": {"0", "0.5"},
  "DROPOUT_RATE": {"0", "0.5"},
  "LEARNING_RATE": {"0.5"},
}


GIVEN = (
  *("MODEL_DIR=/nowhere/run", "MIXTURE_OR_TASK_NAME=none"),
  *("TRAIN_STEPS=100", "WARMUP_STEPS=10"),
)


def configured(
  *bindings, files=("models/tiny", "recipes/base_heated"), given=GIVEN
):
  """The run of a command line; nothing is packed, compiled or written."""
  gin.clear_config()
  options = cli._parser().parse_args(
    ["train", *(f"--gin_file={ROOT / 'gin' / name}.gin" for name in files)]
  )
  options.bindings = [*given, *bindings]
  return configuration.configured(options)


@pytest.mark.parametrize("macro", MACROS)
def test_wrong_values_of_every_macro_are_one_sentence_with_its_name(
  macro, tmp_path, monkeypatch
):
  # Every other macro is as the recipe has it, so that the error is this one's.
  for value in WRONG:
    try:
      configured(f"{macro}={value}")
    except configuration.UsageError as error:
      assert value not in FITS.get(macro, ()), error
      text = configuration.one_sentence(error)
      assert re.match(rf"configuration: {macro} is ", text), (value, text)
      assert "\n" not in text and len(text) < 250
      assert not re.search("0x[0-9a-f]{6}", text), text
    else:
      assert value in FITS.get(macro, ()), value
  assert not pathlib.Path("/nowhere").exists()


@pytest.mark.parametrize(
  "binding, text",
  [
    ("NUM_EXPERTS=3.5", "NUM_EXPERTS is 3.5; it must be a whole number"),
    ("TASK_FEATURE_LENGTHS=64", "TASK_FEATURE_LENGTHS is 64; .* dictionary"),
    (
      "TASK_FEATURE_LENGTHS={'input': 64, 'targets': 64}",
      "TASK_FEATURE_LENGTHS is .* must be of inputs and targets",
    ),
    (
      "TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 64}",
      "TASK_FEATURE_LENGTHS\\['inputs'\\] is 0; it must be at least 1",
    ),
    ("run.Run.trackers=wandb", "Run.trackers is 'wandb'; .* list"),
    ("OPTIMIZER=adam", "OPTIMIZER is 'adam'; it must be a function"),
    (
      "OPTIMIZER=@optimizer.adafactor()",
      "OPTIMIZER is .*adafactor\\(\\), .*: write .*adafactor without \\(\\)",
    ),
    (
      "TEMPERATURE=@heating.linear",
      "is @heating.linear; .*: write @heating.linear\\(\\) for",
    ),
    (
      "NETWORK=@model.TransformerConfig()",
      "NETWORK is @model.*: write @model.TransformerConfig without \\(\\)",
    ),
    (
      "JOINS={'gu': -3}",
      "JOINS\\['gu'\\] is -3; it must be at least 0",
    ),
    (
      "STEP_TEMPERATURES=(1, %NUM_EXPERTS, -2)",
      "STEP_TEMPERATURES\\[2\\] is -2; it must be above 0",
    ),
    ("LEARNING_RATE=-1", "LEARNING_RATE is -1; it must be above 0"),
    ("LEARNING_RATE=%EMB_DIM", "EMB_DIM is 128; it must be at most 100"),
    ("steps.share_of.share=1.5", "steps.share_of.share is 1.5; .* at most 1"),
    ("DENSE_STEPS=101", "dense_steps is 101; .* train_steps = 100"),
    ("EXPERT_DEVICES=3", "num_experts is 8, which the 3 devices"),
    ("MODEL_DEVICES=3", "mlp_dim is 512, which the 3 devices"),
    ("steps.Settings.microbatches=3", "microbatches is 3, .* batch of 128"),
    ("steps.Settings.patience=x", "Settings.patience is 'x'; .* whole number"),
    ("model.TransformerConfig.encoder_expert_blocks=(2,)", "blocks \\[2\\]"),
    *(
      (f"model.TransformerConfig.{name}={value}", f"{name} is .*{text}")
      for name, value, text in (
        ("dropout_rate", "x", "a number"),
        ("dropout_rate", "nan", "a number"),
        ("dropout_rate", "-0.1", "at least 0"),
        ("dropout_rate", "2", "below 1"),
        ("num_heads", "0", "at least 1"),
        ("head_dim", "7", "even"),
        ("encoder_expert_blocks", "1", "a list"),
        ("dtype", "float17", "'float32', 'bfloat16'"),
        ("dtype", "int32", "'float32', 'bfloat16'"),
        ("router", "5", "."),
      )
    ),
  ],
)
def test_what_is_wrong_and_what_fits_is_said(binding, text):
  with pytest.raises(ValueError) as error:
    configured(binding)
  assert re.search(text, configuration.one_sentence(error.value)), error.value


def test_slips_are_told_from_names():
  for binding, text in (
    ("BATCHSIZE=4", "--gin.BATCHSIZE: nothing uses.*mean BATCH_SIZE"),
    ("FROBNICATE=4", "FROBNICATE: nothing uses.*gin/runs/train.gin"),
    ("LOG_STEPS=%LOGSTEPS", "LOGSTEPS has no value"),
    ("LOG_STEPS=%gin.REQUIRED", "LOG_STEPS has no value: set it with"),
  ):
    with pytest.raises(configuration.UsageError, match=text):
      configured(binding)


def test_a_slip_in_a_file_is_found_though_nobody_typed_it(tmp_path):
  path = tmp_path / "mine.gin"
  path.write_text("WARMUP_STEP = 4\nNOTES_OF_MINE = 'kept'\n")
  with pytest.raises(ValueError, match=r"WARMUP_STEP: .*mean WARMUP_STEPS"):
    configured(files=("models/tiny", "recipes/base", path.with_suffix("")))
  path.write_text("NOTES_OF_MINE = 'kept'\n")
  configured(files=("models/tiny", "recipes/base", path.with_suffix("")))


def test_values_of_python_are_checked_the_same_way():
  checks.check_fields(toy.settings())
  for instance, text in (
    (toy.settings(0), "Settings.train_steps is 0; it must be at least 1"),
    (toy.settings(microbatches=0), "Settings.microbatches is 0"),
    (toy.settings(rewarm_steps=-1), "Settings.rewarm_steps is -1"),
    (conversion.Options(reinitialise=1.5), "reinitialise is 1.5"),
    (conversion.Options(centroids="random"), "'orthogonal' or 'activations'"),
    (translation.SearchOptions(batch_size=0), "SearchOptions.batch_size is 0"),
    (dataclasses.replace(toy.DENSE, dropout_rate=1), "dropout_rate is 1"),
    # Inside of another.
    (
      toy.settings(conversion_options=conversion.Options(noise=-1.0)),
      "Options.noise is -1.0",
    ),
  ):
    with pytest.raises(ValueError, match=text):
      checks.check_fields(instance)


def test_every_annotation_that_can_be_bound_is_understood():
  configured()
  from gin import config as gin_config

  for _, wrapped in checks._registered():
    target = wrapped.__init__ if inspect.isclass(wrapped) else wrapped
    hints = checks._hints(wrapped)
    for name in list(inspect.signature(target).parameters)[:50]:
      if name != "self":
        assert name in hints, (wrapped, name)
        checks._errors(object(), hints[name])  # No exception.
  assert len(gin_config._REGISTRY.items()) > 15


def test_devices_that_do_not_fit_are_found_before_anything_is_packed(
  monkeypatch,
):
  def packed(self, progress=None):
    raise AssertionError("rows were packed")

  monkeypatch.setattr(run_lib.Run, "store", packed)
  for bindings, text in (
    (("BATCH_SIZE=12",), "batch of 12 rows .* 8 devices"),
    (("BATCH_SIZE=64",), r"64 rows, .* rows_per_group=16 rows on 8 devices"),
    (
      ("steps.Settings.microbatches=2",),
      r"64 rows, .* multiple of 128: 128, 256, 384",
    ),
    (("MODEL_DEVICES=16",), "model=16 needs a multiple of 16 devices"),
  ):
    run = configured(*bindings)
    with pytest.raises(ValueError, match=text):
      training.train(run, None, run_lib.SILENT)


def test_a_warm_up_longer_than_the_run_is_told():
  assert configured().doubts() == []
  (doubt,) = configured("WARMUP_STEPS=101").doubts()
  assert "still rises at the last step, 99" in doubt
  decays = "LEARNING_RATE_SCHEDULE=@optimizer.cosine_decay()"
  assert configured(decays).doubts() == []
  assert len(configured(decays, "WARMUP_STEPS=200").doubts()) == 1


def test_a_class_whose_objects_are_called_is_no_slip():
  class Module:
    def __call__(self) -> float:
      return 1.0

  for gives in (Module, object, Any):
    assert not checks._errors(Module, Callable[..., gives])
  # As a maker of schedules is, where a schedule is wanted.
  (error,) = checks._errors(heating.linear, heating.Schedule)
  assert "function that gives" in error["msg"]
  assert not checks._errors(heating.linear(1, 2, 3), heating.Schedule)
