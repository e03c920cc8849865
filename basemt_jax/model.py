"""The encoder-decoder Transformer, dense or with layers of experts.

Axes: B batch, L length (Li source, Lt target), D model width, F feed-forward
width, V vocabulary, E experts.

A pre-norm Transformer (arXiv:1706.03762, arXiv:2002.04745) with RMS norm,
rotary positions and tied embeddings, called as T5X's networks are. In the
blocks that `encoder_expert_blocks` and `decoder_expert_blocks` name, a layer
of experts replaces the feed-forward or is inserted after the block, as BASE
layers are (arXiv:2103.16716).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import scope as flax_scope

from basemt_jax import base_layer, layers, ranges, routing

Array = jax.Array
Params = Any

Dtype = Literal["float32", "bfloat16", "float16"]
FeedForward = Literal["dense", "dense_wide", "experts"]
Placement = Literal["replace", "insert"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Everything that defines the network; hardware has no say in it.

  Attributes:
    vocab_size: V.
    emb_dim: D.
    num_heads: Attention heads.
    head_dim: Width of a head.
    mlp_dim: F.
    num_encoder_layers: Encoder blocks.
    num_decoder_layers: Decoder blocks.
    mlp_activations: ('relu',), or two names for a gated feed-forward.
    dropout_rate: On embeddings, hidden units and the outputs of sublayers.
    dtype: Computation type; parameters, norms, routing and logits are
      float32.
    remat: Recompute each block in the backward pass: less memory, a third
      more time.
    attention: A module with the call and the first three attributes of
      `layers.Attention`; blocks fill these in.
    feed_forward: What stands in the expert blocks: 'dense', the plain
      feed-forward; 'dense_wide', one of width E * F, which has the experts'
      parameters without their sparsity; 'experts'.
    encoder_expert_blocks: Indices of encoder blocks, from 0.
    decoder_expert_blocks: Indices of decoder blocks, from 0.
    placement: 'replace' the block's feed-forward by experts, or 'insert' a
      layer of experts after the block (BASE's own choice).
    num_experts: E.
    expert_param_dtype: Type in which experts' matrices are kept. In bfloat16
      they need half the memory and no rounding before every use; updates are
      rounded up or down at random, so that small ones are kept on average.
    num_sublayers: Feed-forward sublayers an expert stacks.
    router: Chooses each token's expert.
    rows_per_group: Rows of the batch that compete for experts together.
    converted: Whether gates start at 1, as after a conversion from a
      dense model, rather than as sigmoid(h . w_e).
  """

  vocab_size: ranges.Count
  emb_dim: ranges.Count = 512
  num_heads: ranges.Count = 8
  head_dim: ranges.Count = 64
  mlp_dim: ranges.Count = 2048
  num_encoder_layers: ranges.Count = 6
  num_decoder_layers: ranges.Count = 6
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: ranges.Fraction = 0.1
  dtype: Dtype = "float32"
  remat: bool = False
  attention: nn.Module = layers.Attention()  # noqa: RUF009
  feed_forward: FeedForward = "dense"
  encoder_expert_blocks: Sequence[int] = ()
  decoder_expert_blocks: Sequence[int] = ()
  placement: Placement = "replace"
  num_experts: ranges.Count = 8
  expert_param_dtype: Literal["float32", "bfloat16"] = "float32"
  num_sublayers: ranges.Count = 1
  router: routing.Router = routing.BalancedRouter()  # noqa: RUF009
  rows_per_group: ranges.Count = 16
  converted: bool = False

  def __post_init__(self):
    """Checks the values that gin or a typing slip can get wrong."""
    ranges.check_choices(self, feed_forward=FeedForward, placement=Placement)
    if self.head_dim % 2:
      raise ValueError(
        f"TransformerConfig.head_dim is {self.head_dim}; rotary positions turn "
        "pairs of numbers, so it must be even"
      )
    for side, blocks, count in (
      ("encoder", self.encoder_expert_blocks, self.num_encoder_layers),
      ("decoder", self.decoder_expert_blocks, self.num_decoder_layers),
    ):
      wrong = [i for i in blocks if not 0 <= i < count]
      if wrong:
        raise ValueError(
          f"TransformerConfig.{side}_expert_blocks names blocks {wrong}, but "
          f"the {side} has blocks 0 to {count - 1}"
        )
      # Lists from gin would make the frozen config unhashable.
      object.__setattr__(self, f"{side}_expert_blocks", tuple(blocks))
    object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
    if self.feed_forward == "dense_wide" and self.placement == "insert":
      raise ValueError(
        "TransformerConfig.feed_forward 'dense_wide' widens the feed-forwards "
        "that experts replace; set placement to 'replace'"
      )

  def block_kinds(self, is_decoder: bool) -> tuple[str, ...]:
    """What stands in each block: 'dense', 'dense_wide' or 'experts'."""
    count = self.num_decoder_layers if is_decoder else self.num_encoder_layers
    chosen = (
      self.decoder_expert_blocks if is_decoder else self.encoder_expert_blocks
    )
    return tuple(
      self.feed_forward if i in chosen else "dense" for i in range(count)
    )

  def hidden_dim(self, kind: str) -> int:
    """Hidden units of a block's feed-forward, or of an expert's."""
    return self.mlp_dim * (self.num_experts if kind == "dense_wide" else 1)

  def dense(self) -> "TransformerConfig":
    """The dense network that `conversion` turns into this one."""
    return dataclasses.replace(self, feed_forward="dense")


