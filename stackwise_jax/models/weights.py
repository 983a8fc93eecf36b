"""What every weight is: shape, axes, initialiser.

One table per part of a rack (embedding, block, head). Initialisation, parameter counts, bytes and FLOPs derive
from it, and its keys are the names in a checkpoint.
"""

import dataclasses
import math
import typing
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key, Params


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of parameters.

    Attributes:
      shape: without the leading block axis that stacks add.
      axes: one letter of the axis alphabet per dimension ("NH" is heads times head width).
      init: "normal" (of `std`), "ones", "zeros" or "constant" (`value` everywhere); "place": a fact about the block,
        told by its place in the rack (`block_facts`), that is kept with its weights and no gradient changes.
      std: standard deviation of a normal initialiser.
      value: of a constant initialiser.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    std: float = 0.0
    value: float = 0.0

    @property
    def is_matrix(self) -> bool:
        """Norms and biases are not."""
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Table = dict[str, Any]
"""A tree of `Weight` with the structure of the parameters."""


def _norm(model: ModelConfig) -> Table:
    scale = {"scale": Weight((model.d_model,), ("D",), "ones")}
    if model.norm == "rmsnorm" or not model.norm_bias:
        return scale
    return scale | {"bias": Weight((model.d_model,), ("D",), "zeros")}


def _linear(model: ModelConfig, inputs: tuple[int, str], outputs: tuple[int, str], std: float) -> Table:
    table = {"kernel": Weight((inputs[0], outputs[0]), (inputs[1], outputs[1]), std=std)}
    if model.use_bias:
        table["bias"] = Weight((outputs[0],), (outputs[1],), "zeros")
    return table


def block_table(model: ModelConfig) -> Table:
    """The weights of one block. Maps onto the residual stream start smaller by sqrt(2 * blocks) (GPT-2)."""
    std = model.init_std
    residual_std = std / math.sqrt(2 * model.n_blocks)
    head_width, kv_heads = typing.cast(int, model.d_head), typing.cast(int, model.n_kv_heads)
    width, hidden = (model.d_model, "D"), (model.d_ff, "F")
    heads, keys = (model.n_heads * head_width, "NH"), (kv_heads * head_width, "KH")
    mlp = {"up": _linear(model, width, hidden, std), "down": _linear(model, hidden, width, residual_std)}
    if model.is_gated:
        mlp["gate"] = _linear(model, width, hidden, std)
    table: Table = {
        "attention_norm": _norm(model),
        "attention": {
            "query": _linear(model, width, heads, std),
            "key": _linear(model, width, keys, std),
            "value": _linear(model, width, keys, std),
            "output": _linear(model, heads, width, residual_std),
        },
        "mlp_norm": _norm(model),
        "mlp": mlp,
    }
    gain = model.stability.residual_gain
    if gain is not None:
        table["residual_gain"] = Weight((), (), "constant", value=gain)
    return table | {name: Weight((), (), "place") for name in block_facts(model, 0)}


def block_facts(model: ModelConfig, block: int | Array) -> dict[str, Array]:
    """What sets block number `block` of a rack apart from others, where blocks differ: 1.0 for yes, 0.0 for no.

    `is_local`: its attention is limited to `model.window`. `is_first`: it has no use for its attention norm. They lie
    among its weights, so that unlike blocks are scanned alike and take them along wherever they are moved.
    """
    facts = {}
    if model.window is not None and model.global_every is not None:
        facts["is_local"] = jnp.float32(jnp.asarray(block) % model.global_every != 0)
    if not model.first_attention_norm:
        facts["is_first"] = jnp.float32(jnp.asarray(block) == 0)
    return facts


def embedding_table(model: ModelConfig) -> Table:
    """The token table, and what there is of learned positions, token types and the norm after them."""
    table: Table = {"tokens": Weight((model.vocab_size, model.d_model), ("V", "D"), std=model.init_std)}
    if model.positions == "learned":
        positions = typing.cast(int, model.max_positions)
        table["positions"] = Weight((positions, model.d_model), ("T", "D"), std=model.init_std)
    if model.token_types:
        table["token_types"] = Weight((model.token_types, model.d_model), ("V", "D"), std=model.init_std)
    if model.embedding_norm:
        table["norm"] = _norm(model)
    return table


def head_table(model: ModelConfig, *, tied: bool) -> Table:
    """The final norm (pre-norm racks only), BERT's map if any, unless tied the output table, and its bias if any."""
    table: Table = {"norm": _norm(model)} if model.norm_position == "pre" else {}
    if model.head_transform:
        table["transform"] = _linear(model, (model.d_model, "D"), (model.d_model, "D"), model.init_std)
        table["transform_norm"] = _norm(model)
    if not tied:
        table["table"] = Weight((model.vocab_size, model.d_model), ("V", "D"), std=model.init_std)
    if model.logit_bias:
        table["logit_bias"] = Weight((model.vocab_size,), ("V",), "zeros")
    return table


def is_weight(node: Any) -> bool:
    """Says that a node of a table is a leaf."""
    return isinstance(node, Weight)


def count(table: Table) -> int:
    """Number of parameters in a table, facts about blocks not among them."""
    return sum(weight.size for weight in jax.tree.leaves(table, is_leaf=is_weight) if weight.init != "place")


def init_weights(key: Key, table: Table) -> Params:
    """Draws float32 parameters; each depends on `key` and its own name only, never on its neighbours.

    Facts about blocks are 0 until somebody who knows the block's place says otherwise.
    """

    def draw(path: tuple[Any, ...], weight: Weight) -> jax.Array:
        if weight.init != "normal":
            return jnp.full(weight.shape, 1.0 if weight.init == "ones" else weight.value, jnp.float32)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return weight.std * jax.random.normal(own_key, weight.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, table, is_leaf=is_weight)
