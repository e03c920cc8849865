"""Files that a reader sees whole or not at all, and folders of one process."""

import concurrent.futures
import os
import signal
import stat
import subprocess
import sys

import pytest

from basemt_jax import files


def test_text_bytes_and_streams(tmp_path):
  files.write_atomically(tmp_path / "new/a", "ä\n")
  files.write_atomically(tmp_path / "b", b"\xff")
  with files.atomic(tmp_path / "b") as file:
    file.write(b"other")
    assert (tmp_path / "b").read_bytes() == b"\xff"
  assert (tmp_path / "new/a").read_bytes() == "ä\n".encode()
  assert (tmp_path / "b").read_bytes() == b"other"
  umask = os.umask(0)
  os.umask(umask)
  mode = stat.S_IMODE((tmp_path / "b").stat().st_mode)
  assert mode == 0o666 & ~umask
  assert sorted(os.listdir(tmp_path)) == ["b", "new"]


def test_a_failure_changes_nothing(tmp_path):
  files.write_atomically(tmp_path / "a", "before")
  with pytest.raises(RuntimeError), files.atomic(tmp_path / "a") as file:
    file.write(b"half")
    raise RuntimeError
  assert os.listdir(tmp_path) == ["a"]
  assert (tmp_path / "a").read_text() == "before"


def test_what_a_killed_writer_left_goes(tmp_path):
  """And what a living one holds stays."""
  code = f"""
import os, signal
from basemt_jax import files
with files.atomic({str(tmp_path / "a")!r}) as file:
  file.write(b"half")
  file.flush()
  os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", code], check=False)
  assert done.returncode == -signal.SIGKILL
  assert len(os.listdir(tmp_path)) == 1
  with files.atomic(tmp_path / "a") as first:
    first.write(b"first")
    first.flush()
    files.write_atomically(tmp_path / "a", "second")
    assert len(os.listdir(tmp_path)) == 2
  assert os.listdir(tmp_path) == ["a"]
  assert (tmp_path / "a").read_text() == "first"


def test_one_process_at_a_time(tmp_path):
  order = []

  def second():
    with files.locked(tmp_path, lambda: order.append("waits")):
      order.append("second")

  with concurrent.futures.ThreadPoolExecutor(1) as threads:
    with files.locked(tmp_path):
      done = threads.submit(second)
      while "waits" not in order:
        assert not done.done()
      order.append("first")
    done.result()
  assert order == ["waits", "first", "second"]
  assert not os.listdir(tmp_path)
