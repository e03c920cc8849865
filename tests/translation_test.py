"""Translation of lists, with a model whose answers are known by hand."""

import warnings

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from basemt_jax import decoding, model, translation

VOCAB = 20
EOS = 1
WORDS = st.integers(2, VOCAB - 3)
SOURCES = st.lists(st.lists(WORDS, max_size=30), max_size=12)


class Copier:
  """Copies the source, each word increased by `shift`, EOS as it is.

  At every step the right token has logit 20, the one after it 18, others 0.
  It reads the source through a memory that is moved only once and counts its
  steps in a cache with a row per sequence.
  """

  def __init__(self):
    self.traced = []

  def encode_tokens(self, variables, encoder_input_tokens):
    self.traced.append(encoder_input_tokens.shape)
    words = encoder_input_tokens + variables["params"]["shift"]
    return {"words": jnp.where(encoder_input_tokens > 1, words, EOS)}

  def init_cache(self, variables, memory, max_decode_length):
    rows = memory["words"].shape[0]
    return {"at": jnp.zeros(rows, jnp.int32), "index": jnp.int32(0)}

  def decode_step(self, variables, memory, cache, tokens):
    at = jnp.minimum(cache["at"], memory["words"].shape[1] - 1)
    right = jnp.take_along_axis(memory["words"], at[:, None], axis=1)
    # A copy that has left the source, or gone wrong, ends.
    before = jnp.take_along_axis(
      memory["words"], jnp.maximum(at - 1, 0)[:, None], axis=1
    )
    wrong = (cache["at"] > 0)[:, None] & (tokens != before)
    right = jnp.where(wrong, EOS, right)
    logits = 20.0 * jax.nn.one_hot(right[:, 0], VOCAB)
    logits += 18.0 * jax.nn.one_hot(right[:, 0] + 1, VOCAB)
    return logits, {"at": cache["at"] + 1, "index": cache["index"] + 1}


def make(shift=0, **options):
  options = {"batch_size": 4, "max_source_length": 32, **options}
  return translation.Translator(
    Copier(),
    {"params": {"shift": jnp.int32(shift)}},
    translation.SearchOptions(**options),
  )


GREEDY = make(shift=1)
BEAM = make(shift=1, beam_size=3, num_return=2)


@hypothesis.given(sources=SOURCES)
@hypothesis.settings(deadline=None, max_examples=40)
def test_order_is_kept_whatever_the_lengths(sources):
  for translator in (GREEDY, BEAM):
    found = translator.translate(sources)
    assert [nbest[0].ids for nbest in found] == [
      tuple(word + 1 for word in source) for source in sources
    ]


def test_eos_and_padding_of_a_source_do_not_matter():
  plain, ended, padded = GREEDY.translate([[5, 6], [5, 6, 1], [5, 6, 1, 0, 0]])
  assert plain == ended == padded


def test_empty_sources_have_empty_translations():
  found = BEAM.translate([[], [1], [7], [0, 0], [1, 0]])
  empty = [translation.Hypothesis(0.0, ())]
  assert found[0] == found[1] == found[3] == found[4] == empty
  assert found[2][0].ids == (8,)
  assert BEAM.translate([]) == []


def test_scores_are_those_of_the_model():
  # Two tokens, both with logit 20 against 18 and 18 zeros.
  log_prob = 20 - np.log(np.exp(20) + np.exp(18) + VOCAB - 2)
  nbest = BEAM.translate([[7]])[0]
  assert nbest[0].ids == (8,)
  assert nbest[0].score == pytest.approx(2 * log_prob / (7 / 6) ** 0.6)
  # With one token replaced by the one after it (log-probability 2 less): the
  # last (EOS by 2, then another EOS) gives -2.38 / (8 / 6)^0.6 = -2.00, the
  # first gives -2.25 / (7 / 6)^0.6 = -2.05.
  assert nbest[1].ids == (8, 2)
  assert nbest[1].score == pytest.approx((3 * log_prob - 2) / (8 / 6) ** 0.6)


@hypothesis.given(sources=SOURCES)
@hypothesis.settings(deadline=None, max_examples=15)
def test_buckets_and_batches_change_nothing(sources):
  reference = BEAM.translate(sources)
  for translator in (OTHER_BUCKETS, OTHER_BATCHES):
    found = translator.translate(sources)
    assert [[h.ids for h in nbest] for nbest in found] == [
      [h.ids for h in nbest] for nbest in reference
    ]
    np.testing.assert_allclose(
      [h.score for nbest in found for h in nbest],
      [h.score for nbest in reference for h in nbest],
      rtol=1e-5,
    )


