"""T5X's calls in T5X's order, without T5X; see `t5x_test` for the real one."""

import dataclasses
import functools
import pathlib
import re
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from flax import traverse_util
from flax.core import freeze, unfreeze
from flax.linen import partitioning as nn_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from basemt_jax import (
  checkpointing,
  conversion,
  description,
  heating,
  losses,
  metrics,
  optimizer,
  partitioning,
  sampling,
  steps,
  trainer,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax.data import batches

pytest.importorskip("seqio")
pytest.importorskip("clu")

import toy_tasks
from clu.data import dataset_iterator

from basemt_jax import t5x_adapter, t5x_data

# T5X still enters meshes so.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*set_mesh.*:DeprecationWarning"
)

BATCH_SIZE = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def make(cache, tmp_path):
  """A run in the test's directory."""

  def run(config=toy.SPARSE, settings=None, name="run", **changes):
    return make_run(cache, tmp_path / name, config, settings, **changes)

  return run


def make_run(cache, model_dir, config, settings=None, **changes):
  """A run of the toy network and tasks."""
  values = {
    "model_dir": str(model_dir),
    "mixture_or_task_name": "toy",
    "task_feature_lengths": toy_tasks.LENGTHS,
    "network": lambda vocab_size: dataclasses.replace(
      config, vocab_size=max(vocab_size, 384)
    ),
    "settings": settings or toy.settings(),
    "batch_size": BATCH_SIZE,
    "strategy": sampling.Strategy(heating.linear(1, 5, 4)),
    "cache_dir": cache,
    "search": translation.SearchOptions(max_target_length=8),
    **changes,
  }
  return Run(**values)


@dataclasses.dataclass(frozen=True)
class Run(run_lib.Run):
  """On the first of the simulated devices: data x expert x model."""

  devices: tuple[int, int, int] = (1, 1, 1)

  def mesh(self):
    return toy.mesh(*self.devices)


def dataset_config(**changes):
  """What `utils.DatasetConfig` holds under `gin/t5x/pretrain_base.gin`."""
  values = {
    "mixture_or_task_name": "toy",
    "task_feature_lengths": toy_tasks.LENGTHS,
    "split": "train",
    "batch_size": BATCH_SIZE,
    "shuffle": True,
    "seed": 0,
    "use_cached": False,
    "pack": True,
    **changes,
  }
  return types.SimpleNamespace(**values)


def checkpoint_config(path=(), mode="latest", **changes):
  """What `utils.CheckpointConfig` holds."""
  return types.SimpleNamespace(
    restore=types.SimpleNamespace(
      path=path, mode=mode, restore_dataset=changes.get("restore", False)
    ),
    save=types.SimpleNamespace(
      save_dataset=changes.get("save", False),
      dtype=changes.get("dtype", "float32"),
    ),
  )


def batches_for(run, **changes):
  return t5x_data.get_dataset(
    dataset_config(),
    0,
    1,
    None,
    run=run,
    checkpoint_cfg=checkpoint_config(**changes),
  )


