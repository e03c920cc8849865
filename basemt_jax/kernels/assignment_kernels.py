"""The solver of `assignment` in few launches, for GPUs.

Axes: S tokens of a group, E experts, W tokens in an expert's repair window, Q
tokens moved together, P parts that the tokens are split in.

On a GPU the plain solver spends its time starting kernels: a Newton step is
about 22 of them, a round of repair 24, of a microsecond or two each. Here a
step is two kernels and all rounds of repair are one, for the same results (up
to the rounding of sums). Written in Pallas for Triton; groups are batched by
`jax.vmap`, and inside `jax.shard_map` every device solves its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from basemt_jax.kernels import kernel_call

# Matrix units take at least 16 rows and columns.
_MIN_EXPERTS, _MAX_EXPERTS = 16, 128
_MAX_REPAIR_EXPERTS = 32
_CHUNK = 64
_MAX_PARTS = 128
# Scores that the threads of the repair kernel hold at a time. With four times
# as many its program is so long that it compiles for more than twice the time.
_TILE = 2**12
_TINY = 1e-30


def is_supported(values: jax.Array) -> bool:
  """Whether `newton_step` can run here, for scores [E, S]."""
  num_experts = values.shape[0]
  held = 2 * 4 * _padded(num_experts) ** 2  # A product of float32 [E, E].
  return (
    kernel_call.can_run()
    and 2 <= num_experts <= _MAX_EXPERTS
    and held <= kernel_call.shared_memory()
  )


def is_repair_supported(values: jax.Array) -> bool:
  """Whether `repair` can run here for scores [E, S], and is the faster form.

  It is one program, which many experts keep busy for too long.
  """
  return is_supported(values) and values.shape[0] <= _MAX_REPAIR_EXPERTS


def _padded(num_experts: int) -> int:
  """A power of two, as every size of a Triton array."""
  return max(1 << (num_experts - 1).bit_length(), _MIN_EXPERTS)


# ------------------------------------------------------------ Newton's step


# Traced and lowered once, though a solve has many steps and a network many
# layers.
@functools.partial(
  jax.jit, static_argnames=("capacity", "num_doublings", "interpret")
)
def newton_step(
  values: jax.Array,
  weights: jax.Array,
  free_values: jax.Array,
  free_weight: jax.Array,
  prices: jax.Array,
  temperature: jax.Array,
  *,
  capacity: int,
  num_doublings: int,
  interpret: bool = False,
) -> jax.Array:
  """One damped Newton step on the softened dual; see `assignment`.

  Args:
    values: [E, S] float32 scores.
    weights: [S] float32, 0 on padding.
    free_values: [E] float32, scores of free slots.
    free_weight: [] float32, their number.
    prices: [E] float32.
    temperature: [] float32.
    capacity: C.
    num_doublings: Factors of the inverse's product.
    interpret: Run without a GPU, slowly, for tests.

  Returns:
    [E], the new prices.
  """
  num_experts, num_tokens = values.shape
  experts = _padded(num_experts)
  chunks = -(-num_tokens // _CHUNK)
  parts = min(chunks, _MAX_PARTS)
  partial, loads = kernel_call.run(
    functools.partial(
      _statistics_kernel, experts=experts, chunks=-(-chunks // parts)
    ),
    (
      jax.ShapeDtypeStruct((parts, experts, experts), jnp.float32),
      jax.ShapeDtypeStruct((parts, experts), jnp.float32),
    ),
    (values, weights, prices, temperature.reshape(1)),
    grid=(parts,),
    compiler_params=triton.CompilerParams(
      num_warps=8 if experts > 64 else 4, num_stages=2
    ),
    interpret=interpret,
    name="newton_statistics",
  )
  return kernel_call.run(
    functools.partial(
      _newton_kernel, capacity=capacity, num_doublings=num_doublings
    ),
    jax.ShapeDtypeStruct((num_experts,), jnp.float32),
    (
      jnp.sum(partial, axis=0),
      jnp.sum(loads, axis=0),
      free_values,
      free_weight.reshape(1),
      prices,
      temperature.reshape(1),
    ),
    grid=(1,),
    compiler_params=triton.CompilerParams(
      num_warps=8 if experts > 32 else 4, num_stages=1
    ),
    interpret=interpret,
    name="newton_step",
  )


def _statistics_kernel(
  values_ref,
  weights_ref,
  prices_ref,
  temperature_ref,
  products_ref,
  loads_ref,
  *,
  experts: int,
  chunks: int,
) -> None:
  """P' P and the loads of one part of the tokens, P their shares."""
  part = pl.program_id(0)
  num_experts, num_tokens = values_ref.shape
  row = jnp.arange(experts, dtype=jnp.int32)
  is_expert = row < num_experts
  prices = triton.load(prices_ref.at[row], mask=is_expert, other=0.0)
  temperature = temperature_ref[0]

  def body(i, sums):
    products, loads = sums
    token = (part * chunks + i) * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
    is_token = token < num_tokens
    values = triton.load(
      values_ref.at[row[:, None], token[None, :]],
      mask=is_expert[:, None] & is_token[None, :],
      other=0.0,
    )
    weights = triton.load(weights_ref.at[token], mask=is_token, other=0.0)
    scores = (values - prices[:, None]) / temperature
    scores = jnp.where(is_expert[:, None], scores, -1e30)
    shares = jnp.exp(scores - jnp.max(scores, axis=0)[None, :])
    shares = shares / jnp.sum(shares, axis=0)[None, :]
    weighted = shares * weights[None, :]
    products += jnp.dot(weighted, shares.T)
    return products, loads + jnp.sum(weighted, axis=1)

  products, loads = lax.fori_loop(
    0,
    chunks,
    body,
    (
      jnp.zeros((experts, experts), jnp.float32),
      jnp.zeros((experts,), jnp.float32),
    ),
  )
  products_ref[part, :, :] = products
  loads_ref[part, :] = loads


