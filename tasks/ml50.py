"""ML-50: English to and from the languages of mBART-50 (arXiv:2008.00401).

`ml50_from_english` is the benchmark's one to many, `ml50_to_english` its many
to one; its many to many, `ml50`, is the union of both: all data is with
English. Sizes per language are not published; they are counted.

The files that fairseq's scripts for ML50 leave (`train.cs_CZ-en_XX.cs_CZ`) are
what `basemt prepare ml50` takes. The list of 52 codes, English among them, is
that of the scripts; languages that a folder lacks are left out.

Importing this registers tasks and mixtures (see `tasks.benchmark`), and has no
other effect.
"""

from basemt_jax.corpora import raw_text
from basemt_jax.data import declared
from tasks import benchmark

# Language to region, as mBART-50 spells them.
REGIONS = {
  **{"ar": "AR", "cs": "CZ", "de": "DE", "es": "XX", "et": "EE", "fi": "FI"},
  **{"fr": "XX", "gu": "IN", "hi": "IN", "it": "IT", "ja": "XX", "kk": "KZ"},
  **{"ko": "KR", "lt": "LT", "lv": "LV", "my": "MM", "ne": "NP", "nl": "XX"},
  **{"ro": "RO", "ru": "RU", "si": "LK", "tr": "TR", "vi": "VN", "zh": "CN"},
  **{"af": "ZA", "az": "AZ", "bn": "IN", "fa": "IR", "he": "IL", "hr": "HR"},
  **{"id": "ID", "ka": "GE", "km": "KH", "mk": "MK", "ml": "IN", "mn": "MN"},
  **{"mr": "IN", "pl": "PL", "ps": "AF", "pt": "XX", "sv": "SE", "sw": "KE"},
  **{"ta": "IN", "te": "IN", "th": "TH", "tl": "XX", "uk": "UA", "ur": "PK"},
  **{"xh": "ZA", "gl": "ES", "sl": "SI"},
}

BENCHMARK = benchmark.Benchmark(
  "ml50",
  tuple(REGIONS),
  raw_text.Names(
    pairs=tuple(("en", language) for language in REGIONS),
    spellings={
      f"{language}_{region}": language
      for language, region in [*REGIONS.items(), ("en", "XX")]
    },
  ),
)


mixture = BENCHMARK.register  # Of a folder.


declared.when_imported(mixture)
