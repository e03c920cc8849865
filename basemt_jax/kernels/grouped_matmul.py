"""Products of blocks of rows with their experts' matrices, on GPUs.

Axes: R blocks, M rows of a block, E experts, K inner width, N outer width.

Rows come in blocks of one expert each, and one kernel does the work of all
blocks: every program multiplies one block with a tile of its expert's matrix,
which it reads where it lies. Nothing depends on the blocks' experts but the
addresses, so that skew costs nothing, no weight is copied, and float32 weights
are rounded to the rows' type tile by tile. (XLA's alternatives: a loop over
blocks asks the host in every round, and `lax.ragged_dot` multiplies every row
with every expert.)

Written in Pallas for Triton. `grouped_matmul_reference` is the plain form.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from basemt_jax import layers
from basemt_jax.kernels import kernel_call

# The matrix units take at least 16 rows; more than 128 only cost registers.
_MIN_BLOCK, _MAX_BLOCK = 16, 128
_MIN_TILE = 16
# From so many rows of an expert on, it is quicker to round its weights once
# than in every block again.
_ROUND_ONCE = 512
# With fewer programs than multiprocessors (132 of an H200), narrower tiles.
_FEW_PROGRAMS = 128
# Neighbouring programs share tiles of weights for so many blocks of rows, whose
# rows then stay in the cache.
_SWIZZLE = 16


def is_supported(width: int, hidden: int) -> bool:
  """Whether both widths divide into the kernel's tiles."""
  return width % 64 == 0 and hidden % 64 == 0


def block_size(num_rows: int, num_experts: int) -> int:
  """Rows of a block, a power of two: an expert's even share, in bounds."""
  share = max(num_rows // num_experts, 1)
  size = 1 << (share - 1).bit_length()
  return min(max(size, _MIN_BLOCK), _MAX_BLOCK)


def round_once(num_rows: int, num_experts: int) -> bool:
  """Whether to convert weights to the rows' type before `grouped_matmul`."""
  return num_rows >= _ROUND_ONCE * num_experts


def grouped_matmul_reference(
  x: jax.Array,
  weights: Sequence[jax.Array],
  activations: Sequence[str],
  block_expert: jax.Array,
) -> jax.Array:
  """What `grouped_matmul` computes, with a copy of the weights per block."""
  result = None
  for weight, name in zip(weights, activations, strict=True):
    matrices = weight[block_expert].astype(x.dtype)
    part = jnp.einsum(
      "rmk,rkn->rmn", x, matrices, preferred_element_type=jnp.float32
    )
    part = layers.activation(name)(part)
    result = part if result is None else result * part
  assert result is not None
  return result.astype(x.dtype)


def grouped_matmul(
  x: jax.Array,
  weights: Sequence[jax.Array],
  activations: Sequence[str],
  block_expert: jax.Array,
  used: jax.Array,
  *,
  tiles: tuple[int, int, int, int] | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`prod_i activation_i(x W_i[e])` for every block of rows, e its expert.

  Sums, activations and their product are float32. Not differentiable.

  Args:
    x: [R, M, K], M a power of two of at least 16.
    weights: Each [E, K, N], of any float type; used in x's type.
    activations: A name as in `layers.activation` for each.
    block_expert: [R] int32.
    used: [] int32; blocks from this one on are skipped and left undefined.
    tiles: Columns and depth of a tile, warps and pipeline stages; for tuning.
    interpret: Run without a GPU, slowly, for tests.

  Returns:
    [R, M, N] in x's type.
  """
  num_blocks, block, depth = x.shape
  columns = weights[0].shape[2]
  if tiles is None:
    tiles = _tiles(x, weights)
  tile_n, tile_k, warps, stages = tiles
  tile_n = math.gcd(tile_n, columns)
  tile_k = math.gcd(tile_k, depth)
  return kernel_call.run(
    functools.partial(
      _kernel,
      activations=tuple(activations),
      num_blocks=num_blocks,
      tile_n=tile_n,
      tile_k=tile_k,
    ),
    jax.ShapeDtypeStruct((num_blocks, block, columns), x.dtype),
    (block_expert, used.reshape(1), x, *weights),
    grid=(num_blocks * (columns // tile_n),),
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    name="grouped_matmul",
  )


def _tiles(
  x: jax.Array, weights: Sequence[jax.Array]
) -> tuple[int, int, int, int]:
  """Columns and depth of a tile, warps, stages, as measured on an H200.

  GPUs with less shared memory have fewer stages; all but one are held there.
  """
  num_blocks, block, _ = x.shape
  columns, depth, warps, stages = 128, 64, 4, 4
  if block >= 128:
    columns, warps, stages = 256, 8, 3
  elif num_blocks * weights[0].shape[2] < _FEW_PROGRAMS * columns:
    columns, depth, stages = 32, 128, 3
  # One running sum for each weight, and twice the bytes for float32 rows.
  columns //= len(weights)
  if x.dtype.itemsize > 2:
    columns, depth = columns // 2, depth // 2
  columns = max(columns, _MIN_TILE)
  held = depth * (
    block * x.dtype.itemsize + columns * sum(w.dtype.itemsize for w in weights)
  )
  stages = min(stages, 1 + kernel_call.shared_memory() // held)
  return columns, depth, warps, stages


def _kernel(
  expert_ref,
  used_ref,
  x_ref,
  *refs,
  activations: tuple[str, ...],
  num_blocks: int,
  tile_n: int,
  tile_k: int,
) -> None:
  """One block of rows times one tile of columns."""
  *weight_refs, out_ref = refs
  _, block, depth = x_ref.shape
  num_tiles = out_ref.shape[2] // tile_n
  # Programs in order: for every bundle of blocks, for every tile of columns,
  # for every block of the bundle.
  program = pl.program_id(0)
  first = program // (_SWIZZLE * num_tiles) * _SWIZZLE
  bundle = jnp.minimum(num_blocks - first, _SWIZZLE)
  place = program % (_SWIZZLE * num_tiles)
  row = first + place % bundle
  column = pl.ds(place // bundle * tile_n, tile_n)

  @pl.when(row < used_ref[0])
  def multiply():
    expert = expert_ref[row]

    def body(k, sums):
      inner = pl.ds(k * tile_k, tile_k)
      rows = x_ref[row, :, inner]
      parts = (
        jnp.dot(
          rows,
          ref[expert, inner, column].astype(rows.dtype),
          preferred_element_type=jnp.float32,
        )
        for ref in weight_refs
      )
      return tuple(a + b for a, b in zip(sums, parts, strict=True))

    sums = lax.fori_loop(
      0,
      depth // tile_k,
      body,
      tuple(jnp.zeros((block, tile_n), jnp.float32) for _ in weight_refs),
    )
    result = None
    for total, name in zip(sums, activations, strict=True):
      part = layers.activation(name)(total)
      result = part if result is None else result * part
    out_ref[row, :, column] = result.astype(out_ref.dtype)
