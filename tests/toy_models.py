"""Model directories that nobody has trained."""

import jax
import numpy as np
import toy

from basemt_jax import checkpointing, description, phases
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
