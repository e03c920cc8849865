"""Balanced assignment of tokens to experts: scores in, experts out.

Axes: S tokens of a group, E experts, C = ceil(S / E) slots of an expert,
W tokens in an expert's repair window, Q tokens moved together, M bidders.

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
3. moves the few tokens that are too many along cheapest paths from over-full to
   free experts (the primal-dual method for transportation problems, all
   paths of a round at once), in a fixed number of rounds; where both experts
   and their slots are many, one such round and then some rounds of bids, which
   cost less and lose little there;
4. gives what is still left, and padding, the free slots in order.

All trip counts are static: no host synchronisation, and work is bounded. After
step 4 the slots are a one-to-one map of tokens whatever the scores were.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
# for more experts; moves of a path in one round, rounds, experts on a path.
_MIN_WINDOW, _MAX_WINDOW = 16, 64
_WINDOW_TOKENS = 512
_MAX_MOVES = 8
_REPAIR_ROUNDS = 8
_HOPS = 4
# A move this much worse than the best one may go with it.
_TOLERANCE = 0.01

# Bids take the place of most rounds of repair above so many experts with so
# many slots; at most so many tokens bid, in so many rounds.
_BIDS_ABOVE_EXPERTS, _BIDS_FROM_SLOTS = 32, 64
_BIDDERS_PER_EXPERT = 4
_BID_ROUNDS = 4

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

  Subtracting an expert's mean changes the prices only. It matters because
  features with a large common part give every expert an offset that dwarfs
  what tells the tokens apart.

  Args:
    values: [E, S] finite scores.
    mask: [S] bool.
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
    fraction = jnp.minimum(i / falling, 1.0)
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
  """[E, S] fixed Gumbel noise: a hash of the position, no random state."""
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
  least 8 bits, because sorting single keys is several times faster. The gain is
  rounded most finely near zero, where the order matters.

  Args:
    choice: [S] int32, E on padding.
    gain: [S], what the token would lose by moving, in units of the spread.
    num_experts: E.

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


def _balance(
  values: jax.Array, mask: jax.Array, prices: jax.Array
) -> jax.Array:
  """Slots [S] int32 from scores [E, S] = a - p and the prices p [E]."""
  num_experts, num_tokens = values.shape
  capacity = -(-num_tokens // num_experts)
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
  start = jnp.cumsum(count) - count

  # The window holds the tokens of an expert that lose least by moving.
  window = min(max(_WINDOW_TOKENS // num_experts, _MIN_WINDOW), _MAX_WINDOW)
  window = min(window, num_tokens)
  spare = (window + 1) // 2
  settled = jnp.maximum(count - window, 0)
  place = jnp.arange(window + spare, dtype=jnp.int32)
  rank = settled[:, None] + place[None]
  filled = (rank < count[:, None]) & (place < window)[None]
  index = jnp.minimum(start[:, None] + rank, num_tokens - 1)
  tokens = jnp.where(filled, order[index], num_tokens)
  slack = jnp.where(jnp.sum(mask) < num_experts * capacity, prices, 0.0)
  is_large = num_experts > _BIDS_ABOVE_EXPERTS and capacity >= _BIDS_FROM_SLOTS
  rounds = 1 if is_large else _REPAIR_ROUNDS
  if assignment_kernels.is_repair_supported(values):
    tokens = assignment_kernels.repair(
      values.T,
      tokens,
      count,
      slack,
      capacity=capacity,
      rounds=rounds,
      hops=_HOPS,
      max_moves=_MAX_MOVES,
      tolerance=_TOLERANCE,
    )
  elif num_experts > 1:
    tokens = _repair(values.T, tokens, count, slack, capacity, rounds)

  # Slots: settled tokens by rank, the window's after them, then all others.
  position = jnp.arange(num_tokens, dtype=jnp.int32)
  order_rank = position - jnp.append(start, 0)[order_expert]
  limit = jnp.append(jnp.minimum(settled, capacity), 0)[order_expert]
  slot = jnp.where(order_rank < limit, order_expert * capacity + order_rank, -1)
  slot = (
    jnp.full(num_tokens, -1, jnp.int32).at[order].set(slot, unique_indices=True)
  )
  filled = tokens < num_tokens
  rank = settled[:, None] + jnp.cumsum(filled, axis=1, dtype=jnp.int32) - 1
  kept = filled & (rank < capacity)
  slot = slot.at[tokens].set(
    jnp.where(kept, experts[:, None] * capacity + rank, -1), mode="drop"
  )
  load = jnp.minimum(settled + jnp.sum(filled, axis=1), capacity)
  if is_large:
    # Room for more late tokens than there usually are; _fill takes the rest.
    width = min(num_tokens, _BIDDERS_PER_EXPERT * num_experts)
    is_late = (slot < 0) & mask
    place = jnp.where(is_late, jnp.cumsum(is_late) - 1, width)
    late = jnp.full(width, num_tokens, jnp.int32)
    late = late.at[place].set(position, mode="drop")
    late_slot, load = _bid(values, late, load, capacity)
    slot = slot.at[late].set(late_slot, mode="drop")
  return _fill(slot, load, capacity)


def _bid(
  values: jax.Array, late: jax.Array, load: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
  """Lets tokens without a slot bid for the free ones, in rounds.

  In a round every token bids for its best expert with room, by what it would
  lose at the next best, and an expert takes the highest bids while it has room
  (Vogel's regret rule for transportation problems).

  Args:
    values: [E, S] priced scores.
    late: [M] int32, the tokens; S where there is none.
    load: [E] int32, slots taken.
    capacity: C.

  Returns:
    [M] int32, the tokens' slots, -1 for those still without; the new load.
  """
  num_experts, num_tokens = values.shape
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  turn = jnp.arange(late.shape[0], dtype=jnp.int32)
  rows = values[:, jnp.minimum(late, num_tokens - 1)]
  slot = jnp.full(late.shape, -1, jnp.int32) + 0 * late

  for _ in range(_BID_ROUNDS):
    is_bidding = (slot < 0) & (late < num_tokens)
    open_rows = jnp.where((load < capacity)[:, None], rows, -_HUGE)
    expert = jnp.argmax(open_rows, axis=0).astype(jnp.int32)
    chosen = expert[None] == experts[:, None]
    best = jnp.max(open_rows, axis=0)
    bid = best - jnp.max(jnp.where(chosen, -_HUGE, open_rows), axis=0)
    higher = bid[:, None] > bid[None]
    higher |= (bid[:, None] == bid[None]) & (turn[:, None] < turn[None])
    rival = (expert[:, None] == expert[None]) & is_bidding[:, None]
    rank = jnp.sum(rival & higher, axis=0, dtype=jnp.int32)
    position = jnp.sum(jnp.where(chosen, load[:, None], 0), axis=0) + rank
    wins = is_bidding & (position < capacity)
    slot = jnp.where(wins, expert * capacity + position, slot)
    load += jnp.sum(chosen & wins[None], axis=1, dtype=jnp.int32)
  return slot, load


def _fill(slot: jax.Array, load: jax.Array, capacity: int) -> jax.Array:
  """Gives tokens without a slot (-1) the free slots [load_e, C), in order."""
  missing = slot < 0
  turn = jnp.cumsum(missing, dtype=jnp.int32) - 1
  free = jnp.cumsum(capacity - load)
  expert = jnp.sum(free[None] <= turn[:, None], axis=1, dtype=jnp.int32)
  expert = jnp.minimum(expert, load.shape[0] - 1)
  # Slots still free after expert e are counted from the end of its row.
  taken = (expert + 1) * capacity - (free[expert] - turn)
  return jnp.where(missing, taken, slot).astype(jnp.int32)


def _repair(
  values: jax.Array,
  tokens: jax.Array,
  load: jax.Array,
  slack: jax.Array,
  capacity: int,
  rounds: int,
) -> jax.Array:
  """Moves tokens from over-full to free experts along cheapest paths.

  Every expert has at most one edge to every other one: its best token for it,
  and equally good ones beside it. A round finds a forest of cheapest paths (at
  most _HOPS edges) from all over-full experts, and moves tokens along one path
  of every tree. Trees do not share experts, and every edge used is tight
  for the distances as potentials, so the moves of a round do not disturb each
  other (Ahuja, Magnanti & Orlin 1993, section 9.8).

  Args:
    values: [S, E] priced scores.
    tokens: [E, W] the tokens that may move; S marks a free place.
    load: [E] tokens of each expert, the settled ones included.
    slack: [E] what a free slot of an expert is worth more than another's.
    capacity: C.
    rounds: Rounds.

  Returns:
    [E, W], the tokens' new places.
  """
  num_tokens, num_experts = values.shape
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  itself = experts[:, None] == experts[None]
  num_places = tokens.shape[1]
  places = jnp.arange(num_places, dtype=jnp.int32)
  max_moves = min(_MAX_MOVES, num_places)

  def body(_, state):
    tokens, rows, own, load = state
    change = rows - own[:, :, None]
    best = jnp.max(change, axis=1)
    edge = jnp.where(itself, -jnp.inf, jnp.minimum(best, 0.0))
    over = load > capacity
    # Once no expert is over-full, a token may still go to a free expert whose
    # price is not the lowest: such a price does not belong to a free slot.
    any_over = jnp.any(over)
    source = jnp.where(any_over, over, load > 0)
    origin = jnp.where(any_over, 0.0, -slack)
    distance, previous = _cheapest_paths(
      edge, jnp.where(source, origin, -jnp.inf)
    )
    filled = tokens < num_tokens
    free_places = jnp.sum(~filled, axis=1)
    room = jnp.minimum(capacity - load, free_places)
    # Experts on the way back from every expert, [_, E], and the tree's root.
    path = [experts]
    for _ in range(2 * _HOPS):
      path.append(previous[path[-1]])
    root = path[-1]
    target = (room > 0) & source[root] & (previous[root] == root)
    worth = distance + slack
    target &= any_over | ((worth > _TOLERANCE) & (root != experts))
    worth = jnp.where(target, worth, -jnp.inf)
    of_root = root[None] == experts[:, None]
    worth_of_root = jnp.where(of_root, worth[None], -jnp.inf)
    last = jnp.argmax(worth_of_root, axis=1)
    found = jnp.max(worth_of_root, axis=1) > -jnp.inf
    is_last = jnp.any((last[:, None] == experts[None]) & found[:, None], axis=0)
    steps = jnp.stack(path)
    on_path = jnp.any(
      (steps[:, :, None] == experts[None, None]) & is_last[None, :, None],
      axis=(0, 1),
    )
    receives = on_path & (previous != experts)
    follows = receives[None] & (previous[None] == experts[:, None])
    sends = jnp.any(follows, axis=1)
    following = jnp.argmax(follows, axis=1)
    # The tokens to send, best first, and how many are about as good.
    sent_change = rows[experts, :, following] - own
    top = jnp.max(sent_change, axis=1, keepdims=True)
    top_place = jnp.argmax(sent_change, axis=1).astype(jnp.int32)[:, None]
    alike = sent_change >= jnp.minimum(top, 0.0) - _TOLERANCE
    similar = jnp.minimum(jnp.sum(alike, axis=1), max_moves)
    alike &= places[None] != top_place
    top_place = jnp.concatenate(
      [top_place, _first(alike, max_moves - 1)], axis=1
    )
    amount = jnp.where(sends, similar, max_moves)
    amount = jnp.where(is_last, jnp.minimum(amount, room), amount)
    excess = jnp.maximum(load - capacity, 1)
    amount = jnp.where(root == experts, jnp.minimum(amount, excess), amount)
    amount = jnp.min(
      jnp.where(of_root & on_path[None], amount[None], max_moves), axis=1
    )[root]
    amount = jnp.where(on_path, amount, 0)
    # Who receives takes the places of what it sends, or else free places.
    free_place = _first(~filled, max_moves)
    target_place = jnp.where(sends[:, None], top_place, free_place)
    moved = jnp.arange(max_moves)[None] < amount[:, None]
    sender = (previous[:, None], top_place[previous])
    new_tokens = jnp.where(receives[:, None], tokens[sender], num_tokens)
    target_place = jnp.where(moved, target_place, num_places)
    where = (experts[:, None], target_place)
    incoming = receives[:, None]
    new_rows = jnp.where(incoming[:, :, None], rows[sender], -jnp.inf)
    new_own = rows[(*sender, experts[:, None])]
    new_own = jnp.where(incoming, new_own, 0.0)
    tokens = tokens.at[where].set(new_tokens, mode="drop")
    rows = rows.at[where].set(new_rows, mode="drop")
    own = own.at[where].set(new_own, mode="drop")
    load = load + jnp.where(receives, amount, 0) - jnp.where(sends, amount, 0)
    return tokens, rows, own, load

  filled = tokens < num_tokens
  rows = values[jnp.minimum(tokens, num_tokens - 1)]
  own = jnp.sum(jnp.where(itself[:, None, :], rows, 0.0), axis=2)
  own = jnp.where(filled, own, 0.0)
  rows = jnp.where(filled[:, :, None], rows, -jnp.inf)
  state = (tokens, rows, own, load)
  return lax.fori_loop(0, rounds, body, state)[0]


def _first(flags: jax.Array, number: int) -> jax.Array:
  """Indices [E, number] of each row's first set flags [E, W]; W if too few."""
  width = flags.shape[1]
  # A product with a triangle: running sums and sorts are slow for short rows.
  triangle = np.triu(np.ones((width, width), np.float32))
  running = flags.astype(jnp.float32) @ triangle
  turn = jnp.arange(number, dtype=jnp.float32)
  before = running[:, None] <= turn[None, :, None]
  return jnp.sum(before, axis=2, dtype=jnp.int32)


def _cheapest_paths(
  edge: jax.Array, origin: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Best sums of an origin [E] and edges [E, E] (<= 0) that lead to an expert.

  Bellman and Ford's iteration, cut off after _HOPS edges.

  Returns:
    distance: [E], -inf where there is no path. (Nor is one started where the
      origin is -inf.)
    previous: [E] the expert before on the path; itself at the start.
  """
  num_experts = edge.shape[0]
  distance = origin
  previous = jnp.arange(num_experts, dtype=jnp.int32)
  for _ in range(min(_HOPS, num_experts - 1)):
    through = distance[:, None] + edge
    best = jnp.max(through, axis=0)
    better = best > distance
    distance = jnp.where(better, best, distance)
    source = jnp.argmax(through, axis=0).astype(jnp.int32)
    previous = jnp.where(better, source, previous)
  return distance, previous


def capacity_of(num_tokens: int, num_experts: int) -> int:
  """C, the slots of an expert for a group of `num_tokens` tokens."""
  return math.ceil(num_tokens / num_experts)
