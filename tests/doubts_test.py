"""What is told about data before training starts."""

import pytest
import sentencepiece

from basemt_jax.data import doubts, store_building
from tasks import files


@pytest.fixture
def told(tmp_path):
  """A function: files of a folder to what is told about them."""

  def tell(contents, lengths, pieces="bytes"):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in contents.items():
      (folder / name).write_text(text, encoding="utf-8")
    mixture = files.mixture(folder, pieces, name=f"files.{tmp_path.name}")
    store = store_building.build_store(mixture, lengths, tmp_path / "store")
    return doubts.of_data(mixture, store)

  return tell


def test_nothing_is_said_of_good_data(told):
  good = "Hello\tHallo\n" * 3
  # What a model wrote has no dev set to miss.
  names = ("en-de.train.tsv", "en-de.dev.tsv", "en_x_bt-de.train.tsv")
  texts = dict.fromkeys(names, good)
  assert told(texts, {"inputs": 32, "targets": 32}) == []


def test_everything_odd_is_said_once(told):
  found = told(
    {
      "en-cn.train.tsv": "Hello\tlong enough to be cut\n" * 2 + "bad\nHi\tHi\n",
      "en-cn.eval.tsv": "Hi\tHi\n",
    },
    {"inputs": 16, "targets": 8},
  )
  assert len(found) == 5
  skipped, ignored, code, dev, cut = found
  assert "1 of 4 lines skipped: 1 no tab instead of one; the first: " in skipped
  assert "en-cn.train.tsv:3: no tab" in skipped
  assert "not used" in ignored and ignored.endswith(": en-cn.eval.tsv")
  assert code.startswith("'cn' is not a language code; it is taken for 'zh'")
  assert dev == "no dev set: cn-en, en-cn"
  assert cut.startswith("67% of the training pairs are longer than the 16 and")
  assert cut.endswith("lose their ends: cn-en 67%, en-cn 67%")


def test_targets_that_the_vocabulary_alters(told, tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([f"some words and {i} more" for i in range(40)]),
    model_prefix=str(tmp_path / "own"),
    vocab_size=30,
    hard_vocab_limit=False,
    **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
  )
  assert told(
    {
      "en-de.train.tsv": "some\tmore\n",
      "en-de.dev.tsv": "some more\tm\u00e4hr\nwords\twords\n",
    },
    {"inputs": 64, "targets": 64},
    tmp_path / "own.model",
  ) == [
    "the vocabulary cannot give back targets as they are (its characters are "
    "others): en-de 50%"
  ]


def test_long_pairs_have_a_store_of_their_own(tmp_path):
  folder = tmp_path / "text"
  folder.mkdir()
  texts = "Hello\tlong enough to be cut\n" * 2 + "Hi\tHi\n"
  for split in ("train", "dev"):
    (folder / f"en-de.{split}.tsv").write_text(texts)
  mixture = files.mixture(folder, name=f"files.{tmp_path.name}")
  lengths = {"inputs": 16, "targets": 8}
  cut, dropped = (
    store_building.ensure_store(
      mixture, lengths, tmp_path / "cache", long_pairs=long_pairs
    )
    for long_pairs in ("cut", "drop")
  )
  assert cut.directory != dropped.directory
  stats = [s.stats("train", "en-de") for s in (cut, dropped)]
  assert [(s.pairs, s.truncated, s.dropped) for s in stats] == [
    (3, 2, 0),
    (1, 0, 2),
  ]
  # Dev sets are whole whatever is done with training pairs.
  assert len(dropped.texts("validation", "en-de")) == 3
  assert dropped.stats("validation", "en-de").pairs == 3
  with pytest.raises(ValueError, match=r"2 of 3 pairs \(66.7%\) are longer"):
    store_building.ensure_store(
      mixture, lengths, tmp_path / "cache", long_pairs="refuse"
    )
