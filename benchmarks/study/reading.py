"""Finished runs, read from sets of logs, and how fast each converged.

    PYTHONPATH=. python benchmarks/study/reading.py NAME LOG.jsonl ...

makes a set: one file, `logs/NAME.jsonl.xz`, with the logs of several runs, one
after the other. A run's first line is its header, which alone has `system`.

The convergence factor of a system is the number of updates that `base` takes to
its best dev loss, over the number that the system takes to reach the same loss;
likewise for seconds. The dense phase counts. Runs may have shared a GPU, so
that their own clocks say little: seconds are updates times the time of a step
in the fastest tenth of the logged windows of the same network.
"""

import argparse
import dataclasses
import json
import lzma
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax import steps
from basemt_jax.data import languages
from basemt_jax.inspection import compare
from benchmarks.study import systems

LOGS = pathlib.Path(__file__).parent / "logs"
BASELINE = "base"
BANDS = ("all", *languages.BANDS)


@dataclasses.dataclass(frozen=True)
class Finished:
  """One run's log."""

  system: str  # name
  seed: int
  header: Mapping[str, Any]  # device, versions, size, settings
  steps: np.ndarray  # [K] of the evaluations
  # [K] of training until then, without compiling, converting and saving, as
  # told above; not known (NaN) until `with_seconds`
  seconds: np.ndarray
  # direction to dev losses [K], nats per token
  losses: Mapping[str, np.ndarray]
  pairs: Mapping[str, int]  # direction to training pairs
  bands: Mapping[str, str]  # direction to 'high', 'mid' or 'low'
  # (Beam, direction) to (BLEU, chrF++)
  scores: Mapping[tuple[int, str], tuple[float, float]]
  # layer to (languages, shares [languages, E])
  experts: Mapping[str, tuple[Sequence[str], np.ndarray]]
  # (Network, steps per second) of each logged window
  windows: Sequence[tuple[str, float]]
  # direction to dev loss at the end if prices do not count
  by_affinity: Mapping[str, float]
  # band to (step, BLEU) of some dev sentences; empty where not measured
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


def read_set(path: pathlib.Path) -> list[Finished]:
  """The runs of a set that were evaluated at all; of a log too (`.jsonl`)."""
  raw = path.read_bytes()
  text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
  runs: list[list[dict[str, Any]]] = []
  for line in text.splitlines():
    record = json.loads(line)
    if "system" in record:
      runs.append([])
    runs[-1].append(record)
  return [
    finished(header, records)
    for header, *records in runs
    if any("dev/loss" in r for r in records)
  ]


def pack(logs: Iterable[pathlib.Path], path: pathlib.Path) -> None:
  """Writes a set from the logs of runs."""
  text = "".join(log.read_text(encoding="utf-8") for log in sorted(logs))
  path.write_bytes(lzma.compress(text.encode(), preset=9))


def finished(
  header: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Finished:
  """A run from its log; its tests may be missing."""
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
  bands = systems.BANDS
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
  """Seconds of training up to some updates, each phase at its own speed."""
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


# Where a run was, and a figure that falls; None: not measured.
Curve = Callable[[Finished], tuple[np.ndarray, np.ndarray] | None]


def convergence(
  runs: Runs, system: str, band: str, axis: str, baseline: str = BASELINE
) -> list[float] | None:
  """How many times fewer updates or seconds than a baseline to its best loss.

  A run is compared with the baseline's of the same seed, if there is one, else
  with its first. The axis is 'steps' or 'seconds'.

  Returns:
    The factor of every run; None where one of them never gets there, or the
    baseline was not run.
  """
  return _times_fewer(
    runs[system],
    runs.get(baseline, ()),
    lambda one: (getattr(one, axis), one.loss(band)),
  )


def bleu_convergence(runs: Runs, system: str, band: str) -> list[float] | None:
  """As `convergence` in updates, for dev BLEU, of runs that measured it."""

  def falling(one: Finished) -> tuple[np.ndarray, np.ndarray] | None:
    if not one.bleu[band]:
      return None
    updates, values = np.array(one.bleu[band], float).T
    return updates, -values

  return _times_fewer(runs[system], runs[BASELINE], falling)


def _times_fewer(
  own: Sequence[Finished], bases: Sequence[Finished], curve: Curve
) -> list[float] | None:
  known = {one.seed: found for one in bases if (found := curve(one))}
  factors = []
  for one in own:
    found = curve(one)
    if not found:
      continue
    if not known:
      return None
    base = known.get(one.seed, next(iter(known.values())))
    target = float(base[1].min())
    needed, whole = (compare.reached(*c, target) for c in (found, base))
    if needed is None or whole is None:
      return None
    factors.append(whole / needed)
  return factors or None


def changes(one: Finished) -> dict[str, Any]:
  """Settings in which a run differs from the system of its name."""
  usual = systems.settings_of(systems.SYSTEMS[one.system])
  settings: Mapping[str, Any] = one.header["settings"]
  return {k: v for k, v in settings.items() if v != usual.get(k)}


def size_changes(one: Finished, like: Finished) -> dict[str, Any]:
  """What a run's size differs in from another's.

  Logs of earlier versions lack fields whose defaults do what was done then.
  """
  size, other = (
    {**vars(systems.Size()), **run.header["size"]} for run in (one, like)
  )
  return {k: v for k, v in size.items() if v != other.get(k)}


def grouped(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
  """Runs by system, in the order of `systems.SYSTEMS`, then by seed.

  Systems that are not of the study come last.
  """
  found: dict[str, list[Finished]] = {name: [] for name in systems.SYSTEMS}
  for one in runs:
    found.setdefault(one.system, []).append(one)
  return {k: sorted(v, key=lambda r: r.seed) for k, v in found.items() if v}


def by_system(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
  """`grouped` runs of one size and of `systems.SYSTEMS`' settings.

  Raises:
    SystemExit: A run has another size than the baseline's, or other settings
      than the system of its name.
  """
  found = grouped(runs)
  for one in (one for own in found.values() for one in own):
    other = {**size_changes(one, found[BASELINE][0]), **changes(one)}
    if other:
      raise SystemExit(
        f"{one.system}, seed {one.seed}, has other settings than "
        f"systems.SYSTEMS and the run of {BASELINE}: {other}"
      )
  return found


def main() -> None:
  """Packs logs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("name", help="of the set")
  parser.add_argument("logs", nargs="+", type=pathlib.Path)
  options = parser.parse_args()
  pack(options.logs, LOGS / f"{options.name}.jsonl.xz")


if __name__ == "__main__":
  main()
