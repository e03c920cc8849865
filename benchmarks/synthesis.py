"""Back-translation and distillation, each beside the same system without it.

    export PYTHONPATH=.
    python benchmarks/synthesis.py prepare --data FOLDER --work WORK
    python benchmarks/synthesis.py run sparse sparse_bt --work WORK
    python benchmarks/synthesis.py run dense dense_kd --work WORK
    python benchmarks/synthesis.py report --work WORK

`prepare` takes English with some languages from a folder of files (see
`tasks/files.py`): of two as many pairs as there are to be had, of others so few
that they are the low band, and of those the rest of their own side as
monolingual text. Then

    sparse     is trained on the pairs,
    sparse_bt  is the same, trained on the pairs and on what `sparse` makes of
               the monolingual text,
    dense      has no experts, and is trained on the pairs,
    dense_kd   is the same, trained on what `sparse` makes of the sources of the
               pairs, and on nothing else.

All see as many packed rows, sampled alike, and of each the checkpoint with the
best BLEU on dev is the one that is tested. The two lines of `run` may run at
once, on a GPU each (`CUDA_VISIBLE_DEVICES`): who needs `sparse` waits for it.
What is done is not done again. `report` needs WORK/*.json and the pairs only.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from basemt_jax import (
  evaluation,
  files,
  run,
  synthesis,
  trained,
  training,
  translation,
)
from basemt_jax.data import languages, row_store, store_building, vocabulary
from benchmarks.study import systems
from tasks import common
from tasks import files as files_tasks

TEACHER = "sparse"
# What each system is compared with, and where it is expected to be better.
BASELINES = {"sparse_bt": "sparse", "dense_kd": "dense"}
SYSTEMS = (TEACHER, "sparse_bt", "dense", "dense_kd")
SIZE = systems.Size(
  train_steps=2500,
  emb_dim=256,
  blocks=4,
  expert_every=2,
  warmup_steps=250,
  rate="cosine_decay",
  evaluations=5,
  rows_per_group=64,
  descent="muon",
  weight_decay=0.3,
  average_decay=0.998,
)
LENGTH = 48
BEAMS = (1, 4)
# One program for all lengths: these sentences are short.
SEARCH = translation.SearchOptions(
  batch_size=512,
  max_source_length=LENGTH,
  max_target_length=LENGTH,
  smallest_bucket=LENGTH,
)


# ------------------------------------------------------------------ data


def prepare(options: argparse.Namespace) -> None:
  """Files of pairs and of monolingual text, the vocabulary, the rows."""
  data, mono = options.work / "data", options.work / "mono"
  for folder in (data, mono):
    folder.mkdir(parents=True)
  for language, count in {**options.high, **options.low}.items():
    pairs = _pairs(options.data, language, "train")
    every = len(pairs) / min(count, len(pairs))
    chosen = [pairs[int(i * every)] for i in range(min(count, len(pairs)))]
    _write(data / f"en-{language}.train.tsv.gz", map("\t".join, chosen))
    for split in ("dev", "test"):
      found = _pairs(options.data, language, split)
      _write(data / f"en-{language}.{split}.tsv", map("\t".join, found))
    if language in options.low:
      text = _others(pairs, chosen)[: options.mono]
      _write(mono / f"{language}.txt.gz", text)
      print(f"{language}: {len(chosen):,} pairs, {len(text):,} sentences")
  _train_vocabulary(options.work, options.vocab_size)
  print(f"{pack(options.work, 'data').rows('train').sum():,} rows")


def _pairs(folder: str, language: str, split: str) -> list[tuple[str, str]]:
  """English and another language of a folder."""
  summary = files_tasks.scan(folder)
  name = {"dev": "validation"}.get(split, split)
  return list(files_tasks.read_direction(summary, name, "en", language))


def _others(
  pairs: Sequence[tuple[str, str]], chosen: Sequence[tuple[str, str]]
) -> list[str]:
  """Sentences whose translation is not among those chosen, once each."""
  english, own = (set(side) for side in zip(*chosen, strict=True))
  rest = (b for a, b in pairs if a not in english and b not in own)
  return list(dict.fromkeys(rest))


def _write(path: pathlib.Path, lines: Any) -> None:
  text = "".join(f"{line}\n" for line in lines).encode()
  is_packed = path.suffix == ".gz"
  path.write_bytes(gzip.compress(text, mtime=0) if is_packed else text)


def _monolingual(work: pathlib.Path) -> dict[str, list[str]]:
  """Sentences by language, as `prepare` wrote them."""
  return {
    path.name.partition(".")[0]: gzip.decompress(path.read_bytes())
    .decode()
    .splitlines()
    for path in sorted((work / "mono").iterdir())
  }


def _train_vocabulary(work: pathlib.Path, size: int) -> None:
  """One for all systems, of all text that any of them is trained on."""
  mixture = _mixture(work / "data", vocabulary.Vocabulary.load("bytes"))
  texts = [
    languages.split_tag(side)[1]
    for pair in vocabulary.sampled_examples(mixture, 5.0, 100_000)
    for side in pair
  ]
  for sentences in _monolingual(work).values():
    texts += sentences[::2]
  known = {
    languages.Direction.of_task(task.name).target.tag for task in mixture.tasks
  }
  tags = [*sorted(known), "<bt>"]
  vocabulary.train_sentencepiece(
    texts, work / "vocabulary.model", size, tags=tags
  )


def _mixture(folder: pathlib.Path, pieces: vocabulary.Vocabulary) -> Any:
  """The mixture of a folder, as `tasks.files` makes it, but without SeqIO."""
  summary = files_tasks.scan(folder)
  name = f"{folder.name}.{pieces.kind}"
  tasks = []
  for source, target in summary.directions:
    read = functools.partial(
      files_tasks.read_direction, summary, source=source, target=target
    )
    sizes = summary.num_pairs((source, target))
    stamp = files_tasks.fingerprint(folder)
    tasks.append(
      common.add_direction(name, source, target, read, sizes, pieces, stamp)
    )
  return common.add_mixture(name, tasks)


def pack(work: pathlib.Path, name: str) -> row_store.RowStore:
  """The packed rows of a folder of WORK."""
  pieces = vocabulary.Vocabulary.load(work / "vocabulary.model")
  lengths = {"inputs": LENGTH, "targets": LENGTH}
  directory = work / f"rows_{name}"
  with contextlib.suppress(ValueError):  # Not there, or not finished.
    return row_store.RowStore(directory)
  return store_building.build_store(
    _mixture(work / name, pieces), lengths, directory
  )


# --------------------------------------------------------------- systems


def described(
  name: str, store: str, work: pathlib.Path, size: systems.Size
) -> run.Run:
  """The run of a system; all differ in experts and data alone."""
  system = dataclasses.replace(
    systems.SYSTEMS["recommended"], top=3.0, learning_rate=3e-3
  )
  if name.startswith("dense"):
    system = dataclasses.replace(system, feed_forward="dense")
  made = systems.run_of(system, size, 0, store, str(work / name))
  every = max(size.train_steps // size.evaluations, 1)
  settings = dataclasses.replace(
    made.settings, save_every=every, keep_checkpoints=size.evaluations
  )
  weights = {"authentic": 0.0} if name == "dense_kd" else {}
  return dataclasses.replace(
    made,
    settings=settings,
    strategy=dataclasses.replace(made.strategy, weights=weights),
    search=SEARCH,
    bleu_every=every,
    bleu_sentences=200,
  )


class DevBleu:
  """Keeps the dev BLEU of every checkpoint; a `reports.Writer`."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.by_step: dict[int, float] = {}
    if path.exists():
      found = json.loads(path.read_text("utf-8"))
      self.by_step = {int(step): bleu for step, bleu in found.items()}

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `reports.Writer`."""
    if "dev/bleu/all" in scalars:
      self.by_step[step] = float(scalars["dev/bleu/all"])
      files.write_json(self._path, self.by_step)

  def flush(self) -> None:
    """See `reports.Writer`."""

  def best(self) -> int:
    """The step with the best one."""
    return max(self.by_step, key=lambda step: self.by_step[step])


def say(name: str, text: str) -> None:
  """A line of the log."""
  print(f"{time.monotonic() - _START:6.1f} {name}: {text}", flush=True)


_START = time.monotonic()


def console(name: str) -> run.Console:
  """Progress as lines."""
  return run.Console(
    message=functools.partial(say, name),
    progress=lambda p, temperature: say(
      name,
      f"step {p.step} loss {p.loss:.3f} {p.tokens_per_second:,.0f} tokens/s",
    ),
    building=lambda *args: None,
    translating=lambda done, total: None,
  )


def loaded(of: run.Run, work: pathlib.Path) -> trained.Trained:
  """The system with the checkpoint that was best on dev."""
  name = pathlib.Path(of.model_dir).name
  best = DevBleu(work / f"{name}.dev").best()
  return trained.load(of, console(name), best)


def make(name: str, work: pathlib.Path, size: systems.Size) -> None:
  """Trains a system on its data, which is written first, and tests it."""
  if (work / f"{name}.json").exists():
    return say(name, "is done")
  teacher = described(TEACHER, str(work / "rows_data"), work, size)
  store = str(work / "rows_data")
  if name in _WRITERS:
    while not (work / f"{TEACHER}.trained").exists():
      time.sleep(1)
    folder = _WRITERS[name](loaded(teacher, work), work, name)
    store = str(pack(work, folder.name).directory)
  of = described(name, store, work, size)
  scores = DevBleu(work / f"{name}.dev")
  if not (work / f"{name}.trained").exists():
    outcome = training.train(of, scores, console(name))
    if outcome != "done":
      raise SystemExit(f"{name}: {outcome}, to be started again")
    (work / f"{name}.trained").touch()
  test(name, loaded(of, work), work)


def test(name: str, model: trained.Trained, work: pathlib.Path) -> None:
  """Translates the test set; scores and translations go to WORK/NAME.json."""
  texts = trained.direction_texts(model.store, "test")
  found: dict[str, Any] = {"step": model.step, "beams": {}}
  for beam in BEAMS:
    search = dataclasses.replace(SEARCH, beam_size=beam)
    results, translations = evaluation.evaluate(
      model.translator(search),
      model.pieces,
      texts,
      thresholds=systems.BANDS,
    )
    for mean in evaluation.summarise(results):
      scores = f"BLEU {mean.bleu:.2f} chrF++ {mean.chrf:.2f}"
      say(name, f"beam {beam} {mean.name} {scores}")
    found["beams"][str(beam)] = {
      result.direction: {
        "band": result.band,
        "bleu": result.bleu,
        "chrf": result.chrf,
        "hypotheses": list(translated.hypotheses),
      }
      for result, translated in zip(results, translations, strict=True)
    }
  files.write_json(work / f"{name}.json", found)


# ------------------------------------------------------- what models write


def back_translate(
  teacher: trained.Trained, work: pathlib.Path, name: str
) -> pathlib.Path:
  """The pairs, and monolingual text with English that the teacher wrote."""
  folder = _copied(work, "data_bt")
  jobs = []
  for language, sentences in _monolingual(work).items():
    direction = languages.Direction.parse(f"en_x_bt-{language}")
    jobs.append(
      synthesis.Job(
        folder / f"{direction}.train.tsv",
        direction,
        teacher.tag("en", language),
        functools.partial(_alone, sentences),
        len(sentences),
        "monolingual text",
      )
    )
  _write_all(name, jobs, teacher, SEARCH)
  return folder


def _alone(sentences: Sequence[str]) -> Iterator[tuple[str, str]]:
  return ((sentence, "") for sentence in sentences)


def distil(
  teacher: trained.Trained, work: pathlib.Path, name: str
) -> pathlib.Path:
  """The pairs, and their sources with what the teacher's beam finds."""
  folder = _copied(work, "data_kd")
  summary = files_tasks.scan(work / "data")
  jobs = []
  for source, target in summary.directions:
    direction = languages.Direction.parse(f"{source}-{target}_x_kd")
    jobs.append(
      synthesis.Job(
        folder / f"{direction}.train.tsv",
        direction,
        teacher.tag(target, source),
        functools.partial(
          files_tasks.read_direction, summary, "train", source, target
        ),
        summary.num_pairs((source, target))["train"],
        "training sources",
      )
    )
  _write_all(name, jobs, teacher, dataclasses.replace(SEARCH, beam_size=4))
  return folder


