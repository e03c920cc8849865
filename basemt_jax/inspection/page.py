"""Inspections for people: tables in a terminal, and one self-contained page.

Both show the same sections and tables; the page has plots and all examples.
"""

import base64
import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from basemt_jax import evaluation
from basemt_jax.inspection import forecasting, run_report, text_report

# More columns of experts than this are told by the strongest.
_MANY_EXPERTS = 16
_TERMINAL_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells as text; columns but the first are aligned to the right.

  Attributes:
    title: what is in it.
    columns: their headings.
    rows: cells.
    note: on how to read it.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure that is drawn when a page is written.

  Attributes:
    caption: what it shows.
    draw: () -> `plots.Figure`.
  """

  caption: str
  draw: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Section:
  """A view.

  Attributes:
    title: heading.
    summary: lines below it.
    warnings: a line each.
    tables: numbers.
    plots: for the page.
    examples: (direction, pairs) for looking at.
  """

  title: str
  summary: Sequence[str]
  warnings: Sequence[str]
  tables: Sequence[Table]
  plots: Sequence[Plot]
  examples: Sequence[tuple[str, Sequence[text_report.Example]]] = ()


def _plots() -> Any:
  from basemt_jax.inspection import plots  # Here: matplotlib loads slowly.

  return plots


# --------------------------------------------------------------- sections


def data_section(data: text_report.Data) -> Section:
  """The view of a task's or mixture's text."""
  looked = sum(d.looked_at for d in data.directions)
  known = [d.pairs for d in data.directions if d.pairs is not None]
  total = f"{sum(known):,}" if len(known) == len(data.directions) else "unknown"
  how = (
    "all pairs" if data.sample is None else f"the first {data.sample:,} pairs"
  )
  bounds = all(d.is_whole for d in data.directions)
  return Section(
    f"Text of {data.name}",
    [
      f"{len(data.directions)} directions, {total} training pairs; looked at "
      f"{how} of every split: {looked:,} training pairs in all.",
      "Cut at {inputs} source and {targets} target tokens.".format(
        **data.lengths
      ),
      *(
        ()
        if bounds
        else (
          "Repeats, and overlap with dev and test, are counted within what was "
          "looked at: there may be more (--full looks at everything).",
        )
      ),
    ],
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
    tokens = [side.mean * sum(side.histogram) for side in sides]

    def joint(shares: Sequence[float], tokens: Any = tokens) -> float:
      return float(np.dot(tokens, shares) / max(1.0, sum(tokens)))

    bytes_ = [side.bytes for side in sides if side.bytes is not None]
    rows.append(
      [
        d.name,
        _count(d.pairs),
        d.band or "?",
        _count(d.looked_at),
        *(f"{s.median:g} {s.p95:g} {s.longest}" for s in sides),
        *(_percent(s.truncated) for s in sides),
        _percent(joint([s.unknown for s in sides])),
        _percent(joint(bytes_)) if len(bytes_) == 2 else "-",
        _percent(d.share(d.empty)),
        _percent(d.share(d.copied)),
        _percent(d.share(d.duplicates)),
        _percent(max(s.altered for s in sides)),
      ]
    )
  return Table(
    "Training text",
    (
      "direction",
      "pairs",
      "band",
      "looked at",
      "source length",
      "target length",
      "source cut",
      "target cut",
      "unknown",
      "bytes",
      "empty",
      "copied",
      "repeats",
      "altered",
    ),
    rows,
    "length: median, 95th percentile and maximum in tokens; unknown, bytes: "
    "share of the tokens; altered: texts that decoding does not give back "
    "exactly (the worse side)",
  )


def _overlap_table(data: text_report.Data) -> Table:
  rows = []
  for d in data.directions:
    row = [d.name]
    for split in ("validation", "test"):
      own = next((h for h in d.held_out if h.split == split), None)
      if own is None:
        row += ["-"] * 4
        continue
      row.append(_count(own.looked_at))
      if own.pairs is None or own.looked_at < own.pairs:
        row[-1] += f" of {_count(own.pairs)}"
      row += map(_count, (own.pairs_seen, own.sources_seen, own.targets_seen))
    rows.append(row)
  seen = ("same pair", "same source", "same target")
  return Table(
    "Held-out text that is also training text of the direction",
    ("direction", "dev looked at", *seen, "test looked at", *seen),
    rows,
  )


def _language_table(data: text_report.Data) -> Table:
  middle = np.median([x.tokens_per_character for x in data.languages])
  return Table(
    "Who pays for the vocabulary",
    (
      "language",
      "characters",
      "tokens",
      "tokens per character",
      "by the median",
      "unknown",
      "bytes",
    ),
    [
      [
        x.name,
        _count(x.characters),
        _count(x.tokens),
        f"{x.tokens_per_character:.3f}",
        f"{x.tokens_per_character / max(middle, 1e-9):.2f}",
        _percent(x.unknown),
        "-" if x.bytes is None else _percent(x.bytes),
      ]
      for x in data.languages
    ],
    "of the text looked at, without tags and EOS; dearest first",
  )


def forecast_section(
  mixture: str, forecasts: Sequence[forecasting.Forecast]
) -> Section:
  """The view of a mixture under one strategy, or two side by side."""
  first = forecasts[0]
  own = list(forecasts)
  estimated = "" if first.is_exact else " (rows estimated from a sample)"
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
    count = len(f.steps)
    for k in np.unique(np.linspace(0, count - 1, 5).astype(int)).tolist():
      rows.append(
        [
          f.name,
          f"{f.steps[k]:,}",
          f"{f.temperatures[k]:.2f}",
          *(
            _percent(float(rates[k, [b == band for b in bands]].sum()))
            for band in evaluation.BANDS
          ),
        ]
      )
  return Table(
    "Temperature, and share of the sentence pairs by resource band",
    ("strategy", "step", "temperature", *evaluation.BANDS),
    rows,
  )


def _draw_table(
  f: forecasting.Forecast, forecasts: Sequence[forecasting.Forecast]
) -> Table:
  milestones = (1, 2, 5, 10)
  return Table(
    "Draws to expect" + (f": {f.name}" if len(forecasts) > 1 else ""),
    (
      "direction",
      "pairs",
      "band",
      "dev",
      "from step",
      "rate first",
      "rate last",
      "rows",
      "source tokens",
      "target tokens",
      "epochs",
      *(f"{k}x at" for k in milestones),
    ),
    [
      [
        d.name,
        _count(d.pairs),
        d.band,
        _count(d.dev_pairs),
        _count(d.first_step),
        _percent(f.pair_rates[0][i]),
        _percent(f.pair_rates[-1][i]),
        f"{d.rows:,.0f}",
        f"{d.source_tokens:,.0f}",
        f"{d.target_tokens:,.0f}",
        f"{d.epochs:,.2f}" + ("*" if d.cap < 1 else ""),
        *(_count(d.seen.get(k)) for k in milestones),
      ]
      for i, d in enumerate(f.directions)
    ],
    "rate: share of the sentence pairs at the first and last step; 2x at: the "
    "step when all its text has been seen twice; *: held back by the cap on "
    "epochs",
  )


def _comparison_table(forecasts: Sequence[forecasting.Forecast]) -> Table:
  first, second = forecasts[:2]
  others = {d.name: d for d in second.directions}
  rows = []
  for d in first.directions:
    other = others.get(d.name)
    if other is None:
      continue
    rows.append(
      [
        d.name,
        d.band,
        f"{d.rows:,.0f}",
        f"{other.rows:,.0f}",
        f"{d.epochs:,.2f}",
        f"{other.epochs:,.2f}",
        f"{other.epochs / d.epochs:.2f}" if d.epochs else "-",
      ]
    )
  return Table(
    f"{first.name} against {second.name}",
    (
      "direction",
      "band",
      f"rows, {first.name}",
      f"rows, {second.name}",
      f"epochs, {first.name}",
      f"epochs, {second.name}",
      "ratio",
    ),
    rows,
  )


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


def _curve_plot(own: run_report.Curves, report: run_report.RunReport) -> Plot:
  return Plot(
    own.name[0].upper() + own.name[1:],
    lambda: _plots().curves(own, report.conversion_step),
  )


def _expert_plot(own: run_report.ExpertMap) -> Plot:
  return Plot(
    f"Experts and languages, {own.layer}", lambda: _plots().experts(own)
  )


def _run_table(report: run_report.RunReport) -> Table:
  splits = sorted({s for d in report.directions for s in d.scores})
  rows = []
  for d in report.directions:
    drawn, difference = d.drawn_rows, "-"
    if drawn is not None and d.planned_rows:
      difference = f"{100 * (drawn / d.planned_rows - 1):+.1f}%"
    rows.append(
      [
        d.name,
        _count(d.pairs),
        d.band,
        f"{d.planned_rows:,.0f}",
        _count(drawn),
        difference,
        f"{d.planned_target_tokens:,.0f}",
        _number(d.trained_target_tokens, 0),
        _number(d.epochs, 2),
        _number(d.loss, 3),
        _number(d.dev_loss, 3),
        *(_number(d.scores.get(split), 1) for split in splits),
      ]
    )
  return Table(
    f"Directions until step {report.step:,}",
    (
      "direction",
      "pairs",
      "band",
      "planned rows",
      "drawn rows",
      "difference",
      "planned target tokens",
      "trained target tokens",
      "epochs",
      "loss",
      "dev loss",
      *(f"{split} BLEU" for split in splits),
    ),
    rows,
    "loss: nats per target token, the last reported",
  )


def _curve_table(own: run_report.Curves) -> Table:
  shown = np.unique(np.linspace(0, len(own.steps) - 1, 8).astype(int)).tolist()
  digits = 1 if own.unit == "BLEU" else 3
  return Table(
    f"{own.name[0].upper()}{own.name[1:]}, means over directions",
    ("step", *own.bands),
    [
      [
        f"{own.steps[k]:,}",
        *(_number(values[k], digits) for values in own.bands.values()),
      ]
      for k in shown
    ],
    own.unit,
  )


def _router_table(report: run_report.RunReport) -> Table:
  return Table(
    "Routers, as last reported",
    ("layer", "most wanted expert / mean", "favourite taken", "entropy, nats"),
    [
      [
        r.layer,
        _number(r.load_max[-1], 2),
        "-" if r.agreement[-1] is None else _percent(r.agreement[-1]),
        _number(r.entropy[-1], 2),
      ]
      for r in report.routers
    ],
  )


def _expert_table(own: run_report.ExpertMap, split: str) -> Table:
  count = len(own.shares[0])
  shares = np.array(own.shares)
  if count <= _MANY_EXPERTS:
    columns = [str(e) for e in range(count)]
    cells = [[f"{100 * share:.0f}" for share in row] for row in shares]
  else:
    columns = ["1st", "2nd", "3rd"]
    best = np.argsort(-shares, axis=1)[:, :3]
    cells = [
      [f"expert {e}: {100 * row[e]:.0f}" for e in top]
      for row, top in zip(shares, best, strict=True)
    ]
  return Table(
    f"Share of each {own.side} language's tokens at each expert, {own.layer}",
    ("language", "tokens", *columns),
    [
      [name, _count(tokens), *row]
      for name, tokens, row in zip(
        own.languages, own.tokens, cells, strict=True
      )
    ],
    f"%, routed as at test time, rows of the {split} split; even would be "
    f"{100 / count:.3g}",
  )


def _count(value: int | None) -> str:
  return "-" if value is None else f"{value:,}"


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float) -> str:
  """'12%', '0.12%'; '0' for none at all."""
  percent = 100 * share
  if percent == 0:
    return "0"
  return f"{percent:.3g}%" if percent >= 0.001 else "<0.001%"


# --------------------------------------------------------------- terminal


def print_sections(
  sections: Sequence[Section], file: TextIO | None = None
) -> None:
  """Writes summaries, warnings and tables; what is no terminal gets all of it.

  Args:
    sections: in the order to show.
    file: standard output by default.
  """
  console = rich.console.Console(file=file, highlight=False)
  if not console.is_terminal:
    # Wide enough for every table: files and pipes have no edge.
    console = rich.console.Console(file=file, highlight=False, width=200)
  for section in sections:
    console.print(rich.text.Text(f"\n{section.title}", style="bold"))
    for line in section.summary:
      console.print(line, markup=False)
    for warning in section.warnings:
      console.print(rich.text.Text(f"! {warning}", style="yellow"))
    for table in section.tables:
      if table.rows:
        console.print(_rich_table(table))
    chosen = [e for e in section.examples if e[1]]
    step = max(1, -(-len(chosen) // _TERMINAL_EXAMPLES))
    for name, examples in chosen[::step]:
      _print_example(console, name, examples[0])


def _rich_table(table: Table) -> rich.table.Table:
  own = rich.table.Table(
    title=rich.text.Text(table.title),
    caption=rich.text.Text(table.note) if table.note else None,
    title_justify="left",
    caption_justify="left",
    box=rich.box.SIMPLE_HEAD,
    pad_edge=False,
  )
  for i, name in enumerate(table.columns):
    own.add_column(
      rich.text.Text(name),
      justify="right" if i else "left",
      overflow="fold",
    )
  for row in table.rows:
    own.add_row(*map(rich.text.Text, row))
  return own


def _print_example(
  console: rich.console.Console, name: str, example: text_report.Example
) -> None:
  console.print(rich.text.Text(f"\n{name}", style="bold"))
  for label, text in _example_lines(example):
    console.print(rich.text.Text(f"  {label:<15} {text}"))


def _example_lines(example: text_report.Example) -> list[tuple[str, str]]:
  return [
    ("source", example.source),
    ("tagged", example.tagged),
    ("source tokens", " ".join(example.source_pieces)),
    ("decoded", example.source_decoded),
    ("target", example.target),
    ("target tokens", " ".join(example.target_pieces)),
    ("decoded", example.target_decoded),
  ]


# ------------------------------------------------------------------- page

_CSS = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222;
  max-width: 1100px; margin: 2em auto; padding: 0 1em; background: #fff; }
h1 { font-size: 1.5em; } h2 { border-bottom: 2px solid #1b6ca8;
  margin-top: 2em; } h3 { margin: 1.6em 0 .3em; font-size: 1.05em; }
nav a { margin-right: 1.2em; }
.warnings { background: #fff6e5; border-left: 4px solid #e08214;
  padding: .5em 1em; max-height: 18em; overflow: auto; }
.table, .examples { overflow: auto; max-height: 34em;
  border: 1px solid #ddd; }
.examples { padding: .3em 1em; }
table { border-collapse: collapse; font-size: 13px; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #f2f5f8; text-align: right;
  vertical-align: bottom; }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid #eee;
  white-space: nowrap; }
th { white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: #fff; }
th:first-child { background: #f2f5f8; z-index: 1; }
tr:hover td { background: #f7fafc; }
.note { color: #666; font-size: 13px; margin: .3em 0; }
figure { margin: 1.2em 0; } figure img { width: 100%; height: auto; }
figcaption { font-weight: 600; }
details { margin: .3em 0; } summary { cursor: pointer; }
.example { margin: .4em 0 1em 1em; font-size: 14px; }
.example dt { float: left; clear: left; width: 8em; color: #666; }
.example dd { margin-left: 8em; }
.piece { background: #eef3f8; border-radius: 3px; padding: 0 3px;
  margin: 1px; display: inline-block; }
.differs { background: #fde8e4; }
"""


