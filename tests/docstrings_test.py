"""The examples in docstrings run, and say what they say."""

import doctest
import importlib

import pytest

# What a reader of the paper comes for has examples.
MODULES = (
  "assignment",
  "base_layer",
  "conversion",
  "heating",
  "sampling",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
  module = importlib.import_module(f"basemt_jax.{name}")
  found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
  assert found.attempted > 0
  assert not found.failed
