"""Layers of the encoder-decoder network: norm, embedding, attention, MLP.

Axes: B batch, L length (Lq queries, Lk keys), D model width, F feed-forward
width, H heads, K head width, V vocabulary.

Parameters are float32 and carry T5X's logical axis names (through
`flax.linen.partitioning`); computation runs in the layer's `dtype`, norms and
logits in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct, traverse_util
from flax.linen import partitioning as nn_partitioning

from basemt_jax import drawing
from basemt_jax.kernels import attention_kernels, kernel_call

Array = jax.Array

param_with_axes = nn_partitioning.param_with_axes
with_sharding_constraint = nn_partitioning.with_sharding_constraint


# Truncated normal with variance 1 / fan-in, for kernels [in, out].
kernel_init = drawing.Initializer(
  nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=()
  )
)
ones_init = drawing.Initializer(nn.initializers.ones)
zeros_init = drawing.Initializer(nn.initializers.zeros)
_embedding_init = drawing.Initializer(nn.initializers.normal(1.0))


def activation(name: str) -> Callable[[Array], Array]:
  """The activation function of this name: 'linear' or one of `jax.nn`'s."""
  if name == "linear":
    return lambda x: x
  function = getattr(jax.nn, name, None)
  if function is None:
    raise ValueError(
      f"activation {name!r} is neither 'linear' nor a function of jax.nn; "
      "use for example 'relu', 'gelu' or 'silu'"
    )
  return function


class Dense(nn.Module):
  """Product `y = x W` over the last axis, W [in, out] float32, no bias.

  Attributes:
    features: Width of the output.
    axes: Logical names of the kernel's two axes.
    dtype: Computation type; the output has it.
  """

  features: int
  axes: tuple[str, str]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [..., in] to [..., features]."""
    kernel = param_with_axes(
      "kernel", kernel_init, (x.shape[-1], self.features), axes=self.axes
    )
    return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
  """Scale by the root mean square (arXiv:1910.07467), as in T5: no bias.

  Statistics are float32 whatever the input; the output has `dtype`.
  """

  dtype: Any = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalises the last axis of [..., D]."""
    scale = param_with_axes("scale", ones_init, (x.shape[-1],), axes=("embed",))
    return rms_norm(x, scale, self.epsilon).astype(self.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float = 1e-6) -> Array:
  """`x / rms(x) * scale` in float32; x [..., D], scale broadcastable to x."""
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
  return x * jax.lax.rsqrt(mean_square + epsilon) * scale


class Embed(nn.Module):
  """Token embedding, shared with the output projection.

  Initialised with standard deviation 1; `attend` divides by sqrt(D), so that
  logits start with unit variance (T5's tied embedding).
  """

  num_embeddings: int
  features: int
  dtype: Any = jnp.float32

  def setup(self):
    """Creates the table [V, D]."""
    self.embedding = param_with_axes(
      "embedding",
      _embedding_init,
      (self.num_embeddings, self.features),
      axes=("vocab", "embed"),
    )

  def __call__(self, tokens: Array) -> Array:
    """Looks up int tokens [B, L]: [B, L, D] in `dtype`.

    Rounded after the look-up, so that the gradients of a frequent token, of
    which a batch has thousands, are summed in float32. In half precision the
    sum would lose most of them, and GPUs add colliding halves very slowly.
    """
    return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

  def attend(self, x: Array) -> Array:
    """Logits [B, L, V] float32 of x [B, L, D]."""
    x = (x * self.features**-0.5).astype(self.dtype)
    return _logits(x, self.embedding.astype(self.dtype))


@jax.custom_vjp
def _logits(x: Array, embedding: Array) -> Array:
  """Logits [B, L, V] float32 of [B, L, D] and [V, D], in the inputs' type.

  The gradient of logits is rounded to that type too, as that of any other
  layer's output: two of the three largest products of a network would
  otherwise run in float32.
  """
  return jnp.einsum(
    "bld,vd->blv", x, embedding, preferred_element_type=jnp.float32
  )


def _logits_forward(x, embedding):
  return _logits(x, embedding), (x, embedding)


def _logits_backward(saved, cotangent):
  x, embedding = saved
  cotangent = cotangent.astype(x.dtype)
  return (
    jnp.einsum("blv,vd->bld", cotangent, embedding),
    jnp.einsum("blv,bld->vd", cotangent, x),
  )


_logits.defvjp(_logits_forward, _logits_backward)


