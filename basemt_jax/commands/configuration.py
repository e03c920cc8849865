"""The configuration of a command: gin files and bindings in, a `run.Run` out.

Flags follow T5X: `--gin_file` (repeatable), `--gin.NAME=VALUE`,
`--gin_search_paths`. gin itself takes any macro and says a lot about what it
does not like; here mistyped and missing macros are found, and an error is one
sentence.
"""

import argparse
import ast
import ctypes
import dataclasses
import difflib
import functools
import glob
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from basemt_jax import files as files_lib
from basemt_jax.commands import checks
from basemt_jax.commands import saved as saved_lib

PACKAGE = pathlib.Path(__file__).parent.parent
CONFIG_FILE = "config.gin"
OPERATIVE_FILE = "operative_config.gin"


# Errors of gin and of Python whose text says what is wrong without their name.
_TELLING = (
  *(ValueError, AttributeError, NameError, SyntaxError),
  *(ImportError, OSError),
)


class UsageError(ValueError):
  """The command line or the configuration is wrong."""


def configured(
  options: argparse.Namespace,
  arguments: Mapping[str, Any] | None = None,
  **macros: Any,
) -> Any:
  """Parses the configuration and returns its `run.Run`.

  Args:
    options: Flags.
    arguments: Of `run.Run`, instead of what is configured for them, which is
      then not evaluated.
    **macros: Win over those of files.
  """
  import gin
  from basemt_jax import processes

  run_class = functools.partial(_parse(options, macros), **(arguments or {}))
  processes.check_same("the configuration", gin.config_str())
  try:
    run = processes.in_turn(run_class)  # May make a vocabulary.
  except TypeError as error:  # A value is missing.
    raise UsageError(f"configuration: {str(error).splitlines()[0]}") from error
  return _checked(run)


def _checked(run: Any) -> Any:
  """The run with its paths as the file system knows them, or an error."""
  checks.check_fields(run)  # What functions of the configuration returned.
  checks.check_fields(run.network(vocab_size=1))
  run.check()
  paths = {
    name: os.path.expanduser(value)
    for name in ("model_dir", "store_dir", "cache_dir")
    if (value := getattr(run, name)) is not None
  }
  optimizer = _with_bindings(run.settings.optimizer)
  settings = dataclasses.replace(run.settings, optimizer=optimizer)
  return dataclasses.replace(run, settings=settings, **paths)


