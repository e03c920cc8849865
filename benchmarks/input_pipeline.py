"""Sentence pairs per CPU second: our batches against SeqIO's pipelines.

    PYTHONPATH=. python benchmarks/input_pipeline.py --repeats 5 --seconds 3

All pipelines read the same made-up corpus of eleven directions, whose sizes
fall from 20,000 to 100 pairs, with the SentencePiece model that ships:

* `seqio.Mixture`, unpacked and packed: fixed rates, SeqIO's own sampling;
* `HeatedMixture`, unpacked and packed: the same through SeqIO, rates that
  change;
* `TrainBatches`: packed rows of a store, as training reads them; and what it
  takes to build the store, which is done once.

The pipelines take turns, and the medians over the turns are compared, so that
a slow moment of the machine does not fall on one of them alone. CPU time is
that of all threads of the process.
"""

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import absl.logging
import numpy as np
import seqio
import tensorflow as tf

from basemt_jax import heating, sampling
from basemt_jax.data import batches, heated_mixture, store_building
from benchmarks import measuring

LENGTHS = {"inputs": 128, "targets": 128}
LANGUAGES = ("fr", "de", "cs", "ru", "fi", "et", "lv", "lt", "ro", "tr", "hi")
SIZES = np.geomspace(20_000, 100, len(LANGUAGES)).astype(int)
BATCH = 128
EXAMPLES_PER_STEP = 600.0
MODEL = pathlib.Path(__file__).parents[1] / "tasks" / "cldr.model"
PLAIN, HEATED, OURS = "seqio.Mixture", "HeatedMixture", "TrainBatches"


def _sentences(count: int, seed: int) -> list[str]:
  """Texts of 3 to 20 made-up words."""
  rng = np.random.default_rng(seed)
  letters = np.array(list("aeioulnrstdmk"))
  words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(999)]
  return [" ".join(rng.choice(words, n)) for n in rng.integers(3, 21, count)]


def _register() -> seqio.Mixture:
  """The corpus, as in-memory tasks, and its mixture at temperature 5."""
  feature = seqio.Feature(
    seqio.SentencePieceVocabulary(str(MODEL)), add_eos=True
  )
  names = []
  for index, (language, size) in enumerate(
    zip(LANGUAGES, SIZES.tolist(), strict=True)
  ):
    texts = {
      "inputs": [f"<2de> {text}" for text in _sentences(size, 2 * index)],
      "targets": _sentences(size, 2 * index + 1),
    }

    def read(
      split: str,
      shuffle_files: bool,
      seed: int | None = None,
      texts: Any = texts,
    ) -> tf.data.Dataset:
      del split, shuffle_files, seed
      return tf.data.Dataset.from_tensor_slices(texts)

    names.append(f"made_up.en_{language}")
    seqio.TaskRegistry.add(
      names[-1],
      source=seqio.FunctionDataSource(
        read,
        splits=["train"],
        num_input_examples={"train": size},
      ),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={"inputs": feature, "targets": feature},
    )
  rates = heating.mixing_rates(SIZES, 5.0)
  return seqio.MixtureRegistry.add(
    "made_up", list(zip(names, rates.tolist(), strict=True))
  )


def _seqio_pairs(mixture: seqio.Mixture, pack: bool) -> Iterator[int]:
  """Pairs in every batch of a SeqIO pipeline."""
  dataset = seqio.get_dataset(
    mixture,
    LENGTHS,
    feature_converter=seqio.EncDecFeatureConverter(pack=pack),
    dataset_split="train",
    shuffle=True,
    num_epochs=None,
    seed=0,
    batch_size=BATCH,
    verbose=False,
  )
  for batch in dataset.prefetch(2).as_numpy_iterator():
    yield _count(batch) if pack else BATCH


def _count(batch: Mapping[str, np.ndarray]) -> int:
  """Pairs in a packed batch."""
  return int(batch["encoder_segment_ids"].max(axis=1).sum())


def _per_cpu_second(pairs: Iterator[int], seconds: float) -> float:
  """Pairs per CPU second of a pipeline that is already running."""
  start, count = time.process_time(), 0
  while (used := time.process_time() - start) < seconds:
    count += next(pairs)
  return count / used


def measure(repeats: int, seconds: float) -> dict[str, Any]:
  """All pipelines in turn, so many seconds of CPU time each.

  Returns:
    Pairs per CPU second of all turns, by pipeline.
  """
  plain = _register()
  strategy = sampling.Strategy(heating.linear(1.0, 5.0, 1000))
  heated = heated_mixture.heat(
    plain, strategy, examples_per_step=EXAMPLES_PER_STEP, total_steps=1000
  )
  with tempfile.TemporaryDirectory() as directory:
    start = time.process_time()
    store = store_building.build_store(
      plain, LENGTHS, directory, splits=["train"]
    )
    build = float(SIZES.sum() / (time.process_time() - start))
    pipelines: dict[str, Callable[[], Iterator[int]]] = {
      f"{PLAIN}": lambda: _seqio_pairs(plain, False),
      f"{HEATED}": lambda: _seqio_pairs(heated, False),
      f"{PLAIN}, packed": lambda: _seqio_pairs(plain, True),
      f"{HEATED}, packed": lambda: _seqio_pairs(heated, True),
      f"{OURS}, packed": lambda: map(
        _count, batches.TrainBatches(store, strategy, BATCH, 0)
      ),
    }
    turns: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(repeats):
      for name, make in pipelines.items():
        pairs = make()
        for _ in range(20):  # Starts threads, fills the shuffle buffers.
          next(pairs)
        turns[name].append(_per_cpu_second(pairs, seconds))
        del pairs  # Ends its threads, whose time would count for the next.
  return {
    "pairs_per_cpu_second": turns,
    "build_pairs_per_cpu_second": build,
    "cpus": os.cpu_count(),
  }


def _print_table(result: Mapping[str, Any]) -> None:
  medians = {
    name: statistics.median(turns)
    for name, turns in result["pairs_per_cpu_second"].items()
  }
  print(f"{'pipeline':<26} {'pairs / CPU s':>14} {'/ plain SeqIO':>14}")
  for name, median in medians.items():
    plain = medians[PLAIN + (", packed" if "packed" in name else "")]
    print(f"{name:<26} {median:>14,.0f} {median / plain:>14.2f}")
  build = result["build_pairs_per_cpu_second"]
  print(f"{'building the store, once':<26} {build:>14,.0f}")


def main() -> None:
  """Measures, prints a table, writes JSON where it is asked for."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=3.0)
  options = parser.parse_args()
  absl.logging.set_verbosity(absl.logging.ERROR)
  result = measure(options.repeats, options.seconds)
  _print_table(result)
  measuring.write(options, result)


if __name__ == "__main__":
  main()
