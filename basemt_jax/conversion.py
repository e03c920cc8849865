"""Dense to sparse: ordered rules that fill every parameter of a sparse model.

Axes: D model width, F feed-forward width, E experts, T tokens, V vocabulary.

A rule says, for the parameters whose path it matches, where the value comes
from. Rules are tried in order and the first match counts. A parameter of
either model that no rule covers, or whose shape does not fit, is an error:
nothing passes silently. By default every expert is a copy of the dense
feed-forward it replaces (sparse upcycling, arXiv:2212.05055) and gates start
at 1, so the sparse model is the same function as the dense one.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from jax.experimental import multihost_utils

from basemt_jax import base_layer, checkpointing, ranges
from basemt_jax import model as model_lib

Array = jax.Array
Tree = Any

TOLERANCE = 1e-5
_K_MEANS_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Rule:
  r"""Where the parameters that match `pattern` come from.

  Attributes:
    pattern: Regular expression; must match the whole sparse path, such as
      'encoder/layers_1/base_layer/expert_centroids'.
    source: Dense path, with \1, \2 for the pattern's groups; None: the
      parameter is new and keeps its initial value.
    stack: Repeat the dense value for every expert (a new first axis).
  """

  pattern: str
  source: str | None
  stack: bool = False


# An expert's first sublayer is the dense feed-forward with its norm; inserted
# experts find no dense counterpart and are covered by INSERT_RULES.
REPLACE_RULES = (
  Rule(
    r"(.*)/base_layer/experts/sublayer_0/layer_norm/scale",
    r"\1/pre_mlp_layer_norm/scale",
    stack=True,
  ),
  Rule(r"(.*)/base_layer/experts/sublayer_0/(w.*)", r"\1/mlp/\2", stack=True),
  Rule(r".*/base_layer/(expert_centroids|gate_bias|gate_scale)", None),
  Rule(r"((?!.*base_layer).*)", r"\1"),
)
INSERT_RULES = (
  Rule(r".*/base_layer/.*", None),
  Rule(r"(.*)", r"\1"),
)


def default_rules(placement: str) -> tuple[Rule, ...]:
  """The rules for `TransformerConfig.placement` 'replace' or 'insert'."""
  return INSERT_RULES if placement == "insert" else REPLACE_RULES


@dataclasses.dataclass(frozen=True)
class Options:
  """How experts start, beyond plain copies.

  Attributes:
    reinitialise: Share of each expert's hidden units drawn anew from a normal
      with the dense weights' mean and deviation, a different subset for each
      expert (Drop-Upcycling, arXiv:2502.19261: 0.5 was best). In [0, 1].
    noise: Gaussian noise on copied expert kernels, in units of their standard
      deviation.
    centroids: 'orthogonal' rows, or 'activations': directions of spherical
      k-means over the tokens that reach the layer.
    optimizer: 'reset': new moments; 'copy': the dense moments, for experts
      those of the feed-forward they copy.
    seed: For everything drawn.
  """

  reinitialise: ranges.Share = 0.0
  noise: ranges.NotNegative = 0.0
  centroids: Literal["orthogonal", "activations"] = "orthogonal"
  optimizer: Literal["reset", "copy"] = "reset"
  seed: ranges.Seed = 0

  @property
  def preserves_function(self) -> bool:
    """Whether the converted model must equal the dense one."""
    return self.reinitialise == 0.0 and self.noise == 0.0


def plan(
  dense: Iterable[str], sparse: Iterable[str], rules: Sequence[Rule]
) -> dict[str, tuple[Rule, str | None]]:
  """Rule and dense source path of every sparse path.

  Raises:
    ValueError: A sparse path matches no rule, a rule names a dense path that
      does not exist, or a dense parameter is used by no rule.
  """
  dense = set(dense)
  result: dict[str, tuple[Rule, str | None]] = {}
  for path in sparse:
    for rule in rules:
      match = re.fullmatch(rule.pattern, path)
      if match:
        source = None if rule.source is None else match.expand(rule.source)
        if source is not None and source not in dense:
          raise ValueError(
            f"conversion rule {rule.pattern!r} fills {path} from the dense "
            f"parameter {source}, which does not exist; the two models do not "
            "belong together, or the rule needs changing"
          )
        result[path] = (rule, source)
        break
    else:
      raise ValueError(
        f"no conversion rule matches the sparse parameter {path}; add a rule "
        "for it"
      )
  unused = sorted(dense - {source for _, source in result.values()})
  if unused:
    raise ValueError(
      f"no conversion rule uses the dense parameter {unused[0]}"
      + (f" and {len(unused) - 1} more" if len(unused) > 1 else "")
      + "; the two models do not belong together, or a rule is missing"
    )
  return result


def convert_params(
  dense: Tree,
  sparse: Tree,
  rules: Sequence[Rule],
  options: Options | None = None,
) -> Tree:
  """Sparse parameters from dense ones, both nested dictionaries.

  New parameters keep what they are initialised with in `sparse`; of the options
  `reinitialise`, `noise` and `seed` apply.

  Returns:
    Nested dict shaped like `sparse`.

  Raises:
    ValueError: See `plan`; or shapes do not fit, naming path, shapes, rule.

  Example:
    >>> rules = [Rule("experts/wi", "mlp/wi", stack=True), Rule("gate", None)]
    >>> dense = {"mlp": {"wi": jnp.ones((8, 32))}}
    >>> sparse = {"experts": {"wi": jnp.zeros((4, 8, 32))}, "gate": jnp.ones(4)}
    >>> wi = convert_params(dense, sparse, rules)["experts"]["wi"]
    >>> wi.shape, float(wi.min())
    ((4, 8, 32), 1.0)
  """
  options = options or Options()
  flat_dense = traverse_util.flatten_dict(dense, sep="/")
  flat_sparse = traverse_util.flatten_dict(sparse, sep="/")
  converted = {}
  for path, (rule, source) in plan(flat_dense, flat_sparse, rules).items():
    fresh = flat_sparse[path]
    if source is None:
      converted[path] = fresh
      continue
    value = flat_dense[source]
    expected = fresh.shape[1:] if rule.stack else fresh.shape
    if value.shape != expected:
      raise ValueError(
        f"conversion rule {rule.pattern!r}: dense {source} has shape "
        f"{value.shape}, but sparse {path} has shape {fresh.shape}, which "
        f"needs {expected}; the widths of the two models must agree"
      )
    if rule.stack:
      value = jnp.broadcast_to(value[None], fresh.shape)
      value = _vary(path, value, options)
    converted[path] = value.astype(fresh.dtype)
  return traverse_util.unflatten_dict(converted, sep="/")


def _vary(path: str, value: Array, options: Options) -> Array:
  """Re-initialises units of, and adds noise to, stacked kernels [E, ., .]."""
  if options.preserves_function or not path.endswith("/kernel"):
    return value
  layer = path.split("/sublayer_")[0]
  key = jax.random.key(options.seed)
  own = jax.random.fold_in(key, _hash(path))
  spread = jnp.std(value[0])
  if options.reinitialise:
    # The kernels of one expert must agree on which hidden units are new: the
    # key is the layer's, not the kernel's.
    hidden_axis = 1 if path.endswith("/wo/kernel") else 2
    units = value.shape[hidden_axis]
    ranks = jax.vmap(lambda k: jax.random.permutation(k, units))(
      jax.random.split(jax.random.fold_in(key, _hash(layer)), value.shape[0])
    )
    new = ranks < round(options.reinitialise * units)
    new = new[:, :, None] if hidden_axis == 1 else new[:, None, :]
    drawn = jnp.mean(value[0]) + spread * jax.random.normal(own, value.shape)
    value = jnp.where(new, drawn, value)
  if options.noise:
    noise = jax.random.normal(jax.random.fold_in(own, 1), value.shape)
    value = value + options.noise * spread * noise
  return value


def _hash(text: str) -> int:
  """A 31-bit number from a path, the same in every process."""
  number = 0
  for byte in text.encode():
    number = (number * 257 + byte) % (2**31 - 1)
  return number


def convert_opt_state(
  dense: Tree,
  fresh: Tree,
  rules: Sequence[Rule],
) -> Tree:
  """The sparse model's optimizer state, with the dense moments carried over.

  Works on any Optax state: a leaf below a path that ends in a parameter's path
  follows that parameter's rule. Leaves whose shape does not fit (factored
  moments of small matrices, moments of new parameters) start anew, as in
  `fresh`; leaves of no parameter (counts) are copied. Moments that experts have
  by neuron are means over the inputs of the dense ones.
  """
  flat_dense = _flat_state(dense)
  flat = {}
  for path, leaf in _flat_state(fresh).items():
    flat[path] = leaf
    for rule in rules:
      prefix, match = _match_suffix(rule, path)
      if match is None:
        continue
      if rule.source is not None:
        value = flat_dense.get(prefix + match.expand(rule.source))
        if value is not None:
          if rule.stack and value.ndim == leaf.ndim == 2:
            value = jnp.mean(value, 0)  # Kept by neuron; see `optimizer.adamw`.
          if rule.stack and value.shape == leaf.shape[1:]:
            value = jnp.broadcast_to(value[None], leaf.shape)
          if value.shape == leaf.shape:
            flat[path] = value.astype(leaf.dtype)
      break
  return checkpointing.restored_opt_state(
    fresh, traverse_util.unflatten_dict(flat, sep="/")
  )


def _flat_state(state: Tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(serialization.to_state_dict(state), sep="/")


def _match_suffix(rule: Rule, path: str):
  """Matches the part of an optimizer path that is a parameter's path."""
  parts = path.split("/")
  for start, part in enumerate(parts):
    if part in ("encoder", "decoder", "token_embedder") or start + 1 == len(
      parts
    ):
      prefix = "".join(p + "/" for p in parts[:start])
      return prefix, re.fullmatch(rule.pattern, "/".join(parts[start:]))
  return "", None


