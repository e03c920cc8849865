"""Renders the study's report from its logs: tables, plots, convergence.

    PYTHONPATH=. python benchmarks/study_report.py --logs docs/study

Writes docs/results.md (`--out`) and its plots. With the translations at hand
(`--translations runs/study/translations --store DIR`) the paired bootstrap is
made again and kept beside the logs as `bootstrap.json`.

Folders beside the logs: `long` holds runs of the same systems in another size,
all of it the same; `quickstart` those of `quickstart.py`; `pilot` runs of any
settings.

The convergence factor of a system is the number of updates that `base` takes to
its best dev loss, over the number that the system takes to reach the same loss;
likewise for seconds. The dense phase counts. Runs may have shared a GPU, so
that their own clocks say little: seconds are updates times the time of a step
in the fastest tenth of the logged windows of the same network.
"""

import argparse
import dataclasses
import gzip
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from basemt_jax import evaluation, steps, trained
from basemt_jax.data import languages, row_store
from benchmarks import study

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# Files are the same every time.
plt.rcParams["svg.hashsalt"] = "study"

BASELINE = "base"
_BANDS = languages.BANDS
BANDS = ("all", *_BANDS)


@dataclasses.dataclass(frozen=True)
class Finished:
  """One run's log.

  Attributes:
    system: Its name.
    seed: Its seed.
    header: Device, versions, size, settings.
    steps: [K] of the evaluations.
    seconds: [K] of training until then, without compiling, converting and
      saving, as told above; not known (NaN) until `with_seconds`.
    losses: Direction to dev losses [K], nats per token.
    pairs: Direction to training pairs.
    bands: Direction to 'high', 'mid' or 'low'.
    scores: (Beam, direction) to (BLEU, chrF++).
    experts: Layer to (languages, shares [languages, E]).
    windows: (Network, steps per second) of each logged window.
    by_affinity: Direction to dev loss at the end if prices do not count.
    bleu: Band to (step, BLEU) of some dev sentences; empty where not measured.
  """

  system: str
  seed: int
  header: Mapping[str, Any]
  steps: np.ndarray
  seconds: np.ndarray
  losses: Mapping[str, np.ndarray]
  pairs: Mapping[str, int]
  bands: Mapping[str, str]
  scores: Mapping[tuple[int, str], tuple[float, float]]
  experts: Mapping[str, tuple[Sequence[str], np.ndarray]]
  windows: Sequence[tuple[str, float]]
  by_affinity: Mapping[str, float]
  bleu: Mapping[str, Sequence[tuple[int, float]]]

  def members(self, band: str) -> list[str]:
    """The directions of a band, or all."""
    return [d for d, b in self.bands.items() if band in ("all", b)]

  def loss(self, band: str) -> np.ndarray:
    """Mean dev loss [K] of a band; every direction counts the same."""
    return np.mean([self.losses[d] for d in self.members(band)], axis=0)

  def has_scores(self, beam: int) -> bool:
    """Whether all of the test set was translated so."""
    return all((beam, d) in self.scores for d in self.bands)

  def score(self, band: str, beam: int) -> tuple[float, float]:
    """Mean BLEU and chrF++ of a band."""
    values = [self.scores[beam, d] for d in self.members(band)]
    bleu, chrf = np.mean(values, axis=0)
    return float(bleu), float(chrf)


Runs = Mapping[str, Sequence[Finished]]  # By system.


