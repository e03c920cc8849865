"""Searches against enumeration and a plain Python beam search.

The model under test is a random table of logits for every prefix of every
source, so that a wrong prefix, cache row or source shows.
"""

import collections
import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from basemt_jax import decoding

VOCAB = 4  # Padding, EOS and two words.
LENGTH = 4
NUM_HYPOTHESES = 1 + 2 + 4 + 8  # EOS after 0, 1, 2 or 3 words.
BATCH = 3


def random_tables(seed, batch=BATCH, scale=2.0):
  """Logits [batch, prefix code, VOCAB] of all prefixes."""
  rng = np.random.default_rng(seed)
  size = (batch, VOCAB**LENGTH, VOCAB)
  return rng.normal(scale=scale, size=size).astype(np.float32)


def table_model(tables):
  """tokens_to_logits over tables; the cache holds each sequence's prefix."""

  def tokens_to_logits(tokens, cache):
    assert tokens.ndim == 2 and tokens.shape[1] == 1
    assert tokens.dtype == jnp.int32
    # The start token (0) leaves the code of the empty prefix as it is.
    code = cache["code"] * VOCAB + tokens[:, 0]
    logits = jnp.asarray(tables)[cache["source"], code]
    return logits, {
      "code": code,
      "source": cache["source"],
      "index": cache["index"] + 1,
    }

  return tokens_to_logits


def table_cache(batch, beam_size):
  return {
    "code": jnp.zeros(batch * beam_size, jnp.int32),
    "source": jnp.repeat(jnp.arange(batch), beam_size),
    "index": jnp.int32(0),
  }


@jax.jit
def greedy(tables, limits, alpha):
  batch = tables.shape[0]
  return decoding.greedy_search(
    table_model(tables), table_cache(batch, 1), limits, LENGTH, alpha
  )


def beam(tables, limits, beam_size, alpha, num_return=None):
  return _beam(tables, limits, alpha, beam_size, num_return)


def _beam_unjitted(tables, limits, alpha, beam_size, num_return):
  batch = tables.shape[0]
  return decoding.beam_search(
    table_model(tables),
    table_cache(batch, beam_size),
    limits,
    LENGTH,
    beam_size,
    alpha,
    num_return,
  )


_beam = jax.jit(_beam_unjitted, static_argnums=(3, 4))


def full_limits(batch=BATCH):
  return np.full(batch, LENGTH, np.int32)


def token_log_probs(table, prefix):
  code = 0
  for token in prefix:
    code = code * VOCAB + token
  logits = table[code].astype(np.float64)
  return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def penalty(length, alpha):
  return ((5 + length) / 6) ** alpha


def enumerate_all(table, limit, alpha):
  """All hypotheses as (score, ids with EOS), best first."""
  found = []
  for words in range(limit):
    for prefix in itertools.product((2, 3), repeat=words):
      ids = (*prefix, 1)
      total = sum(
        token_log_probs(table, ids[:i])[ids[i]] for i in range(len(ids))
      )
      found.append((total / penalty(len(ids), alpha), ids))
  return sorted(found, reverse=True)


def plain_beam_search(table, limit, beam_size, alpha):
  """The documented algorithm with lists, without early stopping by bound."""
  live, ended = [(0.0, ())], []
  for step in range(limit):
    extensions = []
    for total, prefix in live:
      log_probs = token_log_probs(table, prefix)
      for token in (1, 2, 3) if step + 1 < limit else (1,):
        extensions.append((total + log_probs[token], (*prefix, token)))
    extensions.sort(reverse=True)
    for total, ids in extensions[:beam_size]:
      if ids[-1] == 1:
        ended.append((total / penalty(len(ids), alpha), ids))
    live = [e for e in extensions if e[1][-1] != 1][:beam_size]
    if beam_size == 1 and ended:
      break
  return sorted(ended, reverse=True)[:beam_size]


