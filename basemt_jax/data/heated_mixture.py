"""A SeqIO mixture whose rates change while it is read.

It is for SeqIO's and T5X's own tools. Training does not read it: it reads a
`row_store.RowStore`, which `store_building` makes from the mixture's tasks.
"""

import copy
import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from basemt_jax import heating, sampling
from basemt_jax.data import languages, mixtures

# Examples drawn at a time.
_BLOCK = 1024


class HeatedMixture(seqio.Mixture):
  """A mixture whose rates follow a sampling strategy while it is read.

  Example j of the whole job is drawn with the strategy's rates at step
  j / examples_per_step. (Only the temperature matters for splits other than
  'train': all languages are in them.) The choices depend on nothing but the
  mixture's own seed, the shard and j: neither on the seed given to
  `get_dataset` (T5X draws a new one at every start) nor on what another shard
  draws. `heat` registers one, too.

  Attributes:
    plan: the strategy for the tasks' sizes, in the order of `tasks`.
    directions: of the tasks, in their order.

  Args:
    name: of the mixture. tasks: names of registered tasks, or tasks. strategy:
    how they are sampled. examples_per_step: sentence pairs a training step
    uses, over all hosts: batch
      size, times the mean number of pairs in a row when rows are packed.
    total_steps: steps the temperature is tabulated for; then it stays.
    sizes: training pairs per task name; SeqIO's own count when left out.
    seed: of the choices.

  Raises:
    ValueError: a number out of range, a size that is not known, or a
      strategy that cannot be followed with these sizes.
  """

  def __init__(
    self,
    name: str,
    tasks: Sequence[str | seqio.Task],
    strategy: sampling.Strategy,
    examples_per_step: float,
    total_steps: int,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
  ):
    if not examples_per_step > 0:
      raise ValueError(
        f"mixture {name!r} needs examples_per_step above 0, got "
        f"{examples_per_step}"
      )
    if total_steps <= 0:
      raise ValueError(
        f"mixture {name!r} needs total_steps above 0, got {total_steps}"
      )
    names = [t if isinstance(t, str) else t.name for t in tasks]
    found = [mixtures.get_mixture(task) for task in tasks]
    self.sizes = {
      name: _train_size(task, sizes)
      for name, task in zip(names, found, strict=True)
    }
    self.directions = tuple(map(mixtures.direction_or_name, sorted(names)))
    self.examples_per_step = float(examples_per_step)
    self.total_steps = int(total_steps)
    self._choice_seed = int(seed)
    heating.mixing_rates(list(self.sizes.values()), 1.0)  # Raises on no data.
    super().__init__(
      name,
      # SeqIO's rates are the sizes: what its own tools show is T = 1.
      [(task, self.sizes[task.name]) for task in found],
      sample_fn=functools.partial(self._sample, "train", 0, 1),
    )
    pairs = [self.sizes[task.name] for task in self.tasks]
    self.plan = strategy.plan(
      self.directions, pairs, pairs, examples_per_step, languages.meant
    )

  def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
    """As `seqio.Mixture.get_dataset`, with the rates of the strategy."""
    signature = inspect.signature(seqio.Mixture.get_dataset)
    bound = signature.bind(self, *args, **kwargs)
    bound.apply_defaults()
    shard = bound.arguments["shard_info"] or seqio.ShardInfo(0, 1)
    # SeqIO's hook sees neither the split nor the shard: a copy that knows them.
    clone = copy.copy(self)
    clone._sample_fn = functools.partial(
      self._sample, bound.arguments["split"], shard.index, shard.num_shards
    )
    return seqio.Mixture.get_dataset(clone, *args, **kwargs)

  def _sample(
    self,
    split: str,
    shard: int,
    num_shards: int,
    datasets: Sequence[tf.data.Dataset],
    sizes: Sequence[float],
    unused_seed: int | None,
  ) -> tf.data.Dataset:
    """A `seqio.SampleFn` behind what is bound by `get_dataset`."""
    key = f"{self._choice_seed}/{split}/{shard}/{num_shards}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    del sizes  # The plan's.
    choices = self._choices(
      split, int.from_bytes(digest, "little", signed=True), num_shards
    )
    return tf.data.Dataset.choose_from_datasets(
      list(datasets), choices, stop_on_empty_dataset=True
    )

  def _choices(self, split: str, key: int, num_shards: int) -> tf.data.Dataset:
    """Indices of datasets, drawn a block at a time."""
    table = tf.constant(self.plan.temperatures(np.arange(self.total_steps + 1)))
    # SeqIO leaves out tasks that lack the split.
    there = np.array([split in task.splits for task in self.tasks])
    size = self.plan.sizes[there]
    log_size = np.log(np.maximum(size, 1) / size.max())
    factors = (size > 0).astype(np.float64)
    starts = np.zeros(len(size), np.int64)
    if split == "train":
      factors *= self.plan.multipliers[there]
      starts = self.plan.starts[there]
    steps_per_example = num_shards / self.examples_per_step

    def draw(block: tf.Tensor) -> tf.Tensor:
      example = block * _BLOCK + tf.range(_BLOCK, dtype=tf.int64)
      step = tf.cast(example, tf.float64) * steps_per_example
      step = tf.cast(step, tf.int64)
      temperature = tf.gather(table, tf.minimum(step, self.total_steps))
      weights = tf.exp(log_size / temperature[:, None]) * factors
      weights *= tf.cast(step[:, None] >= starts, tf.float64)
      limits = tf.cumsum(weights, axis=1)
      points = (
        tf.random.stateless_uniform(
          [_BLOCK, 1],
          tf.stack([tf.constant(key, tf.int64), block]),
          dtype=tf.float64,
        )
        * limits[:, -1:]
      )
      # The last limit is left out: rounding cannot lead past the end.
      passed = tf.cast(points >= limits[:, :-1], tf.int64)
      return tf.reduce_sum(passed, axis=1)

    blocks = tf.data.Dataset.range(1 << 40)
    return blocks.map(draw).unbatch()


