"""Downloaded archives: what is useful in them, unpacked within limits.

Tar archives (plain, or compressed with gzip, bzip2 or xz) and zip archives are
read to their ends, so that damage is found: their checksums, and the empty
block that closes a tar archive. Whatever is wrong is one sentence that names
the archive and what to do about it.
"""

import bz2
import dataclasses
import gzip
import io
import lzma
import pathlib
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from basemt_jax import files as files_lib

SUFFIXES = (
  *(".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz"),
  ".zip",
)
_MAGIC: dict[bytes, Callable[..., Any]] = {
  b"\x1f\x8b": gzip.open,
  b"BZh": bz2.open,
  b"\xfd7zXZ\x00": lzma.open,
}
_UNPACKED = ".files"  # Ends the name of a folder that was an archive.
_BLOCK = 1 << 20
_BY_HAND = (
  "unpack it yourself into the folder of raw text and take the archive away"
)
_DAMAGED = (
  *(EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error),
  lzma.LZMAError,
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What archives may become; against mistakes and bombs.

  Attributes:
    files: Of all archives together, those within archives included.
    gigabytes: Of all their files.
    ratio: Of an archive's files to itself, once they are more than
      `ratio_from` bytes: text that repeats itself may be small.
  """

  files: int = 100_000
  gigabytes: float = 1000
  ratio: float = 250
  ratio_from: int = 1 << 28


def is_archive(name: str) -> bool:
  """Whether a file is an archive by its name."""
  return name.lower().endswith(SUFFIXES)


def shown_name(name: str) -> str:
  """The path of an unpacked file, with archives as folders."""
  return name.replace(f"{_UNPACKED}/", "/")


def unpack(
  raw: pathlib.Path,
  work: pathlib.Path,
  is_useful: Callable[[str], bool],
  limits: Limits | None = None,
) -> list[str]:
  """Unpacks what is useful, by its path, of all archives in `raw`, each once.

  In `work` every archive gets a folder; one that is there is left alone.

  Returns:
    Names of archives without anything useful.

  Raises:
    ValueError: an archive that is broken, encrypted, of an unknown kind or
      beyond the limits, or a full disk.
  """
  count = _Count(limits or Limits())
  todo = [(path, path.relative_to(raw)) for path in files(raw)]
  useless = []
  while todo:
    path, name = todo.pop()
    if not is_archive(path.name):
      continue
    target = work / f"{name}{_UNPACKED}"
    if not target.exists():
      partial = work / f"{name}.partial"
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir(parents=True)

      def of_archive(member: str, archive: pathlib.Path = name) -> bool:
        return is_useful(f"{archive}/{member}")

      _unpack_one(path, partial, of_archive, count)
      partial.rename(target)
    inner = files(target)
    if not inner:
      useless.append(shown_name(str(name)))
    todo += [(file, file.relative_to(work)) for file in inner]
  return sorted(useless)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files in a folder and its folders, in the order of their names."""
  return sorted(p for p in folder.rglob("*") if p.is_file())


@dataclasses.dataclass
class _Count:
  """What was unpacked so far."""

  limits: Limits
  files: int = 0
  size: int = 0

  def beyond(self, of_archive: int, archive_size: int) -> str:
    """What there is too much of, with so many bytes of an archive; or ''."""
    limits = self.limits
    if self.files > limits.files:
      return f"{limits.files:,} files"
    if self.size > limits.gigabytes * 1e9:
      return f"{limits.gigabytes:,g} GB of files (--max_unpacked_gb)"
    most = max(limits.ratio_from, limits.ratio * archive_size)
    return f"{limits.ratio:g} times its size of files" * (of_archive > most)


def _unpack_one(
  path: pathlib.Path,
  target: pathlib.Path,
  is_useful: Callable[[str], bool],
  count: _Count,
) -> None:
  members = _zip_members if path.suffix.lower() == ".zip" else _tar_members
  size, done = path.stat().st_size, 0

  def check() -> None:
    if what := count.beyond(done, size):
      raise ValueError(
        f"{path} holds, with the archives before it, more than {what}, and no "
        f"more is unpacked: if it is what it should be, {_BY_HAND}"
      )

  try:
    for name, stream in members(path, is_useful):
      count.files += 1
      check()
      out = target / name
      out.parent.mkdir(parents=True, exist_ok=True)
      with open(out, "wb") as file:
        while block := stream.read(_BLOCK):
          done += len(block)
          count.size += len(block)
          check()
          file.write(block)
  except _DAMAGED as error:
    raise _damaged(path, error) from error
  except OSError as error:
    if error.errno is None:  # Of a compression, not of the system.
      raise _damaged(path, error) from error
    if error.errno in files_lib.DISK_FULL:
      raise ValueError(
        f"the disk of {target.parent} is full after {done:,} bytes of {path}: "
        "make room and run the same command again, which goes on from here"
      ) from error
    raise ValueError(
      f"{path} cannot be unpacked to {target.parent} ({error.strerror})"
    ) from error


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path} is not a whole archive ({error}): download it again"
  )


def _inside(member: str) -> pathlib.PurePosixPath:
  """A member's path, made to stay inside of the archive's folder."""
  parts = [p for p in pathlib.PurePosixPath(member).parts if p != ".."]
  return pathlib.PurePosixPath(*(p.strip("/") or "_" for p in parts))


def _zip_members(
  path: pathlib.Path, is_useful: Callable[[str], bool]
) -> Iterator[tuple[pathlib.PurePosixPath, IO[bytes]]]:
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      inside = _inside(member.filename)
      if member.is_dir() or not is_useful(str(inside)):
        continue
      if member.flag_bits & 1:
        raise ValueError(f"{path} is encrypted: {_BY_HAND}")
      try:
        stream = archive.open(member)
      except NotImplementedError:
        raise ValueError(
          f"{path} is compressed by a method that Python does not know "
          f"({member.compress_type}): {_BY_HAND}"
        ) from None
      with stream:
        yield inside, stream


def _tar_members(
  path: pathlib.Path, is_useful: Callable[[str], bool]
) -> Iterator[tuple[pathlib.PurePosixPath, IO[bytes]]]:
  with open(path, "rb") as raw:
    head = raw.peek(8)
    known = [opens for magic, opens in _MAGIC.items() if head.startswith(magic)]
    if not known and not tarfile.is_tarfile(path):
      raise ValueError(
        f"{path} is no tar archive, or is compressed by another method than "
        f"gzip, bzip2 and xz: {_BY_HAND}"
      )
    with known[0](raw) if known else raw as content:
      tail = _Tail(content)
      with tarfile.open(fileobj=tail, mode="r|") as tar:
        for entry in tar:
          inside = _inside(entry.name)
          if entry.isfile() and is_useful(str(inside)):
            stream = tar.extractfile(entry)
            assert stream is not None
            yield inside, stream
      while tail.read(_BLOCK):
        pass
      if any(tail.last):
        raise tarfile.ReadError("it has no end")


class _Tail(io.RawIOBase):
  """A stream that remembers its last block, and is read to its end."""

  def __init__(self, content: Any):
    self._content = content
    self.last = b""

  def read(self, size: int = -1) -> bytes:
    """The next bytes."""
    block: bytes = self._content.read(size)
    self.last = (self.last + block)[-512:]
    return block
