"""Test set-up: eight simulated CPU devices, strict shapes, programs kept."""

import gc
import os
import pathlib

import simulated

# Before jax is imported anywhere: sharding is tested on simulated devices.
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = simulated.xla_flags(devices=8)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most tests compile what another one compiles too, in this run or the last: in
# other workers, in the processes that they start, for another assertion.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs"),
)
# The smallest too: to read one takes a tenth of compiling it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing leaves much behind, among a million objects of the libraries.
gc.set_threshold(100_000, 20, 20)

# A worker takes a file at a time. Those that take longest come first, so that
# all workers end together.
LONG = [
  "kill",
  "trainer",
  "phases",
  "t5x_adapter",
  "multi_process",
  "steps",
  "cli",
]


def pytest_collection_modifyitems(items):
  names = [f"{name}_test" for name in LONG]
  items.sort(key=lambda item: item.path.stem not in names)


@pytest.fixture
def registries():
  """A test registers with SeqIO what it needs, and leaves nothing."""
  import seqio

  tasks = dict(seqio.TaskRegistry._REGISTRY)
  mixes = dict(seqio.MixtureRegistry._REGISTRY)
  yield
  seqio.TaskRegistry._REGISTRY = tasks
  seqio.MixtureRegistry._REGISTRY = mixes


@pytest.fixture
def clean_gin():
  """A test finds no bindings of Gin, and leaves none."""
  import gin

  gin.clear_config()
  yield
  gin.clear_config()
