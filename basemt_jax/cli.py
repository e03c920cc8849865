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
  try:
    return options.command(options) or 0
  except KeyboardInterrupt:
    print("basemt: interrupted", file=sys.stderr)
    return 130
  except (ValueError, OSError, ImportError) as error:
    if options.traceback:
      raise
    print(f"basemt: error: {_one_sentence(error)}", file=sys.stderr)
    print("(--traceback shows where it came from)", file=sys.stderr)
    return 1


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

  def search(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--beam_size", type=int, help="1: greedy")
    sub.add_argument("--alpha", type=float, help="exponent of length penalty")

  command("train", _train, "Train, or go on training, and evaluate.")
  sub = command("evaluate", _evaluate, "Loss, BLEU and chrF++ per direction.")
  checkpoint(sub)
  search(sub)
  sub.add_argument("--split", default="test", help="test or validation")
  sub = command("translate", _translate, "Translate lines of text.")
  checkpoint(sub)
  search(sub)
  sub.add_argument("--to", required=True, metavar="XX", help="target language")
  sub.add_argument("--input", metavar="FILE", help="default: standard input")
  sub.add_argument("--output", metavar="FILE", help="default: standard output")
  sub.add_argument(
    "--n_best", type=int, default=1, help="hypotheses a line, with scores"
  )
  sub = command("convert", _convert, "Turn a dense checkpoint into a sparse.")
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
  command("cache", _cache, "Build the run's packed rows ahead of training.")
  return parser


# ---------------------------------------------------------------- gin


def _configured(options: argparse.Namespace, **macros: Any) -> Any:
  """Parses the configuration and returns its `run.Run`."""
  run_class = _parse(options, macros)
  try:
    return run_class()
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

  from basemt_jax import evaluation, vocabulary
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


def _vocab(options: argparse.Namespace) -> None:
  import importlib

  from basemt_jax import mixtures, vocabulary

  for module in options.module:
    importlib.import_module(module)
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


def _cache(options: argparse.Namespace) -> None:
  store = _configured(options).store(_console().building)
  print(f"{store.directory}: {store.rows('train').sum()} training rows")


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
    with _native_output_hidden():
      from clu import metric_writers

    self._writers = []
    if self._is_first:
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
