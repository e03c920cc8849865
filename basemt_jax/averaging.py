"""The mean of several checkpoints' weights, as a model directory of its own.

Averaging the last checkpoints of a run is worth a few tenths of BLEU
(Vaswani et al., arXiv:1706.03762, section 6.1).
"""

import pathlib
import shutil

import numpy as np
from flax import traverse_util

from basemt_jax import checkpointing, description, locking

# What makes a model directory whole, besides checkpoints.
_FILES = (
  *(description.FILE, description.VOCABULARY_FILE),
  *("config.gin", "operative_config.gin"),
)
# Where weights are in a checkpoint: those that are trained, and the averages
# that are kept of them while training.
_WEIGHTS = ("target/", "state/param_states/average/")


def average(
  model_dir: str | pathlib.Path,
  output: str | pathlib.Path,
  count: int,
  is_best: bool = False,
) -> list[int]:
  """Writes a model whose weights are the mean of several checkpoints'.

  They are the last of a run, dense or sparse, or those with the lowest dev
  loss. Everything else (prices of experts, optimizer, place in the data) is the
  newest one's, whose step it has.

  Returns:
    The steps of the checkpoints, rising.

  Raises:
    ValueError: There are fewer, some are from before a conversion and some
      from after it, or the new directory holds checkpoints already.
  """
  with (
    checkpointing.Checkpoints(model_dir, read_only=True) as source,
    locking.only_writer(output, "the model directory"),
  ):
    steps = _chosen(source, count, is_best)
    with checkpointing.Checkpoints(output) as target:
      target.check_empty()
      tree = _mean(source, steps)
      for name in _FILES:
        if (pathlib.Path(model_dir) / name).exists():
          shutil.copyfile(
            pathlib.Path(model_dir) / name, pathlib.Path(output) / name
          )
      target.save(steps[-1], tree, source.position(steps[-1]))
      target.wait()
  return steps


def _chosen(
  source: checkpointing.Checkpoints, count: int, is_best: bool
) -> list[int]:
  """Steps of the checkpoints to average, rising."""
  losses = source.dev_losses()
  steps = sorted(losses, key=lambda n: losses[n]) if is_best else source.steps()
  if not 1 <= count <= len(steps):
    kind = "with a dev loss" if is_best else "there"
    raise ValueError(
      f"{source.directory} has {len(steps)} checkpoints {kind} "
      f"({', '.join(map(str, sorted(steps)))}), of which {count} cannot be "
      "averaged: ask for a number from 1 to that, or have a run keep more "
      "(steps.Settings.keep_checkpoints)"
    )
  chosen = sorted(steps[:count] if is_best else steps[-count:])
  phases = {step: source.phase(step) for step in chosen}
  if len(set(phases.values())) > 1:
    sparse = [step for step in chosen if phases[step] == "sparse"]
    raise ValueError(
      f"the run was converted between steps {max(set(chosen) - set(sparse))} "
      f"and {sparse[0]}, and dense weights have no mean with sparse ones: "
      f"average at most the {len(sparse)} checkpoints from {sparse[0]} on"
    )
  return chosen


def _mean(source: checkpointing.Checkpoints, steps: list[int]) -> dict:
  """The newest checkpoint's tree with the mean of all in place of weights."""
  like = source.stored(steps[-1])
  weights = {k: v for k, v in like.items() if k.startswith(_WEIGHTS)}
  tree = _restored(source, steps[-1], like)
  # In float64, so that the order of the checkpoints does not show.
  sums = {path: tree[path].astype(np.float64) for path in weights}
  for step in steps[:-1]:
    for path, value in _restored(source, step, weights).items():
      sums[path] += value
  for path, total in sums.items():
    tree[path] = (total / len(steps)).astype(weights[path].dtype)
  return traverse_util.unflatten_dict(tree, sep="/")


def _restored(
  source: checkpointing.Checkpoints, step: int, like: dict
) -> dict[str, np.ndarray]:
  nested = traverse_util.unflatten_dict(like, sep="/")
  tree = source.restore(step, nested, "the mean with the others")
  return traverse_util.flatten_dict(tree, sep="/")
