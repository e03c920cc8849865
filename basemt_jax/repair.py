"""The few tokens that are too many for their expert: moved, or let to bid.

Axes: S tokens of a group, E experts, C slots of an expert, W tokens in an
expert's repair window, Q tokens moved together, M bidders.

Prices leave loads nearly equal (see `assignment`); what is over is moved here
in a fixed number of rounds:

`move_along_paths`: along cheapest paths from over-full to free experts, the
primal-dual method for transportation problems, all paths of a round at once
(Ahuja, Magnanti & Orlin, "Network Flows", 1993, section 9.8);
`bid`: tokens without a slot bid for free ones (Vogel's regret rule), which
costs less where experts and slots are many, and loses little there;
`fill`: what is still left takes the free slots in order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Moves of a path in one round, and experts on a path.
MAX_MOVES = 8
HOPS = 4
# A move this much worse than the best one may go with it.
TOLERANCE = 0.01

_BID_ROUNDS = 4
_LOWEST = -1e30  # A finite stand-in for -inf.


class _Windows(NamedTuple):
  """The tokens of every expert that may move, and what they score.

  Attributes:
    tokens: [E, W] int32; S marks a free place.
    rows: [E, W, E] float32, priced scores of those tokens; -inf in free places.
    own: [E, W] float32, their score where they are; 0 in free places.
    load: [E] int32, tokens of each expert, those outside the window included.
  """

  tokens: jax.Array
  rows: jax.Array
  own: jax.Array
  load: jax.Array


class _Forest(NamedTuple):
  """Trees of cheapest paths from over-full experts, and one path of each.

  Attributes:
    previous: [E] int32, the expert before on the path; itself at a root.
    root: [E] int32, where the path to an expert begins.
    room: [E] int32, tokens an expert can still take.
    is_last: [E] bool, whether a chosen path ends there.
    on_path: [E] bool, whether a chosen path leads through an expert.
  """

  previous: jax.Array
  root: jax.Array
  room: jax.Array
  is_last: jax.Array
  on_path: jax.Array


def move_along_paths(
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
  most HOPS edges) from all over-full experts, and moves tokens along one path
  of every tree. Trees do not share experts, and every edge used is tight
  for the distances as potentials, so the moves of a round do not disturb each
  other.

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
  filled = tokens < num_tokens
  rows = values[jnp.minimum(tokens, num_tokens - 1)]
  own = jnp.sum(jnp.where(itself[:, None, :], rows, 0.0), axis=2)
  start = _Windows(
    tokens,
    jnp.where(filled[:, :, None], rows, -jnp.inf),
    jnp.where(filled, own, 0.0),
    load,
  )

  def one_round(_, windows: _Windows) -> _Windows:
    filled = windows.tokens < num_tokens
    forest = _forest(windows, filled, slack, capacity)
    return _moved(windows, filled, forest, capacity, num_tokens)

  return lax.fori_loop(0, rounds, one_round, start).tokens


def _forest(
  windows: _Windows, filled: jax.Array, slack: jax.Array, capacity: int
) -> _Forest:
  """Cheapest paths of one round, and which of them are used."""
  num_experts = windows.load.shape[0]
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  itself = experts[:, None] == experts[None]
  change = windows.rows - windows.own[:, :, None]
  edge = jnp.minimum(jnp.max(change, axis=1), 0.0)
  edge = jnp.where(itself, -jnp.inf, edge)
  over = windows.load > capacity
  # Once no expert is over-full, a token may still go to a free expert whose
  # price is not the lowest: such a price does not belong to a free slot.
  any_over = jnp.any(over)
  source = jnp.where(any_over, over, windows.load > 0)
  origin = jnp.where(any_over, 0.0, -slack)
  distance, previous = _cheapest_paths(
    edge, jnp.where(source, origin, -jnp.inf)
  )
  free_places = jnp.sum(~filled, axis=1, dtype=jnp.int32)
  room = jnp.minimum(capacity - windows.load, free_places)
  # Experts on the way back from every expert, [_, E], and the tree's root.
  path = [experts]
  for _ in range(2 * HOPS):
    path.append(previous[path[-1]])
  root = path[-1]
  target = (room > 0) & source[root] & (previous[root] == root)
  worth = distance + slack
  target &= any_over | ((worth > TOLERANCE) & (root != experts))
  worth = jnp.where(target, worth, -jnp.inf)
  of_root = root[None] == experts[:, None]
  worth_of_root = jnp.where(of_root, worth[None], -jnp.inf)
  last = jnp.argmax(worth_of_root, axis=1)
  found = jnp.max(worth_of_root, axis=1) > -jnp.inf
  is_last = jnp.any((last[:, None] == experts[None]) & found[:, None], axis=0)
  on_path = jnp.any(
    (jnp.stack(path)[:, :, None] == experts[None, None])
    & is_last[None, :, None],
    axis=(0, 1),
  )
  return _Forest(previous, root, room, is_last, on_path)


def _moved(
  windows: _Windows,
  filled: jax.Array,
  forest: _Forest,
  capacity: int,
  num_tokens: int,
) -> _Windows:
  """The windows after the moves of one round."""
  tokens, rows, own, load = windows
  num_experts, num_places = tokens.shape
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  max_moves = min(MAX_MOVES, num_places)
  receives = forest.on_path & (forest.previous != experts)
  follows = receives[None] & (forest.previous[None] == experts[:, None])
  sends = jnp.any(follows, axis=1)
  following = jnp.argmax(follows, axis=1)
  sent_place, similar = _best_to_send(
    rows[experts, :, following] - own, max_moves
  )
  amount = _amounts(forest, load, sends, similar, capacity, max_moves)
  # Who receives takes the places of what it sends, or else free places.
  free_place = _first(~filled, max_moves)
  target_place = jnp.where(sends[:, None], sent_place, free_place)
  moved = jnp.arange(max_moves, dtype=jnp.int32)[None] < amount[:, None]
  target_place = jnp.where(moved, target_place, num_places)
  where = (experts[:, None], target_place)
  sender = (forest.previous[:, None], sent_place[forest.previous])
  incoming = receives[:, None]
  new_tokens = jnp.where(incoming, tokens[sender], num_tokens)
  new_rows = jnp.where(incoming[:, :, None], rows[sender], -jnp.inf)
  new_own = jnp.where(incoming, rows[(*sender, experts[:, None])], 0.0)
  change = jnp.where(receives, amount, 0) - jnp.where(sends, amount, 0)
  return _Windows(
    tokens.at[where].set(new_tokens, mode="drop"),
    rows.at[where].set(new_rows, mode="drop"),
    own.at[where].set(new_own, mode="drop"),
    load + change,
  )


def _best_to_send(
  change: jax.Array, max_moves: int
) -> tuple[jax.Array, jax.Array]:
  """The tokens to send from each window, best first.

  By what the score of each token would change, [E, W]: their places, [E, Q]
  int32; and how many are about as good, [E] int32.
  """
  places = jnp.arange(change.shape[1], dtype=jnp.int32)
  top = jnp.max(change, axis=1, keepdims=True)
  top_place = jnp.argmax(change, axis=1).astype(jnp.int32)[:, None]
  alike = change >= jnp.minimum(top, 0.0) - TOLERANCE
  similar = jnp.sum(alike, axis=1, dtype=jnp.int32)
  alike &= places[None] != top_place
  others = _first(alike, max_moves - 1)
  return (
    jnp.concatenate([top_place, others], axis=1),
    jnp.minimum(similar, max_moves),
  )


def _amounts(
  forest: _Forest,
  load: jax.Array,
  sends: jax.Array,
  similar: jax.Array,
  capacity: int,
  max_moves: int,
) -> jax.Array:
  """Tokens that go along each expert's path, [E] int32: the least of it all."""
  experts = jnp.arange(load.shape[0], dtype=jnp.int32)
  amount = jnp.where(sends, similar, max_moves)
  amount = jnp.where(forest.is_last, jnp.minimum(amount, forest.room), amount)
  excess = jnp.maximum(load - capacity, 1)
  is_root = forest.root == experts
  amount = jnp.where(is_root, jnp.minimum(amount, excess), amount)
  of_root = forest.root[None] == experts[:, None]
  least = jnp.min(
    jnp.where(of_root & forest.on_path[None], amount[None], max_moves), axis=1
  )
  return jnp.where(forest.on_path, least[forest.root], 0)


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

  Bellman and Ford's iteration, cut off after HOPS edges.

  Returns:
    distance: [E], -inf where there is no path. (Nor is one started where the
      origin is -inf.)
    previous: [E] the expert before on the path; itself at the start.
  """
  num_experts = edge.shape[0]
  distance = origin
  previous = jnp.arange(num_experts, dtype=jnp.int32)
  for _ in range(min(HOPS, num_experts - 1)):
    through = distance[:, None] + edge
    best = jnp.max(through, axis=0)
    better = best > distance
    distance = jnp.where(better, best, distance)
    source = jnp.argmax(through, axis=0).astype(jnp.int32)
    previous = jnp.where(better, source, previous)
  return distance, previous


def bid(
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
    open_rows = jnp.where((load < capacity)[:, None], rows, _LOWEST)
    expert = jnp.argmax(open_rows, axis=0).astype(jnp.int32)
    chosen = expert[None] == experts[:, None]
    best = jnp.max(open_rows, axis=0)
    regret = best - jnp.max(jnp.where(chosen, _LOWEST, open_rows), axis=0)
    higher = regret[:, None] > regret[None]
    higher |= (regret[:, None] == regret[None]) & (turn[:, None] < turn[None])
    rival = (expert[:, None] == expert[None]) & is_bidding[:, None]
    rank = jnp.sum(rival & higher, axis=0, dtype=jnp.int32)
    taken = jnp.where(chosen, load[:, None], 0)
    position = jnp.sum(taken, axis=0, dtype=jnp.int32) + rank
    wins = is_bidding & (position < capacity)
    slot = jnp.where(wins, expert * capacity + position, slot)
    load += jnp.sum(chosen & wins[None], axis=1, dtype=jnp.int32)
  return slot, load


def fill(slot: jax.Array, load: jax.Array, capacity: int) -> jax.Array:
  """Gives tokens without a slot (-1) the free slots `[load_e, C)`, in order.

  Of slots [S] int32 and the slots taken [E]; [S] int32, all different.
  """
  missing = slot < 0
  turn = jnp.cumsum(missing, dtype=jnp.int32) - 1
  free = jnp.cumsum(capacity - load, dtype=jnp.int32)
  expert = jnp.sum(free[None] <= turn[:, None], axis=1, dtype=jnp.int32)
  expert = jnp.minimum(expert, load.shape[0] - 1)
  # Slots still free after expert e are counted from the end of its row.
  taken = (expert + 1) * capacity - (free[expert] - turn)
  return jnp.where(missing, taken, slot).astype(jnp.int32)
