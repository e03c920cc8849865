"""Raw parallel text becomes a folder of training, dev and test files.

The steps, for every pair of languages:

1. Every line is normalised: Unicode NFC, single spaces, no control characters.
2. Dev and test sets are kept whole. A line of the training texts is dropped if
   a side is empty or too long, if the sides' lengths in bytes are too
   different, or if either side is a sentence of a dev or test set of its
   language, of whatever pair, used or not (compared without case, punctuation
   and spaces).
3. Equal pairs are dropped but one. A pair's digest tells the shard it goes to,
   and the order in it, so that shards are samples of the whole text.

Memory: some thousand lines per process, then the text of a shard per process.
Disk: the unpacked archives and the kept lines once more, in `OUT/.work`, which
is removed at the end. Interrupted, the same command goes on: texts that were
read and shards that were written are not done again. The files depend neither
on that nor on the number of processes.

The output is what `tasks.files` reads, and `prepared.json`: what was read,
kept, and dropped why, by text.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import gzip
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from basemt_jax import checksums, files
from basemt_jax.corpora import cleaning, planning, raw_text
from basemt_jax.data import parallel_text

REPORT = "prepared.json"
_WORK = ".work"
_HELD_OUT = "held_out.npy"  # Keys of sentences, where workers find them.
_SHOWN = 8  # Reasons why lines of a text could not be read.


def shard_name(pair: raw_text.Pair, shard: int, shards: int) -> str:
  """The file name of a shard."""
  part = f"-{shard:05}-of-{shards:05}" if shards > 1 else ""
  return f"{pair[0]}-{pair[1]}.train{part}.tsv.gz"


def prepare(
  raw: str | os.PathLike[str],
  out: str | os.PathLike[str],
  names: raw_text.Names,
  options: cleaning.Options | None = None,
  *,
  processes: int | None = None,
  progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Prepares a folder of raw text on all cores of this machine.

  Args:
    raw: folder of downloaded files.
    out: folder for the result.
    names: of the corpus.
    options: what training text must be like.
    processes: to work in; None: one per core; 0: in this one.
    progress: takes a line of text now and then.

  Returns:
    The report, as it is written to `prepared.json`.

  Raises:
    ValueError: nothing to prepare, files that cannot be read, or a folder
      `out` that was prepared from something else.
  """
  raw, out, options = (
    pathlib.Path(raw),
    pathlib.Path(out),
    options or cleaning.Options(),
  )
  with begun(raw, out, names, options, progress) as (work, report):
    if report:
      progress(f"{out} is prepared already")
      return report
    todo = planning.plan(raw, work, names, options)
    np.save(work / _HELD_OUT, todo.keys)
    with _pool(processes) as pool:
      for job in todo.jobs:
        _read_job(job, work, options, pool, progress)
      check_read(todo, work)
      _write_shards(todo.jobs, work, out, pool, progress)
    return finish(todo, work, out, options)


@contextlib.contextmanager
def begun(
  raw: pathlib.Path,
  out: pathlib.Path,
  names: raw_text.Names,
  options: cleaning.Options,
  progress: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[pathlib.Path, dict[str, Any] | None]]:
  """The work folder, and the report if all is done; alone in `out`.

  Raises:
    ValueError: `out` is of other files or options, or within `raw`.
  """
  if out.resolve().is_relative_to(raw.resolve()):
    raise ValueError(
      f"the folder for the result, {out}, is within the folder of raw text: "
      "choose one outside of it"
    )
  identity = _identity(raw, names, options)
  out.mkdir(parents=True, exist_ok=True)
  waiting = f"waiting for another process that prepares {out}"
  with files.locked(out, lambda: progress(waiting)):
    work = out / _WORK
    if (out / REPORT).exists():
      report = _read_json(out / REPORT)
      _check_identity(report["made_of"], identity, out)
      shutil.rmtree(work, ignore_errors=True)
      yield work, report
      return
    work.mkdir(exist_ok=True)
    _go_on(work, identity, out)
    try:
      yield work, None
    except OSError as error:
      is_full = error.errno in files.DISK_FULL
      if not is_full and error.filename:
        raise
      why = "its disk is full" if is_full else error.strerror
      raise ValueError(
        f"{out} cannot be written, {why}: make room and run the same command "
        "again, which goes on from here"
      ) from error


