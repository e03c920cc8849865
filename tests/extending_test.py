"""The page on extending: its files are written, configured and tested."""

import functools
import importlib
import pathlib
import re
import runpy
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

import gin
from basemt_jax import cli, model, plain_data
from basemt_jax.commands import configuration
from basemt_jax.data import parallel_text
from tasks import files

ROOT = pathlib.Path(__file__).parent.parent
FILES = {
  name: text
  for name, text in re.findall(
    r"```(?:python|gin|po|toml)\n# (\S+)\n(.*?)```",
    (ROOT / "docs/extending.md").read_text(),
    re.S,
  )
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  for name, text in FILES.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  project = tomllib.loads(FILES["pyproject.toml"])["project"]
  info = tmp_path / f"{project['name']}-{project['version']}.dist-info"
  info.mkdir()  # As pip would install it.
  (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: 1.0\n")
  (info / "entry_points.txt").write_text(
    "".join(
      f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
      for group, entries in project["entry-points"].items()
    )
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.chdir(tmp_path)
  formats = dict(parallel_text.FORMATS)
  monkeypatch.setattr(parallel_text, "FORMATS", formats)
  gin.clear_config()
  yield tmp_path
  for name in FILES:
    sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith("_test.py")])
def test_its_tests_pass(name, folder):
  tests = runpy.run_path(str(folder / name))
  found = [f for key, f in tests.items() if key.startswith("test_")]
  assert found
  for test in found:
    test()


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".gin")])
def test_its_configurations_are_runs(name, folder):
  model = str(ROOT / "gin/models/tiny.gin")
  options = cli._parser().parse_args(
    ["train", f"--gin_file={model}", f"--gin_file={folder / name}"]
  )
  options.bindings = [f"MODEL_DIR='{folder}'"]
  if name != "po.gin":
    options.bindings.append("MIXTURE_OR_TASK_NAME='none'")
  run = configuration.configured(options)
  rate = run.settings.learning_rate(10)
  run.settings.transformation(rate)
  if name == "wave.gin":
    assert [run.strategy.temperature(k) for k in (0, 250)] == [1, 4]
    assert str(run.strategy).startswith("wave (1 at first, ")
  if name == "confidence.gin":
    assert [m.name for m in run.settings.metrics] == ["confidence"]
  if name == "po.gin":
    summary = seqio.MixtureRegistry.get("files.catalogues").summary
    assert list(files.read_direction(summary, "train", "de", "en")) == [
      ("Speichern", "Save"),
      (
        "Die Datei „%s“ wurde geändert. Speichern?",
        'The file "%s" has changed. Save it?',
      ),
    ]
    assert "1 of 3 lines skipped" in run.mixture_or_task_name.warnings[0]
  if name == "priced.gin":
    priced = importlib.import_module("priced")
    config = run.network(vocab_size=32)
    assert config.router == priced.PricedRouter(rate=0.001)
    read = plain_data.from_plain(plain_data.to_plain(config), ["priced"])
    assert read == config and hash(read) == hash(config)


def test_its_attention_trains_decodes_and_is_described(folder):
  own = importlib.import_module("own")
  config = model.TransformerConfig(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.0,
    attention=own.GatedAttention(),
  )
  read = plain_data.from_plain(plain_data.to_plain(config), ["own"])
  assert read == config and hash(read) == hash(config)

  network = model.Transformer(config)
  draw = np.random.RandomState(0)
  source, target = (
    jnp.asarray(draw.randint(2, 32, size=(2, 5)), jnp.int32) for _ in range(2)
  )
  shifted = jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]
  found = jax.jit(functools.partial(network.init, train=True))(
    jax.random.key(0), source, shifted, target
  )
  variables = {"params": found["params"]}
  gate = variables["params"]["decoder"]["layers_1"]["cross_attention"]["gate"]
  assert gate["kernel"].shape == (16, 16)
  expected = jax.jit(network.apply)(variables, source, shifted, target)
  memory = jax.jit(network.encode_tokens)(variables, source)
  cache = network.init_cache(variables, memory, 5)
  step = jax.jit(network.decode_step)
  for i in range(5):
    logits, cache = step(variables, memory, cache, shifted[:, i : i + 1])
    np.testing.assert_allclose(logits, expected[:, i], atol=2e-5)
