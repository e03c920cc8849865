"""What a training step costs on some devices, compiled ahead of time.

The very step that training runs (`steps.Program`) is compiled for a TPU slice
that need not be there, or for the devices at hand, and the compiled program
is measured: memory, arithmetic, memory traffic, exchanges between devices. No
array is made and nothing is run.

Estimate of a step's time (roofline, doi:10.1145/1498765.1498785), per chip:

  compute = operations / peak, those that XLA counts or, where these are more
  (it does not look into a GPU's libraries), the model's share by formula
  memory = bytes of main memory / its bandwidth
  network = sum over collectives of count * sent bytes * hops / bandwidth of
  the links it can use
  best = max(compute, memory, network): all overlaps with all;
  serial = compute + memory + network: nothing overlaps;
  compiler = cycles that the TPU compiler expects / clock + network, the one
  that knows how well its own operations run;
  MFU = model operations / (chips * peak * time).

The first two know no latency of small operations, of which the solver of the
balanced assignment has some hundred in a row; none knows that of starting an
exchange, or of the host.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from basemt_jax import files, partitioning, steps
from basemt_jax import model as model_lib
from basemt_jax.compilation import chips, hlo
from basemt_jax.data import packing

# ------------------------------------------------------------ topologies


# What libtpu reads when it is loaded.
_OFFLINE = {
  "TPU_SKIP_MDS_QUERY": "1",  # no Google Cloud to ask about the slice
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several processes may compile
  "TPU_MIN_LOG_LEVEL": "1",  # the partitioner's warnings are read below
  "TPU_STDERR_LOG_LEVEL": "1",
}


def topology_devices(name: str) -> list[jax.Device]:
  """The chips of a TPU slice, described by libtpu, not there.

  Args:
    name: Such as 'v5e:16x16', 'v5p:4x4x8' or 'v4:4x4x8', in chips.

  Raises:
    ValueError: No such slice, or no libtpu.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"compiling for {name} needs libtpu, which is not installed: "
      "pip install '.[tpu]', or pip install libtpu"
    )
  from jax.experimental import topologies

  for variable, value in _OFFLINE.items():
    os.environ.setdefault(variable, value)
  options = {}
  if name.startswith(("v4:", "v5p:")):
    # The two cores of a chip as one device, as JAX has them on a TPU.
    options["chip_config_name"] = "megacore"
  try:
    with files.native_output_captured():
      topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **options
      )
  except Exception as error:  # jax.errors.JaxRuntimeError, and others
    first = str(error).splitlines()[0]
    raise ValueError(
      f"no topology {name!r} ({first}); write a TPU and its chips along every "
      "dimension, such as v5e:16x16, v6e:16x16, v5p:4x4x8 or v4:4x4x8"
    ) from error
  return list(topology.devices)


# -------------------------------------------------------------- compiling


