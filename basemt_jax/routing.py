"""Routers decide which expert runs which token; dispatch moves the tokens.

Axes: G groups of tokens, S tokens in a group, E experts, C slots of an expert
for a group, K experts chosen per token, D model width, N and M any rows.

A router sees affinities and never experts. In training it makes a `Plan` for
one group, which fixes the slots; at test time it makes a `Choice` for any
number of tokens, and nothing is dropped. To add a router, write one class with
the methods of `Router`.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from basemt_jax import assignment


class Choice(NamedTuple):
  """Experts of tokens, at test time.

  Attributes:
    expert: [S, K] int32.
    gate: [S, K] float32 in [0, 1], the raw gate of each choice,
      differentiable with respect to the affinities; 0 on padding.
  """

  expert: jax.Array
  gate: jax.Array


class Plan(NamedTuple):
  """Where the tokens of one group go, in training.

  Attributes:
    expert: [S, K] int32, the chosen experts.
    gate: [S, K] float32, as in `Choice`.
    slot: [S, K] int32, the slot of each choice, `expert * C + i`, or E * C
      where the choice is dropped.
    source: [E * C] int32, the choice `token * K + k` in each slot, or S * K
      where the slot is empty: the inverse of `slot`.
    prices: [E] float32, to be handed to the next batch's call.
    auxiliary_loss: [] float32, to be added to the training loss.
  """

  expert: jax.Array
  gate: jax.Array
  slot: jax.Array
  source: jax.Array
  prices: jax.Array
  auxiliary_loss: jax.Array


@runtime_checkable
class Router(Protocol):
  """What BaseLayer asks of a router."""

  @property
  def num_selected_experts(self) -> int:
    """Experts per token, K."""
    ...

  def capacity(self, num_tokens: int, num_experts: int) -> int:
    """Slots C of an expert for a training group of `num_tokens`."""
    ...

  def even_gate(self, num_experts: int) -> float:
    """The raw gate of a token that likes all experts equally, at affinity 0."""
    ...

  def plan(
    self, affinities: jax.Array, mask: jax.Array, prices: jax.Array
  ) -> Plan:
    """Routes one training group.

    Args:
      affinities: [S, E] float32.
      mask: [S] bool, False on padding.
      prices: [E] float32, of the previous batch's plan; zero at first.
    """
    ...

  def choose(
    self, affinities: jax.Array, mask: jax.Array, prices: jax.Array
  ) -> Choice:
    """Routes tokens at test time, each on its own; arguments as for `plan`."""
    ...


@dataclasses.dataclass(frozen=True)
class BalancedRouter:
  """BASE routing: balanced assignment in training, greedy at test time.

  Lewis et al. 2021 (arXiv:2103.16716). The raw gate is the sigmoid of the
  affinity of the assigned expert.

  Attributes:
    prices_at_test: choose by affinity minus learned price at test time, as
      training does, but for its bound on an expert's load. False: by affinity
      alone, the paper's way, which sends tokens to experts that have not been
      trained on their like; docs/tried.md has what it costs.
  """

  prices_at_test: bool = True

  @property
  def num_selected_experts(self) -> int:
    """One expert per token."""
    return 1

  def capacity(self, num_tokens: int, num_experts: int) -> int:
    """Slots of an expert, `C = ceil(S / E)`."""
    return math.ceil(num_tokens / num_experts)

  def even_gate(self, num_experts: int) -> float:
    """The sigmoid's, 1 / 2."""
    del num_experts
    return 0.5

  def plan(
    self, affinities: jax.Array, mask: jax.Array, prices: jax.Array
  ) -> Plan:
    """Assigns C tokens to each expert; see `Router.plan`."""
    num_tokens, num_experts = affinities.shape
    solution = assignment.balanced_assignment(
      lax.stop_gradient(affinities), mask, lax.stop_gradient(prices)
    )
    num_slots = num_experts * self.capacity(num_tokens, num_experts)
    slot = solution.slot[:, None]
    expert = solution.expert[:, None]
    return Plan(
      expert=expert,
      gate=_pick(jax.nn.sigmoid(affinities), expert, mask),
      slot=slot,
      source=_invert(slot, num_slots),
      prices=solution.prices,
      auxiliary_loss=jnp.float32(0.0),
    )

  def choose(
    self, affinities: jax.Array, mask: jax.Array, prices: jax.Array
  ) -> Choice:
    """Each token's favourite; see `Router.choose`."""
    scores = affinities - prices[None] if self.prices_at_test else affinities
    expert = assignment.greedy_assignment(scores, mask)[:, None]
    return Choice(expert, _pick(jax.nn.sigmoid(affinities), expert, mask))


