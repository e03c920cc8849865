"""Batches read ahead: the same ones, and no thread is left."""

import itertools
import threading

import numpy as np
import pytest
import toy_rows

from basemt_jax import prefetch


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return toy_rows.store(tmp_path_factory.mktemp("store"))


def test_prefetching_changes_nothing(store):
  plain = toy_rows.heated(store)
  with prefetch.Prefetcher(toy_rows.heated(store), depth=3) as prefetched:
    for _ in range(50):
      batch, state = next(prefetched)
      toy_rows.assert_equal(batch, next(plain))
      assert state == plain.state()


def test_prefetcher_ends_and_raises_as_its_iterator():
  def broken():
    yield {"x": np.zeros(1)}
    raise RuntimeError("disk on fire")

  with prefetch.Prefetcher(broken()) as ahead:
    batch, state = next(ahead)
    assert batch["x"].shape == (1,) and state is None
    with pytest.raises(RuntimeError, match="disk on fire"):
      next(ahead)
    with pytest.raises(StopIteration):
      next(ahead)
  assert len(list(prefetch.Prefetcher(iter([{}, {}, {}])))) == 3


def test_closed_prefetcher_leaves_no_thread():
  before = threading.active_count()
  for _ in range(3):
    ahead = prefetch.Prefetcher(({} for _ in itertools.count()), depth=1)
    next(ahead)
    ahead.close()
    ahead.close()
    with pytest.raises(StopIteration):
      next(ahead)
  assert threading.active_count() == before


def test_batches_are_put_in_place_by_the_thread_that_reads_them():
  names = []

  def place(batch):
    names.append(threading.current_thread().name)
    if batch == 3:
      raise ValueError("no place for 3")
    return 2 * batch

  with prefetch.Prefetcher(iter([1, 2, 3]), place=place) as ahead:
    assert [next(ahead), next(ahead)] == [(2, None), (4, None)]
    with pytest.raises(ValueError, match="no place for 3"):
      next(ahead)
  assert names == ["prefetch_0"] * 3
