"""Training step of a sparse Transformer beside the dense one of equal FLOPs.

    python benchmarks/training_step.py --shapes 6x64 6x256 12x64 --experts 32

The very step of the trainer (`steps.Program`): packed rows of LENGTH tokens a
side, bfloat16, AdamW; a shape is blocks a side x rows. Model FLOPs per step are
6 times (parameters a token uses) times tokens, plus 12 * length * width per
attention and token; MFU divides by the device's peak, given with --peak_tflops
(989: H100 and H200 SXM, dense bfloat16). All programs are compiled at once, in
threads; the dense and the sparse step of a shape are timed in turn.
"""

import argparse
import concurrent.futures
import itertools
import json
import statistics
import time

import jax
import numpy as np

from basemt_jax import model, optimizer, partitioning, steps

VOCABULARY = 32000


def config(args: argparse.Namespace, layers: int, feed_forward: str):
  """Transformer-big, or as the flags say, with experts in a third of blocks."""
  blocks = tuple(range(2, layers, 3))
  return model.TransformerConfig(
    vocab_size=VOCABULARY,
    emb_dim=args.width,
    num_heads=args.width // 64,
    head_dim=64,
    mlp_dim=4 * args.width,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    dropout_rate=0.1,
    dtype=args.dtype,
    remat=args.remat,
    attention_implementation=args.attention or None,
    feed_forward=feed_forward,
    encoder_expert_blocks=blocks,
    decoder_expert_blocks=blocks,
    num_experts=args.experts,
  )


def batch(rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
  """Rows of four packed examples each."""
  rng = np.random.RandomState(seed)
  shape = (rows, length)
  segments = np.repeat(np.arange(1, 5), length // 4)[None]
  positions = np.tile(np.arange(length // 4), 4)[None]
  result: dict[str, np.ndarray] = {}
  for side in ("encoder", "decoder"):
    tokens = rng.randint(2, VOCABULARY, size=shape).astype(np.int32)
    result[f"{side}_segment_ids"] = np.broadcast_to(segments, shape)
    result[f"{side}_positions"] = np.broadcast_to(positions, shape)
    result[f"{side}_input_tokens"] = tokens
  result["decoder_target_tokens"] = tokens
  result["decoder_loss_weights"] = np.ones(shape, np.float32)
  result["direction"] = rng.randint(24, size=rows)
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


def compiled(
  args: argparse.Namespace, shape: tuple[int, int], feed_forward: str
) -> tuple[steps.Program, float]:
  """A program after its first step, and the seconds that took."""
  layers, rows = shape
  mesh = partitioning.make_mesh(args.expert_devices)
  settings = steps.Settings(
    train_steps=10**6,
    learning_rate=optimizer.inverse_square_root(1e-3, 1000),
    optimizer=optimizer.adamw(),
  )
  program = steps.Program(
    config(args, layers, feed_forward),
    settings,
    settings.learning_rate,
    mesh,
    24,
  )
  start = time.perf_counter()
  data = partitioning.put_batch(batch(rows, args.length, 0), mesh)
  state, _ = program.train_step(program.init(), None, data)
  jax.block_until_ready(state)
  return program, time.perf_counter() - start


def times(
  programs: dict[str, steps.Program], rows: int, args: argparse.Namespace
) -> dict[str, list[float]]:
  """Seconds of a step of each program, measured in turn on four batches."""
  mesh = next(iter(programs.values())).mesh
  batches = [
    partitioning.put_batch(batch(rows, args.length, seed), mesh)
    for seed in range(4)
  ]
  states = {name: program.init() for name, program in programs.items()}
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(args.repeats):
    for name, program in programs.items():
      start = time.perf_counter()
      for data in batches:
        states[name], _ = program.train_step(states[name], None, data)
      jax.block_until_ready(states[name])
      seconds[name].append((time.perf_counter() - start) / len(batches))
  return seconds


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shapes", nargs="+", default=["6x64"])
  parser.add_argument("--width", type=int, default=1024)
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
  shapes = [tuple(int(x) for x in s.split("x")) for s in args.shapes]
  device = jax.devices()[0]
  print(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
  keys = list(itertools.product(shapes, ("dense", "experts")))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda key: compiled(args, *key), keys)
    programs = dict(zip(keys, found, strict=True))
  rows_of_table = []
  for shape in shapes:
    layers, rows = shape
    pair = {n: programs[shape, n][0] for n in ("dense", "experts")}
    medians = {
      name: statistics.median(seconds)
      for name, seconds in times(pair, rows, args).items()
    }
    flops = model_flops(config(args, layers, "dense"), rows, args.length)
    for name, median in medians.items():
      peak = args.peak_tflops * 1e12 * jax.device_count()
      row = {
        "blocks": layers,
        "rows": rows,
        "model": name,
        "ms": round(median * 1e3, 2),
        "mfu": round(flops / median / peak, 4),
        "tokens_per_s": round(2 * rows * args.length / median),
        "ratio": round(median / medians["dense"], 4),
        "compile_s": round(programs[shape, name][1], 1),
      }
      rows_of_table.append(row)
      print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
  memory = device.memory_stats() or {}
  print(f"peak memory {memory.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB")
  if args.json:
    figures = {
      "device": device.device_kind,
      "devices": jax.device_count(),
      "jax": jax.__version__,
      **vars(args),
      "figures": rows_of_table,
    }
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(figures, file)


if __name__ == "__main__":
  main()
