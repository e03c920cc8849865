"""The claim's systems on other data: tables and a summary.

The corpus of `bible.py`, and the claim's languages to and from English apart.
"""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.study import claim, reading, tables

BIBLES = "bible"
ONE_WAY = {"to English": "to_english", "from English": "from_english"}
SYSTEMS = {name: claim.MUON[name] for name in (*claim.BASELINES, "recommended")}
SYSTEMS_ONE_WAY = {"dense_static_5": claim.MUON["dense_static_5"], **SYSTEMS}
MORE_DROPOUT = {
  "base, dropout 0.1": "base_m85_d1",
  "recommended, dropout 0.1": "recipe_m85_d1",
}
# With the inverse square root, a momentum of 0.95 and a dropout of 0.1; the
# logs are named as the systems are.
BEFORE = {name: name for name in SYSTEMS}


def runs(
  name_of_set: str, names: Mapping[str, str] = SYSTEMS
) -> dict[str, list[reading.Finished]]:
  """Whole runs by system, from the names of their logs."""
  return claim.named(names, name_of_set)


def significance(
  name_of_set: str, names: Mapping[str, str] = SYSTEMS
) -> dict[str, dict[str, int]]:
  """Directions in which the recipe is better or worse than each other."""
  own = names["recommended"]
  return claim.compared(own, names, "recommended, against", name_of_set)


def summary() -> dict[str, Any]:
  """What README and docs quote, by data, system and band."""
  return {
    BIBLES: claim.summary_of(runs(BIBLES)),
    **{
      name: claim.summary_of(runs(name, SYSTEMS_ONE_WAY))
      for name in ONE_WAY.values()
    },
  }


def _tables_one_way(title: str, name: str) -> dict[str, Callable[[], str]]:
  def found() -> dict[str, list[reading.Finished]]:
    return runs(name, SYSTEMS_ONE_WAY)

  return {
    title: lambda: tables.short(found()),
    f"{title}, chrF++": lambda: tables.scores(found(), 1, 1),
    f"{title}, significance": lambda: tables.significance(
      significance(name, SYSTEMS_ONE_WAY)
    ),
  }


TABLES: Mapping[str, Callable[[], str]] = {
  "Bibles": lambda: tables.short(runs(BIBLES, {**SYSTEMS, **MORE_DROPOUT})),
  "Bibles, before": lambda: tables.short(runs(BIBLES, BEFORE)),
  "Bibles, fixed 5": lambda: tables.factors(
    runs(BIBLES), "steps", "base_static_5"
  ),
  "Bibles, chrF++": lambda: tables.scores(runs(BIBLES), 1, 1),
  "Bibles, significance": lambda: tables.significance(significance(BIBLES)),
  **{
    title: make
    for name, set_of_runs in ONE_WAY.items()
    for title, make in _tables_one_way(name, set_of_runs).items()
  },
}
