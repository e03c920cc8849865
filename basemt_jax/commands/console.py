"""Where commands speak: progress on standard error, metrics in files.

Imports JAX only when it is used: some commands do not need it.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from basemt_jax import files

_SECONDS = 5.0  # Between lines of progress.


def say(text: str) -> None:
  """Writes a line to standard error."""
  print(files.printable(text), file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
  """A time such as '3:05'."""
  whole, rest = divmod(round(seconds), 60)
  return f"{whole}:{rest:02d}"


def standard() -> Any:
  """A `run.Console` that speaks on standard error."""
  from basemt_jax import run

  def progress(p: Any, temperature: float) -> None:
    say(
      f"step {p.step:>6}/{p.train_steps}  {p.phase:<6}  T {temperature:<5.2f} "
      f"loss {p.loss:.3f}  {p.tokens_per_second:>8,.0f} tokens/s  "
      f"{minutes(p.seconds_left)} left"
    )

  return run.Console(
    message=say,
    progress=progress,
    building=every_few_seconds(
      lambda split, direction, done, total: say(
        f"packing {split} {direction}: {done:,} of {total or '?'} pairs"
      )
    ),
    translating=every_few_seconds(
      lambda done, total: say(f"translated {done:,} of {total:,} sentences")
    ),
  )


def every_few_seconds(
  function: Callable[..., None],
) -> Callable[..., None]:
  """Calls through once in `_SECONDS`, first at once; drops the rest."""
  last = -math.inf

  def call(*args: Any) -> None:
    nonlocal last
    if time.monotonic() - last >= _SECONDS:
      last = time.monotonic()
      function(*args)

  return call


@contextlib.contextmanager
def counter(text: str) -> Iterator[Callable[[int], None]]:
  """A function that shows a number which rises, in one line of a terminal.

  The text has a place for it: 'translated {:,} lines'. Nothing is said where
  standard error is no terminal, or where results go to the terminal and show by
  themselves how far they are.
  """
  if not sys.stderr.isatty() or sys.stdout.isatty():
    yield lambda count: None
    return
  yield lambda count: print(
    f"\r{text.format(count)}", end="", file=sys.stderr, flush=True
  )
  print(file=sys.stderr)
