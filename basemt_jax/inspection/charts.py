"""Kinds of charts: Vega-Lite specifications that a page draws.

Every chart is one panel as wide as its place. Colours are named as the page's
style sheet defines them, so that they follow light, dark and print. A line's
data is one record, `{name, x: [..], y: [..]}`, which keeps pages small; the
chart spreads it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

# More series than this are rows of a heat map.
FEW = 12
BANDS = {
  "high": "var(--high)",
  "mid": "var(--mid)",
  "low": "var(--low)",
  "all": "var(--ink)",
}
_TINTS = [f"var(--c{i})" for i in range(FEW)]
_ROW = 15  # Pixels of a named row.
_HEIGHT = 240  # Of other charts.

Chart = dict[str, Any]
# (x, y) of each name; y None: not known there.
Series = Mapping[str, tuple[Sequence[Any], Sequence[float | None]]]
# Vertical lines, by what they mean.
Marks = Mapping[str, float]


def lines(
  title: str,
  x: str,
  y: str,
  series: Series,
  colors: Mapping[str, str] | None = None,
  marks: Marks | None = None,
  log_x: bool = False,
  zero: bool = False,
) -> Chart:
  """A line for each name, to be pointed at for its name and value.

  Args:
    title: above it.
    x: what is on the horizontal axis.
    y: what is on the vertical axis.
    series: the lines.
    colors: of names; others get one of their own.
    marks: vertical lines.
    log_x: whether the horizontal axis is logarithmic.
    zero: whether the vertical axis begins at 0.
  """
  picked = alt.selection_point(fields=["name"], bind="legend")
  base = (
    alt.Chart()
    .transform_flatten(["x", "y"])
    .encode(
      x=_along(x, alt.Scale(type="log", base=2) if log_x else alt.Undefined),
      y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=zero)),
      color=_color("name", list(series), colors),
      tooltip=_tips(name="name", x=x, y=y),
    )
  )
  # Points take the pointer; few of them are seen, too.
  is_short = max((len(xs) for xs, _ in series.values()), default=0) < 30
  chart = alt.layer(
    base.mark_line(strokeWidth=1.8).encode(
      opacity=alt.condition(picked, alt.value(1), alt.value(0.15))
    ),
    base.mark_point(
      filled=True, size=45 if is_short else 90, opacity=float(is_short)
    ).add_params(picked),
    *(_mark("x:Q", *mark) for mark in (marks or {}).items()),
    data=_spread(series),
  )
  return _finished(chart, title, _HEIGHT)


def shares(
  title: str, x: str, y: str, series: Series, colors: Mapping[str, str]
) -> Chart:
  """Areas that add up to a whole, the first name's at the bottom."""
  chart = (
    alt.Chart(_spread(series))
    .transform_flatten(["x", "y"])
    .mark_area(opacity=0.85)
    .encode(
      x=_along(x),
      y=alt.Y("y:Q", title=y, stack=True),
      order="i:Q",
      color=_color("name", list(series), colors),
      tooltip=_tips(name="name", x=x, y=y),
    )
  )
  return _finished(chart, title, _HEIGHT)


def heat(
  title: str,
  x: str,
  value: str,
  series: Series,
  log: bool = False,
  larger_is_better: bool = True,
  top: float | None = None,
  marks: Marks | None = None,
) -> Chart:
  """A row for each name, coloured by the values.

  Args:
    title: above it.
    x: what the columns are.
    value: what the colours are.
    series: the rows; None: nothing is drawn.
    log: whether colours are by the logarithm; 0 is not drawn then.
    larger_is_better: which end of the colours is the bright one.
    top: values above have the colour of this one.
    marks: lines, each at the first column that is not before it.
  """
  columns = list(dict.fromkeys(x for xs, _ in series.values() for x in xs))
  is_named = any(isinstance(column, str) for column in columns)
  scale = alt.Scale(
    scheme="viridis",
    reverse=not larger_is_better,
    type="log" if log else "linear",
    clamp=True,
    domainMax=alt.Undefined if top is None else top,
  )
  fields = (
    alt.Chart()
    .transform_flatten(["x", "y"])
    .transform_filter("datum.y > 0" if log else "isValid(datum.y)")
    .mark_rect()
    .encode(
      x=alt.X(
        "x:O",
        title=x,
        sort=columns,
        axis=alt.Axis(
          labelOverlap="greedy",
          labelAngle=0,
          format=alt.Undefined if is_named else ",",
        ),
      ),
      y=alt.Y("name:N", title=None, sort=list(series)),
      color=alt.Color(
        "y:Q",
        title=value,
        scale=scale,
        legend=alt.Legend(orient="top", gradientLength=200, titleLimit=300),
      ),
      tooltip=_tips(name="name", x=x, y=value),
    )
  )
  after = {
    name: next((x for x in columns if x >= at), None)
    for name, at in (marks or {}).items()
  }
  rules = [_mark("x:O", n, at) for n, at in after.items() if at is not None]
  chart = alt.layer(fields, *rules, data=_spread(series))
  return _finished(chart, title, max(90, _ROW * len(series)))


