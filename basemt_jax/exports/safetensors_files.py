"""Any model as safetensors with its description, and back.

`model.safetensors` holds the parameters, and the prices of sparse models, in
float32, by their names in the network: 'params/encoder/layers_0/...'. They are
the weights that `translate` uses: the averaged ones where they were kept. The
optimizer's state is left behind.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from basemt_jax import checkpointing, description, files, phases, trained
from basemt_jax import run as run_lib
from basemt_jax.exports import directories

FILE = "model.safetensors"


def library() -> Any:
  """`safetensors.numpy`; see `directories.library`."""
  return directories.library("safetensors.numpy")


def writer(model: trained.Trained) -> Callable[[pathlib.Path], None]:
  """Writes a model's arrays, which are to be float32, into a folder."""
  numpy = library()

  def write(directory: pathlib.Path) -> None:
    flat = traverse_util.flatten_dict(jax.device_get(model.variables), sep="/")
    arrays = {
      name: np.asarray(x, np.float32, order="C") for name, x in flat.items()
    }
    # One entry only: several would come in any order.
    numpy.save_file(arrays, directory / FILE, {"step": str(model.step)})

  return write


def to_model_directory(
  source: pathlib.Path, target: pathlib.Path, modules: Sequence[str] = ()
) -> int:
  """Makes a model directory of an export; returns the step of its checkpoint.

  Args:
    source: What `directories.write` wrote with `writer`.
    target: The model directory; it may not hold anything yet.
    modules: Names of the user's modules that classes of the network are of.

  Raises:
    ValueError: The source is none, damaged, or holds other arrays than its
      network has; the target is there.
  """
  known, pieces = directories.read(source, FILE)
  arrays, step = _arrays(source / FILE)
  run = run_lib.described(source, modules)
  is_sparse = any("/base_layer/" in name for name in arrays)
  expected = _shapes(run, known, "sparse" if is_sparse else "dense")
  _check(arrays, expected, source / FILE)
  tree = traverse_util.unflatten_dict(arrays, sep="/")
  params = tree.pop("params")
  with files.new_directory(target) as directory:
    with checkpointing.Checkpoints(directory) as saved:
      number = np.asarray(step, np.int32)
      state = checkpointing.state_dict(params, {}, number, tree)
      saved.save(step, state, {"data": None})
    description.write(directory, known, pieces)
  return step


def _arrays(path: pathlib.Path) -> tuple[dict[str, np.ndarray], int]:
  """Arrays by name, and the step of the checkpoint they were in."""
  library()
  import safetensors

  try:
    with safetensors.safe_open(path, "np") as file:
      step = int(file.metadata()["step"])
      return {name: file.get_tensor(name) for name in file.keys()}, step  # noqa: SIM118
  except (
    safetensors.SafetensorError,
    KeyError,
    TypeError,
    ValueError,
  ) as error:
    raise ValueError(f"{path} is no export of a model: {error}") from error


def _shapes(
  run: run_lib.Run, known: description.Description, phase: str
) -> dict[str, tuple[int, ...]]:
  """Shapes of a network's variables by name."""
  program = phases.program(
    run.config_of(known.header.vocab_size),
    run.settings,
    phase,
    run.mesh(),
    len(known.directions),
  )
  variables = program.variables(program.shapes)
  flat = traverse_util.flatten_dict(variables, sep="/")
  return {name: tuple(x.shape) for name, x in flat.items()}


def _check(
  arrays: Mapping[str, np.ndarray],
  expected: Mapping[str, tuple[int, ...]],
  path: pathlib.Path,
) -> None:
  """Refuses arrays that are not exactly those of a network.

  Raises:
    ValueError: Names the first that differs.
  """
  found = {name: x.shape for name, x in arrays.items()}
  for name in sorted(found.keys() | expected.keys()):
    if found.get(name) != expected.get(name):
      raise ValueError(
        f"{path} does not hold the network that {description.FILE} beside it "
        f"describes: array {name} has shape {found.get(name)}, and should have "
        f"{expected.get(name)} (None: it is not there)"
      )