class MlpBlock(nn.Module):
  """Feed-forward `wo(drop(act(wi x)))`, or gated: `act(wi_0 x) * wi_1 x`.

  Attributes:
    mlp_dim: F.
    activations: One name: plain. Two names: their product (gated, as
      ('gelu', 'linear') in T5.1.1 or ('silu', 'linear') in SwiGLU).
    dropout_rate: On the hidden units.
    dtype: Computation type.
  """

  mlp_dim: int
  activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, keep: Array | None = None) -> Array:
    """Maps [B, L, D] to [B, L, D]; `keep` [B, 1, F]: see `dropout`."""
    hidden: Any = 1.0
    for i, name in enumerate(self.activations):
      y = Dense(
        self.mlp_dim,
        ("embed", "mlp"),
        self.dtype,
        name="wi" if len(self.activations) == 1 else f"wi_{i}",
      )(x)
      hidden = activation(name)(y) * hidden
    hidden = dropout(hidden, self.dropout_rate, keep)
    hidden = with_sharding_constraint(hidden, ("batch", "length", "mlp"))
    return Dense(x.shape[-1], ("mlp", "embed"), self.dtype, name="wo")(hidden)


def dropout(x: Array, rate: float, keep: Array | None) -> Array:
  """What is kept of x, scaled by 1 / (1 - rate).

  Args:
    x: [..., L, D].
    rate: Share that is dropped.
    keep: bool, broadcastable to x; None: all of x stays as it is. One mask for
      all positions, [..., 1, D], is T5's way, and saves random bits, whose
      generation is a visible share of a training step.
  """
  if keep is None:
    return x
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


# Self-attention, cross-attention, feed-forward, inserted experts.
MAX_SUBLAYERS = 4


def dropout_masks(
  key: Array, rate: float, rows: int, width: int, hidden: Sequence[int]
) -> tuple[Array, list[dict[str, Array]], Array]:
  """What dropout leaves in a stack of blocks, drawn at once.

  Every generator is a program longer than a block's, and masks are small.

  Args:
    key: Of all of them.
    rate: Share that is dropped.
    rows: B.
    width: D.
    hidden: F of each block.

  Returns:
    Bool [2, B, 1, D] for both ends of the stack; for every block `outputs`
    [MAX_SUBLAYERS, B, 1, D] and `hidden` [B, 1, F]; a key for every block.
  """

  def draw(key: Array, number: int, width: int) -> Array:
    keep = jax.random.bernoulli(key, 1.0 - rate, (number, rows, 1, width))
    return with_sharding_constraint(keep, (None, "batch", None, None))

  outputs, units, own = jax.random.split(key, 3)
  ends_and_outputs = draw(outputs, 2 + MAX_SUBLAYERS * len(hidden), width)
  unit_masks = {
    size: iter(draw(jax.random.fold_in(units, size), hidden.count(size), size))
    for size in sorted(set(hidden))
  }
  masks = []
  for i, size in enumerate(hidden):
    first = 2 + MAX_SUBLAYERS * i
    masks.append(
      {
        "outputs": ends_and_outputs[first : first + MAX_SUBLAYERS],
        "hidden": next(unit_masks[size]),
      }
    )
  return ends_and_outputs[:2], masks, jax.random.split(own, len(hidden))


def rotary_embedding(x: Array, positions: Array) -> Array:
  """Rotates query or key heads by position (RoFormer, arXiv:2104.09864).

  Scores then depend on the distance of two positions alone. Unlike an
  additive bias this costs no [H, Lq, Lk] array, so every fused attention
  kernel can be used.

  Args:
    x: [B, L, H, K], K even.
    positions: [B, L] int32.

  Returns:
    Rotated x, same shape and dtype; angles are computed in float32.
  """
  half = x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  first, second = x[..., :half], x[..., half:]
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@struct.dataclass
class SegmentMask:
  """Which keys the queries of packed rows see: those of their own segment.

  Attributes:
    queries: [B, Lq] int32 segments, 0 for padding.
    keys: [B, Lk] int32.
    causal: Whether a query sees only keys at or before its index.
  """

  queries: Array
  keys: Array
  causal: bool = struct.field(pytree_node=False, default=False)

  def array(self) -> Array:
    """[B, 1, Lq, Lk] bool.

    Padding sees padding; where there is none on the side of the keys, a row is
    empty.
    """
    mask = self.queries[:, :, None] == self.keys[:, None, :]
    if self.causal:
      length_q, length_k = self.queries.shape[1], self.keys.shape[1]
      order = jnp.arange(length_q)[:, None] >= jnp.arange(length_k)[None, :]
      mask = mask & order[None]
    return mask[:, None]


