"""Exports: CTranslate2's translations are ours, and safetensors come back."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import toy
import toy_models
import yaml

from basemt_jax import (
  cli,
  evaluation,
  layers,
  model,
  trained,
  translation,
)
from basemt_jax import run as run_lib
from basemt_jax.exports import ctranslate, safetensors_files

STEP = toy_models.STEP


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Holds a dense and a sparse model with averaged weights."""
  directory = tmp_path_factory.mktemp("exports")
  store = toy.write_store(directory / "store")
  toy_models.write_model(directory / "dense", store, average_decay=0.5)
  toy_models.write_model(
    directory / "sparse", store, toy.SPARSE, average_decay=0.5
  )
  return directory


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())


def export(directory, target, *flags):
  return cli.main(
    ["export", f"--model_dir={directory}", f"--to={target}", *flags]
  )


# ------------------------------------------------------------- CTranslate2

SEARCHES = (
  translation.SearchOptions(beam_size=1),
  translation.SearchOptions(beam_size=4, num_return=1, alpha=0.0),
  translation.SearchOptions(beam_size=3, num_return=3, alpha=0.6),
)
SEARCHES = tuple(
  dataclasses.replace(
    s, max_target_length=20, batch_size=16, max_source_length=32
  )
  for s in SEARCHES
)


def random_params(network):
  """Parameters whose choices are clear, and which do not think of padding."""
  draw = np.random.RandomState(1)
  tokens = np.ones((1, 4), np.int32)
  params = jax.tree.map(
    lambda x: np.array(x * draw.uniform(0.5, 1.5, x.shape), np.float32),
    jax.jit(network.init)(jax.random.key(0), tokens, tokens, tokens)["params"],
  )
  table = params["token_embedder"]["embedding"]
  table *= 3.0
  table[0] = 0.0
  return params


@pytest.mark.parametrize(
  "changes, searches",
  [
    ({}, SEARCHES),
    ({"mlp_activations": ("gelu", "linear"), "head_dim": 6}, SEARCHES[:1]),
    (
      {
        **{"mlp_activations": ("linear", "silu"), "num_decoder_layers": 2},
        **{"feed_forward": "dense_wide", "num_experts": 2},
      },
      SEARCHES[:1],
    ),
  ],
  ids=["plain", "gated", "wide"],
)
def test_a_network_translates_the_same(changes, searches, tmp_path):
  config = dataclasses.replace(toy.DENSE, vocab_size=24, **changes)
  network = model.Transformer(config)
  params = random_params(network)
  names = [f"token {i}" for i in range(24)]
  ctranslate.write(tmp_path, config, params, names)
  engine = ctranslate.library().Translator(str(tmp_path), intra_threads=1)
  draw = np.random.RandomState(2)
  sources = [
    draw.randint(2, 24, size=draw.randint(1, 12)).tolist() for _ in range(40)
  ]
  sources += [[], [*sources[0], 1]]
  for options in searches:
    expected, found = (
      translation.Translator(network, {"params": params}, options),
      ctranslate.Translator(engine, names, options),
    )
    for a, b, source in zip(
      expected.translate(sources),
      found.translate(sources),
      sources,
      strict=True,
    ):
      assert len(a) == len(b) and a[0].ids == b[0].ids, source
      # Padding has a share, if a small one, in our probabilities only.
      assert a[0].score == pytest.approx(b[0].score, rel=1e-2, abs=1e-2)


def test_an_export_uses_averaged_weights_and_stands_alone(folder, tmp_path):
  assert export(folder / "dense", tmp_path / "out", "--licence=MIT") == 0
  expected = trained.load(folder / "dense")
  found = ctranslate.load(run_lib.described(tmp_path / "out"))
  search = dataclasses.replace(SEARCHES[0], num_return=1, max_target_length=12)
  texts = [r["source"] for r in toy.texts("test", "en-fr")] + ["", "ä"]
  a, b = (
    evaluation.translate_texts(
      m.translator(search), m.pieces, texts, m.tag("fr")
    )
    for m in (expected, found)
  )
  assert [x[0][1] for x in a] == [x[0][1] for x in b]
  last = trained.load(
    dataclasses.replace(run_lib.described(folder / "dense"), use_average=False)
  )
  c = evaluation.translate_texts(
    last.translator(search), last.pieces, texts, last.tag("fr")
  )
  assert [x[0][1] for x in c] != [x[0][1] for x in a]


def test_translate_takes_an_export_and_says_what_it_does_not(
  folder, tmp_path, capsys
):
  out = tmp_path / "out"
  assert export(folder / "dense", out) == 0
  (tmp_path / "text").write_text("no 5\n\nno 6\n")
  command = ["translate", f"--input={tmp_path}/text", "--to=fr"]
  command.append("--gin.translation.SearchOptions.max_target_length=6")
  capsys.readouterr()
  found = []
  for model_dir in (folder / "dense", out):
    assert cli.main([*command, f"--model_dir={model_dir}"]) == 0
    found.append(capsys.readouterr().out)
  assert found[0] == found[1] and found[0].count("\n") == 3
  for flag in ("--sample", "--prefix=a"):
    assert cli.main([*command, f"--model_dir={out}", flag]) == 1
    assert "use the model directory it was made of" in capsys.readouterr().err


