"""Batches read ahead in a thread, with the position that belongs to each."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Prefetcher:
  """Reads batches ahead in a thread of its own.

  Yields (batch, state): the batch as `place` leaves it; state is the iterator's
  after that batch, so that a checkpoint never runs ahead of what was used; None
  for iterators without `state()`. Use it as a context manager, or call `close`.
  """

  def __init__(
    self,
    iterator: Iterator[Any],
    depth: int = 2,
    place: Callable[[Any], Any] = lambda batch: batch,
  ):
    """Starts reading.

    Args:
      iterator: batches; from now on only the thread may use it.
      depth: batches kept ready, above 0.
      place: what the thread does with each, such as putting it on the devices.
    """
    if depth <= 0:
      raise ValueError(f"depth must be above 0, got {depth}")
    self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    self._stop = threading.Event()
    self._done = False
    self._place = place
    self._thread = threading.Thread(
      target=self._read, args=(iterator,), daemon=True, name="prefetch"
    )
    self._thread.start()

  def _read(self, iterator: Iterator[Any]) -> None:
    state = getattr(iterator, "state", lambda: None)
    try:
      for batch in iterator:
        if not self._put(("batch", (self._place(batch), state()))):
          return
      self._put(("end", StopIteration()))
    except BaseException as error:  # Raised again by the reader.
      self._put(("end", error))

  def _put(self, item: tuple[str, Any]) -> bool:
    """False when the prefetcher was closed in the meantime."""
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __iter__(self) -> "Prefetcher":
    return self

  def __next__(self) -> tuple[Any, Any]:
    if self._done:
      raise StopIteration
    kind, value = self._queue.get()
    if kind == "end":
      self._done = True
      raise value
    return value

  def close(self) -> None:
    """Stops the thread; batches read ahead are dropped."""
    self._done = True
    self._stop.set()
    self._thread.join()

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()
