"""Sampling strategies: which direction the rows of a step are drawn from.

Axis legend: N directions, K steps.

A `Strategy` says it in general: a temperature at every step, when languages
join, and how often any direction may be seen. A `Plan` is a strategy for given
data: rates that are a pure function of the step, so that all draws of a run
can be expected before it starts. At step k direction i is drawn with

  p_i(k) proportional to w_i c_i n_i^(1 / T(k)) from step s_i on, 0 before,

where the weights w_i are 1 unless given, and c_i = 1 unless the cap on epochs
bites. Every strategy that is compared in
the literature is a choice of these: a constant T; T that rises (heating) or
falls (cooling); languages that join at steps s_i; and UniMax (Chung et al.,
arXiv:2304.09151), which is the cap on uniform sampling.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from basemt_jax import heating, ranges

# Steps at a time; bounds the memory of [K, N].
_BLOCK = 4096
# Bins of 1/T in which the cap's weights count as equal: n^(1/T) then differs
# by less than 1 %, and by 1e-6 on average over a bin.
_BIN = 1e-3
_NEWTON_STEPS = 200
_CAP_TOLERANCE = 1e-9


# (Name, all directions) -> those that it means.
Meant = Callable[[str, Sequence[str]], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How directions are sampled over the steps of a run.

  Attributes:
    temperature: Step -> temperature T.
    joins: The first step of late directions. A key is a direction ('en-gu'), a
      language ('gu': all directions from or to it), in any spelling, a label
      ('bt': all directions of text with it, such as 'en_x_bt-gu'), 'authentic'
      (all without any), or a number n (all directions of fewer than n training
      pairs); the latest step of all that match counts.
    max_epochs: The most often that any direction is expected to be gone
      through. A direction that would be seen more often is drawn less, by one
      factor at all steps; the others take over in their proportions.
    steps: Of the run, which `max_epochs` is about.
    sizes: Training pairs n_i by direction, such as a benchmark publishes them;
      None: as many as there are.
    weights: How much more often directions are drawn than that, w_i; keys as
      those of `joins`, but for numbers. The product of all that match counts.

  Example: a run of 100 steps that is heated from 1 to 5, and what it will draw
  of the rows of two directions at its first and its last step.

    >>> strategy = Strategy(heating.linear(1.0, 5.0, 100))
    >>> plan = strategy.plan(["en-de", "en-is"], [9000, 1000], [900, 100], 32)
    >>> plan.rates([0, 100]).round(2)
    array([[0.9 , 0.1 ],
           [0.61, 0.39]])
  """

  temperature: heating.Schedule
  joins: Mapping[str | int, ranges.Steps] = dataclasses.field(
    default_factory=dict
  )
  max_epochs: ranges.Positive | None = None
  steps: ranges.Count | None = None
  sizes: ranges.Sizes | None = None
  weights: ranges.Weights = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Refuses what no data could make sense of."""
    for name, weight in self.weights.items():
      if not 0 <= weight < math.inf:
        raise ValueError(f"the weight of {name!r} must be from 0, got {weight}")
    if not callable(self.temperature):
      raise ValueError(
        "Strategy.temperature must be a schedule such as heating.constant(5),"
        f" got {self.temperature!r}"
      )
    for name, step in self.joins.items():
      if not isinstance(step, int) or step < 0:
        raise ValueError(f"{name!r} must join at a step from 0, got {step!r}")
    if self.max_epochs is None:
      return
    if not 0 < self.max_epochs < math.inf:
      raise ValueError(f"max_epochs must be above 0, got {self.max_epochs}")
    if self.steps is None or self.steps <= 0:
      raise ValueError(
        f"max_epochs={self.max_epochs} needs the steps of the run, above 0, "
        f"got steps={self.steps}"
      )

  def __str__(self) -> str:
    """Names the strategy, the same in every process."""
    parts = [heating.describe(self.temperature)]
    if self.joins:
      parts.append(f"joining at {dict(self.joins)}")
    if self.max_epochs is not None:
      parts.append(f"at most {self.max_epochs:g} epochs in {self.steps} steps")
    if self.sizes is not None:
      text = repr(sorted(self.sizes.items())).encode()
      stamp = hashlib.blake2b(text, digest_size=4).hexdigest()
      parts.append(f"given sizes {stamp}")
    if self.weights:
      parts.append(f"weighted by {dict(self.weights)}")
    return ", ".join(parts)

  def plan(
    self,
    directions: Sequence[str],
    pairs: ArrayLike,
    rows: ArrayLike,
    batch_size: float,
    meant: Meant | None = None,
  ) -> "Plan":
    """The strategy for given data.

    Args:
      directions: [N] names.
      pairs: [N] training pairs.
      rows: [N] packed rows; `pairs` where nothing is packed.
      batch_size: rows of a global batch.
      meant: which of the directions a name in `joins` and `sizes` means, such
        as `languages.meant`, which knows every spelling; None: the direction
        of that very name.

    Raises:
      ValueError: names that no direction has, directions without a size, no
        direction at step 0, or a cap that leaves too little data.
    """
    return Plan(self, directions, pairs, rows, batch_size, meant)


def unimax(
  steps: ranges.Count,
  max_epochs: ranges.Positive | None = None,
  joins: Mapping[str | int, ranges.Steps] | None = None,
  sizes: ranges.Sizes | None = None,
  weights: ranges.Weights | None = None,
) -> Strategy:
  """UniMax: as uniform as no more than `max_epochs` of any direction allow.

  Over the steps of the run; 4 epochs unless given. Other arguments as of
  `Strategy`; a size of 0 leaves a direction out.
  """
  epochs = 4.0 if max_epochs is None else max_epochs
  return Strategy(
    heating.constant(math.inf), joins or {}, epochs, steps, sizes, weights or {}
  )


class Plan:
  """A strategy for given data; made by `Strategy.plan`.

  Attributes:
    pairs: float [N], training pairs.
    rows: float [N], packed rows.
    sizes: float [N], the n_i of the rates.
    starts: int [N], the first step of each direction.
    multipliers: float [N], w_i c_i; c_i is below 1 where the cap bites.
  """

  def __init__(
    self,
    strategy: Strategy,
    directions: Sequence[str],
    pairs: ArrayLike,
    rows: ArrayLike,
    batch_size: float,
    meant: Meant | None = None,
  ):
    """See `Strategy.plan`."""
    meant = meant or _spelled_so
    self.strategy, self.directions = strategy, tuple(directions)
    self.pairs = np.asarray(pairs, np.float64)
    self.rows = np.asarray(rows, np.float64)
    self.batch_size = batch_size
    if not self.pairs.shape == self.rows.shape == (len(self.directions),):
      raise ValueError(
        f"a plan needs pairs and rows of each of {len(self.directions)} "
        f"directions, got shapes {self.pairs.shape} and {self.rows.shape}"
      )
    self.sizes = self.pairs
    if strategy.sizes is not None:
      known = {
        name: size
        for key, size in strategy.sizes.items()
        for name in meant(key, self.directions)
      }
      missing = sorted({*self.directions} - known.keys())
      if missing:
        raise ValueError(
          f"the given sizes lack the directions {', '.join(missing)}"
        )
      given = [known[name] for name in self.directions]
      # What has no rows cannot be drawn, whatever is published.
      self.sizes = np.asarray(given, np.float64) * (self.rows > 0)
    self.starts = _starts(strategy.joins, self.directions, self.sizes, meant)
    self.multipliers = _weights(strategy.weights, self.directions, meant)
    if not ((self.starts == 0) & (self.sizes * self.multipliers > 0)).any():
      raise ValueError(
        "all directions join after step 0 or have weight 0, so there is "
        "nothing to begin with: leave some out of "
        f"joins={dict(strategy.joins)} or weights={dict(strategy.weights)}"
      )
    if strategy.max_epochs is not None:
      self.multipliers = self._capped()

  def temperatures(self, steps: ArrayLike) -> np.ndarray:
    """Temperatures [K] float64 of steps [K]."""
    return heating.temperatures(self.strategy.temperature, np.asarray(steps))

  def rates(self, steps: ArrayLike) -> np.ndarray:
    """Shares of the rows drawn at a step; [K, N] for steps [K], sums 1."""
    steps = np.asarray(steps)
    rates = heating.row_rates(
      self.pairs, self.rows, self.temperatures(steps), self.sizes
    )
    if not self.starts.any() and (self.multipliers == 1).all():
      return rates
    rates = rates * self.multipliers * (steps[:, None] >= self.starts)
    return rates / rates.sum(axis=1, keepdims=True)

  def pair_rates(self, steps: ArrayLike) -> np.ndarray:
    """Shares of the sentence pairs drawn at a step, p_i; [K, N], sums 1."""
    pairs = self.rates(steps) * self.pairs / np.maximum(self.rows, 1)
    return pairs / pairs.sum(axis=1, keepdims=True)

  def expected_rows(self, steps: ArrayLike) -> np.ndarray:
    """Rows expected to be drawn before steps [M], rising; float64 [M, N].

    That is batch_size times the sum of `rates` of earlier steps.
    """
    steps = np.asarray(steps)
    drawn, total, done = [], np.zeros(len(self.directions)), 0
    for step in steps.tolist():
      for start in range(done, step, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, step))
        total = total + self.batch_size * self.rates(block).sum(axis=0)
      done = max(done, step)
      drawn.append(total)
    return np.array(drawn).reshape(len(steps), -1)

  def expected_epochs(self, steps: ArrayLike) -> np.ndarray:
    """How often each direction was gone through before some steps; [M, N]."""
    return self.expected_rows(steps) / np.maximum(self.rows, 1)

  def _capped(self) -> np.ndarray:
    """The multipliers of the cap on epochs; float64 [N].

    Raises:
      ValueError: the cap leaves too few rows for the run.
    """
    strategy = self.strategy
    assert strategy.max_epochs is not None and strategy.steps is not None
    limits = strategy.max_epochs * self.rows * (self.multipliers > 0)
    for end in [*np.unique(self.starts)[1:].tolist(), strategy.steps]:
      end = min(end, strategy.steps)
      allowed, drawn = limits[self.starts < end].sum(), self.batch_size * end
      if allowed < drawn:
        raise ValueError(
          f"{strategy.max_epochs:g} epochs of the directions there are before "
          f"step {end} are {allowed:,.0f} rows, and the steps before it draw "
          f"{drawn:,.0f}: allow more epochs, take fewer steps, or let more "
          "directions join earlier"
        )
    has_rows = self.rows * self.multipliers > 0
    weights, counts = self._distinct_rates(strategy.steps)
    logs = np.log(
      weights, where=weights > 0, out=np.full(weights.shape, -np.inf)
    )
    found = _cap(logs[:, has_rows], counts * self.batch_size, limits[has_rows])
    if found is None:
      raise ValueError(
        f"{strategy.max_epochs:g} epochs are hardly enough for "
        f"{strategy.steps} steps: allow a little more"
      )
    multipliers = self.multipliers.copy()
    multipliers[has_rows] *= found
    return multipliers

  def _distinct_rates(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rates of groups of like steps [G, N], and the size of each group [G]."""
    cold = np.empty(steps)
    for start in range(0, steps, _BLOCK):
      block = np.arange(start, min(start + _BLOCK, steps))
      cold[block] = 1 / self.temperatures(block)
    phase = np.searchsorted(
      np.unique(self.starts), np.arange(steps), side="right"
    )
    _, first, group, counts = np.unique(
      np.stack([phase, np.round(cold / _BIN)]),
      axis=1,
      return_index=True,
      return_inverse=True,
      return_counts=True,
    )
    mean = np.bincount(group.reshape(-1), cold) / counts
    with np.errstate(divide="ignore"):
      rates = heating.row_rates(self.pairs, self.rows, 1 / mean, self.sizes)
    rates = rates * self.multipliers * (first[:, None] >= self.starts)
    return rates, counts.astype(np.float64)


