"""Attention over rows of at most 128 tokens, for GPUs.

Axes: B rows, Lq queries, Lk keys, H heads, K head width.

XLA's plain attention writes scores [B, H, Lq, Lk] to memory, forward and
backward, and cuDNN's fused attention is not to be trusted with short rows. A
short row fits whole into one program: one for each row and head works out all
weights at once and writes what comes of them. The backward pass works the
weights out again, so that nothing but queries, keys and values is kept for it.

Written in Pallas for Triton. `jax.nn.dot_product_attention` with the mask of
`layers.SegmentMask` is the plain form.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from basemt_jax.kernels import kernel_call

# Matrix units take at least 16 rows and columns.
_MIN_LENGTH, _MAX_LENGTH = 16, 128
_MIN_WIDTH, _MAX_WIDTH = 32, 128
# Bytes of shared memory that a program can have on any GPU since Ampere. The
# backward pass holds queries, keys, values and what comes back there.
_SHARED_MEMORY = 99 * 1024
# What each warp has of the weights of a row and head.
_WEIGHTS_PER_WARP = 1024
_MAX_WARPS = 8
# As the plain attention scores what is masked: where that is all of a row, its
# weights are equal.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def is_supported(query: jax.Array, key: jax.Array) -> bool:
  """Whether `attention` can run here, for [B, Lq, H, K] and [B, Lk, H, K]."""
  width, lengths = query.shape[3], (query.shape[1], key.shape[1])
  held = 2 * sum(map(_padded, lengths)) * _padded(width) * query.dtype.itemsize
  return (
    kernel_call.can_run()
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and _MIN_WIDTH <= width <= _MAX_WIDTH
    and width % 8 == 0
    and all(_MIN_LENGTH <= length <= _MAX_LENGTH for length in lengths)
    and held <= _SHARED_MEMORY
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_segments: jax.Array,
  key_segments: jax.Array,
  causal: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Attention within segments: `softmax(q k^T / sqrt(K)) v`.

  Products are of the operands' type with float32 sums, the softmax is float32.
  A query without a key in its segment sees all keys alike.

  Args:
    query: [B, Lq, H, K].
    key: [B, Lk, H, K], of the same type.
    value: [B, Lk, H, K], of the same type.
    query_segments: [B, Lq] int32; a query sees keys of its segment only.
    key_segments: [B, Lk] int32.
    causal: Whether a query sees only keys at or before its index.
    interpret: Run without a GPU, slowly, for tests.

  Returns:
    [B, Lq, H, K] in the operands' type. Differentiable in the first three.
  """
  operands = (query, key, value, query_segments, key_segments)
  return _forward(*operands, causal, interpret)[0]


def _forward(
  query, key, value, query_segments, key_segments, causal, interpret
):
  operands = (query, key, value, query_segments, key_segments)
  out = _run(
    *(_forward_kernel, operands[:1], operands, causal, interpret),
    name="attention",
  )
  return out, operands


def _backward(causal, interpret, operands, gradient):
  given = (*operands, gradient)
  gradients = _run(
    *(_backward_kernel, operands[:3], given, causal, interpret),
    name="attention_backward",
  )
  return (*gradients, None, None)


attention.defvjp(_forward, _backward)


def _run(kernel, like, operands, causal, interpret, name) -> Any:
  """Runs a kernel on every row and head; `like` are arrays as the results."""
  query, key = operands[:2]
  rows, _, heads, _ = query.shape
  weights = _padded(query.shape[1]) * _padded(key.shape[1])
  warps = min(max(weights // _WEIGHTS_PER_WARP, 1), _MAX_WARPS)
  results = kernel_call.run(
    functools.partial(kernel, causal=causal),
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
    operands,
    # Heads of a row, neighbours in memory, run side by side.
    grid=(heads, rows),
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
    name=name,
  )
  return results if len(like) > 1 else results[0]


def _padded(size: int) -> int:
  """A power of two, as every size of a Triton array."""
  return max(1 << (size - 1).bit_length(), _MIN_LENGTH)


def _place(ref) -> tuple[Any, Any]:
  """Where in a reference [B, L, H, K] this program's part is, and its mask."""
  _, length, _, width = ref.shape
  token = jnp.arange(_padded(length), dtype=jnp.int32)[:, None]
  column = jnp.arange(_padded(width), dtype=jnp.int32)[None, :]
  # Without padding there is no mask to work out.
  mask = None
  if token.shape[0] > length or column.shape[1] > width:
    mask = (token < length) & (column < width)
  return ref.at[pl.program_id(1), token, pl.program_id(0), column], mask


def _load(ref) -> jax.Array:
  """The part [L, K] of this program, both a power of two, padded by 0."""
  place, mask = _place(ref)
  return triton.load(place, mask=mask, other=None if mask is None else 0.0)


def _store(ref, x: jax.Array) -> None:
  """Writes the part [L, K] of this program without padding."""
  place, mask = _place(ref)
  triton.store(place, x.astype(ref.dtype), mask=mask)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _weights(
  query: jax.Array,
  key: jax.Array,
  query_segments_ref,
  key_segments_ref,
  scale: float,
  causal: bool,
) -> tuple[jax.Array, jax.Array]:
  """A row and head's weights [Lq, Lk] float32, and which are not masked."""

  def segments(ref):
    length = ref.shape[1]
    index = jnp.arange(_padded(length), dtype=jnp.int32)
    is_token = index < length
    place = ref.at[pl.program_id(1), index]
    return index, is_token, triton.load(place, mask=is_token, other=0)

  query_index, _, query_segments = segments(query_segments_ref)
  key_index, is_key, key_segments = segments(key_segments_ref)
  seen = query_segments[:, None] == key_segments[None, :]
  if causal:
    seen &= query_index[:, None] >= key_index[None, :]
  seen &= is_key[None, :]
  hidden = jnp.where(is_key, _MASKED, -jnp.inf)
  scores = _product(query, key.T) * scale
  scores = jnp.where(seen, scores, hidden[None, :])
  weights = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
  return weights / jnp.sum(weights, axis=1)[:, None], seen


def _forward_kernel(
  query_ref,
  key_ref,
  value_ref,
  query_segments_ref,
  key_segments_ref,
  out_ref,
  *,
  causal: bool,
) -> None:
  """The output of one row and head."""
  weights, _ = _weights(
    _load(query_ref),
    _load(key_ref),
    query_segments_ref,
    key_segments_ref,
    query_ref.shape[3] ** -0.5,
    causal,
  )
  value = _load(value_ref)
  _store(out_ref, _product(weights.astype(value.dtype), value))


def _backward_kernel(
  query_ref,
  key_ref,
  value_ref,
  query_segments_ref,
  key_segments_ref,
  gradient_ref,
  query_gradient_ref,
  key_gradient_ref,
  value_gradient_ref,
  *,
  causal: bool,
) -> None:
  """The gradients of one row and head."""
  query, key = _load(query_ref), _load(key_ref)
  scale = query_ref.shape[3] ** -0.5
  weights, seen = _weights(
    query, key, query_segments_ref, key_segments_ref, scale, causal
  )
  gradient = _load(gradient_ref)
  _store(
    value_gradient_ref, _product(weights.T.astype(gradient.dtype), gradient)
  )
  of_weights = _product(gradient, _load(value_ref).T)
  mean = jnp.sum(weights * of_weights, axis=1)
  of_scores = weights * (of_weights - mean[:, None]) * scale
  of_scores = jnp.where(seen, of_scores, 0.0).astype(query.dtype)
  _store(query_gradient_ref, _product(of_scores, key))
  _store(key_gradient_ref, _product(of_scores.T, query))