def abstract_batch(
  rows: int, lengths: Mapping[str, int], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a training batch of packed rows, split over the devices.

  Args:
    rows: B, over all devices.
    lengths: {'inputs': Li, 'targets': Lt}.
    mesh: Of the devices.
  """
  layout = packing.RowLayout.of(lengths, vocab_size=1)
  row = layout.unpack(np.zeros((1, layout.width), layout.dtype))
  row["direction"] = np.zeros(1, np.int32)
  sharding = partitioning.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(
      (rows, *value.shape[1:]), value.dtype, sharding=sharding
    )
    for name, value in row.items()
  }


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A training step, compiled, or the reason why not."""

  seconds: float  # tracing, lowering and compiling
  executable: Any  # None if it does not fit into memory
  # what it would have needed then, as the compiler says
  used_bytes: float | None
  # of the partitioner, about arrays that it has to rearrange
  warnings: tuple[str, ...]


def compile_step(program: steps.Program, batch: steps.Batch) -> Compiled:
  """Compiles a program's training step for a batch given by its shapes.

  A program that was kept on disk is not used: it would come without warnings.
  """
  start = time.perf_counter()
  executable, used = None, None
  with _nothing_kept(), files.native_output_captured() as lines:
    lowered = program.lower(batch)
    try:
      executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      used = _used_bytes(str(error))
      if used is None:
        raise
  warnings = tuple(
    line.strip() for line in lines if "rematerialization" in line.lower()
  )
  return Compiled(time.perf_counter() - start, executable, used, warnings)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
  """Neither reads nor writes JAX's cache of compiled programs."""
  name = "jax_enable_compilation_cache"
  before = getattr(jax.config, name)
  try:
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # JAX asks for the setting only once.
    yield
  finally:
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def _used_bytes(message: str) -> float | None:
  """The need that a compiler's 'out of memory' states; None: not that."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  # "... required for HLO temporaries (48.00G) exceeds available HBM (15.75G)",
  # arguments included; or "Used 24.50G of 15.75G hbm".
  found = re.search(r"([\d.]+)([KMGT])i?B?\)? (?:exceeds|of) ", message)
  if not found:
    return math.inf
  return float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))


# -------------------------------------------------------------- measuring


def model_flops(
  config: model_lib.TransformerConfig, rows: int, lengths: Mapping[str, int]
) -> float:
  """Operations of one step by formula: forward, and twice that backward.

  Products with weights that a token uses, 2 a weight and token, and attention
  scores and their use, 4 a pair of positions and unit of width. Recomputation,
  routing, and all that is no matrix product are not counted; padding is.
  """
  width = config.emb_dim
  joined = config.num_heads * config.head_dim
  source, target = rows * lengths["inputs"], rows * lengths["targets"]
  projection = width * joined  # of queries, keys, values or outputs
  total = 0.0
  for tokens, count, blocks, is_decoder in (
    (source, config.num_encoder_layers, config.encoder_expert_blocks, False),
    (target, config.num_decoder_layers, config.decoder_expert_blocks, True),
  ):
    length = tokens // rows
    total += count * tokens * (4 * projection + 2 * length * joined)
    if is_decoder:
      total += count * 2 * projection * (target + source)
      total += count * target * 2 * lengths["inputs"] * joined
    for index in range(count):
      total += tokens * _feed_forward_weights(config, index in blocks)
  total += target * width * config.vocab_size
  return 6.0 * total


def _feed_forward_weights(
  config: model_lib.TransformerConfig, is_special: bool
) -> int:
  """Weights of a block's feed-forwards that a token is multiplied with."""
  kernels = len(config.mlp_activations) + 1
  dense = kernels * config.emb_dim * config.mlp_dim
  if not is_special or config.feed_forward == "dense":
    return dense
  if config.feed_forward == "dense_wide":
    return dense * config.num_experts
  chosen = config.router.num_selected_experts * config.num_sublayers * dense
  return chosen + (dense if config.placement == "insert" else 0)


def device_bytes(shapes: Any, shardings: Any) -> int:
  """Bytes on each device of a tree of arrays, given shapes and shardings."""
  return sum(
    math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, sharding in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
    )
  )


def planned_bytes(executable: jax.stages.Compiled) -> int:
  """Memory of a device that the compiler plans with, its own code included."""
  stats: Any = executable.memory_analysis()
  return int(
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )


# -------------------------------------------------------------- the report


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Collectives of one kind along the same mesh axes, in one step."""

  kind: str  # see `hlo.KINDS`
  # of the mesh, joined by ' x '; 'part of ...' where a group has not all
  # devices along them
  axes: str
  devices: int  # in a group
  count: int  # collectives run
  bytes: int  # put in by each chip, over all of them
  largest: str  # array, such as 'bf16[32,128,1024]'
  seconds: float | None  # by bandwidth alone; None: an unknown chip


# Share of a chip's memory to leave to what is not in the step's program: the
# runtime, batches on their way, evaluation and search, fragments.
SPARE = 0.1


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each chip."""

  parameters: int  # by their shapes and shardings
  optimizer: int  # likewise
  batch: int  # likewise
  # all that the step needs besides, the program's code included
  temporary: float
  # of the parameters, which `temporary` has room for at the end of the backward
  # pass, by their shapes and shardings
  gradients: int
  total: float  # the step's need
  available: float | None  # the chip's memory; None: unknown
  fits: bool  # whether the compiler could place the step

  @property
  def is_tight(self) -> bool:
    """Whether it fits with less than `SPARE` of the memory left."""
    if not self.fits or self.available is None:
      return False
    return self.total > (1 - SPARE) * self.available


