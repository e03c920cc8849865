"""Reports of `compilation` for people: their tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from basemt_jax.compilation import ahead_of_time, chips
from basemt_jax.inspection import tables

Rows = list[tuple[str, str]]


def tables_of(result: ahead_of_time.Report) -> list[tables.Table]:
  """Program, memory, work, estimate, notes, and the exchanges of a step."""
  notes = [("warning", text) for text in result.warnings]
  notes += [("to change", text) for text in result.advice]
  parts = (
    ("program", _program_rows(result)),
    ("memory of a chip, GiB", _memory_rows(result.memory)),
    ("work", _work_rows(result)),
    ("estimate", _estimate_rows(result)),
    ("notes", notes),
  )
  return [
    *(tables.Table("", (title, ""), rows) for title, rows in parts if rows),
    _exchange_table(result),
  ]


def _program_rows(result: ahead_of_time.Report) -> Rows:
  return [
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
  ]


def _memory_rows(memory: ahead_of_time.Memory) -> Rows:
  available = ""
  if memory.available:
    available = f" of {memory.available / chips.GIB:.2f}: {_verdict(memory)}"
  return [
    *(
      (name, f"{size / chips.GIB:.2f}")
      for name, size in (
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("temporary", memory.temporary),
        ("of which gradients, at most", memory.gradients),
      )
    ),
    ("in all", f"{memory.total / chips.GIB:.2f}{available}"),
  ]


def _work_rows(result: ahead_of_time.Report) -> Rows:
  if result.flops is None:
    return []
  return [
    ("model operations of a step", f"{result.model_flops:.4g}"),
    ("a chip's share", f"{result.model_flops / result.chips:.4g}"),
    ("compiled operations of a chip", f"{result.flops:.4g}"),
    ("bytes accessed, by XLA's count", f"{result.bytes_accessed:.4g}"),
    ("bytes of main memory, at most", f"{result.hbm_bytes:.4g}"),
  ]


def _estimate_rows(result: ahead_of_time.Report) -> Rows:
  seconds = result.seconds
  if not seconds:
    return []
  rows = [
    (name, f"{seconds[name] * 1e3:.1f} ms")
    for name in ("compute", "memory", "network")
  ]
  rows += [
    (
      f"step: {name}",
      f"{seconds[name] * 1e3:.1f} ms, MFU {result.mfu[name]:.2f}, "
      f"{result.target_tokens / seconds[name]:,.0f} target tokens/s",
    )
    for name in ("best", "serial", "compiler")
    if name in seconds
  ]
  return rows


def _exchange_table(result: ahead_of_time.Report) -> tables.Table:
  return tables.Table(
    "exchanges of a step",
    (
      "exchange",
      "mesh axes",
      "devices",
      "count",
      tables.Column("MB a chip", tables.fixed(2)),
      tables.Column("ms", tables.fixed(2)),
      "largest array",
    ),
    [
      (
        e.kind,
        e.axes,
        e.devices,
        e.count,
        e.bytes / 1e6,
        None if e.seconds is None else e.seconds * 1e3,
        e.largest,
      )
      for e in result.exchanges
    ],
  )


def _verdict(memory: ahead_of_time.Memory) -> str:
  if not memory.fits:
    return "DOES NOT FIT"
  if memory.is_tight:
    return (
      f"fits tightly, {memory.total / (memory.available or 1):.0%} used; leave "
      f"{ahead_of_time.SPARE:.0%} to evaluation and the runtime"
    )
  return "fits"


def mesh_table(results: Sequence[ahead_of_time.Report]) -> tables.Table:
  """The same step on several meshes, in the order given."""
  rows: list[tuple[Any, ...]] = []
  for result in results:
    seconds, memory = result.seconds, result.memory
    step = seconds.get("compiler", seconds.get("serial"))
    fit = "" if memory.fits else ", DOES NOT FIT"
    rows.append(
      (
        " x ".join(map(str, result.mesh.values())),
        f"{memory.total / chips.GIB:.2f}{fit}",
        seconds["network"] * 1e3 if seconds else None,
        step and step * 1e3,
        step and result.target_tokens / step,
      )
    )
  return tables.Table(
    "the same step on other meshes",
    (
      "data x expert x model",
      "GiB a chip",
      tables.Column("network, ms", tables.fixed(1)),
      tables.Column("step, ms", tables.fixed(1)),
      tables.Column("target tokens/s", tables.count),
    ),
    rows,
  )


def markdown(result: ahead_of_time.Report) -> str:
  """The report for the docs."""
  return "\n".join(map(tables.markdown, tables_of(result)))


def from_json(value: Mapping[str, Any]) -> ahead_of_time.Report:
  """A report out of what `dataclasses.asdict` gave."""
  parts = {
    "memory": ahead_of_time.Memory(**value["memory"]),
    "exchanges": [ahead_of_time.Exchange(**e) for e in value["exchanges"]],
  }
  return ahead_of_time.Report(**{**value, **parts})
