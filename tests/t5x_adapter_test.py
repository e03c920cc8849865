"""The adapter driven as T5X drives it; see `t5x_test` for the real one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_calls
import toy
from flax import traverse_util
from flax.core import freeze, unfreeze
from flax.linen import partitioning as nn_partitioning

from basemt_jax import (
  checkpointing,
  losses,
  metrics,
  optimizer,
  partitioning,
  steps,
  translation,
)

pytest.importorskip("seqio")
pytest.importorskip("clu")


from basemt_jax import t5x_adapter, t5x_data

# T5X still enters meshes so.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*set_mesh.*:DeprecationWarning"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def make(cache, tmp_path):
  """A run in the test's directory."""

  def run(config=toy.SPARSE, settings=None, name="run", **changes):
    return t5x_calls.make_run(
      cache, tmp_path / name, config, settings, **changes
    )

  return run


OURS_ONLY = {
  "gradient_norm",
  "tokens_per_second",
  "steps_per_second",
  "learning_rate",
}


def with_dropout(config):
  return dataclasses.replace(config, dropout_rate=0.1)


@pytest.fixture(scope="module")
def sparse(cache, tmp_path_factory):
  """A driver, compiled once for several tests."""
  directory = tmp_path_factory.mktemp("sparse")
  return t5x_calls.T5X(
    t5x_calls.make_run(cache, directory / "run", with_dropout(toy.SPARSE))
  )


def assert_same_metrics(driver, scalars):
  values = driver.values()
  assert scalars.keys() - OURS_ONLY <= values.keys()
  for name in scalars.keys() - OURS_ONLY:
    assert values[name] == pytest.approx(scalars[name], rel=1e-6), name


def test_one_seed_gives_us_and_t5x_the_same_dense_run(make):
  config = with_dropout(toy.DENSE)
  expected, scalars = t5x_calls.our_training(
    make(config, name="ours"), 4, save_every=4, log_every=4
  )
  driver = t5x_calls.T5X(make(config)).start()
  assert not t5x_calls.differences(driver.train(4), expected)
  assert_same_metrics(driver, scalars)


def test_sparse_runs_are_the_same_and_t5x_goes_on_with_ours(make, sparse):
  ours = make(with_dropout(toy.SPARSE), name="ours")
  expected, scalars = t5x_calls.our_training(ours, 4, save_every=2)
  driver = sparse.start()
  half = driver.train(2)
  with checkpointing.Checkpoints(ours.model_dir, read_only=True) as checkpoints:
    stored = checkpoints.restore(2, half, "the test")
  assert not t5x_calls.differences(stored, half)
  t5x_calls.save(stored, driver.run.model_dir, 2)
  assert not t5x_calls.differences(driver.start(stored).train(2), expected)
  assert_same_metrics(driver, scalars)


def test_gradients_are_accumulated_as_we_do(make):
  settings = toy.settings(microbatches=2)
  config = with_dropout(toy.SPARSE)
  ours = make(config, settings, name="ours")
  expected, scalars = t5x_calls.our_training(ours, 2, save_every=2, log_every=2)
  driver = t5x_calls.T5X(make(config, settings)).start()
  assert not t5x_calls.differences(driver.train(2), expected)
  assert_same_metrics(driver, scalars)


@pytest.mark.slow
def test_we_go_on_from_checkpoints_of_t5x(make):
  driver = t5x_calls.T5X(make()).start()
  t5x_calls.save(driver.train(2), driver.run.model_dir, 2)
  expected = driver.train(2)
  assert not t5x_calls.differences(
    t5x_calls.our_training(driver.run, 4)[0], expected
  )


def test_gradients_on_eight_devices_are_those_on_one(make):
  run = make()
  spread = dataclasses.replace(run, devices=(2, 2, 2))
  model, spread_model = t5x_adapter.Model(run), t5x_adapter.Model(spread)
  variables = unfreeze(
    jax.jit(lambda key: model.get_initial_variables(key, {}))(jax.random.key(0))
  )
  batch = next(t5x_calls.batches_for(run))
  arguments = (
    variables["params"],
    batch,
    jax.random.key(1),
    {"prices": variables["prices"]},
  )

  def gradients(model, *arguments):
    return jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))(*arguments)

  (loss, (_, prices)), expected = gradients(model, *arguments)
  mesh = spread.mesh()
  placed = partitioning.variable_shardings(
    variables["params"], variables["params_axes"], mesh
  )
  experts = placed["encoder"]["layers_0"]["base_layer"]["experts"]
  spec = experts["sublayer_0"]["wi"]["kernel"].spec
  assert tuple(spec) == ("expert", None, "model")
  rules = nn_partitioning.axis_rules(partitioning.LOGICAL_AXIS_RULES)
  with mesh, rules:
    (spread_loss, (_, spread_prices)), found = gradients(
      spread_model,
      jax.device_put(variables["params"], placed),
      partitioning.put_batch(batch, mesh),
      *arguments[2:],
    )
  assert float(spread_loss) == pytest.approx(float(loss), rel=1e-6)
  for left, right in ((found, expected), (spread_prices, prices)):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      jax.device_get(unfreeze(left)),
      jax.device_get(unfreeze(right)),
    )


