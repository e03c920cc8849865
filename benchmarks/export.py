"""A dense model beside its exports for CTranslate2: size, speed, agreement.

    PYTHONPATH=. python benchmarks/export.py --model_dir runs/dense --threads 2

Translates the model's test sentences with our own search and with CTranslate2
in float32 and in eight bits, in batches of the same size. Speed is of a second
pass: compiling and reading are left out. Any dense model will do; ours was

    basemt train --gin_file=gin/recipes/quickstart.gin \
      --gin.FEED_FORWARD=dense --gin.DENSE_STEPS=0 --gin.AVERAGE_DECAY=0.99
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from basemt_jax import evaluation, trained, translation
from basemt_jax import run as run_lib
from basemt_jax.data import languages
from basemt_jax.exports import ctranslate, directories
from benchmarks import measuring

QUANTIZATIONS = ("float32", "int8")


def exported(
  model: trained.Trained, folder: pathlib.Path, threads: int
) -> dict[str, Any]:
  """The exports by quantization, loaded."""
  found = {}
  for name in QUANTIZATIONS:
    place = folder / name
    fill = ctranslate.writer(model, name)
    directories.write(place, model, fill, name, "")
    found[name] = ctranslate.load(run_lib.described(place), "cpu", threads)
  return found


def bleu(
  texts: Sequence[evaluation.DirectionTexts], hypotheses: Sequence[str]
) -> float:
  """Mean over directions; `hypotheses` of all of them in order."""
  rest, scores = iter(hypotheses), []
  for t in texts:
    own = [next(rest) for _ in t.sources]
    target = languages.Direction.parse(t.direction).target
    scores.append(evaluation.score(own, t.references, target).bleu)
  return sum(scores) / len(scores)


def measured(
  model: Any,
  sources: Sequence[str],
  search: translation.SearchOptions,
) -> tuple[float, list[tuple[int, ...]], list[str]]:
  """Seconds of a second pass, ids and texts of the best hypotheses."""
  translator = model.translator(search)
  ids = [model.pieces.encode(source) for source in sources]
  translator.translate(ids)
  start = time.perf_counter()
  found = translator.translate(ids)
  seconds = time.perf_counter() - start
  best = [nbest[0].ids for nbest in found]
  return seconds, best, [model.pieces.decode(list(x)) for x in best]


def rows_of(
  models: dict[str, Any],
  texts: Sequence[evaluation.DirectionTexts],
  search: translation.SearchOptions,
) -> list[dict[str, Any]]:
  """Speed, BLEU and agreement with the first of some models."""
  sources = [source for t in texts for source in t.sources]
  rows: list[dict[str, Any]] = []
  expected: list[tuple[int, ...]] = []
  for name, model in models.items():
    seconds, found, hypotheses = measured(model, sources, search)
    expected = expected or found
    differing = sum(a != b for a, b in zip(found, expected, strict=True))
    rows.append(
      {
        "model": name,
        "beam": search.beam_size,
        "alpha": search.alpha,
        "sentences": len(sources),
        "differing": differing,
        "sentences_per_s": round(len(sources) / seconds, 1),
        "bleu": round(bleu(texts, hypotheses), 2),
      }
    )
    print(json.dumps(rows[-1]), flush=True)
  return rows


def sizes(model: trained.Trained, folder: pathlib.Path) -> dict[str, int]:
  """Bytes of the weights by model."""
  parameters = jax.tree.leaves(model.variables["params"])
  own = {"ours": sum(x.size * x.dtype.itemsize for x in parameters)}
  return own | {
    name: (folder / name / ctranslate.MODEL_FILE).stat().st_size
    for name in QUANTIZATIONS
  }


def main() -> None:
  """Prints a line for every model and search."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--model_dir", required=True)
  parser.add_argument("--threads", type=int, default=2, help="CTranslate2's")
  parser.add_argument("--limit", type=int, help="sentences of a direction")
  parser.add_argument(
    "--searches",
    nargs="+",
    default=["1:0.6", "4:0.6", "4:0"],
    metavar="BEAM:ALPHA",
  )
  args = parser.parse_args()
  model = trained.load(args.model_dir, rounded=False)
  texts = trained.direction_texts(model.store, "test", args.limit)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    exports = exported(model, folder, args.threads)
    found: dict[str, Any] = {"bytes": sizes(model, folder), "rows": []}
    print(json.dumps(found["bytes"]), flush=True)
    for text in args.searches:
      beam, _, alpha = text.partition(":")
      search = dataclasses.replace(
        model.run.search, beam_size=int(beam), alpha=float(alpha)
      )
      found["rows"] += rows_of({"ours": model, **exports}, texts, search)
  measuring.write(args, found)


if __name__ == "__main__":
  main()
