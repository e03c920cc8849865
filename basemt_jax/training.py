"""Training a run, and converting a dense one: what writes a model directory."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from basemt_jax import (
  announcement,
  checkpointing,
  description,
  evaluation,
  files,
  locking,
  partitioning,
  phases,
  plain_data,
  processes,
  reports,
  trained,
  trainer,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax.data import doubts, languages, packing, row_store, vocabulary


def train(
  run: run_lib.Run,
  writer: reports.Writer,
  console: run_lib.Console,
  started: Callable[[], None] = lambda: None,
) -> str:
  """Trains, or goes on training; returns the outcome of `trainer.Trainer.run`.

  `started` is called when run and directory have proved to fit together.

  Raises:
    ValueError: The directory holds another run, which this is not a
      continuation of.
  """
  run.check_devices()
  if "://" not in run.model_dir:  # Before rows are packed.
    files.check_writable(pathlib.Path(run.model_dir, description.FILE))
  for doubt in run.doubts():
    console.message(doubt)
  store = run.store(console.building)
  for doubt in doubts.of_data(run.mixture_or_task_name, store):
    console.message(f"warning: {doubt}")
  with _only_writer(run.model_dir):
    processes.check_shared(run.model_dir)
    mesh = run.mesh()
    own = run_lib.describe(run, store)
    check_continues(run, own, console.message)
    config, count = run.config(store), len(store.directions)
    make_program = functools.cache(
      lambda phase: phases.program(config, run.settings, phase, mesh, count)
    )
    last = "sparse" if config.feed_forward == "experts" else "dense"
    for line in announcement.lines(run, store, make_program(last)):
      console.message(line)
    loop = trainer.Trainer(
      config,
      run.settings,
      mesh,
      store.directions,
      run.train_batches(store),
      run.model_dir,
      writer,
      dev_batches=trained.dev_batches(run, store, "validation"),
      hooks=_hooks(run, store, mesh, console),
      verify=run.verify,
      make_program=make_program,
    )
    with contextlib.closing(loop):
      if processes.is_first():
        files.remove_left_behind(run.model_dir)
        description.write(run.model_dir, own, description.pieces_of(store))
      started()
      return loop.run()


def _only_writer(model_dir: str) -> contextlib.AbstractContextManager[None]:
  """Holds the directory; the first of several processes does it for all."""
  if not processes.is_first() or "://" in model_dir:
    return contextlib.nullcontext()
  return locking.only_writer(model_dir, "the model directory")


def check_continues(
  run: run_lib.Run,
  own: description.Description,
  message: Callable[[str], None],
) -> None:
  """Refuses another run's directory; tells what this one does otherwise."""
  if not description.exists(run.model_dir):
    return
  before = description.read(run.model_dir)
  refused, told = description.differences(before, own)
  if refused:
    raise ValueError(
      f"{run.model_dir} holds a run that this is not a continuation of: "
      f"{'; '.join(refused)}; set them back, or choose another directory"
    )
  if told:
    message(f"changed since the run was started: {'; '.join(told)}")


def _hooks(
  run: run_lib.Run,
  store: row_store.RowStore,
  mesh: jax.sharding.Mesh,
  console: run_lib.Console,
) -> reports.Hooks:
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
      key, trained.translator(model, variables, mesh, run.search)
    )
    translator.variables = variables
    results, _ = evaluation.evaluate(
      translator,
      description.pieces_of(store),
      trained.direction_texts(store, "validation", run.bleu_sentences),
      thresholds=run.bands,
    )
    means = evaluation.summarise(results)
    line = ", ".join(
      f"{m.name} {m.bleu:.1f}" for m in means if m.bleu is not None
    )
    console.message(f"step {step}: dev BLEU {line}")
    return evaluation.scalars("dev", results, means)

  has_dev = store.has_pairs("validation")
  return reports.Hooks(
    report=lambda p: console.progress(p, temperature(p.step - 1)),
    message=console.message,
    scalars=scalars,
    evaluate=bleu if has_dev and run.bleu_every else None,
    evaluate_every=run.bleu_every,
    bands={
      name: languages.band(int(pairs), run.bands)
      for name, pairs in zip(
        store.directions, store.pairs("train"), strict=True
      )
    },
  )


