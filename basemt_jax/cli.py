"""The `basemt` command: the one place that parses flags and gin.

    basemt train --gin_file=gin/recipes/quickstart.gin --gin.TRAIN_STEPS=500

Flags follow T5X: `--gin_file` (repeatable), `--gin.NAME=VALUE`,
`--gin_search_paths`. What the commands do is in `run`, `conversion` and
`vocabulary`; here are their flags and what they print.
"""

import argparse
import contextlib
import difflib
import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Quiet C++ logs; set before TensorFlow or XLA are loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

PACKAGE = pathlib.Path(__file__).parent
CONFIG_FILE = "config.gin"
OPERATIVE_FILE = "operative_config.gin"


class UsageError(ValueError):
  """The command line or the configuration is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit code.

  An error of the user's is one sentence on standard error; `--traceback`
  shows where it came from.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  bindings = [a[len("--gin.") :] for a in arguments if a.startswith("--gin.")]
  rest = [a for a in arguments if not a.startswith("--gin.")]
  options = _parser().parse_args(rest)
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
    print(f"basemt: interrupted{who()}", file=sys.stderr)
    return 130
  except (ValueError, OSError, ImportError) as error:
    if options.traceback:
      raise
    print(f"basemt: error{who()}: {_one_sentence(error)}", file=sys.stderr)
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
    raise UsageError(f"--{given[0]} needs {missing} too")
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


def _one_sentence(error: Exception) -> str:
  """The error's text without gin's and Python's trailing explanations."""
  text = str(error).strip() or type(error).__name__
  # gin repeats the whole configuration there.
  text = text.split(" in config string:")[0]
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  # gin appends where a call came from ("In call to configurable ...").
  return " ".join(x for x in lines if not x.startswith("In call to"))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="basemt",
    description="Sparse multilingual translation: train, convert, evaluate, "
    "translate.",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  def command(
    name: str, function: Callable[[argparse.Namespace], int | None], text: str
  ) -> argparse.ArgumentParser:
    sub = commands.add_parser(
      name, help=text, description=text, allow_abbrev=False
    )
    sub.set_defaults(command=function)
    sub.add_argument(
      "--gin_file",
      action="append",
      default=[],
      metavar="FILE",
      help="configuration; repeatable, later files win",
    )
    sub.add_argument(
      "--gin_search_paths",
      default="",
      metavar="DIR,DIR",
      help="where else to look for gin files",
    )
    sub.add_argument(
      "--model_dir",
      metavar="DIR",
      help="short for --gin.MODEL_DIR; for a trained model its saved "
      "configuration is used unless --gin_file is given",
    )
    sub.add_argument(
      "--traceback", action="store_true", help="show where an error came from"
    )
    sub.epilog = "--gin.NAME=VALUE overrides any binding, as in T5X."
    return sub

  def checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
      "--checkpoint",
      default="latest",
      metavar="STEP",
      help="'latest', 'best' (by dev loss) or a step",
    )

  def several(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
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

  def search(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--beam_size", type=int, help="1: greedy")
    sub.add_argument("--alpha", type=float, help="exponent of length penalty")

  several(command("train", _train, "Train, or go on, and evaluate."))
  sub = command("evaluate", _evaluate, "Loss, BLEU and chrF++ per direction.")
  several(sub)
  checkpoint(sub)
  search(sub)
  sub.add_argument("--split", default="test", help="test or validation")
  sub = command("translate", _translate, "Translate lines of text.")
  several(sub)
  checkpoint(sub)
  search(sub)
  sub.add_argument("--to", required=True, metavar="XX", help="target language")
  sub.add_argument("--input", metavar="FILE", help="default: standard input")
  sub.add_argument("--output", metavar="FILE", help="default: standard output")
  sub.add_argument(
    "--n_best", type=int, default=1, help="hypotheses a line, with scores"
  )
  sub = command("convert", _convert, "Turn a dense checkpoint into a sparse.")
  several(sub)
  checkpoint(sub)
  sub.add_argument("--from", dest="source", required=True, metavar="DENSE_DIR")
  sub.add_argument("--to", dest="target", required=True, metavar="SPARSE_DIR")
  sub = command("vocab", _vocab, "Train a SentencePiece vocabulary.")
  sub.add_argument("--mixture", help="default: the configured mixture")
  sub.add_argument(
    "--module", action="append", default=[], help="imported first: your tasks"
  )
  sub.add_argument("--output", required=True, metavar="FILE")
  sub.add_argument("--size", type=int, default=8000, help="pieces")
  sub.add_argument(
    "--temperature",
    type=float,
    default=5.0,
    help="at which directions are sampled",
  )
  sub = command(
    "prepare", _prepare, "Turn downloaded text into training, dev, test files."
  )
  sub.add_argument(
    "corpus",
    choices=("wmt15", "ml50", "opus100", "files"),
    help="benchmark, or 'files': any with the names of docs/data.md",
  )
  sub.add_argument("--raw", required=True, metavar="DIR", help="downloads")
  sub.add_argument("--out", required=True, metavar="DIR", help="for the result")
  sub.add_argument(
    "--languages",
    metavar="XX,YY",
    help="of which all pairs are wanted; default: the benchmark's with English",
  )
  sub.add_argument("--max_characters", type=int, help="of a side; default 1000")
  sub.add_argument(
    "--max_ratio", type=float, help="of the sides' lengths in bytes; default 4"
  )
  sub.add_argument(
    "--processes", type=int, metavar="N", help="default: one per core"
  )
  sub.add_argument(
    "--beam",
    metavar="OPTIONS",
    help="run on Apache Beam with these options, such as "
    "'--runner=FlinkRunner ...'",
  )
  sub = command("cache", _cache, "Build a run's packed rows ahead of training.")
  sub.add_argument(
    "--seqio_dir",
    metavar="DIR",
    help="build SeqIO's own cache of the tasks there instead, for T5X",
  )
  sub = command(
    "inspect", _inspect, "Look at data, sampling or a run, before and after."
  )
  sub.add_argument(
    "--view",
    action="append",
    choices=("task", "mixture", "run"),
    help="task: text; mixture: sampling; run: what was trained; repeatable; "
    "default: whatever there is",
  )
  sub.add_argument("--mixture", help="registered mixture; default: configured")
  sub.add_argument("--task", dest="mixture", help="a single task instead")
  sub.add_argument(
    "--module", action="append", default=[], help="imported first: your tasks"
  )
  checkpoint(sub)
  sub.add_argument(
    "--against",
    action="append",
    default=[],
    metavar="FILE_OR_NAME=VALUE",
    help="a second sampling strategy beside the configured one: a recipe, or "
    "a binding such as MAX_EPOCHS=4; repeatable",
  )
  sub.add_argument(
    "--sample",
    type=int,
    metavar="PAIRS",
    help="of a split to look at; default 2000",
  )
  sub.add_argument("--full", action="store_true", help="look at all pairs")
  sub.add_argument(
    "--lengths",
    metavar="INPUTS,TARGETS",
    help="where the model cuts, in tokens; default: configured, or 256,256",
  )
  sub.add_argument(
    "--max_epochs",
    type=float,
    default=10.0,
    help="warn of directions that are gone through more often",
  )
  sub.add_argument("--html", metavar="FILE", help="write a page with plots")
  sub.add_argument("--json", metavar="FILE", help="write the numbers")
  sub = command(
    "compile",
    _compile,
    "Compile a run's training step ahead of time, and report what it costs.",
  )
  sub.add_argument(
    "--topology",
    metavar="NAME",
    help="TPU slice that need not be here, such as v5e:16x16, v5p:4x4x8 or "
    "v4:4x4x8; default: the devices at hand",
  )
  sub.add_argument(
    "--phase", choices=("sparse", "dense"), default="sparse", help="of the run"
  )
  sub.add_argument(
    "--vocab_size",
    type=int,
    help="with this the mixture need not exist; default: the vocabulary's",
  )
  sub.add_argument(
    "--directions", type=int, default=30, help="used with --vocab_size"
  )
  sub.add_argument("--json", metavar="FILE", help="the report for programs")
  return parser


# ---------------------------------------------------------------- gin


def _configured(options: argparse.Namespace, **macros: Any) -> Any:
  """Parses the configuration and returns its `run.Run`."""
  import gin
  from basemt_jax import processes

  run_class = _parse(options, macros)
  processes.check_same("the configuration", gin.config_str())
  try:
    # May make a vocabulary.
    return processes.in_turn(run_class)
  except TypeError as error:  # A value is missing, or of a wrong type.
    raise UsageError(f"configuration: {str(error).splitlines()[0]}") from error


def _parse(
  options: argparse.Namespace, macros: Mapping[str, Any]
) -> Callable[..., Any]:
  """Parses files and bindings; returns the configurable `run.Run`."""
  import gin
  from basemt_jax import run

  files = list(options.gin_file)
  if options.model_dir:
    macros = {"MODEL_DIR": options.model_dir, **macros}
  if not files:
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
    files = [str(saved)]
  for path in (
    "",
    *filter(None, options.gin_search_paths.split(",")),
    *_roots(),
  ):
    gin.add_config_file_search_path(path)
  bindings = [f"{name} = {value!r}" for name, value in macros.items()]
  # gin logs an error for every place where an include is not.
  logging.disable(logging.ERROR)
  try:
    paths = [_find(f, options) for f in files]
    with _native_output_hidden():  # Imports tasks, and with them TensorFlow.
      gin.parse_config_files_and_bindings(
        paths,
        [*_as_gin(options.bindings), *bindings],
        finalize_config=False,
        skip_unknown=False,
      )
      _check_macros(gin.config_str(), options.bindings)
      gin.finalize()
      if "seqio" in sys.modules:
        from basemt_jax import mixtures  # noqa: F401
  except (
    ValueError,
    LookupError,
    AttributeError,
    NameError,
    SyntaxError,
  ) as error:
    raise UsageError(f"configuration: {_one_sentence(error)}") from error
  except ImportError as error:
    raise UsageError(
      f"configuration: a module it imports is missing: {error}"
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


@contextlib.contextmanager
def _native_output_hidden() -> Iterator[None]:
  """Hides what C++ libraries print when they are loaded.

  TensorFlow greets on standard error whatever its log level. Exceptions are
  Python's and not touched.
  """
  sys.stderr.flush()
  saved = os.dup(2)
  try:
    with open(os.devnull, "wb") as nowhere:
      os.dup2(nowhere.fileno(), 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    os.close(saved)


def _check_macros(config: str, bindings: Sequence[str]) -> None:
  """Refuses macros that have no value, and mistyped ones.

  Args:
    config: All bindings, as `gin.config_str` writes them.
    bindings: Those of the command line; gin itself takes any macro.
  """
  lines = [x for x in config.splitlines() if not x.startswith("#")]
  defined = [m[1] for x in lines if (m := re.match(r"(\w+) = ", x))]
  used = set(re.findall(r"%(\w+)", "\n".join(lines)))
  for name in (b.partition("=")[0].strip() for b in bindings):
    if name in defined and name not in used:
      near = difflib.get_close_matches(name, used, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise UsageError(f"--gin.{name}: nothing uses that macro{hint}")
  for name in sorted(used - {*defined, "gin"}):
    hint = (
      ": give a model, such as --gin_file=gin/models/tiny.gin, before the "
      "recipe"
      if name == "NETWORK"
      else f": set it with --gin.{name}=VALUE"
    )
    raise UsageError(f"the macro {name} has no value{hint}")
  for name in defined:
    if f"{name} = %gin.REQUIRED" in lines:
      raise UsageError(
        f"the macro {name} has no value: set it with --gin.{name}=VALUE"
      )


def _roots() -> list[str]:
  """Where the repository's or the installed package's `gin/` is found."""
  return [str(PACKAGE.parent), str(PACKAGE)]


def _find(name: str, options: argparse.Namespace) -> str:
  """The gin file's path, in the search paths if it is not there as given."""
  places = ["", *options.gin_search_paths.split(","), *_roots()]
  for place in places:
    if (pathlib.Path(place) / name).is_file():
      return str(pathlib.Path(place) / name)
  raise UsageError(
    f"no gin file {name}; recipes are: "
    + ", ".join(f"gin/recipes/{r}" for r in _recipes())
  )


def _recipes() -> list[str]:
  for root in _roots():
    found = sorted(p.name for p in pathlib.Path(root, "gin/recipes").glob("*"))
    if found:
      return found
  return []


def _as_gin(bindings: Sequence[str]) -> list[str]:
  r"""`NAME=VALUE` as gin; a bare word or path is taken as a string.

  A shell removes the quotes of --gin.MODEL_DIR="/tmp/run"; T5X users write
  \"...\", which works too.
  """
  import gin

  result = []
  for binding in bindings:
    name, equals, value = binding.partition("=")
    if not equals:
      raise UsageError(
        f"--gin.{binding} has no value; write --gin.{binding}=VALUE"
      )
    try:
      # References parse only once the files have imported their modules.
      if value.lstrip("([{ ")[:1] not in ("@", "%"):
        gin.config.parse_value(value)
    except Exception:  # Whatever does not parse is a string.
      value = repr(value)
    result.append(f"{name.strip()} = {value}")
  return result


# ----------------------------------------------------------- commands


def _train(options: argparse.Namespace) -> int:
  from basemt_jax import run as run_lib

  run = _configured(options)
  with _Writer(run.model_dir) as writer:
    outcome = run_lib.train(
      run, writer, _console(), lambda: _save_config(run.model_dir)
    )
    if outcome == "interrupted":
      print(
        "stopped: the same command goes on from the checkpoint just written"
      )
      return 0
    try:
      _print_evaluation(run, run_lib.evaluate(run, _console()), writer)
    except run_lib.NoPairsError as error:
      print(f"trained, but not evaluated: {error}")
  return 0


def _evaluate(options: argparse.Namespace) -> None:
  from basemt_jax import run as run_lib

  run = _with_search(_configured(options), options)
  _print_evaluation(
    run,
    run_lib.evaluate(run, _console(), options.checkpoint, options.split),
  )


def _with_search(run: Any, options: argparse.Namespace, n_best: int = 1) -> Any:
  """The run with the search that the flags ask for."""
  import dataclasses

  changes = {
    name: getattr(options, name)
    for name in ("beam_size", "alpha")
    if getattr(options, name) is not None
  }
  beam_size = changes.get("beam_size", max(run.search.beam_size, n_best))
  search = dataclasses.replace(
    run.search, **{**changes, "beam_size": beam_size, "num_return": n_best}
  )
  return dataclasses.replace(run, search=search)


def _print_evaluation(run: Any, result: Any, writer: Any = None) -> None:
  from basemt_jax import evaluation, reporting

  reporting.print_table(result.results)
  print()
  for line in reporting.sample_lines(result.translations, 4):
    print(line)
  languages = [
    evaluation.split_direction(r.direction)[1] for r in result.results
  ]
  target = next((x for x in languages if x != "en"), languages[0])
  print(f"""
{result.split} at step {result.step}; scores, translations: {result.directory}
next: echo "..." | basemt translate --model_dir {run.model_dir} --to {target}
      tensorboard --logdir {run.model_dir}""")
  if writer is not None:
    writer.write_scalars(
      result.step,
      {
        f"{result.split}/bleu/{m.name}": m.bleu
        for m in evaluation.summarise(result.results)
        if m.bleu is not None
      },
    )


def _translate(options: argparse.Namespace) -> None:
  import dataclasses

  from basemt_jax import evaluation, processes, vocabulary
  from basemt_jax import run as run_lib

  run = _with_search(_configured(options), options, options.n_best)
  trained = run_lib.load(run, _console(), options.checkpoint)
  targets = sorted(
    {evaluation.split_direction(d)[1] for d in trained.store.directions}
  )
  if options.to not in targets:
    raise UsageError(
      f"--to {options.to}: the model was not trained to translate into that "
      f"language; it knows {', '.join(targets)}"
    )
  lines = _read_lines(options.input)
  processes.check_same("the input", "\n".join(lines))
  # A few lines do not need the batch that an evaluation fills.
  size = min(run.search.batch_size, max(1, len(lines)))
  run = dataclasses.replace(
    run, search=dataclasses.replace(run.search, batch_size=size)
  )
  nbest = evaluation.translate_texts(
    run_lib.translator(run, trained),
    vocabulary.Vocabulary.load(trained.store.vocabulary),
    lines,
    prefix=f"<2{options.to}> ",
  )
  with contextlib.ExitStack() as stack:
    output: Any = sys.stdout
    if options.output:
      output = stack.enter_context(open(options.output, "w", encoding="utf-8"))
    for hypotheses in nbest:
      for score, text in hypotheses:
        output.write(
          f"{score:.4f}\t{text}\n" if options.n_best > 1 else f"{text}\n"
        )


def _read_lines(path: str | None) -> list[str]:
  data = pathlib.Path(path).read_bytes() if path else sys.stdin.buffer.read()
  name = path or "standard input"
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    raise UsageError(
      f"{name}, line {line}: not UTF-8; convert the text first"
    ) from error
  return text.removesuffix("\n").split("\n") if text else []


def _convert(options: argparse.Namespace) -> None:
  from basemt_jax import run as run_lib

  run = _configured(options, MODEL_DIR=options.target)
  step, error = run_lib.convert(
    run, options.source, options.checkpoint, _console()
  )
  _save_config(run.model_dir)
  print(
    f"{run.model_dir}/checkpoint_{step}: converted; largest relative "
    f"difference of the function on a training batch {error:.1e}"
  )


def _import_modules(names: Sequence[str]) -> None:
  """Imports the user's modules, from the working directory too."""
  import importlib

  if names and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  with _native_output_hidden():
    for name in names:
      importlib.import_module(name)
    if "seqio" in sys.modules:
      from basemt_jax import mixtures  # noqa: F401


def _vocab(options: argparse.Namespace) -> None:
  from basemt_jax import mixtures, vocabulary

  _import_modules(options.module)
  mixture = options.mixture
  if mixture is None:
    mixture = _configured(options).mixture_or_task_name
  vocabulary.train_from_mixture(
    mixtures.get_mixture(mixture),
    options.output,
    vocab_size=options.size,
    temperature=options.temperature,
  )
  print(f"{options.output}: {options.size} pieces")


def _prepare(options: argparse.Namespace) -> None:
  import shlex

  from basemt_jax import cleaning, preparation

  limits = {
    name: getattr(options, name)
    for name in ("max_characters", "max_ratio")
    if getattr(options, name) is not None
  }
  arguments = (
    options.raw,
    options.out,
    _raw_names(options),
    cleaning.Options(**limits),
  )
  if options.beam is not None:
    from basemt_jax import beam_preparation

    report = beam_preparation.prepare(
      *arguments, beam_options=shlex.split(options.beam)
    )
  else:
    report = preparation.prepare(
      *arguments,
      processes=options.processes,
      progress=_every_few_seconds(
        lambda text: print(text, file=sys.stderr, flush=True)
      ),
    )
  print(preparation.table(report))
  print(
    f"{pathlib.Path(options.out, preparation.REPORT)}: all of this, by file"
  )


def _raw_names(options: argparse.Namespace) -> Any:
  """How the files of the corpus are named."""
  import dataclasses
  import importlib
  import itertools

  from basemt_jax import raw_text

  languages = options.languages and options.languages.split(",")
  if options.corpus == "files":
    if not languages or len(languages) < 2:
      raise UsageError("prepare files: say --languages, such as en,de,fr")
    return raw_text.Names(tuple(itertools.combinations(languages, 2)))
  with _native_output_hidden():  # Imports TensorFlow.
    module = importlib.import_module(f"tasks.{options.corpus}")
  names = module.BENCHMARK.raw
  if not languages:
    return names
  unknown = sorted({*languages} - {"en", *module.BENCHMARK.languages})
  if unknown:
    raise UsageError(
      f"--languages: {options.corpus} does not have {', '.join(unknown)}"
    )
  pairs = tuple(pair for pair in names.pairs if pair[1] in languages)
  return dataclasses.replace(names, pairs=pairs)


def _cache(options: argparse.Namespace) -> None:
  run = _configured(options)
  if options.seqio_dir:
    from basemt_jax import task_cache

    folders = task_cache.cache_mixture(
      run.mixture_or_task_name,
      options.seqio_dir,
      _every_few_seconds(
        lambda name, done: print(f"{name}: {done:,} examples", file=sys.stderr)
      ),
    )
    print(f"{options.seqio_dir}: {len(folders)} tasks")
    return
  store = run.store(_console().building)
  print(f"{store.directory}: {store.rows('train').sum()} training rows")


def _compile(options: argparse.Namespace) -> int:
  import json

  if options.topology:
    # Whatever accelerator this host has. Before JAX is loaded.
    os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # Warnings go into the report.
  macros = {}
  if options.vocab_size:
    macros = {"MODEL_DIR": "unused", "MIXTURE_OR_TASK_NAME": "unused"}
  run = _configured(options, **macros)
  from basemt_jax import compilation, compilation_tables
  from basemt_jax import run as run_lib

  devices = None
  if options.topology:
    devices = compilation.topology_devices(options.topology)
  program = run_lib.program(
    run, devices, options.phase, options.vocab_size, options.directions
  )
  report = compilation.report(
    program, run.batch_size, run.task_feature_lengths, options.topology
  )
  compilation_tables.print_report(report)
  if options.json:
    pathlib.Path(options.json).write_text(
      json.dumps(compilation_tables.to_json(report), indent=1) + "\n",
      encoding="utf-8",
    )
  return 0 if report.memory.fits else 1


def _inspect(options: argparse.Namespace) -> None:
  import dataclasses

  from basemt_jax import inspection_page, reporting

  _import_modules(options.module)
  views = options.view or _views_there_are(options)
  run = _inspected_run(options, views)
  mixture = options.mixture or (run and run.mixture_or_task_name)
  sections: list[Any] = []
  numbers: dict[str, Any] = {}
  data = None
  if "task" in views or ("mixture" in views and not _store_there_is(run)):
    data = _inspect_data(options, run, mixture)
  if data and "task" in views:
    sections.append(inspection_page.data_section(data))
    numbers["task"] = dataclasses.asdict(data)
  if "mixture" in views:
    forecasts = _forecasts(options, run, data)
    name = getattr(mixture, "name", mixture)
    sections.append(inspection_page.forecast_section(name, forecasts))
    numbers["mixture"] = [dataclasses.asdict(f) for f in forecasts]
  if "run" in views:
    from basemt_jax import inspection_run

    report = inspection_run.inspect_run(run, _console(), options.checkpoint)
    sections.append(inspection_page.run_section(report))
    numbers["run"] = dataclasses.asdict(report)
  inspection_page.print_sections(sections)
  title = (
    f"basemt inspect: {options.model_dir or getattr(mixture, 'name', mixture)}"
  )
  for path, text in (
    (options.json, lambda: reporting.json_text(numbers)),
    (options.html, lambda: inspection_page.page(title, sections)),
  ):
    if path:
      reporting.write_atomically(path, text())
      print(f"written: {path}")


def _views_there_are(options: argparse.Namespace) -> list[str]:
  """What can be shown of what was given."""
  if options.model_dir:
    return ["mixture", "run"]
  if options.gin_file:
    return ["task", "mixture"]
  if options.mixture:
    return ["task"]
  raise UsageError(
    "nothing to inspect: give --mixture or --task (and --module, which "
    "registers it), --gin_file of a recipe, or --model_dir of a run"
  )


def _inspected_run(options: argparse.Namespace, views: Sequence[str]) -> Any:
  """The configured run; None where there is no configuration."""
  import copy

  if not options.gin_file and not options.model_dir:
    if set(views) & {"mixture", "run"}:
      raise UsageError(
        f"--view {views[0]} needs a run: give --gin_file of a recipe, or "
        "--model_dir"
      )
    return None
  macros = {"MIXTURE_OR_TASK_NAME": options.mixture} if options.mixture else {}
  if "run" not in views:
    # Neither a model nor a directory matters to data.
    macros["MODEL_DIR"] = options.model_dir or "unused"
  options = copy.copy(options)
  if options.gin_file and "run" not in views:
    options.gin_file = ["gin/models/tiny.gin", *options.gin_file]
  return _configured(options, **macros)


def _run_against(options: argparse.Namespace, run: Any) -> Any:
  """The run with the other sampling: bindings changed, or another recipe's.

  A recipe sets everything, so that it is read by itself; steps and batch stay
  the run's, unless they are what is compared.
  """
  import copy

  import gin

  gin.clear_config()
  bindings = [x.removeprefix("--gin.") for x in options.against if "=" in x]
  files = [x for x in options.against if "=" not in x]
  options = copy.copy(options)
  if not files:
    options.bindings = [*options.bindings, *bindings]
    return _inspected_run(options, ["mixture"])
  bound = {binding.partition("=")[0].strip() for binding in bindings}
  macros = {
    "TRAIN_STEPS": run.settings.train_steps,
    "BATCH_SIZE": run.batch_size,
    "MIXTURE_OR_TASK_NAME": "unused",
    "MODEL_DIR": "unused",
  }
  options.gin_file = ["gin/models/tiny.gin", *files]
  options.bindings, options.model_dir = bindings, None
  return _configured(
    options, **{k: v for k, v in macros.items() if k not in bound}
  )


def _store_there_is(run: Any) -> Any:
  """The run's row store, if it has been built; never builds one."""
  from basemt_jax import row_store

  if run is None or run.store_dir:
    return run and run.store()
  from basemt_jax import mixtures  # Imports SeqIO and TensorFlow.

  directory = mixtures.store_directory(
    run.mixture_or_task_name,
    run.task_feature_lengths,
    run.cache_dir or row_store.default_cache_dir(),
  )
  if not (directory / "store.json").exists():
    return None
  if not row_store.read_header(directory)["complete"]:
    return None
  return row_store.RowStore(directory)


def _inspect_data(options: argparse.Namespace, run: Any, mixture: Any) -> Any:
  from basemt_jax import evaluation, inspection

  lengths = {"inputs": 256, "targets": 256}
  if run:
    lengths = dict(run.task_feature_lengths)
  if options.lengths:
    found = re.fullmatch(r"(\d+),(\d+)", options.lengths)
    if not found:
      raise UsageError(
        f"--lengths {options.lengths}: write two numbers of tokens, such as "
        "256,256"
      )
    lengths = {"inputs": int(found[1]), "targets": int(found[2])}
  if options.sample is not None and options.sample < 1:
    raise UsageError(f"--sample {options.sample}: look at 1 pair at least")
  sample = None if options.full else options.sample or inspection.SAMPLE
  done = 0

  def progress(name: str) -> None:
    nonlocal done
    done += 1
    say(f"looked at {name}, {done} directions done")

  say = _every_few_seconds(lambda text: print(text, file=sys.stderr))
  return inspection.inspect_data(
    mixture,
    inspection.Options(
      lengths,
      sample,
      bands=run.bands if run else evaluation.BandThresholds(),
    ),
    progress,
  )


def _forecasts(options: argparse.Namespace, run: Any, data: Any) -> list[Any]:
  """What the configured strategy will draw, and another one's beside it."""
  from basemt_jax import inspection_plan

  store = _store_there_is(run)
  sizes = (
    inspection_plan.sizes_of_store(store)
    if store
    else inspection_plan.sizes_of_data(data)
  )
  runs = {"configured": run}
  if options.against:
    name = " ".join(
      x if "=" in x else pathlib.Path(x).stem for x in options.against
    )
    runs[name] = _run_against(options, run)
  return [
    inspection_plan.forecast(
      name,
      own.strategy,
      sizes,
      own.settings.train_steps,
      own.batch_size,
      run.bands,
      options.max_epochs,
    )
    for name, own in runs.items()
  ]


# -------------------------------------------------------------- output


def _save_config(model_dir: str) -> None:
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


class _Writer:
  """Metrics to TensorBoard and to `metrics.jsonl`."""

  def __init__(self, model_dir: str):
    import jax

    self._is_first = jax.process_index() == 0
    self._directory = model_dir

  def __enter__(self) -> "_Writer":
    self._writers = []
    if self._is_first:
      with _native_output_hidden():  # Imports TensorFlow.
        from clu import metric_writers
      pathlib.Path(self._directory).mkdir(parents=True, exist_ok=True)
      self._writers.append(metric_writers.SummaryWriter(self._directory))
      self._file = open(
        pathlib.Path(self._directory) / "metrics.jsonl", "a", encoding="utf-8"
      )
    return self

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Takes the metrics of a step."""
    import json

    if self._is_first:
      line = {"step": step, "time": time.time(), **scalars}
      self._file.write(json.dumps(line) + "\n")
      for writer in self._writers:
        writer.write_scalars(step, scalars)

  def flush(self) -> None:
    """Writes out what is buffered."""
    if self._is_first:
      self._file.flush()
      for writer in self._writers:
        writer.flush()

  def __exit__(self, *exception: object) -> None:
    self.flush()
    if self._is_first:
      self._file.close()


def _console() -> Any:
  from basemt_jax import run as run_lib

  def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

  def progress(p: Any, temperature: float) -> None:
    minutes, seconds = divmod(round(p.seconds_left), 60)
    say(
      f"step {p.step:>6}/{p.train_steps}  {p.phase:<6}  T {temperature:<5.2f} "
      f"loss {p.loss:.3f}  {p.tokens_per_second:>8,.0f} tokens/s  "
      f"{minutes}:{seconds:02d} left"
    )

  return run_lib.Console(
    message=say,
    progress=progress,
    building=_every_few_seconds(
      lambda split, direction, done, total: say(
        f"packing {split} {direction}: {done:,} of {total or '?'} pairs"
      )
    ),
    translating=_every_few_seconds(
      lambda done, total: say(f"translated {done:,} of {total:,} sentences")
    ),
  )


def _every_few_seconds(
  function: Callable[..., None], seconds: float = 5.0
) -> Callable[..., None]:
  """Calls through once in `seconds`, first at once; drops the rest."""
  last = -seconds

  def call(*args: Any) -> None:
    nonlocal last
    if time.monotonic() - last >= seconds:
      last = time.monotonic()
      function(*args)

  return call


if __name__ == "__main__":
  sys.exit(main())
