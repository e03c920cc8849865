"""Stores of SeqIO's tasks: what they hold, and when they are built again."""

import numpy as np
import pytest
import seqio
import toy_corpus

from basemt_jax.data import row_store, store_building, subword_sampling

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def corpus():
  return toy_corpus.register("corpus")


def test_store_has_what_the_tasks_have(corpus, tmp_path):
  store = store_building.build_store("corpus", toy_corpus.LENGTHS, tmp_path)
  assert store.directions == ("en-af", "en-de", "en-fr")
  assert store.pairs("train").tolist() == [9, 400, 120]
  assert store.pairs("validation").tolist() == [1, 40, 12]
  assert store.vocabulary == "bytes" and store.vocab_size == 259
  assert store.lengths == toy_corpus.LENGTHS
  texts = store.texts("test", "en-fr")
  assert texts[3] == {
    "source": f"20003 {toy_corpus.text(20003)}",
    "target": f"20003 {toy_corpus.text(20004)}",
    "tagged_source": f"<2xx> 20003 {toy_corpus.text(20003)}",
  }
  assert store.texts("train", "en-fr") == []


@pytest.mark.parametrize("change", toy_corpus.CHANGES)
def test_what_names_and_stamps_do_not_tell_is_noticed(change, tmp_path, caplog):
  """Another preprocessor, or other data of the same name and number."""

  def registered(extra):
    seqio.TaskRegistry.remove("corpus.en_de")
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    return seqio.TaskRegistry.add(
      "corpus.en_de",
      source=toy_corpus.source(toy_corpus.SIZES["en_de"]),
      preprocessors=[*extra, seqio.preprocessors.tokenize, toy_corpus.EOS],
      output_features={"inputs": feature, "targets": feature},
    )

  before = store_building.ensure_store(
    registered([]), toy_corpus.LENGTHS, tmp_path
  )
  rows = toy_corpus.files(before.directory)
  header = before.directory / row_store.HEADER
  made = header.stat().st_mtime_ns
  same = store_building.ensure_store(
    registered([toy_corpus.same]), toy_corpus.LENGTHS, tmp_path
  )
  assert header.stat().st_mtime_ns == made and not caplog.text
  after = store_building.ensure_store(
    registered([change]), toy_corpus.LENGTHS, tmp_path
  )
  assert same.directory == before.directory == after.directory
  assert "it is packed again" in caplog.text
  found = toy_corpus.files(after.directory)
  assert found.keys() == rows.keys()
  assert found["train/en-de.rows"] != rows["train/en-de.rows"]


def test_segmentations_of_ids_that_are_not_of_texts_are_refused(tmp_path):
  toy_corpus.register(
    "corpus",
    seqio.SentencePieceVocabulary(str(toy_corpus.MODEL)),
    [toy_corpus.same],
  )
  with pytest.raises(
    ValueError, match=r"task 'corpus\.en_\w+', which does more"
  ):
    store_building.build_store(
      "corpus",
      toy_corpus.LENGTHS,
      tmp_path,
      subwords=subword_sampling.SubwordSampling(0.2),
    )
  assert not list(tmp_path.iterdir())


def test_segmentations_are_drawn_of_seqio_s_tasks(tmp_path):
  vocabulary = seqio.SentencePieceVocabulary(str(toy_corpus.MODEL))
  toy_corpus.register("corpus", vocabulary)
  store = store_building.build_store(
    "corpus",
    toy_corpus.LENGTHS,
    tmp_path,
    subwords=subword_sampling.SubwordSampling(0.3, 2),
  )
  usual, drawn = (
    store.read_mixed("train", np.array([2]), np.array([0]), version)
    for version in (0, 1)
  )
  assert store.directions[2] == "en-fr"
  texts = []
  for batch in (usual, drawn):
    first = batch["encoder_segment_ids"][0] == 1
    ids = batch["encoder_input_tokens"][0][first].tolist()
    texts.append(vocabulary.decode(ids))
    tag = vocabulary.encode("<2xx>")
    assert ids[: len(tag)] == tag and ids[-1] == vocabulary.eos_id
  assert all(text.startswith("<2xx> ") for text in texts)
  known = {
    f"<2xx> {i} {toy_corpus.text(i)}" for i in range(toy_corpus.SIZES["en_fr"])
  }
  assert known.issuperset(texts)


