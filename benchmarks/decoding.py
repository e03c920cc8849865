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
import functools
import json
import statistics
from typing import Any

import jax
import numpy as np

from basemt_jax import model, translation
from benchmarks import measuring

SOURCE, TARGET = 32, 64


def ours(cfg: model.TransformerConfig, beam: int, tokens: np.ndarray) -> Any:
  """A function that translates the sources once."""
  transformer = model.Transformer(cfg)
  short = tokens[:1, :8]

  def init(key: jax.Array) -> Any:
    variables = dict(transformer.init(key, short, short, short, train=True))
    kept = {k: v for k, v in variables.items() if k in ("params", "prices")}
    kept["params"] = jax.tree.map(
      lambda p: p.astype(cfg.dtype) if p.ndim > 1 else p, kept["params"]
    )
    return kept

  variables = jax.jit(init)(jax.random.key(0))
  search = jax.jit(
    functools.partial(
      translation.search,
      transformer,
      max_length=TARGET,
      options=translation.SearchOptions(beam_size=beam),
    )
  )
  limits = np.full(len(tokens), TARGET, np.int32)
  return lambda: search(variables, tokens, limits)


def marian(args: argparse.Namespace, beam: int, tokens: np.ndarray) -> Any:
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
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  rows = []
  for size in args.batches:
    for beam in args.beams:
      tokens = np.random.RandomState(0).randint(
        2, args.vocabulary, size=(size, SOURCE)
      )
      tokens[:, -1] = 1
      functions = {
        name: ours(
          measuring.transformer(
            args.blocks, args.width, args.vocabulary, experts
          ),
          beam,
          tokens,
        )
        for name, experts in (("dense", 0), ("experts", args.experts))
      }
      if args.marian:
        functions["marian"] = marian(args, beam, tokens)
      measuring.in_turn(functions, 1)  # Compiles.
      seconds = {
        name: statistics.median(own)
        for name, own in measuring.in_turn(functions, args.repeats).items()
      }
      row = {
        "batch": size,
        "beam": beam,
        "sentences_per_s": {k: round(size / s, 1) for k, s in seconds.items()},
        "tokens_per_s": {
          k: round(TARGET * size / s) for k, s in seconds.items()
        },
        "sparse_over_dense": round(seconds["experts"] / seconds["dense"], 3),
      }
      rows.append(row)
      print(json.dumps(row), flush=True)
  measuring.write(args, {"rows": rows})


if __name__ == "__main__":
  main()
