"""The device mesh, where arrays live on it, and functions compiled for it.

The mesh has three axes, always: `data` and `expert` together split the batch;
`expert` also splits the experts; `model` splits widths of matrices. Logical
axis names, as T5X's, are mapped to mesh axes by `LOGICAL_AXIS_RULES`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import unfreeze
from flax.linen import partitioning as nn_partitioning
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "expert", "model")

BATCH_SPEC = PartitionSpec(("data", "expert"))

# First match wins. An unmapped name is not split.
LOGICAL_AXIS_RULES = (
  ("batch", ("data", "expert")),
  ("expert", "expert"),
  ("vocab", "model"),
  ("mlp", "model"),
  ("expert_mlp", "model"),
  ("heads", "model"),
  ("joined_kv", "model"),
  ("embed", None),
  ("kv", None),
  ("length", None),
  ("unmodeled", None),
)


def make_mesh(
  expert: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over all devices of all hosts, or some: data x expert x model.

  Any sizes of the axes `expert` and `model` whose product divides the number of
  devices will do, on any topology.

  Raises:
    ValueError: The number of devices is not a multiple of expert * model.
  """
  devices = jax.devices() if devices is None else list(devices)
  if expert < 1 or model < 1 or len(devices) % (expert * model):
    raise ValueError(
      f"a mesh with expert={expert} and model={model} needs a multiple of "
      f"{expert * model} devices, but there are {len(devices)}; choose sizes "
      "whose product divides the number of devices"
    )
  shape = (len(devices) // (expert * model), expert, model)
  return Mesh(_arranged(devices, shape), MESH_AXES)


def _arranged(
  devices: Sequence[jax.Device], shape: tuple[int, int, int]
) -> np.ndarray:
  """Devices in the shape of the mesh, near each other where they exchange much.

  The chips of a TPU slice are a torus. JAX gives every axis whole dimensions of
  it where their sizes allow it (16x16 as 16 x 16 or 256). Otherwise it splits
  dimensions between axes (16x16 as 8 x 32), `model` and then `expert` first
  choosing whole ones. An axis has then a line instead of a ring in a part of a
  dimension, with about half the bandwidth, or goes through chips in between,
  whose own exchanges share these links: `basemt compile` counts both.

  Several slices follow each other along `data`, so that only sums of gradients
  leave a slice, if `data` is a multiple of their number. What remains has no
  arrangement that could be counted on, and keeps JAX's order, which goes host
  by host: slices that cut through the experts, chips that are only a part of a
  slice, and all devices other than TPUs.
  """
  given = np.asarray(devices)
  if devices[0].platform != "tpu":
    return given.reshape(shape)
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  data, *others = shape
  if data % len(slices) or not all(map(_is_whole, slices.values())):
    return given.reshape(shape)
  part = (data // len(slices), *others)
  return np.concatenate(
    [
      mesh_utils.create_device_mesh(part, own, allow_split_physical_axes=True)
      for own in slices.values()
    ]
  )


def _is_whole(devices: Sequence[jax.Device]) -> bool:
  """Whether chips of a slice fill the box between the outermost of them."""
  places = np.array([(*d.coords, d.core_on_chip) for d in devices])
  sizes = np.ptp(places, axis=0) + 1
  return bool(np.prod(sizes) == len(np.unique(places, axis=0)) == len(devices))


def draw_by_kernels(mesh: Mesh) -> None:
  """Has JAX draw random bits by a kernel of its own on a single GPU.

  They are the same bits. Otherwise every draw of keys or masks is a hundred
  instructions, which XLA puts into the kernels of all that read them: a third
  of its time for a step with dropout. The kernel cannot be split over devices,
  and large parameters would be drawn whole on each.
  """
  jax.config.update(
    "jax_threefry_gpu_kernel_lowering",
    mesh.size == 1 and mesh.devices.flat[0].platform == "gpu",
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over `data` and `expert`."""
  return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
  """One whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def variable_shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
  """Shardings of a nested dict of arrays or shapes; shaped like it.

  `axes` is the matching `params_axes` (`prices_axes`) collection that the model
  emits: the logical names of each array's axes.

  Raises:
    ValueError: A parameter has no axes, or an axis does not divide.
  """
  names = traverse_util.flatten_dict(
    unfreeze(nn_partitioning.get_axis_names(axes)), sep="/"
  )
  shardings = {}
  for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
    if path not in names:
      raise ValueError(f"parameter {path} has no logical axes")
    spec: Any = nn_partitioning.logical_to_mesh_axes(
      names[path], LOGICAL_AXIS_RULES
    )
    for size, name, axis in zip(leaf.shape, names[path], spec, strict=True):
      parts = 1 if axis is None else mesh.shape[axis]
      if size % parts:
        raise ValueError(
          f"axis {name!r} of parameter {path} has size {size}, which the "
          f"{parts} devices of mesh axis {axis!r} do not divide; choose a mesh "
          "axis that divides it"
        )
    shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
  return traverse_util.unflatten_dict(shardings, sep="/")


def moment_axes(
  names: Sequence[Any], param_shape: Sequence[int], shape: Sequence[int]
) -> tuple[Any, ...]:
  """Names of the axes of an optimizer's moment, from its parameter's.

  Args:
    names: One for each axis of the parameter.
    param_shape: Its shape.
    shape: The moment's: the parameter's, or that without one axis (Adafactor's
      factored moments), or anything else, such as a placeholder.

  Returns:
    One for each axis of the moment. Where axes of equal size leave open which
    one is gone, only what all cases agree on is named; the others are None.
  """
  names, shape = tuple(names), tuple(shape)
  if shape == tuple(param_shape):
    return names
  kept = [
    names[:i] + names[i + 1 :]
    for i in range(len(names))
    if (*param_shape[:i], *param_shape[i + 1 :]) == shape
  ]
  if not kept:
    return (None,) * len(shape)
  return tuple(
    found[0] if len(set(found)) == 1 else None
    for found in zip(*kept, strict=True)
  )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this host's devices hold, ascending; int.

  Where `model` splits a matrix over hosts, several hosts hold the same rows.

  Raises:
    ValueError: The rows do not divide over the devices.
  """
  ways = mesh.shape["data"] * mesh.shape["expert"]
  if batch_size % ways:
    raise ValueError(
      f"a batch of {batch_size} rows does not divide over data x expert = "
      f"{ways} devices; make the batch size a multiple of it"
    )
  sharding = batch_sharding(mesh)
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  held = [np.arange(batch_size)[index] for index in indices]
  return np.unique(np.concatenate(held))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Global arrays from this host's rows: {name: [rows, ...]} on devices.

  The rows are those of `host_rows`, wherever on the mesh this host's devices
  are, so that every global row is the same on any number of hosts.

  Raises:
    ValueError: The rows do not divide over this host's devices.
  """
  rows = len(next(iter(batch.values())))
  ways = mesh.shape["data"] * mesh.shape["expert"]
  held = host_rows(mesh, ways)
  batch_size = rows * ways // len(held)
  host_rows(mesh, batch_size)  # Refuses rows that are not as many on each.
  sharding, share = batch_sharding(mesh), rows // len(held)

  def put(array: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      at = np.searchsorted(held, (index[0].start or 0) // share) * share
      return array[at : at + share]

    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: put(array) for name, array in batch.items()}


# Kernels that the compiler need not search for. On an H200 the study's sparse
# step is compiled in 12.0 seconds with both options, in 19.3 with the first one
# only. Steps are 3 to 5% shorter with widths of 384 to 1024
# (docs/performance.md).
_GPU_OPTIONS = {
  # Whether kernels that are no products run faster as Triton's.
  "xla_gpu_experimental_enable_fusion_autotuner": False,
  # Products by Triton beside cuBLAS's.
  "xla_gpu_enable_triton_gemm": False,
}


@functools.cache
def _compiler_options(platform: str) -> dict[str, bool] | None:
  """The compiler's options for a platform, as far as this version has them."""
  if platform != "gpu":
    return None
  known = {}
  for name, value in _GPU_OPTIONS.items():
    try:
      jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
      continue
    known[name] = value
  return known or None


class Compiled:
  """A jitted function that can be compiled before it is first called.

  Args:
    function: To be traced.
    mesh: Where logical axis names have their meaning.
    **options: Of `jax.jit`.
  """

  def __init__(self, function: Callable[..., Any], mesh: Mesh, **options: Any):
    chosen = _compiler_options(mesh.devices.flat[0].platform)
    self._function = jax.jit(function, compiler_options=chosen, **options)
    self._mesh = mesh
    self._compiled: Any = None

  def __call__(self, *args: Any) -> Any:
    """Calls it; if `compile` was called, with arguments of the same shapes."""
    return self._in_scope(self._compiled or self._function, *args)

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """Ready to be compiled, for arguments given by shapes and shardings."""
    return self._in_scope(self._function.lower, *args)

  def compile(self, *args: Any) -> None:
    """Compiles, once; any thread may do so while others run programs."""
    if self._compiled is None:
      self._compiled = self.lower(*args).compile()

  def trace(self, *args: Any) -> Any:
    """The shapes of what it returns."""
    return self._in_scope(
      functools.partial(jax.eval_shape, self._function), *args
    )

  def _in_scope(self, function: Callable[..., Any], *args: Any) -> Any:
    with (
      jax.set_mesh(self._mesh),
      nn_partitioning.axis_rules(LOGICAL_AXIS_RULES),
    ):
      return function(*args)
