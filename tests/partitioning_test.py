"""Meshes and shardings on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec

from basemt_jax import partitioning


@pytest.mark.parametrize(
  "expert, model, shape",
  [(1, 1, (8, 1, 1)), (4, 1, (2, 4, 1)), (2, 2, (2, 2, 2))],
)
def test_mesh_takes_all_devices(expert, model, shape):
  mesh = partitioning.make_mesh(expert, model)
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == partitioning.MESH_AXES
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("expert, model", [(3, 1), (16, 1), (4, 4), (0, 1)])
def test_mesh_that_does_not_fit_is_refused(expert, model):
  with pytest.raises(ValueError, match=f"expert={expert} and model={model}"):
    partitioning.make_mesh(expert, model)


def axes_of(*names):
  return nn_partitioning.AxisMetadata(names)


def test_experts_and_widths_are_split_the_rest_is_whole():
  mesh = partitioning.make_mesh(2, 2)
  shapes = {
    "experts": {"kernel": jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.float32)},
  }
  axes = {
    "experts": {"kernel_axes": axes_of("expert", "embed", "expert_mlp")},
    "norm": {"scale_axes": axes_of("embed")},
  }
  found = partitioning.variable_shardings(shapes, axes, mesh)
  assert found["experts"]["kernel"].spec == PartitionSpec(
    "expert", None, "model"
  )
  assert found["norm"]["scale"].spec == PartitionSpec(None)


def test_axis_that_does_not_divide_names_parameter_and_axis():
  mesh = partitioning.make_mesh(4, 1)
  with pytest.raises(ValueError, match=r"'expert' of parameter .*size 6.*4"):
    partitioning.variable_shardings(
      {"w": jax.ShapeDtypeStruct((6, 2), jnp.float32)},
      {"w_axes": axes_of("expert", "embed")},
      mesh,
    )


def test_batch_rows_lie_in_order_over_data_and_expert():
  mesh = partitioning.make_mesh(4, 1)
  batch = {"tokens": np.arange(16, dtype=np.int32).reshape(16, 1)}
  placed = partitioning.put_batch(batch, mesh)["tokens"]
  for shard in placed.addressable_shards:
    data, expert, _ = np.argwhere(mesh.devices == shard.device)[0]
    first = 2 * (4 * data + expert)
    np.testing.assert_array_equal(shard.data[:, 0], [first, first + 1])
  with pytest.raises(ValueError, match=r"12 rows .* 8 devices"):
    partitioning.put_batch({"tokens": np.zeros((12, 1))}, mesh)


@pytest.mark.parametrize(
  ("shape", "axes"),
  [
    ((4, 8, 16), ("expert", "embed", "mlp")),
    ((4, 8), ("expert", "embed")),
    ((4, 16), ("expert", "mlp")),
    ((8, 16), ("embed", "mlp")),
    ((1,), (None,)),
    ((), ()),
  ],
)
def test_moments_keep_the_names_of_the_axes_they_have(shape, axes):
  names = ("expert", "embed", "mlp")
  assert partitioning.moment_axes(names, (4, 8, 16), shape) == axes


def test_moments_are_named_only_where_equal_sizes_leave_no_doubt():
  names = ("expert", "embed", "mlp")
  found = partitioning.moment_axes(names, (4, 8, 8), (4, 8))
  assert found == ("expert", None)
