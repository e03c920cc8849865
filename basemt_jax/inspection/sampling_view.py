"""The view of a mixture under one strategy, or under two side by side."""

from collections.abc import Callable, Sequence

import numpy as np

from basemt_jax.data import languages
from basemt_jax.inspection import charts
from basemt_jax.inspection.forecasting import DirectionForecast, Forecast
from basemt_jax.inspection.page import Plot, Section
from basemt_jax.inspection.tables import (
  Column,
  Table,
  count,
  fixed,
  listed,
  percent,
)

_MILESTONES = (1, 2, 5, 10)
_SMALLEST = 8


def section(mixture: str, forecasts: Sequence[Forecast]) -> Section:
  """All of the view."""
  own = list(forecasts)
  estimated = "" if own[0].is_exact else " (rows estimated from a sample)"
  return Section(
    f"Sampling of {mixture}",
    [
      f"{f.name}: {f.strategy}; {f.train_steps:,} steps of {f.batch_size:,} "
      f"rows{estimated}."
      for f in own
    ],
    [
      warning if len(own) == 1 else f"{f.name}: {warning}"
      for f in own
      for warning in f.warnings
    ],
    [
      _temperature_table(own),
      *(_draw_table(f, _of("Draws to expect", f, own)) for f in own),
      *((_comparison_table(own),) if len(own) > 1 else ()),
    ],
    [
      Plot("Temperature, and who is drawn", _temperature_charts(own)),
      Plot("Rate of every direction", rate_charts(own)),
      Plot("Epochs of every direction", [epoch_chart(own)]),
      Plot("When small directions are seen", _smallest_charts(own)),
    ],
  )


def _of(title: str, f: Forecast, forecasts: Sequence[Forecast]) -> str:
  """A title that tells which forecast it is of, where there are several."""
  return title if len(forecasts) == 1 else f"{title}: {f.name}"


def _band_rates(f: Forecast) -> dict[str, np.ndarray]:
  """Shares [K] of the sentence pairs drawn from each band."""
  bands = np.array([d.band for d in f.directions])
  rates = np.array(f.pair_rates)
  return {band: rates[:, bands == band].sum(axis=1) for band in languages.BANDS}


def _temperature_table(forecasts: Sequence[Forecast]) -> Table:
  rows = []
  for f in forecasts:
    shares = _band_rates(f).values()
    chosen = np.unique(np.linspace(0, len(f.steps) - 1, 5).astype(int))
    for k in chosen.tolist():
      own = (float(share[k]) for share in shares)
      rows.append([f.name, f.steps[k], f.temperatures[k], *own])
  return Table(
    "Temperature, and share of the sentence pairs by resource band",
    [
      "strategy",
      Column("step", count),
      Column("temperature", fixed(2)),
      *(Column(band, percent) for band in languages.BANDS),
    ],
    rows,
  )


def _draw_table(f: Forecast, title: str) -> Table:
  names = [d.name for d in f.directions]
  first, last = (
    dict(zip(names, f.pair_rates[k], strict=True)) for k in (0, -1)
  )
  return listed(
    title,
    f.directions,
    [
      Column("direction", value="name"),
      Column("pairs", count, "pairs"),
      Column("band", value="band"),
      Column("dev", count, "dev_pairs"),
      Column("from step", count, "first_step"),
      Column("rate first", percent, lambda d: first[d.name]),
      Column("rate last", percent, lambda d: last[d.name]),
      Column("rows", count, "rows"),
      Column("source tokens", count, "source_tokens"),
      Column("target tokens", count, "target_tokens"),
      Column("epochs", fixed(2), "epochs"),
      Column("factor", fixed(2), lambda d: d.factor if d.factor != 1 else None),
      *(Column(f"{k}x at", count, _step_of(k)) for k in _MILESTONES),
    ],
    note="rate: share of the sentence pairs at the first and last step; "
    "factor: on its rate, from weights and the cap on epochs; 2x at: the step "
    "when all its text has been seen twice",
  )


def _step_of(epochs: int) -> Callable[[DirectionForecast], int | None]:
  """When a direction has been seen that often."""
  return lambda d: d.seen.get(epochs)


def _comparison_table(forecasts: Sequence[Forecast]) -> Table:
  first, second = forecasts[:2]
  return Table(
    f"{first.name} against {second.name}",
    [
      *("direction", "band"),
      *(Column(f"rows, {f.name}", count) for f in (first, second)),
      *(Column(f"epochs, {f.name}", fixed(2)) for f in (first, second)),
      Column("ratio", fixed(2)),
    ],
    [
      [
        *(a.name, a.band, a.rows, b.rows, a.epochs, b.epochs),
        b.epochs / a.epochs if a.epochs else None,
      ]
      for a, b in zip(first.directions, second.directions, strict=True)
    ],
  )


# ------------------------------------------------------------------ plots

_PAIRS = "% of the pairs of a step"


def _temperature_charts(forecasts: Sequence[Forecast]) -> list[charts.Chart]:
  """Temperature over the steps, and who is drawn, by resource band."""
  temperatures = charts.lines(
    "temperature",
    "step",
    "temperature T (none: infinite, uniform)",
    {f.name: (f.steps, f.temperatures) for f in forecasts},
    zero=True,
  )
  drawn = []
  for f in forecasts:
    bands = {d.band for d in f.directions}
    series = {
      band: (f.steps, (100 * shares).tolist())
      for band, shares in _band_rates(f).items()
      if band in bands
    }
    title = _of("who is drawn", f, forecasts)
    drawn.append(charts.shares(title, "step", _PAIRS, series, charts.BANDS))
  return [temperatures, *drawn]


def rate_charts(forecasts: Sequence[Forecast]) -> list[charts.Chart]:
  """Rate of every direction over the steps."""
  return [
    charts.each(
      _of("rate of every direction", f, forecasts),
      "step",
      _PAIRS,
      {
        d.name: (f.steps, (100 * np.array(rates)).tolist())
        for d, *rates in zip(f.directions, *f.pair_rates, strict=True)
      },
      log=True,
    )
    for f in forecasts
  ]


def epoch_chart(forecasts: Sequence[Forecast]) -> charts.Chart:
  """Epochs of every direction at the end of the run."""
  limit = forecasts[0].max_epochs
  return charts.rows(
    "how often each direction is gone through",
    f"epochs in the whole run (lines: 1 and {limit:g})",
    {f.name: {d.name: d.epochs for d in f.directions} for f in forecasts},
    {"once": 1.0, "more is worth a warning": limit},
    log=True,
  )


def _smallest_charts(forecasts: Sequence[Forecast]) -> list[charts.Chart]:
  """Epochs of the smallest directions over the steps."""
  found = []
  for f in forecasts:
    epochs = np.array(f.epochs).T.tolist()
    series = {
      d.name: (f.steps, own)
      for d, own in zip(f.directions, epochs, strict=True)
    }
    title = _of("the smallest directions", f, forecasts)
    few = dict(list(series.items())[-_SMALLEST:])
    found.append(charts.lines(title, "step", "epochs so far", few))
  return found