def _with_bindings(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function with what gin binds, for those who do not know gin."""
  import gin

  try:
    return functools.partial(function, **gin.get_bindings(function))
  except ValueError:  # It is not gin's.
    return function


# What may be set for a model that is used as it was trained, by the fields of
# `run.Run`.
_USES = {
  "BATCH_SIZE": "batch_size",
  "EXPERT_DEVICES": "expert_devices",
  "MODEL_DEVICES": "model_devices",
  "translation.SearchOptions": "search",
  "evaluation.BandThresholds": "bands",
  "run.Run.verify": "verify",
}


def trained(options: argparse.Namespace) -> Any:
  """The `run.Run` of a trained model.

  What its directory says of it is data (`description`); its `config.gin` is
  not read. Only a gin file that the user names is.
  """
  import_modules(options.module)
  if options.gin_file or not options.model_dir:
    return configured(options)
  from basemt_jax import run

  found = run.described(options.model_dir, options.module)
  for binding in _as_gin(options.bindings):
    found = _use(found, binding)
  checks.check_fields(found)
  return found


def _use(run: Any, binding: str) -> Any:
  """The run with `NAME = VALUE`, if it is about how a model is used."""
  import gin

  name, _, text = binding.partition(" = ")
  owner, _, field = name.rpartition(".")
  group = _USES.get(name) or _USES.get(owner)
  try:
    value = gin.config.parse_value(text)
    if name in _USES:
      return dataclasses.replace(run, **{_USES[name]: value})
    if group:
      part = dataclasses.replace(getattr(run, group), **{field: value})
      return dataclasses.replace(run, **{group: part})
  except TypeError as error:
    raise UsageError(f"--gin.{name}: {error}") from error
  raise UsageError(
    f"--gin.{name}: a model is used as it was trained; give the --gin_file it "
    f"was trained with to set more than {', '.join(_USES)}"
  )


def _parse(
  options: argparse.Namespace, macros: Mapping[str, Any]
) -> Callable[..., Any]:
  """Parses files and bindings; returns the configurable `run.Run`."""
  import gin
  from basemt_jax import run
  from basemt_jax.data import mixtures  # noqa: F401  What it says of imports.

  named = getattr(options, "module", [])
  import_modules(named)
  files = list(options.gin_file)
  if options.model_dir:
    macros = {"MODEL_DIR": options.model_dir, **macros}
  is_saved = not files
  if is_saved:
    files = [_saved_file(options)]
  for path in (
    "",
    *filter(None, options.gin_search_paths.split(",")),
    *_roots(),
  ):
    gin.add_config_file_search_path(path)
  _look_in_working_directory()
  bindings = [f"{name} = {value!r}" for name, value in macros.items()]
  # gin logs an error for every place where an include is not.
  logging.disable(logging.ERROR)
  try:
    paths = [_find(f, options) for f in files]
    if is_saved:
      saved_lib.check_imports(files[0], named)
    with files_lib.native_output_captured():  # Of what the tasks import.
      gin.parse_config_files_and_bindings(paths, [], finalize_config=False)
      for binding in [*_as_gin(options.bindings), *bindings]:
        gin.parse_config(_with_imports(binding))
      if is_saved:
        saved_lib.check_references(files[0], named)
      checks.check([b.partition("=")[0].strip() for b in options.bindings])
      gin.finalize()
  except Exception as error:  # Modules that it imports raise anything.
    # gin tells the line, and not the file.
    of_text = isinstance(error, (SyntaxError, UnicodeDecodeError))
    where = f"{', '.join(files)}: " if of_text else ""
    raise UsageError(
      f"configuration: {where}{_what_is_wrong(error)}"
    ) from error
  finally:
    logging.disable(logging.NOTSET)
  try:
    return gin.get_configurable(run.Run)
  except ValueError as error:
    raise UsageError(
      f"{', '.join(files)} binds nothing of run.Run; include "
      "'gin/runs/train.gin'"
    ) from error


def _saved_file(options: argparse.Namespace) -> str:
  """The configuration in the model directory, where no other is given."""
  if not options.model_dir:
    raise UsageError(
      "nothing is configured: give --gin_file=gin/recipes/NAME.gin, or "
      "--model_dir of a run, which holds its configuration"
    )
  saved = pathlib.Path(options.model_dir) / CONFIG_FILE
  if not saved.exists():
    raise UsageError(
      f"{options.model_dir} is not the directory of a run: it holds no "
      f"{CONFIG_FILE}; give another, or --gin_file"
    )
  return str(saved)


# Bytes of compiled programs that are kept between runs; the least recently used
# go first. A training step for a GPU takes some ten million.
_PROGRAMS_SIZE = 4 * 2**30


def keep_programs() -> None:
  """Has JAX keep what it compiles in the cache folder, for the next run.

  JAX's own variables count where they are set. They are read when JAX is
  imported, so that this comes before; later it does nothing.
  """
  from basemt_jax.data import row_store

  if "jax" in sys.modules:
    return
  folder = os.path.join(row_store.default_cache_dir(), "programs")
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_PROGRAMS_SIZE))
  for name, value in (
    ("MIN_COMPILE_TIME_SECS", "0"),  # A run starts with hundreds of small ones.
    ("MIN_ENTRY_SIZE_BYTES", "-1"),
  ):
    os.environ.setdefault(f"JAX_PERSISTENT_CACHE_{name}", value)


# Files of GPUs and TPUs on Linux.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/*")
# Of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
  """Has the C library keep freed memory, on a machine with CPUs only.

  A step's program asks for its working memory anew each time. By default glibc
  gives that back to the system after every step, which then has to provide and
  clear it page by page: a fifth of the quickstart's step. That must be changed
  before JAX has threads with memory of their own. Other C libraries are left
  alone.
  """
  if sys.platform != "linux" or any(map(glob.glob, _ACCELERATORS)):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return
  mallopt(_ARENA_MAX, 1)  # Other arenas than the first are always trimmed.
  mallopt(_MMAP_MAX, 0)
  mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _roots() -> list[str]:
  """Where the repository's or the installed package's `gin/` is found."""
  return [str(PACKAGE.parent), str(PACKAGE)]


def _find(name: str, options: argparse.Namespace) -> str:
  """The gin file's path, in the search paths if it is not there as given."""
  places = ["", *options.gin_search_paths.split(","), *_roots()]
  for place in places:
    if (pathlib.Path(place) / name).is_file():
      return str(pathlib.Path(place) / name)
  folder = _gin_folder() / "recipes"
  recipes = [path.name for path in folder.glob("*.gin")]
  near = difflib.get_close_matches(pathlib.Path(name).name, recipes, n=1)
  hint = f"did you mean gin/recipes/{near[0]}?" if near else f"see {folder}"
  raise UsageError(f"no gin file {name}; {hint}")


def _gin_folder() -> pathlib.Path:
  """The repository's or the installed package's `gin/`."""
  folders = [pathlib.Path(root, "gin") for root in _roots()]
  return next((f for f in folders if (f / "recipes").is_dir()), folders[0])


def _as_gin(bindings: Sequence[str]) -> list[str]:
  r"""`NAME=VALUE` as gin; a bare word or path is taken as a string.

  A shell removes the quotes of --gin.MODEL_DIR="/tmp/run"; T5X users write
  \"...\", which works too.
  """
  result = []
  for binding in bindings:
    name, equals, value = binding.partition("=")
    if not equals:
      raise UsageError(
        f"--gin.{binding} has no value; write --gin.{binding}=VALUE"
      )
    if value.startswith("~"):
      value = os.path.expanduser(value)
    if not _is_literal(value) and not re.match(r"[@%]|[(\[{].*[@%]", value):
      value = repr(value)
    result.append(f"{name.strip()} = {value}")
  return result


def _with_imports(binding: str) -> str:
  """The binding, after imports where it is the first to use something.

  gin files make known what they use of the modules that they import; the
  command line may use others of these modules: `--gin.OPTIMIZER=@optax.lion`.
  """
  from gin import config

  name, _, value = binding.partition(" = ")
  used = re.findall(r"@(?:\w+/)*([\w.]+)", value)
  used += filter(None, [name.rpartition("/")[2].rpartition(".")[0]])
  if all(config._REGISTRY.matching_selectors(x) for x in used):
    return binding
  imports = {x.bound_name(): x.format() for x in config._IMPORTS}
  roots = {x.partition(".")[0] for x in used}
  if not roots <= imports.keys():  # gin says what it does not know.
    return binding
  head = "from __gin__ import dynamic_registration"
  return "\n".join([head, *sorted(imports[x] for x in roots), binding])


def _is_literal(text: str) -> bool:
  """Whether gin reads the text as a value: a number, a list, quoted text."""
  try:
    ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return False
  return True


def _what_is_wrong(error: Exception) -> str:
  """One sentence, with the nearest name where one was mistyped."""
  text = one_sentence(error)
  # gin raises a class of its own, which has lost the module's name.
  if missing := re.search(r"No module named '([\w.]+)'", text):
    near = difflib.get_close_matches(missing[1], _module_names(), 1, 0.75)
    where = "the current folder, PYTHONPATH and what is installed"
    hint = f"did you mean {near[0]}?" if near else f"looked in {where}"
    return f"a module it imports is missing: {text}; {hint}"
  if isinstance(error, RecursionError):
    return "a gin file includes itself; take that include out"
  if isinstance(error, UnicodeDecodeError):
    return f"a gin file is no UTF-8 text ({text})"
  if name := checks.nearest(text):
    return f"{text.rstrip('.')}; did you mean {name}?"
  if missing := re.search(
    r"<module '([\w.]+)'.*> has no attribute (\w+)", text
  ):
    return f"{missing[1]} has no {missing[2]}"
  if "matching reference" in text:
    hint = "what the command line names, a gin file has to import"
    return f"{text.partition('. In bindings')[0]}; {hint}"
  if isinstance(error, _TELLING):
    return text
  return f"{type(error).__name__}: {text}"


def _module_names() -> list[str]:
  """What a configuration may mean when it imports `task.cldr`."""
  import pkgutil

  roots = [("tasks", PACKAGE.parent / "tasks"), ("basemt_jax", PACKAGE)]
  return [
    f"{root}.{module.name}"
    for root, folder in roots
    for module in pkgutil.iter_modules([str(folder)])
  ] + [root for root, _ in roots]


def _look_in_working_directory() -> None:
  """Lets modules of the working directory be imported, after all others."""
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())


