"""The views of `basemt inspect`: text, sampling, a run, as sections."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from basemt_jax import metrics
from basemt_jax.data import languages
from basemt_jax.inspection import forecasting, run_report, text_report
from basemt_jax.inspection.page import Plot, Section
from basemt_jax.inspection.tables import Column, Table, count, fixed, percent

# More columns of experts than this are told by the strongest.
_MANY_EXPERTS = 16


def _plots() -> Any:
  from basemt_jax.inspection import plots  # Here: only a page needs altair.

  return plots


def _columns(form: Any, *names: str) -> list[Column]:
  return [Column(name, form) for name in names]


# ------------------------------------------------------------------- text


def data_section(data: text_report.Data) -> Section:
  """The view of a task's or mixture's text."""
  looked = sum(d.looked_at for d in data.directions)
  known = [d.pairs for d in data.directions if d.pairs is not None]
  total = count(sum(known)) if len(known) == len(data.directions) else "unknown"
  how = (
    "all pairs" if data.sample is None else f"the first {data.sample:,} pairs"
  )
  summary = [
    f"{len(data.directions)} directions, {total} training pairs; looked at "
    f"{how} of every split: {looked:,} training pairs in all.",
    "Cut at {inputs} source and {targets} target tokens.".format(
      **data.lengths
    ),
  ]
  if not all(d.is_whole for d in data.directions):
    summary.append(
      "Repeats, and overlap with dev and test, are counted within what was "
      "looked at: there may be more (--full looks at everything)."
    )
  return Section(
    f"Text of {data.name}",
    summary,
    data.warnings,
    [_text_table(data), _overlap_table(data), _language_table(data)],
    [
      Plot("Length of the sequences", lambda: _plots().lengths(data)),
      Plot(
        "Who pays for the vocabulary", lambda: _plots().language_costs(data)
      ),
    ],
    [(d.name, d.examples) for d in data.directions],
  )


def _text_table(data: text_report.Data) -> Table:
  rows = []
  for d in data.directions:
    sides = (d.source, d.target)
    tokens = [side.tokens for side in sides]
    bytes_ = [side.bytes for side in sides]

    def joint(shares: Sequence[Any], tokens: Any = tokens) -> float | None:
      if None in shares:
        return None
      return float(np.dot(tokens, shares) / max(1, sum(tokens)))

    rows.append(
      [
        d.name,
        d.pairs,
        d.band or "?",
        d.looked_at,
        *((s.median, s.p95, s.longest) for s in sides),
        *(s.truncated for s in sides),
        joint([s.unknown for s in sides]),
        joint(bytes_),
        *map(d.share, (d.empty, d.copied, d.duplicates)),
        max(s.altered for s in sides),
      ]
    )
  return Table(
    "Training text",
    [
      "direction",
      Column("pairs", count),
      "band",
      Column("looked at", count),
      *_columns(_length, "source length", "target length"),
      *_columns(percent, "source cut", "target cut", "unknown", "bytes"),
      *_columns(percent, "empty", "copied", "repeats", "altered"),
    ],
    rows,
    note="length: median, 95th percentile and maximum in tokens, tag and EOS "
    "included; unknown, bytes: share of the tokens without them; altered: "
    "texts that decoding does not give back exactly (the worse side)",
  )


def _length(values: Sequence[float]) -> str:
  return " ".join(f"{value:g}" for value in values)


def _overlap_table(data: text_report.Data) -> Table:
  rows = []
  for d in data.directions:
    row: list[Any] = [d.name]
    for split in ("validation", "test"):
      own = next((h for h in d.held_out if h.split == split), None)
      if own is None:
        row += [None] * 5
        continue
      row += [own.looked_at, own.pairs]
      row += [own.pairs_seen, own.sources_seen, own.targets_seen]
    rows.append(row)
  columns = [
    Column(f"{split} {what}", count)
    for split in ("dev", "test")
    for what in (
      "looked at",
      "of pairs",
      "same pair",
      "same source",
      "same target",
    )
  ]
  return Table(
    "Held-out text that is also training text of the direction",
    ["direction", *columns],
    rows,
  )


def _language_table(data: text_report.Data) -> Table:
  middle = float(np.median([x.tokens_per_character for x in data.languages]))
  return Table(
    "Who pays for the vocabulary",
    [
      "language",
      *_columns(count, "characters", "tokens"),
      Column("tokens per character", fixed(3)),
      Column("by the median", fixed(2)),
      *_columns(percent, "unknown", "bytes"),
    ],
    [
      [
        x.name,
        x.characters,
        x.tokens,
        x.tokens_per_character,
        x.tokens_per_character / max(middle, 1e-9),
        x.unknown,
        x.bytes,
      ]
      for x in data.languages
    ],
    note="of the text looked at, without tags and EOS; dearest first",
  )


# ---------------------------------------------------------------- mixture


def forecast_section(
  mixture: str, forecasts: Sequence[forecasting.Forecast]
) -> Section:
  """The view of a mixture under one strategy, or two side by side."""
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
      *(_draw_table(f, own) for f in own),
      *((_comparison_table(own),) if len(own) > 1 else ()),
    ],
    [
      Plot("Temperature, and who is drawn", lambda: _plots().temperatures(own)),
      Plot("Rate of every direction", lambda: _plots().rates(own)),
      Plot("Epochs of every direction", lambda: _plots().epochs(own)),
      Plot("When small directions are seen", lambda: _plots().smallest(own)),
    ],
  )


def _temperature_table(forecasts: Sequence[forecasting.Forecast]) -> Table:
  rows = []
  for f in forecasts:
    bands = [d.band for d in f.directions]
    rates = np.array(f.pair_rates)
    chosen = np.unique(np.linspace(0, len(f.steps) - 1, 5).astype(int))
    for k in chosen.tolist():
      shares = (
        float(rates[k, [b == band for b in bands]].sum())
        for band in languages.BANDS
      )
      rows.append([f.name, f.steps[k], f.temperatures[k], *shares])
  return Table(
    "Temperature, and share of the sentence pairs by resource band",
    [
      "strategy",
      Column("step", count),
      Column("temperature", fixed(2)),
      *_columns(percent, *languages.BANDS),
    ],
    rows,
  )


def _draw_table(
  f: forecasting.Forecast, forecasts: Sequence[forecasting.Forecast]
) -> Table:
  milestones = (1, 2, 5, 10)
  rows = [
    [
      d.name,
      d.pairs,
      d.band,
      d.dev_pairs,
      d.first_step,
      f.pair_rates[0][i],
      f.pair_rates[-1][i],
      d.rows,
      d.source_tokens,
      d.target_tokens,
      d.epochs,
      d.factor if d.factor != 1 else None,
      *(d.seen.get(k) for k in milestones),
    ]
    for i, d in enumerate(f.directions)
  ]
  return Table(
    "Draws to expect" + (f": {f.name}" if len(forecasts) > 1 else ""),
    [
      "direction",
      Column("pairs", count),
      "band",
      *_columns(count, "dev", "from step"),
      *_columns(percent, "rate first", "rate last"),
      *_columns(count, "rows", "source tokens", "target tokens"),
      Column("epochs", fixed(2)),
      Column("factor", fixed(2)),
      *_columns(count, *(f"{k}x at" for k in milestones)),
    ],
    rows,
    note="rate: share of the sentence pairs at the first and last step; "
    "factor: on its rate, from weights and the cap on epochs; 2x at: the step "
    "when all its text has been seen twice",
  )


def _comparison_table(forecasts: Sequence[forecasting.Forecast]) -> Table:
  first, second = forecasts[:2]
  others = {d.name: d for d in second.directions}
  rows = [
    [
      d.name,
      d.band,
      d.rows,
      other.rows,
      d.epochs,
      other.epochs,
      other.epochs / d.epochs if d.epochs else None,
    ]
    for d in first.directions
    if (other := others.get(d.name))
  ]
  names = (first.name, second.name)
  return Table(
    f"{first.name} against {second.name}",
    [
      "direction",
      "band",
      *(Column(f"rows, {name}", count) for name in names),
      *(Column(f"epochs, {name}", fixed(2)) for name in names),
      Column("ratio", fixed(2)),
    ],
    rows,
  )


# -------------------------------------------------------------------- run


def run_section(report: run_report.RunReport) -> Section:
  """The view of a model directory."""
  converted = (
    f"; dense until step {report.conversion_step:,}, then sparse"
    if report.conversion_step is not None
    else f"; {report.phase}"
  )
  figures = []
  if any(d.drawn_rows is not None for d in report.directions):
    figures.append(
      Plot("Rows drawn against planned", lambda: _plots().drawn(report))
    )
  figures += [_curve_plot(own, report) for own in report.curves]
  if report.routers:
    figures.append(Plot("Routers", lambda: _plots().routers(report)))
  figures += map(_expert_plot, report.experts)
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
      _run_table(report),
      *map(_curve_table, report.curves),
      *((_router_table(report),) if report.routers else ()),
      *(_expert_table(m, report.routed_split) for m in report.experts),
    ],
    figures,
  )


def _label(own: run_report.Curves) -> str:
  """A curve's title, such as 'Dev BLEU'."""
  name = metrics.parse(own.metric)
  assert name is not None
  return name.label[0].upper() + name.label[1:]


