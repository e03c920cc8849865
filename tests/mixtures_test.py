"""Mixtures by name: directions, splits, and what cannot be told."""

import pathlib

import pytest
import seqio
import toy_corpus

from basemt_jax.data import mixtures, store_building

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def corpus():
  return toy_corpus.register("corpus")


def test_a_task_that_tells_no_languages_is_refused(corpus):
  toy_corpus.register("other", sizes={"pt_br_en": 5})
  tasks = mixtures.tasks_by_direction("other")
  assert [str(name) for name in tasks] == ["pt_BR-en"]
  toy_corpus.register("third", sizes={"en_fr_ca": 5})
  with pytest.raises(ValueError, match=r"'third.en_fr_ca': direction .* could"):
    mixtures.tasks_by_direction("third")
  assert mixtures.direction_or_name("wmt_t2t_ende") == "wmt_t2t_ende"


def test_unknown_mixture_is_named_with_its_neighbours(corpus):
  with pytest.raises(ValueError, match=r"'corpuss' is registered \(did you me"):
    store_building.build_store("corpuss", toy_corpus.LENGTHS, "nowhere")


def test_two_tasks_of_one_direction_are_refused(corpus):
  toy_corpus.register("other", sizes={"en_de": 5})
  both = seqio.Mixture("both", [("corpus.en_de", 1), ("other.en_de", 1)])
  with pytest.raises(ValueError, match=r"'corpus.en_de' and 'other.en_de' bot"):
    mixtures.tasks_by_direction(both)


def test_dev_is_read_as_validation(tmp_path):
  files = {}
  for split in ("train", "dev"):
    files[split] = str(tmp_path / split)
    pathlib.Path(files[split]).write_text("one\teins\n", encoding="utf-8")
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  task = seqio.Task(
    "lines.en_de",
    source=seqio.TextLineDataSource(files),
    preprocessors=[
      toy_corpus.split_tabs,
      seqio.preprocessors.tokenize,
      toy_corpus.EOS,
    ],
    output_features={"inputs": feature, "targets": feature},
  )
  store = store_building.build_store(
    task, toy_corpus.LENGTHS, tmp_path / "store"
  )
  assert store.pairs("validation").tolist() == [1]
  assert store.texts("validation", "en-de")[0]["target"] == "eins"
  assert store.pairs("test").tolist() == [0]
