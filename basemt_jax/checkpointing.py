"""Checkpoints: the train state and the data position, written together.

Directory layout, T5X's own plus one item:

    MODEL_DIR/checkpoint_N/state/     {target, state, flax_mutables} (Orbax)
    MODEL_DIR/checkpoint_N/position/  JSON: data position, phase, best loss
    MODEL_DIR/checkpoint_N/metrics/   JSON: dev loss, if it was measured
    MODEL_DIR/checkpoint_N/checksums.json   of all these files

Orbax writes in a background thread into a temporary directory and renames it
when complete, so a killed process leaves whole checkpoints only. It needs the
arrays until they are on the host, which takes seconds where training takes
milliseconds a step. So what it gets is a copy on the devices, made in the time
of reading them once, wherever one fits (see `has_room`).
"""

import concurrent.futures
import contextlib
import itertools
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization, traverse_util
from orbax.checkpoint import checkpoint_managers

from basemt_jax import checksums, processes

Tree = Any

PREFIX = "checkpoint"


def state_dict(
  params: Tree, opt_state: Tree, step: Any, mutables: Mapping[str, Tree]
) -> dict[str, Any]:
  """The nested dictionary T5X stores for the same train state.

  Of the Optax state its empty parts are left out, as in T5X; `mutables` are the
  other collections by name (`prices`), and may be empty.
  """
  param_states = serialization.to_state_dict(opt_state)
  flat = traverse_util.flatten_dict(param_states, sep="/")
  tree: dict[str, Any] = {
    "target": params,
    "state": {
      "step": step,
      "param_states": traverse_util.unflatten_dict(flat, sep="/"),
    },
  }
  if mutables:
    tree["flax_mutables"] = dict(mutables)
  return tree


