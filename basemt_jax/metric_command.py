"""Scores of translations by a command of the user's, such as COMET.

Neural metrics have dependencies that clash with JAX's, so they run in an
environment of their own. The command reads a JSON object a line, with
`direction`, `source`, `hypothesis` and `reference`, and writes a line for each
in the same order: a number, or an object of names and numbers.
"""

import dataclasses
import json
import math
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from basemt_jax import evaluation

# The name of a metric that has none of its own.
UNNAMED = "metric"


def with_metrics(
  command: str,
  results: Sequence[evaluation.DirectionResult],
  translations: Sequence[evaluation.DirectionTranslations],
) -> list[evaluation.DirectionResult]:
  """Results with the scores of an external command, by direction.

  It is run once, on the sentences of all directions; results are in the order
  of the translations, whose sources are as people write them.

  Raises:
    ValueError: See `scores`.
  """
  records = [
    {
      "direction": t.direction,
      "source": source,
      "hypothesis": hypothesis,
      "reference": reference,
    }
    for t in translations
    for source, hypothesis, reference in zip(
      t.sources, t.hypotheses, t.references, strict=True
    )
  ]
  found = scores(command, records)
  ends = np.cumsum([len(t.references) for t in translations])
  scored = []
  for result, end in zip(results, ends, strict=True):
    own = slice(end - result.test_pairs, end)
    means = {
      name: float(np.mean(values[own]))
      for name, values in found.items()
      if result.test_pairs
    }
    means = {**result.metrics, **means}
    scored.append(dataclasses.replace(result, metrics=means))
  return scored


def scores(
  command: str, records: Sequence[Mapping[str, str]]
) -> dict[str, list[float]]:
  """Runs a command, as a shell reads its words, once; no shell runs it.

  Args:
    command: The command.
    records: What it is given, an object a line.

  Returns:
    By name of the metric, a score for each record.

  Raises:
    ValueError: it cannot be started, fails, or writes anything but as many
      lines of finite numbers; with what it said last.
  """
  text = "".join(
    json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records
  )
  try:
    done = subprocess.run(
      shlex.split(command), input=text.encode(), capture_output=True
    )
  except (OSError, ValueError, IndexError) as error:
    why = getattr(error, "strerror", None) or error
    raise ValueError(
      f"the metric command {command!r} cannot be started: {why}"
    ) from error
  if done.returncode:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    why = f": {said[-1]}" if said else ""
    raise ValueError(
      f"the metric command {command!r} ended with code {done.returncode}{why}"
    )
  lines = done.stdout.decode(errors="replace").splitlines()
  if len(lines) != len(records):
    raise ValueError(
      f"the metric command {command!r} wrote {len(lines)} lines for "
      f"{len(records)} sentences: it must write one score for each, and "
      "nothing else, on its standard output"
    )
  found: dict[str, list[float]] = {}
  for number, values in enumerate(_read(command, lines), start=1):
    if number > 1 and values.keys() != found.keys():
      raise ValueError(
        f"the metric command {command!r} wrote {', '.join(values)} in line "
        f"{number} and {', '.join(found)} before"
      )
    for name, value in values.items():
      found.setdefault(name, []).append(value)
  return found


def _read(command: str, lines: Sequence[str]) -> Iterator[dict[str, float]]:
  """Each line's metrics by name."""
  for number, line in enumerate(lines, start=1):
    try:
      values = json.loads(line)
    except ValueError:
      values = None
    if not isinstance(values, dict):
      values = {UNNAMED: values}
    for value in values.values() or [None]:
      if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
      ):
        raise ValueError(
          f"the metric command {command!r} wrote {line[:60]!r} in line "
          f"{number}, which is neither a finite number nor an object of them"
        )
    yield {str(name): float(value) for name, value in values.items()}
