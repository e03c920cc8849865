"""Kinds of charts: Vega-Lite specifications that a page draws.

Every chart is one panel as wide as its place, with its title above it; `x` and
`y` say what is on its axes, `marks` are vertical lines. Colours are named as
the page's style sheet defines them, so that they follow light, dark and print.
A line's data is one record, `{name, x: [..], y: [..]}`, which keeps pages
small; the chart spreads it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
_SPREAD = {"flatten": ["x", "y"]}

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

  Names without one of `colors` get one of their own. The horizontal axis is
  logarithmic with `log_x`, the vertical one begins at 0 with `zero`.
  """
  encoding = {
    "x": _along(x, {"type": "log", "base": 2} if log_x else {}),
    "y": {**_field("y", y), "scale": {"zero": zero}},
    "color": _color("name", list(series), colors),
    "tooltip": _tips(name="name", x=x, y=y),
  }
  faded = {"condition": {"param": "picked", "value": 1}, "value": 0.15}
  # Points take the pointer; few of them are seen, too.
  is_short = max((len(xs) for xs, _ in series.values()), default=0) < 30
  size, opacity = (45, 1) if is_short else (90, 0)
  line = {
    "mark": {"type": "line", "strokeWidth": 1.8},
    "transform": [_SPREAD],
    "encoding": {**encoding, "opacity": faded},
  }
  points = {
    "mark": {"type": "point", "filled": True, "size": size, "opacity": opacity},
    "transform": [_SPREAD],
    "encoding": encoding,
    "params": [
      {
        "name": "picked",
        "select": {"type": "point", "fields": ["name"]},
        "bind": "legend",
      }
    ],
  }
  layers = [line, points, *_rules(marks or {})]
  return _chart(title, _HEIGHT, data=_data(series), layer=layers)


def shares(
  title: str, x: str, y: str, series: Series, colors: Mapping[str, str]
) -> Chart:
  """Areas that add up to a whole, the first name's at the bottom."""
  return _chart(
    title,
    _HEIGHT,
    data=_data(series),
    transform=[_SPREAD],
    mark={"type": "area", "opacity": 0.85},
    encoding={
      "x": _along(x),
      "y": {**_field("y", y), "stack": True},
      "order": _field("i"),
      "color": _color("name", list(series), colors),
      "tooltip": _tips(name="name", x=x, y=y),
    },
  )


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
  """A row for each name, coloured by the values; None is not drawn.

  With `log` colours are by the logarithm, and 0 is not drawn. Values above
  `top` have its colour. A mark is at the first column that is not before it.
  """
  columns = list(dict.fromkeys(x for xs, _ in series.values() for x in xs))
  axis: dict[str, Any] = {"labelOverlap": "greedy", "labelAngle": 0}
  if not any(isinstance(column, str) for column in columns):
    axis["format"] = ","
  scale: dict[str, Any] = {
    "scheme": "viridis",
    "reverse": not larger_is_better,
    "type": "log" if log else "linear",
    "clamp": True,
  }
  if top is not None:
    scale["domainMax"] = top
  legend = {"orient": "top", "gradientLength": 200, "titleLimit": 300}
  fields = {
    "mark": {"type": "rect"},
    "transform": [
      _SPREAD,
      {"filter": "datum.y > 0" if log else "isValid(datum.y)"},
    ],
    "encoding": {
      "x": {**_field("x", x, "ordinal"), "sort": columns, "axis": axis},
      "y": {**_field("name", kind="nominal"), "sort": list(series)},
      "color": {**_field("y", value), "scale": scale, "legend": legend},
      "tooltip": _tips(name="name", x=x, y=value),
    },
  }
  after = {
    name: next((x for x in columns if x >= at), None)
    for name, at in (marks or {}).items()
  }
  known = {name: at for name, at in after.items() if at is not None}
  return _chart(
    title,
    max(90, _ROW * len(series)),
    data=_data(series),
    layer=[fields, *_rules(known, type="ordinal", sort=columns)],
  )


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
  """A row for each name, with a dot for each series, or a bar from 0.

  The horizontal axis is logarithmic with `log`. `spread` is half the width of
  a grey bar around 0 behind each row.
  """
  names = list(dict.fromkeys(n for own in series.values() for n in own))
  data = [
    {"series": label, "name": name, "x": _short(value)}
    for label, own in series.items()
    for name, value in own.items()
    if value is not None and (value > 0 or not log)
  ]
  row = {**_field("name", kind="nominal"), "sort": names}
  dots = {"type": "point", "filled": True, "size": 60}
  layers: list[dict[str, Any]] = [
    {
      "data": {"values": data},
      "mark": {"type": "bar"} if bars else dots,
      "encoding": {
        "x": _along(x, {"type": "log"} if log else {}),
        "y": row,
        "opacity": {"value": 1},
        "color": _color("series", list(series)),
        "tooltip": _tips(name="name", series="of", x=x),
      },
    },
    *_rules(marks),
  ]
  if spread:
    around = [{"name": n, "from": -v, "to": v} for n, v in spread.items()]
    behind = {
      "data": {"values": around},
      "mark": {"type": "bar", "color": "var(--line)"},
      "encoding": {
        "x": {"field": "from", "type": "quantitative"},
        "x2": {"field": "to"},
        "y": row,
      },
    }
    layers.insert(0, behind)
  return _chart(title, max(60, _ROW * len(names)), layer=layers)