class Block(nn.Module):
  """One Transformer block: attention, (cross-attention,) feed-forward.

  Its own feed-forward is of a kind: 'dense', 'dense_wide' or 'experts'; without
  a mesh experts are on one device.
  """

  config: TransformerConfig
  kind: str
  is_decoder: bool
  mesh: Any = None

  def _norm(self, name: str) -> layers.RMSNorm:
    return layers.RMSNorm(jnp.dtype(self.config.dtype), name=name)

  def _attention(self, name: str) -> Any:
    cfg = self.config
    return cfg.attention.clone(
      parent=self,
      name=name,
      num_heads=cfg.num_heads,
      head_dim=cfg.head_dim,
      dtype=jnp.dtype(cfg.dtype),
    )

  def _experts(self, x: Array, mask: Array, train, keep) -> Array:
    cfg = self.config
    y = base_layer.BaseLayer(
      num_experts=cfg.num_experts,
      mlp_dim=cfg.mlp_dim,
      num_sublayers=cfg.num_sublayers,
      activations=cfg.mlp_activations,
      router=cfg.router,
      rows_per_group=cfg.rows_per_group,
      # fairseq starts inserted experts as the identity; experts in place of a
      # feed-forward start as that feed-forward would.
      zero_init_output=cfg.placement == "insert",
      dropout_rate=cfg.dropout_rate,
      converted=cfg.converted,
      dtype=jnp.dtype(cfg.dtype),
      param_dtype=jnp.dtype(cfg.expert_param_dtype),
      mesh=self.mesh,
      name="base_layer",
    )(x, mask, train=train, enable_dropout=keep is not None)
    if keep is None:
      return y
    # What the experts add is dropped as any sublayer's output is.
    return x + layers.dropout(y - x, cfg.dropout_rate, keep)

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: layers.SegmentMask | None,
    positions: Array,
    token_mask: Array,
    memory: Any,
    memory_mask: layers.SegmentMask | None,
    train: bool,
    decode: bool,
    max_decode_length: int | None,
    keep: dict[str, Array] | None,
  ) -> Array:
    """Maps x [B, L, D] to [B, L, D].

    Masks are those of `layers.Attention`, `token_mask` [B, L] is False on
    padding, and `keep` is one of `layers.dropout_masks`, or None: no dropout.
    """
    cfg, kind = self.config, self.kind
    hidden = None if keep is None else keep["hidden"]
    sublayers: Iterator[Any] = itertools.repeat(None)
    if keep is not None:
      sublayers = iter(keep["outputs"])

    def drop(y: Array) -> Array:
      return layers.dropout(y, cfg.dropout_rate, next(sublayers))

    y = self._norm("pre_self_attention_layer_norm")(x)
    y = self._attention("self_attention")(
      y,
      y,
      mask,
      positions,
      decode=decode,
      max_decode_length=max_decode_length,
    )
    x = x + drop(y)
    if self.is_decoder:
      y = self._norm("pre_cross_attention_layer_norm")(x)
      y = self._attention("cross_attention")(
        y, memory, memory_mask, decode=decode
      )
      x = x + drop(y)
    if kind == "experts" and cfg.placement == "replace":
      x = self._experts(x, token_mask, train, next(sublayers))
    else:
      y = self._norm("pre_mlp_layer_norm")(x)
      y = layers.MlpBlock(
        cfg.hidden_dim(kind),
        cfg.mlp_activations,
        cfg.dropout_rate,
        jnp.dtype(cfg.dtype),
        name="mlp",
      )(y, hidden)
      x = x + drop(y)
    if kind == "experts" and cfg.placement == "insert":
      x = self._experts(x, token_mask, train, next(sublayers))
    return layers.with_sharding_constraint(x, ("batch", "length", "embed"))


