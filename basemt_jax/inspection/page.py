"""Sections of a report, for the terminal and as one page.

The page is one file that loads nothing: style, plots (Vega-Lite) and the
library that draws them are in it.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import rich.text

from basemt_jax import files
from basemt_jax.inspection import charts, tables, text_report

_TERMINAL_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure of a page."""

  caption: str
  charts: Sequence[charts.Chart]  # a panel each


@dataclasses.dataclass(frozen=True)
class Section:
  """A view."""

  title: str
  summary: Sequence[str]  # lines below the title
  warnings: Sequence[str]  # a line each
  tables: Sequence[tables.Table]
  plots: Sequence[Plot]  # for the page
  # (direction, pairs) for looking at
  examples: Sequence[tuple[str, Sequence[text_report.Example]]] = ()


# --------------------------------------------------------------- terminal


def print_sections(sections: Sequence[Section]) -> None:
  """Writes summaries, warnings, tables and a few examples."""
  console = tables.terminal()
  for section in sections:
    console.print(rich.text.Text(f"\n{section.title}", style="bold"))
    for line in section.summary:
      console.print(files.printable(line))
    for warning in section.warnings:
      console.print(
        rich.text.Text(f"! {files.printable(warning)}", style="yellow")
      )
    for table in section.tables:
      if table.rows:
        tables.show(table, console)
    chosen = [e for e in section.examples if e[1]]
    step = max(1, -(-len(chosen) // _TERMINAL_EXAMPLES))
    for name, examples in chosen[::step]:
      console.print(rich.text.Text(f"\n{name}", style="bold"))
      for part in _example(examples[0]):
        text = files.printable(part["text"])
        console.print(rich.text.Text(f"  {part['label']:<15} {text}"))


def _example(example: text_report.Example) -> list[dict[str, Any]]:
  """Lines of a pair: label, text, and for tokens their pieces."""
  lines: list[dict[str, Any]] = [{"label": "source", "text": example[0].text}]
  for label, side, own in (
    ("tagged", "source", example[0]),
    ("target", "target", example[1]),
  ):
    tokens = {"text": " ".join(own.pieces), "pieces": own.pieces}
    differs = own.decoded != own.tagged
    lines += [
      {"label": label, "text": own.tagged},
      {"label": f"{side} tokens", **tokens},
      {"label": "decoded", "text": own.decoded, "differs": differs},
    ]
  return lines


# ------------------------------------------------------------------- page


def page(title: str, sections: Sequence[Section]) -> str:
  """One HTML page with everything in it."""
  import jinja2

  template = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True
  ).from_string(_file("page.html"))
  return template.render(
    title=title,
    sections=sections,
    example=_example,
    data=_data,
    library=_library() if any(s.plots for s in sections) else "",
  )


def write(
  json_path: str | None,
  html_path: str | None,
  title: str,
  sections: Sequence[Section],
  numbers: Mapping[str, Any],
) -> None:
  """Writes the files that a command was asked for, and says so.

  The JSON file has the numbers, the page the sections that show them.
  """
  if json_path:
    files.write_json(json_path, numbers)
  if html_path:
    files.write_atomically(html_path, page(title, sections))
  for path in filter(None, (json_path, html_path)):
    print(f"written: {path}")


def _file(name: str) -> str:
  folder = importlib.resources.files("basemt_jax.inspection")
  return folder.joinpath(name).read_text(encoding="utf-8")


def _data(value: Any) -> str:
  """JSON that may stand in a page's script: no tag can begin in it."""
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
  return text.replace("<", "\\u003c")


@functools.cache
def _library() -> str:
  """JavaScript that draws the charts, with all it needs."""
  import vl_convert

  text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
  return text.replace("</script", "<\\/script")
