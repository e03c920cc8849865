"""Pages: whole, self-contained, and plots of the numbers they stand for."""

import html.parser
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import toy
import vl_convert

from basemt_jax import evaluation, heating, metrics, sampling
from basemt_jax.data import row_store
from basemt_jax.inspection import (
  charts,
  forecasting,
  page,
  run_report,
  run_view,
  sampling_view,
  tables,
  text_report,
  text_view,
  token_counts,
)

BANDS = evaluation.BandThresholds(high=100, low=50)
HEATED = sampling.Strategy(heating.linear(1.0, 5.0, 60))


class Reader(html.parser.HTMLParser):
  """Refuses tags that are not closed, and anything from outside."""

  SINGLE = ("meta", "img", "br")

  def __init__(self, text):
    super().__init__()
    self.open, self.specs, self.scripts, self.text = [], [], 0, []
    self.rows, self._kind = [], None
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    assert tag not in ("link", "iframe", "object", "img")
    own = dict(attributes)
    assert "src" not in own and own.get("href", "#").startswith("#")
    self._kind = own.get("type", tag) if tag == "script" else tag
    self.scripts += self._kind == "script"
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    if tag not in self.SINGLE:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    inside = self.open[-1] if self.open else ""
    if inside == "script":
      if self._kind == "application/json":
        self.specs.append(json.loads(data))
    elif inside in ("td", "th"):
      self.rows[-1][-1] += data
    elif inside != "style":
      self.text.append(data)


def values(spec):
  """All records of a chart."""
  found = list(spec.get("data", {}).get("values", ()))
  for layer in spec.get("layer", ()):
    found += layer.get("data", {}).get("values", ())
  return found


def series(spec):
  """A chart's lines: (x, y) by name."""
  return {r["name"]: (r["x"], r["y"]) for r in values(spec) if "y" in r}


def by_title(specs, title):
  return next(s for s in specs if s["title"] == title)


def close(found, expected):
  """To the five digits that a plot keeps."""
  return found == pytest.approx(expected, rel=1e-4, abs=1e-9)


# Ogham is in no vocabulary.
HOSTILE = "<script>alert(1)</script> & so ᚁ </script>"


def text_data(count):
  """Made up; a direction whose source is 5 and target 20 tokens, twice."""
  bins = token_counts.BINS

  def side(language, length, number):
    histogram = [0] * (len(bins) + 1)
    histogram[int(np.searchsorted(bins, length))] = number
    return token_counts.Side(
      *(language, length, length, length, length, tuple(histogram)),
      *(0.1, 90, 30, 0.0, 0.0405, 1 / 3, 0.0),
    )

  names = names_of(count)
  example = (
    text_report.Shown(HOSTILE, f"<2de> {HOSTILE}", ("<0xE1>", "</s>"), HOSTILE),
    text_report.Shown("שלום", "שלום", ("שלום", "</s>"), "שלום"),
  )
  return text_report.Data(
    "<title>",
    {"inputs": 16, "targets": 16},
    2000,
    tuple(
      text_report.Direction(
        *(name, f"t.{name}", 2, 2, True, "low"),
        *(side("en", 5, 2), side(name[3:], 20, 2)),
        *(0, 0, 0, 1, (10, 40), (), (example,)),
      )
      for name in names
    ),
    tuple(
      text_report.Language(name[3:], 90, 30, (i + 1) / 3, 0.0, 0.04)
      for i, name in enumerate(names)
    ),
    (),
  )


