"""The feed-forwards of experts: their parameters, and two ways to run them.

Axes: N tokens, K experts per token, D model width, F feed-forward width, E
experts, M rows of an expert or a block, R blocks, G groups, X devices of the
mesh's expert axis.

`run_slots` runs experts that all have the same number of tokens, as in
training: plain batched products. `run_tokens` runs every token through its
experts whatever their loads, as at test time, by one of three ways that give
the same: blocks in turn, one kernel for all blocks (GPUs), pieces of falling
size (CPUs).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning
from jax import lax
from jax.sharding import Mesh

from basemt_jax import drawing, layers, routing
from basemt_jax.kernels import grouped_matmul, kernel_call

# Rows of a block of tokens that share an expert, at test time. Larger blocks
# read an expert's weights less often, smaller ones waste less on padding.
_MIN_BLOCK = 8
_MAX_BLOCK = 256
# Sizes of the pieces into which a CPU cuts an expert's tokens. Measured there.
_PIECES = (512, 128, 32, 8)

# Of each sublayer: "norm" [E, D], "wi" matrices [E, D, F], "wo" [E, F, D].
Weights = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is known of a layer of experts and its devices.

  Attributes:
    num_experts: E of the whole layer.
    activations: Of the hidden units; two make a gated feed-forward.
    dropout_rate: On the hidden units.
    dtype: Of the computation.
    mesh: Of axes data, expert and model, inside whose `jax.shard_map` all this
      runs; None where there is but one device.
  """

  num_experts: int
  activations: tuple[str, ...]
  dropout_rate: float
  dtype: Any
  mesh: Mesh | None

  def axis_size(self, name: str) -> int:
    """Devices along an axis of the mesh."""
    return 1 if self.mesh is None else self.mesh.shape[name]

  def axis_index(self, name: str) -> jax.Array | int:
    """This device's place on an axis."""
    return 0 if self.mesh is None else lax.axis_index(name)


class _Weight(nn.Module):
  """A parameter in a scope of its own, as flax.linen.Dense has it."""

  parameter: str
  initializer: Callable[..., jax.Array]
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self) -> jax.Array:
    return nn_partitioning.param_with_axes(
      self.parameter, self.initializer, self.shape, self.dtype, axes=self.axes
    )


# The dense layer's initialisation, for each expert on its own.
_scaled = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,)
)
# In bfloat16 the numbers drawn would be of a few values only.
_kernel_init = drawing.Initializer(
  lambda key, shape, dtype: _scaled(key, shape).astype(dtype)
)


class _Sublayer(nn.Module):
  """Parameters of one feed-forward sublayer of all experts."""

  num_experts: int
  mlp_dim: int
  num_inputs: int
  zero_init_output: bool
  param_dtype: Any

  @nn.compact
  def __call__(self, width: int) -> dict[str, Any]:
    experts, hidden = self.num_experts, self.mlp_dim
    names = ["wi"]
    if self.num_inputs > 1:
      names = [f"wi_{i}" for i in range(self.num_inputs)]
    norm = _Weight(
      "scale",
      layers.ones_init,
      (experts, width),
      ("expert", "embed"),
      name="layer_norm",
    )
    inputs = [
      _Weight(
        "kernel",
        _kernel_init,
        (experts, width, hidden),
        ("expert", "embed", "expert_mlp"),
        self.param_dtype,
        name=name,
      )()
      for name in names
    ]
    output = _Weight(
      "kernel",
      layers.zeros_init if self.zero_init_output else _kernel_init,
      (experts, hidden, width),
      ("expert", "expert_mlp", "embed"),
      self.param_dtype,
      name="wo",
    )
    return {"norm": norm(), "wi": inputs, "wo": output()}


class Experts(nn.Module):
  """Parameters of all experts, with a leading expert axis.

  Each has sublayers with a matrix to the hidden units for each activation.
  Matrices are of type `param_dtype`.
  """

  num_experts: int
  mlp_dim: int
  num_sublayers: int
  num_inputs: int
  zero_init_output: bool
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, width: int) -> Weights:
    """The weights of all sublayers, for tokens of width D."""
    return [
      _Sublayer(
        self.num_experts,
        self.mlp_dim,
        self.num_inputs,
        self.zero_init_output,
        self.param_dtype,
        name=f"sublayer_{j}",
      )(width)
      for j in range(self.num_sublayers)
    ]


