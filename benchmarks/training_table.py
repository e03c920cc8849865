"""The first table of docs/performance.md, of what three scripts measured.

    export PYTHONPATH=. && mkdir -p out
    python benchmarks/pytorch_step.py --json out/pytorch.json \
      --shapes 512x6x256 1024x6x64 1024x12x64
    python benchmarks/first_step.py --cold_only > out/first.txt --shapes \
      base base_sparse big big_sparse big_rounded big_sparse_rounded \
      big_sparse_small big_12 big_12_sparse
    python benchmarks/training_step.py --shapes 6x256 --json out/large.json
    python benchmarks/training_table.py out/*

Any of these files may be missing, and files of several devices may be given:
a row is what is known of one device, network and batch. It is Markdown, with
`-` for what was not measured. `first_step.py` has every network alone in a
process, `training_step.py` dense and sparse in turn in one; of the same row the
file that is given last counts.

Figures are of one chip. Tokens are those of both sides, padding included.
Memory is the allocator's peak, or what the compiler plans with where an earlier
program of the process had a higher peak. The first step is timed from where the
network is made to where the step has ended, compiled programs not kept from
before; starting the process, importing and finding the device are left out, in
both libraries.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from basemt_jax.inspection import tables

MODELS = (
  "PyTorch, dense",
  *("dense", "dense, bfloat16 moments"),
  *("sparse", "sparse, bfloat16 moments", "sparse, small experts"),
)
# What is known of a row, and how it is shown.
FIGURES = (
  tables.Column("ms", tables.fixed(1)),
  tables.Column("tokens/s", tables.count),
  tables.Column("MFU", tables.fixed(3)),
  tables.Column("memory, GiB", tables.fixed(1)),
  tables.Column("first step, s", tables.fixed(1)),
)

# Device, D, blocks a side, rows, place in MODELS.
Key = tuple[str, int, int, int, int]
Figures = dict[str, float]


def model_place(is_sparse: bool, found: dict[str, Any]) -> int:
  """The place of a network of ours in `MODELS`."""
  if is_sparse and found.get("expert_moments") == "by_neuron":
    return MODELS.index("sparse, small experts")
  return 1 + 2 * is_sparse + (found["moments"] == "bfloat16")


def device_name(name: str) -> str:
  """'H100' of 'NVIDIA H100 80GB HBM3'."""
  return name.removeprefix("NVIDIA ").split(" ")[0]


def of_training_step(found: dict[str, Any]) -> Iterator[tuple[Key, Figures]]:
  """Rows of `training_step.py --json`."""
  for row in found["figures"]:
    key = (
      device_name(found["device"]),
      found["width"],
      row["blocks"],
      row["rows"],
      model_place(row["model"] == "experts", found),
    )
    memory = row["memory"]["peak"] or row["memory"]["planned"]
    figures = timed(row, row["tokens_per_s"] / found["devices"])
    yield key, {**figures, "memory, GiB": memory / 2**30}


def of_pytorch(found: dict[str, Any]) -> Iterator[tuple[Key, Figures]]:
  """Rows of `pytorch_step.py --json`."""
  for row in found["rows"]:
    size = (row["width"], row["blocks"], row["rows"])
    figures = {
      **timed(row, row["tokens_per_s"]),
      "memory, GiB": row["peak_gib"],
      "first step, s": row["first_step_s"],
    }
    yield (device_name(found["device"]), *size, 0), figures


def timed(row: dict[str, Any], tokens: float) -> Figures:
  """What both scripts say of a step's time."""
  return {"ms": row["ms"], "tokens/s": tokens, "MFU": row["mfu"]}


def of_first_step(text: str) -> Iterator[tuple[Key, Figures]]:
  """Rows of what `first_step.py` prints; warm processes are left out."""
  for line in text.splitlines():
    head, brace, rest = line.partition("{")
    _, kind, device = [*head.split(maxsplit=2), "", "", ""][:3]
    if kind != "cold" or not brace:
      continue
    row = json.loads(brace + rest)
    size = (row["width"], row["blocks"], row["rows"])
    seconds = row["total"] - row["import"] - row["device"]
    place = model_place(bool(row["experts"]), row)
    figures = {
      **timed({**row, "ms": row["step"]}, row["tokens_per_s"]),
      "first step, s": seconds,
    }
    if row["memory"]:
      figures["memory, GiB"] = row["memory"] / 2**30
    yield (device_name(device), *size, place), figures


def table(paths: list[pathlib.Path]) -> str:
  """What the three scripts' outputs tell, joined, in Markdown."""
  rows: dict[Key, Figures] = collections.defaultdict(dict)
  for path in paths:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
      found = of_first_step(text)
    elif "torch" in (values := json.loads(text)):
      found = of_pytorch(values)
    else:
      found = of_training_step(values)
    for key, figures in found:
      rows[key] |= figures
  return tables.markdown(
    tables.Table(
      "",
      ["device", "D", "blocks", "rows", "model", *FIGURES],
      [
        [*place, MODELS[model], *(figures.get(c.name) for c in FIGURES)]
        for (*place, model), figures in sorted(rows.items())
      ],
    )
  )


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("files", nargs="+", type=pathlib.Path)
  print(table(parser.parse_args().files), end="")


if __name__ == "__main__":
  main()
