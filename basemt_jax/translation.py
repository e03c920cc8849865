"""Translation of many sentences: buckets of like length, compiled once each.

Axes: B batch (source sentences), K beams, N = B * K sequences decoded side by
side, Li source length, V vocabulary.
"""

import collections
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from basemt_jax import decoding, ranges

Array = jax.Array
Tree = Any

# Rows of a batch for few sources.
_FEW = (1, 8)


class TranslationModel(Protocol):
  """The three functions of a model that translation needs.

  `model.Transformer` has them. `variables` are the model's collections, such
  as {'params': params}; a memory is a tree of arrays with a row per sequence.
  """

  def encode_tokens(self, variables: Tree, encoder_input_tokens: Array) -> Tree:
    """Sources [B, Li] int32 to what the decoder needs of them, B rows."""

  def init_cache(
    self, variables: Tree, memory: Tree, max_decode_length: int
  ) -> Tree:
    """An empty cache for the sequences of a memory."""

  def decode_step(
    self, variables: Tree, memory: Tree, cache: Tree, tokens: Array
  ) -> tuple[Array, Tree]:
    """Tokens [N, 1] int32 and cache to logits [N, V] and the new cache."""


@dataclasses.dataclass(frozen=True)
class SearchOptions:
  """How to translate.

  Attributes:
    beam_size: K; 1 is greedy search.
    num_return: Hypotheses per source, at most beam_size.
    alpha: Exponent of the length penalty.
    batch_size: Sources translated side by side, at most.
    max_source_length: Longer sources are cut (tokens, EOS counted).
    max_target_length: The longest hypothesis (tokens, EOS counted).
    length_ratio: A hypothesis has at most length_ratio * source length +
      length_offset tokens, so that one that never ends costs little.
    length_offset: See length_ratio.
    smallest_bucket: Sources are padded to this length or the next of its
      doublings. The search is compiled once for each that occurs; one that a
      single batch of a call would need shares the next longer one's program.
    sampling: Draw num_return translations of each source, rather than search.
  """

  beam_size: ranges.Count = 1
  num_return: ranges.Count = 1
  alpha: ranges.NotNegative = 0.6
  batch_size: ranges.Count = 64
  max_source_length: ranges.Count = 256
  max_target_length: ranges.Count = 256
  length_ratio: ranges.NotNegative = 3.0
  length_offset: ranges.Steps = 16
  smallest_bucket: ranges.Count = 16
  sampling: decoding.Sampling | None = None

  def __post_init__(self):
    """Checks the numbers against each other."""
    if not self.sampling and not 1 <= self.num_return <= self.beam_size:
      raise ValueError(
        f"num_return must be from 1 to beam_size, got num_return"
        f" {self.num_return} with beam_size {self.beam_size}: ask for fewer"
        " hypotheses or a larger beam"
      )

  @property
  def sequences(self) -> int:
    """Sequences that are decoded side by side for each source, K."""
    return self.num_return if self.sampling else self.beam_size

  def bucket(self, length: int) -> int:
    """The length that a source of `length` tokens is padded to."""
    doublings = max(0, math.ceil(math.log2(length / self.smallest_bucket)))
    return min(self.smallest_bucket << doublings, self.max_source_length)

  def limit(self, length: Any) -> Any:
    """The longest hypothesis of sources of `length` (int or array) tokens."""
    if isinstance(length, int):
      limit = math.ceil(self.length_ratio * length) + self.length_offset
      return max(1, min(limit, self.max_target_length))
    limits = jnp.ceil(self.length_ratio * length).astype(jnp.int32)
    return jnp.clip(limits + self.length_offset, 1, self.max_target_length)


class Hypothesis(NamedTuple):
  """A translation.

  Attributes:
    score: See `decoding.Hypotheses`.
    ids: Its tokens without EOS.
  """

  score: float
  ids: tuple[int, ...]


class _Sentence(NamedTuple):
  """A source, its number, and what its translation begins with."""

  ids: tuple[int, ...]
  number: int
  prefix: tuple[int, ...]