def _curve_plot(own: run_report.Curves, report: run_report.RunReport) -> Plot:
  return Plot(_label(own), lambda: _plots().curves(own, report.conversion_step))


def _expert_plot(own: run_report.ExpertMap) -> Plot:
  return Plot(
    f"Experts and languages, {own.layer}", lambda: _plots().experts(own)
  )


def _run_table(report: run_report.RunReport) -> Table:
  evaluated = sorted({s for d in report.directions for s in d.scores})
  loss, bleu = (metrics.named(name) for name in ("loss", "bleu"))
  rows = []
  for d in report.directions:
    difference = None
    if d.drawn_rows is not None and d.planned_rows:
      difference = d.drawn_rows / d.planned_rows - 1
    rows.append(
      [
        d.name,
        d.pairs,
        d.band,
        d.planned_rows,
        d.drawn_rows,
        difference,
        d.planned_target_tokens,
        d.trained_target_tokens,
        d.epochs,
        d.loss,
        d.dev_loss,
        *(d.scores.get(name) for name in evaluated),
      ]
    )
  return Table(
    f"Directions until step {report.step:,}",
    [
      "direction",
      Column("pairs", count),
      "band",
      *_columns(count, "planned rows", "drawn rows"),
      Column("difference", lambda share: f"{100 * share:+.1f}%"),
      *_columns(count, "planned target tokens", "trained target tokens"),
      Column("epochs", fixed(2)),
      *_columns(loss.text, "loss", "dev loss"),
      *_columns(bleu.text, *(f"{name} BLEU" for name in evaluated)),
    ],
    rows,
    note="loss: nats per target token, the last reported; BLEU: of an "
    "evaluation, named by its split and search",
  )


