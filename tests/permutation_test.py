"""Permutations: each element once, every order as likely."""

import numpy as np
import pytest
import scipy.stats

from basemt_jax.data import permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_permuted_is_a_permutation(size):
  for key in (1, 2**63 + 11):
    keys = np.full(size, key, np.uint64)
    out = permutation.permuted(np.arange(size), np.full(size, size), keys)
    assert sorted(out.tolist()) == list(range(size))


def test_permutations_differ_and_are_uniform():
  # Where element 0 of 6 goes, and which pair the first two make, over keys.
  keys = permutation.mix(np.arange(1, 30_001).astype(np.uint64))
  size = np.full(len(keys), 6)
  first, second = (
    permutation.permuted(np.full(len(keys), i), size, keys) for i in (0, 1)
  )
  counts = np.bincount(first, minlength=6)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  pairs = np.bincount(first * 6 + second, minlength=36).reshape(6, 6)
  assert not np.diag(pairs).any()
  off_diagonal = pairs[~np.eye(6, dtype=bool)]
  assert scipy.stats.chisquare(off_diagonal).pvalue > 1e-3
