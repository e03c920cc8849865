"""Several processes that act as one: they start, agree and end together.

On several hosts the same command runs once a host (or once a device), and JAX
joins the processes (`jax.distributed`). What computes runs in all of them; what
speaks or writes a file, in the first. When one ends, the others cannot go on,
and must not wait for ever: see `together`.
"""

import contextlib
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")

AGAIN = "start all processes again: training goes on from its last checkpoint"

# Seconds that processes wait for each other at the start.
START_SECONDS = 300


def is_first() -> bool:
  """Whether this process speaks, and writes files, for all."""
  return jax.process_index() == 0


def name() -> str:
  """Suffix for messages: ' (process 1 of 4)'; '' where there is only one."""
  if jax.process_count() == 1:
    return ""
  return f" (process {jax.process_index()} of {jax.process_count()})"


def together(
  function: Callable[[], int],
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 30,
) -> int:
  """Joins the other processes, calls a function, and ends with them.

  A process that ends before the others takes them with it, with a sentence on
  standard error and an exit code that is not 0. They notice

  - at once, where communication between processes fails when one is gone (on
    CPU), or where the first is gone, with which JAX's own service ends;
  - `heartbeat_seconds` after its last heartbeat at the latest, where it does
    not fail but waits (on GPU and TPU), or a host is gone without a word.

  JAX then ends the process from native code, where no exception handler runs; a
  process of the shell watches for that and writes the sentence.

  Args:
    function: Returns the exit code.
    coordinator_address: HOST:PORT of the first process; None, as the next two:
      JAX finds out (TPU pods, Slurm, Open MPI, Kubernetes).
    num_processes: How many.
    process_id: This one's number, from 0.
    heartbeat_seconds: See above.

  Returns:
    The exit code of a function that ended in all processes. Otherwise the
    process ends here: waiting for the others at exit would hold them up.

  Raises:
    ValueError: It cannot be found out who the others are.
  """
  with _watched() as say_at_death:
    me = "a process" if process_id is None else f"process {process_id}"
    say_at_death(
      f"basemt: error: {me} could not join the others within {START_SECONDS} "
      f"seconds{f' at {coordinator_address}' if coordinator_address else ''}; "
      "see what they wrote, then start all processes again"
    )
    join(coordinator_address, num_processes, process_id, heartbeat_seconds)
    say_at_death(
      f"basemt: error{name()}: ended without a word of its own, because it was "
      f"killed or because another process died; {AGAIN}"
    )
    try:
      code = function()
      if code == 0:
        multihost_utils.sync_global_devices("end")
    except jax.errors.JaxRuntimeError as error:
      print(
        f"basemt: error{name()}: a computation of all processes failed, most "
        f"likely because another process died; {AGAIN} "
        f"(JAX: {' '.join(str(error).split())[:200]})",
        file=sys.stderr,
      )
      code = 1
    except BaseException:
      traceback.print_exc()
      code = 1
    say_at_death("")
    if code:
      _end_now(code)
    jax.distributed.shutdown()
  return code


# How a status of XLA's begins.
_STATUS = re.compile(
  "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|"
  "UNAVAILABLE|UNKNOWN): "
)


@contextlib.contextmanager
def failures_of_jax() -> Iterator[None]:
  """Makes a failed computation a `JaxRuntimeError` wherever it is noticed.

  Who reads an array that could not be computed, because a process is gone, is
  told by JAX with a `ValueError`, as if an argument were wrong.
  """
  try:
    yield
  except ValueError as error:
    if not _STATUS.match(str(error)):
      raise
    raise jax.errors.JaxRuntimeError(str(error)) from error


