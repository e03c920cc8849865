"""The tables of the report, as Markdown."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax.data import languages
from benchmarks.study.reading import (
  BANDS,
  BASELINE,
  Finished,
  Runs,
  bleu_convergence,
  changes,
  convergence,
  size_changes,
)

_BANDS = languages.BANDS


def mean_spread(values: Iterable[float]) -> str:
  """Mean and standard deviation, '12.3 ± 0.4'; the mean alone for one."""
  values = list(values)
  text = f"{statistics.mean(values):.2f}"
  if len(values) > 1:
    text += f" ± {statistics.stdev(values):.2f}"
  return text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table, first column left, others right."""
  lines = [header, ["--", *["--:"] * (len(header) - 1)], *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def factor(values: Sequence[float] | None) -> str:
  """A factor, '2.10 ± 0.10'; a dash where base's best loss is never reached."""
  return "–" if values is None else mean_spread(values)


def specialisation(shares: np.ndarray) -> float:
  """Mutual information of language and expert, in nats; languages weigh alike.

  Args:
    shares: [languages, E] of each language's tokens, at test time.
  """
  shares = shares / shares.sum(axis=1, keepdims=True)
  mean = shares.mean(axis=0, keepdims=True)
  ratio = np.divide(shares, mean, where=shares > 0, out=np.ones_like(shares))
  return float((shares * np.log(ratio)).sum(axis=1).mean())


def _those(runs: Runs, wanted: Callable[[Finished], Any]) -> Runs:
  """Runs of which something is known, and their systems."""
  known = {s: [r for r in own if wanted(r)] for s, own in runs.items()}
  return {system: own for system, own in known.items() if own}


def systems_of(runs: Runs) -> str:
  """What tells the systems apart."""

  def row(system: str, own: Sequence[Finished]) -> list[str]:
    settings = own[0].header["settings"]
    temperature = f"{settings['start']:g}"
    if settings["schedule"] != "constant":
      temperature += f" to {settings['end']:g}, {settings['schedule']}"
    return [
      system,
      str(len(own)),
      f"{settings['learning_rate']:g}",
      f"{settings['dense_share']:.0%}",
      temperature,
    ]

  return table(
    ["system", "seeds", "learning rate", "dense steps", "temperature"],
    (row(system, own) for system, own in runs.items()),
  )


def factors(runs: Runs, axis: str, baseline: str = BASELINE) -> str:
  """How many times fewer updates or seconds than a baseline, by band."""
  return table(
    ["system", "seeds", *BANDS],
    (
      [
        system,
        str(len(own)),
        *(factor(convergence(runs, system, b, axis, baseline)) for b in BANDS),
      ]
      for system, own in runs.items()
    ),
  )


def losses(runs: Runs) -> str:
  """Best dev loss of each band."""
  return table(
    ["system", *BANDS],
    (
      [s, *(mean_spread(r.loss(b).min() for r in own) for b in BANDS)]
      for s, own in runs.items()
    ),
  )


def scores(runs: Runs, beam: int, metric: int) -> str:
  """BLEU (0) or chrF++ (1) of each band, of runs that were translated so."""
  tested = _those(runs, lambda r: r.has_scores(beam))
  return table(
    ["system", "seeds", *BANDS],
    (
      [
        s,
        str(len(own)),
        *(mean_spread(r.score(b, beam)[metric] for r in own) for b in BANDS),
      ]
      for s, own in tested.items()
    ),
  )


def bleu_factors(runs: Runs) -> str:
  """How many times fewer updates to the baseline's best dev BLEU."""
  return table(
    ["system", *BANDS],
    (
      [system, *(factor(bleu_convergence(runs, system, b)) for b in BANDS)]
      for system, own in runs.items()
      if any(one.bleu["all"] for one in own)
    ),
  )


def significance(found: Mapping[str, Mapping[str, Any]]) -> str:
  """Directions of each band that are better, worse or alike."""
  columns = [
    f"{band} {outcome}"
    for band in _BANDS
    for outcome in ("better", "worse", "alike")
  ]
  return table(
    ["system", *columns],
    ([s, *(str(c.get(x, 0)) for x in columns)] for s, c in found.items()),
  )


def routing(runs: Runs) -> str:
  """Dev loss at the end if prices count at test time, and if they do not."""
  priced = _those(runs, lambda r: r.by_affinity)
  return table(
    ["system", "with prices", "by affinity"],
    (
      [
        s,
        mean_spread(r.loss("all")[-1] for r in own),
        mean_spread(float(np.mean(list(r.by_affinity.values()))) for r in own),
      ]
      for s, own in priced.items()
    ),
  )


def experts(runs: Runs) -> str:
  """Mutual information of language and expert, by layer."""
  sparse = _those(runs, lambda r: r.experts)
  layers = sorted(next(iter(sparse.values()))[0].experts) if sparse else []
  return table(
    ["system", *layers],
    (
      [
        s,
        *(
          f"{np.mean([specialisation(r.experts[n][1]) for r in own]):.2f}"
          for n in layers
        ),
      ]
      for s, own in sparse.items()
    ),
  )


def step_times(step_ms: Mapping[str, float]) -> str:
  """Milliseconds of a training step of each network."""
  return table(["network", "ms"], ([n, f"{t:.1f}"] for n, t in step_ms.items()))


def short(runs: Runs) -> str:
  """Best dev losses, factors of updates and BLEU, in one table."""
  names = [f"factor {band}" for band in BANDS]
  bleu = [f"BLEU {band}" for band in _BANDS]

  def tested_scores(own: Sequence[Finished]) -> list[str]:
    tested = [r for r in own if r.has_scores(1)]
    if not tested:
      return ["" for _ in _BANDS]
    return [mean_spread(r.score(b, 1)[0] for r in tested) for b in _BANDS]

  return table(
    ["system", "seeds", *BANDS, *names, *bleu],
    (
      [
        s,
        str(len(own)),
        *(mean_spread(r.loss(b).min() for r in own) for b in BANDS),
        *(factor(convergence(runs, s, b, "steps")) for b in BANDS),
        *tested_scores(own),
      ]
      for s, own in runs.items()
    ),
  )


def settings_tried(runs: Iterable[Finished], like: Finished) -> str:
  """Runs of other settings, at their last evaluation."""
  rows = []
  for one in runs:
    found = {**size_changes(one, like), **changes(one)}
    tested = one.has_scores(1)
    rows.append(
      [
        one.system,
        str(one.seed),
        ", ".join(f"{k} {v}" for k, v in found.items()) or "none",
        str(int(one.steps[-1])),
        *(f"{one.loss(band)[-1]:.3f}" for band in BANDS),
        *(f"{one.score(b, 1)[0]:.1f}" if tested else "" for b in _BANDS),
      ]
    )
  bleu = [f"BLEU {band}" for band in _BANDS]
  return table(
    ["system", "seed", "changes", "step", *BANDS, *bleu], sorted(rows)
  )