class Translator:
  """Translates lists of sentences with one model, in batches of like length.

  The compiled searches belong to the translator: keep it, and assign
  `variables` anew when the parameters have changed.

  Example:
    translator = Translator(transformer, {'params': params})
    best = [nbest[0].ids for nbest in translator.translate(source_ids)]

  Attributes:
    variables: The model's collections, such as {'params': params}.
    options: The SearchOptions.
  """

  def __init__(
    self,
    model: TranslationModel,
    variables: Tree,
    options: SearchOptions | None = None,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    each_alone: bool = False,
  ):
    """Makes a translator.

    Args:
      model: A TranslationModel.
      variables: Its collections, placed on devices as the caller likes.
      options: How to search; the defaults search greedily.
      batch_sharding: Where to put the batch's rows; needed where `variables`
        are spread over several devices. Batches are made large enough to
        give each device as many rows. Where the devices are of several
        processes, all of them translate the same sentences together.
      each_alone: Run the program of one device on each, for its rows, rather
        than one that is divided among them: how many there are then cannot
        show in a rounding. For a model that knows no mesh.
    """
    self.variables = variables
    self.options = options or SearchOptions()
    self._model = model
    self._batch_sharding = batch_sharding
    self._ways = batch_sharding.num_devices if batch_sharding else 1
    # Every process gets all results, so that all end with the same.
    everywhere = (
      jax.sharding.NamedSharding(
        batch_sharding.mesh, jax.sharding.PartitionSpec()
      )
      if batch_sharding
      else None
    )
    found: Callable[..., decoding.Hypotheses]
    found = functools.partial(search, model, options=self.options)
    if each_alone and batch_sharding:
      found = _each_alone(found, batch_sharding)
    self._jitted_search = jax.jit(
      found,
      static_argnames="max_length",
      out_shardings=everywhere,
    )

  def translate(
    self,
    sources: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    numbers: Sequence[int] | None = None,
    whole_batches: bool = False,
  ) -> list[list[Hypothesis]]:
    """Translates sources, whatever their number, lengths and order.

    Args:
      sources: Token ids of each, with or without EOS at the end. A source
        without any other token translates to the empty hypothesis.
      progress: Called with (sources done, all sources) after every batch.
      prefixes: What the translation of each begins with; its tokens come on
        top of the longest hypothesis.
      numbers: Of the sources, which decide what is sampled; by default their
        places in the list.
      whole_batches: Give few sources as many rows as many have, so that their
        number does not show in the rounding of their scores.

    Returns:
      For each source, in the order given, up to num_return hypotheses, best
      first; samples as they were drawn.

    Raises:
      ValueError: Scores that are not finite, or a prefix that is too long.
    """
    read = [
      _Sentence(_strip(source), number, _strip(prefix))
      for source, number, prefix in zip(
        sources,
        range(len(sources)) if numbers is None else numbers,
        prefixes or [()] * len(sources),
        strict=True,
      )
    ]
    self._warn_of_long([sentence.ids for sentence in read])
    self._check_prefixes(read)
    order = sorted(
      (i for i, sentence in enumerate(read) if sentence.ids),
      key=lambda i: len(read[i].ids),
    )
    results = [[Hypothesis(0.0, ())] for _ in read]
    size = self._rows(len(order), whole_batches)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    lengths = self._lengths([len(read[b[-1]].ids) + 1 for b in batches])
    jobs = [
      ([read[i] for i in batch], size, length)
      for batch, length in zip(batches, lengths, strict=True)
    ]
    done = 0
    for place, found in self._translate_batches(jobs):
      for i, hypotheses in zip(batches[place], found, strict=True):
        results[i] = hypotheses
      done += len(batches[place])
      if progress:
        progress(done, len(order))
    return results

  def _translate_batches(
    self, jobs: Sequence[tuple[Sequence["_Sentence"], int, int]]
  ) -> Iterator[tuple[int, list[list[Hypothesis]]]]:
    """Places in `jobs`, and what `_translate_batch` makes of each.

    On a CPU two at a time: a search is a loop of small operations, which two
    cores make hardly shorter than one, and so is its compilation. A batch of
    every length comes first, so that no search is compiled twice.
    """

    def translated(place: int) -> tuple[int, list[list[Hypothesis]]]:
      return place, self._translate_batch(*jobs[place])

    places = range(len(jobs))
    if jax.default_backend() != "cpu" or self._ways > 1:
      yield from map(translated, places)
      return
    first = {jobs[place][2]: place for place in reversed(places)}
    with futures.ThreadPoolExecutor(2) as pool:
      yield from pool.map(translated, first.values())
      yield from pool.map(translated, sorted({*places} - {*first.values()}))

  def _rows(self, count: int, whole_batches: bool) -> int:
    """Rows of the batches that translate so many sources.

    A few do not need a whole batch, but each size is a program of its own.
    """
    most = self.options.batch_size
    fits = next((n for n in _FEW if count <= n < most), most)
    if whole_batches:
      fits = most
    return math.ceil(fits / self._ways) * self._ways

  def _lengths(self, longest: Sequence[int]) -> list[int]:
    """The length that each batch is padded to; batches rise in length."""
    lengths = [
      self.options.bucket(min(n, self.options.max_source_length))
      for n in longest
    ]
    counts = collections.Counter(lengths)
    for i in reversed(range(len(lengths) - 1)):
      if counts[lengths[i]] == 1:  # As long to compile as to run.
        lengths[i] = lengths[i + 1]
    return lengths

  def _batch(
    self, sentences: Sequence["_Sentence"], rows: int, length: int
  ) -> tuple[int, dict[str, Any]]:
    """The longest hypothesis, and arrays of so many rows for `search`."""
    options = self.options
    cut = [list(x.ids[: options.max_source_length - 1]) for x in sentences]
    longest_prefix = max(len(sentence.prefix) for sentence in sentences)
    longest = options.limit(length)
    if longest_prefix:
      longest += max(longest_prefix, options.bucket(longest_prefix))
      longest = min(longest, options.max_target_length)
    # Rows without a source end at their first token and are not returned.
    batch: dict[str, Any] = {
      "tokens": np.zeros((rows, length), np.int32),
      "limits": np.ones(rows, np.int32),
    }
    if options.sampling:
      batch["numbers"] = np.zeros(rows, np.int32)
      batch["numbers"][: len(cut)] = [s.number for s in sentences]
    if longest_prefix:
      batch["prefixes"] = np.zeros((rows, longest), np.int32)
    for row, (ids, sentence) in enumerate(zip(cut, sentences, strict=True)):
      batch["tokens"][row, : len(ids) + 1] = [*ids, decoding.EOS_ID]
      prefix = sentence.prefix
      limit = options.limit(len(ids) + 1) + len(prefix)
      batch["limits"][row] = min(limit, options.max_target_length)
      if prefix:
        batch["prefixes"][row, : len(prefix)] = prefix
    return longest, batch

  def _translate_batch(
    self, sentences: Sequence["_Sentence"], rows: int, length: int
  ) -> list[list[Hypothesis]]:
    longest, batch = self._batch(sentences, rows, length)
    if self._batch_sharding is not None:
      batch = {
        name: jax.make_array_from_callback(
          x.shape, self._batch_sharding, x.__getitem__
        )
        for name, x in batch.items()
      }
    found = jax.device_get(
      self._jitted_search(self.variables, **batch, max_length=longest)
    )
    results = []
    for row in range(len(sentences)):
      hypotheses = [
        Hypothesis(float(score), _strip(ids))
        for score, ids in zip(found.scores[row], found.ids[row], strict=True)
        if score > -np.inf
      ]
      if not hypotheses:
        raise ValueError(
          "the model gives no translation, because its scores are not finite: "
          "training has diverged or the parameters are damaged; use another "
          "checkpoint"
        )
      results.append(hypotheses)
    return results

  def _check_prefixes(self, sentences: Sequence["_Sentence"]) -> None:
    longest = self.options.max_target_length
    for place, sentence in enumerate(sentences, start=1):
      if len(sentence.prefix) >= longest:
        raise ValueError(
          f"the prefix of sentence {place} has {len(sentence.prefix)} tokens, "
          f"and a translation at most {longest} with its end: give a shorter "
          "prefix, or raise translation.SearchOptions.max_target_length"
        )

  def _warn_of_long(self, sources: Sequence[Sequence[int]]) -> None:
    longest = self.options.max_source_length
    lengths = [len(ids) + 1 for ids in sources if len(ids) + 1 > longest]
    if lengths:
      warnings.warn(
        f"{len(lengths)} of {len(sources)} sources are longer than"
        f" max_source_length {longest} (the longest has {max(lengths)}"
        " tokens): the rest of them is not translated",
        stacklevel=3,
      )


