"""Downloaded text: what is found by its name, and read block by block."""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import re
import tarfile
import zipfile

import hypothesis
import pytest
from hypothesis import strategies as st

from basemt_jax.corpora import raw_text
from tasks import ml50, opus100, wmt15

PAIRS = [("a b", "ä \u2028b"), ("c & <d>", "d"), ("e", "f")]
ENGLISH = "".join(f"{a}\n" for a, _ in PAIRS).encode()
CZECH = "".join(f"{b}\n" for _, b in PAIRS).encode()
TABLE = "".join(f"{b}\t{a}\n" for a, b in PAIRS).encode()
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def files(folder, contents):
  """Writes files, compressed as their names say."""
  for name, data in contents.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
  return folder


def tar(contents, mode="w:gz"):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:
    for name, data in contents.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def zipped(contents):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, data in contents.items():
      archive.writestr(name, data)
  return buffer.getvalue()


def sgm(lines):
  segments = "".join(
    f'<seg id="{i}"> {line} </seg>\n' for i, line in enumerate(lines)
  )
  return f'<refset lang="x">\n<doc>\n{segments}</doc></refset>'.encode()


def tmx(pairs):
  units = "".join(
    f'<tu><tuv xml:lang="en-GB"><seg>{a}</seg></tuv>'
    f'<tuv xml:lang="CS"><seg>{b}</seg></tuv></tu>'
    for a, b in pairs
  )
  head = '<?xml version="1.0"?><tmx version="1.4"><header/><body>'
  return f"{head}{units}</body></tmx>".encode()


def lines(text):
  """All pairs of a text, English first."""
  found = [
    pair
    for block in raw_text.blocks(text)
    for pair in raw_text.pairs_of(text, block)
  ]
  return [p[::-1] if text.languages[0] != "en" else p for p in found]


def found(folder, names, work):
  raw_text.unpack(folder, work, names)
  return raw_text.find([folder, work], names)


def test_every_layout_is_read(tmp_path):
  nested = tar(
    {"un/undoc.2000.cs-en.en": ENGLISH, "un/undoc.2000.cs-en.cs": CZECH}
  )
  columns = b"".join(b"id\t0.5\t" + line for line in TABLE.splitlines(True))
  bars = "".join(f"{b} ||| {a}\n" for a, b in PAIRS).encode()
  records = "".join(
    json.dumps({"translation": {"en": a, "cs": b}}) + "\n" for a, b in PAIRS
  )
  escaped = [
    (a.replace("&", "&amp;").replace("<", "&lt;"), b) for a, b in PAIRS
  ]
  raw = files(
    tmp_path / "raw",
    {
      "a/europarl-v7.cs-en.cs.gz": CZECH,
      "a/europarl-v7.cs-en.en.xz": ENGLISH,
      "b/leta.cs": CZECH,
      "b/leta.en": ENGLISH,
      "c/x_ch.txt": b"",
      "casia.tar": tar({"casia_cz.txt": CZECH, "casia_en.txt": ENGLISH}, "w"),
      "outer.zip": zipped({"deep/inner.tgz": nested, "readme": b"x"}),
      "news.cs-en.tsv.bz2": TABLE,
      "data-plaintext-format.0/00train.gz": columns,
      "wiki/titles.cs-en": bars,
      "x.cs-en.jsonl": records.encode(),
      "cs-en.filtered.tmx.gz": tmx(escaped),
      "LICENSE": b"",
    },
  )
  everything = found(raw, wmt15.BENCHMARK.raw, tmp_path / "work")
  texts = everything.texts
  assert list(texts) == [("en", "cs")] and list(texts["en", "cs"]) == ["train"]
  kinds = {text.kind for text in texts["en", "cs"]["train"]}
  assert kinds == {"moses", "table", "bars", "jsonl", "tmx"}
  assert len(texts["en", "cs"]["train"]) == 9
  for text in texts["en", "cs"]["train"]:
    assert [(a.strip(), b.strip()) for a, b in lines(text)] == PAIRS, text.name
  assert everything.unused == ["LICENSE", "c/x_ch.txt (one side)"]
  # Useless files are not unpacked at all.
  assert not list((tmp_path / "work").rglob("readme"))


