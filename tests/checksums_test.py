"""Checksums: files that differ in nothing but bytes."""

import os

from basemt_jax import checksums


def test_a_file_of_the_same_name_size_and_time_is_another(tmp_path):
  path = tmp_path / "text"
  for data in (b"some text" * 9, bytes(10_000_000)):
    path.write_bytes(data)
    before, time = checksums.stamp(path), path.stat().st_mtime_ns
    assert checksums.stamp(path) == before
    path.write_bytes(b"x" * len(data))
    os.utime(path, ns=(time, time))
    checksums._sampled.cache_clear()  # As in another process.
    after = checksums.stamp(path)
    assert after[:2] == before[:2] and after != before
