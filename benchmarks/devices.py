"""Training steps on several devices of one host, beside one device.

    PYTHONPATH=. python benchmarks/devices.py --json devices.json

The network and the batches of `training_step.py`, compiled as there. All
devices lie along the mesh's `expert` axis, each with ROWS rows and its part of
the experts.

Speed: with as many rows on each device on 1 and on N devices (weak scaling).
Efficiency is tokens/s on N devices / (N * tokens/s on 1); ratio is the sparse
step's time / the dense one's.

Equality: a smaller network in float32 without dropout, the same batches on
both. One step's loss, gradients (||g_N - g_1|| / ||g_1|| of every parameter,
and of all together) and the experts of all tokens, then the losses of --steps
steps, and where in these the first token went to another expert: scores that
nearly tie are rounded otherwise at last, and then the two differ for real.

Exchanges: those of the compiled sparse step on N devices, with what the
schedule has between start and end of each; and on GPUs, from a trace of the
first device, the time in kernels that exchange, which includes waiting for
other devices, and how much of it other kernels ran beside.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh

from basemt_jax import model as model_lib
from basemt_jax import partitioning, steps, train_state
from basemt_jax.compilation import ahead_of_time, hlo
from benchmarks import device_trace, measuring, training_step

MODELS: tuple[model_lib.FeedForward, ...] = ("dense", "experts")

# Kernels by what they exchange: over 'kernel | HLO instruction'.
EXCHANGES = {
  "all-to-all": r"SendRecv|AllToAll|all-to-all",
  "all-reduce": r"AllReduce|all_reduce|all-reduce",
  "all-gather": r"AllGather|all-gather",
  "reduce-scatter": r"ReduceScatter|reduce-scatter",
  "other": r"nccl|collective-permute",
}

Programs = dict[tuple[int, model_lib.FeedForward], training_step.Compiled]


def mesh_of(count: int) -> Mesh:
  """The first devices, all along `expert`."""
  return partitioning.make_mesh(count, devices=jax.devices()[:count])


# ------------------------------------------------------------------- speed


def speed(programs: Programs, args: argparse.Namespace) -> list[dict[str, Any]]:
  """Rows of the table: each count of devices, dense and sparse."""
  training_step.first_steps(
    programs, {key: key[0] * args.rows for key in programs}, args.length
  )
  table: dict[tuple[int, model_lib.FeedForward], dict[str, Any]] = {}
  for count in sorted({count for count, _ in programs}):
    rows = count * args.rows
    seconds = training_step.times(
      {name: programs[count, name] for name in MODELS},
      rows,
      args.length,
      args.repeats,
    )
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    for name in MODELS:
      median = medians[name]
      found = programs[count, name]
      tokens_per_s = 2 * rows * args.length / median
      alone = table[1, name]["tokens_per_s"] if count > 1 else tokens_per_s
      table[count, name] = {
        "devices": count,
        "model": name,
        "rows": rows,
        "ms": round(median * 1e3, 2),
        "ms_least": round(min(seconds[name]) * 1e3, 2),
        "ms_most": round(max(seconds[name]) * 1e3, 2),
        "tokens_per_s": round(tokens_per_s),
        "ratio": round(median / medians["dense"], 4),
        "efficiency": round(tokens_per_s / (count * alone), 4),
        "memory_gib": round(found.bytes / training_step.GIB, 2),
        "compile_s": round(found.seconds, 1),
      }
  return list(table.values())


# ---------------------------------------------------------------- equality


@dataclasses.dataclass(frozen=True)
class Check:
  """What is compared between meshes, compiled."""

  trained: training_step.Compiled  # the training step
  measure: Any  # (state, batch) -> loss, gradients, intermediates


def check_config(args: argparse.Namespace) -> model_lib.TransformerConfig:
  """The smaller network, exact."""
  small = {**vars(args), "width": args.check_width, "dtype": "float32"}
  config = training_step.config(
    argparse.Namespace(**small), args.check_blocks, "experts"
  )
  return dataclasses.replace(config, dropout_rate=0.0)


def compiled_check(args: argparse.Namespace, count: int) -> Check:
  """Compiles both functions for a number of devices."""
  config, rows = check_config(args), args.check_rows
  with jax.default_matmul_precision("float32"):
    trained = training_step.compiled(
      config, mesh_of(count), rows, args.length, warmup=10
    )
    program = trained.program

    def measure(state, batch):
      loss, grads, _, _ = steps.gradients(
        state.params,
        state.mutables,
        batch,
        train_state.keys(0)[1],
        program.model,
        program.settings,
        training_step.DIRECTIONS,
      )
      variables = program.variables(state)
      _, updates = model_lib.forward(
        program.model, variables, batch, train=True, enable_dropout=False
      )
      return loss, grads, updates["intermediates"]

    rows_split = partitioning.batch_sharding(program.mesh)
    step = jax.jit(measure, in_shardings=(program.shardings, rows_split))
    with (
      jax.set_mesh(program.mesh),
      nn_partitioning.axis_rules(partitioning.LOGICAL_AXIS_RULES),
    ):
      data = training_step.batches(trained, rows, args.length, 1)[0]
      return Check(trained, step.lower(program.shapes, data).compile())


def equality(
  checks: Mapping[int, Check], args: argparse.Namespace
) -> dict[str, Any]:
  """Losses, gradients, experts and curves on N devices against one."""
  one, many = (checks[count] for count in sorted(checks))
  # The same numbers on both, whatever initialising on a mesh may round.
  initial = jax.device_get(one.trained.program.init())
  measured, curves, loads = [], [], []
  for check in (one, many):
    program = check.trained.program
    data = training_step.batches(check.trained, args.check_rows, args.length, 4)
    state = jax.device_put(initial, program.shardings)
    measured.append(jax.device_get(check.measure(state, data[0])))
    losses = []
    experts = []
    for step in range(args.steps):
      state, sums = check.trained.step(state, data[step % len(data)])
      training_step.check_finite(f"{program.mesh.size} devices", sums)
      losses.append(float(np.sum(sums["loss"]) / np.sum(sums["weight"])))
      # Tokens of each direction that each expert got, of all layers.
      experts.append(
        np.stack([layer["expert"] for layer in sums["router"].values()])
      )
    curves.append(np.array(losses))
    loads.append(np.stack(experts))
    del state
  (loss, grads, sown), (loss_many, grads_many, sown_many) = measured
  grads, grads_many, sown, sown_many = (
    traverse_util.flatten_dict(tree, sep="/")
    for tree in (grads, grads_many, sown, sown_many)
  )
  differences = {
    name: _relative([grads_many[name]], [g]) for name, g in grads.items()
  }
  worst = max(differences, key=lambda name: differences[name])
  routed = {k: v[0] for k, v in sown.items() if k.endswith("/expert")}
  moved = sum(
    int(np.sum(sown_many[name][0] != value)) for name, value in routed.items()
  )
  apart = np.abs(curves[1] - curves[0]) / np.abs(curves[0])
  is_other = (loads[0] != loads[1]).reshape(args.steps, -1).any(axis=1)
  first = int(is_other.argmax()) if is_other.any() else args.steps
  return {
    "parameters": int(sum(g.size for g in grads.values())),
    "rows": args.check_rows,
    "loss": float(loss),
    "loss_difference": abs(float(loss_many) - float(loss)) / abs(float(loss)),
    "gradient_difference_worst": differences[worst],
    "gradient_worst": worst,
    "gradient_difference_all": _relative(grads_many.values(), grads.values()),
    "gradient_differences": differences,
    "tokens_routed": int(sum(np.sum(e >= 0) for e in routed.values())),
    "tokens_with_another_expert": moved,
    "steps": args.steps,
    "losses_1": curves[0].tolist(),
    "losses_n": curves[1].tolist(),
    "curve_difference_worst": float(apart.max()),
    "steps_before_other_experts": first,
    "curve_difference_before": float(apart[:first].max(initial=0.0)),
    "steps_with_other_experts": int(is_other.sum()),
    "curve_differences": apart.tolist(),
  }


def _relative(found: Iterable[Any], expected: Iterable[Any]) -> float:
  """Relative error `||found - expected|| / ||expected||`, in float64."""
  pairs = [
    (np.asarray(a, np.float64), np.asarray(b, np.float64))
    for a, b in zip(found, expected, strict=True)
  ]
  apart = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
  size = sum(float(np.sum(b**2)) for _, b in pairs)
  if not size:
    return 0.0 if not apart else float("inf")
  return (apart / size) ** 0.5


# --------------------------------------------------------------- exchanges


def exchanges(found: training_step.Compiled) -> dict[str, Any]:
  """Collectives of a compiled step: kinds, bytes, splits, what overlaps."""
  text, mesh = found.executable.as_text(), found.program.mesh
  all_to_alls: list[dict[str, Any]] = [
    {
      "kind": c.kind,
      "split_bytes": _splits(c),
      "count": c.count,
      "op_name": c.op_name,
    }
    for c in hlo.collectives(text, mesh.size)
    if "all-to-all" in c.kind and c.groups.shape[1] > 1
  ]
  started = [
    {
      "kind": a.kind,
      "op_name": a.op_name,
      "meanwhile": collections.Counter(name for name, _ in a.meanwhile),
    }
    for a in hlo.asynchronous(text)
  ]
  return {
    "kinds": [
      dataclasses.asdict(e) for e in ahead_of_time.exchanges(text, mesh, None)
    ],
    "all_to_alls": all_to_alls,
    "equal_splits": all(
      len(set(c["split_bytes"])) == 1 and c["kind"] == "all-to-all"
      for c in all_to_alls
    ),
    "asynchronous": started,
  }


def _splits(c: hlo.Collective) -> list[int]:
  """Bytes to each device of the group.

  An all-to-all has an operand for every device, or one that is split evenly.
  """
  size = c.groups.shape[1]
  if len(c.arrays) == 1:
    return [c.bytes // size] * size
  return [hlo.array_bytes(a) for a in c.arrays]


def traced(
  found: training_step.Compiled, args: argparse.Namespace, count: int = 3
) -> dict[str, Any]:
  """Milliseconds of a step in kernels that exchange, on the first device."""
  rows = found.program.mesh.size * args.rows
  data = training_step.batches(found, rows, args.length, count)
  state = found.program.init()
  state, _ = found.step(state, data[0])
  jax.block_until_ready(state)
  with device_trace.recorded() as trace:
    for each in data:
      state, _ = found.step(state, each)
    jax.block_until_ready(state)
  kernels = {
    kind: {
      "ms": total / count,
      "beside_others_ms": beside / count,
      "kernels": launches / count,
    }
    for kind, (total, beside, launches) in trace.overlaps(EXCHANGES).items()
    if launches
  }
  return {
    "steps": count,
    "span_ms": trace.span_ms() / count,
    "busy_ms": trace.busy_ms() / count,
    "kernels": kernels,
    "names": sorted(
      {name[:80] for name, *_ in trace.kernels if "nccl" in name.lower()}
    ),
  }


# -------------------------------------------------------------------- main


def print_rows(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
  """One line a row."""
  print(f"\n{title}")
  for row in rows:
    measuring.print_row(row)


def print_equality(found: Mapping[str, Any], count: int) -> None:
  """What `equality` found, but for the long lists."""
  short = {
    k: v for k, v in found.items() if not isinstance(v, (list, dict, tuple))
  }
  losses = found["losses_1"]
  short |= {"loss_first": losses[0], "loss_last": losses[-1]}
  print_rows(
    f"equality: {count} devices against 1, float32",
    [{k: v} for k, v in short.items()],
  )


def print_exchanges(found: Mapping[str, Any], count: int) -> None:
  """What `exchanges` found, all-to-alls of the same form together."""
  print_rows(f"exchanges of the sparse step on {count} devices", found["kinds"])
  forms = collections.Counter(
    (c["kind"], tuple(c["split_bytes"]))
    for c in found["all_to_alls"]
    for _ in range(c["count"])
  )
  print_rows(
    f"all-to-alls, equal splits: {found['equal_splits']}",
    [
      {
        "count": number,
        "kind": kind,
        "bytes to each device": ", ".join(map(str, splits)),
      }
      for (kind, splits), number in forms.items()
    ],
  )
  print_rows(
    "between start and end of asynchronous ones "
    f"({len(found['asynchronous'])} of "
    f"{sum(row['count'] for row in found['kinds'])})",
    [
      {
        "kind": a["kind"],
        "of": a["op_name"][-60:],
        "meanwhile": ", ".join(f"{n} {k}" for k, n in a["meanwhile"].items())
        or "nothing",
      }
      for a in found["asynchronous"]
    ],
  )


def parsed() -> argparse.Namespace:
  """The command's flags."""
  parser = measuring.parser(__doc__)
  training_step.add_network_flags(parser)
  parser.add_argument("--devices", type=int, default=jax.device_count())
  parser.add_argument("--blocks", type=int, default=6, help="a side")
  parser.add_argument("--rows", type=int, default=64, help="on each device")
  parser.add_argument("--check_width", type=int, default=256)
  parser.add_argument("--check_blocks", type=int, default=3)
  parser.add_argument("--check_rows", type=int, help="of the whole batch")
  parser.add_argument("--steps", type=int, default=30, help="of the check")
  parser.add_argument("--hlo", help="file for the compiled sparse step's text")
  args = parser.parse_args()
  args.check_rows = args.check_rows or 16 * args.devices
  if not 1 < args.devices <= jax.device_count():
    raise SystemExit(
      f"--devices is {args.devices}; it must be 2 or more of the "
      f"{jax.device_count()} devices here"
    )
  return args


