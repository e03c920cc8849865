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

Memory: a block of lines per process, then the text of a shard per process.
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

from basemt_jax.corpora import cleaning, raw_text

REPORT = "prepared.json"
_WORK = ".work"
_EVALUATION = {"validation": "dev", "test": "test"}
_MAX_SHARDS = 512
_SHOWN = 20  # Names of unused files in a table.


def shard_name(pair: raw_text.Pair, shard: int, shards: int) -> str:
  """The file name of a shard."""
  part = f"-{shard:05}-of-{shards:05}" if shards > 1 else ""
  return f"{pair[0]}-{pair[1]}.train{part}.tsv.gz"


# --------------------------------------------------------------- pipeline


@dataclasses.dataclass(frozen=True)
class Job:
  """Training text of a pair of languages.

  Attributes:
    pair: In the order of the output.
    texts: Raw texts.
    shards: Number of files to write.
  """

  pair: raw_text.Pair
  texts: tuple[raw_text.Text, ...]
  shards: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """What there is to do.

  Attributes:
    jobs: One per pair of languages.
    held_out: Sorted `cleaning.sentence_keys` of all dev and test sets.
    evaluation: File name to lines, of dev and test sets.
    sources: File name to the name of the text that it is made of.
    kept_out: Names of dev and test sets that are not used.
    unused: Names of raw files that are not parallel text of the corpus.
    unread: Those among them that are dev or test sets by their names.
    missing: Pairs of languages without training text.
  """

  jobs: tuple[Job, ...]
  held_out: np.ndarray
  evaluation: Mapping[str, Sequence[bytes]]
  sources: Mapping[str, str]
  kept_out: tuple[str, ...]
  unused: tuple[str, ...]
  unread: tuple[str, ...]
  missing: tuple[raw_text.Pair, ...]