def read(path: pathlib.Path) -> Finished:
  """Reads the log of a run that has trained; its tests may be missing."""
  header, *records = (
    json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
  )
  evaluations = [r for r in records if "dev/loss" in r]
  tests = [r for r in records if "test" in r]
  prefix = "dev/loss/"
  directions = [
    name.removeprefix(prefix)
    for name in evaluations[0]
    if name.startswith(prefix)
  ]
  dense_steps = _dense_steps(header)
  pairs = header["pairs"]
  bands = study.BANDS
  if "bands" in header:
    bands = languages.BandThresholds(**header["bands"])
  return Finished(
    header["system"],
    header["seed"],
    header,
    np.array([r["step"] for r in evaluations]),
    np.full(len(evaluations), np.nan),
    {d: np.array([r[prefix + d] for r in evaluations]) for d in directions},
    pairs,
    {d: languages.band(n, bands) for d, n in pairs.items()},
    {(r["beam"], r["test"]): (r["bleu"], r["chrf"]) for r in tests},
    {
      r["layer"]: (r["languages"], np.array(r["expert_shares"]))
      for r in records
      if "layer" in r
    },
    [
      (
        "dense" if r["step"] <= dense_steps else header["network"],
        r["steps_per_second"],
      )
      for r in records
      if "steps_per_second" in r
    ],
    next(
      (
        r["dev_losses_by_affinity"]
        for r in records
        if "dev_losses_by_affinity" in r
      ),
      {},
    ),
    {
      band: [(r["step"], r[name]) for r in records if name in r]
      for band in BANDS
      for name in [f"dev/bleu/{band}"]
    },
  )


def _dense_steps(header: Mapping[str, Any]) -> int:
  share = header["settings"]["dense_share"]
  return steps.share_of(header["size"]["train_steps"], share)


def step_times(runs: Iterable[Finished]) -> dict[str, float]:
  """Milliseconds of a step of each network, from the fastest windows."""
  speeds: dict[str, list[float]] = {}
  for one in runs:
    for network, speed in one.windows:
      speeds.setdefault(network, []).append(speed)
  return {n: 1e3 / float(np.quantile(v, 0.9)) for n, v in speeds.items()}


def seconds(
  header: Mapping[str, Any], updates: np.ndarray, step_ms: Mapping[str, float]
) -> np.ndarray:
  """Of training until some updates; the dense phase goes at its own speed."""
  dense = _dense_steps(header)
  milliseconds = np.maximum(updates - dense, 0) * step_ms[header["network"]]
  if dense:  # A log without any knows no dense step's time.
    milliseconds += np.minimum(updates, dense) * step_ms["dense"]
  return milliseconds / 1e3


def with_seconds(one: Finished, step_ms: Mapping[str, float]) -> Finished:
  """The run with its clock."""
  return dataclasses.replace(
    one, seconds=seconds(one.header, one.steps, step_ms)
  )


def reached(x: np.ndarray, losses: np.ndarray, target: float) -> float | None:
  """Where a curve first is at or below a loss, interpolated; None: nowhere."""
  below = np.flatnonzero(losses <= target)
  if not below.size:
    return None
  i = int(below[0])
  if i == 0:
    return float(x[0])
  share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
  return float(x[i - 1] + share * (x[i] - x[i - 1]))


def convergence(
  runs: Runs, system: str, band: str, axis: str
) -> list[float] | None:
  """How many times fewer updates or seconds than base to base's best loss.

  Args:
    runs: Of all systems; a run is compared with base's of the same seed, if
      there is one, else with base's first.
    system: Its name.
    band: See `BANDS`.
    axis: 'steps' or 'seconds'.

  Returns:
    The factor of every run; None where one of them never gets there.
  """
  factors = []
  for own in runs[system]:
    bases = runs[BASELINE]
    base = next((r for r in bases if r.seed == own.seed), bases[0])
    target = float(base.loss(band).min())
    needed = reached(getattr(own, axis), own.loss(band), target)
    whole = reached(getattr(base, axis), base.loss(band), target)
    if needed is None or whole is None:
      return None
    factors.append(whole / needed)
  return factors


