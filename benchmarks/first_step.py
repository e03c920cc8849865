"""Seconds from the start of a process to its first training step.

    PYTHONPATH=. python benchmarks/first_step.py --shapes study big_sparse
    PYTHONPATH=. python benchmarks/first_step.py --shapes study --conversion

Every shape runs in two processes of its own, one after the other: `cold`, with
an empty compilation cache, and `warm`, with what the first one left there. A
line of the table is one process:

  import: from its start to the end of imports; device: until JAX has devices;
  build: the program's shapes and shardings; trace, compile: of the training
  step, while the initial state is drawn; init: what that takes longer; first:
  the step's first run;
  total: from the start of the process to the end of the first step;
  eval: the first evaluation step, compiled and run; step: milliseconds of a
  step, the median of `--steps` times four; tokens_per_s, mfu: of that step, as
  in `training_step.py`; memory: the allocator's peak, bytes, or null;
  instructions: of the step's program after XLA's passes, a measure of its size
  that no machine disturbs.

With --conversion `trainer.Trainer` trains `--steps` dense steps, which should
take longer than a sparse one takes to compile, and a few sparse ones. The pause
is the time between the last dense and the first sparse step, less the median of
a step: the dev loss of one batch, a checkpoint, the conversion. --profile tells
where the compiler spends its time.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from typing import Any, Literal

import jax
import numpy as np

from basemt_jax import (
  model,
  optimizer,
  partitioning,
  reports,
  steps,
  train_state,
  trainer,
)
from basemt_jax.compilation import ahead_of_time
from benchmarks import measuring, training_step

DIRECTIONS = training_step.DIRECTIONS


@dataclasses.dataclass(frozen=True)
class Shape:
  """A network and its batch.

  Attributes:
    width, blocks, experts, vocabulary: See `measuring.transformer`.
    rows: B.
    length: L of both sides.
    dtype: Of the computation.
    moments, expert_moments: Of `optimizer.adamw`.
    expert_param_dtype: Of the network.
  """

  width: int = 384
  blocks: int = 6
  experts: int = 16
  rows: int = 256
  length: int = 64
  vocabulary: int = 16000
  dtype: model.Dtype = "bfloat16"
  moments: Literal["float32", "bfloat16"] = "float32"
  expert_moments: Literal["full", "by_neuron"] = "full"
  expert_param_dtype: Literal["float32", "bfloat16"] = "float32"

  def config(self) -> model.TransformerConfig:
    """The network."""
    return measuring.transformer(
      *(self.blocks, self.width, self.vocabulary, self.experts),
      dtype=self.dtype,
      expert_param_dtype=self.expert_param_dtype,
    )


_BIG: dict[str, Any] = {
  "width": 1024,
  "rows": 64,
  "length": 256,
  "vocabulary": 32000,
}
SHAPES = {
  "study": Shape(),
  "study_24": Shape(blocks=24),
  "study_dense": Shape(experts=0),
  "study_24_dense": Shape(blocks=24, experts=0),
  "big": Shape(**_BIG, experts=0),
  "big_sparse": Shape(**_BIG, experts=32),
  "big_rounded": Shape(**_BIG, experts=0, moments="bfloat16"),
  "big_sparse_rounded": Shape(**_BIG, experts=32, moments="bfloat16"),
  "big_sparse_small": Shape(
    **_BIG,
    experts=32,
    expert_moments="by_neuron",
    expert_param_dtype="bfloat16",
  ),
  "big_12": Shape(**_BIG, blocks=12, experts=0),
  "big_12_sparse": Shape(**_BIG, blocks=12, experts=32),
  "base": Shape(512, 6, 0, 256, 256, 32000),
  "base_sparse": Shape(512, 6, 32, 256, 256, 32000),
  # For looking at the script itself.
  "tiny": Shape(64, 6, 4, 16, 16, 384, dtype="float32"),
}


def settings(
  shape: Shape, train_steps: int, dense_steps: int = 0
) -> steps.Settings:
  """Training settings, with a report of every step."""
  return measuring.settings(
    train_steps,
    dense_steps=dense_steps,
    optimizer=functools.partial(
      optimizer.adamw,
      moments=shape.moments,
      expert_moments=shape.expert_moments,
    ),
    log_every=1,
  )


def batches(shape: Shape) -> list[dict[str, np.ndarray]]:
  """Four different ones."""
  return [
    training_step.batch(shape.rows, shape.length, seed, shape.vocabulary)
    for seed in range(4)
  ]


class Clock:
  """Seconds between calls, by name."""

  def __init__(self, start: float):
    self.seconds: dict[str, float] = {}
    self._start = self._last = start

  def lap(self, name: str) -> None:
    """Ends what `name` says."""
    now = time.time()
    self.seconds[name] = round(now - self._last, 2)
    self._last = now

  def total(self) -> float:
    """From the start to the last lap's end."""
    return round(self._last - self._start, 2)


