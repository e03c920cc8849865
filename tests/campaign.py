"""A campaign of faults: how many were tried, told, or ended wrong.

    python tests/campaign.py --kills 20 --bytes 3

Every fault must be *told* in one sentence that says where, or leave the result
as it is without it (*unharmed*). Anything else is *wrong*: other parameters,
other text, a traceback, something lost. `campaign_test.py` runs a little of it.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import itertools
import logging
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import conftest  # noqa: F401  Before JAX is imported.

# isort: split
import checks_test
import jax
import kill_test
import numpy as np
import toy
import xxhash
from model_directory_test import load, train

import gin
from basemt_jax import checkpointing, cli, description
from basemt_jax import run as run_lib
from basemt_jax.commands import configuration
from basemt_jax.corpora import preparation, raw_text
from basemt_jax.data import row_store

Counts = collections.Counter[str]


def outcome(
  use: Callable[[], Any], expected: Any, place: str, wrong: list[str]
) -> str:
  """Whether a fault was 'told', left all as it is ('unharmed'), or is 'wrong'.

  Args:
    use: What meets the fault.
    expected: What it gives without.
    place: Which the sentence must name.
    wrong: Gets a line on what is wrong.
  """
  try:
    found = use()
  except (ValueError, OSError) as error:
    text = configuration.one_sentence(error)
    if place in text and len(text) < 900 and "Traceback" not in text:
      return "told"
    wrong.append(f"no sentence on {place}: {text[:300]}")
    return "wrong"
  except Exception as error:
    wrong.append(f"{type(error).__name__} on {place}: {str(error)[:300]}")
    return "wrong"
  if found == expected:
    return "unharmed"
  wrong.append(f"another result, and nothing was told: {place}")
  return "wrong"


# ---------------------------------------------------------------- bytes


def damaged(
  path: pathlib.Path, count: int, random_: random.Random
) -> Iterator[str]:
  """Does faults to a file, one at a time, and mends it after each."""
  data = path.read_bytes()
  faults = {"cut short": data[: len(data) // 2], "emptied": b""}
  for _ in range(count if data else 0):
    at, change = random_.randrange(len(data)), random_.randrange(1, 256)
    changed = bytearray(data)
    changed[at] ^= change
    faults[f"byte {at} changed"] = bytes(changed)
  for name, content in faults.items():
    path.write_bytes(content)
    yield name
  path.unlink()
  yield "deleted"
  path.write_bytes(data)


def digest_of_model(directory: pathlib.Path, step: int) -> str:
  """Of all that is used of a model: arrays, position, description, pieces."""
  model = load(directory, step)
  digest = xxhash.xxh3_128()
  for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables):
    digest.update(f"{path}{leaf.dtype}{leaf.shape}".encode())
    digest.update(np.asarray(leaf).tobytes())
  with checkpointing.Checkpoints(directory, read_only=True) as checkpoints:
    digest.update(repr(checkpoints.position(step)).encode())
  known = repr(model.description.to_json()) + model.pieces.fingerprint
  digest.update(known.encode())
  return digest.hexdigest()


def digest_of_store(directory: pathlib.Path) -> str:
  """Of all rows and texts."""
  store = row_store.RowStore(directory, verify=True)
  digest = xxhash.xxh3_128(repr(store.to_json()).encode())
  for split in store.splits:
    for name in store.directions:
      rows = np.arange(store.stats(split, name).rows)
      for value in store.read(split, name, rows).values():
        digest.update(value.tobytes())
      digest.update(repr(store.texts(split, name)).encode())
  return digest.hexdigest()


def byte_faults(
  root: pathlib.Path,
  use: Callable[[], Any],
  count: int,
  wrong: list[str],
  every: int = 1,
  place: str = "",
) -> Counts:
  """Faults of every file (or every so many) in a directory, one by one."""
  expected, found = use(), Counts()
  random_ = random.Random(0)
  paths = sorted(p for p in root.rglob("*") if p.is_file())
  for path in paths[::every]:
    before = len(wrong)
    for fault in damaged(path, count, random_):
      found[outcome(use, expected, place or str(root), wrong)] += 1
      if len(wrong) > before:
        wrong[-1] += f" ({path.relative_to(root)}, {fault})"
        before = len(wrong)
  return found


def of_model_directory(
  work: pathlib.Path, count: int, wrong: list[str], every: int = 1
) -> Counts:
  """Every file of a model directory of one checkpoint; it is loaded."""
  model = work / "model"
  train(toy.a_run(model, toy.write_store(work / "store")))
  shutil.rmtree(model / "checkpoint_2")
  return byte_faults(
    model, lambda: digest_of_model(model, 4), count, wrong, every=every
  )


def of_configuration(
  work: pathlib.Path, count: int, wrong: list[str]
) -> Counts:
  """The saved configuration, with which training goes on."""
  checks_test.configured(f"MODEL_DIR={work}")
  configuration.save_config(str(work))
  (work / configuration.OPERATIVE_FILE).unlink()  # Nothing reads it.

  def use() -> dict[str, Any]:
    gin.clear_config()
    options = cli._parser().parse_args(["train", f"--model_dir={work}"])
    options.bindings = []
    run = configuration.configured(options)
    return {
      "mixture": run.mixture_or_task_name,
      "lengths": run.task_feature_lengths,
      **run_lib.configuration(run, 300),
    }

  expected = use()

  def told() -> bool:
    found = use()
    # What a resumption compares, and refuses or tells.
    refused, lines = description._differences(expected, found)
    elsewhere = ("mixture", "lengths", "strategy", "learning_rate")
    if refused or lines or any(found[x] != expected[x] for x in elsewhere):
      raise ValueError(f"configuration: {refused or lines}")
    return found == expected

  return byte_faults(work, told, count, wrong, place="config")


def of_row_store(work: pathlib.Path, count: int, wrong: list[str]) -> Counts:
  """Every file of a row store."""
  toy.write_store(work / "store")
  return byte_faults(
    work / "store", lambda: digest_of_store(work / "store"), count, wrong
  )


# ------------------------------------------------------------ full disks


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
  """Files cannot grow beyond a size; what was open or written is kept."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # Half a program is not to be kept: other processes would read it.
  keep = "jax_persistent_cache_min_compile_time_secs"
  seconds = getattr(jax.config, keep)
  jax.config.update(keep, 1e9)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    jax.config.update(keep, seconds)