def each(
  title: str,
  x: str,
  y: str,
  series: Series,
  marks: Marks | None = None,
  larger_is_better: bool = True,
  log: bool = False,
) -> Chart:
  """Lines for a dozen names, a heat map for more."""
  if len(series) <= FEW:
    return lines(title, x, y, series, marks=marks)
  known = [v for _, ys in series.values() for v in ys if v is not None]
  # Early losses are far off; they would take all of the colours.
  top = None if log or not known else float(np.percentile(known, 95))
  return heat(title, x, y, series, log, larger_is_better, top, marks)


def rows(
  title: str,
  x: str,
  series: Mapping[str, Mapping[str, float | None]],
  marks: Marks,
  log: bool = False,
  bars: bool = False,
  spread: Mapping[str, float] | None = None,
) -> Chart:
  """A row for each name, with a dot for each series.

  Args:
    title: above it.
    x: what is on the horizontal axis.
    series: values by name, by series.
    marks: vertical lines.
    log: whether the horizontal axis is logarithmic.
    bars: from 0, in place of dots.
    spread: half the width of a grey bar around 0 behind each row.
  """
  names = list(dict.fromkeys(n for own in series.values() for n in own))
  data = [
    {"series": label, "name": name, "x": _short(value)}
    for label, own in series.items()
    for name, value in own.items()
    if value is not None and (value > 0 or not log)
  ]
  base = alt.Chart(alt.Data(values=data))
  drawn = base.mark_bar() if bars else base.mark_point(filled=True, size=60)
  row = alt.Y("name:N", title=None, sort=names)
  own = drawn.encode(
    x=_along(x, alt.Scale(type="log") if log else alt.Undefined),
    y=row,
    opacity=alt.value(1),
    color=_color("series", list(series)),
    tooltip=_tips(name="name", series="of", x=x),
  )
  layers = [own, *(_mark("x:Q", *mark) for mark in marks.items())]
  if spread:
    around = [{"name": n, "from": -v, "to": v} for n, v in spread.items()]
    behind = alt.Chart(alt.Data(values=around)).mark_bar(color="var(--line)")
    layers.insert(0, behind.encode(x="from:Q", x2="to:Q", y=row))
  return _finished(alt.layer(*layers), title, max(60, _ROW * len(names)))


# ------------------------------------------------------------------ parts


def _finished(chart: Any, title: str, height: int) -> Chart:
  """The specification, without what every chart of a page shares."""
  done = chart.properties(title=title, width="container", height=height)
  spec = done.to_dict()
  return {k: v for k, v in spec.items() if k not in ("config", "$schema")}


def _spread(series: Series) -> alt.Data:
  """A record for each name."""
  return alt.Data(
    values=[
      {"name": n, "i": i, "x": [*map(_short, xs)], "y": [*map(_short, ys)]}
      for i, (n, (xs, ys)) in enumerate(series.items())
    ]
  )


def _along(title: str, scale: Any = alt.Undefined) -> alt.X:
  axis = alt.Axis(tickCount=5, labelOverlap=True)
  return alt.X("x:Q", title=title, scale=scale, axis=axis)


def _color(
  field: str, names: Sequence[str], colors: Mapping[str, str] | None = None
) -> alt.Color:
  """Colours of names, and a legend if there are several."""
  tints = [
    (colors or {}).get(name, _TINTS[i % len(_TINTS)])
    for i, name in enumerate(names)
  ]
  legend = alt.Legend(orient="top", columns=4, labelLimit=140)
  return alt.Color(
    f"{field}:N",
    title=None,
    scale=alt.Scale(domain=list(names), range=tints),
    legend=legend if len(names) > 1 else None,
  )


def _tips(**titles: str) -> list[alt.Tooltip]:
  """What is told of what is pointed at: titles by field."""
  return [
    alt.Tooltip(
      f"{field}:N",
      title=title,
      format=".4~g" if field == "y" else alt.Undefined,
    )
    for field, title in titles.items()
  ]


def _mark(field: str, name: str, at: Any) -> alt.Chart:
  """A vertical line that says what it means when it is pointed at."""
  return (
    alt.Chart(alt.Data(values=[{"what": name, "x": at}]))
    .mark_rule(color="var(--mark)", strokeDash=[5, 3], strokeWidth=1.5)
    .encode(x=field, tooltip=_tips(what="line", x="at"))
  )


def _short(value: Any) -> Any:
  """Five digits are more than a plot shows; None for what JSON cannot hold."""
  if not isinstance(value, float):
    return value
  return float(f"{value:.5g}") if np.isfinite(value) else None
