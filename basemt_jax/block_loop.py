"""Blocks of a network in turn: those that repeat are the body of one loop.

A compiler's time grows with the program, and a network that writes out every
block is as long as it is deep. Here a stack of blocks whose kinds repeat, such
as dense, dense, experts, dense, dense, experts, is a `jax.lax.scan` over its
pattern, with the blocks' parameters stacked on the way into it. Parameters and
all other collections keep a place for each block, `layers_0` and so on.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import scope as flax_scope

Array = jax.Array
Tree = Any


class Segment(NamedTuple):
  """Blocks `start` to `start + length * repeats`, a pattern repeated."""

  start: int
  length: int
  repeats: int


def segments(kinds: Sequence[Any]) -> list[Segment]:
  """Cuts a list into repeated patterns, from the left, each as long as it gets.

  What does not repeat is a segment of its own, of length and repeats 1.

      >>> [tuple(segment) for segment in segments("aabaabc")]
      [(0, 3, 2), (6, 1, 1)]
  """
  found, start = [], 0
  while start < len(kinds):
    best = Segment(start, 1, 1)
    for length in range(1, (len(kinds) - start) // 2 + 1):
      pattern, repeats = kinds[start : start + length], 1
      while kinds[start + repeats * length :][:length] == pattern:
        repeats += 1
      if repeats > 1 and length * repeats > best.length * best.repeats:
        best = Segment(start, length, repeats)
    found.append(best)
    start += best.length * best.repeats
  return found


def run(
  parent: nn.Module,
  blocks: Sequence[nn.Module],
  x: Array,
  arguments: Sequence[Any],
  own_arguments: Sequence[Tree],
  keys: Array | None,
  prepare: Callable[[Tree], Tree],
  scan: bool,
  remat: bool,
) -> Array:
  """Applies blocks whose variables are `layers_0`, ... of a module.

  Args:
    parent: The module; what blocks change in collections is written there.
    blocks: Without a parent; equal ones make equal programs.
    x: [B, L, D], the first block's input.
    arguments: Further ones of every block; what is not an array is static.
    own_arguments: One more of each block, in a loop of one structure.
    keys: Of the blocks' random stream `dropout`, or None.
    prepare: Parameters of a block to what a loop stacks of them.
    scan: Whether repeated blocks become a loop.
    remat: Whether to compute blocks again in the backward pass.

  Returns:
    [B, L, D], the last block's output.
  """
  unchanged = flax_scope.DenyList(("params", "params_axes"))
  assert parent.scope is not None
  changed = flax_scope.intersect_filters(parent.scope.mutable, unchanged)

  def apply(block: nn.Module, x: Array, own: Tree) -> tuple[Array, Tree]:
    variables, argument, key = own
    return block.apply(
      variables,
      x,
      *arguments,
      argument,
      rngs=None if key is None else {"dropout": key},
      mutable=changed or [],
    )

  if remat:
    apply = jax.checkpoint(apply, static_argnums=0, prevent_cse=not scan)
  if not scan:  # Blocks of a kind are traced once, if not compiled once.
    apply = jax.jit(apply, static_argnums=0)
  names = [f"layers_{i}" for i in range(len(blocks))]
  own = [
    (
      _variables(parent, name),
      own_arguments[i],
      keys if keys is None else keys[i],
    )
    for i, name in enumerate(names)
  ]
  found: list[Tree] = []
  for start, length, repeats in (
    segments(blocks) if scan else [Segment(i, 1, 1) for i in range(len(blocks))]
  ):
    pattern = blocks[start : start + length]
    if repeats == 1:
      x, updates = apply(pattern[0], x, own[start])
      found.append(updates)
      continue
    chosen = own[start : start + length * repeats]
    x, stacked = _scan(
      functools.partial(_pattern, apply, pattern), x, chosen, repeats, prepare
    )
    found += [
      jax.tree.map(operator.itemgetter(i), updates)
      for i in range(repeats)
      for updates in stacked
    ]
  for name, updates in zip(names, found, strict=True):
    for collection, tree in updates.items():
      parent.put_variable(collection, name, tree)
  return x


def _variables(parent: nn.Module, name: str) -> dict[str, Tree]:
  """A block's collections."""
  collections = parent.variables.items()
  return {kind: tree[name] for kind, tree in collections if name in tree}


def _pattern(apply, pattern, x: Array, own: list[Tree]):
  """The blocks of one turn of a loop."""
  updates = []
  for block, variables in zip(pattern, own, strict=True):
    x, changed = apply(block, x, variables)
    updates.append(changed)
  return x, updates


def _scan(body, x: Array, own: list[Tree], repeats: int, prepare):
  """`body` over the stacked variables of blocks that repeat a pattern."""
  length = len(own) // repeats
  ready = [
    ({**variables, "params": prepare(variables["params"])}, *rest)
    for variables, *rest in own
  ]
  stacked = [
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *ready[i::length])
    for i in range(length)
  ]
  return jax.lax.scan(body, x, stacked)
