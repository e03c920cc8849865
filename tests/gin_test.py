"""Every gin file: it parses, gives a run, and its network can be traced."""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import traverse_util

import gin
from basemt_jax import cli, heating, phases, routing, steps, train_state
from basemt_jax import model as model_lib
from basemt_jax.commands import configuration
from basemt_jax.data import languages

pytestmark = pytest.mark.usefixtures("clean_gin")

ROOT = pathlib.Path(__file__).parent.parent
MODELS = ["tiny", "base", "big"]
SYSTEMS = [
  "dense",
  "dense_wide",
  "base",
  "base_heated",
  "base_dense_pretrained",
  "base_heated_dense_pretrained",
  "switch",
]
OTHER_SYSTEMS = [
  "base_published",
  "base_static_5",
  "dense_static_5",
  "recommended",
]
BENCHMARKS = ["wmt15", "ml50", "opus100"]
T5X = [
  "convert",
  "evaluate",
  "infer",
  "model",
  "pretrain",
  "pretrain_base",
]
STEPS = 1000


def configured(files, *bindings):
  """The `run.Run` of a command line, and its network."""
  gin.clear_config()
  options = cli._parser().parse_args(
    ["train", *(f"--gin_file=gin/{name}.gin" for name in files)]
  )
  options.bindings = list(bindings)
  return with_network(configuration.configured(options))


def with_network(run):
  # Before the next configuration takes the place of this one.
  return run, run.network(vocab_size=384)


@functools.cache
def system(name, model="tiny"):
  return configured(
    [f"models/{model}", f"recipes/{name}"],
    "MODEL_DIR=/nowhere",
    "MIXTURE_OR_TASK_NAME=none",
    f"TRAIN_STEPS={STEPS}",
  )


@functools.cache
def parameters(name, model="tiny"):
  """Shapes by path of a system's last phase, traced with its loss."""
  run, config = system(name, model)
  config = phases.network(config, run.settings, "sparse")
  network = model_lib.Transformer(config)
  state, _ = jax.eval_shape(
    lambda key: train_state.init_state(
      network, run.settings.transformation(), key
    ),
    jax.random.key(0),
  )
  batch = {
    name: jax.ShapeDtypeStruct(value.shape, value.dtype)
    for name, value in toy.batch(rows=config.rows_per_group).items()
  }
  loss, grads, _, _ = jax.eval_shape(
    lambda state, batch: steps.gradients(
      state.params,
      state.mutables,
      batch,
      jax.random.key(0),
      network,
      run.settings,
      3,
    ),
    state,
    batch,
  )
  assert loss.shape == () and loss.dtype == jnp.float32
  shapes = traverse_util.flatten_dict(state.params, sep="/")
  assert {k: v.shape for k, v in shapes.items()} == {
    k: v.shape for k, v in traverse_util.flatten_dict(grads, sep="/").items()
  }
  return {path: leaf.shape for path, leaf in shapes.items()}


def size(shapes):
  return sum(int(np.prod(shape)) for shape in shapes.values())


def is_expert(path):
  return "/base_layer/" in path


# ---------------------------------------------------------------- files


def test_all_files_are_known_here():
  found = {
    str(p.relative_to(ROOT / "gin").with_suffix(""))
    for p in (ROOT / "gin").rglob("*.gin")
  }
  assert found == {
    *(f"models/{name}" for name in MODELS),
    *(f"recipes/{name}" for name in (*SYSTEMS, *OTHER_SYSTEMS)),
    "recipes/quickstart",
    "recipes/files",
    "recipes/student",
    "recipes/auto",
    *(f"recipes/{name}" for name in BENCHMARKS),
    "recipes/pod_v5e_256",
    "recipes/pod_v5p_128",
    "recipes/pod_v6e_256",
    "runs/train",
    *(f"t5x/{name}" for name in T5X),
  }
  assert not list((ROOT / "gin").rglob("__init__.py"))


@pytest.mark.parametrize("model", MODELS)
def test_models_are_traced_at_their_size(model):
  run, config = system("base", model)
  shapes = parameters("base", model)
  blocks = {p.split("/base_layer")[0] for p in shapes if is_expert(p)}
  assert blocks == {
    *(f"encoder/layers_{i}" for i in config.encoder_expert_blocks),
    *(f"decoder/layers_{i}" for i in config.decoder_expert_blocks),
  }
  kernel = next(p for p in shapes if p.endswith("sublayer_0/wi/kernel"))
  assert shapes[kernel] == (config.num_experts, config.emb_dim, config.mlp_dim)
  assert config.num_heads * config.head_dim == config.emb_dim
  assert run.batch_size % config.rows_per_group == 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_traced(name):
  assert parameters(name)


