"""The grouped product's kernel, interpreted, against a plain product."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basemt_jax import base_layer, experts
from basemt_jax.kernels import grouped_matmul, kernel_call

E, K, N, M = 4, 64, 128, 16

# Tokens of each expert.
LOADS = {
  "random": (21, 3, 40, 16),
  "all to one": (0, 0, 70, 0),
  "one token": (0, 1, 0, 0),
  "none": (0, 0, 0, 0),
}


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
@pytest.mark.parametrize("load", LOADS)
def test_kernel_matches_products_of_blocks(load, activations):
  draw = np.random.default_rng(0)
  owner = [e for e, n in enumerate(LOADS[load]) for _ in range(-(-n // M))]
  used = len(owner)
  block_expert = jnp.asarray(owner + [E - 1] * 2, jnp.int32)
  x = draw.normal(size=(used + 2, M, K)).astype(np.float32)
  weights = [draw.normal(size=(E, K, N)) for _ in activations]
  weights = [jnp.asarray(w, jnp.float32) for w in weights]
  out = grouped_matmul.grouped_matmul(
    jnp.asarray(x),
    weights,
    activations,
    block_expert,
    jnp.int32(used),
    tiles=(32, 16, 4, 3),
    interpret=True,
  )
  for i, e in enumerate(owner):
    expected = x[i] @ np.asarray(weights[0][e])
    if len(activations) == 1:
      expected = np.maximum(expected, 0)
    else:
      expected = jax.nn.gelu(expected) * (x[i] @ np.asarray(weights[1][e]))
    np.testing.assert_allclose(out[i], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("load", LOADS)
def test_layer_with_kernel_matches_the_loop(load, dtype, monkeypatch):
  kernel = grouped_matmul.grouped_matmul
  monkeypatch.setattr(
    grouped_matmul,
    "grouped_matmul",
    lambda *args: kernel(*args, interpret=True),
  )
  expert = np.repeat(np.arange(E), LOADS[load])
  expert = np.random.default_rng(1).permutation(expert)
  expert = np.append(expert, [E, E])  # Two tokens have nothing to do here.
  layer = base_layer.BaseLayer(
    E, N, num_sublayers=2, activations=("gelu", "linear"), dtype=dtype
  )
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = jax.random.normal(keys[0], (len(expert), K), dtype)
  variables = layer.init(keys[1], tokens[None], train=True)
  weights = [
    {
      "norm": 1.5 * sublayer["layer_norm"]["scale"],
      "wi": [sublayer[f"wi_{i}"]["kernel"] for i in range(2)],
      "wo": sublayer["wo"]["kernel"],
    }
    for sublayer in variables["params"]["experts"].values()
  ]
  cotangent = jax.random.normal(keys[2], (len(expert), 1, K), dtype)

  def run(has_kernel):
    monkeypatch.setattr(experts, "_has_kernel", lambda _: has_kernel)

    @jax.jit
    def there_and_back(tokens, weights):
      out, backward = jax.vjp(
        lambda x, w: experts.run_tokens(
          layer._settings(), x, jnp.asarray(expert[:, None], jnp.int32), w, None
        ),
        tokens,
        weights,
      )
      return out, backward(cotangent)

    return there_and_back(tokens, weights)

  actual, expected = run(True), run(False)
  np.testing.assert_array_equal(actual[0][expert == E], 0)
  tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-6


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernel_lowers_for_cuda_without_a_gpu(dtype):
  def product(x, w):
    block_expert = jnp.zeros(3, jnp.int32)
    return grouped_matmul.grouped_matmul(
      x, [w], ["relu"], block_expert, jnp.int32(2)
    )

  x = jnp.zeros((3, M, K), dtype)
  w = jnp.zeros((E, K, N), jnp.float32)
  gpu = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu"),
  )
  with jax.sharding.use_abstract_mesh(gpu):
    lowered = jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",))
  assert "grouped_matmul" in lowered.as_text()


@pytest.mark.parametrize(
  ("num_rows", "size"), [(1, 16), (200, 32), (512, 64), (10**5, 128)]
)
def test_block_size(num_rows, size):
  assert grouped_matmul.block_size(num_rows, 8) == size


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_layer_on_a_mesh_matches_one_device(sizes, monkeypatch):
  devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
  mesh = jax.sharding.Mesh(devices, ("data", "expert", "model"))
  options = {"num_sublayers": 2, "activations": ("gelu", "linear")}
  alone = base_layer.BaseLayer(E, N, **options)
  sharded = base_layer.BaseLayer(E, N, **options, mesh=mesh)
  keys = jax.random.split(jax.random.key(0), 3)
  h = jax.random.normal(keys[0], (4, 12, K))
  mask = jax.random.bernoulli(keys[1], 0.8, h.shape[:2])
  variables = alone.init(keys[2], h, train=True)

  def loss(layer, variables, h):
    out = layer.apply(variables, h, mask, train=False)
    return jnp.sum(jnp.sin(out)), out

  def run(layer):
    compute = jax.value_and_grad(
      functools.partial(loss, layer), argnums=(0, 1), has_aux=True
    )
    (_, out), gradient = jax.jit(compute)(variables, h)
    return out, gradient

  expected = run(alone)
  # Gradients, and the types that shard_map checks, with the plain product.
  monkeypatch.setattr(experts, "_has_kernel", lambda _: True)
  kernel = grouped_matmul.grouped_matmul
  monkeypatch.setattr(
    grouped_matmul,
    "grouped_matmul",
    lambda *args: grouped_matmul.grouped_matmul_reference(*args[:-1]),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    run(sharded),
    expected,
  )
  # The kernel itself. Pallas's interpreter mixes what varies over devices with
  # constants, so that types go unchecked; `kernel_call_test` checks them.
  monkeypatch.setattr(
    grouped_matmul,
    "grouped_matmul",
    functools.partial(kernel, interpret=True),
  )
  monkeypatch.setattr(
    jax, "shard_map", functools.partial(jax.shard_map, check_vma=False)
  )
  out = jax.jit(lambda *args: loss(sharded, *args)[1])(variables, h)
  np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("kibibytes", "block", "dtype", "stages"),
  [
    (227, 128, jnp.float32, 3),
    (227, 64, jnp.float32, 4),
    (99, 128, jnp.float32, 2),
    (99, 64, jnp.float32, 3),
    (99, 128, jnp.bfloat16, 3),
  ],
)
def test_stages_fit_into_shared_memory(
  kibibytes, block, dtype, stages, monkeypatch
):
  monkeypatch.setattr(kernel_call, "shared_memory", lambda: 1024 * kibibytes)
  x = jax.ShapeDtypeStruct((48, block, 512), jnp.bfloat16)
  weights = [jax.ShapeDtypeStruct((16, 512, 2048), dtype)]
  columns, depth, _, found = grouped_matmul._tiles(x, weights)
  assert found == stages
  held = depth * (2 * block + dtype.dtype.itemsize * columns)
  assert (found - 1) * held <= 1024 * kibibytes
