"""The search for the recipe: runs of earlier settings, and their tables."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from basemt_jax.data import languages
from basemt_jax.inspection import compare
from benchmarks.study import claim, reading, tables

# Other settings: a decay of 0.6 (with a momentum of 0.85 for a fixed 5 only), a
# momentum of 0.9; before that a momentum of 0.95 and a dropout of 0.1, first
# with the cosine (each at the best rate tried), then with the inverse square
# root.
OTHER_SETTINGS = {
  "base_static_5, decay 0.6": "base_static_5_m85_w6",
  "base, momentum 0.9": "base_m90_d5_w3",
  "base_static_5, momentum 0.9": "base_static_5_m90_d5_w3",
  "recommended, momentum 0.9, top 3": "recipe_m90_d5_w3",
  "base, momentum 0.9, decay 0.6": "base_m90_d5_w6",
  "base_static_5, momentum 0.9, decay 0.6": "base_static_5_m90_d5_w6",
  "recommended, momentum 0.9, decay 0.6, top 3": "recipe_m90_d5_w6",
  "base, before": "base_cosine_6",
  "base_static_5, before": "base_static_5_cosine_6",
  "recommended, before": "recommended_cosine",
  "base, square root": "base_muon",
  "base_static_5, square root": "base_static_5_muon_6",
  "recommended, square root": "recommended",
}
ADAMW = {
  "dense": "dense",
  "dense_static_5": "dense_static_5",
  "base": "base",
  "base_static_5": "base_static_5",
  "back_at_70": "back_at_70",
  "recommended": "slowly_back",
}
# Runs of other lengths; all with the inverse square root, a momentum of 0.95
# and a dropout of 0.1. Those from 0.006 were cut off at 9,200.
LONG = {
  "base, 20,000": "base_muon_long",
  "base_static_5, 20,000, 0.003": "base_static_5_muon_long",
  "base_static_5, 10,000": "base_static_5_muon_6_10000",
  "recommended, 10,000, 0.003": "slowly_back_muon_10000",
  "recommended, 10,000": "recommended_10000",
}
# What differs from the recipe in runs of earlier ones, planned for 2,500.
EARLIER_PARTS = {
  "top 3": "half_m85_d5_w3",
  "top 3, momentum 0.9": "half_m90_d5_w3",
  "top 3, momentum 0.9, decay 0.6": "half_m90_d5_w6",
  "top 3, momentum 0.9, decay 0.6, from 0.012": "half_m90_d5_w6_12",
  "top 3, momentum 0.9, decay 0.6, back to 1": "half_m90_d5_w6_back_to_1",
  "top 3, momentum 0.9, decay 1": "half_m90_d5_w10",
  "top 3, momentum 0.8, decay 0.6": "half_m80_d5_w6",
  "top 3, momentum 0.9, dropout 0.1": "half_momentum_90",
  "top 3, momentum 0.95": "half_dropout_5",
  "top 3, momentum 0.95, no dropout": "half_dropout_0",
  "top 3, momentum 0.95, dropout 0.1": "recommended_2500_cosine",
  "top 3, momentum 0.95, dropout 0.1, decay 0.1": "half_decay_1",
  "top 3, momentum 0.95, dropout 0.1, from 0.012": "half_12",
  "top 3, momentum 0.95, dropout 0.1, warm-up 150": "half_warm_150",
  "top 3, momentum 0.95, dropout 0.1, groups of 256 rows": "half_groups_256",
  "top 4, back to 2, momentum 0.95, dropout 0.1": "half_top_4",
  "top 3, momentum 0.95, dropout 0.1, square root from 0.006": (
    "recommended_2500"
  ),
}


@functools.cache
def adamw() -> dict[str, list[reading.Finished]]:
  """Runs with AdamW, by system; whole ones only."""
  return claim.named(ADAMW)


def of_other_settings() -> dict[str, list[reading.Finished]]:
  """Runs with AdamW and of earlier settings, by system."""
  return {
    **{f"{system}, AdamW": own for system, own in adamw().items()},
    **claim.named(OTHER_SETTINGS),
  }


def beside_adamw() -> dict[str, list[reading.Finished]]:
  """The recipe beside systems with AdamW."""
  return {**adamw(), "recommended": claim.runs()["recommended"]}


def _heat(settings: Mapping[str, Any]) -> str:
  """A run's temperature in words: '1 to 3 at 20%, 1 at 70%'."""
  text = f"{settings['start']:g}"
  if settings["schedule"] == "linear":
    text += f" to {settings['end']:g} at {settings['heating_share']:.0%}"
  elif settings["schedule"] == "there_and_back":
    text += f" to {settings['top']:g} at {settings['heating_share']:.0%}"
    text += f", {settings['end']:g} at {settings['end_share']:.0%}"
  return text