def bleu_convergence(runs: Runs, system: str, band: str) -> list[float] | None:
  """As `convergence` in updates, for dev BLEU, of runs that measured it.

  Base's best is that of the same seed, or of its first that measured any.
  """
  bases = {r.seed: r.bleu[band] for r in runs[BASELINE] if r.bleu[band]}
  factors = []
  for own in runs[system]:
    if not own.bleu[band] or not bases:
      continue
    base = bases.get(own.seed, next(iter(bases.values())))
    target = max(value for _, value in base)
    needed, whole = (
      reached(updates, -values, -target)
      for updates, values in (
        np.array(b, float).T for b in (own.bleu[band], base)
      )
    )
    if needed is None or whole is None:
      return None
    factors.append(whole / needed)
  return factors or None


def mean_spread(values: Iterable[float]) -> str:
  """'12.3 ± 0.4': mean and standard deviation; the mean alone for one."""
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
  """'2.10 ± 0.10', or a dash where base's best loss is never reached."""
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


def changes(one: Finished) -> dict[str, Any]:
  """Settings in which a run differs from the system of its name."""
  usual = study.settings_of(study.SYSTEMS[one.system])
  settings: Mapping[str, Any] = one.header["settings"]
  return {k: v for k, v in settings.items() if v != usual.get(k)}


def size_changes(one: Finished, like: Finished) -> dict[str, Any]:
  """What a run's size differs in from another's."""
  size: Mapping[str, Any] = one.header["size"]
  return {k: v for k, v in size.items() if v != like.header["size"].get(k)}


def runs_in(folder: pathlib.Path) -> dict[str, list[Finished]]:
  """A folder's runs, by system; empty where there is none of the baseline."""
  runs = {
    name: [read(path) for path in sorted(folder.glob(f"{name}_[0-9].jsonl"))]
    for name in study.SYSTEMS
  }
  return {k: v for k, v in runs.items() if v} if runs[BASELINE] else {}


def finished_runs(folder: pathlib.Path) -> dict[str, list[Finished]]:
  """`runs_in` a folder, of one size and of `study.SYSTEMS`' settings.

  Raises:
    SystemExit: A run has another size or other settings.
  """
  runs = runs_in(folder)
  for one in (one for own in runs.values() for one in own):
    if other := {**size_changes(one, runs[BASELINE][0]), **changes(one)}:
      raise SystemExit(
        f"{folder}: {one.system}, seed {one.seed}, has other settings than "
        f"study.SYSTEMS and the run of {BASELINE}: {other}; move its log to "
        "the logs' folder pilot"
      )
  return runs


def pilots(paths: Iterable[pathlib.Path], like: Finished) -> list[list[str]]:
  """Rows of the table of other settings, at their last evaluation."""
  rows = []
  for path in paths:
    one = read(path)
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
  return sorted(rows)


# -------------------------------------------------------------------- plots


def colours(systems: Sequence[str]) -> dict[str, Any]:
  """A colour for each system, the same in all plots."""
  palette = plt.get_cmap("tab20")
  return {system: palette(i % 20) for i, system in enumerate(systems)}


def plot_losses(runs: Runs, axis: str, path: pathlib.Path) -> None:
  """Dev loss of each band against updates or seconds; seeds are averaged."""
  figure, axes = plt.subplots(
    1, len(BANDS), figsize=(16, 4.6), layout="constrained"
  )
  shades = colours(list(runs))
  for ax, band in zip(axes, BANDS, strict=True):
    for system, own in runs.items():
      x = np.mean([getattr(r, axis) for r in own], axis=0)
      curves = np.array([r.loss(band) for r in own])
      ax.plot(x, curves.mean(axis=0), label=system, color=shades[system])
      if len(own) > 1:
        ax.fill_between(
          x,
          curves.min(axis=0),
          curves.max(axis=0),
          color=shades[system],
          alpha=0.15,
          linewidth=0,
        )
    best = np.mean([r.loss(band).min() for r in runs[BASELINE]])
    ax.axhline(best, color="black", linewidth=0.7, linestyle=":")
    low = min(r.loss(band).min() for own in runs.values() for r in own)
    ax.set_ylim(low - 0.05, low + 1.5)
    ax.set_title(f"{band} (dotted: best of {BASELINE})")
    ax.set_xlabel("updates" if axis == "steps" else "seconds of training")
    ax.grid(alpha=0.3)
  axes[0].set_ylabel("dev loss, nats per token")
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6
  )
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