@pytest.mark.slow
def test_both_phases_are_those_of_our_trainer(make):
  settings = toy.settings(dense_steps=2, rewarm_steps=1, average_decay=0.5)
  expected, _ = t5x_calls.our_training(make(settings=settings, name="ours"), 4)
  dense = make(toy.DENSE, settings, name="dense")
  t5x_calls.save(t5x_calls.T5X(dense).start().train(2), dense.model_dir, 2)
  path = f"{dense.model_dir}/checkpoint_2"
  run = make(settings=settings)
  driver = t5x_calls.T5X(run, path=path, mode="specific")
  tree = t5x_data.from_dense(
    {"state": {"step": np.int32(2)}},
    driver.state_dict(driver.shapes),
    path=path,
    run=run,
  )
  driver.start(tree, path=path, mode="specific")
  assert not t5x_calls.differences(driver.train(2), expected)


# ------------------------------------------------------------- evaluation


def test_evaluates_and_translates_as_we_do(sparse):
  run, model = sparse.run, sparse.model
  store = run.store()
  program = steps.Program(
    run.config(store), run.settings, lambda step: 1.0, run.mesh(), 3
  )
  state = sparse.state_dict(sparse._fresh)
  params, mutables = state["target"], freeze(state["flax_mutables"])
  variables = {"params": params, **unfreeze(mutables)}
  ((name, rows),) = t5x_data.get_eval_datasets(
    t5x_calls.dataset_config(split="validation"), 0, 1, None, None, run=run
  ).items()
  assert (
    name == "toy" and rows.element_spec.keys() == sparse._input_types.keys()
  )
  evaluate = jax.jit(model.eval_fn)
  for _ in range(2):  # They start over.
    sums = None
    for batch in rows:
      _, found = evaluate(params, batch, mutables)
      sums = _merged(sums, found)
  measured = losses.measured(
    program.eval_step, variables, rows, store.directions
  )
  expected = metrics.of_directions(measured, "loss")
  assert len(expected) == 3
  for direction, loss in expected.items():
    value = sums[f"loss/{direction}"].compute_value().value
    assert float(value) == pytest.approx(loss, rel=1e-6)

  # SeqIO's own batches are not packed and know no directions.
  features = {
    k: jnp.asarray(v) for k, v in toy.batch(rows=4).items() if k != "direction"
  }
  _, plain = jax.eval_shape(model.eval_fn, params, features, mutables)
  assert plain.keys() == {"loss", "accuracy", "target_tokens"}
  tokens = np.asarray(features["encoder_input_tokens"])
  sources = [row[row > 0].tolist() for row in tokens]
  tokens = np.pad(tokens, ((0, 0), (0, 8)))
  for row, source in zip(tokens, sources, strict=True):
    row[len(source)] = 1
  ids, aux = jax.jit(model.predict_batch_with_aux)(
    params,
    {"encoder_input_tokens": tokens},
    rng=None,
    flax_mutables=mutables,
  )
  translator = translation.Translator(program.model, variables, run.search)
  for i, (best,) in enumerate(translator.translate(sources)):
    found = [t for t in np.asarray(ids)[i].tolist() if t > 1]
    assert tuple(found[: len(best.ids)]) == best.ids
    assert float(aux["scores"][i]) == pytest.approx(best.score, rel=1e-5)


def _merged(total, metrics):
  if total is None:
    return metrics
  return {k: v.merge(metrics[k]) for k, v in total.items()}


# --------------------------------------------------------------- optimizer


def axes_of(make, tx, name):
  """Shape and names of axes of a moment of an expert's first matrix."""
  config = dataclasses.replace(
    toy.SPARSE, emb_dim=128, mlp_dim=256, head_dim=64
  )
  run = make(config, toy.settings(optimizer=tx))
  model = t5x_adapter.Model(run)
  shapes = jax.eval_shape(
    lambda key: model.get_initial_variables(key, {}, {}), jax.random.key(0)
  )
  state = jax.eval_shape(model.optimizer_def.create, shapes["params"])
  axes = model.optimizer_def.derive_logical_axes(
    state, nn_partitioning.get_axis_names(shapes["params_axes"])
  )
  found = traverse_util.flatten_dict(
    axes.state_dict()["state"]["param_states"], sep="/"
  )
  arrays = traverse_util.flatten_dict(
    state.state_dict()["state"]["param_states"], sep="/"
  )
  kernel = "encoder/layers_0/base_layer/experts/sublayer_0/wi/kernel"
  path = next(p for p in found if p.endswith(f"{name}/{kernel}"))
  return arrays[path].shape, tuple(found[path])


def test_factored_moments_keep_the_axes_they_have(make):
  axes = functools.partial(axes_of, make, optimizer.adafactor)
  # Without F, the longest axis.
  assert axes("v_row") == ((4, 128), ("expert", "embed"))
  assert axes("v_col") == ((4, 256), ("expert", "expert_mlp"))
  assert axes("v") == ((1,), (None,))


def test_moments_by_neuron_keep_the_axes_they_have(make):
  tx = functools.partial(optimizer.adamw, expert_moments="by_neuron")
  assert axes_of(make, tx, "nu") == ((4, 256), ("expert", "expert_mlp"))
