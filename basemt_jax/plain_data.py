"""Configurations as plain data, and back, without running what they name.

Numbers, texts, lists and dictionaries are JSON's own; a dataclass becomes
{"class": "module.Name", "fields": {...}}. Read back, a class must be a
dataclass of this package or of a module that the reader names: data from
somebody else imports nothing and calls nothing else.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_OF_FLAX = ("parent", "name")


def to_plain(value: Any) -> Any:
  """The value as JSON has it.

  What is no plain data, such as a function, leaves its name: enough to compare
  and to tell, not to be made again.
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {
      field.name: to_plain(getattr(value, field.name))
      for field in dataclasses.fields(value)
      if field.init
    }
    # Flax's modules have these two besides their own.
    for name in _OF_FLAX:
      if hasattr(value, "scope"):
        fields.pop(name, None)
    return {"class": _name(type(value)), "fields": fields}
  if isinstance(value, Mapping):
    if all(isinstance(k, str) for k in value) and "class" not in value:
      return {key: to_plain(item) for key, item in value.items()}
    return {"class": "dict", "items": [to_plain(i) for i in value.items()]}
  if isinstance(value, (list, tuple)):
    return [to_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return {"class": "float", "value": repr(value)}
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if hasattr(value, "item") and getattr(value, "shape", None) == ():
    return to_plain(value.item())
  return {"class": "other", "name": _name(value)}


def call_to_plain(function: Callable[..., Any]) -> dict[str, Any]:
  """A function with the arguments that it will be called with, to compare.

  Some are given by `functools.partial` around it; others have their defaults.
  """
  given: dict[str, Any] = {}
  while isinstance(function, functools.partial):
    given = {**function.keywords, **given}
    function = function.func
  own = _argument_defaults(function)
  return {"name": _name(function), "arguments": to_plain({**own, **given})}


def _argument_defaults(function: Callable[..., Any]) -> dict[str, Any]:
  return {
    name: parameter.default
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.default is not inspect.Parameter.empty
  }


def completed_call(value: Mapping[str, Any]) -> dict[str, Any]:
  """As `completed`, of what `call_to_plain` gave."""
  module, _, name = value["name"].rpartition(".")
  function = getattr(sys.modules.get(module), name, None)
  own = to_plain(_argument_defaults(function)) if callable(function) else {}
  return {"name": value["name"], "arguments": {**own, **value["arguments"]}}


def _name(value: Any) -> str:
  kind = value if hasattr(value, "__qualname__") else type(value)
  return f"{kind.__module__}.{kind.__qualname__}"


def from_plain(value: Any, modules: Sequence[str] = ()) -> Any:
  """What `to_plain` was given; lists come back as tuples.

  Of `modules`, besides this package's, dataclasses may be made; they are
  imported.

  Raises:
    ValueError: it names a class of another module, or none that fits.
  """
  if isinstance(value, list):
    return tuple(from_plain(item, modules) for item in value)
  if not isinstance(value, dict):
    return value
  kind = value.get("class")
  if kind is None:
    return {key: from_plain(item, modules) for key, item in value.items()}
  try:
    if kind == "dict":
      return dict(from_plain(item, modules) for item in value["items"])
    if kind == "float":
      return float(value["value"])
    if kind == "other":
      raise ValueError(
        f"{value['name']} is neither a value nor a dataclass, and cannot be "
        "made again from a description; make it a frozen dataclass"
      )
    fields = value["fields"].items()
    made = {name: from_plain(item, modules) for name, item in fields}
    return _dataclass(kind, modules)(**made)
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{kind!r} cannot be made: {error}") from error


def completed(value: Any) -> Any:
  """Plain data with the defaults of fields that it lacks.

  So what an earlier version wrote compares with what this one writes. Of other
  packages' classes only those count that have been imported.
  """
  if isinstance(value, (list, tuple)):
    return [completed(item) for item in value]
  if not isinstance(value, Mapping):
    return value
  if "class" not in value or "fields" not in value:
    return {key: completed(item) for key, item in value.items()}
  own = {name: completed(item) for name, item in value["fields"].items()}
  return {"class": value["class"], "fields": _defaults(value["class"]) | own}


def _defaults(name: str) -> dict[str, Any]:
  """Defaults of a dataclass's fields as plain data."""
  try:
    found = _dataclass(name, sys.modules.keys())
  except ValueError:
    return {}
  values = {}
  for field in dataclasses.fields(found):
    if field.init and not (hasattr(found, "scope") and field.name in _OF_FLAX):
      if field.default is not dataclasses.MISSING:
        values[field.name] = to_plain(field.default)
      elif field.default_factory is not dataclasses.MISSING:
        values[field.name] = to_plain(field.default_factory())
  return values


def _dataclass(name: str, modules: Container[str]) -> type:
  """The class of that name, if it may be made."""
  module, _, attribute = name.rpartition(".")
  if module not in modules and module.partition(".")[0] != _PACKAGE:
    raise ValueError(
      f"it needs {name}, which is not of this package; if you trust that "
      f"module, name it with --module {module}"
    )
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"there is no {name} ({error})") from error
  if not isinstance(found, type) or not dataclasses.is_dataclass(found):
    raise ValueError(f"{name} is not a dataclass")
  return found
