"""One description of a run, for every command.

`Run` describes a run completely; gin binds it (`gin/runs/`), or a model
directory says what it was (`described`). SeqIO, and TensorFlow with it, is
imported only where a row store has to be built.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax

from basemt_jax import (
  base_layer,
  description,
  heating,
  partitioning,
  phases,
  plain_data,
  processes,
  ranges,
  reports,
  sampling,
  steps,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax.data import (
  batches,
  languages,
  packing,
  row_store,
  source_tags,
  subword_sampling,
)


@runtime_checkable
class HasName(Protocol):
  """A SeqIO Mixture or Task, told by its shape."""

  @property
  def name(self) -> str:
    """The name under which it is registered."""
    ...


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run and all that evaluating it needs.

  Attributes:
    model_dir: Checkpoints, metrics and results.
    mixture_or_task_name: Registered SeqIO name, or a Mixture or Task.
    task_feature_lengths: {'inputs': Li, 'targets': Lt}, in tokens.
    network: vocab_size -> `model.TransformerConfig`; gin binds the class.
    settings: How to train.
    batch_size: B, packed rows a step, over all hosts.
    strategy: How directions are sampled over the steps.
    data_seed: Of the order of the data.
    expert_devices: Size of the mesh axis `expert`.
    model_devices: Size of the mesh axis `model`.
    store_dir: An existing row store; then the mixture is not looked at, and
      nothing of SeqIO or TensorFlow is needed.
    cache_dir: Where row stores are built; None: the default
      (`row_store.default_cache_dir`).
    bands: Training pairs that make a direction high or mid resource.
    search: How to translate when evaluating.
    bleu_every: Steps between BLEU on dev during training; 0: never.
    bleu_sentences: Dev sentences per direction for that.
    long_pairs: What becomes of training pairs that are longer than the feature
      lengths: 'cut' to them, 'drop'ped, or 'refuse'd; see `store_building`.
    subwords: In which segmentations training text is seen.
    verify: Compare the bytes of rows and checkpoints with their checksums.
    trackers: Where metrics go besides `metrics.jsonl` and TensorBoard; see
      `commands.trackers`.
    use_average: Whether a trained model is one with averaged weights, if they
      were kept; else it has those of the last step.
  """

  model_dir: ranges.Path
  mixture_or_task_name: ranges.Text | HasName
  task_feature_lengths: ranges.FeatureLengths
  network: Callable[..., model_lib.TransformerConfig]
  settings: steps.Settings
  batch_size: ranges.Count
  strategy: sampling.Strategy
  data_seed: ranges.Seed = 0
  expert_devices: ranges.Count = 1
  model_devices: ranges.Count = 1
  store_dir: ranges.Path | None = None
  cache_dir: ranges.Path | None = None
  bands: languages.BandThresholds = languages.BandThresholds()  # noqa: RUF009
  search: translation.SearchOptions = translation.SearchOptions()  # noqa: RUF009
  bleu_every: ranges.Steps = 0
  bleu_sentences: ranges.Count = 50
  long_pairs: packing.LongPairs = "cut"
  subwords: subword_sampling.SubwordSampling = (
    subword_sampling.SubwordSampling()  # noqa: RUF009
  )
  verify: bool = True
  trackers: Sequence[Callable[[str], Any]] = ()
  use_average: bool = True

  def check(self) -> None:
    """Checks the numbers against each other, whatever the devices at hand.

    Raises:
      ValueError: Names the two that do not fit.
    """
    if self.batch_size % self.settings.microbatches:
      raise ValueError(
        f"microbatches is {self.settings.microbatches}, which does not divide "
        f"the batch of {self.batch_size} rows; choose a divisor of it"
      )
    config = self.network(vocab_size=1)
    split = [("mlp_dim", "model_devices")]
    if config.feed_forward == "experts":
      split.insert(0, ("num_experts", "expert_devices"))
    for name, axis in split:
      size, devices = getattr(config, name), getattr(self, axis)
      if size % devices:
        raise ValueError(
          f"{name} is {size}, which the {devices} devices of {axis} do not "
          "divide; use a multiple of that"
        )

  def doubts(self) -> list[str]:
    """What is possible, but hardly meant; a sentence each."""
    last = self.settings.train_steps - 1
    rate = self.settings.learning_rate
    if last > 0 and float(rate(last)) > float(rate(last - 1)):
      return [
        f"the learning rate still rises at the last step, {last}: its warm-up "
        "is longer than the run; set --gin.WARMUP_STEPS"
      ]
    return []

  def check_devices(self) -> None:
    """Checks the numbers against the devices at hand, before rows are packed.

    Raises:
      ValueError: Names the numbers that do not fit.
    """
    self.host_rows()
    config = self.network(vocab_size=1)
    if config.feed_forward == "experts":
      shape = self.mesh().shape
      base_layer.rows_in_group(
        self.batch_size // self.settings.microbatches,
        config.rows_per_group,
        shape["data"] * shape["expert"],
      )

  def store(
    self, progress: Callable[..., None] | None = None
  ) -> row_store.RowStore:
    """The run's packed rows, built first if they are not there yet.

    Of several processes the first builds; the others then find its rows, or,
    on hosts that share no file system, build the same.
    """
    if self.store_dir:
      return row_store.RowStore(self.store_dir, self.verify)
    from basemt_jax.data import store_building  # Imports SeqIO and TensorFlow.

    return processes.in_turn(
      lambda: store_building.ensure_store(
        self.mixture_or_task_name,
        self.task_feature_lengths,
        self.cache_dir or row_store.default_cache_dir(),
        long_pairs=self.long_pairs,
        subwords=self.subwords,
        progress=progress,
        verify=self.verify,
      )
    )

  def host_rows(self) -> np.ndarray:
    """The rows of every global batch that this process reads."""
    return partitioning.host_rows(self.mesh(), self.batch_size)

  def train_batches(
    self, store: row_store.RowStore, start_step: int = 0
  ) -> batches.TrainBatches:
    """This process's rows of the training batches.

    Raises:
      ValueError: The processes have packed different data.
    """
    train_batches = batches.TrainBatches(
      store,
      self.strategy,
      self.batch_size,
      self.data_seed,
      host_rows=self.host_rows(),
      start_step=start_step,
    )
    processes.check_same(
      "the packed data", json.dumps(train_batches.state(), sort_keys=True)
    )
    return train_batches

  def mesh(self) -> jax.sharding.Mesh:
    """The mesh over all devices of all processes."""
    processes.check_joined()
    return partitioning.make_mesh(self.expert_devices, self.model_devices)

  def config(self, store: row_store.RowStore) -> model_lib.TransformerConfig:
    """The network for the store's vocabulary."""
    return self.config_of(store.vocab_size)

  def config_of(self, vocab_size: int) -> model_lib.TransformerConfig:
    """The network for a vocabulary of so many pieces.

    The embedding is rounded up to a multiple of 128 rows, which every mesh
    divides and matrix units like.
    """
    return self.network(vocab_size=-(-vocab_size // 128) * 128)


@dataclasses.dataclass(frozen=True)
class Console:
  """Where a run speaks.

  Attributes:
    message: Takes one line.
    progress: Takes a `reports.Progress` and the temperature.
    building: Takes progress of building a row store; see `store_building`.
    translating: Takes (done, all) sentences.
  """

  message: Callable[[str], None]
  progress: Callable[[reports.Progress, float], None]
  building: Callable[..., None]
  translating: Callable[[int, int], None]


SILENT = Console(*[lambda *_: None] * 4)


# ---------------------------------------------------------- described runs

# Fields of `steps.Settings` that are no plain values.
_FUNCTIONS = ("learning_rate", "optimizer", "metrics")


def describe(run: Run, store: row_store.RowStore) -> description.Description:
  """What a model directory is to say of the run's model."""
  pieces = description.pieces_of(store)
  mixture = run.mixture_or_task_name
  return description.Description(
    **configuration(run, store.vocab_size),
    mixture=str(getattr(mixture, "name", mixture)),
    store=str(store.directory.absolute()),
    vocabulary=pieces.fingerprint,
    header=store,
    tags=source_tags.of_store(store, pieces),
  )


def configuration(run: Run, vocab_size: int) -> dict[str, Any]:
  """The part of a description that the run says, for so many pieces."""
  strategy = dataclasses.replace(
    run.strategy,
    temperature=heating.tabulated(
      run.strategy.temperature, run.settings.train_steps
    ),
  )
  return {
    "network": plain_data.to_plain(run.config_of(vocab_size)),
    "settings": {
      field.name: plain_data.to_plain(getattr(run.settings, field.name))
      for field in dataclasses.fields(run.settings)
      if field.name not in _FUNCTIONS
    },
    "strategy": plain_data.to_plain(strategy),
    "batch_size": run.batch_size,
    "data_seed": run.data_seed,
    "bands": plain_data.to_plain(run.bands),
    "search": plain_data.to_plain(run.search),
    "optimizer": plain_data.call_to_plain(run.settings.optimizer),
    "learning_rate": _rates(run.settings),
    "devices": {
      "number": jax.device_count(),
      "expert": run.expert_devices,
      "model": run.model_devices,
    },
    "reporting": {
      "bleu_every": run.bleu_every,
      "bleu_sentences": run.bleu_sentences,
      "trackers": [opener.__qualname__ for opener in run.trackers],
    },
  }


def _rates(settings: steps.Settings) -> dict[str, float]:
  """Learning rates at some steps, which tell one schedule from another."""
  some = (n * 10**e for e in range(10) for n in (1, 2, 5))
  return {
    str(step): float(f"{float(settings.learning_rate(step)):.4g}")
    for step in some
    if step < settings.train_steps
  }


def described(
  model_dir: str | pathlib.Path, modules: Sequence[str] = ()
) -> Run:
  """The run that a model directory describes; it cannot be trained on.

  Nothing but the directory, wherever it is now, is needed: neither its
  configuration, nor its data, which `store` finds only where they still are.
  Classes of the network may be of `modules`, the user's own.

  Raises:
    ValueError: See `description.read`; or classes of other modules are needed.
  """
  known = description.read(model_dir)
  try:
    network, settings, strategy, bands, search = (
      plain_data.from_plain(values, modules)
      for values in (
        known.network,
        known.settings,
        known.strategy,
        known.bands,
        known.search,
      )
    )
    settings = steps.Settings(
      learning_rate=optax.constant_schedule(0.0),
      optimizer=optax.sgd,
      **settings,
    )
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{model_dir}/{description.FILE} cannot be used: {error}"
    ) from error
  return Run(
    model_dir=str(model_dir),
    mixture_or_task_name=known.mixture,
    task_feature_lengths=known.header.lengths,
    network=functools.partial(dataclasses.replace, network),
    settings=settings,
    batch_size=known.batch_size,
    strategy=strategy,
    data_seed=known.data_seed,
    store_dir=known.store,
    bands=bands,
    search=search,
  )


# ------------------------------------------------------------- programs


def program(
  run: Run,
  devices: Sequence[jax.Device] | None,
  phase: str,
  vocab_size: int | None = None,
  num_directions: int = 1,
) -> steps.Program:
  """A phase's program, to be compiled: no rows are built or read.

  Without `devices` over all; without a vocabulary's size for that of the
  mixture, which then gives the directions too.
  """
  if vocab_size is None and run.store_dir:
    store = row_store.RowStore(run.store_dir)
    vocab_size, num_directions = store.vocab_size, len(store.directions)
  elif vocab_size is None:
    from basemt_jax.data import store_building  # Imports SeqIO and TensorFlow.

    vocab_size, num_directions = store_building.sizes(run.mixture_or_task_name)
  return phases.program(
    run.config_of(vocab_size),
    run.settings,
    phase,
    partitioning.make_mesh(run.expert_devices, run.model_devices, devices),
    num_directions,
  )
