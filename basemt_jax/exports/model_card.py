"""The model card of an export: README.md with the YAML that hubs read.

The fields are those of Hugging Face's model cards; scores are those that
`evaluate` left in the model directory for the checkpoint.
"""

import importlib.resources
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2

from basemt_jax import trained
from basemt_jax.data import languages

FILE = "README.md"
UNKNOWN_LICENCE = "unknown"


def text(
  model: trained.Trained,
  name: str,
  weights: str,
  use: str,
  licence: str = UNKNOWN_LICENCE,
) -> str:
  """The card of an export of that name.

  It tells what the arrays are (`weights`: 'int8'), and a shell command to `use`
  them.

  Raises:
    ValueError: The licence is no identifier.
  """
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
    raise ValueError(
      f"the licence {licence!r} is not an identifier such as apache-2.0, "
      "cc-by-nc-4.0 or other"
    )
  known = model.description
  scores = _scores(model)
  results = [r for r in scores.get("directions", ()) if r["bleu"] is not None]
  config = model.program.model.config
  template = importlib.resources.files("basemt_jax.exports") / "card.md"
  return jinja2.Template(
    template.read_text("utf-8"), keep_trailing_newline=True
  ).render(
    name=name,
    licence=licence.lower(),
    languages=_languages(known.directions),
    directions=_directions(model, results),
    results=results,
    split=scores.get("test_set"),
    beam=scores.get("search", {}).get("beam_size", 1),
    signatures=sorted(
      {r[f"{score}_signature"] for r in results for score in ("bleu", "chrf")}
    ),
    mixture=known.mixture,
    step=model.step,
    parameters=sum(x.size for x in jax.tree.leaves(model.variables["params"])),
    network=config,
    experts="experts" in config.block_kinds(False) + config.block_kinds(True),
    vocab_size=known.header.vocab_size,
    lengths=known.header.lengths,
    weights=weights,
    sampling=str(model.run.strategy),
    use=use,
  )


def _scores(model: trained.Trained) -> dict[str, Any]:
  """What `evaluate` wrote of the checkpoint; {} if it did not.

  Of several evaluations the one of the model's own test text counts before one
  of dev text, that before other test sets; then the one with the widest beam.
  """
  splits = ("validation", "test")
  folder = pathlib.Path(model.run.model_dir) / "evaluation"
  found = [
    json.loads(path.read_text("utf-8"))
    for path in sorted(folder.glob("*/scores.json"))
  ]
  weights = "averaged" if model.is_averaged else "last"
  return max(
    (
      s
      for s in found
      if (s.get("step"), s.get("weights")) == (model.step, weights)
    ),
    key=lambda s: (
      splits.index(s["test_set"]) if s["test_set"] in splits else -1,
      s["search"]["beam_size"],
    ),
    default={},
  )


def _languages(directions: Sequence[str]) -> list[str]:
  """Codes of ISO 639, sorted; hubs know no scripts and regions there."""
  parsed = map(languages.Direction.parse, directions)
  return sorted({language.base for pair in parsed for language in pair})


def _directions(
  model: trained.Trained, results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Rows of the table, most training pairs first."""
  known = model.description
  scores = {r["direction"]: r for r in results}

  def row(name: str) -> dict[str, Any]:
    found = scores.get(name, {})
    shown = {
      key: f"{found[key]:.1f}" if key in found else ""
      for key in ("bleu", "chrf")
    }
    pairs = known.header.stats("train", name).pairs
    return {"name": name, "pairs": pairs, **shown}

  return sorted(map(row, known.directions), key=lambda r: -r["pairs"])
