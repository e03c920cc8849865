"""Who imports whom: rooms, arrows that point down, libraries that stay few."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "basemt_jax"

# The root's files for training and the network: what runs where only jax,
# flax, optax and orbax are installed.
LIGHT = {
  *("assignment", "repair", "routing", "experts", "base_layer"),
  *("layers", "drawing", "model", "losses"),
  *("heating", "sampling"),
  *(
    "conversion",
    "phases",
    "optimizer",
    "rounding",
    "partitioning",
    "checkpointing",
    "processes",
  ),
  *("train_state", "steps", "metrics", "prefetch", "reports", "trainer"),
  *("decoding", "translation", "scoring"),
  *("files", "checksums", "locking", "plain_data", "ranges"),
}
# What a room may import besides itself and the rooms of `BELOW`. The rest of
# the root (`run`, `evaluation`) counts as the room "".
BELOW = {
  "light": {"kernels"},
  "kernels": {"light"},
  "data": {"light", "kernels"},
  "corpora": {"light", "data"},
  "compilation": {"light", "kernels", "data"},
  "inspection": {"light", "data", "corpora", "compilation", ""},
  "exports": {"light", "data", ""},
  "serving": {"light", "data", ""},
  "": {"light", "kernels", "data"},
  "t5x": {"light", "kernels", "data", ""},
  "commands": {
    *("light", "data", "corpora", "compilation", "inspection"),
    *("exports", "serving", ""),
  },
  "cli": {"light", "commands", ""},
}
HEAVY = ("tensorflow", "seqio", "gin", "t5x", "clu")
# Modules that may import heavy libraries at all, lazily or not.
KNOWS = {
  "data.heated_mixture": {"seqio", "tensorflow"},
  "data.mixtures": {"seqio", "tensorflow"},
  "data.task_cache": {"seqio", "tensorflow"},
  "data.task_reading": {"seqio", "tensorflow"},
  "data.vocabulary": {"seqio"},
  "t5x_adapter": {"seqio", "t5x", "clu"},
  "commands.checks": {"gin"},
  "t5x_data": {"seqio", "clu"},
  "commands.configuration": {"gin"},
  "commands.inspect": {"gin"},
  "commands.saved": {"gin"},
  "commands.t5x_settings": {"gin"},
}


def modules():
  """Dotted name within the package -> file, over all rooms."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] != "gin" and parts[-1] != "__init__":
      found[".".join(parts)] = path
  return found


MODULES = modules()
ROOMS = {name.split(".")[0] for name in MODULES if "." in name}


def room(name):
  """The room of a module; the root is cut by what its files are for."""
  if "." in name:
    return name.split(".")[0]
  if name in LIGHT:
    return "light"
  places = {"t5x_adapter": "t5x", "t5x_data": "t5x", "cli": "cli"}
  return places.get(name, "")


def imported(name):
  """Modules of the package that a module imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      base = node.module.split(".")
      dotted = [[*base, alias.name] for alias in node.names]
    elif isinstance(node, ast.Import):
      dotted = [alias.name.split(".") for alias in node.names]
    else:
      continue
    for parts in dotted:
      if parts[0] == "basemt_jax":
        longest = [".".join(parts[1:end]) for end in (3, 2)]
        found |= {next((m for m in longest if m in MODULES), "")} - {""}
  return found


def modules_after(*names):
  """Top-level modules loaded in a process that imports only these."""
  code = "import sys\n" + "".join(
    f"import basemt_jax.{name}\n" for name in names
  )
  code += "print(*{name.split('.')[0] for name in sys.modules})"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return set(done.stdout.split())


def test_every_room_has_its_rules_and_every_rule_its_room():
  assert set(BELOW) - {"light", "", "t5x", "cli"} == ROOMS
  assert set(MODULES) >= LIGHT
  assert set(KNOWS) <= set(MODULES)
  assert len(MODULES) > 40  # The walk finds the files.


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_down(name):
  here = room(name)
  allowed = BELOW[here] | {here}
  up = {other for other in imported(name) if room(other) not in allowed}
  assert not up


def test_nothing_in_the_package_goes_round_in_a_circle():
  graph = {name: imported(name) for name in MODULES}
  done = set()
  while len(done) < len(graph):
    ready = {n for n, needs in graph.items() if needs - {n} <= done} - done
    assert ready, f"a circle among {sorted(set(graph) - done)}"
    done |= ready


@pytest.mark.parametrize("name", MODULES)
def test_only_some_modules_know_the_heavy_libraries(name):
  names = set()
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.add(node.module.split(".")[0])
  assert names & set(HEAVY) <= KNOWS.get(name, set())


def test_training_needs_no_tensorflow_seqio_or_gin():
  kernels = {name for name in MODULES if room(name) == "kernels"}
  compilation = {name for name in MODULES if room(name) == "compilation"}
  loaded = modules_after(*LIGHT, *kernels, *compilation)
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


def test_tasks_wait_for_seqio_which_learns_of_them_by_whomever():
  code = """
import sys
import tasks
from basemt_jax.data import mixtures, store_building
before = mixtures.get_mixture("cldr")
made_of = store_building.fingerprint("cldr", {"inputs": 8, "targets": 8})
assert "seqio" not in sys.modules and "tensorflow" not in sys.modules
import seqio
after = mixtures.get_mixture("cldr")
assert after is seqio.MixtureRegistry.get("cldr")
names = [task.name for task in before.tasks]
assert sorted(names) == sorted(task.name for task in after.tasks)
assert made_of == store_building.fingerprint(after, {"inputs": 8, "targets": 8})
assert "wmt15" in seqio.MixtureRegistry.names()
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
