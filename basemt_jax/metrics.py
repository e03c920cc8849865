"""The list of metrics: how each is computed, and what it is called and shown.

Axes: B batch, L length, V vocabulary, N directions, E experts.

Training, T5X, the study, tables, TensorBoard and the page of `basemt inspect`
follow this list, so that a metric is one entry. A metric's full name is
`[split/]name[/of]`: 'loss' and 'loss/en-de' in training, 'dev/loss/low' on dev,
'router/decoder/layers_1/entropy' for a layer of experts. What it is of is a
direction or a group of them: a resource band, 'all', 'en->xx'.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Array = Any  # NumPy's on the host, JAX's in T5X's step.

SPLITS = ("dev", "validation", "test")
_GROUPS = ("high", "mid", "low", "all")


def ratio(total: Array, count: Array) -> Array:
  """The sum divided by its weight; NaN where the weight is 0."""
  return total / count


def _load_max(wanted: Array) -> Array:
  """Largest over mean load, of the tokens [E] that want each expert."""
  return wanted.max() * wanted.shape[-1] / wanted.sum()


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number that training or evaluation measures.

  Attributes:
    name: in files and TensorBoard; no '/'.
    label: in tables and plots.
    unit: of the value.
    sums: names of the sums it is computed from (`steps.train_step`; for
      `of_layers`, `losses.router_sums`): arrays that add up over steps and
      devices, with the directions [N] first unless they are scalars. Empty for
      what is measured elsewhere.
    value: (*sums) -> scalar.
    of_directions: it is measured for each direction too.
    of_layers: it is measured for each layer of experts.
    is_main: shown for each direction and band; of the others the whole's value
      is what is looked at.
    larger_is_better: scores are, losses are not.
    digits: after the point, in tables.
    row: (logits [B, L, V], batch) -> float32 [B], a sum over each row that the
      step then adds up under the metric's name; None: the step knows its sums.
  """

  name: str
  label: str
  unit: str = ""
  sums: tuple[str, ...] = ()
  value: Callable[..., Array] = ratio
  of_directions: bool = False
  of_layers: bool = False
  is_main: bool = False
  larger_is_better: bool = False
  digits: int = 3
  row: Callable[[Any, Mapping[str, Any]], Any] | None = None

  def text(self, value: float | None) -> str:
    """The value as tables show it."""
    return "-" if value is None else f"{value:,.{self.digits}f}"


METRICS = (
  Metric(
    "loss",
    "loss",
    "nats per target token",
    ("nll", "weight"),
    of_directions=True,
    is_main=True,
  ),
  Metric(  # Beside the loss, which then is of averaged weights.
    "last_weights_loss", "loss of the last weights", "nats per target token"
  ),
  Metric("bleu", "BLEU", "BLEU", is_main=True, larger_is_better=True, digits=1),
  Metric(
    "chrf", "chrF++", "chrF++", is_main=True, larger_is_better=True, digits=1
  ),
  Metric(
    "objective", "smoothed loss", "nats per target token", ("loss", "weight")
  ),
  Metric(
    "accuracy",
    "accuracy",
    "share of the target tokens",
    ("correct", "weight"),
    larger_is_better=True,
  ),
  Metric("gradient_norm", "gradient norm", "", ("grad_norm", "steps")),
  Metric(
    "target_tokens",
    "target tokens",
    "tokens",
    ("weight",),
    lambda weight: weight,
    of_directions=True,
    digits=0,
  ),
  Metric(
    "load_max",
    "load of the most wanted expert",
    "by the mean",
    ("favourite",),
    _load_max,
    of_layers=True,
    digits=2,
  ),
  Metric(
    "agreement",
    "favourite taken",
    "share of the tokens",
    ("agreement", "favourite"),
    lambda agreed, favourite: agreed / favourite.sum(-1),
    of_directions=True,
    of_layers=True,
  ),
  Metric(
    "entropy",
    "routing entropy",
    "nats",
    ("entropy", "steps"),
    of_layers=True,
    digits=2,
  ),
  Metric(
    "auxiliary_loss",
    "auxiliary loss",
    "",
    ("auxiliary_loss", "steps"),
    of_layers=True,
  ),
  Metric("temperature", "temperature", digits=2),
  Metric("learning_rate", "learning rate", digits=6),
  Metric("tokens_per_second", "speed", "tokens/s", digits=0),
  Metric("steps_per_second", "speed", "steps/s", digits=2),
)


def named(name: str) -> Metric:
  """The entry of that name."""
  return next(metric for metric in METRICS if metric.name == name)


