"""BaseLayer: route tokens to experts, run the experts, gate, return.

Axes: B batch rows, L length, D model width, F feed-forward width, G groups of
tokens, S tokens in a group, E experts, C slots of an expert for a group, X
devices of the mesh's expert axis, K experts per token, N tokens.

Training and test time differ on purpose (Lewis et al. 2021, arXiv:2103.16716):
in training every expert gets the same number of tokens of each group, so tokens
move by equal-split all-to-all; at test time each token goes where it likes, and
no token is dropped whatever the skew.

With a mesh, both run in `jax.shard_map` over its axes data, expert and model:
batch rows are split over data and expert, experts over expert, F over model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from basemt_jax import drawing, experts, routing

_BATCH_AXES = ("data", "expert")

# Norm of centroids at first in a converted layer: with |h| up to 1000 a gate is
# off by 5e-6 at most.
CONVERTED_NORM = 1e-8

Metrics = dict[str, jax.Array]


@functools.cache
def _centroids_init(norm: float) -> drawing.Initializer:
  """Orthogonal rows of this norm."""
  return drawing.Initializer(nn.initializers.orthogonal(norm))


@functools.cache
def _gate_init(value: float) -> drawing.Initializer:
  return drawing.Initializer(nn.initializers.constant(value))


class BaseLayer(nn.Module):
  """A layer of experts: `out = h + g * (f_e(h) - h)`.

  Here `e` is the token's expert, `f_e` a stack of residual feed-forward
  sublayers, and `g = gate_bias + gate_scale * sigmoid(h . w_e)` with learned
  scalars; a router may gate by something else than the sigmoid. The layer
  returns `h + g * (sum of the sublayers' outputs)`, so that with `g = 1` it is
  exactly `h + FF(LN(h))`.

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
    param_dtype: In which the experts' matrices are kept. All other parameters
      are float32.
    mesh: Mesh with axes data, expert and model, or None for one device.

  Example:
    >>> layer = BaseLayer(num_experts=4, mlp_dim=32)
    >>> h = jax.random.normal(jax.random.key(0), (2, 6, 8))
    >>> variables = layer.init(jax.random.key(1), h, train=True)
    >>> collections = ["prices", "intermediates"]
    >>> out, updates = jax.jit(
    ...   lambda *args: layer.apply(*args, train=True, mutable=collections)
    ... )(variables, h)
    >>> out.shape
    (2, 6, 8)
    >>> expert, = updates["intermediates"]["expert"]
    >>> jnp.bincount(expert.ravel(), length=4).tolist()
    [3, 3, 3, 3]
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
  param_dtype: Any = jnp.float32
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
      padding), `routing_entropy` [] and `auxiliary_loss` [] as intermediates;
      `tokens`, which are h, and `mask` as `expert_inputs`.

    Raises:
      ValueError: B, E or the mesh do not fit together.
    """
    h = jnp.asarray(h)
    batch, _, width = h.shape
    settings = self._settings()
    centroids = nn_partitioning.param_with_axes(
      "expert_centroids",
      _centroids_init(CONVERTED_NORM if self.converted else 0.1),
      (self.num_experts, width),
      axes=("unmodeled", "embed"),
    )
    gate = self._gate()
    weights = experts.Experts(
      self.num_experts,
      self.mlp_dim,
      self.num_sublayers,
      len(self.activations),
      self.zero_init_output,
      self.param_dtype,
      name="experts",
    )(width)
    prices = self._prices(train)
    if self.is_initializing():
      return h
    mask = jnp.ones(h.shape[:2], bool) if mask is None else jnp.asarray(mask)
    self.sow("expert_inputs", "tokens", h)
    self.sow("expert_inputs", "mask", mask)
    enable_dropout = train if enable_dropout is None else enable_dropout
    key = None
    if enable_dropout and self.dropout_rate > 0:
      key = self.make_rng("dropout")
    params = {"centroids": centroids, "gate": gate, "experts": weights}
    if train:
      rows = rows_in_group(
        batch,
        self.rows_per_group,
        settings.axis_size("data") * settings.axis_size("expert"),
      )
      apply = functools.partial(_train, settings, self.router, rows)
    else:
      apply = functools.partial(_test, settings, self.router)
    out, metrics = _on_devices(apply, settings, h, mask, params, prices, key)
    new_prices = metrics.pop("prices")
    if train and self.is_mutable_collection("prices"):
      self.put_variable("prices", "prices", new_prices)
    for name, value in metrics.items():
      self.sow("intermediates", name, value)
    return out

  def _gate(self) -> dict[str, jax.Array]:
    """Bias and scale of the gates, both []; 1 in all after a conversion."""
    scale = 1.0
    if self.converted:
      even = self.router.even_gate(self.num_experts)
      scale = 1.0 / (even * self.router.num_selected_experts)
    return {
      name: nn_partitioning.param_with_axes(
        f"gate_{name}", _gate_init(value), (), axes=()
      )
      for name, value in (("bias", 0.0), ("scale", scale))
    }

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

  def _settings(self) -> experts.Settings:
    mesh = self.mesh
    if mesh is not None:
      missing = {*_BATCH_AXES, "model"} - set(mesh.axis_names)
      if missing:
        raise ValueError(
          f"the mesh has the axes {tuple(mesh.axis_names)}; BaseLayer needs "
          "data, expert and model, of size 1 where not used"
        )
      for name, axis in (("num_experts", "expert"), ("mlp_dim", "model")):
        if getattr(self, name) % mesh.shape[axis]:
          raise ValueError(
            f"{name} is {getattr(self, name)}, but the mesh's {axis} axis has "
            f"{mesh.shape[axis]} devices; use a multiple of that"
          )
      if mesh.size == 1:
        mesh = None
    return experts.Settings(
      self.num_experts,
      tuple(self.activations),
      self.dropout_rate,
      self.dtype,
      mesh,
    )


def rows_in_group(batch: int, wanted: int, devices: int) -> int:
  """Rows of the groups that a training batch of B rows is routed in.

  As many as wanted; on one device fewer where the batch is smaller. `devices`
  are those of the mesh axes data x expert.

  Raises:
    ValueError: Groups would not lie on one device each.
  """
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
  settings: experts.Settings,
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
  settings: experts.Settings,
  router: routing.Router,
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
  plans = jax.vmap(router.plan, in_axes=(0, 0, None))(
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
  change = experts.run_slots(settings, slots, params["experts"], keep)
  if exchange:
    change = lax.all_to_all(change, "expert", 1, 0, tiled=True)
  change = moves.combine(change)
  num_selected = router.num_selected_experts
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
  settings: experts.Settings,
  router: routing.Router,
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
  choice = router.choose(
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
    change = experts.run_tokens(
      settings, gather(tokens), expert, params["experts"], key
    )
    change = lax.psum_scatter(change, "expert", scatter_dimension=0, tiled=True)
  else:
    change = experts.run_tokens(
      settings, tokens, expert, params["experts"], key
    )
  out = _residual(h, gate, change)
  metrics = _metrics(settings, affinities, mask, choice.expert[:, 0])
  metrics["auxiliary_loss"] = jnp.float32(0.0)
  metrics["prices"] = prices
  return out, metrics


def _affinities(h: jax.Array, centroids: jax.Array) -> jax.Array:
  """`h . w_e`, [B, L, E] float32, in full precision whatever the type of h."""
  return jnp.einsum(
    "bld,ed->ble",
    h.astype(jnp.float32),
    centroids,
    precision=lax.Precision.HIGHEST,
  )


def _gate(
  params: dict[str, jax.Array], raw: jax.Array, mask: jax.Array
) -> jax.Array:
  """Gates [N, K] of raw ones [N, K]; a token's experts share the bias."""
  gate = params["bias"] / raw.shape[1] + params["scale"] * raw
  return jnp.where(mask.reshape(-1, 1), gate, 0.0)


def _residual(h: jax.Array, gate: jax.Array, change: jax.Array) -> jax.Array:
  """`h + sum_k g_k change_k`: [B, L, D], [N, K], [N, K, D] to [B, L, D]."""
  change = jnp.sum(gate[:, :, None] * change.astype(jnp.float32), axis=1)
  out = h.astype(jnp.float32) + change.reshape(h.shape)
  return out.astype(h.dtype)


def _sum(settings: experts.Settings, value: jax.Array) -> jax.Array:
  """Sum over the devices that hold different rows."""
  return value if settings.mesh is None else lax.psum(value, _BATCH_AXES)


def _metrics(
  settings: experts.Settings,
  affinities: jax.Array,
  mask: jax.Array,
  expert: jax.Array,
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
  settings: experts.Settings,
  key: jax.Array,
  groups: int,
  sublayer: int,
  shape: Any,
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
