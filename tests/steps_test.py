"""Steps on simulated devices, against one device and independent sums."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import toy
from flax import traverse_util
from jax.sharding import PartitionSpec

from basemt_jax import metrics, optimizer, partitioning, steps
from basemt_jax import model as model_lib

FACTORED = functools.partial(optimizer.adafactor, min_dim_size_to_factor=8)
MESHES = [(2, 4, 1), (8, 1, 1), (2, 2, 2)]


def recorder(learning_rate):
  """Keeps the gradients themselves in its state."""
  return optax.chain(
    optax.trace(decay=0.0), optax.scale_by_learning_rate(learning_rate)
  )


# Parameters stay what they are, so that steps can be compared.
PLAIN = toy.settings(optimizer=recorder, learning_rate=lambda step: 0.0, seed=3)


@functools.cache
def program(config=toy.DENSE, settings=PLAIN, shape=(1, 1, 1)):
  return steps.Program(
    config, settings, settings.learning_rate, toy.mesh(*shape), 3
  )


def one_step(program, batch):
  """Gradients, sums and prices of the first step."""
  state, sums = program.train_step(
    program.init(), None, partitioning.put_batch(batch, program.mesh)
  )
  return jax.device_get((state.opt_state[0].trace, sums, state.mutables))


def assert_close(found, expected, relative=1e-5):
  """Every array to `relative` of its largest element."""
  found, expected = (
    traverse_util.flatten_dict(x, sep="/") for x in (found, expected)
  )
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(
      found[path],
      value,
      rtol=0,
      atol=relative * np.abs(value).max() + 1e-12,
      err_msg=path,
    )


# ---------------------------------------------------------------- devices


@pytest.fixture(scope="module")
def one_device():
  return one_step(program(toy.SPARSE), toy.batch())


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sparse_loss_and_gradients_equal_one_device_s(shape, one_device):
  grads, sums, mutables = one_step(
    program(toy.SPARSE, shape=shape), toy.batch()
  )
  expected_grads, expected, expected_mutables = one_device
  # Same assignment: every expert got the same tokens of every direction.
  for layer, router in expected["router"].items():
    for name in ("expert", "favourite", "agreement"):
      np.testing.assert_array_equal(sums["router"][layer][name], router[name])
  assert_close(grads, expected_grads)
  assert_close(sums, expected)
  assert_close(mutables, expected_mutables)
  assert all(
    np.abs(g).max() > 0
    for g in traverse_util.flatten_dict(expected_grads).values()
  )


def test_dense_losses_of_ten_steps_equal_one_device_s():
  settings = dataclasses.replace(
    PLAIN, optimizer=optimizer.adamw, learning_rate=lambda step: 3e-3
  )

  def losses(shape):
    trained = program(toy.DENSE, settings, shape)
    state, found = trained.init(), []
    for step in range(10):
      rows = partitioning.put_batch(toy.batch(step), trained.mesh)
      state, sums = trained.train_step(state, None, rows)
      found.append(float(np.sum(sums["loss"]) / np.sum(sums["weight"])))
    return found

  expected = losses((1, 1, 1))
  assert len(set(expected)) == 10
  np.testing.assert_allclose(losses((2, 4, 1)), expected, rtol=1e-5)


def test_muon_over_experts_devices_steps_as_on_one():
  settings = dataclasses.replace(
    PLAIN,
    optimizer=functools.partial(optimizer.muon, dtype="float32"),
    learning_rate=lambda step: 3e-3,
  )

  def stepped(shape):
    trained = program(toy.SPARSE, settings, shape)
    state = trained.init()
    before = jax.device_get(state.params)
    rows = partitioning.put_batch(toy.batch(), trained.mesh)
    state, _ = trained.train_step(state, None, rows)
    after = jax.device_get(state.params)
    return jax.tree.map(np.subtract, after, before)

  expected, found = stepped((1, 1, 1)), stepped((2, 4, 1))
  # Making a matrix orthogonal magnifies rounding where it is nearly singular.
  for name, update in traverse_util.flatten_dict(expected, sep="/").items():
    other = traverse_util.flatten_dict(found, sep="/")[name]
    error = np.linalg.norm(other - update)
    assert error <= 1e-4 * np.linalg.norm(update), name


def test_a_metric_of_ones_own_is_added_up_by_direction():
  own = metrics.Metric(
    "even",
    "even targets",
    sums=("even", "weight"),
    of_directions=True,
    row=lambda logits, batch: (
      batch["decoder_loss_weights"] * (batch["decoder_target_tokens"] % 2 == 0)
    ).sum(-1),
  )
  settings = dataclasses.replace(PLAIN, metrics=(own,), microbatches=2)
  batch = toy.batch()
  _, sums, _ = one_step(program(toy.DENSE, settings), batch)
  found = metrics.scalars(sums, toy.DIRECTIONS, (own,))
  weights = batch["decoder_loss_weights"]
  is_even = batch["decoder_target_tokens"] % 2 == 0
  assert found["even"] == pytest.approx(
    (is_even * weights).sum() / weights.sum()
  )
  for i, name in enumerate(toy.DIRECTIONS):
    rows = batch["direction"] == i
    expected = (is_even * weights)[rows].sum() / weights[rows].sum()
    assert found[f"even/{name}"] == pytest.approx(expected)


def test_microbatches_give_the_gradients_of_the_whole_batch():
  grads, sums, _ = one_step(
    program(toy.DENSE, dataclasses.replace(PLAIN, microbatches=4), (2, 2, 1)),
    toy.batch(),
  )
  expected_grads, expected, _ = one_step(program(), toy.batch())
  assert_close(grads, expected_grads)
  assert_close(sums, expected)


# ---------------------------------------------------------------- metrics


def logits_of(config, variables, batch):
  forward = functools.partial(
    model_lib.forward, model_lib.Transformer(config), train=True
  )
  logits, updates = jax.jit(forward)(variables, batch)
  return np.asarray(logits, np.float64), jax.device_get(updates)


def test_sums_are_those_of_an_independent_computation(one_device):
  trained, batch = program(toy.SPARSE), toy.batch()
  logits, updates = logits_of(
    toy.SPARSE, trained.variables(trained.init()), batch
  )
  log_z = np.log(np.exp(logits).sum(-1))
  target, weight = (
    batch["decoder_target_tokens"],
    batch["decoder_loss_weights"],
  )
  nll = log_z - np.take_along_axis(logits, target[..., None], -1)[..., 0]
  low = PLAIN.label_smoothing / (384 - 1)
  smoothed = np.full(logits.shape, low)
  np.put_along_axis(
    smoothed, target[..., None], 1 - PLAIN.label_smoothing, axis=-1
  )
  # Kullback-Leibler divergence from the smoothed targets, and z-loss.
  loss = np.sum(smoothed * (np.log(smoothed) + log_z[..., None] - logits), -1)
  loss += PLAIN.z_loss * log_z**2
  correct = logits.argmax(-1) == target
  sums = one_device[1]
  for i in range(3):
    is_row = (batch["direction"] == i)[:, None] * weight
    for name, values in (
      ("nll", nll),
      ("loss", loss),
      ("correct", correct),
      ("weight", weight),
    ):
      np.testing.assert_allclose(
        sums[name][i], np.sum(values * is_row), rtol=1e-5
      )
  assert sums["tokens"] == weight.sum() + np.sum(
    batch["encoder_input_tokens"] > 0
  )
  assert sums["steps"] == 1 and sums["bad_step"] == steps.NEVER
  for side in ("encoder", "decoder"):
    sown = updates["intermediates"][side]["layers_0"]["base_layer"]
    router = sums["router"][f"{side}/layers_0"]
    for name in ("expert", "favourite"):
      table = np.zeros((3, 4))
      for row, direction in zip(sown[name][0], batch["direction"], strict=True):
        for choice in row[row >= 0]:
          table[direction, choice] += 1
      np.testing.assert_array_equal(router[name], table)
    agrees = (sown["expert"][0] == sown["favourite"][0]) & (
      sown["expert"][0] >= 0
    )
    assert router["agreement"].sum() == agrees.sum()
  # The norm of all gradients together.
  norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(one_device[0])))
  np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-5)


def test_sums_add_up_over_steps_and_start_anew_with_none():
  trained = program()
  parts = []
  for step in range(2):
    _, sums = trained.train_step(trained.init(), None, toy.batch(step))
    parts.append(jax.device_get(sums))
  state, sums = trained.init(), None
  for step in range(2):
    state, sums = trained.train_step(state, sums, toy.batch(step))
  both = jax.device_get(sums)
  assert int(both["steps"]) == int(state.step) == 2
  for name in ("loss", "nll", "correct", "weight", "tokens", "grad_norm"):
    np.testing.assert_allclose(
      both[name], parts[0][name] + parts[1][name], rtol=1e-5
    )


def test_first_step_that_is_not_finite_and_its_directions_are_kept():
  trained = program()
  state, sums = trained.init(), None
  for step in range(4):
    batch = toy.batch(step)
    batch["direction"][:] = np.arange(16) % 2
    if step == 2:
      batch["decoder_loss_weights"][1::2, 0] = np.inf
    state, sums = trained.train_step(state, sums, batch)
    if step < 2:
      assert int(sums["bad_step"]) == steps.NEVER
  # Step 3 was bad in all directions, for its parameters were not finite.
  assert int(sums["bad_step"]) == 2
  np.testing.assert_array_equal(sums["bad_direction"], [False, True, False])
  assert not np.isfinite(sums["nll"][:2]).any()


def test_evaluation_is_the_training_loss_without_smoothing():
  trained = program(
    toy.DENSE, dataclasses.replace(PLAIN, label_smoothing=0.0, z_loss=0.0)
  )
  state, batch = trained.init(), toy.batch(5)
  measured = jax.device_get(trained.eval_step(trained.variables(state), batch))
  _, sums = trained.train_step(state, None, batch)
  assert set(measured) == {"nll", "correct", "weight"}
  np.testing.assert_allclose(measured["nll"], sums["loss"], rtol=1e-5)
  for name in ("correct", "weight"):
    np.testing.assert_array_equal(measured[name], sums[name])


def test_dropout_is_drawn_anew_each_step_and_repeats_with_the_seed():
  dropped = dataclasses.replace(toy.DENSE, dropout_rate=0.5)
  trained, found = program(dropped), []
  for _ in range(2):
    state = trained.init()
    for _ in range(2):
      state, sums = trained.train_step(state, None, toy.batch())
      found.append(float(sums["nll"].sum()))
  assert found[:2] == found[2:] and found[0] != found[1]


# -------------------------------------------------------------- shardings


@pytest.mark.parametrize(
  "tx",
  [
    optimizer.adamw,
    FACTORED,
  ],
  ids=["adamw", "adafactor"],
)
def test_experts_and_their_moments_lie_on_the_expert_axis(tx):
  trained = program(
    toy.SPARSE, dataclasses.replace(PLAIN, optimizer=tx), (2, 2, 2)
  )
  specs = jax.tree.map(lambda s: s.spec, trained.shardings).tree()
  flat = traverse_util.flatten_dict(specs, sep="/")
  shapes = traverse_util.flatten_dict(trained.shapes.tree(), sep="/")
  assert flat.keys() == shapes.keys()
  seen = 0
  for path, spec in flat.items():
    is_expert = "/experts/" in path and len(shapes[path].shape) > 1
    assert (spec[:1] == ("expert",)) == is_expert, path
    seen += is_expert
  # Norm and two kernels, in encoder and decoder; their two moments.
  assert seen == 3 * 6 if tx is optimizer.adamw else seen >= 6 * 2
  kernel = "base_layer/experts/sublayer_0/wi/kernel"
  assert flat[f"target/encoder/layers_0/{kernel}"] == PartitionSpec(
    "expert", None, "model"
  )
  assert flat["state/step"] == PartitionSpec()
  prices = flat["flax_mutables/prices/encoder/layers_0/base_layer/prices"]
  assert prices in (PartitionSpec(), PartitionSpec(None))


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_small_states_of_experts_are_those_of_one_device(kept):
  config = dataclasses.replace(toy.SPARSE, expert_param_dtype=kept)
  small = functools.partial(optimizer.adamw, expert_moments="by_neuron")
  settings = toy.settings(optimizer=small, seed=3)
  states = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    trained = program(config, settings, shape)
    batch = partitioning.put_batch(toy.batch(), trained.mesh)
    state, _ = trained.train_step(trained.init(), None, batch)
    states.append(traverse_util.flatten_dict(state.tree(), sep="/"))
  expected, found = states
  kernel = "decoder/layers_0/base_layer/experts/sublayer_0/wi/kernel"
  assert found[f"target/{kernel}"].dtype == kept
  square = found[f"state/param_states/0/nu/{kernel}"]
  assert square.sharding.spec == PartitionSpec("expert", "model")
  # Gradients of what is kept in bfloat16 are sums of bfloat16.
  relative = 1e-5 if kept == "float32" else 2e-2
  for path, value in expected.items():
    a, b = (np.asarray(x, np.float32) for x in (found[path], value))
    far = np.abs(a - b) > relative * np.abs(b).max() + 1e-12
    # An update is of the sign of a gradient, which may be next to zero.
    assert far.mean() < 0.01, path


def test_factored_moments_of_experts_are_factored_and_split():
  trained = program(
    toy.SPARSE,
    dataclasses.replace(
      PLAIN,
      optimizer=FACTORED,
    ),
    (2, 2, 2),
  )
  flat = traverse_util.flatten_dict(trained.shapes.tree(), sep="/")
  shardings = traverse_util.flatten_dict(
    jax.tree.map(lambda s: s.spec, trained.shardings).tree(), sep="/"
  )
  rows = [
    path
    for path in flat
    if "v_row" in path and path.endswith("experts/sublayer_0/wi/kernel")
  ]
  assert len(rows) == 2
  for path in rows:
    assert flat[path].shape in ((4, 16), (4, 32))
    assert shardings[path] == PartitionSpec("expert", None)
    columns = path.replace("v_row", "v_col")
    assert shardings[columns] == PartitionSpec("expert", "model")


# --------------------------------------------------------------- settings


def test_a_conversion_after_the_end_is_refused():
  with pytest.raises(ValueError, match=r"dense_steps is 9.*train_steps = 4"):
    toy.settings(dense_steps=9)


def test_share_of_rounds():
  assert steps.share_of(1000, 0.5) == 500
  assert steps.share_of(9, 0.4) == 4


def test_experts_that_do_not_divide_over_devices_are_named():
  odd = dataclasses.replace(toy.SPARSE, num_experts=6)
  with pytest.raises(ValueError, match=r"num_experts is 6.*4"):
    program(odd, shape=(2, 4, 1))
