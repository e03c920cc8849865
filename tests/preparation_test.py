"""From downloaded text to training files: what is kept, dropped, reported."""

import concurrent.futures
import gzip
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import toy_raw
from raw_text_test import files, zipped

from basemt_jax import cli
from basemt_jax.corpora import cleaning, preparation, raw_text
from basemt_jax.data import normalisation

ROOT = pathlib.Path(__file__).parent.parent
REAL = ROOT.parent / "shared/data/tatoeba-mini"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  return toy_raw.write(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
  return toy_raw.prepare(raw, tmp_path_factory.mktemp("prepared"))


def letters(text):
  return "".join(c for c in text.casefold() if c.isalnum()) or text


def test_what_is_kept_is_what_the_definition_says(raw, prepared):
  """Written a second time, in memory, the slow way."""
  out, report = prepared
  seen = {
    "en": {"unseentest", "nothing", "adevset"},
    "de": {"ungesehenertest", "nichts", "eindevset"},
  }

  def clean(text):
    kept = [c for c in text if unicodedata.category(c) not in ("Cc", "Cf")]
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))

  def good(a, b, language):
    bytes_a, bytes_b = len(a.encode()) + 20, len(b.encode()) + 20
    return (
      a
      and b
      and max(len(a), len(b)) <= 60
      and max(bytes_a, bytes_b) <= 4 * min(bytes_a, bytes_b)
      and letters(a) not in seen["en"]
      and letters(b) not in seen.get(language, ())
    )

  for language, pairs in (
    ("de", toy_raw.corpus(1)),
    ("zh", toy_raw.corpus(2, 800)),
  ):
    cleaned = [(clean(a), clean(b)) for a, b in pairs]
    expected = {(a, b) for a, b in cleaned if good(a, b, language)}
    shards = toy_raw.train_pairs(out, f"en-{language}")
    found = list(itertools.chain(*shards))
    assert len(found) == len(set(found)) and set(found) == expected
    assert report["pairs"][f"en-{language}"]["kept"] == len(found)
    assert len(shards) > 1 and min(map(len, shards)) > 0.6 * len(found) / len(
      shards
    )
  dropped = report["pairs"]["en-de"]["dropped"]
  assert dropped["in a dev or test set"] == 2
  assert dropped["no tab"] == dropped["bad UTF-8"] == 1
  assert dropped["empty side"] == 2
  assert {
    "equal to another pair",
    "longer than 60 characters",
  } <= dropped.keys()
  assert report["pairs"]["en-zh"]["dropped"]["in a dev or test set"] == 1
  for pair in report["pairs"].values():
    assert pair["read"] == pair["kept"] + sum(pair["dropped"].values())
    assert pair["read"] == sum(sum(t["counts"].values()) for t in pair["texts"])
  assert report["missing"] == ["en-fr"] and report["unused"] == ["README"]
  german = report["pairs"]["en-de"]["texts"][0]
  assert german["name"] == "news.en-de.tsv.gz"
  assert german["unread"] == {"no tab": [1503], "bad UTF-8": [1504]}
  # Dev and test sets are whole; the test set is of its one direction.
  assert (out / "de-en.test.tsv").read_text() == (
    "Ungesehener Test\tUnseen test.\nnichts\tnothing\n"
  )
  assert (out / "en-de.dev.tsv").read_text() == "a dev set\tein Dev-Set\n"
  assert json.loads((out / "prepared.json").read_text()) == report
  assert not (out / ".work").exists()


@pytest.mark.parametrize("processes", [0, 2])
def test_neither_processes_nor_interruptions_change_a_byte(
  raw, prepared, tmp_path, processes
):
  class StopError(Exception):
    pass

  calls = 0

  def progress(text):
    nonlocal calls
    calls += 1
    if calls in (1, 3, 4, 8, 15):  # In every stage.
      raise StopError(text)

  interruptions = 0
  while True:
    try:
      report = preparation.prepare(
        raw,
        tmp_path,
        toy_raw.NAMES,
        toy_raw.SMALL,
        processes=processes,
        progress=progress,
      )
      break
    except StopError:
      interruptions += 1
  assert interruptions == 5
  assert report == prepared[1]
  assert toy_raw.content(tmp_path) == toy_raw.content(prepared[0])