def restored_opt_state(template: Tree, param_states: dict[str, Any]) -> Tree:
  """Puts a stored `param_states` back into an Optax state's own types."""
  whole = traverse_util.flatten_dict(
    serialization.to_state_dict(template), keep_empty_nodes=True, sep="/"
  )
  stored = traverse_util.flatten_dict(param_states, sep="/")
  merged = {path: stored.get(path, empty) for path, empty in whole.items()}
  return serialization.from_state_dict(
    template, traverse_util.unflatten_dict(merged, sep="/")
  )


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, without its own questions whether to stop.

  JAX answers each process at a step that all agree on, and takes every question
  for news of the step a process is at. Orbax asks later, and in the first
  process only; the trainer asks once a step.
  """

  def reached_preemption(self, step: int) -> bool:
    """Always False: the trainer asks instead, once a step."""
    del step
    return False


class Checkpoints:
  """The checkpoints of one model directory; closed at the end of `with`.

  With several processes all of them call the same functions in the same order,
  and write their parts of one checkpoint into the one directory. Orbax then has
  them wait for each other by a computation, which may not mix with those of
  training: `save` is done with the devices when it returns.

  Args:
    directory: MODEL_DIR; created if need be.
    keep: Most recent checkpoints to keep; the best by dev loss is kept too.
    read_only: Neither create nor clean anything.
    verify: Compare what is restored with its checksums.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    keep: int = 3,
    read_only: bool = False,
    verify: bool = True,
  ):
    self.directory = epath.Path(directory)
    self._verify = verify
    self._whole: set[int] = set()
    self._saving: int | None = None
    self.set_aside: list[str] = []
    if read_only and not self.directory.is_dir():
      raise ValueError(
        f"no checkpoints: {directory} is not a directory; give the MODEL_DIR "
        "of a run"
      )
    options = ocp.CheckpointManagerOptions(
      step_prefix=PREFIX,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [
          checkpoint_managers.LatestN(keep),
          checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: -metrics["dev_loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
      best_fn=lambda metrics: -metrics["dev_loss"],
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    if not read_only:
      processes.in_turn(self._set_damaged_aside)
    try:
      self._idle_manager = _Manager(
        epath.Path(self.directory).absolute(),
        options=options,
        item_handlers={
          "state": ocp.PyTreeCheckpointHandler(),
          "position": ocp.JsonCheckpointHandler(),
        },
      )
    except Exception as error:  # Orbax reads all metrics.
      there = self._steps_there()
      bad = [n for n in there if self.damage(n)]
      why = [f"{self.path(n)} is damaged: {self.damage(n)[0]}" for n in bad]
      whole = [n for n in there if n not in bad]
      newest = f", the newest of step {whole[0]}," if whole else ""
      raise ValueError(
        "; ".join(why or [f"{directory} cannot be read: {_first_line(error)}"])
        + f"; move it out of the directory, and the others{newest} can be used"
      ) from error
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._start: concurrent.futures.Future[Any] | None = None
    self._room: dict[int, bool] = {}

  def _seal(self) -> None:
    """Adds checksums to a checkpoint that is complete but for its name."""
    if jax.process_index() == 0 and self._is_local:
      name = f"{PREFIX}_{self._saving}.orbax-checkpoint-tmp*"
      for path in pathlib.Path(self.directory).glob(name):
        # Orbax writes times into the one, and nothing reads either.
        checksums.seal(path, but=("_CHECKPOINT_METADATA", "commit_success.txt"))

  @property
  def _is_local(self) -> bool:
    return "://" not in str(self.directory)

  def _set_damaged_aside(self) -> None:
    """Renames what is damaged and newer than the newest whole checkpoint.

    Raises:
      ValueError: There are checkpoints, and none of them is whole.
    """
    if jax.process_index() or not self._is_local:
      return
    root, steps = pathlib.Path(self.directory), self._steps_there()
    bad = list(itertools.takewhile(self.damage, steps))
    lines = [f"{self.path(n)} is damaged: {self.damage(n)[0]}" for n in bad]
    if bad and len(bad) == len(steps):
      raise ValueError(
        f"{'; '.join(lines)}; there is no whole checkpoint to go on from: take "
        "one from a copy, or begin anew in another directory"
      )
    for step, line in zip(bad, lines, strict=True):
      aside = root / f"damaged_{PREFIX}_{step}"
      shutil.rmtree(aside, ignore_errors=True)
      (root / f"{PREFIX}_{step}").rename(aside)
      self.set_aside.append(f"{line}; it is now {aside.name}")

  def _steps_there(self) -> list[int]:
    """Steps of all checkpoints by their names, damaged ones too; falling."""
    paths = pathlib.Path(self.directory).glob(f"{PREFIX}_*")
    names = [path.name.removeprefix(f"{PREFIX}_") for path in paths]
    return sorted((int(n) for n in names if n.isdigit()), reverse=True)

  def damage(self, step: int) -> list[str]:
    """What is wrong with the files of a checkpoint; nothing if it is whole.

    One without checksums, of T5X, is looked at less closely.
    """
    path = pathlib.Path(self.directory) / f"{PREFIX}_{step}"
    if step in self._whole or not self._is_local:
      return []
    if not path.is_dir():
      return ["it is no directory"]
    if self._verify and checksums.is_sealed(path):
      found = checksums.damage(path)
    else:
      state = path / "state"
      has_files = state.is_dir() and any(state.iterdir())
      found = [] if has_files else ["it holds no arrays"]
    if not found:
      self._whole.add(step)
    return found

  def _check(self, step: int) -> None:
    """Refuses a damaged checkpoint, and names the newest whole one."""
    found = self.damage(step)
    if found:
      raise self._damaged(step, checksums.told(found))

  def _damaged(self, step: int, why: str) -> ValueError:
    others = (n for n in reversed(self.steps()) if n != step)
    whole = next((n for n in others if not self.damage(n)), None)
    remedy = (
      "there is no other that is whole"
      if whole is None
      else f"the newest whole one is of step {whole}"
    )
    return ValueError(f"{self.path(step)} is damaged: {why}; {remedy}")

  @property
  def _manager(self) -> ocp.CheckpointManager:
    """Orbax's manager, for one thread only: waits while a save starts."""
    if self._start is not None:
      start, self._start = self._start, None
      with self._writing():
        start.result()
    return self._idle_manager

  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, complete or being written, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Step with the lowest dev loss, or None where none was measured."""
    return self._manager.best_step()

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def dev_losses(self) -> dict[int, float]:
    """Dev loss by step, of the checkpoints for which it was measured."""
    found = {step: self._manager.metrics(step) for step in self.steps()}
    return {step: m["dev_loss"] for step, m in found.items() if m}

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says in one sentence why a checkpoint could not be written."""
    try:
      yield
    except Exception as error:  # Of Orbax, tensorstore, the file system.
      text = _first_line(error)
      is_full = "No space left" in str(error)
      why = "its file system is full" if is_full else text
      raise ValueError(
        f"checkpoint {self._saving} could not be written to {self.directory}: "
        f"{why}; those before it are as they were, and training goes on from "
        "there when it is started again"
      ) from error

  def step_of(self, which: str | int) -> int:
    """The step of 'latest', 'best' (lowest dev loss) or a number.

    Raises:
      ValueError: There is no such checkpoint.
    """
    available = self.steps()
    if not available:
      raise ValueError(
        f"{self.directory} holds no checkpoints; train first, or, if it is an "
        "export, `basemt import` it or give the model directory it was made of"
      )
    if which == "latest":
      newest = max(self._steps_there(), default=0)
      if newest > available[-1]:
        self._check(newest)
      return available[-1]
    if which == "best":
      best = self.best_step()
      if best is None:
        raise ValueError(
          f"no checkpoint in {self.directory} has a dev loss; ask for 'latest' "
          f"or one of the steps {available}"
        )
      return best
    if not str(which).isdigit() or int(which) not in available:
      raise ValueError(
        f"no checkpoint of step {which!r} in {self.directory}; there are steps "
        f"{available}, 'latest' and 'best'"
      )
    return int(which)

  def save(
    self,
    step: int,
    tree: dict[str, Any],
    position: dict[str, Any],
    dev_loss: float | None = None,
  ) -> None:
    """Starts writing; the arrays may be given away (donated) when it returns.

    What goes wrong later is raised by the next call of any function here.

    Args:
      step: Training step; a checkpoint of that step must not exist.
      tree: From `state_dict`.
      position: JSON-able.
      dev_loss: Decides which checkpoint is best.
    """

    def start(tree: dict[str, Any]) -> None:
      self._saving = step
      self._idle_manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree),
          position=ocp.args.JsonSave(position),
        ),
        metrics=None if dev_loss is None else {"dev_loss": dev_loss},
        force=True,
      )

    manager = self._manager
    with self._writing():
      manager.wait_until_finished()  # Orbax keeps the last copy until then.
      self._start_with_copies(start, tree)

  def _start_with_copies(
    self, start: Callable[[Tree], None], tree: Tree
  ) -> None:
    """Calls `start`, in another thread and with copies where they fit."""
    size = _bytes_per_device(tree)
    if size not in self._room:  # Later the peak includes the copies.
      self._room[size] = jax.process_count() == 1 and has_room(size)
    if self._room[size]:
      self._start = self._thread.submit(start, _copied(tree))
    else:
      start(tree)

  def position(self, step: int) -> dict[str, Any]:
    """The stored position of a step; {} for a checkpoint T5X wrote."""
    self._check(step)
    if not (self.path(step) / "position").exists():
      return {}
    try:
      found = self._manager.restore(
        step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
      )["position"]
      if not isinstance(found, dict):
        raise ValueError("it is no object")
    except (ValueError, OSError) as error:
      why = f"its position cannot be read ({_first_line(error)})"
      raise self._damaged(step, why) from error
    return found

  def path(self, step: int) -> epath.Path:
    """Directory of a step's checkpoint."""
    return self.directory / f"{PREFIX}_{step}"

  def stored(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ('target/encoder/...'), shape and type of every stored array."""
    self._check(step)
    try:
      metadata = self._manager.item_metadata(step)["state"]
      tree = getattr(metadata, "tree", metadata)
      return {
        path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
        for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()
      }
    except Exception as error:  # Whatever Orbax makes of broken files.
      why = f"what it holds cannot be read ({_first_line(error)})"
      raise self._damaged(step, why) from error

  def phase(self, step: int) -> str:
    """The phase: 'sparse' if the checkpoint holds experts, else 'dense'.

    The arrays tell, so that a checkpoint that `convert` or T5X wrote needs no
    note of it.
    """
    has_experts = any("/base_layer/" in path for path in self.stored(step))
    return "sparse" if has_experts else "dense"

  def restore(self, step: int, like: dict[str, Any], what: str) -> dict:
    """Reads the part of a checkpoint that `like` describes.

    Args:
      step: Of a complete checkpoint.
      like: Nested dict of arrays or `jax.ShapeDtypeStruct`, with the
        shardings to restore to.
      what: Names the expected tree in an error.

    Raises:
      ValueError: An array is missing, or has another shape; names it.
    """
    stored = self.stored(step)
    wanted = traverse_util.flatten_dict(like, sep="/")
    for path, leaf in wanted.items():
      if path not in stored:
        raise ValueError(
          f"{self.path(step)} holds no array {path}, which {what} needs; the "
          "checkpoint is of another model: use the configuration it was "
          "trained with"
        )
      if stored[path].shape != tuple(leaf.shape):
        raise ValueError(
          f"{path} has shape {stored[path].shape} in {self.path(step)}, but "
          f"{what} needs {tuple(leaf.shape)}; use the configuration it was "
          "trained with"
        )
    try:
      return self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            item=like,
            restore_args=jax.tree.map(_restore_args, like),
            partial_restore=True,
          )
        ),
      )["state"]
    except jax.errors.JaxRuntimeError:
      raise  # No room on the devices: nothing is wrong with the files.
    except Exception as error:  # Whatever tensorstore makes of broken files.
      why = f"its arrays cannot be read ({_first_line(error)})"
      raise self._damaged(step, why) from error

  def wait(self) -> None:
    """Blocks until everything is on disk."""
    manager = self._manager
    with self._writing():
      manager.wait_until_finished()

  def check_empty(self) -> None:
    """Refuses to add a checkpoint to others."""
    if self.latest_step() is not None:
      raise ValueError(
        f"{self.directory} already holds checkpoint_{self.latest_step()}; "
        "choose an empty directory"
      )

  def close(self) -> None:
    """Waits, then frees the background threads."""
    try:
      self.wait()
    finally:
      self._idle_manager.close()
      self._thread.shutdown()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _first_line(error: BaseException) -> str:
  """What an exception says first, and its kind if it says nothing."""
  lines = str(error).strip().splitlines()
  text = lines[0].partition(" See full TensorStore details")[0] if lines else ""
  return text[:200] or type(error).__name__


def has_room(size: int) -> bool:
  """Whether every device of this host has room for so many bytes more.

  It has where they fit beside the most memory that was ever in use, the
  temporary arrays of a training step included, with a tenth left over. Only
  GPUs' figures are known to mean that; a CPU has no figures, and the host's
  memory. Others' answer is no.
  """
  for device in jax.local_devices():
    if device.platform == "gpu":
      memory = device.memory_stats() or {}
      used = memory.get("peak_bytes_in_use", 0) + size
      if used > 0.9 * memory.get("bytes_limit", 0):
        return False
    elif device.platform != "cpu":
      return False
  return True


def _bytes_per_device(tree: Tree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if isinstance(x, jax.Array)
  )


def _copied(tree: Tree) -> Tree:
  """The tree with new arrays in place of those on devices."""
  leaves, structure = jax.tree.flatten(tree)
  copies = iter(_copy([x for x in leaves if isinstance(x, jax.Array)]))
  return jax.tree.unflatten(
    structure,
    [next(copies) if isinstance(x, jax.Array) else x for x in leaves],
  )


@jax.jit
def _copy(arrays: list[jax.Array]) -> list[jax.Array]:
  """One program, because hundreds of small ones would take longer to start."""
  return [jnp.copy(array) for array in arrays]


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
  return ocp.ArrayRestoreArgs(
    sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
  )
