"""What every weight is: shape, axes, initialiser.

One table per part of a rack (embedding, block, head). Initialisation, parameter counts, bytes and FLOPs derive
from it, and its keys are the names in a checkpoint.
"""

import dataclasses
import math
import typing
import zlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
      is_fixed: it is no variable: it stays as it was drawn, or given.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    std: float = 0.0
    value: float = 0.0
    is_fixed: bool = False

    @property
    def is_matrix(self) -> bool:
        """Norms, biases and routers are not. Of experts it is one array [E D F]."""
        return len(self.shape) >= 2 and self.axes[-1] != "E"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Table = dict[str, Any]
"""A tree of `Weight` with the structure of the parameters."""

# Cosines and sines that a masked fraction is written as, and the width of the vector that blocks are told it by. It is
# one number that is told, so the widths do not grow with the model's.
TIME_FEATURES, TIME_WIDTH = 128, 128


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


def _time_map(inputs: int) -> Table:
    """A map of the time vector's network, which has a bias always, and a scale that no width of the model changes."""
    kernel = Weight((inputs, TIME_WIDTH), ("C", "C"), std=1.0 / math.sqrt(inputs))
    return {"kernel": kernel, "bias": Weight((TIME_WIDTH,), ("C",), "zeros")}


def _adaptive(model: ModelConfig, n_norms: int) -> Table:
    """From the time vector to a scale and a shift of each norm; zero at first, so that it changes nothing yet."""
    outputs = 2 * n_norms * model.d_model
    kernel = Weight((TIME_WIDTH, outputs), ("C", f"{2 * n_norms}D"), "zeros")
    return {"kernel": kernel, "bias": Weight((outputs,), (f"{2 * n_norms}D",), "zeros")}


def block_table(model: ModelConfig) -> Table:
    """The weights of one block. Maps onto the residual stream start smaller by sqrt(2 * blocks) (GPT-2).

    With `model.time_input` its norms are adaptive (Peebles and Xie, 2023), which costs (C + 1) * 4 D = 516 D
    parameters: 43 / D of the 12 D^2 of a block with F = 4 D, 5.6 percent at a width of 768 and 0.5 at 8192.
    """
    std = model.init_std
    residual_std = std / math.sqrt(2 * model.n_blocks)
    table: Table = {
        "attention_norm": _norm(model),
        "attention": _attention(model, std, residual_std),
        "mlp_norm": _norm(model),
        "mlp": _experts(model, std, residual_std) if model.has_experts else _mlp(model, model.d_ff, std, residual_std),
    }
    if model.time_input:
        table["adaptive"] = _adaptive(model, 2)
    gain = model.stability.residual_gain
    if gain is not None:
        table["residual_gain"] = Weight((), (), "constant", value=gain)
    return table | {name: Weight((), (), "place") for name in block_facts(model, 0)}


def _mlp(model: ModelConfig, hidden: int, std: float, residual_std: float) -> Table:
    """Fixed maps start at the scale of random features, unit variance for inputs of unit variance: none can grow."""
    width, inner = (model.d_model, "D"), (hidden, "F")
    table = {"up": _linear(model, width, inner, std), "down": _linear(model, inner, width, residual_std)}
    table |= {"gate": _linear(model, width, inner, std)} if model.is_gated else {}
    for name in fixed_maps(model):
        drawn = dataclasses.replace(table[name]["kernel"], std=1.0 / math.sqrt(model.d_model), is_fixed=True)
        table[name] = table[name] | {"kernel": drawn}
    return table


def fixed_maps(model: ModelConfig) -> tuple[str, ...]:
    """Maps of feed-forwards, experts' too, whose kernels are random numbers that no update changes."""
    return {"none": (), "up": ("up",), "up_and_gate": ("up", "gate")}[model.fixed_maps]


