"""Numbers and texts with the range that fits, for annotations of settings.

`commands/checks.py` compares what a configuration binds with these, before
anything is made of it; in Python code they are plain `int`, `float`, `str`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import annotated_types as at

# JAX counts steps, rows and indices in int32.
_END = 2**31

Count = Annotated[int, at.Ge(1), at.Lt(_END)]
Steps = Annotated[int, at.Ge(0), at.Lt(_END)]  # 0: none, or at once.
Seed = Annotated[int, at.Ge(0), at.Lt(_END)]

Positive = Annotated[float, at.Gt(0), at.Lt(math.inf)]
NotNegative = Annotated[float, at.Ge(0), at.Lt(math.inf)]
Rate = Annotated[float, at.Gt(0), at.Le(100)]  # Of learning.
Decay = Annotated[float, at.Ge(0), at.Le(100)]  # Of weights.
Temperature = Annotated[float, at.Gt(0)]  # Infinite: uniform sampling.
Share = Annotated[float, at.Ge(0), at.Le(1)]
Fraction = Annotated[float, at.Ge(0), at.Lt(1)]  # Less than all.

Text = Annotated[str, at.MinLen(1)]
Temperatures = Annotated[Sequence[Temperature], at.MinLen(1)]
Sizes = Annotated[Mapping[str, Annotated[int, at.Ge(0)]], at.MinLen(1)]

Weights = Mapping[str, NotNegative]


def of_inputs_and_targets(lengths: Mapping[str, int]) -> bool:
  """Whether both sides have a length, and nothing else has."""
  return set(lengths) == {"inputs", "targets"}


FeatureLengths = Annotated[
  Mapping[str, Count], at.Predicate(of_inputs_and_targets)
]
# A leading ~ is the home directory, wherever a configuration names a path.
Path = Annotated[str, at.MinLen(1), "path"]


def check_choices(instance: Any, **kinds: Any) -> None:
  """Refuses fields whose value is none of their `Literal`'s.

  Most ranges are compared where a configuration is read; a choice is compared
  for callers in Python too, because a name that nobody knows does no harm that
  shows.

  Raises:
    ValueError: With the field, what was found, and the choices.
  """
  for name, kind in kinds.items():
    value = getattr(instance, name)
    if value not in get_args(kind):
      raise ValueError(
        f"{type(instance).__name__}.{name} is {value!r}; it must be one of "
        f"{', '.join(get_args(kind))}"
      )
