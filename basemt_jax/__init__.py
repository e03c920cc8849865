"""Sparse multilingual translation in JAX and Flax.

BASE layers (balanced assignment of experts), temperature-heated sampling of
languages, and dense pre-training followed by conversion to a sparse model.
Nothing is imported here: `basemt_jax.base_layer` needs jax and flax alone.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
  """`from basemt_jax import vocabulary`: what modules of users' tasks need."""
  if name == "vocabulary":
    from basemt_jax.data import vocabulary

    return vocabulary
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
