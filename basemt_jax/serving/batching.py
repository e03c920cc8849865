"""Requests gathered into batches, for one model in one thread.

While a batch is translated, requests wait; whoever waits for the same search
is in the next batch. So a lone request waits for nobody, and many share what a
batch costs.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Generic, TypeVar

Search = TypeVar("Search")
Found = TypeVar("Found")


class QueueFullError(Exception):
  """So many sentences wait that more would wait for too long."""


@dataclasses.dataclass(frozen=True)
class _Request(Generic[Search, Found]):
  """Sources, how to search, and who waits for what is found."""

  search: Search
  sources: Sequence[str]
  answer: asyncio.Future[list[Found]]


class Batcher(Generic[Search, Found]):
  """A queue in front of a function that translates many sentences at once.

  Args:
    translate: (search, sources) to what is found for each source; is called in
      a thread of its own, one call at a time.
    batch_size: Sentences of a call, at most, but for a request that has more.
    max_waiting: Sentences that may wait.
  """

  def __init__(
    self,
    translate: Callable[[Search, Sequence[str]], list[Found]],
    batch_size: int,
    max_waiting: int,
  ):
    self._translate = translate
    self._batch_size, self._max_waiting = batch_size, max_waiting
    self._waiting: collections.deque[_Request[Search, Found]] = (
      collections.deque()
    )
    self._come = asyncio.Event()
    self._is_closing = False
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "translator")

  @property
  def waiting(self) -> int:
    """Sentences that wait."""
    return sum(len(request.sources) for request in self._waiting)

  async def translate(
    self, search: Search, sources: Sequence[str]
  ) -> list[Found]:
    """What is found for each source.

    Raises:
      QueueFullError: It would be one too many.
    """
    if self.waiting and self.waiting + len(sources) > self._max_waiting:
      raise QueueFullError
    answer = asyncio.get_running_loop().create_future()
    self._waiting.append(_Request(search, sources, answer))
    self._come.set()
    return await answer

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """Translates what comes while the block runs, and then what is left."""
    task = asyncio.create_task(self._run())
    try:
      yield
    finally:
      self._is_closing = True
      self._come.set()
      await task
      self._thread.shutdown()

  async def _run(self) -> None:
    while True:
      await self._come.wait()
      batch = self._next_batch()
      if batch:
        await self._answer(batch)
      elif self._is_closing:
        return
      else:
        self._come.clear()

  async def _answer(self, batch: Sequence[_Request[Search, Found]]) -> None:
    """Translates a batch; each request gets its own part, or the error."""
    sources = [source for request in batch for source in request.sources]
    loop = asyncio.get_running_loop()
    try:
      found = await loop.run_in_executor(
        self._thread, self._translate, batch[0].search, sources
      )
    except Exception as error:  # Whatever the model raises.
      for request in batch:
        if not request.answer.done():
          request.answer.set_exception(error)
      return
    in_order = iter(found)
    for request in batch:
      own = [next(in_order) for _ in request.sources]
      if not request.answer.done():
        request.answer.set_result(own)

  def _next_batch(self) -> list[_Request[Search, Found]]:
    """Takes the first request, and others with its search that fit beside it.

    The rest stays in its order.
    """
    batch: list[_Request[Search, Found]] = []
    rest: collections.deque[_Request[Search, Found]] = collections.deque()
    size = 0
    for request in self._waiting:
      if request.answer.done():  # Nobody waits for it any more.
        continue
      fits = size + len(request.sources) <= self._batch_size
      if not batch or (request.search == batch[0].search and fits):
        batch.append(request)
        size += len(request.sources)
      else:
        rest.append(request)
    self._waiting = rest
    return batch
