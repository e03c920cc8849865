"""Mixtures and their tasks, found by name.

They are SeqIO's, or declared (`declared`) where nobody has imported SeqIO yet:
both have the same names, sources, features and sizes.
"""

import difflib
import re
from typing import Any, TypeAlias

from basemt_jax import files
from basemt_jax.data import declared, languages

MixtureOrTask: TypeAlias = Any  # Or the name that it is registered by.


def _keep_off_accelerators() -> None:
  """TensorFlow only reads data here; it would take JAX's memory."""
  import tensorflow as tf

  with files.native_output_captured():  # It complains where there are none.
    tf.config.set_visible_devices([], "GPU")


declared.when_imported(_keep_off_accelerators)


def get_mixture(mixture: MixtureOrTask) -> Any:
  """A registered mixture or task, or the object itself.

  Raises:
    ValueError: no such name; the nearest ones are named.
  """
  if not isinstance(mixture, str):
    return mixture
  if found := declared.find(mixture):
    return found
  import seqio

  names = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
  if mixture in names:
    return seqio.get_mixture_or_task(mixture)
  near = difflib.get_close_matches(mixture, names, n=3, cutoff=0.4)
  hint = f"did you mean {' or '.join(near)}" if near else "none is similar"
  raise ValueError(
    f"no mixture or task named {mixture!r} is registered ({hint}); import the "
    "module that registers it first"
  )


def direction_or_name(task_name: str) -> str:
  """The direction of a task, or the end of its name where that tells none."""
  try:
    return str(languages.Direction.of_task(task_name))
  except ValueError:
    return re.split(r"[.:/]", task_name)[-1]


def subtasks(mixture: Any) -> list[Any]:
  """The tasks of a mixture, or the task itself."""
  return list(getattr(mixture, "tasks", [mixture]))


def tasks_by_direction(mixture: MixtureOrTask) -> dict[str, Any]:
  """The tasks of a mixture by direction, sorted by direction.

  Raises:
    ValueError: two tasks of one direction, or a name that tells none.
  """
  tasks: dict[str, Any] = {}
  for task in subtasks(get_mixture(mixture)):
    direction = str(languages.Direction.of_task(task.name))
    if direction in tasks:
      raise ValueError(
        f"tasks {tasks[direction].name!r} and {task.name!r} both translate "
        f"{direction!r}: name them apart after the last '.' or ':'"
      )
    tasks[direction] = task
  return dict(sorted(tasks.items()))


def task_split(task: Any, split: str) -> str | None:
  """The task's own name of a split, or None."""
  names = (split, "dev") if split == "validation" else (split,)
  return next((name for name in names if name in task.splits), None)
