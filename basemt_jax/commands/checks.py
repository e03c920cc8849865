"""What gin binds, compared with the annotations of what it is bound to.

gin takes any value for any parameter, and any macro. Here every binding of
this package's classes and functions is held against its annotation (see
`ranges.py`) before anything is called, and macros that nothing uses or nothing
sets are found. The checks need no more than gin's own tables, so that a run
with T5X can ask for them too.
"""

import collections.abc
import dataclasses
import difflib
import functools
import itertools
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import typing_extensions

# What pydantic says of a value, where a reader knows a better word.
_EXPECTED = {
  "int_type": "a whole number",
  "float_type": "a number",
  "string_type": "text (in quotes)",
  "string_too_short": "text that is not empty; is a variable unset?",
  "bool_type": "True or False",
  "dict_type": "a dictionary in braces",
  "sequence_str": "a list in parentheses",
  "too_short": "of {min_length} item(s) at least",
  "greater_than_equal": "at least {ge}",
  "greater_than": "above {gt}",
  "less_than_equal": "at most {le}",
  "less_than": "below {lt}",
  "callable_type": "a function",
}
_OURS = ("basemt_jax", "tasks")
Config = Mapping[tuple[str, str], Mapping[str, Any]]


def check(given: Iterable[str] = ()) -> None:
  """Checks all that gin has parsed.

  Args:
    given: Names that were set by hand, on the command line: a macro among them
      that nothing uses is refused whatever it is called; elsewhere only one
      that looks like a slip for another.

  Raises:
    ValueError: With the name, what was found, and what fits.
  """
  from gin import config as gin_config

  config = gin_config._CONFIG
  _check_macros(config, given)
  for (scope, selector), bindings in config.items():
    configurable = gin_config._REGISTRY[selector]
    if _is_ours(configurable.wrapped):
      hints = _hints(configurable.wrapped)
      where = "/".join(
        filter(None, (scope, selector.removeprefix("basemt_jax.")))
      )
      for name, value in bindings.items():
        _check_binding(config, f"{where}.{name}", value, hints.get(name, Any))


def check_fields(instance: Any) -> None:
  """Compares a dataclass's values with its annotations, and those within.

  Raises:
    ValueError: With the field's name, what was found, and what fits.
  """
  hints = _hints(type(instance))
  for field in dataclasses.fields(instance):
    value = getattr(instance, field.name)
    for error in _errors(value, hints[field.name]):
      raise ValueError(
        f"{type(instance).__name__}.{field.name} is {reprlib.repr(value)}; it "
        f"must be {_expected([error])}"
      )
    # What can be called (a schedule, a layer) has checked itself.
    is_settings = dataclasses.is_dataclass(value) and not callable(value)
    if is_settings and _is_ours(type(value)):
      check_fields(value)


def nearest(message: str) -> str:
  """The name that gin's message about an unknown name is closest to, or ''."""
  parameter = re.search(
    r"'([\w./]+)' doesn't have a parameter named '(\w+)'", message
  )
  names = dict(_registered())
  if parameter:
    owner = parameter[1].rpartition(".")[2]
    known = [
      field
      for name, wrapped in names.items()
      if name.rpartition(".")[2] == owner
      for field in _hints(wrapped)
    ]
    near = difflib.get_close_matches(parameter[2], known, 1)
  else:
    unknown = re.search(
      r"(?:matching reference '@|matching '|selector )([\w./]+)"
      r"|^'([\w./]+)' was not provided",
      message,
    )
    name = (unknown[1] or unknown[2]) if unknown else ""
    wanted = name.rpartition("/")[2]
    modules = {wrapped.__module__ for wrapped in names.values()}
    known = [*names, *itertools.chain(*map(_public, modules))]
    near = difflib.get_close_matches(wanted, known, 1)
  return near[0] if near else ""


def _public(module: str) -> list[str]:
  """What gin could know of a module of which it knows something."""
  return [
    f"{module.removeprefix('basemt_jax.')}.{name}"
    for name, value in vars(sys.modules[module]).items()
    if getattr(value, "__module__", "") == module and not name.startswith("_")
  ]


# --------------------------------------------------------------- macros


def _macro(value: Any) -> str:
  """The name of the macro that a value refers to; '' where it does not."""
  if _is_reference(value) and value.configurable.selector == "gin.macro":
    return "/".join(value.scopes)
  return ""


def _is_reference(value: Any) -> bool:
  from gin import config as gin_config

  return isinstance(value, gin_config.ConfigurableReference)


