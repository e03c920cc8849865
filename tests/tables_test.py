"""The table type: one set of values for terminal and Markdown."""

import io

import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

from basemt_jax.inspection import tables

TABLE = tables.Table(
  "what it is",
  [
    "direction",
    tables.Column("training pairs", tables.count),
    tables.Column("rate", tables.percent),
    tables.Column("mean of it", tables.fixed(2)),
  ],
  [["en-de", 45_000_000, 0.1234, 1.234], ["en-zh-Hans", 12, 0.0, None]],
  foot=[["mean", None, None, 1.234]],
  note="how to read it",
)


def lines(table, width):
  """As on a terminal so many characters wide."""
  text = io.StringIO()
  console = rich.console.Console(
    file=text, width=width, highlight=False, force_terminal=False
  )
  tables.show(table, console)
  return text.getvalue().splitlines()


def test_cells_are_shown_and_kept():
  assert TABLE.cells(TABLE.rows[0]) == ["en-de", "45,000,000", "12.3%", "1.23"]
  assert TABLE.cells(TABLE.rows[1]) == ["en-zh-Hans", "12", "0", "-"]
  assert TABLE.is_text == [True, False, False, False]
  assert tables.markdown(TABLE).splitlines()[1:3] == [
    "| -- | --: | --: | --: |",
    "| en-de | 45,000,000 | 12.3% | 1.23 |",
  ]


@pytest.mark.parametrize(
  "share, text",
  [(0.0, "0"), (1.0, "100%"), (0.0405, "4.05%"), (1e-7, "<0.001%")],
)
def test_percent(share, text):
  assert tables.percent(share) == text


def test_a_pipe_gets_whole_rows():
  text = io.StringIO()
  tables.show(WIDE, tables.terminal(text))
  rows = [x.split() for x in text.getvalue().splitlines() if "en-x" in x]
  assert [len(row) for row in rows] == [17] * 3
  assert "\x1b" not in text.getvalue()


WIDE = tables.Table(
  "wide",
  ["direction", *(tables.Column(f"column {i}", str) for i in range(16))],
  [[f"en-x{i}", *range(10**i, 10**i + 16)] for i in (1, 3, 7)],
)


@settings(deadline=None)
@given(st.integers(40, 200))
def test_every_number_is_whole_at_any_width(width):
  shown = lines(WIDE, width)
  assert max(map(len, shown)) <= width
  words = {word for line in shown for word in line.split()}
  assert {str(v) for row in WIDE.rows for v in row} <= words
  # Every part says which row is which.
  parts = sum("en-x7" in line for line in shown)
  assert parts == sum("direction" in line for line in shown)


def test_text_folds_and_nothing_is_lost():
  notes = tables.Table(
    "",
    ("notes", ""),
    [("warning", "word " * 60), ("change", "日本語 " * 30)],
  )
  shown = lines(notes, 80)
  assert max(map(len, shown)) <= 80
  assert sum(line.count("word") for line in shown) == 60
  assert sum(line.count("日本語") for line in shown) == 30