def _spelled_so(name: str, directions: Sequence[str]) -> Sequence[str]:
  return [name] if name in directions else []


def _starts(
  joins: Mapping[str | int, int],
  directions: Sequence[str],
  sizes: np.ndarray,
  meant: Meant,
) -> np.ndarray:
  """First steps of the directions; int64 [N]."""
  starts = np.zeros(len(directions), np.int64)
  for key, step in joins.items():
    if isinstance(key, str):
      match = _matching(key, directions, f"is to join at step {step}", meant)
    else:
      match = sizes < key
    starts = np.where(match, np.maximum(starts, step), starts)
  return starts


def _weights(
  weights: Mapping[str, float], directions: Sequence[str], meant: Meant
) -> np.ndarray:
  """Weights of the directions; float64 [N]."""
  found = np.ones(len(directions))
  for key, weight in weights.items():
    match = _matching(key, directions, f"is to have weight {weight:g}", meant)
    found = np.where(match, found * weight, found)
  return found


def _matching(
  key: str, directions: Sequence[str], what: str, meant: Meant
) -> np.ndarray:
  """Which directions a direction's, a language's or a label's name means.

  Raises:
    ValueError: None of them.
  """
  match = np.isin(directions, meant(key, directions))
  if not match.any():
    raise ValueError(
      f"{key!r}, which {what}, is neither a direction nor a language nor a "
      f"label of {', '.join(directions)}"
    )
  return match


