"""Fills in the tables of docs/results.md, search.md and tried.md from the logs.

    PYTHONPATH=. python benchmarks/study/report.py

The pages are prose with places for tables between `<!-- table NAME -->` and
`<!-- end -->`; `TABLES` says what each is made of. Figures go to docs/plots,
and what README and docs quote to `summary.json`, beside this file.
"""

import argparse
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from benchmarks.study import (
  claim,
  figures,
  other_data,
  reading,
  search,
  tables,
)

ROOT = pathlib.Path(__file__).parent.parent.parent
SUMMARY = "benchmarks/study/summary.json"
PAGES = ("docs/results.md", "docs/search.md", "docs/tried.md")


@functools.cache
def runs_of(name: str) -> dict[str, list[reading.Finished]]:
  """A set's runs by system, with their clocks."""
  found = reading.by_system(reading.read_set(reading.LOGS / f"{name}.jsonl.xz"))
  times = step_ms(name)
  return {
    system: [reading.with_seconds(one, times) for one in own]
    for system, own in found.items()
  }


@functools.cache
def step_ms(name: str) -> dict[str, float]:
  """Milliseconds of a step of each network of a set."""
  return reading.step_times(reading.read_set(reading.LOGS / f"{name}.jsonl.xz"))


def _significance(name: str) -> str:
  path = reading.LOGS / f"{name}_bootstrap.json"
  return tables.significance(json.loads(path.read_text(encoding="utf-8")))


def _settings_tried() -> str:
  return tables.settings_tried(
    reading.read_set(reading.LOGS / "pilots.jsonl.xz"),
    runs_of("earlier")[reading.BASELINE][0],
  )


TABLES: dict[str, Callable[[], str]] = {
  "earlier systems": lambda: tables.systems_of(runs_of("earlier")),
  "earlier updates": lambda: tables.factors(runs_of("earlier"), "steps"),
  "earlier seconds": lambda: tables.factors(runs_of("earlier"), "seconds"),
  "earlier losses": lambda: tables.losses(runs_of("earlier")),
  "earlier BLEU": lambda: tables.scores(runs_of("earlier"), 1, 0),
  "earlier chrF++": lambda: tables.scores(runs_of("earlier"), 1, 1),
  "earlier BLEU, beam 4": lambda: tables.scores(runs_of("earlier"), 4, 0),
  "earlier BLEU factors": lambda: tables.bleu_factors(runs_of("earlier")),
  "earlier significance": lambda: _significance("earlier"),
  "earlier routing": lambda: tables.routing(runs_of("earlier")),
  "earlier experts": lambda: tables.experts(runs_of("earlier")),
  "earlier step times": lambda: tables.step_times(step_ms("earlier")),
  "long": lambda: tables.short(runs_of("long")),
  "quickstart": lambda: tables.short(
    reading.grouped(reading.read_set(reading.LOGS / "quickstart.jsonl.xz"))
  ),
  "settings tried": _settings_tried,
  **claim.TABLES,
  **search.TABLES,
  **other_data.TABLES,
}


def filled(text: str) -> str:
  """A page with its tables.

  Raises:
    KeyError: A table that is not of `TABLES`.
  """

  def fill(match: re.Match[str]) -> str:
    made = TABLES[match[1]]()
    return f"<!-- table {match[1]} -->\n{made}<!-- end -->"

  return re.sub(
    r"<!-- table (.+?) -->\n.*?<!-- end -->", fill, text, flags=re.S
  )


def summary() -> dict[str, Any]:
  """What README and docs quote: claim, search and other data."""
  return {
    **claim.summary(),
    **search.summary(),
    "other data": other_data.summary(),
  }


def main() -> None:
  """Writes the pages and figures."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=ROOT)
  options = parser.parse_args()
  for page in PAGES:
    path = options.out / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(filled((ROOT / page).read_text(encoding="utf-8")))
    print(f"wrote {path}")
  plots = options.out / "docs" / "plots"
  plots.mkdir(exist_ok=True)
  figures.plot_experts(runs_of("earlier"), plots / "experts.svg")
  twice = claim.named(claim.TWICE)
  shown = {
    "base, AdamW": search.adamw()["base"],
    **claim.runs(),
    **{f"{system}, 10,000": own for system, own in twice.items()},
  }
  figures.plot_losses(shown, "steps", plots / "claim.svg")
  figures.plot_losses(shown, "seconds", plots / "cost.svg")
  path = options.out / SUMMARY
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(summary(), indent=1) + "\n")


if __name__ == "__main__":
  main()
