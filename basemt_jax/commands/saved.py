"""The configuration in a model directory, which may be somebody else's.

gin imports what a file names, and calls what it refers to. From a file that
comes with a model nothing is imported but this package and modules that the
user names, and nothing is called that does not configure a run.
"""

import pathlib
from collections.abc import Collection
from typing import Any

_PACKAGES = ("basemt_jax", "tasks", "optax", "gin", "__gin__")
# Of this package. Others write files, or import and start things.
_OURS = (
  *("base_layer", "conversion", "evaluation", "experts", "heating", "layers"),
  *("losses", "metrics", "model", "optimizer", "routing", "run", "sampling"),
  *("steps", "translation", "commands.trackers", "data.languages"),
  "data.subword_sampling",
)


def check_imports(path: str, named: Collection[str]) -> None:
  """Refuses a file that imports modules that are neither ours nor `named`.

  Nothing of it is used yet.

  Raises:
    ValueError: it imports another module, or includes a file.
  """
  from gin import config_parser

  class Unused(config_parser.ParserDelegate):
    """Takes references; nothing is made of them."""

    def configurable_reference(self, *_: Any) -> None:
      """Of `@name`."""

    def macro(self, *_: Any) -> None:
      """Of `%name`."""

  text = pathlib.Path(path).read_text(encoding="utf-8")
  for statement in config_parser.ConfigParser(text, Unused()):
    if isinstance(statement, config_parser.IncludeStatement):
      raise ValueError(
        f"{path} includes {statement.filename}, which no saved configuration "
        "does; give the files themselves with --gin_file"
      )
    if isinstance(statement, config_parser.ImportStatement):
      module = statement.module
      if not (module.split(".")[0] in _PACKAGES or _is_named(module, named)):
        raise _untrusted(path, f"imports {module}", module)


def check_references(path: str, named: Collection[str]) -> None:
  """Refuses what gin has parsed, if it refers to what configures no run.

  Raises:
    ValueError: naming the first such function or class.
  """
  from gin import config as gin_config

  config = gin_config._CONFIG
  used = [gin_config._REGISTRY[selector] for _, selector in config]
  used += [
    reference.configurable
    for reference in gin_config.iterate_references(config)
  ]
  for configurable in used:
    module = configurable.wrapped.__module__ or ""
    package, _, inner = module.partition(".")
    is_ours = package == "basemt_jax" and inner in _OURS
    is_other = package in _PACKAGES[1:]
    if not (is_ours or is_other or _is_named(module, named)):
      what = f"refers to {module}.{configurable.wrapped.__qualname__}"
      raise _untrusted(path, what, module)


def _is_named(module: str, named: Collection[str]) -> bool:
  return any(f"{module}.".startswith(f"{name}.") for name in named)


def _untrusted(path: str, what: str, module: str) -> ValueError:
  return ValueError(
    f"{path} {what}; of a configuration that comes with a model only what is "
    f"of this package is used: if you trust that module, name it with --module "
    f"{module}, or give --gin_file of your own"
  )