class T5X:
  """The order and form of the calls of T5X's `train`, and nothing else.

  Its `train.train`, `utils.TrainStateInitializer`,
  `train_state.FlaxOptimTrainState` and `trainer.train_with_lr` in one.
  """

  def __init__(self, run, **checkpoints):
    self.run, self.model, self.mesh = run, t5x_adapter.Model(run), run.mesh()
    init_rng, self._base_rng = jax.random.split(
      jax.random.PRNGKey(run.settings.seed)
    )
    spec = batches_for(run, **checkpoints).element_spec
    self._input_shapes = {
      k: (BATCH_SIZE, *v.shape[1:]) for k, v in spec.items()
    }
    self._input_types = {k: v.dtype for k, v in spec.items()}
    self.shapes, axes = jax.eval_shape(self._initial, jax.random.PRNGKey(0))
    self.shardings = self._shardings(self.shapes, axes)
    init = jax.jit(lambda rng: self._initial(rng)[0])
    self._fresh = self._scoped(init)(init_rng)
    self._step = self._scoped(jax.jit(self._train_step))

  def start(self, tree=None, **checkpoints):
    """Begins, or goes on from a checkpoint that T5X finds."""
    self.batches = dataset_iterator.PeekableDatasetIterator(
      batches_for(self.run, **checkpoints)
    )
    self._restore(tree or {})
    self.batches.peek_async().result()
    self.metrics = None
    return self

  def _initial(self, rng):
    """((optimizer, mutables), the axes of both), as `FlaxOptimTrainState`."""
    variables = freeze(
      self.model.get_initial_variables(
        rng=rng,
        input_shapes=self._input_shapes,
        input_types=self._input_types,
      )
    )
    variables, params = variables.pop("params")
    variables, axes = variables.pop("params_axes")
    mutables = freeze(
      {k: v for k, v in variables.items() if not k.endswith("_axes")}
    )
    mutable_axes = freeze({k: variables[f"{k}_axes"] for k in mutables})
    state = self.model.optimizer_def.create(params)
    return (state, mutables), (axes, mutable_axes)

  def _shardings(self, state, axes):
    """Of the state dict's leaves, by path."""
    params_axes, mutable_axes = map(nn_partitioning.get_axis_names, axes)
    logical = state[0].optimizer_def.derive_logical_axes(state[0], params_axes)
    named = {**logical.state_dict(), "flax_mutables": unfreeze(mutable_axes)}
    return {
      path: NamedSharding(
        self.mesh,
        PartitionSpec()
        if names is None
        else nn_partitioning.logical_to_mesh_axes(
          names, partitioning.LOGICAL_AXIS_RULES
        ),
      )
      for path, names in traverse_util.flatten_dict(named, sep="/").items()
    }

  def _restore(self, tree):
    """The checkpoint's arrays, and initial ones where it has none."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    initial = traverse_util.flatten_dict(self.state_dict(self._fresh), sep="/")
    assert flat.keys() <= initial.keys() == self.shardings.keys()
    placed = {
      path: jax.device_put(flat.get(path, value), self.shardings[path])
      for path, value in initial.items()
    }
    tree = traverse_util.unflatten_dict(placed, sep="/")
    optimizer = self._fresh[0].restore_state(tree)
    self.state = optimizer, freeze(tree.get("flax_mutables", {}))

  def _scoped(self, function):
    def call(*args):
      rules = nn_partitioning.axis_rules(partitioning.LOGICAL_AXIS_RULES)
      with self.mesh, rules:
        return function(*args)

    return call

  def _train_step(self, state, batch):
    optimizer, mutables = state
    rng = jax.random.fold_in(self._base_rng, optimizer.state.step)
    gradients = jax.value_and_grad(self.model.loss_fn, has_aux=True)
    if mutables:
      (_, (metrics, mutables)), grads = gradients(
        optimizer.target, batch, rng, mutables
      )
    else:
      (_, metrics), grads = gradients(optimizer.target, batch, rng)
    rate = t5x_adapter.learning_rate(self.run)(optimizer.state.step)
    optimizer = optimizer.apply_gradient(grads, learning_rate=rate)
    return (optimizer, mutables), metrics

  def train(self, num_steps):
    """`trainer.Trainer.train`; returns the state dict."""
    for _ in range(num_steps):
      batch = partitioning.put_batch(next(self.batches), self.mesh)
      self.state, metrics = self._step(self.state, batch)
      if self.metrics is None:
        self.metrics = metrics
      else:
        self.metrics = {k: v.merge(metrics[k]) for k, v in self.metrics.items()}
    return jax.device_get(self.state_dict(self.state))

  def state_dict(self, state):
    optimizer, mutables = state
    tree = optimizer.state_dict()
    if mutables:
      tree["flax_mutables"] = unfreeze(mutables)
    return tree

  def values(self):
    """The metrics, as `MetricsManager` writes them."""
    return {k: float(v.compute_value().value) for k, v in self.metrics.items()}


class Writer:
  """Keeps what is written."""

  def __init__(self):
    self.scalars = {}

  def write_scalars(self, step, scalars):
    self.scalars |= scalars

  def flush(self):
    pass


def our_training(run, end, **changes):
  """State and last metrics of our own loop, at step `end`."""
  store, writer = run.store(), Writer()
  loop = trainer.Trainer(
    run.config(store),
    dataclasses.replace(run.settings, train_steps=end, **changes),
    run.mesh(),
    store.directions,
    batches.TrainBatches(store, run.strategy, run.batch_size, run.data_seed),
    run.model_dir,
    writer,
  )
  loop.run()
  tree = jax.device_get(loop.state.tree())
  loop.close()
  return tree, writer.scalars


def save(tree, model_dir, step):
  """A checkpoint as T5X writes it: no position, no metrics."""
  manager = ocp.CheckpointManager(
    model_dir,
    options=ocp.CheckpointManagerOptions(step_prefix="checkpoint"),
    item_handlers={"state": ocp.PyTreeCheckpointHandler()},
  )
  manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
  manager.close()


def differences(left, right):
  left, right = (traverse_util.flatten_dict(x, sep="/") for x in (left, right))
  assert left.keys() == right.keys() and len(left) > 20
  return {
    path: float(np.max(np.abs(np.float64(left[path]) - right[path])))
    for path in left
    if not np.array_equal(left[path], right[path])
  }


# -------------------------------------------------------------- training

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
  return T5X(make_run(cache, directory / "run", with_dropout(toy.SPARSE)))


def assert_same_metrics(driver, scalars):
  values = driver.values()
  assert scalars.keys() - OURS_ONLY <= values.keys()
  for name in scalars.keys() - OURS_ONLY:
    assert values[name] == pytest.approx(scalars[name], rel=1e-6), name


def test_one_seed_gives_us_and_t5x_the_same_dense_run(make):
  config = with_dropout(toy.DENSE)
  expected, scalars = our_training(
    make(config, name="ours"), 4, save_every=4, log_every=4
  )
  driver = T5X(make(config)).start()
  assert not differences(driver.train(4), expected)
  assert_same_metrics(driver, scalars)


def test_sparse_runs_are_the_same_and_t5x_goes_on_with_ours(make, sparse):
  ours = make(with_dropout(toy.SPARSE), name="ours")
  expected, scalars = our_training(ours, 4, save_every=2)
  driver = sparse.start()
  half = driver.train(2)
  with checkpointing.Checkpoints(ours.model_dir, read_only=True) as checkpoints:
    stored = checkpoints.restore(2, half, "the test")
  assert not differences(stored, half)
  save(stored, driver.run.model_dir, 2)
  assert not differences(driver.start(stored).train(2), expected)
  assert_same_metrics(driver, scalars)


def test_gradients_are_accumulated_as_we_do(make):
  settings = toy.settings(microbatches=2)
  config = with_dropout(toy.SPARSE)
  ours = make(config, settings, name="ours")
  expected, scalars = our_training(ours, 2, save_every=2, log_every=2)
  driver = T5X(make(config, settings)).start()
  assert not differences(driver.train(2), expected)
  assert_same_metrics(driver, scalars)


@pytest.mark.slow
def test_we_go_on_from_checkpoints_of_t5x(make):
  driver = T5X(make()).start()
  save(driver.train(2), driver.run.model_dir, 2)
  expected = driver.train(2)
  assert not differences(our_training(driver.run, 4)[0], expected)


def test_gradients_on_eight_devices_are_those_on_one(make):
  run = make()
  spread = dataclasses.replace(run, devices=(2, 2, 2))
  model, spread_model = t5x_adapter.Model(run), t5x_adapter.Model(spread)
  variables = unfreeze(
    jax.jit(lambda key: model.get_initial_variables(key, {}))(jax.random.key(0))
  )
  batch = next(batches_for(run))
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
  expected, _ = our_training(make(settings=settings, name="ours"), 4)
  dense = make(toy.DENSE, settings, name="dense")
  save(T5X(dense).start().train(2), dense.model_dir, 2)
  path = f"{dense.model_dir}/checkpoint_2"
  run = make(settings=settings)
  driver = T5X(run, path=path, mode="specific")
  tree = t5x_data.from_dense(
    {"state": {"step": np.int32(2)}},
    driver.state_dict(driver.shapes),
    path=path,
    run=run,
  )
  driver.start(tree, path=path, mode="specific")
  assert not differences(driver.train(2), expected)


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
    dataset_config(split="validation"), 0, 1, None, None, run=run
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


# --------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ("changes", "binding"),
  [
    ({"seed": None}, "train/utils.DatasetConfig.seed = %SEED"),
    ({"batch_size": 8}, "train/utils.DatasetConfig.batch_size = %BATCH_SIZE"),
    ({"shuffle": False}, "train/utils.DatasetConfig.shuffle = True"),
    ({"pack": False}, "train/utils.DatasetConfig.pack = True"),
    ({"split": "test"}, "train/utils.DatasetConfig.split = 'train'"),
    (
      {"task_feature_lengths": {"inputs": 8, "targets": 8}},
      "train/utils.DatasetConfig.task_feature_lengths = %TASK_FEATURE_LENGTHS",
    ),
  ],
  ids=str,
)
def test_refuses_other_data_than_the_run_s(make, changes, binding):
  with pytest.raises(ValueError, match=re.escape(f"bind {binding}") + "$"):
    t5x_data.get_dataset(
      dataset_config(**changes),
      0,
      1,
      None,
      run=make(),
      checkpoint_cfg=checkpoint_config(),
    )


@pytest.mark.parametrize("kind", ["save", "restore"])
def test_refuses_t5x_s_own_position(make, kind):
  with pytest.raises(ValueError, match=rf"bind utils\..*{kind}_dataset = Fal"):
    batches_for(make(), **{kind: True})


def test_refuses_rounded_checkpoints(make):
  with pytest.raises(ValueError, match="dtype is 'bfloat16', but training"):
    batches_for(make(), dtype="bfloat16")


def test_the_directory_says_what_model_it_holds(make):
  run = make()
  batches_for(run)
  known = description.read(run.model_dir)
  assert known.directions == run.store().directions
  assert description.read_vocabulary(run.model_dir, known)
  described = run_lib.described(run.model_dir)
  size = known.header.vocab_size
  assert described.config_of(size) == run.config_of(size)
  other = dataclasses.replace(run, settings=toy.settings(label_smoothing=0.3))
  batches_for(other)  # Nothing has been trained yet.
  write_checkpoint(run.model_dir, 2)
  with pytest.raises(ValueError, match=r"label_smoothing was 0\.3 and is"):
    batches_for(run)


def test_refuses_a_mesh_that_is_not_ours(make):
  with pytest.raises(ValueError, match="of it; bind train"):
    t5x_data.get_dataset(
      dataset_config(),
      0,
      2,
      None,
      run=make(),
      checkpoint_cfg=checkpoint_config(),
    )


def test_refuses_experts_in_the_dense_phase(make):
  run = make(settings=toy.settings(dense_steps=2))
  with pytest.raises(ValueError, match="T5X starts at step 0 with exp"):
    batches_for(run)
  with pytest.raises(ValueError, match="this run has none: DENSE_STEPS is 0"):
    t5x_data.get_dataset(
      dataset_config(),
      0,
      1,
      None,
      run=make(),
      checkpoint_cfg=checkpoint_config(),
      phase="dense",
    )


def write_checkpoint(model_dir, step):
  save({"step": np.zeros(())}, model_dir, step)


def test_starts_where_t5x_does(make, tmp_path):
  """The newest checkpoint of the run; else the one it is to start from."""
  run, other = make(), str(tmp_path / "other")

  def starts(**restore):
    return batches_for(run, **restore)._source.step

  assert starts() == 0
  for step in (3, 5):
    write_checkpoint(other, step)
  assert starts(path=f"{other}/checkpoint_3", mode="specific") == 3
  assert starts(path=other, mode="latest") == 5
  write_checkpoint(run.model_dir, 2)
  assert starts(path=other, mode="latest") == 2
  with pytest.raises(ValueError, match="ends in checkpoint_STEP"):
    t5x_data._step_of(t5x_data.epath.Path(other))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"strategy": sampling.Strategy(heating.constant(5))}, "schedule was"),
    ({"data_seed": 1}, "seed was 0 and is 1"),
  ],
  ids=["schedule", "seed"],
)
@pytest.mark.parametrize("starter", ["t5x", "us"])
def test_refuses_to_go_on_with_other_batches(make, starter, changes, message):
  run = make()
  changed = dataclasses.replace(run, **changes)

  def start():
    return t5x_data.get_dataset(
      dataset_config(seed=changed.data_seed),
      0,
      1,
      None,
      run=changed,
      checkpoint_cfg=checkpoint_config(),
    )

  start()  # Nothing has been trained yet: a new run.
  position = batches_for(run)._source.state()
  if starter == "t5x":
    write_checkpoint(run.model_dir, 2)
  else:
    (pathlib.Path(run.model_dir) / t5x_data.DATA_FILE).unlink()
    with checkpointing.Checkpoints(run.model_dir) as checkpoints:
      checkpoints.save(2, {"step": np.zeros(())}, {"data": position})
  with pytest.raises(ValueError, match=message):
    start()


def test_refuses_batches_that_t5x_made(make):
  model = t5x_adapter.Model(make())
  batch = toy.batch(rows=BATCH_SIZE)
  half = {name: value[: BATCH_SIZE // 2] for name, value in batch.items()}
  with pytest.raises(ValueError, match="num_microbatches = None"):
    model.loss_fn({}, half, None)
  del batch["direction"]
  with pytest.raises(ValueError, match="get_dataset_fn = @t5x_data"):
    model.loss_fn({}, batch, None)


def test_refuses_to_convert_what_does_not_fit(make):
  settings = toy.settings(dense_steps=2)
  run = make(settings=settings)
  dense, sparse = (
    jax.eval_shape(
      lambda key, config=config: steps.init_state(
        model_lib.Transformer(config), settings.transformation(), key
      )[0],
      jax.random.key(0),
    )
    for config in (toy.DENSE, toy.SPARSE)
  )
  zeros = {
    name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.tree())
    for name, state in (("dense", dense), ("sparse", sparse))
  }
  dense_kernel = np.random.RandomState(0).normal(size=(16, 32)).astype("f")
  mlp = zeros["dense"]["target"]["encoder"]["layers_0"]["mlp"]
  mlp["wi"]["kernel"] = dense_kernel
  for name, tree in zeros.items():
    for step in (2, 3):
      save(tree, f"{run.model_dir}/{name}{step}", step)

  def convert(name="dense", step=2, run=run, **changes):
    return t5x_data.from_dense(
      {"state": {"step": 2}},
      sparse.tree(),
      path=f"{run.model_dir}/{name}{step}/checkpoint_{step}",
      run=run,
      **changes,
    )

  assert set(convert()) == {"target", "state"}
  layer = convert()["target"]["encoder"]["layers_0"]["base_layer"]
  assert layer.keys() == {"experts"}  # The others keep their initial values.
  kernel = layer["experts"]["sublayer_0"]["wi"]["kernel"]
  np.testing.assert_array_equal(kernel, np.stack([dense_kernel] * 4))
  marker = {"as": "it is"}
  assert (
    t5x_data.from_dense(marker, {}, path="x", run=run, is_resuming=True)
    is marker
  )
  for name, feed_forward in (("dense", "dense"), ("sparse", "experts")):
    checkpoint = f"{run.model_dir}/{name}2/checkpoint_2"
    model = t5x_adapter.Model(run, checkpoint=checkpoint)
    assert model.module.config.feed_forward == feed_forward
  with pytest.raises(ValueError, match="checkpoint_2 holds experts, but"):
    t5x_adapter.Model(make(toy.DENSE), checkpoint=checkpoint)
  with pytest.raises(ValueError, match="set DENSE_STEPS = 3"):
    convert(step=3)
  with pytest.raises(ValueError, match="is not dense: it holds experts"):
    convert("sparse")
  with pytest.raises(ValueError, match="does not exist, or is not complete"):
    t5x_data.from_dense(
      {},
      sparse.tree(),
      path=f"{run.model_dir}/dense3/checkpoint_2",
      run=run,
    )
  wide = make(dataclasses.replace(toy.SPARSE, mlp_dim=64), settings=settings)
  with pytest.raises(ValueError, match="but the dense model needs"):
    convert(run=wide)
  clustered = toy.settings(
    dense_steps=2,
    conversion_options=conversion.Options(centroids="activations"),
  )
  with pytest.raises(ValueError, match="convert with basemt convert"):
    convert(run=make(settings=clustered))


# ------------------------------------------------------------ start and end


def test_starts_in_order_and_imports_the_module(make, monkeypatch):
  done = []
  monkeypatch.setattr(
    t5x_adapter.importlib, "import_module", lambda name: done.append(name)
  )
  run = make()

  def made():
    done.append("made")
    return run

  found = t5x_adapter.start(
    made,
    check=lambda: done.append("checked"),
    join=lambda: done.append("joined"),
    module="my_tasks",
  )
  assert found is run and done == ["checked", "joined", "my_tasks", "made"]


def test_devices_of_processes_that_have_not_joined_are_refused(monkeypatch):
  t5x_adapter.join()
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"give --gin.MULTIPROCESS=True, or"):
    t5x_adapter.join()


def test_sigterm_stops_after_a_step_with_its_state(monkeypatch):
  module = types.ModuleType("t5x.trainer")
  module.PreemptionError = type("PreemptionError", (Exception,), {})
  package = types.ModuleType("t5x")
  package.trainer = module
  monkeypatch.setitem(sys.modules, "t5x", package)
  monkeypatch.setitem(sys.modules, "t5x.trainer", module)

  class Trainer:
    """Keeps its state to itself while it trains, as T5X's."""

    def __init__(self, train_state):
      self.train_state = train_state

    def compile_train(self, batch):
      self._compiled_train_step = lambda state, batch: (state + batch, {})

    def train(self, batches):
      state = self.train_state
      for batch in batches:
        state, _ = self._compiled_train_step(state, batch)
      self.train_state = state

  def batches():
    yield 1
    yield 10
    signal.raise_signal(signal.SIGTERM)
    yield 100
    yield 1000

  old = signal.getsignal(signal.SIGTERM)
  try:
    trainer = t5x_adapter.stopping_trainer(Trainer, train_state=0)
    trainer.compile_train(1)
    with pytest.raises(module.PreemptionError) as stopped:
      trainer.train(batches())
  finally:
    signal.signal(signal.SIGTERM, old)
  assert trainer.train_state == 111
  assert isinstance(stopped.value, SystemExit) and not stopped.value.code


# --------------------------------------------------------------- optimizer


def test_factored_moments_keep_the_axes_they_have(make):
  config = dataclasses.replace(
    toy.SPARSE, emb_dim=128, mlp_dim=256, head_dim=64
  )
  run = make(config, toy.settings(optimizer=optimizer.adafactor))
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
  rows = next(p for p in found if p.endswith(f"v_row/{kernel}"))
  columns = rows.replace("v_row", "v_col")
  assert arrays[rows].shape == (4, 128)  # Without F, the longest axis.
  assert tuple(found[rows]) == ("expert", "embed")
  assert arrays[columns].shape == (4, 256)
  assert tuple(found[columns]) == ("expert", "expert_mlp")
  whole = rows.replace("v_row", "v")
  assert arrays[whole].shape == (1,) and tuple(found[whole]) == (None,)
