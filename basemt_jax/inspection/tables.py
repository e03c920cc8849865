"""One table type for the terminal, a page and Markdown.

Cells keep their values; how they are shown is the column's affair. On a
terminal a table that is too wide is shown in parts, one below the other, each
with the first column.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import rich.box
import rich.cells
import rich.console
import rich.table
import rich.text

from basemt_jax import files

_GAP = 2  # Between columns.
_MIN_TEXT = 24  # Columns of text are not folded to less.


def count(value: int | float) -> str:
  """A whole number with separators: '12,345'."""
  return f"{value:,.0f}"


def fixed(digits: int) -> Callable[[float], str]:
  """A format with so many digits after the point."""
  return lambda value: f"{value:,.{digits}f}"


def percent(share: float) -> str:
  """A share as '12%' or '0.12%'; '0' for none at all."""
  value = 100 * share
  if value == 0:
    return "0"
  return f"{value:.3g}%" if value >= 0.001 else "<0.001%"


@dataclasses.dataclass(frozen=True)
class Column:
  """A column."""

  name: str  # heading
  text: Callable[[Any], str] = str  # how a value is shown; None is shown as '-'
  # for `listed`: an attribute of the items, or a function of one
  value: str | Callable[[Any], Any] = ""

  def of(self, item: Any) -> Any:
    """The value of an item."""
    if isinstance(self.value, str):
      return getattr(item, self.value)
    return self.value(item)


@dataclasses.dataclass(frozen=True)
class Table:
  """Values by row and column."""

  title: str
  # headings and formats; a plain name is shown as it is
  columns: Sequence[Column | str]
  rows: Sequence[Sequence[Any]]  # a value for each column; None: not known
  foot: Sequence[Sequence[Any]] = ()  # rows below a line, such as means
  note: str = ""  # on how to read it

  @property
  def names(self) -> list[str]:
    """Headings."""
    return [c if isinstance(c, str) else c.name for c in self.columns]

  def cells(self, row: Sequence[Any]) -> list[str]:
    """A row as it is shown, with nothing that a terminal would obey."""
    forms = [str if isinstance(c, str) else c.text for c in self.columns]
    texts = (
      value if isinstance(value, str) else "-" if value is None else form(value)
      for form, value in zip(forms, row, strict=True)
    )
    return [files.printable(text) for text in texts]

  @property
  def is_text(self) -> list[bool]:
    """Which columns hold text, and are aligned to the left."""
    rows = [*self.rows, *self.foot]
    return [
      any(isinstance(row[i], str) for row in rows)
      for i in range(len(self.columns))
    ]


def listed(
  title: str, items: Iterable[Any], columns: Sequence[Column], note: str = ""
) -> Table:
  """A row for each item, by the columns' `value`."""
  rows = [[column.of(item) for column in columns] for item in items]
  return Table(title, columns, rows, note=note)


def markdown(table: Table) -> str:
  """The table for documents."""
  marks = [" -- |" if text else " --: |" for text in table.is_text]
  lines = [f"| {' | '.join(table.names)} |", f"|{''.join(marks)}"]
  for row in (*table.rows, *table.foot):
    lines.append(f"| {' | '.join(table.cells(row))} |")
  return "\n".join(lines) + "\n"


# --------------------------------------------------------------- terminal


def terminal(file: TextIO | None = None) -> rich.console.Console:
  """Standard output, or a file, for tables: as wide as the terminal.

  Files and pipes have no edge, so that a row stays a line.
  """
  console = rich.console.Console(file=file, highlight=False, markup=False)
  if not console.is_terminal:
    console.width = 10_000
  return console


def show(table: Table, console: rich.console.Console) -> None:
  """Writes a table, in parts if it is wider than the console."""
  title = table.title
  parts = list(_parts(table, console.width))
  for i, (columns, widths) in enumerate(parts):
    own = rich.table.Table(
      title=rich.text.Text(title) if title and not i else None,
      title_justify="left",
      box=rich.box.SIMPLE_HEAD,
      padding=(0, 1, 0, 0),
      pad_edge=False,
      show_edge=False,
      show_header=any(table.names),
    )
    for k, width in zip(columns, widths, strict=True):
      own.add_column(
        rich.text.Text(table.names[k]),
        justify="left" if table.is_text[k] else "right",
        overflow="fold",
        width=width,
      )
    for row in table.rows:
      own.add_row(*_texts(table, row, columns))
    if table.foot:
      own.add_section()
    for row in table.foot:
      own.add_row(*_texts(table, row, columns))
    console.print(own)
    console.print()
  for line in textwrap.wrap(table.note, min(console.width, 100)):
    console.print(rich.text.Text(line, style="dim"))
  if table.note:
    console.print()


def _texts(
  table: Table, row: Sequence[Any], columns: Sequence[int]
) -> list[rich.text.Text]:
  cells = table.cells(row)
  return [rich.text.Text(cells[k]) for k in columns]


def _parts(table: Table, width: int) -> Iterator[tuple[list[int], list[int]]]:
  """Columns that are shown side by side, and their widths in characters."""
  shown = [table.cells(row) for row in (*table.rows, *table.foot)]
  heads = [rich.cells.cell_len(name) for name in table.names]
  words = [max(map(len, name.split()), default=0) for name in table.names]
  cells = [
    max((rich.cells.cell_len(row[k]) for row in shown), default=0)
    for k in range(len(heads))
  ]
  wide = [max(pair) for pair in zip(cells, heads, strict=True)]
  if sum(wide) + _GAP * (len(wide) - 1) <= width:
    yield list(range(len(wide))), wide
    return
  # Headings fold at their words, text where it must, numbers never.
  narrow = [max(pair) for pair in zip(cells, words, strict=True)]
  first = min(narrow[0], max(_MIN_TEXT, width // 3))
  room = width - first - _GAP
  least = [
    max(min(n, _MIN_TEXT), word) if text else n
    for n, word, text in zip(narrow, words, table.is_text, strict=True)
  ]
  part: list[int] = []
  for k in range(1, len(narrow) + 1):
    is_full = part and (
      k == len(narrow) or sum(least[i] + _GAP for i in (*part, k)) - _GAP > room
    )
    if is_full:
      yield [0, *part], [first, *_shared(part, least, narrow, room)]
      part = []
    if k < len(narrow):
      part.append(k)


def _shared(
  part: Sequence[int], least: Sequence[int], wanted: Sequence[int], room: int
) -> list[int]:
  """Widths of a part's columns: text gets what numbers leave."""
  left = room - sum(least[k] + _GAP for k in part) + _GAP
  widths = []
  for k in part:
    more = max(0, min(wanted[k] - least[k], left))
    left -= more
    widths.append(max(1, least[k] + more))
  return widths