def _is_required(value: Any) -> bool:
  return _is_reference(value) and repr(value) == "%gin.REQUIRED"


def _check_macros(config: Config, given: Iterable[str]) -> None:
  """Refuses macros that have no value, and mistyped ones."""
  from gin import config as gin_config

  values = {
    scope: bindings["value"]
    for (scope, selector), bindings in config.items()
    if selector == "gin.macro"
  }
  used = {_macro(ref) for ref in gin_config.iterate_references(config)} - {""}
  for name in sorted(values.keys() - used):
    by_hand = name in given
    near = difflib.get_close_matches(name, used, 1, 0.6 if by_hand else 0.85)
    if near or by_hand:
      raise ValueError(
        f"{'--gin.' if by_hand else ''}{name}: nothing uses that macro; "
        + (f"did you mean {near[0]}?" if near else "see gin/runs/train.gin")
      )
  # A model that was forgotten first: it may set others.
  for name in sorted(used, key=lambda name: (name in values, name)):
    if name not in values and name == "NETWORK":
      raise ValueError(
        "the macro NETWORK has no value: give a model, such as "
        "--gin_file=gin/models/tiny.gin, before the recipe"
      )
    if name not in values or _is_required(values[name]):
      raise ValueError(
        f"the macro {name} has no value: set it with --gin.{name}=VALUE"
      )


# --------------------------------------------------------------- values


def _check_binding(
  config: Config, name: str, value: Any, annotation: Any
) -> None:
  """Refuses a value that does not fit; says which macro it came by."""
  name, value = followed(config, name, value)
  if _is_required(value):
    raise ValueError(f"{name} has no value: set it with --gin.{name}=VALUE")
  if _is_call(value):
    found = _result(value.configurable.wrapped)
    if not _fits(found, annotation):
      raise ValueError(
        f"{name} is {value!r}, which gives {_name(found)}; it must be "
        f"{_expected(_errors(value, annotation))}"
        + _without_call(value, annotation)
      )
    return
  plain = _plain(config, value)
  errors = [e for e in _errors(plain, annotation) if not _is_call(e["input"])]
  if not errors:
    return
  for place in errors[0]["loc"]:  # The innermost macro is to blame.
    if "[key]" in errors[0]["loc"] or not _has(value, place):
      break
    name, value = followed(config, f"{name}[{place!r}]", value[place])
  same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
  shown = value if _is_reference(value) else reprlib.repr(value)
  raise ValueError(
    f"{name} is {shown}; it must be {_expected(same)}"
    + _hint(value, annotation)
  )


def followed(config: Config, name: str, value: Any) -> tuple[str, Any]:
  """Name and value of the last macro in a chain of references."""
  while macro := _macro(value):
    name, value = macro, config[macro, "gin.macro"]["value"]
  return name, value


def _has(value: Any, place: Any) -> bool:
  """Whether `value[place]` is there; pydantic also names types of a union."""
  if isinstance(value, dict):
    return place in value
  return isinstance(value, list | tuple) and isinstance(place, int)


def _plain(config: Config, value: Any) -> Any:
  """A value with macros within put in; calls are left as references."""
  _, value = followed(config, "", value)
  if isinstance(value, list | tuple):
    return type(value)(_plain(config, item) for item in value)
  if isinstance(value, dict):
    return {k: _plain(config, v) for k, v in value.items()}
  if _is_reference(value) and not value.evaluate:
    return value.configurable.wrapped
  return value


def _is_call(value: Any) -> bool:
  return _is_reference(value) and value.evaluate


def _errors(value: Any, annotation: Any) -> list[Any]:
  """What does not fit, as pydantic's errors; empty where all does."""
  import pydantic

  if _is_record(annotation):
    if isinstance(value, annotation):
      return []
    text = f"of class {annotation.__name__}"
    return [{"loc": (), "input": value, "type": "instance", "msg": text}]
  gives = _gives(annotation)
  if gives is not None and callable(value):
    result = _result(value)
    # Its result would be the function that is wanted, or is clearly another.
    is_maker = result is not Any and _fits(result, annotation)
    is_other = is_maker or _is_record(result) or _is_record(gives)
    if is_other and not _fits(result, gives):
      text = f"a function that gives {_name(gives)}"
      return [{"loc": (), "input": value, "type": "gives", "msg": text}]
  try:
    _adapter(annotation).validate_python(value)
  except pydantic.ValidationError as error:
    return list(error.errors(include_url=False))
  return []


def _is_record(annotation: Any) -> bool:
  """Whether it is a class of records, told by `isinstance` alone."""
  return isinstance(annotation, type) and (
    dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields")
  )


