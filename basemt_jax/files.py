"""Files that readers see whole or not at all; what libraries print."""

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
  """Gives errors of the file system the file's name where they lack it.

  "No space left on device" helps little without the device.
  """
  try:
    yield
  except OSError as error:
    if error.filename is not None or error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_writable(path: str | os.PathLike[str]) -> None:
  """Refuses, before the work is done, what could not be written after it.

  Raises:
    ValueError: the path is a folder, or in none that can be written to.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    raise ValueError(f"{path} is a folder: name a file")
  there = next(p for p in (file, *file.absolute().parents) if p.exists())
  if there != file and not there.is_dir():
    raise ValueError(f"{path} cannot be written: {there} is not a folder")
  if not os.access(there, os.W_OK):
    raise ValueError(
      f"{path} cannot be written: {there} is read-only to this user; choose "
      "another place"
    )


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A file to write to, of which a reader sees all, or the file before.

  It is on the disk, and takes its name, when the block ends; if that fails,
  nothing changes. What killed writers of the same file left is removed. A pipe
  or a terminal cannot be replaced, and is written to as it is.
  """
  if os.path.exists(path) and not os.path.isfile(path):
    with named(path), open(path, "wb") as file:
      yield file
    return
  directory, name = os.path.split(os.fspath(path))
  os.makedirs(directory or ".", exist_ok=True)
  prefix = f".writing-{name}-"
  _remove_abandoned(directory, prefix)
  handle, temporary = tempfile.mkstemp(dir=directory or ".", prefix=prefix)
  try:
    with named(path), open(handle, "wb") as file:
      _lock(handle)
      yield file
      file.flush()
      os.fsync(handle)
      # mkstemp lets nobody else read; results are as public as other files.
      os.chmod(temporary, 0o666 & ~_mask())
      os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A folder to fill, which takes its name when the block ends.

  If that fails, nothing is there.

  Raises:
    ValueError: there is something by that name, and not an empty folder.
  """
  target = pathlib.Path(path).absolute()
  if target.exists() and not (target.is_dir() and not os.listdir(target)):
    raise ValueError(
      f"{path} is there already: name a new folder, or delete it"
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  made = tempfile.mkdtemp(dir=target.parent, prefix=f".new-{target.name}-")
  try:
    with named(path):
      yield pathlib.Path(made)
      os.chmod(made, 0o777 & ~_mask())
      os.replace(made, target)
  except BaseException:
    shutil.rmtree(made, ignore_errors=True)
    raise


def _mask() -> int:
  """The process' mask of permissions, which can only be read by setting it."""
  mask = os.umask(0)
  os.umask(mask)
  return mask


def remove_left_behind(directory: str | os.PathLike[str]) -> None:
  """Removes what killed writers left half written in a folder and below."""
  for folder, _, _ in os.walk(directory):
    _remove_abandoned(folder, ".writing-")


def _remove_abandoned(directory: str, prefix: str) -> None:
  """Removes the temporary files that no living process holds."""
  for path in glob.glob(os.path.join(glob.escape(directory), f"{prefix}*")):
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
      found = os.fstat(file.fileno())
      # A new one is empty for the moment until its writer has locked it.
      is_new = not found.st_size and time.time() - found.st_mtime < 60
      if not is_new and _lock(file.fileno()):
        os.unlink(path)


def _lock(handle: int) -> bool:
  """Locks an open file for as long as it is open, if nobody else has."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:  # Locked, or a file system without locks.
    return False
  return True


def write_atomically(
  path: str | os.PathLike[str], content: str | bytes
) -> None:
  """Writes a file so that a reader sees all of it or the file before.

  Its folder is made; text is written in UTF-8.
  """
  data = content.encode("utf-8") if isinstance(content, str) else content
  with atomic(path) as file:
    file.write(data)


@contextlib.contextmanager
def locked(
  directory: str | os.PathLike[str], waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
  """Alone among processes that lock the folder; waits for the others.

  The lock goes when its process ends, however it ends, and leaves no file;
  `waiting` is called if another process has it.
  """
  handle = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      waiting()
      fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # A file system without locks.
      pass
    yield
  finally:
    os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `json_text`, atomically; bytes that are no UTF-8 are written out."""
  write_atomically(path, json_text(value).encode("utf-8", "backslashreplace"))


def json_text(value: Any) -> str:
  """The value as JSON, with null for numbers that JSON cannot hold."""
  return (
    json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    + "\n"
  )


def _finite(value: Any) -> Any:
  """The value with null for numbers that JSON cannot hold."""
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


# Control characters but line ends and tabs, marks that turn text around, and
# what is left of bytes that are no UTF-8.
_UNPRINTABLE = {
  code: ascii(chr(code))[1:-1]
  for codes in (
    *(range(0x00, 0x09), range(0x0B, 0x20), range(0x7F, 0xA0)),
    *(range(0x2028, 0x202F), range(0x2066, 0x206A), range(0xD800, 0xE000)),
  )
  for code in codes
}


def printable(text: str) -> str:
  r"""The text with what a terminal would obey written out, such as '\x1b'."""
  return text.translate(_UNPRINTABLE)


@contextlib.contextmanager
def native_output_captured() -> Iterator[list[str]]:
  """Keeps what is written to standard error from it, C++ libraries' too.

  TensorFlow greets there when it is loaded, whatever its log level. Exceptions
  are Python's and not touched.

  Yields:
    The lines; filled at the end.
  """
  lines: list[str] = []
  sys.stderr.flush()
  saved = os.dup(2)
  try:
    with tempfile.TemporaryFile() as file:
      os.dup2(file.fileno(), 2)
      try:
        yield lines
      finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        file.seek(0)
        lines += file.read().decode(errors="replace").splitlines()
  finally:
    os.close(saved)
