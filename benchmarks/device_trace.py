"""What a device did while a function ran: kernels, their sources, busy time.

    with device_trace.recorded() as trace:
      run()
    print(trace.busy_ms(), trace.longest(compiled.as_text(), 10))

Reads the profile that `jax.profiler` writes. A kernel's source is the JAX name
stack of the HLO instruction it came from, so that time can be summed by parts
of the model.
"""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping

import jax


@dataclasses.dataclass
class Trace:
  """Kernels of one device, in the order they started."""

  kernels: list[tuple[str, str, float, float]] = dataclasses.field(
    default_factory=list
  )  # (name, HLO instruction or '', start ns, duration ns)

  def span_ms(self) -> float:
    """From the first kernel's start to the last one's end."""
    if not self.kernels:
      return 0.0
    last = max(start + length for _, _, start, length in self.kernels)
    return (last - self.kernels[0][2]) / 1e6

  def busy_ms(self) -> float:
    """Time in which at least one kernel ran."""
    busy, end = 0.0, 0.0
    for _, _, start, length in self.kernels:
      busy += max(start + length - max(start, end), 0.0)
      end = max(end, start + length)
    return busy / 1e6

  def overlaps(self, groups: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """Per group: milliseconds, how many beside other kernels, and kernels.

    Time in which several kernels of a group run counts once; other kernels are
    those of no group.

    Args:
      groups: Group to regular expression over 'kernel | instruction'; the
        first that is found counts.
    """
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in groups}
    others: list[tuple[float, float]] = []
    for name, op, start, length in self.kernels:
      group = _group(f"{name} | {op}", groups)
      span = (start, start + length)
      (others if group is None else spans[group]).append(span)
    others = _union(others)
    return {
      name: (
        sum(end - start for start, end in _union(found)) / 1e6,
        _common(_union(found), others) / 1e6,
        len(found),
      )
      for name, found in spans.items()
    }

  def by_source(self, hlo: str, groups: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds by the first group whose pattern is found, longest first.

    Args:
      hlo: Text of the compiled program.
      groups: Group to regular expression over 'name stack | instruction |
        kernel'.
    """
    sources = _sources(hlo)
    sums: dict[str, float] = defaultdict(float)
    for name, op, _, length in self.kernels:
      group = _group(f"{sources.get(op, '')} | {op} | {name}", groups)
      sums[group or "other"] += length / 1e6
    return dict(_most(sums))

  def longest(self, hlo: str, count: int) -> list[tuple[float, str, str]]:
    """Tuples of ms, instruction and name stack, longest first."""
    sources = _sources(hlo)
    sums: dict[str, float] = defaultdict(float)
    for name, op, _, length in self.kernels:
      sums[op or name] += length / 1e6
    return [(ms, op, sources.get(op, "")) for op, ms in _most(sums)[:count]]


def _sources(hlo: str) -> dict[str, str]:
  """Name stacks of a program's instructions."""
  return dict(re.findall(r"%?([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", hlo))


def _most(sums: Mapping[str, float]) -> list[tuple[str, float]]:
  return sorted(sums.items(), key=lambda item: -item[1])


def _group(text: str, groups: Mapping[str, str]) -> str | None:
  """The first group whose pattern is found in a text."""
  return next((g for g, p in groups.items() if re.search(p, text)), None)


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """The same times as spans that lie apart, in order."""
  result: list[tuple[float, float]] = []
  for start, end in sorted(spans):
    if result and start <= result[-1][1]:
      result[-1] = (result[-1][0], max(result[-1][1], end))
    else:
      result.append((start, end))
  return result


def _common(
  left: list[tuple[float, float]], right: list[tuple[float, float]]
) -> float:
  """Time in both of two lists of spans, each apart and in order."""
  total, i, j = 0.0, 0, 0
  while i < len(left) and j < len(right):
    start = max(left[i][0], right[j][0])
    end = min(left[i][1], right[j][1])
    total += max(end - start, 0.0)
    if left[i][1] < right[j][1]:
      i += 1
    else:
      j += 1
  return total


@contextlib.contextmanager
def recorded() -> Iterator[Trace]:
  """Records what the first device does; complete after the block."""
  trace = Trace()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      yield trace
    for path in sorted(pathlib.Path(folder).rglob("*.xplane.pb")):
      data = jax.profiler.ProfileData.from_file(str(path))
      for plane in data.planes:
        if not re.fullmatch(r"/device:(GPU|TPU):0.*", plane.name):
          continue
        for line in plane.lines:
          if line.name.startswith("Stream") or line.name == "XLA Ops":
            for event in line.events:
              stats = {k: v for k, v in event.stats if k is not None}
              op = str(stats.get("hlo_op", ""))
              trace.kernels.append(
                (event.name, op, event.start_ns, event.duration_ns)
              )
  trace.kernels.sort(key=lambda kernel: kernel[2])
