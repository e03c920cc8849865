"""Batches drawn from a store of packed rows.

Axis legend: B rows of the global batch, N directions, V versions of their rows,
K steps planned together.

The data contract: the global batch of step k is a pure function of (seed, k).
Row r of step k draws its direction with the rates of the sampling strategy at
step k, from a counter-based random stream; the direction then gives its next
row in a permutation of its own for every epoch, of the epoch's version of its
rows where there are several (`subword_sampling`). The position of a run is k
and one counter per direction, for any number of hosts.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from basemt_jax import sampling
from basemt_jax.data import languages, packing, permutation, row_store


def eval_batches(
  store: row_store.RowStore,
  split: str,
  batch_size: int,
  *,
  host_rows: np.ndarray | None = None,
) -> Iterator[packing.Batch]:
  """All rows of a split once, in order, direction after direction.

  Batches of B rows of all hosts, of which this one reads `host_rows`, as in
  `TrainBatches`; the last is filled up with empty rows, in which all is 0 but
  the direction, so that every batch has the same shape on every host.

  Raises:
    ValueError: an unknown split.
  """
  counts = store.rows(split)
  directions = np.repeat(np.arange(len(counts)), counts)
  rows = packing.ranks(counts)
  yield from filled_up(store, split, directions, rows, batch_size, host_rows)


def filled_up(
  store: row_store.RowStore,
  split: str,
  directions: np.ndarray,
  rows: np.ndarray,
  batch_size: int,
  host_rows: np.ndarray | None = None,
) -> Iterator[packing.Batch]:
  """Given rows in batches as `eval_batches` gives them.

  Directions [M] int are indices into `store.directions`, rows [M] int numbers
  within the direction.
  """
  share = slice(None) if host_rows is None else host_rows
  for start in range(0, len(rows), batch_size):
    at = np.arange(start, start + batch_size)[share]
    is_row = at < len(rows)
    at = np.minimum(at, len(rows) - 1)
    batch = store.read_mixed(split, directions[at], rows[at])
    for name, value in batch.items():
      if name != "direction":
        value[~is_row] = 0
    yield batch


class TrainBatches:
  """Endless training batches, a pure function of (seed, step).

  Neither the number of hosts nor prefetching, interruptions or the parts a run
  is split into change the global batch of a step.

  Attributes:
    step: the step whose batch comes next.
    batch_size: B, rows of the global batch.
    directions: names; `direction` in a batch is an index into them.
    plan: the rates of every step, and what they make expected.

  Args:
    store: an open store.
    strategy: how directions are sampled.
    batch_size: B.
    seed: any integer.
    host_rows: numbers of the rows of every global batch that this host reads
      (`partitioning.host_rows`); None: all.
    start_step: the first batch is this step's.

  Raises:
    ValueError: a direction without rows, or a strategy that cannot be
      followed with this data.
  """

  def __init__(
    self,
    store: row_store.RowStore,
    strategy: sampling.Strategy,
    batch_size: int,
    seed: int,
    *,
    host_rows: np.ndarray | None = None,
    start_step: int = 0,
  ):
    self._host_rows = slice(None) if host_rows is None else host_rows
    if start_step < 0:
      raise ValueError(f"start_step must not be negative, got {start_step}")
    self._store = store
    self.batch_size, self._seed = batch_size, int(seed)
    self.directions = store.directions
    self._versions = store.versions("train")
    rows = np.array([store.rows(version) for version in self._versions])
    # Rows of each direction up to the end of each version; [N, V].
    self._ends = np.cumsum(rows, axis=0).T
    if not rows[0].all():
      name = self.directions[int(np.argmin(rows[0]))]
      raise ValueError(
        f"direction {name!r} has no rows in split 'train' of the store in "
        f"{store.directory}: leave its task out of the mixture"
      )
    self.plan = strategy.plan(
      self.directions,
      store.pairs("train"),
      store.epoch_rows("train"),
      batch_size,
      languages.meant,
    )
    # Planned together: enough rows to make numpy's overhead small. A chunk of
    # steps begins at a multiple of its length wherever a run begins, so that
    # rates are always computed at the same place of the same array and cannot
    # differ in the last bit. (The composite keys below need K <= 2047.)
    self._chunk = int(np.clip(8192 // batch_size, 1, 1024))
    self._keys = np.array(
      [permutation.key_of("rows", self._seed, name) for name in self.directions]
    )
    self.seek(start_step)

  def seek(self, step: int) -> None:
    """Goes to a step, computing the position from nothing."""
    counts = np.zeros(len(self.directions), np.int64)
    for start in range(0, step, self._chunk):
      directions = self._draw(start // self._chunk)[: step - start]
      counts += np.bincount(directions.reshape(-1), minlength=len(counts))
    self.step = self._plan_start = self._plan_end = step
    self._counters = counts

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> packing.Batch:
    if self.step == self._plan_end:
      self._plan()
    at = self.step - self._plan_start
    batch = self._store.read_mixed(
      "train",
      self._plan_directions[at, self._host_rows],
      self._plan_rows[at, self._host_rows],
      self._plan_versions[at, self._host_rows],
    )
    self._counters = self._plan_counters[at]
    self.step += 1
    return batch

  def _plan(self) -> None:
    """Chooses the rows of the steps up to the end of the current chunk."""
    chunk = self.step // self._chunk
    skip = self.step - chunk * self._chunk
    directions = self._draw(chunk)[skip:]
    steps, count = len(directions), len(self.directions)
    flat = directions.reshape(-1)
    # The j-th row drawn from a direction has its counter + j.
    order = np.argsort(flat, kind="stable")
    counter = np.empty(len(flat), np.int64)
    counter[order] = packing.ranks(np.bincount(flat, minlength=count))
    counter += self._counters[flat]
    # An epoch goes through one version, and the next through the next.
    ends = self._ends[flat]
    turn, place = np.divmod(counter, ends[:, -1])
    version = (place[:, None] >= ends).sum(axis=1)
    epoch = turn * len(self._versions) + version
    each = np.arange(len(flat))
    starts = np.where(version, ends[each, version - 1], 0)
    key = permutation.mix(
      self._keys[flat] + permutation.GOLDEN * epoch.astype(np.uint64)
    )
    rows = permutation.permuted(
      place - starts, ends[each, version] - starts, key
    )
    cells = flat + count * np.repeat(np.arange(steps), self.batch_size)
    drawn = np.bincount(cells, minlength=steps * count).reshape(steps, count)
    self._plan_directions = directions
    self._plan_rows = rows.reshape(directions.shape)
    self._plan_versions = version.reshape(directions.shape)
    self._plan_counters = self._counters + np.cumsum(drawn, axis=0)
    self._plan_start, self._plan_end = self.step, self.step + steps

  def _draw(self, chunk: int) -> np.ndarray:
    """Directions of all rows of a chunk of steps; int [K, B].

    Philox is a counter-based generator whose raw words are the same in every
    version of numpy (its floats and integers need not be); the chunk is part
    of the counter.
    """
    steps = chunk * self._chunk + np.arange(self._chunk)
    cumulative = np.cumsum(self.plan.rates(steps), axis=1)
    cumulative /= cumulative[:, -1:]
    # In units of 2^-53, and with the step in the upper bits, so that one
    # binary search serves all steps, exactly.
    step = np.arange(self._chunk, dtype=np.uint64)[:, None] << np.uint64(53)
    limits = step + np.floor(np.ldexp(cumulative, 53)).astype(np.uint64)
    key = np.array(
      [permutation.key_of("draw", self._seed), permutation.key_of("directions")]
    )
    counter = np.array([0, chunk, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(
      self._chunk * self.batch_size
    )
    points = step + (words.reshape(self._chunk, -1) >> np.uint64(11))
    found = np.searchsorted(limits.reshape(-1), points, side="right")
    return found - len(self.directions) * np.arange(self._chunk)[:, None]

  @property
  def counters(self) -> dict[str, int]:
    """Rows drawn from each direction before the current step."""
    counters = self._counters.tolist()
    return dict(zip(self.directions, counters, strict=True))

  def _identity(self) -> dict[str, Any]:
    """The settings that a saved position depends on."""
    return {
      "seed": self._seed,
      "batch_size": self.batch_size,
      "lengths": self._store.lengths,
      "schedule": str(self.plan.strategy),
      "subword_sampling": self._store.fingerprint.get("subwords", ""),
    }

  def _data(self) -> dict[str, dict[str, int]]:
    """Size and checksum of every direction's rows."""
    found = {}
    for name in self.directions:
      first, *others = (self._store.stats(v, name) for v in self._versions)
      rows, crc32 = first.rows, first.crc32
      for stats in others:
        rows += stats.rows
        crc32 = zlib.crc32(stats.crc32.to_bytes(4, "little"), crc32)
      found[name] = {"rows": rows, "crc32": crc32}
    return found

  def state(self) -> dict[str, Any]:
    """The position before the next batch; plain JSON, the same on all hosts."""
    return {
      "step": self.step,
      "counters": self.counters,
      "data": self._data(),
      **self._identity(),
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes to a position that `state` returned, on any number of hosts.

    Raises:
      ValueError: it is of a run with another seed, batch size, rows or
        strategy; naming everything that differs.
    """
    # What it was before there was a choice.
    state = {"subword_sampling": "", **state}
    differences = [
      f"{name} was {state.get(name)!r} and is {value!r}"
      for name, value in self._identity().items()
      if state.get(name) != value
    ]
    differences += _row_differences(state.get("data", {}), self._data())
    if differences:
      raise ValueError(
        "the saved data position does not fit this run: "
        f"{'; '.join(differences)}; set them back (a longer run keeps its "
        "temperatures with HEATING_STEPS, and its cap on epochs with "
        "CAP_STEPS), or begin a new run"
      )
    try:
      step = int(state["step"])
      drawn = [int(state["counters"][name]) for name in self.directions]
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"the saved data position is damaged (no {error}): go on from another "
        "checkpoint"
      ) from error
    self.step = self._plan_start = self._plan_end = step
    self._counters = np.array(drawn, np.int64)


def _row_differences(
  old: Mapping[str, Mapping[str, int]], new: Mapping[str, Mapping[str, int]]
) -> list[str]:
  """Directions that came, went or changed, in words."""
  differences = []
  for name in sorted(old.keys() | new.keys()):
    if name not in new:
      differences.append(f"direction {name!r} is no longer there")
    elif name not in old:
      differences.append(f"direction {name!r} is new")
    elif old[name]["rows"] != new[name]["rows"]:
      differences.append(
        f"direction {name!r} had {old[name]['rows']} rows and has "
        f"{new[name]['rows']}"
      )
    elif old[name] != new[name]:
      differences.append(f"the rows of direction {name!r} hold other text")
  return differences
