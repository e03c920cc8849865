"""One form of text: every Unicode form, every script's letters and marks."""

import sys
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies as st

from basemt_jax.data import normalisation
from basemt_jax.data.normalisation import comparison_key, normalise

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
TRICKY = (
  "\u200c\u200d\u200b\ufeff\u0301\u0654\u064b\u0940\u094d\u0995\u09cd\u09af"
  "\u0627\u0648\u05b0\u0345\u0130\ufb01\u00a8\ufe0f\u2028 \t\r\n\u3000"
)
TEXT = st.text(
  st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(list(TRICKY))
  ),
  max_size=12,
)
SENTENCES = [
  "Vi\u1ec7t b\u1ea1n h\u1ecdc s\u00e1ng",  # Vietnamese.
  "\u09ac\u09be\u09a1\u09bc\u09bf \u09af\u09be\u0987",  # Bengali.
  "\u0915\u094d\u0937 \u091c\u093c\u093f\u0928\u094d\u0926\u0917\u0940",
  "\u1109\u1161\u11bc \ud55c\uad6d\uc5b4",  # Jamo and syllables.
  "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",  # Hebrew with points.
]


@hypothesis.given(TEXT)
def test_normalising_is_done_once_for_every_form(text):
  plain = normalise(text)
  assert normalise(plain) == plain
  assert unicodedata.is_normalized("NFC", plain)
  assert plain == " ".join(plain.split())
  for form in ("NFC", "NFD"):
    assert normalise(unicodedata.normalize(form, text)) == plain
  for form in FORMS:
    other = unicodedata.normalize(form, text)
    assert comparison_key(other) == comparison_key(text)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_sentence_is_the_same(sentence, form):
  other = unicodedata.normalize(form, sentence)
  assert normalise(other) == unicodedata.normalize("NFC", sentence)
  assert comparison_key(other) == comparison_key(sentence)


def test_invisible_and_odd_characters():
  text = "\ufeff  a\u00a0b\u2028c\u200bd\x07\u00ade\t\r\n"
  assert normalise(text) == "a b cde"
  assert normalise("a  b") == "a b" and normalise(" a\x1bb ") == "ab"
  assert normalise("\u200f\u0645\u202a\u0631") == "\u0645\u0631"
  assert normalise("e\u200b\u0301") == "\u00e9"
  assert normalise(" \ufeff\n") == ""


@pytest.mark.parametrize(
  "word",
  [
    "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627",  # Persian plural.
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\u0647\u200d.\u0634",  # Persian abbreviation, joining to nothing.
    "\u0915\u094d\u200d\u0937",  # Half form.
    "\u0915\u094d\u200c\u0937",  # Visible virama.
    "\u0d28\u0d4d\u200d",  # Malayalam chillu at the end of a word.
    "\u09b0\u200d\u09cd\u09af",  # Bengali ya-phalaa after ra.
    "\u0dc1\u0dca\u200d\u0dbb\u0dd3",  # Sinhala.
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u2764\ufe0f\u200d\U0001f525",
  ],
)
def test_joiners_stay_where_they_mean_something(word):
  assert normalise(word) == word
  assert normalise(f" {word}\u200d\u200d ") in (word, word + "\u200d")


@pytest.mark.parametrize(
  "text", ["a\u200db", "a\u200cb", "\u200dab", "ab\u200c", "a\u200c\u200db"]
)
def test_joiners_go_where_they_mean_nothing(text):
  assert normalise(text) == "ab"


def test_no_letter_or_mark_of_any_script_is_lost():
  selectors = normalisation._NOT_COMPARED
  for code in range(sys.maxunicode + 1):
    char = chr(code)
    if unicodedata.category(char)[0] not in "LM":
      continue
    assert normalise("x" + char) == unicodedata.normalize("NFC", "x" + char)
    if not selectors.fullmatch(char):
      assert comparison_key("x" + char) != "x", unicodedata.name(char)


def test_what_compares_as_the_same():
  key = comparison_key
  assert key("Hello,  World!") == key("hello world") == "helloworld"
  assert key("\uff28\uff45llo") == key("hello")
  assert key("\ufb01ne") == key("FINE")
  assert key("\u092b\u0932") != key("\u092b\u0942\u0932")  # Fruit, flower.
  assert key("ma\u0301") != key("ma\u0300") != key("ma")
  assert key("\u05d3\u05b7\u05d2") != key("\u05d3\u05d2")
  assert key("ma\u02e5") != key("ma\u02e7\u02e9") != key("ma")
  assert key("?!") == "?!" and key("?") != key("!")
  assert key("\u0645\u06cc\u200c\u062e") == key("\u0645\u06cc\u062e")