class Attention(nn.Module):
  """Multi-head dot-product attention with a cache for decoding.

  Attributes:
    num_heads: H; this and the next two are the network's.
    head_dim: K.
    dtype: Computation type.
    implementation: Of `jax.nn.dot_product_attention`, 'xla' or 'cudnn'; None:
      a fused kernel where one can run, cuDNN's or, for short rows,
      `attention_kernels`', else XLA.
  """

  num_heads: int = 8
  head_dim: int = 64
  dtype: Any = "float32"
  implementation: Any = None

  @nn.compact
  def __call__(
    self,
    inputs_q: Array,
    inputs_kv: Array,
    mask: SegmentMask | Array | None,
    positions: Array | None = None,
    *,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> Array:
    """Attends from inputs_q to inputs_kv.

    Args:
      inputs_q: [B, Lq, D].
      inputs_kv: [B, Lk, D].
      mask: That of packed rows, or bool, broadcastable to [B, H, Lq, Lk];
        True: attend.
      positions: [B, L] int32 for self-attention (rotary); None for
        cross-attention, which has no positions.
      decode: One token a step (Lq = 1). Self-attention keeps `cached_key`,
        `cached_value` [B, max_decode_length, H, K] and `cache_index` [] in
        the collection `cache` and ignores `mask` and `positions`;
        cross-attention keeps its keys and values in `memory`, computed once
        from inputs_kv while that collection is mutable.
      max_decode_length: Length of the cache, needed when it is created.

    Returns:
      [B, Lq, D] in `dtype`.
    """

    def heads(name: str, x: Array) -> Array:
      width = self.num_heads * self.head_dim
      y = Dense(width, ("embed", "joined_kv"), self.dtype, name=name)(x)
      y = y.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
      return with_sharding_constraint(y, ("batch", "length", "heads", "kv"))

    query = heads("query", inputs_q)
    if positions is None and decode:
      key, value = self._memory(heads, inputs_kv)
    else:
      key, value = heads("key", inputs_kv), heads("value", inputs_kv)
    if positions is not None:
      if decode:
        query, key, value, mask = self._update_cache(
          query, key, value, max_decode_length
        )
      else:
        query = rotary_embedding(query, positions)
        key = rotary_embedding(key, positions)
    y = _attend(query, key, value, mask, self.implementation)
    y = y.reshape(*inputs_q.shape[:-1], self.num_heads * self.head_dim)
    return Dense(
      inputs_q.shape[-1], ("joined_kv", "embed"), self.dtype, name="out"
    )(y)

  def _memory(self, heads, inputs_kv: Array) -> tuple[Array, Array]:
    """Keys and values of the source: computed once, then read."""
    key = self.variable("memory", "memory_key", lambda: heads("key", inputs_kv))
    value = self.variable(
      "memory", "memory_value", lambda: heads("value", inputs_kv)
    )
    return key.value, value.value

  def _update_cache(
    self, query: Array, key: Array, value: Array, max_length: int | None
  ) -> tuple[Array, Array, Array, Array]:
    """Writes one step's key and value; returns all, and the causal mask."""
    is_filled = self.has_variable("cache", "cached_key")
    if not is_filled and max_length is None:
      raise ValueError("creating a decoding cache needs max_decode_length")
    shape = (key.shape[0], max_length or 0, *key.shape[2:])
    cached_key = self.variable(
      "cache", "cached_key", jnp.zeros, shape, key.dtype
    )
    cached_value = self.variable(
      "cache", "cached_value", jnp.zeros, shape, value.dtype
    )
    index = self.variable(
      "cache", "cache_index", lambda: jnp.zeros((), jnp.int32)
    )
    step = index.value
    position = jnp.full((key.shape[0], 1), step)
    query = rotary_embedding(query, position)
    if is_filled:
      start = (0, step, 0, 0)
      cached_key.value = jax.lax.dynamic_update_slice(
        cached_key.value, rotary_embedding(key, position), start
      )
      cached_value.value = jax.lax.dynamic_update_slice(
        cached_value.value, value, start
      )
      index.value = step + 1
    length = cached_key.value.shape[1]
    mask = (jnp.arange(length) <= step)[None, None, None]
    return query, cached_key.value, cached_value.value, mask


def _attend(
  query: Array,
  key: Array,
  value: Array,
  mask: SegmentMask | Array | None,
  implementation: Any,
) -> Array:
  """What heads [B, Lq, H, K] get from those of keys and values."""
  if isinstance(mask, SegmentMask):
    fused = _short_rows(query, key, mask.causal)
    if implementation is None and fused is not None:
      return fused(query, key, value, mask.queries, mask.keys)
    mask = mask.array()
  implementation = implementation or _implementation(query, key)
  if implementation == "cudnn" and mask is not None:
    shape = (*mask.shape[:2], query.shape[1], key.shape[1])
    mask = jnp.broadcast_to(mask, shape)  # cuDNN does not broadcast these.
    mask = without_empty_rows(mask)
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation=implementation
  )


