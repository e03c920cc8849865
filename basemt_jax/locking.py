"""One writer to a directory: a lock that goes when its process does.

The operating system holds it (`flock`), so that a process that was killed
leaves nothing behind which somebody would have to delete.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

FILE = ".lock"


@contextlib.contextmanager
def only_writer(directory: str | os.PathLike[str], what: str) -> Iterator[None]:
  """Holds a directory, made if need be, for this process alone.

  One that was made and into which nothing was written is gone afterwards: what
  fails at its start leaves nothing behind. `what` names it in errors.

  Raises:
    ValueError: another process holds it, which is named; or it cannot be made
      or written to.
  """
  folder = pathlib.Path(directory)
  made = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file, path = _locked(folder)
  except OSError as error:
    raise ValueError(
      f"{what} {folder} cannot be written to: {error.strerror}; choose another "
      "or make it writable"
    ) from error
  try:
    yield
  finally:
    if made and os.listdir(folder) == [FILE]:
      path.unlink()
      for empty in made:
        with contextlib.suppress(OSError):
          empty.rmdir()
    file.close()


def _locked(folder: pathlib.Path) -> tuple[TextIO, pathlib.Path]:
  """The locked file, open, and its path."""
  path = folder / FILE
  while True:
    file = path.open("a+", encoding="utf-8")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read()
      file.close()
      raise ValueError(_taken(folder, holder)) from None
    except OSError:
      file.close()
      raise
    # Who held it before may have deleted it in the meantime.
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
      file.truncate(0)
      note = {"pid": os.getpid(), "host": socket.gethostname()}
      file.write(json.dumps(note) + "\n")
      file.flush()
      return file, path
    file.close()


def _taken(folder: pathlib.Path, holder: str) -> str:
  try:
    note = json.loads(holder)
    who = f"process {note['pid']} on host {note['host']}"
  except (ValueError, KeyError, TypeError):
    who = "another process"
  return (
    f"{who} is writing to {folder}: wait until it has ended, or choose another "
    "directory"
  )
