"""Published figures of accelerators, and how long exchanges take on them."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from basemt_jax.compilation import hlo

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of an accelerator."""

  flops: float  # dense bfloat16 operations a second
  hbm_bytes: float
  hbm_bandwidth: float  # bytes a second
  link_bandwidth: float  # bytes a second over one link in one direction
  # of the torus, with two links in each; 0: every chip reaches every other one
  # through a switch, by one link
  dimensions: int
  # cycles a second, in which the TPU compiler counts; 0: it does not.
  # Published, but for v6e: that of v4, v5e and v5p is `flops` by the power of
  # two of operations that their matrix units do in a cycle, and a v6e's do
  # 2^19, as the compiler counts 4.6e5 a cycle for a product of 4096 x 4096.
  clock: float


# By `jax.Device.device_kind`, from cloud.google.com/tpu/docs/ (v4, v5e, v5p,
# v6e) and nvidia.com/en-us/data-center/ (h100, h200). TPU: the specification's
# bidirectional bandwidth of a chip is that of all its links, both ways.
CHIPS = {
  "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 50e9, 3, 1.05e9),
  "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 50e9, 2, 1.5e9),
  "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 100e9, 3, 1.75e9),
  "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, 100e9, 2, 1.75e9),
  "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9, 0, 0.0),
  "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9, 0, 0.0),
}


def network_seconds(
  collective: hlo.Collective, devices: Sequence[jax.Device], chip: Chip
) -> float:
  """Seconds of one run of a collective, by bandwidth alone.

  On a torus, an all-reduce and its like go round from each device of a group to
  the next, in all dimensions in which these lie at a time. What an all-to-all
  sends goes the shortest way through one dimension after the other, and the
  dimension with most to carry decides. All groups communicate at once.
  """
  sent = collective.sent_bytes / chip.link_bandwidth
  if not chip.dimensions:
    return sent
  places = np.array([d.coords for d in devices])
  group = places[collective.groups[0]]
  links, gaps, distances = [], [], []
  for place, size in zip(group.T, places.max(axis=0) + 1, strict=True):
    own = np.unique(place)
    if len(own) == 1:
      continue
    # Devices in between belong to other groups, which use the same links.
    gap = (own[-1] - own[0]) / (len(own) - 1)
    is_ring = _is_ring(size, chip)
    # Around a line instead of a ring one goes there and back again.
    links.append(2 if is_ring and gap * len(own) == size else 1)
    gaps.append(gap)
    apart = np.abs(place[:, None] - place[None])
    if is_ring:
      apart = np.minimum(apart, size - apart)
    distances.append(apart.sum() / (len(place) * (len(place) - 1)))
  if collective.kind in ("all-to-all", "ragged-all-to-all"):
    return sent * max(
      apart / count for apart, count in zip(distances, links, strict=True)
    )
  return sent * max(gaps) / sum(links)


def _is_ring(size: int, chip: Chip) -> bool:
  """Whether a slice's dimension of so many chips closes to a ring.

  In a 2D torus only the whole pod's 16 does, in a 3D torus multiples of 4 do.
  """
  return size == 16 if chip.dimensions == 2 else size % 4 == 0