def _curve_table(own: run_report.Curves) -> Table:
  name = metrics.parse(own.metric)
  assert name is not None
  chosen = np.unique(np.linspace(0, len(own.steps) - 1, 8).astype(int))
  return Table(
    f"{_label(own)}, means over directions",
    [
      Column("step", count),
      *(Column(band, name.metric.text) for band in own.bands),
    ],
    [
      [own.steps[k], *(values[k] for values in own.bands.values())]
      for k in chosen.tolist()
    ],
    note=name.metric.unit,
  )


def _router_table(report: run_report.RunReport) -> Table:
  shown = [
    m
    for m in metrics.METRICS
    if any(m.name in r.values for r in report.routers)
  ]
  return Table(
    "Routers, as last reported",
    ["layer", *(Column(m.label, m.text) for m in shown)],
    [
      [r.layer, *(r.values.get(m.name, [None])[-1] for m in shown)]
      for r in report.routers
    ],
    note=", ".join(f"{m.label}: {m.unit}" for m in shown if m.unit),
  )


def _expert_table(own: run_report.ExpertMap, split: str) -> Table:
  experts = len(own.shares[0])
  shares = np.array(own.shares)
  columns: list[Column]
  cells: list[list[Any]]
  if experts <= _MANY_EXPERTS:
    columns = _columns(fixed(0), *map(str, range(experts)))
    cells = (100 * shares).tolist()
  else:
    columns = _columns(str, "1st", "2nd", "3rd")
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