def _copied(work: pathlib.Path, name: str) -> pathlib.Path:
  shutil.copytree(work / "data", work / name, dirs_exist_ok=True)
  return work / name


def _write_all(
  name: str,
  jobs: Sequence[synthesis.Job],
  teacher: trained.Trained,
  search: translation.SearchOptions,
) -> None:
  start = time.monotonic()
  for done in synthesis.write(jobs, teacher, search, lambda progress: None):
    say(
      name,
      f"{done.job.path.name} {done.done:,} of which {done.skipped:,} "
      "are left out",
    )
  count = sum(job.count for job in jobs)
  rate = count / (time.monotonic() - start)
  say(name, f"{count:,} sentences, {rate:,.0f} a second")


_WRITERS = {"sparse_bt": back_translate, "dense_kd": distil}


# ---------------------------------------------------------------- report


def report(work: pathlib.Path) -> Iterator[str]:
  """Tables in Markdown: every system beside the same without its data."""
  for system, baseline in BASELINES.items():
    both = [work / f"{name}.json" for name in (baseline, system)]
    if not all(path.exists() for path in both):
      continue
    old, new = (json.loads(path.read_text("utf-8")) for path in both)
    for beam in old["beams"]:
      yield from _table(work, beam, baseline, old, system, new)
      yield ""


