"""Reports on compiled steps: numbers by hand, and what the design promises.

The 8 simulated devices of a process of its own always; a TPU slice that is not
there where libtpu is installed.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gin
from basemt_jax import cli, model, partitioning, steps, train_state
from basemt_jax import run as run_lib
from basemt_jax.commands import configuration
from basemt_jax.compilation import ahead_of_time, chips, hlo
from basemt_jax.inspection import compile_report

ROOT = pathlib.Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install '.[tpu]'",
)

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


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def in_own_process(code_or_flags, directory):
  """Runs the command, or code, on 8 devices; warnings are not silenced."""
  if isinstance(code_or_flags, str):
    command = ["-c", code_or_flags]
  else:
    command = ["-m", "basemt_jax.cli", "compile", *code_or_flags]
  return subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env={
      **{k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"},
      "XLA_FLAGS": simulated.xla_flags(devices=8),
      "TMPDIR": str(directory),
    },
    capture_output=True,
    text=True,
    check=False,
  )


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
  return checked(in_own_process([*FLAGS, f"--json={file}"], directory), file)


@pytest.fixture(scope="module")
def on_tpu(tmp_path_factory):
  directory = tmp_path_factory.mktemp("report")
  file = directory / "report.json"
  flags = [*FLAGS, "--topology=v5e:2x4", f"--json={file}"]
  return checked(in_own_process(flags, directory), file)


@pytest.fixture(params=["cpu", pytest.param("tpu", marks=needs_libtpu)])
def report(request):
  return request.getfixturevalue(f"on_{request.param}")


@functools.cache
def pods():
  path = ROOT / "benchmarks" / "pods.py"
  spec = importlib.util.spec_from_file_location("pods", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# ---------------------------------------------- what the design promises


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


RESHARDING = """
import jax, types
from jax.sharding import NamedSharding, PartitionSpec as P
from basemt_jax import partitioning
from basemt_jax.compilation import ahead_of_time
mesh = partitioning.make_mesh(2, 2)
def function(x):
  x = jax.lax.with_sharding_constraint(
    jax.numpy.cos(x), NamedSharding(mesh, P("data")))
  return jax.lax.with_sharding_constraint(
    jax.numpy.sin(x), NamedSharding(mesh, P(None, "data", "expert")))
x = jax.ShapeDtypeStruct((32, 32, 64), "float32",
  sharding=NamedSharding(mesh, P("data")))
