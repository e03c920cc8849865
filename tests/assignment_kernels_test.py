"""The GPU solver, interpreted, against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basemt_jax import assignment, repair
from basemt_jax.kernels import assignment_kernels, kernel_call

S = 96
HARD = ("random", "skewed", "ties", "duplicates", "padding", "infinite")


def scores(kind, num_experts, seed=0):
  """[S, E] float32 and the mask [S]."""
  draw = np.random.default_rng(seed)
  values = draw.normal(size=(S, num_experts))
  mask = np.ones(S, bool)
  if kind == "skewed":
    values += np.linspace(0, 8, num_experts)
  elif kind == "ties":
    values = np.round(values)
  elif kind == "duplicates":
    values = values[draw.integers(4, size=S)]
  elif kind == "padding":
    mask = draw.uniform(size=S) < 0.7
  elif kind == "infinite":
    values[draw.uniform(size=values.shape) < 0.1] = -np.inf
    values[3] = np.inf
  return jnp.asarray(values, jnp.float32), jnp.asarray(mask)


@pytest.fixture
def interpreted(monkeypatch):
  """The solver as on a GPU, with its kernels interpreted."""
  for name in ("newton_step", "repair"):
    kernel = getattr(assignment_kernels, name)
    monkeypatch.setattr(
      assignment_kernels, name, functools.partial(kernel, interpret=True)
    )
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("num_experts", [2, 6])
def test_solver_with_kernels_gives_the_plain_ones_assignment(
  num_experts, interpreted, monkeypatch
):
  solve = jax.jit(assignment.balanced_assignment)
  fast = [solve(*scores(kind, num_experts)) for kind in HARD]
  monkeypatch.undo()
  solve = jax.jit(lambda x, mask: assignment.balanced_assignment(x, mask))
  for kind, found in zip(HARD, fast, strict=True):
    values, mask = scores(kind, num_experts)
    expected = solve(values, mask)
    # Sums are rounded in another order, which may swap tokens that are worth
    # the same; what the assignment is worth is the same.
    assert sorted(found.slot.tolist()) == sorted(expected.slot.tolist()), kind
    worth = [
      np.where(mask, np.clip(values, -1e3, 1e3)[np.arange(S), x.expert], 0.0)
      for x in (found, expected)
    ]
    np.testing.assert_allclose(*map(np.sum, worth), rtol=1e-3, err_msg=kind)
    np.testing.assert_allclose(
      found.prices, expected.prices, rtol=1e-3, atol=1e-3, err_msg=kind
    )


def test_newton_steps_are_the_plain_ones_for_groups_and_free_slots():
  num_experts, capacity = 6, 20
  draw = np.random.default_rng(1)
  values = jnp.asarray(draw.normal(size=(2, num_experts, S)), jnp.float32)
  weights = jnp.asarray(draw.uniform(size=(2, S)) < 0.8, jnp.float32)
  free = jnp.asarray(draw.normal(size=(2, num_experts)), jnp.float32)
  free_weight = num_experts * capacity - weights.sum(axis=1)
  prices = jnp.asarray(draw.normal(size=(2, num_experts)), jnp.float32)

  def steps(function, *given):
    *given, prices = given
    for temperature in (1.0, 0.1, 0.02):
      prices = function(
        *given, prices, jnp.float32(temperature), capacity=capacity
      )
    return prices

  given = (values, weights, free, free_weight, prices)
  kernel = functools.partial(
    assignment_kernels.newton_step,
    num_doublings=assignment._NUM_DOUBLINGS,
    interpret=True,
  )
  found = jax.jit(jax.vmap(functools.partial(steps, kernel)))(*given)
  plain = functools.partial(steps, assignment._newton_step)
  expected = jax.jit(jax.vmap(plain))(*given)
  assert np.abs(expected - prices).max() > 0.5
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [4, 6])
@pytest.mark.parametrize("is_full", [True, False])
def test_repair_makes_the_plain_ones_moves(num_experts, is_full):
  capacity, width = S // num_experts, 24
  moves = functools.partial(
    assignment_kernels.repair,
    capacity=capacity,
    rounds=assignment._REPAIR_ROUNDS,
    hops=repair.HOPS,
    max_moves=repair.MAX_MOVES,
    tolerance=repair.TOLERANCE,
    interpret=True,
  )
  moves = jax.jit(moves)
  plain = jax.jit(
    functools.partial(
      repair.move_along_paths,
      capacity=capacity,
      rounds=assignment._REPAIR_ROUNDS,
    )
  )
  moved = 0
  for seed in range(6):
    draw = np.random.default_rng(seed)
    # Two thirds of the places at most are taken, unevenly.
    counts = draw.integers(4, 17, size=num_experts)
    tokens = np.full((num_experts, width), S)
    order = draw.permutation(S)
    for e, count in enumerate(counts):
      tokens[e, :count], order = order[:count], order[count:]
    values = draw.normal(size=(S, num_experts)) * 0.1
    if seed % 2:
      values = np.round(values, 1)
    load = capacity - 8 + counts - (0 if is_full else 6)
    slack = np.zeros(num_experts) if is_full else draw.normal(size=num_experts)
    given = (
      jnp.asarray(values, jnp.float32),
      jnp.asarray(tokens, jnp.int32),
      jnp.asarray(load, jnp.int32),
      jnp.asarray(slack, jnp.float32),
    )
    expected = plain(*given)
    np.testing.assert_array_equal(moves(*given), expected)
    moved += int(np.sum(expected != tokens))
  assert moved > 20


def test_devices_of_a_mesh_find_what_one_device_finds(interpreted, monkeypatch):
  num_experts, num_groups = 4, 8
  kinds = ("random", "skewed", "padding", "duplicates") * 2
  values, mask = (
    jnp.stack(parts)
    for parts in zip(
      *(scores(kind, num_experts, i) for i, kind in enumerate(kinds)),
      strict=True,
    )
  )
  prices = jnp.asarray([0.3, -0.1, 0.0, -0.2])
  solve = jax.vmap(assignment.balanced_assignment, in_axes=(0, 0, None))
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "expert", "model"), (jax.sharding.AxisType.Auto,) * 3
  )
  rows = jax.sharding.PartitionSpec(("data", "expert"))
  sharded = jax.shard_map(
    solve,
    mesh=mesh,
    in_specs=(rows, rows, jax.sharding.PartitionSpec()),
    out_specs=rows,
    # Pallas's interpreter mixes what varies over devices with constants.
    # `kernel_call_test` checks the types.
    check_vma=False,
  )
  found = jax.jit(sharded)(values, mask, prices)
  alone = jax.jit(solve)(values, mask, prices)
  np.testing.assert_array_equal(found.slot, alone.slot)
  np.testing.assert_allclose(found.prices, alone.prices, rtol=1e-5, atol=1e-6)
  monkeypatch.undo()
  plain = jax.vmap(
    lambda *given: assignment.balanced_assignment(*given), in_axes=(0, 0, None)
  )
  expected = jax.jit(plain)(values, mask, prices)
  np.testing.assert_allclose(
    found.prices, expected.prices, rtol=1e-3, atol=1e-3
  )
  for i in range(num_groups):
    assert sorted(found.slot[i].tolist()) == list(range(S))
    worth = [
      np.asarray(values)[i, np.arange(S), x.expert[i]][mask[i]].sum()
      for x in (found, expected)
    ]
    np.testing.assert_allclose(*worth, rtol=1e-3, err_msg=kinds[i])


@pytest.mark.parametrize(
  ("num_experts", "kibibytes", "expected"),
  [
    (1, 227, False),
    (2, 99, True),
    (64, 99, True),
    (65, 99, False),  # Two float32 matrices of 128 x 128.
    (128, 163, True),
    (129, 227, False),
  ],
)
def test_experts_that_kernels_take(
  num_experts, kibibytes, expected, monkeypatch
):
  values = jax.ShapeDtypeStruct((num_experts, S), jnp.float32)
  assert not assignment_kernels.is_supported(values)  # There is no GPU.
  monkeypatch.setattr(kernel_call, "can_run", lambda: True)
  monkeypatch.setattr(kernel_call, "shared_memory", lambda: 1024 * kibibytes)
  assert assignment_kernels.is_supported(values) == expected
