"""Who imports whom: dependencies point one way, and stay few."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "basemt_jax"

# Lower layers first; a module imports only from layers before its own.
LAYERS = [
  [
    "decoding",
    "heating",
    "hlo",
    "kernel_call",
    "packing",
    "permutation",
    "processes",
  ],
  ["assignment_kernels"],
  ["assignment"],
  ["routing", "row_store", "sampling", "losses", "optimizer", "partitioning"],
  ["chips"],
  ["layers", "batches", "translation"],
  ["grouped_matmul"],
  ["experts"],
  ["base_layer"],
  ["model"],
  ["checkpointing"],
  ["conversion"],
  ["steps"],
  ["compilation"],
  ["compilation_tables"],
  ["trainer"],
]
# Run where only jax, flax, optax and orbax are installed.
LIGHT = [name for layer in LAYERS for name in layer]
HEAVY = ("tensorflow", "seqio", "gin", "t5x", "clu")


def imported(name):
  """Modules of the package that a module imports, anywhere in it."""
  tree = ast.parse((PACKAGE / f"{name}.py").read_text())
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == "basemt_jax":
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] == "basemt_jax":
        found.add(parts[1])
    elif isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split(".")
        if parts[0] == "basemt_jax" and parts[1:]:
          found.add(parts[1])
  return found


def modules_after(*names):
  """Top-level modules loaded in a process that imports only these."""
  code = "import sys\n" + "".join(
    f"import basemt_jax.{name}\n" for name in names
  )
  code += "print(*{name.split('.')[0] for name in sys.modules})"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=PACKAGE.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  return set(done.stdout.split())


def test_training_needs_no_tensorflow_seqio_or_gin():
  loaded = modules_after(*LIGHT)
  assert not loaded & set(HEAVY)
  assert {"jax", "flax", "optax", "orbax"} <= loaded


def test_running_needs_them_only_to_build_a_store():
  assert not modules_after("run", "cli", "evaluation") & set(HEAVY)


def test_the_layer_of_experts_needs_only_jax_and_flax():
  own = {"basemt_jax"}
  with_layer = modules_after("base_layer")
  # Flax itself loads more than it needs; nothing comes on top of that.
  code = "import sys, jax, flax.linen, flax.linen.partitioning\n"
  code += "print(*{name.split('.')[0] for name in sys.modules})"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  extra = with_layer - set(done.stdout.split()) - own
  assert extra <= set(sys.stdlib_module_names)
  assert not with_layer & {"scipy", "sacrebleu", "sentencepiece", *HEAVY}


@pytest.mark.parametrize("name", LIGHT)
def test_dependencies_point_one_way(name):
  level = next(i for i, layer in enumerate(LAYERS) if name in layer)
  lower = {other for layer in LAYERS[:level] for other in layer}
  assert imported(name) <= lower


def test_nothing_in_the_package_goes_round_in_a_circle():
  graph = {p.stem: imported(p.stem) for p in PACKAGE.glob("*.py")}
  done = set()
  while len(done) < len(graph):
    ready = {n for n, needs in graph.items() if needs - {n} <= done} - done
    assert ready, f"a circle among {sorted(set(graph) - done)}"
    done |= ready


def test_only_some_modules_know_the_heavy_libraries():
  for path in PACKAGE.glob("*.py"):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module:
        names.add(node.module.split(".")[0])
    allowed = {
      "mixtures": {"seqio", "tensorflow"},
      "task_cache": {"seqio", "tensorflow"},
      "vocabulary": {"seqio"},
      "t5x_adapter": {"seqio", "t5x", "clu"},
      "configuration": {"gin"},
      "console": {"clu"},
      "inspection_command": {"gin"},
    }.get(path.stem, set())
    assert names & set(HEAVY) <= allowed, path.stem
