"""Runs side by side: settings, scores and their significance, curves.

What a run is compared with is the first of them. Curves are of dev loss, over
updates, target tokens and seconds; a run's factor is how much sooner than the
first run it reaches that one's best dev loss.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax import evaluation, metrics
from basemt_jax.data import languages
from basemt_jax.inspection import charts, results
from basemt_jax.inspection.page import Plot, Section
from basemt_jax.inspection.tables import Column, Table, fixed

AXES = ("updates", "target tokens", "seconds")
_SCORES = tuple(metrics.named(name) for name in ("bleu", "chrf"))


@dataclasses.dataclass(frozen=True)
class Curve:
  """A run's dev loss."""

  loss: list[float]  # [K], nats per token, mean over the directions
  axes: dict[str, list[float]]  # [K] of `AXES`, as far as they are known


@dataclasses.dataclass(frozen=True)
class Score:
  """A run against the first one, on one direction of one test set."""

  test: str  # test set and search
  direction: str  # name; '' for a mean over those of a band
  band: str  # 'high', 'mid', 'low', or 'all'
  scores: dict[str, float]  # by metric: this run's
  differences: dict[str, float]  # by metric: this run's less the first one's
  # by metric: how probable so large a difference were, were the two equal;
  # empty where their translations are not at hand
  p_values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Compared:
  """One run."""

  name: str  # its directory's name, or as much of its path as tells it apart
  # bindings of its configuration that differ between the runs
  settings: dict[str, str]
  curve: Curve | None  # None: dev loss was not measured
  # by axis: the first run's way to its best dev loss, by this run's way there;
  # what was not reached, or is not known, is missing
  factors: dict[str, float]
  scores: tuple[Score, ...]  # by test set and direction
  # by test set and band, and of 'all': means over the directions
  bands: tuple[Score, ...]


# ---------------------------------------------------------------- numbers


def compare(
  model_dirs: Sequence[pathlib.Path], num_samples: int = 1000
) -> list[Compared]:
  """Reads runs and compares them with the first.

  Differences are tested on so many samples of the sentences.

  Raises:
    ValueError: a directory that holds nothing of a run.
  """
  for path in model_dirs:
    if not any(
      (path / name).exists()
      for name in ("config.gin", "metrics.jsonl", "evaluation")
    ):
      raise ValueError(
        f"{path} is not the directory of a run: it holds no config.gin, "
        "metrics.jsonl or evaluation"
      )
  names = _names(model_dirs)
  settings = _differing([_settings(path) for path in model_dirs])
  curves = [_curve(path) for path in model_dirs]
  tests = [results.evaluations(path) for path in model_dirs]
  runs = []
  for i, name in enumerate(names):
    # The first run is compared with itself: no differences, nothing to test.
    samples = num_samples if i else 0
    found = [
      (score, differences)
      for test in sorted(tests[i].keys() & tests[0].keys())
      for score, differences in _scores(tests[0][test], tests[i][test], samples)
    ]
    runs.append(
      Compared(
        name,
        settings[i],
        curves[i],
        _factors(curves[0], curves[i]),
        tuple(score for score, _ in found),
        tuple(_bands(found)),
      )
    )
  return runs


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """The shortest ends of paths that tell them apart."""
  parts = [path.absolute().parts for path in paths]
  for count in range(1, max(map(len, parts)) + 1):
    names = ["/".join(own[-count:]) for own in parts]
    if len(set(names)) == len(names):
      return names
  raise ValueError(f"{paths[0]} is given twice: compare different runs")


def _settings(model_dir: pathlib.Path) -> dict[str, str]:
  """Bindings of the run's configuration, as they are written there."""
  path = model_dir / "config.gin"
  text = path.read_text(encoding="utf-8") if path.exists() else ""
  # A long value goes on in indented lines.
  text = re.sub(r"\\?\n[ \t]+", " ", text)
  found = re.findall(r"^([\w./]+) = *(.*)$", text, re.MULTILINE)
  return {name: value.strip() for name, value in found}


