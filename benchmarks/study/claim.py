"""The claim: which runs it rests on, its tables, and `summary.json`."""

import dataclasses
import functools
import json
import lzma
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax.data import languages
from basemt_jax.inspection import compare
from benchmarks.study import reading, tables

SET = "recipe"
BASELINES = ("base", "base_static_5")

# Systems of the claim and the names of their logs. All have Muon with a
# momentum of 0.85, a cosine from 0.009, a weight decay of 0.3, a dropout of
# 0.05, averaged weights and groups of 64 rows; temperature and network alone
# tell them apart.
MUON = {
  "dense": "dense_m85",
  "dense_static_5": "dense_static_5_m85",
  "dense_wide": "dense_wide_m85",
  "base": "base_m85",
  "base_static_5": "base_static_5_m85",
  "recommended": "recipe_m85",
}
# The same in runs planned for 10,000 updates.
TWICE = {
  "base": "base_m85_10000",
  "base_static_5": "base_static_5_m85_10000",
  "recommended": "recipe_m85_10000",
}
TWICE_MORE_DROPOUT = {
  "base, dropout 0.1": "base_m85_10000_d1",
  "base_static_5, dropout 0.1": "base_static_5_m85_10000_d1",
  "recommended, dropout 0.1": "recipe_m85_10000_d1",
}
# Other settings, given to all three: a decay of 0.6, a momentum of 0.9; before
# that a momentum of 0.95 and a dropout of 0.1, first with the cosine (each at
# the best rate tried), then with the inverse square root.
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
# and a dropout of 0.1. Those from 0.006 were cut off at 9,300.
LONG = {
  "base, 20,000": "base_muon_long",
  "base_static_5, 20,000, 0.003": "base_static_5_muon_long",
  "base_static_5, 10,000": "base_static_5_muon_6_10000",
  "recommended, 10,000, 0.003": "slowly_back_muon_10000",
  "recommended, 10,000": "recommended_10000",
}
# The recipe planned for half of the updates of the baselines, by theirs.
HALF_OF = {
  20_000: {
    "base, 20,000, dropout 0.1": "base_m85_20000_d1",
    "recommended, 10,000": "recipe_m85_10000",
  },
  10_000: {
    "base, 10,000": "base_m85_10000",
    "base_static_5, 10,000": "base_static_5_m85_10000",
    "recommended, 5,000": "recipe_m85",
  },
  5000: {
    "base, 5,000": "base_m85",
    "base_static_5, 5,000": "base_static_5_m85",
    "recommended, 2,500": "half_m85_top_2",
  },
}
LENGTHS = {**HALF_OF[20_000], **HALF_OF[10_000], **HALF_OF[5000]}
# What differs from the recipe, in runs planned for 2,500 updates.
PARTS = {
  "nothing": "half_m85_top_2",
  "no averaged weights": "half_without_averages",
  "AdamW, from 0.003": "half_with_adamw",
  "top 1.5": "half_m85_top_1.5",
  "top 2.5": "half_m85_top_2.5",
  "back to 1": "half_m85_top_2_to_1",
  "from 0.012": "half_m85_12",
  "no decay of norm scales and centroids": "half_m85_spared",
}
# The same of earlier recipes.
EARLIER_PARTS = {
  "top 3": "half_m85_d5_w3",
  "top 3, momentum 0.9": "half_m90_d5_w3",
  "top 3, momentum 0.9, decay 0.6": "half_m90_d5_w6",
  "the same, from 0.012": "half_m90_d5_w6_12",
  "the same, back to 1": "half_m90_d5_w6_back_to_1",
  "top 3, momentum 0.9, decay 1": "half_m90_d5_w10",
  "top 3, momentum 0.8, decay 0.6": "half_m80_d5_w6",
  "top 3, momentum 0.9, dropout 0.1": "half_momentum_90",
  "top 3, momentum 0.95": "half_dropout_5",
  "top 3, momentum 0.95, no dropout": "half_dropout_0",
  "top 3, momentum 0.95, dropout 0.1": "recommended_2500_cosine",
  "the same, decay 0.1": "half_decay_1",
  "the same, decay 0.3, from 0.012": "half_12",
  "the same, warm-up 150": "half_warm_150",
  "the same, groups of 256 rows": "half_groups_256",
  "the same, top 4, back to 2": "half_top_4",
  "the same, square root from 0.006, averages 0.999": "recommended_2500",
}
# Milliseconds of a step, alone on an H100; the runs shared theirs by twos.
#   python benchmarks/training_step.py --width 384 --experts 16 --length 64
#     --vocabulary 8000 --shapes 6x256 --repeats 20 --optimizer NAME
STEP_MS = {
  "adamw": {"dense": 16.73, "BalancedRouter": 19.07},
  # The wide one on an H200, from its log.
  "muon": {"dense": 17.40, "BalancedRouter": 22.71, "dense_wide": 30.24},
}


