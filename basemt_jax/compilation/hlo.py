"""Collectives of a compiled program, read from its HLO text.

XLA offers no other account of what it made of a program's communication. The
text is that of `jax.stages.Compiled.as_text()`, the same on CPU, GPU and TPU.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

# "%name = type opcode(operands), attributes"; a type may be a tuple.
_INSTRUCTION = re.compile(
  r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_PLACED = re.compile(r"\b([a-z]\w*\[[\d,]*\])(\{[^}]*\})?")
# Operations that only name arrays, or whose content counts by itself.
_NO_TRAFFIC = {
  "parameter",
  "constant",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "while",
  "conditional",
  "call",
  "async-start",
  "after-all",
  "partition-id",
  "replica-id",
}
_CALLERS = {"while", "conditional", "call", "async-start"}
# Computations that run when the instruction does. `to_apply` of a reduction is
# no such thing, for it is applied inside of the collective.
_CALLED = re.compile(
  r"\b(?:calls|body|condition|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between devices."""

  kind: str  # one of `KINDS`
  # [N, n] positions of devices in the mesh: who exchanges with whom. Of a
  # collective-permute, n = 2: from, to.
  groups: np.ndarray
  # what each device puts in: types such as 'bf16[128,1024]'
  arrays: tuple[str, ...]
  bytes: int  # of those
  count: int  # how often it runs in one run of the program
  op_name: str  # where in the program it comes from, as JAX names it

  @property
  def sent_bytes(self) -> float:
    """Bytes that a device has to send in one run, by the best algorithms.

    With n devices and b bytes put in by each: all-reduce 2 b (n - 1) / n (a
    reduce-scatter, then an all-gather), reduce-scatter and all-to-all
    b (n - 1) / n, all-gather b (n - 1), collective-permute b.
    """
    n = self.groups.shape[1]
    factor = {
      "all-reduce": 2 * (n - 1) / n,
      "all-gather": float(n - 1),
      "reduce-scatter": (n - 1) / n,
      "all-to-all": (n - 1) / n,
      "ragged-all-to-all": (n - 1) / n,
    }
    return factor.get(self.kind, 1.0) * self.bytes


@dataclasses.dataclass
class _Instruction:
  name: str
  type: str
  opcode: str
  rest: str  # operands and attributes
  is_root: bool


def collectives(text: str, num_devices: int) -> list[Collective]:
  """All collectives of a program, with how often each runs.

  Bodies of loops count once for every turn; branches of a conditional all
  count, as if each were taken.

  Args:
    text: Optimised HLO.
    num_devices: Of the mesh.

  Raises:
    ValueError: The text has a form that is not known, for instance of a loop
      whose number of turns is not static and that holds a collective.
  """
  computations, entry = _parse(text)
  types = {i.name: i.type for body in computations.values() for i in body}
  found = []
  for name, count in _counts(computations, entry).items():
    for i in computations[name]:
      kind = i.opcode.removesuffix("-start")
      if kind not in KINDS:
        continue
      if count is None:
        raise ValueError(
          f"{i.name} is in a loop whose number of turns is not known"
        )
      operands = _operands(i.rest)
      arrays = tuple(
        f"{dtype}[{shape}]"
        for operand in operands
        for dtype, shape in _ARRAY.findall(types[operand])
      )
      found.append(
        Collective(
          kind,
          _groups(i.rest, num_devices),
          arrays,
          sum(array_bytes(a) for a in arrays),
          count,
          _op_name(i),
        )
      )
  return found


@dataclasses.dataclass(frozen=True)
class Asynchronous:
  """A collective that is started, and waited for later."""

  kind: str  # one of `KINDS`
  op_name: str  # where in the program it comes from, as JAX names it
  # (operation, op_name) of what the schedule has in between, but for what only
  # names arrays
  meanwhile: tuple[tuple[str, str], ...]


def asynchronous(text: str) -> list[Asynchronous]:
  """The collectives that other work may run beside, in a scheduled program."""
  computations, _ = _parse(text)
  found = []
  for body in computations.values():
    ends = {
      operand: place
      for place, i in enumerate(body)
      if i.opcode.endswith("-done")
      for operand in _operands(i.rest)
    }
    for place, i in enumerate(body):
      kind = _started(i, computations)
      if kind is None or i.name not in ends:
        continue
      meanwhile = tuple(
        (_operation(other), _op_name(other))
        for other in body[place + 1 : ends[i.name]]
        if other.opcode not in _NO_TRAFFIC - _CALLERS
        and not other.opcode.endswith(("-done", "-update"))
      )
      found.append(Asynchronous(kind, _op_name(i), meanwhile))
  return found