def test_evaluate_takes_an_export_and_test_sets(folder, tmp_path, capsys):
  out, test = tmp_path / "out", tmp_path / "test.en-fr.tsv"
  assert export(folder / "dense", out) == 0
  records = toy.texts("test", "en-fr")
  lines = [f"{r['source']}\t{r['target']}\n" for r in records]
  test.write_text("".join(lines))
  command = ["evaluate", str(test), "--beam_size=2", "--alpha=0"]
  command.append("--gin.translation.SearchOptions.max_target_length=6")
  capsys.readouterr()
  tables = []
  for model_dir in (folder / "dense", out):
    assert cli.main([*command, f"--model_dir={model_dir}"]) == 0
    tables.append(capsys.readouterr().out.partition("scores, trans")[0])
  assert tables[0].replace(f" at step {STEP}", "") == tables[1]
  (scores,) = out.glob("evaluation/*_export_beam2*/scores.json")
  assert json.loads(scores.read_text())["weights"] == "exported"
  assert cli.main(["evaluate", f"--model_dir={out}"]) == 1
  assert "no data of its own: name test sets" in capsys.readouterr().err


def test_eight_bits_take_a_quarter_of_the_room(folder, tmp_path):
  for name, flags in (("whole", ()), ("int8", ("--quantization=int8",))):
    assert export(folder / "dense", tmp_path / name, *flags) == 0
  whole, small = (
    (tmp_path / name / "model.bin").stat().st_size for name in ("whole", "int8")
  )
  assert small < 0.5 * whole  # The norms, and scales of so small matrices.


@dataclasses.dataclass(frozen=True)
class Refusal:
  config: model.TransformerConfig
  says: str


class OtherAttention(layers.Attention):
  pass


@pytest.mark.parametrize(
  "refusal",
  [
    Refusal(toy.SPARSE, "basemt distil"),
    Refusal(
      dataclasses.replace(toy.DENSE, attention=OtherAttention()),
      "no attention like OtherAttention",
    ),
    Refusal(
      dataclasses.replace(toy.DENSE, mlp_activations=("linear",)),
      r"mlp_activations \('linear',\)",
    ),
    Refusal(
      dataclasses.replace(toy.DENSE, mlp_activations=("relu", "gelu")),
      r"mlp_activations \('relu', 'gelu'\)",
    ),
    Refusal(
      dataclasses.replace(toy.DENSE, mlp_activations=("celu", "linear")),
      r"mlp_activations \('celu', 'linear'\)",
    ),
  ],
  ids=lambda r: r.says[:12],
)
def test_what_it_does_not_know_is_refused_by_name(refusal):
  with pytest.raises(ValueError, match=refusal.says):
    ctranslate.check(refusal.config)


def test_a_sparse_model_is_told_of_another_way(folder, tmp_path, capsys):
  assert export(folder / "sparse", tmp_path / "out") == 1
  error = capsys.readouterr().err
  assert "basemt distil" in error and "safetensors" in error
  assert not list(tmp_path.iterdir())


# ------------------------------------------------------------- safetensors


def arrays_of(directory):
  loaded = trained.load(directory, rounded=False)
  flat = jax.tree_util.tree_leaves_with_path(jax.device_get(loaded.variables))
  return {jax.tree_util.keystr(path): array for path, array in flat}


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_model_comes_back_bit_by_bit(name, folder, tmp_path):
  out = tmp_path / "out"
  assert export(folder / name, out, "--format=safetensors") == 0
  stored = safetensors.numpy.load_file(out / safetensors_files.FILE)
  assert any("prices" in key for key in stored) == (name == "sparse")
  moved = out.rename(tmp_path / "moved")
  back = tmp_path / "back"
  assert cli.main(["import", f"--from={moved}", f"--to={back}"]) == 0
  expected, found = arrays_of(folder / name), arrays_of(back)
  assert expected.keys() == found.keys()
  for path, array in expected.items():
    assert array.dtype == found[path].dtype == np.float32
    np.testing.assert_array_equal(array, found[path], err_msg=path)
  before, after = (trained.load(x) for x in (folder / name, back))
  assert before.step == after.step == STEP
  assert before.pieces == after.pieces
  assert before.tag("de") == after.tag("de")
  assert before.program.model.config == after.program.model.config
  # What it says of itself is the same again.
  again = tmp_path / "again"
  assert export(back, again, "--format=safetensors") == 0
  for file in ("model.json", safetensors_files.FILE):
    assert (again / file).read_bytes() == (moved / file).read_bytes()
  assert str(folder) not in (moved / "model.json").read_text()


@pytest.fixture
def exported(folder, tmp_path):
  out = tmp_path / "exported"
  assert export(folder / "sparse", out, "--format=safetensors") == 0
  return out


