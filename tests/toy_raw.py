"""Raw text of three pairs of languages, and what is prepared of it."""

import gzip
import random

from raw_text_test import files, sgm, tar

from basemt_jax import cli
from basemt_jax.corpora import cleaning, preparation, raw_text

NAMES = raw_text.Names((("en", "de"), ("en", "zh"), ("en", "fr")))
SMALL = cleaning.Options(shard_bytes=20_000, max_characters=60)


def corpus(seed=0, count=3000):
  """Dirty pairs: copies, spaces, control characters, decomposed letters."""
  rng = random.Random(seed)
  words = [
    "Haus",
    "käse",
    "e\u0301te\u0301",
    "a\u200bb",
    "x\x07y",
    "你好",
    "C-3",
  ]

  def text():
    joint = rng.choice([" ", "\u00a0", "  ", " \u3000"])
    return joint.join(rng.choices(words, k=rng.choice([1, 2, 3, 5, 9, 20])))

  pairs = [(text(), text()) for _ in range(count)]
  return [rng.choice(pairs) if rng.random() < 0.3 else p for p in pairs] + [
    ("", "leer"),
    (" \u200b ", "leer"),
  ]


def write(folder):
  """Three pairs of languages, in archives and files of several kinds."""
  german, chinese = corpus(1), corpus(2, 800)
  # Sentences of the test sets that training must not have, in other spelling.
  leaks = [("UNSEEN, test!", "Haus"), ("Haus", "ungesehener — TEST")]
  held_out = [("Unseen test.", "Ungesehener Test"), ("nothing", "nichts")]
  table = "".join(f"{a}\t{b}\n" for a, b in [*german[:1500], *leaks])
  sides = ["".join(f"{p[i]}\n" for p in german[1500:]) for i in (0, 1)]
  turned = "".join(f"{b}\t{a}\n" for a, b in [*chinese, leaks[0]])
  archive = tar(
    {"x/p.en-de.en": sides[0].encode(), "x/p.en-de.de": sides[1].encode()}
  )
  return files(
    folder,
    {
      "news.en-de.tsv.gz": table.encode() + b"no tab\n\xff\tx\n",
      "parallel.tgz": archive,
      "zh-en.train.tsv": turned.encode(),
      "test/x-deen-src.de.sgm": sgm([b for _, b in held_out]),
      "test/x-deen-ref.en.sgm": sgm([a for a, _ in held_out]),
      "dev.en-de.tsv": b"a dev  set\tein\x01 Dev-Set\n\tempty\n",
      "README": b"",
    },
  )


def prepare(raw, out):
  """The report too."""
  return out, preparation.prepare(raw, out, NAMES, SMALL, processes=0)


def content(folder):
  return {
    path.name: path.read_bytes()
    for path in sorted(folder.iterdir())
    if path.is_file()
  }


def train_pairs(folder, pair):
  """Pairs of every shard, in order."""
  return [
    [
      tuple(x.split("\t"))
      for x in gzip.decompress(p.read_bytes()).decode().split("\n")[:-1]
    ]
    for p in sorted(folder.glob(f"{pair}.train*"))
  ]


def command(raw, out, *flags, languages="en,de"):
  arguments = ["prepare", "files", f"--languages={languages}", "--processes=0"]
  return cli.main([*arguments, f"--raw={raw}", f"--out={out}", *flags])
