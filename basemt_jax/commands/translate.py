"""`basemt translate`: translate lines of text, as they come."""

import argparse
import codecs
import contextlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NoReturn

from basemt_jax.commands import (
  configuration,
  console,
  flags,
  models,
)

SUMMARY = "Translate lines of text."

# Batches of lines that are sorted by length together, at most.
_WINDOW = 16
_CHUNK = 2**20
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.several_processes(parser)
  flags.checkpoint(parser)
  flags.search(parser)
  flags.modules(parser)
  parser.add_argument(
    "--to", required=True, metavar="XX", help="target language"
  )
  flags.lines(parser)
  parser.add_argument(
    "--n_best",
    type=int,
    default=1,
    metavar="N",
    help="N hypotheses a line, best first, as line's number, score and text "
    "with tabs between",
  )
  parser.add_argument(
    "--jsonl",
    action="store_true",
    help="a JSON object for every line: its number, source and translations",
  )
  prefix = parser.add_mutually_exclusive_group()
  prefix.add_argument(
    "--prefix",
    default="",
    metavar="TEXT",
    help="whole words with which every translation begins",
  )
  prefix.add_argument(
    "--prefix_column",
    action="store_true",
    help="lines are SOURCE<TAB>PREFIX, each with a prefix of its own",
  )
  flags.sampling(parser)


def run(options: argparse.Namespace) -> None:
  """Translates lines, of a file or standard input, into one language."""
  from basemt_jax import evaluation, files, processes

  if options.output:
    files.check_writable(options.output)
  if options.input:
    check_text(options.input)
  run = models.with_search(
    configuration.trained(options), options, options.n_best
  )
  trained = models.load(run, options.checkpoint)
  tag = models.tag(trained, options.to, options.source)
  translator = trained.translator(run.search)
  most = _WINDOW * run.search.batch_size
  done = 0
  with (
    input_lines(options.input) as lines,
    output_text(options.output) as write,
    console.counter("translated {:,} lines") as count,
  ):
    while True:
      texts = lines.read(most, wait=processes.are_several())
      processes.check_same("the input", json.dumps(texts))
      if not texts:
        return
      texts, prefixes = _prefixes(options, texts)
      nbest = evaluation.translate_texts(
        *(translator, trained.pieces, texts, tag),
        prefixes=prefixes,
        first=done,
      )
      for number, (text, found) in enumerate(
        zip(texts, nbest, strict=True), done + 1
      ):
        write(_formatted(options, number, text, found))
      write("")
      count(done := done + len(texts))


def _prefixes(
  options: argparse.Namespace, lines: list[str]
) -> tuple[list[str], list[str]]:
  """Sources, and what each translation begins with."""
  if not options.prefix_column:
    return lines, [options.prefix] * len(lines)
  cells = [line.partition("\t") for line in lines]
  return [source for source, _, _ in cells], [prefix for _, _, prefix in cells]


def _formatted(
  options: argparse.Namespace,
  number: int,
  line: str,
  nbest: Sequence[tuple[float, str]],
) -> str:
  """What is written for a line of the input."""
  if options.jsonl:
    translations = [{"score": score, "text": text} for score, text in nbest]
    record = {"line": number, "source": line, "translations": translations}
    return json.dumps(record, ensure_ascii=False) + "\n"
  if options.n_best > 1:
    return "".join(f"{number}\t{score:.4f}\t{text}\n" for score, text in nbest)
  return f"{nbest[0][1]}\n"


# ----------------------------------------------------------- input, output


class Lines:
  """Lines of a stream, without their ends, read as they come.

  UTF-8, or UTF-16 with a byte-order mark. Only line feeds end a line; the last
  one needs none.
  """

  def __init__(self, stream: BinaryIO, name: str):
    """Reads nothing yet; `name` is the stream's in errors."""
    self._stream, self._name = stream, name
    self._decoder: codecs.IncrementalDecoder | None = None
    self._held: list[str] = []
    self._rest, self._ended = "", False
    self._number = 0  # Of line ends that were read.

  def read(self, most: int, wait: bool = False) -> list[str]:
    """Up to `most` lines; none at the end.

    Args:
      most: lines.
      wait: for so many lines, and not for the first one only. So several
        processes read the same, however fast their inputs come.

    Raises:
      UsageError: what comes next is no text of those encodings.
    """
    while not self._ended and len(self._held) < most:
      if self._held and not wait and not _is_ready(self._stream):
        break
      self._read_more()
    taken, self._held = self._held[:most], self._held[most:]
    return taken

  def _read_more(self) -> None:
    chunk = self._stream.read1(_CHUNK)  # type: ignore[attr-defined]
    self._ended = not chunk
    if self._decoder is None:
      encoding = "utf-16" if chunk[:2] in _WIDE_MARKS else "utf-8"
      self._decoder = codecs.getincrementaldecoder(encoding)()
      if encoding == "utf-8" and 4 * chunk.count(0) > len(chunk):
        self._refuse("begins like UTF-16 without a byte-order mark", 1)
    try:
      text = self._decoder.decode(chunk, final=self._ended)
    except UnicodeDecodeError as error:
      ends = error.object[: error.start].count(b"\n")
      self._refuse(f"not {error.encoding.upper()}", self._number + ends + 1)
    *lines, self._rest = (self._rest + text).split("\n")
    self._number += len(lines)
    self._held += lines
    if self._ended and self._rest:
      self._held.append(self._rest)

  def _refuse(self, why: str, number: int) -> NoReturn:
    raise configuration.UsageError(
      f"{self._name}, line {number}: {why}; convert the text to UTF-8 first"
    )


def _is_ready(stream: BinaryIO) -> bool:
  """Whether more can be read, or the end told, without waiting."""
  try:
    return bool(select.select([stream], [], [], 0)[0])
  except (OSError, ValueError):  # Memory, which never waits.
    return True


def check_text(path: str) -> None:
  """Finds what is no text in a file before a model is loaded."""
  with input_lines(path) as lines:
    while os.path.isfile(path) and lines.read(_CHUNK):
      pass


@contextlib.contextmanager
def input_lines(path: str | None) -> Iterator[Lines]:
  """A file's lines, unpacked if its name says so, or standard input's."""
  from basemt_jax.data import parallel_text

  if path is None:
    yield Lines(sys.stdin.buffer, "standard input")
  else:
    with parallel_text.open_text(path) as stream:
      yield Lines(stream, path)


@contextlib.contextmanager
def output_text(path: str | None) -> Iterator[Callable[[str], None]]:
  """A function that writes text; '' has what was written go out.

  What a file cannot take, of a full disk for instance, is shown instead.
  """
  from basemt_jax import files

  if path is None:
    yield lambda text: print(text, end="", flush=not text)
    return
  written: list[str] = []
  try:
    with files.atomic(path) as file:

      def write(text: str) -> None:
        written.append(text)
        file.write(text.encode("utf-8"))
        if not text:
          file.flush()

      yield write
  except OSError:
    print("".join(written), end="", flush=True)
    raise
