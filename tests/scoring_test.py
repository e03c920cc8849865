"""Scores of given pairs, against the plain network and against the search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from basemt_jax import model, scoring, translation

OPTIONS = translation.SearchOptions(
  beam_size=3,
  num_return=3,
  batch_size=4,
  max_source_length=16,
  max_target_length=10,
  smallest_bucket=4,
)
RANDOM = np.random.default_rng(0)
PAIRS = [
  (RANDOM.integers(2, 384, a).tolist(), RANDOM.integers(2, 384, b).tolist())
  for a, b in ((3, 4), (1, 9), (3, 4), (15, 0), (1, 9))
]


@pytest.fixture(scope="module", params=["dense", "experts"])
def network(request):
  """A random network, its greedy routing far from even, and its variables."""
  config = toy.SPARSE if request.param == "experts" else toy.DENSE
  network = model.Transformer(config)
  tokens = jnp.full((2, 4), 2, jnp.int32)
  init = jax.jit(network.init)
  variables = init(jax.random.key(0), tokens, tokens, tokens)
  variables = {k: v for k, v in variables.items() if k in ("params", "prices")}
  return network, jax.tree.map(lambda x: 2 * x, variables)


def score(network, pairs=PAIRS, **options):
  options = dataclasses.replace(OPTIONS, **options)
  return scoring.Scorer(*network, options).score(*zip(*pairs, strict=True))


def test_scores_are_those_of_each_pair_alone_by_the_definition(network):
  apply = jax.jit(network[0].apply)
  for (source, target), found in zip(PAIRS, score(network), strict=True):
    inputs = np.array([[*source, 1]], np.int32)
    outputs = np.array([[*target, 1]], np.int32)
    shifted = np.array([[0, *target]], np.int32)
    logits = np.float64(apply(network[1], inputs, shifted, outputs)[0])
    log_z = np.log(np.exp(logits).sum(axis=-1))
    expected = logits[np.arange(len(log_z)), outputs[0]] - log_z
    np.testing.assert_allclose(found.token_log_probs, expected, atol=2e-5)
    assert found.total == pytest.approx(expected.sum(), abs=1e-4)
    assert found.per_token == pytest.approx(expected.mean(), abs=2e-5)


def test_a_search_scores_its_own_output_alike(network):
  sources = [source for source, _ in PAIRS]
  options = dataclasses.replace(OPTIONS, alpha=0.8, smallest_bucket=16)
  nbest = translation.Translator(*network, options).translate(sources)
  pairs = [
    (source, hypothesis.ids)
    for source, found in zip(sources, nbest, strict=True)
    for hypothesis in found
  ]
  assert len(pairs) == 3 * len(sources)
  np.testing.assert_allclose(
    [found.normalised(0.8) for found in score(network, pairs)],
    [hypothesis.score for found in nbest for hypothesis in found],
    rtol=1e-4,
  )


def test_batches_and_buckets_change_nothing(network):
  expected = [found.total for found in score(network)]
  found = score(network, batch_size=1, smallest_bucket=16)
  np.testing.assert_allclose([x.total for x in found], expected, rtol=1e-5)


def test_what_is_too_long_is_refused(network):
  long = [([2] * 16, [2]), ([2], [2] * 10)]
  scorer = scoring.Scorer(*network, OPTIONS)
  assert [scorer.too_long(*pair) for pair in [*long, PAIRS[0]]] == [
    "source longer than 16 tokens",
    "target longer than 10 tokens",
    "",
  ]
  with pytest.raises(ValueError, match="target longer than 10 tokens"):
    score(network, long[1:])
