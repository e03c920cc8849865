"""What a run is, in a few lines that are told when it starts."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from basemt_jax import heating, steps
from basemt_jax import run as run_lib
from basemt_jax.data import languages, row_store


def lines(
  run: run_lib.Run, store: row_store.RowStore, program: steps.Program
) -> list[str]:
  """Data, lengths, vocabulary, network, phases, schedules and places.

  Of a run, its rows, and the program of its last phase.
  """
  return [
    *_data(run, store),
    _lengths(store),
    f"vocabulary  {_vocabulary(store)}",
    f"network     {_network(run, program)}",
    f"training    {_training(run)}",
    f"sampling    {_sampling(run)}",
    f"places      {run.model_dir}; packed rows in {store.directory}",
  ]


def parameters(params: Any, num_experts: int) -> tuple[int, int]:
  """Numbers of parameters: all, and those that a token passes through.

  Of a tree of arrays or shapes; each layer of E experts sends a token through
  one.
  """
  total = active = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    size = math.prod(leaf.shape)
    is_expert = "experts" in (getattr(key, "key", None) for key in path)
    total += size
    active += size // num_experts if is_expert else size
  return total, active


def _data(run: run_lib.Run, store: row_store.RowStore) -> list[str]:
  """Directions and pairs, and how they are spread over the bands."""
  pairs = np.asarray(store.pairs("train"))
  tongues = {
    language.authentic
    for name in store.directions
    for language in languages.Direction.parse(name)
  }
  bands = np.array([languages.band(int(n), run.bands) for n in pairs])
  limits = {
    "high": f"{run.bands.high:,} pairs or more",
    "mid": "between",
    "low": f"fewer than {run.bands.low:,}",
  }
  told = [
    f"{name} ({limits[name]}): {_count((bands == name).sum(), 'direction')}, "
    f"{pairs[bands == name].sum() / max(1, pairs.sum()):.1%} of the pairs"
    for name in languages.BANDS
    if (bands == name).any()
  ]
  return [
    f"data        {_count(len(store.directions), 'direction')} between "
    f"{len(tongues)} languages, {pairs.sum():,} training pairs; dev "
    f"{_split_pairs(store, 'validation')}, test {_split_pairs(store, 'test')}",
    f"bands       {'; '.join(told)}",
  ]


def _split_pairs(store: row_store.RowStore, split: str) -> str:
  if not store.has_pairs(split):
    return "none"
  return f"{int(np.sum(store.pairs(split))):,}"


def _lengths(store: row_store.RowStore) -> str:
  stats = [store.stats("train", name) for name in store.directions]
  dropped = sum(s.dropped for s in stats)
  long = dropped or sum(s.truncated for s in stats)
  share = long / max(1, sum(s.read for s in stats))
  what = "were left out" if dropped else "lose their ends"
  return (
    f"lengths     {store.lengths['inputs']} source and "
    f"{store.lengths['targets']} target tokens; {share:.1%} of the pairs are "
    f"longer and {what} (LONG_PAIRS)"
  )


def _vocabulary(store: row_store.RowStore) -> str:
  kind = store.vocabulary_kind
  pieces = "bytes" if kind == "bytes" else "SentencePiece pieces"
  subwords = store.fingerprint.get("subwords")
  drawn = f", drawn anew for repeated text ({subwords})" if subwords else ""
  return f"{store.vocab_size:,} {pieces}{drawn}"


def _network(run: run_lib.Run, program: steps.Program) -> str:
  config = program.model.config
  blocks = *config.encoder_expert_blocks, *config.decoder_expert_blocks
  is_sparse = config.feed_forward == "experts"
  total, active = parameters(
    program.shapes.params, config.num_experts if is_sparse else 1
  )
  experts = (
    f", {config.num_experts} experts in {len(blocks)} of the blocks"
    if is_sparse
    else ""
  )
  return (
    f"{config.num_encoder_layers} + {config.num_decoder_layers} blocks of "
    f"width {config.emb_dim}{experts}; {total:,} parameters, {active:,} for a "
    "token"
  )


def _training(run: run_lib.Run) -> str:
  settings = run.settings
  ends = [settings.train_steps]
  names: Sequence[str] = ["sparse"]
  if run.network(vocab_size=1).feed_forward != "experts":
    names = ["dense"]
  elif 0 < settings.dense_steps < settings.train_steps:
    ends, names = [settings.dense_steps, *ends], ["dense", "sparse"]
  phases = ", then ".join(
    f"{name} to step {end:,}" for name, end in zip(names, ends, strict=True)
  )
  inspected = np.unique(np.linspace(0, ends[-1] - 1, 200).astype(int))
  rates = [float(settings.learning_rate(int(step))) for step in inspected]
  peak = int(np.argmax(rates))
  return (
    f"{phases}; {run.batch_size} packed rows a step; learning rate up to "
    f"{rates[peak]:.2g} about step {inspected[peak]:,}, {rates[-1]:.1g} at the "
    "end"
  )


def _sampling(run: run_lib.Run) -> str:
  """The temperature over the run, and what else decides how often."""
  strategy, last = run.strategy, run.settings.train_steps - 1
  values = heating.temperatures(
    strategy.temperature, np.unique(np.linspace(0, last, 200).astype(int))
  )
  told = [f"temperature {values[0]:.3g}"]
  if values.max() > max(values[0], values[-1]):
    told[0] += f", up to {values.max():.3g}"
  if np.ptp(values) > 0:
    told[0] += f", {values[-1]:.3g} at the end"
  if strategy.joins:
    told.append(f"{len(strategy.joins)} joining later")
  if strategy.max_epochs is not None:
    told.append(f"at most {strategy.max_epochs:g} epochs of a direction")
  return "; ".join(told)


def _count(number: int, what: str) -> str:
  return f"{number} {what}{'' if number == 1 else 's'}"
