"""Plots of inspections: what `charts` draws of each view.

Each function returns the charts of one figure, a panel each.
"""

from collections.abc import Sequence

import numpy as np

from basemt_jax import metrics
from basemt_jax.data import languages
from basemt_jax.inspection import (
  charts,
  forecasting,
  run_report,
  text_report,
  token_counts,
)

_PAIRS = "% of the pairs of a step"


# ------------------------------------------------------------------- data


def lengths(data: text_report.Data) -> list[charts.Chart]:
  """Length histograms of both sides of every direction."""
  figures = []
  for side, limit in (
    ("source", data.lengths["inputs"]),
    ("target", data.lengths["targets"]),
  ):
    sides = {d.name: getattr(d, side) for d in data.directions}
    # Up to the limit, so that the line that marks it is seen.
    last = int(np.searchsorted(token_counts.BINS, limit)) + 2
    for own in sides.values():
      last = max([last, *(i + 1 for i, n in enumerate(own.histogram) if n)])
    ends = [*token_counts.BINS, 2 * token_counts.BINS[-1]][:last]
    shares = {
      name: (
        ends,
        [100 * n / max(1, sum(own.histogram)) for n in own.histogram[:last]],
      )
      for name, own in sides.items()
    }
    title = f"length of the {side}"
    x, y = "tokens, up to (tag and EOS included)", "% of the sequences"
    cut = {"the model cuts": limit}
    if len(shares) <= charts.FEW:
      figures.append(charts.lines(title, x, y, shares, marks=cut, log_x=True))
    else:
      figures.append(charts.heat(title, x, y, shares, marks=cut))
  return figures


def language_costs(data: text_report.Data) -> list[charts.Chart]:
  """Tokens per character of every language."""
  costs = {x.name: x.tokens_per_character for x in data.languages}
  middle = float(np.median(list(costs.values()))) if costs else 0.0
  return [
    charts.rows(
      "what a character costs",
      "tokens per character (line: the median language)",
      {"": costs},
      {"the median language": middle},
      bars=True,
    )
  ]


# ---------------------------------------------------------------- mixture


def temperatures(
  forecasts: Sequence[forecasting.Forecast],
) -> list[charts.Chart]:
  """Temperature over the steps, and who is drawn, by resource band."""
  figures = [
    charts.lines(
      "temperature",
      "step",
      "temperature T (none: infinite, uniform)",
      {f.name: (f.steps, f.temperatures) for f in forecasts},
      zero=True,
    )
  ]
  for f in forecasts:
    rates = 100 * np.array(f.pair_rates)
    bands = [d.band for d in f.directions]
    series = {
      band: (f.steps, rates[:, [x == band for x in bands]].sum(axis=1).tolist())
      for band in languages.BANDS
      if band in bands
    }
    title = _titled("who is drawn", f, forecasts)
    figures.append(charts.shares(title, "step", _PAIRS, series, charts.BANDS))
  return figures


def _titled(
  title: str,
  forecast: forecasting.Forecast,
  forecasts: Sequence[forecasting.Forecast],
) -> str:
  return title if len(forecasts) == 1 else f"{title}: {forecast.name}"


def rates(forecasts: Sequence[forecasting.Forecast]) -> list[charts.Chart]:
  """Rate of every direction over the steps."""
  figures = []
  for f in forecasts:
    values = (100 * np.array(f.pair_rates).T).tolist()
    series = {
      d.name: (f.steps, own)
      for d, own in zip(f.directions, values, strict=True)
    }
    title = _titled("rate of every direction", f, forecasts)
    figures.append(charts.each(title, "step", _PAIRS, series, log=True))
  return figures


def epochs(forecasts: Sequence[forecasting.Forecast]) -> list[charts.Chart]:
  """Epochs of every direction at the end of the run."""
  limit = forecasts[0].max_epochs
  return [
    charts.rows(
      "how often each direction is gone through",
      f"epochs in the whole run (lines: 1 and {limit:g})",
      {f.name: {d.name: d.epochs for d in f.directions} for f in forecasts},
      {"once": 1.0, "more is worth a warning": limit},
      log=True,
    )
  ]


def smallest(forecasts: Sequence[forecasting.Forecast]) -> list[charts.Chart]:
  """Epochs of the smallest directions over the steps."""
  figures = []
  for f in forecasts:
    chosen = range(max(0, len(f.directions) - 8), len(f.directions))
    done = np.array(f.epochs)
    series = {
      f.directions[i].name: (f.steps, done[:, i].tolist()) for i in chosen
    }
    title = _titled("the smallest directions", f, forecasts)
    figures.append(charts.lines(title, "step", "epochs so far", series))
  return figures


# -------------------------------------------------------------------- run


def drawn(report: run_report.RunReport) -> list[charts.Chart]:
  """Rows drawn against rows planned."""
  own = [d for d in report.directions if d.drawn_rows is not None]
  total = max(1.0, sum(d.planned_rows for d in own))
  planned = {d.name: max(d.planned_rows, 1e-9) for d in own}
  more = {
    d.name: 100 * ((d.drawn_rows or 0) / planned[d.name] - 1) for d in own
  }
  chance = {
    name: 200 * float(np.sqrt(plan * max(0, 1 - plan / total))) / plan
    for name, plan in planned.items()
  }
  return [
    charts.rows(
      f"rows drawn until step {report.step:,}",
      "% more than planned (bar: two standard deviations of chance)",
      {"drawn": more},
      {"as planned": 0.0},
      spread=chance,
    )
  ]


def curves(
  own: run_report.Curves, conversion: int | None
) -> list[charts.Chart]:
  """A metric over the steps: means of the bands, and every direction."""
  name = metrics.parse(own.metric)
  assert name is not None
  marks = {}
  if conversion is not None and own.steps[0] <= conversion <= own.steps[-1]:
    marks = {"conversion": float(conversion)}
  unit = name.metric.unit
  bands = {band: (own.steps, values) for band, values in own.bands.items()}
  each = {d: (own.steps, values) for d, values in own.directions.items()}
  return [
    charts.lines(
      f"{name.label}, means by resource",
      "step",
      unit,
      bands,
      charts.BANDS,
      marks,
    ),
    charts.each(
      f"{name.label} of every direction",
      "step",
      unit,
      each,
      marks,
      name.metric.larger_is_better,
    ),
  ]


def routers(report: run_report.RunReport) -> list[charts.Chart]:
  """What the routers did over the steps, a line per layer."""
  figures = []
  for metric in metrics.METRICS:
    series = {
      short_layer(r.layer): (r.steps, r.values[metric.name])
      for r in report.routers
      if any(r.values.get(metric.name, ()))
    }
    if series:
      title = f"{metric.label}, {metric.unit}".removesuffix(", ")
      figures.append(charts.each(title, "step", metric.label, series))
  return figures


def short_layer(name: str) -> str:
  """A layer's name, shortened: 'enc 1' for 'encoder/layers_1'."""
  for long, short in (("encoder", "enc"), ("decoder", "dec")):
    name = name.replace(f"{long}/layers_", f"{short} ")
  return name


def experts(own: run_report.ExpertMap) -> list[charts.Chart]:
  """Share of each language's tokens at each expert."""
  count = len(own.shares[0])
  numbers = [str(e) for e in range(count)]
  series = {
    language: (numbers, [100 * share for share in row])
    for language, row in zip(own.languages, own.shares, strict=True)
  }
  return [
    charts.heat(
      own.layer,
      f"expert (even: {100 / count:.3g}% each)",
      f"% of a language's {own.side} tokens",
      series,
    )
  ]
