"""Batches read ahead in a thread, with the position that belongs to each."""

import collections
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any


class Prefetcher:
  """Reads batches ahead in a thread of its own.

  Yields (batch, state): the batch as `place` leaves it; state is the iterator's
  after that batch, so that a checkpoint never runs ahead of what was used; None
  for iterators without `state()`. Use it as a context manager, or call `close`.

  Args:
    iterator: batches; from now on only the thread may use it.
    place: what the thread does with each, such as putting it on the devices.
    depth: batches that are read ahead.
  """

  def __init__(
    self,
    iterator: Iterator[Any],
    place: Callable[[Any], Any] = lambda batch: batch,
    depth: int = 3,
  ):
    self._iterator, self._place = iterator, place
    self._state = getattr(iterator, "state", lambda: None)
    self._thread = futures.ThreadPoolExecutor(1, "prefetch")
    self._ahead = collections.deque(
      self._thread.submit(self._read) for _ in range(depth)
    )

  def _read(self) -> tuple[Any, Any]:
    batch = self._place(next(self._iterator))
    return batch, self._state()

  def __iter__(self) -> "Prefetcher":
    return self

  def __next__(self) -> tuple[Any, Any]:
    if not self._ahead:
      raise StopIteration
    try:
      found = self._ahead.popleft().result()
    except Exception:  # The iterator's own, or its end.
      self.close()
      raise
    self._ahead.append(self._thread.submit(self._read))
    return found

  def close(self) -> None:
    """Stops the thread; batches read ahead are dropped."""
    self._ahead.clear()
    self._thread.shutdown(cancel_futures=True)

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()