def _go_on(work: pathlib.Path, identity: Any, out: pathlib.Path) -> None:
  """Takes over what an earlier run left in the work folder, if it fits."""
  note = work / "made_of.json"
  old = _read_json(note) if note.exists() else None
  if old is not None and old != identity:
    if any(work.glob("*/shard-*.json")):
      _check_identity(old, identity, out)
    # Nothing was written yet. What was unpacked depends on these.
    other = any(old.get(key) != identity[key] for key in ("pairs", "files"))
    for path in work.iterdir():
      if path.is_dir() and (other or path.name != "unpacked"):
        shutil.rmtree(path)
  if old != identity:
    files.write_json(note, identity)


def _check_identity(old: Any, new: Any, out: pathlib.Path) -> None:
  if all(len(file) == 2 for file in old.get("files", ())):
    # Of an earlier version, which wrote no checksums.
    new = new | {"files": [file[:2] for file in new["files"]]}
  if old != new:
    changed = [key for key in new if old.get(key) != new[key]]
    raise ValueError(
      f"{out} was prepared from something else (other {', '.join(changed)}): "
      "choose another folder, or delete this one"
    )


def _identity(
  raw: pathlib.Path, names: raw_text.Names, options: cleaning.Options
) -> dict[str, Any]:
  """What the result depends on."""
  if not raw.is_dir():
    raise ValueError(f"the folder of raw text {str(raw)!r} does not exist")
  return {
    "pairs": [list(pair) for pair in names.pairs],
    "options": {
      field.name: getattr(options, field.name)
      for field in dataclasses.fields(options)
      if field.compare
    },
    "decisions": {split: list(x) for split, x in sorted(names.decided.items())},
    "files": [
      [str(path.relative_to(raw)), size, checksum]
      for path in sorted(raw.rglob("*"))
      if path.is_file()
      for size, _, checksum in [checksums.stamp(path)]
    ],
  }


# --------------------------------------------------------------- processes


def _pool(processes: int | None) -> concurrent.futures.Executor:
  if processes == 0:
    return concurrent.futures.ThreadPoolExecutor(1)
  # Spawned: the parent may hold TensorFlow's threads.
  return concurrent.futures.ProcessPoolExecutor(
    processes or os.cpu_count(),
    multiprocessing.get_context("spawn"),
    signal.signal,  # It is the parent that is interrupted.
    (signal.SIGINT, signal.SIG_IGN),
  )


def _bounded(
  pool: concurrent.futures.Executor,
  function: Callable[..., Any],
  arguments: Iterable[tuple[Any, ...]],
) -> Iterator[Any]:
  """Results in order, with few arguments and results in memory at a time."""
  limit = 2 * getattr(pool, "_max_workers", 1) + 1
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    for each in arguments:
      waiting.append(pool.submit(function, *each))
      if len(waiting) >= limit:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    for future in waiting:
      future.cancel()


def _clean(
  lines: Sequence[parallel_text.Line],
  languages: raw_text.Pair,
  pair: raw_text.Pair,
  shards: int,
  options: cleaning.Options,
  work: pathlib.Path,
) -> tuple[dict[int, bytes], cleaning.Outcome]:
  """In a worker: the kept lines of a chunk by shard."""
  held_out = np.load(work / _HELD_OUT, mmap_mode="r")
  kept, outcome = cleaning.clean(lines, languages, pair, options, held_out)
  parts = cleaning.by_shard(kept, shards)
  return {k: b"\n".join([*part, b""]) for k, part in parts.items()}, outcome


def _read_job(
  job: planning.Job,
  work: pathlib.Path,
  options: cleaning.Options,
  pool: concurrent.futures.Executor,
  progress: Callable[[str], None],
) -> None:
  """Puts the kept lines of all raw texts of a pair into a file per shard."""
  folder = job_folder(work, job.pair)
  for number, text in enumerate(job.texts):
    if (folder / f"{number}.json").exists():
      continue
    part = folder / str(number)
    shutil.rmtree(part, ignore_errors=True)  # Of an interrupted run.
    part.mkdir(parents=True)
    outcome = cleaning.Outcome()
    with contextlib.ExitStack() as stack:
      opened: dict[int, Any] = {}
      arguments = (
        (chunk, text.languages, job.pair, job.shards, options, work)
        for chunk in planning.chunks(text)
      )
      for lines, found in _bounded(pool, _clean, arguments):
        outcome.add(found)
        for shard, content in lines.items():
          if shard not in opened:
            opened[shard] = stack.enter_context(open(part / str(shard), "wb"))
          opened[shard].write(content)
        count = outcome.counts.total()
        progress(f"reading {'-'.join(job.pair)}, {text.name}: {count:,} lines")
    write_outcome(work, job.pair, number, text.name, outcome)


