"""Optimizers, averaged weights and learning-rate schedules.

An optimizer is a function of the learning rate, as Optax's own are:
`optimizer(learning_rate=rate)` makes the `optax.GradientTransformation` whose
updates are added to the parameters. The training step calls it with the rate
of the *training* step. So any optimizer of Optax works by its own name, its
rate is applied once, and the schedule goes on through a conversion that resets
the optimizer's own state. T5X's trainer, which passes a rate too, drives the
same optimizer.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from basemt_jax import ranges, rounding

Optimizer = Callable[..., optax.GradientTransformation]
Rate = Any  # A float, or a float32 [] of the step's trace.
Schedule = Callable[..., float]
Tree = Any


def adamw(
  learning_rate: Rate,
  b1: ranges.Fraction = 0.9,
  b2: ranges.Fraction = 0.98,
  eps: ranges.NotNegative = 1e-9,
  weight_decay: ranges.Decay = 0.0,
  max_grad_norm: ranges.Positive | None = 1.0,
  moments: Literal["float32", "bfloat16"] = "float32",
  expert_moments: Literal["full", "by_neuron"] = "full",
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (arXiv:1711.05101) and clipping.

  The defaults for b2 and eps are those of translation models
  (arXiv:1706.03762).

  Args:
    learning_rate: Scales the updates.
    b1: Decay of the mean of gradients.
    b2: Decay of the mean of squared gradients.
    eps: Added to the root.
    weight_decay: Per step and unit of learning rate; of arrays with two
      axes or more.
    max_grad_norm: Global norm gradients are clipped to; None: not clipped.
    moments: Type in which both means are kept between steps. In bfloat16 they
      are rounded up or down at random, so that small changes are kept on
      average; the state is half as large.
    expert_moments: 'by_neuron': of experts' matrices nothing is kept but the
      mean of squared gradients of each output, over its inputs (as in
      Adam-mini, arXiv:2406.16793); so they have no `b1`. 'full' is 8 bytes a
      parameter.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if moments == "bfloat16":
    adam = _with_rounded_moments(adam)
  if expert_moments == "by_neuron":
    adam = _with_small_experts(adam, b2, eps, max_grad_norm)
    max_grad_norm = None  # It clips, so that gradients are read less often.
  return _chain(max_grad_norm, adam, weight_decay, learning_rate)


def _with_rounded_moments(
  adam: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Adam that computes in float32 and keeps its means in bfloat16."""

  def init(params: Tree) -> Any:
    state = adam.init(params)
    mean, square = optax.tree.cast((state.mu, state.nu), jnp.bfloat16)
    return state._replace(mu=mean, nu=square)

  def update(
    updates: Tree, state: Any, params: Tree = None
  ) -> tuple[Tree, Any]:
    mean, square = optax.tree.cast((state.mu, state.nu), jnp.float32)
    exact = state._replace(mu=mean, nu=square)
    updates, exact = adam.update(updates, exact, params)
    # Salts of their own for every parameter would make every kernel one of its
    # own, which takes the compiler longer than all of Adam.
    mean, square = (
      jax.tree.map(
        lambda x, salt=2 * state.count + i: rounding.round_at_random(x, salt),
        tree,
      )
      for i, tree in enumerate((exact.mu, exact.nu))
    )
    return updates, exact._replace(mu=mean, nu=square)

  return optax.GradientTransformation(init, update)


def _is_stack(x: Any) -> bool:
  """Whether a parameter is [E, M, N], a matrix for each expert."""
  return getattr(x, "ndim", 0) == 3


def _parts(like: Tree, tree: Tree) -> tuple[Tree, Tree]:
  """What a tree like the parameters has for experts' matrices, and the rest."""

  def part(of_experts: bool) -> Tree:
    return jax.tree.map(
      lambda p, x: x if _is_stack(p) == of_experts else optax.MaskedNode(),
      like,
      tree,
    )

  return part(True), part(False)


def _joined(of_experts: Tree, rest: Tree) -> Tree:
  """The tree whose parts these are."""

  def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)

  return jax.tree.map(
    lambda x, y: y if is_masked(x) else x, of_experts, rest, is_leaf=is_masked
  )


