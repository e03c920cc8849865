"""Results of an evaluation for people and programs: table, JSON, text files."""

import collections
import io
import math
from collections.abc import Sequence
from typing import TextIO

import rich.box
import rich.console
import rich.table

from basemt_jax import evaluation


def print_table(
  results: Sequence[evaluation.DirectionResult],
  file: TextIO | None = None,
  pivot: str = "en",
) -> None:
  """Writes the table of results, with means and sacreBLEU's signatures.

  Args:
    results: In the order to show.
    file: Standard output by default. What is no terminal gets plain text of
      100 columns at most.
    pivot: See `evaluation.summarise`.
  """
  console = rich.console.Console(file=file, highlight=False)
  if not console.is_terminal:
    console = rich.console.Console(file=file, highlight=False, width=100)
  _print(console, results, pivot)


def render_table(
  results: Sequence[evaluation.DirectionResult], pivot: str = "en"
) -> str:
  """The table of `print_table` as plain text, whatever the environment."""
  text = io.StringIO()
  console = rich.console.Console(
    file=text, highlight=False, width=100, force_terminal=False
  )
  _print(console, results, pivot)
  return text.getvalue()


def _print(
  console: rich.console.Console,
  results: Sequence[evaluation.DirectionResult],
  pivot: str,
) -> None:
  console.print(_table(results, pivot))
  for line in _signature_lines(results):
    console.print(line, markup=False)


def _table(
  results: Sequence[evaluation.DirectionResult], pivot: str
) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("direction", overflow="fold")
  table.add_column("training pairs", justify="right")
  table.add_column("band")
  for name in ("test pairs", "loss", "BLEU", "chrF++"):
    table.add_column(name, justify="right")
  for r in results:
    table.add_row(
      r.direction,
      f"{r.train_pairs:,}",
      r.band,
      f"{r.test_pairs:,}",
      *_cells(r),
    )
  table.add_section()
  for mean in evaluation.summarise(results, pivot):
    label = (
      f"{mean.name} resource" if mean.name in evaluation.BANDS else mean.name
    )
    table.add_row(
      f"mean of {label}", f"{mean.directions} directions", "", "", *_cells(mean)
    )
  return table


def _cells(row: evaluation.DirectionResult | evaluation.Mean) -> list[str]:
  return [
    "-" if value is None else f"{value:.{digits}f}"
    for value, digits in ((row.loss, 3), (row.bleu, 1), (row.chrf, 1))
  ]


def _signature_lines(
  results: Sequence[evaluation.DirectionResult],
) -> list[str]:
  """A line for every signature, and who has the less common ones."""
  lines = []
  for metric, attribute in (
    ("BLEU", "bleu_signature"),
    ("chrF++", "chrf_signature"),
  ):
    directions = collections.defaultdict(list)
    for r in results:
      if getattr(r, attribute):
        directions[getattr(r, attribute)].append(r.direction)
    ranked = sorted(directions.items(), key=lambda item: -len(item[1]))
    for i, (signature, names) in enumerate(ranked):
      who = f" ({', '.join(names)})" if i else ""
      lines.append(f"{metric}{who}: {signature}")
  return lines


def sample_lines(
  translations: Sequence[evaluation.DirectionTranslations], count: int = 5
) -> list[str]:
  """Some translations to look at: the middle one of `count` directions."""
  some = [t for t in translations if t.sources]
  chosen = some[:: max(1, math.ceil(len(some) / max(1, count)))][:count]
  lines = []
  for t in chosen:
    i = len(t.sources) // 2
    lines += [
      f"{t.direction}  source      {t.sources[i]}",
      f"{' ' * len(t.direction)}  hypothesis  {t.hypotheses[i]}",
      f"{' ' * len(t.direction)}  reference   {t.references[i]}",
    ]
  return lines
