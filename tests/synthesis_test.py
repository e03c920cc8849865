"""Back-translation and distillation: the same bytes, whatever happens."""

import dataclasses
import json

import pytest
import toy

from basemt_jax import run as run_lib
from basemt_jax import synthesis, trained, training, translation
from basemt_jax.data import languages, normalisation, source_tags

SEARCH = translation.SearchOptions(
  batch_size=2, max_source_length=32, max_target_length=8, smallest_bucket=8
)
TEXTS = [
  (("no " + "12 " * (i % 6) + f"{i}").strip() if i % 9 else "", f"NO {i}")
  for i in range(70)
] + [("a sentence of far too many letters for this model", "")]


@dataclasses.dataclass(frozen=True)
class OnDevices(run_lib.Run):
  """A run on the first so many of the simulated devices."""

  devices: int = 1

  def mesh(self):
    return toy.mesh(data=self.devices)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """Of a sparse model that has learnt which letters there are."""
  directory = tmp_path_factory.mktemp("synthesis")
  store = toy.write_store(directory / "store")
  settings = toy.settings(60, log_every=60, eval_every=60, save_every=60)
  run = toy.a_run(directory / "model", store, toy.SPARSE, settings=settings)
  assert training.train(run, toy.Writer(), run_lib.SILENT) == "done"
  return directory / "model"


def load(directory, devices=1):
  run = run_lib.described(directory)
  values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
  return trained.load(OnDevices(**values, devices=devices))


@pytest.fixture(scope="module")
def model(directory):
  return load(directory)


def a_job(folder, texts=TEXTS, direction="de_x_bt-en", **changes):
  parsed = languages.Direction.parse(direction)
  job = synthesis.Job(
    folder / f"{direction}.train.tsv",
    parsed,
    source_tags.SourceTag("<2de> "),
    lambda: iter(texts),
    len(texts),
    "some text",
  )
  return dataclasses.replace(job, **changes)


def write(job, model, search=SEARCH, told=lambda progress: None):
  (done,) = synthesis.write([job], model, search, told)
  return done, job.path.read_bytes()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
  """What is written without an interruption, on one device."""
  done, data = write(a_job(tmp_path_factory.mktemp("plain")), model)
  assert done.done == 71 and done.skipped >= 9
  return data


def test_every_usable_text_stands_beside_its_translation(model, written):
  # All at once, by the plain translator.
  texts = [text for text, _ in TEXTS if 0 < len(text) < 25]
  ids = [model.pieces.encode(f"<2de> {text}") for text in texts]
  found = [
    normalisation.normalise(model.pieces.decode(nbest[0].ids))
    for nbest in model.translator(SEARCH).translate(ids)
  ]
  expected = [pair for pair in zip(found, texts, strict=True) if pair[0]]
  assert len(expected) > 30
  lines = written.decode().splitlines()
  assert [tuple(line.split("\t")) for line in lines] == expected


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_do_not_show(directory, written, tmp_path, devices):
  assert write(a_job(tmp_path), load(directory, devices))[1] == written


@pytest.mark.parametrize("devices", [1, 4])
def test_sampling_is_the_same_again(directory, model, tmp_path, devices):
  search = dataclasses.replace(
    SEARCH, sampling=translation.decoding.Sampling(temperature=2.0, seed=3)
  )
  one = write(a_job(tmp_path / "one"), model, search)[1]
  other = load(directory, devices)
  assert write(a_job(tmp_path / "other"), other, search)[1] == one


class KilledError(Exception):
  """In place of a signal that nobody can catch."""


def test_whoever_is_killed_goes_on_where_a_chunk_ended(
  model, written, tmp_path
):
  job = a_job(tmp_path)

  def kill(progress):
    raise KilledError

  starts = 0
  while not job.path.exists():
    starts += 1
    told = kill if starts < 3 else lambda progress: None
    try:
      write(job, model, told=told)
    except KilledError:
      assert not job.path.exists()
      # What was written after the last note, whole or not.
      with (tmp_path / f".{job.path.name}.partial").open("ab") as file:
        file.write(b"half a li")
  assert starts == 3
  assert job.path.read_bytes() == written
  # Once more: nothing is left to do.
  assert write(job, model, told=kill)[1] == written
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {job.path.name, f".{job.path.name}.json"}


def test_a_kill_before_the_last_rename_loses_nothing(model, written, tmp_path):
  job = a_job(tmp_path)
  write(job, model)
  job.path.rename(tmp_path / f".{job.path.name}.partial")
  assert write(job, model)[1] == written


def test_what_is_there_of_something_else_is_not_touched(model, tmp_path):
  job = a_job(tmp_path, TEXTS[:3])
  job.path.write_text("mine\n")
  with pytest.raises(ValueError, match="was not written by this command"):
    write(job, model)
  job.path.unlink()
  write(job, model)
  other = dataclasses.replace(SEARCH, beam_size=2)
  with pytest.raises(ValueError, match=r"with other settings \(search\)"):
    write(job, model, other)
  job.path.write_text("cut")
  with pytest.raises(ValueError, match="is not as it was written"):
    write(job, model)
  note = tmp_path / f".{job.path.name}.json"
  note.write_text(note.read_text()[:30])
  with pytest.raises(ValueError, match=r"json is damaged"):
    write(job, model)


def test_distilled_pairs_keep_the_order_of_the_name(model, tmp_path):
  search = dataclasses.replace(SEARCH, beam_size=3, num_return=3)
  job = a_job(tmp_path, TEXTS[1:4], "en-de_x_kd", closest=True)
  pairs = [
    line.split("\t")
    for line in write(job, model, search)[1].decode().splitlines()
  ]
  assert [source for source, _ in pairs] == [text for text, _ in TEXTS[1:4]]
  ids = [model.pieces.encode(job.tag(text)) for text, _ in TEXTS[1:4]]
  nbest = model.translator(search).translate(ids)
  for (_, target), hypotheses in zip(pairs, nbest, strict=True):
    assert target in [
      normalisation.normalise(model.pieces.decode(h.ids)) for h in hypotheses
    ]
  note = json.loads((tmp_path / f".{job.path.name}.json").read_text())
  assert note["whole"] and note["lines"] == 3
