"""Mixtures whose rates change, read through SeqIO."""

import numpy as np
import pytest
import scipy.stats
import seqio
import tensorflow as tf
import toy_corpus

from basemt_jax import heating, sampling
from basemt_jax.data import heated_mixture

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def corpus():
  return toy_corpus.register("corpus")


def _heat(mixture, **options):
  defaults = {"examples_per_step": 20, "total_steps": 300}
  strategy = options.pop("strategy", None) or sampling.Strategy(
    heating.linear(1, 5, 300)
  )
  return heated_mixture.heat(mixture, strategy, **{**defaults, **options})


def _draws(mixture, count, **options):
  """Indices of the directions of the first examples, in sorted order."""
  dataset = mixture.get_dataset(
    toy_corpus.LENGTHS, "train", shuffle=False, num_epochs=None, **options
  )
  return [
    int(e["targets"][0]) - 3 for e in dataset.take(count).as_numpy_iterator()
  ]


def _constant_task(name, index, size):
  """Endless copies of one example, that tells which task it is of."""

  def read(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    data = {"inputs": [[5]], "targets": [[3 + index]]}
    data = {k: tf.constant(v, tf.int32) for k, v in data.items()}
    return tf.data.Dataset.from_tensor_slices(data).repeat(size)

  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      read, splits=["train"], num_input_examples={"train": size}
    ),
    preprocessors=[toy_corpus.EOS],
    output_features={"inputs": feature, "targets": feature},
  )


@pytest.fixture
def constant():
  """Three tasks of 10,000, 1,000 and 100 examples."""
  sizes = [10_000, 1_000, 100]
  tasks = [_constant_task(f"constant.t{i}", i, n) for i, n in enumerate(sizes)]
  return seqio.Mixture("constant", [(t, 1.0) for t in tasks])


def test_heated_mixture_is_a_registered_seqio_mixture(corpus):
  heated = _heat("corpus")
  assert seqio.get_mixture_or_task("corpus_heated") is heated
  assert isinstance(heated, seqio.Mixture)
  assert heated.directions == ("en-af", "en-de", "en-fr")
  assert heated.sizes == {f"corpus.{k}": v for k, v in toy_corpus.SIZES.items()}
  assert str(heated.plan.strategy) == "linear(1.0, 5.0, 300)"
  assert heated.num_input_examples("train") == sum(toy_corpus.SIZES.values())