def plot_bleu(
  runs: Runs,
  step_ms: Mapping[str, float],
  path: pathlib.Path,
) -> None:
  """Dev BLEU of each band against updates and seconds, of measured runs."""
  figure, axes = plt.subplots(
    2, len(BANDS), figsize=(16, 8), sharey="col", layout="constrained"
  )
  shades = colours(list(runs))
  for column, band in zip(axes.T, BANDS, strict=True):
    for system, own in runs.items():
      for one in own:
        if not one.bleu[band]:
          continue
        updates, values = np.array(one.bleu[band], float).T
        clock = seconds(one.header, updates, step_ms)
        for ax, x in zip(column, (updates, clock), strict=True):
          ax.plot(x, values, label=system, color=shades[system])
    column[0].set_title(band)
    column[0].set_xlabel("updates")
    column[1].set_xlabel("seconds of training")
    for ax in column:
      ax.grid(alpha=0.3)
  axes[0, 0].set_ylabel("dev BLEU")
  axes[1, 0].set_ylabel("dev BLEU")
  lines, names = axes[0, 0].get_legend_handles_labels()
  of_name = dict(zip(names, lines, strict=True))  # One line a system.
  figure.legend(
    of_name.values(), of_name.keys(), loc="outside lower center", ncols=6
  )
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


def plot_experts(runs: Runs, path: pathlib.Path) -> None:
  """Share of each language's tokens at each expert, by system and layer.

  Of the systems in the claim, first seeds.
  """
  shown = [
    own[0]
    for system, own in runs.items()
    if own[0].experts and study.SYSTEMS[system].beam
  ]
  layers = sorted({layer for r in shown for layer in r.experts})
  if not shown:
    return
  figure, axes = plt.subplots(
    len(shown),
    len(layers),
    figsize=(4 * len(layers), 3.4 * len(shown)),
    squeeze=False,
    layout="constrained",
  )
  for row, one in zip(axes, shown, strict=True):
    for ax, layer in zip(row, layers, strict=True):
      languages, shares = one.experts[layer]
      image = ax.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
      ax.set_yticks(range(len(languages)), languages, fontsize=7)
      ax.set_xlabel("expert", fontsize=8)
      ax.set_title(f"{one.system}\n{layer}", fontsize=8)
      figure.colorbar(image, ax=ax, label="share of tokens")
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


# ---------------------------------------------------------------- bootstrap


def bootstrap(
  runs: Runs,
  translations: pathlib.Path,
  store_dir: str,
  beam: int = 1,
) -> dict[str, dict[str, Any]]:
  """Directions of each band that a system translates better, worse, alike.

  Paired bootstrap on BLEU against the baseline's translations of the same
  seed, p < 0.05; counts are over the seeds whose translations are there. `bleu`
  holds their means of all directions, the baseline's and the system's.
  """
  store = row_store.RowStore(store_dir)
  references = {
    text.direction: text.references
    for text in trained.direction_texts(store, "test")
  }

  def hypotheses(one: Finished) -> dict[str, list[str]] | None:
    path = translations / f"{one.system}_{one.seed}_beam{beam}.json.gz"
    if not path.exists():
      return None
    with gzip.open(path, "rt") as file:
      return json.load(file)

  result: dict[str, dict[str, Any]] = {}
  for system, own in runs.items():
    if system == BASELINE:
      continue
    counts: dict[str, Any] = {}
    for one in own:
      base = next((r for r in runs[BASELINE] if r.seed == one.seed), None)
      pair = None if base is None else (hypotheses(base), hypotheses(one))
      if pair is None or None in pair:
        continue
      scores = []
      for direction, band in one.bands.items():
        bleu = evaluation.paired_bootstrap(
          pair[0][direction],  # type: ignore[index]
          pair[1][direction],  # type: ignore[index]
          references[direction],
          languages.Direction.parse(direction).target,
        )[0]
        outcome = "alike"
        if bleu.p_value < 0.05:
          outcome = "better" if bleu.system > bleu.baseline else "worse"
        key = f"{band} {outcome}"
        counts[key] = counts.get(key, 0) + 1
        scores.append((bleu.baseline, bleu.system))
      means = np.mean(scores, axis=0).round(3).tolist()
      counts.setdefault("bleu", {})[str(one.seed)] = means
    if counts:
      result[system] = counts
  return result