def _differing(runs: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
  """For each run, the bindings that are not the same in all."""
  names = list(dict.fromkeys(itertools.chain(*runs)))
  names = [n for n in names if len({r.get(n) for r in runs}) > 1]
  return [
    {n: run.get(n, "") for n in names if n != "MODEL_DIR"} for run in runs
  ]


def _curve(model_dir: pathlib.Path) -> Curve | None:
  """Dev loss over what was done for it."""
  series = results.read_metrics(model_dir / "metrics.jsonl")
  losses = series.get("dev/loss")
  if not losses:
    return None
  steps = sorted(losses)
  axes = {"updates": [float(step) for step in steps]}
  reports = sorted(series.get("loss", ()))
  for axis, amounts in (
    ("target tokens", series.get("target_tokens")),
    ("seconds", _seconds(series, reports)),
  ):
    if amounts:
      at = sorted(amounts)
      total = np.cumsum([amounts[step] for step in at])
      axes[axis] = np.interp(steps, [0, *at], [0.0, *total]).tolist()
  return Curve([losses[step] for step in steps], axes)


def _seconds(
  series: Mapping[str, results.Series], reports: Sequence[int]
) -> results.Series:
  """Seconds of training of each report; evaluations and saving left out."""
  speeds = series.get("steps_per_second", {})
  return {
    step: (step - before) / speeds[step]
    for before, step in itertools.pairwise([0, *reports])
    if step in speeds
  }


def _factors(first: Curve | None, own: Curve | None) -> dict[str, float]:
  """How much sooner the first run's best dev loss is reached."""
  if first is None or own is None:
    return {}
  target = min(first.loss)
  factors = {}
  for axis in first.axes.keys() & own.axes.keys():
    theirs = reached(first.axes[axis], first.loss, target)
    ours = reached(own.axes[axis], own.loss, target)
    if theirs and ours:
      factors[axis] = theirs / ours
  return {axis: factors[axis] for axis in AXES if axis in factors}


def reached(
  x: Sequence[float] | np.ndarray,
  losses: Sequence[float] | np.ndarray,
  target: float,
) -> float | None:
  """Where a curve first is at or below a loss, interpolated; None: nowhere."""
  below = np.flatnonzero(np.array(losses) <= target)
  if not below.size:
    return None
  i = int(below[0])
  if i == 0:
    return float(x[0])
  share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
  return float(x[i - 1] + share * (x[i] - x[i - 1]))


# By metric: differences of resampled scores [K], {} if they are not known.
Differences = dict[str, np.ndarray]


def _scores(
  first: results.Evaluated, own: results.Evaluated, num_samples: int
) -> Iterator[tuple[Score, Differences]]:
  """A run's scores on a test set, in the directions that both have."""
  for direction, result in own.directions.items():
    base = first.directions.get(direction)
    values = {
      m.name: result[m.name] for m in _SCORES if result.get(m.name) is not None
    }
    if base is None or len(values) < len(_SCORES):
      continue
    p_values, differences = _tested(first, own, direction, num_samples)
    yield (
      Score(
        own.name,
        direction,
        result["band"],
        values,
        {n: value - base[n] for n, value in values.items()},
        p_values,
      ),
      differences,
    )


def _tested(
  first: results.Evaluated,
  own: results.Evaluated,
  direction: str,
  num_samples: int,
) -> tuple[dict[str, float], Differences]:
  """The paired bootstrap of a direction; ({}, {}) where there can be none."""
  references = first.sentences(direction, "ref")
  base, system = (e.sentences(direction, "hyp") for e in (first, own))
  if references is None or references != own.sentences(direction, "ref"):
    return {}, {}
  if base is None or system is None or not num_samples:
    return {}, {}
  language = languages.Direction.parse(direction).target
  arguments = references, language, num_samples
  tests = evaluation.paired_bootstrap(base, system, *arguments)
  sampled = [evaluation.bootstrap_scores(h, *arguments) for h in (base, system)]
  return (
    {m.name: test.p_value for m, test in zip(_SCORES, tests, strict=True)},
    {m.name: sampled[1][m.name] - sampled[0][m.name] for m in _SCORES},
  )


def _bands(found: Sequence[tuple[Score, Differences]]) -> Iterator[Score]:
  """Means over the directions of each test set's bands, tested as one."""
  for test in sorted({score.test for score, _ in found}):
    for band in (*languages.BANDS, "all"):
      own = [
        x for x in found if x[0].test == test and band in (x[0].band, "all")
      ]
      if not own:
        continue
      scores, differences = (
        {
          m.name: float(np.mean([getattr(s, kind)[m.name] for s, _ in own]))
          for m in _SCORES
        }
        for kind in ("scores", "differences")
      )
      p_values = {}
      if all(sampled for _, sampled in own):
        p_values = {
          m.name: _p_value(
            np.mean([sampled[m.name] for _, sampled in own], axis=0),
            differences[m.name],
          )
          for m in _SCORES
        }
      yield Score(test, "", band, scores, differences, p_values)


def _p_value(sampled: np.ndarray, difference: float) -> float:
  """How probable so large a difference were by chance, as sacreBLEU has it."""
  if difference == 0:
    return 1.0
  larger = np.abs(sampled - sampled.mean()) > abs(difference)
  return float((larger.sum() + 1) / (len(sampled) + 1))


# ------------------------------------------------------------------- view


def section(runs: Sequence[Compared]) -> Section:
  """The comparison for people."""
  tests = sorted({s.test for run in runs for s in run.scores})
  compared = [_settings_table(runs), _factor_table(runs)]
  for test in tests:
    compared += [_score_table(runs, test, by) for by in ("band", "direction")]
  warnings = []
  if not tests:
    warnings.append(
      "no test set that all runs were evaluated on with the same search: run "
      "basemt evaluate on each"
    )
  plots = []
  if any(run.curve for run in runs):
    plots.append(Plot("Dev loss", _curve_charts(runs)))
  plots += [Plot(f"Scores on {t}", _score_charts(runs, t)) for t in tests]
  return Section(
    "Runs compared",
    [f"{', '.join(run.name for run in runs[1:])} against {runs[0].name}."],
    warnings,
    compared,
    plots,
  )


def _settings_table(runs: Sequence[Compared]) -> Table:
  return Table(
    "Settings that differ",
    ["setting", *(run.name for run in runs)],
    [
      [name, *(run.settings.get(name, "") for run in runs)]
      for name in runs[0].settings
    ],
  )


def _factor_table(runs: Sequence[Compared]) -> Table:
  loss = metrics.named("loss")
  return Table(
    f"How much sooner the best dev loss of {runs[0].name} is reached",
    [
      "run",
      Column("best dev loss", loss.text),
      *(Column(axis, fixed(2)) for axis in AXES),
    ],
    [
      [
        run.name,
        min(run.curve.loss) if run.curve else None,
        *(run.factors.get(axis) for axis in AXES),
      ]
      for run in runs
    ],
    note="-: not reached, or not known; seconds are of training, without "
    "evaluating and saving",
  )


def _score_table(runs: Sequence[Compared], test: str, by: str) -> Table:
  """Scores of the first run, and how much more the others have.

  A row for each 'direction' or 'band', as `by` says.
  """
  found = [
    {
      getattr(s, by): s
      for s in (run.scores if by == "direction" else run.bands)
      if s.test == test
    }
    for run in runs
  ]
  columns: list[Column | str] = [by]
  rows: list[list[Any]] = [[name] for name in found[0]]
  if by == "direction":
    columns.append("band")
    rows = [[name, score.band] for name, score in found[0].items()]
  for m in _SCORES:
    columns.append(Column(f"{m.label}, {runs[0].name}", m.text))
    for row in rows:
      row.append(found[0][row[0]].scores[m.name])
    for run, scores in zip(runs[1:], found[1:], strict=True):
      of = f"{m.label}, {run.name}"
      columns += [Column(f"more {of}", _signed(m.digits))]
      columns += [Column(f"p, {of}", fixed(3))]
      for row in rows:
        own = scores.get(row[0])
        row.append(own and own.differences[m.name])
        row.append(own and own.p_values.get(m.name))
  return Table(
    f"Scores by {by} on {test}",
    columns,
    rows,
    note="p: of the paired bootstrap; how probable so large a difference were, "
    "were the two equal; -: the translations are not at hand",
  )


def _signed(digits: int) -> Any:
  return lambda value: f"{value:+.{digits}f}"


def _curve_charts(runs: Sequence[Compared]) -> list[charts.Chart]:
  return [
    charts.lines(
      f"dev loss by {axis}",
      axis,
      metrics.named("loss").unit,
      {
        run.name: (run.curve.axes[axis], run.curve.loss)
        for run in runs
        if run.curve and axis in run.curve.axes
      },
    )
    for axis in AXES
    if any(run.curve and axis in run.curve.axes for run in runs)
  ]


def _score_charts(runs: Sequence[Compared], test: str) -> list[charts.Chart]:
  return [
    charts.rows(
      f"{metric.label} more than {runs[0].name}",
      metric.unit,
      {
        run.name: {
          s.direction: s.differences[metric.name]
          for s in run.scores
          if s.test == test
        }
        for run in runs[1:]
      },
      {"the same": 0.0},
    )
    for metric in _SCORES
  ]
