"""A model directory is whole: moved, damaged, shared, gone on with."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from basemt_jax import (
  checkpointing,
  checksums,
  description,
  evaluation,
  files,
  heating,
  locking,
  optimizer,
  plain_data,
  routing,
  sampling,
  trained,
  training,
)
from basemt_jax import run as run_lib
from basemt_jax.data import row_store, source_tags


def train(run):
  """Trains; the lines that were told."""
  told = []
  console = dataclasses.replace(run_lib.SILENT, message=told.append)
  assert training.train(run, toy.Writer(), console) == "done"
  return told


def load(directory, which="latest"):
  """What `trained.load` gives for a directory, on one device."""
  run = run_lib.described(directory)
  values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
  return trained.load(toy.OneDevice(**values), which=which)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  directory = tmp_path_factory.mktemp("original")
  store = toy.write_store(directory / "store")
  train(toy.a_run(directory / "model", store))
  return directory


@pytest.fixture
def copy(original, tmp_path):
  """A directory with `model`, and `store`, that may be damaged."""
  return pathlib.Path(shutil.copytree(original, tmp_path / "copy"))


# ---------------------------------------------------------------- whole


def test_nothing_but_the_directory_is_needed(copy, original):
  (copy / "model").rename(copy / "renamed")
  shutil.rmtree(copy / "store")
  model, expected = load(copy / "renamed"), load(original / "model")
  assert model.step == 4 and model.description.directions == toy.DIRECTIONS
  assert model.description.header.lengths == {"inputs": 32, "targets": 24}
  assert model.tag("fr") == source_tags.SourceTag("<2fr> ")
  assert model.pieces == expected.pieces
  jax.tree.map(
    np.testing.assert_array_equal, model.variables, expected.variables
  )


def test_a_description_comes_back_as_it_was(original):
  found = description.read(original / "model")
  values = json.loads(json.dumps(found.to_json()))
  assert description.Description.from_json(values).to_json() == found.to_json()
  run = run_lib.described(original / "model")
  assert run.config_of(found.header.vocab_size) == dataclasses.replace(
    toy.DENSE, vocab_size=384
  )
  steps = np.arange(9)
  np.testing.assert_array_equal(
    run.strategy.temperature(steps), heating.linear(1.0, 5.0, 4)(steps)
  )


def test_rows_of_other_data_are_refused_by_what_differs(original, tmp_path):
  known = description.read(original / "model")
  other = row_store.RowStore(toy.write_store(tmp_path / "other"))
  description.check_rows(known, other)
  other.directions = (*other.directions, "fr-en")
  other.vocab_size += 7
  with pytest.raises(
    ValueError, match=r"the vocabulary .*259.*266.*fr-en, which the model lacks"
  ):
    description.check_rows(known, other)


# --------------------------------------------------------------- damage


def flips(path, count=12):
  """Flips a bit at places spread over a file, one at a time."""
  data = path.read_bytes()
  for at in np.unique(np.linspace(0, len(data) - 1, count).astype(int)):
    changed = bytearray(data)
    changed[at] ^= 1 << int(at) % 8
    path.write_bytes(bytes(changed))
    yield f"{path} at {at}"
  path.write_bytes(data)


def test_every_flipped_bit_of_a_checkpoint_is_told_or_harmless(copy):
  step = copy / "model" / "checkpoint_4"
  told = 0
  for path in sorted(p for p in step.rglob("*") if p.is_file()):
    for where in flips(path):
      bad = checksums.damage(step)
      told += bool(bad)
      # Orbax's own notes on time, which nothing here reads.
      assert bad or path.name in (
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
      ), where
  assert told > 50 and not checksums.damage(step)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA"])
def test_what_has_no_checksum_is_not_read(copy, original, name):
  (copy / "model" / "checkpoint_4" / name).write_text("{")
  (copy / "model" / "checkpoint_4" / "commit_success.txt").unlink(
    missing_ok=True
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    load(copy / "model").variables,
    load(original / "model").variables,
  )


def test_every_flipped_bit_of_a_description_is_told(copy):
  path = copy / "model" / description.FILE
  for where in flips(path, 60):
    with pytest.raises(ValueError, match=r"model\.json") as error:
      description.read(path.parent)
    assert "\n" not in str(error.value), where
  description.read(path.parent)


def test_every_flipped_bit_of_a_store_is_told(copy):
  store = copy / "store"
  row_store.RowStore(store, verify=True)
  for path in sorted(p for p in store.rglob("*") if p.is_file()):
    for where in flips(path):
      with pytest.raises(ValueError) as error:
        row_store.RowStore(store, verify=True)
      assert str(store) in str(error.value), where
    data = path.read_bytes()
    path.unlink()
    if path.name != checksums.FILE:
      with pytest.raises(ValueError, match=str(store)):
        row_store.RowStore(store, verify=True)
    path.write_bytes(data)


def test_a_set_of_texts_that_is_gone_is_not_evaluated_without(copy):
  (copy / "store" / "test" / "en-fr.jsonl").unlink()
  with pytest.raises(ValueError, match=r"en-fr\.jsonl has 0 bytes"):
    row_store.RowStore(copy / "store")


DAMAGES = {
  "empty": lambda path: (
    [shutil.rmtree(p) for p in path.iterdir() if p.is_dir()]
    and [p.unlink() for p in path.iterdir()]
  ),
  "no arrays": lambda path: shutil.rmtree(path / "state"),
  "no position": lambda path: shutil.rmtree(path / "position"),
  "half a position": lambda path: next(
    p for p in (path / "position").iterdir()
  ).write_text('{"data": {"st'),
  "other JSON": lambda path: next(
    p for p in (path / "position").iterdir()
  ).write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(copy, damage):
  DAMAGES[damage](copy / "model" / "checkpoint_4")
  with pytest.raises(
    ValueError, match=r"checkpoint_4 is damaged: .*whole one is of step 2$"
  ):
    with_checkpoints(copy / "model", lambda c: c.stored(4))
  assert with_checkpoints(copy / "model", lambda c: c.position(2))["data"]
  told = with_checkpoints(
    copy / "model", lambda c: c.set_aside, read_only=False
  )
  assert len(told) == 1 and "checkpoint_4 is damaged" in told[0]
  assert with_checkpoints(copy / "model", lambda c: c.steps()) == [2]
  assert (copy / "model" / "damaged_checkpoint_4").is_dir()


def test_a_file_in_place_of_a_checkpoint_is_named(copy):
  shutil.rmtree(copy / "model" / "checkpoint_4")
  (copy / "model" / "checkpoint_4").write_text("")
  with pytest.raises(ValueError, match=r"it is no directory; the newest.*2"):
    with_checkpoints(copy / "model", lambda c: c.step_of("latest"))


def with_checkpoints(directory, function, read_only=True):
  opened = checkpointing.Checkpoints(directory, read_only=read_only)
  try:
    return function(opened)
  finally:
    opened.close()


def test_without_any_whole_checkpoint_nothing_begins_anew(copy):
  for step in (2, 4):
    shutil.rmtree(copy / "model" / f"checkpoint_{step}" / "state")
  with pytest.raises(ValueError, match="no whole checkpoint to go on from"):
    checkpointing.Checkpoints(copy / "model")
  assert (copy / "model" / "checkpoint_4").is_dir()


def test_training_goes_on_from_the_newest_whole_checkpoint(copy):
  arrays = copy / "model" / "checkpoint_4" / "state"
  largest = max(
    (p for p in arrays.rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  next(flips(largest, 3))
  told = train(toy.a_run(copy / "model", str(copy / "store")))
  told = [line for line in told if "checkpoint_" in line]
  assert "holds other bytes than were written" in told[0]
  assert told[1] == "going on from checkpoint_2, dense phase"
  assert not checksums.damage(copy / "model" / "checkpoint_4")


# -------------------------------------------------------- going on, locks


@pytest.mark.parametrize(
  "changes, text",
  [
    (
      {"network": dataclasses.replace(toy.DENSE, num_heads=4, head_dim=4)},
      "network.head_dim was 8 and is 4; network.num_heads was 2 and is 4",
    ),
    ({"data_seed": 1}, "data_seed was 0 and is 1"),
    ({"batch_size": 16}, "batch_size was 8 and is 16"),
    (
      {"settings": toy.settings(4, optimizer=optimizer.adafactor)},
      r"optimizer.name was '.*\.adamw' and is '.*\.adafactor'",
    ),
    (
      {"settings": toy.settings(4, z_loss=0.0)},
      "settings.z_loss was 0.0001 and is 0.0",
    ),
  ],
)
def test_what_may_not_change_is_refused_and_nothing_is_touched(
  original, changes, text
):
  before = sorted(os.listdir(original / "model"))
  run = toy.a_run(original / "model", str(original / "store"), **changes)
  with pytest.raises(ValueError, match=text):
    train(run)
  assert sorted(os.listdir(original / "model")) == before


def test_what_may_change_is_told_in_a_line(copy):
  network = dataclasses.replace(toy.DENSE, dropout_rate=0.25)
  settings = toy.settings(
    6,
    eval_every=2,
    save_every=2,
    log_every=1,
    learning_rate=optimizer.inverse_square_root(2e-2, 4),
    optimizer=functools.partial(optimizer.adamw, weight_decay=0.1),
  )
  run = toy.a_run(
    copy / "model",
    str(copy / "store"),
    network,
    settings=settings,
    bleu_every=50,
  )
  # As if it had been trained on more.
  known = description.read(run.model_dir)
  known = dataclasses.replace(known, devices={**known.devices, "number": 9})
  description.write(run.model_dir, known, load(run.model_dir).pieces)
  told = train(run)
  (line,) = [x for x in told if x.startswith("changed since")]
  for text in (
    "network.dropout_rate was 0.0 and is 0.25",
    "settings.train_steps was 4 and is 6",
    "settings.log_every was 2 and is 1",
    "the learning rate at step 1 was 0.0025 and is 0.005",
    "optimizer.arguments.weight_decay was 0.0 and is 0.1",
    "devices.number was 9 and is 8",
    "reporting.bleu_every was 0 and is 50",
  ):
    assert text in line
  # What is in the directory now is what was trained.
  known = description.read(copy / "model")
  assert known.settings["train_steps"] == 6


def test_a_field_that_was_not_there_yet_had_its_default(original):
  """What an earlier version wrote goes on working when the package grows."""
  now = description.read(original / "model")
  values = json.loads(json.dumps(now.to_json()))
  for name in ("learning_rate", "devices", "reporting"):
    del values[name]
  del values["optimizer"]["arguments"]["weight_decay"]
  for name in ("placement", "attention", "router", "mlp_activations", "remat"):
    del values["network"]["fields"][name]
  del values["settings"]["patience"], values["settings"]["z_loss"]
  stats = values["header"]["splits"]["train"]["en-de"]
  del stats["sample"]
  stats["of_an_earlier_version"] = 5
  old = description.Description.from_json(values)
  description.check_network(old, now.network, "m")
  assert description.differences(old, now) == ([], [])
  none = dataclasses.replace(old, optimizer=None)
  assert description.differences(none, now) == ([], [])
  other = {**now.network["fields"], "placement": "insert"}
  with pytest.raises(ValueError, match="placement was 'replace' and is 'ins"):
    description.check_network(old, {**now.network, "fields": other}, "m")


def test_a_second_writer_is_told_who_the_first_is(copy):
  run = toy.a_run(copy / "model", str(copy / "store"))
  with locking.only_writer(run.model_dir, "the model directory"):
    with pytest.raises(ValueError, match=f"process {os.getpid()} on host .*"):
      train(run)
    assert load(run.model_dir).step == 4  # Readers do not mind.
  # A killed one leaves its note, and no lock.
  assert (copy / "model" / locking.FILE).read_text()
  with locking.only_writer(run.model_dir, "the model directory"):
    pass


def test_a_failed_start_leaves_nothing(tmp_path, original):
  run = toy.a_run(
    tmp_path / "runs" / "new",
    str(original / "store"),
    strategy=sampling.Strategy(heating.constant(1.0), joins={"xx": 5}),
  )
  with pytest.raises(ValueError, match="'xx'"):
    train(run)
  assert not (tmp_path / "runs").exists()


def test_what_killed_writers_left_is_removed(tmp_path):
  with files.atomic(tmp_path / "a" / "b.json") as file:
    file.write(b"{}")
    mine = next((tmp_path / "a").iterdir())
    dead = tmp_path / "a" / ".writing-c.json-x"
    dead.write_text("half")
    files.remove_left_behind(tmp_path)
    assert mine.exists() and not dead.exists()


# ------------------------------------------------------------- tags, data


@pytest.mark.parametrize(
  "prefix, suffix",
  [
    ("<2de> ", ""),
    ("translate English to German: ", ""),
    (">>deu<< ", ""),
    ("__de__ ", ""),
    ("[de_DE]", ""),
    ("<2de> <formal> ", ""),
    ("", " <2de>"),
    ("de_DE ", ""),
    ("", ""),
  ],
)
def test_tags_are_found_in_any_text(prefix, suffix):
  words = [f"{a} {b}" for a in ("the", "no", "one") for b in range(12)]
  found = source_tags.of_texts([f"{prefix}{w}{suffix}" for w in words])
  assert found == source_tags.SourceTag(prefix, suffix)


def test_sources_of_which_some_are_tagged_have_no_tag():
  half = [f"<2de> {i} x" for i in range(30)] + [f"y {i}" for i in range(30)]
  assert source_tags.of_texts(half) is None
  kinds = [f"<2{x}> {i}" for x in ("de", "fr") for i in range(30)]
  assert source_tags.of_texts(kinds) is None


def test_a_tag_is_chosen_by_direction():
  german, french = (source_tags.SourceTag(x) for x in ("de: ", "fr: "))
  tags = {"en-de": german, "en-fr": french, "de-fr": french, "fr-de": None}
  assert trained.choose_tag(tags, "fr") == french
  # What a model wrote is not what anybody translates from, or into.
  synthetic = {
    "en_x_bt-fr": source_tags.SourceTag("<2fr> <bt> "),
    "en-fr_x_kd": french,
  }
  assert trained.choose_tag({**tags, **synthetic}, "fr") == french
  taught = {"en-fr_x_kd": french}
  assert trained.choose_tag(taught, "fr") == french
  assert trained.choose_tag(tags, "de", "en") == german
  for to, source, text in (
    ("xx", None, "it knows de, fr"),
    ("fr", "xx", "not trained to translate from xx into it, but from de, en"),
    ("de", None, "sources of fr-de were not all tagged alike"),
  ):
    with pytest.raises(trained.UnknownTagError, match=text):
      trained.choose_tag(tags, to, source)
  tags = {"en-de": german, "fr-de": french}
  with pytest.raises(trained.NoSourceError, match="say which it is: en, fr"):
    trained.choose_tag(tags, "de")


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner).map(tuple)
    | st.dictionaries(st.text() | st.integers(), inner)
  ),
  max_leaves=8,
)


@given(JSON)
def test_plain_data_comes_back(value):
  plain = plain_data.to_plain(value)
  again = json.loads(json.dumps(plain))
  assert repr(plain_data.from_plain(again)) == repr(value)


def test_a_description_makes_dataclasses_of_known_modules_only():
  router = routing.TopKRouter(2, 1.5)
  plain = plain_data.to_plain(router)
  assert plain_data.from_plain(plain) == router
  run = toy.a_run("x", None)
  for kind, text in (
    ("subprocess.Popen", "name it with --module subprocess"),
    ("os.system", "name it with --module os"),
    ("basemt_jax.files.write_atomically", "is not a dataclass"),
    ("basemt_jax.files.os.system", "there is no|is not"),
    ("basemt_jax.nothing.Here", "there is no"),
  ):
    with pytest.raises(ValueError, match=text):
      plain_data.from_plain({"class": kind, "fields": {}})
  assert plain_data.to_plain(run.mesh)["class"] == "other"
  with pytest.raises(ValueError, match="cannot be made again"):
    plain_data.from_plain(plain_data.to_plain(run.mesh))


def test_scores_that_are_not_finite_are_an_error_not_fewer_lines(original):
  model = load(original / "model")
  bad = dataclasses.replace(
    model, variables=jax.tree.map(lambda x: x * np.nan, model.variables)
  )
  search = dataclasses.replace(
    model.run.search, batch_size=2, max_target_length=4
  )
  with pytest.raises(ValueError, match="scores are not finite"):
    evaluation.translate_texts(
      bad.translator(search), bad.pieces, ["no 1", "no 2"], bad.tag("de")
    )
