"""A dense model as a CTranslate2 model, and how that is searched.

CTranslate2 (https://github.com/OpenNMT/CTranslate2) translates on CPUs and GPUs
without JAX. Its Transformer is ours where that has pre-norm blocks with RMS
norms, rotary positions that turn the halves of a head, no biases, plain or
gated feed-forwards, and logits of the embedding's own table over sqrt(D): all
of a dense network but attention and activations of other kinds. Axes: D model
width, F feed-forward width, H heads, K head width, V vocabulary.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from basemt_jax import (
  decoding,
  description,
  layers,
  trained,
  translation,
)
from basemt_jax import model as model_lib
from basemt_jax import run as run_lib
from basemt_jax.data import source_tags, vocabulary
from basemt_jax.exports import directories

Params = Mapping[str, Any]

# CTranslate2's names of functions of `jax.nn`.
_ACTIVATIONS = {
  "relu": "RELU",
  "gelu": "GELUTanh",
  "silu": "SWISH",
  "swish": "SWISH",
  "tanh": "Tanh",
  "sigmoid": "Sigmoid",
}
# Hypotheses that are found, in beams: with 2 some are missed that our search
# finds (2 in 4800 sentences), with 5 no more than with 3.
_PATIENCE = 3
# Added to the logit of padding, which is never produced; float16 holds it.
_NEVER = -3e4
MODEL_FILE = "model.bin"


def library() -> Any:
  """CTranslate2; see `directories.library`."""
  return directories.library("ctranslate2")


def check(config: model_lib.TransformerConfig) -> None:
  """Refuses a network that no CTranslate2 model is.

  Raises:
    ValueError: Names what it has that CTranslate2's Transformer has not.
  """
  kinds = {*config.block_kinds(False), *config.block_kinds(True)}
  if "experts" in kinds:
    raise ValueError(
      "the model is sparse, and CTranslate2 knows no layers of experts: train "
      "a dense student of it with `basemt distil` and export that, or export "
      "this one with --format safetensors"
    )
  if type(config.attention) is not layers.Attention:
    raise ValueError(
      f"CTranslate2 has no attention like {type(config.attention).__name__}, "
      "only layers.Attention's; export with --format safetensors"
    )
  _activation(config.mlp_activations)


def _activation(names: Sequence[str]) -> tuple[str, int | None]:
  """CTranslate2's name of the activation; and which of two is the linear one.

  Raises:
    ValueError: It has no such feed-forward.
  """
  linear = [i for i, name in enumerate(names) if name == "linear"]
  others = [name for name in names if name != "linear"]
  fits = len(others) == 1 and len(linear) < 2 and others[0] in _ACTIVATIONS
  if not fits:
    raise ValueError(
      f"CTranslate2 has no feed-forward with mlp_activations {tuple(names)}: "
      f"it knows one of {', '.join(_ACTIVATIONS)}, alone or times 'linear'; "
      "export with --format safetensors"
    )
  return _ACTIVATIONS[others[0]], linear[0] if linear else None


def writer(
  model: trained.Trained, quantization: str
) -> Callable[[pathlib.Path], None]:
  """Writes a model into a folder; see `write`, which may raise now already."""
  check(model.program.model.config)
  return functools.partial(
    write,
    config=model.program.model.config,
    params=jax.device_get(model.variables["params"]),
    names=_names(model.pieces, model.program.model.config.vocab_size),
    quantization=quantization,
  )


def _names(pieces: vocabulary.Vocabulary, rows: int) -> list[str]:
  """The tokens of a table of so many rows, all different."""
  known = pieces.vocab_size
  own = [pieces.piece(i) for i in range(known)]
  return own + [f"<row_{i}>" for i in range(known, rows)]


def write(
  directory: pathlib.Path,
  config: model_lib.TransformerConfig,
  params: Params,
  names: Sequence[str],
  quantization: str = "float32",
) -> None:
  """Writes `model.bin`, `config.json` and `shared_vocabulary.json`.

  Args:
    directory: That is there.
    config: A dense network's.
    params: Its parameters, arrays of any float type.
    names: Of the V tokens, all different.
    quantization: One of CTranslate2's, such as 'int8' or 'float16'.

  Raises:
    ValueError: See `check`; or CTranslate2 does not know the quantization.
  """
  specs = library().specs
  check(config)
  activation, linear = _activation(config.mlp_activations)
  kind = {
    "num_heads": config.num_heads,
    "activation": specs.Activation[activation],
    "ffn_glu": linear is not None,
    "rms_norm": True,
    "head_dim": config.head_dim,
    "rotary_dim": 0,  # All of a head.
    "rotary_interleave": False,
  }
  spec = specs.TransformerSpec(
    specs.TransformerEncoderSpec(config.num_encoder_layers, **kind),
    specs.TransformerDecoderSpec(config.num_decoder_layers, **kind),
  )
  for side in ("encoder", "decoder"):
    _fill_stack(getattr(spec, side), params[side], linear)
  table = _float32(params["token_embedder"]["embedding"])
  spec.encoder.embeddings[0].weight = table
  spec.decoder.embeddings.weight = table
  spec.decoder.projection.weight = table
  spec.decoder.projection.bias = np.zeros(len(table), np.float32)
  spec.decoder.projection.bias[decoding.PAD_ID] = _NEVER
  spec.decoder.scale_outputs = np.float32(config.emb_dim**-0.5)
  spec.register_source_vocabulary(names)
  spec.register_target_vocabulary(names)
  settings = {
    "bos_token": names[decoding.PAD_ID],
    "decoder_start_token": names[decoding.PAD_ID],
    "eos_token": names[decoding.EOS_ID],
    "unk_token": names[vocabulary.UNK_ID],
    "add_source_eos": True,
    "layer_norm_epsilon": layers.RMSNorm.epsilon,
  }
  for name, value in settings.items():
    setattr(spec.config, name, value)
  spec.validate()
  spec.optimize(quantization=quantization)
  spec.save(str(directory))


def _fill_stack(spec: Any, params: Params, linear: int | None) -> None:
  """Fills the encoder's or decoder's specification, but for embeddings."""
  spec.scale_embeddings = False
  final = params.get("encoder_norm") or params["decoder_norm"]
  spec.layer_norm.gamma = _float32(final["scale"])
  for i, layer in enumerate(spec.layer):
    block = params[f"layers_{i}"]
    attention = layer.self_attention
    _fill_norm(attention, block["pre_self_attention_layer_norm"])
    _fill_linear(attention.linear[0], block["self_attention"], _QKV)
    _fill_linear(attention.linear[1], block["self_attention"], ("out",))
    if "cross_attention" in block:
      _fill_norm(layer.attention, block["pre_cross_attention_layer_norm"])
      for one, names in zip(layer.attention.linear, _CROSS, strict=True):
        _fill_linear(one, block["cross_attention"], names)
    _fill_norm(layer.ffn, block["pre_mlp_layer_norm"])
    _fill_linear(layer.ffn.linear_1, block["mlp"], ("wo",))
    if linear is None:
      _fill_linear(layer.ffn.linear_0, block["mlp"], ("wi",))
    else:
      _fill_linear(layer.ffn.linear_0, block["mlp"], (f"wi_{1 - linear}",))
      _fill_linear(layer.ffn.linear_0_noact, block["mlp"], (f"wi_{linear}",))


_QKV = ("query", "key", "value")
_CROSS = (("query",), ("key", "value"), ("out",))


def _fill_norm(spec: Any, params: Params) -> None:
  spec.layer_norm.gamma = _float32(params["scale"])


def _fill_linear(spec: Any, params: Params, names: Sequence[str]) -> None:
  """One matrix [out, in] of kernels [in, out] side by side."""
  kernels = [_float32(params[name]["kernel"]) for name in names]
  spec.weight = np.ascontiguousarray(np.concatenate(kernels, axis=1).T)


def _float32(array: Any) -> np.ndarray:
  return np.array(array, np.float32)  # A copy: quantization works in place.


# ---------------------------------------------------------------- searching


@dataclasses.dataclass(frozen=True)
class Exported:
  """A CTranslate2 model, loaded; used as `trained.Trained` is."""

  # of the model directory it was exported from; its search counts
  run: run_lib.Run
  description: description.Description  # what it was trained as
  pieces: vocabulary.Vocabulary
  engine: Any  # a `ctranslate2.Translator`
  console: run_lib.Console = run_lib.SILENT  # takes progress
  step: None = None  # an export does not say of which checkpoint it is
  weights: str = "exported"

  def translator(
    self, search: translation.SearchOptions | None = None
  ) -> "Translator":
    """Translates with this model; as the run says unless `search` is given.

    Raises:
      ValueError: It is to draw, which an export does not.
    """
    search = search or self.run.search
    if search.sampling:
      raise ValueError(
        "an export for CTranslate2 does not draw translations: use the model "
        "directory it was made of"
      )
    config = self.run.config_of(self.pieces.vocab_size)
    names = _names(self.pieces, config.vocab_size)
    return Translator(self.engine, names, search)

  def tag(self, to: str, source: str | None = None) -> source_tags.SourceTag:
    """What asks for a language; see `trained.Trained.tag`."""
    return trained.choose_tag(self.description.tags, to, source)


def load(run: run_lib.Run, device: str = "auto", threads: int = 0) -> Exported:
  """The export in a run's directory.

  Args:
    run: As `run.described` gives it for that directory.
    device: 'cpu', 'cuda' or 'auto'.
    threads: Of a batch on a CPU; 0: CTranslate2's choice.

  Raises:
    ValueError: See `directories.read`; or CTranslate2 cannot load it.
  """
  known, pieces = directories.read(run.model_dir, MODEL_FILE)
  ctranslate2 = library()
  try:
    engine = ctranslate2.Translator(
      str(run.model_dir), device=device, intra_threads=threads
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"CTranslate2 cannot load {run.model_dir}: {error}"
    ) from error
  return Exported(run, known, pieces, engine)


class Translator:
  """Translates lists of sentences, as `translation.Translator` does.

  CTranslate2 divides log-probabilities by `n^alpha` for n tokens, EOS counted,
  and we by `((5 + n) / 6)^alpha`. Both search among the same prefixes; ours
  stops when nothing better can come, and CTranslate2's when it has so many
  hypotheses as it is told. So it finds more than are asked for, without a
  penalty, and they are ranked by our scores.

  Attributes:
    options: The SearchOptions.
  """

  def __init__(
    self,
    engine: Any,
    names: Sequence[str],
    options: translation.SearchOptions,
  ):
    """Makes one of a `ctranslate2.Translator` and the names of its tokens."""
    self._engine, self._names, self.options = engine, names, options
    self._ids = {name: i for i, name in enumerate(names)}

  def translate(
    self,
    sources: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    numbers: Sequence[int] | None = None,
  ) -> list[list[translation.Hypothesis]]:
    """See `translation.Translator.translate`.

    Raises:
      ValueError: There are prefixes.
    """
    del numbers  # Nothing is drawn.
    if prefixes and any(prefixes):
      raise ValueError(
        "an export for CTranslate2 cannot begin translations as told: use the "
        "model directory it was made of"
      )
    longest = self.options.max_source_length - 1
    read = [
      [*itertools.takewhile(lambda i: i != decoding.EOS_ID, ids)][:longest]
      for ids in sources
    ]
    order = sorted(
      (i for i, ids in enumerate(read) if ids), key=lambda i: len(read[i])
    )
    results = [[translation.Hypothesis(0.0, ())] for _ in read]
    size = self.options.batch_size
    for start in range(0, len(order), size):
      batch = order[start : start + size]
      found = self._search([read[i] for i in batch])
      for i, hypotheses in zip(batch, found, strict=True):
        results[i] = hypotheses
      if progress:
        progress(start + len(batch), len(order))
    return results

  def _search(
    self, sources: Sequence[Sequence[int]]
  ) -> list[list[translation.Hypothesis]]:
    """Hypotheses of sources that rise in length."""
    options = self.options
    limits = [options.limit(len(ids) + 1) - 1 for ids in sources]
    is_simple = options.beam_size == 1 or (
      options.alpha == 0 and options.num_return == 1
    )
    patience = 1 if is_simple else _PATIENCE
    read = [[self._names[i] for i in ids] for ids in sources]
    found = self._engine.translate_batch(
      read,
      beam_size=options.beam_size,
      num_hypotheses=patience * options.beam_size,
      patience=patience,
      length_penalty=0,
      max_input_length=0,
      min_decoding_length=0,
      max_decoding_length=max(limits),
      return_scores=True,
    )
    results = []
    for source, names, limit, result in zip(
      sources, read, limits, found, strict=True
    ):
      longest = max(len(hypothesis) for hypothesis in result.hypotheses)
      if longest > limit:  # That of the batch is longer.
        results += self._search([source])
      else:
        results.append(self._ranked(names, result, limit))
    return results

  def _ranked(
    self, source: Sequence[str], result: Any, limit: int
  ) -> list[translation.Hypothesis]:
    """The best hypotheses of a source, with our scores."""
    options = self.options
    hypotheses = []
    for log_probability, names in zip(
      result.scores, result.hypotheses, strict=True
    ):
      length = len(names) + 1
      if length > limit:  # CTranslate2 has not counted an EOS.
        (scored,) = self._engine.score_batch(
          [source], [names], max_input_length=0
        )
        log_probability = sum(scored.log_probs)
      ids = tuple(self._ids[name] for name in names)
      ours = log_probability / ((5 + length) / 6) ** options.alpha
      hypotheses.append(translation.Hypothesis(ours, ids))
    hypotheses.sort(key=lambda h: -h.score)
    return hypotheses[: options.num_return]
