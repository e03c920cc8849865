"""Initial parameters without compiling a network: recorded, then drawn.

To initialise a network is to draw hundreds of arrays of a few kinds. As one
program that takes a compiler longer than a training step. Here the network is
only traced, to record which initialiser makes which parameter, and each is
drawn by a small program that all parameters of its kind and shape share. The
values are those of `Module.init`, whatever the devices.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import scope as flax_scope

Array = jax.Array
Tree = Any
Path = tuple[str, ...]

_recorded: contextvars.ContextVar[list[tuple[Array, Callable]] | None] = (
  contextvars.ContextVar("recorded", default=None)
)


@dataclasses.dataclass(frozen=True)
class Initializer:
  """An initialiser that can be recorded; equal ones draw alike.

  Attributes:
    draw: (key, shape, dtype) -> array; the same object for the same kind.
  """

  draw: Callable[..., Array]

  def __call__(self, key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    """Draws; while a network is recorded, stands in for it."""
    found = _recorded.get()
    if found is None:
      return self.draw(key, shape, dtype)
    value = jnp.zeros(shape, dtype)
    found.append((value, self.draw))
    return value


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Array, Callable]]]:
  """Keeps what initialisers in the block stand in for; they give zeros."""
  found: list[tuple[Array, Callable]] = []
  token = _recorded.set(found)
  try:
    yield found
  finally:
    _recorded.reset(token)


@dataclasses.dataclass(frozen=True)
class Draw:
  """How one parameter comes to be.

  Attributes:
    draw: See `Initializer`.
    place: What its key depends on: the path of its module, and its number
      among that module's parameters, from 1.
  """

  draw: Callable[..., Array]
  place: tuple[Any, ...]

  def key(self, key: Array) -> Array:
    """The parameter's own key, as flax derives it from that of `init`."""
    return flax_scope.LazyRng.create(key, *self.place).as_jax_rng()


def draws_of(
  found: list[tuple[Array, Callable]], params: Tree
) -> dict[Path, Draw] | None:
  """How every parameter of `Module.init` comes to be, by path.

  `found` is what `recording` kept in the same trace. None if some parameters
  have another initialiser than `Initializer`, so that `Module.init` must draw
  all.
  """
  order = {id(value): i for i, (value, _) in enumerate(found)}
  paths = {
    order[id(leaf)]: path
    for path, leaf in traverse_util.flatten_dict(params).items()
    if id(leaf) in order
  }
  if len(paths) < len(jax.tree.leaves(params)):
    return None
  count: collections.Counter[Path] = collections.Counter()
  draws = {}
  for i, path in sorted(paths.items()):
    count[path[:-1]] += 1
    draws[path] = Draw(found[i][1], (*path[:-1], count[path[:-1]]))
  return draws


def drawn(
  draws: Mapping[Path, Draw], shapes: Tree, shardings: Tree, key: Array
) -> dict[Path, Array]:
  """The parameters that `draws` has, for the key of an initialisation.

  Shapes, types and shardings are trees of all parameters.
  """
  shapes, shardings = map(traverse_util.flatten_dict, (shapes, shardings))

  def kind(path: Path) -> tuple[Any, ...]:
    shape = shapes[path]
    return draws[path].draw, shape.shape, shape.dtype, shardings[path]

  def compiled(kind: tuple[Any, ...]) -> Callable[[Array], Array]:
    draw, shape, dtype, sharding = kind
    function = functools.partial(draw, shape=shape, dtype=dtype)
    return jax.jit(function, out_shardings=sharding).lower(key).compile()

  kinds = list(dict.fromkeys(map(kind, draws)))
  with futures.ThreadPoolExecutor() as pool:
    programs = dict(zip(kinds, pool.map(compiled, kinds), strict=True))
  return {path: programs[kind(path)](draws[path].key(key)) for path in draws}
