"""The view of a run: planned and drawn, losses and scores, routers, experts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from basemt_jax import metrics
from basemt_jax.inspection import charts
from basemt_jax.inspection.page import Plot, Section
from basemt_jax.inspection.run_report import (
  Curves,
  DirectionRun,
  ExpertMap,
  RunReport,
)
from basemt_jax.inspection.tables import Column, Table, count, fixed, listed

# More columns of experts than this are told by the strongest.
_MANY_EXPERTS = 16


def section(report: RunReport) -> Section:
  """All of the view."""
  converted = (
    f"; dense until step {report.conversion_step:,}, then sparse"
    if report.conversion_step is not None
    else f"; {report.phase}"
  )
  plots = []
  if any(d.drawn_rows is not None for d in report.directions):
    plots.append(Plot("Rows drawn against planned", [drawn_chart(report)]))
  for own in report.curves:
    plots.append(Plot(_title(own), curve_charts(own, report.conversion_step)))
  if report.routers:
    plots.append(Plot("Routers", [_router_chart(r) for r in report.routers]))
  for experts in report.experts:
    title = f"Experts and languages, {experts.layer}"
    plots.append(Plot(title, [_expert_chart(experts)]))
  return Section(
    f"Run {report.model_dir}",
    [
      f"Checkpoint of step {report.step:,} of {report.train_steps:,}"
      f"{converted}. Checkpoints: "
      f"{', '.join(f'{s:,}' for s in report.checkpoints)}.",
      f"Sampling: {report.strategy}.",
    ],
    report.warnings,
    [
      _direction_table(report),
      *map(_curve_table, report.curves),
      *((_router_table(report.routers),) if report.routers else ()),
      *(_expert_table(m, report.routed_split) for m in report.experts),
    ],
    plots,
  )


def _title(own: Curves) -> str:
  """What curves are of, such as 'Dev BLEU'."""
  return own.label[0].upper() + own.label[1:]


# ----------------------------------------------------------------- tables


def _direction_table(report: RunReport) -> Table:
  evaluated = sorted({s for d in report.directions for s in d.scores})
  loss, bleu = (metrics.named(name) for name in ("loss", "bleu"))
  return listed(
    f"Directions until step {report.step:,}",
    report.directions,
    [
      Column("direction", value="name"),
      Column("pairs", count, "pairs"),
      Column("band", value="band"),
      Column("planned rows", count, "planned_rows"),
      Column("drawn rows", count, "drawn_rows"),
      Column("difference", lambda share: f"{100 * share:+.1f}%", _difference),
      Column("planned target tokens", count, "planned_target_tokens"),
      Column("trained target tokens", count, "trained_target_tokens"),
      Column("epochs", fixed(2), "epochs"),
      Column("loss", loss.text, "loss"),
      Column("dev loss", loss.text, "dev_loss"),
      *(Column(f"{x} BLEU", bleu.text, _score_of(x)) for x in evaluated),
    ],
    note="loss: nats per target token, the last reported; BLEU: of an "
    "evaluation, named by its split and search",
  )


def _difference(d: DirectionRun) -> float | None:
  """Drawn rows more than planned, as a share."""
  if d.drawn_rows is None or not d.planned_rows:
    return None
  return d.drawn_rows / d.planned_rows - 1


def _score_of(evaluation: str) -> Callable[[DirectionRun], float | None]:
  return lambda d: d.scores.get(evaluation)


def _curve_table(own: Curves) -> Table:
  chosen = np.unique(np.linspace(0, len(own.steps) - 1, 8).astype(int))
  return Table(
    f"{_title(own)}, means over directions",
    [
      Column("step", count),
      *(Column(band, fixed(own.digits)) for band in own.bands),
    ],
    [
      [own.steps[k], *(values[k] for values in own.bands.values())]
      for k in chosen.tolist()
    ],
    note=own.unit,
  )


def _router_table(routers: Sequence[Curves]) -> Table:
  return Table(
    "Routers, as last reported",
    ["layer", *(Column(own.label, fixed(own.digits)) for own in routers)],
    [
      [layer, *(own.lines.get(layer, [None])[-1] for own in routers)]
      for layer in sorted({layer for own in routers for layer in own.lines})
    ],
    note=", ".join(f"{own.label}: {own.unit}" for own in routers if own.unit),
  )


def _expert_table(own: ExpertMap, split: str) -> Table:
  experts = len(own.shares[0])
  shares = np.array(own.shares)
  columns: list[Column]
  cells: list[list[Any]]
  if experts <= _MANY_EXPERTS:
    columns = [Column(str(e), fixed(0)) for e in range(experts)]
    cells = (100 * shares).tolist()
  else:
    columns = [Column(place) for place in ("1st", "2nd", "3rd")]
    best = np.argsort(-shares, axis=1)[:, :3]
    cells = [
      [f"expert {e}: {100 * row[e]:.0f}" for e in top]
      for row, top in zip(shares, best, strict=True)
    ]
  return Table(
    f"Share of each {own.side} language's tokens at each expert, {own.layer}",
    ["language", Column("tokens", count), *columns],
    [
      [name, tokens, *row]
      for name, tokens, row in zip(
        own.languages, own.tokens, cells, strict=True
      )
    ],
    note=f"%, routed as at test time, rows of the {split} split; even would be "
    f"{100 / experts:.3g}",
  )


# ------------------------------------------------------------------ plots


def drawn_chart(report: RunReport) -> charts.Chart:
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
  return charts.rows(
    f"rows drawn until step {report.step:,}",
    "% more than planned (bar: two standard deviations of chance)",
    {"drawn": more},
    {"as planned": 0.0},
    spread=chance,
  )


def curve_charts(own: Curves, conversion: int | None) -> list[charts.Chart]:
  """A metric over the steps: means of the bands, and every direction."""
  marks = {}
  if conversion is not None and own.steps[0] <= conversion <= own.steps[-1]:
    marks = {"conversion": float(conversion)}
  bands, each = (
    {name: (own.steps, values) for name, values in lines.items()}
    for lines in (own.bands, own.lines)
  )
  return [
    charts.lines(
      f"{own.label}, means by resource",
      "step",
      own.unit,
      bands,
      charts.BANDS,
      marks,
    ),
    charts.each(
      f"{own.label} of every direction",
      "step",
      own.unit,
      each,
      marks,
      own.larger_is_better,
    ),
  ]


def _router_chart(own: Curves) -> charts.Chart:
  """What the routers did over the steps, a line per layer."""
  series = {
    _short_layer(layer): (own.steps, values)
    for layer, values in own.lines.items()
  }
  title = f"{own.label}, {own.unit}".removesuffix(", ")
  return charts.each(title, "step", own.label, series)


def _short_layer(name: str) -> str:
  """A layer's name, shortened: 'enc 1' for 'encoder/layers_1'."""
  for long, short in (("encoder", "enc"), ("decoder", "dec")):
    name = name.replace(f"{long}/layers_", f"{short} ")
  return name


def _expert_chart(own: ExpertMap) -> charts.Chart:
  """Share of each language's tokens at each expert."""
  count = len(own.shares[0])
  numbers = [str(e) for e in range(count)]
  series = {
    language: (numbers, [100 * share for share in row])
    for language, row in zip(own.languages, own.shares, strict=True)
  }
  return charts.heat(
    own.layer,
    f"expert (even: {100 / count:.3g}% each)",
    f"% of a language's {own.side} tokens",
    series,
  )
