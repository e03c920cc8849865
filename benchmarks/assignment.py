"""Time and quality of the balanced assignment, on whatever device JAX finds.

    PYTHONPATH=. python benchmarks/assignment.py --json out.json

Scores are those of clustered, skewed features that drift from batch to batch;
with --affinities, those of a trained model's layers on training batches
(`study/runs.py run --affinities` writes them).
Cold means without prices, warm with the previous batch's. Quality is (score -
random) / (optimum - random): where SciPy can find the optimum in reasonable
time it is exact, else a lower bound from the dual problem, whose value no
assignment exceeds. Times are medians over runs, several groups solved at once
where the shape says so; `steps` is the curve to choose a step count by.
"""

import concurrent.futures
import functools
import importlib.util
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from basemt_jax import assignment
from benchmarks import measuring

# Groups, tokens of a group, experts.
SHAPES = (
  (4, 512, 8),
  (4, 1024, 8),
  (4, 1024, 32),
  (1, 8192, 8),
  (1, 8192, 32),
  (1, 8192, 128),
  (1, 32768, 128),
)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
_EXACT_UP_TO = 1024
_IN_FLIGHT = 4


def drifting_scores(
  num_tokens: int, num_experts: int, seed: int, batches: int
) -> list[np.ndarray]:
  """Scores of batches, [S, E] float32: Zipf clusters and a common mean."""
  draw = np.random.default_rng(seed)
  width, clusters = 64, 200
  share = np.arange(1, clusters + 1) ** -1.1
  centres = draw.normal(size=(clusters, width))
  mean = 2 * draw.normal(size=width)
  centroids = draw.normal(size=(num_experts, width))
  result = []
  for _ in range(batches):
    which = draw.choice(clusters, size=num_tokens, p=share / share.sum())
    noise = 0.5 * draw.normal(size=(num_tokens, width))
    features = centres[which] + mean + noise
    result.append((features @ centroids.T).astype(np.float32))
    for part in (centres, mean, centroids):
      part += 0.02 * draw.normal(size=part.shape)
  return result


def best_total(affinities: np.ndarray, prices: np.ndarray) -> float:
  """The optimum, or for large groups an upper bound of it."""
  values = affinities.astype(np.float64)
  num_tokens, num_experts = values.shape
  capacity = num_tokens // num_experts
  exact = importlib.util.find_spec("scipy") and num_tokens <= _EXACT_UP_TO
  if not exact:
    # Weak duality holds for any prices, at equality for the best ones.
    dual = prices.astype(np.float64)
    return (values - dual).max(axis=1).sum() + capacity * dual.sum()
  from scipy import optimize

  columns = values[:, np.repeat(np.arange(num_experts), capacity)]
  row, column = optimize.linear_sum_assignment(columns, maximize=True)
  return columns[row, column].sum()


def quality(affinities: np.ndarray, result: assignment.Assignment) -> float:
  """`(score - random) / (optimum - random)` of a group; checks the balance."""
  values = affinities.astype(np.float64)
  expert = np.asarray(result.expert)
  load = np.bincount(expert, minlength=values.shape[1])
  assert load.max() == load.min(), "unbalanced"
  score = values[np.arange(len(values)), expert].sum()
  random = values.mean(axis=1).sum()
  best = best_total(affinities, np.asarray(result.prices))
  return (score - random) / (best - random)


def measure(
  solve: Any, inputs: list[tuple[Any, ...]], repeats: int
) -> tuple[float, float]:
  """Median milliseconds, and the worst quality over the inputs."""
  results = [jax.block_until_ready(solve(*given)) for given in inputs]
  times = []
  for _ in range(repeats):
    # Several in flight, as in training, where the host runs ahead.
    start = time.perf_counter()
    jax.block_until_ready([solve(*given) for given in inputs * _IN_FLIGHT])
    seconds = time.perf_counter() - start
    times.append(seconds / len(inputs) / _IN_FLIGHT)
  worst = min(
    quality(np.asarray(given[0][g]), jax.tree.map(lambda x, g=g: x[g], result))
    for given, result in zip(inputs, results, strict=True)
    for g in range(given[0].shape[0])
  )
  return 1e3 * statistics.median(times), worst


def drawn(shape: tuple[int, int, int], sets: int) -> list[Any]:
  """Pairs of successive batches' scores [G, S, E]."""
  groups, num_tokens, num_experts = shape
  result = []
  for seed in range(sets):
    pairs = [
      drifting_scores(num_tokens, num_experts, 100 * seed + g, 2)
      for g in range(groups)
    ]
    result.append([np.stack(x) for x in zip(*pairs)])  # noqa: B905
  return result


def of_model(batches: np.ndarray) -> list[Any]:
  """Pairs of a layer's successive batches [1, S, E] of [count, S, E]."""
  return list(itertools.pairwise(batches[:, None]))


def rows_of(
  source: str, pairs: list[Any], repeats: int, curve: bool
) -> list[dict[str, Any]]:
  """Measurements of one shape: cold and warm, by number of steps."""
  cold_inputs, warm_inputs = [], []
  first = jax.jit(jax.vmap(assignment.balanced_assignment))
  for pair in pairs:
    before, after = jax.device_put(pair)
    cold_inputs.append((after,))
    warm_inputs.append((after, first(before).prices))
  groups, num_tokens, num_experts = pairs[0][0].shape

  def solve(steps, affinities, prices=None):
    return assignment.balanced_assignment(
      affinities, None, prices, num_steps=steps
    )

  cases = [
    (kind, inputs, steps)
    for kind, inputs in (("cold", cold_inputs), ("warm", warm_inputs))
    for steps in (None, *(STEPS if curve else ()))
  ]
  lowered = [
    jax.jit(jax.vmap(functools.partial(solve, steps))).lower(*inputs[0])
    for _, inputs, steps in cases
  ]
  # Side by side, as compiling takes many times longer than measuring.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = list(pool.map(lambda program: program.compile(), lowered))
  rows = []
  for (kind, inputs, steps), run in zip(cases, compiled, strict=True):
    milliseconds, worst = measure(run, inputs, repeats)
    rows.append(
      {
        "scores": source,
        "groups": groups,
        "tokens": num_tokens,
        "experts": num_experts,
        "start": kind,
        "steps": steps or "default",
        "milliseconds": round(milliseconds, 4),
        "quality": round(worst, 6),
      }
    )
    measuring.print_row(rows[-1])
  return rows


def main() -> None:
  """Prints the table and writes it as JSON."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--sets", type=int, default=3, help="input sets")
  parser.add_argument("--no-curve", action="store_true")
  parser.add_argument(
    "--affinities", nargs="+", default=[], metavar="NPZ", help="of trained runs"
  )
  parser.add_argument(
    "--shape",
    type=int,
    nargs=3,
    action="append",
    metavar=("GROUPS", "TOKENS", "EXPERTS"),
  )
  options = parser.parse_args()
  for file in options.affinities:
    if not Path(file).exists():
      parser.error(
        f"no file {file}; `study/runs.py run --affinities` writes such"
      )
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
  rows = []
  curve = not options.no_curve
  for shape in options.shape or (() if options.affinities else SHAPES):
    pairs = drawn(tuple(shape), options.sets)
    rows += rows_of("drawn", pairs, options.repeats, curve)
  for file in options.affinities:
    for layer, batches in np.load(file).items():
      rows += rows_of(
        layer.removesuffix("/base_layer"),
        of_model(batches),
        options.repeats,
        curve,
      )
  measuring.write(options, {"rows": rows})


if __name__ == "__main__":
  main()
