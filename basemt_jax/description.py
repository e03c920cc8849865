"""What a model directory says of its model, whatever is left of its data.

    MODEL_DIR/model.json         what is described here, with its checksum
    MODEL_DIR/vocabulary.model   the SentencePiece model; none for bytes

Both are written when training starts. Whoever evaluates, translates, converts
or looks at a model reads them and its checkpoints, and nothing else: the
directory may be moved, archived or mailed. `config.gin` beside them is for
people, and for going on with training.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from basemt_jax import checksums, files, plain_data
from basemt_jax.data import row_store, source_tags, vocabulary

FILE = "model.json"
VOCABULARY_FILE = "vocabulary.model"
_FORMAT, _VERSION = "basemt_jax model", 1
_SETTINGS = "basemt_jax.steps.Settings"

# What a run may change when it goes on: it is told. All else is refused.
_MAY_CHANGE = (
  *("network.dropout_rate", "network.dtype", "network.remat"),
  "network.attention.implementation",
  *("settings.train_steps", "settings.dense_steps", "settings.patience"),
  *("settings.conversion_options", "settings.rewarm_steps"),
  *("settings.microbatches", "settings.keep_checkpoints"),
  *("settings.log_every", "settings.eval_every", "settings.save_every"),
  *("bands", "search", "optimizer.arguments", "devices", "reporting"),
)
# What a resumption compares elsewhere (the strategy, the rows of the data), or
# what makes no difference once parameters are there.
_NOT_COMPARED = (
  *("network.converted", "strategy"),
  *("mixture", "store", "header", "tags"),
  "learning_rate",  # See `_rates_differ`.
)
# What a sparse network has and a dense one has not.
_EXPERTS = tuple(
  f"network.{name}"
  for name in (
    *("feed_forward", "encoder_expert_blocks", "decoder_expert_blocks"),
    *("placement", "num_experts", "num_sublayers", "router"),
    *("rows_per_group", "expert_param_dtype"),
  )
)


@dataclasses.dataclass(frozen=True)
class Description:
  """A model, as it was trained; configurations as `plain_data` has them.

  Attributes:
    network: The final network, with experts where the run ends sparse.
    settings: Fields of `steps.Settings` that are plain values.
    strategy: How directions were sampled; its temperature as plain data.
    batch_size: Rows a step.
    data_seed: Of the order of the data.
    bands: Training pairs that make a direction high or mid resource.
    search: How to translate.
    mixture: Name of the mixture; for people.
    store: Where the packed rows were.
    vocabulary: Fingerprint of the vocabulary.
    header: Directions, their sizes, feature lengths.
    tags: How sources of each direction were tagged; None: not all alike.
    optimizer: Name and arguments; this and what follows are to tell what a
      resumption changes, and None where an earlier version wrote nothing.
    learning_rate: At some steps.
    devices: Their number, and the sizes of the mesh.
    reporting: BLEU on dev, trackers.
  """

  network: Mapping[str, Any]
  settings: Mapping[str, Any]
  strategy: Mapping[str, Any]
  batch_size: int
  data_seed: int
  bands: Mapping[str, Any]
  search: Mapping[str, Any]
  mixture: str
  store: str
  vocabulary: str
  header: row_store.Header
  tags: Mapping[str, source_tags.SourceTag | None]
  optimizer: Mapping[str, Any] | None = None
  learning_rate: Mapping[str, float] | None = None
  devices: Mapping[str, int] | None = None
  reporting: Mapping[str, Any] | None = None

  @property
  def directions(self) -> tuple[str, ...]:
    """Names, in the order in which batches number them."""
    return self.header.directions

  def to_json(self) -> dict[str, Any]:
    """All of it as JSON."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    fields = {k: v for k, v in fields.items() if v is not None}
    fields["header"] = self.header.to_json()
    fields["tags"] = {
      name: tag and dataclasses.asdict(tag) for name, tag in self.tags.items()
    }
    return fields

  @classmethod
  def from_json(
    cls, values: Mapping[str, Any], place: str = FILE
  ) -> "Description":
    """What `to_json` gave."""
    tags = {
      name: None if tag is None else source_tags.SourceTag(**tag)
      for name, tag in values["tags"].items()
    }
    header = row_store.Header(place, values["header"])
    return cls(**{**values, "tags": tags, "header": header})


