"""Reports on the pod recipes: what their training steps cost, compiled.

    python benchmarks/pods.py --compile

compiles every recipe for its TPU slice, which need not be there (extra `tpu`;
5 to 10 minutes each on two cores), into docs/pods/*.json; without --compile,
the tables of docs/pods.md are made of these files.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys

from basemt_jax.compilation import ahead_of_time, chips
from basemt_jax.inspection import compile_report

ROOT = pathlib.Path(__file__).parent.parent
VOCABULARY, DIRECTIONS = 32000, 30


@dataclasses.dataclass(frozen=True)
class Pod:
  """A recipe on a slice."""

  recipe: str
  topology: str
  experts: int

  @property
  def file(self) -> pathlib.Path:
    """Its report."""
    name = f"{self.recipe}_{self.experts}_experts.json"
    return ROOT / "docs" / "pods" / name

  @property
  def command(self) -> list[str]:
    """Makes the report, but for where it goes."""
    return [
      "compile",
      f"--gin_file=gin/recipes/{self.recipe}.gin",
      f"--topology={self.topology}",
      f"--gin.NUM_EXPERTS={self.experts}",
      f"--vocab_size={VOCABULARY}",
      f"--directions={DIRECTIONS}",
    ]


PODS = (
  Pod("pod_v5e_256", "v5e:16x16", 32),
  Pod("pod_v5e_256", "v5e:16x16", 128),
  Pod("pod_v6e_256", "v6e:16x16", 32),
  Pod("pod_v6e_256", "v6e:16x16", 128),
  Pod("pod_v5p_128", "v5p:4x4x8", 32),
  Pod("pod_v5p_128", "v5p:4x4x8", 128),
)

PAGE = ROOT / "docs" / "pods.md"
# What is below it in the page is made of the reports; the prose is above.
MARK = "<!-- benchmarks/pods.py -->\n"


def read(pod: Pod) -> ahead_of_time.Report:
  """The report in docs/pods."""
  return compile_report.from_json(json.loads(pod.file.read_text("utf-8")))


def summary() -> str:
  """One line for each report."""
  lines = [
    "| recipe | experts | parameters | memory of a chip, GiB | model TFLOP a "
    "chip | best | serial | compiler | MFU (compiler) |",
    "| -- | --: | --: | --: | --: | --: | --: | --: | --: |",
  ]
  for pod in PODS:
    r = read(pod)
    available = (r.memory.available or 0) / chips.GIB
    times = [f"{r.seconds[k] * 1e3:.0f} ms" for k in r.mfu]
    cells = [
      f"[`{pod.recipe}`](../gin/recipes/{pod.recipe}.gin)",
      str(pod.experts),
      f"{r.parameters / 1e9:.2f} G",
      f"{r.memory.total / chips.GIB:.1f} of {available:.0f}",
      f"{r.model_flops / r.chips / 1e12:.2f}",
      *times,
      f"{r.mfu['compiler']:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def page() -> str:
  """The text of docs/pods.md, its prose as it is."""
  prose, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
  parts = [prose + MARK + summary()]
  for pod in PODS:
    command = "basemt " + " \\\n      ".join(pod.command)
    parts.append(
      f"## {pod.recipe}, {pod.experts} experts\n\n    {command}\n\n"
      + compile_report.markdown(read(pod))
    )
  return "\n".join(parts)


def main() -> None:
  """Writes the page."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--compile", action="store_true")
  if parser.parse_args().compile:
    for pod in PODS:
      subprocess.run(
        [
          sys.executable,
          "-m",
          "basemt_jax.cli",
          *pod.command,
          f"--json={pod.file}",
        ],
        cwd=ROOT,
        check=True,
      )
  PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
  main()