def measure(shape: Shape, count: int, profile: bool) -> dict[str, Any]:
  """A line of the table, in this process."""
  clock = Clock(float(os.environ["FIRST_STEP_STARTED"]))
  clock.lap("import")
  mesh = partitioning.make_mesh()
  clock.lap("device")
  described = settings(shape, 10**6)
  _, key = train_state.keys(described.seed)
  program = steps.Program(
    shape.config(), described, described.learning_rate, mesh, DIRECTIONS
  )
  clock.lap("build")
  data = [partitioning.put_batch(b, mesh) for b in batches(shape)]
  clock.lap("data")
  thread = futures.ThreadPoolExecutor(1)
  starting = thread.submit(program.init)
  lowered = program.lower(data[0])
  clock.lap("trace")
  with tempfile.TemporaryDirectory() as folder:
    if profile:
      with jax.profiler.trace(folder):
        step = lowered.compile()
      print_profile(folder)
    else:
      step = lowered.compile()
  clock.lap("compile")
  state = jax.block_until_ready(starting.result())
  clock.lap("init")
  state, sums = jax.block_until_ready(step(state, data[0], key))
  clock.lap("first")
  total = clock.total()
  training_step.check_finite("the first step", sums)
  jax.block_until_ready(program.eval_step(program.variables(state), data[0]))
  clock.lap("eval")
  times = []
  for _ in range(count + 1):
    # Four at a time: a loop that waits for every step measures the waiting.
    start = time.perf_counter()
    for each in data:
      state, sums = step(state, each, key)
    jax.block_until_ready((state, sums))
    times.append((time.perf_counter() - start) / len(data))
  median = statistics.median(times[1:])
  tokens = shape.rows * shape.length
  flops = ahead_of_time.model_flops(
    shape.config(), shape.rows, training_step.both_sides(shape.length)
  )
  return {
    **dataclasses.asdict(shape),
    **clock.seconds,
    "total": total,
    "step": round(1e3 * median, 2),
    "tokens_per_s": round(2 * tokens / median),
    "mfu": round(flops / median / (1e12 * training_step.PEAK_TFLOPS), 4),
    "memory": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "instructions": str(step.as_text()).count(" = "),
    "loss": round(float(np.sum(sums["nll"]) / np.sum(sums["weight"])), 4),
  }


def print_profile(folder: str) -> None:
  """What the host did, by name, longest first; names nest."""
  spent: collections.Counter[str] = collections.Counter()
  for path in pathlib.Path(folder).rglob("*.xplane.pb"):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      if plane.name.startswith("/host"):
        for line in plane.lines:
          for event in line.events:
            spent[event.name.split("#")[0][:60]] += event.duration_ns
  for name, nanoseconds in spent.most_common(40):
    print(f"    {nanoseconds / 1e9:8.2f} s  {name}", flush=True)


def measure_conversion(shape: Shape, count: int) -> dict[str, Any]:
  """Seconds of the pause at a conversion after `count` dense steps."""
  clock: dict[int, float] = {}
  last = count + 20
  data = batches(shape)

  def report(progress: reports.Progress) -> None:
    clock[progress.step] = time.perf_counter()

  with tempfile.TemporaryDirectory() as folder:
    loop = trainer.Trainer(
      shape.config(),
      settings(shape, last, dense_steps=count),
      partitioning.make_mesh(),
      [f"en-x{i:02}" for i in range(DIRECTIONS)],
      itertools.cycle(data),
      folder,
      measuring.NoWriter(),
      dev_batches=lambda: data[:1],
      hooks=reports.Hooks(
        report=report, message=lambda text: print(f"    {text}", flush=True)
      ),
    )
    start = time.perf_counter()
    outcome = loop.run()
    loop.close()
  if outcome != "done":
    raise SystemExit(f"{outcome} after step {max(clock)}: nothing to tell")
  gaps = {i: clock[i] - clock[i - 1] for i in range(2, last + 1)}
  usual = statistics.median(gaps.values())
  return {
    "first": round(clock[1] - start, 2),
    "pause": round(gaps[count + 1] - usual, 2),
    "step": round(1e3 * usual, 2),
    "longest other": round(
      max(gap for i, gap in gaps.items() if i != count + 1), 2
    ),
  }


def run_child(arguments: list[str], cache: str) -> None:
  """A process of its own, with the cache in a folder."""
  subprocess.run(
    [sys.executable, __file__, *arguments],
    env={
      **os.environ,
      "FIRST_STEP_STARTED": str(time.time()),
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    check=True,
  )


def main() -> None:
  """Prints a line for every shape and cache."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["study"])
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--conversion", action="store_true")
  parser.add_argument("--profile", action="store_true")
  parser.add_argument("--cold_only", action="store_true")
  parser.add_argument("--in_process", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.in_process:
    shape = SHAPES[args.shapes[0]]
    device = jax.devices()[0]
    found = (
      measure_conversion(shape, args.steps)
      if args.conversion
      else measure(shape, args.steps, args.profile)
    )
    head = [args.shapes[0], args.in_process, device.device_kind]
    print(" ".join([*head, json.dumps(found)]), flush=True)
    return
  flags = ["--steps", str(args.steps)]
  flags += ["--conversion"] * args.conversion + ["--profile"] * args.profile
  for name in args.shapes:
    with tempfile.TemporaryDirectory() as cache:
      for kind in ("cold", "warm")[: 1 if args.cold_only else 2]:
        run_child(["--shapes", name, "--in_process", kind, *flags], cache)


if __name__ == "__main__":
  main()