def write(
  directory: str | pathlib.Path,
  description: Description,
  pieces: vocabulary.Vocabulary,
) -> None:
  """Writes both files, each so that a reader sees all of it or the one before.

  The vocabulary comes first: no description speaks of what is not there.
  """
  root = pathlib.Path(directory)
  if pieces.model is not None:
    files.write_atomically(root / VOCABULARY_FILE, pieces.model)
  values = description.to_json()
  files.write_json(
    root / FILE,
    {
      "format": _FORMAT,
      "version": _VERSION,
      "checksum": _checksum(values),
      "description": values,
    },
  )


def _checksum(values: Mapping[str, Any]) -> str:
  return checksums.bytes_checksum(json.dumps(values, sort_keys=True).encode())


def exists(directory: str | pathlib.Path) -> bool:
  """Whether a directory says what model it holds."""
  return (pathlib.Path(directory) / FILE).exists()


def read(directory: str | pathlib.Path) -> Description:
  """Reads what was written to MODEL_DIR, wherever it is now.

  Raises:
    ValueError: nothing was, or it is damaged or of another version.
  """
  path = pathlib.Path(directory) / FILE
  try:
    values = json.loads(path.read_text("utf-8"))
    found = (values["format"], values["version"])
    is_whole = values["checksum"] == _checksum(values["description"])
  except FileNotFoundError:
    raise ValueError(
      f"{directory} is not the directory of a run: it holds no {FILE}; give "
      "another, or, for a model that T5X or an earlier version trained, the "
      "--gin_file it was trained with"
    ) from None
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error}); {_REMEDY}") from error
  if found != (_FORMAT, _VERSION):
    raise ValueError(
      f"{path} is of format {found[0]!r}, version {found[1]!r}; this program "
      f"reads {_FORMAT!r}, version {_VERSION}"
    )
  if not is_whole:
    raise ValueError(
      f"{path} is damaged: it holds other bytes than were written; {_REMEDY}"
    )
  try:
    return Description.from_json(values["description"], str(path))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} cannot be used: {error}") from error


_REMEDY = (
  "take it from a copy, or start the training command again, which writes it"
)


def read_vocabulary(
  directory: str | pathlib.Path, description: Description
) -> vocabulary.Vocabulary:
  """The vocabulary that the model was trained with.

  Raises:
    ValueError: it is not there, or it is another.
  """
  path = pathlib.Path(directory) / VOCABULARY_FILE
  is_file = description.header.vocabulary_kind != vocabulary.BYTES
  if is_file and not path.is_file():
    raise ValueError(f"{path} is missing; {_REMEDY}")
  pieces = _pieces(description.header, path)
  if pieces.fingerprint != description.vocabulary:
    raise ValueError(
      f"{path} is damaged: it is not the vocabulary that the model was trained "
      f"with; {_REMEDY}"
    )
  return pieces


def pieces_of(store: row_store.RowStore) -> vocabulary.Vocabulary:
  """The vocabulary that a store's rows are made of."""
  return _pieces(store, store.vocabulary)


def _pieces(
  header: row_store.Header, path: str | pathlib.Path
) -> vocabulary.Vocabulary:
  if header.vocabulary_kind == vocabulary.BYTES:
    extra = header.vocab_size - len(vocabulary.Vocabulary())
    return vocabulary.Vocabulary(extra_ids=extra)
  return vocabulary.Vocabulary.load(path)


# ---------------------------------------------------------------- changes


def differences(
  old: Description, new: Description
) -> tuple[list[str], list[str]]:
  """What a run that goes on may not do otherwise, and what it may, in words."""
  before, after = old.to_json(), new.to_json()
  both = before.keys() & after.keys()
  refused, told = _differences(
    *({name: values[name] for name in both} for values in (before, after))
  )
  told += _rates_differ(old.learning_rate or {}, new.learning_rate or {})
  if old.network["fields"]["feed_forward"] == "dense":
    # A dense run may go on to a sparse phase; the trainer checks the phases.
    told += [text for text in refused if _is_about_experts(text)]
    refused = [text for text in refused if not _is_about_experts(text)]
  return refused, told