def change_array(directory, change):
  """Writes the arrays anew, and takes the checksums away."""
  path = directory / safetensors_files.FILE
  arrays = safetensors.numpy.load_file(path)
  change(arrays)
  safetensors.numpy.save_file(arrays, path, {"step": "4"})
  (directory / "checksums.json").unlink()


@pytest.mark.parametrize(
  "damage, says",
  [
    (lambda d: (d / "model.safetensors").write_bytes(b"x"), "is damaged"),
    (lambda d: (d / "model.json").unlink(), "model.json is missing"),
    (lambda d: (d / "model.safetensors").unlink(), "is no export"),
    (
      lambda d: change_array(
        d, lambda a: a.pop("params/encoder/encoder_norm/scale")
      ),
      r"encoder_norm/scale has shape None, and should have \(16,\)",
    ),
    (
      lambda d: change_array(d, lambda a: a.update(more=np.ones(3))),
      r"array more has shape \(3,\), and should have None",
    ),
  ],
  ids=["bytes", "description", "arrays", "one_less", "one_more"],
)
def test_what_is_not_whole_is_not_imported(damage, says, exported, tmp_path):
  damage(exported)
  with pytest.raises(ValueError, match=says):
    safetensors_files.to_model_directory(exported, tmp_path / "back")
  assert not (tmp_path / "back").exists()


def test_nothing_is_written_over(exported, folder, capsys):
  before = sorted(exported.iterdir())
  assert export(folder / "dense", exported) == 1
  assert "is there already" in capsys.readouterr().err
  assert sorted(exported.iterdir()) == before
  assert not list(exported.parent.glob(".*"))


# -------------------------------------------------------------------- cards


def test_the_card_tells_data_scores_and_licence(folder, tmp_path):
  result = evaluation.DirectionResult(
    *("en-de", 60, "low", 6, 1.0, 12.345, 40.0),
    bleu_signature="nrefs:1",
    chrf_signature="nw:2",
  )
  written = []
  for number, (name, step, weights, beam) in enumerate(
    [
      ("test", toy_models.STEP, "averaged", 1),
      ("test", toy_models.STEP, "averaged", 4),  # This one.
      ("validation", toy_models.STEP, "averaged", 8),
      ("news", toy_models.STEP, "averaged", 8),
      ("test", toy_models.STEP, "last", 8),
      ("test", toy_models.STEP - 1, "averaged", 8),
    ]
  ):
    written.append(folder / "dense/evaluation" / str(number) / "scores.json")
    bleu = 12.345 if beam == 4 else 1.0
    evaluation.write_scores(
      written[-1],
      [dataclasses.replace(result, bleu=bleu)],
      {
        **{"test_set": name, "step": step, "weights": weights},
        "search": {"beam_size": beam},
      },
    )
  assert export(folder / "dense", tmp_path / "a b", "--licence=Apache-2.0") == 0
  card = (tmp_path / "a b" / "README.md").read_text()
  _, head, text = card.split("---\n", 2)
  head = yaml.safe_load(head)
  assert head["license"] == "apache-2.0"
  assert head["language"] == ["de", "en", "fr"]
  assert head["pipeline_tag"] == "translation"
  assert "mixture-of-experts" not in head["tags"]
  entry = head["model-index"][0]
  assert entry["name"] == "a b"
  metrics = entry["results"][0]["metrics"]
  assert {m["type"]: m["value"] for m in metrics} == {"bleu": 12.35, "chrf": 40}
  assert entry["results"][0]["dataset"]["config"] == "en-de"
  assert "| en-de | 60 | 12.3 | 40.0 |" in text
  assert "| en-fr | 24 |  |  |" in text
  assert "linear(1.0, 5.0, 4)" in text and "`nrefs:1`" in text
  assert "basemt serve --model_dir 'a b'" in text
  for path in written:
    path.unlink()


def test_an_unmeasured_sparse_model_says_so(exported):
  card = (exported / "README.md").read_text()
  head = yaml.safe_load(card.split("---\n", 2)[1])
  assert head["license"] == "unknown" and "model-index" not in head
  assert "mixture-of-experts" in head["tags"]
  assert "has not been measured" in card and "| experts | 4 in" in card


def test_odd_licences_and_missing_packages(
  folder, tmp_path, monkeypatch, capsys
):
  target = tmp_path / "out"
  assert export(folder / "dense", target, "--licence=my own") == 1
  assert "not an identifier" in capsys.readouterr().err
  for name, flag in (
    ("ctranslate2", "--format=ctranslate2"),
    ("safetensors.numpy", "--format=safetensors"),
  ):
    monkeypatch.setitem(sys.modules, name, None)
    assert export(folder / "dense", target, flag) == 1
    assert "pip install 'basemt_jax[export]'" in capsys.readouterr().err
  assert (
    export(
      folder / "dense", target, "--format=safetensors", "--quantization=int8"
    )
    == 1
  )
  assert "--quantization is CTranslate2's" in capsys.readouterr().err
  assert not target.exists()
