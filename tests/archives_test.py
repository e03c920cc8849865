"""Archives: what is unpacked, and what is said of those that cannot be."""

import bz2
import gzip
import io
import lzma
import pathlib
import random
import tarfile

import pytest
from raw_text_test import files, tar, zipped

from basemt_jax.corpora import archives

# Text that does not compress to nothing.
LINES = "".join(f"{random.Random(i).random()}\n" for i in range(3000)).encode()
TAR = tar({"a/x.tsv": LINES, "y.tsv": b"more\n" * 99}, "w")
KINDS = {
  "x.tar": TAR,
  "x.tgz": gzip.compress(TAR),
  "x.tar.gz": gzip.compress(TAR),
  "x.tar.bz2": bz2.compress(TAR),
  "x.tar.xz": lzma.compress(TAR),
  "x.zip": zipped({"a/x.tsv": LINES, "y.tsv": b"more\n" * 99}),
}


def unpacked(folder, limits=None, is_useful=lambda name: True):
  """Path to content of what is unpacked of a folder's archives."""
  work = folder.parent / "work"
  archives.unpack(folder, work, is_useful, limits)
  return {
    archives.shown_name(str(path.relative_to(work))): path.read_bytes()
    for path in archives.files(work)
  }


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_unpacked(tmp_path, name):
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / name).write_bytes(KINDS[name])
  found = unpacked(tmp_path / "raw")
  assert found == {f"{name}/a/x.tsv": LINES, f"{name}/y.tsv": b"more\n" * 99}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_an_archive_that_breaks_off_is_damaged(tmp_path, name, share):
  raw = tmp_path / "raw"
  raw.mkdir()
  data = KINDS[name]
  whole = data.rstrip(b"\0") if name == "x.tar" else data
  (raw / name).write_bytes(whole[: int(len(whole) * share)])
  with pytest.raises(ValueError, match=rf"{name} is not a whole .*download it"):
    unpacked(raw)
  # Nothing half is taken for whole.
  (raw / name).write_bytes(data)
  assert len(unpacked(raw)) == 2


@pytest.mark.parametrize("name", [name for name in KINDS if name != "x.tar"])
def test_a_changed_byte_is_noticed(tmp_path, name):
  data = bytearray(KINDS[name])
  data[len(data) // 3] ^= 64
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / name).write_bytes(data)
  with pytest.raises(ValueError, match=rf"{name} is not a whole .*download it"):
    unpacked(tmp_path / "raw")


def with_byte(data, signature, offset, value):
  """A zip archive with another byte in all headers of a kind."""
  data = bytearray(data)
  at = data.find(signature)
  while at >= 0:
    data[at + offset] = value
    at = data.find(signature, at + 1)
  return bytes(data)


ENCRYPTED = with_byte(
  with_byte(KINDS["x.zip"], b"PK\x01\x02", 8, 1), b"PK\x03\x04", 6, 1
)
UNKNOWN = with_byte(
  with_byte(KINDS["x.zip"], b"PK\x01\x02", 10, 97), b"PK\x03\x04", 8, 97
)


@pytest.mark.parametrize(
  "name, data, message",
  [
    ("x.zip", ENCRYPTED, "x.zip is encrypted: unpack it yourself"),
    ("x.zip", UNKNOWN, r"a method that Python does not know \(97\): unpack it"),
    (
      "x.tgz",
      b"\x28\xb5\x2f\xfd" + b"zstd" * 99,
      "is no tar archive, or is comp",
    ),
    ("x.tar", b"<html>404 not found</html>", "is no tar archive"),
    ("x.zip", b"<html>404 not found</html>", "is not a whole archive"),
    ("x.zip", b"", "is not a whole archive"),
    ("x.tgz", b"", "is no tar archive"),
  ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, data, message):
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / name).write_bytes(data)
  with pytest.raises(ValueError, match=message) as caught:
    unpacked(tmp_path / "raw")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
  "limits, message",
  [
    ({"files": 1}, "more than 1 files"),
    ({"gigabytes": 1e-5}, r"more than 1e-05 GB of files \(--max_unpacked_gb\)"),
    ({"ratio": 0.5, "ratio_from": 1000}, "more than 0.5 times its size"),
  ],
)
def test_there_are_limits(tmp_path, name, limits, message):
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / name).write_bytes(KINDS[name])
  with pytest.raises(ValueError, match=message):
    unpacked(tmp_path / "raw", archives.Limits(**limits))


def test_limits_hold_over_archives_in_archives(tmp_path):
  inner = zipped({f"{i}.tsv": b"a\tb\n" for i in range(9)})
  outer = zipped({f"{i}.zip": inner for i in range(9)})
  raw = files(tmp_path / "raw", {"x.zip": outer})
  assert len(unpacked(raw)) == 9 + 81
  raw = files(tmp_path / "again/raw", {"x.zip": outer})
  with pytest.raises(ValueError, match="more than 50 files"):
    unpacked(raw, archives.Limits(files=50))


def test_text_that_repeats_itself_is_no_bomb(tmp_path):
  raw = files(tmp_path / "raw", {"x.tgz": tar({"x.tsv": b"a\tb\n" * 99_999})})
  assert unpacked(raw) == {"x.tgz/x.tsv": b"a\tb\n" * 99_999}


def test_a_full_disk_is_not_a_damaged_archive(tmp_path, monkeypatch):
  raw = files(tmp_path / "raw", {"x.zip": KINDS["x.zip"]})

  def full(path, mode):
    return open("/dev/full" if mode == "wb" else path, mode)

  monkeypatch.setattr(archives, "open", full, raising=False)
  with pytest.raises(ValueError, match=r"is full after .* of .*x\.zip: make"):
    unpacked(raw)
  monkeypatch.undo()
  assert len(unpacked(raw)) == 2


@pytest.mark.parametrize(
  "member", ["../../../escaped.tsv", "/escaped.tsv", "a/../../escaped.tsv"]
)
def test_archives_cannot_write_elsewhere(tmp_path, member):
  raw = files(
    tmp_path / "deep/er/raw",
    {"x.tgz": tar({member: b"a\tb\n"}), "y.zip": zipped({member: b"a\tb\n"})},
  )
  assert len(unpacked(raw)) == 2
  found = {p for p in tmp_path.rglob("*") if p.name == "escaped.tsv"}
  assert len(found) == 2 and all("work" in path.parts for path in found)
  assert not pathlib.Path("/escaped.tsv").exists()


def test_links_and_devices_are_not_followed(tmp_path):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as archive:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
      info = tarfile.TarInfo(f"{kind.decode()}.tsv")
      info.type, info.linkname = kind, "/etc/passwd"
      archive.addfile(info)
  raw = files(tmp_path / "raw", {"x.tar": buffer.getvalue()})
  assert unpacked(raw) == {}


def test_only_what_is_useful_is_unpacked_and_once(tmp_path):
  raw = files(tmp_path / "raw", {"x.zip": KINDS["x.zip"], "z.tar": TAR})
  found = unpacked(raw, is_useful=lambda name: name == "x.zip/a/x.tsv")
  assert list(found) == ["x.zip/a/x.tsv"]
  work = tmp_path / "work"
  (work / "x.zip.files/a/x.tsv").write_bytes(b"as it was left")
  useless = archives.unpack(raw, work, lambda name: True)
  assert (work / "x.zip.files/a/x.tsv").read_bytes() == b"as it was left"
  assert useless == ["z.tar"]