def test_quickstart_is_what_it_says():
  pytest.importorskip("seqio")
  run, config = configured(["recipes/quickstart"])
  assert run.model_dir == "runs/quickstart"
  assert run.mixture_or_task_name == "cldr"
  assert config.feed_forward == "experts"
  assert 0 < run.settings.dense_steps < run.settings.train_steps
  temperature = run.strategy.temperature
  assert temperature(run.settings.train_steps) > temperature(0)
  assert run.batch_size % config.rows_per_group == 0
  # A fifth of a run of two steps is none: it starts at the top.
  run, _ = configured(["recipes/quickstart"], "TRAIN_STEPS=2")
  assert heating.temperatures(run.strategy.temperature, np.arange(3)) == (
    pytest.approx([3.5, 2.75, 2.0])
  )


def test_files_recipe_takes_a_folder(tmp_path):
  pytest.importorskip("seqio")
  (tmp_path / "en-de.train.tsv").write_text("a b\tA B\nc d\tC D\n")
  run, config = configured(
    ["recipes/files"], f"DATA_DIR={tmp_path}", "VOCABULARY=bytes"
  )
  assert {t.name for t in run.mixture_or_task_name.tasks}
  assert config.feed_forward == "experts"


def test_a_student_is_dense_and_reads_the_teacher_alone(tmp_path):
  pytest.importorskip("seqio")
  for name in ("en-de", "en-de_x_kd"):
    (tmp_path / f"{name}.train.tsv").write_text("a b\tA B\nc d\tC D\n")
  run, config = configured(
    ["recipes/student"], f"DATA_DIR={tmp_path}", "VOCABULARY=bytes"
  )
  assert config.feed_forward == "dense" and not run.settings.dense_steps
  names = ["de-en", "en-de", "en-de_x_kd"]
  plan = run.strategy.plan(names, [2] * 3, [1] * 3, 8, languages.meant)
  rates = plan.rates([0, 99])
  np.testing.assert_array_equal(rates, [[0, 0, 1]] * 2)


def test_auto_recipe_chooses_by_text_and_time(tmp_path):
  pytest.importorskip("seqio")
  lines = [f"number {i}\tNummer {i}\n" for i in range(9000)]
  (tmp_path / "en-de.train.tsv").write_text("".join(lines))
  given = (f"DATA_DIR={tmp_path}", "VOCABULARY=bytes")
  found = []
  for more in ([], ["MINUTES=0.05"], ["EMB_DIM=64", "BATCH_SIZE=48"]):
    run, config = configured(["recipes/auto"], *given, *more)
    assert config.num_heads * config.head_dim in (config.emb_dim, 128)
    assert config.feed_forward == "dense"
    assert run.settings.dense_steps == 0
    found.append((run.settings.train_steps, config.emb_dim, run.batch_size))
  assert found[0][0] > found[1][0]
  assert found[2][1:] == (64, 48)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_recipes_take_a_folder(name, tmp_path):
  pytest.importorskip("seqio")
  (tmp_path / "en-de.train.tsv").write_text("a b\tA B\nc d\tC D\n")
  run, _ = configured(
    ["models/tiny", "recipes/base_heated", f"recipes/{name}"],
    f"DATA_DIR={tmp_path}",
    "VOCABULARY=bytes",
    "MODEL_DIR=/some/where",
    "TRAIN_STEPS=100",
    *(["SIZES=%PUBLISHED_SIZES"] if name == "wmt15" else []),
  )
  tasks = [f"{name}.{way}" for way in ("de_en", "en_de")]
  assert [t.name for t in run.mixture_or_task_name.tasks] == tasks
  assert run.bands.low <= 1_000_000 >= run.bands.high
  if name == "wmt15":
    assert run.strategy.sizes["en-gu"] == run.strategy.sizes["gu-en"] == 155_798
  importlib.import_module(f"tasks.{name}").mixture()  # All languages again.


# -------------------------------------------------------------- systems


def temperatures(run):
  return heating.temperatures(run.strategy.temperature, np.arange(STEPS + 1))


def test_dense_systems_have_no_experts_and_wide_has_their_parameters():
  dense, wide, base = (
    parameters(name) for name in ("dense", "dense_wide", "base")
  )
  assert not any(map(is_expert, [*dense, *wide]))

  def kernels(shapes):
    return size({p: s for p, s in shapes.items() if "/wi/" in p or "/wo/" in p})

  assert kernels(wide) == kernels(base) > 2 * kernels(dense)
  # Beyond those, experts add norms, centroids and gates: less than 1 %.
  assert size(wide) < size(base) < 1.01 * size(wide)


