"""Tasks of texts, known without SeqIO, which takes seconds to import.

Rows of a task whose texts a Python function reads are packed, and compared with
the texts again, without SeqIO or TensorFlow. Such a task is declared here. To
SeqIO it is registered when that is imported, by whomever: until then what is
declared is all there is, and afterwards SeqIO's registries alone are asked.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from basemt_jax import files
from basemt_jax.data import vocabulary as vocabulary_lib

_LIBRARY = "seqio"


@dataclasses.dataclass(frozen=True)
class Feature:
  """As `seqio.Feature`, of one of our vocabularies."""

  vocabulary: vocabulary_lib.Vocabulary
  add_eos: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
  """As much of a `seqio.Task` as rows are packed from.

  Its source gives texts, which are tokenised and nothing else: a
  `tasks.common.PairSource`, or what has its methods.
  """

  name: str
  source: Any
  output_features: Mapping[str, Feature]

  @property
  def splits(self) -> Sequence[str]:
    """As of `seqio.Task`."""
    return self.source.splits

  def num_input_examples(self, split: str) -> int:
    """As of `seqio.Task`."""
    return self.source.num_input_examples(split)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """As much of a `seqio.Mixture`."""

  name: str
  tasks: Sequence[Task]


_declared: dict[str, Task | Mixture] = {}
_waiting: list[Callable[[], Any]] = []


def find(name: str) -> Task | Mixture | None:
  """What is declared by a name; None where SeqIO is there to be asked."""
  return None if _LIBRARY in sys.modules else _declared.get(name)


def declare(thing: Any, register: Callable[[], Any]) -> Any:
  """Declares a `Task` or `Mixture`, and has it registered to SeqIO.

  If SeqIO is there, what `register` returns is returned; else the thing itself,
  and `register` is called when it is imported.
  """
  if _LIBRARY in sys.modules:
    return register()
  _declared[thing.name] = thing
  when_imported(register)
  return thing


def when_imported(call: Callable[[], Any]) -> None:
  """Calls a function now if SeqIO is there, else after its import."""
  if _LIBRARY in sys.modules:
    call()
    return
  _waiting.append(call)
  if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
  """Notices the import of SeqIO; everything is found by the other finders."""

  def find_spec(
    self,
    fullname: str,
    path: Sequence[str] | None,
    target: types.ModuleType | None = None,
  ) -> importlib.machinery.ModuleSpec | None:
    """The library's own spec, whose module then calls what waits."""
    if fullname != _LIBRARY:
      return None
    sys.meta_path.remove(self)
    spec = importlib.util.find_spec(fullname)
    if spec is not None and spec.loader is not None:
      execute = spec.loader.exec_module

      def executed(module: types.ModuleType) -> None:
        with files.native_output_captured():
          execute(module)
        while _waiting:
          _waiting.pop(0)()

      spec.loader.exec_module = executed  # type: ignore[method-assign]
    return spec
