"""Temperature heating: mixing rates and temperature schedules.

Axis legend: N directions, K steps.

A direction i with n_i training pairs is drawn with probability
p_i proportional to n_i^(1/T): T = 1 follows the data, large T is uniform.
*Heating* raises T during training, so that the small languages are seen more
and more (Dua et al., "Tricks for Training Sparse Translation Models", NAACL
2022); *cooling* lowers it (Cooldown, arXiv 2410.04579). The paper's own form
and constants are not published, so every schedule here has both ends free.

A schedule is any pure function of the training step, given as an int or an
array of ints, that returns temperatures of the same shape: an Optax schedule
is one too.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from basemt_jax import ranges

Schedule = Callable[[Any], float | np.ndarray]

# Steps at which schedules are told apart: all the first ones, then ever fewer.
_PROBES = np.unique(np.geomspace(1, 1e7, 4000).astype(np.int64)) - 1


def mixing_rates(sizes: ArrayLike, temperature: ArrayLike) -> np.ndarray:
  """Shares of the directions, `p_i = n_i^(1/T) / sum_j n_j^(1/T)`.

  Computed from logarithms, hence exact in range for any size and for T = inf
  (uniform over the directions that have data).

  Args:
    sizes: [N] training pairs, none negative, not all zero; a direction without
      data gets the rate 0 at every temperature.
    temperature: scalar or [K], above 0, `inf` allowed.

  Returns:
    float64 [N], or [K, N] for K temperatures; every row sums to 1.

  Raises:
    ValueError: sizes or temperatures outside those ranges.

  Example:
    >>> mixing_rates([900, 100], 1.0)
    array([0.9, 0.1])
    >>> mixing_rates([900, 100], [2.0, np.inf])
    array([[0.75, 0.25],
           [0.5 , 0.5 ]])
  """
  sizes = np.asarray(sizes, np.float64)
  if sizes.ndim != 1 or not sizes.size:
    raise ValueError(
      f"mixing_rates needs one size per direction, got shape {sizes.shape}"
    )
  if not np.all(np.isfinite(sizes)) or np.any(sizes < 0) or not np.any(sizes):
    raise ValueError(
      "mixing_rates needs finite sizes, none negative and one at least above "
      f"0, got {sizes.tolist()}"
    )
  temperature = np.asarray(temperature, np.float64)
  if not np.all(temperature > 0):
    raise ValueError(
      f"a sampling temperature must be above 0, got {temperature.min()}"
    )
  # The largest n_i / n_max is 1, so no power overflows and none is NaN.
  log_sizes = np.log(
    sizes / sizes.max(), where=sizes > 0, out=np.zeros_like(sizes)
  )
  weights = np.exp(log_sizes / temperature[..., None]) * (sizes > 0)
  return weights / weights.sum(axis=-1, keepdims=True)


def row_rates(
  pairs: ArrayLike,
  rows: ArrayLike,
  temperature: ArrayLike,
  sizes: ArrayLike | None = None,
) -> np.ndarray:
  """Shares of packed rows under which *pairs* have `mixing_rates`' shares.

  A row of direction i carries pairs_i / rows_i pairs on average, so that q_i is
  proportional to p_i / (pairs_i / rows_i). Rows [N] are 0 only where pairs [N]
  are; the rates are those of `sizes` [N], or of the pairs.

  Returns:
    float64 [N], or [K, N] for K temperatures; every row sums to 1.
  """
  pairs = np.asarray(pairs, np.float64)
  rates = mixing_rates(pairs if sizes is None else sizes, temperature)
  rates = rates * np.asarray(rows, np.float64) / np.maximum(pairs, 1)
  return rates / rates.sum(axis=-1, keepdims=True)


def temperatures(schedule: Schedule, steps: np.ndarray) -> np.ndarray:
  """A schedule's temperatures at steps, int [K]; float64 [K].

  Schedules are vectorised over steps, or constant (a scalar is broadcast).

  Raises:
    ValueError: a temperature that is not above 0.
  """
  values = np.asarray(schedule(steps), np.float64)
  values = np.broadcast_to(values, np.shape(steps))
  if not np.all(values > 0):
    step = np.asarray(steps)[~(values > 0)][0]
    raise ValueError(
      f"schedule {describe(schedule)} gives a temperature that is not above 0 "
      f"at step {step}"
    )
  return values


def describe(schedule: Schedule) -> str:
  """A text that names a schedule and is the same in every process.

  A function is named with some of its values, because functions of one name
  can differ in what they remember.
  """
  if dataclasses.is_dataclass(schedule):
    return repr(schedule)
  # Never repr() of a function: it holds a memory address.
  name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
  values = np.broadcast_to(
    np.asarray(schedule(_PROBES), np.float64), _PROBES.shape
  )
  stamp = hashlib.blake2b(
    np.array2string(
      values, threshold=len(values), formatter={"float": "{:.6g}".format}
    ).encode(),
    digest_size=4,
  )
  return f"{name} ({values[0]:.6g} at first, {stamp.hexdigest()})"


@dataclasses.dataclass(frozen=True)
class _Stepwise:
  boundaries: tuple[int, ...]
  temperatures: tuple[float, ...]

  def __call__(self, step: Any) -> Any:
    index = np.searchsorted(self.boundaries, step, side="right")
    return np.asarray(self.temperatures, np.float64)[index]

  def __repr__(self) -> str:
    if not self.boundaries:
      return f"constant({self.temperatures[0]})"
    return f"stepwise({list(self.boundaries)}, {list(self.temperatures)})"


@dataclasses.dataclass(frozen=True)
class _Interpolated:
  """From `start` to `end` in `steps` steps along a named curve, then flat."""

  curve: str
  start: float
  end: float
  steps: int

  def __call__(self, step: Any) -> Any:
    fraction = np.clip(np.asarray(step, np.float64) / self.steps, 0.0, 1.0)
    start, end = np.float64(self.start), np.float64(self.end)
    if self.curve == "linear":
      return start + fraction * (end - start)
    if self.curve == "square_root":
      return np.sqrt(start**2 + fraction * (end**2 - start**2))
    return end + 0.5 * (start - end) * (1.0 + np.cos(np.pi * fraction))

  def __repr__(self) -> str:
    return f"{self.curve}({self.start}, {self.end}, {self.steps})"


@dataclasses.dataclass(frozen=True)
class Tabulated:
  """A schedule by its values at some steps, even between them, flat after.

  What is kept of a schedule that is somebody's function.
  """

  name: str
  steps: tuple[int, ...]
  temperatures: tuple[float, ...]

  def __call__(self, step: Any) -> Any:
    """Temperatures of steps."""
    # Of its reciprocal, which is finite for uniform sampling too.
    cold = 1 / np.asarray(self.temperatures, np.float64)
    with np.errstate(divide="ignore"):
      return 1 / np.interp(step, self.steps, cold)

  def __repr__(self) -> str:
    return self.name


_TABULATED = 512


def tabulated(schedule: Schedule, steps: int) -> Schedule:
  """The same schedule as plain data, over a run of so many steps.

  One of this module is data already; of any other 513 values are kept.
  """
  if isinstance(schedule, (_Stepwise, _Interpolated, _Sequence, Tabulated)):
    return schedule
  at = np.unique(np.linspace(0, steps, _TABULATED + 1).astype(int))
  return Tabulated(
    describe(schedule),
    tuple(at.tolist()),
    tuple(temperatures(schedule, at).tolist()),
  )


@dataclasses.dataclass(frozen=True)
class _Sequence:
  """Schedules one after the other, each in steps of its own."""

  schedules: tuple[Schedule, ...]
  boundaries: tuple[int, ...]

  def __call__(self, step: Any) -> Any:
    step = np.asarray(step)
    value = np.asarray(self.schedules[0](step), np.float64)
    for start, schedule in zip(
      self.boundaries, self.schedules[1:], strict=True
    ):
      later = schedule(np.maximum(step - start, 0))
      value = np.where(step >= start, later, value)
    return value

  def __repr__(self) -> str:
    first, *rest = map(describe, self.schedules)
    then = [
      f", from step {start} {text}"
      for start, text in zip(self.boundaries, rest, strict=True)
    ]
    return first + "".join(then)


def constant(temperature: ranges.Temperature) -> Schedule:
  """The same temperature at every step (`inf`: uniform sampling)."""
  return stepwise((), (temperature,))


def stepwise(
  boundaries: Sequence[ranges.Steps],
  temperatures: ranges.Temperatures,
) -> Schedule:
  """`temperatures[j]` from step `boundaries[j - 1]` on.

  A stepwise fall is the Cooldown recipe (5 for half of the run, then 1).

  Raises:
    ValueError: not one temperature more than boundaries, boundaries that do not
      rise, or a temperature that is not above 0.
  """
  if len(temperatures) != len(boundaries) + 1:
    raise ValueError(
      f"stepwise needs one temperature more than boundaries, got "
      f"{len(temperatures)} temperatures for {len(boundaries)} boundaries"
    )
  if any(b <= a for a, b in itertools.pairwise(boundaries)):
    raise ValueError(
      f"stepwise needs rising boundaries, got {list(boundaries)}"
    )
  _check_temperatures("stepwise", temperatures)
  return _Stepwise(tuple(boundaries), tuple(map(float, temperatures)))


def linear(
  start: ranges.Positive, end: ranges.Positive, steps: ranges.Steps
) -> Schedule:
  """Temperature changes by the same amount every step (Wang et al. 2020).

  From `start` at step 0 to `end` from step `steps` on; 0 steps: `end` at once.
  So do `square_root` and `cosine`.

  Raises:
    ValueError: a temperature that is not above 0 or not finite, steps below 0.
  """
  return _interpolated("linear", start, end, steps)


def square_root(
  start: ranges.Positive, end: ranges.Positive, steps: ranges.Steps
) -> Schedule:
  """`T^2` is linear in the step: the competence curve, Platanios et al. 2019.

  T(k) = sqrt(start^2 + (k / steps) (end^2 - start^2)).
  """
  return _interpolated("square_root", start, end, steps)


def cosine(
  start: ranges.Positive, end: ranges.Positive, steps: ranges.Steps
) -> Schedule:
  """Half a cosine wave: flat at both ends, steepest in the middle."""
  return _interpolated("cosine", start, end, steps)


def there_and_back(
  start: ranges.Positive,
  top: ranges.Positive,
  end: ranges.Positive,
  top_steps: ranges.Steps,
  end_steps: ranges.Steps,
) -> Schedule:
  """Heating, then back: T rises linearly to `top`, then falls to `end`.

  The small languages are seen early, and the large ones' share is restored
  before the run ends. `top` is reached at step `top_steps`, `end` at
  `end_steps`.

  Raises:
    ValueError: a temperature that is not above 0 or not finite, steps below 0
      or in the wrong order.
  """
  if not 0 <= top_steps <= end_steps:
    raise ValueError(
      f"there_and_back needs 0 <= top_steps <= end_steps, got {top_steps} and "
      f"{end_steps}"
    )
  back = linear(top, end, end_steps - top_steps)
  return _Sequence((linear(start, top, top_steps), back), (top_steps,))


def _interpolated(curve: str, start: float, end: float, steps: int) -> Schedule:
  start, end = float(start), float(end)
  _check_temperatures(curve, (start, end))
  if not np.isfinite(start) or not np.isfinite(end):
    raise ValueError(
      f"{curve} needs finite temperatures, got {start} and {end}; 100 is as "
      "good as uniform"
    )
  if steps < 0:
    raise ValueError(f"{curve} needs steps of at least 0, got {steps}")
  if steps == 0:  # A share of a run of very few steps.
    return constant(end)
  return _Interpolated(curve, start, end, int(steps))


def _check_temperatures(curve: str, values: Sequence[float]) -> None:
  if not all(value > 0 for value in values):
    raise ValueError(f"{curve} needs temperatures above 0, got {list(values)}")
