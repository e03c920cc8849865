"""The claim: which runs it rests on, its tables, and `summary.json`."""

import collections
import dataclasses
import functools
import json
import lzma
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
# The layer as it was published, and its groups of 4 rows.
PUBLISHED = {"base_published": "base_published_m85"}
# The same in runs planned for 10,000 updates.
TWICE = {
  "base": "base_m85_10000",
  "base_static_5": "base_static_5_m85_10000",
  "recommended": "recipe_m85_10000",
}
MORE_DROPOUT = {
  "base, dropout 0.1": "base_m85_10000_d1",
  "base_static_5, dropout 0.1": "base_static_5_m85_10000_d1",
  "recommended, dropout 0.1": "recipe_m85_10000_d1",
  "base, 20,000, dropout 0.1": "base_m85_20000_d1",
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
# Milliseconds of a step, alone on an H100; the runs shared theirs by twos.
#   python benchmarks/training_step.py --width 384 --experts 16 --length 64
#     --vocabulary 8000 --shapes 6x256 --repeats 20 --optimizer NAME
STEP_MS = {
  "adamw": {"dense": 16.73, "BalancedRouter": 19.07},
  # The wide one was not timed on an H100; 1.73 times the sparse one, as in the
  # first study on an H200.
  "muon": {"dense": 17.40, "BalancedRouter": 22.71, "dense_wide": 39.30},
}


@functools.cache
def all_runs(name_of_set: str = SET) -> dict[str, reading.Finished]:
  """Every run of a set of `several.py`, by the name of its log."""
  found = {}
  by_run = scores(name_of_set)
  for one in reading.read_set(reading.LOGS / f"{name_of_set}.jsonl.xz"):
    name = f"{one.header['name']}_{one.seed}"
    found[name] = dataclasses.replace(one, scores=by_run.get(name, {}))
  return found


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
def runs() -> dict[str, list[reading.Finished]]:
  """Runs of the claim by system; whole ones only."""
  return named(MUON)


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


def with_published() -> dict[str, list[reading.Finished]]:
  """Runs of the claim, and of the layer as it was published."""
  return {**named(PUBLISHED), **runs()}


def halved() -> dict[str, list[reading.Finished]]:
  """Baselines of 10,000 updates, and the recipe planned for half of them."""
  baselines = {name: TWICE[name] for name in BASELINES}
  return named({**baselines, "recommended, 5,000": MUON["recommended"]})


def twice() -> dict[str, list[reading.Finished]]:
  """Runs planned for 10,000 updates or more, by system and dropout."""
  return named({**TWICE, **MORE_DROPOUT})


def significance() -> dict[str, dict[str, int]]:
  """Directions in which the recipe is better, worse and alike.

  With 5,000 and 10,000 updates and half of them, against each other system.
  """
  own, twice = MUON["recommended"], TWICE["recommended"]
  baselines = {name: TWICE[name] for name in BASELINES}
  return {
    **compared(own, MUON, "5,000, against"),
    **compared(twice, TWICE, "10,000, against"),
    **compared(own, baselines, "5,000, against 10,000 of"),
  }


def compared(
  own: str, others: Mapping[str, str], words: str, name_of_set: str = SET
) -> dict[str, dict[str, int]]:
  """Directions of each band that are better, worse and alike.

  Of the runs that log `own` names against those of each other one, by what a
  table calls these: `words` and the system.
  """
  bands = next(iter(all_runs(name_of_set).values())).bands
  found = {}
  for system, log in others.items():
    if log == own:
      continue
    outcomes = collections.Counter(
      f"{bands[record['test']]} {record['outcome']}"
      for record in _score_records(name_of_set)
      if record["run"] == own and record.get("against") == log
    )
    if not outcomes:
      raise ValueError(f"{name_of_set}: {own} was not compared with {log}")
    found[f"{words} {system}"] = dict(outcomes)
  return found


def summary() -> dict[str, Any]:
  """What README and docs quote, by updates, system and band."""
  return {
    "muon": summary_of(runs()),
    "muon, 10,000 updates": summary_of(twice()),
    "muon, half of 10,000 updates": summary_of(halved()),
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
    "dev_loss": _spread([float(one.loss(band).min()) for one in own]),
    "dev_loss_at_end": _spread([float(one.loss(band)[-1]) for one in own]),
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


def longest(names: Mapping[str, str]) -> dict[str, reading.Finished]:
  """The longest run of each log, the first of them, by what a table says."""
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
    (row(name, one) for name, one in longest(names).items()),
  )


def table_of_half_arrivals() -> str:
  """When each baseline reaches what the recipe has with half of its updates."""
  rows = []
  for planned, names in HALF_OF.items():
    *baselines, own = named(names).items()
    target = float(np.mean([one.loss("all").min() for one in own[1]]))
    for name, runs_of_it in baselines:
      for one in runs_of_it:
        losses = one.loss("all")
        needed = compare.reached(one.steps, losses, target)
        rows.append(
          [
            f"{name}, seed {one.seed}",
            f"{losses.min():.3f}",
            f"{one.steps[losses.argmin()]:,}",
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
  "claim losses": lambda: tables.losses(with_published()),
  "claim BLEU": lambda: tables.scores(with_published(), 1, 0),
  "claim chrF++": lambda: tables.scores(with_published(), 1, 1),
  "twice losses": lambda: tables.losses(twice()),
  "twice BLEU": lambda: tables.scores(twice(), 1, 0),
  "twice chrF++": lambda: tables.scores(twice(), 1, 1),
  "claim significance": lambda: tables.significance(significance()),
  "parts": lambda: table_of_bests(PARTS, "other than the recipe"),
}