def _started(
  i: _Instruction, computations: dict[str, list[_Instruction]]
) -> str | None:
  """The kind of collective that an instruction starts, if any."""
  if i.opcode == "async-start":
    inside = [
      other.opcode
      for name in _CALLED.findall(i.rest)
      for other in computations[name]
    ]
    return next((opcode for opcode in inside if opcode in KINDS), None)
  kind = i.opcode.removesuffix("-start")
  return kind if kind in KINDS and kind != i.opcode else None


def _operation(i: _Instruction) -> str:
  """The operation's name, with that of a library's function."""
  target = re.search(r'custom_call_target="([^"]*)"', i.rest)
  return f"{i.opcode} {target[1]}" if target else i.opcode


def _op_name(i: _Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', i.rest)
  return found[1] if found else ""


def memory_bytes(text: str) -> int:
  """Bytes that a program reads and writes in a device's main memory, at most.

  Inputs and outputs of every operation that runs, bodies of loops once for
  every turn, but not what the compiler keeps on the chip: arrays inside of a
  fusion, and those that TPU programs mark with memory space S(1). An operation
  that reads a part of an array counts as reading all of it, except for the
  copies between the two memories.
  """
  computations, entry = _parse(text)
  types = {i.name: i.type for body in computations.values() for i in body}
  fused = {
    name
    for body in computations.values()
    for i in body
    if i.opcode == "fusion"
    for name in _CALLED.findall(i.rest)
  }
  total = 0
  for name, count in _counts(computations, entry).items():
    if name in fused:
      continue
    for i in computations[name]:
      if i.opcode in _NO_TRAFFIC or i.opcode.endswith(("-done", "-update")):
        continue
      total += (count or 1) * _instruction_bytes(i, types)
  return total


def _instruction_bytes(i: _Instruction, types: dict[str, str]) -> int:
  if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
    # Names the array that is copied, its place in the other memory, and a
    # context of 4 bytes.
    sizes = [
      array_bytes(f"{dtype}[{shape}]")
      for dtype, shape in _ARRAY.findall(i.type)
    ]
    return min((size for size in sizes if size > 4), default=4)
  names = dict.fromkeys(_operands(i.rest))
  return sum(
    _main_memory_bytes(t) for t in (i.type, *(types[n] for n in names))
  )


def _main_memory_bytes(type_: str) -> int:
  """Bytes of the arrays of a type that are not in memory space S(1)."""
  return sum(
    array_bytes(array)
    for array, layout in _PLACED.findall(type_)
    if "S(1)" not in layout
  )


def estimated_cycles(text: str) -> int:
  """Cycles of a step by the TPU compiler's own estimate, without exchanges.

  0 where the compiler does not say.
  """
  computations, entry = _parse(text)
  return sum(
    (count or 1) * int(cycles)
    for name, count in _counts(computations, entry).items()
    for i in computations[name]
    for cycles in re.findall(r'"estimated_cycles":"(\d+)"', i.rest)
  )


def axes_of(
  groups: np.ndarray, mesh_shape: dict[str, int]
) -> tuple[tuple[str, ...], bool]:
  """The mesh axes along which groups of devices lie.

  Args:
    groups: [N, n] positions in the mesh, row-major.
    mesh_shape: Size of every axis, in order.

  Returns:
    Axes along which a group's devices differ; and whether each group has all
    devices along these.
  """
  places = np.unravel_index(groups, tuple(mesh_shape.values()))
  axes = tuple(
    name
    for name, place in zip(mesh_shape, places, strict=True)
    if (place != place[:, :1]).any()
  )
  whole = math.prod(mesh_shape[name] for name in axes) == groups.shape[1]
  return axes, whole


def array_bytes(array: str) -> int:
  """Bytes of 'bf16[2,128]'; types of less than a byte count as they pack."""
  dtype, shape = _ARRAY.fullmatch(array).groups()  # type: ignore[union-attr]
  if dtype == "pred":
    bits = 8
  elif dtype in ("token", "opaque"):
    bits = 0
  else:  # f32, bf16, s4, f8e4m3fn, ...: the first number in the name
    bits = int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
  size = math.prod(int(n) for n in shape.split(",") if n)
  return size * bits // 8


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by computation, callees first; and the entry's name."""
  computations: dict[str, list[_Instruction]] = {}
  body: list[_Instruction] = []
  entry = ""
  for line in text.splitlines():
    if not line.startswith(" "):
      start = _COMPUTATION.match(line)
      if start:
        body = computations.setdefault(start[2], [])
        entry = start[2] if start[1] else entry
      continue
    if found := _INSTRUCTION.match(line):
      is_root, name, type_, opcode, rest = found.groups()
      body.append(_Instruction(name, type_, opcode, rest, bool(is_root)))
  if not entry:
    raise ValueError("the text is no HLO module: it has no ENTRY computation")
  return computations, entry


def _counts(
  computations: dict[str, list[_Instruction]], entry: str
) -> dict[str, int | None]:
  """How often each computation runs; None where that is not known."""
  counts: dict[str, int | None] = collections.defaultdict(int)
  counts[entry] = 1
  for name in reversed(computations):  # Callers come after what they call.
    times = counts[name]
    for i in computations[name]:
      # The end of an asynchronous call names the computation once more.
      if i.opcode.endswith(("-done", "-update")) or times == 0:
        continue
      called = _CALLED.findall(i.rest)
      if branches := _BRANCHES.search(i.rest):
        called += re.findall(r"[\w.\-]+", branches[1])
      if i.opcode == "call":
        called += re.findall(r"\bto_apply=%?([\w.\-]+)", i.rest)
      turns = _turns(i, computations) if i.opcode == "while" else 1
      for other in called:
        before = counts[other]
        if None in (times, turns, before):
          counts[other] = None
        else:
          counts[other] = before + times * turns  # type: ignore[operator]
  return {name: counts[name] for name in computations if counts[name] != 0}


def _turns(
  loop: _Instruction, computations: dict[str, list[_Instruction]]
) -> int | None:
  """How often a loop's body runs.

  XLA for CPU and GPU says it; for TPU the condition of a counted loop of JAX,
  which starts from 0, compares with the one constant it has.
  """
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
  limits = [
    int(value[1])
    for i in computations[condition[1]]  # type: ignore[index]
    if i.opcode == "constant"
    and i.type.startswith("s32[]")
    and (value := re.match(r"(\d+)\)", i.rest))
  ]
  return limits[0] if len(limits) == 1 else None


def _operands(rest: str) -> list[str]:
  """Names of the operands of 'a, %b), attributes'."""
  depth, length = 1, 0
  while depth and length < len(rest):
    depth += {"(": 1, ")": -1}.get(rest[length], 0)
    length += 1
  # CPU and GPU may print the operands' types before their names.
  return re.findall(r"%([\w.\-]+)", rest[:length])


def _groups(rest: str, num_devices: int) -> np.ndarray:
  """Replica groups [N, n] of an instruction's attributes.

  Written as lists ({{0,1},{2,3}}), as a reshaped and transposed range
  ([2,4]<=[4,2]T(1,0)), or as axes of a mesh that XLA made up
  (mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}).
  """
  pairs = re.search(r"source_target_pairs=(\{\{[\d,{} ]*\}\})", rest)
  lists = re.search(r"replica_groups=(\{\{[\d,{} ]*\}\})", rest)
  if pairs or lists:
    written = (pairs or lists)[1]  # type: ignore[index]
    rows = [
      [int(n) for n in row.split(",")]
      for row in re.findall(r"\{([\d, ]+)\}", written)
    ]
    if len({len(row) for row in rows}) > 1:
      raise ValueError(f"groups of unequal size: {written}")
    return np.array(rows)
  if re.search(r"replica_groups=\{\}", rest):
    return np.arange(num_devices)[None]
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
  )
  if iota:
    order = _iota(_numbers(iota[2]), _numbers(iota[3] or ""))
    return order.reshape(_numbers(iota[1]))
  mesh = re.search(
    r"replica_groups=@?\w*mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((.*?)\))? ?\{([^}]*)\}",
    rest,
  )
  if mesh:
    return _mesh_groups(*mesh.groups())
  raise ValueError(f"replica groups of an unknown form: {rest[:500]}")


