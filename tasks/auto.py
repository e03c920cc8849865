"""Settings by the data and the machine, for `gin/recipes/auto.gin`.

Rules of thumb, not a search. The time that is given and what the machine
computes in it decide how large a network can be fed; the text decides how large
a one it can feed, and the vocabulary and the lengths. docs/data.md tells what
the results were.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import regex

from basemt_jax.compilation import chips
from tasks import files

_log = logging.getLogger("basemt_jax.auto")

# Pairs of every file that are looked at.
_SAMPLE = 2000
# Characters that are a word, or a good part of one, each.
_DENSE_SCRIPTS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
# Of a CPU core, and as a share of an accelerator's published peak: what
# training reaches. Measured with small networks; see docs/data.md.
_CORE_FLOPS = 35e9
_SHARE_OF_PEAK = 0.15
_UNKNOWN_ACCELERATOR = 100e12  # Published peak.
# Width, blocks of each side, and Muon's learning rate, by size. Measured are
# 128 (docs/data.md) and 384 (docs/results.md); the others go by them.
_NETWORKS = (
  (128, 2, 2e-2),
  (192, 3, 1.4e-2),
  (256, 4, 1.2e-2),
  (384, 6, 9e-3),
  (512, 6, 6e-3),
  (1024, 6, 4e-3),
)
# Tokens that a parameter wants to see, and epochs after which more of the same
# text teaches little.
_TOKENS_PER_PARAMETER = 5
_MOST_EPOCHS = 30
# Sparse models pay where many directions share one.
_FEWEST_DIRECTIONS = 8
# Share of the rows' positions that hold tokens.
_FILLED = 0.9
# Training pairs of a vocabulary's pieces, and the characters in one of them:
# counted up to 8,000, in English and German.
_VOCABULARIES = (
  (50_000, 2000, 2.9),
  (250_000, 4000, 3.5),
  (2_000_000, 8000, 3.8),
  (20_000_000, 16_000, 4.1),
  (math.inf, 32_000, 4.3),
)


@dataclasses.dataclass(frozen=True)
class Machine:
  """What there is to train on.

  Attributes:
    name: For people.
    flops: That training reaches in a second.
    is_cpu: Whether it has no accelerator.
    devices: That JAX sees.
  """

  name: str
  flops: float
  is_cpu: bool
  devices: int = 1

  @classmethod
  def found(cls) -> Machine:
    """The one that this process runs on."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
      cores = len(os.sched_getaffinity(0))
      flops = cores * _CORE_FLOPS
      return cls(f"{cores} CPU cores", flops, True, len(devices))
    chip = chips.CHIPS.get(kind)
    peak = chip.flops if chip else _UNKNOWN_ACCELERATOR
    flops = len(devices) * peak * _SHARE_OF_PEAK
    return cls(f"{len(devices)} x {kind}", flops, False, len(devices))


@dataclasses.dataclass(frozen=True)
class Text:
  """What a folder of parallel text is like.

  Attributes:
    pairs: Training pairs by direction; both ways of every pair of languages.
    characters: Of source and target of a pair together, on average.
    longest: Of a side, but for one in 200 pairs.
    dense: Share of the characters that are words or good parts of words.
    alphabet: Different characters, but for the rarest.
  """

  pairs: dict[str, int]
  characters: float
  longest: float
  dense: float
  alphabet: int

  @classmethod
  def of_folder(cls, data_dir: str) -> Text:
    """Reads a folder once, to count, and the first pairs of every file."""
    summary = files.scan(data_dir)
    pairs = {
      "-".join(direction): summary.num_pairs(direction)["train"]
      for direction in summary.directions
    }
    sample = [
      pair
      for splits in summary.files.values()
      if "train" in splits
      for pair in itertools.islice(
        files.read_pairs(splits["train"], summary.max_characters), _SAMPLE
      )
    ]
    letters = Counter(itertools.chain.from_iterable(a + b for a, b in sample))
    sides = sorted(max(len(a), len(b)) for a, b in sample)
    total = letters.total()
    return cls(
      pairs,
      total / len(sample),
      sides[int(0.995 * (len(sides) - 1))],
      sum(n for x, n in letters.items() if _DENSE_SCRIPTS.match(x)) / total,
      sum(1 for n in letters.values() if n > total / 1e6),
    )


@dataclasses.dataclass(frozen=True)
class Choice:
  """Settings, by the names of their macros, and what to expect.

  Attributes:
    minutes: About how long training takes, without compiling.
    epochs: How often all text is seen.
    parameters: That a token passes through.
  """

  vocab_size: int
  task_feature_lengths: dict[str, int]
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_layers: int
  expert_blocks: tuple[int, ...]
  num_experts: int
  feed_forward: str
  dtype: str
  dropout_rate: float
  weight_decay: float
  average_decay: float
  batch_size: int
  train_steps: int
  warmup_steps: int
  learning_rate: float
  eval_steps: int
  minutes: float
  epochs: float
  parameters: int


