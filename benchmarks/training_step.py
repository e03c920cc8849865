"""Training step of a sparse Transformer beside the dense one of equal FLOPs.

    PYTHONPATH=. python benchmarks/training_step.py --shapes 6x64 6x256 12x64

The very step of the trainer (`steps.Program`): packed rows of LENGTH tokens a
side, the last 1/16 of the target's side padding; bfloat16, AdamW; a shape is
blocks a side x rows. Model FLOPs per step are 6 times (parameters a token uses)
times tokens, plus 12 * length * width per attention and token; MFU divides by
the device's peak, given with --peak_tflops (989: H100 and H200 SXM, dense
bfloat16). Padding counts as tokens. All programs are compiled at once, in
threads; the dense and the sparse step of a shape are timed in turn.

Memory is of one device, in GiB. By formula, with b bytes a number of the type
of computation:

  parameters, optimizer: by shapes and shardings; gradients: as the parameters;
  rounded: float32 parameters once more in b bytes, unless that is float32;
  activations: the least that a backward pass needs without computing products
    again (what JAX saves before XLA fuses is about twice that). For a token and
    attention: b (2 D + 4 J), the input, the normed input; queries, keys, values
      and the joined output; with them 4 H, the logarithms of the softmax's
      sums, where attention is cuDNN's, nothing where it is that of short rows,
      else H L scores in float32 and in b;
    feed-forward: b (2 D + F) and F bytes for the signs of ReLU, or b (2 D +
      3 F) if gated; experts: besides, b 2 D for the tokens in their slots and
      what comes back, and the 4 E bytes of affinities;
    each side: b 3 D, embedding, last block's output, that normed.
    With --remat, b D a block and the most that one block needs;
  logits: 4 V a target token, and b V their gradient.

The sum has all of that at once; but gradients come while activations go, so the
program may need less. `planned` is what the compiler says. `peak` is the
allocator's: it knows only that of
the process, so that programs take their first step one after the other, the
smallest first, and one that raised no peak shows none. D model width, F
feed-forward width, H heads, J joined heads' width, L length, E experts, V
vocabulary.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from basemt_jax import (
  layers,
  model,
  optimizer,
  partitioning,
  steps,
  train_state,
)
from basemt_jax.compilation import ahead_of_time
from basemt_jax.kernels import attention_kernels
from benchmarks import device_trace, measuring

GIB = 2**30
# Of one H100 or H200 SXM, dense bfloat16.
PEAK_TFLOPS = 989.0
DIRECTIONS = 24


def config(
  args: argparse.Namespace, blocks: int, feed_forward: model.FeedForward
) -> model.TransformerConfig:
  """Transformer-big, or as the flags say, with experts in a third of blocks."""
  return measuring.transformer(
    *(blocks, args.width, args.vocabulary, args.experts),
    feed_forward=feed_forward,
    dtype=args.dtype,
    expert_param_dtype=args.expert_param_dtype,
    remat=args.remat,
    attention=layers.Attention(implementation=args.attention or None),
  )


def batch(
  rows: int, length: int, seed: int, vocabulary: int
) -> dict[str, np.ndarray]:
  """Rows of four packed examples each; the target's last 1/16 is padding.

  As in real rows, which are full on one side first, target padding meets a
  source without any, and few tokens are most of the text (Zipf's law): how
  often a batch holds the same one decides what the embedding's gradient costs.
  """
  rng = np.random.RandomState(seed)
  share = 1.0 / np.arange(1, vocabulary - 1)
  shape = (rows, length)
  segments = np.repeat(np.arange(1, 5), -(-length // 4))[None, :length]
  positions = np.tile(np.arange(-(-length // 4)), 4)[None, :length]
  is_real = np.arange(length)[None] < length - -(-length // 16)
  source, target = 2 + rng.choice(
    vocabulary - 2, size=(2, *shape), p=share / share.sum()
  )
  target = target * is_real
  shifted = np.roll(target, 1, axis=1) * (positions > 0) * is_real
  result = {
    "encoder_input_tokens": source,
    "encoder_segment_ids": np.broadcast_to(segments, shape),
    "encoder_positions": np.broadcast_to(positions, shape),
    "decoder_input_tokens": shifted,
    "decoder_target_tokens": target,
    "decoder_segment_ids": np.broadcast_to(segments * is_real, shape),
    "decoder_positions": np.broadcast_to(positions * is_real, shape),
    "decoder_loss_weights": np.broadcast_to(is_real, shape),
    "direction": rng.randint(DIRECTIONS, size=rows),
  }
  return {
    k: np.ascontiguousarray(v, np.float32 if "weights" in k else np.int32)
    for k, v in result.items()
  }


def both_sides(length: int) -> dict[str, int]:
  """Lengths as the package has them."""
  return {"inputs": length, "targets": length}


# ------------------------------------------------------------------ memory


def activation_bytes(
  cfg: model.TransformerConfig, rows: int, length: int
) -> int:
  """What the backward pass needs of the blocks, by formula; see the head."""
  size = jnp.dtype(cfg.dtype).itemsize
  blocks = []
  for count, is_decoder, experts in (
    (cfg.num_encoder_layers, False, cfg.encoder_expert_blocks),
    (cfg.num_decoder_layers, True, cfg.decoder_expert_blocks),
  ):
    for index in range(count):
      is_sparse = cfg.feed_forward == "experts" and index in experts
      attentions = (1 + is_decoder) * _attention_bytes(cfg, length)
      blocks.append(attentions + _feed_forward_bytes(cfg, is_sparse))
  if cfg.remat:
    blocks = [size * cfg.emb_dim] * len(blocks) + [max(blocks)]
  return rows * length * (sum(blocks) + 2 * 3 * size * cfg.emb_dim)


def _attention_bytes(cfg: model.TransformerConfig, length: int) -> int:
  """Bytes that a token's attention keeps for the backward pass."""
  size = jnp.dtype(cfg.dtype).itemsize
  shape = (1, length, cfg.num_heads, cfg.head_dim)
  heads: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(cfg.dtype))
  attention: Any = cfg.attention
  kind = attention.implementation or layers._implementation(heads, heads)
  scores = 4 if kind == "cudnn" else length * (4 + (size if size < 4 else 0))
  if (
    attention.implementation is None
    and kind == "xla"
    and attention_kernels.is_supported(heads, heads)
  ):
    scores = 0  # Worked out again.
  joined = cfg.num_heads * cfg.head_dim
  return size * (2 * cfg.emb_dim + 4 * joined) + cfg.num_heads * scores