def _with_small_experts(
  adam: optax.GradientTransformation,
  b2: float,
  eps: float,
  max_grad_norm: float | None,
) -> optax.GradientTransformation:
  """Adam of clipped gradients, with a small state of experts' matrices.

  Of a parameter [E, M, N] `nu` is [E, N] float32, and there is no `mu`. The
  decay of `nu`, the correction of its bias and `eps` are Adam's own.

  Gradients of experts are read twice: for the sums that both `nu` and the norm
  are made of, and for the update.
  """

  def init(params: Tree) -> optax.ScaleByAdamState:
    experts, rest = _parts(params, params)
    state = adam.init(rest)
    square = jax.tree.map(lambda p: jnp.zeros_like(p[:, 0]), experts)
    return optax.ScaleByAdamState(
      state.count, state.mu, _joined(square, state.nu)
    )

  def update(
    updates: Tree, state: optax.ScaleByAdamState, params: Tree = None
  ) -> tuple[Tree, optax.ScaleByAdamState]:
    del params
    scale = jnp.ones((), jnp.float32)
    if max_grad_norm is not None:
      scale = _clipping(updates, max_grad_norm)
    (grads, rest), (square, nu) = (
      _parts(updates, tree) for tree in (updates, state.nu)
    )
    rest, (count, mu, nu) = adam.update(
      jax.tree.map(lambda g: scale * g, rest),
      optax.ScaleByAdamState(state.count, state.mu, nu),
    )
    square = jax.tree.map(
      lambda g, v: b2 * v + (1 - b2) * scale**2 * _column_sums(g) / g.shape[1],
      grads,
      square,
    )
    direction = jax.tree.map(
      lambda g, v: scale * g / (jnp.sqrt(v[:, None] / (1 - b2**count)) + eps),
      grads,
      square,
    )
    return _joined(direction, rest), optax.ScaleByAdamState(
      count, mu, _joined(square, nu)
    )

  return optax.GradientTransformation(init, update)


def adafactor(
  learning_rate: Rate,
  decay_rate: ranges.Fraction = 0.8,
  weight_decay: ranges.Decay = 0.0,
  max_grad_norm: ranges.Positive | None = None,
  min_dim_size_to_factor: ranges.Count = 128,
) -> optax.GradientTransformation:
  """Adafactor (arXiv:1804.04235): second moments factored by row and column.

  Updates are not scaled by the parameters' size, so the learning rate means
  the same as for `adamw`, as do decay and norm; updates are clipped to a root
  mean square of 1 in any case. `decay_rate` is the exponent of the decay of
  second moments, which smaller matrices keep in full.
  """
  return _chain(
    max_grad_norm,
    optax.chain(
      optax.scale_by_factored_rms(
        decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
      ),
      optax.clip_by_block_rms(1.0),
    ),
    weight_decay,
    learning_rate,
  )


def muon(
  learning_rate: Rate,
  momentum: ranges.Fraction = 0.95,
  b1: ranges.Fraction = 0.9,
  b2: ranges.Fraction = 0.98,
  eps: ranges.NotNegative = 1e-9,
  weight_decay: ranges.Decay = 0.0,
  max_grad_norm: ranges.Positive | None = 1.0,
  dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> optax.GradientTransformation:
  """Muon for matrices, each expert's its own; NAdam for everything else.

  Muon (https://kellerjordan.github.io/posts/muon) makes the momentum of a
  matrix orthogonal. Its updates are scaled to the root mean square 0.2 that
  Adam's have (arXiv:2502.16982), so the learning rate means the same as for
  `adamw`. Embeddings, centroids, gates and norms are NAdam's: both have
  Nesterov's momentum.

  `momentum` is the decay of the mean of a matrix's gradients. Matrices are made
  orthogonal in `dtype`: the iteration does not converge in any case, so
  bfloat16, the method's own, serves as well. CPUs, which multiply no faster in
  bfloat16, are quicker in float32. Other arguments are as of `adamw`.
  """
  direction = optax.partition(
    {
      "matrix": _orthogonal_momentum(momentum, eps, jnp.dtype(dtype)),
      "other": optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=True),
    },
    lambda params: jax.tree_util.tree_map_with_path(
      lambda path, p: (
        "matrix" if p.ndim >= 2 and path[-1].key == "kernel" else "other"
      ),
      params,
    ),
  )
  return _chain(max_grad_norm, direction, weight_decay, learning_rate)


class MomentumState(NamedTuple):
  """State of Muon's part.

  Attributes:
    updates: [] int32, how many so far.
    mean: Of gradients, like the parameters.
  """

  updates: jax.Array
  mean: Tree


