"""The rack: embedding, a list of stacks, head. `{"embedding": ..., "stacks": [...], "head": ...}`.

A plain tree of arrays. A tied head has no `table` of its own and reads the embedding's.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stackwise_jax.models import weights
from stackwise_jax.models.layers import apply_norm, as_fixed, dropout, modulations
from stackwise_jax.models.mixing import Context
from stackwise_jax.models.stack import apply_stack, decode_stack, init_stack, stack_size
from stackwise_jax.models.stores import Store, init_store, slots
from stackwise_jax.ops.activation import activate
from stackwise_jax.ops.mask import Mask, MaskKind, decoding_mask
from stackwise_jax.ops.matmul import matmul
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key, Params

# Streams of the run's key, so that no two parts of a rack ever draw the same numbers.
EMBEDDING_STREAM, BLOCKS_STREAM, HEAD_STREAM = 0, 1, 2
# Columns that a bias on logits takes in the output table: rows of 16-bit numbers stay aligned to 16 bytes, as matrix
# units want them.
BIAS_COLUMNS = 8

# A masked fraction is told as DiT tells its 1000 steps: waves of 1 to 10000 radians a step.
TIME_STEPS, LONGEST_TIME = 1000.0, 10000.0


def init_embedding(key: Key, model: ModelConfig) -> Params:
    """Draws the embedding from the run's key."""
    return weights.init_weights(jax.random.fold_in(key, EMBEDDING_STREAM), weights.embedding_table(model))


def init_head(key: Key, model: ModelConfig) -> Params:
    """Draws the final norm and, unless tied, the output table from the run's key."""
    table = weights.head_table(model, tied=model.ties_embedding)
    return weights.init_weights(jax.random.fold_in(key, HEAD_STREAM), table)


def init_rack_stack(key: Key, model: ModelConfig, first_block: int | Array, n_blocks: int) -> Params:
    """Draws one stack from the run's key."""
    return init_stack(jax.random.fold_in(key, BLOCKS_STREAM), model, first_block, n_blocks)


def init_rack(key: Key, model: ModelConfig, sizes: tuple[int, ...]) -> Params:
    """Draws a whole rack with stacks of `sizes` blocks."""
    return {
        "embedding": init_embedding(key, model),
        "stacks": [init_rack_stack(key, model, sum(sizes[:i]), size) for i, size in enumerate(sizes)],
        "head": init_head(key, model),
    }


def count_parameters(model: ModelConfig) -> int:
    """Parameters of a whole rack, a tied table counted once."""
    block = weights.block_table(model)
    unused = 0
    if not model.first_attention_norm:  # nor what would tell it the time, half of what tells both norms
        unused = weights.count(block["attention_norm"]) + weights.count(block.get("adaptive", {})) // 2
    return (
        weights.count(weights.embedding_table(model))
        + model.n_blocks * weights.count(block)
        - unused
        + weights.count(weights.head_table(model, tied=model.ties_embedding))
    )


