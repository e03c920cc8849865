"""What becomes of raw text: training, dev or test set, held out, or a doubt."""

import shutil
import unicodedata

import pytest
import toy_raw
from raw_text_test import files, sgm

from basemt_jax import cli
from basemt_jax.corpora import preparation, raw_text

# Ordinary words whose letters have more than one form.
FORMS = {
  "vi": ["Tiếng Việt bạn học", "mưa nắng sữa phố"],
  "bn": ["আমি বাড়ি যাই না।", "সে সময় পায় না।"],
  "ko": ["안녕하세요 여러분", "한국어 문장"],
  "hi": ["ज़रूर पढ़ना", "फल और फूल"],
  "el": ["Άνθρωπος και θάλασσα", "ῥέω ᾳ"],
}


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("language", FORMS)
def test_held_out_text_leaves_in_every_form(tmp_path, language, form):
  held_out = FORMS[language]
  in_form = [unicodedata.normalize(form, text) for text in held_out]
  table = "".join(f"train {i}\t{text}\n" for i, text in enumerate(in_form))
  raw = files(
    tmp_path / "raw",
    {
      f"web.en-{language}.tsv": table.encode() + b"kept\tkept\n",
      f"test.en-{language}.tsv": "".join(
        f"test {i}\t{text}\n" for i, text in enumerate(held_out)
      ).encode(),
    },
  )
  names = raw_text.Names((("en", language),))
  preparation.prepare(raw, tmp_path / "out", names, processes=0)
  assert toy_raw.train_pairs(tmp_path / "out", f"en-{language}") == [
    [("kept", "kept")]
  ]
  tests = (tmp_path / "out" / f"en-{language}.test.tsv").read_text()
  assert [line.split("\t")[1] for line in tests.splitlines()] == [
    unicodedata.normalize("NFC", text) for text in held_out
  ]


def test_sets_that_are_not_used_stay_out_of_training(tmp_path):
  """Second test sets, and one side whose other one is not there."""
  sets = ["newstest2013", "newstest2014", "flores200.devtest", "wmttest2022"]
  contents = {
    "web.en-de.tsv": "".join(
      f"{name} en\tanders {i}\nother {i}\t{name} de\n"
      for i, name in enumerate([*sets, "newsdev2019", "kept"])
    ).encode()
  }
  for name in sets:
    contents[f"{name}.en-de.en"] = f"{name.upper()}, EN!\n".encode()
    contents[f"{name}.en-de.de"] = f"{name} de\n".encode()
  contents["newsdev2019-ende-ref.de.sgm"] = sgm(["newsdev2019 de"])
  raw = files(tmp_path / "raw", contents)
  names = raw_text.Names((("en", "de"),))
  report = preparation.prepare(raw, tmp_path / "out", names, processes=0)
  found = {
    x
    for pair in toy_raw.train_pairs(tmp_path / "out", "en-de")[0]
    for x in pair
  }
  left = {"anders 5", "kept en", "other 5", "kept de"}
  assert found == left | {"newsdev2019 en", "anders 4"}
  assert len(report["held_out"]) == 4
  assert report["evaluation"]["en-de.test.tsv"]["made_of"].startswith("flores")
  # Asked for by name, another is the test set.
  names = raw_text.Names((("en", "de"),), decided={"test": ("newstest2014*",)})
  report = preparation.prepare(raw, tmp_path / "2", names, processes=0)
  assert {
    x for p in toy_raw.train_pairs(tmp_path / "2", "en-de")[0] for x in p
  } == found
  made_of = report["evaluation"]["en-de.test.tsv"]["made_of"]
  assert made_of.startswith("newstest2014")


@pytest.mark.parametrize("flag", ["train", "dev", "test", "held_out"])
def test_doubts_are_asked_about(tmp_path, capsys, flag):
  raw = files(
    tmp_path / "raw",
    {
      "web.en-de.tsv": b"a test drive\tx\nb\tc\n",
      "Test_Drive.en-de.en": b"A test drive\n",
      "Test_Drive.en-de.de": b"Probefahrt\n",
    },
  )
  command = ["prepare", "files", "--languages=en,de", "--processes=0"]
  command += [f"--raw={raw}", f"--out={tmp_path / 'out'}"]
  assert cli.main(command) == 1
  told = capsys.readouterr().err
  assert "Test_Drive.en-de.en" in told and "web" not in told
  for each in ("train", "dev", "test", "held_out"):
    assert f"--{each} " in told
  assert cli.main([*command, f"--{flag}=Test_Drive*"]) == 0
  train = toy_raw.train_pairs(tmp_path / "out", "en-de")[0]
  drive, seen = ("A test drive", "Probefahrt"), ("a test drive", "x")
  expected = {drive, seen, ("b", "c")} if flag == "train" else {("b", "c")}
  assert set(train) == expected
  made = {path.name for path in (tmp_path / "out").glob("*.tsv")}
  evaluated = flag in ("dev", "test")
  assert made == ({f"en-de.{flag}.tsv"} if evaluated else set())


def test_globs_must_fit(tmp_path):
  raw = files(tmp_path / "raw", {"a.en-de.tsv": b"x\ty\n"})
  for decided, message in (
    ({"test": ("b*",)}, r"no parallel text matches 'b\*', .* a\.en-de\.tsv"),
    ({"test": ("a*",), "train": ("*",)}, "globs of test and train"),
  ):
    names = raw_text.Names((("en", "de"),), decided=decided)
    with pytest.raises(ValueError, match=message):
      preparation.prepare(raw, tmp_path / "out", names, processes=0)
    shutil.rmtree(tmp_path / "out")


def test_languages_have_one_spelling(tmp_path):
  raw = files(
    tmp_path / "raw",
    {
      "a.en-pt-br.tsv": b"a\tb\n",
      "b.pt_BR-en.tsv": b"c\td\n",
      "c.eng_Latn-por_Latn_BR.jsonl": b'{"en": "e", "pt-BR": "f"}\n',
      "d.en-pt_PT.tsv": b"g\th\n",
    },
  )
  assert toy_raw.command(raw, tmp_path / "out", languages="EN,pt-br") == 0
  (train,) = toy_raw.train_pairs(tmp_path / "out", "en-pt_BR")
  assert sorted(train) == [("a", "b"), ("d", "c"), ("e", "f")]


def test_nothing_to_prepare(tmp_path):
  with pytest.raises(ValueError, match="nowhere' does not exist"):
    preparation.prepare(tmp_path / "nowhere", tmp_path / "out", toy_raw.NAMES)
  raw = files(tmp_path / "raw", {"x.en-it.tsv": b"a\tb\n"})
  message = (
    r"no training text of en-de, en-zh, en-fr in .*: found x\.en-it\.tsv"
  )
  with pytest.raises(ValueError, match=message):
    preparation.prepare(raw, tmp_path / "out", toy_raw.NAMES, processes=0)
  with pytest.raises(ValueError, match="is within the folder of raw text"):
    preparation.prepare(raw, raw / "out", toy_raw.NAMES, processes=0)
