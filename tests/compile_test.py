"""Reports of `basemt compile`: numbers by hand, and what the design promises.

The 8 simulated devices of a process of its own always; a TPU slice that is not
there where libtpu is installed.
"""

import dataclasses
import json

import pytest
import simulated

from basemt_jax import cli
from basemt_jax.compilation import ahead_of_time, chips
from basemt_jax.inspection import compile_report

pytestmark = pytest.mark.usefixtures("clean_gin")

# The network of the reports below: by the command line, and by hand.
VOCABULARY, WIDTH, HIDDEN, EXPERTS, ROWS = 384, 32, 64, 8, 128
LENGTHS = {"inputs": 32, "targets": 16}
MESH = {"data": 2, "expert": 4, "model": 1}
FLAGS = [
  "--gin_file=gin/models/tiny.gin",
  "--gin_file=gin/recipes/base.gin",
  f"--vocab_size={VOCABULARY - 20}",  # rounded up
  "--directions=3",
  f"--gin.EMB_DIM={WIDTH}",
  f"--gin.NUM_EXPERTS={EXPERTS}",
  f"--gin.BATCH_SIZE={ROWS}",
  f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}",
  f"--gin.EXPERT_DEVICES={MESH['expert']}",
  *(
    f"--gin.model.TransformerConfig.{name}={value}"
    for name, value in {
      "num_heads": 2,
      "head_dim": 16,
      "mlp_dim": HIDDEN,
      "num_encoder_layers": 1,
      "num_decoder_layers": 1,
      "encoder_expert_blocks": (0,),
      "decoder_expert_blocks": (0,),
    }.items()
  ),
]
EXPERT_LAYERS = 2


def checked(done, file):
  assert done.returncode == 0, done.stderr
  assert "all-to-all" in done.stdout
  value = json.loads(file.read_text())
  report = compile_report.from_json(value)
  assert dataclasses.asdict(report) == value
  return report


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
  directory = tmp_path_factory.mktemp("report")
  file = directory / "report.json"
  return checked(
    simulated.in_own_process([*FLAGS, f"--json={file}"], directory), file
  )


@pytest.fixture(scope="module")
def on_tpu(tmp_path_factory):
  directory = tmp_path_factory.mktemp("report")
  file = directory / "report.json"
  flags = [*FLAGS, "--topology=v5e:2x4", f"--json={file}"]
  return checked(simulated.in_own_process(flags, directory), file)


@pytest.fixture(
  params=["cpu", pytest.param("tpu", marks=simulated.needs_libtpu)]
)
def report(request):
  return request.getfixturevalue(f"on_{request.param}")


# ------------------------------------------------ what the design promises


def test_only_the_expected_exchanges(report):
  found = {(e.kind, e.axes): e.count for e in report.exchanges}
  # Tokens go to their experts and back, forward and backward.
  assert found.pop(("all-to-all", "expert")) == 4 * EXPERT_LAYERS
  # Gradients and metrics; experts' gradients; the norm of these.
  assert found.pop(("all-reduce", "data x expert")) >= 1
  assert found.pop(("all-reduce", "data")) >= 1
  assert found.pop(("all-reduce", "expert")) >= 1
  # No all-gather of weights or activations, nothing else.
  assert not found


def test_bytes_of_the_exchanges(report):
  size = {(e.kind, e.axes): e.bytes for e in report.exchanges}
  tokens = ROWS // 8 * (LENGTHS["inputs"] + LENGTHS["targets"])
  # Each layer: its tokens four times, D float32 each, whatever the routing. A
  # TPU multiplies in bfloat16, and sends what is but multiplied as such.
  width = 4 * 4 if report.topology is None else 3 * 4 + 2
  assert size["all-to-all", "expert"] == width * tokens * WIDTH
  # Gradients of the chip's own experts, once.
  assert size["all-reduce", "data"] == EXPERT_LAYERS * 4 * expert_weights() // 4
  # All other gradients, once; and a few sums.
  shared = 4 * shared_weights()
  embedding = 4 * VOCABULARY * WIDTH
  assert (
    shared
    <= size["all-reduce", "data x expert"]
    <= (
      # Two lookups and the output have a gradient of the embedding each, which
      # are added before or after the exchange.
      shared + 2 * embedding + 4096
    )
  )
  assert size["all-reduce", "expert"] < 100


