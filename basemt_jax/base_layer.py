"""BaseLayer: route tokens to experts, run the experts, gate, return.

Axes: B batch rows, L length, D model width, F feed-forward width, G groups of
tokens, S tokens in a group, E experts, C slots of an expert for a group, K
experts per token, N tokens, M rows of an expert.

Training and test time differ on purpose (Lewis et al. 2021, arXiv:2103.16716):
in training every expert gets the same number of tokens of each group, so tokens
move by equal-split all-to-all; at test time each token goes where it likes, and
no token is dropped whatever the skew.

With a mesh, both run in `jax.shard_map` over its axes data, expert and model:
batch rows are split over data and expert, experts over expert, F over model.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from basemt_jax import grouped_matmul, layers, routing

_BATCH_AXES = ("data", "expert")

# Rows of a block of tokens that share an expert, at test time. Larger blocks
# read an expert's weights less often, smaller ones waste less on padding.
_MIN_BLOCK = 8
_MAX_BLOCK = 256
# Sizes of the pieces into which a CPU cuts an expert's tokens. Measured there.
_PIECES = (512, 128, 32, 8)

# Norm of centroids at first in a converted layer: with |h| up to 1000 a gate is
# off by 5e-6 at most.
CONVERTED_NORM = 1e-8

Weights = list[dict[str, Any]]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What the pure functions below need to know of the layer."""

  num_experts: int
  router: routing.Router
  activations: tuple[str, ...]
  dropout_rate: float
  dtype: Any
  mesh: Mesh | None  # None where there is but one device

  def axis_size(self, name: str) -> int:
    return 1 if self.mesh is None else self.mesh.shape[name]

  def axis_index(self, name: str) -> jax.Array | int:
    return 0 if self.mesh is None else lax.axis_index(name)