def test_killed_it_goes_on(raw, prepared, tmp_path):
  """The command, killed at any time, ends with the same bytes."""
  command = [sys.executable, "-m", "basemt_jax.cli", "prepare", "files"]
  command += ["--languages=en,de,zh", f"--raw={raw}", f"--out={tmp_path / 'x'}"]
  command += ["--processes=1", "--max_characters=60"]
  for seconds in (0.6, 1.2):
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert "en-de" in done.stdout and "in a dev or test set" in done.stdout
  whole = tmp_path / "whole"
  names = raw_text.Names((("en", "de"), ("en", "zh"), ("de", "zh")))
  options = cleaning.Options(max_characters=60)
  preparation.prepare(raw, whole, names, options, processes=0)
  assert toy_raw.content(tmp_path / "x") == toy_raw.content(whole)


def test_prepared_files_are_read_without_counting(prepared, monkeypatch):
  pytest.importorskip("seqio")
  from tasks import files as task_files

  out, report = prepared
  counted = task_files.scan(out)
  monkeypatch.setattr(task_files, "_counted", lambda folder, max_characters: {})
  assert {k: r.pairs for k, r in task_files.scan(out).reports.items()} == {
    k: r.pairs for k, r in counted.reports.items()
  }
  assert (
    counted.num_pairs(("en", "de"))["train"]
    == (report["pairs"]["en-de"]["kept"])
  )
  monkeypatch.undo()
  reading = []
  monkeypatch.setattr(
    task_files, "_report", lambda file, limit: reading.append(file.split)
  )
  task_files.scan(out)
  assert sorted(reading) == ["test", "validation"]


def test_another_preparation_of_the_folder_is_refused(raw, prepared):
  out, report = prepared
  assert (
    preparation.prepare(raw, out, toy_raw.NAMES, toy_raw.SMALL, processes=0)
    == report
  )
  other = cleaning.Options(shard_bytes=20_000, max_characters=61)
  with pytest.raises(ValueError, match=r"something else \(other options\)"):
    preparation.prepare(raw, out, toy_raw.NAMES, other, processes=0)


def test_a_raw_file_of_the_same_size_with_other_bytes_is_another(tmp_path):
  raw = files(tmp_path / "raw", {"x.en-de.tsv": b"one\teins\ntwo\tzwei\n"})
  names, out = raw_text.Names((("en", "de"),)), tmp_path / "out"
  report = preparation.prepare(raw, out, names, processes=0)
  assert preparation.prepare(raw, out, names, processes=0) == report
  (raw / "x.en-de.tsv").write_text("one\teins\ntwo\tdrei\n")
  with pytest.raises(ValueError, match=r"something else \(other files\)"):
    preparation.prepare(raw, out, names, processes=0)
  # An earlier version looked at sizes alone.
  path = out / preparation.REPORT
  report["made_of"]["files"] = [f[:2] for f in report["made_of"]["files"]]
  path.write_text(json.dumps(report))
  assert preparation.prepare(raw, out, names, processes=0) == report