class Stack(nn.Module):
  """The encoder or the decoder: dropout, blocks, final norm, dropout."""

  config: TransformerConfig
  is_decoder: bool
  mesh: Any = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: layers.SegmentMask | None,
    positions: Array,
    token_mask: Array,
    memory: Array | None = None,
    memory_mask: layers.SegmentMask | None = None,
    train: bool = False,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> Array:
    """Maps embeddings [B, L, D] to [B, L, D]; arguments as `Block`'s."""
    cfg = self.config
    blocks = [
      Block(cfg, kind, self.is_decoder, self.mesh, parent=None)
      for kind in cfg.block_kinds(self.is_decoder)
    ]
    arguments = (
      *(mask, positions, token_mask, memory, memory_mask),
      *(train, decode, max_decode_length),
    )
    if self.is_initializing():
      for i, block in enumerate(blocks):
        x = block.clone(parent=self, name=f"layers_{i}")(x, *arguments, None)
      return self._norm()(x)
    ends: Any = (None, None)
    own: Any = [None] * len(blocks)
    keys = None
    if enable_dropout and cfg.dropout_rate > 0.0:
      ends, own, keys = layers.dropout_masks(
        self.make_rng("dropout"),
        cfg.dropout_rate,
        x.shape[0],
        cfg.emb_dim,
        [cfg.hidden_dim(block.kind) for block in blocks],
      )
    x = layers.dropout(x, cfg.dropout_rate, ends[0])
    x = self._in_turn(blocks, x, arguments, own, keys)
    return layers.dropout(self._norm()(x), cfg.dropout_rate, ends[1])

  def _in_turn(
    self,
    blocks: Sequence[nn.Module],
    x: Array,
    arguments: Sequence[Any],
    own: Sequence[Any],
    keys: Array | None,
  ) -> Array:
    """Applies blocks to x [B, L, D]; those of a kind are traced once.

    Blocks have no parent; equal ones make equal programs. The variables of
    block i are `layers_i`; what it changes in collections is put there.
    `arguments` are further ones of every block, of which what is no array is
    static, `own` one more of each, `keys` of their random stream `dropout`, or
    None.
    """
    unchanged = flax_scope.DenyList(("params", "params_axes"))
    assert self.scope is not None
    changed = flax_scope.intersect_filters(self.scope.mutable, unchanged)

    def apply(block: nn.Module, x: Array, variables: Any, own: Any, key: Any):
      return block.apply(
        variables,
        x,
        *arguments,
        own,
        rngs=None if key is None else {"dropout": key},
        mutable=changed or [],
      )

    if self.config.remat:
      apply = jax.checkpoint(apply, static_argnums=0)
    apply = jax.jit(apply, static_argnums=0)
    collections = self.variables.items()
    for i, block in enumerate(blocks):
      name = f"layers_{i}"
      variables = {
        kind: tree[name] for kind, tree in collections if name in tree
      }
      key = None if keys is None else keys[i]
      x, updates = apply(block, x, variables, own[i], key)
      for collection, tree in updates.items():
        self.put_variable(collection, name, tree)
    return x

  def _norm(self) -> layers.RMSNorm:
    name = "decoder_norm" if self.is_decoder else "encoder_norm"
    return layers.RMSNorm(jnp.dtype(self.config.dtype), name=name)