# ------------------------------------------------------------------ parts


def _chart(title: str, height: int, **parts: Any) -> Chart:
  return {"title": title, "width": "container", "height": height, **parts}


def _field(
  name: str, title: str | None = None, kind: str = "quantitative"
) -> dict[str, Any]:
  """A field of the data; without a title its axis has none."""
  return {"field": name, "type": kind, "title": title}


def _data(series: Series) -> dict[str, Any]:
  """A record for each name."""
  return {
    "values": [
      {"name": n, "i": i, "x": [*map(_short, xs)], "y": [*map(_short, ys)]}
      for i, (n, (xs, ys)) in enumerate(series.items())
    ]
  }


def _along(
  title: str, scale: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  axis = {"tickCount": 5, "labelOverlap": True}
  own = {**_field("x", title), "axis": axis}
  return {**own, "scale": scale} if scale else own


def _color(
  field: str, names: Sequence[str], colors: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Colours of names, and a legend if there are several."""
  tints = [
    (colors or {}).get(name, _TINTS[i % len(_TINTS)])
    for i, name in enumerate(names)
  ]
  legend = {"orient": "top", "columns": 4, "labelLimit": 140}
  return {
    **_field(field, kind="nominal"),
    "scale": {"domain": names, "range": tints},
    "legend": legend if len(names) > 1 else None,
  }


def _tips(**titles: str) -> list[dict[str, Any]]:
  """What is told of what is pointed at: titles by field."""
  return [
    {
      **_field(field, title, "nominal"),
      **({"format": ".4~g"} if field == "y" else {}),
    }
    for field, title in titles.items()
  ]


def _rules(marks: Mapping[str, Any], **along: Any) -> list[dict[str, Any]]:
  """Vertical lines that say what they mean when they are pointed at.

  `along` is of the horizontal axis, where it is not one of quantities.
  """
  look = {"color": "var(--mark)", "strokeDash": [5, 3], "strokeWidth": 1.5}
  return [
    {
      "data": {"values": [{"what": name, "x": at}]},
      "mark": {"type": "rule", **look},
      "encoding": {
        # Without a title: the axis keeps its own.
        "x": {"field": "x", "type": "quantitative", **along},
        "tooltip": _tips(what="line", x="at"),
      },
    }
    for name, at in marks.items()
  ]


def _short(value: Any) -> Any:
  """Five digits are more than a plot shows; None for what JSON cannot hold."""
  if not isinstance(value, float):
    return value
  return float(f"{value:.5g}") if np.isfinite(value) else None