def run_slots(
  settings: Settings,
  x: jax.Array,
  weights: Weights,
  keep: Callable[[int, Any], jax.Array] | None,
) -> jax.Array:
  """Sum of the sublayers' outputs, f_e(x) - x, for x [E, M, D].

  Args:
    settings: The layer's.
    x: Rows of each expert, in the compute type.
    weights: Of the same experts; F may be this device's part.
    keep: Dropout masks [E, R, F] of a sublayer and hidden shape [E, M, F], each
      for M / R consecutive rows; None without dropout.

  Returns:
    [E, M, D] in the compute type.
  """
  change = jnp.zeros_like(x)
  for j, sublayer in enumerate(weights):
    y = x if j == 0 else x + change
    y = layers.rms_norm(y, sublayer["norm"][:, None]).astype(settings.dtype)
    hidden = None
    for name, kernel in zip(settings.activations, sublayer["wi"], strict=True):
      part = jnp.einsum("emd,edf->emf", y, kernel.astype(settings.dtype))
      part = layers.activation(name)(part)
      hidden = part if hidden is None else hidden * part
    assert hidden is not None
    if keep is not None:
      alive = keep(j, hidden.shape)
      split = hidden.reshape(*alive.shape[:2], -1, hidden.shape[2])
      split = split * (
        alive[:, :, None] / (1.0 - settings.dropout_rate)
      ).astype(settings.dtype)
      hidden = split.reshape(hidden.shape)
    out = jnp.einsum(
      "emf,efd->emd", hidden, sublayer["wo"].astype(settings.dtype)
    )
    if settings.mesh is not None:
      out = lax.psum(out, "model")
    change = out if j == 0 else change + out
  return change


