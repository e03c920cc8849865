"""A trained model, loaded: to translate with, to evaluate, to look into.

    model = trained.load("runs/quickstart")
    texts = model.tagged(["in 3 weeks"], to="de")
    best = evaluation.translate_texts(model.translator(), model.pieces, texts)

The model directory is enough (`description`); neither SeqIO nor TensorFlow nor
the data it was trained on is needed.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from basemt_jax import (
  checkpointing,
  description,
  evaluation,
  files,
  layers,
  losses,
  metric_command,
  metrics,
  partitioning,
  phases,
  plain_data,
  processes,
  scoring,
  steps,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax.data import (
  batches,
  languages,
  packing,
  row_store,
  source_tags,
  vocabulary,
)


class NoPairsError(ValueError):
  """There is nothing to evaluate on."""


class UnknownTagError(ValueError):
  """Sources cannot be tagged as they were in training."""


class NoSourceError(UnknownTagError):
  """The tag depends on the language of the text, which is not said."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """A checkpoint's model, ready for use.

  Attributes:
    run: How it is used: devices, search, batch size.
    step: Of the checkpoint.
    program: Its phase's program.
    variables: What `program.model.apply` takes.
    description: What it was trained as, with `pieces` as vocabulary.
    console: Takes progress, if rows have to be built.
  """

  run: run_lib.Run
  step: int
  program: steps.Program
  variables: Any
  description: description.Description
  pieces: vocabulary.Vocabulary
  console: run_lib.Console = run_lib.SILENT

  @functools.cached_property
  def store(self) -> row_store.RowStore:
    """The rows it was trained on, where they still are, or can be built again.

    Raises:
      ValueError: They are not there, or are of other data.
    """
    run = self.run
    if run.store_dir and not pathlib.Path(run.store_dir).exists():
      raise ValueError(
        f"the rows of {run.mixture_or_task_name!r} that {run.model_dir} was "
        f"trained on are no longer in {run.store_dir}; name test sets to "
        "evaluate on, or give --gin_file of its recipe, which packs them again"
      )
    store = run.store(self.console.building)
    description.check_rows(self.description, store)
    return store

  @property
  def is_averaged(self) -> bool:
    """Whether its weights are averages of those of many steps."""
    return _is_averaged(self.run)

  @property
  def weights(self) -> str:
    """Those of averaged weights, or of the last step."""
    return "averaged" if self.is_averaged else "last"

  def translator(
    self, search: translation.SearchOptions | None = None
  ) -> translation.Translator:
    """Translates with this model; as the run says unless `search` is given."""
    return translator(
      self.program.model,
      self.variables,
      self.program.mesh,
      search or self.run.search,
    )

  def scorer(self) -> scoring.Scorer:
    """Scores pairs with this model."""
    mesh = self.program.mesh
    return scoring.Scorer(
      self.program.model, self.variables, self.run.search, _sharding(mesh)
    )

  def tag(self, to: str, source: str | None = None) -> source_tags.SourceTag:
    """What sources had around them in training for a language to be given.

    The language of the source is needed only where the tag depends on it.

    Raises:
      UnknownTagError: No such direction, or its tag is not known; a
        `NoSourceError` if it would be with a `source`.
    """
    return choose_tag(self.description.tags, to, source)


def tagged_texts(
  known: description.Description,
  direction: str,
  pairs: Sequence[tuple[str, str]],
) -> evaluation.DirectionTexts:
  """Pairs of any origin, tagged as those of a direction were in training.

  Raises:
    UnknownTagError: See `Trained.tag`.
  """
  tag = known.tags[direction]
  if tag is None:
    raise UnknownTagError(_not_alike(direction))
  sources, references = [a for a, _ in pairs], [b for _, b in pairs]
  train_pairs = known.header.pairs("train")
  return evaluation.DirectionTexts(
    direction,
    [tag(source) for source in sources],
    references,
    int(train_pairs[known.directions.index(direction)]),
    sources,
  )


def _not_alike(direction: str) -> str:
  return (
    f"the sources of {direction} were not all tagged alike in training, so "
    "that there is no one tag which asks for that language"
  )


def choose_tag(
  tags: Mapping[str, source_tags.SourceTag | None],
  to: str,
  source: str | None = None,
) -> source_tags.SourceTag:
  """The tag that asks for a language; see `Trained.tag`."""
  directions = {name: languages.Direction.parse(name) for name in tags}
  found = {d.target for d in directions.values()}
  # Into what a teacher wrote a model translates as into the language itself.
  targets = sorted(t for t in found if not t.label or t.authentic not in found)
  meant = languages.matching(to, targets)
  if len(meant) > 1:
    raise UnknownTagError(
      f"that may be {' or '.join(meant)}; say which one is wanted"
    )
  if not meant:
    raise UnknownTagError(
      "the model was not trained to translate into that language; it knows "
      f"{', '.join(targets)}"
    )
  into = {name: d.source for name, d in directions.items() if d.target in meant}
  sources = languages.matching(source, into.values()) if source else ()
  names = [name for name, a in into.items() if source is None or a in sources]
  if not names:
    raise UnknownTagError(
      f"the model was not trained to translate from {source} into it, but from "
      f"{', '.join(sorted(into.values()))}"
    )
  # What a model wrote is read with a tag of its own, which no text of a
  # person has.
  names = [n for n in names if not directions[n].source.label] or names
  unknown = [name for name in names if tags[name] is None]
  if unknown:
    raise UnknownTagError(_not_alike(unknown[0]))
  chosen = {tag for name in names if (tag := tags[name]) is not None}
  if len(chosen) > 1:
    raise NoSourceError(
      "how it is asked for depends on the language of the text; say which it "
      f"is: {', '.join(sorted(into.values()))}"
    )
  return chosen.pop()


def load(
  run: run_lib.Run | str | pathlib.Path,
  console: run_lib.Console = run_lib.SILENT,
  which: str | int = "latest",
  rounded: bool = True,
) -> Trained:
  """Restores parameters and prices, not the optimizer.

  Args:
    run: A model directory; or a run that says how to use what is in its
      directory. Its network must be the one that was trained.
    console: Takes progress, if rows have to be built.
    which: 'latest', 'best' (lowest dev loss) or a step.
    rounded: Matrices have the type they are multiplied in, see
      `layers.rounded`; else they are as they were saved.

  Raises:
    ValueError: No such checkpoint, or it is damaged or of another model.
  """
  if not isinstance(run, run_lib.Run):
    run = run_lib.described(run)
  with checkpointing.Checkpoints(
    run.model_dir, read_only=True, verify=run.verify
  ) as checkpoints:
    step = checkpoints.step_of(which)
    known, pieces = _known(run, console)
    program = phases.program(
      run.config_of(known.header.vocab_size),
      run.settings,
      checkpoints.phase(step),
      run.mesh(),
      len(known.directions),
    )
    like = program.abstract_tree()
    weights = like.pop("target")
    if rounded:
      weights = layers.rounded(weights, program.model.config.dtype)
    del like["state"]
    is_averaged = _is_averaged(run)
    if is_averaged:
      like["state"] = {"param_states": {"average": weights}}
    else:
      like["target"] = weights
    tree = checkpoints.restore(step, like, "the run")
  params = (
    tree["state"]["param_states"]["average"] if is_averaged else tree["target"]
  )
  variables = {"params": params, **tree.get("flax_mutables", {})}
  return Trained(run, step, program, variables, known, pieces, console)


def _is_averaged(run: run_lib.Run) -> bool:
  return run.use_average and run.settings.average_decay > 0


def _known(
  run: run_lib.Run, console: run_lib.Console
) -> tuple[description.Description, vocabulary.Vocabulary]:
  """The description and vocabulary of a run's model.

  Of the directory; of the run and its data only where the directory has none,
  because T5X trained the model.
  """
  if not description.exists(run.model_dir):
    store = run.store(console.building)
    return run_lib.describe(run, store), description.pieces_of(store)
  known = description.read(run.model_dir)
  network = plain_data.to_plain(run.config_of(known.header.vocab_size))
  description.check_network(known, network, run.model_dir)
  return known, description.read_vocabulary(run.model_dir, known)


def translator(
  model: model_lib.Transformer,
  variables: Any,
  mesh: jax.sharding.Mesh,
  search: translation.SearchOptions,
) -> translation.Translator:
  """A translator whose batches are spread over a mesh of several devices."""
  return translation.Translator(model, variables, search, _sharding(mesh))


def _sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding | None:
  return partitioning.batch_sharding(mesh) if mesh.size > 1 else None


# ------------------------------------------------------------- evaluation


def direction_texts(
  store: row_store.RowStore, split: str, limit: int | None = None
) -> list[evaluation.DirectionTexts]:
  """The sentences of a split, by direction; at most `limit` of each."""
  texts = []
  train_pairs = store.pairs("train")
  for name, pairs in zip(store.directions, train_pairs, strict=True):
    records = store.texts(split, name)[:limit]
    if not records and languages.label_of(name):
      continue  # Only there to train on.
    texts.append(
      evaluation.DirectionTexts(
        name,
        [record["tagged_source"] for record in records],
        [record["target"] for record in records],
        int(pairs),
        [record["source"] for record in records],
      )
    )
  return texts


def dev_batches(
  run: run_lib.Run, store: row_store.RowStore, split: str
) -> Callable[[], Iterator[packing.Batch]] | None:
  """A function that starts over on a split's batches; None without pairs."""
  if not store.has_pairs(split):
    return None
  return lambda: batches.eval_batches(
    store,
    split,
    run.batch_size,
    host_rows=run.host_rows(),
  )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The outcome of an evaluation.

  Attributes:
    test_set: Its name; 'test' or 'validation' for a split of the model's data.
    step: Of the checkpoint; None: of an export, which is the only one.
    results: By direction, most training pairs first.
    translations: In the same order.
    directory: Where both were written.
    not_written: Why they were not, if so: a full disk takes no results away.
  """

  test_set: str
  step: int | None
  results: list[evaluation.DirectionResult]
  translations: list[evaluation.DirectionTranslations]
  directory: pathlib.Path
  not_written: OSError | None = None


def check_evaluation(run: run_lib.Run) -> None:
  """Refuses a directory that no results could be written to, before the work.

  Raises:
    ValueError: See `files.check_writable`.
  """
  folder = pathlib.Path(run.model_dir) / "evaluation"
  if processes.is_first() and folder.parent.is_dir():
    files.check_writable(folder / "scores.json")


def evaluate(
  run: run_lib.Run,
  console: run_lib.Console,
  which: str | int = "latest",
  split: str | None = None,
  command: str | None = None,
) -> Evaluation:
  """Loss, BLEU and chrF++ on the model's own data.

  Args:
    run: The run; its `search` says how to translate.
    console: Takes progress.
    which: See `load`.
    split: 'test' or 'validation'; None: 'test' if the data has one.
    command: Of a metric; see `evaluate_texts`.

  Raises:
    NoPairsError: The split has no pairs.
    ValueError: See `load`; or the data is not what the model was trained on.
  """
  check_evaluation(run)
  trained = load(run, console, which)
  store = trained.store
  if split is None:
    split = "test" if store.has_pairs("test") else "validation"
  batches = dev_batches(run, store, split)
  if batches is None:
    raise NoPairsError(
      f"the data has no pairs in split {split!r}; it has splits "
      f"{', '.join(s for s in store.splits if store.has_pairs(s))}"
    )
  mesh = trained.program.mesh
  measured = losses.measured(
    trained.program.eval_step,
    trained.variables,
    (partitioning.put_batch(batch, mesh) for batch in batches()),
    store.directions,
    run.settings.metrics,
  )
  return evaluate_texts(
    trained,
    trained.translator(),
    split,
    direction_texts(store, split),
    measured,
    command,
  )


class Evaluable(Protocol):
  """A model that text is evaluated with: a `Trained` one, or an export."""

  @property
  def run(self) -> run_lib.Run:
    """How it is used."""

  @property
  def step(self) -> int | None:
    """Of its checkpoint; None: it has only one."""

  @property
  def weights(self) -> str:
    """Which they are, for whoever reads the scores."""

  @property
  def pieces(self) -> vocabulary.Vocabulary:
    """Its vocabulary."""

  @property
  def console(self) -> run_lib.Console:
    """Takes progress."""


def evaluate_texts(
  model: Evaluable,
  translator: Any,
  test_set: str,
  texts: Sequence[evaluation.DirectionTexts],
  measured: Mapping[str, float] | None = None,
  command: str | None = None,
) -> Evaluation:
  """BLEU and chrF++ of any text; written to the model directory.

  The folder is named by test set, checkpoint and search, so that no result is
  replaced by another's.

  Args:
    model: Trained or exported.
    translator: Of the model; the compiled searches belong to it.
    test_set: Its name.
    texts: By direction, tagged.
    measured: Loss and the run's own metrics, where known; see
      `losses.measured`.
    command: Scores the translations too; see `metric_command.with_metrics`.
  """
  run, search = model.run, translator.options
  results, translations = evaluation.evaluate(
    translator,
    model.pieces,
    texts,
    metrics.of_directions(measured or {}, "loss"),
    run.bands,
    model.console.translating,
  )
  for metric in run.settings.metrics:
    own = metrics.of_directions(measured or {}, metric.name)
    results = evaluation.with_metric(results, metric.name, own)
  if command:
    results = metric_command.with_metrics(command, results, translations)
  step = "export" if model.step is None else model.step
  name = f"{test_set}_{step}_{evaluation.search_slug(search)}"
  directory = pathlib.Path(run.model_dir) / "evaluation" / name
  about = {
    "test_set": test_set,
    "step": model.step,
    "weights": model.weights,
    "search": dataclasses.asdict(search),
  }
  found = Evaluation(test_set, model.step, results, translations, directory)
  if processes.is_first():
    try:
      evaluation.write_translations(directory, translations)
      evaluation.write_scores(directory / "scores.json", results, about)
    except OSError as error:
      return dataclasses.replace(found, not_written=error)
  return found
