"""Programs of a run: the sizes that they are made for."""

import dataclasses

import jax
import pytest
import toy

from basemt_jax import cli
from basemt_jax import run as run_lib
from basemt_jax.commands import configuration

pytestmark = pytest.mark.usefixtures("clean_gin")


def configured(*flags):
  options = cli._parser().parse_args(["compile", *flags])
  options.bindings = []
  return configuration.configured(options)


def test_sizes_are_the_vocabulary_s_and_the_mixture_s():
  building = pytest.importorskip("basemt_jax.data.store_building")
  run = configured("--gin_file=gin/recipes/quickstart.gin")
  size, directions = building.sizes(run.mixture_or_task_name)
  assert directions == 24  # English to and from 12 languages
  program = run_lib.program(run, jax.devices()[:1], "dense")
  assert program.name == "dense"
  assert 0 <= program.model.config.vocab_size - size < 128


def test_sizes_are_those_of_a_store(tmp_path):
  run = configured("--gin_file=gin/recipes/quickstart.gin")
  run = dataclasses.replace(run, store_dir=toy.write_store(tmp_path))
  program = run_lib.program(run, jax.devices()[:4], "sparse")
  assert program.model.config.vocab_size == 384  # 256 bytes and some more
  # The phase after the conversion.
  assert program.name == "sparse" and program.model.config.converted
  assert program.mesh.size == 4