def choose(text: Text, machine: Machine, minutes: float) -> Choice:
  """The settings for some text on a machine.

  Args:
    text: What there is to learn.
    machine: To learn it on.
    minutes: To take at most.
  """
  both_ways = sum(text.pairs.values())
  vocab_size, per_piece = next(
    (pieces, characters)
    for most, pieces, characters in _VOCABULARIES
    if both_ways / 2 < most
  )
  # Bytes, special pieces, tags and characters need pieces of their own.
  vocab_size = max(vocab_size, 2 * (260 + len(text.pairs) + text.alphabet))
  per_character = (1 - text.dense) / per_piece + text.dense / 1.2
  pair_tokens = text.characters * per_character + 4  # Tag and ends.
  length = _up(1.2 * text.longest * per_character + 3, 32)
  length = min(max(length, 64), 128 if machine.is_cpu else 256)
  tokens = pair_tokens * both_ways  # Of an epoch.
  flops = machine.flops * 60 * minutes
  width, blocks, rate, parameters = _network(vocab_size, flops, tokens)
  # A token is of one side, and passes through that side of the network.
  seen = min(flops / (3 * parameters), _MOST_EPOCHS * tokens)
  batch_tokens = min(2048 if machine.is_cpu else 65_536, max(2048, seen / 2000))
  batch_size = _up(batch_tokens / 2 / length, 16 * machine.devices)
  steps = max(100, round(seen / (_FILLED * 2 * length * batch_size), -2))
  heads = max(4, width // 64)
  is_sparse = not machine.is_cpu and len(text.pairs) >= _FEWEST_DIRECTIONS
  epochs = seen / tokens
  return Choice(
    vocab_size=vocab_size,
    task_feature_lengths={"inputs": length, "targets": length},
    emb_dim=width,
    num_heads=heads,
    head_dim=width // heads,
    mlp_dim=4 * width,
    num_layers=blocks,
    expert_blocks=tuple(range(2, blocks, 3)) or (blocks - 1,),
    num_experts=16,
    feed_forward="experts" if is_sparse else "dense",
    dtype="float32" if machine.is_cpu else "bfloat16",
    weight_decay=0.1 if machine.is_cpu else 0.3,
    average_decay=0.0 if machine.is_cpu else 0.999,
    # Without it dev loss no longer fell after ten epochs of 20,000 pairs.
    dropout_rate=0.0 if epochs < 12 else 0.1 if epochs < 25 else 0.2,
    batch_size=batch_size,
    train_steps=int(steps),
    warmup_steps=int(min(4000, steps // 10)),
    learning_rate=rate,
    eval_steps=int(steps // 4),
    minutes=3 * parameters * seen / machine.flops / 60,
    epochs=epochs,
    parameters=int(parameters),
  )


def _network(
  vocab_size: int, flops: float, tokens: float
) -> tuple[int, int, float, float]:
  """The largest network that time and text feed; also its parameters."""
  chosen = None
  for width, blocks, rate in _NETWORKS:
    # Encoder and decoder blocks with feed-forwards of 4 widths, embedding.
    parameters = 28 * blocks * width**2 + vocab_size * width
    seen = min(flops / (3 * parameters), _MOST_EPOCHS * tokens)
    if chosen is None or seen >= _TOKENS_PER_PARAMETER * parameters:
      chosen = width, blocks, rate, parameters
  assert chosen is not None
  return chosen


def _up(value: float, step: int) -> int:
  """The next multiple of `step`."""
  return step * math.ceil(value / step)


@functools.cache
def of_folder(data_dir: str, minutes: float | None) -> Choice:
  """The settings for a folder on this machine; told when first asked for."""
  machine = Machine.found()
  minutes = minutes or (10 if machine.is_cpu else 60)
  text = Text.of_folder(data_dir)
  choice = choose(text, machine, minutes)
  for line in told(text, machine, choice):
    _log.info("%s", line)
  return choice


def choice(name: str, data_dir: str, minutes: float | None = None) -> Any:
  """One of the settings for a folder on this machine.

  Args:
    name: A field of `Choice`.
    data_dir: The folder.
    minutes: To train at most; None: 10 on a CPU, 60 on an accelerator.
  """
  return getattr(of_folder(data_dir, minutes), name)


# What was reached, by `Machine.is_cpu`; docs/data.md has the whole table.
_REACHED = {
  True: "31 BLEU after 5 minutes of two cores, 34 after 11, with 20,000 pairs "
  "in each of 2 directions",
  False: "57, 42 and 38 BLEU after two minutes of an H200, with more than "
  "22,000, 5,500 and 800 pairs in each of 24 directions",
}


def told(text: Text, machine: Machine, choice: Choice) -> Iterable[str]:
  """What was chosen, and what to expect of it."""
  yield (
    f"chosen for {sum(text.pairs.values()):,} pairs in {len(text.pairs)} "
    f"directions on {machine.name}: {choice.num_layers} + {choice.num_layers} "
    f"blocks of width {choice.emb_dim} ({choice.feed_forward}), vocabulary "
    f"{choice.vocab_size:,}, lengths {choice.task_feature_lengths['inputs']}, "
    f"{choice.train_steps:,} steps of {choice.batch_size} rows, which are "
    f"{choice.epochs:.1f} epochs"
  )
  minutes = math.ceil(choice.minutes)
  yield (
    f"expect about {minutes} minute{'s' * (minutes > 1)} of training, more or "
    "less with --gin.MINUTES=N; any of these can be set by its macro"
  )
  yield f"short everyday sentences gave {_REACHED[machine.is_cpu]}"