def _mesh_groups(axes: str, devices: str | None, used: str) -> np.ndarray:
  """Groups [N, n] along some axes, or parts ('a':(2)4) of axes, of a mesh."""
  sizes = {n: int(size) for n, size in re.findall(r"'?(\w+)'?=(\d+)", axes)}
  parts = {
    name: (int(before), int(size)) if size else (1, sizes[name])
    for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", used)
  }
  count = math.prod(sizes.values())
  if devices is None:
    order = np.arange(count)
  elif devices.startswith("["):
    written = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", devices)
    order = _iota(
      _numbers(written[1]),  # type: ignore[index]
      _numbers(written[2] or ""),  # type: ignore[index]
    )
  else:
    order = np.array(_numbers(devices))
  # An axis of which a part is used is three: before, the part, after.
  shape: list[int] = []
  inside: list[int] = []
  outside: list[int] = []
  for name, size in sizes.items():
    before, part = parts.get(name, (size, 1))
    for width, where in (
      (before, outside),
      (part, inside),
      (size // (before * part), outside),
    ):
      where.append(len(shape))
      shape.append(width)
  grid = order.reshape(shape).transpose(*outside, *inside)
  return grid.reshape(-1, math.prod(shape[i] for i in inside))


def _iota(shape: Sequence[int], transposed: Sequence[int]) -> np.ndarray:
  """Numbers 0, 1, ... in `shape`, its axes transposed, flat."""
  order = np.arange(math.prod(shape)).reshape(shape)
  return (order.transpose(transposed) if transposed else order).reshape(-1)


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n.strip()]
