"""The list of metrics: names, values from sums, means by band, tags."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basemt_jax import metrics

DIRECTIONS = ("de-en", "en-de", "en-fr")
SUMS = {
  "loss": np.array([8.0, 3.0, 0.0], np.float32),
  "nll": np.array([6.0, 2.0, 0.0], np.float32),
  "correct": np.array([1.0, 1.0, 0.0], np.float32),
  "weight": np.array([3.0, 1.0, 0.0], np.float32),
  "grad_norm": np.array(5.0, np.float32),
  "steps": np.array(2, np.int32),
  "router": {
    "decoder/layers_1": {
      "favourite": np.array([[3, 1], [1, 0], [0, 0]], np.float32),
      "agreement": np.array([3.0, 1.0, 0.0], np.float32),
      "entropy": np.array(1.0, np.float32),
      "auxiliary_loss": np.array(0.5, np.float32),
    }
  },
}


def test_values_by_hand():
  """Sums of two steps: means by token or by step, nothing of no tokens."""
  layer = "router/decoder/layers_1"
  assert metrics.scalars(SUMS, DIRECTIONS) == pytest.approx(
    {
      "loss": 2.0,
      "loss/de-en": 2.0,
      "loss/en-de": 2.0,
      "objective": 2.75,
      "accuracy": 0.5,
      "gradient_norm": 2.5,
      "target_tokens": 4.0,
      "target_tokens/de-en": 3.0,
      "target_tokens/en-de": 1.0,
      "target_tokens/en-fr": 0.0,
      f"{layer}/load_max": 4 * 2 / 5,
      f"{layer}/agreement": 4 / 5,
      f"{layer}/agreement/de-en": 3 / 4,
      f"{layer}/agreement/en-de": 1.0,
      f"{layer}/entropy": 0.5,
      f"{layer}/auxiliary_loss": 0.25,
    }
  )
  # An evaluation's sums are fewer.
  few = {name: SUMS[name] for name in ("nll", "correct", "weight")}
  assert set(metrics.scalars(few, DIRECTIONS)) == {
    *("loss", "loss/de-en", "loss/en-de", "accuracy", "target_tokens"),
    *(f"target_tokens/{d}" for d in DIRECTIONS),
  }


def test_a_metric_of_ones_own_is_one_entry():
  own = metrics.Metric(
    "long", "long sequences", "share", ("long", "weight"), of_directions=True
  )
  sums = {**SUMS, "long": np.array([1.5, 1.0, 0.0], np.float32)}
  values = metrics.scalars(sums, DIRECTIONS, (*metrics.METRICS, own))
  assert values["long"] == 2.5 / 4 and values["long/de-en"] == 0.5
  found = metrics.parse("long/de-en", (own,))
  assert (found.metric, found.of, found.label) == (
    own,
    "de-en",
    "long sequences",
  )


@given(
  st.sampled_from([m for m in metrics.METRICS if not m.of_layers]),
  st.sampled_from(["", *metrics.SPLITS]),
  st.sampled_from(["", "all", "low", "en->xx", "en-zh-Hans", "a/b.c"]),
)
def test_names_come_apart_as_they_were_put_together(metric, split, of):
  name = "/".join(filter(None, (split, metric.name, of)))
  found = metrics.parse(name)
  assert (found.metric, found.split, found.of) == (metric, split, of)
  assert found.is_group == (of in ("all", "low", "en->xx"))


def test_a_metric_of_ones_own_is_shown_as_others_are():
  own = metrics.Metric("long", "long sequences", is_main=True)
  known = (*metrics.METRICS, own)
  values = {"dev/long": 0.3, "dev/long/de-en": 0.5, "accuracy/de-en": 0.1}
  assert metrics.tagged(values, known) == {
    "dev/long": 0.3,
    "dev_by_direction/long/de-en": 0.5,
  }
  means = metrics.band_means(values, {"de-en": "low"}, known)
  assert means == {"dev/long/low": 0.5}
  assert metrics.of_directions(values, "dev/long") == {"de-en": 0.5}


def test_labels():
  assert metrics.parse("loss").label == "training loss"
  assert metrics.parse("dev/chrf/all").label == "dev chrF++"
  assert metrics.parse("tokens_per_second").label == "speed"
  found = metrics.parse("router/decoder/layers_11/entropy")
  assert (found.layer, found.label) == ("decoder/layers_11", "routing entropy")
  assert metrics.parse("conversion/relative_error") is None
  assert metrics.parse("losses") is None


def test_bands_are_means_over_directions_that_were_measured():
  bands = {"de-en": "high", "en-de": "high", "en-fr": "low"}
  values = {
    "loss": 3.0,
    "loss/de-en": 1.0,
    "loss/en-de": 2.0,
    "dev/bleu/en-fr": 7.0,
    "dev/bleu/low": 6.5,  # As it was measured: kept.
    "target_tokens/de-en": 5.0,  # Not a main metric.
  }
  assert metrics.band_means(values, bands) == {"loss/high": 1.5}
  assert metrics.band_means(values, {}) == {}


def test_dashboards_show_bands_first_and_few_tags():
  layer = "router/decoder/layers_1"
  shown = {
    "loss": "loss",
    "loss/low": "loss/low",
    "loss/en-de": "loss_by_direction/en-de",
    "dev/bleu/en->xx": "dev/bleu/en->xx",
    "dev/chrf/en-de": "dev_by_direction/chrf/en-de",
    f"{layer}/agreement": f"{layer}/agreement",
    f"{layer}/agreement/en-de": None,
    "target_tokens/en-de": None,
    "conversion/relative_error": "conversion/relative_error",
  }
  assert {name: metrics.tag(name) for name in shown} == shown