def check_network(
  known: Description, network: Mapping[str, Any], directory: str
) -> None:
  """Refuses to use a model as another network, as plain data, than was trained.

  Raises:
    ValueError: naming what differs.
  """
  found, _ = _differences({"network": known.network}, {"network": network})
  if found:
    raise ValueError(
      f"the configured network is not the one in {directory}: "
      f"{'; '.join(found)}; leave out --gin_file, or set it back"
    )


def check_dense(
  known: Description, network: Mapping[str, Any], directory: str
) -> None:
  """Refuses a sparse network that is not made of the dense one in a directory.

  Raises:
    ValueError: naming what differs besides the experts.
  """
  found, _ = _differences({"network": known.network}, {"network": network})
  found = [text for text in found if not _is_about_experts(text)]
  if found:
    raise ValueError(
      f"the sparse network is not made of the dense one in {directory}: "
      f"{'; '.join(found)}; set them back"
    )


def _differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
  before, after = (dict(_flat(_complete(values))) for values in (old, new))
  refused: list[str] = []
  told: list[str] = []
  for name in sorted(before.keys() | after.keys()):
    a, b = before.get(name), after.get(name)
    if a == b or _is_in(name, _NOT_COMPARED):
      continue
    text = f"{name} was {a!r} and is {b!r}"
    (told if _is_in(name, _MAY_CHANGE) else refused).append(text)
  return refused, told


def _complete(values: Mapping[str, Any]) -> Any:
  """As JSON has them, lists for tuples, with defaults of what is left out."""
  found = plain_data.completed(json.loads(json.dumps(values)))
  if "settings" in found:
    settings = {"class": _SETTINGS, "fields": found["settings"]}
    found["settings"] = plain_data.completed(settings)["fields"]
  if "optimizer" in found:
    call = plain_data.completed_call(found["optimizer"])
    found["optimizer"] = json.loads(json.dumps(call))
  return found


def _rates_differ(
  old: Mapping[str, float], new: Mapping[str, float]
) -> list[str]:
  """The first step at which two schedules are known to differ, in words."""
  steps = sorted(old.keys() & new.keys(), key=int)
  return [
    f"the learning rate at step {step} was {old[step]:g} and is {new[step]:g}"
    for step in steps
    if old[step] != new[step]
  ][:1]


def _is_about_experts(text: str) -> bool:
  return _is_in(text.split()[0], _EXPERTS)


def _is_in(name: str, groups: Sequence[str]) -> bool:
  return any(name == g or name.startswith(f"{g}.") for g in groups)


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Pairs (dotted name, value) of everything in nested dictionaries."""
  if not isinstance(values, Mapping) or not values:
    yield name, values
    return
  if "class" in values and "fields" in values:
    inner = values["fields"]
    if name.count("."):  # Of a router or a schedule the kind matters too.
      yield f"{name}.class", values["class"]
  else:
    inner = values
  for key, item in inner.items():
    yield from _flat(item, f"{name}.{key}" if name else key)


def check_rows(description: Description, store: row_store.RowStore) -> None:
  """Refuses rows of other data than the model was trained for.

  Raises:
    ValueError: naming what differs: vocabulary, lengths, directions.
  """
  pieces = pieces_of(store)
  found = []
  if pieces.fingerprint != description.vocabulary:
    found.append(
      f"the vocabulary (the model's has {description.header.vocab_size} pieces,"
      f" the data's is another of {pieces.vocab_size})"
    )
  if store.lengths != description.header.lengths:
    found.append(
      f"the feature lengths ({description.header.lengths} and {store.lengths})"
    )
  for name in sorted({*description.directions} ^ {*store.directions}):
    which = "the data" if name in description.directions else "the model"
    found.append(f"direction {name}, which {which} lacks")
  if found:
    raise ValueError(
      f"the rows in {store.directory} do not fit the model: it was trained "
      f"with other data, and what differs is {'; '.join(found)}; evaluate it "
      "with the data it was trained on, or train anew"
    )