@dataclasses.dataclass(frozen=True)
class TopKRouter:
  """Switch or top-k routing with a capacity and an auxiliary loss.

  Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6; the raw gate is the
  softmax of the affinities, not normalised over the chosen experts. In
  training, the choices beyond an expert's capacity are dropped, later choices
  first, then later tokens. At test time nothing is dropped.

  Attributes:
    num_selected_experts: K; 1 is Switch.
    capacity_factor: slots relative to an even share.
    auxiliary_loss_weight: of the load-balancing loss.
    z_loss_weight: of the squared log-partition (ST-MoE, arXiv:2202.08906).
  """

  num_selected_experts: int = 1
  capacity_factor: float = 1.25
  auxiliary_loss_weight: float = 0.01
  z_loss_weight: float = 0.0

  def __post_init__(self):
    if self.num_selected_experts < 1:
      raise ValueError(
        f"num_selected_experts is {self.num_selected_experts}; a token needs "
        "at least 1 expert"
      )
    if not self.capacity_factor > 0:
      raise ValueError(
        f"capacity_factor is {self.capacity_factor}; it must be positive"
      )

  def capacity(self, num_tokens: int, num_experts: int) -> int:
    """Slots of an expert, `C = ceil(S K capacity_factor / E)`, at most S."""
    wanted = num_tokens * self.num_selected_experts * self.capacity_factor
    # No expert can be chosen twice by one token.
    return min(num_tokens, math.ceil(wanted / num_experts))

  def even_gate(self, num_experts: int) -> float:
    """The softmax's, 1 / E."""
    return 1.0 / num_experts

  def plan(
    self, affinities: jax.Array, mask: jax.Array, prices: jax.Array
  ) -> Plan:
    """Drops what is over capacity; see `Router.plan`."""
    num_tokens, num_experts = affinities.shape
    choice = self.choose(affinities, mask, prices)
    capacity = self.capacity(num_tokens, num_experts)
    num_slots = num_experts * capacity
    # First choices of all tokens come before all second choices.
    key = jnp.where(mask[:, None], choice.expert, num_experts).T.reshape(-1)
    position = jnp.arange(key.shape[0], dtype=jnp.int32)
    ordered_key, order = lax.sort((key, position), num_keys=1)
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    first = jnp.sum(key[:, None] < experts[None], axis=0, dtype=jnp.int32)
    rank = position - first[ordered_key]
    kept = (rank < capacity) & (ordered_key < num_experts)
    slot = jnp.where(kept, ordered_key * capacity + rank, num_slots)
    slot = jnp.zeros_like(slot).at[order].set(slot, unique_indices=True)
    slot = slot.reshape(self.num_selected_experts, num_tokens).T
    return Plan(
      expert=choice.expert,
      gate=choice.gate,
      slot=slot,
      source=_invert(slot, num_slots),
      prices=prices,
      auxiliary_loss=self._auxiliary_loss(affinities, mask, choice.expert),
    )

  def choose(
    self, affinities: jax.Array, mask: jax.Array, prices: jax.Array
  ) -> Choice:
    """Each token's K favourites; see `Router.choose`."""
    del prices
    num_experts = affinities.shape[1]
    if self.num_selected_experts > num_experts:
      raise ValueError(
        f"num_selected_experts is {self.num_selected_experts}, but there are "
        f"{num_experts} experts; choose at most that many"
      )
    _, expert = lax.top_k(affinities, self.num_selected_experts)
    gate = _pick(jax.nn.softmax(affinities, axis=-1), expert, mask)
    return Choice(expert, gate)

  def _auxiliary_loss(
    self, affinities: jax.Array, mask: jax.Array, expert: jax.Array
  ) -> jax.Array:
    """`E sum_e f_e P_e` and the z-loss, weighted; means over real tokens."""
    num_experts = affinities.shape[1]
    real = mask[:, None].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real), 1.0)
    chosen = expert[:, :, None] == jnp.arange(num_experts)[None, None]
    load = jnp.mean(chosen.astype(jnp.float32), axis=1)
    load = jnp.sum(load * real, axis=0) / count
    shares = jnp.sum(jax.nn.softmax(affinities, axis=-1) * real, axis=0) / count
    balance = num_experts * jnp.sum(lax.stop_gradient(load) * shares)
    log_partition = jax.nn.logsumexp(affinities, axis=-1)
    z_loss = jnp.sum(log_partition**2 * real[:, 0]) / count
    return self.auxiliary_loss_weight * balance + self.z_loss_weight * z_loss


