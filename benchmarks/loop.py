"""What the training loop adds to a step: reports, data, checkpoints.

    PYTHONPATH=. python benchmarks/loop.py --every 10 100 --json out.json

The trainer itself (`trainer.Trainer`) with rows read from disk, on a network of
Transformer-base's size with experts, once for every interval of reports. A row
of the table compares three times of a step: in the loop; bare, the same program
on batches that are on the device already; and the time in which the device runs
kernels, from a trace of the bare steps. busy is kernels / loop. What a
checkpoint adds is the difference of two windows of as many steps, one of which
begins with a checkpoint; the first of a run also compiles, and allocates the
host's memory.
"""

import argparse
import contextlib
import itertools
import operator
import os
import tempfile
import time
from typing import Any

import jax
import numpy as np

from basemt_jax import (
  heating,
  partitioning,
  reports,
  sampling,
  trainer,
)
from basemt_jax.data import batches, packing, row_store
from basemt_jax.inspection import tables
from benchmarks import device_trace, measuring

DIRECTIONS = 24
VOCABULARY = 32000
TRACED_STEPS = 20


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
  return row_store.RowStore(directory)


def train_batches(store: row_store.RowStore, rows: int) -> batches.TrainBatches:
  """Batches with a rising temperature."""
  strategy = sampling.Strategy(heating.linear(1.0, 5.0, 100))
  return batches.TrainBatches(store, strategy, rows, 0)


def measure_loop(
  store: row_store.RowStore,
  folder: str,
  every: int,
  args: argparse.Namespace,
) -> tuple[dict[str, Any], trainer.Trainer]:
  """Trains for five windows: warm, quiet, checkpoint, quiet, checkpoint.

  A report comes when its step is done, and so tells the time.
  """
  window = args.steps
  settings = measuring.settings(
    5 * window, log_every=every, save_every=2 * window
  )
  clock: dict[int, float] = {}

  def report(progress: reports.Progress) -> None:
    clock[progress.step] = time.perf_counter()

  loop = trainer.Trainer(
    measuring.transformer(args.layers, args.width, VOCABULARY, args.experts),
    settings,
    partitioning.make_mesh(),
    store.directions,
    train_batches(store, args.rows),
    folder,
    measuring.NoWriter(),
    hooks=reports.Hooks(report=report),
  )
  with contextlib.closing(loop):
    loop.run()
  times = [clock[i * window] for i in range(1, 6)]
  quiet, first, _, second = (
    1e3 * (b - a) for a, b in itertools.pairwise(times)
  )
  row = {
    "every": every,
    "step_ms": quiet / window,
    "first_checkpoint_adds_ms": first - quiet,
    "second_checkpoint_adds_ms": second - quiet,
  }
  return row, loop


def measure_bare(
  loop: trainer.Trainer, store: row_store.RowStore, args: argparse.Namespace
) -> dict[str, float]:
  """The loop's program without the loop; its state is used up."""
  program, state = loop.program, loop.state
  source = train_batches(store, args.rows)
  data = [partitioning.put_batch(next(source), program.mesh) for _ in range(4)]

  def run(count: int) -> float:
    nonlocal state
    sums = None
    start = time.perf_counter()
    for i in range(count):
      state, sums = program.train_step(state, sums, data[i % 4])
    jax.block_until_ready((state, sums))
    return 1e3 * (time.perf_counter() - start) / count

  run(4)
  times = {"bare_ms": run(args.steps)}
  with device_trace.recorded() as trace:
    run(TRACED_STEPS)
  if trace.kernels:  # A CPU's are not traced.
    times["kernels_ms"] = trace.busy_ms() / TRACED_STEPS
  return times


def table(rows: list[dict[str, Any]]) -> tables.Table:
  """One line for every interval of reports."""
  two = tables.fixed(2)
  return tables.listed(
    "",
    rows,
    [
      tables.Column(name, text, operator.methodcaller("get", key))
      for name, text, key in (
        ("reports every", str, "every"),
        ("step ms", two, "step_ms"),
        ("bare ms", two, "bare_ms"),
        ("kernels ms", two, "kernels_ms"),
        ("busy", tables.percent, "busy"),
        ("1st checkpoint adds ms", tables.count, "first_checkpoint_adds_ms"),
        ("2nd", tables.count, "second_checkpoint_adds_ms"),
      )
    ],
  )


def main() -> None:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--experts", type=int, default=16)
  parser.add_argument(
    "--every", type=int, nargs="+", default=[10, 100], help="steps, reports"
  )
  parser.add_argument("--steps", type=int, default=100, help="of a window")
  args = parser.parse_args()
  for every in args.every:
    if args.steps % every:
      parser.error(f"--steps {args.steps} is no multiple of --every {every}")
  results: list[dict[str, Any]] = []
  bare: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as folder:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      # All runs are of one program.
      jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
    store = write_store(f"{folder}/rows", args.length, 2 * args.rows)
    for every in args.every:
      with tempfile.TemporaryDirectory(dir=folder) as run:
        row, loop = measure_loop(store, run, every, args)
      bare = bare or measure_bare(loop, store, args)
      del loop  # Its state would take the next one's room.
      if "kernels_ms" in bare:
        row["busy"] = bare["kernels_ms"] / row["step_ms"]
      results.append({**row, **bare})
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  print(tables.markdown(table(results)))
  measuring.write(args, {"results": results})


if __name__ == "__main__":
  main()
