"""Reports that were made of the recipes for pods, as they are or changed."""

import dataclasses
import functools
import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


@functools.cache
def pods():
  path = ROOT / "benchmarks" / "pods.py"
  spec = importlib.util.spec_from_file_location("pods", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def with_memory(**memory):
  """A report that was made, with other memory."""
  report = pods().read(pods().PODS[0])
  changed = dataclasses.replace(report.memory, **memory)
  return dataclasses.replace(report, memory=changed)