class BaseLayer(nn.Module):
  """A layer of experts: out = h + g * (f_e(h) - h).

  e is the token's expert, f_e a stack of residual feed-forward sublayers, and
  g = gate_bias + gate_scale * sigmoid(h . w_e) with learned scalars; a router
  may gate by something else than the sigmoid. The layer returns
  h + g * (sum of the sublayers' outputs), so that with g = 1 it is exactly
  h + FF(LN(h)).

  Attributes:
    num_experts: E.
    mlp_dim: F.
    num_sublayers: Feed-forward sublayers of an expert.
    activations: Of the hidden units; two names make a gated feed-forward, as in
      `layers.MlpBlock`.
    router: Decides which expert runs which token.
    rows_per_group: Batch rows whose tokens compete for slots in training. Rows
      should be of many languages. A property of the model, not of the hardware.
    zero_init_output: Start with zero output weights: the layer is the identity
      at first (fairseq's choice).
    dropout_rate: On the hidden units, a mask for an expert's tokens of a group.
    converted: Start with g = 1 for every token, which preserves a dense
      feed-forward's function: centroids are too small to move a gate, and the
      scale is the inverse of a gate at affinity 0. (Assignment does not depend
      on the size of centroids. A gate of bias 1 and scale 0 would preserve the
      function too, but the scale's sign decides whether centroids move to the
      tokens their expert serves well or away from them, and from 0 it learns
      either.) Otherwise g = sigmoid(h . w_e), with centroids of norm 0.1.
    dtype: Of the experts' computation. Routing and gate are float32.
    mesh: Mesh with axes data, expert and model, or None for one device.
  """

  num_experts: int
  mlp_dim: int
  num_sublayers: int = 1
  activations: Sequence[str] = ("relu",)
  router: routing.Router = routing.BalancedRouter()
  rows_per_group: int = 16
  zero_init_output: bool = False
  dropout_rate: float = 0.0
  converted: bool = False
  dtype: Any = jnp.float32
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self,
    h: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool,
    enable_dropout: bool | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      h: [B, L, D].
      mask: [B, L] bool, False on padding, which is returned unchanged; None
        means no padding.
      train: Route in training groups and update the prices, if the collection
        `prices` is mutable; else route each token on its own.
      enable_dropout: Needs the random stream `dropout`; `train` by default.

    Returns:
      [B, L, D] in h's type. Sows `expert` and `favourite` [B, L] int32 (-1 on
      padding), `routing_entropy` [] and `auxiliary_loss` [] as intermediates.

    Raises:
      ValueError: B, E or the mesh do not fit together.
    """
    h = jnp.asarray(h)
    batch, _, width = h.shape
    settings = self._settings()
    centroids = nn_partitioning.param_with_axes(
      "expert_centroids",
      nn.initializers.orthogonal(CONVERTED_NORM if self.converted else 0.1),
      (self.num_experts, width),
      axes=("unmodeled", "embed"),
    )
    scale = 1.0
    if self.converted:
      even = self.router.even_gate(self.num_experts)
      scale = 1.0 / (even * self.router.num_selected_experts)
    gate = {
      name: nn_partitioning.param_with_axes(
        f"gate_{name}", nn.initializers.constant(value), (), axes=()
      )
      for name, value in (("bias", 0.0), ("scale", scale))
    }
    weights = _Experts(
      self.num_experts,
      self.mlp_dim,
      self.num_sublayers,
      len(self.activations),
      self.zero_init_output,
      name="experts",
    )(width)
    prices = self._prices(train)
    if self.is_initializing():
      return h
    mask = jnp.ones(h.shape[:2], bool) if mask is None else jnp.asarray(mask)
    enable_dropout = train if enable_dropout is None else enable_dropout
    key = None
    if enable_dropout and self.dropout_rate > 0:
      key = self.make_rng("dropout")
    params = {"centroids": centroids, "gate": gate, "experts": weights}
    if train:
      rows = _rows_per_group(batch, self.rows_per_group, settings)
      apply = functools.partial(_train, settings, rows)
    else:
      apply = functools.partial(_test, settings)
    out, metrics = _on_devices(apply, settings, h, mask, params, prices, key)
    new_prices = metrics.pop("prices")
    if train and self.is_mutable_collection("prices"):
      self.put_variable("prices", "prices", new_prices)
    for name, value in metrics.items():
      self.sow("intermediates", name, value)
    return out

  def _prices(self, train: bool) -> jax.Array:
    """The prices; zero at test time where the caller has none to give."""
    is_given = self.has_variable("prices", "prices")
    if not (train or is_given or self.is_mutable_collection("prices")):
      return jnp.zeros((self.num_experts,), jnp.float32)
    return nn_partitioning.variable_with_axes(
      "prices",
      "prices",
      jnp.zeros,
      (self.num_experts,),
      jnp.float32,
      axes=("unmodeled",),
    ).value

  def _settings(self) -> _Settings:
    mesh = self.mesh
    if mesh is not None:
      missing = {*_BATCH_AXES, "model"} - set(mesh.axis_names)
      if missing:
        raise ValueError(
          f"the mesh has the axes {tuple(mesh.axis_names)}; BaseLayer needs "
          "data, expert and model, of size 1 where not used"
        )
      if self.num_experts % mesh.shape["expert"]:
        raise ValueError(
          f"num_experts is {self.num_experts}, but the mesh's expert axis has "
          f"{mesh.shape['expert']} devices; use a multiple of that"
        )
      if self.mlp_dim % mesh.shape["model"]:
        raise ValueError(
          f"mlp_dim is {self.mlp_dim}, but the mesh's model axis has "
          f"{mesh.shape['model']} devices; use a multiple of that"
        )
      if mesh.size == 1:
        mesh = None
    return _Settings(
      self.num_experts,
      self.router,
      tuple(self.activations),
      self.dropout_rate,
      self.dtype,
      mesh,
    )


class _Weight(nn.Module):
  """A parameter in a scope of its own, as flax.linen.Dense has it."""

  parameter: str
  initializer: Callable[..., jax.Array]
  shape: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self) -> jax.Array:
    return nn_partitioning.param_with_axes(
      self.parameter, self.initializer, self.shape, axes=self.axes
    )


class _Sublayer(nn.Module):
  """Parameters of one feed-forward sublayer of all experts."""

  num_experts: int
  mlp_dim: int
  num_inputs: int
  zero_init_output: bool

  @nn.compact
  def __call__(self, width: int) -> dict[str, Any]:
    # The dense layer's initialisation, for each expert on its own.
    init = nn.initializers.variance_scaling(
      1.0,
      "fan_in",
      "truncated_normal",
      in_axis=-2,
      out_axis=-1,
      batch_axis=(0,),
    )
    experts, hidden = self.num_experts, self.mlp_dim
    names = ["wi"]
    if self.num_inputs > 1:
      names = [f"wi_{i}" for i in range(self.num_inputs)]
    norm = _Weight(
      "scale",
      nn.initializers.ones,
      (experts, width),
      ("expert", "embed"),
      name="layer_norm",
    )
    inputs = [
      _Weight(
        "kernel",
        init,
        (experts, width, hidden),
        ("expert", "embed", "expert_mlp"),
        name=name,
      )()
      for name in names
    ]
    output = _Weight(
      "kernel",
      nn.initializers.zeros if self.zero_init_output else init,
      (experts, hidden, width),
      ("expert", "expert_mlp", "embed"),
      name="wo",
    )
    return {"norm": norm(), "wi": inputs, "wo": output()}


class _Experts(nn.Module):
  """Parameters of all experts, with a leading expert axis."""

  num_experts: int
  mlp_dim: int
  num_sublayers: int
  num_inputs: int
  zero_init_output: bool

  @nn.compact
  def __call__(self, width: int) -> Weights:
    return [
      _Sublayer(
        self.num_experts,
        self.mlp_dim,
        self.num_inputs,
        self.zero_init_output,
        name=f"sublayer_{j}",
      )(width)
      for j in range(self.num_sublayers)
    ]


def _rows_per_group(batch: int, wanted: int, settings: _Settings) -> int:
  """Rows of a group; raises where groups would not lie on one device each."""
  devices = settings.axis_size("data") * settings.axis_size("expert")
  if devices == 1 and 0 < batch < wanted:
    return batch
  if batch % (wanted * devices) or batch == 0:
    sizes = ", ".join(str(i * wanted * devices) for i in (1, 2, 3))
    raise ValueError(
      f"the training batch has {batch} rows, but groups of rows_per_group="
      f"{wanted} rows on {devices} devices (mesh axes data x expert) need a "
      f"multiple of {wanted * devices}: {sizes}, ..."
    )
  return wanted


def _on_devices(
  apply: Callable[..., tuple[jax.Array, Metrics]],
  settings: _Settings,
  h: jax.Array,
  mask: jax.Array,
  params: dict[str, Any],
  prices: jax.Array,
  key: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
  """Runs `apply` on every device's share, or directly without a mesh."""
  if settings.mesh is None:
    return apply(h, mask, params, prices, key)
  devices = settings.axis_size("data") * settings.axis_size("expert")
  batch = h.shape[0]
  # Test batches of any size: rows of padding, cut off again below.
  extra = -batch % devices
  if extra:
    h = jnp.pad(h, ((0, extra), (0, 0), (0, 0)))
    mask = jnp.pad(mask, ((0, extra), (0, 0)))
  rows = P(_BATCH_AXES)
  sublayer = {
    "norm": P("expert"),
    "wi": P("expert", None, "model"),
    "wo": P("expert", "model"),
  }
  param_specs = {"centroids": P(), "gate": P(), "experts": sublayer}
  out, metrics = jax.shard_map(
    apply,
    mesh=settings.mesh,
    in_specs=(
      rows,
      rows,
      {**param_specs, "experts": [sublayer] * len(params["experts"])},
      P(),
      P(),
    ),
    out_specs=(
      rows,
      {
        "expert": rows,
        "favourite": rows,
        "routing_entropy": P(),
        "auxiliary_loss": P(),
        "prices": P(),
      },
    ),
  )(h, mask, params, prices, key)
  if extra:
    out = out[:batch]
    for name in ("expert", "favourite"):
      metrics[name] = metrics[name][:batch]
  return out, metrics