# ----------------------------------------------------------- conversion


def convert(
  run: run_lib.Run,
  dense_dir: str,
  which: str | int,
  console: run_lib.Console,
  converted: Callable[[], None] = lambda: None,
) -> tuple[int, float]:
  """Converts a dense checkpoint; `run.model_dir` gets the sparse one.

  Vocabulary, lengths and directions are those that the dense model was trained
  with, whatever has become of its data. The sparse checkpoint has the dense
  one's step; the sparse run finds its own place in its data at that step, for
  its sampling temperature may be another. `converted` is called when the
  function has proved to be the same, before the checkpoint is written: one that
  is there is complete.

  Returns:
    The step, and the relative error of the function on a training batch.

  Raises:
    ValueError: Nothing to convert, models that do not belong together, or a
      function that is not preserved; nothing is written then.
  """
  with contextlib.ExitStack() as held:
    held.enter_context(_only_writer(run.model_dir))
    mesh = run.mesh()
    processes.check_shared(run.model_dir)
    known, pieces, store = _dense_data(run, dense_dir, console)
    config = run.config_of(known.header.vocab_size)
    config = dataclasses.replace(config, converted=True)
    if config.feed_forward != "experts":
      raise ValueError(
        f"the configured network has feed_forward {config.feed_forward!r}; "
        "converting needs a sparse one: 'experts'"
      )
    source = held.enter_context(
      checkpointing.Checkpoints(dense_dir, read_only=True, verify=run.verify)
    )
    target = held.enter_context(checkpointing.Checkpoints(run.model_dir))
    step = source.step_of(which)
    if source.phase(step) != "dense":
      raise ValueError(f"{source.path(step)} is not dense: it holds experts")
    target.check_empty()
    dense, sparse = (
      phases.program(config, run.settings, phase, mesh, len(known.directions))
      for phase in ("dense", "sparse")
    )
    state = dense.shapes.from_tree(
      source.restore(step, dense.abstract_tree(), "the dense model")
    )
    batch = _some_batch(run, store, known.header, step)
    sparse_state, error = phases.Conversion(dense, sparse)(
      state, partitioning.put_batch(batch, mesh)
    )
    if processes.is_first():
      own = run_lib.configuration(run, known.header.vocab_size)
      description.write(
        run.model_dir, dataclasses.replace(known, **own), pieces
      )
    converted()
    target.save(step, sparse_state.tree(), {"data": None})
    target.wait()
  return step, error


def _dense_data(
  run: run_lib.Run, dense_dir: str, console: run_lib.Console
) -> tuple[
  description.Description, vocabulary.Vocabulary, row_store.RowStore | None
]:
  """What is known of a dense model, its vocabulary, its rows if still there.

  Raises:
    ValueError: the run's sparse network is not made of that model's.
  """
  if not description.exists(dense_dir):  # T5X trained it.
    store = run.store(console.building)
    return run_lib.describe(run, store), description.pieces_of(store), store
  known = description.read(dense_dir)
  network = plain_data.to_plain(run.config_of(known.header.vocab_size))
  description.check_dense(known, network, dense_dir)
  try:
    found = row_store.RowStore(known.store)
    description.check_rows(known, found)
  except (ValueError, OSError):
    found = None
  return known, description.read_vocabulary(dense_dir, known), found


def _some_batch(
  run: run_lib.Run,
  store: row_store.RowStore | None,
  header: row_store.Header,
  step: int,
) -> packing.Batch:
  """The batch of a step; one of random tokens where the data is gone.

  Whether two networks compute the same function shows on either.
  """
  if store is not None:
    return next(run.train_batches(store, step))
  rows, layout = len(run.host_rows()), header.layout
  random = np.random.default_rng(step)
  tokens = random.integers(2, header.vocab_size, (rows, layout.width))
  segments = np.ones((rows, layout.width), np.int64)
  half = layout.inputs + layout.targets
  packed = np.concatenate([tokens[:, :half], segments[:, half:]], axis=1)
  direction = {"direction": np.zeros(rows, np.int32)}
  return layout.unpack(packed.astype(layout.dtype)) | direction