def _pick(values: jax.Array, expert: jax.Array, mask: jax.Array) -> jax.Array:
  """Picks `values[s, expert[s, k]]` of [S, E], for [S, K]; 0 on padding [S].

  By comparison, because the transpose of indexing would be a scatter.
  """
  experts = jnp.arange(values.shape[1], dtype=jnp.int32)
  chosen = expert[:, :, None] == experts[None, None]
  chosen &= mask[:, None, None]
  return jnp.sum(jnp.where(chosen, values[:, None], 0.0), axis=-1)


def _invert(slot: jax.Array, num_slots: int) -> jax.Array:
  """The choice in every slot, [num_slots]; `slot.size` where there is none."""
  choices = jnp.arange(slot.size, dtype=jnp.int32)
  empty = jnp.full(num_slots, slot.size, jnp.int32)
  return empty.at[slot.reshape(-1)].set(choices, mode="drop")


class Dispatcher(NamedTuple):
  """Index maps that move rows of several groups to expert slots and back.

  Attributes:
    slot: [N, K] int32, the row of [E * M] each choice goes to, or E * M.
    source: [E * M] int32, the choice `n * K + k` in each slot, or N * K.
    num_experts: E.
  """

  slot: jax.Array
  source: jax.Array
  num_experts: int

  def dispatch(self, rows: jax.Array) -> jax.Array:
    """Moves rows [N, D] to their slots [E, M, D]; empty slots are zero."""
    num_rows, num_selected = self.slot.shape
    token = jnp.minimum(self.source // num_selected, num_rows)
    slots = gather_rows(rows, token, self.slot)
    return slots.reshape(self.num_experts, -1, rows.shape[1])

  def combine(self, slots: jax.Array) -> jax.Array:
    """Moves slots [E, M, D] back to [N, K, D]; dropped choices are zero."""
    width = slots.shape[2]
    rows = gather_rows(
      slots.reshape(-1, width), self.slot.reshape(-1), self.source[:, None]
    )
    return rows.reshape(*self.slot.shape, width)


def dispatcher(plans: Plan, num_experts: int) -> Dispatcher:
  """Joins the plans of G groups, arrays with a leading axis G, in one map.

  Slots are ordered by expert, then group, so that an expert's rows are
  together: M = G * C and N = G * S.
  """
  num_groups, num_tokens, num_selected = plans.slot.shape
  capacity = plans.source.shape[1] // num_experts
  group = jnp.arange(num_groups, dtype=jnp.int32)
  num_slots = num_groups * num_experts * capacity
  expert, place = jnp.divmod(plans.slot, capacity)
  slot = (expert * num_groups + group[:, None, None]) * capacity + place
  slot = jnp.where(expert < num_experts, slot, num_slots)
  num_choices = num_tokens * num_selected
  source = jnp.where(
    plans.source < num_choices,
    plans.source + group[:, None] * num_choices,
    num_groups * num_choices,
  )
  source = source.reshape(num_groups, num_experts, capacity)
  return Dispatcher(
    slot.reshape(-1, num_selected),
    jnp.swapaxes(source, 0, 1).reshape(-1),
    num_experts,
  )


@jax.custom_vjp
def gather_rows(
  rows: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
  """Gathers `rows[index]`, zero where out of range, without scatters.

  The transpose of a gather is a scatter-add; here the caller knows who reads
  each row, so the transpose is a gather too.

  Args:
    rows: [N, D].
    index: [M] int32; N where the result is zero.
    inverse: [N, K] int32, all positions m with index[m] == n, filled up with M.

  Returns:
    [M, D].
  """
  del inverse
  return rows.at[index].get(mode="fill", fill_value=0)


def _gather_rows_forward(rows, index, inverse):
  return gather_rows(rows, index, inverse), inverse


def _gather_rows_backward(inverse, cotangent):
  read = cotangent.at[inverse.reshape(-1)].get(mode="fill", fill_value=0)
  read = read.reshape(*inverse.shape, cotangent.shape[1])
  gradient = read[:, 0] if inverse.shape[1] == 1 else jnp.sum(read, axis=1)
  return gradient, None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)
