"""The paper's claim, measured: systems, seeds, and the figures they give.

    PYTHONPATH=. python benchmarks/study.py prepare --data FOLDER --store DIR
    PYTHONPATH=. python benchmarks/study.py run --store DIR --logs docs/study
    PYTHONPATH=. python benchmarks/study_report.py --logs docs/study

`prepare` packs a folder of files (see `tasks/files.py`) once; it needs SeqIO,
the others do not. `run` trains one system and seed after the other, and leaves
a log (JSONL) of each; what has a complete log is not run again, so that an
interrupted study goes on with the next run. Several processes may run at once,
on one GPU or several (`CUDA_VISIBLE_DEVICES`): each takes the next run that
nobody is making. One process keeps an H200 busy; a second one on the same GPU
only fills the gaps in which the first compiles.

The systems are those of `gin/recipes/`. All see the same number of tokens, the
dense phase included, and all but `dense_wide` spend the same FLOPs on each.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import gzip
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util

from basemt_jax import (
  conversion,
  evaluation,
  heating,
  metrics,
  optimizer,
  partitioning,
  routing,
  run,
  sampling,
  steps,
  trained,
  trainer,
  training,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax.data import batches, languages, row_store
from basemt_jax.inspection import run_report


@dataclasses.dataclass(frozen=True)
class System:
  """What tells a system from the others.

  Attributes:
    feed_forward: See `model_lib.TransformerConfig`.
    dense_share: Of the steps, before conversion.
    schedule: Name of a schedule of `heating`.
    start: Temperature at the start.
    end: Temperature at the end.
    heating_share: Of the steps, until the end temperature.
    max_epochs: See `sampling.Strategy`; 0: no cap.
    router: Chooses experts.
    learning_rate: Peak, at the end of the warm-up; then falls with the inverse
      square root of the step, which does not know how long a run will be.
    seeds: How many runs the study makes of it.
    beam: Whether its translations are searched with a beam, too.
    reinitialise, noise, centroids, optimizer: See `conversion.Options`.
    rewarm_steps: See `steps.Settings`.
  """

  feed_forward: model_lib.FeedForward = "experts"
  dense_share: float = 0.0
  schedule: str = "constant"
  start: float = 1.0
  end: float = 2.5
  heating_share: float = 1.0
  max_epochs: float = 0.0
  router: routing.Router = routing.BalancedRouter()  # noqa: RUF009
  learning_rate: float = 3e-3
  seeds: int = 1
  beam: bool = False
  reinitialise: float = 0.0
  noise: float = 0.0
  centroids: Literal["orthogonal", "activations"] = "orthogonal"
  optimizer: Literal["reset", "copy"] = "reset"
  rewarm_steps: int = 0

  def temperature(self, train_steps: int) -> heating.Schedule:
    """The schedule of a run."""
    if self.schedule == "constant":
      return heating.constant(self.start)
    heated = steps.share_of(train_steps, self.heating_share)
    return getattr(heating, self.schedule)(self.start, self.end, heated)


_CLAIM: dict[str, Any] = {"seeds": 3, "beam": True}
# What was tried for learning rates and temperatures: docs/study/notes.md.
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
  "dense_heated": System("dense", schedule="linear", **_DENSE),
}
BANDS = languages.BandThresholds(high=20_000, low=5_000)
_DEV_BLEU = [f"dev/bleu/{band}" for band in ("all", *languages.BANDS)]


@dataclasses.dataclass(frozen=True)
class Size:
  """What all systems share.

  Attributes:
    train_steps: Updates of a run.
    batch_size: Packed rows.
    emb_dim: D; heads are of 64, feed-forwards of 4 D.
    blocks: Of encoder and of decoder; every third has experts.
    num_experts: E.
    warmup_steps: Updates in which the learning rate rises.
    dropout_rate: See `model_lib.TransformerConfig`.
    evaluations: Of the dev loss, in the course of a run.
  """

  train_steps: int = 5000
  batch_size: int = 256
  emb_dim: int = 384
  blocks: int = 6
  num_experts: int = 16
  warmup_steps: int = 600
  dropout_rate: float = 0.1
  evaluations: int = 25


def run_of(
  system: System, size: Size, seed: int, store_dir: str, model_dir: str
) -> run.Run:
  """The run that `basemt train` would make of the system's recipe."""
  expert_blocks = tuple(range(2, size.blocks, 3))
  every = size.train_steps // size.evaluations

  def network(vocab_size: int) -> model_lib.TransformerConfig:
    return model_lib.TransformerConfig(
      vocab_size=vocab_size,
      emb_dim=size.emb_dim,
      num_heads=size.emb_dim // 64,
      head_dim=64,
      mlp_dim=4 * size.emb_dim,
      num_encoder_layers=size.blocks,
      num_decoder_layers=size.blocks,
      dropout_rate=size.dropout_rate,
      dtype="bfloat16",
      feed_forward=system.feed_forward,
      encoder_expert_blocks=expert_blocks,
      decoder_expert_blocks=expert_blocks,
      num_experts=size.num_experts,
      router=system.router,
    )

  settings = steps.Settings(
    train_steps=size.train_steps,
    dense_steps=steps.share_of(size.train_steps, system.dense_share),
    conversion_options=conversion.Options(
      system.reinitialise, system.noise, system.centroids, system.optimizer
    ),
    rewarm_steps=system.rewarm_steps,
    learning_rate=optimizer.inverse_square_root(
      system.learning_rate, size.warmup_steps
    ),
    optimizer=optimizer.adamw(),
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
    network=network,
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


class Log:
  """A run's JSONL file; takes metrics as a `trainer.Writer`.

  Kept are the dev losses, BLEU by band, the training loss and the speed.

  Raises:
    BlockingIOError: Another process writes the file, or has just finished it.
  """

  def __init__(self, path: pathlib.Path):
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(path.open("a", encoding="utf-8"))
      # The lock ends with the process, however that ends.
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      try:
        is_there = os.path.samestat(os.fstat(self._file.fileno()), path.stat())
      except FileNotFoundError:
        is_there = False
      if not is_there:  # Another process renamed it since: a finished log.
        raise BlockingIOError(f"{path} has just been finished")
      self._file.truncate(0)
      stack.pop_all()

  def write(self, **record: Any) -> None:
    """Writes one line."""
    print(json.dumps(record), file=self._file, flush=True)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `trainer.Writer`."""
    kept = {
      name: round(float(value), 5)
      for name, value in scalars.items()
      if _is_dev_loss(name)
      or name in ("loss", "steps_per_second", "gradient_norm", *_DEV_BLEU)
    }
    if kept:
      self.write(step=step, **kept)

  def flush(self) -> None:
    """See `trainer.Writer`."""
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _is_dev_loss(name: str) -> bool:
  """Of the whole or a direction; means by band follow from those."""
  found = metrics.parse(name)
  return bool(
    found
    and (found.split, found.metric.name) == ("dev", "loss")
    and not found.is_group
  )


CONSOLE = run.Console(
  message=lambda text: print("  " + text, flush=True),
  progress=lambda progress, temperature: None,
  building=lambda *args, **kwargs: None,
  translating=lambda done, total: None,
)


def is_complete(path: pathlib.Path) -> bool:
  """Whether a log ends as logs of finished runs do."""
  if not path.exists():
    return False
  lines = path.read_text(encoding="utf-8").splitlines()
  return bool(lines) and "finished" in json.loads(lines[-1])


def make_run(
  described: run.Run,
  header: Mapping[str, Any],
  logs: pathlib.Path,
  beams: Sequence[int],
  affinities: bool = False,
) -> None:
  """Trains one system with one seed; its test scores and affinities if asked.

  Args:
    described: The run; its folder is named as the log is, and removed.
    header: What the log says of it: `system`, `seed`, `network`, ...
    logs: Folder of logs.
    beams: Sizes to translate the test set with.
    affinities: Whether to keep `training_affinities` beside the run's folder.

  Raises:
    BlockingIOError: Another process does.
  """
  model_dir = pathlib.Path(described.model_dir)
  work, name = model_dir.parent, model_dir.name
  path = logs / f"{name}.jsonl"
  with contextlib.closing(Log(path.with_suffix(".part"))) as log:
    if is_complete(path):  # Since it was looked at last.
      path.with_suffix(".part").unlink()
      return
    print(name, flush=True)
    # Half a run of before would start with its own size and warm-up.
    shutil.rmtree(model_dir, ignore_errors=True)
    device = jax.devices()[0].device_kind
    log.write(**header, device=device, jax=jax.__version__)
    start = time.perf_counter()
    outcome = training.train(described, log, CONSOLE)
    if outcome != "done":
      raise SystemExit(f"{name}: {outcome}, to be made again")
    log.write(trained_after=round(time.perf_counter() - start, 1))
    model = trained.load(described, CONSOLE)
    for layer in run_report.expert_maps(model, "validation"):
      shares = np.round(layer.shares, 4).tolist()
      log.write(
        layer=layer.layer, languages=layer.languages, expert_shares=shares
      )
    if header["network"] == "BalancedRouter":
      log.write(dev_losses_by_affinity=losses_by_affinity(described, model))
    if affinities:
      found: Any = training_affinities(described, model)
      np.savez(work / f"{name}_affinities.npz", **found)
    for beam in beams:
      _translate(described, model, beam, log, work / "translations")
    log.write(finished=round(time.perf_counter() - start, 1))
    path.with_suffix(".part").rename(path)
  shutil.rmtree(model_dir)


def _translate(
  described: run.Run,
  model: trained.Trained,
  beam: int,
  log: Log,
  folder: pathlib.Path,
) -> None:
  """Scores the test set; translations go to a file of their own."""
  search = dataclasses.replace(described.search, beam_size=beam)
  results, translations = evaluation.evaluate(
    model.translator(search),
    model.pieces,
    trained.direction_texts(model.store, "test"),
    thresholds=described.bands,
  )
  for result in results:
    log.write(
      test=result.direction,
      beam=beam,
      band=result.band,
      pairs=result.train_pairs,
      bleu=round(result.bleu or 0.0, 3),
      chrf=round(result.chrf or 0.0, 3),
      signature=result.bleu_signature,
    )
  folder.mkdir(parents=True, exist_ok=True)
  name = pathlib.Path(described.model_dir).name
  with gzip.open(folder / f"{name}_beam{beam}.json.gz", "wt") as file:
    json.dump({t.direction: list(t.hypotheses) for t in translations}, file)


def pairs_of(store: row_store.RowStore) -> dict[str, int]:
  """Training pairs of every direction."""
  return {
    name: int(pairs)
    for name, pairs in zip(store.directions, store.pairs("train"), strict=True)
  }


def losses_by_affinity(
  described: run.Run, loaded: trained.Trained
) -> dict[str, float]:
  """Dev losses if prices do not count at test time."""
  program, store = loaded.program, loaded.store
  config = dataclasses.replace(
    program.model.config, router=routing.BalancedRouter(prices_at_test=False)
  )
  unpriced = steps.Program(
    config,
    described.settings,
    described.settings.learning_rate,
    program.mesh,
    len(store.directions),
  )
  split = batches.eval_batches(store, "validation", described.batch_size)
  losses = trainer.direction_losses(
    unpriced.eval_step,
    loaded.variables,
    (partitioning.put_batch(batch, program.mesh) for batch in split),
    store.directions,
  )
  return {name: round(loss, 5) for name, loss in losses.items()}


def training_affinities(
  described: run.Run, loaded: trained.Trained, count: int = 6
) -> dict[str, np.ndarray]:
  """What the assignment is asked to solve, for benchmarks/assignment.py.

  Returns:
    By layer of experts: affinities [count, T, E] float32 of the first T tokens
    of `count` successive training batches, T a multiple of 128.
  """
  model = loaded.program.model

  @jax.jit
  def inputs(variables, batch):
    _, updates = model_lib.forward(
      model, variables, batch, train=False, reported=["expert_inputs"]
    )
    flat = traverse_util.flatten_dict(updates["expert_inputs"])
    return {
      "/".join(path[:-1]): (tokens, flat[(*path[:-1], "mask")][0])
      for path, (tokens,) in flat.items()
      if path[-1] == "tokens"
    }

  source = described.train_batches(loaded.store)
  params = traverse_util.flatten_dict(loaded.variables["params"], sep="/")
  result: dict[str, list[np.ndarray]] = {}
  for _ in range(count):
    batch = partitioning.put_batch(next(source), loaded.program.mesh)
    for layer, (h, mask) in inputs(loaded.variables, batch).items():
      centroids = np.asarray(params[f"{layer}/expert_centroids"])
      tokens = np.asarray(h, np.float32)[np.asarray(mask)]
      result.setdefault(layer, []).append(tokens @ centroids.T)
  least = min((len(x) for y in result.values() for x in y), default=0)
  return {
    layer: np.stack([x[: least - least % 128] for x in found])
    for layer, found in result.items()
  }


def network_of(system: System) -> str:
  """Names what decides a step's time: the kind of feed-forward and router."""
  if system.feed_forward != "experts":
    return system.feed_forward
  return type(system.router).__name__


def prepare(data: str, store: str, vocab_size: int, length: int) -> None:
  """Trains the vocabulary and packs the rows; needs SeqIO."""
  from basemt_jax.data import mixtures
  from tasks import files

  vocabulary_path = files.vocabulary_file(data, vocab_size)
  mixture = files.mixture(data, vocabulary_path)
  mixtures.build_store(mixture, {"inputs": length, "targets": length}, store)
  found = row_store.RowStore(store)
  for name, pairs, rows in zip(
    found.directions, found.pairs("train"), found.rows("train"), strict=True
  ):
    print(f"{name} {pairs} pairs {rows} rows")


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


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  commands = parser.add_subparsers(required=True, dest="command")
  sub = commands.add_parser("prepare")
  sub.add_argument("--data", required=True)
  sub.add_argument("--store", required=True)
  sub.add_argument("--vocab_size", type=int, default=8000)
  sub.add_argument("--length", type=int, default=64)
  sub = commands.add_parser("run")
  sub.add_argument("--work", type=pathlib.Path, default="runs/study")
  sub.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
  sub.add_argument(
    "--change",
    nargs="+",
    default=[],
    metavar="FIELD=VALUE",
    help="of `System`, for all systems; use another --logs for each change",
  )
  sub.add_argument(
    "--beams",
    type=int,
    nargs="*",
    help="sizes to translate the test set with; none: dev losses only, to tune "
    "by; default: 1, and 4 for the systems in the claim; BLEU of some dev "
    "sentences then, too, ten times in a run",
  )
  sub.add_argument(
    "--affinities",
    action="store_true",
    help="write WORK/*_affinities.npz for benchmarks/assignment.py",
  )
  sub.add_argument(
    "--seeds", type=int, nargs="+", help="default: each system's own number"
  )
  sub.add_argument("--store", required=True)
  sub.add_argument("--logs", type=pathlib.Path, required=True)
  sub.add_argument("--size", nargs="+", default=[], metavar="FIELD=VALUE")
  options = parser.parse_args()
  if options.command == "prepare":
    prepare(options.data, options.store, options.vocab_size, options.length)
    return
  options.logs.mkdir(parents=True, exist_ok=True)
  if not pathlib.Path(options.store, "store.json").exists():
    raise SystemExit(f"no rows in {options.store}; pack them with `prepare`")
  size = with_changes(Size(), options.size)
  for seed in options.seeds or range(3):
    for name in options.systems:
      wanted = options.seeds or seed < SYSTEMS[name].seeds
      if not wanted or is_complete(options.logs / f"{name}_{seed}.jsonl"):
        continue
      system = with_changes(SYSTEMS[name], options.change)
      header = {
        "system": name,
        "seed": seed,
        "settings": settings_of(system),
        "network": network_of(system),
        "size": dataclasses.asdict(size),
        "pairs": pairs_of(row_store.RowStore(options.store)),
      }
      model_dir = str(options.work / f"{name}_{seed}")
      described = run_of(system, size, seed, options.store, model_dir)
      beams = options.beams
      if beams is None:
        beams = (1, 4) if system.beam else (1,)
      if beams:
        described = dataclasses.replace(
          described, bleu_every=max(size.train_steps // 10, 1)
        )
      with contextlib.suppress(BlockingIOError):  # Another one makes it.
        make_run(described, header, options.logs, beams, options.affinities)


if __name__ == "__main__":
  main()