@functools.cache
def all_runs(name_of_set: str = SET) -> dict[str, reading.Finished]:
  """Every run of a set of `several.py`, by the name of its log."""
  named = {}
  for one in reading.read_set(reading.LOGS / f"{name_of_set}.jsonl.xz"):
    name = f"{one.header['name']}_{one.seed}"
    own = scores(name_of_set).get(name, {})
    named[name] = dataclasses.replace(one, scores=own)
  return named


@functools.cache
def _score_records(name_of_set: str) -> list[dict[str, Any]]:
  raw = (reading.LOGS / f"{name_of_set}_scores.jsonl.xz").read_bytes()
  return [json.loads(line) for line in lzma.decompress(raw).splitlines()]


def scores(
  name_of_set: str,
) -> dict[str, dict[tuple[int, str], tuple[float, float]]]:
  """BLEU and chrF++ by beam and direction, by the name of a log."""
  found: dict[str, dict[tuple[int, str], tuple[float, float]]] = {}
  for record in _score_records(name_of_set):
    if "bleu" in record:
      own = found.setdefault(f"{record['run']}_{record['seed']}", {})
      own[record["beam"], record["test"]] = record["bleu"], record["chrf"]
  return found


@functools.cache
def runs(descent: str = "muon") -> dict[str, list[reading.Finished]]:
  """Runs of the claim by system; whole ones only."""
  return named({"muon": MUON, "adamw": ADAMW}[descent])


def named(
  names: Mapping[str, str], name_of_set: str = SET
) -> dict[str, list[reading.Finished]]:
  """Whole runs by what a table calls them, from the names of their logs."""
  by_seed = sorted(all_runs(name_of_set).values(), key=lambda one: one.seed)
  found = {
    system: [
      reading.with_seconds(one, STEP_MS[one.header["size"]["descent"]])
      for one in by_seed
      if one.header["name"] == name
      and one.steps[-1] == one.header["size"]["train_steps"]
    ]
    for system, name in names.items()
  }
  return {k: v for k, v in found.items() if v}


def halved() -> dict[str, list[reading.Finished]]:
  """Baselines of 10,000 updates, and the recipe planned for half of them."""
  baselines = {name: TWICE[name] for name in BASELINES}
  return named({**baselines, "recommended, 5,000": MUON["recommended"]})


def twice() -> dict[str, list[reading.Finished]]:
  """Runs planned for 10,000 updates, by system and dropout."""
  return named({**TWICE, **TWICE_MORE_DROPOUT})


def of_other_settings() -> dict[str, list[reading.Finished]]:
  """Runs with AdamW and of earlier settings, by system."""
  return {
    **{f"{system}, AdamW": own for system, own in runs("adamw").items()},
    **named(OTHER_SETTINGS),
  }


def beside_adamw() -> dict[str, list[reading.Finished]]:
  """The recipe beside systems with AdamW."""
  return {**runs("adamw"), "recommended": runs()["recommended"]}


def significance() -> dict[str, dict[str, int]]:
  """Directions of each band that are better, worse and alike: the recipe's.

  With 5,000 and 10,000 updates and half of them, against each other system.
  """
  found = {}
  for lengths, own, others in (
    ("5,000", MUON, MUON),
    ("10,000", TWICE, TWICE),
    ("5,000 to 10,000", MUON, TWICE),
  ):
    for name, log in others.items():
      if name != "recommended":
        counts = outcomes(SET, {name: own["recommended"]}, log)
        found.update({f"{lengths}, {k}": v for k, v in counts.items()})
  return found


def outcomes(
  name_of_set: str, names: Mapping[str, str], other: str
) -> dict[str, dict[str, int]]:
  """Directions of each band that are better, worse and alike than a baseline.

  By what a table calls the systems, from the names of their logs; `other` is
  one, too.
  """
  bands = next(iter(all_runs(name_of_set).values())).bands
  systems = {name: system for system, name in names.items()}
  found: dict[str, dict[str, int]] = {s: {} for s in systems.values()}
  for record in _score_records(name_of_set):
    if record.get("against") == other and record["run"] in systems:
      counts = found[systems[record["run"]]]
      key = f"{bands[record['test']]} {record['outcome']}"
      counts[key] = counts.get(key, 0) + 1
  return {system: counts for system, counts in found.items() if counts}


def summary() -> dict[str, Any]:
  """What README and docs quote, by optimizer, system and band."""
  return {
    **{descent: summary_of(runs(descent)) for descent in STEP_MS},
    "muon, 10,000 updates": summary_of(twice()),
    "muon, half of 10,000 updates": summary_of(halved()),
    "muon, other settings": summary_of({**runs(), **named(OTHER_SETTINGS)}),
  }


def summary_of(found: reading.Runs) -> dict[str, Any]:
  """Some runs by system and band."""
  return {
    system: {
      "seeds": [one.seed for one in own],
      **{band: _summary(found, system, band) for band in reading.BANDS},
    }
    for system, own in found.items()
  }