def test_no_array_is_rearranged_against_its_will(report):
  assert report.warnings == []


# --------------------------------------------------------- numbers by hand


def expert_weights():
  """Of one layer: each expert has a norm and two kernels."""
  return EXPERTS * (WIDTH + 2 * WIDTH * HIDDEN)


def shared_weights():
  """All others: embedding, 3 attentions, norms, centroids, gates."""
  attention = 4 * WIDTH * WIDTH
  norms = 1 + 2 + 2  # encoder, decoder, and after each stack
  return (
    VOCABULARY * WIDTH
    + 3 * attention
    + norms * WIDTH
    + EXPERT_LAYERS * (EXPERTS * WIDTH + 2)
  )


def test_parameters_and_memory_by_hand(report):
  assert report.mesh == MESH and report.chips == 8
  assert report.phase == "sparse"
  experts = EXPERT_LAYERS * expert_weights()
  assert report.parameters == shared_weights() + experts
  own = 4 * (shared_weights() + experts // 4)
  assert report.memory.parameters == own
  assert report.memory.optimizer == 2 * own + 4  # two moments, a counter
  row = 3 * LENGTHS["inputs"] + 5 * LENGTHS["targets"] + 1
  assert report.memory.batch == ROWS // 8 * row * 4
  assert report.memory.total > 3 * own and report.memory.fits
  assert report.source_tokens == ROWS * LENGTHS["inputs"]
  assert report.target_tokens == ROWS * LENGTHS["targets"]


def test_operations_are_about_those_of_the_formula(report):
  # Tiny matrices: routing, softmax and norms are a visible part.
  share = report.model_flops / report.chips
  assert share < report.flops < 2 * share
  assert report.hbm_bytes > 0


@simulated.needs_libtpu
def test_an_estimate_is_what_its_formula_says(on_tpu):
  chip, seconds = chips.CHIPS["TPU v5 lite"], on_tpu.seconds
  assert on_tpu.device == "TPU v5 lite" and on_tpu.topology == "v5e:2x4"
  assert seconds["compute"] == on_tpu.flops / chip.flops
  assert seconds["memory"] == on_tpu.hbm_bytes / chip.hbm_bandwidth
  parts = [seconds[x] for x in ("compute", "memory", "network")]
  assert parts[2] == sum(e.seconds for e in on_tpu.exchanges) > 0
  assert seconds["best"] == max(parts) and seconds["serial"] == sum(parts)
  assert seconds["compiler"] > seconds["network"]
  for name, mfu in on_tpu.mfu.items():
    rate = on_tpu.model_flops / seconds[name]
    assert mfu == pytest.approx(rate / (8 * chip.flops))
  assert on_tpu.memory.available == 16 * 2**30


def test_no_estimate_for_a_device_that_is_not_known(on_cpu):
  assert on_cpu.seconds == on_cpu.mfu == {}
  assert on_cpu.memory.available is None
  assert all(e.seconds is None for e in on_cpu.exchanges)


def test_gradients_are_shown_as_part_of_what_is_temporary(report):
  assert report.memory.gradients == report.memory.parameters
  assert "of which gradients" in compile_report.markdown(report)


# ------------------------------------------------------ what does not work


def test_without_libtpu_the_extra_is_named(monkeypatch, capfd):
  monkeypatch.setattr(
    ahead_of_time.importlib.util, "find_spec", lambda name: None
  )
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
  assert cli.main(["compile", *FLAGS, "--topology=v5e:2x4"]) == 1
  assert "pip install '.[tpu]'" in capfd.readouterr().err
