"""`preparation`'s steps as an Apache Beam pipeline, for more than a machine.

The files are the same, byte for byte. Beam has its own way to go on after
failures and to use workers, so there is none here. All workers must see the
folders of raw text and of the result under the same names: a shared or mounted
file system.

Beam is an extra of the package: `pip install 'basemt_jax[beam]'`.
"""

import os
import pathlib
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from basemt_jax.corpora import cleaning, planning, preparation, raw_text

_Key = tuple[raw_text.Pair, int]


def prepare(
  raw: str | os.PathLike[str],
  out: str | os.PathLike[str],
  names: raw_text.Names,
  options: cleaning.Options | None = None,
  *,
  beam_options: Sequence[str] = (),
) -> dict[str, Any]:
  """As `preparation.prepare`, on a Beam runner.

  Its options are as Beam's command lines have them, '--runner=DirectRunner'.

  Raises:
    ValueError: as `preparation.prepare`.
    ImportError: Beam is not installed.
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise ImportError(
      f"Apache Beam cannot be imported ({error}): pip install "
      "'basemt_jax[beam]'"
    ) from error

  raw, out = pathlib.Path(raw).resolve(), pathlib.Path(out).resolve()
  options = options or cleaning.Options()
  with preparation.begun(raw, out, names, options) as (work, report):
    if report:
      return report
    todo = planning.plan(raw, work, names, options)
    for job in todo.jobs:
      preparation.job_folder(work, job.pair).mkdir(exist_ok=True)
    with beam.Pipeline(
      options=pipeline_options.PipelineOptions(list(beam_options))
    ) as pipeline:
      _add_steps(pipeline, todo, work, out, options)
    return preparation.finish(todo, work, out, options)


def _add_steps(
  pipeline: Any,
  todo: planning.Todo,
  work: pathlib.Path,
  out: pathlib.Path,
  options: cleaning.Options,
) -> None:
  """Puts the steps into a pipeline: read, clean, add up, write shards."""
  import apache_beam as beam

  shards = {job.pair: job.shards for job in todo.jobs}
  texts = {
    (job.pair, number): text
    for job in todo.jobs
    for number, text in enumerate(job.texts)
  }
  held_out = pipeline | "held out" >> beam.Create([todo.keys])
  found = (
    pipeline
    | "texts" >> beam.Create(list(texts.items()))
    | "read" >> beam.FlatMap(_chunks)
    | "spread" >> beam.Reshuffle()
    | "clean"
    >> beam.FlatMap(
      _clean,
      held_out=beam.pvalue.AsSingleton(held_out),
      options=options,
      shards=shards,
    ).with_outputs("outcomes", main="lines")
  )
  # One empty element for each, so that empty ones are written, too.
  no_outcomes = pipeline | "no outcomes" >> beam.Create(
    [(key, cleaning.Outcome()) for key in texts]
  )
  no_lines = pipeline | "no lines" >> beam.Create(
    [((pair, i), []) for pair, count in shards.items() for i in range(count)]
  )
  _ = (
    (found["outcomes"], no_outcomes)
    | "all outcomes" >> beam.Flatten()
    | "add up" >> beam.CombinePerKey(_sum)
    | "write outcomes"
    >> beam.Map(
      _write_outcome,
      work=str(work),
      names={key: text.name for key, text in texts.items()},
    )
  )
  _ = (
    (found["lines"], no_lines)
    | "all lines" >> beam.Flatten()
    | "by shard" >> beam.GroupByKey()
    | "write shards"
    >> beam.Map(_write, work=str(work), out=str(out), shards=shards)
  )


def _chunks(
  element: tuple[_Key, raw_text.Text],
) -> Iterator[tuple[_Key, raw_text.Pair, bytes]]:
  key, text = element
  for chunk in planning.chunks(text):
    # Beam's own coder of texts fails at lone surrogates.
    yield key, text.languages, pickle.dumps(chunk)


def _clean(
  element: tuple[_Key, raw_text.Pair, bytes],
  held_out: np.ndarray,
  options: cleaning.Options,
  shards: dict[raw_text.Pair, int],
) -> Iterator[Any]:
  """Kept lines by pair and shard, and outcomes by pair and raw text."""
  import apache_beam as beam

  (pair, number), languages, chunk = element
  kept, outcome = cleaning.clean(
    pickle.loads(chunk), languages, pair, options, held_out
  )
  yield beam.pvalue.TaggedOutput("outcomes", ((pair, number), outcome))
  for shard, part in cleaning.by_shard(kept, shards[pair]).items():
    yield (pair, shard), part


def _sum(outcomes: Iterable[cleaning.Outcome]) -> cleaning.Outcome:
  total = cleaning.Outcome()
  for each in outcomes:
    total.add(each)
  return total


def _write_outcome(
  element: tuple[_Key, cleaning.Outcome], work: str, names: dict[_Key, str]
) -> None:
  (pair, number), outcome = element
  preparation.write_outcome(
    pathlib.Path(work), pair, number, names[pair, number], outcome
  )


def _write(
  element: tuple[_Key, Iterable[list[bytes]]],
  work: str,
  out: str,
  shards: dict[raw_text.Pair, int],
) -> None:
  (pair, shard), lines = element
  preparation.write_shard(
    (line for part in lines for line in part),
    pathlib.Path(work),
    pathlib.Path(out),
    pair,
    shard,
    shards[pair],
  )
