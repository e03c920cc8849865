"""Model directories: of a run of some steps, and such that nobody trained."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import toy

from basemt_jax import (
  checkpointing,
  description,
  heating,
  phases,
  sampling,
  training,
)
from basemt_jax import run as run_lib

STEP = 4


def write_model(directory, store, network=toy.DENSE, **changes):
  """A model directory of random weights, other ones in the average."""
  run = toy.a_run(
    directory, store, network, settings=toy.settings(STEP, **changes)
  )
  rows = run.store()
  phase = "sparse" if network is toy.SPARSE else "dense"
  program = phases.program(run.config(rows), run.settings, phase, toy.mesh(), 3)
  draw = np.random.RandomState(0)

  def varied(x):
    if x.dtype != np.float32:
      return x
    factor, term = draw.uniform(0, (2, 0.01), (*x.shape, 2)).T
    return np.asarray(x * factor.T + term.T, np.float32)

  tree = jax.tree.map(varied, jax.device_get(program.init().tree()))
  with checkpointing.Checkpoints(directory) as saved:
    saved.save(STEP, tree, {"data": None})
  known = run_lib.describe(run, rows)
  description.write(directory, known, description.pieces_of(rows))
  return directory


class Jsonl:
  """A writer as the command's, without TensorBoard."""

  def __init__(self, path):
    self._path = path

  def write_scalars(self, step, scalars):
    with open(self._path, "a") as file:
      file.write(json.dumps({"step": step, **scalars}) + "\n")

  def flush(self):
    pass


def silent():
  return run_lib.SILENT


def train(directory, dense_steps=0):
  """A run of 4 steps."""
  run = run_lib.Run(
    str(directory / "model"),
    "not looked at",
    {"inputs": 32, "targets": 24},
    functools.partial(dataclasses.replace, toy.SPARSE),
    toy.settings(4, dense_steps=dense_steps, eval_every=2, metrics=(toy.REAL,)),
    8,
    sampling.Strategy(heating.linear(1.0, 5.0, 4)),
    store_dir=toy.write_store(directory / "store"),
    bands=toy.BANDS,
  )
  (directory / "model").mkdir()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
    writer = Jsonl(directory / "model" / "metrics.jsonl")
    assert training.train(run, writer, silent()) == "done"
  return run