def _block_size(num_choices: int, num_experts: int) -> int:
  """Rows of a block: half an even share of the load, a power of two."""
  share = max(num_choices // (2 * num_experts), 1)
  size = 1 << (share - 1).bit_length()
  return min(max(size, _MIN_BLOCK), _MAX_BLOCK, num_choices)


def run_tokens(
  settings: Settings,
  tokens: jax.Array,
  expert: jax.Array,
  weights: Weights,
  key: jax.Array | None,
) -> jax.Array:
  """Runs every token through its experts, whatever their load.

  Args:
    settings: The layer's.
    tokens: [N, D] in the compute type.
    expert: [N, K] int32, or E where this device has nothing to do.
    weights: Of E experts, the local ones.
    key: Of dropout, or None.

  Returns:
    [N, K, D], f_e(token) - token; zero where there was nothing to do.
  """
  if settings.mesh is not None:
    # Their gradients are summed over the axis once, outside of the loop, and
    # never in a branch, which not all devices take.
    weights = lax.pcast(weights, "data", to="varying")
  on_cpu = jax.default_backend() == "cpu" and settings.axis_size("model") == 1
  if on_cpu and key is None:
    return _in_pieces(settings, tokens, expert, weights)
  return _in_blocks(settings, tokens, expert, weights, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(
  settings: Settings, tokens: jax.Array, expert: jax.Array, weights: Weights
) -> jax.Array:
  """`run_tokens` without dropout, for CPUs.

  Choices are sorted by expert, and each expert's run is cut into pieces of
  falling size, the last of which may reach into the next expert's run, which
  comes later and overwrites what it finds there. So nothing is padded, and most
  rows go through large products. How many pieces there are is known only when
  they are: to be differentiated, the layer runs `_in_blocks`.
  """
  num_experts = weights[0]["norm"].shape[0]
  order = _by_expert(expert, num_experts)
  row = jnp.arange(expert.size, dtype=jnp.int32)
  row = jnp.where(order.expert < num_experts, row, expert.size)
  slot = jnp.zeros_like(row).at[order.choice].set(row, unique_indices=True)
  moves = routing.Dispatcher(slot.reshape(expert.shape), order.choice, 1)
  sizes = tuple(s for s in _PIECES if s <= expert.size) or _PIECES[-1:]
  rows = jnp.pad(moves.dispatch(tokens)[0], ((0, sizes[-1]), (0, 0)))
  ends = jnp.cumsum(order.load, dtype=jnp.int32)

  def run_expert(state):
    start, change = state
    index = jnp.sum(ends <= start, dtype=jnp.int32)
    one = jax.tree.map(
      lambda w: lax.dynamic_index_in_dim(w, index, keepdims=True), weights
    )

    def run_piece(size, _, state):
      start, change = state
      x = lax.dynamic_slice_in_dim(rows, start, size)
      y = run_slots(settings, x[None], one, None)[0]
      return start + size, lax.dynamic_update_slice_in_dim(change, y, start, 0)

    # Loops, not branches: these would copy all rows.
    for size in sizes:
      left = ends[index] - start
      count = (left + size - 1) // size if size == sizes[-1] else left // size
      start, change = lax.fori_loop(
        0, count, functools.partial(run_piece, size), (start, change)
      )
    return ends[index], change

  start = jnp.zeros_like(ends[-1])
  _, change = lax.while_loop(
    lambda state: state[0] < ends[-1], run_expert, (start, jnp.zeros_like(rows))
  )
  return moves.combine(change[None, : expert.size])


def _in_pieces_forward(settings, tokens, expert, weights):
  return jax.vjp(
    lambda x, w: _in_blocks(settings, x, expert, w, None), tokens, weights
  )


def _in_pieces_backward(settings, backward, cotangent):
  del settings
  tokens_gradient, weights_gradient = backward(cotangent)
  return tokens_gradient, None, weights_gradient


_in_pieces.defvjp(_in_pieces_forward, _in_pieces_backward)


def _in_blocks(
  settings: Settings,
  tokens: jax.Array,
  expert: jax.Array,
  weights: Weights,
  key: jax.Array | None,
) -> jax.Array:
  """`run_tokens`, for any platform.

  Choices are sorted by expert, and each expert's run is padded to whole blocks.
  However the load is skewed there are at most N K / block + E blocks; those
  that are not needed are skipped.
  """
  num_experts = weights[0]["norm"].shape[0]
  num_choices = expert.size
  use_kernel = key is None and _has_kernel(weights)
  if use_kernel:
    # The choices are among all experts, of which this device has some.
    block = grouped_matmul.block_size(num_choices, settings.num_experts)
  else:
    block = _block_size(num_choices, num_experts)
  busy = min(num_experts, num_choices)
  num_blocks = (num_choices + busy * (block - 1)) // block
  moves, block_expert, used = _blocks(expert, num_experts, block, num_blocks)
  rows = moves.dispatch(tokens)
  if use_kernel:
    change = _grouped(settings, num_choices, rows, block_expert, used, weights)
  else:
    change = _scan(settings, rows, block_expert, used, weights, key)
  return moves.combine(change)


def _has_kernel(weights: Weights) -> bool:
  """Whether `grouped_matmul` can run here, with these shapes."""
  _, hidden, width = weights[0]["wo"].shape
  return kernel_call.can_run() and grouped_matmul.is_supported(width, hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
  settings: Settings,
  num_rows: int,
  rows: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  weights: Weights,
) -> jax.Array:
  """`_scan` in two products for each sublayer, with the gradient of `_scan`."""
  if grouped_matmul.round_once(num_rows, settings.num_experts):
    weights = [
      {
        **w,
        **jax.tree.map(
          lambda x: x.astype(settings.dtype), {"wi": w["wi"], "wo": w["wo"]}
        ),
      }
      for w in weights
    ]
  change = jnp.zeros_like(rows)
  for j, sublayer in enumerate(weights):
    y = rows if j == 0 else rows + change
    y = layers.rms_norm(y, sublayer["norm"][block_expert][:, None])
    hidden = grouped_matmul.grouped_matmul(
      y.astype(settings.dtype),
      sublayer["wi"],
      settings.activations,
      block_expert,
      used,
    )
    out = grouped_matmul.grouped_matmul(
      hidden, [sublayer["wo"]], ["linear"], block_expert, used
    )
    if settings.mesh is not None:
      out = lax.psum(out, "model")
    change = out if j == 0 else change + out
  return change


def _grouped_forward(settings, num_rows, rows, block_expert, used, weights):
  change = _grouped(settings, num_rows, rows, block_expert, used, weights)
  return change, (rows, block_expert, used, weights)


def _grouped_backward(settings, num_rows, saved, cotangent):
  del num_rows
  rows, block_expert, used, weights = saved
  _, backward = jax.vjp(
    lambda x, w: _scan(settings, x, block_expert, used, w, None), rows, weights
  )
  rows_gradient, weights_gradient = backward(cotangent)
  return rows_gradient, None, None, weights_gradient


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _scan(
  settings: Settings,
  rows: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  weights: Weights,
  key: jax.Array | None,
) -> jax.Array:
  """Changes [R, M, D] of the blocks in turn: plain JAX, for any platform.

  Of the rows [R, M, D] of R blocks, whose experts are `block_expert` [R] int32;
  blocks from `used` [] on may be skipped. `key` is of dropout, or None.
  """
  if key is not None:
    key = jax.random.fold_in(key, settings.axis_index("data"))
    key = jax.random.fold_in(key, settings.axis_index("expert"))
    key = jax.random.fold_in(key, settings.axis_index("model"))

  def run(index, x, e):
    one = jax.tree.map(
      lambda w: lax.dynamic_index_in_dim(w, e, keepdims=True), weights
    )
    keep = None
    if key is not None:
      own = jax.random.fold_in(key, index)

      def keep(j, shape):
        place = jax.random.fold_in(own, j)
        return jax.random.bernoulli(place, 1.0 - settings.dropout_rate, shape)

    return run_slots(settings, x[None], one, keep)[0]

  def body(_, block_inputs):
    index, x, e = block_inputs
    if settings.axis_size("model") > 1:
      # Skipping would put a collective into a branch.
      return None, run(index, x, e)
    return None, lax.cond(
      index < used, run, lambda i, x, e: jnp.zeros_like(x), index, x, e
    )

  indices = jnp.arange(rows.shape[0], dtype=jnp.int32)
  _, change = lax.scan(body, None, (indices, rows, block_expert))
  return change


class _Order(NamedTuple):
  """Choices sorted by expert, those of an expert in the order they come in.

  Attributes:
    expert: [N K] int32, in rising order; E: none.
    choice: [N K] int32, of which choice `n * K + k` it is.
    load: [E] int32, choices of each expert.
  """

  expert: jax.Array
  choice: jax.Array
  load: jax.Array


def _by_expert(expert: jax.Array, num_experts: int) -> _Order:
  """Sorts choices [N, K], of E experts or E for none."""
  flat = expert.reshape(-1)
  position = jnp.arange(flat.size, dtype=jnp.int32)
  if (num_experts + 1) * flat.size <= 2**31:
    # One sort key in place of a pair.
    key = lax.sort(flat * flat.size + position, is_stable=False)
    ordered, choice = jnp.divmod(key, flat.size)
  else:
    ordered, choice = lax.sort((flat, position), num_keys=1)
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  load = jnp.sum(flat[:, None] == experts[None], axis=0, dtype=jnp.int32)
  return _Order(ordered, choice, load)


def _blocks(
  expert: jax.Array, num_experts: int, block: int, num_blocks: int
) -> tuple[routing.Dispatcher, jax.Array, jax.Array]:
  """Lays choices out in blocks of one expert each.

  Returns:
    The map of N tokens to [num_blocks, block] rows; the expert of each block
    [num_blocks] int32; how many blocks are in use, [] int32.
  """
  order = _by_expert(expert, num_experts)
  blocks = (order.load + block - 1) // block
  last_block = jnp.cumsum(blocks, dtype=jnp.int32)
  first_choice = jnp.cumsum(order.load) - order.load
  first_row = (last_block - blocks) * block - first_choice
  num_rows = num_blocks * block
  position = jnp.arange(expert.size, dtype=jnp.int32)
  row = jnp.where(
    order.expert < num_experts,
    position + jnp.append(first_row, 0)[order.expert],
    num_rows,
  )
  slot = jnp.zeros_like(row).at[order.choice].set(row, unique_indices=True)
  source = jnp.full(num_rows, row.size, jnp.int32)
  source = source.at[row].set(order.choice, mode="drop")
  index = jnp.arange(num_blocks, dtype=jnp.int32)
  owner = jnp.sum(last_block[None] <= index[:, None], axis=1, dtype=jnp.int32)
  owner = jnp.minimum(owner, num_experts - 1)
  moves = routing.Dispatcher(slot.reshape(expert.shape), source, num_blocks)
  return moves, owner, last_block[-1]