@dataclasses.dataclass(frozen=True)
class Report:
  """What a training step costs; see the module's head for the estimate."""

  topology: str | None  # as asked for; None: the devices at hand
  device: str  # kind of chip
  chips: int
  mesh: dict[str, int]  # size of every axis
  phase: str  # 'dense' or 'sparse'
  parameters: int  # of the network
  rows: int  # of the global batch
  source_tokens: int  # places for tokens in it, padding included
  target_tokens: int  # likewise
  memory: Memory  # on each chip
  model_flops: float  # of a step on all chips, by formula
  # on each chip, as XLA counts them in the compiled program
  flops: float | None
  # likewise: of every operation, in whatever memory
  bytes_accessed: float | None
  # at most, read from and written to the chip's main memory
  hbm_bytes: float | None
  exchanges: list[Exchange]
  # estimates: 'compute', 'memory', 'network', 'best', 'serial', and for most
  # TPUs 'compiler'; empty for an unknown chip
  seconds: dict[str, float]
  mfu: dict[str, float]  # at 'best', 'serial' and 'compiler'
  compile_seconds: float  # on the machine that made the report
  warnings: list[str]  # of the partitioner
  advice: list[str]  # what to change where it does not fit, or fits tightly
  versions: dict[str, str]  # of JAX and libtpu


def report(
  program: steps.Program,
  rows: int,
  lengths: Mapping[str, int],
  topology: str | None = None,
) -> Report:
  """Compiles a program's training step and measures it.

  The batch is that of `abstract_batch`; `topology` is the name that the
  program's devices were described by.
  """
  mesh = program.mesh
  batch = abstract_batch(rows, lengths, mesh)
  compiled = compile_step(program, batch)
  kind = mesh.devices.flat[0].device_kind
  chip = chips.CHIPS.get(kind)
  memory = _memory(program, batch, compiled, chip)
  total_flops = model_flops(program.model.config, rows, lengths)
  mfu: dict[str, float] = {}
  flops = accessed = traffic = None
  found: list[Exchange] = []
  seconds: dict[str, float] = {}
  if compiled.executable is not None:
    text = compiled.executable.as_text()
    found = exchanges(text, mesh, chip)
    costs = compiled.executable.cost_analysis() or {}
    # XLA counts the body of the loop over microbatches once.
    parts = program.settings.microbatches
    flops, accessed = (
      costs[name] * parts if name in costs else None
      for name in ("flops", "bytes accessed")
    )
    traffic = float(hlo.memory_bytes(text))
    if chip and flops is not None:
      share = total_flops / mesh.size
      seconds = _seconds(max(flops, share), traffic, found, chip)
      if chip.clock and (cycles := hlo.estimated_cycles(text)):
        seconds["compiler"] = cycles / chip.clock + seconds["network"]
      mfu = _mfu(share, seconds, chip)
  return Report(
    topology=topology,
    device=kind,
    chips=mesh.size,
    mesh=dict(mesh.shape),
    phase=program.name,
    parameters=sum(x.size for x in jax.tree.leaves(program.shapes.params)),
    rows=rows,
    source_tokens=rows * lengths["inputs"],
    target_tokens=rows * lengths["targets"],
    memory=memory,
    model_flops=total_flops,
    flops=flops,
    bytes_accessed=accessed,
    hbm_bytes=traffic,
    exchanges=found,
    seconds=seconds,
    mfu=mfu,
    compile_seconds=compiled.seconds,
    warnings=list(compiled.warnings),
    advice=_advice(program, memory, rows)
    if memory.is_tight or not memory.fits
    else [],
    versions=_versions(topology),
  )


def _mfu(
  flops: float, seconds: Mapping[str, float], chip: chips.Chip
) -> dict[str, float]:
  """Share of a chip's peak that the model's FLOPs are, by each estimate."""
  return {
    name: flops / (chip.flops * seconds[name])
    for name in ("best", "serial", "compiler")
    if name in seconds
  }