def table_of_quickstart() -> str:
  """The quickstart with other temperatures."""
  found = claim.all_runs("quickstart_schedules")
  grouped = {name: [one] for name, one in found.items()}
  grouped["base"] = grouped.pop("base_0")

  def row(name: str, one: reading.Finished) -> list[str]:
    factors = reading.convergence(grouped, name, "all", "steps")
    tested = one.has_scores(1)
    return [
      _heat(one.header["settings"]),
      f"{one.header['settings']['dense_share']:.0%}",
      tables.factor(factors),
      f"{one.loss('all').min():.3f}",
      *(
        f"{one.score(band, 1)[0]:.1f}" if tested else ""
        for band in languages.BANDS
      ),
    ]

  return tables.table(
    [
      "temperature",
      "dense",
      "times fewer updates",
      "dev loss",
      *(f"BLEU {band}" for band in languages.BANDS),
    ],
    (row(name, own[0]) for name, own in grouped.items()),
  )


def table_of_all() -> str:
  """Every run of the search: what it changes, and losses on the way."""
  at = (1000, 2600, 5000)

  def row(name: str, one: reading.Finished) -> list[str]:
    settings, size = one.header["settings"], one.header["size"]
    whole = one.loss("all")
    losses = [
      f"{whole[int(np.flatnonzero(one.steps == step)[0])]:.3f}"
      if step in one.steps
      else ""
      for step in at
    ]
    last = [f"{one.loss(b)[-1]:.3f}" for b in languages.BANDS]
    return [
      name,
      _heat(settings),
      f"{settings['dense_share']:.0%}",
      f"{size['weight_decay']:g}",
      size["descent"],
      str(size["rows_per_group"]),
      str(int(one.steps[-1])),
      *losses,
      *last,
    ]

  return tables.table(
    [
      "run",
      "temperature",
      "dense",
      "decay",
      "optimizer",
      "rows",
      "steps",
      *(f"loss at {step}" for step in at),
      *(f"last, {band}" for band in languages.BANDS),
    ],
    (row(name, one) for name, one in claim.all_runs().items()),
  )


def with_plain_baselines() -> dict[str, list[reading.Finished]]:
  """The recipe beside the baselines of the first study.

  Those have neither averaged weights nor weight decay, and groups of 16 rows.
  """
  earlier = reading.by_system(
    reading.read_set(reading.LOGS / "earlier.jsonl.xz")
  )
  plain = {system: earlier[system] for system in claim.BASELINES}
  return {**plain, "recommended": claim.runs()["recommended"]}


def table_of_arrivals() -> str:
  """When the recipe reaches what a baseline of the long runs had, and when."""
  runs_by_name = claim.longest(LONG)
  recipe = runs_by_name["recommended, 10,000"]
  rows = []
  for name, base in runs_by_name.items():
    if base.system == recipe.system:
      continue
    for updates in (5000, 10_000, 15_000, 20_000):
      if base.steps[-1] < updates - 1000:  # Some were cut off before 10,000.
        continue
      loss = float(base.loss("all")[base.steps <= updates].min())
      at = int(base.steps[base.loss("all") <= loss][0])
      needed = compare.reached(recipe.steps, recipe.loss("all"), loss)
      rows.append(
        [
          name,
          f"{at:,}",
          f"{loss:.3f}",
          f"{needed:,.0f}" if needed else "never",
          f"{at / needed:.2f}" if needed else "–",
        ]
      )
  return tables.table(
    ["baseline", "after updates", "dev loss", "recipe", "times fewer"], rows
  )


def summary() -> dict[str, Any]:
  """Runs with AdamW and of earlier settings, by system and band."""
  return {
    "adamw": claim.summary_of(adamw()),
    "muon, other settings": claim.summary_of(
      {**claim.runs(), **claim.named(OTHER_SETTINGS)}
    ),
  }


TABLES: Mapping[str, Any] = {
  "earlier parts": lambda: claim.table_of_bests(
    EARLIER_PARTS, "other than the recipe"
  ),
  "other losses": lambda: tables.losses(of_other_settings()),
  "other BLEU": lambda: tables.scores(of_other_settings(), 1, 0),
  "other chrF++": lambda: tables.scores(of_other_settings(), 1, 1),
  "long runs": lambda: claim.table_of_bests(LONG, "system, planned for"),
  "long arrivals": table_of_arrivals,
  "AdamW updates": lambda: tables.factors(adamw(), "steps"),
  "AdamW updates, fixed 5": lambda: tables.factors(
    adamw(), "steps", "base_static_5"
  ),
  "recipe beside AdamW, seconds": lambda: tables.factors(
    beside_adamw(), "seconds"
  ),
  "plain updates": lambda: tables.factors(with_plain_baselines(), "steps"),
  "plain updates, fixed 5": lambda: tables.factors(
    with_plain_baselines(), "steps", "base_static_5"
  ),
  "recipe runs": table_of_all,
  "quickstart schedules": table_of_quickstart,
}
