"""What only a GPU can show: `TEST_PLATFORM=cuda pytest -n0 tests/gpu_test.py`.

Fast paths that are on for GPUs alone, against the plain ones on the same GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basemt_jax import assignment, base_layer, layers, partitioning
from basemt_jax.kernels import assignment_kernels, attention_kernels

pytestmark = [
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
  # JAX 0.11 says so of every kernel; what is to follow it is not there yet.
  pytest.mark.filterwarnings("ignore:The Pallas Triton backend"),
]


@pytest.mark.parametrize("length", [64, 128, 192, 256])
def test_attention_gradients_with_low_scores_and_padding(length):
  """All scores of a query near -150, and queries that may see nothing.

  The first feature alone makes scores low, by the same for all keys, so that
  it must not change the result; its own gradients cancel to rounding errors.
  """
  keys = jax.random.split(jax.random.key(length), 3)
  query, key, value = (jax.random.normal(k, (4, length, 4, 64)) for k in keys)
  query, key = query.at[..., 0].set(60.0), key.at[..., 0].set(-20.0)
  mask = jnp.ones((4, 1, length, length), bool)
  mask = layers.without_empty_rows(mask.at[:, :, -5:].set(False))

  def loss(implementation, dtype, query, key, value):
    out = jax.nn.dot_product_attention(
      *(x.astype(dtype) for x in (query, key, value)),
      mask=mask,
      implementation=implementation,
    )
    return jnp.sum(jnp.square(out[:, :-5].astype(jnp.float32)))

  picked = layers._implementation(
    query.astype(jnp.bfloat16), key.astype(jnp.bfloat16)
  )
  # The reference must not round products to tf32: 1e-3 of such scores is much.
  with jax.default_matmul_precision("float32"):
    found, expected = (
      jax.jit(jax.grad(functools.partial(loss, *how), argnums=(0, 1, 2)))(
        query, key, value
      )
      for how in ((picked, jnp.bfloat16), ("xla", jnp.float32))
    )
  for ours, plain in zip(found, expected, strict=True):
    assert np.isfinite(ours).all()
    ours, plain = ours[..., 1:], plain[..., 1:]
    assert np.linalg.norm(ours - plain) < 0.03 * np.linalg.norm(plain)


@pytest.mark.parametrize("lengths", [(64, 64), (16, 128), (100, 60)])
@pytest.mark.parametrize("width", [32, 64, 96])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_short_rows_against_the_plain_one(lengths, width, causal):
  """With packed rows, padding, and queries that see nothing."""
  keys = jax.random.split(jax.random.key(width), 4)
  query, key, value, towards = (
    jax.random.normal(k, (8, lengths[i], 4, width))
    for k, i in zip(keys, (0, 1, 1, 0), strict=True)
  )
  segments = [
    jnp.broadcast_to(jnp.arange(n) // 9 * (jnp.arange(n) < n - end), (8, n))
    for n, end in zip(lengths, (5, 0), strict=True)
  ]
  mask = layers.SegmentMask(*segments, causal)

  def loss(dtype, query, key, value):
    heads = [x.astype(dtype) for x in (query, key, value)]
    if dtype == jnp.bfloat16:
      assert attention_kernels.is_supported(*heads[:2])
      out = attention_kernels.attention(*heads, *segments, causal)
    else:
      out = jax.nn.dot_product_attention(*heads, mask=mask.array())
    return jnp.sum(towards * out.astype(jnp.float32)), out

  with jax.default_matmul_precision("float32"):
    found, expected = (
      jax.jit(
        jax.grad(
          functools.partial(loss, dtype), argnums=(0, 1, 2), has_aux=True
        )
      )(query, key, value)
      for dtype in (jnp.bfloat16, jnp.float32)
    )
  for ours, plain in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    ours = ours.astype(jnp.float32)
    assert np.isfinite(ours).all()
    assert np.linalg.norm(ours - plain) < 0.01 * np.linalg.norm(plain)


def scores(num_tokens, num_experts, seed):
  draw = np.random.default_rng(seed)
  centres = draw.normal(size=(20, num_experts))
  values = centres[draw.integers(0, 20, num_tokens)] + draw.normal(
    size=num_experts
  )
  return jnp.asarray(
    values + draw.normal(size=(num_tokens, num_experts)), jnp.float32
  )


@pytest.mark.parametrize(
  ("num_tokens", "num_experts"),
  [(1024, 8), (1000, 32), (4096, 64), (8192, 128)],
)
def test_assignment_kernels_against_the_plain_solver(
  num_tokens, num_experts, monkeypatch
):
  values = scores(num_tokens, num_experts, 0)
  mask = jnp.arange(num_tokens) < num_tokens - 37
  found = jax.jit(assignment.balanced_assignment)(values, mask)
  monkeypatch.setattr(assignment_kernels, "is_supported", lambda _: False)
  plain = jax.jit(lambda *given: assignment.balanced_assignment(*given))(
    values, mask
  )
  for result in (found, plain):
    load = np.bincount(result.expert[mask], minlength=num_experts)
    assert load.max() <= -(-num_tokens // num_experts)
    assert len(set(np.asarray(result.slot).tolist())) == num_tokens

  def worth(result):
    picked = jnp.take_along_axis(values, result.expert[:, None], axis=1)
    return float(jnp.mean(picked[mask]))

  random = float(values.mean())
  assert worth(found) - random >= 0.999 * (worth(plain) - random)


@pytest.mark.parametrize("train", [True, False])
def test_sharded_layer_equals_one_device(train):
  if jax.device_count() < 2:
    pytest.skip("needs 2 GPUs")
  h = jax.random.normal(jax.random.key(0), (64, 128, 64))
  out = {}
  for devices in (1, 2):
    mesh = partitioning.make_mesh(devices, 1, jax.devices()[:devices])
    layer = base_layer.BaseLayer(
      num_experts=8, mlp_dim=256, mesh=mesh if devices > 1 else None
    )
    variables = layer.init(jax.random.key(1), h, train=True)

    def loss(params, h, layer=layer, prices=variables["prices"]):
      y, _ = layer.apply(
        {"params": params, "prices": prices},
        h,
        train=train,
        mutable=["prices"],
      )
      return jnp.sum(jnp.square(y)), y

    with jax.default_matmul_precision("float32"), jax.set_mesh(mesh):
      out[devices] = jax.jit(jax.grad(loss, has_aux=True))(
        variables["params"], h
      )
  for ours, one in zip(*map(jax.tree.leaves, (out[2], out[1])), strict=True):
    scale = np.abs(one).max()
    np.testing.assert_allclose(ours, one, atol=1e-4 * scale)
