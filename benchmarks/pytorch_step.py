"""A training step of the dense encoder-decoder in PyTorch, to compare with.

    PYTHONPATH=. python benchmarks/pytorch_step.py --shapes 512x6x256 1024x6x64

What a PyTorch user would write today: `torch.compile`, scaled dot product
attention, bfloat16 autocast, fused AdamW, dropout 0.1, label smoothing 0.1,
tied embeddings, pre-norm, ReLU. A shape is width x blocks a side x rows of
LENGTH tokens. It needs only torch. PyTorch's flash attention takes no masks of
packed rows, so rows here are one long example each: less work than ours.
MFU and FLOPs are counted as in `training_step.py`.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
  """Multi-head attention by the library's fused kernel."""

  def __init__(self, width: int):
    super().__init__()
    self.heads = width // 64
    self.query = nn.Linear(width, width, bias=False)
    self.key_value = nn.Linear(width, 2 * width, bias=False)
    self.out = nn.Linear(width, width, bias=False)

  def forward(self, x: torch.Tensor, memory: torch.Tensor, causal: bool):
    """Maps queries `x` [B, Lq, D] and `memory` [B, Lk, D] to [B, Lq, D]."""

    def split(y: torch.Tensor) -> torch.Tensor:
      return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    key, value = self.key_value(memory).chunk(2, -1)
    y = functional.scaled_dot_product_attention(
      split(self.query(x)), split(key), split(value), is_causal=causal
    )
    return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
  """Pre-norm block; with `cross`, a decoder's."""

  def __init__(self, width: int, cross: bool):
    super().__init__()
    self.attention = Attention(width)
    self.cross = Attention(width) if cross else None
    self.up = nn.Linear(width, 4 * width, bias=False)
    self.down = nn.Linear(4 * width, width, bias=False)
    self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 + cross))
    self.drop = nn.Dropout(0.1)

  def forward(self, x: torch.Tensor, memory: torch.Tensor | None):
    """Maps [B, L, D] to [B, L, D]."""
    y = self.norms[0](x)
    x = x + self.drop(self.attention(y, y, self.cross is not None))
    if self.cross is not None:
      x = x + self.drop(self.cross(self.norms[2](x), memory, False))
    y = self.drop(functional.relu(self.up(self.norms[1](x))))
    return x + self.drop(self.down(y))


class Translator(nn.Module):
  """Encoder-decoder with tied embeddings; returns the loss."""

  def __init__(self, width: int, blocks: int, vocabulary: int):
    super().__init__()
    self.embedding = nn.Embedding(vocabulary, width)
    nn.init.normal_(self.embedding.weight, std=width**-0.5)
    self.encoder = nn.ModuleList(Block(width, False) for _ in range(blocks))
    self.decoder = nn.ModuleList(Block(width, True) for _ in range(blocks))
    self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

  def forward(self, source: torch.Tensor, target: torch.Tensor):
    """Mean loss of source and target tokens, [B, L] each."""
    x = self.embedding(source)
    for block in self.encoder:
      x = block(x, None)
    memory = self.norms[0](x)
    y = self.embedding(functional.pad(target[:, :-1], (1, 0)))
    for block in self.decoder:
      y = block(y, memory)
    logits = functional.linear(self.norms[1](y), self.embedding.weight)
    return functional.cross_entropy(
      logits.flatten(0, 1).float(), target.flatten(), label_smoothing=0.1
    )


def model_flops(
  width: int, blocks: int, rows: int, length: int, vocabulary: int
) -> float:
  """As `training_step.model_flops`, of a network with F = 4 D."""
  used = blocks * 28 * width**2 + vocabulary * width
  tokens = rows * length
  return 6.0 * used * tokens + 12.0 * 3 * blocks * length * width * tokens


def measure(
  width: int, blocks: int, rows: int, args: argparse.Namespace
) -> dict[str, float | int | str]:
  """Compiles a network and times its steps."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  start = time.perf_counter()
  network = Translator(width, blocks, args.vocabulary).to(device)
  optimizer = torch.optim.AdamW(
    network.parameters(),
    lr=1e-4,
    betas=(0.9, 0.98),
    weight_decay=0.0,
    fused=device == "cuda",
  )
  compiled = torch.compile(network) if device == "cuda" else network
  shape = (rows, args.length)
  batches = [
    torch.randint(2, args.vocabulary, (2, *shape), device=device)
    for _ in range(4)
  ]

  def step(batch: torch.Tensor) -> None:
    with torch.autocast(device, torch.bfloat16):
      loss = compiled(batch[0], batch[1])
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  def wait() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  step(batches[0])
  wait()
  first = time.perf_counter() - start
  for batch in batches:
    step(batch)
  wait()
  seconds = []
  for _ in range(args.repeats):
    start = time.perf_counter()
    for batch in batches:
      step(batch)
    wait()
    seconds.append((time.perf_counter() - start) / len(batches))
  median = statistics.median(seconds)
  flops = model_flops(width, blocks, rows, args.length, args.vocabulary)
  return {
    "width": width,
    "blocks": blocks,
    "rows": rows,
    "model": "pytorch dense",
    "ms": round(median * 1e3, 2),
    "tokens_per_s": round(2 * rows * args.length / median),
    "mfu": round(flops / median / (args.peak_tflops * 1e12), 4),
    "first_step_s": round(first, 1),
    "peak_gib": round(
      torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0, 2
    ),
  }


def main() -> None:
  """Prints a line for every shape."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shapes", nargs="+", default=["1024x6x64"])
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--vocabulary", type=int, default=32000)
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--peak_tflops", type=float, default=989.0)
  parser.add_argument("--json", help="file for the figures")
  args = parser.parse_args()
  has_gpu = torch.cuda.is_available()
  name = torch.cuda.get_device_name() if has_gpu else "cpu"
  rows = []
  for shape in args.shapes:
    width, blocks, count = (int(x) for x in shape.split("x"))
    rows.append(measure(width, blocks, count, args))
    print(json.dumps(rows[-1]), flush=True)
    if has_gpu:
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      written = {"torch": torch.__version__, "device": name, "rows": rows}
      json.dump(written, file)


if __name__ == "__main__":
  main()