def test_nothing_is_skipped_in_silence(tmp_path, capsys):
  nested = "[" * 100_000 + "]" * 100_000
  lines = [
    '{"en": "a", "de": "b"}',
    "{",
    nested,
    '{"en": "\\ud83d", "de": "x"}',
  ]
  lines += ['{"en": "c"}', "null", '{"en": "only \x00", "de": "y"}', *"[[["]
  unit = '<tu><tuv xml:lang="{}"><seg>{}</seg></tuv>'
  unit += '<tuv xml:lang="{}"><seg>t</seg></tuv></tu>\n'
  units = [unit.format("en", i, "fr" if i % 2 else "de-AT") for i in range(4)]
  raw = files(
    tmp_path / "raw",
    {
      "x.en-de.jsonl": "\n".join(lines).encode(),
      "m.en-de.tmx": f"<tmx><body>\n{''.join(units)}</body></tmx>".encode(),
      "nothing.zip": zipped({"readme": b"", "x.en-it.tsv": b"a\tb\n"}),
      "generaltest2023.en-de.xml": b"<dataset/>",
    },
  )
  assert toy_raw.command(raw, tmp_path / "out") == 0
  told = capsys.readouterr().out
  for fact in (
    "x.en-de.jsonl: 4 bad JSON (lines 2, 8, 9 ...)",
    "1 JSON nested too deeply (line 3)",
    "1 lone surrogate (line 4)",
    "1 no text 'de' in JSON (line 5)",
    "1 no object in JSON (line 6)",
    "1 NUL character (line 7)",
    "m.en-de.tmx: 2 unit without 'de': it has en, fr (lines 3, 5)",
    "not used: generaltest2023.en-de.xml, nothing.zip",
    "NOT held out: generaltest2023.en-de.xml",
  ):
    assert fact in told
  report = json.loads((tmp_path / "out/prepared.json").read_text())
  counts = report["pairs"]["en-de"]
  assert counts["read"] == 14 and counts["kept"] == 3


@pytest.mark.parametrize(
  "contents, message",
  [
    (
      {"b.en-de.tsv": b"no tab\n" * 9},
      r"b\.en-de\.tsv .* 9 no tab \(lines 1, 2",
    ),
    (
      {"b.en-de.tsv": b""},
      r"nothing of b\.en-de\.tsv can be used, it is empty",
    ),
    ({"b.en-de.jsonl": b"{\n"}, r"b\.en-de\.jsonl can be used, 1 bad JSON"),
    ({"test.en-de.tsv": b"x\n"}, r"nothing of test\.en-de\.tsv, a dev or test"),
    ({"test.en-de.tsv": b"x\ty\nx\n"}, r"test\.en-de\.tsv:2: no tab"),
    (
      {"test.en-de.tsv": b"a\tb\n"},
      "nothing is kept .* 1 in a dev or test set",
    ),
  ],
)
def test_a_text_that_gives_nothing_is_an_error(
  tmp_path, capsys, contents, message
):
  raw = files(tmp_path / "raw", {"a.en-de.tsv": b"a\tb\n", **contents})
  assert toy_raw.command(raw, tmp_path / "out") == 1
  told = capsys.readouterr()
  assert re.search(message, told.err) and not told.out
  assert not (tmp_path / "out/prepared.json").exists()
  # Mended, the same command does it.
  (name,) = contents
  (raw / name).unlink()
  assert toy_raw.command(raw, tmp_path / "out") == 0


def test_names_cannot_drive_the_terminal(tmp_path, capfd):
  evil = "\x1b]0;owned\x07\x9b31m\u202e.en-de.tsv"
  raw = files(tmp_path / "raw", {evil: b"a\tb\nno tab\n"})
  with open(os.fsencode(raw) + b"/\xff-README", "wb"):
    pass
  assert toy_raw.command(raw, tmp_path / "out") == 0
  (raw / evil).write_bytes(b"no tab\n")
  assert toy_raw.command(raw, tmp_path / "2") == 1
  told = "".join(capfd.readouterr())
  assert r"\x1b]0;owned\x07\x9b31m\u202e.en-de.tsv" in told
  assert r"\udcff-README" in told
  assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told)


def test_two_at_once_do_no_harm(raw, prepared, tmp_path):
  """Whoever comes second waits, and finds it done."""
  said = []
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    reports = list(
      threads.map(
        lambda _: preparation.prepare(
          raw,
          tmp_path,
          toy_raw.NAMES,
          toy_raw.SMALL,
          processes=0,
          progress=said.append,
        ),
        range(2),
      )
    )
  assert reports == [prepared[1]] * 2
  assert toy_raw.content(tmp_path) == toy_raw.content(prepared[0])
  assert f"{tmp_path} is prepared already" in said