def test_a_finished_store_needs_no_lock(corpus, tmp_path, monkeypatch):
  store_building.build_store("corpus", toy_corpus.LENGTHS, tmp_path)

  def refuse(*_):
    raise OSError("read-only")

  monkeypatch.setattr(store_building.files, "locked", refuse)
  assert store_building.build_store(
    "corpus", toy_corpus.LENGTHS, tmp_path, verify=True
  )


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_interrupted_build_goes_on(corpus, tmp_path, calls):
  store_building.build_store("corpus", toy_corpus.LENGTHS, tmp_path / "whole")
  done = []

  def interrupt(*progress):
    done.append(progress)
    if len(done) == calls:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    store_building.build_store(
      "corpus", toy_corpus.LENGTHS, tmp_path / "parts", progress=interrupt
    )
  with pytest.raises(ValueError, match="not finished"):
    row_store.RowStore(tmp_path / "parts")
  again = []
  store_building.build_store(
    "corpus",
    toy_corpus.LENGTHS,
    tmp_path / "parts",
    progress=lambda *p: again.append(p),
  )
  # Finished directions are not read again.
  assert {p[:2] for p in done[:-1]}.isdisjoint(p[:2] for p in again)
  everything = "**/*"
  whole = {p: p for p in (tmp_path / "whole").glob(everything) if p.is_file()}
  # store.json, .lock; rows and record of every direction; texts of two splits.
  assert len(whole) == 2 + 2 * 3 * 3 + 2 * 3
  for path in whole:
    other = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
    assert path.read_bytes() == other.read_bytes(), path.name


def test_progress_tells_split_direction_and_numbers(corpus, tmp_path):
  seen = []
  store_building.build_store(
    "corpus", toy_corpus.LENGTHS, tmp_path, progress=lambda *p: seen.append(p)
  )
  assert seen[:2] == [("train", "en-af", 9, 9), ("train", "en-de", 400, 400)]
  assert len(seen) == 9


def test_finished_store_is_opened_and_a_stale_one_refused(corpus, tmp_path):
  store_building.build_store("corpus", toy_corpus.LENGTHS, tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.rows")}
  store_building.build_store("corpus", toy_corpus.LENGTHS, tmp_path)
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.rows")}
  other = {"inputs": 32, "targets": 32}
  with pytest.raises(ValueError, match=r"something else \(other feature leng"):
    store_building.build_store("corpus", other, tmp_path)
  assert row_store.RowStore(tmp_path).lengths == toy_corpus.LENGTHS


def test_changed_files_get_a_store_of_their_own(tmp_path):
  data = tmp_path / "data.tsv"
  data.write_text("one\teins\ntwo\tzwei\n")
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  task = seqio.TaskRegistry.add(
    "lines.en_de",
    source=seqio.TextLineDataSource({"train": str(data)}),
    preprocessors=[
      toy_corpus.split_tabs,
      seqio.preprocessors.tokenize,
      toy_corpus.EOS,
    ],
    output_features={"inputs": feature, "targets": feature},
  )
  cache = tmp_path / "cache"
  first = store_building.ensure_store(task, toy_corpus.LENGTHS, cache)
  assert first.splits == ("train", "validation", "test")
  assert first.pairs("validation").tolist() == [0]
  again = store_building.ensure_store("lines.en_de", toy_corpus.LENGTHS, cache)
  assert again.directory == first.directory
  data.write_text("one\teins\ntwo\tzwei\nthree\tdrei\n")
  second = store_building.ensure_store(task, toy_corpus.LENGTHS, cache)
  assert second.directory != first.directory
  assert second.pairs("train").tolist() == [3]


def test_a_source_can_tell_its_fingerprint(corpus):
  before = store_building.fingerprint(corpus, toy_corpus.LENGTHS)
  seqio.TaskRegistry.get("corpus.en_fr").source.fingerprint = "two"
  after = store_building.fingerprint(corpus, toy_corpus.LENGTHS)
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {"source files"}


def test_several_vocabularies_are_refused(corpus, tmp_path):
  toy_corpus.register(
    "pieces", seqio.SentencePieceVocabulary(str(toy_corpus.MODEL))
  )
  both = seqio.Mixture("both", [("corpus.en_de", 1), ("pieces.en_fr", 1)])
  with pytest.raises(ValueError, match=r"'pieces.en_fr' has a vocabulary of i"):
    store_building.build_store(both, toy_corpus.LENGTHS, tmp_path)
