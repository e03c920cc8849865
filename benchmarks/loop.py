"""How busy the training loop keeps the device, from a trace.

    PYTHONPATH=. python benchmarks/loop.py --json out.json

The trainer itself (`trainer.Trainer`) with rows read from disk, logging and
checkpoints, on a network of Transformer-base's size with experts. Three times
of a step: in the loop; bare, the same program called on batches that are on
the device already; and the time in which the device runs kernels, from a trace
of the loop (tracing slows the launches, not the kernels). What a checkpoint
costs is measured by the clock.
"""

import argparse
import contextlib
import json
import tempfile
import time
from typing import Any

import jax
import numpy as np

from basemt_jax import (
  batches,
  heating,
  model,
  optimizer,
  packing,
  partitioning,
  row_store,
  sampling,
  steps,
  trainer,
)
from benchmarks import device_trace

DIRECTIONS = 24
VOCABULARY = 32000


def write_store(directory: str, length: int, rows: int) -> row_store.RowStore:
  """Random token ids, `rows` rows or so of every direction."""
  draw = np.random.default_rng(0)
  layout = packing.RowLayout(length, length)
  stats = {}
  for i in range(DIRECTIONS):
    name = f"en-x{i:02}"
    writer = row_store.RowStoreWriter(directory, "train", name, layout)
    lengths = draw.integers(10, 60, size=rows * length // 35)
    source, target = (
      packing.Ragged.of([draw.integers(2, VOCABULARY, n) for n in lengths])
      for _ in range(2)
    )
    writer.add(source, target, ())
    stats[name] = writer.finish()
  row_store.write_header(
    directory,
    layout=layout,
    vocabulary={"kind": "bytes", "file": None, "size": VOCABULARY},
    fingerprint={},
    splits={"train": stats},
  )
  return row_store.RowStore.open(directory)


class NoWriter:
  """Takes metrics and leaves them."""

  def write_scalars(self, step: int, scalars: Any) -> None:
    """See `trainer.Writer`."""

  def flush(self) -> None:
    """See `trainer.Writer`."""


def bare_step_ms(
  loop: trainer.Trainer, store: row_store.RowStore, args: argparse.Namespace
) -> float:
  """Milliseconds of a step of the loop's program without the loop."""
  program, state = loop.program, loop.state
  source = train_batches(store, args.rows)
  data = [partitioning.put_batch(next(source), program.mesh) for _ in range(4)]
  for count in (4, args.every):  # The first few warm up.
    start = time.perf_counter()
    for i in range(count):
      state, _ = program.train_step(state, None, data[i % 4])
    jax.block_until_ready(state)
  return 1e3 * (time.perf_counter() - start) / args.every


def train_batches(store: row_store.RowStore, rows: int) -> batches.TrainBatches:
  """Batches with a rising temperature."""
  strategy = sampling.Strategy(heating.linear(1.0, 5.0, 100))
  return batches.TrainBatches(store, strategy, rows, 0)


def main() -> None:
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--experts", type=int, default=16)
  parser.add_argument("--every", type=int, default=50, help="steps, reports")
  parser.add_argument("--json", help="file for the figures")
  args = parser.parse_args()
  blocks = tuple(range(2, args.layers, 3))
  config = model.TransformerConfig(
    vocab_size=VOCABULARY,
    emb_dim=args.width,
    num_heads=args.width // 64,
    head_dim=64,
    mlp_dim=4 * args.width,
    num_encoder_layers=args.layers,
    num_decoder_layers=args.layers,
    dtype="bfloat16",
    feed_forward="experts",
    encoder_expert_blocks=blocks,
    decoder_expert_blocks=blocks,
    num_experts=args.experts,
  )
  settings = steps.Settings(
    train_steps=4 * args.every,
    learning_rate=optimizer.inverse_square_root(1e-3, 1000),
    optimizer=optimizer.adamw(),
    log_every=args.every // 5,
    eval_every=10**6,
    save_every=3 * args.every,
  )
  watch = contextlib.ExitStack()
  trace = device_trace.Trace()
  clock: dict[int, float] = {}

  def report(progress: trainer.Progress) -> None:
    nonlocal trace
    jax.block_until_ready(loop.state)
    clock[progress.step] = time.perf_counter()
    if progress.step == args.every:
      trace = watch.enter_context(device_trace.recorded())
    elif progress.step == 2 * args.every:
      watch.close()

  with tempfile.TemporaryDirectory() as folder:
    store = write_store(f"{folder}/rows", args.length, 2 * args.rows)
    loop = trainer.Trainer(
      config,
      settings,
      partitioning.make_mesh(),
      store.directions,
      train_batches(store, args.rows),
      f"{folder}/run",
      NoWriter(),
      hooks=trainer.Hooks(report=report),
    )
    with contextlib.closing(loop):
      loop.run()
      bare_ms = bare_step_ms(loop, store, args)
  gap, every = settings.log_every, args.every
  quiet = clock[3 * every - gap] - clock[2 * every + gap]
  step_ms = 1e3 * quiet / (every - 2 * gap)
  saving = 1e3 * (clock[3 * every + gap] - clock[3 * every])
  figures = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    **vars(args),
    "step_ms": round(step_ms, 3),
    "bare_step_ms": round(bare_ms, 3),
    "checkpoint_holds_ms": round(saving - gap * step_ms, 1),
  }
  if trace.kernels:  # A CPU's are not traced.
    kernels_ms = trace.busy_ms() / every
    figures["kernels_ms"] = round(kernels_ms, 3)
    figures["busy_share"] = round(kernels_ms / step_ms, 4)
  print(figures)
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(figures, file)


if __name__ == "__main__":
  main()
