"""Time of a BASE layer beside the dense feed-forward with equal FLOPs.

    PYTHONPATH=. python benchmarks/layer.py --tokens 8192 --experts 8 32 128

Forward and backward (gradients of input and parameters) in training; forward
with greedy routing at test time, also with every token at one expert, on
weights rounded as `trained.load` rounds them. All are timed in one process, in
turn, on several input sets; the median is printed, and JSON written on request.
T tokens, D model width, F feed-forward width, E experts.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from basemt_jax import base_layer, layers
from benchmarks import measuring

LENGTH = 256


class DenseLayer(nn.Module):
  """`h + FF(LN(h))`: what an expert computes for every token."""

  mlp_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    y = layers.RMSNorm(self.dtype)(h)
    y = layers.MlpBlock(self.mlp_dim, dtype=self.dtype)(y)
    return h + y


def clustered(key: jax.Array, tokens: int, width: int, dtype: Any) -> jax.Array:
  """Activations [T / L, L, D] in skewed clusters, as a network's are."""
  keys = jax.random.split(key, 3)
  centres = jax.random.normal(keys[0], (40, width))
  share = jax.nn.log_softmax(-0.15 * jnp.arange(40.0))
  length = min(LENGTH, tokens)
  members = jax.random.categorical(keys[1], share, shape=(tokens // length,))
  noise = jax.random.normal(keys[2], (tokens // length, length, width))
  return (centres[members][:, None] * 0.7 + noise).astype(dtype)


def time_each(
  functions: dict[str, Callable[[Any], Any]], inputs: list[Any], repeats: int
) -> dict[str, float]:
  """Median milliseconds of each function, called in turn on every input."""
  for function in functions.values():
    jax.block_until_ready(function(inputs[0]))

  def on_all(function: Callable[[Any], Any]) -> list[Any]:
    return [function(x) for x in inputs]

  seconds = measuring.in_turn(
    {n: functools.partial(on_all, own) for n, own in functions.items()}, repeats
  )
  return {
    name: 1e3 * statistics.median(own) / len(inputs)
    for name, own in seconds.items()
  }


def measure(tokens: int, experts: int, args: argparse.Namespace) -> dict:
  """One row of the table."""
  dtype = jnp.dtype(args.dtype)
  inputs = [
    clustered(jax.random.key(i), tokens, args.width, dtype) for i in range(4)
  ]
  sparse = base_layer.BaseLayer(
    num_experts=experts,
    mlp_dim=args.mlp_dim,
    dtype=dtype,
    rows_per_group=min(args.rows_per_group, max(tokens // LENGTH, 1)),
  )
  dense = DenseLayer(args.mlp_dim, dtype)
  variables = dict(sparse.init(jax.random.key(0), inputs[0], train=True))
  params, prices = variables["params"], variables["prices"]
  dense_params = dense.init(jax.random.key(0), inputs[0])["params"]

  def sparse_loss(params, h, prices):
    out, updates = sparse.apply(
      {"params": params, "prices": prices}, h, train=True, mutable=["prices"]
    )
    return jnp.sum(out.astype(jnp.float32) ** 2), updates["prices"]

  def dense_loss(params, h):
    return jnp.sum(dense.apply({"params": params}, h).astype(jnp.float32) ** 2)

  step = jax.jit(jax.grad(sparse_loss, argnums=(0, 1), has_aux=True))
  greedy = jax.jit(lambda p, h: sparse.apply({"params": p}, h, train=False))
  forward = jax.jit(lambda p, h: dense.apply({"params": p}, h))
  dense_step = jax.jit(jax.grad(dense_loss, argnums=(0, 1)))
  held, dense_held = (
    layers.rounded(p, args.dtype) for p in (params, dense_params)
  )
  # Equal affinities: every token goes to the first expert.
  zero = jnp.zeros_like(params["expert_centroids"])
  skewed = {**held, "expert_centroids": zero}
  functions: dict[str, Callable[[Any], Any]] = {}
  if "train" in args.modes:
    for h in inputs * 2:  # Prices of a run that is under way.
      _, prices = step(params, h, prices)
    functions = {
      "dense train": functools.partial(dense_step, dense_params),
      "base train": lambda h: step(params, h, prices),
    }
  if "test" in args.modes:
    functions |= {
      "dense test": functools.partial(forward, dense_held),
      "base test": functools.partial(greedy, held),
      "base skewed test": functools.partial(greedy, skewed),
    }
  row = time_each(functions, inputs, args.repeats)
  ratios = {
    f"{mode} ratio": row[f"base {mode}"] / row[f"dense {mode}"]
    for mode in args.modes
  }
  return {"tokens": tokens, "experts": experts, **row, **ratios}


def main() -> None:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
  parser.add_argument("--experts", type=int, nargs="+", default=[8])
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--mlp_dim", type=int, default=1024)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rows_per_group", type=int, default=16)
  parser.add_argument(
    "--modes", nargs="+", choices=("train", "test"), default=["train", "test"]
  )
  parser.add_argument("--repeats", type=int, default=11)
  args = parser.parse_args()
  device = jax.devices()[0].device_kind
  print(f"{device}, jax {jax.__version__}, {args.dtype}, D={args.width}")
  rows = []
  for tokens in args.tokens:
    for experts in args.experts:
      rows.append(measure(tokens, experts, args))
      measuring.print_row(rows[-1])
  measuring.write(args, {"rows": rows})


if __name__ == "__main__":
  main()