def possible_meshes(
  config: model_lib.TransformerConfig, rows: int, devices: int
) -> list[tuple[int, int, int]]:
  """Sizes (data, expert, model) of all meshes that a network and batch allow.

  Of `rows`, B, each device of `data` and `expert` needs whole groups. All of
  the devices are used.
  """
  experts = config.num_experts if config.feed_forward == "experts" else 1
  widths = math.gcd(config.num_heads, config.mlp_dim, config.vocab_size)
  return [
    (ways // expert, expert, model)
    for model in _divisors(math.gcd(widths, devices))
    for ways in (devices // model,)
    for expert in _divisors(math.gcd(experts, ways))
    if rows % (ways * config.rows_per_group) == 0
  ]


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def best_first(reports: Sequence[Report]) -> list[Report]:
  """Reports on the same step, the fastest that fits first.

  By the compiler's estimate where there is one, else by `serial`.
  """

  def rank(found: Report) -> tuple[bool, float]:
    seconds = found.seconds.get("compiler", found.seconds.get("serial"))
    return not found.memory.fits, math.inf if seconds is None else seconds

  return sorted(reports, key=rank)


def _versions(topology: str | None) -> dict[str, str]:
  names = ("jax", "libtpu") if topology else ("jax",)
  return {name: importlib.metadata.version(name) for name in names}


def _memory(
  program: steps.Program,
  batch: steps.Batch,
  compiled: Compiled,
  chip: chips.Chip | None,
) -> Memory:
  shapes, shardings = program.shapes, program.shardings
  parameters = device_bytes(shapes.params, shardings.params)
  moments = device_bytes(shapes.opt_state, shardings.opt_state)
  inputs = device_bytes(batch, {k: v.sharding for k, v in batch.items()})
  if compiled.executable is None:
    total = compiled.used_bytes or math.inf
  else:
    total = float(planned_bytes(compiled.executable))
  available = chip.hbm_bytes if chip else None
  return Memory(
    parameters,
    moments,
    inputs,
    temporary=total - parameters - moments - inputs,
    gradients=parameters,  # One of the same type for each.
    total=total,
    available=available,
    fits=compiled.executable is not None
    and (available is None or total <= available),
  )


def exchanges(text: str, mesh: Mesh, chip: chips.Chip | None) -> list[Exchange]:
  """A program's collectives, those of the same kind and axes together."""
  devices = list(mesh.devices.flat)
  together: dict[tuple[str, str, int], list[hlo.Collective]] = {}
  for collective in hlo.collectives(text, mesh.size):
    if collective.groups.shape[1] == 1:
      continue  # With itself: along an axis of one device.
    axes, is_whole = hlo.axes_of(collective.groups, dict(mesh.shape))
    name = " x ".join(axes)
    if not is_whole:
      name = f"part of {name}"
    key = (collective.kind, name, collective.groups.shape[1])
    together.setdefault(key, []).append(collective)
  result = []
  for (kind, axes_name, size), found in together.items():
    seconds = None
    if chip:
      seconds = sum(
        c.count * chips.network_seconds(c, devices, chip) for c in found
      )
    arrays = [a for c in found for a in c.arrays]
    result.append(
      Exchange(
        kind,
        axes_name,
        size,
        count=sum(c.count for c in found),
        bytes=sum(c.count * c.bytes for c in found),
        largest=max(arrays, key=hlo.array_bytes),
        seconds=seconds,
      )
    )
  return sorted(result, key=lambda e: -e.bytes)


def _seconds(
  flops: float, traffic: float, exchanges: Sequence[Exchange], chip: chips.Chip
) -> dict[str, float]:
  parts = {
    "compute": flops / chip.flops,
    "memory": traffic / chip.hbm_bandwidth,
    "network": sum(e.seconds or 0.0 for e in exchanges),
  }
  best, serial = max(parts.values()), sum(parts.values())
  return {**parts, "best": best, "serial": serial}


def _advice(program: steps.Program, memory: Memory, rows: int) -> list[str]:
  """What would make room, what helps most first."""
  config, mesh = program.model.config, program.mesh
  state = memory.parameters + memory.optimizer
  batch_devices = mesh.shape["data"] * mesh.shape["expert"]
  advice = []
  if memory.temporary > state:
    if not config.remat:
      advice.append("recompute blocks: model.TransformerConfig.remat = True")
    least = batch_devices * config.rows_per_group
    if rows > least:
      advice.append(f"fewer rows: BATCH_SIZE = {least} is the least here")
      advice.append("split the step: steps.Settings.microbatches = 2")
  if (
    config.feed_forward == "experts"
    and mesh.shape["expert"] < config.num_experts
  ):
    advice.append(
      f"fewer experts a chip: EXPERT_DEVICES = {2 * mesh.shape['expert']}"
    )
  advice.append(f"split matrices: MODEL_DEVICES = {2 * mesh.shape['model']}")
  advice.append("moments of less memory: OPTIMIZER = @optimizer.adafactor")
  return advice