def is_of(
  significance: Mapping[str, Mapping[str, Any]],
  runs: Runs,
) -> bool:
  """Whether `bootstrap`'s translations are those that the logs scored.

  Both hold BLEU to three digits, so that means agree to 0.001.
  """
  scores = {
    (one.system, str(one.seed)): one.score("all", 1)[0]
    for own in runs.values()
    for one in own
    if one.has_scores(1)
  }
  return all(
    abs(scores.get((name, seed), np.inf) - mean) < 0.002
    for system, counts in significance.items()
    for seed, means in counts["bleu"].items()
    for name, mean in zip((BASELINE, system), means, strict=True)
  )


# ------------------------------------------------------------------- report


def system_section(runs: Runs) -> list[str]:
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

  return [
    "## Systems\n",
    "Where there are several seeds, the tables below hold means and standard "
    "deviations.\n",
    table(
      ["system", "seeds", "learning rate", "dense steps", "temperature"],
      (row(system, own) for system, own in runs.items()),
    ),
  ]


def convergence_section(runs: Runs) -> list[str]:
  """Factors, in updates and in seconds."""
  result = ["## Convergence\n"]
  for axis, text, also in (
    ("steps", "How many times fewer updates", ""),
    (
      "seconds",
      "How many times fewer seconds of training",
      "Seconds are updates times the time of a step, below: the runs shared "
      "GPUs.\n",
    ),
  ):
    result += [
      f"{text} than `base` to reach `base`'s best dev loss, of the\nsame seed "
      "where there is one; the dense phase counts. A dash: a seed never does.\n"
      + also,
      table(
        ["system", "seeds", *BANDS],
        (
          [
            system,
            str(len(own)),
            *(factor(convergence(runs, system, b, axis)) for b in BANDS),
          ]
          for system, own in runs.items()
        ),
      ),
    ]
  return result


def loss_section(runs: Runs, plots: str) -> list[str]:
  """Best dev losses, and their curves."""
  return [
    "## Best dev loss\n",
    table(
      ["system", *BANDS],
      (
        [s, *(mean_spread(r.loss(b).min() for r in own) for b in BANDS)]
        for s, own in runs.items()
      ),
    ),
    f"![Dev loss against updates]({plots}/loss_updates.svg)\n",
    f"![Dev loss against seconds]({plots}/loss_seconds.svg)\n",
  ]


def score_section(runs: Runs) -> list[str]:
  """BLEU and chrF++ of each band, for every kind of search."""
  beams = sorted({b for own in runs.values() for r in own for b, _ in r.scores})
  result = []
  for beam in beams:
    search = "greedy search" if beam == 1 else f"beam {beam}"
    tested = {
      s: [r for r in own if r.has_scores(beam)] for s, own in runs.items()
    }
    for index, metric in enumerate(("BLEU", "chrF++")):
      result += [
        f"## Test {metric}, {search}\n",
        table(
          ["system", "seeds", *BANDS],
          (
            [
              system,
              str(len(own)),
              *(
                mean_spread(r.score(b, beam)[index] for r in own) for b in BANDS
              ),
            ]
            for system, own in tested.items()
            if own
          ),
        ),
      ]
  return result