def _feed_forward_bytes(cfg: model.TransformerConfig, is_sparse: bool) -> int:
  """Bytes that a token's feed-forward keeps for the backward pass."""
  size = jnp.dtype(cfg.dtype).itemsize
  is_gated = len(cfg.mlp_activations) > 1
  hidden = cfg.mlp_dim * (3 * size if is_gated else size + 1)
  if not is_sparse:
    return 2 * size * cfg.emb_dim + hidden
  return 4 * size * cfg.emb_dim + hidden + 4 * cfg.num_experts


def memory(found: "Compiled", rows: int, length: int) -> dict[str, int]:
  """Bytes of one device by formula, and as the compiler `planned`."""
  program = found.program
  cfg, shapes, shardings = (
    program.model.config,
    program.shapes,
    program.shardings,
  )
  own = rows // (program.mesh.shape["data"] * program.mesh.shape["expert"])
  parameters = ahead_of_time.device_bytes(shapes.params, shardings.params)
  size = jnp.dtype(cfg.dtype).itemsize
  leaves = zip(
    jax.tree.leaves(shapes.params),
    jax.tree.leaves(shardings.params),
    strict=True,
  )
  exact = [(p, s) for p, s in leaves if p.dtype == jnp.float32]
  exact_bytes = ahead_of_time.device_bytes(*zip(*exact, strict=True))
  formula = {
    "parameters": parameters,
    "optimizer": ahead_of_time.device_bytes(
      shapes.opt_state, shardings.opt_state
    ),
    "gradients": parameters,
    "rounded": exact_bytes * size // 4 if size < 4 else 0,
    "activations": activation_bytes(cfg, own, length),
    "logits": own * length * cfg.vocab_size * (4 + size),
  }
  return {**formula, "sum": sum(formula.values()), "planned": found.bytes}


