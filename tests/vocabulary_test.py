"""Vocabularies: equality with SeqIO's, round trips, training."""

import pickle
import subprocess
import sys
import unicodedata

import hypothesis
import pytest
import sentencepiece
import seqio
from hypothesis import strategies as st

from basemt_jax.data import vocabulary
from basemt_jax.data.vocabulary import Vocabulary
from tasks import cldr, common

TEXTS = [
  "<2de> Thursday, March 4, 2021",
  "x <2de> y<2de>",
  " two  spaces\tand\u00a0more ",
  "日本語 हिन्दी العربية",
  "\U0001f600 out of the vocabulary \u1234",
  "",
]


@pytest.fixture(scope="module")
def model():
  return Vocabulary.load(cldr.MODEL_PATH)


@pytest.mark.parametrize("source", [cldr.MODEL_PATH, "bytes"])
def test_ids_and_texts_are_seqios(source):
  ours = Vocabulary.load(source)
  theirs = ours.seqio()
  assert ours.vocab_size == len(ours) == theirs.vocab_size
  special = (theirs.pad_id, theirs.eos_id, theirs.unk_id)
  assert (ours.pad_id, ours.eos_id, ours.unk_id) == special
  phrases = [side for pair in cldr.pairs("hi", "test")[:20] for side in pair]
  for text in TEXTS + phrases:
    ids = ours.encode(text)
    assert ids == list(theirs.encode(text))
    assert ids == theirs.encode_tf(text).numpy().tolist()
    padded = [*ids, 1, 0, 0]
    assert ours.decode(padded) == theirs.decode(padded)
  assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


@pytest.mark.parametrize("source", [cldr.MODEL_PATH, "bytes"])
def test_from_seqio_is_the_same_vocabulary(source):
  ours = Vocabulary.load(source)
  assert Vocabulary.from_seqio(ours.seqio()) == ours
  copied = pickle.loads(pickle.dumps(ours))
  assert copied == ours and hash(copied) == hash(ours)
  assert copied.encode("a 1") == ours.encode("a 1")
  assert Vocabulary.load("bytes") != Vocabulary.load(cldr.MODEL_PATH)


def test_tasks_of_users_find_it_at_the_front():
  import basemt_jax

  assert basemt_jax.vocabulary is vocabulary
  with pytest.raises(AttributeError, match="has no attribute 'vocab'"):
    basemt_jax.vocab  # noqa: B018


def test_byte_vocabulary_with_extra_ids():
  ours = Vocabulary.from_seqio(seqio.ByteVocabulary(extra_ids=10))
  assert ours.vocab_size == 269 and ours.seqio().extra_ids == 10
  assert ours.decode([100, 265]) == ours.seqio().decode([100, 265]) == "a"


def test_other_seqio_vocabularies_are_refused():
  with pytest.raises(ValueError, match="PassThroughVocabulary is neither"):
    Vocabulary.from_seqio(seqio.PassThroughVocabulary(5))


def test_decode_stops_at_eos_and_takes_any_id(model):
  ids = model.encode("4 March")
  assert model.decode([0, *ids, 0, 1, *ids]) == "4 March"
  assert model.decode([*ids, model.vocab_size + 5]) == model.decode([*ids, 2])
  assert Vocabulary.load("bytes").decode([68, 258, 2, 999]) == "A"


CHARACTERS = st.characters(
  exclude_categories=["Cs"], exclude_characters="\u2581\0"
)


@hypothesis.given(st.text(CHARACTERS))
@hypothesis.settings(deadline=None, max_examples=200)
def test_only_spaces_are_lost(text):
  vocab = Vocabulary.load(cldr.MODEL_PATH)
  text = unicodedata.normalize("NFC", text)
  spaces = {ord(space): " " for space in vocabulary._SPACES}
  plain = " ".join(part for part in text.translate(spaces).split(" ") if part)
  assert vocab.decode(vocab.encode(text)) == plain
  assert Vocabulary().decode(Vocabulary().encode(text)) == text


def test_pieces_for_tables(model):
  assert [model.piece(i) for i in (0, 1, 2)] == ["<pad>", "</s>", "<unk>"]
  tag, *digits = [model.piece(i) for i in model.encode("<2de> 47")]
  assert tag == "\u2581<2de>" and digits == ["\u2581", "4", "7"]
  assert [Vocabulary().piece(i) for i in (1, 68, 3)] == ["</s>", "A", "<0x00>"]


