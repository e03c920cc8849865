"""The one reader: every format, and nothing skipped in silence."""

import bz2
import gzip
import html
import json
import lzma

import hypothesis
import pytest
from hypothesis import strategies as st

from basemt_jax.data import normalisation, parallel_text

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}
PACK[".xz"] = lzma.compress
PAIRS = [("a b", "\u00e4 b"), ("c\u0301", "d"), ("e", "f | g")]
NORMAL = [tuple(map(normalisation.normalise, pair)) for pair in PAIRS]


def written(folder, name, text, encoding="utf-8"):
  data = text if isinstance(text, bytes) else text.encode(encoding)
  suffix = "." + name.rsplit(".", 1)[-1]
  path = folder / name
  path.write_bytes(PACK.get(suffix, bytes)(data))
  return path


def lines(read_format, *paths, wanted=("en", "de")):
  return list(read_format(paths, wanted))


def usable(read_format, *paths, wanted=("en", "de"), limit=99):
  """Usable pairs, and the report."""
  report = parallel_text.Report("x")
  found = parallel_text.read(read_format, paths, wanted, limit, report)
  return list(found), report


def memory(pairs, codes=("en", "de"), root='tmx version="1.4"', prefix=""):
  """A translation memory."""
  units = []
  for pair in pairs:
    variants = "".join(
      f'<{prefix}tuv xml:lang="{code}"><{prefix}seg>{html.escape(side)}'
      f"</{prefix}seg></{prefix}tuv>"
      for code, side in zip(codes, pair, strict=True)
    )
    units.append(f"<{prefix}tu>{variants}</{prefix}tu>\n")
  end = root.split()[0]
  return f"<{root}><header/><body>\n{''.join(units)}</body></{end}>"


@pytest.mark.parametrize("suffix", sorted(PACK))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_format_in_every_encoding(tmp_path, suffix, encoding, end):
  def put(name, text):
    return written(tmp_path, name + suffix, text.replace("\n", end), encoding)

  tab = "".join(f"{a}\t{b}\n" for a, b in PAIRS)
  wide = "".join(f"1\turl\t{a}\t{b}\n" for a, b in PAIRS)
  objects = "\n".join(json.dumps({"n": 1, "en": a, "de": b}) for a, b in PAIRS)
  nested = "\n".join(
    json.dumps({"translation": {"de": b, "en": a}}) for a, b in PAIRS
  )
  barred = "".join(f"{a} ||| {b}\n" for a, b in PAIRS)
  sides = ["".join(f"{pair[i]}\n" for pair in PAIRS) for i in (0, 1)]
  text = parallel_text
  found = [
    usable(text.tsv, put("a.tsv", tab)),
    usable(text.last_columns, put("b.tsv", wide)),
    usable(text.jsonl, put("a.jsonl", objects)),
    usable(text.jsonl, put("b.jsonl", nested)),
    usable(text.bars, put("a.en-de", barred)),
    usable(text.moses, put("a.en", sides[0]), put("a.de", sides[1])),
    usable(text.tmx, put("a.tmx", memory(PAIRS))),
  ]
  for pairs, report in found:
    assert pairs == NORMAL
    assert report.pairs == 3 and not report.skipped


def test_troubles_have_file_line_and_reason(tmp_path):
  content = [
    b"one\teins",
    b"two",
    b"three\tdrei\t3",
    b"",
    b"\xff\tvier",
    b"f\0ive\tf",
    b"six\t ",
    b"seven\t" + b"s" * 21,
    b" eight \t acht",
  ]
  path = written(tmp_path, "a.tsv", b"\n".join(content))
  pairs, report = usable(parallel_text.tsv, path, limit=20)
  assert pairs == [("one", "eins"), ("eight", "acht")]
  assert dict(report.skipped) == {
    "no tab instead of one": 2,
    "2 tabs instead of one": 1,
    "bad UTF-8": 1,
    "NUL character": 1,
    "empty side": 1,
    "longer than 20 characters": 1,
  }
  assert report.examples == [
    f"{path}:2: no tab instead of one",
    f"{path}:3: 2 tabs instead of one",
    f"{path}:4: no tab instead of one",
    f"{path}:5: bad UTF-8",
    f"{path}:6: NUL character",
  ]
  assert str(report).startswith("x: 7 of 9 lines skipped: 2 no tab instead")


def test_json_that_is_no_pair(tmp_path):
  content = [
    '{"en": "a", "de": "\\ud83d\\ude00"}',
    '{"en": "a", "de": "\\ud83d"}',
    '{"en": "a", "de": 1}',
    '{"en": "a"}',
    "[1]",
    "{",
    "[" * 100_000,
  ]
  path = written(tmp_path, "a.jsonl", "\n".join(content))
  pairs, report = usable(parallel_text.jsonl, path)
  assert pairs == [("a", "\U0001f600")]
  assert report.examples == [
    f"{path}:2: lone surrogate",
    f"{path}:3: no text 'de' in JSON",
    f"{path}:4: no text 'de' in JSON",
    f"{path}:5: no object in JSON",
    f"{path}:6: bad JSON",
  ]
  assert report.skipped["JSON nested too deeply"] == 1


@pytest.mark.parametrize("code", ["pt-BR", "pt_BR", "PT-br", "por-BR"])
def test_languages_are_found_by_what_they_are(tmp_path, code):
  path = written(tmp_path, "a.tmx", memory([("a", "b")], codes=("en-US", code)))
  wanted = ("en", "pt_BR")
  assert lines(parallel_text.tmx, path, wanted=wanted) == [(2, ("a", "b"))]
  path = written(tmp_path, "a.jsonl", json.dumps({"eng_Latn": "a", code: "b"}))
  assert lines(parallel_text.jsonl, path, wanted=wanted) == [(1, ("a", "b"))]


