"""What kernels can have, and `pallas_call` that works in `jax.shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl


def can_run() -> bool:
  """Whether arrays are on GPUs that Triton and cuDNN's attention compile for.

  Of NVIDIA's, those are Ampere and later (compute capability 8.0).
  """
  if jax.default_backend() != "gpu":
    return False
  version = _compute_capability()
  return not version[:1].isdigit() or float(version) >= 8


def shared_memory() -> int:
  """Bytes of shared memory that a program can have on these GPUs.

  From the table of compute capabilities in NVIDIA's CUDA programming guide;
  those that are not named have as little as 8.6, 8.9 and 12.0.
  """
  large = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
  return 1024 * large.get(_compute_capability(), 99)


def _compute_capability() -> str:
  return str(getattr(jax.devices()[0], "compute_capability", ""))


def run(
  kernel: Callable[..., None],
  out_shape: Any,
  operands: Sequence[jax.Array],
  **options: Any,
) -> Any:
  """Runs a kernel on every device's own operands.

  Inside `jax.shard_map` a kernel's results must say over which axes of the mesh
  they vary. They vary over all axes that any operand varies over; the other
  operands are cast to vary over them too.

  Args:
    kernel: Takes a reference for each operand and each result.
    out_shape: A tree of `jax.ShapeDtypeStruct`.
    operands: Arrays.
    **options: Of `pallas_call`.

  Returns:
    Arrays in the tree of `out_shape`.
  """
  axes = frozenset[str]().union(*(_axes(x) for x in operands))
  operands = [
    lax.pcast(x, tuple(sorted(axes - _axes(x))), to="varying") for x in operands
  ]
  alike = jax.typeof(operands[0]).manual_axis_type
  out_shape = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=alike),
    out_shape,
  )
  return pl.pallas_call(kernel, out_shape=out_shape, **options)(*operands)


def _axes(x: jax.Array) -> frozenset[str]:
  """Axes of the mesh over which an array varies; none outside shard_map."""
  return jax.typeof(x).manual_axis_type.varying
