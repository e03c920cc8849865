"""Greedy and beam search, and sampling, over a `tokens_to_logits` callable.

Axes: B batch (source sentences), K beams, N sequences decoded side by side
(N = B * K, the beams of one source are neighbours), Li source length, L longest
hypothesis, V vocabulary.

The searches see the model as one function, `tokens_to_logits(tokens, cache)`:
tokens [N, 1] int32 and a cache to logits [N, V] and the new cache. A cache is
any pytree. Its leaves of no dimension (the index of the step) belong to all
sequences; every other leaf has leading dimension N, and beam search reorders it
when beams change places. What all beams of a source have in common (the source
and its cross-attention keys and values) is not cache: let the function hold it
with K rows per source (`repeat_for_beams`), and it is never moved.

A hypothesis is a sequence of tokens that ends with EOS (id 1); padding (id 0)
also starts the decoder and is never produced. Where a sequence has reached its
longest length EOS is forced, at the log-probability the model gives it, so that
every hypothesis is a complete one and all scores compare. Where a source has a
prefix, its tokens are forced likewise, and the search goes on after them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from basemt_jax import ranges

Array = jax.Array
Tree = Any
TokensToLogits = Callable[[Array, Tree], tuple[Array, Tree]]

PAD_ID = 0
EOS_ID = 1


class Hypotheses(NamedTuple):
  """The best hypotheses of every source, best first.

  Attributes:
    ids: [B, K, L] int32, each row a hypothesis with its EOS, padded with 0.
    scores: [B, K] float32, log-probability over `length_penalty`; -inf (and
      ids 0) where a source has fewer than K hypotheses, as a tiny vocabulary
      or a length limit of 1 has.
  """

  ids: Array
  scores: Array


def length_penalty(length: Array | int, alpha: float | Array) -> Array:
  """`((5 + length) / 6)^alpha`, which divides a hypothesis' log-probability.

  Wu et al., "Google's Neural Machine Translation System" (arXiv:1609.08144),
  equation 14; T5X's brevity penalty. A length counts EOS.
  """
  return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def repeat_for_beams(tree: Tree, beam_size: int) -> Tree:
  """Repeats every row of every leaf: [B, ...] to [B * beam_size, ...]."""
  if beam_size == 1:
    return tree
  return jax.tree.map(lambda x: jnp.repeat(x, beam_size, axis=0), tree)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How `sample` draws tokens: of all, or of the most probable ones.

  Attributes:
    temperature: Log-probabilities are divided by it: below 1 likely tokens
      become likelier still.
    top_k: Only so many of the most probable tokens (Fan et al.,
      arXiv:1805.04833); 0: all.
    top_p: Only the fewest most probable tokens that have this probability
      together, after temperature and top_k (Holtzman et al.,
      arXiv:1904.09751); 1: all.
    seed: Of all draws.
  """

  temperature: ranges.Positive = 1.0
  top_k: ranges.Steps = 0
  top_p: ranges.Share = 1.0
  seed: ranges.Seed = 0


def greedy_search(
  tokens_to_logits: TokensToLogits,
  cache: Tree,
  limits: Array,
  max_length: int,
  alpha: float | Array = 0.0,
  prefixes: Array | None = None,
) -> Hypotheses:
  """Takes the most probable token at every step, until all sequences end.

  Args:
    tokens_to_logits: See the module; N = B.
    cache: The first step's cache.
    limits: [B] int32, the longest length of each hypothesis, EOS counted, in
      1 to max_length.
    max_length: L, static.
    alpha: Exponent of the length penalty in the scores; it chooses nothing.
    prefixes: [B, L] int32, what each hypothesis has to begin with, shorter
      than its limit and padded with 0; None: nothing.

  Returns:
    Hypotheses with K = 1; equal to `beam_search` with beam_size 1.
  """

  def most_probable(choices: Array, step: Array) -> Array:
    del step
    return jnp.argmax(choices, axis=-1)

  ids, scores = _one_by_one(
    *(tokens_to_logits, cache, limits, max_length, alpha, prefixes),
    most_probable,
  )
  return Hypotheses(ids[:, None], scores[:, None])