# ---------------------------------------------------------------- programs


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program whose step is compiled."""

  program: steps.Program  # what was compiled
  executable: Any  # the compiled step
  key: Any  # of dropout
  seconds: float  # tracing, lowering and compiling

  def step(self, state: Any, data: Any) -> tuple[Any, dict[str, Any]]:
    """Takes a step; the state's arrays are taken over."""
    return self.executable(state, data, self.key)

  @property
  def bytes(self) -> int:
    """Memory of a device that the compiler plans with for a step."""
    return ahead_of_time.planned_bytes(self.executable)


def compiled(
  cfg: model.TransformerConfig,
  mesh: Mesh,
  rows: int,
  length: int,
  warmup: int = 1000,
  optimizer_name: str = "adamw",
  **options: Any,
) -> Compiled:
  """Compiles, and runs nothing, so that threads can do several at once.

  Options are those of the optimizer.
  """
  settings = measuring.settings(
    10**6,
    learning_rate=optimizer.inverse_square_root(1e-3, warmup),
    optimizer=functools.partial(getattr(optimizer, optimizer_name), **options),
  )
  start = time.perf_counter()
  program = steps.Program(
    cfg, settings, settings.learning_rate, mesh, DIRECTIONS
  )
  data = ahead_of_time.abstract_batch(rows, both_sides(length), mesh)
  step = program.lower(data).compile()
  return Compiled(
    program,
    step,
    train_state.keys(settings.seed)[1],
    time.perf_counter() - start,
  )


def batches(
  found: Compiled, rows: int, length: int, count: int
) -> list[dict[str, Any]]:
  """Different batches on a program's devices."""
  return [
    partitioning.put_batch(
      batch(rows, length, seed, found.program.model.config.vocab_size),
      found.program.mesh,
    )
    for seed in range(count)
  ]


def check_finite(name: str, sums: Mapping[str, Any]) -> None:
  """Ends the program if a step's loss or gradients are not finite."""
  if int(sums["bad_step"]) != steps.NEVER:
    loss = float(jnp.sum(sums["loss"]) / jnp.sum(sums["weight"]))
    raise SystemExit(
      f"{name}: loss {loss} and gradient norm {float(sums['grad_norm'])} of "
      f"step {int(sums['bad_step'])} are not both finite, so its figures would "
      "mean nothing"
    )


def first_steps(
  programs: Mapping[Any, Compiled], rows: Mapping[Any, int], length: int
) -> dict[Any, int | None]:
  """Takes every program's first step, one at a time; the peaks of memory.

  Returns:
    Bytes on the first device; None where the process had a higher peak before,
    or the device does not say.
  """
  peaks: dict[Any, int | None] = {}
  before = 0
  for key in sorted(programs, key=lambda key: programs[key].bytes):
    found = programs[key]
    data = batches(found, rows[key], length, 1)[0]
    state, sums = found.step(found.program.init(), data)
    check_finite(str(key), sums)
    del state, sums, data
    device = found.program.mesh.devices.flat[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    peaks[key] = peak if peak > before else None
    before = max(before, peak)
  return peaks


def times(
  programs: Mapping[str, Compiled], rows: int, length: int, repeats: int
) -> dict[str, list[float]]:
  """Seconds of a step of each program, measured in turn on four batches.

  The programs are of one mesh, and have taken a step before.
  """
  data = batches(next(iter(programs.values())), rows, length, 4)
  states = {name: found.program.init() for name, found in programs.items()}
  jax.block_until_ready(states)

  def steps_of(name: str) -> Any:
    for each in data:
      states[name], sums = programs[name].step(states[name], each)
    check_finite(name, sums)
    return states[name]

  seconds = measuring.in_turn(
    {name: functools.partial(steps_of, name) for name in programs}, repeats
  )
  return {n: [s / len(data) for s in own] for n, own in seconds.items()}


# Parts of a step by name stack, as `device_trace.Trace.by_source` takes them.
PARTS = {
  "gradient of embeddings": r"transpose.*token_embedder.*(gather|take|scatter)",
  "attention": "attention",
  "logits": "token_embedder.attend",
  "assignment": r"plan|newton|balanced|assignment",
  "experts": "base_layer",
  "feed-forward": "mlp",
}


def print_trace(found: Compiled, rows: int, length: int) -> None:
  """Prints where four steps of a program that has run before spend their time.

  XLA's CUDA graphs hide the name stacks; without them
  (XLA_FLAGS=--xla_gpu_enable_command_buffer=) they are there.
  """
  data = batches(found, rows, length, 4)
  state = jax.block_until_ready(found.program.init())
  with device_trace.recorded() as trace:
    for each in data:
      state, _ = found.step(state, each)
    jax.block_until_ready(state)
  if not trace.kernels:
    print("no kernels in the trace: it needs a GPU or a TPU")
    return
  hlo, steps_ = found.executable.as_text(), len(data)
  kernels = len(trace.kernels) / steps_
  print(f"busy {trace.busy_ms() / steps_:.2f} ms a step, {kernels:.0f} kernels")
  for part, total in trace.by_source(hlo, PARTS).items():
    print(f"  {part} {total / steps_:.3f} ms")
  for total, op, source in trace.longest(hlo, 10):
    print(f"    {total / steps_:.3f} ms  {op}  {source}")


def add_network_flags(parser: argparse.ArgumentParser) -> None:
  """What `config` reads, the length, and how often to measure."""
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--vocabulary", type=int, default=32000)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--experts", type=int, default=32)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--expert_param_dtype", default="float32")
  parser.add_argument("--remat", action="store_true")
  parser.add_argument("--attention", default="")
  parser.add_argument("--repeats", type=int, default=10)