def test_test_sets_are_known_by_year_and_direction(tmp_path):
  english, czech = ([pair[i] for pair in PAIRS] for i in (0, 1))
  raw = files(
    tmp_path,
    {
      "train.cs-en.tsv": TABLE,
      "dev/newstest2017.cs": CZECH,
      "dev/newstest2017.en": ENGLISH,
      "dev/newstest2016.cs": CZECH,
      "dev/newstest2016.en": ENGLISH,
      "sgm/newstest2018-csen-src.cs.sgm": sgm(czech),
      "sgm/newstest2018-csen-ref.en.sgm": sgm(["x", "y &amp; z", "w"]),
      "sgm/newstest2018-encs-src.en.sgm": sgm(english),
      "sgm/newstest2018-encs-ref.cs.sgm": sgm(czech),
      "sgm/newstest2018-ende-ref.de.sgm": sgm(english),
      "plain/newstest2018.cs": CZECH,
      "plain/newstest2018.en": ENGLISH,
    },
  )
  everything = found(raw, wmt15.BENCHMARK.raw, tmp_path / "work")
  splits = everything.texts["en", "cs"]
  assert [t.name for t in splits["validation"]] == [
    "dev/newstest2017.en and newstest2017.cs"
  ]
  assert {t.languages for t in splits["test"]} == {("cs", "en"), ("en", "cs")}
  assert all(t.directed for t in splits["test"])
  into_english = next(t for t in splits["test"] if t.languages[0] == "cs")
  assert [a for a, _ in lines(into_english)] == ["x", "y & z", "w"]
  assert {text.name for text in everything.held_out} == {
    "dev/newstest2016.en and newstest2016.cs",
    "plain/newstest2018.en and newstest2018.cs",
    "sgm/newstest2018-ende-ref.de.sgm (one side)",
  }


# Names as the benchmarks' own archives have them.
REAL_NAMES = [
  (wmt15, "giga-fren.release2.fixed.{fr,en}.gz", "fr", "train"),
  (wmt15, "commoncrawl.ru-en.{ru,en}", "ru", "train"),
  (wmt15, "wikititles-v1.gu-en.tsv.gz", "gu", "train"),
  (wmt15, "en-zh/UNv1.0.en-zh.{zh,en}", "zh", "train"),
  (wmt15, "neu2017/NEU_{cn,en}.txt", "zh", "train"),
  (wmt15, "casia2015/casia2015_{ch,en}.txt", "zh", "train"),
  (wmt15, "1mcorpus/corpus.en_ru.1m.{ru,en}", "ru", "train"),
  (wmt15, "en-tr.tmx.gz", "tr", "train"),
  (wmt15, "hindencorp0.1.gz", "hi", "train"),
  (wmt15, "rapid2016.lt-en.{lt,en}", "lt", "train"),
  (wmt15, "dev/newsdev2014.{hi,en}", "hi", "validation"),
  (wmt15, "newsdev2019-kken-{src.kk,ref.en}.sgm", "kk", "validation"),
  (wmt15, "newsdev2017-lven-{src.lv,ref.en}.sgm", "lv", "validation"),
  (wmt15, "dev/newstest2012-{src.es,ref.en}.sgm", "es", "validation"),
  (wmt15, "sgm/newstest2019-fien-{src.fi,ref.en}.sgm", "fi", "test"),
  (wmt15, "newstest2013-{src.es,ref.en}.sgm", "es", "test"),
  (wmt15, "newstest2013-{src.fr,ref.en}.sgm", "fr", "validation"),
  (wmt15, "newstestB2016-enfi-{src.en,ref.fi}.sgm", "fi", None),
  (wmt15, "newsdiscussdev2015-fren-{src.fr,ref.en}.sgm", "fr", None),
  (ml50, "raw/train.af_ZA-en_XX.{af_ZA,en_XX}", "af", "train"),
  (ml50, "raw/valid.cs_CZ-en_XX.{cs_CZ,en_XX}", "cs", "validation"),
  (ml50, "raw/test.en_XX-zh_CN.{zh_CN,en_XX}", "zh", "test"),
  (opus100, "supervised/af-en/opus.af-en-train.{af,en}", "af", "train"),
  (opus100, "supervised/en-zu/opus.en-zu-dev.{zu,en}", "zu", "validation"),
  (opus100, "supervised/en-or/opus.en-or-test.{or,en}", "or", "test"),
]


@pytest.mark.parametrize("benchmark, path, language, split", REAL_NAMES)
def test_names_of_the_benchmarks(tmp_path, benchmark, path, language, split):
  match = re.fullmatch(r"(.*)\{(.*),(.*)\}(.*)", path)
  ends = match.groups() if match else (path, "", "", "")
  data = sgm(["a"]) if "sgm" in path else b"a\tb\n"
  names = [ends[0] + ends[i] + ends[3] for i in (1, 2)]
  folder = files(tmp_path, dict.fromkeys(names, data))
  found = raw_text.find([folder], benchmark.BENCHMARK.raw)
  expected = {("en", language): [split]} if split else {}
  assert {key: list(value) for key, value in found.texts.items()} == expected
  assert bool(found.held_out) == (split is None)
  assert not found.unused and not found.doubtful