def sample(
  tokens_to_logits: TokensToLogits,
  cache: Tree,
  limits: Array,
  max_length: int,
  sampling: Sampling,
  numbers: Array,
  num_samples: int = 1,
  alpha: float | Array = 0.0,
  prefixes: Array | None = None,
) -> Hypotheses:
  """Draws hypotheses independently, token by token.

  What is drawn for a source depends on the seed, the source's number and its
  logits: not on the batch, nor on the devices. K is `num_samples`, N = B * K,
  and `numbers` [B] int32 are the sources'; the rest is as in `greedy_search`.

  Returns:
    Hypotheses in the order in which they were drawn; some may be equal. Scores
    are of the model's own probabilities, whatever the temperature.
  """
  seed = jax.random.key(sampling.seed)
  keys = jax.vmap(
    lambda number: jax.vmap(
      lambda k: jax.random.fold_in(jax.random.fold_in(seed, number), k)
    )(jnp.arange(num_samples))
  )(numbers).reshape(-1)

  def drawn(choices: Array, step: Array) -> Array:
    now = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return _draw(choices / sampling.temperature, now, sampling)

  if prefixes is not None:
    prefixes = jnp.repeat(prefixes, num_samples, axis=0)
  ids, scores = _one_by_one(
    *(tokens_to_logits, cache, jnp.repeat(limits, num_samples), max_length),
    *(alpha, prefixes, drawn),
  )
  shape = (limits.shape[0], num_samples)
  return Hypotheses(ids.reshape(*shape, -1), scores.reshape(shape))


def _draw(logits: Array, keys: Array, sampling: Sampling) -> Array:
  """A token of each row of logits [N, V], by the row's key; int [N]."""
  size = logits.shape[-1]
  tokens = None
  if sampling.top_k or sampling.top_p < 1:
    width = min(sampling.top_k or size, size)
    logits, tokens = jax.lax.top_k(logits, width)
    shares = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    # The most probable one stays, whatever the rounding.
    kept = (before < sampling.top_p).at[:, 0].set(True)
    logits = jnp.where(kept, logits, -jnp.inf)
  chosen = jax.vmap(jax.random.categorical)(keys, logits)
  if tokens is None:
    return chosen
  return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0]


