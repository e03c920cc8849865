import fractions
import math

import hypothesis
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from basemt_jax import heating

WMT15 = [64_336_053, 40_449_146, 38_492_126, 25_986_436, 15_182_374, 155_798]


def test_mixing_rates_match_hand_computed_shares():
  # 16^(1/2) : 4^(1/2) : 1 = 4 : 2 : 1.
  rates = heating.mixing_rates([16, 4, 1], 2.0)
  np.testing.assert_allclose(rates, [4 / 7, 2 / 7, 1 / 7], rtol=1e-15)
  assert rates.dtype == np.float64


def test_temperature_one_is_proportional_and_infinity_uniform():
  exact = [float(fractions.Fraction(n, sum(WMT15))) for n in WMT15]
  np.testing.assert_allclose(
    heating.mixing_rates(WMT15, 1.0), exact, rtol=1e-14
  )
  np.testing.assert_array_equal(
    heating.mixing_rates(WMT15, math.inf), np.full(6, 1 / 6)
  )


@hypothesis.given(
  st.lists(st.integers(1, 10**18), min_size=2, max_size=6, unique=True),
  st.floats(0.05, 1e6),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_rates_are_shares_in_the_order_of_the_sizes(sizes, temperature):
  rates = heating.mixing_rates(sizes, temperature)
  assert np.isclose(rates.sum(), 1.0, rtol=1e-12)
  order = np.argsort(sizes)
  assert np.all(np.diff(rates[order]) >= 0)
  # Heating takes from the largest direction and gives to the smallest.
  hotter = heating.mixing_rates(sizes, 2 * temperature)
  assert hotter[order[-1]] <= rates[order[-1]] + 1e-12
  assert hotter[order[0]] >= rates[order[0]] - 1e-12


@pytest.mark.parametrize("temperature", [0.01, 1.0, 5.0, math.inf])
def test_direction_without_data_is_never_drawn(temperature):
  rates = heating.mixing_rates([10, 0, 1000], temperature)
  assert rates[1] == 0
  assert np.isclose(rates.sum(), 1.0)


def test_many_temperatures_at_once_equal_one_at_a_time():
  ts = np.array([1.0, 2.5, 100.0])
  many = heating.mixing_rates(WMT15, ts)
  assert many.shape == (3, 6)
  for row, t in zip(many, ts, strict=True):
    np.testing.assert_allclose(row, heating.mixing_rates(WMT15, t), rtol=1e-14)


@pytest.mark.parametrize(
  "sizes, temperature, message",
  [
    ([1, 2], 0.0, "above 0, got 0.0"),
    ([1, 2], -1.0, "above 0, got -1.0"),
    ([1, 2], math.nan, "above 0, got nan"),
    ([1, -2], 1.0, "none negative.*-2"),
    ([0, 0], 1.0, "one at least above 0"),
    ([], 1.0, "one size per direction"),
  ],
)
def test_impossible_rates_are_refused(sizes, temperature, message):
  with pytest.raises(ValueError, match=message):
    heating.mixing_rates(sizes, temperature)


def test_row_rates_give_pairs_their_shares():
  pairs, rows = np.array([900, 90, 10]), np.array([100, 30, 10])
  for temperature in (1.0, 5.0):
    rates = heating.row_rates(pairs, rows, temperature)
    assert np.isclose(rates.sum(), 1.0)
    drawn = rates * pairs / rows  # Pairs that come with a row.
    np.testing.assert_allclose(
      drawn / drawn.sum(), heating.mixing_rates(pairs, temperature), rtol=1e-13
    )


def test_row_rates_at_temperature_one_are_the_rows_themselves():
  # Proportional sampling goes through all rows equally often.
  rates = heating.row_rates([900, 90, 10], [100, 30, 10], 1.0)
  np.testing.assert_allclose(rates, np.array([100, 30, 10]) / 140, rtol=1e-13)


def test_row_rates_take_other_sizes_than_those_counted():
  pairs, rows = np.array([900, 90, 10]), np.array([100, 30, 10])
  rates = heating.row_rates(pairs, rows, 2.0, [16, 4, 1])
  drawn = rates * pairs / rows
  np.testing.assert_allclose(drawn / drawn.sum(), [4 / 7, 2 / 7, 1 / 7])


SCHEDULES = [
  (heating.linear(1, 5, 100), {0: 1, 25: 2, 50: 3, 100: 5, 10**7: 5}),
  (heating.linear(5, 1, 100), {0: 5, 50: 3, 100: 1, 101: 1}),
  # T^2 goes from 1 to 25, so it is 13 half way.
  (heating.square_root(1, 5, 100), {0: 1, 50: 13**0.5, 100: 5, 200: 5}),
  (heating.square_root(5, 1, 100), {0: 5, 50: 13**0.5, 100: 1}),
  (heating.cosine(1, 5, 100), {0: 1, 50: 3, 100: 5, 500: 5}),
  (heating.cosine(5, 1, 90), {0: 5, 30: 4, 60: 2, 90: 1}),  # cos 60° = 1/2
  (
    heating.there_and_back(1, 5, 2, 100, 400),
    {0: 1, 50: 3, 100: 5, 200: 4, 400: 2, 10**7: 2},
  ),
  (heating.there_and_back(1, 5, 2, 0, 0), {0: 2, 9: 2}),
  (heating.constant(5), {0: 5, 7: 5}),
  (heating.constant(math.inf), {3: math.inf}),
  (
    heating.stepwise([10, 20], [5, 2, 1]),
    {0: 5, 9: 5, 10: 2, 19: 2, 20: 1, 99: 1},
  ),
]


@pytest.mark.parametrize(
  "schedule, values", SCHEDULES, ids=[heating.describe(s) for s, _ in SCHEDULES]
)
def test_schedules_take_hand_computed_values(schedule, values):
  for step, value in values.items():
    np.testing.assert_allclose(schedule(step), value, rtol=1e-12)
  steps = np.array(list(values))
  expected = list(values.values())
  np.testing.assert_allclose(schedule(steps), expected, rtol=1e-12)
  np.testing.assert_allclose(
    heating.temperatures(schedule, steps), expected, rtol=1e-12
  )


def test_descriptions_name_the_schedule():
  assert heating.describe(heating.linear(1, 5, 100)) == "linear(1.0, 5.0, 100)"
  assert heating.describe(heating.constant(2)) == "constant(2.0)"
  text = heating.describe(heating.stepwise([10], [5, 1]))
  assert text == "stepwise([10], [5.0, 1.0])"
  text = heating.describe(heating.there_and_back(1, 5, 2, 100, 400))
  assert text == "linear(1.0, 5.0, 100), from step 100 linear(5.0, 2.0, 300)"


def test_optax_schedules_are_temperature_schedules():
  steps = np.array([0, 50, 100])
  schedule = optax.linear_schedule(1.0, 5.0, 100)
  np.testing.assert_allclose(heating.temperatures(schedule, steps), [1, 3, 5])
  flat = optax.constant_schedule(2.0)
  np.testing.assert_allclose(heating.temperatures(flat, steps), [2, 2, 2])
  assert "0x" not in heating.describe(schedule)  # The same in every process.


def test_functions_are_told_apart_by_their_values():
  def describe(end, steps):
    return heating.describe(optax.linear_schedule(1.0, end, steps))

  assert describe(5.0, 100) == describe(5.0, 100)
  found = {describe(end, k) for end in (4.9, 5.0) for k in (100, 101, 10**6)}
  assert len(found) == 6
  assert heating.describe(lambda step: 2.0) == heating.describe(
    lambda step: 1.0 + np.ones(np.shape(step))
  )
  assert "(1 at first, " in describe(5.0, 100)


@pytest.mark.parametrize("curve", ["linear", "square_root", "cosine"])
def test_in_no_steps_a_schedule_is_at_its_end_at_once(curve):
  schedule = getattr(heating, curve)(1, 5, 0)
  assert heating.temperatures(schedule, np.arange(3)).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: heating.constant(0), "constant|stepwise.*above 0"),
    (lambda: heating.linear(1, -5, 10), r"linear needs.*-5"),
    (lambda: heating.linear(1, 5, -1), "steps of at least 0, got -1"),
    (lambda: heating.cosine(1, math.inf, 10), "finite"),
    (lambda: heating.there_and_back(1, 5, 2, 9, 4), "got 9 and 4"),
    (lambda: heating.stepwise([10], [1]), "1 temperatures for 1 boundaries"),
    (lambda: heating.stepwise([10, 10], [1, 2, 3]), r"rising.*\[10, 10\]"),
    (
      lambda: heating.temperatures(lambda step: 2.0 - step, np.arange(5)),
      "not above 0 at step 2",
    ),
  ],
)
def test_impossible_schedules_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