def _table(
  work: pathlib.Path,
  beam: str,
  baseline: str,
  old: dict[str, Any],
  system: str,
  new: dict[str, Any],
) -> Iterator[str]:
  """Means by band and side of English, and how many directions differ."""
  yield (
    f"Beam {beam}; {baseline} of step {old['step']}, {system} of {new['step']}"
  )
  yield ""
  yield (
    f"| | directions | BLEU {baseline} | {system} | chrF++ {baseline} | "
    f"{system} | better, worse |"
  )
  yield "| -- | --: | --: | --: | --: | --: | --: |"
  a, b = old["beams"][beam], new["beams"][beam]
  groups: dict[str, list[str]] = {}
  for direction, scores in a.items():
    side = "from" if direction.startswith("en-") else "into"
    groups.setdefault(f"{scores['band']}, {side} English", []).append(direction)
  groups["all"] = list(a)
  changes = {
    direction: _change(work, direction, a[direction], b[direction])
    for direction in a
  }
  for group, names in groups.items():
    means = [
      f"{sum(x[n][metric] for n in names) / len(names):.2f}"
      for metric in ("bleu", "chrf")
      for x in (a, b)
    ]
    better = sum(changes[n] > 0 for n in names)
    worse = sum(changes[n] < 0 for n in names)
    cells = [group, str(len(names)), *means, f"{better}, {worse}"]
    yield f"| {' | '.join(cells)} |"


