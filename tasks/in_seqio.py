"""What SeqIO's own classes are extended by; importing this imports SeqIO."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import seqio


class ModelFile(seqio.SentencePieceVocabulary):
  """A SentencePiece model that need not exist before it is used."""

  @property
  def sp_model(self) -> bytes:
    """The model's content.

    Raises:
      ValueError: there is no such file.
    """
    self._check()
    return super().sp_model

  @property
  def tokenizer(self) -> Any:
    """The Python tokenizer; raises as `sp_model`."""
    self._check()
    return super().tokenizer

  def _check(self) -> None:
    path = self.sentencepiece_model_file
    if not os.path.exists(path):
      raise ValueError(
        f"the vocabulary {path} does not exist: train it with `basemt vocab "
        f"--module tasks --mixture {pathlib.Path(path).parent.name} "
        f"--output {path}`"
      )