def names_of(count):
  return [f"en-x{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(count)]


def forecast_of(count, name="a"):
  pairs = np.geomspace(100_000, 100, count).astype(int)
  names = tuple(names_of(count))
  sizes = forecasting.Sizes(
    names, pairs, pairs / 5, pairs * 20.0, pairs * 22.0, pairs, True
  )
  return forecasting.forecast(name, HEATED, sizes, 60, 8, BANDS)


def run_of(count):
  """Made up; steps 1 to 3, the last one not measured in the first direction."""
  names = names_of(count)
  losses = {n: [4.0, 3.0 + i / count, 2.0] for i, n in enumerate(names)}
  losses[names[0]][2] = None
  curves = run_report.Curves(
    *("dev/loss", "dev loss", "nats per target token", 3, False),
    *([1, 2, 3], losses, {"low": [4.0, 3.5, 2.0]}),
  )
  load = metrics.named("load_max")
  router = run_report.Curves(
    *("router/load_max", load.label, load.unit, load.digits, False),
    *([1, 2, 3], {"decoder/layers_1": [3.0, 2.0, 1.5]}, {}),
  )
  experts = run_report.ExpertMap(
    "decoder/layers_1",
    "target",
    [n[3:] for n in names],
    [10] * count,
    np.full((count, 128), 1 / 128).tolist(),
  )
  directions = tuple(
    run_report.DirectionRun(
      *(n, "low", 100, 50.0, 55, 500.0, 550.0, 2.75, 2.0, 2.5),
      {"test, greedy": 20.0, "test, beam 4": 21.0},
    )
    for n in names
  )
  return run_report.RunReport(
    *("runs/x", 3, "sparse", 6, [3], 2, "heated", directions),
    *((curves,), (router,), (experts,), "validation", ()),
  )


@pytest.fixture(scope="module")
def document():
  """One page with everything: the library is bundled once."""
  forecasts = [forecast_of(3), forecast_of(3, "b")]
  return page.page(
    "<x>",
    [
      text_view.section(text_data(3)),
      sampling_view.section("toy", forecasts),
      run_view.section(run_of(3)),
    ],
  )


def test_a_page_is_whole_and_text_stays_text(document):
  read = Reader(document)
  text = "".join(read.text)
  assert text.count(HOSTILE) == 3 * 3 and "<title>" in text
  assert read.scripts == 2  # The library, and what draws.
  # Small enough to be mailed.
  assert len(document.encode()) < 1.2e6
  assert "cdn" not in document[-2000:]
  assert len(read.specs) == 2 + 1 + 3 + 2 + 1 + 2 + 1 + 2 + 1 + 1


def test_tables_of_a_page_have_the_cells_of_the_terminal(document):
  rows = Reader(document).rows
  for table in run_view.section(run_of(3)).tables:
    assert table.names in rows
    for row in table.rows:
      assert table.cells(row) in rows


def test_plots_can_be_drawn(document):
  """By the library of the page, outside of a browser."""
  for spec in Reader(document).specs:
    drawn = vl_convert.vegalite_to_svg({**spec, "width": 300})
    shown = ElementTree.fromstring(drawn)
    assert "var(--" in drawn or "viridis" in json.dumps(spec), spec["title"]
    text = {t.text for t in shown.iter("{http://www.w3.org/2000/svg}text")}
    assert spec["title"] in text


def test_plots_hold_the_numbers(document):
  specs = Reader(document).specs
  forecast = forecast_of(3)
  # Two sampling plans are shown side by side.
  rates = series(by_title(specs, "rate of every direction: a"))
  epochs = series(by_title(specs, "the smallest directions: b"))
  for i, d in enumerate(forecast.directions):
    steps, shares = rates[d.name]
    assert steps == forecast.steps
    assert close(shares, [100 * own[i] for own in forecast.pair_rates])
    assert close(epochs[d.name][1], [own[i] for own in forecast.epochs])
  temperature = series(by_title(specs, "temperature"))
  assert close(temperature["a"][1], forecast.temperatures)
  drawn = series(by_title(specs, "who is drawn: a"))
  total = np.sum([y for _, y in drawn.values()], axis=0)
  assert close(total.tolist(), [100.0] * len(forecast.steps))
  done = values(by_title(specs, "how often each direction is gone through"))
  found = {r["name"]: r["x"] for r in done if r.get("series") == "a"}
  assert found == pytest.approx(
    {d.name: d.epochs for d in forecast.directions}, rel=1e-4
  )
  losses = by_title(specs, "dev loss of every direction")
  assert series(losses)["en-xaa"] == ([1, 2, 3], [4.0, 3.0, None])
  assert {"what": "conversion", "x": 2.0} in values(losses)
  length = series(by_title(specs, "length of the target"))["en-xaa"]
  assert [x for x, y in zip(*length, strict=True) if y] == [23]  # 20 in 17..23.
  drawn = values(by_title(specs, "rows drawn until step 3"))
  assert {"series": "drawn", "name": "en-xab", "x": 10.0} in drawn
  share = series(by_title(specs, "decoder/layers_1"))["xaa"]
  assert share[0][-1] == "127" and set(share[1]) == {0.78125}


@pytest.mark.parametrize("count", [1, 100])
def test_every_direction_has_its_name_in_plots_of_any_size(count):
  forecast, run = forecast_of(count), run_of(count)
  names = names_of(count)
  figures = [
    *sampling_view.rate_charts([forecast]),
    sampling_view.epoch_chart([forecast]),
    run_view.drawn_chart(run),
    *text_view.length_charts(text_data(count)),
    run_view.curve_charts(run.curves[0], None)[1],
  ]
  for spec in figures:
    shown = {r["name"] for r in values(spec) if "name" in r}
    assert shown == set(names), spec["title"]
    # A row each, so that names do not overlap.
    assert count <= charts.FEW or spec["height"] > 10 * count


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_tables_that_fit(width, monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", str(width))
  monkeypatch.setattr(
    tables.rich.console.Console, "is_terminal", property(lambda self: True)
  )
  sections = [
    sampling_view.section("toy", [forecast_of(3)]),
    run_view.section(run_of(3)),
  ]
  page.print_sections(sections)
  shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
  assert max(map(len, shown.splitlines())) <= width
  for word in ("5x at", "test, greedy", "rate last", "wanted"):
    assert all(part in shown for part in word.split()), word


def test_a_store_is_forecast_on_a_page(tmp_path):
  store = row_store.RowStore(toy.write_store(tmp_path))
  sizes = forecasting.sizes_of_store(store)
  forecast = forecasting.forecast("it", HEATED, sizes, 60, 8, BANDS)
  section = sampling_view.section("toy", [forecast])
  assert [len(plot.charts) for plot in section.plots] == [2, 1, 1, 1]