def _train_size(task: seqio.Task, sizes: Mapping[str, int] | None) -> int:
  """Training pairs of a task, given or as SeqIO knows them."""
  if sizes is not None and task.name in sizes:
    return int(sizes[task.name])
  size = task.num_input_examples("train") if "train" in task.splits else 0
  if size is None:
    raise ValueError(
      f"task {task.name!r} does not tell how many training examples it has: "
      "pass sizes={task name: pairs}"
    )
  return int(size)


def heat(
  mixture: mixtures.MixtureOrTask,
  strategy: sampling.Strategy,
  *,
  examples_per_step: float,
  total_steps: int,
  sizes: Mapping[str, int] | None = None,
  seed: int = 0,
  name: str | None = None,
) -> HeatedMixture:
  """Registers the tasks of any mixture as a `HeatedMixture`, and returns it.

  The mixture may be given by its name; other arguments are those of the class.
  The new name is `<mixture>_heated` unless given; a heated mixture that already
  has it is replaced.

  Raises:
    ValueError: unknown mixture, a name that something else has, or numbers
      that `HeatedMixture` refuses.
  """
  found = mixtures.get_mixture(mixture)
  name = name or f"{found.name}_heated"
  if name in seqio.TaskRegistry.names() or (
    name in seqio.MixtureRegistry.names()
    and not isinstance(seqio.MixtureRegistry.get(name), HeatedMixture)
  ):
    raise ValueError(
      f"cannot register the heated mixture {name!r}: something else has that "
      "name; pass another one"
    )
  heated = HeatedMixture(
    name,
    seqio.get_subtasks(found),
    strategy,
    examples_per_step,
    total_steps,
    sizes,
    seed,
  )
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add_provider(name, heated)
  return heated
