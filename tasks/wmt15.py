"""WMT-15: English to and from 15 languages of the WMT news tasks.

Sizes and test years are those of Kudugunta et al., "Beyond Distillation:
Task-level Mixture-of-Experts" (arXiv:2110.03742), Table 3: 200 million training
pairs, from 64 million (Czech) to 156,000 (Gujarati), and newstest of the year
that a language was last in the task. High resource there means more than a
million pairs, and low resource fewer.

`wmt15` reads prepared files (see `tasks.benchmark`); `wmt15_tfds` what
TensorFlow Datasets has of the same years, which it downloads when it is first
read. The data differ: TFDS does not filter, lacks the tests of 2019, and has
other versions of some corpora.

Importing this registers tasks and mixtures, and has no other effect.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from basemt_jax.corpora import raw_text
from basemt_jax.data import declared, languages
from tasks import benchmark, common

# Training pairs with English, and the year of the test set (and of TFDS's
# builder).
_TABLE = {
  "cs": (64_336_053, 2018),
  "fr": (40_449_146, 2014),
  "ru": (38_492_126, 2019),
  "zh": (25_986_436, 2019),
  "es": (15_182_374, 2013),
  "fi": (6_587_448, 2019),
  "de": (4_508_785, 2014),
  "et": (2_175_873, 2018),
  "lv": (637_599, 2017),
  "lt": (635_146, 2019),
  "ro": (610_320, 2016),
  "hi": (313_748, 2014),
  "kk": (222_424, 2019),
  "tr": (205_756, 2018),
  "gu": (155_798, 2019),
}
PAIRS = {language: pairs for language, (pairs, _) in _TABLE.items()}
TEST_YEARS = {language: year for language, (_, year) in _TABLE.items()}
# The first year of these in the task: there is no newstest of the year before.
_NEW = {"et", "lv", "lt", "ro", "hi", "kk", "gu"}


def evaluation(name: str, pair: raw_text.Pair) -> str | None:
  """Which split a dev or test set is of; None for sets of other years.

  The dev set is the newstest of the year before the test set's, or the newsdev
  of the same year for languages that were new.
  """
  found = re.search(r"(newstest|newsdev)(20\d\d)", name.lower())
  if not found:
    return None
  year = TEST_YEARS[pair[1]]
  if found.groups() == ("newstest", str(year)):
    return "test"
  is_new = pair[1] in _NEW
  dev = ("newsdev", str(year)) if is_new else ("newstest", str(year - 1))
  return "validation" if found.groups() == dev else None


BENCHMARK = benchmark.Benchmark(
  "wmt15",
  tuple(PAIRS),
  raw_text.Names(
    pairs=tuple(("en", language) for language in PAIRS),
    spellings={"cz": "cs", "cn": "zh", "ch": "zh"},
    evaluation=evaluation,
    tables={
      r"plaintext-format|czeng": ("cs", "en"),
      r"hindencorp": ("en", "hi"),
    },
  ),
  PAIRS,
)


mixture = BENCHMARK.register  # Of a folder.
sizes = BENCHMARK.sizes


def _texts(dataset: Any, source: str, target: str) -> Any:
  """TFDS's {language: text} as tagged inputs, and targets."""
  import tensorflow as tf

  prefix = languages.Language(target).tag + " "
  return dataset.map(
    lambda example: {
      "inputs": prefix + example[source],
      "targets": example[target],
    },
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def _register_tfds() -> Any:
  """Registers `wmt15_tfds`, at the published rates."""
  import seqio

  from tasks import in_seqio

  pieces = in_seqio.ModelFile(str(BENCHMARK.data_dir / benchmark.MODEL_FILE))
  rates = {}
  for language, year in TEST_YEARS.items():
    splits = ["train", "validation", "test"] if year < 2019 else None
    for source, target in (("en", language), (language, "en")):
      task = common.add_task(
        "wmt15_tfds",
        source,
        target,
        seqio.TfdsDataSource(
          f"wmt{year % 100}_translate/{language}-en:1.0.0",
          splits=splits or ["train", "validation"],
        ),
        pieces,
        [functools.partial(_texts, source=source, target=target)],
      )
      rates[task.name] = PAIRS[language]
  return seqio.MixtureRegistry.add("wmt15_tfds", list(rates.items()))


declared.when_imported(mixture)
declared.when_imported(_register_tfds)