def _write_shards(
  jobs: Sequence[planning.Job],
  work: pathlib.Path,
  out: pathlib.Path,
  pool: concurrent.futures.Executor,
  progress: Callable[[str], None],
) -> None:
  """Writes all shards that are not there yet."""
  todo = [
    (work, out, job.pair, shard, job.shards)
    for job in jobs
    for shard in range(job.shards)
  ]
  for done, _ in enumerate(_bounded(pool, _write_shard, todo), start=1):
    progress(f"writing: {done} of {len(todo)} files")


def _write_shard(
  work: pathlib.Path,
  out: pathlib.Path,
  pair: raw_text.Pair,
  shard: int,
  shards: int,
) -> None:
  """In a worker: one shard, unless it is there."""
  if _shard_counts(work, pair, shard).exists():
    return
  parts = sorted(job_folder(work, pair).glob(f"*/{shard}"))
  write_shard(_lines(parts), work, out, pair, shard, shards)
  for part in parts:
    part.unlink()


def _lines(paths: Sequence[pathlib.Path]) -> Iterator[bytes]:
  for path in paths:
    with open(path, "rb") as file:
      for line in file:
        yield line.rstrip(b"\n")


# ------------------------------------------------------------------ results


def job_folder(work: pathlib.Path, pair: raw_text.Pair) -> pathlib.Path:
  """Where the results of a pair of languages are collected."""
  return work / "-".join(pair)


def write_outcome(
  work: pathlib.Path,
  pair: raw_text.Pair,
  number: int,
  name: str,
  outcome: cleaning.Outcome,
) -> None:
  """Notes that a raw text has been read, and what became of its lines."""
  files.write_json(
    job_folder(work, pair) / f"{number}.json",
    {
      "name": name,
      "counts": _by_number(outcome.counts),
      "unread": dict(sorted(outcome.unread.items())),
    },
  )


def _by_number(counts: Mapping[str, int]) -> dict[str, int]:
  return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def check_read(todo: planning.Todo, work: pathlib.Path) -> None:
  """Refuses texts that could not be read, and languages without a line."""
  for job in todo.jobs:
    texts = _outcomes(job, work)
    for text in texts:
      if all(reason in text["unread"] for reason in text["counts"]):
        why = "; ".join(_unread(text)) or "it is empty"
        raise ValueError(
          f"nothing of {text['name']} can be used, {why}: mend it or take it "
          "away"
        )
    if not any("kept" in text["counts"] for text in texts):
      total: Counter[str] = Counter()
      for text in texts:
        total.update(text["counts"])
      why = ", ".join(f"{n:,} {x}" for x, n in total.most_common(_SHOWN))
      raise ValueError(
        f"nothing is kept of the training text of {'-'.join(job.pair)}, "
        f"{planning.listed([t['name'] for t in texts])}: {why}"
      )


def _outcomes(job: planning.Job, work: pathlib.Path) -> list[dict[str, Any]]:
  folder = job_folder(work, job.pair)
  return [_read_json(folder / f"{i}.json") for i in range(len(job.texts))]


def _unread(text: Mapping[str, Any]) -> list[str]:
  """What of a text could not be read: reason, number of lines, the first."""
  most = sorted(text["unread"], key=lambda x: (-text["counts"][x], x))
  said = []
  for reason in most[:_SHOWN]:
    numbers = text["unread"][reason]
    more = " ..." if text["counts"][reason] > len(numbers) else ""
    where = ", ".join(map(str, numbers)) + more
    lines = "line" if len(numbers) == 1 else "lines"
    said.append(f"{text['counts'][reason]:,} {reason} ({lines} {where})")
  if len(most) > _SHOWN:
    said.append(f"and {len(most) - _SHOWN} other reasons")
  return said


