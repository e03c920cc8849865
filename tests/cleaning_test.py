"""Steps of cleaning, by hand."""

import pytest

from basemt_jax.corpora import cleaning


@pytest.mark.parametrize(
  "first, second, reason",
  [
    ("a", "b", None),
    ("", "b", "empty side"),
    ("a" * 1001, "b" * 1000, "longer than 1000 characters"),
    ("a" * 1000, "b" * 1000, None),
    ("a" * 60, "b" * 300, None),
    ("a" * 60, "b" * 301, "length ratio above 4"),
    # Bytes: one Chinese character is three.
    ("a" * 100, "你" * 33, None),
    ("Yes", "Ja, das ist richtig, so ist es wirklich", None),
  ],
)
def test_faults_by_hand(first, second, reason):
  found = cleaning.usable((first, second), cleaning.Options())
  assert found == (reason or (first, second))


def test_sentences_are_compared_by_letters_and_language():
  keys = cleaning.sentence_keys
  same = keys("en", ["Hello, World 2!", "hello world2", "HELLO—WORLD 2"])
  assert len(set(same.tolist())) == 1
  assert keys("de", ["hello world2"])[0] != same[0]
  assert keys("en", ["?!"])[0] != keys("en", ["..."])[0]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"max_characters": 0}, "max_characters must be at least 1, got 0"),
    ({"max_ratio": 0.5}, "max_ratio must be at least 1, got 0.5"),
    ({"max_ratio": float("nan")}, "max_ratio must be at least 1, got nan"),
    ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
  ],
)
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    cleaning.Options(**options)