@functools.lru_cache(1024)
def _adapter(annotation: Any) -> Any:
  import pydantic

  return pydantic.TypeAdapter(
    annotation,
    config=pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True),
  )


def _expected(errors: Iterable[Any]) -> str:
  """What would have fitted, in words."""
  texts = []
  for error in errors:
    text = error["msg"].removeprefix("Input should be ")
    limits = {
      name: f"{value:g}" if isinstance(value, float) else value
      for name, value in error.get("ctx", {}).items()
    }
    if error["type"] == "predicate_failed":  # Its name says what it asks.
      text = text.split("'")[1].replace("_", " ")
    elif limits.get("class") == "Sequence":
      text = _EXPECTED["sequence_str"]
    elif limits.get("lt") == "inf":
      text = "finite"
    elif error["type"] in _EXPECTED:
      text = _EXPECTED[error["type"]].format(**limits)
    texts.append(text)
  return " or ".join(dict.fromkeys(texts))


def _hint(value: Any, annotation: Any) -> str:
  """How to write what was meant."""
  if _is_reference(value):
    if _fits(_result(value.configurable.wrapped), annotation):
      return f": write {value!r}() for what it returns"
    return ""
  gives = _gives(annotation)
  for name, wrapped in _registered():
    result = _result(wrapped)
    if dataclasses.is_dataclass(gives) and result is gives:
      return f", such as @{name}"
    if result == annotation and not isinstance(wrapped, type):
      return f", such as @{name}()"
    if dataclasses.is_dataclass(annotation) and result is annotation:
      return f", such as @{name}()"
  return ""


def _without_call(value: Any, annotation: Any) -> str:
  """For @fn() where @fn is meant."""
  gives = _gives(annotation)
  if gives is None or not _fits(_result(value.configurable.wrapped), gives):
    return ""
  return f": write {str(value).removesuffix('()')} without ()"


def _registered() -> Iterator[tuple[str, Any]]:
  """Names and objects of this package that gin knows."""
  from gin import config as gin_config

  for selector, configurable in gin_config._REGISTRY.items():
    if _is_ours(configurable.wrapped):
      yield selector.removeprefix("basemt_jax."), configurable.wrapped


# ---------------------------------------------------------- annotations


def _is_ours(function: Any) -> bool:
  return function.__module__.split(".")[0] in _OURS


def _hints(function: Any) -> dict[str, Any]:
  """Annotations of a function's or a class's parameters."""
  if isinstance(function, type) and not dataclasses.is_dataclass(function):
    function = function.__init__  # type: ignore[misc]
  return typing.get_type_hints(function, include_extras=True)


def _result(function: Any) -> Any:
  """The annotation of what a call gives."""
  if isinstance(function, type):
    return function
  try:
    return typing.get_type_hints(function).get("return", Any)
  except (NameError, TypeError, AttributeError):  # Of another package.
    return Any


def _gives(annotation: Any) -> Any:
  """What a function of this annotation returns; None: it is no function."""
  if typing.get_origin(annotation) is not collections.abc.Callable:
    return None
  return typing.get_args(annotation)[1]


def _fits(found: Any, expected: Any) -> bool:
  """Whether one annotation may stand for another; True where unclear."""
  if typing.get_origin(expected) is typing.Annotated:
    return _fits(found, typing.get_args(expected)[0])
  if typing.get_origin(found) is typing.Annotated:
    return _fits(typing.get_args(found)[0], expected)
  if typing.get_origin(expected) is typing.Literal:
    return _fits(found, type(typing.get_args(expected)[0]))
  for side in (found, expected):
    if typing.get_origin(side) in (typing.Union, types.UnionType):
      return any(
        _fits(*((x, expected) if side is found else (found, x)))
        for x in typing.get_args(side)
      )
  found, expected = (typing.get_origin(x) or x for x in (found, expected))
  if Any in (found, expected) or not (
    isinstance(found, type) and isinstance(expected, type)
  ):
    return True
  if typing_extensions.is_protocol(expected):
    members = typing_extensions.get_protocol_members(expected)
    return all(hasattr(found, member) for member in members)
  if _is_record(found) and expected is collections.abc.Sequence:
    return False  # An optimizer is a tuple by accident.
  if expected is float and found is int:
    return True
  return issubclass(found, expected)


def _name(annotation: Any) -> str:
  origin = typing.get_origin(annotation) or annotation
  if origin is collections.abc.Callable:
    return "a function"
  return getattr(origin, "__name__", str(annotation))