def _cap(
  logs: np.ndarray, draws: np.ndarray, limits: np.ndarray
) -> np.ndarray | None:
  """Multipliers under which no direction is drawn more than its limit.

  Args:
    logs: [G, N] logarithms of weights, -inf for 0.
    draws: [G] draws with each row of weights.
    limits: [N] above 0.

  Returns:
    [N] in (0, 1]: with the expected draws d_i = sum_g draws_g softmax(logs_g +
    log c)_i, either c_i = 1 and d_i <= limits_i, or d_i = limits_i. None where
    there are none, or not to the tolerance.
  """
  x = np.zeros(len(limits))
  capped = np.zeros(len(limits), bool)
  while True:
    over = draws @ _shares(logs, x)[1] > limits * (1 + _CAP_TOLERANCE)
    if not (over & ~capped).any():
      return np.exp(x)
    # A lower c_i raises all other draws, so that the capped stay capped.
    capped |= over
    found = _meet(logs, draws, limits, x, capped)
    if found is None:
      return None
    x = found


def _shares(logs: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The log-sum-exp [G] and the softmax [G, N] of logs + x."""
  z = logs + x
  top = z.max(axis=1, keepdims=True)
  shares = np.exp(z - top)
  norm = shares.sum(axis=1, keepdims=True)
  return (top + np.log(norm))[:, 0], shares / norm


def _meet(
  logs: np.ndarray,
  draws: np.ndarray,
  limits: np.ndarray,
  x: np.ndarray,
  free: np.ndarray,
) -> np.ndarray | None:
  """Moves x where it is `free` until these directions meet their limits.

  Their expected draws minus their limits are the gradient of the convex
  function draws . log sum_i exp(logs_i + x_i) - limits . x, which damped
  Newton steps minimise.
  """
  x = x.copy()
  for _ in range(_NEWTON_STEPS):
    norms, shares = _shares(logs, x)
    value = draws @ norms - limits @ x
    expected, part = draws @ shares, shares[:, free]
    gradient = (expected - limits)[free]
    if (np.abs(gradient) <= _CAP_TOLERANCE / 2 * limits[free]).all():
      return x
    curvature = np.diag(expected[free]) - part.T @ (draws[:, None] * part)
    # Scaled, since limits differ by powers of ten; the small ridge is for
    # multipliers that only matter relative to one another.
    scale = 1 / np.sqrt(expected[free])
    curvature = scale[:, None] * curvature * scale
    curvature[np.diag_indices_from(curvature)] += 1e-13
    step = scale * np.linalg.solve(curvature, scale * gradient)
    step *= min(1.0, 4.0 / np.abs(step).max())
    descent = gradient @ step
    for _ in range(40):
      new = x.copy()
      new[free] -= step
      new_value = draws @ _shares(logs, new)[0] - limits @ new
      # Up to the rounding of the values, which ends up above their difference;
      # that of the norms is there even where these are 0.
      rounding = 1e-13 * (abs(value) + draws.sum())
      if new_value <= value - 1e-4 * descent + rounding:
        break
      step, descent = step / 2, descent / 2
    x = new
  return None