def page(title: str, sections: Sequence[Section]) -> str:
  """One HTML page with everything in it: no script, no other file."""
  links = "".join(
    f'<a href="#s{i}">{html.escape(s.title)}</a>'
    for i, s in enumerate(sections)
  )
  body = "".join(_page_section(i, s) for i, s in enumerate(sections))
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>"
    f"<h1>{html.escape(title)}</h1><nav>{links}</nav>{body}</body></html>\n"
  )


def _page_section(index: int, section: Section) -> str:
  parts = [f'<h2 id="s{index}">{html.escape(section.title)}</h2>']
  parts += [f"<p>{html.escape(line)}</p>" for line in section.summary]
  if section.warnings:
    items = "".join(f"<li>{html.escape(w)}</li>" for w in section.warnings)
    parts.append(f'<div class="warnings"><ul>{items}</ul></div>')
  parts += map(_page_plot, section.plots)
  parts += [_page_table(table) for table in section.tables if table.rows]
  if any(examples for _, examples in section.examples):
    parts.append('<h3>Examples</h3><div class="examples">')
    parts += [_page_examples(*own) for own in section.examples if own[1]]
    parts.append("</div>")
  return "".join(parts)


def _page_plot(plot: Plot) -> str:
  """An image of its own, so that ids of one plot cannot meet another's."""
  data = base64.b64encode(_plots().svg(plot.draw()).encode()).decode()
  caption = html.escape(plot.caption)
  return (
    f"<figure><figcaption>{caption}</figcaption>"
    f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}"></figure>'
  )


def _page_table(table: Table) -> str:
  head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
  rows = "".join(
    "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
    for row in table.rows
  )
  note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
  return (
    f'<h3>{html.escape(table.title)}</h3><div class="table"><table><thead><tr>'
    f"{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
  )


def _page_examples(name: str, examples: Sequence[text_report.Example]) -> str:
  items = []
  for example in examples:
    expected = {"source": example.tagged, "target": example.target}
    side = "source"
    lines = []
    for label, text in _example_lines(example):
      side = label if label in expected else side
      content = f'<span dir="auto">{html.escape(text)}</span>'
      if label.endswith("tokens"):
        pieces = getattr(example, f"{side}_pieces")
        content = "".join(
          f'<span class="piece">{html.escape(piece)}</span>' for piece in pieces
        )
      differs = label == "decoded" and text != expected[side]
      mark = ' class="differs"' if differs else ""
      lines.append(f"<dt>{label}</dt><dd{mark}>{content}</dd>")
    items.append(f'<dl class="example">{"".join(lines)}</dl>')
  return (
    f"<details><summary>{html.escape(name)}</summary>{''.join(items)}</details>"
  )