def _newton_kernel(
  products_ref,
  loads_ref,
  free_values_ref,
  free_weight_ref,
  prices_ref,
  temperature_ref,
  out_ref,
  *,
  capacity: int,
  num_doublings: int,
) -> None:
  """New prices from the sums over tokens."""
  products, loads = products_ref[:, :], loads_ref[:]
  (experts,) = loads.shape
  (num_experts,) = prices_ref.shape
  row = jnp.arange(experts, dtype=jnp.int32)
  is_expert = row < num_experts
  prices = triton.load(prices_ref.at[row], mask=is_expert, other=0.0)
  free = triton.load(free_values_ref.at[row], mask=is_expert, other=0.0)
  temperature = temperature_ref[0]
  scores = jnp.where(is_expert, (free - prices) / temperature, -1e30)
  shares = jnp.exp(scores - jnp.max(scores))
  shares = shares / jnp.sum(shares)
  free_weight = free_weight_ref[0]
  products += free_weight * (shares[:, None] * shares[None, :])
  loads += free_weight * shares
  # Products are rounded; their own sums keep the matrix row-stochastic.
  total = jnp.sum(products, axis=1)
  matrix = products / jnp.maximum(total, _TINY)[:, None]
  residual = jnp.log(jnp.maximum(loads, _TINY) / capacity)
  residual = jnp.where(is_expert, residual, 0.0)
  direction = residual - jnp.sum(loads * residual) / jnp.sum(loads)
  direction = jnp.where(is_expert, direction, 0.0)
  for i in range(num_doublings):
    direction += jnp.sum(matrix * direction[None, :], axis=1)
    if i + 1 < num_doublings:
      matrix = jnp.dot(matrix, matrix)
  new = prices + temperature * jnp.minimum(jnp.maximum(direction, -2.0), 2.0)
  triton.store(out_ref.at[row], new, mask=is_expert)


# ------------------------------------------------------------------- repair


def repair(
  values: jax.Array,
  tokens: jax.Array,
  load: jax.Array,
  slack: jax.Array,
  *,
  capacity: int,
  rounds: int,
  hops: int,
  max_moves: int,
  tolerance: float,
  interpret: bool = False,
) -> jax.Array:
  """All rounds of `assignment`'s repair in one kernel.

  Args:
    values: [S, E] float32 priced scores.
    tokens: [E, W] int32, the tokens that may move; S marks a free place.
    load: [E] int32, tokens of each expert.
    slack: [E] float32, what a free slot is worth more than another expert's.
    capacity: C.
    rounds: Rounds.
    hops: Edges of a path at most.
    max_moves: Q, tokens that go along a path in one round.
    tolerance: A move this much worse than the best may go with it.
    interpret: Run without a GPU, slowly, for tests.

  Returns:
    [E, W], the tokens' new places.
  """
  num_tokens, num_experts = values.shape
  experts = max(1 << (num_experts - 1).bit_length(), 2)
  num_places = tokens.shape[1]
  width = 1 << (num_places - 1).bit_length()
  # Places of padding are neither free nor filled.
  padding = ((0, experts - num_experts), (0, width - num_places))
  tokens = jnp.pad(tokens, padding, constant_values=num_tokens + 1)
  load = jnp.pad(load, padding[0], constant_values=capacity)
  slack = jnp.pad(slack, padding[0])
  rows = values[jnp.minimum(tokens, num_tokens - 1)]
  rows = jnp.pad(rows, ((0, 0), (0, 0), padding[0]), constant_values=-jnp.inf)
  rows = jnp.where((tokens < num_tokens)[:, :, None], rows, -jnp.inf)
  out, *_ = kernel_call.run(
    functools.partial(
      _repair_kernel,
      num_tokens=num_tokens,
      num_experts=num_experts,
      capacity=capacity,
      rounds=rounds,
      hops=hops,
      tolerance=tolerance,
      barrier=(lambda: None) if interpret else triton.debug_barrier,
    ),
    (
      jax.ShapeDtypeStruct(tokens.shape, jnp.int32),
      jax.ShapeDtypeStruct(rows.shape, jnp.float32),
      jax.ShapeDtypeStruct((experts, max_moves), jnp.int32),
    ),
    (tokens, rows, load, slack),
    grid=(1,),
    input_output_aliases={0: 0, 1: 1},
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="assignment_repair",
  )
  return out[:num_experts, :num_places]


