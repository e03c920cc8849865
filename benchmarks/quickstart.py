"""The paper's systems on the quickstart: two CPU cores, no data to get.

    PYTHONPATH=. python benchmarks/quickstart.py --logs runs/quickstart_logs
    PYTHONPATH=. python benchmarks/study/reading.py quickstart \
      runs/quickstart_logs/*.jsonl
    PYTHONPATH=. python benchmarks/study/report.py

Each is `gin/recipes/quickstart.gin` with the macros below, which do for `basemt
train` as well (`--gin.DENSE_STEPS=0`), and a dev loss every 20 steps. A run
takes 2 to 3 minutes; its log (JSONL) is kept, and what has a complete one is
not run again. Several processes share the work.
"""

import argparse
import contextlib
import pathlib
from typing import Any

import gin
from basemt_jax import run
from basemt_jax.commands import configuration
from benchmarks.study import runs

RECIPE = "gin/recipes/quickstart.gin"
_SCRATCH = ["DENSE_STEPS=0"]
_UNHEATED = ["TEMPERATURE=@heating.constant()"]
SYSTEMS = {
  "dense": ["FEED_FORWARD='dense'", *_SCRATCH, *_UNHEATED],
  "base": _SCRATCH + _UNHEATED,
  "base_heated": _SCRATCH,
  "base_dense_pretrained": _UNHEATED,
  "base_heated_dense_pretrained": [],
  # Both remedies, with less heat.
  "top_2": ["TOP_TEMPERATURE=2", "END_TEMPERATURE=2"],
  "top_2_back_to_1.5": ["TOP_TEMPERATURE=2", "END_TEMPERATURE=1.5"],
}
SEEDS = range(3)


def run_of(name: str, seed: int, model_dir: pathlib.Path) -> run.Run:
  """The run that `basemt train` would make of the same macros."""
  gin.clear_config()
  options = argparse.Namespace(
    gin_file=[RECIPE],
    gin_search_paths="",
    model_dir=str(model_dir),
    bindings=[f"SEED={seed}", "EVAL_STEPS=20", *SYSTEMS[name]],
  )
  return configuration.configured(options)


def settings_of(name: str, described: run.Run) -> dict[str, Any]:
  """What a log tells of a system's settings, the recipe's part of them too."""
  steps = described.settings
  return {
    "macros": SYSTEMS[name],
    "sampling": str(described.strategy),
    "dense_share": steps.dense_steps / steps.train_steps,
  }


def main() -> None:
  """Makes the runs that are missing."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--logs", type=pathlib.Path, required=True)
  parser.add_argument(
    "--work", type=pathlib.Path, default=pathlib.Path("runs/quickstart_study")
  )
  options = parser.parse_args()
  options.logs.mkdir(parents=True, exist_ok=True)
  for seed in SEEDS:
    for name in SYSTEMS:
      if runs.is_complete(options.logs / f"{name}_{seed}.jsonl"):
        continue
      described = run_of(name, seed, options.work / f"{name}_{seed}")
      header = {
        "system": name,
        "seed": seed,
        "settings": settings_of(name, described),
        "network": "dense" if name == "dense" else "BalancedRouter",
        "size": {"train_steps": described.settings.train_steps},
        "pairs": runs.pairs_of(described.store()),
        "bands": vars(described.bands),
      }
      with contextlib.suppress(BlockingIOError):  # Another one makes it.
        runs.make_run(described, header, options.logs, beams=(1,))


if __name__ == "__main__":
  main()
