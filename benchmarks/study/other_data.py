"""The claim's systems on the corpus of `bible.py`: tables and a summary."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.study import claim, reading, tables

SET = "bible"  # Its runs are named as their systems are.
RECIPE = {"recommended": "recommended"}
SYSTEMS = {name: name for name in claim.BASELINES} | RECIPE


def runs() -> dict[str, list[reading.Finished]]:
  """Whole runs by system."""
  return claim.named(SYSTEMS, SET)


def significance() -> dict[str, dict[str, int]]:
  """Directions in which the recipe is better or worse than each baseline."""
  return {
    f"{name}, against {other}": counts
    for other in claim.BASELINES
    for name, counts in claim.outcomes(SET, RECIPE, other).items()
  }


def summary() -> dict[str, Any]:
  """What README and docs quote, by system and band."""
  return {SET: claim.summary_of(runs())}


TABLES: Mapping[str, Callable[[], str]] = {
  "Bibles": lambda: tables.short(runs()),
  "Bibles, fixed 5": lambda: tables.factors(runs(), "steps", "base_static_5"),
  "Bibles, chrF++": lambda: tables.scores(runs(), 1, 1),
  "Bibles, significance": lambda: tables.significance(significance()),
}
