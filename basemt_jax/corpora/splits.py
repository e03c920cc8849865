"""Which split a file is of, told by the words of its name.

Words are cut at separators, digits and capitals: `newstest2014-enhr-ref.hr` is
`newstest 2014 enhr ref hr`. A word counts as a whole: `Development_Funds`,
`TestimonyCorpus` and `validated-web` say nothing of a split.

- Names of published evaluation sets (`newstest`, `flores`, `tst`, ...) are
  known wherever they stand.
- `test`, `dev`, `valid` and the like are known where nothing but numbers,
  languages and words such as `ref` or `full` follow: `ted-test2015`,
  `dev.en-hr`. Followed by other words (`Test_Drive`), or glued to one
  (`bibletest`), they may belong to the name of a corpus: that is in doubt.
- What a file's name does not say, the nearest folder that says it does.
"""

import pathlib
import re
from collections.abc import Collection

TRAIN, VALIDATION, TEST = "train", "validation", "test"
DOUBTFUL = "doubtful"
HELD_OUT = "held_out"  # Neither trained nor evaluated on.

# Of published evaluation sets; 'held_out' is two words.
_TEST_SETS = """
  newstest newstests newsdiscusstest generaltest wmttest florestest tedtst tst
  devtest testset testsets evalset heldout holdout mteval semeval sacrebleu
  dev_test news_test general_test wmt_test held_out hold_out challenge_set
"""
_VALIDATION_SETS = """
  newsdev newsdiscussdev newssyscomb syscomb floresdev devset devsets valset
  validset tuneset news_dev news_syscomb
"""
_SETS = {
  split: [f" {name.replace('_', ' ')} " for name in names.split()]
  for split, names in ((TEST, _TEST_SETS), (VALIDATION, _VALIDATION_SETS))
}
# Sets of several splits: another word says which; otherwise they are tests.
_BENCHMARK = "benchmark"
_BENCHMARKS = [
  f" {name} "
  for name in ("flores", "floresp", "floresv", "ntrex", "tico", "wmt news")
]
_WORDS = {
  TRAIN: ("train", "training", "trainset"),
  TEST: ("test", "tests", "eval", "testdata"),
  VALIDATION: (
    *("dev", "devel", "val", "valid", "validation", "tune", "tuning"),
    "devdata",
  ),
}
# These are of evaluation only if the name says nothing else.
_LONG_WORDS = {
  TEST: ("evaluation", "testing"),
  VALIDATION: ("development",),
}
# Years of a shared task alone: the data to train on, or its test set?
_TASKS = ("wmt", "iwslt")
_GLUED = re.compile(r"\w+(test|tests|dev|devel|valid|devset|testset|tst)")
_NOT_GLUED = """
  latest greatest fastest shortest brightest smartest lightest hottest
  contest contests protest protests attest detest invalid
"""
_NEUTRAL_WORDS = """
  src ref refs source sources reference references trg tgt target hyp
  set sets full all part split data corpus text txt lang
  raw clean cleaned tok detok bpe lc filtered original orig
  public final version release small common blind gold
  gz tsv json jsonl tmx sgm sgml xml zip tar tgz
"""
_NEUTRAL = frozenset(_NEUTRAL_WORDS.split())
_CAPITALS = re.compile(
  r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
  # 'TEDtest': an ordinary acronym, and one of the words.
  r"|(?<=[A-Z])(?=(?:test|dev|devtest|valid|eval|tst)(?![a-z]))"
)


def split_of(path: str, codes: Collection[str] = ()) -> str:
  """The split that a path tells: TRAIN, VALIDATION, TEST or DOUBTFUL.

  What the file's name says, or else the nearest folder; TRAIN if nothing is
  said. A doubt about the file's name goes if a folder is of evaluation, and a
  folder tells the split of a benchmark of several. `codes` are languages, as
  they may be spelled in names.
  """
  known = {part for c in codes for part in _words(c)}
  known |= {c.lower() for c in codes}
  *folders, name = pathlib.PurePosixPath(path).parts
  said = _of_part(name, known) or _task_alone(name, known)
  for folder in reversed(folders):
    if said not in (None, DOUBTFUL, _BENCHMARK):
      break
    around = _of_part(folder, known)
    if said is None or around in (VALIDATION, TEST):
      said = around
  return TEST if said == _BENCHMARK else said or TRAIN


def _of_part(part: str, codes: set[str]) -> str | None:
  """What one name says; None for nothing."""
  # With and without cuts at capitals: 'NewsTest' is 'newstest', too.
  found = set()
  for text in (_CAPITALS.sub(" ", part), part):
    for component in text.split("."):
      found |= _of_words(_words(component), codes)
  long = [word for word in _words(part) if not _is_neutral(word, codes)]
  for split, names in _LONG_WORDS.items():
    if long and long[-1] in names:
      found.add(split if len(long) == 1 else DOUBTFUL)
  certain = found - {DOUBTFUL, _BENCHMARK}
  if certain:
    return certain.pop() if len(certain) == 1 else DOUBTFUL
  return next((x for x in (_BENCHMARK, DOUBTFUL) if x in found), None)


def _of_words(words: list[str], codes: set[str]) -> set[str]:
  """All that the words between two dots say."""
  found = set()
  joined = f" {' '.join(words)} "
  for split, names in _SETS.items():
    if any(name in joined for name in names):
      found.add(split)
  if any(name in joined for name in _BENCHMARKS):
    found.add(_BENCHMARK)
  if found & {TEST, VALIDATION}:
    return found  # The words in 'dev test' are not looked at one by one.
  for at, word in enumerate(words):
    if word in codes:
      continue
    rest_is_neutral = all(_is_neutral(w, codes) for w in words[at + 1 :])
    for split, stems in _WORDS.items():
      stem = next((n for n in stems if word.startswith(n)), None)
      if word in stems or (stem and _is_pair(word[len(stem) :], codes)):
        certain = rest_is_neutral or split == TRAIN
        found.add(split if certain else DOUBTFUL)
    if _GLUED.fullmatch(word) and word not in _NOT_GLUED.split():
      found.add(DOUBTFUL)
  return found


def _task_alone(name: str, codes: set[str]) -> str | None:
  """Doubt about 'wmt14.en-de.en'."""
  words = [w for w in _words(name) if not _is_neutral(w, codes)]
  return DOUBTFUL if words and all(w in _TASKS for w in words) else None


def _words(text: str) -> list[str]:
  """Runs of letters, and runs of digits, without case."""
  return re.findall(r"\d+|[^\W\d_]+", text.lower())


def _is_neutral(word: str, codes: set[str]) -> bool:
  """Whether a word may follow 'test' without a doubt."""
  few = len(word) <= 2 or word.isdigit()
  return few or word in _NEUTRAL or word in codes or _is_pair(word, codes)


def _is_pair(word: str, codes: set[str]) -> bool:
  """Whether the word is two languages, 'enhr', or one of them."""
  cuts = range(2, len(word) - 1)
  return word in codes or any(
    word[:cut] in codes and word[cut:] in codes for cut in cuts
  )