def _orthogonal_momentum(
  decay: float, eps: float, dtype: jnp.dtype
) -> optax.GradientTransformation:
  """Nesterov's momentum, its matrices made orthogonal."""

  def init(params: Tree) -> MomentumState:
    return MomentumState(
      jnp.zeros((), jnp.int32), optax.tree.zeros_like(params)
    )

  def update(
    updates: Tree, state: MomentumState, params: Tree = None
  ) -> tuple[Tree, MomentumState]:
    del params
    count = state.updates + 1
    mean = optax.tree.update_moment(updates, state.mean, decay, 1)
    ahead = jax.tree.map(
      lambda m, g: decay * m + (1 - decay) * g,
      optax.tree.bias_correction(mean, decay, count + 1),
      optax.tree.bias_correction(updates, decay, count),
    )
    # All arrays of a shape at once: a few large products in place of hundreds
    # of small ones. A new first axis leaves the sharding of experts alone.
    leaves, treedef = jax.tree.flatten(ahead)
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
      of_shape.setdefault(leaf.shape, []).append(i)
    for indices in of_shape.values():
      stack = jnp.stack([leaves[i] for i in indices])
      for i, made in zip(indices, _orthogonal(stack, eps, dtype), strict=True):
        leaves[i] = made
    return jax.tree.unflatten(treedef, leaves), MomentumState(count, mean)

  return optax.GradientTransformation(init, update)


def _orthogonal(x: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
  """Nearly the closest orthogonal matrices, of root mean square 0.2.

  Of [..., M, N]: five steps of the quintic Newton-Schulz iteration with
  products in `dtype`; singular values come to about 0.7 to 1.2. `eps` is added
  to norms.
  """
  wide = x.shape[-2] <= x.shape[-1]
  made = x if wide else x.mT
  norm = jnp.sqrt(jnp.sum(jnp.square(made), (-2, -1), keepdims=True))
  made = (made / (norm + eps)).astype(dtype)
  short, long = made.shape[-2:]
  if dtype == jnp.float32 and 2 * short <= long:
    with jax.default_matmul_precision("float32"):
      made = _newton_schulz_factor(made @ made.mT) @ made
  else:
    for _ in range(5):
      made = 3.4445 * made + _mixed(made @ made.mT) @ made
  scale = 0.2 * max(x.shape[-2:]) ** 0.5
  return scale * (made if wide else made.mT).astype(x.dtype)


def _mixed(square: jax.Array) -> jax.Array:
  """What a step multiplies X by, less 3.4445: of the square X X^T."""
  return -4.775 * square + 2.0315 * (square @ square)


def _newton_schulz_factor(square: jax.Array) -> jax.Array:
  """What five steps together multiply X by, from the square X X^T.

  A step's factor P is a polynomial of the square, which becomes P X X^T P. So
  only one product more has the long side. It takes float32: errors of the
  square grow twelvefold a step.
  """
  identity = 3.4445 * jnp.eye(square.shape[-1], dtype=square.dtype)
  identity = jnp.broadcast_to(identity, square.shape)
  factor = step = identity + _mixed(square)
  for _ in range(4):
    square = step @ square @ step
    step = identity + _mixed(square)
    factor = step @ factor
  return factor


def _column_sums(x: jax.Array) -> jax.Array:
  """Sums of squares over rows, float32: [E, N] of [E, M, N]."""
  return jnp.sum(jnp.square(x.astype(jnp.float32)), -2)


def global_norm(gradients: Tree) -> jax.Array:
  """The norm of all gradients, [] float32."""

  def square(x: jax.Array) -> jax.Array:
    if not _is_stack(x):
      return jnp.sum(jnp.square(x.astype(jnp.float32)))
    # Without the barrier XLA makes one sum of both, and so reads what is most
    # of a sparse model once more where sums of columns are needed, too.
    return jnp.sum(jax.lax.optimization_barrier(_column_sums(x)))

  return jnp.sqrt(sum(map(square, jax.tree.leaves(gradients))))


def _clipping(gradients: Tree, max_norm: float) -> jax.Array:
  """What gradients are multiplied by so that their norm is at most that."""
  norm = global_norm(gradients)
  return jnp.where(norm < max_norm, 1.0, max_norm / norm)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Optax's transformation of that name, with this `global_norm`."""

  def update(updates: Tree, state: Any, params: Tree = None) -> Any:
    del params
    norm = global_norm(updates)
    clipped = jax.tree.map(
      lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), updates
    )
    return clipped, state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _chain(
  max_grad_norm: float | None,
  direction: optax.GradientTransformation,
  weight_decay: float,
  learning_rate: Rate,
) -> optax.GradientTransformation:
  parts = [direction]
  if max_grad_norm is not None:
    parts.insert(0, _clip_by_global_norm(max_grad_norm))
  if weight_decay:
    # Norm scales, gates and prices are not; experts' stacked norm scales and
    # centroids, [E, D], are taken for such, as in all that was measured.
    def matrices(params: Tree) -> Tree:
      return jax.tree.map(lambda p: p.ndim >= 2, params)

    parts.append(optax.add_decayed_weights(weight_decay, mask=matrices))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def map_moments(
  optimizer: optax.GradientTransformation,
  function: Callable[..., Any],
  state: Tree,
  *like_params: Tree,
  other: Any,
) -> Tree:
  """Maps an optimizer's state where it is of parameters.

  Args:
    optimizer: Whose state it is.
    function: Takes a leaf of the state and those of its parameter in
      `like_params`.
    state: The state, or its shapes.
    *like_params: Trees like the parameters.
    other: In place of leaves of no parameter, such as counts.
  """

  def mapped(leaf: Any, *rest: Any) -> Any:
    # Where an optimizer leaves a parameter to another one.
    if isinstance(leaf, optax.MaskedNode):
      return leaf
    return function(leaf, *rest)

  return optax.tree_utils.tree_map_params(
    optimizer,
    mapped,
    state,
    *like_params,
    transform_non_params=lambda _: other,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )


