"""How the sources of a direction are marked for it, found in the data.

A multilingual model is told by a tag in the source which language is wanted:
'<2de> ', 'translate English to German: ', '>>deu<< ' or whatever a task puts
before the text, some also after it. What a model was trained with is read off
its packed rows, so that it is known of any task, and kept with the model.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from basemt_jax.data import row_store, vocabulary

# Sequences of a direction that are looked at.
_SAMPLE = 200
# From how many different texts on their common beginning is no accident.
_ENOUGH = 20
# '<2de>', '<2de> <formal>', '>>deu<<', '__de__', '[de_DE]', 'de_DE:'.
_TAG = r"(?:<[^<>\s]+>|>>[^<>\s]+<<|__\w+__|\[[\w-]+\])"
_FIRST_TAGS = re.compile(rf"(?:{_TAG}\s*)+")
_LAST_TAGS = re.compile(rf"(?:\s*{_TAG})+$")
# The share of sequences that must come out as they were packed.
_AGREE = 0.9


@dataclasses.dataclass(frozen=True)
class SourceTag:
  """What a direction's sources have around their text; may be nothing.

  The prefix, spaces included, stands before it, the suffix after it.
  """

  prefix: str = ""
  suffix: str = ""

  def __call__(self, text: str) -> str:
    """The text as the model reads it."""
    return f"{self.prefix}{text}{self.suffix}"


def of_store(
  store: row_store.RowStore, pieces: vocabulary.Vocabulary
) -> dict[str, SourceTag | None]:
  """The tag of every direction; None where there is no telling."""
  found: dict[str, SourceTag | None] = {}
  for name in store.directions:
    sequences = store.some_sources("train", name, _SAMPLE)
    texts = [pieces.decode(ids) for ids in sequences]
    tag = of_texts(texts)
    if tag is not None and not _agrees(tag, texts, sequences, pieces):
      tag = None
    found[name] = tag
  return found


def of_texts(texts: Sequence[str]) -> SourceTag | None:
  """The tag that all of some sources have; None where only some have one."""
  texts = list(dict.fromkeys(texts))
  if not texts:
    return None
  before = [m[0] if (m := _FIRST_TAGS.match(t)) else "" for t in texts]
  after = [m[0] if (m := _LAST_TAGS.search(t)) else "" for t in texts]
  suffix = after[0] if len(set(after)) == 1 else ""
  if any(before):
    prefix = _common(before)
    # Text may begin with what looks like a tag; it may not lack the tag.
    tags = _FIRST_TAGS.match(prefix)
    return SourceTag(tags[0], suffix) if tags else _some_have_one(before)
  if not suffix and any(after):
    return _some_have_one(after)
  return SourceTag(_common_words(texts), suffix)


def _some_have_one(tags: Sequence[str]) -> SourceTag | None:
  """No tag, if few sources seem to have one; None, undecided, if more do."""
  share = sum(map(bool, tags)) / len(tags)
  return None if share > 1 - _AGREE else SourceTag()


def _common(texts: Sequence[str]) -> str:
  """What all texts begin with."""
  # The first and the last in order share what all share.
  pairs = zip(min(texts), max(texts), strict=False)
  return "".join(
    a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
  )


def _common_words(texts: Sequence[str]) -> str:
  """The words that all texts begin with, and the space after them."""
  common = _common(texts)
  if len(texts) < _ENOUGH:
    return ""
  colon = re.match(r"[^:]*:\s*", common)  # T5's 'translate ... to ...: '.
  if colon:
    return colon[0]
  return common[: max(common.rfind(" "), common.rfind("\u3000")) + 1]


def _agrees(
  tag: SourceTag,
  texts: Sequence[str],
  sequences: Sequence[Sequence[int]],
  pieces: vocabulary.Vocabulary,
) -> bool:
  """Whether tagged text is encoded to what was packed; most of it is."""
  same = 0
  for text, ids in zip(texts, sequences, strict=True):
    end = len(text) - len(tag.suffix)
    body = text[len(tag.prefix) : end]
    made = pieces.encode(tag(body))
    same += made == [i for i in ids if i != vocabulary.EOS_ID]
  return same >= _AGREE * len(texts)
