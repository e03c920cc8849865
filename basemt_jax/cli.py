"""The `basemt` command: the one place that parses flags.

    basemt train --gin_file=gin/recipes/quickstart.gin --gin.TRAIN_STEPS=500

What the commands do is in `run` and the modules it names, what configures them
in `configuration`; here are their flags and what they print.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# Quiet C++ logs; set before TensorFlow or XLA are loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from basemt_jax import configuration, console


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
    print(
      f"basemt: interrupted{who()}; the same command goes on, or starts again",
      file=sys.stderr,
    )
    return 130
  except (ValueError, OSError, ImportError) as error:
    if options.traceback:
      raise
    print(
      f"basemt: error{who()}: {configuration.one_sentence(error)}",
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


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
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


# ----------------------------------------------------------- commands


def _train(options: argparse.Namespace) -> int:
  from basemt_jax import run as run_lib

  run = configuration.configured(options)
  with console.Writer(run.model_dir) as writer:
    outcome = run_lib.train(
      run,
      writer,
      console.standard(),
      lambda: configuration.save_config(run.model_dir),
    )
    if outcome == "interrupted":
      print(
        "stopped: the same command goes on from the checkpoint just written"
      )
      return 0
    try:
      _print_evaluation(run, run_lib.evaluate(run, console.standard()), writer)
    except run_lib.NoPairsError as error:
      print(f"trained, but not evaluated: {error}")
  return 0


def _evaluate(options: argparse.Namespace) -> None:
  from basemt_jax import run as run_lib

  run = _with_search(configuration.configured(options), options)
  _print_evaluation(
    run,
    run_lib.evaluate(
      run, console.standard(), options.checkpoint, options.split
    ),
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

  run = _with_search(configuration.configured(options), options, options.n_best)
  trained = run_lib.load(run, console.standard(), options.checkpoint)
  targets = sorted(
    {evaluation.split_direction(d)[1] for d in trained.store.directions}
  )
  if options.to not in targets:
    raise configuration.UsageError(
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
    raise configuration.UsageError(
      f"{name}, line {line}: not UTF-8; convert the text first"
    ) from error
  return text.removesuffix("\n").split("\n") if text else []


def _convert(options: argparse.Namespace) -> None:
  from basemt_jax import run as run_lib

  run = configuration.configured(options, MODEL_DIR=options.target)
  step, error = run_lib.convert(
    run, options.source, options.checkpoint, console.standard()
  )
  configuration.save_config(run.model_dir)
  print(
    f"{run.model_dir}/checkpoint_{step}: converted; largest relative "
    f"difference of the function on a training batch {error:.1e}"
  )


def _vocab(options: argparse.Namespace) -> None:
  from basemt_jax import mixtures, vocabulary

  configuration.import_modules(options.module)
  mixture = options.mixture
  if mixture is None:
    mixture = configuration.configured(options).mixture_or_task_name
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
      progress=console.every_few_seconds(
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
      raise configuration.UsageError(
        "prepare files: say --languages, such as en,de,fr"
      )
    return raw_text.Names(tuple(itertools.combinations(languages, 2)))
  with configuration.native_output_hidden():  # Imports TensorFlow.
    module = importlib.import_module(f"tasks.{options.corpus}")
  names = module.BENCHMARK.raw
  if not languages:
    return names
  unknown = sorted({*languages} - {"en", *module.BENCHMARK.languages})
  if unknown:
    raise configuration.UsageError(
      f"--languages: {options.corpus} does not have {', '.join(unknown)}"
    )
  pairs = tuple(pair for pair in names.pairs if pair[1] in languages)
  return dataclasses.replace(names, pairs=pairs)


def _cache(options: argparse.Namespace) -> None:
  run = configuration.configured(options)
  if options.seqio_dir:
    from basemt_jax import task_cache

    folders = task_cache.cache_mixture(
      run.mixture_or_task_name,
      options.seqio_dir,
      console.every_few_seconds(
        lambda name, done: print(f"{name}: {done:,} examples", file=sys.stderr)
      ),
    )
    print(f"{options.seqio_dir}: {len(folders)} tasks")
    return
  store = run.store(console.standard().building)
  print(f"{store.directory}: {store.rows('train').sum()} training rows")


def _inspect(options: argparse.Namespace) -> None:
  from basemt_jax import inspection_command

  inspection_command.inspect(options)


def _compile(options: argparse.Namespace) -> int:
  import json

  if options.topology:
    # Whatever accelerator this host has. Before JAX is loaded.
    os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # Warnings go into the report.
  macros = {}
  if options.vocab_size:
    macros = {"MODEL_DIR": "unused", "MIXTURE_OR_TASK_NAME": "unused"}
  run = configuration.configured(options, **macros)
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


if __name__ == "__main__":
  sys.exit(main())
