"""What T5X is told that a run would not follow, and how it starts and stops."""

import dataclasses
import pathlib
import re
import signal
import sys
import types

import jax
import numpy as np
import pytest
import t5x_calls
import toy

from basemt_jax import (
  checkpointing,
  conversion,
  description,
  heating,
  sampling,
  train_state,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib

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
      t5x_calls.dataset_config(**changes),
      0,
      1,
      None,
      run=make(),
      checkpoint_cfg=t5x_calls.checkpoint_config(),
    )


@pytest.mark.parametrize("kind", ["save", "restore"])
def test_refuses_t5x_s_own_position(make, kind):
  with pytest.raises(ValueError, match=rf"bind utils\..*{kind}_dataset = Fal"):
    t5x_calls.batches_for(make(), **{kind: True})


def test_refuses_rounded_checkpoints(make):
  with pytest.raises(ValueError, match="dtype is 'bfloat16', but training"):
    t5x_calls.batches_for(make(), dtype="bfloat16")


def test_the_directory_says_what_model_it_holds(make):
  run = make()
  t5x_calls.batches_for(run)
  known = description.read(run.model_dir)
  assert known.directions == run.store().directions
  assert description.read_vocabulary(run.model_dir, known)
  described = run_lib.described(run.model_dir)
  size = known.header.vocab_size
  assert described.config_of(size) == run.config_of(size)
  other = dataclasses.replace(run, settings=toy.settings(label_smoothing=0.3))
  t5x_calls.batches_for(other)  # Nothing has been trained yet.
  write_checkpoint(run.model_dir, 2)
  with pytest.raises(ValueError, match=r"label_smoothing was 0\.3 and is"):
    t5x_calls.batches_for(run)


def test_refuses_a_mesh_that_is_not_ours(make):
  with pytest.raises(ValueError, match="of it; bind train"):
    t5x_data.get_dataset(
      t5x_calls.dataset_config(),
      0,
      2,
      None,
      run=make(),
      checkpoint_cfg=t5x_calls.checkpoint_config(),
    )


def test_refuses_experts_in_bfloat16(make):
  kept = dataclasses.replace(toy.SPARSE, expert_param_dtype="bfloat16")
  with pytest.raises(
    ValueError, match=r"expert_param_dtype is 'bfloat16', and"
  ):
    t5x_adapter.Model(make(kept))


def test_refuses_experts_in_the_dense_phase(make):
  run = make(settings=toy.settings(dense_steps=2))
  with pytest.raises(ValueError, match="T5X starts at step 0 with exp"):
    t5x_calls.batches_for(run)
  with pytest.raises(ValueError, match="this run has none: DENSE_STEPS is 0"):
    t5x_data.get_dataset(
      t5x_calls.dataset_config(),
      0,
      1,
      None,
      run=make(),
      checkpoint_cfg=t5x_calls.checkpoint_config(),
      phase="dense",
    )


def write_checkpoint(model_dir, step):
  t5x_calls.save({"step": np.zeros(())}, model_dir, step)


def test_starts_where_t5x_does(make, tmp_path):
  """The newest checkpoint of the run; else the one it is to start from."""
  run, other = make(), str(tmp_path / "other")

  def starts(**restore):
    return t5x_calls.batches_for(run, **restore)._source.step

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
      t5x_calls.dataset_config(seed=changed.data_seed),
      0,
      1,
      None,
      run=changed,
      checkpoint_cfg=t5x_calls.checkpoint_config(),
    )

  start()  # Nothing has been trained yet: a new run.
  position = t5x_calls.batches_for(run)._source.state()
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
  batch = toy.batch(rows=t5x_calls.BATCH_SIZE)
  half = {
    name: value[: t5x_calls.BATCH_SIZE // 2] for name, value in batch.items()
  }
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
      lambda key, config=config: train_state.init_state(
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
      t5x_calls.save(tree, f"{run.model_dir}/{name}{step}", step)

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