def import_modules(names: Sequence[str]) -> None:
  """Imports the user's modules, from the working directory too."""
  import importlib

  from basemt_jax.data import mixtures  # noqa: F401  What it says of imports.

  _look_in_working_directory()
  with files_lib.native_output_captured():
    for name in names:
      try:
        importlib.import_module(name)
      except Exception as error:
        raise UsageError(f"--module {name}: {_what_is_wrong(error)}") from error


def save_config(model_dir: str) -> None:
  """Keeps the configuration with the run, for later commands and readers."""
  import jax

  import gin

  if jax.process_index() == 0:
    pathlib.Path(model_dir).mkdir(parents=True, exist_ok=True)
    directory = pathlib.Path(model_dir)
    for name, text in (
      (CONFIG_FILE, gin.config_str()),  # All bindings: what commands read.
      (OPERATIVE_FILE, gin.operative_config_str()),  # Those that had effect.
    ):
      (directory / name).write_text(text, encoding="utf-8")


def one_sentence(error: Exception) -> str:
  """The error's text without gin's and Python's trailing explanations."""
  text = str(error).strip() or type(error).__name__
  if isinstance(error, OSError) and error.filename and error.strerror:
    text = f"{error.filename}: {error.strerror}"
  # One that gin or another error has taken in.
  text = re.sub(r"\[Errno \d+\] ([^:\n]+): '([^'\n]+)'", r"\2: \1", text)
  # gin repeats the whole configuration there.
  text = text.split(" in config string:")[0]
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  # gin appends where a call came from ("In call to configurable ...").
  return " ".join(x for x in lines if not x.startswith("In call to"))
