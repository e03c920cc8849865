"""The `basemt` command: the one place that parses flags.

    basemt train --gin_file=gin/recipes/quickstart.gin --gin.TRAIN_STEPS=500

Each command is a file of `commands/`, with its flags and what it prints; how it
is configured is in `commands/configuration.py`.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

# Quiet C++ logs; set before TensorFlow or XLA are loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from basemt_jax.commands import configuration, console, flags


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit code.

  An error of the user's is one sentence on standard error; `--traceback`
  shows where it came from.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  bindings = [a[len("--gin.") :] for a in arguments if a.startswith("--gin.")]
  rest = [a for a in arguments if not a.startswith("--gin.")]
  configuration.keep_programs()  # Before a command imports JAX.
  options = _parser(rest).parse_args(rest)
  options.bindings = bindings
  _quiet_libraries()
  return _guarded(options, _start)


def _guarded(
  options: argparse.Namespace,
  function: Callable[[argparse.Namespace], int | None],
  who: Callable[[], str] = lambda: "",
) -> int:
  """Calls a function; returns the exit code, having said what went wrong."""
  try:
    return function(options) or 0
  except KeyboardInterrupt:
    print(
      f"basemt: interrupted{who()}; the same command goes on, or starts again",
      file=sys.stderr,
    )
    return 130
  except (ValueError, OSError, ImportError) as error:
    if options.traceback:
      raise
    print(
      console.printable(
        f"basemt: error{who()}: {configuration.one_sentence(error)}"
      ),
      file=sys.stderr,
    )
    print("(--traceback shows where it came from)", file=sys.stderr)
    return 1


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

  if processes.is_first():
    return options.command(options)
  options.output = None
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    return options.command(options)


def _quiet_libraries() -> None:
  """Libraries' warnings are for their developers, not for this command."""
  for name in ("absl", "jax", "orbax"):
    logging.getLogger(name).setLevel(logging.ERROR)


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
  "convert",
  "inspect",
  "compare",
  "prepare",
  "vocab",
  "cache",
  "compile",
)


def _parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
  """Of the command that is asked for; some import much, and all for --help."""
  parser = _Parser(
    prog="basemt",
    description="Sparse multilingual translation: train, convert, evaluate, "
    "translate.",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  asked = [name for name in COMMANDS if name in arguments[:1]]
  for name in asked or COMMANDS:
    module = importlib.import_module(f"basemt_jax.commands.{name}")
    sub = commands.add_parser(
      name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False
    )
    sub.set_defaults(command=module.run)
    flags.configuration(sub)
    module.add_flags(sub)
  return parser


if __name__ == "__main__":
  sys.exit(main())
