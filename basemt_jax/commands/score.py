"""`basemt score`: how probable given translations are."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from basemt_jax.commands import configuration, console, flags, models, translate

SUMMARY = "Log-probabilities of given pairs of sentences."

# Batches that are read before the first score is written: as many lengths to
# put beside their like.
_BATCHES = 16


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.checkpoint(parser)
  flags.modules(parser)
  parser.add_argument(
    "--to",
    metavar="XX",
    help="target language of lines SOURCE<TAB>TARGET; without it lines are "
    "DIRECTION<TAB>SOURCE<TAB>TARGET, with en-de for a direction",
  )
  flags.lines(parser)
  parser.add_argument(
    "--alpha", type=float, help="exponent of the length penalty"
  )
  parser.add_argument(
    "--jsonl",
    action="store_true",
    help="an object a line, with the log-probability of every token, instead "
    "of TOTAL<TAB>PER_TOKEN<TAB>NORMALISED<TAB>TOKENS",
  )


def run(options: argparse.Namespace) -> None:
  """Scores pairs as they come; a line in is a line out."""
  from basemt_jax import files
  from basemt_jax import trained as trained_lib
  from basemt_jax.data import parallel_text

  if options.output:
    files.check_writable(options.output)
  if options.input:
    translate.check_text(options.input)
  model = trained_lib.load(
    configuration.trained(options), console.standard(), options.checkpoint
  )
  scoring = _Scoring(model, options)
  most = _BATCHES * model.run.search.batch_size
  name = options.input or "standard input"
  report = parallel_text.Report(name)
  with (
    translate.input_lines(options.input) as lines,
    translate.output_text(options.output) as write,
  ):
    done = 0
    while some := lines.read(most):
      for number, found in enumerate(scoring(some), done + 1):
        if trouble := found.get("trouble"):
          report.skip(f"{name}:{number}", trouble)
        else:
          report.pairs += 1
        write(_line({"line": number, **found}, options.jsonl))
      write("")
      done += len(some)
  if report.skipped:
    print(
      f"not scored: {report}; the first: {report.examples[0]}", file=sys.stderr
    )


class _Scoring:
  """Scores lines of text; what cannot be scored has its `trouble`."""

  def __init__(self, model: Any, options: argparse.Namespace):
    self._model, self._options = model, options
    self._scorer = model.scorer()
    alpha = options.alpha
    self._alpha = model.run.search.alpha if alpha is None else alpha
    if options.to:
      self._tag = models.tag(model, options.to, options.source)

  def __call__(self, lines: list[str]) -> Iterator[dict[str, Any]]:
    read = [self._read(line) for line in lines]
    usable = [x for x in read if "trouble" not in x]
    scores = iter(
      self._scorer.score(
        [x.pop("source_ids") for x in usable],
        [x["target_ids"] for x in usable],
      )
    )
    for values in read:
      if "trouble" not in values:
        score = next(scores)
        ids = [*values.pop("target_ids"), 1]
        pieces = [self._model.pieces.piece(i) for i in ids]
        values |= {
          "total": score.total,
          "per_token": score.per_token,
          "normalised": score.normalised(self._alpha),
          "tokens": list(zip(pieces, score.token_log_probs, strict=True)),
        }
      yield values

  def _read(self, line: str) -> dict[str, Any]:
    """What stands in a line, as text and ids, or its trouble."""
    from basemt_jax.data import normalisation

    if not line.strip():
      return {"trouble": "blank line"}
    names = ["source", "target"]
    if not self._options.to:
      names.insert(0, "direction")
    cells = [normalisation.normalise(cell) for cell in line.split("\t")]
    if len(cells) != len(names):
      return {"trouble": f"{len(cells)} columns instead of {len(names)}"}
    values: dict[str, Any] = dict(zip(names, cells, strict=True))
    if not values["source"] or not values["target"]:
      return {**values, "trouble": "empty side"}
    try:
      tag = self._tag_of(values.get("direction"))
    except ValueError as error:
      return {**values, "trouble": f"{values['direction']}: {error}"}
    encode = self._model.pieces.encode
    ids = encode(tag(values["source"])), encode(values["target"])
    if why := self._scorer.too_long(*ids):
      return {**values, "trouble": why}
    return {**values, "source_ids": ids[0], "target_ids": ids[1]}

  def _tag_of(self, direction: str | None) -> Any:
    from basemt_jax.data import languages

    if direction is None:
      return self._tag
    parsed = languages.Direction.parse(direction)
    return self._model.tag(parsed.target, parsed.source)


def _line(values: dict[str, Any], as_json: bool) -> str:
  if as_json:
    return json.dumps(values, ensure_ascii=False) + "\n"
  scores = [
    values.get(name, math.nan) for name in ("total", "per_token", "normalised")
  ]
  count = len(values.get("tokens", ()))
  return "".join(f"{score:.6f}\t" for score in scores) + f"{count}\n"
