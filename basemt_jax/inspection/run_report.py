"""What a run did: its draws, losses, scores, and which experts took what.

Axis legend: N directions, E experts, B rows of a batch.

Read from MODEL_DIR: checkpoints (any, T5X's too), `metrics.jsonl` and the
scores of evaluations. What is not there is left out.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax import checkpointing, metrics, partitioning
from basemt_jax import run as run_lib
from basemt_jax import trained as trained_lib
from basemt_jax.data import batches, doubts, languages, packing, row_store
from basemt_jax.inspection import results

# Rows of a direction that are routed through a checkpoint.
ROWS = 16
# Standard deviations between planned and drawn rows from which to warn.
_FAR = 5.0


@dataclasses.dataclass(frozen=True)
class DirectionRun:
  """A direction in a run, up to a checkpoint."""

  name: str
  band: str  # 'high', 'mid' or 'low'
  pairs: int  # of training
  planned_rows: float  # expected of the strategy
  drawn_rows: int | None  # as the checkpoint counts them; None: it does not
  planned_target_tokens: float  # likewise
  # as the metrics count them; None: they do not
  trained_target_tokens: float | None
  epochs: float | None  # drawn rows by rows there are; None where those are
  loss: float | None  # the last in training, nats per token
  dev_loss: float | None  # the last, nats per token
  # BLEU of the last evaluation of each test set and search
  scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Curves:
  """A metric over the steps."""

  # its full name: 'loss', 'dev/loss', 'dev/bleu'; 'router/load_max' of layers
  metric: str
  label: str  # in words
  unit: str  # of the values
  digits: int  # after the point, in tables
  larger_is_better: bool  # scores are, losses are not
  steps: list[int]  # at which it was measured
  # values of each direction, or of each layer; None: not measured then
  lines: dict[str, list[float | None]]
  # means of the directions by resource band, and of 'all'; {} of layers
  bands: dict[str, list[float | None]]


@dataclasses.dataclass(frozen=True)
class ExpertMap:
  """Which experts a layer sends the tokens of a language to, at test time."""

  layer: str  # 'decoder/layers_1'
  # 'source' (encoder) or 'target' (decoder): whose languages they are
  side: str
  languages: list[str]  # names, sorted
  tokens: list[int]  # of each language that were routed
  # [languages][E], of a language's tokens; each row sums to 1
  shares: list[list[float]]


@dataclasses.dataclass(frozen=True)
class RunReport:
  """The report on a model directory."""

  model_dir: str
  step: int  # of the checkpoint looked at
  phase: str  # of it: 'dense' or 'sparse'
  train_steps: int  # of the whole run
  checkpoints: list[int]  # steps
  conversion_step: int | None  # when the dense model became sparse; None: not
  strategy: str  # of sampling, in words
  directions: tuple[DirectionRun, ...]  # most training pairs first
  # of the main metrics that were measured, by direction
  curves: tuple[Curves, ...]
  routers: tuple[Curves, ...]  # what the routers did in training, by layer
  experts: tuple[ExpertMap, ...]  # by layer; none for a dense checkpoint
  routed_split: str  # of which rows were routed
  warnings: tuple[str, ...]


def inspect_run(
  run: run_lib.Run,
  console: run_lib.Console,
  which: str | int = "latest",
) -> RunReport:
  """Looks at a run's model directory.

  The checkpoint is the 'latest', the 'best', or that of a step.

  Raises:
    ValueError: no checkpoints, no such one, or they are of another model.
  """
  trained = trained_lib.load(run, console, which)
  header, step = trained.description.header, trained.step
  with checkpointing.Checkpoints(run.model_dir, read_only=True) as checkpoints:
    steps = checkpoints.steps()
    position = checkpoints.position(step)
  model_dir = pathlib.Path(run.model_dir)
  series = results.read_metrics(model_dir / "metrics.jsonl")
  split = "validation" if header.has_pairs("validation") else "train"
  try:
    experts, gone = expert_maps(trained, split), ""
  except ValueError as error:
    experts, gone = (), str(error)
  directions = _directions(run, header, step, position, series)
  bands = {d.name: d.band for d in directions}
  known = known_metrics(run.settings.known_metrics, series, bands)
  return RunReport(
    model_dir=str(run.model_dir),
    step=step,
    phase=trained.program.name,
    train_steps=run.settings.train_steps,
    checkpoints=steps,
    conversion_step=_conversion_step(run, series, step, trained.program.name),
    strategy=str(run.strategy),
    directions=tuple(directions),
    curves=tuple(_curves(series, bands, known)),
    routers=tuple(_routers(series, known)),
    experts=experts,
    routed_split=split,
    warnings=(
      *_warnings(directions, bool(position), bool(series)),
      *([f"not known which experts take what: {gone}"] if gone else []),
    ),
  )


# ---------------------------------------------------------------- metrics


def _last(series: Mapping[int, float] | None, step: int) -> float | None:
  """The last value until a step."""
  values = [v for s, v in sorted((series or {}).items()) if s <= step]
  return values[-1] if values else None


def _conversion_step(
  run: run_lib.Run, series: Mapping[str, results.Series], step: int, phase: str
) -> int | None:
  measured = series.get("conversion/relative_error")
  if measured:
    return max(measured)
  dense = run.settings.dense_steps
  return dense if phase == "sparse" and 0 < dense <= step else None


def _directions(
  run: run_lib.Run,
  store: row_store.Header,
  step: int,
  position: Mapping[str, Any],
  series: Mapping[str, results.Series],
) -> list[DirectionRun]:
  """Planned against drawn, and how each direction fared."""
  pairs, rows = store.pairs("train"), store.epoch_rows("train")
  plan = run.strategy.plan(
    store.directions, pairs, rows, run.batch_size, languages.meant
  )
  planned = plan.expected_rows(np.array([step]))[0]
  counters = (position.get("data") or {}).get("counters") or {}
  evaluated = results.evaluations(pathlib.Path(run.model_dir), step)
  scores = {name: own.scores("bleu") for name, own in evaluated.items()}
  directions = []
  for i, name in enumerate(store.directions):
    stats = store.stats("train", name)
    tokens = series.get(f"target_tokens/{name}")
    trained = None
    if tokens:
      trained = sum(value for s, value in tokens.items() if s <= step)
    drawn = counters.get(name)
    directions.append(
      DirectionRun(
        name=name,
        band=languages.band(stats.pairs, run.bands),
        pairs=stats.pairs,
        planned_rows=float(planned[i]),
        drawn_rows=drawn,
        planned_target_tokens=float(
          planned[i] * stats.target_tokens / max(1, stats.rows)
        ),
        trained_target_tokens=trained,
        epochs=None if drawn is None else drawn / max(1, rows[i]),
        loss=_last(series.get(f"loss/{name}"), step),
        dev_loss=_last(series.get(f"dev/loss/{name}"), step),
        scores={s: own[name] for s, own in scores.items() if name in own},
      )
    )
  return sorted(directions, key=lambda d: (-d.pairs, d.name))


def known_metrics(
  own: Sequence[metrics.Metric], names: Iterable[str], directions: Iterable[str]
) -> list[metrics.Metric]:
  """The run's metrics, and others that it measured by direction.

  A model directory has no code: what a metric of the user's is called is not
  known without the configuration, and its name has to do.
  """
  known, directions = list(own), set(directions)
  for full in names:
    stem, _, of = full.rpartition("/")
    split, _, rest = stem.partition("/")
    name = rest if split in metrics.SPLITS else stem
    if of in directions and "/" not in name and not metrics.parse(full, known):
      known.append(metrics.Metric(name, name, is_main=True))
  return known


def _curve(
  name: metrics.Name,
  full_name: str,
  found: Mapping[str, results.Series],
  groups: Mapping[str, Sequence[str]],
) -> Curves:
  """Series by direction or layer on the steps of all, and means of groups."""
  steps = sorted({step for own in found.values() for step in own})
  return Curves(
    full_name,
    name.label,
    name.metric.unit,
    name.metric.digits,
    name.metric.larger_is_better,
    steps,
    {line: [own.get(step) for step in steps] for line, own in found.items()},
    {
      group: [_mean([found[d].get(step) for d in own]) for step in steps]
      for group, own in groups.items()
      if own
    },
  )


def _curves(
  series: Mapping[str, results.Series],
  bands: Mapping[str, str],
  known: Sequence[metrics.Metric],
) -> Iterator[Curves]:
  """Main metrics that were measured by direction, in training and on dev."""
  main = [m for m in known if m.is_main]
  for metric, split in itertools.product(main, ("", "dev")):
    stem = f"{split}/{metric.name}" if split else metric.name
    found = {d: series[f"{stem}/{d}"] for d in bands if f"{stem}/{d}" in series}
    if found:
      groups = {
        band: [d for d in found if bands[d] == band] for band in languages.BANDS
      }
      groups["all"] = list(found)
      yield _curve(metrics.Name(metric, split), stem, found, groups)


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None


def _routers(
  series: Mapping[str, results.Series], known: Sequence[metrics.Metric]
) -> Iterator[Curves]:
  """Metrics of layers, the layers in the order of their names."""
  layers: dict[str, dict[str, results.Series]] = {}
  for name, own in sorted(series.items()):
    found = metrics.parse(name, known)
    if found and found.layer and not found.of:
      layers.setdefault(found.metric.name, {})[found.layer] = own
  for metric in known:
    if metric.name in layers:
      stem = f"router/{metric.name}"
      yield _curve(metrics.Name(metric), stem, layers[metric.name], {})


# ---------------------------------------------------------------- experts


def expert_maps(
  trained: trained_lib.Trained, split: str, rows: int = ROWS
) -> tuple[ExpertMap, ...]:
  """Routes some rows of every direction, spread over a split.

  Returns:
    A map per layer of experts; none for a dense model.
  """
  if trained.program.name == "dense":
    return ()
  store, mesh = trained.store, trained.program.mesh
  total: dict[str, np.ndarray] = {}
  size = trained.run.batch_size
  for batch in _some_batches(store, split, rows, size, mesh.size):
    sums = trained.program.routing_step(
      trained.variables, partitioning.put_batch(batch, mesh)
    )
    for layer, own in sums.items():
      counts = np.asarray(own["expert"], np.float64)
      total[layer] = total.get(layer, 0) + counts
  return tuple(
    _expert_map(layer, total[layer], store.directions)
    for layer in sorted(total)
  )


def _some_batches(
  store: row_store.RowStore,
  split: str,
  rows: int,
  batch_size: int,
  devices: int,
) -> Iterator[packing.Batch]:
  """Rows spread evenly over each direction; the last batch is filled up."""
  counts = store.rows(split)
  chosen = [
    np.unique(np.linspace(0, count - 1, min(rows, count)).astype(int))
    for count in counts
  ]
  directions = np.repeat(np.arange(len(counts)), [len(c) for c in chosen])
  row = np.concatenate(chosen)
  # Devices divide a batch, so that all of them get a part.
  size = min(batch_size, -(-len(row) // devices) * devices)
  return batches.filled_up(store, split, directions, row, size)


def _expert_map(
  layer: str, counts: np.ndarray, directions: Sequence[str]
) -> ExpertMap:
  """Adds the directions [N, E] up by the language the layer reads."""
  side = 0 if layer.startswith("encoder") else 1
  own_language = [
    str(languages.Direction.parse(name)[side]) for name in directions
  ]
  names = sorted(set(own_language))
  sums = np.zeros((len(names), counts.shape[1]))
  for language, own in zip(own_language, counts, strict=True):
    sums[names.index(language)] += own
  return ExpertMap(
    layer,
    ("source", "target")[side],
    names,
    [int(n) for n in sums.sum(axis=1)],
    (sums / np.maximum(1, sums.sum(axis=1, keepdims=True))).tolist(),
  )


def _warnings(
  directions: Sequence[DirectionRun], has_position: bool, has_metrics: bool
) -> Iterator[str]:
  """A line for each kind of trouble, with the directions that have it."""
  if not has_position:
    yield "the checkpoint holds no data position: drawn rows are not known"
  if not has_metrics:
    yield "there is no metrics.jsonl: losses and routers are not known"
  total = sum(d.planned_rows for d in directions)
  far = []
  for d in directions:
    if d.drawn_rows is None or not total:
      continue
    share = d.planned_rows / total
    deviation = max(1.0, (d.planned_rows * (1 - share)) ** 0.5)
    if abs(d.drawn_rows - d.planned_rows) > _FAR * deviation:
      far.append(f"{d.name} {d.drawn_rows:,} for {d.planned_rows:,.0f}")
  yield from doubts.listed(
    "other rows were drawn than planned: data or strategy were others", far
  )