def compile_all(
  args: argparse.Namespace,
) -> tuple[Programs, dict[int, Check]]:
  """Everything that is run, compiled side by side, the largest first."""
  counts = (1, args.devices)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    waiting = {
      (count, name): pool.submit(
        training_step.compiled,
        training_step.config(args, args.blocks, name),
        mesh_of(count),
        count * args.rows,
        args.length,
      )
      for count in reversed(counts)
      for name in reversed(MODELS)
    }
    checks = pool.map(functools.partial(compiled_check, args), counts)
    programs = {key: found.result() for key, found in waiting.items()}
    return programs, dict(zip(counts, checks, strict=True))


def main() -> None:
  """Prints the tables; figures are written as they come."""
  args = parsed()
  kind, platform = jax.devices()[0].device_kind, jax.devices()[0].platform
  print(f"{args.devices} x {kind}, jax {jax.__version__}")
  start = time.perf_counter()
  programs, checks = compile_all(args)
  print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
  sparse = programs[args.devices, "experts"]
  figures: dict[str, Any] = {}

  def keep(name: str, found: Any) -> Any:
    figures[name] = found
    figures["seconds"] = round(time.perf_counter() - start, 1)
    measuring.write(args, figures)
    return found

  print_rows("speed", keep("speed", speed(programs, args)))
  print_equality(keep("equality", equality(checks, args)), args.devices)
  if platform == "gpu":
    trace = keep("trace", traced(sparse, args))
    print_rows(
      f"kernels that exchange, a step of {trace['span_ms']:.1f} ms",
      [{"kind": kind, **row} for kind, row in trace["kernels"].items()],
    )
  else:
    print(f"\nno trace: {platform} has no kernels to show")
  if args.hlo:
    with open(args.hlo, "w", encoding="utf-8") as file:
      file.write(sparse.executable.as_text())
  print_exchanges(keep("exchanges", exchanges(sparse)), args.devices)
  print(f"\n{figures['seconds']:.0f} s in all")


if __name__ == "__main__":
  main()
