"""Balanced assignment of tokens to experts: scores in, experts out.

Axes: S tokens of a group, E experts, `C = ceil(S / E)` slots of an expert,
W tokens in an expert's repair window.

The problem (BASE layers, Lewis et al. 2021, arXiv:2103.16716, section 3.1):

  maximise sum_t a[t, x_t]  over x  with at most C tokens for every expert.

Its linear-programming dual has one price per expert. At the optimal prices
every token sits at an expert that maximises a[t, e] - p[e], and few tokens are
indifferent. The solver therefore

1. finds prices by a fixed number of Newton steps on the dual, smoothed with a
   temperature that falls from step to step (optimal transport with entropic
   regularisation, Cuturi 2013, arXiv:1306.0895), started from the previous
   solution's prices where they are given;
2. lets every token choose, with one sort that orders the tokens of an expert
   by how much they would lose elsewhere;
3. moves the few tokens that are too many (`repair`);
4. gives what is still left, and padding, the free slots in order.

All trip counts are static: no host synchronisation, and work is bounded. After
step 4 the slots are a one-to-one map of tokens whatever the scores were.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from basemt_jax import repair
from basemt_jax.kernels import assignment_kernels

# Temperatures are in units of the scores' spread. Warm prices are off by the
# drift between batches and by sampling noise, about a tenth of the spread; more
# where batches draw their languages anew, so that 6 warm steps left a trained
# layer at a quality of 0.988.
_COLD_TEMPERATURE = 1.0
_WARM_TEMPERATURE = 0.2
_FINAL_TEMPERATURE = 0.00125
_COLD_STEPS = 12
_WARM_STEPS = 8

# The Newton system's inverse is a product of this many factors (I + M^(2^i)).
_NUM_DOUBLINGS = 6

# Noise that splits equal tokens, in final temperatures. More of it leaves more
# tokens to repair.
_NOISE = 0.3

# Repair: at least and at most so many tokens of an expert that may move, fewer
# for more experts; rounds.
_MIN_WINDOW, _MAX_WINDOW = 16, 64
_WINDOW_TOKENS = 512
_REPAIR_ROUNDS = 8

# Bids take the place of most rounds of repair above so many experts with so
# many slots; at most so many tokens bid.
_BIDS_ABOVE_EXPERTS, _BIDS_FROM_SLOTS = 32, 64
_BIDDERS_PER_EXPERT = 4

# Finite stand-ins for infinities; a million times more still fits float32.
_HUGE = 1e30
_TINY = 1e-30


class Assignment(NamedTuple):
  """A balanced assignment of S tokens to E experts.

  Attributes:
    expert: [S] int32, the expert of each token, padding included.
    slot: [S] int32, unique, in [0, E * C); `expert == slot // C`.
    prices: [E] float32, mean zero, in the units of the affinities; the dual
      solution, to start the next, similar problem from.
  """

  expert: jax.Array
  slot: jax.Array
  prices: jax.Array


class _Scores(NamedTuple):
  """Scores, centred by token and by expert and divided by their spread."""

  values: jax.Array  # [E, S], a token's maximum is 0
  offset: jax.Array  # [E], subtracted from every token, in the units of input
  spread: jax.Array  # [], what the rest was divided by


def greedy_assignment(
  affinities: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """Gives every token its favourite expert, whatever the load.

  Args:
    affinities: [S, E] scores; NaN counts as the lowest score.
    mask: [S] bool, False on padding; padding gets expert 0.

  Returns:
    [S] int32; the first of equal experts.
  """
  values = _finite(affinities)
  expert = jnp.argmax(values, axis=-1).astype(jnp.int32)
  return expert if mask is None else jnp.where(mask, expert, 0)


def balanced_assignment(
  affinities: jax.Array,
  mask: jax.Array | None = None,
  prices: jax.Array | None = None,
  *,
  num_steps: int | None = None,
) -> Assignment:
  """Assigns tokens to experts, at most C = ceil(S / E) real ones to each.

  Non-finite scores are defined: NaN and -inf count as -1e30, +inf as 1e30, and
  finite scores beyond are cut off there. A constant added to a row, or a
  positive factor on all scores, changes nothing (up to float rounding).

  Args:
    affinities: [S, E] scores, higher is better; computed in float32.
    mask: [S] bool, False on padding. Padding takes the slots that are left; its
      scores are never read.
    prices: [E] prices of a previous, similar problem. All zero counts as not
      known yet.
    num_steps: Newton steps; more is slower and better. By default 12, or 8
      where prices are given.

  Returns:
    The assignment. With S a multiple of E and no padding, every expert has
    exactly C tokens.

  Example:
    >>> scores = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    >>> jax.jit(balanced_assignment)(scores).expert.tolist()
    [0, 0, 1, 1]
  """
  num_tokens, num_experts = affinities.shape
  values = _finite(affinities)
  if mask is None:
    mask = jnp.ones(num_tokens, bool)
  # Experts first: reductions over experts then run along whole vectors.
  scores = _normalise(jnp.where(mask[None], values.T, 0.0), mask)
  if prices is None:
    # Varies over devices as the scores do, which shard_map wants of a carry.
    start = jnp.zeros_like(scores.offset) * scores.offset
    first_temperature = _COLD_TEMPERATURE
    num_steps = _COLD_STEPS if num_steps is None else num_steps
  else:
    known = jnp.where(jnp.isfinite(prices), prices, 0.0).astype(jnp.float32)
    start = jnp.clip((known - scores.offset) / scores.spread, -1e6, 1e6)
    # Zero prices mean "none yet"; the columns' means are the better guess.
    start = jnp.where(jnp.any(known != 0), start, 0.0)
    first_temperature = _WARM_TEMPERATURE
    num_steps = _WARM_STEPS if num_steps is None else num_steps
  dual = _solve_dual(scores, mask, start, first_temperature, num_steps)
  slot = _balance(
    scores.values - dual[:, None], mask, dual + scores.offset / scores.spread
  )
  new_prices = (dual - jnp.mean(dual)) * scores.spread + scores.offset
  new_prices = new_prices - jnp.mean(new_prices)
  capacity = -(-num_tokens // num_experts)
  return Assignment(
    expert=slot // capacity,
    slot=slot,
    prices=new_prices - jnp.mean(new_prices),
  )


def _finite(affinities: jax.Array) -> jax.Array:
  """Scores as float32 in [-1e30, 1e30], NaN lowest."""
  values = jnp.asarray(affinities, jnp.float32)
  values = jnp.where(jnp.isnan(values), -_HUGE, values)
  return jnp.clip(values, -_HUGE, _HUGE)


def _typical(row_values: jax.Array, mask: jax.Array) -> jax.Array:
  """Geometric mean of masked, positive values [S]: robust to outliers."""
  used = mask & (row_values > _TINY)
  logs = jnp.where(used, jnp.log(jnp.maximum(row_values, _TINY)), 0.0)
  count = jnp.sum(used)
  mean = jnp.exp(jnp.sum(logs) / jnp.maximum(count, 1))
  return jnp.where(count > 0, mean, 1.0)


def _normalise(values: jax.Array, mask: jax.Array) -> _Scores:
  """Centres tokens by their maximum, experts by a robust mean; unit spread.

  Of finite scores [E, S] and mask [S]. Subtracting an expert's mean changes the
  prices only. It matters because features with a large common part give every
  expert an offset that dwarfs what tells the tokens apart.
  """
  inverse_experts = 1.0 / values.shape[0]
  values = values - jnp.max(values, axis=0, keepdims=True)
  outer = _typical(-jnp.sum(values * inverse_experts, axis=0), mask)
  clipped = jnp.maximum(values, -16.0 * outer)
  weights = mask.astype(jnp.float32)
  weights = weights / jnp.maximum(jnp.sum(weights), 1.0)
  offset = jnp.dot(clipped, weights, precision=lax.Precision.HIGHEST)
  values = values - offset[:, None]
  values = values - jnp.max(values, axis=0, keepdims=True)
  spread = _typical(-jnp.sum(values * inverse_experts, axis=0), mask)
  values = jnp.maximum(values / spread, -1e6)
  return _Scores(jnp.where(mask[None], values, 0.0), offset, spread)


def _solve_dual(
  scores: _Scores,
  mask: jax.Array,
  start: jax.Array,
  first_temperature: float,
  num_steps: int,
) -> jax.Array:
  """Prices [E] at which the softened loads are equal, in normalised units."""
  num_experts, num_tokens = scores.values.shape
  capacity = -(-num_tokens // num_experts)
  weights = mask.astype(jnp.float32)
  # Free slots act as tokens that like all experts equally, so that an expert
  # with room to spare never costs more than another one with room.
  free_weight = num_experts * capacity - jnp.sum(weights)
  free_values = -scores.offset / scores.spread
  free_values = jnp.clip(free_values - jnp.max(free_values), -1e6, 0.0)
  falling = max(num_steps - 2, 1)  # the last two steps are at the end value
  ratio = _FINAL_TEMPERATURE / first_temperature

  def step(newton_step, i, prices):
    # In float32 also where 64 bits are on.
    fraction = jnp.minimum(jnp.float32(i) / falling, 1.0)
    temperature = first_temperature * jnp.power(ratio, fraction)
    return newton_step(
      scores.values,
      weights,
      free_values,
      free_weight,
      prices,
      temperature,
      capacity=capacity,
    )

  if not assignment_kernels.is_supported(scores.values):
    return lax.fori_loop(
      0, num_steps, functools.partial(step, _newton_step), start
    )
  newton_step = functools.partial(
    assignment_kernels.newton_step, num_doublings=_NUM_DOUBLINGS
  )
  prices = start
  for i in range(num_steps):  # A loop would cost more launches than a step.
    prices = step(newton_step, i, prices)
  return prices


def _newton_step(
  values: jax.Array,
  weights: jax.Array,
  free_values: jax.Array,
  free_weight: jax.Array,
  prices: jax.Array,
  temperature: jax.Array,
  capacity: int,
) -> jax.Array:
  """One damped Newton step on the softened dual.

  With shares P = softmax((a - p) / T) and loads n = sum_t P_t, Sinkhorn's step
  is T log(n / C), and Newton's is its image under (I - M)^-1, M = P'P / n: a
  row-stochastic matrix whose eigenvalue 1 (all prices move together) is
  projected out. The inverse is the Neumann series (I + M)(I + M^2)(I + M^4)...
  cut off: a few [E, E] products, and naturally damped where M is close to I.
  """
  shares = jax.nn.softmax((values - prices[:, None]) / temperature, axis=0)
  free_shares = jax.nn.softmax((free_values - prices) / temperature)
  products = jnp.dot(
    shares * weights[None], shares.T, precision=lax.Precision.HIGHEST
  )
  products += free_weight * jnp.outer(free_shares, free_shares)
  loads = jnp.sum(products, axis=1)  # as a token's shares sum to one
  safe_loads = jnp.maximum(loads, _TINY)
  matrix = products / safe_loads[:, None]
  residual = jnp.log(safe_loads / capacity)
  direction = residual - jnp.sum(loads * residual) / jnp.sum(loads)
  for i in range(_NUM_DOUBLINGS):
    direction = direction + matrix @ direction
    if i + 1 < _NUM_DOUBLINGS:
      matrix = matrix @ matrix
  # The quadratic model holds within about a temperature of where it was made.
  return prices + temperature * jnp.clip(direction, -2.0, 2.0)


def _gumbel_noise(num_experts: int, num_tokens: int) -> jax.Array:
  """Fixed Gumbel noise [E, S]: a hash of the position, no random state."""
  shape = (num_experts, num_tokens)
  expert = lax.broadcasted_iota(jnp.uint32, shape, 0)
  token = lax.broadcasted_iota(jnp.uint32, shape, 1)
  bits = token * np.uint32(0x9E3779B1) + expert * np.uint32(0x85EBCA77)
  bits = (bits ^ (bits >> 15)) * np.uint32(0x2C1B3C6D)
  bits = (bits ^ (bits >> 12)) * np.uint32(0x297A2D39)
  bits = bits ^ (bits >> 15)
  uniform = (bits >> 8).astype(jnp.float32) * np.float32(2**-24)
  return -jnp.log(-jnp.log(uniform + np.float32(2**-25)))


def _order(
  choice: jax.Array, gain: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
  """Tokens by expert, and within an expert by falling gain.

  Expert, gain and token are packed in one 32-bit key where the gain keeps at
  least 8 bits, because sorting single keys is several times faster. The gain,
  what a token would lose by moving, is rounded most finely near zero, where the
  order matters. On padding `choice` [S] is E.

  Returns:
    The tokens in order, and their experts; [S] int32 each.
  """
  num_tokens = choice.shape[0]
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  token_bits = max(num_tokens - 1, 1).bit_length()
  gain_bits = 32 - token_bits - num_experts.bit_length()
  if gain_bits < 8:
    experts, _, tokens = lax.sort(
      (choice, -gain, token), num_keys=3, is_stable=False
    )
    return tokens, experts
  gain_bits = min(gain_bits, 22)
  positive = jnp.clip(gain + 0.1, 0.0, 1e6)  # noise makes small losses of gains
  rounded = positive / (positive + 0.2) * ((1 << gain_bits) - 1)
  falling = np.uint32((1 << gain_bits) - 1) - rounded.astype(jnp.uint32)
  key = choice.astype(jnp.uint32) << np.uint32(gain_bits + token_bits)
  key |= falling << np.uint32(token_bits)
  key |= token.astype(jnp.uint32)
  key = lax.sort(key, is_stable=False)
  tokens = key & np.uint32((1 << token_bits) - 1)
  experts = key >> np.uint32(gain_bits + token_bits)
  return tokens.astype(jnp.int32), experts.astype(jnp.int32)


class _Choice(NamedTuple):
  """What every token chose, in the order of the choice.

  Attributes:
    order: [S] int32, tokens by expert, within one by falling gain.
    expert: [S] int32, the expert of each token in that order; E on padding.
    load: [E] int32, tokens that chose an expert.
  """

  order: jax.Array
  expert: jax.Array
  load: jax.Array

  @property
  def start(self) -> jax.Array:
    """Where in `order` the tokens of each expert begin; int32 [E]."""
    return jnp.cumsum(self.load, dtype=jnp.int32) - self.load


def _balance(
  values: jax.Array, mask: jax.Array, prices: jax.Array
) -> jax.Array:
  """Slots [S] int32 from scores [E, S] = a - p and the prices p [E]."""
  num_experts, num_tokens = values.shape
  capacity = -(-num_tokens // num_experts)
  choice = _choose(values, mask)
  window = min(max(_WINDOW_TOKENS // num_experts, _MIN_WINDOW), _MAX_WINDOW)
  window = min(window, num_tokens)
  settled = jnp.maximum(choice.load - window, 0)
  tokens = _movable(choice, settled, window, num_tokens)
  has_room = jnp.sum(mask, dtype=jnp.int32) < num_experts * capacity
  slack = jnp.where(has_room, prices, 0.0)
  is_large = num_experts > _BIDS_ABOVE_EXPERTS and capacity >= _BIDS_FROM_SLOTS
  rounds = 1 if is_large else _REPAIR_ROUNDS
  if assignment_kernels.is_repair_supported(values):
    tokens = assignment_kernels.repair(
      values.T,
      tokens,
      choice.load,
      slack,
      capacity=capacity,
      rounds=rounds,
      hops=repair.HOPS,
      max_moves=repair.MAX_MOVES,
      tolerance=repair.TOLERANCE,
    )
  elif num_experts > 1:
    tokens = repair.move_along_paths(
      values.T, tokens, choice.load, slack, capacity, rounds
    )
  slot, load = _slots(choice, settled, tokens, capacity)
  if is_large:
    # Room for more late tokens than there usually are; `fill` takes the rest.
    width = min(num_tokens, _BIDDERS_PER_EXPERT * num_experts)
    is_late = (slot < 0) & mask
    turn = jnp.cumsum(is_late, dtype=jnp.int32) - 1
    place = jnp.where(is_late, turn, width)
    late = jnp.full(width, num_tokens, jnp.int32)
    position = jnp.arange(num_tokens, dtype=jnp.int32)
    late = late.at[place].set(position, mode="drop")
    late_slot, load = repair.bid(values, late, load, capacity)
    slot = slot.at[late].set(late_slot, mode="drop")
  return repair.fill(slot, load, capacity)


def _choose(values: jax.Array, mask: jax.Array) -> _Choice:
  """Every token at the expert with the highest priced score [E, S]."""
  num_experts, num_tokens = values.shape
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  # Noise splits equal tokens; the plain maximum would send all of them to one
  # expert.
  noise = _NOISE * _FINAL_TEMPERATURE * _gumbel_noise(num_experts, num_tokens)
  choice = jnp.argmax(values + noise, axis=0).astype(jnp.int32)
  chosen = choice[None] == experts[:, None]
  gain = jnp.max(jnp.where(chosen, values, -jnp.inf), axis=0)
  if num_experts > 1:
    gain -= jnp.max(jnp.where(chosen, -jnp.inf, values), axis=0)
  order, order_expert = _order(
    jnp.where(mask, choice, num_experts), gain, num_experts
  )
  count = jnp.sum(chosen & mask[None], axis=1, dtype=jnp.int32)
  return _Choice(order, order_expert, count)


def _movable(
  choice: _Choice, settled: jax.Array, window: int, num_tokens: int
) -> jax.Array:
  """The tokens [E, W] of each expert that lose least by moving.

  S marks a free place; a window has half as many more for what may come.
  """
  spare = (window + 1) // 2
  place = jnp.arange(window + spare, dtype=jnp.int32)
  rank = settled[:, None] + place[None]
  filled = (rank < choice.load[:, None]) & (place < window)[None]
  index = jnp.minimum(choice.start[:, None] + rank, num_tokens - 1)
  return jnp.where(filled, choice.order[index], num_tokens)


def _slots(
  choice: _Choice, settled: jax.Array, tokens: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
  """Slots [S] int32 and those taken of each expert, [E] int32.

  Settled tokens come by rank, the window's after them; all others have -1.
  """
  num_tokens, num_experts = choice.order.shape[0], settled.shape[0]
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  position = jnp.arange(num_tokens, dtype=jnp.int32)
  order_rank = position - jnp.append(choice.start, 0)[choice.expert]
  limit = jnp.append(jnp.minimum(settled, capacity), 0)[choice.expert]
  slot = jnp.where(
    order_rank < limit, choice.expert * capacity + order_rank, -1
  )
  slot = (
    jnp.full(num_tokens, -1, jnp.int32)
    .at[choice.order]
    .set(slot, unique_indices=True)
  )
  filled = tokens < num_tokens
  rank = settled[:, None] + jnp.cumsum(filled, axis=1, dtype=jnp.int32) - 1
  kept = filled & (rank < capacity)
  slot = slot.at[tokens].set(
    jnp.where(kept, experts[:, None] * capacity + rank, -1), mode="drop"
  )
  taken = settled + jnp.sum(filled, axis=1, dtype=jnp.int32)
  return slot, jnp.minimum(taken, capacity)
