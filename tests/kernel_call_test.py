"""Kernels on the GPUs of a mesh: which ones run there, found without a GPU."""

import collections
import re
import types

import jax
import jax.numpy as jnp
import pytest

from basemt_jax import base_layer
from basemt_jax.kernels import kernel_call

ROWS, LENGTH, WIDTH = 64, 256, 256
# A step is in the program once, however many of them a solve has.
TRAINING = {"newton_statistics": 1, "newton_step": 1, "assignment_repair": 1}


def gpus(data, expert, model):
  """A mesh of GPUs that need not be there."""
  return jax.sharding.AbstractMesh(
    (data, expert, model),
    ("data", "expert", "model"),
    (jax.sharding.AxisType.Auto,) * 3,
    abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu"),
  )


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize(
  ("train", "expected"), [(True, TRAINING), (False, {"grouped_matmul": 2})]
)
def test_layer_calls_kernels_on_gpus_of_a_mesh(
  sizes, train, expected, monkeypatch
):
  layer = base_layer.BaseLayer(
    num_experts=8, mlp_dim=512, dtype=jnp.bfloat16, mesh=gpus(*sizes)
  )
  h = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((ROWS, LENGTH), bool)
  variables = jax.eval_shape(
    lambda h: layer.init(jax.random.key(0), h, train=True), h
  )

  def loss(params, h, prices, mask):
    variables = {"params": params, "prices": prices}
    out, updates = layer.apply(
      variables, h, mask, train=train, mutable=["prices"]
    )
    return jnp.sum(out.astype(jnp.float32) ** 2), updates

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  # Tracing checks over which axes everything varies; lowering makes the
  # kernels' Triton programs.
  traced = gradient.trace(variables["params"], h, variables["prices"], mask)
  program = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = [x for x in program.splitlines() if "xla.gpu.triton" in x]
  names = re.compile(f'name = "({"|".join(expected)})"')
  found = collections.Counter(names.search(call)[1] for call in calls)
  assert found == expected


@pytest.mark.parametrize(
  ("version", "expected", "kibibytes"),
  [
    ("7.5", False, 99),
    ("8.0", True, 163),
    ("8.9", True, 99),
    ("9.0", True, 227),
    ("12.0", True, 99),
    ("gfx942", True, 99),
  ],
)
def test_what_gpus_have(version, expected, kibibytes, monkeypatch):
  device = types.SimpleNamespace(compute_capability=version)
  assert not kernel_call.can_run()  # CPUs have none.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert kernel_call.can_run() == expected
  assert kernel_call.shared_memory() == kibibytes * 1024


def test_results_vary_over_all_axes_of_the_operands():
  def combine(a_ref, b_ref, c_ref, sum_ref, product_ref):
    sum_ref[...] = a_ref[...] + b_ref[...] + c_ref[...]
    product_ref[...] = a_ref[...] * b_ref[...] * c_ref[...]

  axes = []

  def on_device(*operands):
    like = jax.ShapeDtypeStruct((8,), jnp.float32)
    results = kernel_call.run(combine, (like, like), operands)
    axes.extend(jax.typeof(x).manual_axis_type.varying for x in results)
    return results

  split = [jax.sharding.PartitionSpec(x) for x in (None, "data", "model")]
  sharded = jax.shard_map(
    on_device,
    mesh=gpus(2, 2, 2),
    in_specs=tuple(split),
    out_specs=jax.sharding.PartitionSpec(("data", "model")),
  )
  operands = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (8, 16, 16)]
  jax.eval_shape(sharded, *operands)
  assert axes == [{"data", "model"}] * 2
