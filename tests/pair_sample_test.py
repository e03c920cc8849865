"""A sample of a split: across all of it, whoever reads it in which parts."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from basemt_jax.data import pair_sample

POSITIONS = st.integers(0, 1 << 40)


@hypothesis.given(POSITIONS, st.integers(0, 5000), st.integers(0, 5000))
def test_parts_have_what_the_whole_has(start, first, second):
  middle, stop = start + first, start + first + second
  parts = [
    *pair_sample.positions(start, middle),
    *pair_sample.positions(middle, stop),
  ]
  assert parts == pair_sample.positions(start, stop).tolist()


def test_small_splits_are_in_it_whole_and_large_ones_from_end_to_end():
  found = pair_sample.positions(0, 1 << 22)
  assert found[: 1 << 14].tolist() == list(range(1 << 14))
  # 8 doublings: as many of each as of the others, everywhere within it.
  counts, _ = np.histogram(np.log2(found[1 << 14 :]), np.arange(14, 23))
  assert (abs(counts / 8192 - 1) < 0.05).all()
  gaps = np.diff(found)[1 << 14 :] / found[1 + (1 << 14) :]
  assert gaps.max() < 0.01


@hypothesis.given(POSITIONS)
def test_blocks_rise_and_are_few(position):
  here, then = map(pair_sample.block_of, (position, position + 1))
  assert here <= then <= here + 1
  assert pair_sample.block_of(0) == 0
  assert pair_sample.block_of(10_000_000) < 400


@hypothesis.given(st.permutations(list(range(0, 3000, 97))), st.randoms())
def test_digests_depend_on_what_is_there_and_where(order, random):
  def digests(positions, change=None):
    found = []
    for position in positions:
      text = b"other" if position == change else b"text"
      pair_sample.add(found, position, text)
    return found

  whole = digests(sorted(order))
  assert digests(order) == whole
  changed = random.choice(order)
  differing = [
    i
    for i, (a, b) in enumerate(zip(whole, digests(order, changed), strict=True))
    if a != b
  ]
  assert differing == [pair_sample.block_of(changed)]
  moved = [position + 1 for position in order]
  assert digests(moved) != whole
