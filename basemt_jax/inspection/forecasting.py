"""What a run will draw from a mixture, known before it starts.

Axis legend: N directions, K steps shown.

Expectations of a `sampling.Plan`: rates over the steps; rows, tokens and
epochs per direction; when a small language has been seen how often.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from basemt_jax import sampling
from basemt_jax.data import doubts, languages, row_store
from basemt_jax.inspection import text_report

# Epochs whose step is told.
MILESTONES = (1, 2, 5, 10, 20, 50, 100)
# More epochs than this are worth a warning.
MAX_EPOCHS = 10.0
# Steps whose rates are kept for plots, and between which epochs are
# interpolated.
_SHOWN, _FINE = 120, 2000


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much data there is, by direction."""

  directions: tuple[str, ...]  # N
  pairs: np.ndarray  # int [N], training pairs
  rows: np.ndarray  # float [N], packed rows of them
  source_tokens: np.ndarray  # float [N], in these rows
  target_tokens: np.ndarray  # float [N], in these rows
  dev_pairs: np.ndarray  # int [N]
  is_exact: bool  # counted, not estimated from a sample


def sizes_of_store(store: row_store.Header) -> Sizes:
  """Sizes of a store, counted when its rows were packed."""
  stats = [store.stats("train", name) for name in store.directions]
  dev = np.zeros(len(stats), np.int64)
  if "validation" in store.splits:
    dev = store.pairs("validation")
  return Sizes(
    store.directions,
    store.pairs("train"),
    store.epoch_rows("train"),
    np.array([s.source_tokens for s in stats]),
    np.array([s.target_tokens for s in stats]),
    dev,
    is_exact=True,
  )


def sizes_of_data(data: text_report.Data) -> Sizes:
  """Sizes estimated from the pairs that an inspection looked at.

  Raises:
    ValueError: a direction whose number of pairs is not known.
  """
  directions = sorted(data.directions, key=lambda d: d.name)
  for d in directions:
    if d.pairs is None:
      raise ValueError(
        f"task {d.task!r} does not tell how many training pairs it has, so "
        "that nothing can be expected of it: count them with --full"
      )
  pairs = np.array([d.pairs for d in directions])
  # How many times the pairs looked at there are.
  scale = pairs / np.maximum(1, [d.looked_at for d in directions])
  dev = [
    sum((h.pairs or h.looked_at) for h in d.held_out if h.split == "validation")
    for d in directions
  ]
  return Sizes(
    tuple(d.name for d in directions),
    pairs,
    scale * [d.rows for d in directions],
    scale * [d.row_tokens[0] for d in directions],
    scale * [d.row_tokens[1] for d in directions],
    np.array(dev),
    is_exact=all(d.is_whole for d in directions),
  )


@dataclasses.dataclass(frozen=True)
class DirectionForecast:
  """What a run is expected to draw from a direction."""

  name: str
  band: str  # 'high', 'mid' or 'low'
  pairs: int  # of training
  dev_pairs: int
  first_step: int  # from which on it is sampled
  # on its rate, that weights and a cap on epochs ask for; 1: none
  factor: float
  rows: float  # packed, drawn in the whole run
  source_tokens: float  # drawn in the whole run
  target_tokens: float  # likewise
  epochs: float  # how often it is gone through
  # epochs of `MILESTONES` that are reached, and the step of each
  seen: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Forecast:
  """A strategy over a run, for given data."""

  name: str  # to tell it from another
  strategy: str  # in words
  train_steps: int
  batch_size: int  # rows a step
  is_exact: bool  # sizes were counted, not estimated from a sample
  directions: tuple[DirectionForecast, ...]  # most training pairs first
  steps: list[int]  # [K], where rates and epochs are given
  temperatures: list[float]  # [K]
  pair_rates: list[list[float]]  # [K][N], share of the sentence pairs of a step
  epochs: list[list[float]]  # [K][N], epochs done before a step
  max_epochs: float  # more are worth a warning
  warnings: tuple[str, ...]


def forecast(
  name: str,
  strategy: sampling.Strategy,
  sizes: Sizes,
  train_steps: int,
  batch_size: int,
  bands: languages.BandThresholds,
  max_epochs: float = MAX_EPOCHS,
) -> Forecast:
  """Works out what a run will draw; see `Forecast`."""
  plan = strategy.plan(
    sizes.directions, sizes.pairs, sizes.rows, batch_size, languages.meant
  )
  fine = np.unique(np.linspace(0, train_steps, _FINE + 1).astype(int))
  shown = np.unique(np.linspace(0, train_steps - 1, _SHOWN).astype(int))
  epochs = plan.expected_epochs(fine)
  order = sorted(
    range(len(sizes.directions)),
    key=lambda i: (-sizes.pairs[i], sizes.directions[i]),
  )
  directions = [
    DirectionForecast(
      name=sizes.directions[i],
      band=languages.band(int(sizes.pairs[i]), bands),
      pairs=int(sizes.pairs[i]),
      dev_pairs=int(sizes.dev_pairs[i]),
      first_step=int(plan.starts[i]),
      factor=float(plan.multipliers[i]),
      rows=float(epochs[-1, i] * sizes.rows[i]),
      source_tokens=float(epochs[-1, i] * sizes.source_tokens[i]),
      target_tokens=float(epochs[-1, i] * sizes.target_tokens[i]),
      epochs=float(epochs[-1, i]),
      seen=_milestones(fine, epochs[:, i]),
    )
    for i in order
  ]
  return Forecast(
    name,
    str(strategy),
    train_steps,
    batch_size,
    sizes.is_exact,
    tuple(directions),
    shown.tolist(),
    plan.temperatures(shown).tolist(),
    plan.pair_rates(shown)[:, order].tolist(),
    [
      [float(np.interp(step, fine, epochs[:, i])) for i in order]
      for step in shown
    ],
    max_epochs,
    tuple(_warnings(directions, train_steps, max_epochs)),
  )


def _milestones(steps: np.ndarray, epochs: np.ndarray) -> dict[int, int]:
  """The step at which each milestone is reached; epochs [M] never fall."""
  reached = {}
  for count in MILESTONES:
    at = int(np.searchsorted(epochs, count))
    if at == len(epochs):
      break
    between = np.interp(count, epochs[at - 1 : at + 1], steps[at - 1 : at + 1])
    reached[count] = int(np.ceil(between))
  return reached


def _warnings(
  directions: Sequence[DirectionForecast], train_steps: int, max_epochs: float
) -> Iterator[str]:
  """A line for each kind of trouble, with the directions that have it."""
  yield from doubts.listed(
    f"never sampled in {train_steps:,} steps",
    [
      f"{d.name} (joins at step {d.first_step:,})"
      if d.first_step
      else f"{d.name} ({d.rows:.2g} rows expected)"
      for d in directions
      if d.rows < 0.5
    ],
  )
  often = [d for d in directions if d.epochs > max_epochs]
  yield from doubts.listed(
    f"gone through more than {max_epochs:g} times, which invites overfitting",
    [
      f"{d.name} {d.epochs:,.1f} times ({d.pairs:,} pairs)"
      for d in sorted(often, key=lambda d: -d.epochs)
    ],
  )
  yield from doubts.listed(
    "no dev set, so that overfitting would not be seen",
    [
      d.name
      for d in directions
      if not d.dev_pairs and not languages.label_of(d.name)
    ],
  )