OTHER_BUCKETS = make(shift=1, beam_size=3, num_return=2, smallest_bucket=5)
OTHER_BATCHES = make(shift=1, beam_size=3, num_return=2, batch_size=3)


def test_compiled_once_per_bucket_and_not_for_new_parameters():
  translator = make(smallest_bucket=4)
  # With EOS, lengths 3, 5, 5, 9 and so on: buckets 4, 8, 16, 32.
  for _ in range(2):
    for length in (2, 4, 3, 5, 6, 8, 14, 18, 30):
      translator.translate([[5] * length])
  translator.variables = {"params": {"shift": jnp.int32(2)}}
  assert translator.translate([[5, 6]])[0][0].ids == (7, 8)
  assert sorted(translator._model.traced) == [(1, 4), (1, 8), (1, 16), (1, 32)]


@pytest.mark.parametrize(
  "counts, shapes",
  [
    # Sources of 3, 14 and 30 tokens with EOS, in batches of 16.
    ((1, 0, 0), {(1, 4)}),
    ((3, 0, 2), {(8, 32)}),
    ((16, 0, 1), {(16, 32)}),  # One batch of short ones: not worth its own.
    ((32, 16, 1), {(16, 4), (16, 32)}),
    ((32, 32, 32), {(16, 4), (16, 16), (16, 32)}),
  ],
)
def test_few_sources_share_programs(counts, shapes):
  translator = make(smallest_bucket=4, batch_size=16)
  sources = [
    [5 + i] * (length - 1)
    for i, (count, length) in enumerate(zip(counts, (3, 14, 30), strict=True))
    for _ in range(count)
  ]
  found = translator.translate(sources)
  assert [nbest[0].ids for nbest in found] == [tuple(s) for s in sources]
  assert set(translator._model.traced) == shapes


@pytest.mark.parametrize(
  "length, bucket", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 100)]
)
def test_bucket(length, bucket):
  options = translation.SearchOptions(max_source_length=100)
  assert options.bucket(length) == bucket


@hypothesis.given(
  length=st.integers(1, 200),
  smallest=st.integers(1, 300),
  ratio=st.floats(0, 4),
  offset=st.integers(-5, 20),
)
def test_bucket_holds_the_source_and_its_hypotheses(
  length, smallest, ratio, offset
):
  options = translation.SearchOptions(
    max_source_length=200,
    smallest_bucket=smallest,
    length_ratio=ratio,
    length_offset=offset,
  )
  bucket = options.bucket(length)
  assert length <= bucket <= 200
  assert 1 <= options.limit(length) <= options.limit(bucket) <= 256


def test_long_sources_are_cut_with_a_warning():
  translator = make(max_source_length=8)
  with pytest.warns(
    UserWarning,
    match=r"1 of 2 sources .* max_source_length 8 \(the longest has 13 tokens",
  ):
    found = translator.translate([[5] * 12, [6] * 7])
  assert [nbest[0].ids for nbest in found] == [(5,) * 7, (6,) * 7]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    translator.translate([[6] * 7])


def test_hypotheses_are_no_longer_than_the_limit_of_their_source():
  translator = make(length_ratio=0.5, length_offset=1, max_target_length=5)
  found = translator.translate([[5] * length for length in (1, 3, 5, 30)])
  # Of n words and EOS: ceil((n + 1) / 2) + 1 tokens, at most 5, one is EOS.
  assert [len(nbest[0].ids) for nbest in found] == [1, 2, 3, 4]


def test_progress_is_told():
  told = []
  GREEDY.translate([[5]] * 9 + [[]], lambda *counts: told.append(counts))
  assert told == [(4, 9), (8, 9), (9, 9)]


def test_what_progress_raises_ends_the_search(monkeypatch):
  searched, search = [], GREEDY._translate_batch

  def counted(*arguments):
    searched.append(arguments)
    return search(*arguments)

  def stop(done, total):
    raise KeyboardInterrupt

  monkeypatch.setattr(GREEDY, "_translate_batch", counted)
  with pytest.raises(KeyboardInterrupt):
    GREEDY.translate([[5]] * 40, stop)
  # All are of one length, and the first batch of a length comes alone.
  assert len(searched) == 1


def test_sharded_batch_translates_the_same():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
  row_sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("data")
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  translator = translation.Translator(
    Copier(),
    jax.device_put({"params": {"shift": jnp.int32(1)}}, everywhere),
    # Made a multiple of the four devices.
    translation.SearchOptions(batch_size=3, max_source_length=32),
    batch_sharding=row_sharding,
  )
  sources = [[5, 6, 7], [8], [9, 10]]
  assert translator.translate(sources) == GREEDY.translate(sources)


