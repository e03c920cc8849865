"""Files written so that a reader sees all of them or none."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any


def write_atomically(
  path: str | os.PathLike[str], content: str | bytes
) -> None:
  """Writes a file so that a reader sees all of it or the file before.

  Args:
    path: the file; its folder is made.
    content: text is written in UTF-8.
  """
  directory = os.path.dirname(os.fspath(path)) or "."
  os.makedirs(directory, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=directory, prefix=".writing-")
  try:
    with open(handle, "wb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
    # mkstemp lets nobody else read; results are as public as other files.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


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