def apply_embedding(
    params: Params,
    inputs: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    key: Key | None = None,
    token_types: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Looks tokens up, maps them to the width of the residual stream, adds token types (the first where none are given)
    and learned positions, and applies the norm: each if there is any."""
    x = (as_fixed(params["tokens"]) if model.fixed_table else params["tokens"])[inputs]
    if model.d_embedding is not None:
        x = matmul(x, params["projection"]["kernel"], dtype=dtype)
    if model.token_types and token_types is None:  # one row for all, whose gradient is a sum and no scatter
        x = x + params["token_types"][0][None, None, :]
    elif model.token_types:
        x = x + params["token_types"][token_types]
    if model.positions == "learned":
        x = x + params["positions"][positions]
    if model.embedding_norm:
        x = apply_norm(params["norm"]["scale"], params["norm"].get("bias"), x, model)
    return dropout(x.astype(dtype), model.dropout, key)


def time_vector(embedding: Params, rates: Float[Array, "B"]) -> Float[Array, "B C"]:
    """What blocks of a model with `time_input` are told: a function of each row's masked fraction, in float32.

    64 pairs of cosine and sine of 1000 r, of geometric frequencies from 1 down to about 1/10000, two maps, SiLU after
    each: the time of DiT (Peebles and Xie, 2023), at the width that MDLM has it (Sahoo et al., 2024).

    Args:
      embedding: parameters of the embedding, whole.
      rates: masked fractions in [0, 1]; 0 is a row without masks.
    """
    half = weights.TIME_FEATURES // 2
    frequencies = (LONGEST_TIME ** (-np.arange(half) / half)).astype(np.float32)
    angles = TIME_STEPS * rates.astype(jnp.float32)[:, None] * frequencies[None, :]
    vector = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    for name in ("first", "second"):
        own = embedding["time"][name]
        vector = jax.nn.silu(matmul(vector, own["kernel"], dtype=jnp.float32) + own["bias"][None, :])
    return vector


def apply_head_norm(
    params: Params, x: Float[Array, "B T D"], model: ModelConfig, time: Float[Array, "B C"] | None = None
) -> Float[Array, "B T E"]:
    """What stands between the last stack and the output table: the final norm, and BERT's map, activation and norm.

    A post-norm block already ends in a norm, and a rack without the map needs none here.

    Args:
      time: `Context.time`, where `model.time_input`; it changes the final norm.

    Returns:
      as wide as the rows of `output_table`, so that their products are the logits.
    """
    if model.norm_position == "pre":
        modulation = modulations(params["adaptive"], time, 1)[0] if model.time_input else None
        x = apply_norm(params["norm"]["scale"], params["norm"].get("bias"), x, model, modulation)
    if model.head_transform:
        mapped = matmul(x.reshape(-1, x.shape[-1]), params["transform"]["kernel"], dtype=x.dtype)
        bias = params["transform"].get("bias")
        mapped = mapped if bias is None else mapped + bias.astype(x.dtype)[None, :]
        own = params["transform_norm"]
        x = apply_norm(own["scale"], own.get("bias"), activate(mapped, None, model.ffn).reshape(x.shape), model)
    if model.logit_bias:
        ones = jnp.zeros((*x.shape[:2], BIAS_COLUMNS), x.dtype).at[:, :, 0].set(1)
        x = jnp.concatenate([x, ones], axis=-1)
    return x


def output_table(head: Params, embedding: Params) -> Float[Array, "V E"]:
    """The table that logits are taken against: the head's own, or the embedding's when tied.

    A bias on logits is one more column, which meets a one in what `apply_head_norm` returns; zeros fill up
    `BIAS_COLUMNS`.
    """
    table = head["table"] if "table" in head else embedding["tokens"]
    if "logit_bias" not in head:
        return table
    column = jnp.pad(head["logit_bias"].astype(table.dtype)[:, None], ((0, 0), (0, BIAS_COLUMNS - 1)))
    return jnp.concatenate([table, column], axis=1)


def row_context(
    model: ModelConfig,
    segments: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    *,
    kind: str | None = None,
    prefix_lengths: Int[Array, "B"] | None = None,
    block_length: int | None = None,
    time: Float[Array, "B C"] | None = None,
) -> Context:
    """The context of whole packed rows; without segments a row is one document and attention takes its fast path.

    Args:
      segments, positions: of block_diffusion, those of a row twice, for its noised and its clean half.
      kind: who sees whom (`ops.mask.Mask`), since one rack may be run under several; None: `model.attention`.
      prefix_lengths: of kind prefix.
      block_length: of kinds block_causal and block_diffusion.
      time: `time_vector` of the rows' masked fractions, where `model.time_input`.
    """
    own_kind = typing.cast(MaskKind, model.attention if kind is None else kind)
    return Context(positions, Mask(own_kind, segments, prefix_lengths, block_length), time=time)


def apply_rack(
    rack: Params,
    inputs: Int[Array, "B T"],
    context: Context,
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    token_types: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """Runs the whole rack, without dropout, up to the output table; multiply by `output_table` for logits."""
    embedding = rack["embedding"]
    x = apply_embedding(embedding, inputs, context.positions, model, dtype=dtype, token_types=token_types)
    for stack in rack["stacks"]:
        x = apply_stack(stack, x, context, model, dtype=dtype)
    return apply_head_norm(rack["head"], x, model, context.time)


def reading_context(
    stored: list[Store],
    places: Int[Array, "B T"],
    first: Int[Array, "B"],
    *,
    time: Float[Array, "B C"] | None = None,
) -> Context:
    """The context of `T` more places of causal rows that begin at different slots, padding before them.

    Args:
      places: slot of each new place, one after another and the same in all rows.
      first: slot of each row's first token, at position 0.
      time: as in `row_context`.
    """
    n_slots = slots(stored)
    if n_slots is None:
        mask = Mask("causal", (places >= first[:, None]).astype(jnp.int32))
    else:
        mask = decoding_mask(places, n_slots, first)
    return Context(jnp.maximum(places - first[:, None], 0), mask, write_at=places[0, 0], time=time)


def init_key_values(rack: Params, model: ModelConfig, batch: int, length: int, *, dtype: DTypeLike) -> list[Store]:
    """Empty stores of keys and values, or of what stands for them, for `length` places, one entry per stack."""
    return [init_store(model, stack_size(stack), batch, length, dtype=dtype) for stack in rack["stacks"]]


def decode_rack(
    rack: Params,
    inputs: Int[Array, "B T"],
    context: Context,
    stored: list[Store],
    model: ModelConfig,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B V"], list[Store]]:
    """Reads `T` more places after those stored; returns float32 logits of the last one and what is stored now."""
    x, extended = decode_stacks(rack, inputs, context, stored, model, dtype=dtype)
    return rack_logits(rack, x[:, -1:], model, context.time)[:, 0], extended


def decode_stacks(
    rack: Params,
    inputs: Int[Array, "B T"],
    context: Context,
    stored: list[Store],
    model: ModelConfig,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T D"], list[Store]]:
    """As `decode_rack`, but returns what the last stack puts out, before the final norm, at every place."""
    x = apply_embedding(rack["embedding"], inputs, context.positions, model, dtype=dtype)
    extended = []
    for stack, stack_stored in zip(rack["stacks"], stored, strict=True):
        x, stack_stored = decode_stack(stack, x, context, stack_stored, model, dtype=dtype)
        extended.append(stack_stored)
    return x, extended


def rack_logits(
    rack: Params, x: Float[Array, "B T D"], model: ModelConfig, time: Float[Array, "B C"] | None = None
) -> Float[Array, "B T V"]:
    """float32 logits of what the last stack puts out; `time` as in `apply_head_norm`."""
    x = apply_head_norm(rack["head"], x, model, time)
    table = output_table(rack["head"], rack["embedding"])
    return jnp.einsum("BTE,VE->BTV", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