def _end_now(code: int) -> NoReturn:
  """Ends without the handlers at exit, which wait for the other processes."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def join(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 30,
  give: str = "--coordinator_address, --num_processes and --process_id",
) -> None:
  """Joins the other processes; see `together` for the arguments.

  `give` is what to say them with, where JAX cannot find out.

  Raises:
    ValueError: They cannot be found, or do not answer.
  """
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=START_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
      coordinator_bind_address=_bind_address(coordinator_address),
    )
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"cannot find out who the other processes are ({error}); outside of TPU "
      f"pods, Slurm, Open MPI and Kubernetes give {give}"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f"cannot join the other processes at {coordinator_address}: {error}; is "
      "the address the first process's, and its port free?"
    ) from error


def _bind_address(address: str | None) -> str | None:
  """Where the first process listens: at the address that was told.

  None, JAX's default of all interfaces, where nothing was told, or where the
  address is not of an interface of this host (but of a router before it).
  """
  host = (address or "").rpartition(":")[0]
  if not host:
    return None
  kind = socket.SOCK_STREAM
  try:
    for family, _, _, _, place in socket.getaddrinfo(
      host.strip("[]"), 0, type=kind
    ):
      with socket.socket(family, kind) as server:
        server.bind(place)
    return address
  except (OSError, UnicodeError):
    return None


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[str], None]]:
  """Yields a function that takes what is to be said if this process dies.

  A shell reads lines until the end of its input, which comes when this process
  ends in whatever way, and then says the last one, if it is not empty.
  """
  watch = subprocess.Popen(
    [
      "/bin/sh",
      "-c",
      "trap '' INT TERM HUP; while read -r line; do last=$line; done; "
      '[ -z "$last" ] || printf "%s\\n" "$last" >&2',
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
  )
  assert watch.stdin is not None
  pipe = watch.stdin

  def say_at_death(sentence: str) -> None:
    pipe.write(f"{sentence}\n".encode())
    pipe.flush()

  try:
    yield say_at_death
  finally:
    say_at_death("")
    pipe.close()
    watch.wait()


def are_several() -> bool:
  """Asks without starting JAX's devices where no processes have joined."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def check_joined(give: str = "--distributed") -> None:
  """Refuses devices of processes that have not joined; `give` joins them.

  Raises:
    ValueError: JAX sees several processes (it does on TPU pods).
  """
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(
      f"there are devices of {jax.process_count()} processes, which have not "
      f"joined; give {give}, or call jax.distributed.initialize first"
    )


def in_turn(function: Callable[[], Result]) -> Result:
  """Calls a function in the first process, then in the others.

  What the first leaves on disk, the others find there; on hosts that share no
  file system they make it themselves.
  """
  if not are_several():
    return function()
  if is_first():
    result = function()
    multihost_utils.sync_global_devices("in turn")
    return result
  multihost_utils.sync_global_devices("in turn")
  return function()


def check_same(what: str, text: str) -> None:
  """Refuses processes that differ in a text.

  Raises:
    ValueError: In all processes; names those that differ from the first.
  """
  if not are_several():
    return
  found = multihost_utils.process_allgather(
    np.array(zlib.crc32(text.encode()), np.uint32)
  )
  others = np.flatnonzero(found != found[0])
  if len(others):
    raise ValueError(
      f"{what} of process {', '.join(map(str, others))} differs from that of "
      "process 0; give every process the same"
    )


def check_shared(directory: str | os.PathLike[str]) -> None:
  """Refuses a directory that is not the same one in all processes.

  Raises:
    ValueError: In all processes; names those that do not see it.
  """
  if not are_several():
    return
  token = multihost_utils.broadcast_one_to_all(
    np.array(random.SystemRandom().getrandbits(31), np.int32)
  )
  mark = pathlib.Path(directory) / f".shared-{int(token)}"
  if is_first():
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
  multihost_utils.sync_global_devices("marked")
  sees = multihost_utils.process_allgather(np.array(_appears(mark)))
  if is_first():
    mark.unlink()
  if not sees.all():
    blind = ", ".join(map(str, np.flatnonzero(~sees)))
    raise ValueError(
      f"process {blind} does not see what process 0 writes to {directory}; "
      "checkpoints are written by all processes into one directory: choose one "
      "on a file system that all hosts share"
    )


def _appears(path: pathlib.Path) -> bool:
  """Whether a file is there, or comes: network file systems may be late."""
  end = time.monotonic() + 10.0
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.2)
  return path.exists()


def ask_to_stop() -> None:
  """Has all processes stop at the same step; see `is_stop_agreed`.

  SIGTERM is what asks: JAX catches it in any process, and tells the others.
  """
  signal.raise_signal(signal.SIGTERM)


def is_stop_agreed(step: int) -> bool:
  """Whether all processes stop after this step, because one of them was asked.

  All processes must call it at every step. It costs microseconds until a
  process has been asked.
  """
  return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def on_sigterm(function: Callable[[], None]) -> Iterator[None]:
  """Calls a function on SIGTERM, and restores the old handler at the end.

  With several processes JAX has its own handler, which tells the others
  (`is_stop_agreed`); it does nothing but that, so that the end is the
  default's: to end the process.
  """
  is_main = threading.current_thread() is threading.main_thread()
  old: Any = signal.SIG_DFL
  if is_main and jax.process_count() == 1:
    old = signal.signal(signal.SIGTERM, lambda *_: function())
  try:
    yield
  finally:
    if is_main:
      signal.signal(signal.SIGTERM, old)
