import concurrent.futures
import functools
import io
import itertools
import pathlib

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from basemt_jax import heating, sampling
from basemt_jax.data import (
  batches,
  declared,
  store_building,
  subword_sampling,
  vocabulary,
)
from tasks import common

CLDR = pathlib.Path(common.__file__).with_name("cldr.model")
PIECES = vocabulary.Vocabulary.load(CLDR)
LENGTHS = {"inputs": 64, "targets": 48}
SAMPLING = subword_sampling.SubwordSampling(0.2, versions=3)
PAIRS = {"en-de": 1100, "en-af": 40}
WORDS = ("Monday", "afternoon", "thirteen", "kilometres", "Germany", "litres")


def texts(split, direction):
  """Pairs of different numbers of words, ended by their number."""
  count = PAIRS[direction] if split == "train" else 5
  for i in range(count):
    words = [WORDS[i * k % len(WORDS)] for k in range(1, 3 + i % 4)]
    yield f"{' '.join(words)} {i}", f"{i} {' '.join(words[::-1])}"


def mixture(pieces=PIECES, pairs=PAIRS):
  feature = declared.Feature(pieces)
  return declared.Mixture(
    "corpus",
    [
      declared.Task(
        f"corpus.{name.replace('-', '_')}",
        common.PairSource(
          functools.partial(texts, direction=name),
          {"train": count, "validation": 5},
          prefix=f"<2{name[-2:]}> ",
        ),
        {"inputs": feature, "targets": feature},
      )
      for name, count in pairs.items()
    ],
  )


def build(directory, subwords=SAMPLING, **options):
  return store_building.build_store(
    mixture(), LENGTHS, directory, subwords=subwords, **options
  )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return build(tmp_path_factory.mktemp("store"))


def rows_of(store):
  files = sorted(store.directory.rglob("*.rows"))
  return {str(f.relative_to(store.directory)): f.read_bytes() for f in files}


def pairs_of(batch):
  """Ids of both sides of all pairs, row by row."""
  for r in range(len(batch["direction"])):
    source, target = (
      batch["encoder_segment_ids"][r],
      batch["decoder_segment_ids"][r],
    )
    for s in range(1, source.max() + 1):
      yield (
        tuple(batch["encoder_input_tokens"][r][source == s].tolist()),
        tuple(batch["decoder_target_tokens"][r][target == s].tolist()),
      )


@functools.cache
def bpe():
  """A model whose segmentations are drawn by leaving out merges."""
  words = [text for pair in texts("train", "en-de") for text in pair]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(words),
    model_writer=model,
    model_type="bpe",
    vocab_size=350,
    byte_fallback=True,
    hard_vocab_limit=False,
    user_defined_symbols=["\u2581<2de>"],
    **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
  )
  return vocabulary.Vocabulary(model.getvalue())


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  words=st.lists(st.sampled_from([*WORDS, "\u00e4hnlich", "\u661f\u671f"])),
  alpha=st.floats(0.05, 1.0),
  start=st.integers(0, 10**9),
  limit=st.integers(1, 40),
)
def test_what_is_drawn_is_the_same_text(kind, words, alpha, start, limit):
  pieces = bpe() if kind == "bpe" else PIECES
  draw = subword_sampling.Draw(alpha, "train.1/en-de")
  texts = [" ".join(words), "Monday", ""]
  drawn = draw.targets(pieces, texts, start, limit)
  assert drawn == draw.targets(pieces, texts, start, limit)
  for text, ids in zip(texts, drawn, strict=True):
    assert pieces.decode(ids) == pieces.decode(pieces.encode(text))
    # Nothing is cut that would not be cut anyhow.
    assert len(ids) < limit or ids == pieces.encode(text)
  tagged = [f"<2de> {text}".strip() for text in texts]
  tag = pieces.encode("<2de>")
  for text, ids in zip(
    tagged, draw.sources(pieces, tagged, start, 1000), strict=True
  ):
    assert ids[: len(tag)] == tag
    assert pieces.decode(ids) == pieces.decode(pieces.encode(text))


def test_versions_hold_the_same_pairs_in_other_segmentations(store):
  assert store.splits == ("train", "validation", "test")
  assert store.versions("train") == ("train", "train.1", "train.2")
  assert store.versions("validation") == ("validation",)
  for direction, name in enumerate(store.directions):
    found = []
    for version, split in enumerate(store.versions("train")):
      rows = np.arange(store.stats(split, name).rows)
      at = np.full(len(rows), direction)
      batch = store.read_mixed("train", at, rows, np.full(len(rows), version))
      decoded = {
        tuple(map(PIECES.decode, pair)): pair for pair in pairs_of(batch)
      }
      assert len(decoded) == PAIRS[name] == store.stats(split, name).pairs
      found.append(decoded)
    usual, first, second = found
    expected = {(f"<2{name[-2:]}> {a}", b) for a, b in texts("train", name)}
    assert usual.keys() == first.keys() == second.keys() == expected
    for text, pair in usual.items():
      assert pair == tuple((*PIECES.encode(t), 1) for t in text)
    for a, b in itertools.combinations(found, 2):
      differ = [a[t][side] != b[t][side] for t in a for side in (0, 1)]
      assert np.mean(differ) > 0.5


def test_the_usual_rows_are_what_they_are_without_sampling(store, tmp_path):
  plain = build(tmp_path, subword_sampling.SubwordSampling())
  assert plain.versions("train") == ("train",)
  known = rows_of(store)
  for file, data in rows_of(plain).items():
    assert known.pop(file) == data
  assert {file.split("/")[0] for file in known} == {"train.1", "train.2"}