def test_training_is_deterministic_and_keeps_tags_whole(tmp_path):
  texts = [side for pair in cldr.pairs("sw", "train") for side in pair]
  for name in ("a", "b"):
    trained = vocabulary.train_sentencepiece(
      iter(texts), tmp_path / name, 400, tags=["<2sw>", "<2en>"]
    )
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  assert trained.vocab_size <= 400
  assert len(trained.encode("<2sw>")) == 1
  assert trained.decode(trained.encode("ça 日本 2021")) == "ça 日本 2021"
  assert str(tmp_path).encode() not in (tmp_path / "a").read_bytes()


def test_few_texts_give_a_small_vocabulary(tmp_path):
  trained = vocabulary.train_sentencepiece(["a b", "b a"], tmp_path / "m", 8000)
  assert 259 < trained.vocab_size < 300


def test_training_errors(tmp_path):
  with pytest.raises(ValueError, match=r"vocab_size is 250.*take 259"):
    vocabulary.train_sentencepiece(["a"], tmp_path / "m", 250)
  with pytest.raises(ValueError, match="no texts"):
    vocabulary.train_sentencepiece(["", " "], tmp_path / "m", 300)


def test_loading_errors(tmp_path):
  with pytest.raises(ValueError, match=r"no vocabulary file .*none\.model"):
    Vocabulary.load(tmp_path / "none.model")
  (tmp_path / "bad.model").write_bytes(b"not a model")
  with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece"):
    Vocabulary.load(tmp_path / "bad.model")
  with open(tmp_path / "ids.model", "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["a b c"] * 9),
      model_writer=file,
      vocab_size=8,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  with pytest.raises(ValueError, match=r"ids\.model has pad.*\(-1, 2, 0\)"):
    Vocabulary.load(tmp_path / "ids.model")
  with pytest.raises(ValueError, match="no file"):
    Vocabulary().save(tmp_path / "x")


def _task(name, count, **kwargs):
  """An unregistered task of `count` pairs."""

  def read(split):
    return ((f"{name} {i}", f"{name.upper()} {i}") for i in range(count))

  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  return seqio.Task(
    f"made.en_{name}",
    source=common.PairSource(read, {"train": count}),
    output_features={"inputs": feature, "targets": feature},
    **kwargs,
  )


def _tagged(dataset):
  return dataset.map(lambda x: {**x, "inputs": "<2xx> " + x["inputs"]})


TOKENIZE = [_tagged, seqio.preprocessors.tokenize]


@pytest.mark.parametrize("temperature, shares", [(1, (60, 6)), (1e9, (60, 60))])
def test_sampled_examples_follow_the_temperature(temperature, shares):
  tasks = [
    _task("aa", 60, preprocessors=TOKENIZE),
    _task("bb", 6, preprocessors=TOKENIZE),
  ]
  mixture = seqio.Mixture("made", [(task, 1) for task in tasks])
  drawn = list(vocabulary.sampled_examples(mixture, temperature, 10**9))
  for name, share in zip(("aa", "bb"), shares, strict=True):
    mine = [pair for pair in drawn if pair[0].startswith(f"<2xx> {name}")]
    assert len(mine) == share
  assert set(drawn) >= {("<2xx> bb 5", "BB 5"), ("<2xx> aa 59", "AA 59")}
  fewer = list(vocabulary.sampled_examples(mixture, temperature, 22))
  assert len(fewer) == 22 and len(set(fewer)) >= 17  # Spread, not the start.


def test_raw_pairs_of_tasks_that_tokenise_in_their_own_way():
  def own(dataset, output_features):
    return seqio.preprocessors.tokenize(dataset, output_features, False)

  assert list(vocabulary.raw_pairs(_task("aa", 3, preprocessors=[own]))) == [
    (f"aa {i}", f"AA {i}") for i in range(3)
  ]


def test_train_from_mixture_finds_the_tags(tmp_path):
  tasks = [seqio.TaskRegistry.get(f"cldr.{d}") for d in ("en_ja", "sw_en")]
  mixture = seqio.Mixture("some", [(task, 1) for task in tasks])
  trained = vocabulary.train_from_mixture(mixture, tmp_path / "m", 500)
  for tag, known in (("<2ja>", True), ("<2en>", True), ("<2sw>", False)):
    assert (len(trained.encode(tag)) == 1) is known


def test_no_tensorflow_is_imported():
  code = (
    "import sys; from basemt_jax.data import vocabulary;"
    f"v = vocabulary.Vocabulary.load({str(cldr.MODEL_PATH)!r});"
    "v.decode(v.encode('a'));"
    "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 'jax')))"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