def test_units_without_a_language_are_counted(tmp_path):
  text = memory([("a", "b"), ("c", "d")]).replace('"de"', '"fr"', 1)
  path = written(tmp_path, "a.tmx", text)
  assert lines(parallel_text.tmx, path) == [
    (2, "unit without 'de': it has en, fr"),
    (3, ("c", "d")),
  ]
  both = lines(parallel_text.tmx, path, wanted=("en", "en_US"))
  assert [found for _, found in both] == [
    "unit without 'en_US': it has en, fr",
    "unit without 'en_US': it has en, de",
  ]


@pytest.mark.parametrize(
  "root, prefix",
  [
    ('tmx version="1.4" xmlns="http://www.lisa.org/tmx14"', ""),
    ('t:tmx xmlns:t="http://www.lisa.org/tmx14"', "t:"),
  ],
)
def test_namespaces(tmp_path, root, prefix):
  path = written(tmp_path, "a.tmx", memory([("a", "b")], ("en", "de"), root))
  assert lines(parallel_text.tmx, path) == [(2, ("a", "b"))]


def test_markup_within_segments(tmp_path):
  inline = (
    'Click <bpt i="1">&lt;b <sub>x</sub>&gt;</bpt>OK<ept i="1">&lt;/b&gt;</ept>'
    " <hi>now</hi><ph>{\\v}</ph>&amp;&nbsp;go<it>x</it>"
  )
  text = memory([("SEGMENT", "b")]).replace("SEGMENT", inline)
  text = f'<!DOCTYPE tmx SYSTEM "tmx14.dtd">{text}'
  path = written(tmp_path, "a.tmx", text)
  assert usable(parallel_text.tmx, path)[0] == [("Click OK now& go", "b")]


def test_broken_and_hostile_memories_are_refused(tmp_path):
  text = memory([("a", "b")])
  path = written(tmp_path, "a.tmx", text[:-9])
  with pytest.raises(ValueError, match=r"a.tmx:3: not well-formed TMX"):
    lines(parallel_text.tmx, path)
  bomb = '<!DOCTYPE x [<!ENTITY a "b"><!ENTITY c "&a;&a;">]>'
  path = written(tmp_path, "b.tmx", bomb + text)
  with pytest.raises(ValueError, match=r"b.tmx:1: declares the XML entity 'a'"):
    lines(parallel_text.tmx, path)
  path = written(tmp_path, "c.tmx", "")
  with pytest.raises(ValueError, match=r"c.tmx:1: not well-formed TMX"):
    lines(parallel_text.tmx, path)


@pytest.mark.parametrize("shorter", [0, 1])
def test_uneven_sides_are_refused(tmp_path, shorter):
  texts = ["a\n" * (3 if i == shorter else 4) for i in (0, 1)]
  paths = [written(tmp_path, f"x{i}", text) for i, text in enumerate(texts)]
  with pytest.raises(ValueError, match=rf": x{shorter} ends after 3 lines and"):
    lines(parallel_text.moses, *paths)


def test_test_sets(tmp_path):
  segments = '<doc>\n<seg id="{}">a &amp; b</seg>\n</doc>'
  paths = [
    written(tmp_path, name, "".join(segments.format(i) for i in range(n)))
    for name, n in (("s", 2), ("r", 2), ("short", 1))
  ]
  pair = ("a & b", "a & b")
  assert lines(parallel_text.sgm, *paths[:2]) == [(1, pair), (2, pair)]
  with pytest.raises(ValueError, match=r"they have 2 and 1 segments"):
    lines(parallel_text.sgm, *paths[1:])


@pytest.mark.parametrize("name", ["gz", "bz2", "xz"])
def test_broken_compression_is_told(tmp_path, name):
  path = written(
    tmp_path, f"a.tsv.{name}", b"".join(b"%d\ta\n" % i for i in range(9999))
  )
  path.write_bytes(path.read_bytes()[:-99])
  with pytest.raises(
    ValueError, match=r"is not a whole \w+ file: it breaks off"
  ):
    lines(parallel_text.tsv, path)


def test_other_encodings_are_told(tmp_path):
  path = written(tmp_path, "a.tsv", "hello\thallo\n", "utf-16-le")
  with pytest.raises(ValueError, match=r"a.tsv is no UTF-8 text: it begins"):
    lines(parallel_text.tsv, path)
  path = written(tmp_path, "b.tsv", "a\tb\nc\td".encode("utf-16") + b"\0")
  with pytest.raises(ValueError, match=r"b.tsv is not whole UTF-16 text"):
    lines(parallel_text.tsv, path)


SIDE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9)


@hypothesis.given(pairs=st.lists(st.tuples(SIDE, SIDE), max_size=5))
def test_formats_agree(tmp_path_factory, pairs):
  folder = tmp_path_factory.mktemp("text")
  text = parallel_text
  tab = "".join(f"{a}\t{b}\n" for a, b in pairs)
  objects = "".join(json.dumps({"en": a, "de": b}) + "\n" for a, b in pairs)
  sides = ["".join(f"{pair[i]}\n" for pair in pairs) for i in (0, 1)]
  found = [
    usable(text.tsv, written(folder, "a.tsv", tab)),
    usable(text.jsonl, written(folder, "a.jsonl", objects)),
    usable(text.moses, *(written(folder, f"a{i}", sides[i]) for i in (0, 1))),
  ]
  if not set("".join(map("".join, pairs))) & {"\ufffe", "\uffff"}:
    found.append(usable(text.tmx, written(folder, "a.tmx", memory(pairs))))
  for usable_pairs, report in found:
    assert usable_pairs == found[0][0]
    assert report.pairs == len(usable_pairs)
    assert report.skipped.total() == len(pairs) - len(usable_pairs)