@hypothesis.given(
  st.lists(
    st.tuples(st.text("aé \r\u2028", max_size=9), st.text("bß", max_size=30)),
    max_size=40,
  ),
  st.integers(1, 60),
  st.booleans(),
)
@hypothesis.settings(
  deadline=None,
  max_examples=60,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_blocks_hold_all_lines_whatever_their_size(tmp_path, pairs, size, end):
  """Moses and table alike, with and without a line end after the last."""
  joined = ["\n".join(side).encode() for side in zip(*pairs, strict=True)]
  if pairs and (end or not pairs[-1][0] or not pairs[-1][1]):
    joined = [side + b"\n" for side in joined]
  sides = joined or [b"", b""]
  paths = [tmp_path / "x.en", tmp_path / "x.de"]
  for path, side in zip(paths, sides, strict=True):
    path.write_bytes(side)
  text = raw_text.Text(
    "x", "moses", ("en", "de"), False, tuple(map(str, paths)), ("en", "de")
  )
  blocks = list(raw_text.blocks(text, size))
  found = [p for block in blocks for p in raw_text.pairs_of(text, block)]
  assert found == pairs
  counts = [[part.count(b"\n") for part in block] for block in blocks]
  assert all(a == b for a, b in counts)
  table = tmp_path / "x.tsv"
  table.write_text("".join(f"{a}\t{b}\n" for a, b in pairs), newline="")
  text = raw_text.Text(
    "x", "table", ("en", "de"), False, (str(table),), ("en", "de")
  )
  blocks = list(raw_text.blocks(text, size))
  assert [p for b in blocks for p in raw_text.pairs_of(text, b)] == pairs


@pytest.mark.parametrize("size", [1, 9, 999])
@pytest.mark.parametrize("lengths", [(3, 2), (2, 3)])
def test_sides_of_unequal_length_are_refused(tmp_path, size, lengths):
  paths = [tmp_path / "x.en", tmp_path / "x.de"]
  for path, length in zip(paths, lengths, strict=True):
    path.write_text("line\n" * length)
  text = raw_text.Text(
    "x", "moses", ("en", "de"), False, tuple(map(str, paths)), ("en", "de")
  )
  which = "first" if lengths == (2, 3) else "second"
  with pytest.raises(ValueError, match=f"the {which} ends after 2 lines"):
    list(raw_text.blocks(text, size))


def test_bad_lines_are_told_apart():
  def of(kind, *block):
    text = raw_text.Text("x", kind, ("en", "de"), False, (), ("en", "de"))
    return list(raw_text.pairs_of(text, block))

  assert of("table", b"a\tb\na\n\xff\tb\nc\td\te\n") == [
    ("a", "b"),
    "no tab",
    "bad UTF-8",
    ("d", "e"),
  ]
  assert of("moses", b"a\n\xff\n", b"b\nc\n") == [("a", "b"), "bad UTF-8"]
  assert of("bars", b"a ||| b\na | b\n") == [("a ", " b"), "not one |||"]
  assert of("jsonl", b'{"en": "a", "de": "b"}\n{\n[]\n{"en": 3}\n') == [
    ("a", "b"),
    "bad JSON",
    "texts missing in JSON",
    "texts missing in JSON",
  ]


def test_broken_downloads_are_refused(tmp_path):
  names = raw_text.Names((("en", "de"),))
  archive = tar({"x.en-de.en": b"a\n" * 9999, "x.en-de.de": b"b\n" * 9999})
  raw = files(tmp_path / "raw", {"x.tgz": archive[:-40]})
  with pytest.raises(ValueError, match=r"x\.tgz is not a whole archive"):
    raw_text.unpack(raw, tmp_path / "work", names)
  # Nothing half is taken for whole: mended, it is unpacked from the start.
  (raw / "x.tgz").write_bytes(archive)
  texts = found(raw, names, tmp_path / "work").texts
  assert len(lines(texts["en", "de"]["train"][0])) == 9999
  whole = gzip.compress(b"a\tb\n" * 9999)
  (tmp_path / "x.en-de.tsv.gz").write_bytes(whole[:-9])
  texts = raw_text.find([tmp_path], names).texts
  broken = next(t for t in texts["en", "de"]["train"] if t.kind == "table")
  with pytest.raises(ValueError, match=r"x\.en-de\.tsv\.gz cannot be read to"):
    lines(broken)


def test_archives_cannot_write_elsewhere(tmp_path):
  names = raw_text.Names((("en", "de"),))
  member = "../../../escaped.en-de.tsv"
  raw = files(
    tmp_path / "a/raw",
    {"x.tgz": tar({member: b"a\tb\n"}), "y.zip": zipped({member: b"a\tb\n"})},
  )
  texts = found(raw, names, tmp_path / "a/work").texts
  assert len(texts["en", "de"]["train"]) == 2
  outside = [p for p in tmp_path.rglob("*.tsv") if "work" not in p.parts]
  assert not outside
  assert all(
    pathlib.Path(t.paths[0]).is_relative_to(tmp_path / "a/work")
    for t in texts["en", "de"]["train"]
  )
