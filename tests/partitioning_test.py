"""Meshes and shardings on eight simulated devices."""

import importlib.util
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec

from basemt_jax import partitioning
from basemt_jax.compilation import ahead_of_time


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


# --------------------------------------------------------- chips of a torus


def shapes_of(count):
  """All meshes of so many devices."""
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  return [
    (count // (expert * model), expert, model)
    for expert, model in itertools.product(sizes, sizes)
    if count % (expert * model) == 0
  ]


def chips_of(*box, slice_index=0, kind="TPU v6 lite"):
  """What JAX tells of a slice's chips, in its order."""
  return [
    types.SimpleNamespace(
      platform="tpu",
      device_kind=kind,
      coords=[x, y, z],
      core_on_chip=0,
      slice_index=slice_index,
    )
    for z, y, x in itertools.product(*map(range, reversed(box)))
  ]


def places(devices):
  return [(d.slice_index, *d.coords) for d in devices.flat]


def assert_complete(devices, mesh, shape):
  assert mesh.shape == shape
  assert sorted(places(mesh)) == sorted(places(np.array(devices)))


@pytest.mark.parametrize(
  "box",
  [
    *((16, 16, 1), (8, 8, 1), (4, 8, 1), (2, 4, 1), (2, 2, 1), (1, 1, 1)),
    *((4, 4, 4), (4, 4, 8), (4, 8, 8), (4, 4, 12), (2, 2, 3), (5, 3, 7)),
  ],
  ids=str,
)
def test_every_mesh_of_a_torus_can_be_had(box):
  devices = chips_of(*box)
  for shape in shapes_of(len(devices)):
    assert_complete(devices, partitioning._arranged(devices, shape), shape)


@pytest.mark.parametrize(
  ("box", "shape"),
  [
    ((16, 16, 1), (16, 16, 1)),
    ((16, 16, 1), (1, 16, 16)),
    ((8, 8, 1), (8, 8, 1)),
    ((4, 4, 8), (8, 16, 1)),
    ((4, 4, 8), (4, 32, 1)),
    ((4, 4, 4), (4, 4, 4)),
  ],
)
def test_an_axis_takes_whole_dimensions_where_it_can(box, shape):
  mesh = partitioning._arranged(chips_of(*box), shape)
  for axis, size in enumerate(shape):
    line = np.moveaxis(mesh, axis, 0).reshape(size, -1)[:, 0]
    along = np.array([d.coords for d in line])
    extents = [len(np.unique(along[:, i])) for i in range(3)]
    # A dimension is used whole or not at all.
    assert all(n in (1, whole) for n, whole in zip(extents, box, strict=True))
    assert np.prod(extents) == size


def test_experts_fill_a_dimension_before_they_split_one():
  mesh = partitioning._arranged(chips_of(16, 16, 1), (8, 32, 1))
  along = np.array([d.coords for d in mesh[0, :, 0]])
  assert sorted(len(np.unique(x)) for x in along.T) == [1, 2, 16]


@pytest.mark.parametrize("shape", [(8, 4, 1), (2, 16, 1), (4, 2, 4)])
def test_slices_are_joined_by_data_alone(shape):
  devices = [
    *chips_of(4, 4, 1),
    *chips_of(4, 4, 1, slice_index=1),
  ]
  mesh = partitioning._arranged(devices, shape)
  assert_complete(devices, mesh, shape)
  for row in mesh:
    assert len({d.slice_index for d in row.flat}) == 1


@pytest.mark.parametrize(
  ("devices", "shape"),
  [
    (chips_of(4, 4, 1)[1:13], (3, 4, 1)),
    (chips_of(4, 2, 1) + chips_of(4, 2, 1, slice_index=1), (1, 16, 1)),
  ],
  ids=["with holes", "experts over slices"],
)
def test_the_order_of_hosts_is_kept_where_no_other_is_better(devices, shape):
  mesh = partitioning._arranged(devices, shape)
  assert mesh.shape == shape
  assert list(mesh.flat) == devices


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install '.[tpu]'",
)
@pytest.mark.parametrize(
  "topology",
  ["v6e:16x16", "v6e:8x8", "v5e:16x16", "v5p:4x4x4", "v5p:4x4x8", "v4:4x4x8"],
)
def test_every_mesh_of_a_described_slice_can_be_had(topology):
  devices = ahead_of_time.topology_devices(topology)
  for _, expert, model in shapes_of(len(devices)):
    mesh = partitioning.make_mesh(expert, model, devices)
    assert set(mesh.devices.flat) == set(devices)
    assert (mesh.shape["expert"], mesh.shape["model"]) == (expert, model)


# ------------------------------------------------------------------ shardings


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


def test_options_of_gpus_are_known_to_this_compiler_and_given_to_gpus_only():
  assert partitioning._compiler_options("gpu") == partitioning._GPU_OPTIONS
  assert partitioning._compiler_options("cpu") is None
  assert partitioning._compiler_options("tpu") is None


def test_options_that_the_compiler_lacks_are_left_out(monkeypatch):
  known = partitioning._GPU_OPTIONS
  monkeypatch.setattr(
    partitioning, "_GPU_OPTIONS", {"xla_gpu_no_such_option": False, **known}
  )
  found = partitioning._compiler_options.__wrapped__
  assert found("gpu") == known
  monkeypatch.setattr(partitioning, "_GPU_OPTIONS", {"no_such_option": False})
  assert found("gpu") is None