def as_lists(found, source):
  """[(score, ids with EOS)] of one source, without the missing ones."""
  result = []
  for score, ids in zip(found.scores[source], found.ids[source], strict=True):
    if score > -np.inf:
      end = list(ids).index(1) + 1
      assert not np.any(ids[end:])
      result.append((float(score), tuple(int(i) for i in ids[:end])))
  return result


def assert_same(actual, expected):
  assert [ids for _, ids in actual] == [ids for _, ids in expected]
  np.testing.assert_allclose(
    [score for score, _ in actual],
    [score for score, _ in expected],
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5, -0.5])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beam_finds_all_hypotheses_in_order(seed, alpha):
  tables = random_tables(seed)
  found = beam(tables, full_limits(), NUM_HYPOTHESES, alpha)
  for source in range(BATCH):
    assert_same(
      as_lists(found, source), enumerate_all(tables[source], LENGTH, alpha)
    )


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_beam_equals_plain_search(seed, beam_size):
  tables = random_tables(seed)
  found = beam(tables, full_limits(), beam_size, 0.6)
  for source in range(BATCH):
    assert_same(
      as_lists(found, source),
      plain_beam_search(tables[source], LENGTH, beam_size, 0.6),
    )


@hypothesis.given(
  seed=st.integers(0, 10**6),
  alpha=st.floats(-1, 2),
  scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
  limits=st.tuples(*[st.integers(1, LENGTH)] * BATCH),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_beam_of_one_is_greedy(seed, alpha, scale, limits):
  tables = random_tables(seed, scale=scale)  # Scale 0: ties everywhere.
  limits = np.asarray(limits, np.int32)
  alpha = np.float32(alpha)
  one, chosen = beam(tables, limits, 1, alpha), greedy(tables, limits, alpha)
  np.testing.assert_array_equal(one.ids, chosen.ids)
  np.testing.assert_allclose(one.scores, chosen.scores, rtol=1e-6)


def test_beam_of_one_keeps_its_first_hypothesis_while_others_go_on():
  # EOS has 0.51, word 2 has 0.49 and then ends for sure, which scores better:
  # log(0.51) = -0.67, log(0.49) / (7 / 6)^2 = -0.52.
  tables = np.full((2, VOCAB**LENGTH, VOCAB), -30, np.float32)
  tables[0, 0, [1, 2]] = np.log([0.51, 0.49])
  tables[0, 2, 1] = 0
  tables[1, :, 2] = 0
  found = beam(tables, full_limits(2), 1, 2.0)
  assert as_lists(found, 0)[0][1] == (1,)
  assert as_lists(found, 1)[0][1] == (2, 2, 2, 1)


@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(deadline=None, max_examples=30)
def test_greedy_follows_the_most_probable_token(seed):
  tables = random_tables(seed)
  found = greedy(tables, full_limits(), np.float32(0.6))
  for source in range(BATCH):
    ids, total = (), 0.0
    while not ids or ids[-1] != 1:
      log_probs = token_log_probs(tables[source], ids)
      allowed = (1, 2, 3) if len(ids) + 1 < LENGTH else (1,)
      token = max(allowed, key=lambda t, log_probs=log_probs: log_probs[t])
      total += log_probs[token]
      ids = (*ids, token)
    expected = [(total / penalty(len(ids), 0.6), ids)]
    assert_same(as_lists(found, source), expected)


@hypothesis.given(
  seed=st.integers(0, 10**6),
  alpha=st.floats(-1, 2),
  limits=st.tuples(*[st.integers(1, LENGTH)] * BATCH),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_hypotheses_are_distinct_complete_sorted_and_within_limits(
  seed, alpha, limits
):
  tables = random_tables(seed)
  found = beam(tables, np.asarray(limits, np.int32), 3, np.float32(alpha))
  assert found.ids.shape == (BATCH, 3, LENGTH)
  assert found.ids.dtype == np.int32 and found.scores.dtype == np.float32
  for source in range(BATCH):
    nbest = as_lists(found, source)
    assert 1 <= len(nbest) == min(3, 2 ** limits[source] - 1)
    assert len({ids for _, ids in nbest}) == len(nbest)
    scores = [score for score, _ in nbest]
    assert scores == sorted(scores, reverse=True)
    for score, ids in nbest:
      assert len(ids) <= limits[source]
      total = sum(
        token_log_probs(tables[source], ids[:i])[ids[i]]
        for i in range(len(ids))
      )
      assert score == pytest.approx(
        total / penalty(len(ids), alpha), rel=1e-4, abs=1e-5
      )


@hypothesis.given(
  seed=st.integers(0, 10**6), alpha=st.sampled_from([-0.7, 0.0, 0.6, 2.0])
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_stopping_early_changes_nothing(seed, alpha):
  tables, alpha = random_tables(seed), np.float32(alpha)
  all_five = beam(tables, full_limits(), 5, alpha)
  for num_return in (1, 2):
    some = beam(tables, full_limits(), 5, alpha, num_return)
    np.testing.assert_array_equal(some.ids, all_five.ids[:, :num_return])
    np.testing.assert_array_equal(some.scores, all_five.scores[:, :num_return])


def test_bad_hypotheses_do_not_stop_the_search():
  # EOS is always among the three best, at e^-10, until three words are said.
  tables = np.full((1, VOCAB**LENGTH, VOCAB), -20, np.float32)
  tables[:, :, 1], tables[:, :, 2] = -10, 0
  tables[0, (2 * 4 + 2) * 4 + 2, [1, 2]] = 0, -10
  found = beam(tables, full_limits(1), 3, 0.6)
  assert as_lists(found, 0)[0][1] == (2, 2, 2, 1)


@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(deadline=None, max_examples=20)
def test_a_source_does_not_depend_on_the_others(seed):
  tables = random_tables(seed)
  # Another source that ends at once, and one that never wants to.
  others = random_tables(seed + 1, batch=2)
  others[0, :, 1], others[1, :, 1] = 50, -50
  mixed = beam(np.stack([others[0], tables[0], others[1]]), full_limits(), 3, 0)
  same = beam(np.stack([tables[0]] * BATCH), full_limits(), 3, 0)
  np.testing.assert_array_equal(mixed.ids[1], same.ids[0])
  np.testing.assert_array_equal(mixed.scores[1], same.scores[0])


@pytest.mark.parametrize("beam_size", [1, 3])
def test_loop_ends_when_all_sources_are_done(beam_size):
  tables = random_tables(0)
  tables[:, :, 1] = 50  # EOS, always.
  model, calls = table_model(tables), []

  def counting(tokens, cache):
    jax.debug.callback(lambda: calls.append(tokens.shape))
    return model(tokens, cache)

  @jax.jit
  def search():
    cache = table_cache(BATCH, beam_size)
    if beam_size == 1:
      return decoding.greedy_search(counting, cache, full_limits(), LENGTH)
    return decoding.beam_search(
      counting, cache, full_limits(), LENGTH, beam_size, 0.6, num_return=1
    )

  jax.block_until_ready(search())
  jax.effects_barrier()
  assert calls == [(BATCH * beam_size, 1)]


def test_padding_is_never_produced():
  tables = random_tables(0)
  tables[:, :, 0] = 50
  found = beam(tables, full_limits(), 3, 0.6)
  for source in range(BATCH):
    assert all(0 not in ids for _, ids in as_lists(found, source))
  assert np.all(np.isfinite(greedy(tables, full_limits(), 0.6).scores))


def test_a_sequence_that_never_ends_is_ended_at_its_limit():
  tables = np.zeros((BATCH, VOCAB**LENGTH, VOCAB), np.float32)
  tables[:, :, 1] = -40  # EOS: log-probability -40 - log(3 + e^-40).
  tables[:, :, 2] = 0.5
  limits = np.asarray([1, 2, LENGTH], np.int32)
  found = greedy(tables, limits, np.float32(0))
  np.testing.assert_array_equal(
    found.ids[:, 0], [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 2, 1]]
  )
  log_z = math.log(2 + math.exp(0.5))
  np.testing.assert_allclose(
    found.scores[:, 0],
    [-40 - log_z, -39.5 - 2 * log_z, -38.5 - 4 * log_z],
    rtol=1e-6,
  )


def test_length_penalty_prefers_longer_hypotheses():
  # EOS after one word has 0.45; going on to three words 0.55 * 0.8 = 0.44;
  # log(0.45) / (7 / 6) = -0.68, log(0.44) / (9 / 6) = -0.55.
  tables = np.full((1, VOCAB**LENGTH, VOCAB), -30, np.float32)
  tables[0, 0, 2] = 0
  tables[0, 2, [1, 3]] = np.log([0.45, 0.55])
  tables[0, 2 * 4 + 3, [2, 3]] = np.log([0.8, 0.2])
  tables[0, (2 * 4 + 3) * 4 + 2, 1] = 0
  best = {
    alpha: as_lists(beam(tables, full_limits(1), 3, alpha), 0)[0][1]
    for alpha in (0.0, 1.0)
  }
  assert best == {0.0: (2, 1), 1.0: (2, 3, 2, 1)}


def test_length_penalty_is_that_of_gnmt():
  np.testing.assert_allclose(
    decoding.length_penalty(jnp.array([1, 7, 13]), 0.5),
    [1.0, math.sqrt(2), math.sqrt(3)],
    rtol=1e-6,
  )


def test_no_more_beams_than_hypotheses_exist():
  found = beam(random_tables(0), np.ones(BATCH, np.int32), 3, 0.6)
  np.testing.assert_array_equal(np.isinf(found.scores), [[0, 1, 1]] * BATCH)
  np.testing.assert_array_equal(found.ids[:, 0], [[1, 0, 0, 0]] * BATCH)
  assert not np.any(found.ids[:, 1:])


PREFIXES = ((), (2,), (3, 2))


def padded(prefixes):
  rows = np.zeros((len(prefixes), LENGTH), np.int32)
  for row, prefix in zip(rows, prefixes, strict=True):
    row[: len(prefix)] = prefix
  return rows


@hypothesis.given(
  seed=st.integers(0, 10**6),
  order=st.permutations(PREFIXES),
  alpha=st.sampled_from([0.0, 0.6]),
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_forced_prefixes_leave_the_best_that_begin_so(seed, order, alpha):
  tables, alpha = random_tables(seed), np.float32(alpha)
  found = _prefixed(tables, padded(order), alpha, NUM_HYPOTHESES)
  for source, prefix in enumerate(order):
    expected = [
      (score, ids)
      for score, ids in enumerate_all(tables[source], LENGTH, alpha)
      if ids[: len(prefix)] == prefix
    ]
    assert_same(as_lists(found, source), expected)
  one = _prefixed(tables, padded(order), alpha, 1)
  greedy = _prefixed(tables, padded(order), alpha, 0)
  np.testing.assert_array_equal(one.ids, greedy.ids)
  np.testing.assert_allclose(one.scores, greedy.scores, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=3)
def _prefixed(tables, prefixes, alpha, beam_size):
  model, limits = table_model(tables), full_limits()
  cache = table_cache(BATCH, max(1, beam_size))
  if not beam_size:
    return decoding.greedy_search(model, cache, limits, LENGTH, alpha, prefixes)
  return decoding.beam_search(
    *(model, cache, limits, LENGTH, beam_size, alpha), prefixes=prefixes
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def sampled(tables, sampling, num_samples, numbers, length=LENGTH, prefix=None):
  batch = tables.shape[0]
  return decoding.sample(
    table_model(tables),
    table_cache(batch, num_samples),
    full_limits(batch),
    length,
    sampling,
    numbers,
    num_samples,
    0.0,
    prefix,
  )


def probabilities(table, sampling, limit=LENGTH):
  """Of every hypothesis, by enumeration in float64."""
  found = {}
  for _, ids in enumerate_all(table, limit, 0.0):
    total = 1.0
    for i, token in enumerate(ids):
      log_probs = token_log_probs(table, ids[:i])
      log_probs[0] = -np.inf
      if i + 1 == limit:
        log_probs[2:] = -np.inf
      weights = np.exp(log_probs / sampling.temperature)
      best = np.argsort(-weights)[: sampling.top_k or VOCAB]
      shares = weights[best] / weights[best].sum()
      before = np.cumsum(shares) - shares
      kept = dict(zip(best[before < sampling.top_p], shares, strict=False))
      total *= kept.get(token, 0.0) / sum(kept.values())
    found[ids] = total
  return found


@pytest.mark.parametrize(
  "sampling",
  [
    decoding.Sampling(),
    decoding.Sampling(temperature=0.5, seed=1),
    decoding.Sampling(top_k=2, temperature=2.0),
    decoding.Sampling(top_p=0.7, temperature=1.5, seed=3),
    decoding.Sampling(top_k=2, top_p=0.6),
  ],
)
def test_samples_are_as_frequent_as_they_are_probable(sampling):
  # One source many times, each with a number of its own.
  count, table = 2000, random_tables(5, batch=1, scale=1.0)
  tables = np.repeat(table, count, axis=0)
  found = sampled(tables, sampling, 2, np.arange(count, dtype=np.int32))
  drawn = collections.Counter(
    tuple(int(i) for i in ids[: list(ids).index(1) + 1])
    for ids in np.asarray(found.ids).reshape(-1, LENGTH)
  )
  expected = probabilities(table[0], sampling)
  assert sum(expected.values()) == pytest.approx(1)
  for ids, share in expected.items():
    deviation = math.sqrt(share * (1 - share) / (2 * count))
    assert abs(drawn[ids] / (2 * count) - share) <= 5 * deviation


@hypothesis.given(seed=st.integers(0, 1000), order=st.permutations(range(6)))
@hypothesis.settings(deadline=None, max_examples=15)
def test_what_is_sampled_depends_on_number_and_seed_alone(seed, order):
  tables, order = random_tables(seed, batch=6), np.array(order, np.int32)
  sampling = decoding.Sampling(top_p=0.9)
  found = sampled(tables, sampling, 2, np.arange(6, dtype=np.int32))
  other = sampled(tables[order], sampling, 2, order)
  np.testing.assert_array_equal(found.ids[order], other.ids)
  np.testing.assert_array_equal(found.scores[order], other.scores)
  some = sampled(tables[order[:2]], sampling, 2, order[:2])
  np.testing.assert_array_equal(some.ids, other.ids[:2])


def test_samples_of_a_source_differ_and_so_do_seeds():
  tables = np.zeros((1, VOCAB**LENGTH, VOCAB), np.float32)
  tables[:, :, 1] = -9  # Hardly ever ends by itself.
  number = np.zeros(1, np.int32)
  one, other = (
    np.asarray(sampled(tables, decoding.Sampling(seed=seed), 30, number).ids)
    for seed in (0, 1)
  )
  assert len({tuple(ids) for ids in one[0]}) >= 6  # Of 8 likely ones.
  assert (one != other).any()


def test_samples_begin_with_the_prefix_and_have_the_models_score():
  tables = random_tables(0)
  sampling = decoding.Sampling(temperature=3.0)
  numbers = np.arange(BATCH, dtype=np.int32)
  found = sampled(tables, sampling, 4, numbers, LENGTH, padded(PREFIXES))
  for source, prefix in enumerate(PREFIXES):
    scores = {ids: s for s, ids in enumerate_all(tables[source], LENGTH, 0.0)}
    for score, ids in as_lists(found, source):
      assert ids[: len(prefix)] == prefix
      assert score == pytest.approx(scores[ids], rel=1e-5)


def test_errors():
  tables, limits = random_tables(0), full_limits()
  with pytest.raises(ValueError, match="got 4 with beam size 3"):
    beam(tables, limits, 3, 0.6, 4)
  with pytest.raises(ValueError, match="got 0 with beam size 0"):
    beam(tables, limits, 0, 0.6)
  with pytest.raises(ValueError, match=r"'code'.*\(3,\).*beam size 2 needs 6"):
    decoding.beam_search(
      table_model(tables), table_cache(BATCH, 1), limits, LENGTH, 2
    )
