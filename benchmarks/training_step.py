"""Training step of a sparse Transformer beside the dense one of equal FLOPs.

    python benchmarks/training_step.py --rows 64 --experts 32

The very step of the trainer (`steps.Program`): packed rows of LENGTH tokens a
side, bfloat16, AdamW. Model FLOPs per step are 6 times (parameters a token
uses) times tokens, plus 12 * length * width per attention and token; MFU
divides by the device's peak, given with --peak_tflops (989: H100 and H200
SXM, dense bfloat16).
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from basemt_jax import model, optimizer, partitioning, steps

VOCABULARY = 32000


def config(args: argparse.Namespace, feed_forward: str):
  """Transformer-big, or as the flags say, with experts in a third of blocks."""
  blocks = tuple(range(2, args.layers, 3))
  return model.TransformerConfig(
    vocab_size=VOCABULARY,
    emb_dim=args.width,
    num_heads=args.width // 64,
    head_dim=64,
    mlp_dim=4 * args.width,
    num_encoder_layers=args.layers,
    num_decoder_layers=args.layers,
    dropout_rate=0.1,
    dtype=args.dtype,
    remat=args.remat,
    attention_implementation=args.attention or None,
    feed_forward=feed_forward,
    encoder_expert_blocks=blocks,
    decoder_expert_blocks=blocks,
    num_experts=args.experts,
  )


def batch(args: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
  """Rows of four packed examples each."""
  rng = np.random.RandomState(seed)
  shape = (args.rows, args.length)
  segments = np.repeat(np.arange(1, 5), args.length // 4)[None]
  positions = np.tile(np.arange(args.length // 4), 4)[None]
  result: dict[str, np.ndarray] = {}
  for side in ("encoder", "decoder"):
    tokens = rng.randint(2, VOCABULARY, size=shape).astype(np.int32)
    result[f"{side}_segment_ids"] = np.broadcast_to(segments, shape)
    result[f"{side}_positions"] = np.broadcast_to(positions, shape)
    result[f"{side}_input_tokens"] = tokens
  result["decoder_target_tokens"] = tokens
  result["decoder_loss_weights"] = np.ones(shape, np.float32)
  result["direction"] = rng.randint(24, size=args.rows)
  return {
    k: np.ascontiguousarray(v, np.float32 if "weights" in k else np.int32)
    for k, v in result.items()
  }


def model_flops(cfg: model.TransformerConfig, rows: int, length: int) -> float:
  """FLOPs of one step by formula: forward, and twice that backward."""
  width, hidden = cfg.emb_dim, cfg.mlp_dim
  attention = 4 * width * cfg.num_heads * cfg.head_dim
  encoder = cfg.num_encoder_layers * (attention + 2 * width * hidden)
  decoder = cfg.num_decoder_layers * (2 * attention + 2 * width * hidden)
  used = encoder + decoder + cfg.vocab_size * width
  scores = cfg.num_encoder_layers + 2 * cfg.num_decoder_layers
  tokens = rows * length
  return 6.0 * used * tokens + 12.0 * scores * length * width * tokens


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--experts", type=int, default=32)
  parser.add_argument("--expert_devices", type=int, default=1)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--remat", action="store_true")
  parser.add_argument("--attention", default="")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--peak_tflops", type=float, default=989.0)
  parser.add_argument("--json", help="file for the figures")
  args = parser.parse_args()
  mesh = partitioning.make_mesh(args.expert_devices)
  settings = steps.Settings(
    train_steps=10**6,
    learning_rate=optimizer.inverse_square_root(1e-3, 1000),
    optimizer=optimizer.adamw(),
  )
  batches = [
    partitioning.put_batch(batch(args, seed), mesh) for seed in range(4)
  ]
  programs, states = {}, {}
  times: dict[str, list[float]] = {}
  for name in ("dense", "experts"):
    program = steps.Program(
      config(args, name), settings, settings.learning_rate, mesh, 24
    )
    start = time.perf_counter()
    state, _ = program.train_step(program.init(), None, batches[0])
    jax.block_until_ready(state)
    print(
      f"{name}: compiled in {time.perf_counter() - start:.0f} s", flush=True
    )
    programs[name], states[name], times[name] = program, state, []
  for _ in range(args.repeats):
    for name, program in programs.items():
      start = time.perf_counter()
      for data in batches:
        states[name], _ = program.train_step(states[name], None, data)
      jax.block_until_ready(states[name])
      times[name].append((time.perf_counter() - start) / len(batches))
  flops = model_flops(config(args, "dense"), args.rows, args.length)
  figures = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
    **vars(args),
  }
  for name, seconds in times.items():
    median = statistics.median(seconds)
    mfu = flops / median / (args.peak_tflops * 1e12 * jax.device_count())
    tokens = 2 * args.rows * args.length / median
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 0) / 2**30
    figures[name] = {"ms": median * 1e3, "mfu": mfu, "tokens_per_s": tokens}
    print(
      f"{name:8} {median * 1e3:8.1f} ms  MFU {mfu:.3f}  {tokens:,.0f} tokens/s"
      f"  (peak memory so far {peak:.1f} GiB)"
    )
  figures["ratio"] = figures["experts"]["ms"] / figures["dense"]["ms"]
  print(f"sparse / dense {figures['ratio']:.3f}")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(figures, file)


if __name__ == "__main__":
  main()
