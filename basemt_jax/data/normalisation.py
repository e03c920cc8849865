"""One form of text: for training, evaluation, search input and scores alike.

The same sentence can be written with many sequences of code points. What a
model reads, what it is compared with and what it is kept apart from is in one
form, `normalise`: Unicode NFC, single plain spaces, nothing invisible. Letters
and marks stay as they are.
"""

import re
import unicodedata

import regex

# Control characters but white space, soft hyphens, zero-width spaces, marks of
# direction, invisible operators, byte-order marks, annotation anchors and
# noncharacters. Joiners, variation selectors and emoji tags are not among them.
_INVISIBLE = re.compile(
  "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u200b\u200e\u200f"
  "\u202a-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
# Zero-width joiners say something after letters of joining scripts, within and
# after the syllables of Indic ones, and between the parts of an emoji; a
# non-joiner does so only within a word.
_JOINS = (
  r"[[\p{L}\p{M}--\p{Indic_Syllabic_Category=Other}]\p{Joining_Type=D}"
  r"\p{Joining_Type=R}\p{Joining_Type=L}\p{Extended_Pictographic}\p{EMod}"
  r"--[\u200c\u200d]]\p{M}*"
)
_IDLE_JOINERS = regex.compile(
  rf"(?<!{_JOINS})[\u200c\u200d]|(?<=[\u200c\u200d])[\u200c\u200d]"
  r"|\u200c(?![\p{L}\p{M}])",
  regex.VERSION1,
)
# What is left of a sentence for comparing: letters, marks (vowel signs, tones,
# vocalisation, tone letters, which count as symbols) and digits, but no
# selectors of a variant of the same letter.
_NOT_COMPARED = regex.compile(
  r"[^\p{L}\p{M}\p{N}\u02e5-\u02eb\ua700-\ua716]"
  r"|[\u034f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)


def normalise(text: str) -> str:
  """The text in NFC, with single plain spaces and nothing invisible.

  White space of every kind, line and paragraph separators included, is one
  plain space, and none at the ends. Control and format characters go;
  zero-width joiners stay where a script or an emoji needs them. Applying it
  again changes nothing.
  """
  if text.isprintable():  # Then nothing is invisible, and no space is odd.
    return " ".join(unicodedata.normalize("NFC", text).split())
  # Invisible ones first: they may stand between a letter and its mark.
  text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
  if "\u200c" in text or "\u200d" in text:
    text = unicodedata.normalize("NFC", _IDLE_JOINERS.sub("", text))
  return " ".join(text.split())


def comparison_key(text: str) -> str:
  """Equal for sentences that count as the same when sets are kept apart.

  Letters, marks and digits, without case and compatibility forms (full-width
  letters, ligatures, presentation forms); all of the text where there are none
  of them.
  """
  folded = unicodedata.normalize("NFKC", normalise(text)).casefold()
  folded = unicodedata.normalize("NFC", folded)
  return _NOT_COMPARED.sub("", folded) or folded