def _short_rows(
  query: Array, key: Array, causal: bool
) -> Callable[..., Array] | None:
  """`attention_kernels.attention` on the devices of the mesh, if it can run.

  Every device works on its rows and heads, so their numbers must divide. With
  several devices and no mesh nobody says what is where, and a kernel would be
  given all rows on every device.
  """
  if not attention_kernels.is_supported(query, key):
    return None
  if _implementation(query, key) == "cudnn":
    return None

  def attention(*operands: Array) -> Array:
    return attention_kernels.attention(*operands, causal)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and jax.device_count() > 1:
    return None
  if mesh.size <= 1 or mesh.manual_axes:  # Manual: already on one device.
    return attention
  heads: Any = nn_partitioning.logical_to_mesh_axes(
    ("batch", "length", "heads", "kv")
  )
  ways = [_ways(mesh, axes) for axes in heads]
  if any(size % n for size, n in zip(query.shape, ways, strict=True)):
    return None
  rows = jax.sharding.PartitionSpec(heads[0])
  return jax.shard_map(
    attention, in_specs=(heads,) * 3 + (rows,) * 2, out_specs=heads
  )


def _ways(mesh: Any, axes: Any) -> int:
  """Parts of an array's axis that is split over axes of the mesh, or None."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


# Queries and keys that cuDNN's fused attention handles at a time.
_FUSED_TILE = 128


def _implementation(query: Array, key: Array) -> str:
  """'cudnn' on GPUs for what its fused attention takes, else 'xla'.

  The fused kernel does not write scores [B, H, Lq, Lk] to memory. It takes
  half precision only, and here whole tiles of 128: on rows of 64 its gradients
  became NaN in the course of training. That fits a backward pass that works out
  the weights exp(0 - log Z) of keys beyond the end of the last tile too, which
  overflow once all scores of a query are below -88.
  """
  _, length, _, width = query.shape
  fits = (
    kernel_call.can_run()
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and width % 8 == 0
    and width <= 128
    and length % _FUSED_TILE == 0
    and key.shape[1] % _FUSED_TILE == 0
  )
  return "cudnn" if fits else "xla"


def without_fusion(attention: nn.Module) -> nn.Module:
  """The same attention by XLA, for a search.

  A search with cuDNN's attention in it works in the process that compiled it,
  but dies in the next one that finds it in the compilation cache: its plan is
  then read while a CUDA graph is recorded (jax 0.11.2, H100).
  """
  if getattr(attention, "implementation", "xla") is not None:
    return attention
  return attention.clone(implementation="xla")


def without_empty_rows(mask: Array) -> Array:
  """Lets queries that may see no key at all see every key.

  Padding of the target is such a query where the source has no padding. Its
  output is of no consequence, but cuDNN's gradients of such a query are NaN.

  Args:
    mask: [..., Lq, Lk] bool.
  """
  return mask | ~jnp.any(mask, axis=-1, keepdims=True)


def segments_of(tokens: Array, segment_ids: Array | None) -> Array:
  """Segment ids [B, L]; without packing, 1 on tokens and 0 on padding."""
  if segment_ids is None:
    return (tokens > 0).astype(jnp.int32)
  return segment_ids


def positions_of(tokens: Array, positions: Array | None) -> Array:
  """Positions [B, L]; without packing, 0 to L - 1."""
  if positions is None:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  return positions


def rounded(params: Any, dtype: str) -> Any:
  """Parameters with every matrix in the type it is multiplied in.

  What does not learn need not keep what a product rounds away: in half
  precision a model takes half the memory, and decoding, which reads all
  weights for few tokens, half the traffic. Norms, centroids and gates are used
  in float32 and stay so, and what is kept in half precision stays that, too.

  Args:
    params: Nested dict of arrays, or of `jax.ShapeDtypeStruct`.
    dtype: Its name, as `TransformerConfig.dtype`.

  Returns:
    Parameters of the same function, placed as they were.
  """

  def cast(path: tuple[str, ...], x: Any) -> Any:
    widens = jnp.dtype(dtype).itemsize > x.dtype.itemsize
    if path[-1] not in ("kernel", "embedding") or widens:
      return x
    if isinstance(x, jax.ShapeDtypeStruct):
      return x.update(dtype=dtype)
    return x.astype(dtype)

  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({k: cast(k, x) for k, x in flat.items()})