def is_fixed(path: tuple[Any, ...], model: ModelConfig) -> bool:
    """`Weight.is_fixed` of an array of a block or the embedding by its name."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if names[-1] == "tokens":
        return model.fixed_table
    return names[-1] == "kernel" and names[-2] in fixed_maps(model)


def _experts(model: ModelConfig, std: float, residual_std: float) -> Table:
    """A router, the matrices of all experts in one array each, and shared experts as one feed-forward.

    The router is kept as vectors are (`is_matrix`): float32 in trunks of 16 bits or fewer that keep vectors so, whole
    on every device, and moved by AdamW without decay.
    """
    own, hidden = model.experts, typing.cast(int, model.experts.d_ff)

    def of_all(name: str, kernel: Weight) -> Table:
        shape, axes = (own.count, *kernel.shape), ("E", *kernel.axes)
        return {name: {"kernel": dataclasses.replace(kernel, shape=shape, axes=axes)}}

    one = _mlp(model, hidden, std, residual_std)
    experts: Table = {}
    for name, linear in one.items():
        experts |= of_all(name, linear["kernel"])
    table: Table = {"router": Weight((model.d_model, own.count), ("D", "E"), std=std), "experts": experts}
    return table | ({"shared": _mlp(model, own.shared * hidden, std, residual_std)} if own.shared else {})


def is_matrix(path: tuple[Any, ...], n_axes: int) -> bool:
    """`Weight.is_matrix` of an array by its name and its number of axes, those before a weight's own left out."""
    return n_axes >= 2 and jax.tree_util.keystr(path[-1:], simple=True) != "router"


def _attention(model: ModelConfig, std: float, residual_std: float) -> Table:
    """Queries, keys, values and output, and what the kind of attention puts before them."""
    head_width, kv_heads = typing.cast(int, model.d_head), typing.cast(int, model.n_kv_heads)
    width, rotary = (model.d_model, "D"), rotary_key_width(model)
    of_queries, of_keys, of_values, table = width, width, width, {}
    if model.has_latents:
        latent = (typing.cast(int, model.latent.kv_rank), "R")
        of_keys = of_values = latent
        if model.latent.query_rank is not None:
            of_queries = (model.latent.query_rank, "R")
            table["query_latent"] = _linear(model, width, of_queries, std)
        if model.latent.form == "separate":
            table |= {name: _linear(model, width, latent, std) for name in ("key_latent", "value_latent")}
        else:
            table |= {"latent": _linear(model, width, latent, std), "latent_norm": _latent_norm(latent[0])}
            if model.latent.query_rank is not None:
                table["query_norm"] = _latent_norm(model.latent.query_rank)
            if rotary:
                table["rotary_key"] = _linear(model, width, (rotary, "P"), std)
    values = value_width(model)
    return table | {
        "query": _linear(model, of_queries, (model.n_heads * (head_width + rotary), "NH"), std),
        "key": _linear(model, of_keys, (kv_heads * head_width, "KH"), std),
        "value": _linear(model, of_values, (kv_heads * values, "KH"), std),
        "output": _linear(model, (model.n_heads * values, "NH"), width, residual_std),
    }


def _latent_norm(rank: int) -> Table:
    """RMSNorm, whatever the norm of the blocks."""
    return {"scale": Weight((rank,), ("R",), "ones")}


def rotary_key_width(model: ModelConfig) -> int:
    """Width of the rotary key that all heads share, beside their own keys; 0 where there is none."""
    is_decoupled = model.has_latents and model.latent.form == "shared" and model.positions == "rotary"
    return typing.cast(int, model.latent.d_rope) if is_decoupled else 0


def key_width(model: ModelConfig) -> int:
    """Width of a query, and of the key that it meets."""
    return typing.cast(int, model.d_head) + rotary_key_width(model)


def product_width(model: ModelConfig) -> int:
    """Width of the vectors whose products go into the softmax: of queries and keys, or of their random features."""
    has_features = model.has_kernel and model.kernel.family != "linear"
    return model.kernel.n_features if has_features else key_width(model)


def value_width(model: ModelConfig) -> int:
    """Width of a value of one head."""
    return typing.cast(int, model.latent.d_value if model.has_latents else model.d_head)


def stores_latents(model: ModelConfig) -> bool:
    """A reader keeps latents, from which keys and values follow, and not these."""
    return model.attention_kind == "mla" and model.latent.form == "shared"