def _change(
  work: pathlib.Path, name: str, old: dict[str, Any], new: dict[str, Any]
) -> int:
  """1 or -1 where BLEU is significantly better or worse, p < 0.05; or 0."""
  source, target = languages.Direction.parse(name)
  other = source if target == "en" else target
  pairs = _pairs(str(work / "data"), str(other), "test")
  references = [pair[target != "en"] for pair in pairs]
  bleu = evaluation.paired_bootstrap(
    old["hypotheses"], new["hypotheses"], references, target
  )[0]
  if bleu.p_value >= 0.05:
    return 0
  return 1 if bleu.system > bleu.baseline else -1


# --------------------------------------------------------------- command


def counts(values: Sequence[str]) -> dict[str, int]:
  """['de=80000'] to {'de': 80000}."""
  return {
    name: int(number)
    for name, _, number in (value.partition("=") for value in values)
  }


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(required=True, dest="command")
  sub = commands.add_parser("prepare")
  sub.add_argument("--data", required=True)
  sub.add_argument("--high", nargs="+", default=["de=80000", "fr=50000"])
  low = ["es=1000", "nl=1000", "sv=1000"]
  sub.add_argument("--low", nargs="+", default=low)
  sub.add_argument("--mono", type=int, default=20_000, help="sentences of each")
  sub.add_argument("--vocab_size", type=int, default=8000)
  run_parser = commands.add_parser("run")
  run_parser.add_argument("systems", nargs="+", choices=SYSTEMS)
  run_parser.add_argument(
    "--size", nargs="+", default=[], metavar="FIELD=VALUE", help="of SIZE"
  )
  for sub in (*commands.choices.values(), commands.add_parser("report")):
    sub.add_argument("--work", type=pathlib.Path, required=True)
  options = parser.parse_args()
  if options.command == "prepare":
    options.high, options.low = counts(options.high), counts(options.low)
    prepare(options)
  elif options.command == "run":
    size = systems.with_changes(SIZE, options.size)
    for name in options.systems:
      make(name, options.work, size)
  else:
    print("\n".join(report(options.work)))


if __name__ == "__main__":
  main()
