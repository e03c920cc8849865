"""A corpus of numbered text in three directions, as SeqIO tasks and mixture."""

import pathlib

import seqio
import tensorflow as tf

from basemt_jax.data import mixtures

LENGTHS = {"inputs": 64, "targets": 48}
SIZES = {"en_de": 400, "en_fr": 120, "en_af": 9}
SPLITS = {"train": 1.0, "validation": 0.1, "test": 0.1}
MODEL = pathlib.Path(mixtures.__file__).parents[2] / "tasks" / "cldr.model"
EOS = seqio.preprocessors.append_eos_after_trim


def text(i):
  return " ".join(f"w{(i * k) % 37}é" for k in range(1, 2 + (i * 7919) % 8))


def source(size):
  counts = {s: max(1, int(size * share)) for s, share in SPLITS.items()}

  def read(split, shuffle_files, seed=None):
    del shuffle_files, seed
    offset = 10_000 * list(SPLITS).index(split)
    numbers = range(offset, offset + counts[split])
    texts = {
      "inputs": [f"<2xx> {i} {text(i)}" for i in numbers],
      "targets": [f"{i} {text(i + 1)}" for i in numbers],
    }
    return tf.data.Dataset.from_tensor_slices(texts)

  return seqio.FunctionDataSource(
    read, splits=list(SPLITS), num_input_examples=counts
  )


def same(dataset):
  return dataset


def register(corpus, vocabulary=None, extra=(), sizes=SIZES):
  feature = seqio.Feature(vocabulary or seqio.ByteVocabulary(), add_eos=True)
  for name, size in sizes.items():
    seqio.TaskRegistry.add(
      f"{corpus}.{name}",
      source=source(size),
      preprocessors=[seqio.preprocessors.tokenize, EOS, *extra],
      output_features={"inputs": feature, "targets": feature},
    )
  return seqio.MixtureRegistry.add(
    corpus, [(f"{corpus}.{name}", size) for name, size in sizes.items()]
  )


def split_tabs(dataset):
  def split(line):
    parts = tf.strings.split(line, "\t")
    return {"inputs": parts[0], "targets": parts[1]}

  return dataset.map(split)


def _upper(dataset):
  return dataset.map(lambda x: {**x, "targets": tf.strings.upper(x["targets"])})


def _last_differs(dataset):
  last = f"{SIZES['en_de'] - 1} "
  return dataset.map(
    lambda x: {
      **x,
      "targets": tf.where(
        tf.strings.regex_full_match(x["targets"], f"{last}.*"),
        "other",
        x["targets"],
      ),
    }
  )


# What neither names nor sizes tell.
CHANGES = [_upper, _last_differs]


def files(directory, pattern="*/*"):
  return {
    str(p.relative_to(directory)): p.read_bytes()
    for p in sorted(directory.glob(pattern))
  }