@pytest.mark.parametrize("name", SYSTEMS)
def test_phases_router_and_temperature_are_the_system_s(name):
  run, config = system(name)
  is_sparse = not name.startswith("dense")
  assert any(map(is_expert, parameters(name))) == is_sparse
  assert run.settings.train_steps == STEPS
  pretrained = "dense_pretrained" in name
  assert run.settings.dense_steps == (STEPS // 4 if pretrained else 0)
  router = routing.TopKRouter if name == "switch" else routing.BalancedRouter
  assert isinstance(config.router, router)
  values = temperatures(run)
  assert values[0] == 1
  if "heated" in name:
    assert (np.diff(values) > 0).all() and values[-1] == 2.5
  else:
    assert (values == 1).all()
  # Gates are 1 after a conversion, sigmoids from scratch.
  last = phases.network(config, run.settings, "sparse")
  assert last.converted == pretrained


@pytest.mark.parametrize("name", [*SYSTEMS, *OTHER_SYSTEMS])
def test_the_study_measures_the_recipes(name, monkeypatch):
  """In all but size, and the learning rate, which depends on it."""
  monkeypatch.syspath_prepend(str(ROOT))
  study = importlib.import_module("benchmarks.study.systems")
  run, config = system(name)
  size = dataclasses.replace(
    study.SIZES.get(name, study.Size()), train_steps=STEPS
  )
  measured = study.run_of(study.SYSTEMS[name], size, 0, "", "")
  network = measured.network(384)
  same = ("dense_steps", "conversion_options", "rewarm_steps", "average_decay")
  for what in same:
    assert getattr(run.settings, what) == getattr(measured.settings, what)
  for what in ("feed_forward", "router", "placement", "rows_per_group"):
    assert getattr(config, what) == getattr(network, what)
  assert (temperatures(run) == temperatures(measured)).all()
  if name == "recommended":  # Elsewhere it is the model's.
    assert config.dropout_rate == network.dropout_rate
  # Two steps tell optimizer, decay and momentum.
  params = {"kernel": jnp.ones((2, 2))}
  gradients = [
    {"kernel": jnp.array(g)} for g in ([[1, 2], [3, 5.0]], np.eye(2))
  ]
  updates = []
  for tx in (r.settings.transformation(0.1) for r in (run, measured)):
    state = tx.init(params)
    for gradient in gradients:
      update, state = tx.update(gradient, state, params)
    updates.append(update["kernel"].tolist())
  assert updates[0] == updates[1]


def test_the_quickstart_is_measured_as_each_system(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(str(ROOT))
  quickstart = importlib.import_module("benchmarks.quickstart")
  found = {}
  for name in quickstart.SYSTEMS:
    run, config = with_network(quickstart.run_of(name, 2, tmp_path))
    assert (run.settings.seed, run.data_seed) == (2, 2)
    heat = temperatures(run)
    steps_and_heat = (run.settings.dense_steps, max(heat), heat[-1])
    found[name] = (config.feed_forward, *steps_and_heat)
  assert found == {
    "dense": ("dense", 0, 1, 1),
    "base": ("experts", 0, 1, 1),
    "base_heated": ("experts", 0, 3.5, 2),
    "base_dense_pretrained": ("experts", 36, 1, 1),
    "base_heated_dense_pretrained": ("experts", 36, 3.5, 2),
    "top_2": ("experts", 36, 2, 2),
    "top_2_back_to_1.5": ("experts", 36, 2, 1.5),
  }


def test_the_quickstarts_logs_are_of_its_present_recipe(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(str(ROOT))
  quickstart = importlib.import_module("benchmarks.quickstart")
  reading = importlib.import_module("benchmarks.study.reading")
  found = reading.read_set(reading.LOGS / "quickstart.jsonl.xz")
  measured = [(one.system, one.seed) for one in found]
  assert len(set(measured)) == len(measured)
  for name in set(quickstart.SYSTEMS) - {"dense", "base_dense_pretrained"}:
    assert {(name, seed) for seed in quickstart.SEEDS} <= set(measured)
  for header in (one.header for one in found):
    run = quickstart.run_of(header["system"], header["seed"], tmp_path)
    expected = quickstart.settings_of(header["system"], run)
    assert header["settings"] == expected
    assert header["size"] == {"train_steps": run.settings.train_steps}


# ----------------------------------------------------------- overriding


def test_macros_are_overridden_on_the_command_line():
  run, config = configured(
    ["models/tiny", "recipes/base_heated_dense_pretrained"],
    "MODEL_DIR=/some/where",
    'MIXTURE_OR_TASK_NAME="quoted"',
    "TRAIN_STEPS=300",
    "NUM_EXPERTS=2",
    "END_TEMPERATURE=9",
    "steps.share_of.share=0.1",
    "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 9}",
    "TEMPERATURE=@heating.square_root()",
    "OPTIMIZER=@optimizer.adafactor",
    "WEIGHT_DECAY=0.5",
    "conversion.Options.reinitialise=0.5",
  )
  assert run.model_dir == "/some/where"
  assert run.mixture_or_task_name == "quoted"
  assert run.settings.train_steps == 300
  assert run.settings.dense_steps == 30
  assert config.num_experts == 2
  temperature = run.strategy.temperature
  assert temperature(150) == pytest.approx(np.sqrt((1 + 81) / 2))
  assert temperature(300) == 9
  assert run.task_feature_lengths == {"inputs": 8, "targets": 9}
  assert run.settings.conversion_options.reinitialise == 0.5
  state = run.settings.transformation().init({"w": jnp.ones((256, 128))})
  assert max(leaf.size for leaf in jax.tree.leaves(state)) <= 256


STRATEGIES = {
  "START_TEMPERATURE=5": "constant(5.0)",
  "TEMPERATURE=@heating.linear()": "linear(1.0, 2.5, 100)",
  "TEMPERATURE=@heating.square_root()": "square_root(1.0, 2.5, 100)",
  "TEMPERATURE=@heating.cosine()": "cosine(1.0, 2.5, 100)",
  "TEMPERATURE=@heating.stepwise()": "stepwise([50], [1.0, 2.5])",
  "JOINS={'gu':20,1000:7}": ("constant(1.0), joining at {'gu': 20, 1000: 7}"),
  "MAX_EPOCHS=8": "constant(1.0), at most 8 epochs in 100 steps",
  "STRATEGY=@sampling.unimax()": (
    "constant(inf), at most 4 epochs in 100 steps"
  ),
  "STRATEGY=@sampling.unimax() MAX_EPOCHS=2 JOINS={'gu':9} CAP_STEPS=50": (
    "constant(inf), joining at {'gu': 9}, at most 2 epochs in 50 steps"
  ),
}


@pytest.mark.parametrize("binding", STRATEGIES)
def test_a_sampling_strategy_is_one_line(binding):
  run, _ = configured(
    ["models/tiny", "recipes/base"],
    "MODEL_DIR=/some/where",
    "MIXTURE_OR_TASK_NAME=none",
    "TRAIN_STEPS=100",
    *binding.split(" "),
  )
  assert str(run.strategy) == STRATEGIES[binding]


def test_later_files_win(tmp_path):
  path = tmp_path / "mine.gin"
  path.write_text("BATCH_SIZE = 48\nSEED = 7\n")
  gin.clear_config()
  options = cli._parser().parse_args(
    [
      "train",
      "--gin_file=gin/models/tiny.gin",
      "--gin_file=gin/recipes/base.gin",
      "--gin_file=mine.gin",
      f"--gin_search_paths={tmp_path}",
      "--model_dir=/nowhere",
    ]
  )
  options.bindings = ["MIXTURE_OR_TASK_NAME=none"]
  run = configuration.configured(options)
  assert (run.batch_size, run.data_seed, run.settings.seed) == (48, 7, 7)
  assert run.model_dir == "/nowhere"


def described(run, network):
  """Everything of a run that can be compared."""
  settings = dataclasses.replace(
    run.settings, optimizer=None, learning_rate=None
  )
  rates = [float(run.settings.learning_rate(s)) for s in range(0, STEPS, 99)]
  rest = dataclasses.replace(
    run, network=network, settings=settings, strategy=None
  )
  return rest, rates, temperatures(run).tolist()


@pytest.mark.parametrize("name", ["dense_wide", "switch", SYSTEMS[5]])
def test_saved_configuration_gives_the_same_run(name, tmp_path):
  bindings = (
    f"MODEL_DIR={tmp_path}",
    "MIXTURE_OR_TASK_NAME=none",
    f"TRAIN_STEPS={STEPS}",
    "LEARNING_RATE=3e-4",
    "model.TransformerConfig.rows_per_group=4",
  )
  expected = described(
    *configured(["models/tiny", f"recipes/{name}"], *bindings)
  )
  configuration.save_config(str(tmp_path))
  gin.clear_config()
  options = cli._parser().parse_args(["evaluate", f"--model_dir={tmp_path}"])
  options.bindings = []
  assert described(*with_network(configuration.configured(options))) == expected
