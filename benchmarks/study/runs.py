"""The paper's claim, measured: systems, seeds, and the figures they give.

    export PYTHONPATH=.
    python benchmarks/study/runs.py prepare --data FOLDER --store DIR
    python benchmarks/study/runs.py run --store DIR --logs LOGS
    python benchmarks/study/reading.py NAME LOGS/*.jsonl
    python benchmarks/study/report.py

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
import fnmatch
import gzip
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from basemt_jax import (
  evaluation,
  losses,
  metrics,
  partitioning,
  routing,
  run,
  steps,
  trained,
  training,
)
from basemt_jax import model as model_lib
from basemt_jax.data import batches, languages, row_store
from basemt_jax.inspection import run_report
from benchmarks.study import systems

_DEV_BLEU = [f"dev/bleu/{band}" for band in ("all", *languages.BANDS)]


class Log:
  """A run's JSONL file; takes metrics as a `reports.Writer`.

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
    """See `reports.Writer`."""
    kept = {
      name: round(float(value), 5)
      for name, value in scalars.items()
      if _is_dev_loss(name)
      or name in ("loss", "steps_per_second", "gradient_norm", *_DEV_BLEU)
    }
    if kept:
      self.write(step=step, **kept)

  def flush(self) -> None:
    """See `reports.Writer`."""
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _is_dev_loss(name: str) -> bool:
  """Whether it is a dev loss of all or a direction; bands follow from those."""
  found = metrics.parse(name)
  return bool(
    found
    and found.split == "dev"
    and found.metric.name in ("loss", "last_weights_loss")
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
  measured = losses.measured(
    unpriced.eval_step,
    loaded.variables,
    (partitioning.put_batch(batch, program.mesh) for batch in split),
    store.directions,
  )
  found = metrics.of_directions(measured, "loss")
  return {name: round(loss, 5) for name, loss in found.items()}


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


def prepare(options: argparse.Namespace) -> None:
  """Trains the vocabulary and packs the rows; needs SeqIO."""
  from basemt_jax.data import mixtures, store_building
  from tasks import common, files

  vocabulary_path = files.vocabulary_file(options.data, options.vocab_size)
  mixture = files.mixture(options.data, vocabulary_path)
  if options.only:
    tasks = mixtures.tasks_by_direction(mixture)
    chosen = [tasks[d] for d in tasks if fnmatch.fnmatch(d, options.only)]
    mixture = common.add_mixture(f"{mixture.name}.chosen", chosen)
  lengths = {"inputs": options.length, "targets": options.length}
  found = store_building.build_store(
    mixture, lengths, options.store, long_pairs=options.long_pairs
  )
  for name, pairs, rows in zip(
    found.directions, found.pairs("train"), found.rows("train"), strict=True
  ):
    print(f"{name} {pairs} pairs {rows} rows")


def parsed() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  commands = parser.add_subparsers(required=True, dest="command")
  sub = commands.add_parser("prepare")
  sub.add_argument("--data", required=True)
  sub.add_argument("--store", required=True)
  sub.add_argument("--vocab_size", type=int, default=8000)
  sub.add_argument("--length", type=int, default=64)
  sub.add_argument("--long_pairs", choices=("cut", "drop"), default="cut")
  sub.add_argument("--only", help="directions like '*-en' or 'en-*' alone")
  sub = commands.add_parser("run")
  sub.add_argument("--work", type=pathlib.Path, default="runs/study")
  names = list(systems.SYSTEMS)
  sub.add_argument("--systems", nargs="+", choices=names, default=names)
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
  return parser.parse_args()


def run_system(
  name: str, seed: int, size: systems.Size, options: argparse.Namespace
) -> None:
  """Makes a system's run, unless another process does."""
  system = systems.with_changes(systems.SYSTEMS[name], options.change)
  header = {
    "system": name,
    "seed": seed,
    "settings": systems.settings_of(system),
    "network": systems.network_of(system),
    "size": dataclasses.asdict(size),
    "pairs": pairs_of(row_store.RowStore(options.store)),
  }
  model_dir = str(options.work / f"{name}_{seed}")
  described = systems.run_of(system, size, seed, options.store, model_dir)
  beams = options.beams
  if beams is None:
    beams = (1, 4) if system.beam else (1,)
  if beams:
    described = dataclasses.replace(
      described, bleu_every=max(size.train_steps // 10, 1)
    )
  with contextlib.suppress(BlockingIOError):
    make_run(described, header, options.logs, beams, options.affinities)


def main() -> None:
  """Packs rows, or makes the runs that are missing."""
  options = parsed()
  if options.command == "prepare":
    prepare(options)
    return
  options.logs.mkdir(parents=True, exist_ok=True)
  if not pathlib.Path(options.store, "store.json").exists():
    raise SystemExit(f"no rows in {options.store}; pack them with `prepare`")
  size = systems.with_changes(systems.Size(), options.size)
  for seed in options.seeds or range(3):
    for name in options.systems:
      wanted = options.seeds or seed < systems.SYSTEMS[name].seeds
      if wanted and not is_complete(options.logs / f"{name}_{seed}.jsonl"):
        run_system(name, seed, size, options)


if __name__ == "__main__":
  main()