@dataclasses.dataclass(frozen=True)
class Name:
  """A full name, taken apart.

  Attributes:
    metric: the entry.
    split: 'dev', 'test'; '' for training.
    layer: 'decoder/layers_1'; '' where it is of no layer.
    of: a direction or a group; '' for the whole.
  """

  metric: Metric
  split: str = ""
  layer: str = ""
  of: str = ""

  @property
  def is_group(self) -> bool:
    """Whether it is of several directions."""
    return self.of in _GROUPS or "->" in self.of

  @property
  def label(self) -> str:
    """Split and metric in words: 'dev BLEU', 'training loss'."""
    split = self.split or ("training" if self.metric.is_main else "")
    return f"{split} {self.metric.label}".strip()


def parse(name: str, known: Sequence[Metric] = METRICS) -> Name | None:
  """Takes a full name apart; None for one that is of no metric here."""
  for metric in known:
    if metric.of_layers:
      found = re.fullmatch(rf"router/(.+?)/{metric.name}(?:/(.+))?", name)
      if found:
        return Name(metric, "", found[1], found[2] or "")
      continue
    splits = "|".join(SPLITS)
    found = re.fullmatch(rf"(?:({splits})/)?{metric.name}(?:/(.+))?", name)
    if found:
      return Name(metric, found[1] or "", "", found[2] or "")
  return None


def computed(
  sums: Mapping[str, Any],
  directions: Sequence[str],
  known: Sequence[Metric] = METRICS,
) -> Iterator[tuple[str, Metric, tuple[Array, ...]]]:
  """What can be computed of a step's sums: (name, metric, arrays to add up).

  `metric.value(*arrays)` is the value, whatever arrays of other steps were
  added first.

  Args:
    sums: of `steps.train_step` or `steps.eval_step`.
    directions: N names.
    known: the metrics to look for.
  """
  layers = sums.get("router", {})
  for metric in known:
    places: dict[str, Mapping[str, Any]] = {"": sums}
    if metric.of_layers:
      places = {f"router/{k}/": {**sums, **v} for k, v in layers.items()}
    for prefix, own in places.items():
      if not metric.sums or not set(metric.sums) <= own.keys():
        continue
      arrays = [own[name] for name in metric.sums]
      whole = tuple(a.sum(axis=0) if a.ndim else a for a in arrays)
      yield prefix + metric.name, metric, whole
      if metric.of_directions:
        for i, direction in enumerate(directions):
          each = tuple(a[i] if a.ndim else a for a in arrays)
          yield f"{prefix}{metric.name}/{direction}", metric, each


def scalars(
  sums: Mapping[str, Any],
  directions: Sequence[str],
  known: Sequence[Metric] = METRICS,
) -> dict[str, float]:
  """Values by full name, from sums on the host; NaN (of no tokens) left out.

  Arguments as of `computed`.
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    values = {
      name: float(metric.value(*arrays))
      for name, metric, arrays in computed(sums, directions, known)
    }
  return {name: v for name, v in values.items() if not np.isnan(v)}


def of_directions(values: Mapping[str, float], name: str) -> dict[str, float]:
  """A metric's values by what they are of: 'loss' gives those of 'loss/...'."""
  stem = f"{name}/"
  return {
    full.removeprefix(stem): value
    for full, value in values.items()
    if full.startswith(stem)
  }


def band_means(
  values: Mapping[str, float],
  bands: Mapping[str, str],
  known: Sequence[Metric] = METRICS,
) -> dict[str, float]:
  """Means over the directions of each band, of the main metrics.

  Args:
    values: by full name.
    bands: of the directions.
    known: the metrics that a run measures.

  Returns:
    By full name, such as 'dev/loss/low'; without those that `values` has.
  """
  groups: dict[str, list[float]] = {}
  for name, value in values.items():
    found = parse(name, known)
    if found and found.metric.is_main and found.of in bands:
      stem = name.removesuffix(found.of)
      groups.setdefault(stem + bands[found.of], []).append(value)
  return {
    name: float(np.mean(own))
    for name, own in groups.items()
    if name not in values
  }


def tag(name: str, known: Sequence[Metric] = METRICS) -> str | None:
  """Where dashboards such as TensorBoard show a metric; None: nowhere.

  Wholes and bands come first, and each direction of the main metrics in a
  section below: 'dev/loss/low', 'dev_by_direction/loss/en-de'. A direction's
  other metrics are in `metrics.jsonl` alone: there would be hundreds.
  """
  found = parse(name, known)
  if found is None or not found.of or found.is_group:
    return name
  if not found.metric.is_main:
    return None
  first, _, rest = name.partition("/")
  return f"{first}_by_direction/{rest}"


def tagged(
  values: Mapping[str, Any], known: Sequence[Metric] = METRICS
) -> dict[str, float]:
  """What dashboards show of metrics by full name: values by `tag`."""
  tags = ((tag(name, known), value) for name, value in values.items())
  return {name: float(value) for name, value in tags if name is not None}
