"""Results of an evaluation: their table, signatures, and some translations."""

import collections
import math
from collections.abc import Sequence
from typing import TextIO

from basemt_jax import evaluation, files, metrics
from basemt_jax.data import languages
from basemt_jax.inspection import tables

SHOWN = tuple(metrics.named(name) for name in ("loss", "bleu", "chrf"))


def table(results: Sequence[evaluation.DirectionResult]) -> tables.Table:
  """A row for each direction in the order given, and below them the means."""
  others = list(dict.fromkeys(name for r in results for name in r.metrics))
  means = []
  for mean in evaluation.summarise(results):
    resource = " resource" if mean.name in languages.BANDS else ""
    scores = _scores(mean, others)
    label = f"mean of {mean.name}{resource}"
    count = f"{mean.directions} direction{'s' * (mean.directions != 1)}"
    means.append([label, count, "", "", *scores])
  return tables.Table(
    "",
    [
      "direction",
      tables.Column("training pairs", tables.count),
      "band",
      tables.Column("test pairs", tables.count),
      *(tables.Column(m.label, m.text) for m in SHOWN),
      *(tables.Column(name, lambda value: f"{value:.4g}") for name in others),
    ],
    [
      [r.direction, r.train_pairs, r.band, r.test_pairs, *_scores(r, others)]
      for r in results
    ],
    foot=means,
  )


def _scores(
  row: evaluation.DirectionResult | evaluation.Mean, others: Sequence[str]
) -> list[float | None]:
  """The metrics of a row that are shown, then those of a metric command."""
  shown = [getattr(row, metric.name) for metric in SHOWN]
  return [*shown, *(row.metrics.get(name) for name in others)]


def print_scores(
  results: Sequence[evaluation.DirectionResult], file: TextIO | None = None
) -> None:
  """Writes the table, with means and sacreBLEU's signatures."""
  console = tables.terminal(file)
  tables.show(table(results), console)
  for sentence in evaluation.missing_tokenizers(results):
    print(sentence, file=file)
  for line in _signature_lines(results):
    console.print(line)


def _signature_lines(
  results: Sequence[evaluation.DirectionResult],
) -> list[str]:
  """A line for every signature, and who has the less common ones."""
  lines = []
  for metric in ("bleu", "chrf"):
    directions = collections.defaultdict(list)
    for r in results:
      signature = getattr(r, f"{metric}_signature")
      if signature:
        directions[signature].append(r.direction)
    ranked = sorted(directions.items(), key=lambda item: -len(item[1]))
    for i, (signature, names) in enumerate(ranked):
      who = f" ({', '.join(names)})" if i else ""
      lines.append(f"{metrics.named(metric).label}{who}: {signature}")
  return lines


def sample_lines(
  translations: Sequence[evaluation.DirectionTranslations], count: int = 5
) -> list[str]:
  """Some translations to look at: the middle one of `count` directions."""
  some = [t for t in translations if t.sources]
  chosen = some[:: max(1, math.ceil(len(some) / max(1, count)))][:count]
  lines = []
  for t in chosen:
    i = len(t.sources) // 2
    head = t.direction
    for label, texts in (
      ("source", t.sources),
      ("hypothesis", t.hypotheses),
      ("reference", t.references),
    ):
      lines.append(f"{head}  {label:<10}  {files.printable(texts[i])}")
      head = " " * len(head)
  return lines
