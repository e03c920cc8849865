"""A run, from a mixture to a table of BLEU: what the commands do.

`Run` describes a run completely; gin binds it (`gin/runs/`), `cli` calls the
functions. SeqIO, and TensorFlow with it, is imported only where a row store
has to be built.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from basemt_jax import (
  checkpointing,
  evaluation,
  partitioning,
  phases,
  processes,
  sampling,
  steps,
  trainer,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax.data import batches, packing, row_store, vocabulary


class NoPairsError(ValueError):
  """There is nothing to evaluate on."""


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
  """

  model_dir: str
  mixture_or_task_name: Any
  task_feature_lengths: Mapping[str, int]
  network: Callable[..., model_lib.TransformerConfig]
  settings: steps.Settings
  batch_size: int
  strategy: sampling.Strategy
  data_seed: int = 0
  expert_devices: int = 1
  model_devices: int = 1
  store_dir: str | None = None
  cache_dir: str | None = None
  bands: evaluation.BandThresholds = evaluation.BandThresholds()  # noqa: RUF009
  search: translation.SearchOptions = translation.SearchOptions()  # noqa: RUF009
  bleu_every: int = 0
  bleu_sentences: int = 50

  def __post_init__(self):
    """Checks the numbers, which a command line gets wrong most easily."""
    for name in ("batch_size", "expert_devices", "model_devices"):
      steps.check_count(f"Run.{name}", getattr(self, name))
    steps.check_count("Run.bleu_every", self.bleu_every, least=0)

  def store(
    self, progress: Callable[..., None] | None = None
  ) -> row_store.RowStore:
    """The run's packed rows, built first if they are not there yet.

    Of several processes the first builds; the others then find its rows, or,
    on hosts that share no file system, build the same.
    """
    if self.store_dir:
      return row_store.RowStore.open(self.store_dir)
    from basemt_jax.data import mixtures  # Imports SeqIO and TensorFlow.

    return processes.in_turn(
      lambda: mixtures.ensure_store(
        self.mixture_or_task_name,
        self.task_feature_lengths,
        self.cache_dir or row_store.default_cache_dir(),
        progress=progress,
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
    """Over all devices of all processes."""
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
    progress: Takes a `trainer.Progress` and the temperature.
    building: Takes progress of building a row store; see `mixtures`.
    translating: Takes (done, all) sentences.
  """

  message: Callable[[str], None]
  progress: Callable[[trainer.Progress, float], None]
  building: Callable[..., None]
  translating: Callable[[int, int], None]


def train(
  run: Run,
  writer: trainer.Writer,
  console: Console,
  started: Callable[[], None] = lambda: None,
) -> str:
  """Trains, or goes on training.

  Args:
    run: The run.
    writer: Takes metrics.
    console: Takes progress.
    started: Called when run and directory have proved to fit together.

  Returns:
    The outcome; see `trainer.Trainer.run`.
  """
  store = run.store(console.building)
  processes.check_shared(run.model_dir)
  mesh = run.mesh()
  loop = trainer.Trainer(
    run.config(store),
    run.settings,
    mesh,
    store.directions,
    run.train_batches(store),
    run.model_dir,
    writer,
    dev_batches=_dev_batches(run, store, "validation"),
    hooks=_hooks(run, store, mesh, console),
  )
  with contextlib.closing(loop):
    started()
    return loop.run()


def _hooks(
  run: Run,
  store: row_store.RowStore,
  mesh: jax.sharding.Mesh,
  console: Console,
) -> trainer.Hooks:
  """Temperature with every report, and BLEU on dev every so often."""

  def temperature(step: int) -> float:
    return float(run.strategy.temperature(np.array(step)))

  def scalars(step: int) -> dict[str, float]:
    # Uniform sampling's is infinite, which JSON does not know.
    value = temperature(step)
    return {"temperature": value} if np.isfinite(value) else {}

  translators: dict[str, translation.Translator] = {}

  def bleu(
    model: model_lib.Transformer, variables: Any, step: int
  ) -> dict[str, float]:
    # One translator a phase, because it holds the compiled search.
    key = model.config.feed_forward
    translator = translators.setdefault(
      key, _translator(model, variables, mesh, run.search)
    )
    translator.variables = variables
    results, _ = evaluation.evaluate(
      translator,
      vocabulary.Vocabulary.load(store.vocabulary),
      direction_texts(store, "validation", run.bleu_sentences),
      thresholds=run.bands,
    )
    means = evaluation.summarise(results)
    line = ", ".join(
      f"{m.name} {m.bleu:.1f}" for m in means if m.bleu is not None
    )
    console.message(f"step {step}: dev BLEU {line}")
    return evaluation.scalars("dev", results, means)

  has_dev = _has_pairs(store, "validation")
  return trainer.Hooks(
    report=lambda p: console.progress(p, temperature(p.step - 1)),
    message=console.message,
    scalars=scalars,
    evaluate=bleu if has_dev and run.bleu_every else None,
    evaluate_every=run.bleu_every,
    bands={
      name: evaluation.band(int(pairs), run.bands)
      for name, pairs in zip(
        store.directions, store.pairs("train"), strict=True
      )
    },
  )


def _has_pairs(store: row_store.RowStore, split: str) -> bool:
  return split in store.splits and bool(store.pairs(split).any())


def _dev_batches(
  run: Run, store: row_store.RowStore, split: str
) -> Callable[[], Iterator[packing.Batch]] | None:
  """A function that starts over on a split's batches; None without pairs."""
  if not _has_pairs(store, split):
    return None
  return lambda: batches.eval_batches(
    store,
    split,
    run.batch_size,
    host_rows=run.host_rows(),
  )


def direction_texts(
  store: row_store.RowStore, split: str, limit: int | None = None
) -> list[evaluation.DirectionTexts]:
  """The sentences of a split, by direction; at most `limit` of each."""
  texts = []
  train_pairs = store.pairs("train")
  for name, pairs in zip(store.directions, train_pairs, strict=True):
    records = store.texts(split, name)[:limit]
    texts.append(
      evaluation.DirectionTexts(
        name,
        [record["tagged_source"] for record in records],
        [record["target"] for record in records],
        int(pairs),
      )
    )
  return texts


# ------------------------------------------------------------- programs


def program(
  run: Run,
  devices: Sequence[jax.Device] | None,
  phase: str,
  vocab_size: int | None = None,
  num_directions: int = 1,
) -> steps.Program:
  """A phase's program, to be compiled: no rows are built or read.

  Args:
    run: The run.
    devices: Of the mesh; None: all.
    phase: 'dense' or 'sparse'.
    vocab_size: Pieces; None: of the mixture, which gives the directions too.
    num_directions: N, used with `vocab_size`.
  """
  if vocab_size is None and run.store_dir:
    store = row_store.RowStore.open(run.store_dir)
    vocab_size, num_directions = store.vocab_size, len(store.directions)
  elif vocab_size is None:
    from basemt_jax.data import mixtures  # Imports SeqIO and TensorFlow.

    vocab_size, num_directions = mixtures.sizes(run.mixture_or_task_name)
  return phases.program(
    run.config_of(vocab_size),
    run.settings,
    phase,
    partitioning.make_mesh(run.expert_devices, run.model_devices, devices),
    num_directions,
  )


# ------------------------------------------------------- trained models


@dataclasses.dataclass(frozen=True)
class Trained:
  """A checkpoint's model, ready for use.

  Attributes:
    step: Of the checkpoint.
    program: Its phase's program.
    variables: What `program.model.apply` takes.
    store: The run's rows and vocabulary.
  """

  step: int
  program: steps.Program
  variables: Any
  store: row_store.RowStore


def load(run: Run, console: Console, which: str | int = "latest") -> Trained:
  """Restores parameters and prices, not the optimizer.

  Matrices have the type they are multiplied in; see `model.rounded`.

  Args:
    run: The run that wrote the checkpoint.
    console: Takes progress, if rows have to be built.
    which: 'latest', 'best' (lowest dev loss) or a step.

  Raises:
    ValueError: No such checkpoint, or it is of another model.
  """
  with contextlib.closing(
    checkpointing.Checkpoints(run.model_dir, read_only=True)
  ) as checkpoints:
    step = _step(checkpoints, which)
    store = run.store(console.building)
    program = phases.program(
      run.config(store),
      run.settings,
      checkpoints.phase(step),
      run.mesh(),
      len(store.directions),
    )
    like = program.abstract_tree()
    del like["state"]
    dtype = program.model.config.dtype
    like["target"] = model_lib.rounded(like["target"], dtype)
    tree = checkpoints.restore(step, like, "the run")
  variables = {"params": tree["target"], **tree.get("flax_mutables", {})}
  return Trained(step, program, variables, store)


def _step(checkpoints: checkpointing.Checkpoints, which: str | int) -> int:
  available = checkpoints.steps()
  if not available:
    raise ValueError(
      f"{checkpoints.directory} holds no checkpoints; train first"
    )
  if which == "latest":
    return available[-1]
  if which == "best":
    best = checkpoints.best_step()
    if best is None:
      raise ValueError(
        f"no checkpoint in {checkpoints.directory} has a dev loss; ask for "
        f"'latest' or one of the steps {available}"
      )
    return best
  if not str(which).isdigit() or int(which) not in available:
    raise ValueError(
      f"no checkpoint of step {which!r} in {checkpoints.directory}; there are "
      f"steps {available}, 'latest' and 'best'"
    )
  return int(which)


def _translator(
  model: model_lib.Transformer,
  variables: Any,
  mesh: jax.sharding.Mesh,
  search: translation.SearchOptions,
) -> translation.Translator:
  return translation.Translator(
    model,
    variables,
    search,
    partitioning.batch_sharding(mesh) if mesh.size > 1 else None,
  )


def translator(run: Run, trained: Trained) -> translation.Translator:
  """Translates with a loaded model and the run's search options."""
  return _translator(
    trained.program.model, trained.variables, run.mesh(), run.search
  )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The outcome of `evaluate`.

  Attributes:
    step: Of the checkpoint.
    split: Evaluated.
    results: By direction, most training pairs first.
    translations: In the same order.
    directory: Where both were written.
  """

  step: int
  split: str
  results: list[evaluation.DirectionResult]
  translations: list[evaluation.DirectionTranslations]
  directory: pathlib.Path


def evaluate(
  run: Run,
  console: Console,
  which: str | int = "latest",
  split: str | None = None,
) -> Evaluation:
  """Loss, BLEU and chrF++ of every direction; written to the model directory.

  Args:
    run: The run; its `search` says how to translate.
    console: Takes progress.
    which: See `load`.
    split: 'test' or 'validation'; None: 'test' if the data has one.

  Raises:
    NoPairsError: The split has no pairs.
    ValueError: See `load`.
  """
  trained = load(run, console, which)
  store = trained.store
  if split is None:
    split = "test" if _has_pairs(store, "test") else "validation"
  batches = _dev_batches(run, store, split)
  if batches is None:
    raise NoPairsError(
      f"the data has no pairs in split {split!r}; it has splits "
      f"{', '.join(s for s in store.splits if _has_pairs(store, s))}"
    )
  mesh = run.mesh()
  losses = trainer.direction_losses(
    trained.program.eval_step,
    trained.variables,
    (partitioning.put_batch(batch, mesh) for batch in batches()),
    store.directions,
  )
  results, translations = evaluation.evaluate(
    translator(run, trained),
    vocabulary.Vocabulary.load(store.vocabulary),
    direction_texts(store, split),
    losses,
    run.bands,
    console.translating,
  )
  directory = (
    pathlib.Path(run.model_dir) / "evaluation" / f"{split}_{trained.step}"
  )
  if processes.is_first():
    evaluation.write_translations(directory, translations)
    evaluation.write_scores(directory / "scores.json", results)
  return Evaluation(trained.step, split, results, translations, directory)


# ----------------------------------------------------------- conversion


def convert(
  run: Run, dense_dir: str, which: str | int, console: Console
) -> tuple[int, float]:
  """Converts a dense checkpoint; `run.model_dir` gets the sparse one.

  The sparse checkpoint has the dense one's step, and the sparse run's own data
  position at that step: its sampling temperature may be another.

  Args:
    run: The sparse run.
    dense_dir: Model directory of the dense run.
    which: See `load`.
    console: Takes progress.

  Returns:
    The step, and the relative error of the function on a training batch.

  Raises:
    ValueError: Nothing to convert, models that do not belong together, or a
      function that is not preserved; nothing is written then.
  """
  store, mesh = run.store(console.building), run.mesh()
  processes.check_shared(run.model_dir)
  config = dataclasses.replace(run.config(store), converted=True)
  if config.feed_forward != "experts":
    raise ValueError(
      f"the configured network has feed_forward {config.feed_forward!r}; "
      "converting needs a sparse one: 'experts'"
    )
  with (
    contextlib.closing(
      checkpointing.Checkpoints(dense_dir, read_only=True)
    ) as source,
    contextlib.closing(checkpointing.Checkpoints(run.model_dir)) as target,
  ):
    step = _step(source, which)
    if source.phase(step) != "dense":
      raise ValueError(f"{source.path(step)} is not dense: it holds experts")
    if target.latest_step() is not None:
      raise ValueError(
        f"{run.model_dir} already holds checkpoint_{target.latest_step()}; "
        "choose an empty directory"
      )
    dense, sparse = (
      phases.program(config, run.settings, phase, mesh, len(store.directions))
      for phase in ("dense", "sparse")
    )
    state = dense.shapes.from_tree(
      source.restore(step, dense.abstract_tree(), "the dense model")
    )
    train_batches = run.train_batches(store, step)
    position = {"data": train_batches.state()}
    batch = partitioning.put_batch(next(train_batches), mesh)
    converted, error = trainer.convert_state(dense, sparse, state, batch)
    target.save(step, converted.tree(), position)
    target.wait()
  return step, error
