"""The claim's systems on the corpus of `bible.py`: tables and a summary."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.study import claim, reading, tables

SET = "bible"
SYSTEMS = {name: claim.MUON[name] for name in (*claim.BASELINES, "recommended")}
# With the inverse square root, a momentum of 0.95 and a dropout of 0.1; the
# logs are named as the systems are.
BEFORE = {name: name for name in SYSTEMS}


def runs(
  names: Mapping[str, str] = SYSTEMS,
) -> dict[str, list[reading.Finished]]:
  """Whole runs by system, from the names of their logs."""
  return claim.named(names, SET)


def significance() -> dict[str, dict[str, int]]:
  """Directions in which the recipe is better or worse than each baseline."""
  return {
    f"recommended, against {other}": claim.outcomes(
      SET, SYSTEMS, SYSTEMS[other]
    )["recommended"]
    for other in claim.BASELINES
  }


def summary() -> dict[str, Any]:
  """What README and docs quote, by system and band."""
  return {SET: claim.summary_of(runs())}


TABLES: Mapping[str, Callable[[], str]] = {
  "Bibles": lambda: tables.short(runs()),
  "Bibles, before": lambda: tables.short(runs(BEFORE)),
  "Bibles, fixed 5": lambda: tables.factors(runs(), "steps", "base_static_5"),
  "Bibles, chrF++": lambda: tables.scores(runs(), 1, 1),
  "Bibles, significance": lambda: tables.significance(significance()),
}
