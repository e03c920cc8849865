"""OPUS-100: English to and from 99 languages (arXiv:2004.11867).

About 55 million pairs: 44 languages have a million, 73 at least 100,000, 95 at
least 10,000; most have dev and test sets of 2,000 pairs. The paper calls more
than 900,000 pairs high resource and fewer than 100,000 low. Sizes are counted.

Importing this registers tasks and mixtures (see `tasks.benchmark`), and has no
other effect.
"""

from basemt_jax.corpora import raw_text
from basemt_jax.data import declared
from tasks import benchmark

_CODES = """
  af am an ar as az be bg bn br bs ca cs cy da de dz el eo es et eu fa fi fr fy
  ga gd gl gu ha he hi hr hu hy id ig is it ja ka kk km kn ko ku ky li lt lv mg
  mk ml mn mr ms mt my nb ne nl nn no oc or pa pl ps pt ro ru rw se sh si sk sl
  sq sr sv ta te tg th tk tr tt ug uk ur uz vi wa xh yi yo zh zu
"""
LANGUAGES = tuple(_CODES.split())

BENCHMARK = benchmark.Benchmark(
  "opus100",
  LANGUAGES,
  raw_text.Names(pairs=tuple(("en", language) for language in LANGUAGES)),
)


mixture = BENCHMARK.register  # Of a folder.


declared.when_imported(mixture)