class AveragedState(NamedTuple):
  """State of `averaged`.

  Attributes:
    updates: [] int32, how many it is over.
    average: Like the parameters, float32.
    inner: State of the optimizer itself.
  """

  updates: jax.Array
  average: Tree
  inner: Tree


def averaged(
  optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
  """The optimizer, keeping an exponential average of the parameters.

  After update t the average moves by 1 - min(decay, (1 + t) / (10 + t)) of its
  distance to the new parameters: at first it spans the last ninth of the
  updates, later the last 1 / (1 - decay).
  """
  if not 0.0 < decay < 1.0:
    raise ValueError(f"the decay of averaged weights is {decay}, not in (0, 1)")

  def init(params: Tree) -> AveragedState:
    return AveragedState(
      jnp.zeros((), jnp.int32),
      jax.tree.map(jnp.copy, params),
      optimizer.init(params),
    )

  def update(updates, state, params):
    updates, inner = optimizer.update(updates, state.inner, params)
    count = state.updates + 1
    share = 1.0 - jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    average = jax.tree.map(
      lambda a, new: a + share.astype(a.dtype) * (new - a),
      state.average,
      optax.apply_updates(params, updates),
    )
    return updates, AveragedState(count, average, inner)

  return optax.GradientTransformation(init, update)


def restarted_average(state: Tree, params: Tree) -> Tree:
  """An optimizer's state whose average, if it keeps one, begins at `params`."""
  if not isinstance(state, AveragedState):
    return state
  average = jax.tree.map(
    lambda old, p: jnp.array(p, old.dtype), state.average, params
  )
  return AveragedState(jnp.zeros_like(state.updates), average, state.inner)


def inverse_square_root(
  peak: ranges.Rate, warmup_steps: ranges.Count
) -> Schedule:
  """Linear warm-up to `peak`, then peak * sqrt(warmup_steps / step).

  Step 0 has the rate of step 1, so the first update is not lost.
  """

  def rate(step):
    step = jnp.maximum(step, 1.0)
    return peak * jnp.minimum(
      step / warmup_steps, jnp.sqrt(warmup_steps / step)
    )

  return rate


def linear_decay(
  peak: ranges.Rate, warmup_steps: ranges.Steps, train_steps: ranges.Count
) -> Schedule:
  """Linear warm-up to `peak`, then linear to 0 at `train_steps` (BASE's)."""
  return _warm_then(
    peak,
    warmup_steps,
    optax.linear_schedule(peak, 0.0, max(1, train_steps - warmup_steps)),
  )


def cosine_decay(
  peak: ranges.Rate,
  warmup_steps: ranges.Steps,
  train_steps: ranges.Count,
  final: ranges.Share = 0.0,
) -> Schedule:
  """Linear warm-up to `peak`, then half a cosine to `final * peak`."""
  return _warm_then(
    peak,
    warmup_steps,
    optax.cosine_decay_schedule(
      peak, max(1, train_steps - warmup_steps), alpha=final
    ),
  )


def _warm_then(peak: float, warmup_steps: int, decay: Schedule) -> Schedule:
  warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def rewarm(rate: Schedule, start: int, steps: int) -> Schedule:
  """`rate`, with a second linear warm-up of `steps` steps from step `start`.

  For the sparse phase: its optimizer state is new, so its first updates are
  the least certain.
  """

  def rewarmed(step):
    ramp = jnp.clip((step - start + 1.0) / (steps + 1.0), 0.0, 1.0)
    return rate(step) * jnp.where(step < start, 1.0, ramp)

  return rewarmed
