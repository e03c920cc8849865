"""What a run says of itself when it starts, against the run by hand."""

import dataclasses

import jax
import toy

from basemt_jax import announcement, phases
from basemt_jax.data import languages, row_store


def told(tmp_path, network, **changes):
  store = row_store.RowStore(toy.write_store(tmp_path / "store"))
  run = toy.a_run(tmp_path / "run", store.directory, network, **changes)
  last = "sparse" if network is toy.SPARSE else "dense"
  program = phases.program(
    run.config(store), run.settings, last, run.mesh(), len(store.directions)
  )
  lines = announcement.lines(run, store, program)
  found = {}
  for line in lines:
    name, _, text = line.partition(" ")
    found[name] = text.strip()
  assert len(found) == len(lines)
  return found, program


def test_everything_about_a_run_is_told(tmp_path):
  found, program = told(
    tmp_path,
    toy.SPARSE,
    settings=toy.settings(dense_steps=2),
    bands=languages.BandThresholds(60, 30),
  )
  assert found["data"] == (
    "3 directions between 3 languages, 144 training pairs; dev 18, test 18"
  )
  assert found["bands"] == (
    "high (60 pairs or more): 2 directions, 83.3% of the pairs; "
    "low (fewer than 30): 1 direction, 16.7% of the pairs"
  )
  assert found["lengths"].startswith("32 source and 24 target tokens; 0.0%")
  assert found["vocabulary"] == "259 bytes"
  leaves = jax.tree_util.tree_leaves_with_path(program.shapes.params)
  total = sum(leaf.size for _, leaf in leaves)
  # Of four experts in each of two layers a token passes through one.
  experts = sum(
    x.size for p, x in leaves if "experts" in jax.tree_util.keystr(p)
  )
  assert experts % 8 == 0 and experts > 0
  assert found["network"] == (
    "1 + 1 blocks of width 16, 4 experts in 2 of the blocks; "
    f"{total:,} parameters, {total - experts * 3 // 4:,} for a token"
  )
  assert found["training"].startswith(
    "dense to step 2, then sparse to step 4; 8 packed rows a step; learning "
    "rate up to 0.0075 about step 3"
  )
  assert found["sampling"] == "temperature 1, 4 at the end"
  assert found["places"].startswith(str(tmp_path / "run"))


def test_a_plain_run_says_nothing_of_what_it_has_not(tmp_path):
  strategy = dataclasses.replace(
    toy.a_run("", "").strategy, temperature=lambda step: 0.0 * step + 5.0
  )
  found, _ = told(tmp_path, toy.DENSE, strategy=strategy)
  assert "expert" not in found["network"]
  assert found["training"].startswith("dense to step 4; 8 packed rows")
  assert found["sampling"] == "temperature 5"
