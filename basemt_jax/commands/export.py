"""`basemt export`: a trained model in the format of other programs."""

import argparse
import shlex

from basemt_jax.commands import configuration, console, flags

SUMMARY = "Write a trained model for CTranslate2, or as safetensors."
# CTranslate2 makes bfloat16 only where PyTorch is.
QUANTIZATIONS = ("float32", "float16", "int16", "int8", "int8_float16")


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.checkpoint(parser)
  flags.modules(parser)
  parser.add_argument(
    "--to", required=True, metavar="DIR", type=flags.path, help="a new folder"
  )
  parser.add_argument(
    "--format",
    choices=("ctranslate2", "safetensors"),
    default="ctranslate2",
    help="ctranslate2 (default): dense models, to be served fast; safetensors: "
    "any model, and back again with `basemt import`",
  )
  parser.add_argument(
    "--quantization",
    choices=QUANTIZATIONS,
    help="of CTranslate2's matrices; default float32",
  )
  parser.add_argument(
    "--licence",
    default="unknown",
    metavar="ID",
    help="for the model card, such as apache-2.0",
  )


def run(options: argparse.Namespace) -> None:
  """Writes arrays, description, vocabulary and model card."""
  from basemt_jax import trained
  from basemt_jax.exports import ctranslate, directories, safetensors_files

  to_ctranslate = options.format == "ctranslate2"
  if options.quantization and not to_ctranslate:
    raise configuration.UsageError(
      "--quantization is CTranslate2's; safetensors hold float32, as trained"
    )
  kind = ctranslate if to_ctranslate else safetensors_files
  kind.library()  # Said before the model is read.
  model = trained.load(
    configuration.trained(options),
    console.standard(),
    options.checkpoint,
    rounded=False,
  )
  weights = options.quantization or "float32"
  if to_ctranslate:
    fill, use = ctranslate.writer(model, weights), "basemt serve --model_dir {}"
  else:
    fill = safetensors_files.writer(model)
    use = "basemt import --from {} --to MODEL_DIR"
  directories.write(options.to, model, fill, weights, use, options.licence)
  print(
    f"{options.to}: {options.format} of step {model.step}, {weights}\n"
    f"next: {use.format(shlex.quote(options.to))}"
  )
