"""Scores of the translations that runs left, and which differ significantly.

    PYTHONPATH=. python benchmarks/study/scoring.py --store DIR \
      --translations DIR --out scores.jsonl --against base base_static_5

Translations are too large to keep; the scores are kept with the logs. For each
run, beam and direction there is a line with BLEU and chrF++. Against each named
system, a paired bootstrap of BLEU with the translations of the same seed says
whether the run is better or worse, p < 0.05.

Files of translations are named SYSTEM_SEED_beamN.json.gz.
"""

import argparse
import concurrent.futures
import gzip
import json
import multiprocessing
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from basemt_jax import evaluation, trained
from basemt_jax.data import languages, row_store

Job = tuple[
  str, int, int, str, str | None
]  # Run, seed, beam, direction, other.


def named(path: pathlib.Path) -> tuple[str, int, int]:
  """System, seed and beam of a file of translations."""
  found = re.fullmatch(r"(.+)_(\d+)_beam(\d+)\.json\.gz", path.name)
  if not found:
    raise ValueError(f"{path} is not named SYSTEM_SEED_beamN.json.gz")
  return found[1], int(found[2]), int(found[3])


Translations = dict[tuple[str, int, int], dict[str, list[str]]]


class Scorer:
  """Scores directions of runs.

  Args:
    references: By direction.
    translations: By system, seed and beam; then by direction.
  """

  def __init__(
    self,
    references: Mapping[str, Sequence[str]],
    translations: Translations,
  ):
    self.references, self.translations = references, translations

  def jobs(self, others: Sequence[str]) -> Iterator[Job]:
    """Jobs of every run and direction: its scores, and each comparison."""
    for other in (None, *others):  # The cheap ones first.
      for system, seed, beam in self.translations:
        is_paired = (other, seed, beam) in self.translations
        if other is None or (is_paired and other != system):
          for direction in self.references:
            yield system, seed, beam, direction, other

  def score(self, job: Job) -> dict[str, Any]:
    """A line of the output."""
    system, seed, beam, direction, other = job
    record = {"run": system, "seed": seed, "beam": beam, "test": direction}
    own = self.translations[system, seed, beam][direction]
    references = self.references[direction]
    language = languages.Direction.parse(direction).target
    if other is None:
      scores = evaluation.score(own, references, language)
      bleu, chrf = round(scores.bleu, 3), round(scores.chrf, 3)
      return {
        **record,
        "bleu": bleu,
        "chrf": chrf,
        "signature": scores.bleu_signature,
      }
    theirs = self.translations[other, seed, beam][direction]
    paired = evaluation.paired_bootstrap(theirs, own, references, language)
    outcome = "alike"
    if paired[0].p_value < 0.05:
      better = paired[0].system > paired[0].baseline
      outcome = "better" if better else "worse"
    return {**record, "against": other, "outcome": outcome}


def load(store: str, folder: pathlib.Path) -> Scorer:
  """A scorer of a folder's files."""
  texts = trained.direction_texts(row_store.RowStore(store), "test")
  translations: Translations = {}
  for path in sorted(folder.glob("*.json.gz")):
    with gzip.open(path, "rt") as file:
      translations[named(path)] = json.load(file)
  return Scorer({t.direction: t.references for t in texts}, translations)


_scorer: Scorer  # Of a worker process.


def _start(store: str, folder: pathlib.Path) -> None:
  global _scorer
  _scorer = load(store, folder)


def _score(job: Job) -> dict[str, Any]:
  return _scorer.score(job)


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes the scores."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--store", required=True)
  parser.add_argument("--translations", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--against", nargs="*", default=["base"])
  parser.add_argument("--processes", type=int, default=2)
  options = parser.parse_args(arguments)
  scorer = load(options.store, options.translations)
  jobs = list(scorer.jobs(options.against))
  with (
    concurrent.futures.ProcessPoolExecutor(
      options.processes,
      multiprocessing.get_context("spawn"),
      initializer=_start,
      initargs=(options.store, options.translations),
    ) as pool,
    options.out.open("w", encoding="utf-8") as file,
  ):
    for record in pool.map(_score, jobs):
      print(json.dumps(record), file=file, flush=True)


if __name__ == "__main__":
  main()