def cluster_centroids(
  model: model_lib.Transformer,
  variables: Tree,
  batch: dict[str, Array],
  options: Options,
) -> dict[str, np.ndarray]:
  """Expert centroids from a batch's tokens that reach each layer of experts.

  Spherical k-means (Dhillon & Modha, 2001) over the layer's inputs, centred,
  so that a direction all tokens share does not count. `variables` are those of
  the sparse model after `convert_params`; `options.seed` picks the first ones.

  Returns:
    By path of the centroids' parameter: [E, D] float32, rows of norm
    `base_layer.CONVERTED_NORM`.
  """

  # Compiled, because arrays of several processes cannot be closed over.
  @jax.jit
  def reported(variables: Tree, batch: dict[str, Array]) -> Tree:
    return model_lib.forward(
      model, variables, batch, train=False, reported=["expert_inputs"]
    )[1]

  updates = reported(variables, batch)
  inputs = traverse_util.flatten_dict(updates["expert_inputs"])
  centroids = {}
  for layer in sorted(path[:-1] for path in inputs if path[-1] == "tokens"):
    path = "/".join((*layer, "expert_centroids"))
    h, mask = (
      multihost_utils.process_allgather(inputs[(*layer, name)][0], tiled=True)
      for name in ("tokens", "mask")
    )
    tokens = np.asarray(h, np.float32)[np.asarray(mask)]
    tokens = tokens - tokens.mean(axis=0)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True) + 1e-9
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    centroids[path] = base_layer.CONVERTED_NORM * _spherical_k_means(
      tokens, flat[path].shape[0], options.seed
    )
  return centroids


def _spherical_k_means(
  tokens: np.ndarray, clusters: int, seed: int
) -> np.ndarray:
  """Unit centroids [clusters, D] of unit tokens [T, D]."""
  draw = np.random.RandomState(seed)  # A stream NumPy keeps for ever.
  replace = len(tokens) < clusters
  centroids = tokens[draw.choice(len(tokens), clusters, replace=replace)]
  for _ in range(_K_MEANS_STEPS):
    nearest = np.argmax(tokens @ centroids.T, axis=1)
    for i in range(clusters):
      members = tokens[nearest == i]
      if len(members):
        mean = members.sum(axis=0)
        centroids[i] = mean / (np.linalg.norm(mean) + 1e-9)
  return centroids


def relative_error(
  dense_logits: Array, sparse_logits: Array, weights: Array
) -> Array:
  """Largest difference of logits of real tokens, relative to the largest.

  Of logits [B, L, V] float32 and weights [B, L], 0 on padding; [] float32.
  """
  is_real = weights[..., None] > 0
  error = jnp.max(
    jnp.where(is_real, jnp.abs(sparse_logits - dense_logits), 0.0)
  )
  return error / jnp.max(jnp.where(is_real, jnp.abs(dense_logits), 0.0))