def search(
  model: TranslationModel,
  variables: Tree,
  tokens: Array,
  limits: Array,
  max_length: int,
  options: SearchOptions,
  numbers: Array | None = None,
  prefixes: Array | None = None,
) -> decoding.Hypotheses:
  """Translations of one batch; pure, so it can be compiled.

  Of sources [B, Li] int32, with EOS, padded with 0, whose longest hypotheses
  are `limits` [B] int32, and of all L, static. For sampling their numbers [B]
  int32 count, by default their places; prefixes [B, L] are as in
  `decoding.greedy_search`.

  Returns:
    See `decoding.beam_search` and `decoding.sample`.
  """
  memory = decoding.repeat_for_beams(
    model.encode_tokens(variables, tokens), options.sequences
  )
  cache = model.init_cache(variables, memory, max_length)

  def tokens_to_logits(tokens: Array, cache: Tree) -> tuple[Array, Tree]:
    return model.decode_step(variables, memory, cache, tokens)

  common: tuple[decoding.TokensToLogits, Tree, Array, int]
  common = (tokens_to_logits, cache, limits, max_length)
  if options.sampling:
    if numbers is None:
      numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    return decoding.sample(
      *common,
      options.sampling,
      numbers,
      options.num_return,
      options.alpha,
      prefixes,
    )
  if options.beam_size == 1:
    return decoding.greedy_search(*common, options.alpha, prefixes)
  return decoding.beam_search(
    *common, options.beam_size, options.alpha, options.num_return, prefixes
  )


def _each_alone(
  found: Callable[..., decoding.Hypotheses],
  sharding: jax.sharding.NamedSharding,
) -> Callable[..., decoding.Hypotheses]:
  """`search` on every device for the rows that it has."""

  def run(variables: Tree, max_length: int, **batch: Array) -> Any:
    return jax.shard_map(
      lambda variables, batch: found(variables, **batch, max_length=max_length),
      mesh=sharding.mesh,
      in_specs=(jax.sharding.PartitionSpec(), sharding.spec),
      out_specs=sharding.spec,
      check_vma=False,
    )(variables, batch)

  return run


def _strip(ids: Sequence[int]) -> tuple[int, ...]:
  """The ids before the first EOS, without padding."""
  ids = [int(i) for i in ids]
  if decoding.EOS_ID in ids:
    ids = ids[: ids.index(decoding.EOS_ID)]
  return tuple(i for i in ids if i != decoding.PAD_ID)