def test_the_same_bytes_beside_another_and_after_an_interruption(
  store, tmp_path
):
  def stop(split, direction, done, total):
    if (split, direction) == ("train.1", "en-de") and done > 1024:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    build(tmp_path / "stopped", progress=stop)
  other = subword_sampling.SubwordSampling(0.3, versions=2)
  with concurrent.futures.ThreadPoolExecutor(3) as threads:
    again = threads.submit(build, tmp_path / "stopped")
    beside = threads.submit(build, tmp_path / "beside")
    threads.submit(build, tmp_path / "other", other).result()
  assert rows_of(again.result()) == rows_of(beside.result()) == rows_of(store)


def train_batches(store, **options):
  strategy = sampling.Strategy(heating.constant(2.0))
  return batches.TrainBatches(store, strategy, 16, seed=3, **options)


def test_epochs_take_turns_with_the_versions(store):
  source = train_batches(store)
  index = store.directions.index("en-af")
  seen = []
  for _ in range(80):
    batch = next(source)
    chosen = batch["direction"] == index
    rows = {name: value[chosen] for name, value in batch.items()}
    seen += [
      [*pairs_of({k: v[i : i + 1] for k, v in rows.items()})]
      for i in range(int(chosen.sum()))
    ]
  counts = [store.stats(v, "en-af").rows for v in store.versions("train")]
  ends = np.cumsum(counts * 2)
  starts = [0, *ends[:-1]]
  epochs = [
    list(itertools.chain.from_iterable(seen[a:b]))
    for a, b in zip(starts, ends, strict=True)
  ]
  decoded = [[tuple(map(PIECES.decode, pair)) for pair in e] for e in epochs]
  assert all(sorted(e) == sorted(decoded[0]) for e in decoded)
  assert len(decoded[0]) == PAIRS["en-af"]
  for first, second in zip(epochs[:3], epochs[3:], strict=True):
    assert sorted(first) == sorted(second)  # The same version comes again,
    assert first != second  # in another order.
  assert sorted(epochs[0]) != sorted(epochs[1]) != sorted(epochs[2])


def test_a_run_goes_on_in_the_middle_of_any_version(store):
  whole = train_batches(store)
  wanted = [next(whole) for _ in range(60)]
  for step in (7, 23, 59):
    part = train_batches(store)
    for _ in range(step):
      next(part)
    position = part.state()
    again = train_batches(store)
    again.restore(position)
    sought = train_batches(store, start_step=step)
    halves = [
      train_batches(store, start_step=step, host_rows=np.arange(16)[half])
      for half in (slice(0, 8), slice(8, 16))
    ]
    for batch in wanted[step:]:
      parts = [next(half) for half in halves]
      for found in (next(again), next(sought)):
        for name, value in batch.items():
          np.testing.assert_array_equal(found[name], value)
          both = np.concatenate([part[name] for part in parts])
          np.testing.assert_array_equal(both, value)


def test_another_sampling_is_another_run(store, tmp_path):
  plain = build(tmp_path, subword_sampling.SubwordSampling())
  position = train_batches(store).state()
  with pytest.raises(ValueError, match=r"alpha \S+, 3 versions"):
    train_batches(plain).restore(position)
  # Positions of before there was a choice.
  position = train_batches(plain).state()
  del position["subword_sampling"]
  train_batches(plain).restore(position)
  with pytest.raises(ValueError, match="subword_sampling was ''"):
    train_batches(store).restore(position)


def test_an_epoch_has_the_mean_of_the_versions_rows(store):
  rows = [store.rows(version) for version in store.versions("train")]
  np.testing.assert_allclose(store.epoch_rows("train"), np.mean(rows, axis=0))
  shares = train_batches(store).plan.pair_rates([0])[0]
  expected = np.sqrt([PAIRS[name] for name in store.directions])
  np.testing.assert_allclose(shares, expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize(
  ("pairs", "versions"),
  [(0, 8), (100, 8), (125_000, 8), (300_000, 3), (500_001, 1), (10**8, 1)],
)
def test_large_directions_have_fewer_versions(pairs, versions):
  assert subword_sampling.SubwordSampling(0.1, 8).versions_of(pairs) == versions
  assert subword_sampling.SubwordSampling(None, 8).versions_of(pairs) == 1


def test_a_direction_may_lack_versions(store, tmp_path, monkeypatch):
  monkeypatch.setattr(subword_sampling, "_MOST_PAIRS", 1000)
  smaller = build(tmp_path)
  assert smaller.rows("train.2").tolist() == [store.rows("train.2")[0], 0]
  assert smaller.directions == ("en-af", "en-de")
  rows = smaller.rows("train")[1]
  assert smaller.epoch_rows("train")[1] == rows
  source = train_batches(smaller)
  seen = [
    pair
    for batch in itertools.islice(source, 80)
    for pair in pairs_of(
      {k: v[batch["direction"] == 1] for k, v in batch.items()}
    )
  ]
  assert len(seen) > PAIRS["en-de"]  # More than an epoch, of one version.
  assert all(
    pair[1][:-1] == (*PIECES.encode(PIECES.decode(pair[1])),) for pair in seen
  )


def test_bytes_have_one_segmentation(tmp_path):
  with pytest.raises(ValueError, match=r"SUBWORD_SAMPLING .* is bytes"):
    store_building.build_store(
      mixture(vocabulary.Vocabulary()), LENGTHS, tmp_path, subwords=SAMPLING
    )
  assert not list(tmp_path.iterdir())
