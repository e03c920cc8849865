r"""Translates the test set with the models that `several.py` leaves.

    PYTHONPATH=. python benchmarks/study/translations.py --store DIR \
      --logs DIR --weights DIR --runs FILE --parts 0 1 --seconds 500

In a process of its own, beside the training: what goes wrong here costs no
run, and the search compiles while nothing waits for it. Waits for the weights
of each run of the given parts, until the time is over. Attention is XLA's,
because cuDNN's programs do not survive the compilation cache. LOGS/translations
holds the result, to be scored by `scoring.py`.
"""

import argparse
import gzip
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from basemt_jax import (
  description,
  evaluation,
  partitioning,
  phases,
  trained,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax.data import row_store
from benchmarks.study import several, systems


class Translations:
  """Translates with one model after the other; like ones share a search."""

  def __init__(self, store: str, folder: pathlib.Path, beam: int):
    self._store, self._folder = row_store.RowStore(store), folder
    self._beam = beam
    self._pieces = description.pieces_of(self._store)
    self._texts = trained.direction_texts(self._store, "test")
    self._translators: dict[Any, translation.Translator] = {}

  def make(self, plan: several.Planned, weights: pathlib.Path) -> None:
    """Writes the translations of a run."""
    with np.load(weights) as stored:
      flat = {name: jnp.asarray(stored[name]) for name in stored.files}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    translator = self._translator(plan, variables)
    lines = iter(
      evaluation.translate_texts(
        translator,
        self._pieces,
        [source for t in self._texts for source in t.sources],
      )
    )
    found = {
      t.direction: [next(lines)[0][1] for _ in t.sources] for t in self._texts
    }
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / f"{plan.label}_beam{self._beam}.json.gz"
    part = path.with_suffix(".part")
    with gzip.open(part, "wt") as file:
      json.dump(found, file)
    part.rename(path)

  def _translator(
    self, plan: several.Planned, variables: Any
  ) -> translation.Translator:
    described = systems.run_of(plan.system, plan.size, plan.seed, "", "")
    config = phases.network(
      described.config(self._store), described.settings, "sparse"
    )
    if config not in self._translators:
      mesh = described.mesh()
      is_spread = mesh.size > 1
      self._translators[config] = translation.Translator(
        model_lib.Transformer(config, mesh if is_spread else None),
        variables,
        translation.SearchOptions(beam_size=self._beam, batch_size=1024),
        partitioning.batch_sharding(mesh) if is_spread else None,
      )
    self._translators[config].variables = variables
    return self._translators[config]


def main(arguments: Sequence[str] | None = None) -> None:
  """Translates with the models of some parts as they come."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--store", required=True)
  parser.add_argument("--logs", type=pathlib.Path, required=True)
  parser.add_argument("--weights", type=pathlib.Path, required=True)
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--parts", type=int, nargs="+", required=True)
  parser.add_argument("--seconds", type=float, required=True)
  parser.add_argument("--beam", type=int, default=1)
  options = parser.parse_args(arguments)
  deadline = time.monotonic() + options.seconds
  made = Translations(
    options.store, options.logs / "translations", options.beam
  )
  plans = several.planned(options.runs.read_text(encoding="utf-8"))
  waiting = [plan for plan in plans if plan.part in options.parts]
  while waiting and time.monotonic() < deadline:
    for plan in list(waiting):
      weights = options.weights / f"{plan.label}.npz"
      if weights.exists():
        start = time.monotonic()
        made.make(plan, weights)
        weights.unlink()
        waiting.remove(plan)
        seconds = time.monotonic() - start
        print(f"{plan.label}: translated in {seconds:.0f} s", flush=True)
    time.sleep(1)


if __name__ == "__main__":
  main()