class FullAt:
  """The disk is full at the n-th file that is forced to it.

  Attributes:
    reached: Whether there were so many.
  """

  def __init__(self, number: int):
    self._left, self.reached = number, False

  def __enter__(self) -> "FullAt":
    self._real = os.fsync
    os.fsync = self._fsync
    return self

  def _fsync(self, handle: int) -> None:
    self._left -= 1
    if not self._left:
      self.reached = True
      raise OSError(errno.ENOSPC, "No space left on device")
    self._real(handle)

  def __exit__(self, *_: object) -> None:
    os.fsync = self._real


def survived(
  directory: pathlib.Path,
  fault: contextlib.AbstractContextManager[Any],
  write: Callable[[], Any],
  digest: Callable[[], str],
  expected: str,
  wrong: list[str],
) -> str:
  """Meets the fault, then does the same again: the same must come out."""

  def use() -> str:
    with fault:
      write()
    return digest()

  shutil.rmtree(directory, ignore_errors=True)
  found = outcome(use, expected, str(directory), wrong)
  try:
    write()
    if digest() == expected:
      return found
    wrong.append(f"went on to another result ({fault})")
  except Exception as error:
    wrong.append(f"could not go on: {type(error).__name__}: {error}")
  return "wrong"


def full_disks_of_store(
  work: pathlib.Path, every: int, wrong: list[str]
) -> Counts:
  """The disk is full at every write of a row store."""
  directory, found = work / "store", Counts()
  expected = digest_of_store(pathlib.Path(toy.write_store(directory)))
  for number in itertools.count(1, every):
    fault = FullAt(number)
    result = survived(
      directory,
      fault,
      lambda: toy.write_store(directory),
      lambda: digest_of_store(directory),
      expected,
      wrong,
    )
    if not fault.reached:
      return found
    found[result] += 1
  raise AssertionError


def full_disks_of_preparing(
  work: pathlib.Path, limits: list[int], wrong: list[str]
) -> Counts:
  """The disk is full at every write of `prepare`."""
  raw, out, found = work / "raw", work / "out", Counts()
  raw.mkdir()
  for name, number in (("corpus", 200), ("test", 5), ("dev", 5)):
    for language in ("en", "de"):
      lines = [f"{name} {i * 7919} {language}" for i in range(number)]
      text = "\n".join([*lines, ""])
      (raw / f"{name}.en-de.{language}").write_text(text)

  def write() -> None:
    names = raw_text.Names((("en", "de"),))
    preparation.prepare(raw, out, names, processes=0)

  def digest() -> str:
    made = {p.name: p.read_bytes() for p in sorted(out.iterdir())}
    return xxhash.xxh3_128(repr(made).encode()).hexdigest()

  write()
  expected = digest()
  for fault in map(largest_file, limits):
    found[survived(out, fault, write, digest, expected, wrong)] += 1
  for number in itertools.count(1):
    full = FullAt(number)
    result = survived(out, full, write, digest, expected, wrong)
    if not full.reached:
      return found
    found[result] += 1
  raise AssertionError


