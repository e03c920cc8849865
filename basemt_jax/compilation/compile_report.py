"""Reports of `compilation` for people and programs: tables, Markdown, JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from basemt_jax.compilation import ahead_of_time, chips


def lines(
  result: ahead_of_time.Report,
) -> list[tuple[str, list[tuple[str, str]]]]:
  """The report as titled tables of two columns, and one of exchanges.

  Returns:
    (title, rows) in order; see `exchange_rows` for the exchanges.
  """
  memory, seconds = result.memory, result.seconds
  available = (
    f" of {memory.available / chips.GIB:.2f}: "
    f"{'fits' if memory.fits else 'DOES NOT FIT'}"
    if memory.available
    else ""
  )
  tables = [
    (
      "program",
      [
        ("devices", f"{result.chips} x {result.device}"),
        ("topology", result.topology or "the devices at hand"),
        ("mesh", ", ".join(f"{k} {v}" for k, v in result.mesh.items())),
        ("phase", result.phase),
        ("parameters", f"{result.parameters:,}"),
        (
          "batch",
          f"{result.rows:,} rows: {result.source_tokens:,} source and "
          f"{result.target_tokens:,} target tokens at most",
        ),
        ("compiled in", f"{result.compile_seconds:.0f} s"),
        (
          "versions",
          ", ".join(f"{k} {v}" for k, v in result.versions.items()),
        ),
      ],
    ),
    (
      "memory of a chip, GiB",
      [
        (name, f"{size / chips.GIB:.2f}")
        for name, size in (
          ("parameters", memory.parameters),
          ("optimizer", memory.optimizer),
          ("batch", memory.batch),
          ("temporary", memory.temporary),
        )
      ]
      + [("in all", f"{memory.total / chips.GIB:.2f}{available}")],
    ),
  ]
  if result.flops is not None:
    work = [
      ("model operations of a step", f"{result.model_flops:.4g}"),
      ("a chip's share", f"{result.model_flops / result.chips:.4g}"),
      ("compiled operations of a chip", f"{result.flops:.4g}"),
      ("bytes accessed, by XLA's count", f"{result.bytes_accessed:.4g}"),
      ("bytes of main memory, at most", f"{result.hbm_bytes:.4g}"),
    ]
    tables.append(("work", work))
  if seconds:
    estimate = [
      (name, f"{seconds[name] * 1e3:.1f} ms")
      for name in ("compute", "memory", "network")
    ]
    estimate += [
      (
        f"step: {name}",
        f"{seconds[name] * 1e3:.1f} ms, MFU {result.mfu[name]:.2f}, "
        f"{result.target_tokens / seconds[name]:,.0f} target tokens/s",
      )
      for name in ("best", "serial", "compiler")
      if name in seconds
    ]
    tables.append(("estimate", estimate))
  notes = [("warning", text) for text in result.warnings]
  notes += [("to change", text) for text in result.advice]
  if notes:
    tables.append(("notes", notes))
  return tables


EXCHANGE_COLUMNS = (
  "exchange",
  "mesh axes",
  "devices",
  "count",
  "MB a chip",
  "ms",
  "largest array",
)


def exchange_rows(result: ahead_of_time.Report) -> list[tuple[str, ...]]:
  """Cells of the table of exchanges; see `EXCHANGE_COLUMNS`."""
  return [
    (
      e.kind,
      e.axes,
      str(e.devices),
      str(e.count),
      f"{e.bytes / 1e6:,.2f}",
      "-" if e.seconds is None else f"{e.seconds * 1e3:.2f}",
      e.largest,
    )
    for e in result.exchanges
  ]


def print_report(result: ahead_of_time.Report) -> None:
  """Writes the report to standard output."""
  import rich.box
  import rich.console
  import rich.table

  console = rich.console.Console(highlight=False, markup=False)
  if not console.is_terminal:
    console = rich.console.Console(highlight=False, markup=False, width=100)

  def show(title: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
    table = rich.table.Table(
      title=title,
      title_justify="left",
      box=rich.box.SIMPLE_HEAD,
      pad_edge=False,
      show_header=any(columns),
    )
    for name in columns:
      table.add_column(name, overflow="fold")
    for row in rows:
      table.add_row(*row)
    console.print(table)

  for title, rows in lines(result):
    show(title, ("", ""), rows)
  show("exchanges of a step", EXCHANGE_COLUMNS, exchange_rows(result))


def markdown(result: ahead_of_time.Report) -> str:
  """The report for the docs."""
  parts = []
  for title, rows in lines(result):
    body = "".join(f"| {name} | {value} |\n" for name, value in rows)
    parts.append(f"| {title} | |\n| -- | -- |\n{body}")
  head = " | ".join(EXCHANGE_COLUMNS)
  body = "".join(f"| {' | '.join(r)} |\n" for r in exchange_rows(result))
  parts.append(f"| {head} |\n|{' -- |' * len(EXCHANGE_COLUMNS)}\n{body}")
  return "\n".join(parts)


def to_json(result: ahead_of_time.Report) -> dict[str, Any]:
  """The report as JSON has it."""
  return dataclasses.asdict(result)


def from_json(value: Mapping[str, Any]) -> ahead_of_time.Report:
  """A report out of `to_json`."""
  parts = {
    "memory": ahead_of_time.Memory(**value["memory"]),
    "exchanges": [ahead_of_time.Exchange(**e) for e in value["exchanges"]],
  }
  return ahead_of_time.Report(**{**value, **parts})