def plan(
  raw: pathlib.Path,
  work: pathlib.Path,
  names: raw_text.Names,
  options: cleaning.Options,
) -> Plan:
  """Unpacks archives, and finds what there is to do.

  Raises:
    ValueError: no folder, no training text, files that cannot be read, or texts
      of which it is in doubt whether they are for training.
  """
  if not raw.is_dir():
    raise ValueError(f"The folder of raw text {str(raw)!r} does not exist.")
  unpacked = work / "unpacked"
  unpacked.mkdir(parents=True, exist_ok=True)
  raw_text.unpack(raw, unpacked, names)
  found = raw_text.find([raw, unpacked], names)
  _check_doubts(found.doubtful)
  jobs = []
  for pair in names.pairs:
    if texts := found.texts.get(pair, {}).get("train"):
      size = sum(text.text_bytes for text in texts)
      shards = min(_MAX_SHARDS, -(-size // options.shard_bytes)) or 1
      jobs.append(Job(pair, tuple(texts), shards))
  if not jobs:
    raise ValueError(
      f"There is no training text of this benchmark in {str(raw)!r}: its files "
      "are known by their names; docs/data.md lists them."
    )
  trained = {job.pair for job in jobs}
  keys, evaluation, sources = [np.zeros(1, np.uint64)], {}, {}
  kept_out = list(found.held_out)
  for pair, of_pair in found.texts.items():
    for split in _EVALUATION.keys() & of_pair.keys():
      for text in of_pair[split]:
        if pair not in trained:
          kept_out.append(text)
          continue
        name, pairs = _evaluation_set(text, pair, split)
        evaluation[name] = [f"{a}\t{b}".encode() for a, b in pairs]
        sources[name] = text.name
        languages = text.languages if text.directed else pair
        keys += _keys(languages, pairs)
  for text in kept_out:
    keys += _keys(text.languages, _pairs(text))
  return Plan(
    tuple(jobs),
    np.unique(np.concatenate(keys)),
    dict(sorted(evaluation.items())),
    sources,
    tuple(sorted(text.name for text in kept_out)),
    tuple(sorted(found.unused)),
    tuple(sorted(found.unread)),
    tuple(pair for pair in names.pairs if pair not in trained),
  )


def _check_doubts(doubtful: Sequence[str]) -> None:
  """Asks what only the user can know."""
  if doubtful:
    raise ValueError(
      "by their names, these may be training text, or a dev or test set that "
      f"must stay out of it: {_listed(doubtful)}; decide with --train GLOB, "
      "--dev GLOB, --test GLOB or --held_out GLOB (neither trained nor "
      f"evaluated on), such as --train '{doubtful[0].split(' and ')[0]}'"
    )


def _evaluation_set(
  text: raw_text.Text, pair: raw_text.Pair, split: str
) -> tuple[str, list[raw_text.Pair]]:
  """The name and the pairs of a dev or test file."""
  pairs = list(_pairs(text, strict=True))
  if not text.directed and text.languages != pair:
    pairs = [(b, a) for a, b in pairs]
  name = "-".join(text.languages if text.directed else pair)
  return f"{name}.{_EVALUATION[split]}.tsv", pairs


def _keys(
  languages: raw_text.Pair, pairs: Sequence[raw_text.Pair]
) -> list[np.ndarray]:
  return [
    cleaning.sentence_keys(language, (sides[i] for sides in pairs))
    for i, language in enumerate(languages)
  ]


def _pairs(text: raw_text.Text, strict: bool = False) -> list[raw_text.Pair]:
  """The normalised pairs of a dev or test set that have two sides.

  Raises:
    ValueError: `strict`, and a line that cannot be read.
  """
  pairs = []
  for block in raw_text.blocks(text):
    for sides in raw_text.pairs_of(text, block):
      if not isinstance(sides, str):
        first, second = map(cleaning.normalise, sides)
        if first and second:
          pairs.append((first, second))
      elif strict:
        raise ValueError(f"{text.name} is a test set with a bad line: {sides}.")
  return pairs


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
  with begun(raw, out, names, options) as (work, report):
    if report:
      progress(f"{out} is prepared already")
      return report
    todo = plan(raw, work, names, options)
    np.save(work / "held_out.npy", todo.held_out)
    with _pool(processes, work, options) as pool:
      for job in todo.jobs:
        _read_job(job, work, pool, progress)
      _write_shards(todo.jobs, work, out, pool, progress)
    return finish(todo, work, out, options)


@contextlib.contextmanager
def begun(
  raw: pathlib.Path,
  out: pathlib.Path,
  names: raw_text.Names,
  options: cleaning.Options,
) -> Iterator[tuple[pathlib.Path, dict[str, Any] | None]]:
  """The work folder, and the report if all is done.

  Raises:
    ValueError: `out` is of other files or options.
  """
  out.mkdir(parents=True, exist_ok=True)
  identity = _identity(raw, names, options)
  if (out / REPORT).exists():
    report = _read_json(out / REPORT)
    _check_identity(report["made_of"], identity, out)
    shutil.rmtree(out / _WORK, ignore_errors=True)
    yield out / _WORK, report
    return
  work = out / _WORK
  work.mkdir(exist_ok=True)
  _go_on(work, identity, out)
  yield work, None


def _go_on(work: pathlib.Path, identity: Any, out: pathlib.Path) -> None:
  """Takes over what an earlier run left in the work folder, if it fits."""
  note = work / "made_of.json"
  old = _read_json(note) if note.exists() else None
  if old is not None and old != identity:
    if any(
      path.is_dir() and path.name != "unpacked" for path in work.iterdir()
    ):
      _check_identity(old, identity, out)
    # Only archives were unpacked: that depends on these.
    if any(old.get(key) != identity[key] for key in ("pairs", "files")):
      shutil.rmtree(work / "unpacked", ignore_errors=True)
  if old != identity:
    _write_json(note, identity)


def _check_identity(old: Any, new: Any, out: pathlib.Path) -> None:
  if old != new:
    changed = [key for key in new if old.get(key) != new[key]]
    raise ValueError(
      f"{out} was prepared from something else (other {', '.join(changed)}): "
      "choose another folder, or delete this one."
    )


def _identity(
  raw: pathlib.Path, names: raw_text.Names, options: cleaning.Options
) -> dict[str, Any]:
  """What the result depends on."""
  if not raw.is_dir():
    raise ValueError(f"The folder of raw text {str(raw)!r} does not exist.")
  return {
    "pairs": [list(pair) for pair in names.pairs],
    "options": dataclasses.asdict(options),
    "decisions": {split: list(x) for split, x in sorted(names.decided.items())},
    "files": [
      [str(path.relative_to(raw)), path.stat().st_size]
      for path in sorted(raw.rglob("*"))
      if path.is_file()
    ],
  }


# --------------------------------------------------------------- processes

# Of a worker process: the options and the keys of held-out sentences.
_worker: dict[str, Any] = {}


def _start_worker(held_out: str, options: cleaning.Options) -> None:
  _worker.update(held_out=np.load(held_out, mmap_mode="r"), options=options)


def _start_process(held_out: str, options: cleaning.Options) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent is interrupted.
  _start_worker(held_out, options)


@contextlib.contextmanager
def _pool(
  processes: int | None, work: pathlib.Path, options: cleaning.Options
) -> Iterator[concurrent.futures.Executor]:
  """Workers that hold the keys of held-out sentences."""
  arguments = (str(work / "held_out.npy"), options)
  if processes == 0:
    _start_worker(*arguments)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
      yield threads
    return
  # Spawned: the parent may hold TensorFlow's threads.
  with concurrent.futures.ProcessPoolExecutor(
    processes or os.cpu_count(),
    multiprocessing.get_context("spawn"),
    _start_process,
    arguments,
  ) as pool:
    yield pool


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
  text: raw_text.Text, block: raw_text.Block, pair: raw_text.Pair, shards: int
) -> tuple[dict[int, bytes], Counter[str]]:
  """In a worker: the kept lines of a block by shard."""
  parts, counts = cleaning.clean_block_by_shard(
    text, block, pair, _worker["options"], _worker["held_out"], shards
  )
  return {k: b"\n".join([*part, b""]) for k, part in parts.items()}, counts


def _read_job(
  job: Job,
  work: pathlib.Path,
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
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
      files: dict[int, Any] = {}
      blocks = (
        (text, block, job.pair, job.shards) for block in raw_text.blocks(text)
      )
      for lines, found in _bounded(pool, _clean, blocks):
        counts += found
        for shard, content in lines.items():
          if shard not in files:
            files[shard] = stack.enter_context(open(part / str(shard), "wb"))
          files[shard].write(content)
        progress(
          f"reading {'-'.join(job.pair)}, {text.name}: {counts.total():,} lines"
        )
    write_counts(work, job.pair, number, text.name, counts)


def _write_shards(
  jobs: Sequence[Job],
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


def write_counts(
  work: pathlib.Path,
  pair: raw_text.Pair,
  number: int,
  name: str,
  counts: Counter[str],
) -> None:
  """Notes that a raw text has been read, and what became of its lines."""
  _write_json(
    job_folder(work, pair) / f"{number}.json",
    {"name": name, "counts": dict(counts.most_common())},
  )


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

  Args:
    lines: in any order.
    work: gets a note of their numbers.
    out: gets the file.
    pair: of languages.
    shard: number of the shard.
    shards: of the pair.
  """
  by_digest: dict[bytes, bytes] = {}
  total = 0
  for line in lines:
    total += 1
    by_digest.setdefault(cleaning.digest(line), line)
  path = out / shard_name(pair, shard, shards)
  partial = path.with_name(path.name + ".partial")
  with (
    open(partial, "wb") as raw,
    # No name and no time in it: the same lines are the same bytes.
    gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,
  ):
    file.writelines(by_digest[key] + b"\n" for key in sorted(by_digest))
  partial.rename(path)
  kept = len(by_digest)
  _write_json(
    _shard_counts(work, pair, shard),
    {"kept": kept, "equal to another pair": total - kept},
  )


def finish(
  todo: Plan, work: pathlib.Path, out: pathlib.Path, options: cleaning.Options
) -> dict[str, Any]:
  """Writes dev and test sets and the report, and removes the work folder."""
  for name, lines in todo.evaluation.items():
    (out / name).write_bytes(b"".join(line + b"\n" for line in lines))
  report: dict[str, Any] = {
    "pairs": {},
    "evaluation": {
      name: {"pairs": len(lines), "made_of": todo.sources[name]}
      for name, lines in todo.evaluation.items()
    },
    "held_out": list(todo.kept_out),
    "missing": ["-".join(pair) for pair in todo.missing],
    "unused": list(todo.unused),
    "unread": list(todo.unread),
    "max_characters": options.max_characters,
    "train_files": {},
    "made_of": _read_json(work / "made_of.json"),
  }
  for job in todo.jobs:
    folder = job_folder(work, job.pair)
    texts = [_read_json(folder / f"{i}.json") for i in range(len(job.texts))]
    counts: Counter[str] = Counter()
    for text in texts:
      counts.update(text["counts"])
    read = counts.total()
    del counts["kept"]
    for shard in range(job.shards):
      found = _read_json(_shard_counts(work, job.pair, shard))
      counts.update(found)
      name = shard_name(job.pair, shard, job.shards)
      report["train_files"][name] = {
        "pairs": found["kept"],
        "bytes": (out / name).stat().st_size,
      }
    kept = counts.pop("kept", 0)
    report["pairs"]["-".join(job.pair)] = {
      "read": read,
      "kept": kept,
      "dropped": dict((+counts).most_common()),
      "texts": texts,
    }
  _write_json(out / REPORT, report)
  shutil.rmtree(work)
  return report


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: pathlib.Path, value: Any) -> None:
  partial = path.with_name(path.name + ".partial")
  text = json.dumps(value, indent=1, ensure_ascii=False)
  partial.write_text(text + "\n", encoding="utf-8")
  partial.rename(path)


def table(report: Mapping[str, Any]) -> str:
  """A report for readers: a line per pair of languages, and what was unused."""
  lines = [f"{'pair':<12} {'read':>14} {'kept':>14}  dropped"]
  total: Counter[str] = Counter()
  for name, pair in report["pairs"].items():
    dropped = ", ".join(f"{n:,} {why}" for why, n in pair["dropped"].items())
    lines.append(
      f"{name:<12} {pair['read']:>14,} {pair['kept']:>14,}  {dropped or '-'}"
    )
    total.update(read=pair["read"], kept=pair["kept"])
  lines.append(f"{'all':<12} {total['read']:>14,} {total['kept']:>14,}")
  for name, made in report["evaluation"].items():
    lines.append(f"{name}: {made['pairs']:,} pairs of {made['made_of']}")
  for title, what in (
    ("held out of training, not used", "held_out"),
    ("no training text", "missing"),
    ("not used", "unused"),
    ("dev or test sets that cannot be read, NOT held out", "unread"),
  ):
    if report[what]:
      lines.append(f"{title}: {_listed(report[what])}")
  return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
  """The first of some names, and how many more there are."""
  more = len(names) - _SHOWN
  return ", ".join(names[:_SHOWN]) + (
    f", and {more:,} more" if more > 0 else ""
  )