def _one_by_one(
  tokens_to_logits: TokensToLogits,
  cache: Tree,
  limits: Array,
  max_length: int,
  alpha: float | Array,
  prefixes: Array | None,
  choose: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
  """Extends N sequences by a token each until all have ended.

  `choose` takes log-probabilities [N, V], -inf where a token may not follow,
  and the step, and gives tokens [N]; the rest is as in `greedy_search`.

  Returns:
    Ids [N, L] int32 and scores [N] float32.
  """
  limits = jnp.clip(limits, 1, max_length)
  count = limits.shape[0]

  def unfinished(state):
    step, _, _, _, done = state
    return (step < max_length) & ~done.all()

  def advance(state):
    step, ids, log_probs, cache, done = state
    logits, cache = tokens_to_logits(_last_tokens(ids, step), cache)
    choices = _token_log_probs(logits, step, limits, prefixes)
    token = choose(choices, step).astype(jnp.int32)
    gain = jnp.take_along_axis(choices, token[:, None], axis=-1)[:, 0]
    ids = ids.at[:, step].set(jnp.where(done, PAD_ID, token))
    log_probs = jnp.where(done, log_probs, log_probs + gain)
    return step + 1, ids, log_probs, cache, done | (token == EOS_ID)

  ids = jnp.zeros((count, max_length), jnp.int32)
  start = (0, ids, jnp.zeros(count), cache, jnp.zeros(count, bool))
  _, ids, log_probs, _, _ = jax.lax.while_loop(unfinished, advance, start)
  lengths = (ids != PAD_ID).sum(axis=-1)
  return ids, log_probs / length_penalty(lengths, alpha)


class _Beams(NamedTuple):
  """What `beam_search` carries from step to step.

  Attributes:
    step: [] int32, tokens generated so far.
    live_ids: [B, K, L] int32, prefixes without EOS, most probable first.
    live_log_probs: [B, K] float32, -inf where there is no prefix.
    ended: The K best complete hypotheses.
    cache: Of the live prefixes, N = B * K.
    done: [B] bool, sources whose hypotheses stay as they are.
  """

  step: Array | int
  live_ids: Array
  live_log_probs: Array
  ended: Hypotheses
  cache: Tree
  done: Array


def beam_search(
  tokens_to_logits: TokensToLogits,
  cache: Tree,
  limits: Array,
  max_length: int,
  beam_size: int,
  alpha: float | Array = 0.6,
  num_return: int | None = None,
  prefixes: Array | None = None,
) -> Hypotheses:
  """Beam search with length normalisation and exact early stopping.

  Each step extends the K live prefixes of a source by every token and ranks
  the results by log-probability. Those among the K best that end with EOS are
  complete; the K best that do not end live on. A source is done when no
  prefix lives or when no continuation of a prefix can score above the worst
  hypothesis to be returned: bad hypotheses, however many, never stop the
  search for a good one. A beam of 1 is done with its first hypothesis, which
  makes it greedy search.

  A source's result does not depend on the others in the batch. A beam no
  smaller than the number of hypotheses that exist finds the best ones of all.

  Args:
    tokens_to_logits: See the module; N = B * beam_size.
    cache: The first step's cache, of N rows (`repeat_for_beams`).
    limits: [B] int32, the longest length of each source's hypotheses, EOS
      counted, in 1 to max_length.
    max_length: L, static.
    beam_size: K.
    alpha: Exponent of the length penalty: 0 prefers short hypotheses, 1 (about)
      scores by the mean log-probability of a token.
    num_return: Hypotheses to return, by default beam_size. They are the first
      of those that a larger number would return; fewer can stop earlier.
    prefixes: [B, L], see `greedy_search`.

  Returns:
    Hypotheses with num_return in place of K: distinct, best first.

  Raises:
    ValueError: The beam size is not positive, num_return exceeds it, or a leaf
      of the cache has neither N rows nor no dimension.
  """
  num_return = beam_size if num_return is None else num_return
  if not 1 <= num_return <= beam_size:
    raise ValueError(
      f"num_return must be from 1 to the beam size, got {num_return} with beam"
      f" size {beam_size}: ask for fewer hypotheses or a larger beam"
    )
  limits = jnp.clip(limits, 1, max_length)
  batch = limits.shape[0]
  _check_cache(cache, batch, beam_size)
  row_limits = jnp.repeat(limits, beam_size)
  if prefixes is not None:
    prefixes = jnp.repeat(prefixes, beam_size, axis=0)

  def unfinished(beams: _Beams) -> Array:
    return (beams.step < max_length) & ~beams.done.all()

  def advance(beams: _Beams) -> _Beams:
    ids = beams.live_ids.reshape(-1, max_length)
    logits, cache = tokens_to_logits(_last_tokens(ids, beams.step), beams.cache)
    choices = _token_log_probs(logits, beams.step, row_limits, prefixes)
    return _advance(
      beams._replace(cache=cache), choices, limits, alpha, num_return
    )

  ids = jnp.zeros((batch, beam_size, max_length), jnp.int32)
  nothing = jnp.full((batch, beam_size), -jnp.inf)
  start = _Beams(
    step=0,
    live_ids=ids,
    # All prefixes are empty at first: one of them is enough.
    live_log_probs=nothing.at[:, 0].set(0.0),
    ended=Hypotheses(ids, nothing),
    cache=cache,
    done=jnp.zeros(batch, bool),
  )
  ended = jax.lax.while_loop(unfinished, advance, start).ended
  return Hypotheses(ended.ids[:, :num_return], ended.scores[:, :num_return])


def _advance(
  beams: _Beams,
  choices: Array,
  limits: Array,
  alpha: float | Array,
  num_return: int,
) -> _Beams:
  """One step of `beam_search`, whose arguments these are.

  `choices` [N, V] are log-probabilities of the next tokens; the cache already
  holds the last ones.
  """
  step, beam_size = beams.step, beams.live_ids.shape[1]
  beam, token, log_probs = _best_extensions(choices, beams.live_log_probs)
  ids = jnp.take_along_axis(beams.live_ids, beam[:, :, None], axis=1)
  ids = ids.at[:, :, step].set(token)
  ended = _merge_ended(beams, ids, token, log_probs, alpha)
  live_log_probs, kept = jax.lax.top_k(
    jnp.where(token == EOS_ID, -jnp.inf, log_probs), beam_size
  )
  # What a live prefix becomes is longer by at least EOS, no longer than its
  # limit, and no more probable.
  bound = live_log_probs[:, 0] / jnp.maximum(
    length_penalty(step + 2, alpha), length_penalty(limits, alpha)
  )
  worst = ended.scores[:, num_return - 1]
  done = beams.done | (worst >= bound)  # Also where nothing lives: -inf.
  if beam_size == 1:
    done |= worst > -jnp.inf
  return _Beams(
    step=step + 1,
    live_ids=jnp.take_along_axis(ids, kept[:, :, None], axis=1),
    live_log_probs=live_log_probs,
    ended=ended,
    cache=_take_beams(beams.cache, jnp.take_along_axis(beam, kept, axis=1)),
    done=done,
  )


def _last_tokens(ids: Array, step: Array | int) -> Array:
  """The decoder's input [N, 1]: the token before `step` of ids [N, L]."""
  before = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(step - 1, 0), 1, 1)
  return jnp.where(step == 0, PAD_ID, before)