class Transformer(nn.Module):
  """The network, with T5X's call signature.

  The mesh, of `partitioning.make_mesh`, is for the exchange of tokens between
  experts; None: the unsharded path, the same function.
  """

  config: TransformerConfig
  mesh: Any = None

  def setup(self):
    """Creates the shared embedding, the encoder and the decoder."""
    cfg = self.config
    self.token_embedder = layers.Embed(
      cfg.vocab_size, cfg.emb_dim, jnp.dtype(cfg.dtype)
    )
    self.encoder = Stack(cfg, False, self.mesh)
    self.decoder = Stack(cfg, True, self.mesh)

  def encode(
    self,
    encoder_input_tokens: Array,
    encoder_segment_ids: Array | None = None,
    encoder_positions: Array | None = None,
    *,
    train: bool = False,
    enable_dropout: bool = False,
  ) -> Array:
    """Encodes int tokens [B, Li] to [B, Li, D]; arguments as `__call__`'s."""
    segments = layers.segments_of(encoder_input_tokens, encoder_segment_ids)
    return self.encoder(
      self.token_embedder(encoder_input_tokens),
      layers.SegmentMask(segments, segments),
      layers.positions_of(encoder_input_tokens, encoder_positions),
      segments > 0,
      train=train,
      enable_dropout=enable_dropout,
    )

  def decode(
    self,
    encoded: Array,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array | None = None,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    decoder_positions: Array | None = None,
    *,
    train: bool = False,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> Array:
    """Logits [B, Lt, V] float32, given encoded [B, Li, D].

    With `decode`, one token a step (Lt = 1); keys and values live in the
    collections `cache` and `memory` (see `layers.Attention`). Other arguments
    as `__call__`'s; without decoder_target_tokens every position is real.
    """
    source = layers.segments_of(encoder_input_tokens, encoder_segment_ids)
    target = (
      jnp.ones_like(decoder_input_tokens)
      if decoder_target_tokens is None
      else layers.segments_of(decoder_target_tokens, decoder_segment_ids)
    )
    mask = None if decode else layers.SegmentMask(target, target, causal=True)
    memory_mask = layers.SegmentMask(target, source)
    if decode or decoder_segment_ids is None:
      # All of a row, padding of the target too, sees all of its source.
      memory_mask = layers.SegmentMask(
        jnp.ones_like(target), (source > 0).astype(jnp.int32)
      )
    x = self.decoder(
      self.token_embedder(decoder_input_tokens),
      mask,
      layers.positions_of(decoder_input_tokens, decoder_positions),
      target > 0,
      encoded,
      memory_mask,
      train,
      enable_dropout,
      decode,
      max_decode_length,
    )
    return self.token_embedder.attend(x)

  def __call__(
    self,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    encoder_positions: Array | None = None,
    decoder_positions: Array | None = None,
    *,
    train: bool = False,
    enable_dropout: bool | None = None,
  ) -> Array:
    """Teacher-forced logits.

    Args:
      encoder_input_tokens: [B, Li] int32, 0 is padding.
      decoder_input_tokens: [B, Lt] int32, targets shifted right.
      decoder_target_tokens: [B, Lt] int32; tells padding.
      encoder_segment_ids: [B, Li] int32 of packed rows, or None: one example
        a row.
      decoder_segment_ids: [B, Lt].
      encoder_positions: [B, Li] int32 within the segment, or None.
      decoder_positions: [B, Lt].
      train: Balanced routing and price updates; else greedy routing.
      enable_dropout: Defaults to `train`.

    Returns:
      [B, Lt, V] float32.
    """
    enable_dropout = train if enable_dropout is None else enable_dropout
    encoded = self.encode(
      encoder_input_tokens,
      encoder_segment_ids,
      encoder_positions,
      train=train,
      enable_dropout=enable_dropout,
    )
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_positions,
      train=train,
      enable_dropout=enable_dropout,
    )

  @nn.nowrap
  def encode_tokens(
    self, variables: Params, encoder_input_tokens: Array
  ) -> Params:
    """The decoder's memory of a source [B, Li]: a tree of [B, ...] arrays.

    Holds the source mask's tokens and every block's cross-attention keys and
    values, so that a decoding step does not compute them again.
    """
    attention = layers.without_fusion(self.config.attention)
    config = dataclasses.replace(self.config, attention=attention)
    network = self.clone(config=config)
    encoded = network.apply(
      variables, encoder_input_tokens, method=network.encode
    )
    _, state = self.apply(
      variables,
      encoded,
      encoder_input_tokens,
      encoder_input_tokens[:, :1],
      decode=True,
      max_decode_length=1,
      method=self.decode,
      mutable=["cache", "memory"],
    )
    return {"tokens": encoder_input_tokens, "memory": state["memory"]}

  @nn.nowrap
  def init_cache(
    self, variables: Params, memory: Params, max_decode_length: int
  ) -> Params:
    """An empty cache for the sequences of `memory`."""
    first = memory["tokens"][:, :1]
    _, state = self._step(
      variables, memory, {}, first, max_decode_length=max_decode_length
    )
    return state["cache"]

  @nn.nowrap
  def decode_step(
    self, variables: Params, memory: Params, cache: Params, tokens: Array
  ) -> tuple[Array, Params]:
    """One step: tokens [N, 1] and cache to logits [N, V] and the new cache."""
    logits, state = self._step(variables, memory, {"cache": cache}, tokens)
    return logits[:, 0], state["cache"]

  @nn.nowrap
  def _step(self, variables, memory, collections, tokens, **kwargs):
    # Cross-attention reads its keys from `memory`; only their type and the
    # width of what would be encoded matter here.
    encoded = jnp.zeros(
      (*memory["tokens"].shape, self.config.emb_dim),
      jnp.dtype(self.config.dtype),
    )
    return self.apply(
      {**variables, "memory": memory["memory"], **collections},
      encoded,
      memory["tokens"],
      tokens,
      decode=True,
      method=self.decode,
      mutable=["cache"],
      **kwargs,
    )


