"""The view of a task's or mixture's text: tables, plots and examples."""

from collections.abc import Sequence

import numpy as np

from basemt_jax.inspection import charts, text_report, token_counts
from basemt_jax.inspection.page import Plot, Section
from basemt_jax.inspection.tables import (
  Column,
  Table,
  count,
  fixed,
  listed,
  percent,
)


def section(data: text_report.Data) -> Section:
  """All of the view."""
  looked = sum(d.looked_at for d in data.directions)
  known = [d.pairs for d in data.directions if d.pairs is not None]
  total = count(sum(known)) if len(known) == len(data.directions) else "unknown"
  how = (
    "all pairs" if data.sample is None else f"the first {data.sample:,} pairs"
  )
  plural = "" if len(data.directions) == 1 else "s"
  summary = [
    f"{len(data.directions)} direction{plural}, {total} training pairs; looked "
    f"at {how} of every split: {looked:,} training pairs in all.",
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
      Plot("Length of the sequences", length_charts(data)),
      Plot("Who pays for the vocabulary", [_cost_chart(data)]),
    ],
    [(d.name, d.examples) for d in data.directions],
  )


def _text_table(data: text_report.Data) -> Table:
  both = {
    d.name: text_report.joined(d.name, (d.source, d.target))
    for d in data.directions
  }
  return listed(
    "Training text",
    data.directions,
    [
      Column("direction", value="name"),
      Column("pairs", count, "pairs"),
      Column("band", value=lambda d: d.band or "?"),
      Column("looked at", count, "looked_at"),
      Column("source length", _length, lambda d: _lengths(d.source)),
      Column("target length", _length, lambda d: _lengths(d.target)),
      Column("source cut", percent, lambda d: d.source.truncated),
      Column("target cut", percent, lambda d: d.target.truncated),
      Column("unknown", percent, lambda d: both[d.name].unknown),
      Column("bytes", percent, lambda d: both[d.name].bytes),
      Column("empty", percent, lambda d: d.share(d.empty)),
      Column("copied", percent, lambda d: d.share(d.copied)),
      Column("repeats", percent, lambda d: d.share(d.duplicates)),
      Column(
        "altered", percent, lambda d: max(d.source.altered, d.target.altered)
      ),
    ],
    note="length: median, 95th percentile and maximum in tokens, tag and EOS "
    "included; unknown, bytes: share of the tokens without them; altered: "
    "texts that decoding does not give back exactly (the worse side)",
  )


def _lengths(side: token_counts.Side) -> tuple[float, ...]:
  return side.median, side.p95, side.longest


def _length(values: Sequence[float]) -> str:
  return " ".join(f"{value:g}" for value in values)


def _overlap_table(data: text_report.Data) -> Table:
  columns = [Column("direction", value="name")]
  for split, name in (("dev", "validation"), ("test", "test")):
    for what, field in (
      ("looked at", "looked_at"),
      ("of pairs", "pairs"),
      ("same pair", "pairs_seen"),
      ("same source", "sources_seen"),
      ("same target", "targets_seen"),
    ):

      def of(
        d: text_report.Direction, name: str = name, field: str = field
      ) -> int | None:
        own = [h for h in d.held_out if h.split == name]
        return getattr(own[0], field) if own else None

      columns.append(Column(f"{split} {what}", count, of))
  return listed(
    "Held-out text that is also training text of the direction",
    data.directions,
    columns,
  )


def _language_table(data: text_report.Data) -> Table:
  middle = float(np.median([x.tokens_per_character for x in data.languages]))
  return listed(
    "Who pays for the vocabulary",
    data.languages,
    [
      Column("language", value="name"),
      Column("characters", count, "characters"),
      Column("tokens", count, "tokens"),
      Column("tokens per character", fixed(3), "tokens_per_character"),
      Column(
        "by the median",
        fixed(2),
        lambda x: x.tokens_per_character / max(middle, 1e-9),
      ),
      Column("unknown", percent, "unknown"),
      Column("bytes", percent, "bytes"),
    ],
    note="of the text looked at, without tags and EOS; dearest first",
  )


# ------------------------------------------------------------------ plots


def length_charts(data: text_report.Data) -> list[charts.Chart]:
  """Length histograms of both sides of every direction."""
  found = []
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
      found.append(charts.lines(title, x, y, shares, marks=cut, log_x=True))
    else:
      found.append(charts.heat(title, x, y, shares, marks=cut))
  return found


def _cost_chart(data: text_report.Data) -> charts.Chart:
  """Tokens per character of every language."""
  costs = {x.name: x.tokens_per_character for x in data.languages}
  middle = float(np.median(list(costs.values()))) if costs else 0.0
  return charts.rows(
    "what a character costs",
    "tokens per character (line: the median language)",
    {"": costs},
    {"the median language": middle},
    bars=True,
  )
