"""What the measurements share: the network, turns, flags, files."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from basemt_jax import model, optimizer, steps


def transformer(
  blocks: int, width: int, vocabulary: int, experts: int = 0, **changes: Any
) -> model.TransformerConfig:
  """A network with heads of 64 and feed-forwards of 4 D.

  Args:
    blocks: of each side; every third has experts, if any has.
    width: D.
    vocabulary: V.
    experts: E; 0: dense.
    **changes: of the configuration.
  """
  chosen = tuple(range(2, blocks, 3))
  settings: dict[str, Any] = {
    "vocab_size": vocabulary,
    "emb_dim": width,
    "num_heads": width // 64,
    "head_dim": 64,
    "mlp_dim": 4 * width,
    "num_encoder_layers": blocks,
    "num_decoder_layers": blocks,
    "dropout_rate": 0.1,
    "dtype": "bfloat16",
    "feed_forward": "experts" if experts else "dense",
    "encoder_expert_blocks": chosen,
    "decoder_expert_blocks": chosen,
    "num_experts": experts or 1,
  }
  return model.TransformerConfig(**{**settings, **changes})


def settings(train_steps: int, **changes: Any) -> steps.Settings:
  """Training with AdamW that neither evaluates nor saves."""
  usual = {
    "learning_rate": optimizer.inverse_square_root(1e-3, 1000),
    "optimizer": optimizer.adamw,
    "eval_every": 10**6,
    "save_every": 10**6,
    "keep_checkpoints": 1,
  }
  return steps.Settings(train_steps, **{**usual, **changes})


def in_turn(
  functions: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of each function until its result is there, called in turn.

  So a slow moment of the machine does not fall on one of them alone.
  """
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def parser(text: str) -> argparse.ArgumentParser:
  """A script's flags, with its head for help; it writes its figures."""
  found = argparse.ArgumentParser(
    description=text, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  found.add_argument("--json", help="file for the figures")
  return found


def machine() -> dict[str, Any]:
  """What figures depend on."""
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
  }


def write(args: argparse.Namespace, figures: Mapping[str, Any]) -> None:
  """Writes figures, flags and machine, if a file is asked for."""
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump({**machine(), **vars(args), **figures}, file, default=str)


def print_row(row: Mapping[str, Any]) -> None:
  """Prints a row of a table as it comes."""
  cells = (
    f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
    for name, value in row.items()
  )
  print("  ".join(cells), flush=True)


class NoWriter:
  """Takes metrics as a `reports.Writer`, and leaves them."""

  def write_scalars(self, step: int, scalars: Any) -> None:
    """See `reports.Writer`."""

  def flush(self) -> None:
    """See `reports.Writer`."""
