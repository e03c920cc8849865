import dataclasses
import math

import hypothesis
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from basemt_jax import heating, sampling
from basemt_jax.data import languages

NAMES = ["en-cs", "en-de", "en-gu", "gu-en"]
PAIRS = np.array([90_000, 9_000, 900, 600])
ROWS = np.array([3_000, 450, 90, 75])
BATCH = 32


def _plan(strategy, names=NAMES, pairs=PAIRS, rows=ROWS, batch_size=BATCH):
  return strategy.plan(names, pairs, rows, batch_size, languages.meant)


def _strategies(steps):
  """All that are compared in the literature, over some steps."""
  heated = heating.linear(1, 5, steps)
  cap = {"max_epochs": 3.0, "steps": steps}
  return {
    "proportional": sampling.Strategy(heating.constant(1)),
    "static": sampling.Strategy(heating.constant(5)),
    "heating": sampling.Strategy(heated),
    "cooling": sampling.Strategy(heating.linear(5, 1, steps)),
    "cooldown": sampling.Strategy(heating.stepwise([steps // 2], [5, 1])),
    "joining": sampling.Strategy(
      heating.constant(2), {"gu": steps // 3, "en-de": 7}
    ),
    "unimax": sampling.unimax(steps, 3),
    "heating, capped": sampling.Strategy(heated, **cap),
    "joining, capped": sampling.Strategy(heated, {1000: steps // 2}, **cap),
    "weights": sampling.Strategy(heated, weights={"gu": 3, "en-gu": 0.5}),
    "weights, capped": sampling.Strategy(heated, weights={"gu": 9}, **cap),
    "published sizes": sampling.Strategy(
      heated, sizes=dict(zip(NAMES, [5, 9, 2, 4], strict=True))
    ),
  }


@pytest.mark.parametrize("name", _strategies(90))
def test_expected_rows_are_those_that_are_drawn(name):
  """Draws by brute force: a multinomial at every step, many times over."""
  steps, runs = 90, 300
  plan = _plan(_strategies(steps)[name])
  rng = np.random.default_rng(0)
  drawn = np.zeros((runs, len(NAMES)))
  for step in range(steps):
    drawn += rng.multinomial(BATCH, plan.rates([step])[0], size=runs)
  expected = plan.expected_rows([steps])[0]
  error = drawn.std(axis=0) / math.sqrt(runs)
  assert (np.abs(drawn.mean(axis=0) - expected) <= 4.5 * error + 1e-6).all()
  np.testing.assert_allclose(expected.sum(), BATCH * steps)
  np.testing.assert_allclose(
    plan.expected_epochs([steps])[0], expected / ROWS, rtol=1e-15
  )


@pytest.mark.parametrize("name", _strategies(90))
def test_rates_are_shares_and_a_pure_function_of_the_step(name):
  plan = _plan(_strategies(90)[name])
  steps = np.arange(200)
  rates = plan.rates(steps)
  assert rates.shape == (200, len(NAMES)) and (rates >= 0).all()
  np.testing.assert_allclose(rates.sum(axis=1), 1)
  for step in (0, 29, 30, 89, 199):
    np.testing.assert_allclose(plan.rates([step])[0], rates[step], rtol=1e-12)
  pairs = rates * PAIRS / ROWS
  np.testing.assert_allclose(
    plan.pair_rates(steps), pairs / pairs.sum(axis=1, keepdims=True)
  )


def test_expected_rows_of_several_steps_at_once():
  plan = _plan(_strategies(10_000)["joining"])
  at = [0, 3, 3, 4095, 4096, 5000, 10_000]
  summed = np.cumsum(BATCH * plan.rates(np.arange(10_000)), axis=0)
  found = plan.expected_rows(at)
  assert (found[0] == 0).all()
  for step, rows in zip(at[1:], found[1:], strict=True):
    np.testing.assert_allclose(rows, summed[step - 1], rtol=1e-9)


def test_expected_epochs_by_hand():
  # T = 1: every direction goes through 50 * 14 / 140 = 5 epochs.
  data = (["a-b", "a-c", "a-d"], [900, 90, 10], [100, 30, 10], 14)
  plan = sampling.Strategy(heating.constant(1)).plan(*data)
  np.testing.assert_allclose(plan.expected_epochs([50])[0], [5, 5, 5])
  hot = sampling.Strategy(heating.linear(1, 5, 50)).plan(*data)
  epochs = hot.expected_epochs([50])[0]
  assert epochs[0] < 5 < epochs[1] < epochs[2]


# ------------------------------------------------------------------ joins


@pytest.mark.parametrize(
  "joins, starts",
  [
    ({}, [0, 0, 0, 0]),
    ({"en-gu": 5}, [0, 0, 5, 0]),
    ({"gu": 5}, [0, 0, 5, 5]),
    ({"gu": 5, "gu-en": 9, "en-gu": 2}, [0, 0, 5, 9]),
    ({1000: 5, 10_000: 3}, [0, 3, 5, 5]),
  ],
)
def test_directions_join(joins, starts):
  plan = _plan(sampling.Strategy(heating.constant(2), joins))
  assert plan.starts.tolist() == starts
  for step, rates in enumerate(plan.rates(np.arange(12))):
    weights = np.sqrt(PAIRS) * ROWS / PAIRS * (step >= np.array(starts))
    np.testing.assert_allclose(rates, weights / weights.sum())


def test_names_of_joins_and_sizes_are_in_any_spelling():
  strategy = sampling.Strategy(
    heating.constant(1),
    {"eng_Latn-pt-BR": 5, "deu": 3},
    sizes={"en-pt-br": 7, "de-en": 1},
  )
  names, counts = ["deu_Latn-en", "en-pt_BR"], [4, 4]
  with pytest.raises(ValueError, match="all directions join after step 0"):
    strategy.plan(names, counts, counts, 2, languages.meant)
  late = dataclasses.replace(strategy, joins={"eng_Latn-pt-BR": 5})
  plan = late.plan(names, counts, counts, 2, languages.meant)
  assert plan.starts.tolist() == [0, 5] and plan.sizes.tolist() == [1, 7]


# -------------------------------------------------------------------- cap


def test_weights_multiply_rates_of_any_strategy():
  names = ["de-en", "en-de", "en_x_bt-de", "en-de_x_kd"]
  weights = {"authentic": 2.0, "bt": 0.5, "en-de": 3.0, "kd": 0.0}
  factors = np.array([2.0, 6.0, 0.5, 0.0])
  for make in (sampling.unimax, None):
    strategy = sampling.Strategy(heating.linear(1, 5, 9), weights=weights)
    plain = sampling.Strategy(heating.linear(1, 5, 9))
    if make:
      strategy, plain = make(9, 100, weights=weights), make(9, 100)
    expected = _plan(plain, names).rates([0, 9]) * factors
    np.testing.assert_allclose(
      _plan(strategy, names).rates([0, 9]),
      expected / expected.sum(axis=1, keepdims=True),
    )
  assert str(plain) != str(strategy)


def test_a_label_joins_late():
  strategy = sampling.Strategy(heating.constant(1), joins={"bt": 5})
  rates = _plan(strategy, ["en-de", "de-en", "fr_x_bt-en", "en-fr"]).rates(
    [4, 5]
  )
  assert (rates > 0).tolist() == [[True, True, False, True], [True] * 4]


def _unimax(sizes, budget, epochs):
  """The algorithm as it is published: in ascending order of sizes."""
  draws, left = {}, budget
  order = np.argsort(sizes, kind="stable")
  for place, i in enumerate(order):
    share = left / (len(sizes) - place)
    draws[i] = min(share, epochs * sizes[i])
    left -= draws[i]
  return np.array([draws[i] for i in range(len(sizes))])


@hypothesis.given(
  st.lists(st.integers(1, 10**7), min_size=1, max_size=20),
  st.floats(0.1, 20),
  st.floats(0.001, 0.999),
)
@hypothesis.example([684, 685, 716], 1.0, 0.984375)  # Norms of 0.
@hypothesis.settings(deadline=None, max_examples=60)
def test_unimax_is_the_published_algorithm(sizes, epochs, share):
  steps, sizes = 50, np.array(sizes)
  batch_size = share * epochs * sizes.sum() / steps
  names = [f"en-x{i}" for i in range(len(sizes))]
  plan = sampling.unimax(steps, epochs).plan(names, sizes, sizes, batch_size)
  expected = _unimax(sizes, batch_size * steps, epochs)
  np.testing.assert_allclose(
    plan.expected_rows([steps])[0], expected, rtol=1e-6
  )
  # And at every step in the same proportions.
  np.testing.assert_allclose(plan.rates([0])[0], plan.rates([49])[0])


@hypothesis.given(
  st.data(),
  st.integers(1, 12),
  st.sampled_from([1.00001, 1.1, 2, 10]),
  st.sampled_from(["static", "heating", "cooling", "uniform"]),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_caps_hold_and_bite_no_more_than_they_must(data, count, room, name):
  steps = 300
  schedule = {
    "static": heating.constant(3),
    "heating": heating.square_root(1, 5, steps),
    "cooling": heating.cosine(5, 1, steps),
    "uniform": heating.constant(math.inf),
  }[name]
  rows = 10 ** np.array(
    data.draw(st.lists(st.floats(0, 6), min_size=count, max_size=count))
  )
  pairs = rows * np.array(
    data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
  )
  late = data.draw(
    st.lists(st.integers(0, steps - 1), min_size=count - 1, max_size=count - 1)
  )
  starts = np.array([0, *late])
  names = [f"en-x{i}" for i in range(count)]
  joins = {name: step for name, step in zip(names[1:], late, strict=True)}
  # Before any step, what has joined must suffice.
  ends = [*np.unique(starts)[1:], steps]
  least = max(BATCH * end / rows[starts < end].sum() for end in ends)
  with pytest.raises(ValueError, match="allow more epochs"):
    sampling.Strategy(schedule, joins, 0.999 * least, steps).plan(
      names, pairs, rows, BATCH
    )
  epochs = room * least
  plan = sampling.Strategy(schedule, joins, epochs, steps).plan(
    names, pairs, rows, BATCH
  )
  found = plan.expected_epochs([steps])[0]
  assert (found <= epochs * (1 + 1e-4)).all()
  capped = plan.multipliers < 1
  np.testing.assert_allclose(found[capped], epochs, rtol=1e-4)
  # The others keep their proportions to one another.
  free = dataclasses.replace(plan.strategy, max_epochs=None)
  rates = free.plan(names, pairs, rows, BATCH).rates(np.arange(steps))
  kept = plan.rates(np.arange(steps))
  weights = rates * plan.multipliers
  weights /= weights.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(kept, weights, rtol=1e-9)
  assert plan.starts.tolist() == starts.tolist()


def test_cap_solves_the_convex_problem_that_defines_it():
  """SciPy's general solver, from another start, finds the same rates."""
  steps = 40
  strategy = sampling.Strategy(
    heating.linear(1, 5, steps), {"gu": 10}, 1.0, steps
  )
  plan = _plan(strategy)
  free = _plan(dataclasses.replace(strategy, max_epochs=None))
  rates = free.rates(np.arange(steps))

  def objective(x):
    value = BATCH * np.log(rates @ np.exp(x)).sum() - ROWS @ x
    shares = rates * np.exp(x)
    shares /= shares.sum(axis=1, keepdims=True)
    return value, BATCH * shares.sum(axis=0) - ROWS

  found = scipy.optimize.minimize(
    objective,
    np.full(4, -0.5),
    jac=True,
    bounds=[(None, 0)] * 4,
    method="L-BFGS-B",
    options={"ftol": 1e-15, "gtol": 1e-9},
  )
  np.testing.assert_allclose(plan.multipliers, np.exp(found.x), rtol=1e-4)
  assert (plan.multipliers < 1).any()


def test_cap_that_does_not_bite_changes_nothing():
  steps = 100
  heated = heating.linear(1, 5, steps)
  plan = _plan(sampling.Strategy(heated, {}, 1000, steps))
  plain = _plan(sampling.Strategy(heated))
  at = np.arange(steps)
  np.testing.assert_array_equal(plan.rates(at), plain.rates(at))


def test_direction_without_rows_is_never_drawn():
  plan = sampling.unimax(10, 4).plan(NAMES[:3], [50, 0, 5], [10, 0, 5], 2)
  np.testing.assert_allclose(
    plan.expected_rows([10])[0], [10 / 3, 0, 50 / 3], rtol=1e-6
  )


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
  "options, message",
  [
    ({"temperature": 5}, "must be a schedule .* got 5"),
    ({"joins": {"gu": -1}}, "'gu' must join at a step from 0, got -1"),
    ({"joins": {"gu": 0.5}}, "'gu' must join at a step from 0, got 0.5"),
    ({"joins": {"gj": 5}}, "'gj', which is to join at step 5, is neither"),
    ({"joins": {"en": 5}}, "all directions join after step 0"),
    ({"max_epochs": 0, "steps": 5}, "max_epochs must be above 0, got 0"),
    ({"max_epochs": 4}, "needs the steps of the run, above 0, got steps=None"),
    (
      {"max_epochs": 0.5, "steps": 1000},
      r"0.5 epochs of .* before step 1000 are 1,808 rows, and the steps before "
      "it draw 32,000",
    ),
    (
      {"max_epochs": 1, "steps": 100, "joins": {"cs": 90, "de": 90}},
      "before step 90 are 165 rows, and the steps before it draw 2,880",
    ),
    ({"sizes": {"en-cs": 5}}, "sizes lack the directions en-de, en-gu, gu-en"),
  ],
)
def test_impossible_strategies_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _plan(sampling.Strategy(**{"temperature": heating.constant(1), **options}))


def test_names_are_the_same_in_every_process():
  strategy = _strategies(90)["joining, capped"]
  text = "linear(1.0, 5.0, 90), joining at {1000: 45}, at most 3 epochs in 90"
  assert str(strategy) == text + " steps"
  given = [
    dataclasses.replace(strategy, sizes=sizes)
    for sizes in ({"a-b": 1, "b-a": 2}, {"b-a": 2, "a-b": 1}, {"a-b": 1})
  ]
  assert str(given[0]) == str(given[1]) != str(given[2])
