"""A network, a corpus and settings so small that compiling takes longest."""

import dataclasses
import functools

import jax
import numpy as np
from flax import traverse_util

from basemt_jax import (
  checkpointing,
  heating,
  metrics,
  model,
  optimizer,
  partitioning,
  phases,
  sampling,
  steps,
)
from basemt_jax import run as run_lib
from basemt_jax.data import languages, packing, row_store, vocabulary

DENSE = model.TransformerConfig(
  vocab_size=384,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
  dropout_rate=0.0,
  encoder_expert_blocks=(0,),
  decoder_expert_blocks=(0,),
  num_experts=4,
  rows_per_group=2,
)
SPARSE = dataclasses.replace(DENSE, feed_forward="experts")

# The same network for commands, after gin/models/tiny.gin.
NETWORK_GIN = """
NUM_EXPERTS = 4
EMB_DIM = 16
model.TransformerConfig:
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 1
  num_decoder_layers = 1
  encoder_expert_blocks = (0,)
  decoder_expert_blocks = (0,)
  rows_per_group = 2
"""

# A metric of a run's own; it is 1 wherever there are tokens.
REAL = metrics.Metric(
  "real",
  "real tokens",
  "share of the target tokens",
  ("real", "weight"),
  of_directions=True,
  is_main=True,
  row=lambda logits, batch: batch["decoder_loss_weights"].sum(-1),
)

LAYOUT = packing.RowLayout(32, 24)
PAIRS = {"de-en": 60, "en-de": 60, "en-fr": 24}
DIRECTIONS = tuple(sorted(PAIRS))
BANDS = languages.BandThresholds(high=100, low=50)


def settings(train_steps=4, **changes):
  values = {
    "learning_rate": optimizer.inverse_square_root(1e-2, 4),
    "optimizer": optimizer.adamw,
    "log_every": 2,
    "eval_every": 4,
    "save_every": 2,
    **changes,
  }
  return steps.Settings(train_steps, **values)


def mesh(data=1, expert=1, model=1):
  """Over the first of the simulated devices."""
  devices = jax.devices()[: data * expert * model]
  return partitioning.make_mesh(expert, model, devices)


class Writer:
  """Takes metrics."""

  def write_scalars(self, step, scalars):
    pass

  def flush(self):
    pass


@dataclasses.dataclass(frozen=True)
class OneDevice(run_lib.Run):
  """A run on the first of the simulated devices."""

  def mesh(self):
    return mesh()


def a_run(model_dir, store, network=DENSE, train_steps=4, **changes):
  """A run on the rows of `write_store`, with a checkpoint every other step."""
  values = {
    "settings": settings(train_steps, eval_every=2, save_every=2),
    "batch_size": 8,
    "strategy": sampling.Strategy(heating.linear(1.0, 5.0, 4)),
    "store_dir": store,
    **changes,
  }
  return OneDevice(
    str(model_dir),
    "not looked at",
    {"inputs": 32, "targets": 24},
    functools.partial(dataclasses.replace, network),
    **values,
  )


def texts(split, direction):
  """Phrases that are copied in capitals; splits share none."""
  count = PAIRS[direction] if split == "train" else 6
  offset = {"train": 0, "validation": 1000, "test": 2000}[split]
  records = []
  for i in range(offset, offset + count):
    source = f"no {i * 7919 % 10007}"
    records.append(
      {
        "source": source,
        "tagged_source": f"<2{direction[3:]}> {source}",
        "target": source.upper(),
      }
    )
  return records


def write_store(directory, splits=("train", "validation", "test")):
  """A row store of bytes; returns its directory as text."""
  bytes_ = vocabulary.Vocabulary.load("bytes")
  stats = {}
  for split in splits:
    stats[split] = {}
    for name in DIRECTIONS:
      writer = row_store.RowStoreWriter(directory, split, name, LAYOUT)
      stats[split][name] = writer.stats
      if writer.stats.finished:
        continue
      records = texts(split, name)[writer.stats.pairs :]
      writer.add(
        *(
          packing.Ragged.of([[*bytes_.encode(r[side]), 1] for r in records])
          for side in ("tagged_source", "target")
        ),
        () if split == "train" else records,
      )
      stats[split][name] = writer.finish()
  row_store.write_header(
    directory,
    layout=LAYOUT,
    vocabulary={"kind": "bytes", "file": None, "size": bytes_.vocab_size},
    fingerprint={},
    splits=stats,
  )
  return str(directory)


def batch(seed=0, rows=16, length=8, directions=3):
  """A batch of random tokens, a third of the rows padded."""
  rng = np.random.RandomState(seed)
  source, target = rng.randint(2, 384, size=(2, rows, length))
  target[::3, 5:] = 0
  source[1::3, 6:] = 0
  shifted = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
  tokens = {
    "encoder_input_tokens": source,
    "decoder_input_tokens": shifted,
    "decoder_target_tokens": target,
    "direction": rng.randint(directions, size=rows),
  }
  features = {name: value.astype(np.int32) for name, value in tokens.items()}
  features["decoder_loss_weights"] = (target > 0).astype(np.float32)
  return features


def checkpoint(model_dir, step, like):
  with checkpointing.Checkpoints(model_dir, read_only=True) as checkpoints:
    return (
      traverse_util.flatten_dict(
        jax.device_get(checkpoints.restore(step, like, "the test")), sep="/"
      ),
      checkpoints.position(step),
    )


def saved(model_dir):
  """{step: phase} of the checkpoints."""
  with checkpointing.Checkpoints(model_dir, read_only=True) as checkpoints:
    return {step: checkpoints.phase(step) for step in checkpoints.steps()}


def abstract_tree(config, settings, phase):
  return phases.program(config, settings, phase, mesh(), 3).abstract_tree()


def assert_same_run(left, right, step, config, settings, phase):
  """All arrays and positions of two runs' checkpoints are equal."""
  like = abstract_tree(config, settings, phase)
  (found, position), (expected, expected_position) = (
    checkpoint(x, step, like) for x in (left, right)
  )
  assert position == expected_position
  different = [
    path
    for path, value in expected.items()
    if not np.array_equal(found[path], value)
  ]
  assert not different
  assert found.keys() == expected.keys() and len(expected) > 20
