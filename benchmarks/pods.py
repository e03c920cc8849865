"""Reports on the pod recipes: what their training steps cost, compiled.

    python benchmarks/pods.py --compile

compiles every recipe for its TPU slice, which need not be there (extra `tpu`;
5 to 10 minutes each on two cores), into docs/pods/*.json; without --compile,
docs/pods.md is written from these files.
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

HEAD = """\
# Pod recipes, compiled

Transformer-big with BASE layers in a third of its blocks, for 256 TPU v5e, for
256 TPU v6e and for 128 TPU v5p. These are reports of `basemt compile`: the very
training step of a recipe, compiled by the TPU compiler (libtpu) without the
hardware. Memory, operations and exchanges are those of the compiled program;
times are estimates. **Nothing on this page has been run on a TPU.**

On one H200, where the same report can be compared with a run (Transformer-big,
64 rows of 256 tokens a side, `benchmarks/training_step.py`): memory 26.64 GiB
reported and measured with 32 experts; `serial` 51 ms, measured 62 ms; dense 42
and 51 ms. The TPU compiler's own estimate does not exist there.

`best`, `serial` and `compiler` are three estimates of a step, explained at the
head of [`ahead_of_time.py`](../basemt_jax/compilation/ahead_of_time.py):
everything overlaps;
nothing overlaps; the TPU compiler's own count of cycles, then the exchanges.
Plan with the last. None of them knows the latency of starting operations.
Bandwidths and peaks are the published ones.

A step's batch is 4096 rows of 256 + 256 tokens: about a million target tokens,
as many as NLLB-200 trained with. It cannot be much smaller on so many chips:
every chip along `data` and `expert` needs a whole group of 16 rows, whose
tokens compete for experts. `MODEL_DEVICES=4` does with a quarter of the rows,
but every block then sums its activations over four chips: on 256 v5e, with the
batch as it is, about a third of the speed is left (with an earlier step, 4.15
of 12.3 million target tokens/s). `model.TransformerConfig.rows_per_group` is
the other way; it changes the model. `basemt compile --meshes=all` compiles a
step on every mesh that its sizes allow and shows the best three.

The clock in which a v6e's compiler counts is not published. It follows from the
peak, as that of the others does: see
[`chips.py`](../basemt_jax/compilation/chips.py).

`python benchmarks/pods.py --compile` makes the reports anew,
`python benchmarks/pods.py` this page from them.

"""


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
  """The text of docs/pods.md."""
  parts = [HEAD + summary()]
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
  (ROOT / "docs" / "pods.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
  main()
