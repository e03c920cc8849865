"""Downloaded text: what is found by its name."""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile

import pytest

from basemt_jax.corpora import archives, raw_text
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
  found = [pair for _, pair in text.lines()]
  return [p[::-1] if text.languages[0] != "en" else p for p in found]


def found(folder, names, work):
  archives.unpack(folder, work, names.is_useful)
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
  assert [a.strip() for a, _ in lines(into_english)] == ["x", "y & z", "w"]
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


def test_broken_downloads_are_refused(tmp_path):
  names = raw_text.Names((("en", "de"),))
  whole = gzip.compress(b"a\tb\n" * 9999)
  (tmp_path / "x.en-de.tsv.gz").write_bytes(whole[:-9])
  (text,) = raw_text.find([tmp_path], names).texts["en", "de"]["train"]
  with pytest.raises(
    ValueError, match=r"x\.en-de\.tsv\.gz is not a whole gzip"
  ):
    lines(text)