def _summary(
  found_runs: reading.Runs, system: str, band: str
) -> dict[str, Any]:
  own = found_runs[system]
  found: dict[str, Any] = {
    "dev_loss": _spread([float(one.loss(band).min()) for one in own])
  }
  for baseline in BASELINES:
    for axis in ("steps", "seconds"):
      factors = reading.convergence(found_runs, system, band, axis, baseline)
      if factors:
        found[f"times_fewer_{axis}_than_{baseline}"] = _spread(factors)
  tested = [one for one in own if one.has_scores(1)]
  for index, metric in enumerate(("bleu", "chrf")):
    if tested:
      found[metric] = _spread([one.score(band, 1)[index] for one in tested])
  return found


def _spread(values: Sequence[float]) -> dict[str, float]:
  """Mean, and the standard deviation where there are several."""
  found = {"mean": round(float(np.mean(values)), 4)}
  if len(values) > 1:
    found["spread"] = round(float(np.std(values, ddof=1)), 4)
  return found


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
  found = all_runs("quickstart_schedules")
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
    (row(name, one) for name, one in all_runs().items()),
  )


def with_plain_baselines() -> dict[str, list[reading.Finished]]:
  """The recipe beside the baselines of the first study.

  Those have neither averaged weights nor weight decay, and groups of 16 rows.
  """
  earlier = reading.by_system(
    reading.read_set(reading.LOGS / "earlier.jsonl.xz")
  )
  plain = {system: earlier[system] for system in BASELINES}
  return {**plain, "recommended": runs()["recommended"]}


def long_runs(names: Mapping[str, str]) -> dict[str, reading.Finished]:
  """The longest run of each log, of the first seed, by what a table says."""
  by_log: dict[str, reading.Finished] = {}
  for one in all_runs().values():
    kept = by_log.setdefault(one.header["name"], one)
    if one.steps[-1] > kept.steps[-1]:
      by_log[one.header["name"]] = one
  return {called: by_log[name] for called, name in names.items()}


def table_of_bests(names: Mapping[str, str], first: str) -> str:
  """Best dev losses of the first seeds of some logs, and when they came."""

  def row(name: str, one: reading.Finished) -> list[str]:
    best = int(one.loss("all").argmin())
    return [
      name,
      f"{one.steps[best]:,}",
      *(f"{one.loss(band)[best]:.3f}" for band in reading.BANDS),
    ]

  return tables.table(
    [first, "best at", *reading.BANDS],
    (row(name, one) for name, one in long_runs(names).items()),
  )


def table_of_arrivals() -> str:
  """When the recipe reaches what a baseline of the long runs had, and when."""
  runs_by_name = long_runs(LONG)
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


def table_of_half_arrivals() -> str:
  """When each baseline reaches what the recipe has with half of its updates."""
  rows = []
  for planned, names in HALF_OF.items():
    *baselines, own = named(names).items()
    target = float(np.mean([one.loss("all").min() for one in own[1]]))
    for name, runs_of_it in baselines:
      for one in runs_of_it:
        needed = compare.reached(one.steps, one.loss("all"), target)
        best = one.loss("all")
        rows.append(
          [
            f"{name}, seed {one.seed}",
            f"{best.min():.3f}",
            f"{one.steps[best.argmin()]:,}",
            f"{planned // 2:,}",
            f"{target:.3f}",
            f"{needed:,.0f}" if needed else "never",
          ]
        )
  return tables.table(
    ["baseline", "its best", "at", "recipe, planned for", "has", "reached at"],
    rows,
  )


TABLES: Mapping[str, Any] = {
  "claim updates": lambda: tables.factors(runs(), "steps"),
  "claim updates, fixed 5": lambda: tables.factors(
    runs(), "steps", "base_static_5"
  ),
  "half arrivals": table_of_half_arrivals,
  "half updates": lambda: tables.factors(halved(), "steps"),
  "half updates, fixed 5": lambda: tables.factors(
    halved(), "steps", "base_static_5"
  ),
  "lengths": lambda: table_of_bests(LENGTHS, "system, planned for"),
  "claim losses": lambda: tables.losses(runs()),
  "claim BLEU": lambda: tables.scores(runs(), 1, 0),
  "claim chrF++": lambda: tables.scores(runs(), 1, 1),
  "twice losses": lambda: tables.losses(twice()),
  "twice BLEU": lambda: tables.scores(twice(), 1, 0),
  "twice chrF++": lambda: tables.scores(twice(), 1, 1),
  "claim significance": lambda: tables.significance(significance()),
  "parts": lambda: table_of_bests(PARTS, "other than the recipe"),
  "earlier parts": lambda: table_of_bests(
    EARLIER_PARTS, "other than the recipe"
  ),
  "other losses": lambda: tables.losses(of_other_settings()),
  "other BLEU": lambda: tables.scores(of_other_settings(), 1, 0),
  "other chrF++": lambda: tables.scores(of_other_settings(), 1, 1),
  "long runs": lambda: table_of_bests(LONG, "system, planned for"),
  "long arrivals": table_of_arrivals,
  "AdamW updates": lambda: tables.factors(runs("adamw"), "steps"),
  "AdamW updates, fixed 5": lambda: tables.factors(
    runs("adamw"), "steps", "base_static_5"
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
