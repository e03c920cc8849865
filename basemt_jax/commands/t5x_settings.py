"""What T5X is told and would not follow, refused before anything is compiled.

`gin/t5x/` has `t5x_adapter.start` call `check` first. T5X's own programs parse
flags and gin, so what `basemt` finds in its configuration has to be found in
theirs afterwards: here. Only quotes that a shell has taken are looked for when
this is imported, by a gin file: T5X parses what its command line binds after
all files, and gin then does not say of which name it speaks.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from basemt_jax.commands import checks

Config = Mapping[tuple[str, str], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Told:
  """A parameter of T5X's that a run does not follow."""

  owner: str  # end of the name that gin has for its function or class
  parameter: str
  # values with which nothing is ignored, as gin prints them
  fits: tuple[str, ...]
  bind: str  # what to bind instead, and why


_MESH = (
  "EXPERT_DEVICES and MODEL_DEVICES, which are the mesh's: T5X's own meshes "
  "have no axis for experts"
)
_RATE = "LEARNING_RATE, WARMUP_STEPS and LEARNING_RATE_SCHEDULE"
TOLD = (
  Told(
    "__main__.train",
    "use_hardware_rng",
    ("False",),
    "USE_HARDWARE_RNG = False: the hardware's numbers change with the devices, "
    "and the run with them",
  ),
  Told(
    "t5x.trainer.Trainer",
    "num_microbatches",
    ("None", "1"),
    "steps.Settings.microbatches in its place: T5X's parts of a batch would "
    "take groups of rows apart",
  ),
  Told(
    "t5x.trainer.Trainer",
    "learning_rate_fn",
    ("@t5x_adapter.learning_rate()",),
    _RATE,
  ),
  *(
    Told("partitioning.PjitPartitioner", name, ("None", "1"), _MESH)
    for name in (
      *("num_partitions", "model_parallel_submesh"),
      *("ici_mesh_shape", "dcn_mesh_shape"),
    )
  ),
  *(
    Told(
      f"__main__.{name}", "partitioner", ("@t5x_adapter.partitioner()",), _MESH
    )
    for name in ("train", "evaluate", "infer")
  ),
  Told(
    "__main__.train",
    "get_dataset_fn",
    ("@t5x_data.get_dataset",),
    "train.get_dataset_fn = @t5x_data.get_dataset: T5X's shuffles anew, and "
    "begins the temperature schedule again, at every restart",
  ),
  *(
    Told("utils.create_learning_rate_scheduler", name, (value,), _RATE)
    for name, value in (
      ("base_learning_rate", "1.0"),
      ("warmup_steps", "10000"),
      ("factors", "'constant * rsqrt_decay'"),
    )
  ),
)


def check() -> None:
  """Checks all that gin has parsed for a program of T5X's.

  Raises:
    ValueError: A macro is mistyped or has no value, a value does not fit, or
      T5X is told what the run would not follow; with what to bind.
  """
  import gin

  checks.check([b.partition("=")[0].strip() for b in _given()])
  config = gin.config._CONFIG
  for told in TOLD:
    for found in _values(config, told.owner, told.parameter):
      if _text(found) not in told.fits:
        raise ValueError(
          f"{told.owner.removeprefix('__main__.')}.{told.parameter} is "
          f"{_text(found)}, which this run would not follow; bind {told.bind}"
        )
  for seed in _values(config, "__main__.train", "random_seed"):
    _, own = checks.followed(
      config, "SEED", config["SEED", "gin.macro"]["value"]
    )
    if seed != own:
      raise ValueError(
        f"train.random_seed (RANDOM_SEED) is {seed!r}, but SEED, of which the "
        f"order of the data is made too, is {own!r}; bind SEED alone"
      )


def _given() -> list[str]:
  """What T5X's command line binds: 'NAME = VALUE'."""
  from absl import flags

  values = flags.FLAGS
  if not values.is_parsed() or "gin_bindings" not in values:
    return []
  return values.gin_bindings


def check_quotes(bindings: Iterable[str]) -> None:
  """Refuses values that are text without quotes.

  Args:
    bindings: 'NAME = VALUE' each.

  Raises:
    ValueError: With the name, and how it is written.
  """
  import gin

  for binding in bindings:
    name, _, value = (part.strip() for part in binding.partition("="))
    if re.search("[@%]", value):  # What it refers to may not be known yet.
      continue
    try:
      gin.config.parse_value(value)
    except SyntaxError as error:
      raise ValueError(
        f"--gin.{name}={value} is no value for gin, which wants text in "
        "quotes that the shell leaves alone: write "
        f'--gin.{name}=\\"{value}\\"'
      ) from error


def _values(config: Config, owner: str, parameter: str) -> list[Any]:
  """What is bound to a parameter, without the macros in between."""
  return [
    checks.followed(config, parameter, bindings[parameter])[1]
    for (_, selector), bindings in config.items()
    if f".{selector}".endswith(f".{owner}") and parameter in bindings
  ]


def _text(value: Any) -> str:
  """The value as gin writes it, references by the ends of their names."""
  text = repr(value)
  if text.startswith("@"):
    return "@" + ".".join(text[1:].split("/")[-1].split(".")[-2:])
  return text


check_quotes(_given())