def forward(
  network: Transformer,
  variables: Params,
  batch: Mapping[str, Array],
  *,
  train: bool,
  enable_dropout: bool | None = None,
  dropout_rng: Array | None = None,
  reported: Sequence[str] = ("intermediates",),
) -> tuple[Array, dict[str, Any]]:
  """Logits of a batch, and what the network's collections became.

  Args:
    network: The Transformer.
    variables: {'params': ..., 'prices': ...}.
    batch: T5X's features; others are ignored.
    train: See `Transformer.__call__`.
    enable_dropout: See `Transformer.__call__`.
    dropout_rng: Key, needed with dropout.
    reported: Collections of what modules tell: `intermediates` of routers,
      `expert_inputs`.

  Returns:
    Logits [B, Lt, V] float32; and what was reported with, in training, the
    other collections' new values.
  """
  names = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "encoder_segment_ids",
    "decoder_segment_ids",
    "encoder_positions",
    "decoder_positions",
  )
  mutable = list(reported)
  if train:
    mutable += [name for name in variables if name != "params"]
  call: Any = network.apply
  logits, updates = call(
    variables,
    **{name: batch[name] for name in names if name in batch},
    train=train,
    enable_dropout=enable_dropout,
    rngs=None if dropout_rng is None else {"dropout": dropout_rng},
    mutable=mutable,
  )
  return logits, {**{name: {} for name in reported}, **updates}
