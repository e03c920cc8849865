"""Attention over short rows, interpreted, against the plain one."""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as nn_partitioning
from hypothesis import strategies as st

from basemt_jax import layers, partitioning
from basemt_jax.kernels import attention_kernels

# Few shapes, so that few programs are compiled: powers of two and not, both
# sides alike and not.
SHAPES = [(16, 16, 32), (20, 33, 24), (64, 16, 40)]
ROWS, HEADS = 3, 2


def plain(query, key, value, query_segments, key_segments, causal):
  mask = layers.SegmentMask(query_segments, key_segments, causal).array()
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation="xla"
  )


def fused(*operands):
  return attention_kernels.attention(*operands, True)


@functools.partial(jax.jit, static_argnums=(0, 4))
def with_gradients(function, heads, segments, towards, causal):
  """The output, and the gradients of its product with `towards`."""

  def loss(heads):
    out = function(*heads, *segments, causal)
    return jnp.sum(out.astype(jnp.float32) * towards), out

  gradients, out = jax.grad(loss, has_aux=True)(heads)
  return (out, *gradients)


def drawn(shape, seed, size=1.0):
  """Query, key and value, and what the output is multiplied by."""
  length_q, length_k, width = shape
  draw = np.random.default_rng(seed)
  query, key, value, towards = (
    jnp.asarray(draw.normal(size=(ROWS, n, HEADS, width)), jnp.float32)
    for n in (length_q, length_k, length_k, length_q)
  )
  return (size * query, key, value), towards