def parsed() -> argparse.Namespace:
  """The command's flags."""
  parser = measuring.parser(__doc__)
  add_network_flags(parser)
  parser.add_argument("--shapes", nargs="+", default=["6x64"])
  parser.add_argument("--expert_devices", type=int, default=1)
  parser.add_argument(
    "--optimizer", choices=("adamw", "adafactor", "muon"), default="adamw"
  )
  parser.add_argument(
    "--moments",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of adamw",
  )
  parser.add_argument(
    "--expert_moments",
    choices=("full", "by_neuron"),
    default="full",
    help="of adamw",
  )
  parser.add_argument(
    "--trace", action="store_true", help="show where the time goes"
  )
  parser.add_argument("--peak_tflops", type=float, default=PEAK_TFLOPS)
  return parser.parse_args()


def main() -> None:
  """Prints the tables."""
  args = parsed()
  shapes = [tuple(int(x) for x in s.split("x")) for s in args.shapes]
  device = jax.devices()[0]
  print(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
  mesh = partitioning.make_mesh(args.expert_devices)
  keys = list(itertools.product(shapes, ("dense", "experts")))
  options = {"moments": args.moments, "expert_moments": args.expert_moments}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(
      lambda key: compiled(
        config(args, key[0][0], key[1]),
        mesh,
        key[0][1],
        args.length,
        optimizer_name=args.optimizer,
        **(options if args.optimizer == "adamw" else {}),
      ),
      keys,
    )
    programs = dict(zip(keys, found, strict=True))
  peaks = first_steps(programs, {key: key[0][1] for key in keys}, args.length)
  rows_of_table: list[dict[str, Any]] = []
  for shape in shapes:
    layers_, rows = shape
    pair = {n: programs[shape, n] for n in ("dense", "experts")}
    medians = {
      name: statistics.median(seconds)
      for name, seconds in times(pair, rows, args.length, args.repeats).items()
    }
    flops = ahead_of_time.model_flops(
      config(args, layers_, "dense"), rows, both_sides(args.length)
    )
    for name, median in medians.items():
      peak = args.peak_tflops * 1e12 * jax.device_count()
      row = {
        "blocks": layers_,
        "rows": rows,
        "model": name,
        "ms": round(median * 1e3, 2),
        "mfu": round(flops / median / peak, 4),
        "tokens_per_s": round(2 * rows * args.length / median),
        "ratio": round(median / medians["dense"], 4),
        "compile_s": round(pair[name].seconds, 1),
      }
      measuring.print_row(row)
      figures = {
        **memory(pair[name], rows, args.length),
        "peak": peaks[shape, name],
      }
      rows_of_table.append({**row, "memory": figures})
      if args.trace:
        print_trace(pair[name], rows, args.length)
  print("\nmemory of a device, GiB")
  for row in rows_of_table:
    place = {name: row[name] for name in ("blocks", "rows", "model")}
    known = {k: v / GIB for k, v in row["memory"].items() if v is not None}
    measuring.print_row({**place, **known})
  measuring.write(args, {"figures": rows_of_table})


if __name__ == "__main__":
  main()