def _token_log_probs(
  logits: Array,
  step: Array | int,
  limits: Array,
  prefixes: Array | None = None,
) -> Array:
  """Log-probabilities [N, V] of tokens that may follow, -inf for others."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  token = jnp.arange(logits.shape[-1])[None]
  allowed = (token != PAD_ID) & (
    (token == EOS_ID) | (step + 1 < limits)[:, None]
  )
  if prefixes is not None:
    forced = jax.lax.dynamic_slice_in_dim(prefixes, step, 1, 1)
    allowed = jnp.where(forced == PAD_ID, allowed, token == forced)
  return jnp.where(allowed, log_probs, -jnp.inf)


def _best_extensions(
  choices: Array, live_log_probs: Array
) -> tuple[Array, Array, Array]:
  """The 2K best one-token extensions: K of them do not end with EOS.

  The best of every beam come first, so that rounding of summed
  log-probabilities cannot change the order within a beam.

  Returns:
    Beam, token (int32) and log-probability (float32), each [B, 2K] (fewer where
    V < 2), most probable first, of choices [B * K, V] and prefixes [B, K].
  """
  batch, beam_size = live_log_probs.shape
  width = min(2 * beam_size, choices.shape[-1])
  gains, tokens = jax.lax.top_k(choices, width)
  sums = live_log_probs[:, :, None] + gains.reshape(batch, beam_size, width)
  log_probs, index = jax.lax.top_k(
    sums.reshape(batch, -1), min(2 * beam_size, beam_size * width)
  )
  token = jnp.take_along_axis(tokens.reshape(batch, -1), index, axis=1)
  return index // width, token.astype(jnp.int32), log_probs


def _merge_ended(
  beams: _Beams, ids: Array, token: Array, log_probs: Array, alpha: Any
) -> Hypotheses:
  """The K best of the complete hypotheses so far and this step's new ones."""
  beam_size = beams.live_log_probs.shape[1]
  is_ended = (token == EOS_ID)[:, :beam_size] & ~beams.done[:, None]
  penalty = length_penalty(beams.step + 1, alpha)
  scores = jnp.where(is_ended, log_probs[:, :beam_size] / penalty, -jnp.inf)
  scores = jnp.concatenate([beams.ended.scores, scores], axis=1)
  ids = jnp.concatenate([beams.ended.ids, ids[:, :beam_size]], axis=1)
  scores, best = jax.lax.top_k(scores, beam_size)
  ids = jnp.take_along_axis(ids, best[:, :, None], axis=1)
  return Hypotheses(
    jnp.where((scores > -jnp.inf)[:, :, None], ids, PAD_ID), scores
  )


def _take_beams(cache: Tree, beam: Array) -> Tree:
  """Reorders the rows of a cache: row k of source b is its row beam[b, k]."""
  batch, beam_size = beam.shape
  if beam_size == 1:
    return cache
  rows = (jnp.arange(batch)[:, None] * beam_size + beam).reshape(-1)
  return jax.tree.map(
    lambda x: x if x.ndim == 0 else jnp.take(x, rows, axis=0), cache
  )


def _check_cache(cache: Tree, batch: int, beam_size: int) -> None:
  rows = batch * beam_size
  for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
    shape = jnp.shape(leaf)
    if shape and shape[0] != rows:
      raise ValueError(
        f"cache leaf {jax.tree_util.keystr(path)} has shape {shape}, but beam"
        f" search over {batch} sources with beam size {beam_size} needs"
        f" {rows} rows: make the cache for {rows} sequences, and keep what"
        " beams share outside of it"
      )
