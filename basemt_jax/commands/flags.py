"""Flags that several commands share."""

import argparse
import os


def path(text: str) -> str:
  """A path from the command line: `~` is the home directory, '' no path.

  Raises:
    ArgumentTypeError: The text is empty.
  """
  if not text:
    raise argparse.ArgumentTypeError("the path is empty; is a variable unset?")
  return os.path.expanduser(text)


def configuration(parser: argparse.ArgumentParser) -> None:
  """What every command takes: gin files, a model directory, a traceback."""
  parser.add_argument(
    "--gin_file",
    action="append",
    type=path,
    default=[],
    metavar="FILE",
    help="configuration; repeatable, later files win",
  )
  parser.add_argument(
    "--gin_search_paths",
    default="",
    metavar="DIR,DIR",
    help="where else to look for gin files",
  )
  parser.add_argument(
    "--model_dir",
    metavar="DIR",
    type=path,
    help="short for --gin.MODEL_DIR; for a trained model its saved "
    "configuration is used unless --gin_file is given",
  )
  parser.add_argument(
    "--traceback", action="store_true", help="show where an error came from"
  )
  parser.epilog = (
    "--gin.NAME=VALUE overrides any binding, as in T5X. Exit codes: 0 done, or "
    "stopped to go on later; 1 an error, told in one sentence; 2 wrong flags; "
    "130 interrupted."
  )


def checkpoint(parser: argparse.ArgumentParser) -> None:
  """Which checkpoint of a run."""
  parser.add_argument(
    "--checkpoint",
    default="latest",
    metavar="STEP",
    help="'latest', 'best' (by dev loss) or a step",
  )


def modules(parser: argparse.ArgumentParser) -> None:
  """The user's own modules."""
  parser.add_argument(
    "--module",
    action="append",
    default=[],
    metavar="NAME",
    help="imported first: your tasks, or classes of your network; repeatable",
  )


def several_processes(parser: argparse.ArgumentParser) -> None:
  """How processes on several hosts find each other."""
  group = parser.add_argument_group(
    "several processes", "the same command for each; see docs/scaling.md"
  )
  group.add_argument(
    "--distributed",
    action="store_true",
    help="join the processes of this TPU pod, Slurm, Open MPI or Kubernetes "
    "job",
  )
  group.add_argument(
    "--coordinator_address",
    metavar="HOST:PORT",
    help="elsewhere: of the first process, with a free port of its host",
  )
  group.add_argument("--num_processes", type=int, metavar="N")
  group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
  group.add_argument(
    "--heartbeat_timeout",
    type=int,
    default=30,
    metavar="SECONDS",
    help="a process that has not been heard of for so long is dead, and the "
    "others stop; default 30",
  )


def mixture(parser: argparse.ArgumentParser) -> None:
  """A mixture by its name, and the user's modules that may register it."""
  parser.add_argument(
    "--mixture", help="registered mixture; default: configured"
  )
  modules(parser)


def report_files(parser: argparse.ArgumentParser) -> None:
  """Where a report goes besides the terminal."""
  parser.add_argument(
    "--html", metavar="FILE", type=path, help="write a page with plots"
  )
  parser.add_argument(
    "--json", metavar="FILE", type=path, help="write the numbers"
  )


def lines(parser: argparse.ArgumentParser) -> None:
  """Lines of text in, lines out."""
  parser.add_argument(
    "--from",
    dest="source",
    metavar="XX",
    help="language of the text; asked for where the model needs it",
  )
  parser.add_argument(
    "--input",
    metavar="FILE",
    type=path,
    help="default: standard input, read as it comes",
  )
  parser.add_argument(
    "--output",
    metavar="FILE",
    type=path,
    help="written when all is done; default: standard output, as it comes",
  )


def search(parser: argparse.ArgumentParser) -> None:
  """How to search for a translation."""
  parser.add_argument("--beam_size", type=int, help="1: greedy")
  parser.add_argument("--alpha", type=float, help="exponent of length penalty")


def sampling(parser: argparse.ArgumentParser) -> None:
  """How to draw translations instead of searching for the best."""
  group = parser.add_argument_group("sampling, instead of beam search")
  group.add_argument(
    "--sample", action="store_true", help="draw translations by probability"
  )
  group.add_argument(
    "--temperature", type=float, metavar="T", help="below 1: likelier tokens"
  )
  group.add_argument(
    "--top_k", type=int, metavar="K", help="of the K likeliest tokens only"
  )
  group.add_argument(
    "--top_p",
    type=float,
    metavar="P",
    help="of the fewest tokens that have this probability together",
  )
  group.add_argument("--seed", type=int, metavar="N", help="of the draws")
