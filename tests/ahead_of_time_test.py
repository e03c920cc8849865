"""Steps compiled ahead of time: what they cost, and on which mesh."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pod_reports
import pytest
import simulated
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from basemt_jax import model, partitioning, steps, train_state
from basemt_jax.compilation import ahead_of_time, chips
from basemt_jax.inspection import compile_report

pytestmark = pytest.mark.usefixtures("clean_gin")

LENGTHS = {"inputs": 32, "targets": 16}

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
  done = simulated.in_own_process(RESHARDING, tmp_path)
  assert "Involuntary full rematerialization" in done.stdout, done.stderr


@simulated.needs_libtpu
def test_rearranging_would_be_seen_on_a_tpu(tmp_path):
  code = RESHARDING.replace(
    "make_mesh(2, 2)",
    "make_mesh(2, 2, ahead_of_time.topology_devices('v5e:2x4'))",
  )
  done = simulated.in_own_process(code, tmp_path)
  assert "Involuntary full rematerialization" in done.stdout, done.stderr


# ------------------------------------------------------- what a step costs


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
  "topology", [None, pytest.param("v5e:2x2", marks=simulated.needs_libtpu)]
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
  first = pod_reports.with_memory()
  slow = dataclasses.replace(first, seconds={**first.seconds, "compiler": 9.0})
  large = pod_reports.with_memory(fits=False)
  assert ahead_of_time.best_first([large, slow, first]) == [first, slow, large]
  (row,) = compile_report.mesh_table([slow]).rows
  assert row[0] == "8 x 32 x 1" and row[3] == 9000.0
  assert "DOES NOT FIT" in compile_report.mesh_table([large]).rows[0][1]


# ------------------------------------------------------ what does not work


@simulated.needs_libtpu
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


def test_other_errors_of_the_compiler_are_no_lack_of_memory():
  assert ahead_of_time._used_bytes("INTERNAL: Used 3G of it") is None
  assert ahead_of_time._used_bytes("RESOURCE_EXHAUSTED: no") == float("inf")
  message = "RESOURCE_EXHAUSTED: XLA: Used 24.50G of 15.75G hbm. Exceeded by"
  assert ahead_of_time._used_bytes(message) == 24.5 * 2**30


@simulated.needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x99", "v99:2x2", "v5e"])
def test_unknown_topologies_are_refused(name):
  with pytest.raises(ValueError, match=f"no topology '{name}'.*v5e:16x16"):
    ahead_of_time.topology_devices(name)


@simulated.needs_libtpu
@pytest.mark.parametrize(
  "name, count", [("v5e:16x16", 256), ("v5p:4x4x8", 128), ("v4:4x4x8", 128)]
)
def test_topologies_count_chips(name, count):
  devices = ahead_of_time.topology_devices(name)
  assert len(devices) == count
  assert devices[0].device_kind in chips.CHIPS