def _shard_counts(
  work: pathlib.Path, pair: raw_text.Pair, shard: int
) -> pathlib.Path:
  return job_folder(work, pair) / f"shard-{shard}.json"


def write_shard(
  lines: Iterable[bytes],
  work: pathlib.Path,
  out: pathlib.Path,
  pair: raw_text.Pair,
  shard: int,
  shards: int,
) -> None:
  """Step 3 of a shard: writes its lines once each, in order of digests.

  Lines come in any order; `work` gets a note of their numbers.
  """
  by_digest: dict[bytes, bytes] = {}
  total = 0
  for line in lines:
    total += 1
    by_digest.setdefault(cleaning.digest(line), line)
  with (
    files.atomic(out / shard_name(pair, shard, shards)) as raw,
    # No name and no time in it: the same lines are the same bytes.
    gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,
  ):
    file.writelines(by_digest[key] + b"\n" for key in sorted(by_digest))
  kept = len(by_digest)
  files.write_json(
    _shard_counts(work, pair, shard),
    {"kept": kept, "equal to another pair": total - kept},
  )


def finish(
  todo: planning.Todo,
  work: pathlib.Path,
  out: pathlib.Path,
  options: cleaning.Options,
) -> dict[str, Any]:
  """Writes dev and test sets and the report, and removes the work folder."""
  check_read(todo, work)
  for name, one in todo.evaluation.items():
    lines = "".join(f"{a}\t{b}\n" for a, b in one.pairs)
    files.write_atomically(out / name, lines)
  report: dict[str, Any] = {
    "pairs": {},
    "evaluation": {
      name: {"pairs": len(one.pairs), "made_of": one.text.name}
      for name, one in todo.evaluation.items()
    },
    "held_out": [
      {
        "name": one.text.name,
        "pairs": len(one.pairs),
        "unread": dict(one.unread),
      }
      for one in todo.held_out
    ],
    "missing": ["-".join(pair) for pair in todo.missing],
    "unused": list(todo.unused),
    "unread": list(todo.unread),
    "max_characters": options.max_characters,
    "train_files": {},
    "made_of": _read_json(work / "made_of.json"),
  }
  for job in todo.jobs:
    shards = {
      shard_name(job.pair, shard, job.shards): _read_json(
        _shard_counts(work, job.pair, shard)
      )
      for shard in range(job.shards)
    }
    report["train_files"] |= {
      name: {"pairs": found["kept"], "bytes": size, "checksum": checksum}
      for name, found in shards.items()
      for size, _, checksum in [checksums.stamp(out / name)]
    }
    report["pairs"]["-".join(job.pair)] = _summary(
      _outcomes(job, work), shards.values()
    )
  files.write_json(out / REPORT, report)
  shutil.rmtree(work)
  return report


def _summary(
  texts: Sequence[Mapping[str, Any]], shards: Iterable[Mapping[str, int]]
) -> dict[str, Any]:
  """The report of a pair of languages, from those of its texts and shards."""
  counts: Counter[str] = Counter()
  for text in texts:
    counts.update(text["counts"])
  read = counts.total()
  del counts["kept"]
  for found in shards:
    counts.update(found)
  kept = counts.pop("kept", 0)
  return {
    "read": read,
    "kept": kept,
    "dropped": _by_number(+counts),
    "texts": list(texts),
  }


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))


def notes(report: Mapping[str, Any]) -> list[str]:
  """A report for readers: what was not read, held out, missing or unused."""
  lines = []
  for pair in report["pairs"].values():
    lines += [
      f"not read: {text['name']}: {'; '.join(_unread(text))}"
      for text in pair["texts"]
      if text["unread"]
    ]
  for name, made in report["evaluation"].items():
    lines.append(f"{name}: {made['pairs']:,} pairs of {made['made_of']}")
  others = dict(report, held_out=[each["name"] for each in report["held_out"]])
  for title, what in (
    ("held out of training, not used", "held_out"),
    ("no training text", "missing"),
    ("not used", "unused"),
    ("dev or test sets that cannot be read, NOT held out", "unread"),
  ):
    if others[what]:
      lines.append(f"{title}: {planning.listed(others[what])}")
  return lines
