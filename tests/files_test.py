"""The user's own files: what is found, read, skipped, refused."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import shutil

import hypothesis
import pytest
import seqio
from hypothesis import strategies as st

from basemt_jax.data import normalisation, parallel_text, vocabulary
from tasks import files

pytestmark = pytest.mark.usefixtures("registries")

GOOD = "Hello\tHallo\n"
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(folder, contents):
  for name, text in contents.items():
    data = text if isinstance(text, bytes) else text.encode()
    packed = PACK.get("." + name.rsplit(".", 1)[-1], bytes)(data)
    (folder / name).write_bytes(packed)
  return folder


def read(summary, first, second, split="train", limit=files.MAX_CHARACTERS):
  file = summary.files[first, second][split]
  return list(files.read_pairs(file, limit))


def skipped(summary):
  return sum(report.skipped.total() for report in summary.reports.values())


def test_every_layout_is_found(tmp_path):
  pairs = [("a b", "a\u0308 \u2028b"), ("c", "d"), ("e", "f")]
  plain = [("a b", "ä b"), *pairs[1:]]
  tsv = "".join(f"{a}\t{b}\n" for a, b in pairs)
  sides = ["".join(f"{pair[i]}\n" for pair in pairs) for i in (0, 1)]
  lines = [{"x": 1, "en": a, "pt-BR": b} for a, b in pairs]
  nested = [{"translation": line} for line in lines]
  dump = "\n".join  # And no line end after the last.
  write(
    tmp_path,
    {
      "en-de.train.tsv": "\ufeff" + tsv,
      "en-de.dev.tsv.gz": tsv.replace("\n", "\r\n"),
      "train.fr-en.en": sides[1],
      "train.fr-en.fr.gz": sides[0],
      "test.fr-en.en.gz": sides[1],
      "test.fr-en.fr": sides[0],
      "en-pt-BR.train.jsonl": dump(map(json.dumps, lines)),
      "en-pt-BR.valid.jsonl.gz": dump(map(json.dumps, nested)),
      "eng_Latn-deu_Latn.train.tsv": tsv,
      "README.md": "",
      "en-de.trian.tsv": tsv,
      "eng_Latn-deu_Latn.dev.tsv.xz": tsv,
      "EN-pt_br.test.tsv.bz2": tsv,
      ".hidden.tsv": "",
    },
  )
  summary = files.scan(tmp_path)
  splits = {key: list(found) for key, found in summary.files.items()}
  assert splits == {
    ("en", "de"): ["train", "validation"],
    ("fr", "en"): ["train", "test"],
    ("en", "pt_BR"): ["train", "validation", "test"],
    ("eng_Latn", "deu_Latn"): ["train", "validation"],
  }
  for languages, found in splits.items():
    for split in found:
      assert read(summary, *languages, split) == plain
    assert summary.num_pairs(languages) == dict.fromkeys(found, 3)
  assert summary.ignored == ("README.md", "en-de.trian.tsv")
  assert skipped(summary) == 0
  (warning,) = summary.warnings
  assert warning.endswith("dev or test: README.md, en-de.trian.tsv")


def test_sides_alone_are_of_the_only_pair(tmp_path):
  texts = {"train.en": "a\n", "train.da": "b\n", "dev.en": "c\n"}
  write(tmp_path, {**texts, "dev.da.gz": "d\n", "train.txt": "?"})
  summary = files.scan(tmp_path)
  assert list(summary.files) == [("da", "en")]
  assert read(summary, "da", "en") == [("b", "a")]
  assert read(summary, "da", "en", "validation") == [("d", "c")]
  assert summary.ignored == ("train.txt",)
  write(tmp_path, {"train.de": "e\n"})
  with pytest.raises(ValueError, match="no parallel text"):
    files.scan(tmp_path)


def test_a_format_from_outside_is_one_function(tmp_path, monkeypatch):
  def semicolons(paths, languages):
    for number, line in parallel_text.lines(paths[0]):
      sides = line.split(";")
      is_pair = len(sides) == 2
      yield number, tuple(sides) if is_pair else parallel_text.Trouble("not 2")

  write(tmp_path, {"en-de.train.ssv.gz": "a;b\nc\n"})
  with pytest.raises(ValueError, match="no parallel text"):
    files.scan(tmp_path)
  monkeypatch.setitem(parallel_text.FORMATS, ".ssv", semicolons)
  summary = files.scan(tmp_path)
  assert read(summary, "en", "de") == [("a", "b")]
  assert summary.warnings[0].endswith("en-de.train.ssv.gz:2: not 2")


def test_unusable_lines_are_reported_and_skipped(tmp_path):
  content = [
    b"one\teins",
    b"two",
    b"three\tdrei\t3",
    b"",
    b"\xff\tvier",
    b"five\t ",
    b"six\t" + b"s" * 21,
    b" seven \t sieben",
  ]
  write(tmp_path, {"en-de.train.tsv": b"\n".join(content)})
  summary = files.scan(tmp_path, max_characters=20)
  report = summary.reports[summary.files["en", "de"]["train"]]
  assert dict(report.skipped) == {
    "no tab instead of one": 2,
    "2 tabs instead of one": 1,
    "bad UTF-8": 1,
    "empty side": 1,
    "longer than 20 characters": 1,
  }
  assert report.pairs == 2 and skipped(summary) == 6
  path = tmp_path / "en-de.train.tsv"
  assert report.examples == [
    f"{path}:2: no tab instead of one",
    f"{path}:3: 2 tabs instead of one",
    f"{path}:4: no tab instead of one",
    f"{path}:5: bad UTF-8",
    f"{path}:6: empty side",
  ]
  (warning,) = summary.warnings
  assert warning.startswith(f"{path}: 6 of 8 lines skipped: 2 no tab")
  assert warning.endswith(f"; the first: {path}:2: no tab instead of one")
  expected = [("one", "eins"), ("seven", "sieben")]
  assert read(summary, "en", "de", limit=20) == expected


def test_unusable_json_and_moses_lines(tmp_path):
  write(
    tmp_path,
    {
      "en-de.train.jsonl": '{"en": "a", "de": "b"}\n{"en": "a"\n[1]\n'
      '{"en": "a", "de": 3}\n{"en": "a", "fr": "b"}\n\n',
      "train.en-fr.en": "a\n\nc\n",
      "train.en-fr.fr": "x\ny\nz\n",
    },
  )
  summary = files.scan(tmp_path)
  reports = {
    key: summary.reports[f["train"]] for key, f in summary.files.items()
  }
  assert dict(reports["en", "de"].skipped) == {
    "bad JSON": 2,
    "no object in JSON": 1,
    "no text 'de' in JSON": 2,
  }
  assert reports["en", "fr"].examples == [
    f"{tmp_path / 'train.en-fr.en'}:2: empty side"
  ]
  assert read(summary, "en", "fr") == [("a", "x"), ("c", "z")]


@pytest.mark.parametrize(
  "contents, message",
  [
    ({}, "no parallel text in .*: its files must be named en-de.train.tsv"),
    ({"en-de.dev.tsv": GOOD}, "en-de.dev.tsv has no training file beside it"),
    ({"en-de.train.tsv": ""}, "en-de.train.tsv has no pairs, it is empty"),
    (
      {"en-de.train.tsv": "a\nb\n"},
      "none of its 2 lines can be used .*train.tsv:1: no tab",
    ),
    (
      {"en-de.train.tsv": GOOD, "en-de.test.tsv.gz": ""},
      "en-de.test.tsv.gz has no pairs, it is empty",
    ),
    (
      {"en-de.train.tsv": GOOD, "en-de.train.tsv.gz": GOOD},
      r"train.tsv and .*train.tsv.gz are both the train split of en and de",
    ),
    (
      {"en-de.train.tsv": GOOD, "de-en.train.jsonl": "{}"},
      r"de-en.train.jsonl and .*en-de.train.tsv are both the train split",
    ),
    (
      {"en-de.train.tsv": GOOD, "en-de.dev.tsv": GOOD, "en-de.valid.tsv": GOOD},
      "both the validation split",
    ),
    ({"en-en.train.tsv": GOOD}, "pairs 'en' with itself"),
    (
      {"en-klingon.train.tsv": GOOD},
      "en-klingon.train.tsv: direction 'en-klingon' is not two language codes",
    ),
    ({"train.en-de.de": "a\n"}, "train.en-de.de .* the 'en' side is missing"),
    (
      {"train.en-de.de": "a", "train.en-de.en": "a", "train.en-de.en.gz": "a"},
      "train.en-de.en and .*en.gz are the same side",
    ),
    (
      {"train.en-de.en": "a\nb\n", "train.en-de.de": "a\n"},
      "not parallel: train.en-de.de ends after 1 lines",
    ),
  ],
)
def test_folders_that_cannot_be_used(tmp_path, contents, message):
  with pytest.raises(ValueError, match=message):
    files.mixture(write(tmp_path, contents))


def test_missing_folder_and_broken_gzip(tmp_path):
  with pytest.raises(ValueError, match=r"'.*nowhere' does not exist"):
    files.scan(tmp_path / "nowhere")
  path = write(tmp_path, {"en-de.train.tsv.gz": GOOD * 999})
  with pytest.raises(ValueError, match="is not a folder"):
    files.scan(path / "en-de.train.tsv.gz")
  whole = (tmp_path / "en-de.train.tsv.gz").read_bytes()
  for broken in (whole[:-9], GOOD.encode()):
    (tmp_path / "en-de.train.tsv.gz").write_bytes(broken)
    with pytest.raises(ValueError, match=r"tsv.gz is not a whole gzip file"):
      files.scan(tmp_path)


def examples(name, split="train"):
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    {"inputs": 99, "targets": 99}, split=split, shuffle=False, seed=0
  )
  return [
    (e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode())
    for e in dataset.as_numpy_iterator()
  ]


def test_mixture_has_both_directions(tmp_path):
  folder = tmp_path / "my-data"
  folder.mkdir()
  lines = "Hello\tHallo\nbad line\nYes\tJa\n"
  write(folder, {"en-de.train.tsv": lines, "en-de.dev.tsv": GOOD})
  mixture = files.mixture(folder)
  assert mixture.name == "files.my_data"
  names = ["files.my_data.de_en", "files.my_data.en_de"]
  assert [task.name for task in mixture.tasks] == names
  assert [mixture.get_rate(task) for task in mixture.tasks] == [2, 2]
  assert mixture.num_input_examples("validation") == 2
  assert skipped(mixture.summary) == 1
  assert examples(names[0]) == [("<2en> Hallo", "Hello"), ("<2en> Ja", "Yes")]
  assert examples(names[1]) == [("<2de> Hello", "Hallo"), ("<2de> Yes", "Ja")]
  assert examples(names[1], "validation") == [("<2de> Hello", "Hallo")]


def test_what_a_model_wrote_is_one_direction_with_a_tag_of_its_own(tmp_path):
  write(
    tmp_path,
    {
      "en-de.train.tsv": "a\tA\n",
      "en-de.test.tsv": "b\tB\n",
      "en_x_bt-de.train.tsv": "c\tC\nd\tD\n",
      "en-de_x_kd.train.tsv": "e\tE\n",
    },
  )
  made = files.mixture(tmp_path, name="files.labels")
  tasks = {task.name.split(".")[-1]: task for task in made.tasks}
  assert sorted(tasks) == ["de_en", "en__de_x_kd", "en_de", "en_x_bt__de"]
  texts = {
    name: next(task.source.text_pairs("train")) for name, task in tasks.items()
  }
  assert texts == {
    "en_de": ("<2de> a", "A"),
    "de_en": ("<2en> A", "a"),
    "en_x_bt__de": ("<2de> <bt> c", "C"),
    "en__de_x_kd": ("<2de> e", "E"),
  }
  assert tasks["en_x_bt__de"].num_input_examples("train") == 2
  assert made.warnings == []


def test_column_order_may_differ_between_splits(tmp_path):
  write(tmp_path, {"en-de.train.tsv": GOOD, "de-en.test.tsv": "Ja\tYes\n"})
  mixture = files.mixture(tmp_path, name="files.turned")
  assert len(mixture.tasks) == 2
  assert examples("files.turned.en_de", "test") == [("<2de> Yes", "Ja")]
  assert examples("files.turned.de_en", "test") == [("<2en> Ja", "Yes")]


def test_dev_and_test_sets_may_be_of_one_direction(tmp_path):
  write(
    tmp_path,
    {
      "en-de.train.tsv": GOOD,
      "en-de.test.tsv": "one\teins\ntwo\tzwei\n",
      "de-en.test.tsv": "drei\tthree\n",
      "de-en.dev.tsv": "vier\tfour\n",
    },
  )
  mixture = files.mixture(tmp_path, name="files.directed")
  assert len(mixture.tasks) == 2
  assert mixture.num_input_examples("test") == 3
  to_german = ["<2de> one", "<2de> two"]
  assert [a for a, _ in examples("files.directed.en_de", "test")] == to_german
  assert examples("files.directed.de_en", "test") == [("<2en> drei", "three")]
  for name, pair in (
    ("en_de", ("<2de> four", "vier")),
    ("de_en", ("<2en> vier", "four")),
  ):
    assert examples(f"files.directed.{name}", "validation") == [pair]


def test_shards_are_one_text(tmp_path):
  write(
    tmp_path,
    {
      "en-de.train-00000-of-00003.tsv.gz": "a\tA\nb\tB\n",
      "en-de.train-00001-of-00003.tsv.gz": "",
      "en-de.train-00002-of-00003.tsv": "c\tC\nd\n",
    },
  )
  summary = files.scan(tmp_path)
  assert read(summary, "en", "de") == [("a", "A"), ("b", "B"), ("c", "C")]
  (warning,) = summary.warnings
  assert "1 of 4 lines" in warning
  assert "train-00002-of-00003.tsv:2: no tab" in warning
  (tmp_path / "en-de.train-00001-of-00003.tsv.gz").unlink()
  with pytest.raises(ValueError, match="3 shards and shard 1 is not there"):
    files.scan(tmp_path)


def test_registering_again(tmp_path):
  folder = write(tmp_path, {"en-de.train.tsv": GOOD})
  mixture = files.mixture(folder, name="files.again")
  assert files.mixture(str(folder), "bytes", name="files.again") is mixture
  with pytest.raises(ValueError, match=r"'files\.again' is already"):
    files.mixture(folder, name="files.again", max_characters=7)
  (folder / "en-de.train.tsv").write_text(GOOD * 2)
  with pytest.raises(ValueError, match="give another `name`"):
    files.mixture(folder, name="files.again")
  with pytest.raises(Exception, match=r"had 1 usable pairs .* has 2 now"):
    examples("files.again.en_de")


TEXT = st.text(
  st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\r"),
  min_size=1,
  max_size=8,
).filter(normalisation.normalise)


@hypothesis.given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
@hypothesis.settings(deadline=None, max_examples=50)
def test_any_text_is_read_back_from_every_layout(tmp_path_factory, pairs):
  folder = tmp_path_factory.mktemp("any")
  texts = ["".join(f"{pair[i]}\n" for pair in pairs) for i in (0, 1)]
  lines = [{"en": a, "de": b} for a, b in pairs]
  contents = {
    "en-de.train.tsv": "".join(f"{a}\t{b}\n" for a, b in pairs),
    "dev.en-de.en.gz": texts[0],
    "dev.en-de.de": texts[1],
    "en-de.test.jsonl": "\n".join(map(json.dumps, lines)),
  }
  pairs = [tuple(map(normalisation.normalise, pair)) for pair in pairs]
  summary = files.scan(write(folder, contents))
  for split in ("train", "validation", "test"):
    assert read(summary, "en", "de", split) == pairs
  shutil.rmtree(folder)


def test_vocabulary_of_a_folder(tmp_path):
  lines = "".join(f"word {i} of\tWort {i} von\n" for i in range(50))
  write(tmp_path, {"en-de.train.tsv": lines})
  path = tmp_path / "v.model"
  trained = files.train_vocabulary(tmp_path, path, 320)
  assert trained == vocabulary.Vocabulary.load(path)
  assert len(trained.encode("<2de>")) == len(trained.encode("<2en>")) == 1
  mixture = files.mixture(tmp_path, path)  # Beside the byte vocabulary's.
  assert mixture.output_features["inputs"].vocabulary.vocab_size < 330


def _corpus(name):
  """A folder of the test data that is not part of the repository."""
  default = pathlib.Path(__file__).parents[2] / "shared" / "data"
  folder = pathlib.Path(os.environ.get("BASEMT_TEST_DATA", default)) / name
  if not folder.is_dir():
    pytest.skip(f"no {folder.name} in BASEMT_TEST_DATA or ../shared/data")
  return folder


def test_real_text():
  folder = _corpus("tatoeba-mini")
  mixture = files.mixture(folder)
  assert len(mixture.tasks) == 24 and skipped(mixture.summary) == 0
  sizes = [
    line.split("\t")[1:3]
    for line in (folder / "SIZES.tsv").read_text().splitlines()[1:]
  ]
  counted = {
    pathlib.Path(report.file).name: report.pairs
    for report in mixture.summary.reports.values()
  }
  assert counted == {name: int(pairs) for name, pairs in sizes}
  first = examples("files.tatoeba_mini.en_af", "test")[0]
  line = (folder / "en-af.test.tsv").read_text().splitlines()[0]
  assert first == tuple(f"<2af> {line}".split("\t"))
