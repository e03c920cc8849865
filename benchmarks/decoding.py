"""Sentences a second of dense and sparse models, beside Hugging Face's Marian.

    PYTHONPATH=. python benchmarks/decoding.py --batches 1 64 512 --beams 1 4

Random weights, sources of 32 tokens, hypotheses of 64: their number is what
costs, not what they say. All models have the same width, blocks, heads and
vocabulary, and compute in bfloat16. Marian (`--marian`, where `torch` and
`transformers` are installed) generates exactly as many tokens with its own
`generate`, compiled caches and all as its users have it. Medians of several
repeats, compiling left out; models are timed in turn.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from basemt_jax import model, translation
from benchmarks import measuring

SOURCE, TARGET = 32, 64


def sources(size: int, vocabulary: int) -> np.ndarray:
  """Tokens [size, SOURCE] with an end each."""
  tokens = np.random.RandomState(0).randint(2, vocabulary, size=(size, SOURCE))
  tokens[:, -1] = 1
  return tokens


def weights(transformer: model.Transformer) -> Any:
  """Random ones, matrices in the type they are multiplied in."""
  cfg = transformer.config
  short = np.ones((1, 8), np.int32)

  def init(key: jax.Array) -> Any:
    variables = dict(transformer.init(key, short, short, short, train=True))
    kept = {k: v for k, v in variables.items() if k in ("params", "prices")}
    kept["params"] = jax.tree.map(
      lambda p: p.astype(cfg.dtype) if p.ndim > 1 else p, kept["params"]
    )
    return kept

  return jax.jit(init)(jax.random.key(0))


def ours(
  transformer: model.Transformer,
  variables: Any,
  beam: int,
  tokens: np.ndarray,
) -> Callable[[], Any]:
  """A compiled function that translates the sources once."""
  search = functools.partial(
    translation.search,
    transformer,
    max_length=TARGET,
    options=translation.SearchOptions(beam_size=beam),
  )
  operands = variables, tokens, np.full(len(tokens), TARGET, np.int32)
  return functools.partial(
    jax.jit(search).lower(*operands).compile(), *operands
  )


def marian(
  args: argparse.Namespace, beam: int, tokens: np.ndarray
) -> Callable[[], Any]:
  """The same of a Marian model of the same size."""
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  network = transformers.MarianMTModel(
    transformers.MarianConfig(
      vocab_size=args.vocabulary,
      d_model=args.width,
      encoder_layers=args.blocks,
      decoder_layers=args.blocks,
      encoder_attention_heads=args.width // 64,
      decoder_attention_heads=args.width // 64,
      encoder_ffn_dim=4 * args.width,
      decoder_ffn_dim=4 * args.width,
      max_position_embeddings=512,
      pad_token_id=0,
      eos_token_id=1,
      decoder_start_token_id=0,
      forced_eos_token_id=1,
    )
  )
  network = network.to(device, torch.bfloat16).eval()
  inputs = torch.tensor(tokens, device=device)

  def translate() -> None:
    with torch.inference_mode():
      network.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        num_beams=beam,
        do_sample=False,
        min_new_tokens=TARGET,
        max_new_tokens=TARGET,
      )
    if device == "cuda":
      torch.cuda.synchronize()

  return translate


def compile_all(
  args: argparse.Namespace,
) -> dict[tuple[int, int], dict[str, Callable[[], Any]]]:
  """Our searches by batch, beam and model, compiled side by side."""
  found: dict[tuple[int, int], dict[str, Any]] = collections.defaultdict(dict)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for name, experts in (("dense", 0), ("experts", args.experts)):
      transformer = model.Transformer(
        measuring.transformer(args.blocks, args.width, args.vocabulary, experts)
      )
      variables = weights(transformer)
      for size, beam in itertools.product(args.batches, args.beams):
        found[size, beam][name] = pool.submit(
          ours, transformer, variables, beam, sources(size, args.vocabulary)
        )
  return {
    case: {name: search.result() for name, search in own.items()}
    for case, own in found.items()
  }


def main() -> None:
  """Prints a line for every batch and beam."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--blocks", type=int, default=6)
  parser.add_argument("--vocabulary", type=int, default=32000)
  parser.add_argument("--experts", type=int, default=32)
  parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 512])
  parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--marian", action="store_true", help="needs torch")
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
  searches = compile_all(args)
  rows = []
  for size, beam in itertools.product(args.batches, args.beams):
    functions = searches[size, beam]
    if args.marian:
      functions["marian"] = marian(args, beam, sources(size, args.vocabulary))
    measuring.in_turn(functions, 1)  # Warms up.
    seconds = {
      name: statistics.median(own)
      for name, own in measuring.in_turn(functions, args.repeats).items()
    }
    row = {
      "batch": size,
      "beam": beam,
      "sentences_per_s": {k: round(size / s, 1) for k, s in seconds.items()},
      "tokens_per_s": {k: round(TARGET * size / s) for k, s in seconds.items()},
      "sparse_over_dense": round(seconds["experts"] / seconds["dense"], 3),
    }
    rows.append(row)
    print(json.dumps(row), flush=True)
    measuring.write(args, {"rows": rows})


if __name__ == "__main__":
  main()
