"""Lines that `basemt translate` reads: all of them, as they come."""

import io
import os
import sys
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from basemt_jax.commands import configuration, console, translate

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


class Chunks(io.RawIOBase):
  """Gives the bytes in pieces of given lengths."""

  def __init__(self, data, lengths):
    self.data, self.lengths = data, list(lengths)

  def readable(self):
    return True

  def read1(self, most):
    length = self.lengths.pop() if self.lengths else len(self.data)
    taken, self.data = self.data[:length], self.data[length:]
    return taken


@hypothesis.given(
  texts=st.lists(TEXTS.map(lambda x: x.replace("\n", " ")), max_size=9),
  encoding=st.sampled_from(["utf-8", "utf-16"]),
  lengths=st.lists(st.integers(3, 9), max_size=20),
  most=st.integers(1, 4),
  ended=st.booleans(),
)
def test_every_line_is_read_wherever_the_stream_is_cut(
  texts, encoding, lengths, most, ended
):
  hypothesis.assume(ended or not texts or texts[-1])
  hypothesis.assume(encoding != "utf-8" or not any("\0" in x for x in texts))
  written = "\n".join(texts) + "\n" * (ended and bool(texts))
  if encoding == "utf-8" and written.encode()[:2] in (b"\xff\xfe", b"\xfe\xff"):
    return
  lines = translate.Lines(Chunks(written.encode(encoding), lengths), "text")
  found = []
  while taken := lines.read(most):
    assert len(taken) <= most
    found += taken
  assert found == texts
  assert lines.read(most) == []


def test_lines_are_given_before_the_end_and_all_at_once_only_if_asked():
  reading, writing = os.pipe()
  with open(reading, "rb") as stream:
    lines = translate.Lines(stream, "text")
    os.write(writing, b"one\ntwo\nthr")
    assert lines.read(9) == ["one", "two"]
    os.write(writing, b"ee\nfour\nfive\n")
    assert lines.read(1) == ["three"]
    rest = threading.Timer(0.05, lambda: os.write(writing, b"six\nseven"))
    rest.start()
    assert lines.read(3, wait=True) == ["four", "five", "six"]
    rest.join()
    os.close(writing)
    assert lines.read(3, wait=True) == ["seven"]
    assert lines.read(3, wait=True) == []


@pytest.mark.parametrize(
  "data, text",
  [
    (b"good\nno\xe9l\n", "text, line 2: not UTF-8; convert"),
    ("ab\ncd\n".encode("utf-16-le"), "line 1: begins like UTF-16 without"),
    (b"one\n" + "\ud83d".encode("utf-8", "surrogatepass"), "line 2: not UTF-8"),
  ],
)
def test_what_is_no_text_is_refused_by_its_line(data, text):
  lines = translate.Lines(io.BytesIO(data), "text")
  with pytest.raises(configuration.UsageError, match=text):
    while lines.read(1):
      pass


@pytest.mark.parametrize(
  "terminals, shown",
  [("err", "\r3 lines\r1,200 lines\n"), ("", ""), ("both", "")],
)
def test_progress_is_shown_on_a_terminal_that_shows_no_results(
  terminals, shown, monkeypatch, capsys
):
  for name in ("err", "out"):
    is_one = terminals in (name, "both")
    stream = getattr(sys, f"std{name}")
    monkeypatch.setattr(stream, "isatty", lambda is_one=is_one: is_one)
  with console.counter("{:,} lines") as count:
    count(3)
    count(1200)
  assert capsys.readouterr().err == shown


@pytest.mark.skipif(
  not os.path.exists("/dev/full"), reason="no device that is always full"
)
def test_what_a_full_disk_cannot_take_is_shown(capsys):
  with (
    pytest.raises(OSError, match="No space left"),
    translate.output_text("/dev/full") as write,
  ):
    write("eins\n")
    write("zwei\n")
    write("")
  assert capsys.readouterr().out == "eins\nzwei\n"