def test_no_more_hypotheses_than_beams():
  with pytest.raises(ValueError, match="num_return 3 with beam_size 2"):
    translation.SearchOptions(beam_size=2, num_return=3)


def test_prefixes_come_on_top_of_the_limit():
  translator = make(shift=1, length_ratio=1.0, length_offset=0)
  prefix = [9] * 6
  sources = [[5, 6], [5, 6, 7], []]
  found = translator.translate(sources, prefixes=[prefix, [], prefix])
  # The copier ends when it was led astray.
  assert [nbest[0].ids for nbest in found] == [tuple(prefix), (6, 7, 8), ()]
  long = make(max_target_length=7).translate([[5]], prefixes=[prefix])
  assert long[0][0].ids == tuple(prefix)
  with pytest.raises(ValueError, match="prefix of sentence 2 has 6 tokens"):
    make(max_target_length=6).translate([[5], [5]], prefixes=[[2], prefix])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_samples_do_not_depend_on_batches(batch_size):
  sources = [[5, 6, 7], [8], [9, 10, 2, 3], [5, 6, 7], [8]]
  sampling = decoding.Sampling(temperature=20.0, top_k=5, seed=3)
  options = {"sampling": sampling, "num_return": 3}
  found = make(**options).translate(sources)
  assert found[0] != found[3] and len(found[0]) == 3
  other = make(**options, batch_size=batch_size)
  again = other.translate(sources[2:] + sources[:2], numbers=[2, 3, 4, 0, 1])
  assert [[h.ids for h in nbest] for nbest in again] == [
    [h.ids for h in nbest] for nbest in found[2:] + found[:2]
  ]


SOURCE_LENGTH, TARGET_LENGTH = 12, 8


@pytest.fixture(scope="module")
def transformer():
  """A random Transformer and its variables."""
  network = model.Transformer(
    model.TransformerConfig(
      vocab_size=VOCAB,
      emb_dim=16,
      num_heads=2,
      head_dim=8,
      mlp_dim=32,
      num_encoder_layers=1,
      num_decoder_layers=2,
    )
  )
  tokens = jnp.full((1, 4), 2, jnp.int32)
  init = jax.jit(network.init)
  variables = init(jax.random.key(0), tokens, tokens, tokens)
  return network, {"params": variables["params"]}


TRANSFORMER_SOURCES = [
  [3, 4, 5],
  [6] * 11,
  [7, 8],
  [9, 3, 9, 3, 9],
  [19, 2],
  [4],
]


def transformer_options(**options):
  return translation.SearchOptions(
    max_source_length=SOURCE_LENGTH,
    max_target_length=TARGET_LENGTH,
    **{"batch_size": 4, "alpha": 0.0, **options},
  )


def test_translation_equals_decoding_without_cache(transformer):
  network, variables = transformer
  forward = jax.jit(lambda *tokens: network.apply(variables, *tokens))
  found = translation.Translator(
    network, variables, transformer_options()
  ).translate(TRANSFORMER_SOURCES)
  for source, nbest in zip(TRANSFORMER_SOURCES, found, strict=True):
    padded = np.zeros((1, SOURCE_LENGTH), np.int32)
    padded[0, : len(source) + 1] = [*source, EOS]
    ids, total = [], 0.0
    while EOS not in ids:
      inputs = np.zeros((1, TARGET_LENGTH), np.int32)
      inputs[0, 1 : len(ids) + 1] = ids
      # All positions count as real: none sees a later one.
      targets = np.ones((1, TARGET_LENGTH), np.int32)
      logits = forward(padded, inputs, targets)[0, len(ids)]
      log_probs = np.array(jax.nn.log_softmax(logits))
      log_probs[0] = -np.inf
      last = len(ids) + 1 == TARGET_LENGTH
      token = EOS if last else int(np.argmax(log_probs))
      total += log_probs[token]
      ids.append(token)
    assert nbest[0].ids == tuple(ids[:-1])
    assert nbest[0].score == pytest.approx(total, rel=1e-4)


def test_padding_changes_no_translation_of_a_transformer(transformer):
  network, variables = transformer
  one, other = (
    translation.Translator(
      network,
      variables,
      transformer_options(beam_size=3, num_return=3, **options),
    ).translate(TRANSFORMER_SOURCES)
    for options in ({}, {"batch_size": 1, "smallest_bucket": 3})
  )
  for some, same in zip(one, other, strict=True):
    assert [h.ids for h in some] == [h.ids for h in same]
    np.testing.assert_allclose(
      [h.score for h in some], [h.score for h in same], rtol=1e-4
    )