def test_a_full_disk_is_told_and_survived(raw, prepared, tmp_path, monkeypatch):
  def full(path, mode):
    return open("/dev/full" if mode == "wb" else path, mode)

  monkeypatch.setattr(preparation, "open", full, raising=False)
  message = rf"{tmp_path} cannot be written, its disk is full: make room"
  with pytest.raises(ValueError, match=message):
    preparation.prepare(
      raw, tmp_path, toy_raw.NAMES, toy_raw.SMALL, processes=0
    )
  monkeypatch.undo()
  preparation.prepare(raw, tmp_path, toy_raw.NAMES, toy_raw.SMALL, processes=0)
  assert toy_raw.content(tmp_path) == toy_raw.content(prepared[0])


@pytest.mark.skipif(not REAL.exists(), reason="needs the real corpus")
def test_real_text_survives(tmp_path, capsys):
  """Clean text of six scripts loses next to nothing."""
  languages = ["en", "de", "zh", "mr", "bg", "vi", "af"]
  arguments = ["prepare", "files", f"--raw={REAL}", f"--out={tmp_path}"]
  arguments += [f"--languages={','.join(languages)}", "--processes=0"]
  assert cli.main(arguments) == 0
  assert "no training text: de-zh" in capsys.readouterr().out
  report = json.loads((tmp_path / "prepared.json").read_text())
  assert set(report["pairs"]) == {f"en-{x}" for x in languages[1:]}
  for pair in report["pairs"].values():
    assert pair["kept"] > 0.995 * pair["read"] > 0
  with gzip.open(REAL / "en-zh.train.tsv.gz", "rt") as file:
    original = {normalisation.normalise(x.replace("\t", " ")) for x in file}
  kept = itertools.chain(*toy_raw.train_pairs(tmp_path, "en-zh"))
  assert {" ".join(pair) for pair in kept} <= original


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
  """Peak memory of a process that prepares 1 and 5 times as much."""
  peaks = []
  for times in (1, 5):
    raw = tmp_path / f"raw{times}"
    raw.mkdir()
    rng = np.random.default_rng(0)
    with open(raw / "x.en-de.tsv", "w") as file:
      for _ in range(times * 20):
        numbers = rng.integers(0, 10**9, (10_000, 4)).tolist()
        file.writelines(
          f"{a} is {b} {'x' * 40}\t{c} ist {d} {'y' * 40}\n"
          for a, b, c, d in numbers
        )
    code = f"""
import resource
from basemt_jax.corpora import cleaning, preparation, raw_text
from basemt_jax.data import normalisation
preparation.prepare({str(raw)!r}, {str(raw)!r} + ".out",
  raw_text.Names((("en", "de"),)),
  cleaning.Options(shard_bytes=4_000_000), processes=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=ROOT,
      check=True,
      capture_output=True,
      text=True,
    )
    peaks.append(int(done.stdout))
  assert peaks[1] < 1.15 * peaks[0]


@pytest.mark.slow
def test_beam_writes_the_same_bytes(raw, prepared, tmp_path):
  pytest.importorskip("apache_beam")
  # In a process of its own, since Beam's warnings are not ours.
  code = f"""
import sys
sys.path.insert(0, "tests")
from basemt_jax.corpora import beam_preparation
from toy_raw import NAMES, SMALL
beam_preparation.prepare({str(raw)!r}, {str(tmp_path)!r}, NAMES, SMALL,
                         beam_options=["--runner=DirectRunner"])
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
  assert toy_raw.content(tmp_path) == toy_raw.content(prepared[0])


def test_without_beam_the_extra_is_named(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  raw = files(tmp_path / "raw", {"a.en-de.tsv": b"a\tb\n"})
  assert (
    toy_raw.command(raw, tmp_path / "out", "--beam=--runner=DirectRunner") == 1
  )
  assert "pip install 'basemt_jax[beam]'" in capsys.readouterr().err
