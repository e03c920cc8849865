"""The systems that the study compares, and the size that all share.

Those of `gin/recipes/`, as Python so that a study can vary any part of them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

from basemt_jax import (
  conversion,
  heating,
  optimizer,
  routing,
  run,
  sampling,
  steps,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax.data import languages


@dataclasses.dataclass(frozen=True)
class System:
  """What tells a system from the others."""

  feed_forward: model_lib.FeedForward = "experts"
  dense_share: float = 0.0  # of the steps, before conversion
  schedule: str = "constant"  # name of one of `heating`
  start: float = 1.0  # temperature at the start
  end: float = 2.5  # temperature at the end
  heating_share: float = 1.0  # of the steps, until the end's; or the top one
  top: float = 0.0  # temperature in between, of `there_and_back`
  end_share: float = 1.0  # of the steps, until `there_and_back` is at its end
  max_epochs: float = 0.0  # see `sampling.Strategy`; 0: no cap
  router: routing.Router = routing.BalancedRouter()  # noqa: RUF009
  placement: model_lib.Placement = "replace"
  learning_rate: float = 3e-3  # peak, at the end of the warm-up
  seeds: int = 1  # runs that the study makes of it
  beam: bool = False  # whether translations are searched with a beam, too
  # See `conversion.Options`.
  reinitialise: float = 0.0
  noise: float = 0.0
  centroids: Literal["orthogonal", "activations"] = "orthogonal"
  optimizer: Literal["reset", "copy"] = "reset"
  rewarm_steps: int = 0  # see `steps.Settings`

  def temperature(self, train_steps: int) -> heating.Schedule:
    """The schedule of a run."""
    if self.schedule == "constant":
      return heating.constant(self.start)
    heated = steps.share_of(train_steps, self.heating_share)
    if self.schedule == "there_and_back":
      end = steps.share_of(train_steps, self.end_share)
      return heating.there_and_back(self.start, self.top, self.end, heated, end)
    return getattr(heating, self.schedule)(self.start, self.end, heated)


_CLAIM: dict[str, Any] = {"seeds": 3, "beam": True}
# What was tried for learning rates and temperatures: docs/tried.md.
_DENSE: dict[str, Any] = {"learning_rate": 4e-3}
_DENSE_START: dict[str, Any] = {
  "dense_share": 0.25,
  "optimizer": "copy",
  "learning_rate": 4e-3,
}
SYSTEMS: dict[str, System] = {
  "dense": System("dense", **_DENSE, **_CLAIM),
  "base": System(**_CLAIM),
  "base_heated": System(schedule="linear", **_CLAIM),
  "base_dense_pretrained": System(**_DENSE_START, **_CLAIM),
  "base_heated_dense_pretrained": System(
    schedule="linear", **_DENSE_START, **_CLAIM
  ),
  "dense_wide": System("dense_wide"),
  "switch": System(router=routing.TopKRouter()),
  "base_heated_5": System(schedule="linear", end=5.0),
  "base_heated_square_root": System(schedule="square_root", end=5.0),
  "base_cooled": System(schedule="linear", start=5.0, end=1.0),
  "base_static_5": System(start=5.0),
  "dense_static_5": System("dense", start=5.0, **_DENSE),
  "base_published": System(
    router=routing.BalancedRouter(prices_at_test=False), placement="insert"
  ),
  "recommended": System(
    schedule="there_and_back",
    top=2.0,
    end=1.5,
    heating_share=0.2,
    learning_rate=9e-3,
  ),
  "dense_heated": System("dense", schedule="linear", **_DENSE),
}
BANDS = languages.BandThresholds(high=20_000, low=5_000)


@dataclasses.dataclass(frozen=True)
class Size:
  """What all systems share."""

  train_steps: int = 5000  # updates of a run
  batch_size: int = 256  # packed rows
  emb_dim: int = 384  # D; feed-forwards are of 4 D
  head_dim: int = 64  # of attention
  blocks: int = 6  # of encoder and of decoder
  expert_every: int = 3  # of so many blocks the last has experts
  # blocks that have them instead: numbers joined by commas, or 'none'
  encoder_experts: str = ""
  decoder_experts: str = ""
  dtype: model_lib.Dtype = "bfloat16"  # computation type
  num_experts: int = 16  # E
  warmup_steps: int = 600  # updates in which the learning rate rises
  # name of a schedule of `optimizer`; 'inverse_square_root' does not know how
  # long a run will be, and 'cosine_decay' ends at 0
  rate: str = "inverse_square_root"
  dropout_rate: float = 0.1  # see `model_lib.TransformerConfig`
  evaluations: int = 25  # of the dev loss, in the course of a run
  rows_per_group: int = 16  # rows that compete for experts together
  descent: str = "adamw"  # name of an optimizer of `optimizer`
  momentum: float = 0.95  # of `muon`
  moments: str = "float32"  # type of the means that `adamw` keeps
  expert_moments: str = "full"  # of `adamw`
  # type in which matrices of experts are kept
  expert_param_dtype: Literal["float32", "bfloat16"] = "float32"
  weight_decay: float = 0.0  # of its matrices
  # of averaged weights, which are then evaluated; 0: none
  average_decay: float = 0.0
  # where to stop a run that is planned as one of `train_steps`; 0: at its end
  stop_at: int = 0


# What recipes set besides the system; elsewhere it is as in all systems.
SIZES = {
  "base_published": Size(rows_per_group=4),
  "recommended": Size(
    rate="cosine_decay",
    rows_per_group=64,
    descent="muon",
    momentum=0.85,
    weight_decay=0.3,
    dropout_rate=0.05,
    average_decay=0.998,
  ),
}


# The same objects every time, so that runs can share their programs.
@functools.cache
def _rate(name: str, peak: float, *arguments: int) -> optimizer.Schedule:
  return getattr(optimizer, name)(peak, *arguments)


@functools.cache
def _optimizer(
  descent: str,
  momentum: float,
  moments: str,
  expert_moments: str,
  weight_decay: float,
) -> optimizer.Optimizer:
  chosen: dict[str, Any] = {}
  if descent == "adamw":
    chosen = {"moments": moments, "expert_moments": expert_moments}
  elif descent == "muon":
    chosen = {"momentum": momentum}
  return functools.partial(
    getattr(optimizer, descent), weight_decay=weight_decay, **chosen
  )


def _expert_blocks(size: Size, chosen: str) -> tuple[int, ...]:
  if chosen == "none":
    return ()
  if chosen:
    return tuple(int(block) for block in chosen.split(","))
  return tuple(range(size.expert_every - 1, size.blocks, size.expert_every))


def _network(
  system: System, size: Size, vocab_size: int
) -> model_lib.TransformerConfig:
  return model_lib.TransformerConfig(
    vocab_size=vocab_size,
    emb_dim=size.emb_dim,
    num_heads=size.emb_dim // size.head_dim,
    head_dim=size.head_dim,
    mlp_dim=4 * size.emb_dim,
    num_encoder_layers=size.blocks,
    num_decoder_layers=size.blocks,
    dropout_rate=size.dropout_rate,
    dtype=size.dtype,
    feed_forward=system.feed_forward,
    encoder_expert_blocks=_expert_blocks(size, size.encoder_experts),
    decoder_expert_blocks=_expert_blocks(size, size.decoder_experts),
    num_experts=size.num_experts,
    expert_param_dtype=size.expert_param_dtype,
    rows_per_group=size.rows_per_group,
    router=system.router,
    placement=system.placement,
  )


def run_of(
  system: System, size: Size, seed: int, store_dir: str, model_dir: str
) -> run.Run:
  """The run that `basemt train` would make of the system's recipe."""
  lengths = [size.warmup_steps]
  if size.rate != "inverse_square_root":
    lengths.append(size.train_steps)
  every = size.train_steps // size.evaluations

  settings = steps.Settings(
    train_steps=size.stop_at or size.train_steps,
    dense_steps=steps.share_of(size.train_steps, system.dense_share),
    conversion_options=conversion.Options(
      system.reinitialise, system.noise, system.centroids, system.optimizer
    ),
    rewarm_steps=system.rewarm_steps,
    learning_rate=_rate(size.rate, system.learning_rate, *lengths),
    optimizer=_optimizer(
      *(size.descent, size.momentum),
      *(size.moments, size.expert_moments, size.weight_decay),
    ),
    average_decay=size.average_decay,
    log_every=max(every // 2, 1),
    eval_every=every,
    save_every=size.train_steps,
    keep_checkpoints=1,
    seed=seed,
  )
  return run.Run(
    model_dir=model_dir,
    mixture_or_task_name="files",
    task_feature_lengths={},
    network=functools.partial(_network, system, size),
    settings=settings,
    batch_size=size.batch_size,
    strategy=sampling.Strategy(
      system.temperature(size.train_steps),
      max_epochs=system.max_epochs or None,
      steps=size.train_steps,
    ),
    data_seed=seed,
    store_dir=store_dir,
    bands=BANDS,
    search=translation.SearchOptions(batch_size=1024),
  )


def network_of(system: System) -> str:
  """Names what decides a step's time: the kind of feed-forward and router."""
  if system.feed_forward != "experts":
    return system.feed_forward
  return type(system.router).__name__


def settings_of(system: System) -> dict[str, Any]:
  """What a log says of a system: all that the study varies."""
  settings = dict(vars(system))
  for name in ("seeds", "beam", "router"):
    del settings[name]
  router = system.router
  prices = getattr(router, "prices_at_test", False)
  return {**settings, "router": type(router).__name__, "prices_at_test": prices}


def with_changes(record: Any, options: Sequence[str]) -> Any:
  """A dataclass with fields changed: ['train_steps=100', ...]."""
  types = {
    name: type(value)
    for name, value in vars(record).items()
    if type(value) in (str, int, float) and name != "seeds"
  }
  changes: dict[str, Any] = {}
  for option in options:
    name, _, value = option.partition("=")
    if name not in types:
      raise SystemExit(
        f"no field {name!r} of {type(record).__name__}; give one of "
        f"{', '.join(types)}"
      )
    changes[name] = types[name](value)
  return dataclasses.replace(record, **changes)