def bleu_section(runs: Runs, plots: str) -> list[str]:
  """BLEU in the course of training, where it was measured."""
  if not has_bleu(runs):
    return []
  return [
    "## Dev BLEU in the course of training\n",
    "Greedy search, 50 sentences of each direction. How many times fewer "
    "updates than `base`\nto reach `base`'s best; a dash: never.\n",
    table(
      ["system", *BANDS],
      (
        [system, *(factor(bleu_convergence(runs, system, b)) for b in BANDS)]
        for system, own in runs.items()
        if any(one.bleu["all"] for one in own)
      ),
    ),
    f"![Dev BLEU against updates and seconds]({plots}/bleu.svg)\n",
  ]


def has_bleu(runs: Runs) -> bool:
  """Whether any run measured BLEU in the course of training."""
  return any(one.bleu["all"] for own in runs.values() for one in own)


def significance_section(
  significance: Mapping[str, Mapping[str, Any]],
) -> list[str]:
  """Outcomes of `bootstrap`."""
  if not significance:
    return []
  columns = [
    f"{band} {outcome}"
    for band in _BANDS
    for outcome in ("better", "worse", "alike")
  ]
  return [
    "## Directions against `base`, paired bootstrap\n",
    "Directions, of the seeds whose translations were kept, with better, "
    "worse, and not\nsignificantly different BLEU in a greedy search, "
    "p < 0.05.\n",
    table(
      ["system", "seeds", *columns],
      (
        [
          s,
          str(len(counts["bleu"])),
          *(str(counts.get(c, 0)) for c in columns),
        ]
        for s, counts in significance.items()
      ),
    ),
  ]


def routing_section(runs: Runs, plots: str) -> list[str]:
  """What experts know of languages, and what prices do at test time."""
  sparse = {
    s: found
    for s, own in runs.items()
    if (found := [r for r in own if r.experts])
  }
  if not sparse:
    return []
  layers = sorted(next(iter(sparse.values()))[0].experts)
  priced = {s: [r for r in own if r.by_affinity] for s, own in sparse.items()}
  return [
    "## Routing at test time\n",
    "Mean dev loss at the end, with tokens routed by affinity minus price (the "
    "default), and by\naffinity alone (the BASE paper's way).\n",
    table(
      ["system", "with prices", "by affinity"],
      (
        [
          s,
          mean_spread(r.loss("all")[-1] for r in own),
          mean_spread(
            float(np.mean(list(r.by_affinity.values()))) for r in own
          ),
        ]
        for s, own in priced.items()
        if own
      ),
    ),
    "## Experts and languages\n",
    "Mutual information of a token's language and its expert at test time, in "
    "nats (0: experts\nknow no languages), mean over seeds.\n",
    table(
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
    ),
    f"![Experts and languages]({plots}/experts.svg)\n",
  ]


def short_section(title: str, runs: Runs) -> list[str]:
  """Best dev losses, factors and scores of other runs, in one table."""
  if not runs:
    return []
  updates = runs[BASELINE][0].header["size"]["train_steps"]
  factors = [f"factor {band}" for band in BANDS]
  bleu = [f"BLEU {band}" for band in _BANDS]

  def scores(own: Sequence[Finished]) -> list[str]:
    tested = [r for r in own if r.has_scores(1)]
    if not tested:
      return ["" for _ in _BANDS]
    return [mean_spread(r.score(b, 1)[0] for r in tested) for b in _BANDS]

  return [
    f"## {title}\n",
    f"{updates} updates: best dev loss, factors of updates as above, and BLEU "
    "of a greedy\nsearch where it was made.\n",
    table(
      ["system", "seeds", *BANDS, *factors, *bleu],
      (
        [
          s,
          str(len(own)),
          *(mean_spread(r.loss(b).min() for r in own) for b in BANDS),
          *(factor(convergence(runs, s, b, "steps")) for b in BANDS),
          *scores(own),
        ]
        for s, own in runs.items()
      ),
    ),
  ]


