"""The `basemt` command: the one place that parses flags.

    basemt train --gin_file=gin/recipes/quickstart.gin --gin.TRAIN_STEPS=500

Each command is a file of `commands/`, with its flags and what it prints; how it
is configured is in `commands/configuration.py`.
"""

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

# Quiet C++ logs; set before TensorFlow or XLA are loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from basemt_jax import files
from basemt_jax.commands import configuration, flags

_INTERRUPTED = 130  # The exit code of shells for SIGINT.


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit code.

  An error of the user's is one sentence on standard error; `--traceback`
  shows where it came from. What nobody foresaw shows it anyway.

  Exit codes: 0, done (or stopped by a signal with a checkpoint to go on from);
  1, an error; 2, wrong flags; 130, interrupted.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  bindings = [a[len("--gin.") :] for a in arguments if a.startswith("--gin.")]
  rest = [a for a in arguments if not a.startswith("--gin.")]
  configuration.keep_programs()  # Before a command imports JAX.
  options = _parser(rest).parse_args(rest)
  options.bindings = bindings
  _quiet_libraries()
  with _warnings_told():
    return _guarded(options, _start)


def run() -> NoReturn:
  """`main` as a program.

  An interrupted one ends at once, after its files are closed: if Python ended
  it, what threads of XLA still compute and compile with would be taken away
  from them, and it would crash.
  """
  code = main()
  if code == _INTERRUPTED:
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def _guarded(
  options: argparse.Namespace,
  function: Callable[[argparse.Namespace], int | None],
  who: Callable[[], str] = lambda: "",
) -> int:
  """Calls a function; returns the exit code, having said what went wrong."""
  try:
    code = function(options) or 0
    sys.stdout.flush()  # Now, where it can still be told.
    return code
  except KeyboardInterrupt:
    print(
      f"basemt: interrupted{who()}; the same command goes on, or starts again",
      file=sys.stderr,
    )
    return _INTERRUPTED
  except (ValueError, OSError, ImportError) as error:
    text = _output_lost(error) or configuration.one_sentence(error)
    if options.traceback:
      raise
    print(
      files.printable(f"basemt: error{who()}: {text}"),
      file=sys.stderr,
    )
    print("(--traceback shows where it came from)", file=sys.stderr)
    return 1


def _output_lost(error: Exception) -> str:
  """A sentence if standard output is closed or full; it is then given up."""
  lost: OSError | None = None
  if isinstance(error, BrokenPipeError):
    lost = error
  try:
    sys.stdout.flush()
  except OSError as again:
    lost = again
  if lost is not None:
    # Python would try again at exit, and show a trace.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return f"standard output: {lost.strerror}; not all was written there"
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    place = error.filename or "standard output or a file"
    return f"{place} could not be written: {error.strerror}"
  return ""


def _start(options: argparse.Namespace) -> int | None:
  """Runs the command, with the other processes if there are any."""
  flags = ("coordinator_address", "num_processes", "process_id")
  given = [f for f in flags if getattr(options, f, None) is not None]
  if not given and not getattr(options, "distributed", False):
    return options.command(options)
  if given and len(given) < len(flags):
    missing = " and ".join(f"--{f}" for f in flags if f not in given)
    raise configuration.UsageError(f"--{given[0]} needs {missing} too")
  from basemt_jax import processes

  return processes.together(
    lambda: _guarded(options, _as_one, processes.name),
    options.coordinator_address,
    options.num_processes,
    options.process_id,
    options.heartbeat_timeout,
  )


def _as_one(options: argparse.Namespace) -> int | None:
  """Runs the command in all processes; the first speaks for all."""
  from basemt_jax import processes

  with processes.failures_of_jax():
    if processes.is_first():
      return options.command(options)
    return _unheard(options)


def _unheard(options: argparse.Namespace) -> int | None:
  """Runs the command without a word."""
  options.output = None
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    return options.command(options)


def _quiet_libraries() -> None:
  """Libraries' warnings are for their developers, not for this command."""
  logging.getLogger("jax").setLevel(logging.ERROR)
  # Of a checkpoint that could not be written Orbax logs a trace for each array,
  # and tensorstore shows more; who waits for the checkpoint says it once.
  for name in ("absl", "orbax", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  show = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      show(unraisable)

  sys.unraisablehook = hook


class _Sentence(logging.StreamHandler):
  """Warnings and progress of this package as sentences of the command."""

  def format(self, record: logging.LogRecord) -> str:
    """The message alone, with nothing in it that a terminal would obey."""
    kind = "basemt: warning: " if record.levelno >= logging.WARNING else ""
    return files.printable(f"{kind}{record.getMessage()}")


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
  """Has this package's warnings, logged or not, told on standard error."""
  log = logging.getLogger("basemt_jax")
  package, show = str(configuration.PACKAGE), warnings.showwarning

  def told(message: Any, kind: Any, filename: str, *rest: Any) -> None:
    if filename.startswith(package):
      log.warning("%s", message)
    else:
      show(message, kind, filename, *rest)

  handler, propagated = _Sentence(sys.stderr), log.propagate
  log.addHandler(handler)
  level = log.level
  log.setLevel(logging.INFO)
  log.propagate = False  # TensorFlow's handler shows all, in its own way.
  try:
    with warnings.catch_warnings():
      warnings.showwarning = told  # type: ignore[assignment]
      yield
  finally:
    log.removeHandler(handler)
    log.propagate = propagated
    log.setLevel(level)


class _Parser(argparse.ArgumentParser):
  """Says in one sentence what is wrong and where to look."""

  def error(self, message: str) -> NoReturn:
    """Ends with exit code 2."""
    self.exit(2, f"basemt: error: {message}; see basemt [COMMAND] --help\n")


# In the order in which `basemt --help` lists them.
COMMANDS = (
  "train",
  "evaluate",
  "translate",
  "score",
  "backtranslate",
  "distil",
  "average",
  "convert",
  "export",
  "import",
  "serve",
  "inspect",
  "compare",
  "prepare",
  "vocab",
  "cache",
  "compile",
)


def _commands(asked: str) -> dict[str, Any]:
  """Modules by command: this package's, then those of other packages.

  Only the one that is asked for, where it is known: some import much. Others
  add theirs as entry points of the group `basemt_jax.commands`; see
  docs/extending.md.
  """
  if asked in COMMANDS:
    return {asked: importlib.import_module(f"basemt_jax.commands.{asked}")}
  found = {
    name: importlib.import_module(f"basemt_jax.commands.{name}")
    for name in COMMANDS
  }
  for entry in importlib.metadata.entry_points(group="basemt_jax.commands"):
    try:
      found.setdefault(entry.name, entry.load())
    except Exception as error:  # Another package's, and no reason to stop.
      print(
        f"basemt: warning: the command {entry.name} ({entry.value}) cannot be "
        f"loaded: {configuration.one_sentence(error)}",
        file=sys.stderr,
      )
  return found


def _parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
  """The parser of the command asked for, or of all for --help."""
  parser = _Parser(
    prog="basemt",
    description="Sparse multilingual translation: train, convert, evaluate, "
    "translate.",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  asked = arguments[0] if arguments else ""
  for name, module in _commands(asked).items():
    sub = commands.add_parser(
      name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False
    )
    sub.set_defaults(command=module.run)
    flags.configuration(sub)
    module.add_flags(sub)
  return parser


if __name__ == "__main__":
  run()
