"""How probable a model finds given translations.

Axes: B batch (sentence pairs), Li source length, Lt target length.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from basemt_jax import decoding, layers, losses, translation
from basemt_jax import model as model_lib

Array = jax.Array
Tree = Any


class Score(NamedTuple):
  """Log-probabilities (nats) of a target's tokens, its EOS included.

  Attributes:
    token_log_probs: One for each token.
  """

  token_log_probs: tuple[float, ...]

  @property
  def total(self) -> float:
    """The log-probability of the whole target."""
    return math.fsum(self.token_log_probs)

  @property
  def per_token(self) -> float:
    """The mean over the tokens."""
    return self.total / len(self.token_log_probs)

  def normalised(self, alpha: float) -> float:
    """What a search with this length penalty ranks hypotheses by."""
    length = len(self.token_log_probs)
    return self.total / float(decoding.length_penalty(length, alpha))


class Scorer:
  """Scores lists of sentence pairs with one model, in batches of like length.

  Attributes:
    options: Of which batch size, buckets and longest lengths count.
  """

  def __init__(
    self,
    model: model_lib.Transformer,
    variables: Tree,
    options: translation.SearchOptions,
    batch_sharding: jax.sharding.NamedSharding | None = None,
  ):
    """Makes a scorer; arguments as of `translation.Translator`."""
    self.options = options
    self._variables = variables
    self._batch_sharding = batch_sharding
    ways = batch_sharding.num_devices if batch_sharding else 1
    self._batch_size = math.ceil(options.batch_size / ways) * ways
    self._log_probs = jax.jit(functools.partial(token_log_probs, model))

  def too_long(self, source: Sequence[int], target: Sequence[int]) -> str:
    """Why a pair, without EOS, cannot be scored as a whole; '' if it can."""
    options = self.options
    for ids, longest, side in (
      (source, options.max_source_length, "source"),
      (target, options.max_target_length, "target"),
    ):
      if len(ids) >= longest:
        return f"{side} longer than {longest} tokens"
    return ""

  def score(
    self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
  ) -> list[Score]:
    """Scores of pairs of token ids, tagged, without EOS; in their order.

    Raises:
      ValueError: A pair is too long; see `too_long`.
    """
    for source, target in zip(sources, targets, strict=True):
      if why := self.too_long(source, target):
        raise ValueError(f"a pair cannot be scored: {why}")
    order = sorted(
      range(len(sources)), key=lambda i: (len(sources[i]), len(targets[i]))
    )
    results = [Score(())] * len(sources)
    for start in range(0, len(order), self._batch_size):
      chosen = order[start : start + self._batch_size]
      log_probs = self._score_batch(
        self._padded([sources[i] for i in chosen]),
        self._padded([targets[i] for i in chosen]),
      )
      for i, row in zip(chosen, log_probs, strict=False):
        end = len(targets[i]) + 1
        results[i] = Score(tuple(row[:end].tolist()))
    return results

  def _padded(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Sequences with EOS as rows of a bucket's length; more rows are empty."""
    longest = max(len(ids) + 1 for ids in sequences)
    smallest = self.options.smallest_bucket
    length = smallest << max(0, math.ceil(math.log2(longest / smallest)))
    tokens = np.zeros((self._batch_size, length), np.int32)
    for row, ids in zip(tokens, sequences, strict=False):
      row[: len(ids) + 1] = [*ids, decoding.EOS_ID]
    return tokens

  def _score_batch(self, sources: np.ndarray, targets: np.ndarray) -> Any:
    tokens: Any = (sources, targets)
    if self._batch_sharding is not None:
      tokens = jax.device_put(tokens, self._batch_sharding)
    return jax.device_get(self._log_probs(self._variables, *tokens))


def token_log_probs(
  model: model_lib.Transformer, variables: Tree, sources: Array, targets: Array
) -> Array:
  """Log-probability of every target token, given those before it.

  Of sources [B, Li] and targets [B, Lt], int32 with EOS, padded with 0: [B, Lt]
  float32; what stands at padding means nothing.
  """
  # The attention that translates, so that scores are those of the search.
  attention = layers.without_fusion(model.config.attention)
  config = dataclasses.replace(model.config, attention=attention)
  shifted = jax.numpy.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  logits, _ = model_lib.forward(
    model.clone(config=config),
    variables,
    {
      "encoder_input_tokens": sources,
      "decoder_input_tokens": shifted,
      "decoder_target_tokens": targets,
    },
    train=False,
  )
  return -losses.token_losses(logits, targets)[1]