Fact = bool | Float[Array, ""]
"""What a block is told of itself: known while tracing, or a number among its weights."""


def block_facts(model: ModelConfig, block: int | Array) -> dict[str, Array]:
    """What sets block number `block` of a rack apart from others, where blocks differ: 1.0 for yes, 0.0 for no.

    `is_local`: its attention is limited to `model.window`. `is_first`: it has no use for its attention norm.
    `is_causal`: it sees no place after its own, in a rack whose first blocks do (`model.causal_from`). They lie among
    its weights, so that unlike blocks are scanned alike, however stacks are cut (`models.stack.placed` says them anew
    where a stack comes to another place).
    """
    return {name: jnp.float32(fact) for name, fact in _facts(model, jnp.asarray(block)).items()}


def known_facts(model: ModelConfig, first_blocks: Collection[int], n_blocks: int) -> list[dict[str, bool]]:
    """`block_facts` of the blocks of a stack, as far as they are the same wherever in the rack it may begin.

    Args:
      first_blocks: numbers of the blocks that it may begin with.
      n_blocks: of the stack.

    >>> model = ModelConfig(window=64, global_every=3)
    >>> known_facts(model, (0, 3), 3)
    [{'is_local': False}, {'is_local': True}, {'is_local': True}]
    >>> known_facts(model, (0, 4), 3)[0]
    {}
    """
    known = []
    for place in range(n_blocks):
        cases = [_facts(model, first + place) for first in first_blocks]
        alike = [name for name in _facts(model, 0) if len({case[name] for case in cases}) == 1]
        known.append({name: cases[0][name] for name in alike})
    return known


def _facts(model: ModelConfig, block: Any) -> dict[str, Any]:
    facts = {}
    if model.window is not None and model.global_every is not None:
        facts["is_local"] = block % model.global_every != 0
    if model.causal_from is not None:
        facts["is_causal"] = block >= model.causal_from
    if not model.first_attention_norm:
        facts["is_first"] = block == 0
    return facts


def embedding_table(model: ModelConfig) -> Table:
    """The token table, and what there is of a map after it, learned positions, token types, their norm and the time.

    The map (`model.d_embedding`, R columns) makes V R + R D numbers of V D, fewer where R is far below D (Lan et al.,
    2020), and starts so that its outputs are as large as the entries of the table.

    The time's network (`model.time_input`) lies here because it is settled with the embedding: what a frozen stack is
    told never changes. It has 33,024 parameters whatever the width.
    """
    width = (model.d_model, "D") if model.d_embedding is None else (model.d_embedding, "R")
    tokens = Weight((model.vocab_size, width[0]), ("V", width[1]), std=model.init_std, is_fixed=model.fixed_table)
    table: Table = {"tokens": tokens}
    if model.d_embedding is not None:
        kernel = Weight((model.d_embedding, model.d_model), ("R", "D"), std=1.0 / math.sqrt(model.d_embedding))
        table["projection"] = {"kernel": kernel}
    if model.positions == "learned":
        positions = typing.cast(int, model.max_positions)
        table["positions"] = Weight((positions, model.d_model), ("T", "D"), std=model.init_std)
    if model.token_types:
        table["token_types"] = Weight((model.token_types, model.d_model), ("V", "D"), std=model.init_std)
    if model.embedding_norm:
        table["norm"] = _norm(model)
    if model.time_input:
        table["time"] = {"first": _time_map(TIME_FEATURES), "second": _time_map(TIME_WIDTH)}
    return table


def head_table(model: ModelConfig, *, tied: bool) -> Table:
    """The final norm (pre-norm racks only), BERT's map if any, unless tied the output table, and its bias if any.

    With `model.time_input` the final norm is adaptive: (C + 1) * 2 D = 258 D parameters.
    """
    table: Table = {"norm": _norm(model)} if model.norm_position == "pre" else {}
    if model.time_input and model.norm_position == "pre":
        table["adaptive"] = _adaptive(model, 1)
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


def count_fixed(table: Table) -> int:
    """Number of those parameters of a table that are no variables."""
    return sum(weight.size for weight in jax.tree.leaves(table, is_leaf=is_weight) if weight.is_fixed)


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
