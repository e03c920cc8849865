"""Preparation by Apache Beam: the same bytes as without."""

import pathlib
import subprocess
import sys

import pytest
import toy_raw
from raw_text_test import files

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  return toy_raw.write(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
  return toy_raw.prepare(raw, tmp_path_factory.mktemp("prepared"))


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
