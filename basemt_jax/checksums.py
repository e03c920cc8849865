"""Checksums of a directory's files, and what has become of them since.

A sealed directory holds `checksums.json`: the XXH3 of every file in it, as
hexadecimal digits by relative path. Files are read in parallel, as fast as the
disk gives them.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import random
from collections.abc import Container, Iterable, Sequence

import xxhash

from basemt_jax import files

FILE = "checksums.json"
_METHOD = "xxh3_128"
_BLOCK = 1 << 24
_THREADS = 8
_SAMPLE, _SAMPLED = 1 << 16, 64  # Bytes of a block, blocks of a large file.


def file_checksum(path: str | os.PathLike[str]) -> str:
  """The XXH3 of a file's bytes; 32 hexadecimal digits."""
  digest = xxhash.xxh3_128()
  with open(path, "rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


def stamp(path: str | os.PathLike[str]) -> tuple[int, int, str]:
  """What tells in milliseconds whether a file has changed.

  Returns:
    Its size, its time of change in nanoseconds, and the checksum of its bytes:
    of all of them, or, of a large file, of some blocks spread over it.
  """
  found = os.stat(path)
  size, changed = found.st_size, found.st_mtime_ns
  return size, changed, _sampled(os.fspath(path), size, changed)


@functools.lru_cache(1 << 16)
def _sampled(path: str, size: int, unused_time: int) -> str:
  digest = xxhash.xxh3_128()
  with open(path, "rb") as file:
    if size <= _SAMPLED * _SAMPLE:
      digest.update(file.read())
    else:
      draws = random.Random(size)
      for _ in range(_SAMPLED):
        file.seek(draws.randrange(size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
  return digest.hexdigest()


def bytes_checksum(data: bytes) -> str:
  """The XXH3 of bytes in memory; 32 hexadecimal digits."""
  return xxhash.xxh3_128(data).hexdigest()


def seal(directory: str | os.PathLike[str], but: Container[str] = ()) -> None:
  """Writes the checksums of all files of a directory that will not change.

  Files named in `but` do not count, nor those whose names begin with a dot
  (locks, half-written ones).
  """
  root = pathlib.Path(directory)
  names = sorted(
    path.relative_to(root).as_posix()
    for path in root.rglob("*")
    if path.is_file()
    and path.name not in but
    and not _is_left_out(path.relative_to(root))
  )
  sums = _all(root, names)
  files.write_json(root / FILE, {"method": _METHOD, "files": sums})


def _is_left_out(path: pathlib.Path) -> bool:
  return path.as_posix() == FILE or any(p.startswith(".") for p in path.parts)


def _all(root: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  names = list(names)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    sums = threads.map(lambda name: file_checksum(root / name), names)
    return dict(zip(names, sums, strict=True))


def is_sealed(directory: str | os.PathLike[str]) -> bool:
  """Whether the directory holds checksums of its files."""
  return (pathlib.Path(directory) / FILE).exists()


def damage(directory: str | os.PathLike[str]) -> list[str]:
  """What of a sealed directory is missing or differs, a phrase for each file.

  Nothing of a directory that is whole, or was never sealed.
  """
  root = pathlib.Path(directory)
  try:
    values = json.loads((root / FILE).read_text("utf-8"))
    recorded = dict(values["files"])
    if values["method"] != _METHOD:
      raise ValueError(values["method"])
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, TypeError):
    return [f"{FILE} cannot be read"]
  missing = [name for name in recorded if not (root / name).is_file()]
  found = _all(root, (name for name in recorded if name not in missing))
  differing = [name for name, value in found.items() if recorded[name] != value]
  return [f"{name} is missing" for name in missing] + [
    f"{name} holds other bytes than were written" for name in differing
  ]


def told(phrases: Sequence[str], most: int = 3) -> str:
  """What `damage` found, in a line: a few phrases, and how many more."""
  more = len(phrases) - most
  end = [f"{more} more of its files"] if more > 0 else []
  return "; ".join([*phrases[:most], *end])