def _repair_kernel(
  tokens_in_ref,
  rows_in_ref,
  load_ref,
  slack_ref,
  tokens_ref,
  rows_ref,
  leaving_ref,
  *,
  num_tokens: int,
  num_experts: int,
  capacity: int,
  rounds: int,
  hops: int,
  tolerance: float,
  barrier: Callable[[], None],
) -> None:
  """`repair.move_along_paths` with sums over masks in place of indices.

  The tokens of every place and their scores stay in global memory, which the
  threads of the one program share; barriers part reading from writing.
  """
  del tokens_in_ref, rows_in_ref  # The same memory as the outputs.
  experts, width = tokens_ref.shape
  max_moves = leaving_ref.shape[1]
  expert = jnp.arange(experts, dtype=jnp.int32)
  place = jnp.arange(width, dtype=jnp.int32)
  move = jnp.arange(max_moves, dtype=jnp.int32)
  is_expert = expert < num_experts
  itself = expert[:, None] == expert[None, :]
  slack = slack_ref[:]
  has_slack = jnp.max(jnp.abs(slack)) > 0
  infinity = jnp.float32(jnp.inf)
  # So many places at a time that their scores fit into registers.
  span = min(max(_TILE // experts**2, 1), width)

  def at(vector, index):
    """Gives vector[index], for [E] int32 and [E] int32."""
    chosen = index[:, None] == expert[None, :]
    return jnp.sum(jnp.where(chosen, vector[None, :], 0), axis=1)

  def any_of(flags, axis):
    return jnp.max(flags.astype(jnp.int32), axis=axis) > 0

  def places_of(flags, turn):
    """Index of each row's set flag number turn [Q]; W if there are fewer."""
    rank = jnp.cumsum(flags.astype(jnp.int32), axis=1)
    before = rank[:, None, :] <= turn[None, :, None]
    return jnp.sum(before.astype(jnp.int32), axis=2)

  def scores_at(expert_of_place):
    """Scores [E, W] of all places for one expert a row, [E]."""
    return triton.load(
      rows_ref.at[expert[:, None], place[None, :], expert_of_place[:, None]]
    )

  def best_moves():
    """Best change [E, E] that a token of an expert gets from another one."""

    def body(i, best):
      some = pl.ds(i * span, span)
      rows = rows_ref[:, some, :]
      places = i * span + jnp.arange(span, dtype=jnp.int32)
      now = triton.load(
        rows_ref.at[expert[:, None], places[None, :], expert[:, None]]
      )
      now = jnp.where(now > -infinity, now, 0.0)
      return jnp.maximum(best, jnp.max(rows - now[:, :, None], axis=1))

    return lax.fori_loop(
      0, width // span, body, jnp.full((experts, experts), -infinity)
    )

  def body(state):
    turn, load, _ = state
    tokens = tokens_ref[:, :]
    own = scores_at(expert)
    own = jnp.where(own > -infinity, own, 0.0)
    best = best_moves()
    edge = jnp.where(itself, -infinity, jnp.minimum(best, 0.0))
    over = load > capacity
    any_over = jnp.max(over.astype(jnp.int32)) > 0
    source = jnp.where(any_over, over, load > 0) & is_expert
    origin = jnp.where(any_over, jnp.zeros_like(slack), -slack)
    # Cheapest paths, as in `repair._cheapest_paths`.
    distance = jnp.where(source, origin, -infinity)
    previous = expert
    for _ in range(hops):
      through = distance[:, None] + edge
      nearest = jnp.max(through, axis=0)
      came_from = jnp.argmax(through, axis=0).astype(jnp.int32)
      previous = jnp.where(nearest > distance, came_from, previous)
      distance = jnp.maximum(distance, nearest)
    free = tokens == num_tokens
    free_places = jnp.sum(free.astype(jnp.int32), axis=1)
    room = jnp.minimum(capacity - load, free_places)
    # Ways back of 1, 2, 4, ... edges; no path has more than 2 * hops.
    back = [previous]
    while 2 ** (len(back) - 1) < 2 * hops:
      back.append(at(back[-1], back[-1]))
    root = back[-1]
    target = (room > 0) & (at(source.astype(jnp.int32), root) > 0)
    target &= (at(previous, root) == root) & is_expert
    worth = distance + slack
    target &= any_over | ((worth > tolerance) & (root != expert))
    worth = jnp.where(target, worth, -infinity)
    of_root = root[None, :] == expert[:, None]
    worth_of_root = jnp.where(of_root, worth[None, :], -infinity)
    last = jnp.argmax(worth_of_root, axis=1).astype(jnp.int32)
    found = jnp.max(worth_of_root, axis=1) > -infinity
    is_last = any_of((last[:, None] == expert[None, :]) & found[:, None], 0)
    on_path = is_last
    for way in back:
      on_path |= any_of((way[:, None] == expert[None, :]) & on_path[:, None], 0)
    receives = on_path & (previous != expert)
    follows = receives[None, :] & (previous[None, :] == expert[:, None])
    sends = any_of(follows, 1)
    following = jnp.argmax(follows.astype(jnp.int32), axis=1).astype(jnp.int32)
    # The tokens to send, best first, and how many are about as good.
    change = scores_at(following) - own
    top = jnp.max(change, axis=1)
    top_place = jnp.argmax(change, axis=1).astype(jnp.int32)
    alike = change >= (jnp.minimum(top, 0.0) - tolerance)[:, None]
    similar = jnp.minimum(jnp.sum(alike.astype(jnp.int32), axis=1), max_moves)
    alike &= place[None, :] != top_place[:, None]
    leaving = jnp.where(
      (move == 0)[None, :], top_place[:, None], places_of(alike, move - 1)
    )
    amount = jnp.where(sends, similar, max_moves)
    amount = jnp.where(is_last, jnp.minimum(amount, room), amount)
    excess = jnp.maximum(load - capacity, 1)
    amount = jnp.where(root == expert, jnp.minimum(amount, excess), amount)
    least = jnp.min(
      jnp.where(of_root & on_path[None, :], amount[None, :], max_moves), axis=1
    )
    amount = jnp.where(on_path, at(least, root), 0)
    # Who receives takes the places of what it sends, or else free places.
    arriving = jnp.where(sends[:, None], leaving, places_of(free, move))
    going = move[None, :] < amount[:, None]
    moved = going & receives[:, None]
    leaving_ref[:, :] = leaving
    barrier()
    sender = previous[:, None]
    from_place = triton.load(leaving_ref.at[sender, move[None, :]])
    new_tokens = triton.load(
      tokens_ref.at[sender, from_place], mask=moved, other=num_tokens
    )
    emptied = going & (sends & ~receives)[:, None]
    where = jnp.where(emptied, leaving, arriving)
    written = moved | emptied
    new_rows = triton.load(
      rows_ref.at[
        sender[:, :, None], from_place[:, :, None], expert[None, None, :]
      ],
      mask=moved[:, :, None] & is_expert[None, None, :],
      other=-infinity,
    )
    barrier()
    triton.store(
      tokens_ref.at[expert[:, None], where], new_tokens, mask=written
    )
    triton.store(
      rows_ref.at[
        expert[:, None, None], where[:, :, None], expert[None, None, :]
      ],
      new_rows,
      mask=written[:, :, None] & is_expert[None, None, :],
    )
    barrier()
    arrived = jnp.where(receives, amount, 0)
    load = load + arrived - jnp.where(sends, amount, 0)
    goes_on = (jnp.max(load) > capacity) | has_slack
    return turn + 1, load, (jnp.max(arrived) > 0) & goes_on

  # A round that finds nothing to do, or has nothing left to do, is the last.
  lax.while_loop(
    lambda state: (state[0] < rounds) & state[2],
    body,
    (jnp.int32(0), load_ref[:], jnp.bool_(True)),
  )