def render(
  runs: Runs,
  significance: Mapping[str, Mapping[str, Any]],
  long_runs: Runs,
  quickstart: Runs,
  pilot_rows: Sequence[Sequence[str]],
  step_ms: Mapping[str, float],
  notes: str,
  plots: str,
) -> str:
  """The report as Markdown."""
  first = next(iter(runs.values()))[0]
  size = ", ".join(f"{k} {v}" for k, v in first.header["size"].items())
  parts = [
    "# Results\n",
    f"{sum(map(len, runs.values()))} runs on {first.header['device']}, jax "
    f"{first.header['jax']}; {size}. Rendered from the logs by\n"
    "[`study_report.py`](../benchmarks/study_report.py).\n",
    notes,
    *system_section(runs),
    *convergence_section(runs),
    *loss_section(runs, plots),
    *score_section(runs),
    *bleu_section(runs, plots),
    *significance_section(significance),
    *routing_section(runs, plots),
    "## Time of a training step\n",
    "Nine windows of ten were slower, because runs shared GPUs. "
    "`BalancedRouter`: BASE layers.\n",
    table(["network", "ms"], ([n, f"{t:.1f}"] for n, t in step_ms.items())),
    *short_section("Longer runs", long_runs),
    *short_section("Quickstart, on two CPU cores", quickstart),
  ]
  if pilot_rows:
    bleu = [f"BLEU {band}" for band in _BANDS]
    parts += [
      "## Other settings tried\n",
      "Mean dev loss at the last evaluation, and test BLEU with greedy search "
      "where it was made.\n",
      table(["system", "seed", "changes", "step", *BANDS, *bleu], pilot_rows),
    ]
  return "\n".join(parts)


def main() -> None:
  """Writes the report."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--logs", type=pathlib.Path, required=True)
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("docs/results.md")
  )
  parser.add_argument("--translations", type=pathlib.Path)
  parser.add_argument("--store")
  options = parser.parse_args()
  runs = finished_runs(options.logs)
  if not runs:
    raise SystemExit(
      f"{options.logs} holds no finished run of {BASELINE!r}; make one with "
      "study.py run"
    )
  step_ms = step_times([one for own in runs.values() for one in own])
  runs = {
    system: [with_seconds(one, step_ms) for one in own]
    for system, own in runs.items()
  }
  kept = options.logs / "bootstrap.json"
  if options.translations:
    found_tests = bootstrap(runs, options.translations, options.store)
    kept.write_text(json.dumps(found_tests, indent=1) + "\n")
  significance = json.loads(kept.read_text()) if kept.exists() else {}
  if not is_of(significance, runs):
    raise SystemExit(
      f"{kept} compares translations of other runs than the logs'; make it "
      "again with --translations and --store"
    )
  plots = options.out.parent / "plots"
  plots.mkdir(parents=True, exist_ok=True)
  plot_losses(runs, "steps", plots / "loss_updates.svg")
  plot_losses(runs, "seconds", plots / "loss_seconds.svg")
  if has_bleu(runs):
    plot_bleu(runs, step_ms, plots / "bleu.svg")
  plot_experts(runs, plots / "experts.svg")
  notes = options.logs / "notes.md"  # What to make of the figures, by hand.
  long_runs = finished_runs(options.logs / "long")
  pilot_rows = pilots(options.logs.glob("pilot/*.jsonl"), runs[BASELINE][0])
  options.out.write_text(
    render(
      runs,
      significance,
      long_runs,
      runs_in(options.logs / "quickstart"),
      pilot_rows,
      step_ms,
      notes.read_text(),
      plots.name,
    )
  )
  print(f"wrote {options.out}")


if __name__ == "__main__":
  main()