def full_disks_of_training(
  work: pathlib.Path, limits: list[int], writes: list[int], wrong: list[str]
) -> Counts:
  """The disk is full while a model directory is written, at any point."""
  run = toy.a_run(work / "model", toy.write_store(work / "store"))

  def digest() -> str:
    return digest_of_model(work / "model", 4)

  train(run)
  expected, found = digest(), Counts()
  for fault in (*map(largest_file, limits), *map(FullAt, writes)):
    found[
      survived(
        work / "model", fault, lambda: train(run), digest, expected, wrong
      )
    ] += 1
  return found


# ---------------------------------------------------------- wrong values


def wrong_values(macros: list[str], wrong: list[str]) -> Counts:
  """Values of every kind for macros of gin/runs/train.gin."""
  found = Counts()
  for macro in macros:
    for value in checks_test.WRONG:
      fits = value in checks_test.FITS.get(macro, ())
      result = outcome(
        lambda m=macro, v=value: bool(checks_test.configured(f"{m}={v}")),
        fits,  # True where the value has a meaning.
        macro,
        wrong,
      )
      found[result] += 1
  return found


# ------------------------------------------------------------------ kills


def kills(
  work: pathlib.Path, count: int, each: int, wrong: list[str]
) -> Counts:
  """kill -9 of `train` at random moments; then the bits of an unkilled run."""
  random_, found = random.Random(0), Counts()
  store = toy.write_store(work / "store")
  (work / "whole").mkdir()
  whole = kill_test.Command(work / "whole", store)
  whole.finish()
  start = time.monotonic()
  shutil.rmtree(whole.model_dir)
  whole.finish()
  seconds = time.monotonic() - start
  for number in range(0, count, each):
    directory = work / f"killed_{number}"
    directory.mkdir()
    command = kill_test.Command(directory, store)
    tried = min(each, count - number)
    for _ in range(tried):
      with command.started():
        time.sleep(random_.uniform(0.1, 0.9) * seconds)
    try:
      command.finish()
      kill_test.assert_same_end(command, whole)
      found["unharmed"] += tried
    except AssertionError as error:
      wrong.append(f"after kills: {str(error)[-300:]}")
      found["wrong"] += tried
    shutil.rmtree(directory)
  return found


# ------------------------------------------------------------------ table


@dataclasses.dataclass(frozen=True)
class Part:
  """A row of the table: what it is about, and how it is run."""

  name: str
  run: Callable[[pathlib.Path, list[str]], Counts]


def parts(options: argparse.Namespace) -> list[Part]:
  """The rows of the table."""
  sizes = [0, 1 << 9, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 20]
  return [
    Part(
      "bytes changed, files cut, emptied, deleted: model directory",
      lambda work, wrong: of_model_directory(work, options.bytes, wrong),
    ),
    Part(
      "the same: `config.gin`, with which training goes on",
      lambda work, wrong: of_configuration(work, 20 * options.bytes, wrong),
    ),
    Part(
      "the same: row store",
      lambda work, wrong: of_row_store(work, options.bytes, wrong),
    ),
    Part(
      "disk full at a write of `train`, then started again",
      lambda work, wrong: full_disks_of_training(
        work, sizes, list(range(1, 9)), wrong
      ),
    ),
    Part(
      "disk full at a write of a row store, then started again",
      lambda work, wrong: full_disks_of_store(work, 1, wrong),
    ),
    Part(
      "disk full at a write of `prepare`, then started again",
      lambda work, wrong: full_disks_of_preparing(work, sizes[:3], wrong),
    ),
    Part(
      "values of every kind for every macro of `gin/runs/train.gin`",
      lambda _, wrong: wrong_values(checks_test.MACROS, wrong),
    ),
    Part(
      "`kill -9` of `train` at random moments, then the same bits",
      lambda work, wrong: kills(work, options.kills, 4, wrong),
    ),
  ]


def main() -> int:
  """Runs all of it; 1 if anything ended wrong."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--bytes", type=int, default=3, help="faults a file")
  parser.add_argument("--only", default="", help="rows whose names hold this")
  options = parser.parse_args()
  for name in ("absl", "asyncio", "orbax"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  names = ("told", "unharmed", "wrong")
  print("| fault | tried | told | unharmed | wrong |\n|---|--:|--:|--:|--:|")
  all_wrong: list[str] = []
  for part in parts(options):
    if options.only in part.name:
      with tempfile.TemporaryDirectory() as work:
        found = part.run(pathlib.Path(work), all_wrong)
      cells = [part.name, str(found.total()), *(str(found[n]) for n in names)]
      print(f"| {' | '.join(cells)} |", flush=True)
  for line in all_wrong:
    print(line, file=sys.stderr)
  return 1 if all_wrong else 0


if __name__ == "__main__":
  sys.exit(main())
