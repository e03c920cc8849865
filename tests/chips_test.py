"""Exchanges among chips: their seconds, by hand and link by link."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from basemt_jax.compilation import chips, hlo

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
