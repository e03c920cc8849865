"""docs/extending.md does what it says."""

import dataclasses
import functools
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gin
from basemt_jax import model, plain_data

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"
CONFIG = model.TransformerConfig(
  vocab_size=32,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=2,
  num_decoder_layers=2,
  dropout_rate=0.0,
)


def listings(section, language):
  text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def own(monkeypatch):
  """The page's own.py."""
  module = types.ModuleType("own")
  monkeypatch.setitem(sys.modules, "own", module)
  (code,) = listings("An attention", "python")
  exec(compile(code, "own.py", "exec"), module.__dict__)
  yield module
  gin.clear_config()


def test_an_attention_trains_decodes_and_is_described(own):
  (binding,) = listings("An attention", "gin")
  gin.parse_config(binding)
  config = gin.get_configurable(model.TransformerConfig)(
    **{
      f.name: getattr(CONFIG, f.name)
      for f in dataclasses.fields(CONFIG)
      if f.name != "attention"
    }
  )
  assert isinstance(config.attention, own.GatedAttention)
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