def segments_of(lengths, row_length):
  """Packed examples of these lengths, then padding."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:row_length]
  return np.pad(ids, (0, row_length - len(ids)))


packed = st.lists(
  st.lists(st.integers(0, 40), max_size=6), min_size=ROWS, max_size=ROWS
)


@hypothesis.example((20, 33, 24), [[], [], []], [[13], [], [18]], True, 100, 27)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.sampled_from(SHAPES),
  packed,
  packed,
  st.booleans(),
  st.sampled_from([0.1, 1.0, 100.0]),
  st.integers(0, 100),
)
def test_outputs_and_gradients_are_the_plain_ones(
  shape, query_lengths, key_lengths, causal, size, seed
):
  heads, towards = drawn(shape, seed, size)
  segments = [
    jnp.asarray([segments_of(x, n) for x in each], jnp.int32)
    for each, n in zip((query_lengths, key_lengths), shape[:2], strict=True)
  ]
  found = with_gradients(fused, heads, segments, towards, causal)
  expected = with_gradients(plain, heads, segments, towards, causal)
  with jax.enable_x64(True):
    doubled = jax.tree.map(lambda x: np.asarray(x, np.float64), heads)
    exact = with_gradients(plain, doubled, segments, towards, causal)
  every = (map(np.asarray, each) for each in (found, expected, exact))
  for ours, theirs, true in zip(*every, strict=True):
    # High scores leave of a gradient what float32 rounds away: there it is
    # as near to the exact one as the plain attention's in float32.
    rounded = 2 * np.abs(theirs - true).max()
    scale = np.abs(true).max()
    np.testing.assert_allclose(
      ours, true, rtol=1e-4, atol=max(2e-5 * scale, rounded)
    )


def test_queries_that_see_nothing_see_all_keys_alike():
  heads, towards = drawn((20, 33, 24), 0)
  segments = jnp.full((ROWS, 20), 2), jnp.full((ROWS, 33), 1)
  out, *gradients = with_gradients(fused, heads, segments, towards, False)
  mean = jnp.mean(heads[2], axis=1, keepdims=True)
  np.testing.assert_allclose(out, jnp.broadcast_to(mean, out.shape), atol=1e-6)
  # What is masked moves no score, whatever it is.
  assert not np.any(gradients[0]) and not np.any(gradients[1])
  mean = jnp.sum(towards, axis=1, keepdims=True) / 33
  np.testing.assert_allclose(
    gradients[2], jnp.broadcast_to(mean, heads[2].shape), atol=1e-6
  )


def test_bfloat16_is_as_near_to_exact_as_the_plain_one():
  """Weights and gradients are rounded in other places, but not more often."""
  heads, towards = drawn((64, 64, 32), 1)
  segments = [jnp.asarray([segments_of([30, 20], 64)] * ROWS)] * 2
  exact = with_gradients(plain, heads, segments, towards, True)
  heads = [x.astype(jnp.bfloat16) for x in heads]
  found = with_gradients(fused, heads, segments, towards, True)
  theirs = with_gradients(plain, heads, segments, towards, True)
  for ours, rounded, x in zip(found, theirs, exact, strict=True):
    assert ours.dtype == jnp.bfloat16
    errors = [
      np.linalg.norm(y.astype(jnp.float32) - x) / np.linalg.norm(x)
      for y in (ours, rounded)
    ]
    assert errors[0] < min(1.2 * errors[1], 0.01)


@pytest.mark.parametrize(
  ("shape", "dtype", "expected"),
  [
    ((100, 100, 64), jnp.bfloat16, True),
    ((60, 100, 128), jnp.float16, True),
    ((100, 100, 72), jnp.bfloat16, False),  # Needs 128 KiB, of 99.
    ((64, 64, 64), jnp.float32, False),
    ((1, 64, 64), jnp.bfloat16, False),
    ((64, 129, 64), jnp.bfloat16, False),
    ((64, 64, 36), jnp.bfloat16, False),
  ],
)
def test_shapes_that_kernels_take(shape, dtype, expected, monkeypatch):
  query, key = (
    jax.ShapeDtypeStruct((ROWS, n, HEADS, shape[2]), dtype) for n in shape[:2]
  )
  assert not attention_kernels.is_supported(query, key)  # There is no GPU.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert attention_kernels.is_supported(query, key) == expected


@pytest.fixture
def parts(monkeypatch):
  """Shapes of queries as kernels get them, with plain attention in place."""
  found = []

  def attention(*operands):
    found.append(operands[0].shape)
    return plain(*operands)

  monkeypatch.setattr(attention_kernels, "attention", attention)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  return found


@pytest.mark.parametrize(
  ("mesh", "rows", "expected"),
  [
    ((2, 1), 4, (1, 32, 4, 32)),
    ((1, 2), 4, (2, 32, 2, 32)),
    ((1, 8), 4, None),  # Eight devices cannot share four heads,
    ((2, 1), 3, None),  # nor four of them three rows.
    (None, 4, None),  # Nobody says where rows are.
  ],
)
def test_layer_on_a_mesh_uses_it_where_rows_and_heads_divide(
  mesh, rows, expected, parts, monkeypatch
):
  layer = layers.Attention(num_heads=4, head_dim=32, dtype=jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (rows, 32, 48))
  positions = jnp.tile(jnp.arange(16), (rows, 2))
  segments = jnp.asarray([segments_of([16, 9], 32)] * rows)
  mask = layers.SegmentMask(segments, segments, causal=True)
  params = layer.init(jax.random.key(1), x, x, None, positions)["params"]

  def loss(params, x):
    y = layer.apply({"params": params}, x, x, mask, positions)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  gradient: Any = jax.jit(jax.grad(loss, argnums=(0, 1)))
  if mesh is not None:
    devices = jax.devices()[: 4 if mesh[1] < 8 else 8]
    gradient = partitioning.Compiled(
      jax.grad(loss, argnums=(0, 1)), partitioning.make_mesh(*mesh, devices)
    )
  found = gradient(params, x)
  assert set(parts) == ({expected} if expected else set())
  monkeypatch.undo()
  theirs = jax.jit(jax.grad(lambda *args: loss(*args), argnums=(0, 1)))
  for ours, plain in zip(
    *map(jax.tree.leaves, (found, theirs(params, x))), strict=True
  ):
    assert np.linalg.norm(ours - plain) < 0.02 * np.linalg.norm(plain)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_kernels_are_called_on_gpus_of_a_mesh(sizes, monkeypatch):
  mesh = jax.sharding.AbstractMesh(
    sizes,
    partitioning.MESH_AXES,
    (jax.sharding.AxisType.Auto,) * 3,
    abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu"),
  )
  heads = jax.ShapeDtypeStruct((8, 100, 4, 48), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((8, 100), jnp.int32)

  def loss(query, key, value, *segments):
    mask = layers.SegmentMask(*segments)
    out = layers._attend(query, key, value, mask, None)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with (
    jax.sharding.use_abstract_mesh(mesh),
    nn_partitioning.axis_rules(partitioning.LOGICAL_AXIS_RULES),
  ):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
      *[heads] * 3, *[segments] * 2
    )
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
  for name in ("attention", "attention_backward"):
    assert program.count(f'name = "{name}"') == 1