jax.jit(function).lower(x).compile()  # Kept now, without its warnings.
jax.clear_caches()
program = types.SimpleNamespace(lower=lambda x: jax.jit(function).lower(x))
print(*ahead_of_time.compile_step(program, x).warnings)
"""


def test_rearranging_would_be_seen(tmp_path):
  done = in_own_process(RESHARDING, tmp_path)
  assert "Involuntary full rematerialization" in done.stdout, done.stderr


@needs_libtpu
def test_rearranging_would_be_seen_on_a_tpu(tmp_path):
  code = RESHARDING.replace(
    "make_mesh(2, 2)",
    "make_mesh(2, 2, ahead_of_time.topology_devices('v5e:2x4'))",
  )
  done = in_own_process(code, tmp_path)
  assert "Involuntary full rematerialization" in done.stdout, done.stderr


# ------------------------------------------------------- numbers by hand


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


@needs_libtpu
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


def test_operations_in_libraries_count_by_the_formula(monkeypatch):
  # On GPUs XLA's count leaves out what cuBLAS and cuDNN do.
  gpu = chips.CHIPS["NVIDIA H200"]
  monkeypatch.setitem(chips.CHIPS, jax.devices()[0].device_kind, gpu)
  monkeypatch.setattr(ahead_of_time, "model_flops", lambda *_: 1e12)
  settings = toy.settings()

  class NoStep(steps.Program):
    """Of a step that does nothing."""

    def lower(self, batch):
      return jax.jit(lambda batch: batch["direction"] + 1).lower(batch)

  program = NoStep(toy.DENSE, settings, settings.learning_rate, toy.mesh(), 3)
  report = ahead_of_time.report(program, 16, LENGTHS)
  assert report.flops < 1e3
  assert report.seconds["compute"] == 1e12 / gpu.flops
  assert report.mfu["serial"] == pytest.approx(
    report.seconds["compute"] / report.seconds["serial"]
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology", [None, pytest.param("v5e:2x2", marks=needs_libtpu)]
)
def test_microbatches_change_exchanges_not_operations(topology):
  devices = jax.devices()[:4]
  if topology:
    devices = ahead_of_time.topology_devices(topology)
  config = dataclasses.replace(
    toy.SPARSE, emb_dim=128, head_dim=64, mlp_dim=512, dtype="bfloat16"
  )
  mesh = partitioning.make_mesh(2, 1, devices)
  flops, count = [], []
  for parts in (1, 4):
    settings = toy.settings(microbatches=parts)
    program = steps.Program(config, settings, settings.learning_rate, mesh, 3)
    report = ahead_of_time.report(program, 64, LENGTHS, topology)
    flops.append(report.flops)
    count.append(
      sum(e.count for e in report.exchanges if e.kind == "all-to-all")
    )
  assert flops[1] == pytest.approx(flops[0], rel=0.05)
  assert count == [8, 32]


def test_model_operations_are_six_for_each_parameter_and_token():
  """And 12 L D for each attention and token; those of one expert count."""
  config = model.TransformerConfig(vocab_size=32000, emb_dim=1024, num_heads=16)
  state, _ = jax.eval_shape(
    lambda: train_state.init_state(
      model.Transformer(config),
      toy.settings().transformation(),
      jax.random.key(0),
    )
  )
  matrices = [x.size for x in jax.tree.leaves(state.params) if x.ndim > 1]
  attentions = config.num_encoder_layers + 2 * config.num_decoder_layers
  expected = (6 * sum(matrices) + 12 * attentions * 256 * 1024) * 64 * 256
  sparse = dataclasses.replace(
    config, feed_forward="experts", decoder_expert_blocks=(1, 4)
  )
  for network in (config, sparse):
    found = ahead_of_time.model_flops(
      network, 64, {"inputs": 256, "targets": 256}
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"mlp_activations": ("silu", "linear")},
    {"feed_forward": "dense_wide", "encoder_expert_blocks": ()},
  ],
  ids=str,
)
def test_model_operations_are_three_times_the_forward_pass_s(change):
  # Wide enough for matrix products to be nearly all that XLA counts.
  config = dataclasses.replace(
    toy.DENSE,
    emb_dim=128,
    head_dim=64,
    mlp_dim=512,
    num_experts=2,
    **change,
  )
  lengths = {"inputs": 64, "targets": 32}
  mesh = toy.mesh()
  batch = ahead_of_time.abstract_batch(8, lengths, mesh)
  network = model.Transformer(config)
  state, _ = jax.eval_shape(
    lambda: train_state.init_state(
      network, toy.settings().transformation(), jax.random.key(0)
    )
  )
  forward = jax.jit(
    lambda params, batch: model.forward(
      network, {"params": params}, batch, train=False
    )[0]
  )
  counted = forward.lower(state.params, batch).cost_analysis()["flops"]
  by_formula = ahead_of_time.model_flops(config, 8, lengths) / 3
  assert by_formula < counted < 1.1 * by_formula


def test_batch_has_the_shapes_of_real_ones(tmp_path):
  from basemt_jax.data import row_store

  store = row_store.RowStore(toy.write_store(tmp_path))
  real = store.read("train", "en-de", np.arange(2))
  shapes = ahead_of_time.abstract_batch(2, store.lengths, toy.mesh())
  assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
    k: (v.shape, v.dtype) for k, v in real.items()
  }


def configured(*flags):
  options = cli._parser().parse_args(["compile", *flags])
  options.bindings = []
  return configuration.configured(options)


def test_sizes_are_the_vocabulary_s_and_the_mixture_s():
  building = pytest.importorskip("basemt_jax.data.store_building")
  run = configured("--gin_file=gin/recipes/quickstart.gin")
  size, directions = building.sizes(run.mixture_or_task_name)
  assert directions == 24  # English to and from 12 languages
  program = run_lib.program(run, jax.devices()[:1], "dense")
  assert program.name == "dense"
  assert 0 <= program.model.config.vocab_size - size < 128


def test_sizes_are_those_of_a_store(tmp_path):
  run = configured("--gin_file=gin/recipes/quickstart.gin")
  run = dataclasses.replace(run, store_dir=toy.write_store(tmp_path))
  program = run_lib.program(run, jax.devices()[:4], "sparse")
  assert program.model.config.vocab_size == 384  # 256 bytes and some more
  # The phase after the conversion.
  assert program.name == "sparse" and program.model.config.converted
  assert program.mesh.size == 4


# ------------------------------------------------------------- the network


TORUS_2D = chips.Chip(1.0, 1.0, 1.0, 50e9, 2, 0.0)
TORUS_3D = dataclasses.replace(TORUS_2D, dimensions=3)
SWITCH = dataclasses.replace(TORUS_2D, dimensions=0)


def grid(*sizes):
  return [
    types.SimpleNamespace(coords=list(place))
    for place in itertools.product(*map(range, sizes))
  ]


def exchange(kind, groups, size):
  return hlo.Collective(kind, np.array(groups), (), size, 1, "")


def link_load(n, size):
  """Most bytes over a link of a ring of n, each to each, the shorter way."""
  load = np.zeros((n, 2))
  for start, way in itertools.product(range(n), range(1, n)):
    # Half of what goes to the opposite chip goes either way round.
    for direction, hops in ((0, way), (1, n - way)):
      share = 1.0 if 2 * hops < n else 0.5 if 2 * hops == n else 0.0
      for hop in range(hops):
        at = start + hop if direction == 0 else start - hop - 1
        load[at % n, direction] += share * size / n
  return load.max()


def test_all_to_all_on_a_ring_is_bound_by_its_links():
  devices, size = grid(16, 16), 16e6
  rows = np.arange(256).reshape(16, 16)
  seconds = chips.network_seconds(
    exchange("all-to-all", rows, size), devices, TORUS_2D
  )
  assert seconds == pytest.approx(link_load(16, size) / 50e9)


@pytest.mark.parametrize(
  "kind, places, hops, links",
  [
    # Half of a ring, every other chip: the others are in between.
    ("all-reduce", range(0, 256, 32), 2, 2),
    # A quarter of a ring is a line.
    ("all-reduce", range(0, 64, 16), 1, 1),
    # Four by four: lines both ways, of which each carries its own part. On
    # average 1.25 apart in either, and 16 / 15 of that from another chip.
    (
      "all-to-all",
      [16 * i + j for i in range(4) for j in range(4)],
      1.25 * 16 / 15,
      1,
    ),
    # A ring of 16 by 2: the ring has most to carry, 4 apart on average.
    (
      "all-to-all",
      [16 * i + j for i in range(16) for j in (0, 1)],
      4 * 32 / 31,
      2,
    ),
  ],
)
def test_seconds_of_an_exchange_among_some(kind, places, hops, links):
  places = list(places)
  collective = exchange(kind, [places], 1e9)
  seconds = chips.network_seconds(collective, grid(16, 16), TORUS_2D)
  n = len(places)
  sent = 1e9 * (n - 1) / n * (2 if kind == "all-reduce" else 1)
  assert seconds == pytest.approx(sent * hops / (links * 50e9))


@pytest.mark.parametrize(
  "kind, sizes, chip, links, sent",
  [
    ("all-reduce", (16, 16), TORUS_2D, 4, 2 * 255 / 256),
    ("all-reduce", (4, 4, 8), TORUS_3D, 6, 2 * 127 / 128),
    ("all-reduce", (2, 4), TORUS_2D, 2, 2 * 7 / 8),
    ("all-gather", (2, 4), TORUS_2D, 2, 7),
    ("reduce-scatter", (8,), SWITCH, 1, 7 / 8),
    ("all-to-all", (8,), SWITCH, 1, 7 / 8),
  ],
)
def test_seconds_of_an_exchange_among_all(kind, sizes, chip, links, sent):
  devices = grid(*sizes)
  seconds = chips.network_seconds(
    exchange(kind, [np.arange(len(devices))], 1e9), devices, chip
  )
  assert seconds == pytest.approx(1e9 * sent / (links * 50e9))


# ------------------------------------------------------------------ meshes


@pytest.mark.parametrize("config", [toy.SPARSE, toy.DENSE], ids=["sparse", ""])
@pytest.mark.parametrize("rows", [16, 64])
def test_possible_meshes_are_those_that_programs_can_be_made_for(config, rows):
  found = set(ahead_of_time.possible_meshes(config, rows, 8))
  assert found
  for expert, widths in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
    if expert * widths > 8:
      continue
    mesh = (8 // (expert * widths), expert, widths)
    experts = config.num_experts if config.feed_forward == "experts" else 1
    assert (mesh in found) == (
      experts % expert == 0
      and config.num_heads % widths == 0
      and rows % (8 // widths * config.rows_per_group) == 0
    )


def test_the_fastest_mesh_that_fits_comes_first():
  first = pod_report()
  slow = dataclasses.replace(first, seconds={**first.seconds, "compiler": 9.0})
  large = pod_report(fits=False)
  assert ahead_of_time.best_first([large, slow, first]) == [first, slow, large]
  (row,) = compile_report.mesh_table([slow]).rows
  assert row[0] == "8 x 32 x 1" and row[3] == 9000.0
  assert "DOES NOT FIT" in compile_report.mesh_table([large]).rows[0][1]


# ------------------------------------------------------ what does not work


@needs_libtpu
def test_a_step_that_does_not_fit_is_reported_with_what_to_change(tmp_path):
  devices = ahead_of_time.topology_devices("v5e:2x2")
  mesh = partitioning.make_mesh(2, 1, devices)

  class TooLarge(steps.Program):
    """The step, and 24 GiB of matrices that are all needed at once."""

    def lower(self, batch):
      del batch
      x = jax.ShapeDtypeStruct(
        (24, 2**14, 2**14), jnp.float32, sharding=NamedSharding(mesh, P())
      )
      return jax.jit(lambda x: x @ x).lower(x)

  settings = toy.settings()
  program = TooLarge(toy.SPARSE, settings, settings.learning_rate, mesh, 3)
  report = ahead_of_time.report(program, 16, LENGTHS, "v5e:2x2")
  assert not report.memory.fits and report.exchanges == []
  assert report.memory.total == 48 * 2**30  # the product too
  advice = " ".join(report.advice)
  for text in (
    "remat = True",
    "BATCH_SIZE = 8",
    "EXPERT_DEVICES = 4",
    "MODEL_DEVICES = 2",
  ):
    assert text in advice
  assert "DOES NOT FIT" in compile_report.markdown(report)


def pod_report(**memory):
  """A report that was made, with other memory."""
  report = pods().read(pods().PODS[0])
  changed = dataclasses.replace(report.memory, **memory)
  return dataclasses.replace(report, memory=changed)


@pytest.mark.parametrize(
  ("used", "fits", "said"),
  [
    (0.5, True, "of 16.00: fits |"),
    (0.91, True, "fits tightly, 91% used; leave 10%"),
    (1.2, False, "DOES NOT FIT"),
  ],
)
def test_a_step_that_leaves_no_room_is_said_to(used, fits, said):
  available = 16 * 2**30
  report = pod_report(total=used * available, available=available, fits=fits)
  assert said in compile_report.markdown(report)


def test_gradients_are_shown_as_part_of_what_is_temporary(report):
  assert report.memory.gradients == report.memory.parameters
  assert "of which gradients" in compile_report.markdown(report)


def test_other_errors_of_the_compiler_are_no_lack_of_memory():
  assert ahead_of_time._used_bytes("INTERNAL: Used 3G of it") is None
  assert ahead_of_time._used_bytes("RESOURCE_EXHAUSTED: no") == float("inf")
  message = "RESOURCE_EXHAUSTED: XLA: Used 24.50G of 15.75G hbm. Exceeded by"
  assert ahead_of_time._used_bytes(message) == 24.5 * 2**30


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x99", "v99:2x2", "v5e"])
def test_unknown_topologies_are_refused(name):
  with pytest.raises(ValueError, match=f"no topology '{name}'.*v5e:16x16"):
    ahead_of_time.topology_devices(name)


@needs_libtpu
@pytest.mark.parametrize(
  "name, count", [("v5e:16x16", 256), ("v5p:4x4x8", 128), ("v4:4x4x8", 128)]
)
def test_topologies_count_chips(name, count):
  devices = ahead_of_time.topology_devices(name)
  assert len(devices) == count
  assert devices[0].device_kind in chips.CHIPS


def test_without_libtpu_the_extra_is_named(monkeypatch, capfd):
  monkeypatch.setattr(
    ahead_of_time.importlib.util, "find_spec", lambda name: None
  )
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
  assert cli.main(["compile", *FLAGS, "--topology=v5e:2x4"]) == 1
  assert "pip install '.[tpu]'" in capfd.readouterr().err


# ------------------------------------------------------------------ docs


def test_the_page_on_pods_shows_the_reports():
  assert (ROOT / "docs" / "pods.md").read_text() == pods().page()


def test_pod_recipes_fit_and_exchange_what_they_should():
  for pod in pods().PODS:
    report = pods().read(pod)
    assert report.memory.fits and report.warnings == []
    found = {(e.kind, e.axes): e.count for e in report.exchanges}
    # Four layers of experts: 16 exchanges, as in the small network above.
    assert found.pop(("all-to-all", "expert")) == 16
    assert {kind for kind, _ in found} == {"all-reduce"}


@pytest.mark.parametrize("pod", pods().PODS, ids=lambda pod: pod.file.stem)
def test_pod_recipes_are_what_was_compiled(pod):
  options = cli._parser().parse_args(pod.command[:2])
  options.bindings = [f"NUM_EXPERTS={pod.experts}"]
  run = configuration.configured(
    options, MODEL_DIR="none", MIXTURE_OR_TASK_NAME="no"
  )
  config = run.config_of(pods().VOCABULARY)
  report = pods().read(pod)
  assert report.topology == pod.topology and report.phase == "sparse"
  assert report.rows == run.batch_size
  assert report.target_tokens == run.batch_size * 256
  groups = report.mesh["data"] * report.mesh["expert"]
  assert report.mesh["expert"] == run.expert_devices
  assert run.batch_size % (groups * config.rows_per_group) == 0
  state, _ = jax.eval_shape(
    lambda: train_state.init_state(
      model.Transformer(dataclasses.replace(config, converted=True)),
      run.settings.transformation(),
      jax.random.key(0),
    )
  )
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert report.parameters == count
  lengths = run.task_feature_lengths
  flops = ahead_of_time.model_flops(config, run.batch_size, lengths)
  assert report.model_flops == pytest.approx(flops)
