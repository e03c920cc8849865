"""Test sets of any kind, read for the directions of a model."""

import gzip

import pytest

from basemt_jax.corpora import test_sets

PAIRS = [(f"source {i}", f"Ziel {i}") for i in range(4)]
KNOWN = ("en-de", "de-en", "en-pt_BR", "de_x_bt-en")


def write(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(f"{line}\n" for line in lines)
  if path.suffix == ".gz":
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text, encoding="utf-8")


def write_moses(folder, first, second):
  for name, side in ((first, 0), (second, 1)):
    write(folder / name, [pair[side] for pair in PAIRS])


def sgm(pairs, side):
  return [f"<seg id='{i}'>{pair[side]}</seg>" for i, pair in enumerate(pairs)]


def tsv(pairs=PAIRS):
  return ["\t".join(pair) for pair in pairs]


BACK = [pair[::-1] for pair in PAIRS]
BOTH = {"en-de": PAIRS, "de-en": BACK}


def test_sets_are_known_by_what_their_files_names_have_in_common(tmp_path):
  folder = tmp_path / "mine"
  write(folder / "en-de.test.tsv.gz", tsv())
  write(folder / "en-de.dev.tsv", tsv(PAIRS[:1]))
  write(folder / "en-fr.test.tsv", tsv())  # Not the model's.
  write_moses(folder, "newstest2019-src.eng.txt", "newstest2019-ref.deu.txt")
  for name, side in (("src.en", 0), ("ref.de", 1)):
    write(folder / f"newstest2014-ende-{name}.sgm", sgm(PAIRS, side))
  write_moses(
    folder / "flores" / "devtest", "eng_Latn.devtest", "por_Latn.devtest"
  )
  write_moses(folder / "ted", "tst2015.en-de.en", "tst2015.en-de.de")
  assert test_sets.find([str(folder)], KNOWN, "test") == {
    "mine-test": BOTH,
    "newstest2019": BOTH,
    "newstest2014": {"en-de": PAIRS},  # It is of one direction.
    "flores-devtest": {"en-pt_BR": PAIRS},
    "tst2015": BOTH,
  }
  assert test_sets.find([str(folder)], KNOWN, "validation") == {
    "mine-dev": {"en-de": PAIRS[:1], "de-en": BACK[:1]}
  }


def test_files_are_test_sets_whatever_their_names_say(tmp_path, monkeypatch):
  write(tmp_path / "talks.en-de.tsv", tsv())
  write_moses(tmp_path / "en-de", "bible.en", "bible.de")
  write(tmp_path / "talks.en-pt_BR.tsv", tsv())
  monkeypatch.chdir(tmp_path)
  files = ["talks.en-de.tsv", "en-de/bible.en", "en-de/bible.de"]
  found = test_sets.find(files, KNOWN, "test")
  assert found == {"talks": BOTH, "bible": BOTH}


@pytest.mark.parametrize(
  "names, lines, text",
  [
    ([], [], "no test set of the model's languages, which are of de-en, en-de"),
    (["en-de.test.tsv"], ["one side"], r"en-de.test.tsv:1: no tab"),
    (["en-de.test.tsv"], ["a\t"], r"en-de.test.tsv:1: empty side, in a test"),
    (["en-de.test.tsv"], [], "en-de.test.tsv is empty"),
    (["en-de.test.tsv", "en_de.test.jsonl"], ['{"en": "a", "de": "b"}'], "no"),
    (["x.en-de.test.tsv", "x.de-en.test.tsv"], ["a\tb"], "both the set"),
  ],
)
def test_what_cannot_be_scored_is_refused(tmp_path, names, lines, text):
  for name in names:
    write(tmp_path / name, lines)
  with pytest.raises(ValueError, match=text):
    test_sets.find([str(tmp_path)], KNOWN, "test")
  with pytest.raises(ValueError, match="there is no file or folder"):
    test_sets.find([str(tmp_path / "none")], KNOWN, "test")
