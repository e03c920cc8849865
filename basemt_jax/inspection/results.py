"""What a model directory holds of a run: metrics, and results of evaluations.

Metrics are lines of `metrics.jsonl`; an evaluation is a folder
`evaluation/NAME` with `scores.json`, and a direction's `.hyp` and `.ref` beside
it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

# Values by step.
Series = dict[int, float]


def read_metrics(path: pathlib.Path) -> dict[str, Series]:
  """Metrics by name and step; {} if there is no file.

  A run that was killed and went on from a checkpoint has written some steps
  twice: what came later counts, and what it made void is dropped.
  """
  lines: list[tuple[int, dict[str, Any]]] = []
  if not path.exists():
    return {}
  for text in path.read_text("utf-8", errors="replace").split("\n"):
    try:
      values = json.loads(text)
      step = int(values.pop("step"))
    except (ValueError, KeyError, TypeError, AttributeError):
      continue  # Half a line, of a process that was killed.
    if "loss" in values:  # A step's first line.
      while lines and lines[-1][0] >= step:
        lines.pop()
    lines.append((step, values))
  series: dict[str, Series] = {}
  for step, values in lines:
    for name, value in values.items():
      if isinstance(value, (int, float)):
        series.setdefault(name, {})[step] = float(value)
  return series


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """One evaluation."""

  name: str  # 'test, greedy', 'test, beam 4'
  step: int  # of the checkpoint; 0 of an export
  directory: pathlib.Path
  # `evaluation.DirectionResult`s as dictionaries, by direction
  directions: Mapping[str, Mapping[str, Any]]

  def scores(self, metric: str) -> dict[str, float]:
    """A metric's values by direction, where they were measured."""
    return {
      name: own[metric]
      for name, own in self.directions.items()
      if own.get(metric) is not None
    }

  def sentences(self, direction: str, suffix: str) -> list[str] | None:
    """Lines of 'hyp' or 'ref'; None where there is no file."""
    path = self.directory / f"{direction}.{suffix}"
    if not path.exists():
      return None
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def evaluations(
  model_dir: pathlib.Path, step: int | None = None
) -> dict[str, Evaluated]:
  """The last evaluation of every test set and search until a step, by name."""
  found: dict[str, Evaluated] = {}
  for path in sorted(model_dir.glob("evaluation/*/scores.json")):
    own = _read(path)
    if step is not None and own.step > step:
      continue
    if own.name not in found or found[own.name].step <= own.step:
      found[own.name] = own
  return dict(sorted(found.items()))


def _read(path: pathlib.Path) -> Evaluated:
  """One evaluation.

  Raises:
    ValueError: it is damaged.
  """
  try:
    contents = json.loads(path.read_text(encoding="utf-8"))
    return Evaluated(
      f"{contents['test_set']}, {search_name(contents['search'])}",
      contents["step"] or 0,
      path.parent,
      {r["direction"]: r for r in contents["directions"]},
    )
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged ({error}); evaluate again, or delete it"
    ) from error


def search_name(search: Mapping[str, Any]) -> str:
  """What readers call a search: 'greedy' or 'beam 4'."""
  beam = search["beam_size"]
  return "greedy" if beam == 1 else f"beam {beam}"