def _train(
  settings: _Settings,
  rows_per_group: int,
  h: jax.Array,
  mask: jax.Array,
  params: dict[str, Any],
  prices: jax.Array,
  key: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
  """The training path on one device's rows [B, L, D]."""
  batch, length, width = h.shape
  groups = batch // rows_per_group
  affinities = _affinities(h, params["centroids"])
  group_shape = (groups, rows_per_group * length)
  group_mask = mask.reshape(group_shape)
  plans = jax.vmap(settings.router.plan, in_axes=(0, 0, None))(
    affinities.reshape(*group_shape, settings.num_experts), group_mask, prices
  )
  moves = routing.dispatcher(plans, settings.num_experts)
  slots = moves.dispatch(h.reshape(-1, width).astype(settings.dtype))
  exchange = settings.axis_size("expert") > 1
  if exchange:
    # [E, G*C, D] -> [E/X, X*G*C, D]: local experts, all devices' groups.
    slots = lax.all_to_all(slots, "expert", 0, 1, tiled=True)
  keep = None
  if key is not None:
    keep = functools.partial(_group_dropout, settings, key, groups)
  change = _run_experts(settings, slots, params["experts"], keep)
  if exchange:
    change = lax.all_to_all(change, "expert", 1, 0, tiled=True)
  change = moves.combine(change)
  num_selected = settings.router.num_selected_experts
  gate = _gate(params["gate"], plans.gate.reshape(-1, num_selected), mask)
  out = _residual(h, gate, change)
  metrics = _metrics(settings, affinities, mask, plans.expert[..., 0])
  # Groups of nothing but padding know no prices and have no loss.
  known = jnp.any(group_mask, axis=1).astype(jnp.float32)
  count = _sum(settings, jnp.sum(known))
  auxiliary_loss = _sum(settings, jnp.sum(plans.auxiliary_loss * known))
  metrics["auxiliary_loss"] = auxiliary_loss / jnp.maximum(count, 1.0)
  total = _sum(settings, jnp.sum(plans.prices * known[:, None], axis=0))
  metrics["prices"] = jnp.where(
    count > 0, lax.stop_gradient(total / jnp.maximum(count, 1.0)), prices
  )
  return out, metrics


def _test(
  settings: _Settings,
  h: jax.Array,
  mask: jax.Array,
  params: dict[str, Any],
  prices: jax.Array,
  key: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
  """The test-time path on one device's rows [B, L, D]: nothing is dropped.

  With sharded experts, the devices along the expert axis gather each other's
  tokens, run their own experts, and send back the sums.
  """
  width = h.shape[2]
  affinities = _affinities(h, params["centroids"])
  choice = settings.router.choose(
    affinities.reshape(-1, settings.num_experts), mask.reshape(-1), prices
  )
  gate = _gate(params["gate"], choice.gate, mask)
  tokens = h.reshape(-1, width).astype(settings.dtype)
  expert = jnp.where(mask.reshape(-1, 1), choice.expert, settings.num_experts)
  shards = settings.axis_size("expert")
  if shards > 1:
    gather = functools.partial(
      lax.all_gather, axis_name="expert", axis=0, tiled=True
    )
    local_experts = settings.num_experts // shards
    expert = gather(expert) - lax.axis_index("expert") * local_experts
    expert = jnp.where(
      (expert >= 0) & (expert < local_experts), expert, local_experts
    )
    change = _run_tokens(
      settings, gather(tokens), expert, params["experts"], key
    )
    change = lax.psum_scatter(change, "expert", scatter_dimension=0, tiled=True)
  else:
    change = _run_tokens(settings, tokens, expert, params["experts"], key)
  out = _residual(h, gate, change)
  metrics = _metrics(settings, affinities, mask, choice.expert[:, 0])
  metrics["auxiliary_loss"] = jnp.float32(0.0)
  metrics["prices"] = prices
  return out, metrics


def _affinities(h: jax.Array, centroids: jax.Array) -> jax.Array:
  """H . w_e, [B, L, E] float32 in full precision whatever the compute type."""
  return jnp.einsum(
    "bld,ed->ble",
    h.astype(jnp.float32),
    centroids,
    precision=lax.Precision.HIGHEST,
  )


def _gate(
  params: dict[str, jax.Array], raw: jax.Array, mask: jax.Array
) -> jax.Array:
  """G [N, K] of raw gates [N, K]; the bias is shared by a token's experts."""
  gate = params["bias"] / raw.shape[1] + params["scale"] * raw
  return jnp.where(mask.reshape(-1, 1), gate, 0.0)


def _residual(h: jax.Array, gate: jax.Array, change: jax.Array) -> jax.Array:
  """H + sum_k g_k change_k; [B, L, D], [N, K], [N, K, D] -> [B, L, D]."""
  change = jnp.sum(gate[:, :, None] * change.astype(jnp.float32), axis=1)
  out = h.astype(jnp.float32) + change.reshape(h.shape)
  return out.astype(h.dtype)


def _sum(settings: _Settings, value: jax.Array) -> jax.Array:
  """Sum over the devices that hold different rows."""
  return value if settings.mesh is None else lax.psum(value, _BATCH_AXES)


def _metrics(
  settings: _Settings, affinities: jax.Array, mask: jax.Array, expert: jax.Array
) -> Metrics:
  """What the layer sows about routing; affinities [B, L, E]."""
  affinities = lax.stop_gradient(affinities)
  favourite = jnp.argmax(affinities, axis=-1).astype(jnp.int32)
  log_shares = jax.nn.log_softmax(affinities, axis=-1)
  entropy = -jnp.sum(jnp.exp(log_shares) * log_shares, axis=-1)
  total = _sum(settings, jnp.sum(jnp.where(mask, entropy, 0.0)))
  count = _sum(settings, jnp.sum(mask, dtype=jnp.float32))
  return {
    "expert": jnp.where(mask, expert.reshape(mask.shape), -1),
    "favourite": jnp.where(mask, favourite, -1),
    "routing_entropy": total / jnp.maximum(count, 1.0),
  }


def _group_dropout(
  settings: _Settings, key: jax.Array, groups: int, sublayer: int, shape: Any
) -> jax.Array:
  """Which hidden units live, [E/X, X*G, F] bool, for hidden [E/X, X*G*C, F].

  Drawn for each expert and global group, so that neither the number of devices
  along data nor along expert changes the masks.
  """
  shards = settings.axis_size("expert")
  local_experts, _, hidden = shape
  expert = settings.axis_index("expert") * local_experts
  expert += jnp.arange(local_experts)
  group = settings.axis_index("data") * shards * groups
  group += jnp.arange(shards * groups)
  key = jax.random.fold_in(key, sublayer)
  key = jax.random.fold_in(key, settings.axis_index("model"))

  def draw(expert, group):
    place = jax.random.fold_in(jax.random.fold_in(key, expert), group)
    return jax.random.bernoulli(place, 1.0 - settings.dropout_rate, (hidden,))

  rows = jax.vmap(draw, in_axes=(None, 0))
  return jax.vmap(rows, in_axes=(0, None))(expert, group)


def _run_experts(
  settings: _Settings,
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


def _run_tokens(
  settings: _Settings,
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
  settings: _Settings, tokens: jax.Array, expert: jax.Array, weights: Weights
) -> jax.Array:
  """`_run_tokens` without dropout, for CPUs.

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
      y = _run_experts(settings, x[None], one, None)[0]
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
  settings: _Settings,
  tokens: jax.Array,
  expert: jax.Array,
  weights: Weights,
  key: jax.Array | None,
) -> jax.Array:
  """`_run_tokens`, for any platform.

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
  return jax.default_backend() == "gpu" and grouped_matmul.is_supported(
    width, hidden
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
  settings: _Settings,
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
  settings: _Settings,
  rows: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  weights: Weights,
  key: jax.Array | None,
) -> jax.Array:
  """Changes [R, M, D] of the blocks in turn: plain JAX, for any platform.

  Args:
    settings: The layer's.
    rows: [R, M, D] in the compute type, the rows of R blocks.
    block_expert: [R] int32.
    used: [] int32; blocks from this one on may be skipped.
    weights: Of the local experts.
    key: Of dropout, or None.
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

    return _run_experts(settings, x[None], one, keep)[0]

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