@pytest.mark.parametrize("shards", [1, 2])
def test_shares_follow_the_schedule(constant, shards):
  per_step, window = 20, 50
  heated = _heat(constant, examples_per_step=per_step)
  draws = np.array(
    [
      _draws(heated, 6000, shard_info=seqio.ShardInfo(i, shards))
      for i in range(shards)
    ]
  )
  # Shards draw apart from one another, and share the clock.
  if shards == 2:
    assert np.mean(draws[0] == draws[1]) < 0.9
  statistic = 0.0
  sizes = np.array([10_000, 1_000, 100])
  per_window = window * per_step // shards
  for w in range(6000 // per_window):
    drawn = draws[:, w * per_window : (w + 1) * per_window]
    counts = np.bincount(drawn.reshape(-1), minlength=3)
    expected = np.zeros(3)
    for step in range(w * window, (w + 1) * window):
      rates = sizes ** (1 / min(5, 1 + 4 * step / 300))
      expected += per_step * rates / rates.sum()
    statistic += ((counts - expected) ** 2 / expected).sum()
  freedom = 2 * (6000 // per_window)
  assert scipy.stats.chi2.sf(statistic, freedom) > 1e-3


@pytest.mark.parametrize("shards", [1, 2])
def test_joins_and_caps_are_followed(constant, shards):
  """Against the definition, and the whole run against the cap."""
  per_step, steps = 20, 300
  strategy = sampling.Strategy(
    heating.linear(1, 5, steps), {"t1": 100}, max_epochs=6, steps=steps
  )
  heated = _heat(constant, strategy=strategy, examples_per_step=per_step)
  draws = np.stack(
    [
      _draws(
        heated,
        steps * per_step // shards,
        shard_info=seqio.ShardInfo(i, shards),
      )
      for i in range(shards)
    ],
    axis=1,
  ).reshape(steps, per_step)
  assert not (draws[:100] == 1).any() and (draws[100] == 1).any()
  expected = heated.plan.expected_rows([100, 200, 300])
  np.testing.assert_allclose(expected[-1][2], 600, rtol=1e-4)  # 6 epochs.
  counts = [np.bincount(draws[:k].reshape(-1), minlength=3) for k in (100, 300)]
  for found, wanted in zip(counts, expected[[0, 2]], strict=True):
    assert (np.abs(found - wanted) < 4 * np.sqrt(wanted) + 1e-9).all()


def test_draws_depend_on_the_mixture_s_seed_alone(constant):
  heated = _heat(constant)
  first = _draws(heated, 500)
  # T5X gives another seed at every start.
  assert first == _draws(heated, 500, seed=None)
  assert first == _draws(_heat(constant), 500)
  assert first != _draws(_heat(constant, seed=1), 500)


def _packed(mixture, seed=3):
  return seqio.get_dataset(
    mixture,
    toy_corpus.LENGTHS,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
    dataset_split="train",
    shuffle=True,
    num_epochs=None,
    seed=seed,
  )


def test_seqio_iterates_and_packs_it(corpus):
  _heat("corpus")
  rows = list(_packed("corpus_heated").take(40).as_numpy_iterator())
  assert max(row["encoder_segment_ids"].max() for row in rows) > 1
  again = list(_packed("corpus_heated").take(40).as_numpy_iterator())
  for a, b in zip(rows, again, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_iterator_checkpoint_restores_exactly(corpus, tmp_path):
  heated = _heat("corpus")
  iterator = iter(_packed(heated))
  for _ in range(7):
    next(iterator)
  saved = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "it"))
  expected = [next(iterator) for _ in range(30)]
  restored = iter(_packed(heated))
  tf.train.Checkpoint(iterator=restored).read(saved).assert_consumed()
  for value in expected:
    for name, tensor in next(restored).items():
      np.testing.assert_array_equal(tensor, value[name])


def test_heat_takes_a_task_a_mixture_or_a_name(corpus):
  task = seqio.TaskRegistry.get("corpus.en_de")
  assert [t.name for t in _heat("corpus.en_de").tasks] == ["corpus.en_de"]
  assert _heat(task).name == "corpus.en_de_heated"
  first = _heat(corpus)
  assert _heat("corpus") is not first  # Registered anew, without complaint.
  assert _heat("corpus", name="mine").name == "mine"
  assert (
    len(_heat(seqio.Mixture("both", [("corpus", 1), (task, 1)])).tasks) == 3
  )


def test_heat_uses_given_sizes(constant):
  sizes = {"constant.t0": 0, "constant.t1": 1, "constant.t2": 0}
  assert set(_draws(_heat(constant, sizes=sizes), 100)) == {1}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"examples_per_step": 0}, "examples_per_step above 0, got 0"),
    ({"total_steps": 0}, "total_steps above 0, got 0"),
    ({"name": "corpus"}, "'corpus': something else has that name"),
    (
      {"sizes": dict.fromkeys(["corpus." + k for k in toy_corpus.SIZES], 0)},
      "above 0",
    ),
  ],
)
def test_impossible_heating_is_refused(corpus, options, message):
  with pytest.raises(ValueError, match=message):
    _heat("corpus", **options)


def test_unknown_sizes_have_to_be_given(tmp_path):
  data = tmp_path / "x.tsv"
  data.write_text("a\tb\n")
  feature = seqio.Feature(seqio.ByteVocabulary())
  task = seqio.TaskRegistry.add(
    "sizeless.en_de",
    source=seqio.TextLineDataSource({"train": str(data)}),
    preprocessors=[toy_corpus.split_tabs, seqio.preprocessors.tokenize],
    output_features={"inputs": feature, "targets": feature},
  )
  with pytest.raises(ValueError, match=r"'sizeless.en_de' does not tell how"):
    _heat(task)
  assert _heat(task, sizes={"sizeless.en_de": 7}).sizes["sizeless.en_de"] == 7
