"""Plots of inspections: figures that can be read with 100 directions.

Axis legend: N directions, K steps, E experts.

Up to a dozen directions are lines with their names at the end; more are rows
of a heat map, so that no legend has to be searched.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, figure, ticker

from basemt_jax import evaluation
from basemt_jax.inspection import forecasting, run_report, text_report

# More directions than this are shown as a heat map.
FEW = 12

_WIDTH = 10.0  # Inches, of every figure.
_ROW = 0.17  # Inches of a labelled row.
_SMALL = 8  # Points.
_TALL = 40  # Rows from which on the scale is written above, too.
_BANDS = {
  "high": "#1b6ca8",
  "mid": "#e08214",
  "low": "#b2182b",
  "all": "#333333",
}
_PAIR = ("#1b6ca8", "#d95f02")
_STYLE: Any = {
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e6e6e6",
  "axes.axisbelow": True,
  "svg.fonttype": "none",  # Text stays text: searchable, and small.
  "svg.hashsalt": "basemt",  # The same figure gives the same bytes.
}

Figure = figure.Figure
# '0.5' and '20', never '5e-1'.
_PLAIN = ticker.FuncFormatter(lambda value, _: f"{value:g}")


def svg(plot: Figure) -> str:
  """The figure as an `<svg>` element for a page."""
  text = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    plot.savefig(text, format="svg", metadata={"Date": None})
  content = text.getvalue()
  return content[content.index("<svg") :]


def _figure(height: float, **options: Any) -> Figure:
  return Figure(figsize=(_WIDTH, height), layout="constrained", **options)


def _styled(function: Any) -> Any:
  """Draws with the style, which is not global."""

  def draw(*args: Any, **options: Any) -> Figure:
    with matplotlib.rc_context(_STYLE):
      return function(*args, **options)

  draw.__doc__, draw.__name__ = function.__doc__, function.__name__
  return draw


# ------------------------------------------------------------------- data


@_styled
def lengths(data: text_report.Data) -> Figure:
  """Length histograms of both sides of every direction."""
  if len(data.directions) > FEW:
    return _length_map(data)
  columns = min(3, len(data.directions))
  rows = -(-len(data.directions) // columns)
  plot = _figure(0.6 + 1.7 * rows)
  grid = plot.subplots(rows, columns, squeeze=False, sharex=True)
  edges = np.array([0.5, *text_report.BINS, 2 * text_report.BINS[-1]])
  for axes, direction in zip(grid.flat, data.directions, strict=False):
    for side, color in zip(
      (direction.source, direction.target), _PAIR, strict=True
    ):
      share = np.array(side.histogram) / max(1, sum(side.histogram))
      axes.stairs(100 * share, edges, color=color, linewidth=1.5)
    axes.set_title(direction.name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_PLAIN)
    longest = max(direction.source.longest, direction.target.longest)
    axes.set_xlim(1, max(1.5 * longest, 1.2 * max(data.lengths.values())))
    for limit, color in zip(_limits(data), _PAIR, strict=True):
      axes.axvline(limit, color=color, linestyle=":", linewidth=1)
  for axes in list(grid.flat)[len(data.directions) :]:
    axes.set_visible(False)
  plot.supxlabel(
    "tokens, tag and EOS included (dotted: where the model cuts)", fontsize=9
  )
  plot.supylabel("% of the sequences", fontsize=9)
  _legend(plot, {"source": _PAIR[0], "target": _PAIR[1]})
  return plot


def _limits(data: text_report.Data) -> tuple[int, int]:
  return data.lengths["inputs"], data.lengths["targets"]


def _legend(plot: Figure, entries: Mapping[str, str]) -> None:
  """A line per entry, above the figure."""
  handles = [
    matplotlib.lines.Line2D([], [], color=color, linewidth=2)
    for color in entries.values()
  ]
  plot.legend(
    handles,
    list(entries),
    loc="outside upper right",
    ncols=len(entries),
    frameon=False,
  )


def _length_map(data: text_report.Data) -> Figure:
  """Histograms as rows of two heat maps."""
  names = [d.name for d in data.directions]
  plot = _figure(1.3 + _ROW * len(names))
  grid = plot.subplots(1, 2, sharey=True)
  tables = [
    np.array(
      [np.array(side.histogram) / max(1, sum(side.histogram)) for side in sides]
    )
    for sides in (
      [d.source for d in data.directions],
      [d.target for d in data.directions],
    )
  ]
  used = np.flatnonzero(sum(t.sum(axis=0) for t in tables))
  # Up to the limit, so that the line that marks it is seen.
  wanted = int(np.searchsorted(text_report.BINS, max(_limits(data)))) + 1
  last = max(int(used[-1]) if len(used) else 0, wanted) + 1
  top = max(float(t.max()) for t in tables)
  for axes, table, side, limit in zip(
    grid, tables, ("source", "target"), _limits(data), strict=True
  ):
    shown = 100 * table[:, :last]
    image = _heat(axes, shown, names, vmax=100 * top)
    labels = [str(b) for b in text_report.BINS] + ["more"]
    axes.set_xticks(np.arange(last)[::2], labels[:last:2], fontsize=_SMALL)
    # Bin i ends at BINS[i]: the limit lies after the last bin within it.
    within = int(np.searchsorted(text_report.BINS, limit, side="right"))
    axes.axvline(within - 0.5, color="#b2182b", linestyle=":", linewidth=1.5)
    axes.set_xlabel(f"tokens of the {side}, up to (dotted: the model cuts)")
  _colorbar(plot, image, list(grid), "% of the sequences")
  return plot


def _heat(
  axes: Any,
  values: np.ndarray,
  names: Sequence[str],
  **options: Any,
) -> Any:
  """A heat map with a named row each."""
  axes.grid(False)
  image = axes.imshow(
    values,
    aspect="auto",
    interpolation="nearest",
    cmap=options.pop("cmap", "YlGnBu"),
    **({"vmin": 0} if "norm" not in options else {}),
    **options,
  )
  axes.set_yticks(range(len(names)), names, fontsize=_SMALL)
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0, labeltop=len(names) > _TALL)
  return image


def _colorbar(
  plot: Figure, image: Any, axes: Any, label: str, **options: Any
) -> None:
  """At the top, where a tall figure is looked at first."""
  shrink = min(1.0, 5.0 / plot.get_figheight())
  plot.colorbar(
    image,
    ax=axes,
    label=label,
    shrink=shrink,
    aspect=30,
    anchor=(0.0, 1.0),
    **options,
  )


@_styled
def language_costs(data: text_report.Data) -> Figure:
  """Tokens per character of every language."""
  languages = data.languages[::-1]  # The dearest on top.
  plot = _figure(1.1 + _ROW * 1.15 * len(languages))
  axes = plot.subplots()
  costs = [x.tokens_per_character for x in languages]
  axes.barh([x.name for x in languages], costs, color="#1b6ca8", height=0.7)
  for i, cost in enumerate(costs):
    axes.text(cost, i, f" {cost:.2f}", va="center", fontsize=_SMALL)
  middle = float(np.median(costs)) if costs else 0.0
  axes.axvline(middle, color="#333333", linestyle="--", linewidth=1, zorder=0)
  axes.set_xlabel("tokens per character (dashed: the median language)")
  axes.set_ylim(-0.6, len(languages) - 0.4)
  axes.tick_params(axis="y", labelsize=_SMALL, length=0)
  axes.margins(x=0.08)
  axes.grid(False, axis="y")
  return plot


# ---------------------------------------------------------------- mixture


@_styled
def temperatures(forecasts: Sequence[forecasting.Forecast]) -> Figure:
  """Temperature over the steps, and who is drawn, by resource band."""
  plot = _figure(3.0)
  grid = plot.subplots(1, 1 + len(forecasts))
  axes = grid[0]
  for forecast, color in zip(forecasts, _PAIR, strict=False):
    finite = np.array(forecast.temperatures)
    finite = np.where(np.isfinite(finite), finite, np.nan)
    axes.plot(forecast.steps, finite, color=color, label=forecast.name)
    if np.isnan(finite).any():
      axes.text(
        0.97,
        0.05,
        f"{forecast.name}: infinite (uniform)",
        transform=axes.transAxes,
        ha="right",
        color=color,
        fontsize=_SMALL,
      )
  axes.set_ylim(0, None)
  axes.set_ylabel("temperature T")
  _step_axis(axes)
  axes.set_title("temperature")
  if len(forecasts) > 1:
    axes.legend(frameon=False, fontsize=_SMALL)
  for axes, forecast in zip(grid[1:], forecasts, strict=True):
    rates = 100 * np.array(forecast.pair_rates)
    bands = [d.band for d in forecast.directions]
    present = [b for b in evaluation.BANDS if b in bands]
    shares = [
      rates[:, [x == band for x in bands]].sum(axis=1) for band in present
    ]
    axes.stackplot(
      forecast.steps, shares, colors=[_BANDS[b] for b in present], alpha=0.85
    )
    low = np.zeros(len(forecast.steps))
    for band, share in zip(present, shares, strict=True):
      # At that end where its area is higher, if a word fits in.
      is_late = bool(share[-1] > share[0])
      at = (len(share) - 1) * (97 if is_late else 3) // 100
      if share[at] > 6:
        axes.text(
          forecast.steps[at],
          low[at] + share[at] / 2,
          f"{band} resource",
          ha="right" if is_late else "left",
          va="center",
          color="white",
          fontsize=_SMALL,
        )
      low += share
    axes.set_ylim(0, 100)
    axes.margins(x=0)
    axes.set_ylabel("% of the pairs of a step")
    _step_axis(axes)
    axes.set_title(_titled("who is drawn", forecast, forecasts))
  return plot


def _titled(
  title: str,
  forecast: forecasting.Forecast,
  forecasts: Sequence[forecasting.Forecast],
) -> str:
  return title if len(forecasts) == 1 else f"{title}: {forecast.name}"


@_styled
def rates(forecasts: Sequence[forecasting.Forecast]) -> Figure:
  """Rate of every direction over the steps."""
  count = len(forecasts[0].directions)
  if count <= FEW:
    plot = _figure(3.8)
    grid = plot.subplots(1, len(forecasts), squeeze=False, sharey=True)[0]
    for axes, forecast in zip(grid, forecasts, strict=True):
      values = 100 * np.array(forecast.pair_rates).T
      names = [d.name for d in forecast.directions]
      _named_lines(axes, forecast.steps, dict(zip(names, values, strict=True)))
      _step_axis(axes)
      axes.set_title(_titled("rate of every direction", forecast, forecasts))
    grid[0].set_ylabel("% of the pairs of a step")
    return plot
  plot = _figure(1.4 + _ROW * count)
  grid = plot.subplots(1, len(forecasts), squeeze=False)[0]
  tables = [100 * np.array(f.pair_rates).T for f in forecasts]
  known = np.concatenate([t[t > 0] for t in tables])
  norm = colors.LogNorm(max(known.min(), known.max() / 1e5), known.max())
  for axes, forecast, table in zip(grid, forecasts, tables, strict=True):
    names = [d.name for d in forecast.directions]
    shown = np.ma.masked_less_equal(table, 0)
    image = _heat(
      axes,
      shown,
      names,
      norm=norm,
      cmap="viridis",
      extent=(0, forecast.train_steps, count - 0.5, -0.5),
    )
    axes.set_facecolor("#dddddd")
    _step_axis(axes)
    axes.set_title(_titled("rate of every direction", forecast, forecasts))
  _colorbar(
    plot,
    image,
    list(grid),
    "% of the pairs of a step (grey: not drawn)",
    format=_PLAIN,
  )
  return plot


def _step_axis(axes: Any) -> None:
  """Few steps under an axis, so that large ones have room."""
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _step_ticks(axes: Any, steps: Sequence[int]) -> None:
  """Some steps under the columns of a heat map."""
  at = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
  axes.set_xticks(at, [f"{steps[i]:,}" for i in at], fontsize=_SMALL)
  axes.set_xlabel("step")


def _named_lines(
  axes: Any,
  steps: Sequence[int],
  lines: Mapping[str, Sequence[float | None]],
  palette: Mapping[str, str] | None = None,
) -> None:
  """Lines with their names at the end, moved apart where they are close."""
  tints = matplotlib.colormaps["tab20" if len(lines) > 10 else "tab10"]
  table = np.array(
    [[np.nan if v is None else v for v in y] for y in lines.values()], float
  ).reshape(len(lines), len(steps))
  hues = [
    (palette or {}).get(name, tints(i % tints.N))
    for i, name in enumerate(lines)
  ]
  for y, color in zip(table, hues, strict=True):
    marker = "." if len(steps) < 30 else None
    axes.plot(steps, y, color=color, linewidth=1.5, marker=marker)
  low, high = axes.get_ylim()
  height = axes.get_window_extent().height / axes.figure.dpi
  gap = 0.135 / max(height, 1.0) * (high - low)
  place = -np.inf
  for end, text, color in _ends(list(lines), table, hues, 0.005 * (high - low)):
    place = max(end, place + gap)
    axes.annotate(
      text,
      (1.0, place),
      xycoords=("axes fraction", "data"),
      xytext=(4, 0),
      textcoords="offset points",
      color=color,
      fontsize=_SMALL,
      va="center",
      annotation_clip=False,
    )
  axes.set_ylim(low, max(high, place))
  axes.margins(x=0.01)


def _ends(
  names: Sequence[str],
  table: np.ndarray,
  hues: Sequence[Any],
  tolerance: float,
) -> list[tuple[float, str, Any]]:
  """Where lines [N, K] end, from below; those that coincide share a label."""
  groups: list[list[int]] = []
  for i, y in enumerate(table):
    if not np.isfinite(y).any():
      continue
    for group in groups:
      if np.array_equal(np.isfinite(y), np.isfinite(table[group[0]])) and (
        np.nanmax(np.abs(y - table[group[0]])) <= tolerance
      ):
        group.append(i)
        break
    else:
      groups.append([i])
  ends = []
  for group in groups:
    y = table[group[0]]
    text = ", ".join(names[i] for i in group[:2])
    if len(group) > 2:
      text += f" and {len(group) - 2} more"
    # The line on top is the last that was drawn.
    ends.append((float(y[np.isfinite(y)][-1]), text, hues[group[-1]]))
  return sorted(ends, key=lambda end: end[0])


@_styled
def epochs(forecasts: Sequence[forecasting.Forecast]) -> Figure:
  """Epochs of every direction at the end of the run."""
  names = [d.name for d in forecasts[0].directions]
  plot = _figure(1.4 + _ROW * len(names))
  axes = plot.subplots()
  rows = np.arange(len(names))[::-1]
  for forecast, color, marker in zip(forecasts, _PAIR, "oD", strict=False):
    own = {d.name: d.epochs for d in forecast.directions}
    values = np.array([own.get(name, np.nan) for name in names])
    axes.scatter(
      np.where(values > 0, values, np.nan),
      rows,
      color=color,
      marker=marker,
      s=22,
      label=forecast.name,
      zorder=3,
    )
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
  axes.xaxis.set_major_formatter(_PLAIN)
  axes.axvline(1, color="#333333", linewidth=1)
  max_epochs = forecasts[0].max_epochs
  axes.axvline(max_epochs, color="#b2182b", linestyle="--", linewidth=1)
  axes.set_yticks(rows, names, fontsize=_SMALL)
  axes.set_ylim(-0.7, len(names) - 0.3)
  axes.tick_params(axis="y", length=0)
  axes.tick_params(axis="x", labeltop=len(names) > _TALL)
  axes.set_xlabel(f"epochs in the whole run (line: 1, dashed: {max_epochs:g})")
  axes.set_title("how often each direction is gone through, largest on top")
  if len(forecasts) > 1:
    _legend(plot, dict(zip([f.name for f in forecasts], _PAIR, strict=False)))
  return plot


@_styled
def smallest(forecasts: Sequence[forecasting.Forecast]) -> Figure:
  """Epochs of the smallest directions over the steps."""
  plot = _figure(3.4)
  grid = plot.subplots(1, len(forecasts), squeeze=False, sharey=True)[0]
  for axes, forecast in zip(grid, forecasts, strict=True):
    count = len(forecast.directions)
    chosen = range(max(0, count - 8), count)
    done = np.array(forecast.epochs)
    _named_lines(
      axes,
      forecast.steps,
      {forecast.directions[i].name: done[:, i].tolist() for i in chosen},
    )
    _step_axis(axes)
    axes.set_title(_titled("the smallest directions", forecast, forecasts))
  grid[0].set_ylabel("epochs so far")
  return plot


# -------------------------------------------------------------------- run


@_styled
def drawn(report: run_report.RunReport) -> Figure:
  """Rows drawn against rows planned."""
  own = [d for d in report.directions if d.drawn_rows is not None]
  total = max(1.0, sum(d.planned_rows for d in own))
  plan = np.array([max(d.planned_rows, 1e-9) for d in own])
  real = np.array([float(d.drawn_rows or 0) for d in own])
  spread = 200 * np.sqrt(plan * (1 - plan / total)) / plan
  plot = _figure(1.3 + _ROW * len(own))
  axes = plot.subplots()
  rows = np.arange(len(own))[::-1]
  axes.barh(rows, 2 * spread, left=-spread, color="#dddddd", height=0.7)
  axes.scatter(100 * (real / plan - 1), rows, color=_PAIR[0], s=22, zorder=3)
  axes.axvline(0, color="#333333", linewidth=1)
  axes.set_yticks(rows, [d.name for d in own], fontsize=_SMALL)
  axes.set_ylim(-0.7, len(own) - 0.3)
  axes.tick_params(axis="y", length=0)
  axes.set_xlabel(
    "% more rows drawn than planned (grey: two standard deviations of chance)"
  )
  axes.set_title(f"rows drawn until step {report.step:,}, largest on top")
  return plot


@_styled
def curves(own: run_report.Curves, conversion: int | None) -> Figure:
  """A metric over the steps: means of the bands, and every direction."""
  few = len(own.directions) <= FEW
  height = 3.6 if few else max(3.6, 1.2 + _ROW * len(own.directions))
  plot = _figure(height)
  # Lines are not drawn out to the height of a heat map.
  low = max(height - 3.6, 0.01)
  grid = plot.add_gridspec(
    2, 2, width_ratios=(1, 1.15), height_ratios=(3.6, low)
  )
  left = plot.add_subplot(grid[0, 0] if low > 1 else grid[:, 0])
  right = plot.add_subplot(grid[:, 1])
  _named_lines(left, own.steps, own.bands, _BANDS)
  left.set_ylabel(own.unit)
  left.set_title(f"{own.name}, means by resource")
  if few:
    _named_lines(right, own.steps, own.directions)
    right.set_ylabel(own.unit)
  else:
    table = np.array(list(own.directions.values()), float)
    shown = np.ma.masked_invalid(table)
    # Early losses are far off; they would take all of the colours.
    top = float(np.nanpercentile(table, 95))
    least = float(np.nanmin(table))
    image = _heat(
      right,
      shown,
      list(own.directions),
      norm=colors.Normalize(least, max(top, least + 1e-9)),
      cmap="viridis" if own.unit == "BLEU" else "viridis_r",
    )
    _step_ticks(right, own.steps)
    _colorbar(plot, image, right, own.unit, extend="max")
  right.set_title(f"{own.name} of every direction")
  for axes, is_heat in ((left, False), (right, not few)):
    if not is_heat:
      _step_axis(axes)
    if conversion is None:
      continue
    at: float = conversion
    if is_heat:
      # Between the columns of the last dense and the first sparse step.
      at = float(np.searchsorted(own.steps, conversion, side="right")) - 0.5
    elif not own.steps[0] <= conversion <= own.steps[-1]:
      continue
    axes.axvline(at, color="#b2182b", linestyle="--", linewidth=1.2)
    if not is_heat:
      axes.annotate(
        "conversion",
        (at, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -8),
        textcoords="offset points",
        color="#b2182b",
        fontsize=_SMALL,
      )
  return plot


@_styled
def routers(report: run_report.RunReport) -> Figure:
  """What the routers did over the steps, a line per layer."""
  panels = {
    "load_max": "load of the most wanted expert / mean",
    "agreement": "share of tokens with their favourite",
    "entropy": "routing entropy, nats",
  }
  if any(any(r.auxiliary_loss) for r in report.routers):
    panels["auxiliary_loss"] = "auxiliary loss"
  plot = _figure(3.0 if len(panels) < 4 else 5.6)
  rows = 1 if len(panels) < 4 else 2
  grid = plot.subplots(rows, -(-len(panels) // rows), squeeze=False)
  for axes, (name, title) in zip(grid.flat, panels.items(), strict=True):
    lines = {_short_layer(r.layer): getattr(r, name) for r in report.routers}
    _named_lines(axes, report.routers[0].steps, lines)
    axes.set_title(title)
    _step_axis(axes)
  return plot


def _short_layer(name: str) -> str:
  """'encoder/layers_1' as 'enc 1'."""
  for long, short in (("encoder", "enc"), ("decoder", "dec")):
    name = name.replace(f"{long}/layers_", f"{short} ")
  return name


@_styled
def experts(own: run_report.ExpertMap) -> Figure:
  """Share of each language's tokens at each expert."""
  shares = 100 * np.array(own.shares)
  languages, count = shares.shape
  plot = _figure(1.3 + 1.25 * _ROW * languages)
  axes = plot.subplots()
  image = _heat(axes, shares, own.languages)
  step = max(1, count // 32)
  axes.set_xticks(range(0, count, step))
  axes.tick_params(axis="x", labelsize=_SMALL)
  axes.set_xlabel(f"expert (even: {100 / count:.3g}% each)")
  axes.set_ylabel(f"{own.side} language")
  axes.set_title(own.layer)
  if count <= 16:
    bright = shares > 0.55 * shares.max()
    for i in range(languages):
      for j in range(count):
        axes.text(
          j,
          i,
          f"{shares[i, j]:.0f}",
          ha="center",
          va="center",
          fontsize=_SMALL - 1,
          color="white" if bright[i, j] else "#333333",
        )
  _colorbar(plot, image, axes, f"% of a language's {own.side} tokens")
  return plot
